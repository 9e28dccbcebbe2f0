// Sorting and searching of the tables of chosen rows; everything else works without this script.
"use strict";
for (const frame of document.querySelectorAll(".rows")) {
  const body = frame.querySelector("tbody");
  const rows = [...body.rows];
  const tools = frame.querySelector(".tools");
  const search = document.createElement("input");
  const found = document.createElement("span");
  search.type = "search";
  search.placeholder = "Search these rows";
  search.setAttribute("aria-label", "Search these rows");
  found.setAttribute("role", "status");
  tools.append(search, found);
  const texts = rows.map((row) => row.textContent.toLowerCase());
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    rows.forEach((row, i) => {
      row.hidden = !words.every((word) => texts[i].includes(word));
      shown += row.hidden ? 0 : 1;
    });
    found.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  });
  const heads = [...frame.querySelectorAll("thead th")];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    const value = (row) => {
      const cell = row.cells[column];
      const number = Number(cell.dataset.v ?? cell.textContent);
      return Number.isNaN(number) ? cell.textContent : number;
    };
    button.addEventListener("click", () => {
      const now = head.getAttribute("aria-sort");
      const scores = rows[0]?.cells[column].dataset.v !== undefined;
      const down = now ? now === "ascending" : scores; // the best score first
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const sign = down ? -1 : 1;
      const order = (a, b) =>
        typeof a === "number" && typeof b === "number"
          ? a - b
          : String(a).localeCompare(String(b), "en", { numeric: true });
      body.append(...[...rows].sort((a, b) => sign * order(value(a), value(b))));
    });
  });
}
// A closed <details> prints nothing: open all for printing.
addEventListener("beforeprint", () => {
  for (const one of document.querySelectorAll("details")) one.open = true;
});
