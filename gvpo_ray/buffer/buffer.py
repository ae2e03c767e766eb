"""The group buffer is where finished groups wait for the learner; it enforces the staleness bound.

    rollout loop   start(num) ─ may the next groups start? ─► history(prompt, num) ─► put(group) ─ to the log
    learner        next_command(step) ─ train, save or stop? ─► batch(step)
                   ─► published(version, weights, metrics) · report_references(…)
    engines        weights(newer_than)
    driver         permit(step) · trained(step) · save() · reconnect(…) · status() · close(error)

The commands to the learner are in control.py, the durable log in log.py, replay in replay.py. The buffer is a
plain class with async methods on one event loop; actor.py makes it an actor. Steps count from 1: step s
trains the s-th batch and makes version s of the weights. Version 0 is what the run started from.

Groups are stored in the log only, and the page cache keeps them in memory. So the buffer does not grow with
the tokens of the groups that wait. A restarted buffer rebuilds its state from the log, except for what
`reconnect` tells it and what the learner publishes next.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.buffer.control import LearnerControl
from gvpo_ray.buffer.log import EndedBy, GroupLog, lock_folder
from gvpo_ray.buffer.replay import ReplayIndex, replayed
from gvpo_ray.buffer.states import BoundState, LearnerState, Owner
from gvpo_ray.buffer.turns import Turns
from gvpo_ray.config.data import ReplayConfig
from gvpo_ray.files import append_line, read_lines

STEPS = "steps.jsonl"
"""The file in the log's folder with each step's metrics, for a driver killed before it could write them."""


def steps_metrics(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the metrics of each step, as the learner reported them last; `folder` is the log's."""
    return {entry["step"]: entry["metrics"] for entry in read_lines(folder / STEPS)}


class GroupBuffer(LearnerControl):
    """A GroupBuffer hands groups from the rollout loop to the learner, within the staleness bound.

    It continues a log that already has groups. No other buffer writes to the folder until this one has ended.

    Args:
        folder: the log's folder.
        groups_per_step: groups that a step trains.
        num_steps: steps of the run.
        max_staleness: most versions between the weights that may begin a group and the weights that train it;
            None: unbounded.
        version: version of the weights that the learner starts from.
        replay: which completions are replayed; None: none.
        takes_turns: whether engines sleep while the learner trains (turns.py).

    Raises:
        LogError: another buffer still writes to the folder after LOCK_WAIT_S, or the log lacks groups that
            are assigned to a step.
    """

    def __init__(
        self,
        folder: str | Path,
        groups_per_step: int,
        num_steps: int,
        max_staleness: int | None,
        version: int = 0,
        replay: ReplayConfig | None = None,
        takes_turns: bool = False,
    ) -> None:
        self._turns = Turns() if takes_turns else None
        self._lock = lock_folder(Path(folder))
        super().__init__(Path(folder), version)
        self.log = GroupLog(folder)
        self.log.repair()
        self.groups_per_step = groups_per_step
        self.num_steps = num_steps
        self.max_staleness = max_staleness
        # A step is assigned only once the learner has made all versions before it. While a resumed learner
        # repeats steps, `_learner_version` is behind.
        self.version = max(version, max(self.log.assigned, default=0) - 1)
        self._history = (
            ReplayIndex(self.log, replay, self.version) if replay is not None and replay.share > 0 else None
        )
        self._finished = set(self.log.group_ids)
        self._running: set[int] = set()
        self._next_id = 0  # no id from here on was started
        self._weights: tuple[int, Any] | None = None
        self._metrics: dict[int, dict[str, Any]] = {}
        self._last_group_at: float | None = None
        self._last_step_at: float | None = None

    def release(self) -> None:
        """Release the folder for another buffer, as the end of this process does."""
        self.log.close()
        self._lock.close()

    # --- rollout --------------------------------------------------------------------------------------------

    @property
    def _num_started(self) -> int:
        return len(self._finished) + len(self._running)

    def _may_start(self) -> bool:
        if self._num_started >= self.num_steps * self.groups_per_step:
            return False
        return (
            self.max_staleness is None
            or self._num_started // self.groups_per_step <= self.version + self.max_staleness
        )

    async def start(self, num: int = 1) -> list[tuple[int, int]] | None:
        """Wait until the staleness bound lets a group start, and start up to `num` of them.

        The version that comes with a group is the staleness bound for the engine: an engine with older
        weights waits for newer ones. They will come: the version asked for is never above `version`, and a
        learner that is behind it needs no new group to get there.

        Returns:
            [(group id, oldest version of the weights that may begin it)], or None when the run is over.
        """
        async with self._new_version:
            with self._waits["bound"]:
                await self._new_version.wait_for(lambda: self._closed or self._may_start())
            if self._closed:
                return None
            started: list[tuple[int, int]] = []
            while len(started) < num and self._may_start():
                while self._next_id in self._finished or self._next_id in self._running:
                    self._next_id += 1
                oldest = (
                    0
                    if self.max_staleness is None
                    else max(0, self._num_started // self.groups_per_step - self.max_staleness)
                )
                # After a resume the log can be ahead of the weights: never ask for a version that does not
                # exist.
                started.append((self._next_id, min(oldest, self.version)))
                self._running.add(self._next_id)
                self._next_id += 1
            return started

    async def history(self, prompt: pa.Table, num: int) -> pa.Table:
        """Return at most `num` earlier completions of the policy for this prompt, with the source "replay".

        They come with their logged rewards and sampling log-probs, and with the references that the learner
        reported. A completion is at most once in a group, but may be in several groups. There are none unless
        replay is configured.
        """
        return (
            replayed(prompt, []) if self._history is None else self._history.pick(prompt, num, self.version)
        )

    async def skip(self, group_id: int) -> None:
        """Give up a started group that will not be sampled; another one may start in its place."""
        async with self._new_version:
            self._running.discard(group_id)
            self._new_version.notify_all()

    async def put(self, finished: pa.Table) -> list[EndedBy]:
        """Append finished groups to the log and wake the learner; a group already there is ignored.

        Returns:
            How the checks of the completions ended, for each group.

        Raises:
            GroupError: a group lacks a logged column, or its lists do not fit.
        """
        references = [
            name
            for name in groups.REFERENCE_COLUMNS
            if name in finished.schema.names and not finished[name].null_count
        ]
        groups.validate(finished, (*groups.LOGGED_COLUMNS, *references))
        finished = groups.log_columns(finished)
        ended = [self._put_one(finished.slice(i, 1)) for i in range(len(finished))]
        async with self._new_group:
            self._new_group.notify_all()
        return ended

    def _put_one(self, group: pa.Table) -> EndedBy:
        group_id = group.column("group_id")[0].as_py()
        self._running.discard(group_id)
        if group_id in self._finished:
            return EndedBy.NONE
        row = len(self.log)
        self.log.append(group)
        self._finished.add(group_id)
        self._last_group_at = time.time()
        if self._history is not None:
            self._history.add(row, group)
        if not groups.all_cut_off(group):
            return EndedBy.WELL if groups.any_episode_well(group) else EndedBy.NONE
        return EndedBy.LATE if groups.all_late(group) else EndedBy.CHECKS

    # --- learner --------------------------------------------------------------------------------------------

    async def batch(self, step: int) -> pa.Table | None:
        """Return the groups of a step in order of arrival, once there are enough; None: the run was closed.

        The assignment of groups to the step is in the log before the answer. So any rank, also after a
        restart or the end of the run, gets the same rows.
        """
        async with self._new_group:
            self._learner_is_up = True
            if step not in self.log.assigned:
                begin = self.log.end
                end = begin + self.groups_per_step
                if len(self.log) < end:
                    self.set_learner_state(LearnerState.WAITS_FOR_GROUPS, waits_for=step)
                with self._waits["learner"]:
                    await self._new_group.wait_for(
                        lambda: self._closed or step in self.log.assigned or len(self.log) >= end
                    )
                if step not in self.log.assigned:
                    if self._closed:
                        self.set_learner_state(LearnerState.STOPPED)
                        return None
                    self.log.assign(step, begin, end)
            self.set_learner_state(LearnerState.TRAINS, f"step {step}")
        if self._turns is not None:
            await self._turns.take()
        return self.log.read(*self.log.assigned[step])

    async def report_references(self, version: int, references: Mapping[int, list[float | None]]) -> None:
        """Record log-probs of a step's groups under the reference model of `version`, for later replay.

        Args:
            version: version of the reference's weights.
            references: group id -> one number per completion; None: the completion was not trained on.
        """
        if self._history is not None:
            self._history.report_references(version, references)

    async def published(self, version: int, weights: Any, metrics: dict[str, Any] | None = None) -> None:
        """Record that the learner has made `version`: groups may start, and engines get new weights.

        A learner that resumed from a checkpoint publishes older versions again: engines without newer ones
        get those.

        Args:
            version: the step that made these weights.
            weights: where the weights are, for the engines. None: they are on their way, and a second call
                says where; until then this is no new version for groups and engines.
            metrics: the step's metrics, for the driver.
        """
        async with self._new_version:
            self._learner_version = version
            if weights is not None:
                self.version = max(self.version, version)
                self._weights = (version, weights)
            if metrics is not None:
                self._metrics[version] = metrics
                append_line(self.log.folder / STEPS, {"step": version, "metrics": metrics})
                self._last_step_at = time.time()
            self._new_version.notify_all()
        if self._learner_from is None:  # the learner started before this buffer was restarted
            self._learner_from = version
        elif weights is not None and version > self._learner_from:  # the step is finished
            self._learner_deaths = 0
        if self._turns is not None and weights is not None:
            await self._turns.give()
        if not self.learner_is_beyond(version):
            self.set_learner_state(LearnerState.PUBLISHED, f"version {version}")
        if self._history is not None:
            self._history.forget(self.version)

    # --- engines --------------------------------------------------------------------------------------------

    async def weights(self, newer_than: int) -> tuple[int, Any] | None:
        """Return (version, where) of the last published weights once newer; None: the run was closed."""
        async with self._new_version:
            await self._new_version.wait_for(
                lambda: self._closed or (self._weights is not None and self._weights[0] > newer_than)
            )
            return None if self._closed else self._weights

    async def next_turn(self, turn: int) -> tuple[int, Owner] | None:
        """Return the next turn on shared GPUs, and whose it is; see Turns.next. None: the run was closed."""
        assert self._turns is not None
        return await self._turns.next(turn)

    async def engines_sleep(self, turn: int) -> None:
        """Let the learner begin its turn: all engines sleep."""
        assert self._turns is not None
        await self._turns.slept(turn)

    async def close(self, error: str | None = None) -> None:
        """End the run and wake everybody who waits; the first error is kept."""
        await super().close(error)
        if self._turns is not None:
            await self._turns.close()

    async def has_weights(self) -> bool:
        """Return whether the learner has told where its weights are; a restarted buffer does not know."""
        return self._weights is not None

    # --- driver ---------------------------------------------------------------------------------------------

    async def reached(self, version: int) -> int | None:
        """Return the version of the published weights once it is `version` or newer; None: closed.

        After a resume, the log and so `start` may be ahead of the learner's weights.
        """
        weights = await self.weights(version - 1)
        return None if weights is None else weights[0]

    async def trained(self, step: int) -> dict[str, Any] | None:
        """Return a step's metrics once it is trained; None: the run was closed before.

        A learner that started from a newer checkpoint than the driver saw has trained the steps before it:
        their metrics are on disk.
        """
        async with self._new_version:
            await self._new_version.wait_for(
                lambda: self._closed or step in self._metrics or step <= (self._learner_from or 0)
            )
            for old in [s for s in self._metrics if s < step]:
                del self._metrics[old]
            if step not in self._metrics and step <= (self._learner_from or 0):
                return steps_metrics(self.log.folder).get(step, {})
            return self._metrics.get(step)

    async def waits(self) -> dict[str, float] | None:
        """Return the seconds of waiting since this buffer was made.

        "learner" is the learner's waiting for groups, "bound" the engines' waiting for the staleness bound
        although they have free slots, "driver" the learner's waiting for the driver.

        Returns:
            Seconds by who waits; None while there is no learner, or until it has asked for groups after a
                restart.
        """
        return {who: waits.seconds for who, waits in self._waits.items()} if self._learner_is_up else None

    async def reconnect(self, running: list[int], allowed: int, closed: bool, error: str | None) -> None:
        """Tell a restarted buffer what the log does not hold.

        Args:
            running: ids of the groups in flight.
            allowed: last step that may be trained.
            closed: whether the run is over.
            error: the run's first error.
        """
        async with self._new_version:
            self._running |= {*running} - self._finished
        await self.permit(allowed)
        if closed:
            await self.close(error)

    async def status(self) -> dict[str, Any]:
        """Return the state of the queue, the staleness bound and the learner, for watchdog and status page.

        Times are Unix seconds.
        """
        num_waiting = len(self.log) - self.log.end
        learner = f"{self._learner_state} {self._learner_detail}".rstrip()
        if self._learner_waits_for is not None:
            learner += f": step {self._learner_waits_for} has {num_waiting} of {self.groups_per_step}"
        bound, why = self._bound()
        return {
            "version": self.version,
            "num_finished": len(self._finished),
            "num_running": len(self._running),
            "oldest_running": min(self._running, default=None),
            "num_waiting": num_waiting,
            "bound": bound,
            "staleness": f"{bound}{why}",
            "learner_state": self._learner_state,
            "learner": learner,
            "learner_since": self._learner_since,
            "learner_restarts": list(self._learner_restarts),
            "last_group_at": self._last_group_at,
            "last_step_at": self._last_step_at,
            "closed": self._closed,
            "error": self.error,
        }

    def _bound(self) -> tuple[BoundState, str]:
        if self._may_start():
            return BoundState.OPEN, ""
        if self._num_started >= self.num_steps * self.groups_per_step:
            return BoundState.ALL_STARTED, ""
        return (
            BoundState.CLOSED,
            f": {self._num_started} groups started, version {self.version} allows no more",
        )
