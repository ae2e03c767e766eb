"""`gvpo-ray report RUN_DIR`: one self-contained HTML page of a run, or of two beside each other, that needs
no network.

    RUN_DIR/metrics.jsonl     charts against the step; first and last value of every metric
    RUN_DIR/events.jsonl      {"time", "step", "who", "name", "why"} per line: what failed and was replaced, a
                              mark in the charts. who "run" (started, stopped) and "pool" (grew, shrank) are
                              no recoveries: marks in the time-line alone
    RUN_DIR/config.yaml       the resolved config
    RUN_DIR/evaluations/      best and worst completions of the evaluations
    RUN_DIR/groups/           and of the newest groups that were trained on

Only metrics.jsonl must be there. Everything that a model, a data set or a config wrote goes through
`escaped`: it is shown, never obeyed; and should that fail, the page's Content-Security-Policy names the hash
of the one script and of the one style that may act, and loads nothing. The pictures are made here and need no
script: report.js adds the search and the numbers under the pointer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.observe.metrics import STALENESS_EDGES
from gvpo_ray.observe.report import charts
from gvpo_ray.observe.report.charts import Line, Point, escaped, finite, html_table, shown

CHARTS = {
    "reward/mean": "over the verifiable completions of the step's batch",
    "eval/<name>/pass@1": "share of right completions, mean over the held-out prompts; band: one standard "
    "error up and down",
    "loss": "over all mini-batches of the step",
    "gvpo/residual_var": "what of the rewards' variance the policy does not explain yet",
    "policy/kl_ref": "distance of the policy from its reference, in nats per completion",
    "grad_norm": "before clipping, mean over the step's updates",
    "time/wait_for_groups / time/step": "share of the step that the learner had no batch",
    "tokens/trained / time/step": "completion tokens trained per second",
    "pools/*/tokens_per_s": "tokens per second that each pool of engines wrote",
    "staleness/mean": "steps between the oldest weights that wrote a completion and the step's start",
    "gvpo/residual_var/*": "mean squared residual of the completions of each staleness",
}
"""What is drawn first, and what it means. A name with " / " is a quotient of two metrics, one with * a line
for each metric that fits; eval/<name> is a chart for each set."""
TERMS = {
    "gvpo/term_*": "Descending the loss ascends the sum of the three, times beta.",
    "gvpo/*_var": "In the group: what there is to explain (reward), what the policy says (implicit_reward, "
    "beta D), what is left (residual).",
    "gvpo/reward_correlation": "of the implicit reward beta D with the reward: 1 is the optimum",
    "gvpo/binding": "share of the residuals in which beta counts: near 0 nothing holds the policy near its "
    "reference",
    "gvpo/beta": "reward units per nat of log-ratio; loss.beta: auto steers it to where beta D varies half "
    "as much as the rewards do",
    "gvpo/effective_share": "of the completions: those that the policy would still write, as it would today",
    "gvpo/kept": "of the likelihood of what is right: below 1 it has got less likely since it was sampled, "
    "and less is pushed down",
    "gvpo/damping": "what the learning rate is multiplied by: the share of the residuals that the rewards "
    "explain",
}
TERMS_TEXT = {
    "term_reward": "The advantage term, Cov(R, log π): raises the log-probability of the completions that "
    "are better than their group's mean.",
    "term_reference": "The covariance with the reference, β Cov(log π_ref, log π): keeps the order of the "
    "completions as the reference has it.",
    "term_variance": "The variance, −β/2 Var(log π): holds the completions' log-probabilities together, so "
    "that none runs away from the others.",
}
HISTOGRAMS = {
    "staleness/histogram": "shares of our own completions, by the steps between the oldest weights that "
    "wrote them and their training",
    "groups/size_histogram": "shares of the groups, by their number of completions with a reward",
    "gvpo/residual_histogram": "shares of the completions by their residual, in units of reward: all in the "
    "middle at the optimum",
}
ENGINES = "pools/*/engines"
MAX_CHARACTERS = 4000
MAX_EVALUATIONS = 12  # of a set whose completions are shown
NUM_EXAMPLES = 3
NUM_TRAINED = 64  # of the newest groups, from which the examples of the training are taken
MAX_EVENTS = 500


@dataclass(frozen=True)
class Run:
    """What the directory of a run says."""

    name: str
    number: int
    """0; 1 of the run that it is compared with."""
    path: Path
    series: dict[str, list[Point]]
    events: list[dict[str, Any]]
    config: str

    @property
    def recoveries(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("who") not in charts.NO_RECOVERY]


def write(run_dir: str | Path, other_run_dir: str | Path | None = None) -> Path:
    """Write RUN_DIR/report.html from what the run has written so far, or RUN_DIR/compare.html of two runs;
    returns its path.

    Raises:
        ConfigError: not the directory of a run, twice the same one, or it cannot be written.
    """
    paths = [Path(run_dir)] if other_run_dir is None else [Path(run_dir), Path(other_run_dir)]
    for path in paths:
        if not (path / "metrics.jsonl").is_file():
            raise ConfigError(f"{path}: no metrics.jsonl: not the directory of a run")
    runs = [
        _read(path, name, number)
        for number, (path, name) in enumerate(zip(paths, _names(paths), strict=True))
    ]
    file = paths[0] / ("report.html" if other_run_dir is None else "compare.html")
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(_page(runs), encoding="utf-8")
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"{run_dir}: cannot write {file.name}: {error.strerror}") from error
    return file


# --- reading ------------------------------------------------------------------------------------------------


def _names(paths: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of those above as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len({*names}) == len(names):
            return names
    raise ConfigError(f"{paths[0]} and {paths[1]} are the same run")


def _read(path: Path, name: str, number: int) -> Run:
    values: dict[str, dict[float, float]] = {}  # of a step that was written twice, the later
    for line in _json_lines(path / "metrics.jsonl"):
        step = finite(line.pop("step", None))
        for key, value in line.items() if step is not None else ():
            if (drawable := finite(value)) is not None:
                values.setdefault(key, {})[step] = drawable
    config = (path / "config.yaml").read_text(errors="replace") if (path / "config.yaml").is_file() else ""
    return Run(
        name,
        number,
        path,
        {key: sorted(points.items()) for key, points in values.items()},
        _json_lines(path / "events.jsonl"),
        config,
    )


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


def _config(run: Run) -> dict[str, Any]:
    try:
        data = yaml.safe_load(run.config)
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested dictionary by dotted keys."""
    flat = {}
    for key, value in data.items():
        flat.update(
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return flat


def _state(run: Run) -> str:
    """Steps trained, and what became of the run as far as its directory tells: a killed one cannot say so."""
    trained = int(run.series["loss"][-1][0]) if "loss" in run.series else 0
    num_steps = _config(run).get("num_steps")
    last = next((event.get("name") for event in reversed(run.events) if event.get("who") == "run"), None)
    if isinstance(num_steps, int) and trained >= num_steps:
        state = "complete"
    else:
        state = {"started": "running, or killed", "stopped": "stopped before its end"}.get(
            str(last), "not complete"
        )
    return (
        f"{trained} of {num_steps} steps trained: {state}"
        if num_steps is not None
        else f"{trained} steps trained: {state}"
    )


def _matches(run: Run, pattern: str) -> dict[str, list[Point]]:
    """The points that a name of CHARTS stands for, by what * stands for ("" without one)."""
    if " / " in pattern:
        one, other = (run.series.get(name, []) for name in pattern.split(" / "))
        units = dict(other)
        return {
            "": [
                (step, value / units[step])
                for step, value in one
                if units.get(step) and finite(value / units[step]) is not None
            ]
        }
    head, star, tail = pattern.partition("*")
    if not star:
        return {"": run.series.get(pattern, [])}
    found = {
        name[len(head) : len(name) - len(tail)]: points
        for name, points in run.series.items()
        if name.startswith(head) and name.endswith(tail)
    }
    return {label: found[label] for label in sorted(found, key=charts.in_order) if label}


def _charts(runs: Sequence[Run], names: Mapping[str, str], limits: Point, with_marks: bool = True) -> str:
    """Of those names that any run has."""
    parts = []
    for name, what in ((name, what) for chart, what in names.items() for name in _resolved(runs, chart)):
        lines = []
        for run in runs:
            spread = (
                dict(run.series.get(name.removesuffix("pass@1") + "stderr", ()))
                if name.endswith("/pass@1")
                else {}
            )
            of_run = run.name if len(runs) > 1 else ""
            lines += [
                Line(label, points, spread, run.number, of_run)
                for label, points in _matches(run, name).items()
                if points
            ]
        if lines:
            edges = STALENESS_EDGES if name == "gvpo/residual_var/*" else ()
            marks = [run.recoveries for run in runs] if with_marks else []
            parts.append(charts.chart(name, what, lines, limits, marks, edges, smooth=name != ENGINES))
    return "".join(parts)


def _resolved(runs: Sequence[Run], chart: str) -> list[str]:
    """The name of a chart, with every held-out set's for <name>."""
    head, sets, tail = chart.partition("<name>")
    return (
        sorted({name for run in runs for name in run.series if name.startswith(head) and name.endswith(tail)})
        if sets
        else [chart]
    )


# --- the page -----------------------------------------------------------------------------------------------


def _page(runs: Sequence[Run]) -> str:
    style, script = (
        Path(__file__).with_name(name).read_text(encoding="utf-8") for name in ("report.css", "report.js")
    )
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'; "
        "form-action 'none'"
    )
    steps = [points[i][0] for run in runs for points in run.series.values() for i in (0, -1)]
    limits = min(steps, default=0), max(steps, default=1)
    title = escaped(" and ".join(run.name for run in runs))
    names = [f"{_key(run)}{escaped(run.name)}: " if len(runs) > 1 else "" for run in runs]
    heads = "".join(f"<p>{name}{escaped(_state(run))}</p>" for name, run in zip(names, runs, strict=True))
    curves = _charts(runs, CHARTS, limits)
    terms = _charts(runs, TERMS, limits)
    told = "".join(f"<p><b>{name}</b> {escaped(text)}</p>" for name, text in TERMS_TEXT.items())
    times = _charts(runs, {ENGINES: "running engines of each pool"}, limits)
    sections = {
        "Curves": f'<div class="charts">{curves}</div>{_rest(runs, limits)}'
        if curves
        else "<p>No step is trained yet.</p>",
        "Three terms": f'{told}<div class="charts">{terms}</div>'
        if terms
        else "<p>None: no step is trained yet.</p>",
        "Histograms": _of_each(runs, lambda run: _histograms(run, limits), "charts"),
        "Time-line": f'<div class="charts">{times}</div>'
        + _of_each(runs, lambda run: charts.lanes(run.events, limits), "charts")
        + _of_each(runs, _events),
        "Values": _values(runs),
        "Completions": '<p hidden><input id="search" type="search" placeholder="search prompts, '
        'completions, rewards, reasons" '
        'aria-label="search the completions"> <span id="found" class="faint"></span></p>'
        + (_of_each(runs, _completions) or "<p>No evaluation, and no group that was trained on.</p>"),
        "Config": _difference(runs)
        + "".join(
            _fold(
                f"config.yaml{f' of {run.name}' if len(runs) > 1 else ''}",
                f'<pre class="config">{escaped(run.config)}</pre>',
            )
            if run.config
            else "<p>No config.yaml.</p>"
            for run in runs
        ),
    }
    ids = {name: name.lower().replace(" ", "-") for name in sections}
    links = "".join(f'<a href="#{ids[name]}">{name}</a>' for name in sections)
    body = "".join(
        f'<section id="{ids[name]}"><h2>{name}</h2>{content}</section>' for name, content in sections.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{style}</style></head><body class="{"two" if len(runs) > 1 else "one"}">
<h1>{title}</h1><div class="runs">{heads}</div><nav>{links}</nav>
<p><small>Against the step. Of a line with more points than the picture has columns, the lowest and the
highest of each column are drawn: no spike is lost. The bold line through more than 100 points is their mean,
50 along the run. Red marks are recoveries{_marks_of(runs)}.</small></p>
{body}
<script>{script}</script></body></html>
"""


def _when(time: Any) -> str:
    seconds = finite(time)
    return (
        f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
        if seconds is not None and 0 <= seconds < 1e11
        else ""
    )


def _fold(title: str, content: str, is_open: bool = False) -> str:
    return f"<details{' open' if is_open else ''}><summary>{escaped(title)}</summary>{content}</details>"


def _key(run: Run) -> str:
    return f'<span class="key {"ab"[run.number]} c{run.number}"></span>'


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _marks_of(runs: Sequence[Run]) -> str:
    return (
        f": of {escaped(runs[0].name)} below the plots, of {escaped(runs[1].name)} above"
        if len(runs) > 1
        else ""
    )


def _of_each(runs: Sequence[Run], content: Callable[[Run], str], kind: str = "") -> str:
    """What each run has of it, under the run's name where there are two."""
    parts = [(run, content(run)) for run in runs]
    return "".join(
        (f"<h3>{_key(run)}{escaped(run.name)}</h3>" if len(runs) > 1 else "")
        + (f'<div class="{kind}">{part}</div>' if kind else part)
        for run, part in parts
        if part
    )


def _rest(runs: Sequence[Run], limits: Point) -> str:
    """The charts of all other metrics, folded away; those that never changed are in the table alone."""
    drawn = re.compile(
        "|".join(
            re.escape(name).replace(r"\*", "[^/]+").replace("<name>", ".+")
            for name in [*CHARTS, *TERMS, ENGINES, *(f"{name}/*" for name in HISTOGRAMS)]
            if " / " not in name
        )
    )
    names = sorted({name for run in runs for name in run.series if not drawn.fullmatch(name)})
    moving = {
        name: ""
        for name in names
        if len({value for run in runs for _, value in run.series.get(name, ())}) > 1
    }
    constant = (
        f"<p><small>{len(names) - len(moving)} metrics that never changed are in the table of "
        "values alone.</small></p>"
    )
    content = f'{constant}<div class="charts">{_charts(runs, moving, limits, with_marks=False)}</div>'
    return _fold(f"All other metrics ({len(moving)})", content) if names else ""


def _histograms(run: Run, limits: Point) -> str:
    return "".join(
        charts.histogram(name, what, _matches(run, f"{name}/*"), limits) for name, what in HISTOGRAMS.items()
    )


def _values(runs: Sequence[Run]) -> str:
    """First and last value of every metric and their steps, those of CHARTS and TERMS first."""
    order = [name for chart in (*CHARTS, *TERMS) for name in _resolved(runs, chart)]
    rows = []
    for name in dict.fromkeys([*order, *sorted({name for run in runs for name in run.series})]):
        ends = [_matches(run, name).get("", []) for run in runs]
        if any(ends):
            cells = [
                [shown(p[0][1]), f"{p[0][0]:g}", shown(p[-1][1]), f"{p[-1][0]:g}"] if p else [""] * 4
                for p in ends
            ]
            rows.append([name, *(cell for row in cells for cell in row)])
    names = "".join(f'<th colspan="4">{_key(run)}{escaped(run.name)}</th>' for run in runs)
    above = f"<tr><th></th>{names}</tr>" if len(runs) > 1 else ""
    return html_table(("metric", *("first", "at step", "last", "at step") * len(runs)), rows, above=above)


def _events(run: Run) -> str:
    """How many of each kind, and all that happened in the order of the file; of very many, the first and the
    last.
    """
    counts = Counter(str(event.get("who", "?")) for event in run.recoveries)
    head = ", ".join(f"{who} {count}" for who, count in sorted(counts.items()))
    events, half = run.events, MAX_EVENTS // 2
    note = (
        f"<p>Of {len(events)} events, the first and the last {half}.</p>" if len(events) > MAX_EVENTS else ""
    )
    events = events[:half] + events[-half:] if note else events
    rows = [
        (_when(event.get("time")), *(event.get(key, "") for key in ("step", "who", "name", "why")))
        for event in events
    ]
    listed = html_table(("time", "step", "who", "name", "why"), rows, "events") if rows else ""
    return f"<p>{len(run.recoveries)} recoveries{escaped(f': {head}') if head else ''}</p>{note}{listed}"


def _difference(runs: Sequence[Run]) -> str:
    """The keys in which two configs differ."""
    if len(runs) < 2:
        return ""
    one, other = (_flat(_config(run)) for run in runs)
    keys = [
        key
        for key in dict.fromkeys([*one, *other])
        if key not in one or key not in other or one[key] != other[key]
    ]
    rows = [
        (
            key,
            *(
                yaml.safe_dump(config[key]).removesuffix("...\n") if key in config else "not there"
                for config in (one, other)
            ),
        )
        for key in keys
    ]
    return (
        html_table(("key", *(run.name for run in runs)), rows, "difference")
        if rows
        else "<p>The configs are the same.</p>"
    )


# --- completions --------------------------------------------------------------------------------------------

COLUMNS = ("prompt", "answer", "completions", "rewards")
DETAILS = ("reward_parts", "reward_reasons", "finish_reasons", "sources", "version_min", "version_max")


def _completions(run: Run) -> str:
    """Best, worst and unverifiable ones of the held-out sets' evaluations, the last open, and of the newest
    trained groups.
    """
    by_set: dict[str, list[tuple[int, Path]]] = {}
    for file in (run.path / "evaluations").glob("*-step-*.arrow"):
        name, _, number = file.stem.rpartition("-step-")
        if number.isdecimal():
            by_set.setdefault(name, []).append((int(number), file))
    parts = []
    for name, files in sorted(by_set.items()):
        files.sort(reverse=True)
        num = min(MAX_EVALUATIONS, len(files))  # spread over the run, the first and the last among them
        picked = [files[i * (len(files) - 1) // max(1, num - 1)] for i in range(num)]
        for step, file in picked:
            parts.append(_fold(f"{name}, step {step}", _cases(file), is_open=step == picked[0][0]))
        if num < len(files):
            parts.append(f"<p><small>{num} of the {len(files)} evaluations of {escaped(name)}.</small></p>")
    if logs := sorted((run.path / "groups").glob("*.arrow"))[-1:]:
        parts.append(
            _fold(f"the newest {NUM_TRAINED} groups of the training", _cases(logs[0], newest=NUM_TRAINED))
        )
    return "".join(parts)


def _cases(file: Path, newest: int | None = None) -> str:
    try:
        batches = groups.read_batches(file, is_log=newest is not None)
        table = pa.Table.from_batches(batches[-newest:] if newest else batches) if batches else groups.empty()
        table = table.slice(max(0, len(table) - newest)) if newest else table
        table = groups.validate(
            table.select([name for name in (*COLUMNS, *DETAILS) if name in table.schema.names]), COLUMNS
        )
    except groups.GroupError as error:  # its writer was killed, or is at it
        return f"<p>{escaped(error)}</p>"
    cases = {
        kind: [_case(kind, table, i, j) for i, j in found]
        for kind, found in _extremes(table["rewards"].to_pylist()).items()
    }
    return (
        "".join(f'<div class="cases">{"".join(found)}</div>' for found in cases.values() if found)
        or "<p>No completion has a reward.</p>"
    )


def _extremes(rewards: Sequence[Sequence[Any]]) -> dict[str, list[tuple[int, int]]]:
    """(prompt, completion) of the best, the worst and some without a reward, one per prompt in each; none is
    in two.
    """
    scored = [
        [(reward, i, j) for j, reward in enumerate(row) if finite(reward) is not None]
        for i, row in enumerate(rewards)
    ]
    best = sorted(
        (max(group, key=lambda case: case[0]) for group in scored if group), key=lambda case: -case[0]
    )[:NUM_EXAMPLES]
    left = [[case for case in group if case not in best] for group in scored]
    worst = sorted(
        (min(group, key=lambda case: case[0]) for group in left if group), key=lambda case: case[0]
    )[:NUM_EXAMPLES]
    none = [(i, row.index(None)) for i, row in enumerate(rewards) if None in row][:NUM_EXAMPLES]
    return {
        "best": [(i, j) for _, i, j in best],
        "worst": [(i, j) for _, i, j in worst],
        "unverifiable": none,
    }


def _case(kind: str, table: pa.Table, row: int, completion: int) -> str:
    group = next(groups.rows(table.slice(row, 1)))

    def of(name: str) -> Any:
        return group[name][completion] if group.get(name) else None

    def cut(value: object) -> str:
        text = str(value)
        return escaped(
            text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]} … ({len(text):,} characters)"
        )

    reward = of("rewards")
    by_function = {name: values[completion] for name, values in (group.get("reward_parts") or {}).items()}
    parts = [f"{name} {'null' if part is None else shown(part)}" for name, part in by_function.items()]
    if (oldest := of("version_min")) is not None:
        parts.append(
            f"version {oldest}"
            if oldest == of("version_max")
            else f"versions {oldest} to {of('version_max')}"
        )
    parts += [
        str(value)
        for name in ("sources", "finish_reasons", "reward_reasons")
        if (value := of(name)) is not None
    ]
    head = (
        f"<b>{kind}{'' if reward is None else f': reward {shown(reward)}'}</b> "
        f"<small>{cut(' · '.join(parts))}</small>"
    )
    prompt, written, answer = (
        cut(value) for value in (group["prompt"], group["completions"][completion], group["answer"])
    )
    texts = (
        f'<pre>{prompt}</pre><pre class="completion">{written}</pre><p><small>answer: {answer}</small></p>'
    )
    return f'<article class="case {kind}"><p>{head}</p>{texts}</article>'
