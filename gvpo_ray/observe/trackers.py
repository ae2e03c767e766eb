"""Where the numbers of a run go beside metrics.jsonl: Ray's metrics, and so Prometheus, and the trackers that the config names.

A metric's name on Ray is that of metrics.py with `gvpo_` before it, `_` for every other sign, and its unit at the end; a part of the name that
is free, or one of many, is a label. Everything has the label `run`, the name of the run directory. Ray puts `ray_` before it all:

    reward/mean                 gvpo_reward_mean{run="math"}
    time/step                   gvpo_time_step_seconds
    eval/test/pass@1            gvpo_eval_pass_ratio{set="test", k="1"}
    gvpo/residual_var/4         gvpo_residual_var_by_staleness{staleness="4"}

NAMES holds the rule. What each stage does and how much waits for it is there too, from the status that the ring keeps (`of_status`):

    gvpo_run_state{state}            1 for what the driver does, 0 for the rest: starting, training, evaluating, stopped, complete
    gvpo_num_steps                   after which the run is complete
    gvpo_engines{pool, state}        engines of a pool by state
    gvpo_engine_groups{pool}         groups in flight at a pool
    gvpo_engine_version{pool}        oldest weights that an engine of the pool has
    gvpo_groups{at}                  groups on their way: prompts (wait for an engine), engines, verifiers, buffer
    gvpo_oldest_group_seconds        age of the oldest of them; 0: there is none
    gvpo_verifiers{state}            verifiers that are busy, and idle
    gvpo_buffer_groups{state}        finished in all; of these waiting for the learner; running: begun and not finished
    gvpo_dial_open                   1: a group may begin as far as the dial is concerned
    gvpo_learner_state{state}        1 for what the learner does, 0 for the rest (LEARNER_STATES)
    gvpo_learner_state_seconds       since when it does

The trackers get the lines of metrics.jsonl as they are.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gvpo_ray.config.run import ConfigError, GVPOConfig, MLflowConfig, TrackingConfig

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
        (r"(?:gvpo/)?(completions/(?:correct|truncated|unverifiable)|policy/clipped|binding|effective_share|kept|damping)", r"\1_ratio"),
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

ENGINE_STATES = ("off", "wanted", "starting", "waits for weights", "running", "leaving", "dead")
RUN_STATES = ("starting", "training", "evaluating", "stopped", "complete")
PLACES = ("prompts", "engines", "verifiers", "buffer")
LEARNER_STATES = (
    "has not started", "starts", "waits for groups", "waits for the driver", "trains", "has published", "saves", "has saved", "died",
    "was told to stop",
)  # fmt: skip
"""How the buffer's words for what the learner does begin."""


def series_of(name: str) -> tuple[str, dict[str, str]]:
    """Name and labels on Ray of a metric."""
    for pattern, ours in NAMES:
        if match := pattern.fullmatch(name):
            return f"gvpo_{_plain(match.expand(ours))}", match.groupdict()
    return f"gvpo_{_plain(name)}", {}


def _plain(name: str) -> str:
    return re.sub(r"\W", "_", name)


def _numbers(line: Line) -> dict[str, float]:
    """What can be drawn: no texts, and nothing that is not a number."""
    return {name: float(value) for name, value in line.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def of_line(line: Line) -> list[Series]:
    """Of a line of metrics.jsonl."""
    return [(*series_of(name), value) for name, value in _numbers(line).items()]


def of_status(status: Mapping[str, Any]) -> list[Series]:
    """Of what the ring says of itself (Ring.status)."""

    def one_of(name: str, states: Sequence[str], state: str | None) -> list[Series]:
        return [(name, {"state": other}, float(other == state)) for other in states]

    series: list[Series] = [
        ("gvpo_num_steps", {}, float(status["num_steps"])),
        *one_of("gvpo_run_state", RUN_STATES, status["doing"]),
        *(("gvpo_groups", {"at": place}, float(status["running"].get(place, 0))) for place in PLACES),
        ("gvpo_oldest_group_seconds", {}, max(0.0, status["time"] - status["oldest"]["since"]) if status["oldest"] else 0.0),
        ("gvpo_verifiers", {"state": "busy"}, float(sum(number > 0 for number in status["verifiers"].values()))),
        ("gvpo_verifiers", {"state": "idle"}, float(sum(number == 0 for number in status["verifiers"].values()))),
        *((*series_of(f"recoveries/{who}"), float(number)) for who, number in status["recoveries"].items()),
    ]
    for pool in dict.fromkeys(engine["pool"] for engine in status["engines"]):
        engines = [engine for engine in status["engines"] if engine["pool"] == pool]
        states = Counter(engine["state"] for engine in engines)
        series += [("gvpo_engines", {"pool": pool, "state": state}, float(states[state])) for state in ENGINE_STATES]
        series.append(("gvpo_engine_groups", {"pool": pool}, float(sum(engine["num_groups"] for engine in engines))))
        versions = [engine["version"] for engine in engines if engine["version"] is not None]
        series += [("gvpo_engine_version", {"pool": pool}, float(min(versions)))] if versions else []
    if buffer := status["buffer"]:
        series += [("gvpo_buffer_groups", {"state": state}, float(buffer[f"num_{state}"])) for state in ("finished", "waiting", "running")]
        series.append(("gvpo_dial_open", {}, float(buffer["dial"] == "open")))
        series += one_of("gvpo_learner_state", LEARNER_STATES, next((state for state in LEARNER_STATES if buffer["learner"].startswith(state)), None))
        since = buffer["learner_since"]
        series.append(("gvpo_learner_state_seconds", {}, max(0.0, status["time"] - since) if since else 0.0))
    return series


class Gauges:
    """Series as gauges of Ray.

    Ray forgets a gauge that was not set within two of its reports (20 s), and a step may take longer: `show` sets all that is known anew.
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


# --- trackers ------------------------------------------------------------------------------------------------------------


class Tracker(Protocol):
    """A tracker's library.

    `run` is None until there is one, and then what finds it again: it is kept in run_dir.
    """

    run: str | None

    def log(self, step: int, at: int, values: dict[str, float]) -> None:
        """Returns when the values are kept. `at`: the place of the line in the run: it grows from line to line, while several have one step."""

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, arguments: dict[str, Any], run_dir: Path, run: str | None, parameters: dict[str, Any]) -> None:
        from tensorboardX import SummaryWriter

        # Its files are named by the second: a process that begins within the one of another would write over that one's.
        self._writer = SummaryWriter(**{"logdir": str(run_dir / "tensorboard"), "filename_suffix": f".{time.time_ns()}", **arguments})
        if run is None:
            self._writer.add_text("config", "".join(f"    {name}: {value}\n" for name, value in parameters.items()), 0)
        self.run = str(self._writer.logdir)

    def log(self, step: int, at: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(_tag(name), value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    def __init__(self, arguments: dict[str, Any], run_dir: Path, run: str | None, parameters: dict[str, Any]) -> None:
        import wandb

        self.run = str(arguments.get("id") or run or secrets.token_hex(4))
        ours = {"project": "gvpo", "name": run_dir.name, "dir": str(run_dir), "resume": "allow", "reinit": "create_new", "allow_val_change": True}
        settings = {"console": "off", **arguments.get("settings", {})}  # the run's own lines are not W&B's to catch
        self._run = wandb.init(**{**ours, **arguments, "id": self.run, "config": parameters, "settings": settings})
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, at: int, values: dict[str, float]) -> None:
        # W&B's own step must grow with every line, also over the process that takes the run up.
        self._run.log({"step": step, **values}, step=at, commit=True)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    def __init__(self, config: MLflowConfig, run_dir: Path, run: str | None, parameters: dict[str, Any]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        folder, artifacts = run_dir / "mlflow", None
        uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            folder.mkdir(exist_ok=True)
            uri, artifacts = f"sqlite:///{folder}/runs.db", (folder / "artifacts").as_uri()
        self._client = MlflowClient(uri)
        if run is None:
            experiment = self._client.get_experiment_by_name(config.experiment)
            number = experiment.experiment_id if experiment else self._client.create_experiment(config.experiment, artifacts)
            run = self._client.create_run(number, tags=config.tags, run_name=config.run_name or run_dir.name).info.run_id
            params = [Param(_tag(name), str(value)) for name, value in parameters.items()]
            for begin in range(0, len(params), 100):  # as many as one call takes
                self._client.log_batch(run, params=params[begin : begin + 100])
        else:
            self._client.update_run(run, status="RUNNING")
        self.run: str | None = run

    def log(self, step: int, at: int, values: dict[str, float]) -> None:
        now = int(1000 * time.time())
        self._client.log_batch(self.run, metrics=[self._metric(_tag(name), value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self._client.set_terminated(self.run)


def _tag(name: str) -> str:
    """A name that TensorBoard and MLflow take."""
    return re.sub(r"[^\w./-]", "_", name.replace("@", "_at_"))


TRACKERS: dict[str, tuple[Callable[..., Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"), "wandb": (WandB, "wandb"), "mlflow": (MLflow, "mlflow"),
}  # fmt: skip
"""By their key in the config: what makes one, and the package that it needs."""


def check_trackers(config: TrackingConfig) -> None:
    """Raises ConfigError where the library of a tracker is missing."""
    for name, (_, package) in TRACKERS.items():
        if getattr(config, name) is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(f"tracking.{name}: the package {package} is not installed; pip install -e '.[tracking]' brings it")


def parameters_of(config: GVPOConfig) -> dict[str, Any]:
    """The resolved config as flat keys (learner.num_workers), without what looks like a secret, and without `tracking`."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif not SECRET_NAME.search(prefix):
            text = json.dumps(value) if isinstance(value, (list, dict)) else value
            flat[prefix] = SECRET_PART.sub("…", text) if isinstance(text, str) else text

    walk("", config.model_dump(mode="json", exclude={"tracking"}))
    return flat


SECRET_NAME = re.compile(r"(?i)api_?key|secret|passw|credential|authorization|(^|[._])(token|auth|key)($|\.)")
SECRET_PART = re.compile(r"(?i)(?<=://)[^/@\s\"]+(?=@)|(?<=key=)[^&\s\"]+|(?<=token=)[^&\s\"]+|(?<=secret=)[^&\s\"]+")
"""Of a URL: who logs in, and a key that it ends with."""


class _Feed(threading.Thread):
    """Gives one tracker the lines that it has not had yet, in a thread of its own: nobody waits for somebody else's server.

    What it has had is in run_dir/tracking/<name>.json. A run that is resumed computes the steps after its checkpoint again, and they come out
    the same: the tracker is not told of them twice. What a tracker that failed has missed, it gets with the next line, or when the run is resumed.
    """

    def __init__(self, name: str, tracker: Tracker, lines: Sequence[Line], state: Path, last: int, say: Callable[[str], None]) -> None:
        super().__init__(name=f"tracking {name}", daemon=True)
        self._tracker, self._lines, self._state, self._last, self._say = tracker, lines, state, last, say
        self._next = 0
        self._has_warned = self._is_ending = False
        self._wake = threading.Event()
        self._keep()
        self.wake()

    def _keep(self) -> None:
        part = self._state.with_suffix(".part")
        part.write_text(json.dumps({"run": self._tracker.run, "last": self._last}))
        part.replace(self._state)

    def wake(self) -> None:
        self._wake.set()

    def run(self) -> None:
        """Waits for lines (woken by Tracking) until the run ends."""
        while True:
            self._wake.wait()
            self._wake.clear()
            is_ending = self._is_ending
            try:
                self._log_new()
            except Exception as error:  # a library's of others, most often its network's: the training is not to end with it
                if not self._has_warned:
                    self._has_warned = True
                    self._say(f"{self.name}: {_first_line(error)}; the training goes on, and what is missing there is sent again later")
            if is_ending:
                with contextlib.suppress(Exception):  # as above
                    self._tracker.close()
                return

    def _log_new(self) -> None:
        while self._next < len(self._lines):
            line = self._lines[self._next]
            if place(line) > self._last:
                self._tracker.log(line["step"], place(line), {name: value for name, value in _numbers(line).items() if name != "step"})
                self._last = place(line)
                self._keep()
            self._next += 1

    def close(self) -> None:
        """Send what is left, for a while."""
        self._is_ending = True
        self.wake()
        self.join(CLOSE_S)


CLOSE_S = 30.0
"""How long the end of a run waits for a tracker that still sends."""


def place(line: Line) -> int:
    """Of a line in its run: an evaluation of a step comes after the step's training. Both at most once."""
    return 2 * int(line["step"]) + any(name.startswith("eval/") for name in line)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}".rstrip(": ")


class Tracking:
    """Shows a run's numbers to Ray and to the trackers of its config.

    Args:
        lines: of metrics.jsonl, those of the process before included; it grows, and `line` tells of it.
        say: gets one line when a tracker fails.

    Raises:
        ConfigError: a tracker that does not start: its arguments, its server, its account.
    """

    def __init__(self, config: GVPOConfig, lines: Sequence[Line], say: Callable[[str], None]) -> None:
        run_dir = Path(config.run_dir)
        self._gauges = Gauges(run_dir.name)
        self._feeds: list[_Feed] = []
        for name, (make, _) in TRACKERS.items():
            arguments = getattr(config.tracking, name)
            if arguments is None:
                continue
            state = run_dir / "tracking" / f"{name}.json"
            state.parent.mkdir(exist_ok=True)
            known = json.loads(state.read_text()) if state.exists() else {"run": None, "last": -1}
            try:
                tracker = make(arguments, run_dir, known["run"], parameters_of(config))
            except Exception as error:  # whatever the library raises, it is the config's, or its server's
                self.close()
                raise ConfigError(f"tracking.{name}: {_first_line(error)}") from error
            self._feeds.append(_Feed(name, tracker, lines, state, known["last"], say))
            self._feeds[-1].start()

    def line(self, line: Line) -> None:
        """A new line of metrics.jsonl."""
        self._gauges.show("evaluation" if place(line) % 2 else "training", of_line(line))
        for feed in self._feeds:
            feed.wake()

    def status(self, status: Mapping[str, Any]) -> None:
        """What the ring says of itself, every few seconds."""
        self._gauges.show("status", of_status(status))

    def close(self) -> None:
        for feed in self._feeds:
            feed.close()
