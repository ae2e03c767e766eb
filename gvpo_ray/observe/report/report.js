"use strict";
// The search over the completions, the numbers of tokens, and the look of the charts, which are drawn when they come into view.

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

for (const list of document.querySelectorAll(".coloured pre[tabindex]")) {
  const tokens = [...list.querySelectorAll("span")], said = list.nextElementSibling;
  let chosen = -1;
  const choose = (at) => {
    tokens[chosen]?.classList.remove("chosen");
    chosen = Math.max(0, Math.min(tokens.length - 1, at));
    tokens[chosen].classList.add("chosen");
    tokens[chosen].scrollIntoView({ block: "nearest" });
    said.textContent = `token ${chosen + 1} “${tokens[chosen].textContent}”: ${tokens[chosen].title}`;
  };
  list.addEventListener("click", ({ target }) => tokens.includes(target) && choose(tokens.indexOf(target)));
  list.addEventListener("keydown", (event) => {
    const places = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: tokens.length - 1 };
    if (!tokens.length || !(event.key in places)) return;
    event.preventDefault();
    choose(places[event.key]);
  });
}

const figures = JSON.parse(document.querySelector("#figures").textContent);
const plots = [...document.querySelectorAll(".plot")];
const isDark = matchMedia("(prefers-color-scheme: dark)");
const config = {
  displaylogo: false, responsive: true, showTips: false,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
};

/** A colour of the page's style, by its name; opacity from 0 to 1. */
function colour(name, opacity = 1) {
  const hex = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim().slice(1);
  const full = hex.length === 3 ? [...hex].map((digit) => digit + digit).join("") : hex;
  const [red, green, blue] = [0, 2, 4].map((at) => parseInt(full.slice(at, at + 2), 16));
  return `rgba(${red},${green},${blue},${opacity})`;
}

/** A trace in the page's colours. */
function styled(trace) {
  const { kind, colour: number, run } = trace.meta;
  const own = `c${number}`, dash = run && kind !== "faint" ? "dash" : "solid";
  const faint = document.body.className === "two" ? 0.25 : 0.4;
  switch (kind) {
    case "band": return { ...trace, line: { width: 0 }, fillcolor: colour(own, 0.15) };
    case "faint": return { ...trace, line: { width: 1, color: colour(own, faint) } };
    case "mean": return { ...trace, line: { width: 2.2, color: colour(own), dash } };
    case "line": return { ...trace, line: { width: 1.6, color: colour(own), dash },
      marker: { size: 6, color: colour(run ? "page" : own), line: { width: 1.6, color: colour(own) } } };
    case "heat": return { ...trace, showscale: false, ygap: 1, hoverongaps: false,
      colorscale: [[0, colour("c0", 0)], [0.001, colour("c0", 0.08)], [1, colour("c0")]] };
    default: {
      const mark = colour(kind === "calm" ? "faint" : "mark"), size = trace.yaxis ? 8 : 14;
      return { ...trace, marker: { symbol: "line-ns-open", size, color: mark, line: { width: 2, color: mark } } };
    }
  }
}

function layout(figure) {
  const [first, last] = figure.limits, margin = Math.max(1, last - first) * 0.01;
  const axis = { color: colour("faint"), gridcolor: colour("edge"), linecolor: colour("edge"), zeroline: false,
    tickfont: { size: 12 }, automargin: true };
  const range = figure.kind === "histogram" ? [first - 0.5, Math.max(last, first + 1) + 0.5]
    : [first - margin, Math.max(last, first + 1) + margin];
  const y = { ...axis, hoverformat: ".5~g", nticks: 6 };
  if (figure.rows) {
    Object.assign(y, { tickmode: "array", tickvals: figure.rows.map((_, i) => i), ticktext: figure.rows,
      range: [-0.5, figure.rows.length - 0.5], fixedrange: true });
  }
  return {
    height: figure.legend ? 270 : 230, margin: { l: 44, r: 8, t: 26, b: 28 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("text") },
    hovermode: figure.kind === "line" ? "x" : "closest",
    hoverlabel: { bgcolor: colour("page"), bordercolor: colour("faint"), font: { color: colour("text") }, namelength: 32,
      align: "left" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("faint"), activecolor: colour("c0") },
    showlegend: figure.legend, legend: { orientation: "h", x: 0, y: -0.14, yanchor: "top", font: { size: 12 } },
    xaxis: { ...axis, range, showgrid: false, hoverformat: ",.6~g", nticks: 7 },
    yaxis: y,
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
  };
}

function draw(plot) {
  const figure = figures[plot.dataset.figure];
  return Plotly.react(plot, figure.traces.map(styled), layout(figure), config);
}

const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    draw(target);
  }
}, { rootMargin: "300px" });
plots.forEach((plot) => seen.observe(plot));
isDark.addEventListener("change", () => plots.filter((plot) => plot.classList.contains("js-plotly-plot")).forEach(draw));
addEventListener("beforeprint", () => plots.forEach(draw));
