// Formulas: every .math element holds TeX; KaTeX draws it, and punctuation after a formula stays on its line
document.addEventListener("DOMContentLoaded", () => document.querySelectorAll(".math").forEach(e => {
  const display = e.classList.contains("display"), tex = e.textContent;
  const rows = display && tex.includes("\\\\") && !tex.includes("\\begin");
  katex.render(rows ? `\\begin{gathered}${tex}\\end{gathered}` : tex, e, {displayMode: display, throwOnError: false});
  const next = e.nextSibling, mark = next && next.nodeType === 3 && next.data.match(/^[.,;:!?)\]]+/);
  if (display || !mark) return;
  const keep = document.createElement("span");
  keep.className = "nowrap";
  e.before(keep);
  keep.append(e, mark[0]);
  next.data = next.data.slice(mark[0].length);
}));
// The page that is open is in sight in a long list of contents
document.addEventListener("DOMContentLoaded", () => {
  const list = document.querySelector(".sidebar-scroll"), here = list && list.querySelector(".current-page");
  if (!here) return;
  const {top, bottom} = list.getBoundingClientRect(), at = here.getBoundingClientRect().top;
  if (at > bottom - 40) list.scrollTop += at - (top + bottom)/2;
});
