// How search results are ordered: what a heading says counts most, then headings that hold a word, then text
var Scorer = {
  score: ([page, title, anchor, about, score, file, kind]) => score + (kind === "title" ? 100 : 0),
  objNameMatch: 11, objPartialMatch: 6, objPrio: {0: 15, 1: 5, 2: -5}, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
