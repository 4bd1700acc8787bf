"use strict";
// Sort, filter and compare the rows; all three are in the address, so that a page that is read again keeps them.
const COLORS = ["#3b82f6", "#e8710a", "#1fa463", "#d93f87", "#8b5cf6", "#a0801a", "#0e9aa7", "#e5484d"];
const table = document.querySelector("table"), body = table.tBodies[0], box = document.querySelector("input[type=search]");
const heads = [...table.querySelectorAll("th[data-key]")], written = [...body.rows];
const state = new URLSearchParams(location.hash.slice(1));
const picked = () => (state.get("show") || "").split(",").filter(id => document.getElementById(id));
let typed = 0;

function set(name, value) {
  if (value) state.set(name, value); else state.delete(name);
  history.replaceState(null, "", "#" + state);
}

function sort() {
  const key = (state.get("sort") || "").replace(/^-/, ""), sign = (state.get("sort") || "").startsWith("-") ? -1 : 1;
  const column = heads.find(head => head.dataset.key === key);
  for (const head of heads) head.ariaSort = head !== column ? null : sign > 0 ? "ascending" : "descending";
  const rows = [...written];
  if (column) {
    const at = row => row.cells[column.cellIndex].dataset.v ?? "";
    rows.sort((a, b) => {
      const [x, y] = [at(a), at(b)];
      if (x === "" || y === "") return (x === "") - (y === "");  // what a run does not have is last both ways
      return sign * (column.classList.contains("text") ? x.localeCompare(y) : x - y);
    });
  }
  body.append(...rows);
}

function filter() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of written) {
    row.hidden = !words.every(word => row.dataset.text.includes(word));
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent = words.length ? `${shown} of ${written.length} shown` : "";
}

function element(name, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(+at.toPrecision(12));
  return found;
}

function compare() {
  const panel = document.getElementById("compare"), runs = picked().map(id => document.getElementById(id));
  for (const row of written) row.querySelector("input").checked = runs.includes(row);
  const curves = runs.map(row => JSON.parse(row.dataset.points)).map(points => points.length ? points : [[0, NaN]]);
  const all = curves.flat().filter(([, loss]) => loss === loss);
  panel.hidden = runs.length === 0;
  if (!runs.length) return;
  const [width, height, left, right, top, bottom] = [1200, 260, 52, 12, 8, 34], svg = element("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "validation loss over steps of the ticked runs"});
  const last = Math.max(1, ...all.map(([step]) => step)), low = Math.min(...all.map(([, loss]) => loss));
  // without the steep fall of the first fifth
  let high = Math.max(...curves.map(points => points[Math.floor(points.length / 5)][1]).filter(loss => loss === loss));
  if (!(high > low)) high = low + 1;
  const x = step => left + (width - left - right) * step / last;
  const y = loss => top + (height - top - bottom) * (high - Math.min(loss, high)) / (high - low);
  for (const loss of all.length ? ticks(low, high, 5) : []) {
    svg.append(element("line", {x1: left, x2: width - right, y1: y(loss), y2: y(loss)}));
    svg.append(element("text", {x: left - 6, y: y(loss) + 4, "text-anchor": "end"}, loss));
  }
  for (const step of ticks(0, last, 8)) {
    svg.append(element("text", {x: x(step), y: height - 18, "text-anchor": "middle"}, step.toLocaleString("en")));
  }
  svg.append(element("text", {x: (left + width) / 2, y: height - 3, "text-anchor": "middle"}, "step"));
  const list = document.createElement("ul");
  curves.forEach((points, n) => {
    const color = COLORS[n % COLORS.length], dash = ["", "6 3", "2 3"][Math.floor(n / COLORS.length) % 3];
    const at = points.filter(([, loss]) => loss === loss).map(([step, loss]) => [x(step), y(loss)]);
    svg.append(element("polyline", {points: at.join(" "), stroke: color, "stroke-width": 1.8, "stroke-dasharray": dash}));
    for (const [cx, cy] of at.slice(-1)) svg.append(element("circle", {cx, cy, r: 3, fill: color}));
    const item = document.createElement("li"), end = points.at(-1)[1];
    item.style.setProperty("--color", color);
    item.textContent = `${runs[n].dataset.name}: ${end === end ? end.toFixed(4) : "no evaluation yet"}`;
    list.append(item);
  });
  panel.replaceChildren("Validation loss of the ticked runs", svg, list);
}

for (const head of heads) head.firstElementChild.addEventListener("click", () => {
  const now = state.get("sort"), key = head.dataset.key;
  set("sort", now === key ? `-${key}` : now === `-${key}` ? "" : key);
  sort();
});
box.addEventListener("input", () => { typed = Date.now(); set("filter", box.value); filter(); });
body.addEventListener("change", event => {
  const id = event.target.closest("tr").id, others = picked().filter(other => other !== id);
  set("show", (event.target.checked ? [...others, id] : others).join(","));
  compare();
});

function ago(seconds) {
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (seconds >= 2 * size) return `${Math.round(seconds / size)} ${unit}`;
  }
  return `${Math.max(0, Math.round(seconds))} s`;
}

for (const cell of body.querySelectorAll(".sign")) {
  cell.title = cell.textContent;
  cell.textContent = ago(Date.now() / 1000 - cell.dataset.v);
}

const note = document.getElementById("written"), seconds = +document.body.dataset.every;
function age() {
  const late = (Date.now() / 1000 - note.dataset.v);
  note.classList.toggle("late", late > 10 * seconds);
  if (late > 10 * seconds) note.textContent = `${note.dataset.text}, and not since: is --watch still running?`;
}

box.value = state.get("filter") || "";
sort(); filter(); compare();
if (sessionStorage.getItem("typing")) {
  box.focus();
  box.selectionStart = box.value.length;
}
if (seconds) {
  age();
  setInterval(() => {
    if (Date.now() - typed < 3000) return;
    sessionStorage.setItem("typing", document.activeElement === box ? "yes" : "");
    location.reload();
  }, 1000 * seconds);
}
