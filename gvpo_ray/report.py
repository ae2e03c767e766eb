"""`gvpo-ray report RUN_DIR`: one self-contained HTML page per run, without a script and without the network.

    RUN_DIR/metrics.jsonl     charts against the step; first and last value of every metric
    RUN_DIR/events.jsonl      {"time", "step", "who", "name", "why"} per line: what failed and was replaced, a mark in every chart.
                              who "run" (started, stopped) is no recovery and only listed
    RUN_DIR/config.yaml       the resolved config
    RUN_DIR/evaluations/      best and worst completions of the last evaluation of each set

Only metrics.jsonl must be there. Everything that a model, a data set or a config wrote goes through `_text`: it is shown, never obeyed.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from gvpo_ray import groups
from gvpo_ray.config import ConfigError
from gvpo_ray.metrics import mean

Point = tuple[float, float]
"""Step and value."""

CHARTS = {
    "reward/mean": "over the verifiable completions of the step's batch",
    "eval/<name>/pass@1": "share of right completions, mean over the held-out prompts",
    "loss": "over all mini-batches of the step",
    "gvpo/residual_var": "what of the rewards' variance the policy does not explain yet",
    "policy/kl_ref": "distance of the policy from its reference",
    "staleness/mean": "steps between the oldest weights that wrote a completion and the step's start",
    "tokens/trained / time/step": "completion tokens trained per second",
    "time/wait_for_groups / time/step": "share of the step that the learner had no batch",
}
"""What is drawn, and what it means. A name with " / " is a quotient of two metrics; eval/<name> stands for every set."""
MAX_POINTS = 1000
MAX_CHARACTERS = 4000
NUM_EXAMPLES = 3
LEFT, RIGHT, TOP, BOTTOM = 62, 612, 8, 176  # of the plot in a chart of 640 x 200


def write(run_dir: str | Path) -> Path:
    """Write RUN_DIR/report.html from what the run has written so far; returns its path.

    Raises:
        ConfigError: not the directory of a run, or it cannot be written.
    """
    path = Path(run_dir)
    if not (path / "metrics.jsonl").is_file():
        raise ConfigError(f"{run_dir}: no metrics.jsonl: not the directory of a run")
    part = path / ".report.html.part"
    try:
        part.write_text(_page(path), encoding="utf-8")
        part.replace(path / "report.html")
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot write report.html: {error.strerror}") from error
    return path / "report.html"


def _page(path: Path) -> str:
    lines = [line for line in _json_lines(path / "metrics.jsonl") if _number(line.get("step")) is not None]
    events = _json_lines(path / "events.jsonl")
    recoveries = [event for event in events if event.get("who") != "run"]
    config = (path / "config.yaml").read_text(errors="replace") if (path / "config.yaml").is_file() else ""
    steps = [line["step"] for line in lines]
    limits = min(steps, default=0), max(steps, default=1)
    charts = [_chart(name, what, points, limits, recoveries) for name, what, points in _charted(lines)]
    name = _text(path.resolve().name)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}</title><style>{STYLE}</style></head><body>
<h1>{name}</h1><p>{_text(_state(lines, events, config))}</p>
<div class="charts">{"".join(charts) or "<p>No step is trained yet.</p>"}</div>
<h2>Recoveries</h2>{_recoveries(events, recoveries)}
<h2>Metrics</h2><div class="scroll">{_table(("metric", "first", "at step", "last", "at step"), _first_and_last(lines))}</div>
<h2>Config</h2>{f"<details><summary>config.yaml</summary><pre>{_text(config)}</pre></details>" if config else "<p>No config.yaml.</p>"}
<h2>Completions of the last evaluation</h2>{_examples(path / "evaluations") or "<p>No evaluation.</p>"}
</body></html>
"""


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may not be there; the last one of a killed writer is left out."""
    lines = []
    for text in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def _number(value: Any) -> float | None:
    """None for what cannot be drawn: no number, not finite, or so large that differences overflow."""
    return value if isinstance(value, (int, float)) and abs(value) < 1e300 else None


def _text(value: object) -> str:
    """Text for the page. Characters that neither HTML nor UTF-8 can hold are replaced."""
    return html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value)))


def _show(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def _state(lines: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], config: str) -> str:
    """Steps trained, and what became of the run as far as its directory tells: a killed one cannot say so."""
    trained = max((line["step"] for line in lines if "loss" in line), default=0)
    try:
        data = yaml.safe_load(config)
    except yaml.YAMLError:
        data = None
    num_steps = data.get("num_steps") if isinstance(data, dict) else None
    last = next((event.get("name") for event in reversed(events) if event.get("who") == "run"), None)
    if isinstance(num_steps, int) and trained >= num_steps:
        state = "complete"
    else:
        state = {"started": "running, or killed", "stopped": "stopped before its end"}.get(str(last), "not complete")
    return f"{trained} of {num_steps} steps trained: {state}" if num_steps is not None else f"{trained} steps trained: {state}"


def _charted(lines: Sequence[Mapping[str, Any]]) -> Iterable[tuple[str, str, list[Point]]]:
    """Name, meaning and points of each chart that has any."""
    evaluations = sorted({key for line in lines for key in line if key.startswith("eval/") and key.endswith("/pass@1")})
    for chart, what in CHARTS.items():
        for name in evaluations if chart == "eval/<name>/pass@1" else [chart]:
            if points := _points(lines, *(name.split(" / ") if name == chart else [name])):
                yield name, what, points


def _points(lines: Sequence[Mapping[str, Any]], name: str, divisor: str | None = None) -> list[Point]:
    """A metric, or the quotient of two, by step; of a step that was written twice, the later."""
    points = {}
    for line in lines:
        value, unit = _number(line.get(name)), 1 if divisor is None else _number(line.get(divisor))
        if value is not None and unit and _number(value / unit) is not None:
            points[line["step"]] = value / unit
    return sorted(points.items())


def thin(points: Sequence[Point], num: int = MAX_POINTS) -> list[Point]:
    """At most `num` points: means over buckets of neighbours, all of one size but the last."""
    size = max(1, math.ceil(len(points) / num))
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [(mean([x for x, _ in bucket]), mean([y for _, y in bucket])) for bucket in buckets]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Some four round numbers from low to high."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(1, step) if whole else step
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _chart(name: str, what: str, points: list[Point], limits: Point, recoveries: Sequence[Mapping[str, Any]]) -> str:
    """One metric against the step; every recovery is a vertical mark that says what happened when it is pointed at."""
    drawn = thin(points)
    first, last = limits[0], max(limits[1], limits[0] + 1)
    low, high = min(y for _, y in drawn), max(y for _, y in drawn)
    margin = (high - low) / 20
    if margin <= 1e-9 * max(abs(low), abs(high), 1e-12):  # constant: it needs a height all the same
        margin = abs(high) / 10 if abs(high) > 1e-12 else 1.0
    low, high = low - margin, high + margin

    def at(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (min(max(x, first), last) - first) / (last - first), 1)

    def up(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (y - low) / (high - low), 1)

    parts = [f'<path class="grid" d="M{LEFT} {up(y)}H{RIGHT}"/><text x="{LEFT - 6}" y="{up(y) + 4}">{y:,.6g}</text>' for y in _ticks(low, high)]
    parts += [f'<text class="step" x="{at(x)}" y="{BOTTOM + 18}">{x:,.0f}</text>' for x in _ticks(first, last, whole=True)]
    marks: dict[float, list[str]] = {}
    for event in recoveries:  # those that would lie on one another share a mark
        step = _number(event.get("step"))
        marks.setdefault(round(at(last if step is None else step)), []).append(
            f"step {event.get('step', '?')}: {event.get('who', '?')} {event.get('name', '')}: {event.get('why', '')}"
        )
    for x, stories in marks.items():
        more = [f"and {len(stories) - 8} more"] if len(stories) > 8 else []
        title, line = _text("\n".join(stories[:8] + more)), f"M{x} {TOP}V{BOTTOM}"
        parts.append(f'<g class="mark"><title>{title}</title><path class="hit" d="{line}"/><path d="{line}"/></g>')
    parts.append(f'<polyline points="{" ".join(f"{at(x)},{up(y)}" for x, y in drawn)}"/>')
    if name.startswith("eval/") or len(drawn) == 1:
        parts += [f'<circle cx="{at(x)}" cy="{up(y)}" r="3.5"><title>step {_show(x)}: {_show(y)}</title></circle>' for x, y in drawn]
    head = f"<figcaption><b>{_text(name)}</b> <span>{_show(points[-1][1])}</span><br><small>{_text(what)}</small></figcaption>"
    return f'<figure>{head}<svg viewBox="0 0 640 200" role="img" aria-label="{_text(name)}">{"".join(parts)}</svg></figure>'


def _recoveries(events: Sequence[Mapping[str, Any]], recoveries: Sequence[Mapping[str, Any]]) -> str:
    """How many of each kind, and all that happened in the order of the file."""
    counts = Counter(str(event.get("who", "?")) for event in recoveries)
    head = ", ".join(f"{who} {count}" for who, count in sorted(counts.items()))
    rows = [(_when(event.get("time")), *(event.get(key, "") for key in ("step", "who", "name", "why"))) for event in events]
    table = f'<div class="scroll">{_table(("time", "step", "who", "name", "why"), rows)}</div>' if events else ""
    return f"<p>{len(recoveries)} recoveries{_text(f': {head}') if head else ''}</p>{table}"


def _when(time: Any) -> str:
    seconds = _number(time)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC" if seconds is not None and 0 <= seconds < 1e11 else ""


def _first_and_last(lines: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, Any, str, Any]]:
    rows = []
    for name in sorted({name for line in lines for name in line} - {"step"}):
        if points := _points(lines, name):
            rows.append((name, _show(points[0][1]), points[0][0], _show(points[-1][1]), points[-1][0]))
    return rows


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr></thead><tbody>{body}</tbody></table>"


def _examples(folder: Path) -> str:
    """Of each held-out set's last evaluation, completions with the highest and the lowest rewards."""
    newest: dict[str, tuple[int, Path]] = {}
    for file in sorted(folder.glob("*-step-*.arrow")):
        name, _, number = file.stem.rpartition("-step-")
        if number.isdecimal():
            newest[name] = max(newest.get(name, (-1, file)), (int(number), file))
    parts = []
    for name, (step, file) in newest.items():
        parts.append(f"<h3>{_text(name)}, step {step}</h3>")
        try:
            rows = list(groups.rows(groups.validate(groups.load(file), ("prompt", "answer", "completions", "rewards"))))
        except groups.GroupError as error:  # its writer was killed, or is at it
            parts.append(f"<p>{_text(error)}</p>")
            continue
        best, worst = _extremes(rows)
        for title, cases in (("best", best), ("worst", worst)):
            parts += [f"<h4>{title}: reward {_show(reward)}</h4>{_example(rows[i], j)}" for reward, i, j in cases]
        if not best:
            parts.append("<p>No completion has a reward.</p>")
    return "".join(parts)


def _extremes(rows: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[float, int, int]], list[tuple[float, int, int]]]:
    """(reward, prompt, completion) of the best and of the worst, one per prompt in each; none is in both."""
    scored = [[(reward, i, j) for j, reward in enumerate(row["rewards"]) if _number(reward) is not None] for i, row in enumerate(rows)]
    best = sorted((max(group, key=lambda case: case[0]) for group in scored if group), key=lambda case: -case[0])[:NUM_EXAMPLES]
    left = [[case for case in group if case not in best] for group in scored]
    return best, sorted((min(group, key=lambda case: case[0]) for group in left if group), key=lambda case: case[0])[:NUM_EXAMPLES]


def _example(row: Mapping[str, Any], completion: int) -> str:
    def cut(value: object) -> str:
        text = str(value)
        return _text(text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} … ({len(text):,} characters)")

    prompt, written, answer = (cut(value) for value in (row["prompt"], row["completions"][completion], row["answer"]))
    return f'<pre>{prompt}</pre><pre class="completion">{written}</pre><p><small>answer: {answer}</small></p>'


STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --faint: #667; --edge: #d8dde3; --box: #f5f7f9; --line: #1f6feb; --mark: #c2410c }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171b; --text: #e4e7eb; --faint: #9aa3ad; --edge: #343a42; --box: #1d2127; --line: #6cb0ff; --mark: #ff9d5c }
}
body { margin: 2rem auto; padding: 0 1rem; max-width: 84rem; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem }
figure { margin: 0; min-width: 0 } figcaption span { float: right; font-variant-numeric: tabular-nums } small, th { color: var(--faint) }
svg { display: block; width: 100% }
svg text { fill: var(--faint); font-size: 12px; text-anchor: end } svg text.step { text-anchor: middle }
polyline { fill: none; stroke: var(--line); stroke-width: 1.5; stroke-linejoin: round }
circle { fill: var(--line) } .grid { stroke: var(--edge) }
.mark path { stroke: var(--mark); stroke-width: 1.5; stroke-dasharray: 4 3 }
.mark path.hit { stroke: transparent; stroke-width: 9; stroke-dasharray: none }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .2rem 1.2rem .2rem 0; text-align: left; vertical-align: top }
td { border-top: 1px solid var(--edge); overflow-wrap: anywhere; white-space: pre-wrap }
.scroll { max-height: 32rem; overflow: auto }
pre { background: var(--box); padding: .6rem .8rem; overflow-wrap: anywhere; white-space: pre-wrap }
pre.completion { border-left: 3px solid var(--line) }
"""
