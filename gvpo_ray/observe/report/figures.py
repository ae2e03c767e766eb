"""The charts of a report are plotly figures, in plain JSON; the page's script gives them their look.

Plotly reads some HTML in texts (`<b>`, `<a href>`), so every text from outside goes through `plain`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo_ray.config.shown import mask
from gvpo_ray.observe.metrics import mean

Point = tuple[float, float]
"""Step and value."""
Event = Mapping[str, Any]
"""A line of events.jsonl: step, who, name, why."""
Figure = dict[str, Any]
"""A figure as JSON: title, name and text of its caption; kind, limits and traces for the script."""

NUM_COLUMNS = 500
"""Number of parts of the step axis; a line has at most two points in each."""
NUM_MARKS = 150
"""Number of parts of the step axis for events; those in the same part share a mark."""
NO_RECOVERY = ("run", "pool")
"""Values of `who` whose events are no recoveries: a run starts or stops, a pool grows or shrinks."""


def printable(text: str) -> str:
    """Mask secrets, and replace the characters that neither HTML nor UTF-8 can hold."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", mask(text))


def plain(text: object) -> str:
    """Escape text so that plotly shows it as it is."""
    return printable(str(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def shown(value: float) -> str:
    """Write a number with four digits that count, large ones in full."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def finite(value: Any) -> float | None:
    """Return the number, or None for what cannot be drawn: no number, not finite, or above 1e300."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else None


@dataclass(frozen=True)
class Line:
    """A Line holds the points of a line in a chart."""

    label: str
    """Distinguishes the lines of a run in one chart; "" where there is only one."""
    points: list[Point]
    spread: Mapping[float, float] = field(default_factory=dict)
    """Half the height of the band around the line, by step."""
    number: int = 0
    """Number of its run; lines of run 1 are dashed."""
    run: str = ""
    """Name of its run where two runs are compared."""


def in_order(label: str) -> tuple[float, str]:
    """Sort key of labels: bucket edges by size, other labels after them."""
    try:
        return float(label), ""
    except ValueError:
        return math.inf, label


def bucket(label: str, edges: Sequence[float]) -> str:
    """Name the range between an edge and the one before: 8 after 4 is "5–8"."""
    edge, _ = in_order(label)
    if edge not in edges and not (edges and label == "inf"):
        return label
    before = max((each for each in edges if each < edge), default=None)
    if before is None:
        return f"≤ {edge:g}" if edge else label
    if label == "inf":
        return f"> {before:g}"
    if all(float(each).is_integer() for each in edges if math.isfinite(each)) and min(edges) >= 0:
        return f"{edge:g}" if edge - before == 1 else f"{before + 1:g}–{edge:g}"
    return f"≤ {edge:g}"


def thin(points: Sequence[Point], first: float, last: float, num_columns: int) -> list[Point]:
    """Keep the smallest and the largest value of each column of the chart, and both ends of the line.

    The line through them covers what the line through all points covers, so no spike is lost. Few points are
    all kept.
    """
    if len(points) <= 2 * num_columns:
        return list(points)
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(int((point[0] - first) / (last - first) * num_columns), []).append(point)
    drawn = {points[0], points[-1]}
    for column in columns.values():
        drawn |= {min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])}
    return sorted(drawn)


def trend(points: Sequence[Point], num: int = 50) -> list[Point]:
    """Average the points over at most `num` runs of neighbours of the same length (the last is shorter)."""
    size = math.ceil(len(points) / num)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(mean([x for x, _ in part]), mean([y for _, y in part])) for part in parts]


def _trace(points: Sequence[Point], kind: str, colour: int, run: int, **more: Any) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [x for x, _ in points],
        "y": [float(f"{y:.6g}") for _, y in points],
        "meta": {"kind": kind, "colour": colour, "run": run},
        **more,
    }


def chart(
    title: str,
    name: str,
    text: str,
    lines: Sequence[Line],
    limits: Point,
    marks: Sequence[Sequence[Event]] = (),
    edges: Sequence[float] = (),
    smooth: bool = True,
) -> Figure:
    """Draw lines against the step.

    Args:
        title: of the chart.
        name: the metric's key in metrics.jsonl.
        text: the caption.
        lines: of all runs.
        limits: the first and the last step of the axis.
        marks: the events of each run that are marked below the lines.
        edges: of the buckets whose upper ends the labels are.
        smooth: draw a bold running mean over lines of more than 100 points.
    """
    labels = sorted({line.label for line in lines}, key=in_order)
    traces, last = [], []
    for line in lines:
        colour = labels.index(line.label) % 6 if len(labels) > 1 else line.number
        label = " ".join(part for part in (line.run, bucket(line.label, edges)) if part)
        drawn = thin(line.points, limits[0], max(limits[1], limits[0] + 1), NUM_COLUMNS)
        group = {"name": plain(label or title), "legendgroup": plain(label or title)}
        if line.spread:
            upper = [(x, y + line.spread.get(x, 0.0)) for x, y in drawn]
            lower = [(x, y - line.spread.get(x, 0.0)) for x, y in reversed(drawn)]
            band = {"fill": "toself", "hoverinfo": "skip", "showlegend": False, **group}
            traces.append(_trace(upper + lower, "band", colour, line.number, **band))
        is_faint = smooth and len(line.points) > 100
        mode = "lines+markers" if len(drawn) <= min(50, drawn[-1][0] - drawn[0][0] + 1) else "lines"
        kind = "faint" if is_faint else "line"
        shows = {"mode": mode, "showlegend": not is_faint}
        traces.append(_trace(drawn, kind, colour, line.number, **shows, **group))
        if is_faint:
            means = {"hoverinfo": "skip", **group}
            traces.append(_trace(trend(line.points), "mean", colour, line.number, **means))
        if len(labels) == 1:
            last.append({"colour": colour, "value": shown(line.points[-1][1])})
    beside: dict[str, Any] = {"yaxis": "y2", "name": "recoveries", "showlegend": False}
    traces += [
        _marks(events, limits, 0.97 if number else 0.03, number, **beside)
        for number, events in enumerate(marks)
        if events
    ]
    return _figure(title, name, text, "line", limits, traces, legend=len(lines) > 1, last=last)


def _figure(
    title: str, name: str, text: str, kind: str, limits: Point, traces: list[dict[str, Any]], **more: Any
) -> Figure:
    caption = {"title": title, "name": name, "text": text}
    return {**caption, "kind": kind, "limits": limits, "traces": traces, "legend": False, "last": [], **more}


def _marks(
    events: Iterable[Event], limits: Point, y: float, run: int = 0, kind: str = "mark", **more: Any
) -> dict[str, Any]:
    """Return the trace of some events at a height; those that would overlap share a mark."""
    first, last = limits
    width = max(last - first, 1) / NUM_MARKS
    marks: dict[int, list[tuple[float, str]]] = {}
    for event in events:
        step = finite(event.get("step"))
        x = last if step is None else min(max(step, first), last)
        text = (
            f"step {event.get('step', '?')}: {event.get('who', '?')} {event.get('name', '')}: "
            f"{event.get('why', '')}"
        )
        marks.setdefault(int((x - first) / width), []).append((x, _wrapped(text)))

    return {
        "type": "scatter",
        "mode": "markers",
        "x": [found[0][0] for found in marks.values()],
        "y": [y] * len(marks),
        "text": [
            "<br>".join(text for _, text in found[:4])
            + (f"<br>and {len(found) - 4} more" if len(found) > 4 else "")
            for found in marks.values()
        ],
        "hoverinfo": "text",
        "meta": {"kind": kind, "colour": 0, "run": run},
        **more,
    }


def _wrapped(text: str, width: int = 60) -> str:
    """Cut a long text and break it into lines, as plotly does not."""
    text = " ".join(printable(text).split())  # a secret is masked before a break may part it
    text = text if len(text) <= 200 else f"{text[:200]}…"
    return "<br>".join(plain(text[i : i + width]) for i in range(0, len(text), width))


def histogram(
    title: str, name: str, text: str, shares: Mapping[str, list[Point]], limits: Point, num_columns: int = 80
) -> Figure | None:
    """Draw shares over time: a row for each bucket between those ever used, a column for some steps.

    Args:
        title: of the chart.
        name: the metric's key in metrics.jsonl.
        text: the caption.
        shares: of each bucket by its upper edge, from the lowest to "inf".
        limits: the first and the last step of the axis.
        num_columns: largest number of columns; each shows the mean of its steps.

    Returns:
        The figure; None where no bucket was used.
    """
    used = [label for label, points in shares.items() if any(value for _, value in points)]
    if not used:
        return None
    keys = list(shares)
    keys = keys[keys.index(used[0]) : keys.index(used[-1]) + 1]
    rows = [bucket(key, [in_order(label)[0] for label in shares]) for key in keys]
    first, last = limits[0], max(limits[1], limits[0] + 1)
    num_columns = min(num_columns, int(last - first) + 1)
    width = (last - first + 1) / num_columns
    cells: dict[str, list[list[float]]] = {key: [[] for _ in range(num_columns)] for key in keys}
    for key in keys:
        for step, value in shares[key]:
            cells[key][min(num_columns - 1, int((step - first) / width))].append(value)
    heights = [[round(mean(cell), 6) if cell else None for cell in cells[key]] for key in keys]
    spans = [
        (math.ceil(first + i * width), math.ceil(first + (i + 1) * width) - 1) for i in range(num_columns)
    ]
    names = [f"step {a:g}" if a >= b else f"steps {a:g} to {b:g}, mean" for a, b in spans]
    newest = shares[keys[0]][-1][0] if shares[keys[0]] else limits[1]
    heat_map = {
        "type": "heatmap",
        "x": [first - 0.5 + (i + 0.5) * width for i in range(num_columns)],
        "y": list(range(len(keys))),
        "z": heights,
        "text": [[f"{span}<br>{plain(row)}" for span in names] for row in rows],
        "hovertemplate": "%{text}: %{z:.1%}<extra></extra>",
        "zmin": 0,
        "zmax": 1,
        "meta": {"kind": "heat", "colour": 0, "run": 0},
    }
    exact = [f"{dict(shares[key]).get(newest, 0):.4%}" for key in keys]
    return _figure(
        title,
        name,
        text,
        "histogram",
        limits,
        [heat_map],
        rows=[plain(row) for row in rows],
        newest=f"step {newest:g}, exactly",
        exact=list(zip(rows, exact, strict=True)),
    )


def lanes(events: Iterable[Event], limits: Point) -> Figure | None:
    """Draw every event as a mark in the lane of the part that it happened to; None without events."""
    by_who: dict[str, list[Event]] = {}
    for event in events:
        by_who.setdefault(str(event.get("who", "?")), []).append(event)
    if not by_who:
        return None
    names = sorted(by_who, reverse=True)
    traces = [
        _marks(by_who[who], limits, i, kind="calm" if who in NO_RECOVERY else "mark")
        for i, who in enumerate(names)
    ]
    rows = [plain(who if len(who) <= 12 else f"{who[:11]}…") for who in names]
    text = "what failed and was replaced (red), and when the run was started and stopped"
    return _figure("Events", "events.jsonl", text, "lanes", limits, traces, rows=rows)
