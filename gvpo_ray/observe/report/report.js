"use strict";
// What the page can do beyond being read: a search over the completions, and the numbers under the pointer. Text goes in as text only.

const box = document.querySelector("#search"), found = document.querySelector("#found");
const cases = [...document.querySelectorAll(".case")].map((element) => [element, element.textContent.toLowerCase()]);
const folds = [...document.querySelectorAll("#completions details")].map((element) => [element, element.open]);

function search() {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const [element, text] of cases) {
    element.hidden = !words.every((word) => text.includes(word));
    shown += !element.hidden;
  }
  for (const [element, wasOpen] of folds) {
    const any = element.querySelector(".case:not([hidden])") !== null;
    element.hidden = words.length > 0 && !any;
    element.open = words.length > 0 ? any : wasOpen;
  }
  found.textContent = words.length ? `${shown} of ${cases.length}` : `${cases.length} completions`;
}

function searchFragment() {
  const query = new URLSearchParams(location.hash.slice(1)).get("q");
  if (query === null) return;
  box.value = query;
  search();
  box.scrollIntoView();
}

if (box) {
  box.parentElement.hidden = false;
  box.addEventListener("input", () => {
    history.replaceState(null, "", `#${new URLSearchParams({ q: box.value })}`);
    search();
  });
  addEventListener("hashchange", searchFragment);
  search();
  searchFragment();
}

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
const parsed = new WeakMap(); // of a line that was pointed at once: its points in the picture

function points(line) {
  if (!parsed.has(line)) parsed.set(line, line.getAttribute("d").slice(1).split(" ").map((point) => point.split(",").map(Number)));
  return parsed.get(line);
}

/** The point of a line nearest to x; they are in order. */
function nearest(line, x) {
  const all = points(line);
  let low = 0, high = all.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (all[middle][0] < x) low = middle;
    else high = middle;
  }
  return Math.abs(all[low][0] - x) < Math.abs(all[high][0] - x) ? all[low] : all[high];
}

/** The picture holds heights to a thousandth: no more digits are shown than that gives. */
function value(number, unit) {
  const digits = Math.floor(-Math.log10(unit / 1000));
  if (digits < 0) return String(Math.round(number / 10 ** -digits) * 10 ** -digits);
  return String(Number(digits > 9 ? number.toPrecision(6) : number.toFixed(digits)));
}

function point(svg, event) {
  const [left, right, top, bottom, first, last, low, high] = svg.dataset.plot.split(" ").map(Number);
  const frame = svg.getBoundingClientRect(), x = ((event.clientX - frame.left) * svg.viewBox.baseVal.width) / frame.width;
  const lines = [...svg.querySelectorAll(".line")].map((line) => [line, nearest(line, x)]);
  if (!lines.length || x < left - 5 || x > right + 5) return leave(svg);
  const stepOf = ([x]) => Math.round(first + ((x - left) / (right - left)) * (last - first));
  const at = lines.map(([, point]) => point).reduce((a, b) => (Math.abs(a[0] - x) <= Math.abs(b[0] - x) ? a : b));
  const unit = (high - low) / (bottom - top);
  const rows = lines.map(([line, point]) => {
    const elsewhere = stepOf(point) === stepOf(at) ? "" : ` (step ${stepOf(point)})`;
    return `${line.dataset.label ? `${line.dataset.label}: ` : ""}${value(low + (bottom - point[1]) * unit, unit)}${elsewhere}`;
  });
  let cursor = svg.querySelector(".cursor");
  if (!cursor) svg.append((cursor = document.createElementNS("http://www.w3.org/2000/svg", "path")));
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("d", `M${at[0]} ${top}V${bottom}`);
  tip.textContent = [`step ${stepOf(at)}`, ...rows].join("\n");
  tip.hidden = false;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
  tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 10)}px`;
}

function leave(svg) {
  tip.hidden = true;
  svg.querySelector(".cursor")?.remove();
}

for (const svg of document.querySelectorAll("svg[data-plot]")) {
  for (const kind of ["pointerdown", "pointermove"]) svg.addEventListener(kind, (event) => point(svg, event));
  svg.addEventListener("pointerleave", () => leave(svg));
}
