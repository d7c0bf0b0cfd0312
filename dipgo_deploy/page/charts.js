"use strict";
// Says of each chart what lies under the pointer or the cursor. Without it the charts are pictures with tables beside them.
(() => {
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  document.body.append(tip);

  const hide = () => {
    tip.textContent = "";
    for (const cursor of document.querySelectorAll(".cursor")) cursor.style.visibility = "hidden";
  };

  const show = (cursor, chart, place, text) => {
    hide();
    const [x, y, width, height] = place;
    for (const [name, value] of Object.entries({ x, y, width, height })) cursor.setAttribute(name, value);
    cursor.style.visibility = "visible";
    tip.textContent = text;
    const box = cursor.getBoundingClientRect();
    const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + 8;
    const top = below + tip.offsetHeight > innerHeight ? box.top - tip.offsetHeight - 8 : below;
    tip.style.transform = `translate(${Math.max(8, left)}px, ${Math.max(8, top)}px)`;
  };

  // A grid: [x, y, width, height] of a cell, by row and column.
  const grid = (data) => ({
    first: [0, 0],
    at: (x, y) => [Math.floor((y - data.y) / data.height), Math.floor((x - data.x) / data.width)],
    has: ([row, column]) => row >= 0 && row < data.rows.length && column >= 0 && column < data.columns.length,
    move: ([row, column], down, right) => [row + down, column + right],
    place: ([row, column]) => [data.x + column * data.width, data.y + row * data.height, data.width, data.height],
    text: ([row, column]) => {
      const lines = [`${data.rows[row]}, ${data.columns[column]}`, data.states[data.cells[row][column]]];
      // Runs of columns with the same notes: first, last, notes.
      const run = (data.notes[row] || []).find(([first, last]) => first <= column && column <= last) || [];
      for (const note of run.slice(2)) lines.push(data.texts[note]);
      return lines.filter(Boolean).join("\n");
    },
  });

  // Marks in order, each [x, y, width, height, text].
  const marks = (data) => ({
    first: 0,
    at: (x, y) => data.marks.findLastIndex(([left, top, wide, tall]) =>
      x >= left && x < left + wide && y >= top && y < top + tall),
    has: (place) => place >= 0 && place < data.marks.length,
    move: (place, down, right) => place + down + right,
    place: (place) => data.marks[place].slice(0, 4),
    text: (place) => data.marks[place][4],
  });

  for (const script of document.querySelectorAll("script[data-chart]")) {
    const data = JSON.parse(script.textContent);
    const holder = document.getElementById(script.dataset.chart);
    const svg = holder.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const chart = data.marks ? marks(data) : grid(data);
    let current = null;
    const go = (place) => {
      if (!chart.has(place)) return false;
      current = place;
      show(cursor, chart, chart.place(place), chart.text(place));
      return true;
    };
    const pointed = (event) => {
      const box = svg.getBoundingClientRect();
      const [, , wide, tall] = svg.getAttribute("viewBox").split(" ").map(Number);
      const place = chart.at((event.clientX - box.left) * wide / box.width, (event.clientY - box.top) * tall / box.height);
      if (!go(place)) hide();
    };
    svg.addEventListener("pointermove", pointed);
    svg.addEventListener("pointerdown", pointed);
    svg.addEventListener("pointerleave", hide);
    holder.addEventListener("blur", hide);
    holder.addEventListener("focus", () => { if (holder.matches(":focus-visible")) go(current ?? chart.first); });
    holder.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { hide(); return; }
      const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (!steps) return;
      event.preventDefault();
      if (current === null) go(chart.first);
      else go(chart.move(current, ...steps));
      const [x, , width] = chart.place(current);
      const box = svg.getBoundingClientRect();
      const scale = box.width / Number(svg.getAttribute("viewBox").split(" ")[2]);
      if (x * scale < holder.scrollLeft) holder.scrollLeft = x * scale;
      if ((x + width) * scale > holder.scrollLeft + holder.clientWidth)
        holder.scrollLeft = (x + width) * scale - holder.clientWidth;
      show(cursor, chart, chart.place(current), chart.text(current));
    });
  }
})();
