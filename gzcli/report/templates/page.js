"use strict";
// A click on a column's head, or Enter and Space on it, sorts the rows; a second one turns them round.
for (const head of document.querySelectorAll("thead th")) {
  head.querySelector("button").addEventListener("click", () => {
    const first = head.dataset.first, now = head.getAttribute("aria-sort");
    const order = now === "none" ? first : now === "ascending" ? "descending" : "ascending";
    for (const other of head.parentNode.children) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", order);
    sort(head.closest("table").tBodies[0], head.cellIndex, order === "ascending" ? 1 : -1);
  });
}

// Cells without a number stay below those with one, whatever the order.
function sort(body, column, sign) {
  const key = row => {
    const cell = row.cells[column];
    return cell.dataset.value === undefined ? null : Number(cell.dataset.value);
  };
  const words = row => row.cells[column].innerText;
  const rows = [...body.rows];
  const counts = rows.some(row => key(row) !== null);
  rows.sort((a, b) => {
    const x = key(a), y = key(b);
    if (!counts) return sign * words(a).localeCompare(words(b), undefined, {numeric: true});
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x - y);
  });
  body.append(...rows);
}

// Paper shows what the page hides.
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
