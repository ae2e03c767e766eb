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
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from gvpo_ray.config.base import ConfigError
from gvpo_ray.files import write_whole
from gvpo_ray.observe.metrics import STALENESS_EDGES
from gvpo_ray.observe.report import charts
from gvpo_ray.observe.report.charts import Line, Point, escaped, finite, fold, html_table, shown
from gvpo_ray.observe.report.completions import completions_of
from gvpo_ray.observe.report.reading import Run, config_of, flattened, matching, read_run, state_of

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
MAX_EVENTS = 500


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
    """The folders' names, with as many of those above as it takes to tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len({*names}) == len(names):
            return names
    raise ConfigError(f"{paths[0]} and {paths[1]} are the same run")


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
                for label, points in matching(run, name).items()
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
    heads = "".join(f"<p>{name}{escaped(state_of(run))}</p>" for name, run in zip(names, runs, strict=True))
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
        + (_of_each(runs, completions_of) or "<p>No evaluation, and no group that was trained on.</p>"),
        "Config": _difference(runs)
        + "".join(
            fold(
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
    return fold(f"All other metrics ({len(moving)})", content) if names else ""


def _histograms(run: Run, limits: Point) -> str:
    return "".join(
        charts.histogram(name, what, matching(run, f"{name}/*"), limits) for name, what in HISTOGRAMS.items()
    )


def _values(runs: Sequence[Run]) -> str:
    """First and last value of every metric and their steps, those of CHARTS and TERMS first."""
    order = [name for chart in (*CHARTS, *TERMS) for name in _resolved(runs, chart)]
    rows = []
    for name in dict.fromkeys([*order, *sorted({name for run in runs for name in run.series})]):
        ends = [matching(run, name).get("", []) for run in runs]
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
    one, other = (flattened(config_of(run)) for run in runs)
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
