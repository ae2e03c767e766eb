"""The pictures of a report: numbers of a run as inline SVG, without a script. They know neither files nor
what a metric means.

Everything that comes from outside goes through `escaped`.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gvpo_ray.observe.metrics import mean

Point = tuple[float, float]
"""Step and value."""
Event = Mapping[str, Any]
"""step, who, name, why."""
LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 58, 462, 8, 176, 480, 200
"""Of the plot in a picture, and of the picture."""
MARK = 3
"""Marks are not nearer to each other."""
NO_RECOVERY = ("run", "pool")
"""Whose events are no recoveries: a run is started or stopped, a pool grows or shrinks."""


def escaped(value: object) -> str:
    """Text for the page. Characters that neither HTML nor UTF-8 can hold are replaced."""
    return html.escape(
        re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))
    )


def shown(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e12 else f"{value:.4g}"


def _tick(value: float) -> str:
    """Short, for an axis."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 10 * unit <= abs(value) < 1e12 or unit == 1e6 <= abs(value) < 1e9:
            return f"{value / unit:.6g}{letter}"
    return f"{value:.6g}"


def html_table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "numbers", above: str = ""
) -> str:
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    heads = "".join(f"<th>{escaped(cell)}</th>" for cell in head)
    return (
        '<div class="scroll"><table '
        f'class="{kind}"><thead>{above}<tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def finite(value: Any) -> float | None:
    """None for what cannot be drawn: no number, not finite, or so large that differences overflow."""
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else None


@dataclass(frozen=True)
class Line:
    """Of a chart."""

    label: str
    """Tells it from the others of its run; "" where there is but one."""
    points: list[Point]
    spread: Mapping[float, float] = field(default_factory=dict)
    """Half the height of a band, by step."""
    number: int = 0
    """Of its run: the second's lines are dashed."""
    run: str = ""
    """Named where there are two."""


def in_order(label: str) -> tuple[float, str]:
    """To sort by: the edges of buckets by their size, other names after them."""
    try:
        return float(label), ""
    except ValueError:
        return math.inf, label


def bucket(label: str, edges: Sequence[float]) -> str:
    """What lies between an edge and the one before: 8 after 4 is "5–8"."""
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
    """The points with the smallest and the largest value in each column of the picture, and the first and the
    last of all.

    A line through them covers what a line through all points would: no spike is lost. Few points are all
    kept.
    """
    if len(points) <= 2 * num_columns:
        return list(points)
    columns: dict[int, list[Point]] = {}
    for point in points:
        columns.setdefault(int((point[0] - first) / (last - first) * num_columns), []).append(point)
    kept = {points[0], points[-1]}
    for column in columns.values():
        kept |= {min(column, key=lambda point: point[1]), max(column, key=lambda point: point[1])}
    return sorted(kept)


def trend(points: Sequence[Point], num: int = 50) -> list[Point]:
    """At most `num` means over neighbours, all of as many but the last."""
    size = math.ceil(len(points) / num)
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [(mean([x for x, _ in each]), mean([y for _, y in each])) for each in buckets]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Two to six round numbers from low to high."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    step = max(1, step) if whole else step
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


class Plot:
    """Where steps and values lie in a picture, and the frame that they lie in."""

    def __init__(self, limits: Point, low: float, high: float, right: int = RIGHT) -> None:
        self.first, self.last, self.right = limits[0], max(limits[1], limits[0] + 1), right
        margin = (high - low) / 20
        if margin <= 1e-9 * max(abs(low), abs(high), 1e-12):  # constant: it needs a height all the same
            margin = abs(high) / 10 if abs(high) > 1e-12 else 1.0
        self.low, self.high = low - margin, high + margin

    def x(self, step: float) -> float:
        return LEFT + (self.right - LEFT) * (min(max(step, self.first), self.last) - self.first) / (
            self.last - self.first
        )

    def y(self, value: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (value - self.low) / (self.high - self.low)

    def path(self, points: Iterable[Point]) -> str:
        """To a hundredth, heights to a thousandth: of a run of up to 30,000 steps report.js reads the exact
        step from it.
        """
        return "M" + " ".join(f"{self.x(x):.5g},{self.y(y):.6g}" for x, y in points)

    def steps(self) -> str:
        """The labels of the axis."""
        ticks = _ticks(self.first, self.last, whole=True)
        return "".join(
            f'<text class="step" x="{self.x(x):.1f}" y="{BOTTOM + 20}">{_tick(x)}</text>' for x in ticks
        )

    def values(self) -> str:
        ticks = [(round(self.y(y), 1), _tick(y)) for y in _ticks(self.low, self.high)]
        return "".join(
            f'<path class="grid" d="M{LEFT} {y}H{self.right}"/><text x="{LEFT - 6}" '
            f'y="{y + 4:.1f}">{label}</text>'
            for y, label in ticks
        )

    def marks(self, events: Iterable[Event], top: float, bottom: float, kind: str = "") -> str:
        """What happened, as upright marks that say it when they are pointed at; those that would lie on one
        another share a mark.
        """
        marks: dict[int, list[tuple[float, str]]] = {}
        for event in events:
            step = finite(event.get("step"))
            x = self.x(self.last if step is None else step)
            story = (
                f"step {event.get('step', '?')}: {event.get('who', '?')} {event.get('name', '')}: "
                f"{event.get('why', '')}"
            )
            marks.setdefault(int(x / MARK), []).append((x, story))
        parts = []
        for stories in marks.values():
            more = [f"and {len(stories) - 4} more"] if len(stories) > 4 else []
            title = escaped(
                "\n".join(
                    [story if len(story) <= 200 else f"{story[:200]}…" for _, story in stories[:4]] + more
                )
            )
            line = f"M{stories[0][0]:.4g} {top:g}V{bottom:g}"
            parts.append(
                f'<g class="mark {kind}"><title>{title}</title><path class="hit" d="{line}"/><path '
                f'd="{line}"/></g>'
            )
        return "".join(parts)


def _figure(name: str, what: str, content: str, last: str = "", data: str = "", below: str = "") -> str:
    head = f"<figcaption>{last}<b>{escaped(name)}</b><br><small>{escaped(what)}</small></figcaption>"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(name)}"{data}>{content}</svg>'
    return f"<figure>{head}{svg}{below}</figure>"


def chart(
    name: str,
    what: str,
    lines: Sequence[Line],
    limits: Point,
    marks: Sequence[Sequence[Event]] = (),
    edges: Sequence[float] = (),
    smooth: bool = True,
) -> str:
    """Lines against the step, which goes from the one of `limits` to the other.

    marks: of each run, what is marked beside the plot. edges: of the buckets that labels are the upper ends
    of. smooth: with their running mean.
    """
    labels = sorted({line.label for line in lines}, key=in_order)
    many = labels != [""]
    right = RIGHT - 94 if many else RIGHT
    heights = [
        y + sign * line.spread.get(x, 0.0)
        for line in lines
        for x, y in line.points
        for sign in ((1, -1) if line.spread else (0,))
    ]
    plot = Plot(limits, min(heights), max(heights), right)
    parts, ends, last = [plot.values(), plot.steps()], {}, ""
    for number, events in enumerate(marks):  # below the plot; the second's above
        parts.append(plot.marks(events, *((TOP - 7, TOP) if number else (BOTTOM, BOTTOM + 7))))
    for line in lines:
        colour = labels.index(line.label) % 6 if many else line.number
        kind = f"{'ab'[line.number]} c{colour}"
        label = bucket(line.label, edges)
        full = " ".join(part for part in (line.run, label) if part)
        drawn = thin(line.points, plot.first, plot.last, right - LEFT)
        if line.spread:
            outline = [(x, y + line.spread.get(x, 0.0)) for x, y in drawn] + [
                (x, y - line.spread.get(x, 0.0)) for x, y in reversed(drawn)
            ]
            parts.append(f'<path class="band {kind}" d="{plot.path(outline)}Z"/>')
        faint = " faint" if smooth and len(line.points) > 100 else ""
        parts.append(
            f'<path class="line{faint} {kind}" data-label="{escaped(full)}" d="{plot.path(drawn)}"/>'
        )
        end = line.points[-1][1]
        if faint:
            means = trend(line.points)
            end = means[-1][1]
            parts.append(f'<path class="mean {kind}" d="{plot.path(means)}"/>')
        # not at every step: where there is a value
        if len(drawn) <= min(50, drawn[-1][0] - drawn[0][0] + (len(drawn) == 1)):
            parts += [
                f'<circle class="{kind}" cx="{plot.x(x):.5g}" cy="{plot.y(y):.5g}" r="3"/>' for x, y in drawn
            ]
        if many:
            ends.setdefault(label, (plot.y(end), colour))
        else:
            last += f' <span class="{kind}">{shown(line.points[-1][1])}</span>'
    height = -math.inf
    # at the line's end, or below the label before
    for label, (y, colour) in sorted(ends.items(), key=lambda end: end[1][0]):
        height = max(y + 4, height + 13, TOP + 6)
        short = label if len(label) <= 16 else f"{label[:15]}…"
        parts.append(
            f'<text class="label c{colour}" x="{right + 6}" y="{height:.1f}">{escaped(short)}</text>'
        )
    data = f' data-plot="{LEFT} {right} {TOP} {BOTTOM} {plot.first} {plot.last} {plot.low!r} {plot.high!r}"'
    return _figure(name, what, "".join(parts), f'<span class="last">{last}</span>', data)


def histogram(
    name: str, what: str, shares: Mapping[str, list[Point]], limits: Point, num_columns: int = 80
) -> str:
    """Shares over time: a row for each bucket that was ever used, a column for some steps, the darker the
    more; and the last step's numbers.

    shares: of each bucket by its upper edge, from the lowest to "inf".
    """
    used = [label for label, points in shares.items() if any(value for _, value in points)]
    if not used:
        return ""
    keys = list(shares)
    keys = keys[keys.index(used[0]) : keys.index(used[-1]) + 1]
    rows = [bucket(key, [in_order(label)[0] for label in shares]) for key in keys]
    plot, height = Plot(limits, 0, 1), (BOTTOM - TOP) / len(keys)
    num_columns = min(num_columns, int(plot.last - plot.first) + 1)
    width = (plot.right - LEFT) / num_columns
    columns: dict[int, dict[str, list[Point]]] = {}
    for key in keys:
        for step, value in shares[key]:
            column = min(
                num_columns - 1, int((step - plot.first) / (plot.last - plot.first + 1) * num_columns)
            )
            columns.setdefault(column, {}).setdefault(key, []).append((step, value))
    parts = [
        f'<text x="{LEFT - 6}" y="{BOTTOM - (i + 0.5) * height + 4:.1f}">{escaped(row)}</text>'
        for i, row in enumerate(rows)
    ]
    for column, by_key in sorted(columns.items()):
        steps = [step for step, _ in next(iter(by_key.values()))]
        x, title, cells = (
            LEFT + column * width,
            [f"step {steps[0]:g}" if len(steps) == 1 else f"steps {steps[0]:g} to {steps[-1]:g}, mean"],
            [],
        )
        for i, key in enumerate(keys):
            share = mean([value for _, value in by_key.get(key, ())])
            if share > 0:
                title.append(f"{rows[i]}: {share:.1%}")
                y = BOTTOM - (i + 1) * height + 0.5
                cells.append(
                    f'<path class="o{max(1, round(share * 10))}" d="M{x:.1f} '
                    f'{y:.1f}h{width:.2f}v{height - 1:.1f}h-{width:.2f}z"/>'
                )
        box = f'<path class="t" d="M{x:.1f} {TOP}h{width:.2f}V{BOTTOM}h-{width:.2f}z"/>'
        parts.append(f"<g><title>{escaped(chr(10).join(title))}</title>{box}{''.join(cells)}</g>")
    last = shares[keys[0]][-1][0]
    exact = html_table(
        (name, "share"),
        [(row, f"{dict(shares[key]).get(last, 0):.4%}") for row, key in zip(rows, keys, strict=True)],
    )
    below = f"<details><summary>step {last:g}, exactly</summary>{exact}</details>"
    return _figure(name, what, f'<g class="heat">{"".join(parts)}</g>{plot.steps()}', below=below)


def lanes(events: Iterable[Event], limits: Point) -> str:
    """Every event as a mark in the lane of who it happened to."""
    by_who: dict[str, list[Event]] = {}
    for event in events:
        by_who.setdefault(str(event.get("who", "?")), []).append(event)
    if not by_who:
        return ""
    plot, height = Plot(limits, 0, 1), (BOTTOM - TOP) / max(4, len(by_who))
    parts = [plot.steps()]
    for i, (who, of_who) in enumerate(sorted(by_who.items())):
        y = TOP + i * height
        parts.append(f'<path class="grid" d="M{LEFT} {y + height:.1f}H{plot.right}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + height / 2 + 4:.1f}" class="who">{escaped(who[:8])}</text>'
        )
        parts.append(
            plot.marks(
                of_who, round(y + 5, 1), round(y + height - 5, 1), "calm" if who in NO_RECOVERY else ""
            )
        )
    return _figure(
        "events",
        "what failed and was replaced, by who (red), and when the run was started and stopped: point at a "
        "mark",
        "".join(parts),
    )


def fold(title: str, content: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escaped(title)}</summary>{content}</details>"
