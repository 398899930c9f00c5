"use strict";
// Tables of class "sortable" sort by a click on a column's head; without this script they stay as they are.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.title = "Sort by this column";
    button.setAttribute("aria-label", "Sort by " + head.innerText.trim().split(/\n+/, 2).join(", "));
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => {
        const cell = row.cells[column];
        const text = cell.dataset.value ?? cell.innerText.replaceAll(",", "").replace("−", "-");
        return text.trim() !== "" && !isNaN(text) ? Number(text) : text.trim();
      };
      const compare = (a, b) => {
        const [x, y] = [key(a), key(b)];
        // Numbers come before text (a gap, a failure) in both directions.
        if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;
        const order = typeof x === "number" ? x - y : x.localeCompare(y);
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
    });
  });
}
// The names at the top switch checkpoints off and on, wherever the page shows them side by side.
const names = [...document.querySelectorAll("[data-checkpoint]")];
for (const item of names.length > 1 ? names : []) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "toggle";
  button.title = "Hide or show this checkpoint";
  button.setAttribute("aria-pressed", "true");
  button.append(...item.childNodes);
  item.append(button);
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(shown));
    for (const part of document.querySelectorAll(`[data-c="${item.dataset.checkpoint}"]`)) {
      part.style.display = shown ? "" : "none";
    }
  });
}
// Strips of frames play as a film, one frame in the place of all.
for (const film of document.querySelectorAll("[data-film]")) {
  const frames = film.querySelectorAll("img");
  if (frames.length < 2) continue;
  const button = document.createElement("button");
  let timer = 0;
  let now = 0;
  const show = (place) => {
    frames[now].classList.remove("now");
    now = place % frames.length;
    frames[now].classList.add("now");
  };
  const stop = () => {
    clearInterval(timer);
    timer = 0;
    film.classList.remove("playing");
    button.textContent = "▶ Play";
  };
  button.type = "button";
  button.className = "play";
  button.addEventListener("click", () => {
    if (timer) return stop();
    film.classList.add("playing");
    button.textContent = "■ Stop";
    show(0);
    timer = setInterval(() => show(now + 1), 350);
  });
  stop();
  film.previousElementSibling.append(button);
}
// Print shows all that is folded.
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details:not([open])")) {
    fold.open = true;
    fold.dataset.printed = "";
  }
});
addEventListener("afterprint", () => {
  for (const fold of document.querySelectorAll("details[data-printed]")) {
    fold.open = false;
    delete fold.dataset.printed;
  }
});
