// How search results are ordered: what a heading says counts most, then headings that hold a word, then text;
// of pages that hold the same words those that show how to do something come first, and lists of names last
const first = {"00_start/how_do_i": 8, "00_start/": 5, "00_tutorials/": 4, "reference/": -6, "index": -2};
const bonus = page => (Object.entries(first).find(([k]) => page.startsWith(k)) || [0, 0])[1];
var Scorer = {
  score: ([page, title, anchor, about, score, file, kind]) => score + (kind === "title" ? 100 : 0) + bonus(page),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
