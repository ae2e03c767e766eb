"""The lines of metrics.jsonl go to Ray and to the trackers of the config."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import secrets
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gvpo_ray.actors import cause_of, tag_of
from gvpo_ray.config.base import ConfigError, flattened
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.config.shown import hide
from gvpo_ray.config.tracking import MLflowConfig, TrackingConfig
from gvpo_ray.files import write_whole
from gvpo_ray.observe.ray_metrics import Gauges, Line, numbers_of, of_line, of_status, place


class Tracker(Protocol):
    """A Tracker is the adapter of a tracker's library."""

    run: str | None
    """Id or folder with which a resumed run finds its place again; kept in run_dir."""

    def log(self, step: int, at: int, values: dict[str, float]) -> None:
        """Log the values of a line, and return when the tracker has them.

        Args:
            step: of the line; a training line and an evaluation may share it.
            at: position of the line in the run, which grows from line to line.
            values: by metric.
        """

    def close(self) -> None:
        """End the run in the tracker."""


class TensorBoard:
    """The tracker TensorBoard writes event files to run_dir/tensorboard."""

    def __init__(
        self, arguments: dict[str, Any], run_dir: Path, run: str | None, parameters: dict[str, Any]
    ) -> None:
        from tensorboardX import SummaryWriter

        # tensorboardX names its files by the second, so two processes that begin in the same second would
        # write to the same file.
        self._writer = SummaryWriter(
            **{"logdir": str(run_dir / "tensorboard"), "filename_suffix": f".{time.time_ns()}", **arguments}
        )
        if run is None:
            self._writer.add_text(
                "config", "".join(f"    {name}: {value}\n" for name, value in parameters.items()), 0
            )
        self.run = str(self._writer.logdir)

    def log(self, step: int, at: int, values: dict[str, float]) -> None:
        """Add the values at `step`, and flush the file."""
        for name, value in values.items():
            self._writer.add_scalar(_tag(name), value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WandB:
    """The tracker WandB logs to a run of Weights & Biases; a resumed run has the same id."""

    def __init__(
        self, arguments: dict[str, Any], run_dir: Path, run: str | None, parameters: dict[str, Any]
    ) -> None:
        import wandb

        self.run = str(arguments.get("id") or run or secrets.token_hex(4))
        ours = {
            "project": "gvpo",
            "name": run_dir.name,
            "dir": str(run_dir),
            "resume": "allow",
            "reinit": "create_new",
            "allow_val_change": True,
        }
        # W&B would wrap stdout, to which the run itself writes
        settings = {"console": "off", **arguments.get("settings", {})}
        # W&B keeps the command line, whose overrides may hold secrets
        given, sys.argv = sys.argv, hide(sys.argv)
        try:
            self._run = wandb.init(
                **{**ours, **arguments, "id": self.run, "config": parameters, "settings": settings}
            )
        finally:
            sys.argv = given
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, at: int, values: dict[str, float]) -> None:
        """Log the values as one line of history."""
        # W&B's own step must grow with every line, also after the run was resumed.
        self._run.log({"step": step, **values}, step=at, commit=True)

    def close(self) -> None:
        """Finish the run in W&B."""
        self._run.finish()


class MLflow:
    """The tracker MLflow logs to a run of MLflow, on a server or in a database in run_dir/mlflow."""

    def __init__(
        self, config: MLflowConfig, run_dir: Path, run: str | None, parameters: dict[str, Any]
    ) -> None:
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
            number = (
                experiment.experiment_id
                if experiment
                else self._client.create_experiment(config.experiment, artifacts)
            )
            run = self._client.create_run(
                number, tags=config.tags, run_name=config.run_name or run_dir.name
            ).info.run_id
            params = [Param(_tag(name), str(value)) for name, value in parameters.items()]
            for begin in range(0, len(params), 100):  # as many as one call takes
                self._client.log_batch(run, params=params[begin : begin + 100])
        else:
            self._client.update_run(run, status="RUNNING")
        self.run: str | None = run
        self._run: str = run

    def log(self, step: int, at: int, values: dict[str, float]) -> None:
        """Log the values at `step`."""
        now = int(1000 * time.time())
        self._client.log_batch(
            self._run, metrics=[self._metric(_tag(name), value, now, step) for name, value in values.items()]
        )

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run)


def _tag(name: str) -> str:
    """Make a metric's name one that TensorBoard and MLflow accept."""
    return re.sub(r"[^\w./-]", "_", name.replace("@", "_at_"))


TRACKERS: dict[str, tuple[Callable[..., Any], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WandB, "wandb"),
    "mlflow": (MLflow, "mlflow"),
}
"""Class of each tracker and the package that it needs, by the key in the config."""


def check_trackers(config: TrackingConfig) -> None:
    """Check that the libraries of the configured trackers are installed.

    Raises:
        ConfigError: one line that names the missing package.
    """
    for name, (_, package) in TRACKERS.items():
        if getattr(config, name) is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"tracking.{name}: the package {package} is not installed; pip install -e '.[tracking]' "
                "brings it"
            )


def parameters_of(config: GVPOConfig) -> dict[str, Any]:
    """Return the resolved config by dotted keys (learner.num_workers), without `tracking` and secrets."""
    flat = flattened(hide(config.model_dump(mode="json", exclude={"tracking"})))
    return {
        key: json.dumps(value) if isinstance(value, (list, dict)) else value for key, value in flat.items()
    }


class _Feed(threading.Thread):
    """A _Feed sends new lines to one tracker, in a thread, so that training never waits for a server.

    run_dir/tracking/<name>.json holds the position of the last line that was sent. A resumed run computes the
    steps after its checkpoint again, with the same results, and does not send them twice. Lines that a
    tracker missed while it failed are sent with the next line, or when the run is resumed.
    """

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        lines: Sequence[Line],
        state: Path,
        last: int,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(name=f"tracking {name}", daemon=True)
        self._tracker, self._lines, self._state, self._last, self._say = tracker, lines, state, last, say
        self._next = 0
        self._has_warned = self._is_ending = False
        self._wake = threading.Event()
        self._keep()
        self.wake()

    def _keep(self) -> None:
        write_whole(self._state, json.dumps({"run": self._tracker.run, "last": self._last}))

    def wake(self) -> None:
        self._wake.set()

    def run(self) -> None:
        """Wait for lines and send them until the run ends; `wake` announces them."""
        while True:
            self._wake.wait()
            self._wake.clear()
            is_ending = self._is_ending
            try:
                self._log_new()
            # any error of a tracker's library, most often of its network, must not end the training
            except Exception as error:
                if not self._has_warned:
                    self._has_warned = True
                    self._say(
                        f"{self.name}: {cause_of(error)}; the training goes on, and what is missing "
                        "there is sent again later"
                    )
            if is_ending:
                with contextlib.suppress(Exception):  # nor must an error of the last call
                    self._tracker.close()
                return

    def _log_new(self) -> None:
        while self._next < len(self._lines):
            line = self._lines[self._next]
            if place(line) > self._last:
                self._tracker.log(
                    line["step"],
                    place(line),
                    {name: value for name, value in numbers_of(line).items() if name != "step"},
                )
                self._last = place(line)
                self._keep()
            self._next += 1

    def close(self) -> None:
        """Send the lines that are left, for at most CLOSE_S seconds."""
        self._is_ending = True
        self.wake()
        self.join(CLOSE_S)


CLOSE_S = 30.0
"""Seconds that the end of a run waits for a tracker that still sends."""


class Tracking:
    """Tracking sends the metrics of a run to Ray and to the trackers of its config.

    Args:
        config: of the run.
        lines: of metrics.jsonl, including those from before a resume. The list grows; `line` announces it.
        say: gets one line when a tracker fails.

    Raises:
        ConfigError: a tracker does not start, because of its arguments, its server or its account.
    """

    def __init__(self, config: GVPOConfig, lines: Sequence[Line], say: Callable[[str], None]) -> None:
        run_dir = Path(config.run_dir)
        self._gauges = Gauges(tag_of(run_dir.name))
        self._feeds: list[_Feed] = []
        for name, (make, _) in TRACKERS.items():
            arguments = getattr(config.tracking, name)
            if arguments is None:
                continue
            state = run_dir / "tracking" / f"{name}.json"
            state.parent.mkdir(exist_ok=True)
            known: dict[str, Any] = (
                json.loads(state.read_text(encoding="utf-8")) if state.exists() else {"run": None, "last": -1}
            )
            try:
                tracker = make(arguments, run_dir, known["run"], parameters_of(config))
            except Exception as error:  # whatever the library raises, the config or the server is at fault
                self.close()
                raise ConfigError(f"tracking.{name}: {cause_of(error)}") from error
            self._feeds.append(_Feed(name, tracker, lines, state, known["last"], say))
            self._feeds[-1].start()

    def line(self, line: Line) -> None:
        """Send a new line of metrics.jsonl."""
        self._gauges.show("evaluation" if place(line) % 2 else "training", of_line(line))
        for feed in self._feeds:
            feed.wake()

    def status(self, status: Mapping[str, Any]) -> None:
        """Send the status of the run, which the training loop reports every few seconds."""
        self._gauges.show("status", of_status(status))

    def close(self) -> None:
        """Send the lines that are left, and close the trackers."""
        for feed in self._feeds:
            feed.close()
