"""The page of `gvpo-ray report` is self-contained HTML about a run, or about two beside each other.

    RUN_DIR/metrics.jsonl     charts against the step; first and last value of every metric
    RUN_DIR/events.jsonl      {"time", "step", "who", "name", "why"} per line: what failed and was replaced.
                              It is marked in the charts; events of who "run" (started, stopped) and "pool"
                              (grew, shrank) are no recoveries, and are marked in the time-line alone
    RUN_DIR/config.yaml       the resolved config
    RUN_DIR/evaluations/      best and worst completions of the evaluations
    RUN_DIR/groups/           best and worst completions of the newest trained groups
    RUN_DIR/tokens/           tokens of a few trained completions, in colours

Only metrics.jsonl must be there. Everything that a model, a data set or a config wrote is untrusted: Jinja
escapes it in the page, JSON in the script's data, `figures.plain` in plotly's texts. Should that fail, the
page's Content-Security-Policy names the hashes of the scripts and styles that may act, and loads nothing.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gvpo_ray.config.base import ConfigError, flattened
from gvpo_ray.files import write_whole
from gvpo_ray.observe.metrics import (
    CURVES,
    ENGINES,
    HISTOGRAMS,
    METRICS,
    STALENESS_EDGES,
    TERMS,
    THREE_TERMS,
    find,
)
from gvpo_ray.observe.report import figures
from gvpo_ray.observe.report.completions import completions_of
from gvpo_ray.observe.report.figures import Figure, Line, Point, finite, in_order, shown
from gvpo_ray.observe.report.reading import Run, config_of, read_run, state_of
from gvpo_ray.observe.report.tokens import LEVELS, PART, coloured_of

MAX_EVENTS = 500
IMAGE_STYLE = "".join(
    f"image-rendering: {value}; "
    for value in (
        "optimizeSpeed",
        "-moz-crisp-edges",
        "-o-crisp-edges",
        "-webkit-optimize-contrast",
        "optimize-contrast",
        "crisp-edges",
        "pixelated",
    )
)
"""The style attribute that plotly.js 4.1 gives to the image of a heat map."""
SECTIONS = ("Curves", "Three terms", "Histograms", "Time-line", "Values", "Completions", "Tokens", "Config")


def write(run_dir: str | Path, other_run_dir: str | Path | None = None) -> Path:
    """Write RUN_DIR/report.html from what the run has written so far, or RUN_DIR/compare.html of two runs.

    Returns:
        The path of the page.

    Raises:
        ConfigError: a folder is not the directory of a run, or of one that has trained; both are the same;
            or the page cannot be written.
    """
    paths = [Path(run_dir)] if other_run_dir is None else [Path(run_dir), Path(other_run_dir)]
    for path in paths:
        if not (path / "metrics.jsonl").is_file():
            is_run = (path / "config.yaml").is_file()
            why = "nothing to show yet: no step has ended" if is_run else "not the directory of a run"
            raise ConfigError(f"{path}: no metrics.jsonl: {why}")
    runs = [
        read_run(path, name, number)
        for number, (path, name) in enumerate(zip(paths, _names(paths), strict=True))
    ]
    file = paths[0] / ("report.html" if other_run_dir is None else "compare.html")
    try:
        write_whole(file, _page(runs))
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot write {file.name}: {error.strerror}") from error
    return file


def _names(paths: Sequence[Path]) -> list[str]:
    """Name runs by their folders, with as many folders above as tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len({*names}) == len(names):
            return names
    raise ConfigError(f"{paths[0]} and {paths[1]} are the same run")


def _printable(value: Any) -> Any:
    """Clean every text that the template shows (Jinja's `finalize`); markup of the template stays."""
    return figures.printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gvpo_ray.observe.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_printable,
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment


def _asset(name: str) -> Markup:
    """Read a script or a style of the package, which the page takes as it is."""
    return Markup(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def _page(runs: Sequence[Run]) -> str:
    from plotly.offline import get_plotlyjs  # the import takes half a second

    style, plotly_style, script = map(_asset, ("report.css", "plotly.css", "report.js"))
    plotly = Markup(get_plotlyjs())
    steps = [points[i][0] for run in runs for points in run.series.values() for i in (0, -1)]
    limits = min(steps, default=0), max(steps, default=1)
    names = {name for run in runs for name in run.series}
    others = {name for name in names if (metric := find(name)[0]) is None or not metric.section}
    moving = {name for name in others if len({y for run in runs for _, y in run.series.get(name, ())}) > 1}
    context: dict[str, Any] = {
        "curves": _charts(runs, _of_section(names, CURVES), limits),
        "others": _charts(runs, moving, limits, has_marks=False),
        "terms": _charts(runs, _of_section(names, TERMS), limits),
        "engines": _charts(runs, _of_section(names, ENGINES), limits, smooth=False),
        "histograms": [_histograms(run, limits) for run in runs],
        "lanes": [figures.lanes(run.events, limits) for run in runs],
    }
    data = _numbered(context)
    page = _environment().get_template("page.html")
    return page.render(
        **context,
        figures=data,
        title=" and ".join(run.name for run in runs),
        two=len(runs) > 1,
        runs=runs,
        states=[state_of(run) for run in runs],
        sections=SECTIONS,
        num_others=len(others),
        three_terms=[metric for metric in METRICS if metric.chart == THREE_TERMS],
        all_events=[_events(run) for run in runs],
        values=_values(runs),
        completions=[completions_of(run) for run in runs],
        coloured=[coloured_of(run, len(runs)) for run in runs],
        levels=LEVELS,
        part=PART,
        difference=_difference(runs),
        policy=_policy([style, plotly_style], [plotly, script]),
        style=style,
        plotly_style=plotly_style,
        plotly=plotly,
        script=script,
    ).lstrip()


def _policy(styles: Sequence[str], scripts: Sequence[str]) -> str:
    """Return a Content-Security-Policy with which only these styles and scripts act, and nothing is loaded.

    Images may be made by the page itself: plotly draws its PNG from them.
    """

    def hashes(texts: Sequence[str]) -> str:
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; style-src 'unsafe-hashes' {hashes([*styles, IMAGE_STYLE])}; "
        f"script-src {hashes(scripts)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _numbered(context: dict[str, Any]) -> list[dict[str, Any]]:
    """Give every figure of the page its id; returns what the script needs of them, by id."""
    data: list[dict[str, Any]] = []

    def visit(value: Any) -> None:
        if isinstance(value, list):
            for each in value:
                visit(each)
        elif value is not None:
            value["id"] = len(data)
            data.append({key: value.get(key) for key in ("kind", "limits", "legend", "traces", "rows")})

    for value in context.values():
        visit(value)
    return data


def _of_section(names: set[str], section: str) -> set[str]:
    return {name for name in names if (metric := find(name)[0]) is not None and metric.section == section}


def _place(name: str) -> tuple[int, tuple[float, str], str]:
    """Sort key of metrics: the order of the registry, then free parts; unregistered ones last."""
    metric, parts = find(name)
    free = " ".join(parts.values())
    return METRICS.index(metric) if metric else len(METRICS), in_order(free), name


def _charts(
    runs: Sequence[Run], names: set[str], limits: Point, has_marks: bool = True, smooth: bool = True
) -> list[Figure]:
    """Draw the metrics of some names, those of one title in one chart."""
    found: dict[str, list[str]] = {}
    for name in sorted(names, key=_place):
        metric, parts = find(name)
        found.setdefault((metric.chart or metric.label).format(**parts) if metric else name, []).append(name)
    charts = []
    for title, members in found.items():
        metric, parts = find(members[0])
        is_open = metric is not None and not metric.chart and bool(parts) and "{" not in metric.label
        lines = []
        for run in runs:
            of_run = run.name if len(runs) > 1 else ""
            for name in members:
                if name not in run.series:
                    continue
                one, free = find(name)
                label = one.label.format(**free) if one and one.chart else ""
                label = next(iter(free.values())) if is_open else label
                spread = dict(run.series.get(name.removesuffix("pass@1") + "stderr", ()))
                is_pass = name.startswith("eval/") and name.endswith("/pass@1")
                points = run.series[name]
                lines.append(Line(label, points, spread if is_pass else {}, run.number, of_run))
        edges = STALENESS_EDGES if metric is not None and "{staleness}" in metric.name else ()
        marks = [run.recoveries for run in runs] if has_marks else []
        texts = [(one.label, one.text) for one in dict.fromkeys(find(name)[0] for name in members) if one]
        text = "; ".join(f"{label}: {text}" if len(texts) > 1 else text for label, text in texts)
        if metric is not None and metric.chart == THREE_TERMS:
            text = ""  # the section says it
        unit = f" ({metric.unit})" if metric is not None and metric.unit not in ("", "ratio") else ""
        key = metric.name if metric is not None and is_open else ", ".join(members)
        charts.append(figures.chart(f"{title}{unit}", key, text, lines, limits, marks, edges, smooth))
    return charts


def _histograms(run: Run, limits: Point) -> list[Figure]:
    drawn = []
    for metric in METRICS:
        if metric.section != HISTOGRAMS:
            continue
        edges = {match["edge"]: name for name in run.series if (match := metric.pattern.fullmatch(name))}
        shares = {edge: run.series[edges[edge]] for edge in sorted(edges, key=in_order)}
        drawn.append(figures.histogram(metric.label, metric.name, metric.text, shares, limits))
    return [figure for figure in drawn if figure is not None]


def _values(runs: Sequence[Run]) -> list[list[str]]:
    """Return rows of a table: first and last value of every metric of each run, and their steps."""
    rows = []
    for name in sorted({name for run in runs for name in run.series}, key=_place):
        row = [name]
        for run in runs:
            points = run.series.get(name)
            ends = (points[0], points[-1]) if points else ()
            row += [cell for x, y in ends for cell in (shown(y), f"{x:g}")] or [""] * 4
        rows.append(row)
    return rows


def _when(time: Any) -> str:
    seconds = finite(time)
    return (
        f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
        if seconds is not None and 0 <= seconds < 1e11
        else ""
    )


def _events(run: Run) -> dict[str, Any]:
    """Count the recoveries, and list all events in the order of the file; of very many, both ends."""
    counts = Counter(str(event.get("who", "?")) for event in run.recoveries)
    events, half = run.events, MAX_EVENTS // 2
    note = f"Of {len(events)} events, the first and the last {half}." if len(events) > MAX_EVENTS else ""
    return {
        "counts": ", ".join(f"{who} {count}" for who, count in sorted(counts.items())),
        "note": note,
        "rows": [
            (_when(event.get("time")), *(str(event.get(key, "")) for key in ("step", "who", "name", "why")))
            for event in (events[:half] + events[-half:] if note else events)
        ],
    }


def _difference(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """Return the keys in which two configs differ, and their values in YAML."""
    if len(runs) < 2:
        return []
    one, other = (flattened(config_of(run)) for run in runs)

    def said(config: dict[str, Any], key: str) -> str:
        return yaml.safe_dump(config[key]).removesuffix("...\n") if key in config else "not there"

    return [
        (str(key), said(one, key), said(other, key))
        for key in dict.fromkeys([*one, *other])
        if key not in one or key not in other or one[key] != other[key]
    ]
