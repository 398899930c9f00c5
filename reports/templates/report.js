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
        const order = typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true });
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
// A click on a patch turns the map beside each copy of that picture into the similarity to the patch.
const RAMP = [[24, 15, 62], [59, 60, 140], [32, 130, 142], [94, 201, 98], [253, 231, 37]];
const SIDE = 160;
const ramp = (value) => {
  const place = Math.min(Math.max(value, 0), 1) * (RAMP.length - 1);
  const low = Math.min(Math.floor(place), RAMP.length - 2);
  return RAMP[low].map((c, k) => Math.round(c + (place - low) * (RAMP[low + 1][k] - c)));
};
const cosinesTo = (picture, patch, patches) => {
  const steps = atob(picture.dataset.similar);
  const [low, high] = picture.dataset.range.split(" ").map(Number);
  return Array.from({ length: patches }, (_, other) => {
    if (other === patch) return 1;
    const [i, j] = patch < other ? [patch, other] : [other, patch];
    const place = i * (patches - 1) - (i * (i - 1)) / 2 + j - i - 1;
    return low + ((high - low) * steps.charCodeAt(place)) / 255;
  });
};
const paint = (picture, map, y, x) => {
  const [rows, columns] = picture.dataset.grid.split(" ").map(Number);
  const [row, column] = [Math.floor(y * rows), Math.floor(x * columns)];
  const cosines = cosinesTo(picture, row * columns + column, rows * columns);
  const others = cosines.filter((_, i) => i !== row * columns + column);
  const [low, high] = [Math.min(...others), Math.max(...others)];
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [SIDE, SIDE];
  const pen = canvas.getContext("2d");
  const edge = (place, count) => Math.round((place * SIDE) / count);
  const box = (r, c) => [
    edge(c, columns), edge(r, rows), edge(c + 1, columns) - edge(c, columns), edge(r + 1, rows) - edge(r, rows),
  ];
  cosines.forEach((value, i) => {
    pen.fillStyle = `rgb(${ramp((value - low) / Math.max(high - low, 1e-12))})`;
    pen.fillRect(...box(Math.floor(i / columns), i % columns));
  });
  pen.strokeStyle = "rgb(255, 40, 40)";
  pen.lineWidth = 2;
  pen.strokeRect(...box(row, column));
  map.src = canvas.toDataURL();
  const digits = high - low < 0.02 ? 5 : 2;
  map.title = `cosines from ${low.toFixed(digits)} (dark) to ${high.toFixed(digits)} (yellow)`;
};
for (const gallery of document.querySelectorAll(".gallery")) {
  const pictures = [...gallery.querySelectorAll("img[data-similar]")];
  if (!pictures.length) continue;
  const maps = new Map(pictures.map((picture) => [picture, picture.nextElementSibling]));
  const components = new Map(pictures.map((picture) => [picture, maps.get(picture).src]));
  const hint = document.createElement("p");
  hint.textContent = "Click a patch of a picture, or go to it with the arrow keys, for its similarity to all patches "
    + "of the picture under every checkpoint. Escape brings the components back.";
  gallery.querySelector("figcaption").append(hint);
  const show = (place, y, x) => {
    for (const picture of pictures) {
      if (picture.dataset.place === place) paint(picture, maps.get(picture), y, x);
    }
  };
  for (const picture of pictures) {
    const [rows, columns] = picture.dataset.grid.split(" ").map(Number);
    let [y, x] = [0.5, 0.5];
    picture.tabIndex = 0;
    picture.addEventListener("click", (event) => {
      const frame = picture.getBoundingClientRect();
      y = Math.min(Math.max((event.clientY - frame.top) / frame.height, 0), 0.9999);
      x = Math.min(Math.max((event.clientX - frame.left) / frame.width, 0), 0.9999);
      show(picture.dataset.place, y, x);
    });
    picture.addEventListener("keydown", (event) => {
      const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (event.key === "Escape") {
        for (const [one, map] of maps) [map.src, map.title] = [components.get(one), ""];
      } else if (step) {
        event.preventDefault();
        y = (Math.min(Math.max(Math.floor(y * rows) + step[0], 0), rows - 1) + 0.5) / rows;
        x = (Math.min(Math.max(Math.floor(x * columns) + step[1], 0), columns - 1) + 0.5) / columns;
        show(picture.dataset.place, y, x);
      }
    });
  }
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
