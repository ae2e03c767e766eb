"""The numbers of a run as Ray's metrics, and so Prometheus's: their names, labels and gauges.

A metric's name on Ray is that of metrics.py with `gvpo_` before it, `_` for every other sign, and its unit at
the end; a part of the name that is free, or one of many, is a label. Everything has the label `run`, the name
of the run directory. Ray puts `ray_` before it all:

    reward/mean                 gvpo_reward_mean{run="math"}
    time/step                   gvpo_time_step_seconds
    eval/test/pass@1            gvpo_eval_pass_ratio{set="test", k="1"}
    gvpo/residual_var/4         gvpo_residual_var_by_staleness{staleness="4"}

NAMES holds the rule. What each stage does and how much waits for it is there too, from the status that the
ring keeps (`of_status`):

    gvpo_run_state{state}            1 for what the driver does, 0 for the rest: starting, training,
                                     evaluating, stopped, complete
    gvpo_num_steps                   after which the run is complete
    gvpo_engines{pool, state}        engines of a pool by state
    gvpo_engine_groups{pool}         groups in flight at a pool
    gvpo_engine_version{pool}        oldest weights that an engine of the pool has
    gvpo_groups{at}                  groups on their way: prompts (wait for an engine), engines, verifiers,
                                     buffer
    gvpo_oldest_group_seconds        age of the oldest of them; 0: there is none
    gvpo_verifiers{state}            verifiers that are busy, and idle
    gvpo_buffer_groups{state}        finished in all; of these waiting for the learner; running: begun and not
                                     finished
    gvpo_dial_open                   1: a group may begin as far as the dial is concerned
    gvpo_learner_state{state}        1 for what the learner does, 0 for the rest (LearnerState)
    gvpo_learner_state_seconds       since when it does
"""

from __future__ import annotations

import math
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from gvpo_ray.buffer.states import BoundState, LearnerState
from gvpo_ray.observe.status import EngineState, RunState

Series = tuple[str, dict[str, str], float]
"""(name, labels, value)"""

Line = Mapping[str, Any]
"""Of metrics.jsonl."""

NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"eval/(?P<set>.+)/pass@(?P<k>\d+)", "eval_pass_ratio"),
        (r"eval/(?P<set>.+)/length_mean", "eval_length_mean_tokens"),
        (r"eval/(?P<set>.+)/num_prompts", "eval_num_prompts"),
        (r"eval/(?P<set>.+)/(\w+)", r"eval_\2_ratio"),
        (r"pools/(?P<pool>.+)/engines", "pool_engines"),
        (r"pools/(?P<pool>.+)/tokens_per_s", "pool_tokens_per_second"),
        (r"pools/(?P<pool>.+)/token_share", "pool_token_ratio"),
        (r"sources/(?P<source>.+)", "sources_ratio"),
        (r"unverifiable/(?P<reason>.+)", "unverifiable_ratio"),
        (r"recoveries/(?P<who>.+)", "recoveries"),
        (r"gvpo/residual_var/(?P<staleness>.+)", "residual_var_by_staleness"),
        (r"(?:gvpo/)?(.+histogram)/(?P<edge>.+)", r"\1_ratio"),
        (
            r"(?:gvpo/)?(completions/(?:correct|truncated|unverifiable)|policy/clipped|binding|effective_share|kept|damping)",
            r"\1_ratio",
        ),
        (r"(policy/(?:kl_ref|log_ratio_rms)|weights/parity_\w+)", r"\1_nats"),
        (r"(staleness/\w+)", r"\1_steps"),
        (r"(completions/length_mean)", r"\1_tokens"),
        (r"(time/\w+)", r"\1_seconds"),
        (r"(.+)_per_s", r"\1_per_second"),
        (r"(.+)_s", r"\1_seconds"),
        (r"gvpo/(.+)", r"\1"),
    )
)
"""The first that fits says what a name becomes; its named parts are labels."""

PLACES = ("prompts", "engines", "verifiers", "buffer")


def series_of(name: str) -> tuple[str, dict[str, str]]:
    """Name and labels on Ray of a metric."""
    for pattern, ours in NAMES:
        if match := pattern.fullmatch(name):
            return f"gvpo_{_plain(match.expand(ours))}", match.groupdict()
    return f"gvpo_{_plain(name)}", {}


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


def numbers_of(line: Line) -> dict[str, float]:
    """What can be drawn: no texts, and nothing that is not a number."""
    return {
        name: float(value)
        for name, value in line.items()
        if isinstance(value, (int, float)) and math.isfinite(value)
    }


def of_line(line: Line) -> list[Series]:
    """Of a line of metrics.jsonl."""
    return [(*series_of(name), value) for name, value in numbers_of(line).items()]


def of_status(status: Mapping[str, Any]) -> list[Series]:
    """Of what the ring says of itself (Ring.status)."""

    def one_of(name: str, states: Iterable[str], state: str) -> list[Series]:
        return [(name, {"state": other}, float(other == state)) for other in states]

    series: list[Series] = [
        ("gvpo_num_steps", {}, float(status["num_steps"])),
        *one_of("gvpo_run_state", RunState, status["doing"]),
        *(("gvpo_groups", {"at": place}, float(status["running"].get(place, 0))) for place in PLACES),
        (
            "gvpo_oldest_group_seconds",
            {},
            max(0.0, status["time"] - status["oldest"]["since"]) if status["oldest"] else 0.0,
        ),
        (
            "gvpo_verifiers",
            {"state": "busy"},
            float(sum(number > 0 for number in status["verifiers"].values())),
        ),
        (
            "gvpo_verifiers",
            {"state": "idle"},
            float(sum(number == 0 for number in status["verifiers"].values())),
        ),
        *((*series_of(f"recoveries/{who}"), float(number)) for who, number in status["recoveries"].items()),
    ]
    for pool in dict.fromkeys(engine["pool"] for engine in status["engines"]):
        engines = [engine for engine in status["engines"] if engine["pool"] == pool]
        states = Counter(engine["state"] for engine in engines)
        series += [
            ("gvpo_engines", {"pool": pool, "state": state}, float(states[state])) for state in EngineState
        ]
        series.append(
            ("gvpo_engine_groups", {"pool": pool}, float(sum(engine["num_groups"] for engine in engines)))
        )
        versions = [engine["version"] for engine in engines if engine["version"] is not None]
        series += [("gvpo_engine_version", {"pool": pool}, float(min(versions)))] if versions else []
    if buffer := status["buffer"]:
        series += [
            ("gvpo_buffer_groups", {"state": state}, float(buffer[f"num_{state}"]))
            for state in ("finished", "waiting", "running")
        ]
        series.append(("gvpo_dial_open", {}, float(buffer["bound"] == BoundState.OPEN)))
        series += one_of("gvpo_learner_state", LearnerState, buffer["learner_state"])
        since = buffer["learner_since"]
        series.append(("gvpo_learner_state_seconds", {}, max(0.0, status["time"] - since) if since else 0.0))
    return series


class Gauges:
    """Series as gauges of Ray.

    Ray forgets a gauge that was not set within two of its reports (20 s), and a step may take longer: `show`
    sets all that is known anew.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}
        self._newest: dict[str, list[Series]] = {}
        self._lock = threading.Lock()  # lines come from the user's thread, the status from the ring's

    def show(self, kind: str, series: list[Series]) -> None:
        """Newer series of a kind: what that kind had before and has no longer is not shown any more."""
        from ray.util.metrics import Gauge

        with self._lock:
            self._newest[kind] = series
            for name, labels, value in (entry for entries in self._newest.values() for entry in entries):
                if name not in self._gauges:
                    self._gauges[name] = Gauge(name, tag_keys=("run", *labels))
                self._gauges[name].set(value, {"run": self._run, **labels})


def place(line: Line) -> int:
    """Of a line in its run: an evaluation of a step comes after the step's training. Both at most once."""
    return 2 * int(line["step"]) + any(name.startswith("eval/") for name in line)
