// Tables that a click on a head sorts: by numbers (data-value), or by text.
"use strict";
(() => {
  const number = (cell) => cell.dataset.value === undefined || cell.dataset.value === "" ? null : Number(cell.dataset.value);
  const compare = (column, up) => (a, b) => {
    const [one, other] = [a, b].map((row) => row.cells[column]), [x, y] = [one, other].map(number);
    if (x !== null && y !== null) return up ? x - y : y - x;
    if (x !== null || y !== null) return x === null ? 1 : -1;  // what was not measured is last
    return (up ? 1 : -1) * one.textContent.localeCompare(other.textContent, "en", {numeric: true});
  };
  document.addEventListener("click", (event) => {
    const head = event.target.closest("table.sortable thead th");
    if (!head) return;
    const heads = [...head.parentNode.cells], body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort(compare(heads.indexOf(head), up)));
  });
})();
