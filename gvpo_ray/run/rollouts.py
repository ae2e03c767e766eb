"""The rollout loop moves groups from the prompts to the buffer, and reports the state of the run.

    prompts ──► engines ──► verifiers ──► buffer ──► learner ──► weights ─┐
      ▲                                                       (pulled by  │
      └── a group may start while started // n <= version + max_staleness ◄┘ engines)

Everything asynchronous runs on one event loop of the driver, which holds object refs only; tables go from
actor to actor. `Ring._roll_out` is the path of one group.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
from ray.exceptions import RayError

from gvpo_ray import groups
from gvpo_ray.actors import EventCallback, RunError, is_lost
from gvpo_ray.buffer.actor import BufferClient
from gvpo_ray.buffer.log import Quarantine
from gvpo_ray.config.data import ReplayConfig
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.engines.pools import EngineGroup
from gvpo_ray.observe.status import EngineState, status_lines, write_status
from gvpo_ray.run.inputs import Inputs
from gvpo_ray.verifiers.pool import VerifierGroup
from gvpo_ray.verifiers.references import ReferenceGroup

LineCallback = Callable[[str], None]
"""A callback that shows a line to the user."""


class Ring:
    """A Ring is the rollout loop of a run.

    Args:
        inputs: the prompts and offline sources; None if the run trains on recorded groups only.
        engines: sample the groups; none if the run trains on recorded groups only.
        verifiers: score the groups; None if the run trains on recorded groups only, and then `watch` is all
            that there is to run.
        buffer: takes the scored groups.
        quarantine: prompts that are not sampled again.
        sampling: number of completions, temperature, and so on.
        replay: share of a group's completions that are replayed.
        watchdog_s: seconds without a finished group or step after which the watchdog reports.
        run_dir: where status.json is written.
        state: returns the driver's part of the status: step, num_steps, what it does, recoveries.
        note: called on every recovery.
        say: called with lines for the user.
        references: add the log-probs of another model that is the reference; None: a policy of the run is.
    """

    def __init__(
        self,
        inputs: Inputs | None,
        engines: EngineGroup,
        verifiers: VerifierGroup | None,
        buffer: BufferClient,
        quarantine: Quarantine,
        sampling: SamplingConfig,
        replay: ReplayConfig,
        watchdog_s: float,
        run_dir: Path,
        state: Callable[[], dict[str, Any]],
        note: EventCallback,
        say: LineCallback,
        references: ReferenceGroup | None = None,
    ) -> None:
        self._references = references
        self._inputs, self._engines, self._verifiers, self._buffer, self._quarantine = (
            inputs,
            engines,
            verifiers,
            buffer,
            quarantine,
        )
        self._sampling, self._num_replayed = sampling, round(replay.share * sampling.num_completions)
        self._watchdog_s, self._run_dir, self._state, self._note, self._say = (
            watchdog_s,
            run_dir,
            state,
            note,
            say,
        )
        self.running: dict[int, tuple[float, str]] = {}
        """Groups in flight: id -> (Unix seconds when it started, stage)."""
        self._at: Counter[str] = Counter()
        """Number of groups in flight per stage."""
        self.show: Callable[[dict[str, Any]], None] = lambda status: None
        """Callback that gets every status that is written to status.json."""
        self._version = 0  # of published weights, as far as this loop has asked
        self._num_gone = 0  # sources of groups whose prompts are all in quarantine
        self._last: dict[str, Any] = {}
        self._tokens_before: dict[str, int] = {}
        self._then = time.perf_counter()

    async def run(self) -> None:
        """Sample until the buffer is closed.

        The first error of any task ends the loop, as an exception group.

        Raises:
            RunError: every prompt was in quarantine when the run was taken up.
        """
        self._refuse_quarantine()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._engines.run())
            watching = tasks.create_task(self.watch())
            await self._start_groups(tasks)
            watching.cancel()

    async def _start_groups(self, tasks: asyncio.TaskGroup) -> None:
        """Start as many groups as there is room for.

        Waits for room first (a freed engine slot sets the event), then for the staleness bound.
        """
        assert self._inputs is not None
        while True:
            while (room := self._room()) < 1:
                self._engines.room.clear()
                await self._engines.room.wait()
            started = await self._buffer.start(min(room, MAX_STARTS))
            if started is None:
                return
            ready: list[pa.Table] = []
            for group_id, min_version in started:
                self._goes_to(group_id, time.time(), "prompts")
                prompt, is_whole = self._inputs.group(group_id)
                if is_whole and self._references is None and groups.has_all_rewards(prompt):
                    ready.append(prompt)
                else:
                    tasks.create_task(self._roll_out([prompt], is_whole, min_version))
            for first in range(0, len(ready), MAX_TOGETHER):
                tasks.create_task(self._roll_out(ready[first : first + MAX_TOGETHER], True, 0))

    def _room(self) -> int:
        """Return the number of groups that may start.

        A group needs a free engine slot, and the verifiers must not be too far behind.
        """
        later = self._at["verifiers"] + self._at["references"] + self._at["buffer"]
        if not self._engines.slots:
            return MAX_UNVERIFIED - len(self.running)
        free = self._engines.num_free() - self._at["prompts"]  # groups at this stage are about to take a slot
        return min(free, max(MAX_UNVERIFIED, 2 * self._engines.max_groups) - later)

    def _goes_to(self, group_id: int, since: float, where: str | None) -> None:
        """Record the stage that a group enters; None: it has left the loop."""
        if group_id in self.running:
            self._at[self.running.pop(group_id)[1]] -= 1
        if where is not None:
            self.running[group_id] = since, where
            self._at[where] += 1

    async def _roll_out(self, prompts: Sequence[pa.Table], is_whole: bool, min_version: int) -> None:
        """Take a group along its path: sampled, verified, logged. The driver sees object refs only.

        Several whole groups go together where nothing of them has to be computed: a call to an actor takes
        longer than what it then does for one of them.
        """
        assert self._verifiers is not None
        since = {prompt["group_id"][0].as_py(): time.time() for prompt in prompts}
        kept = [prompt for prompt in prompts if not self._quarantine.holds(prompt)]
        for group_id in since.keys() - {prompt["group_id"][0].as_py() for prompt in kept}:
            await self._buffer.skip(group_id)
            self._goes_to(group_id, since.pop(group_id), None)  # or a new buffer waits for it
        if kept and (is_whole or await self._has_reached(min_version)):
            while True:
                self._go_to(since, "prompts")
                try:
                    sampled = (
                        ray.put(groups.to_wire(pa.concat_tables(kept, promote_options="default")))
                        if is_whole
                        else await self._sample(kept[0], min_version)
                    )
                    self._go_to(since, "verifiers")
                    self._engines.room.set()
                    scored = await self._verifiers.score(sampled)
                    if self._references is not None:
                        self._go_to(since, "references")
                        scored = await self._references.score(scored)
                    self._go_to(since, "buffer")
                    ended = await self._buffer.put(scored)
                    break
                except RayError as error:
                    if not is_lost(error):
                        raise
            if any([self._quarantine.judge(*each) for each in zip(kept, ended, strict=True)]):
                self._refuse_quarantine()
        self._go_to(since, None)
        self._engines.room.set()

    def _go_to(self, since: Mapping[int, float], where: str | None) -> None:
        """Record the stage that groups enter together."""
        for group_id, at in since.items():
            self._goes_to(group_id, at, where)

    async def _has_reached(self, version: int) -> bool:
        """Wait until the weights of a version are published; return whether they were before the run ended.

        A group that has a slot keeps it while its engine waits for newer weights. After a resume they come
        only when the driver lets the learner train, and the driver may wait for a slot: in an evaluation.
        """
        while self._version < version:
            reached = await self._buffer.reached(version)
            if reached is None:
                return False
            self._version = reached
        return True

    def _refuse_quarantine(self) -> None:
        """Raise an error where no group is left, as a run that skips all of them would go on for ever.

        While some source of groups has prompts left, the run goes on with those.
        """
        if self._inputs is None or not len(self._quarantine):
            return
        gone, left = list[str](), list[str]()
        for name, prompts in self._inputs.problems().items():
            is_gone = self._quarantine.holds_all(prompts, name)
            (gone if is_gone else left).append("prompts" if name is None else f"sources.{name}")
        if not left:
            raise RunError(f"every prompt is in {self._quarantine.path}: {self._quarantine.what_ends()}")
        if len(gone) > self._num_gone:
            self._num_gone = len(gone)
            where = f"every prompt of {', '.join(gone)} is in {self._quarantine.path}"
            self._say(f"{where}: the run goes on with {', '.join(left)}")

    async def _sample(self, prompt: pa.Table, min_version: int) -> Any:
        """Return the group's completions: some replayed, some from offline sources, the rest new."""
        assert self._inputs is not None
        kept: list[Any] = [groups.to_wire(completions) for completions in self._inputs.offline(prompt)]
        if self._num_replayed:  # first in the group: the buffer finds replayed completions by their places
            kept.insert(0, await self._buffer.replayed(prompt, self._num_replayed))
        group_id = prompt["group_id"][0].as_py()
        self._goes_to(group_id, self.running[group_id][0], "engines")
        return await self._engines.sample(prompt, self._sampling, min_version, kept=tuple(kept), is_new=True)

    # --- status and watchdog --------------------------------------------------------------------------------

    def rates(self) -> dict[str, float]:
        """Return what engines and verifiers did since the last call, as metrics."""
        now, pools = time.perf_counter(), sorted({slot.pool for slot in self._engines.slots})
        seconds, self._then = now - self._then, now
        tokens = {
            pool: sum(slot.num_tokens for slot in self._engines.slots if slot.pool == pool) for pool in pools
        }
        new = {pool: tokens[pool] - self._tokens_before.get(pool, 0) for pool in pools}
        self._tokens_before, total = tokens, sum(new.values())
        metrics = {"tokens/generated": float(total), "tokens/generated_per_s": total / seconds}
        for pool in pools:
            metrics[f"pools/{pool}/engines"] = float(
                sum(slot.pool == pool and slot.state == EngineState.RUNNING for slot in self._engines.slots)
            )
            metrics[f"pools/{pool}/tokens_per_s"] = new[pool] / seconds
            metrics[f"pools/{pool}/token_share"] = new[pool] / total if total else 0.0
        metrics |= {f"weights/{name}": value for name, value in self._engines.times.items()}
        metrics |= self._engines.prefix_cache()
        num_verifiers = len(self._verifiers.actors) if self._verifiers else 0
        return metrics | {
            "verifiers/num": float(num_verifiers),
            "prompts/quarantined": float(len(self._quarantine)),
        }

    async def status(self) -> dict[str, Any]:
        """Return the state of each stage, for status.json (observe/status.py puts it into words)."""
        oldest = min(
            ((since, group_id, where) for group_id, (since, where) in self.running.items()), default=None
        )
        available, total = await asyncio.to_thread(_cluster_resources)
        try:
            of_buffer = await asyncio.wait_for(self._buffer.status(), BUFFER_ANSWERS_S)
        except TimeoutError:
            of_buffer = None
        return {
            "time": time.time(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **self._state(),
            "engines": self._engines.status(),
            "verifiers": {
                name: number
                for group in (self._verifiers, self._references)
                for name, number in (group.status() if group else {}).items()
            },
            "outages": self._verifiers.outages() if self._verifiers else [],
            "buffer": of_buffer,
            "running": dict(self._at),
            "oldest": oldest
            and {
                "group_id": oldest[1],
                "since": oldest[0],
                "where": self._engines.engine_with(oldest[1]) or oldest[2],
                "prompt": self._inputs and self._inputs.group(oldest[1])[0]["prompt"][0].as_py()[:80],
            },
            "resources": {
                name: [available.get(name, 0.0), number]
                for name, number in sorted(total.items())
                if not re.search("node:|_group_", name)
            },
        }

    async def write_final_status(self) -> None:
        """Write the final status.json, which `gvpo-ray status` shows of a run that has ended.

        It must run on the event loop of `watch`, because both write the same temporary file.
        """
        if self._last:
            write_status(self._run_dir, {**self._last, **self._state(), "time": time.time()})

    async def note_learner(self) -> None:
        """Note the restarts of the learner that were not noted yet."""
        self._note_learner(await self._buffer.status())

    def _note_learner(self, of_buffer: dict[str, Any]) -> None:
        # The buffer keeps all restarts on disk, so those that an earlier driver did not live to note are
        # included.
        for restart in of_buffer.get("learner_restarts", [])[self._state()["recoveries"].get("learner", 0) :]:
            self._note(
                "learner",
                "learner",
                f"{restart['cause']}; goes on from the checkpoint of step {restart['step']}",
            )

    async def watch(self) -> None:
        """Write status.json, note restarts of the learner, and report when no group or step finishes."""
        said = 0.0
        moved = dict.fromkeys(("group has finished", "step has ended"), time.time())
        while True:
            self._last = status = await self.status()
            write_status(self._run_dir, status)
            self.show(status)
            of_buffer = status["buffer"] or {}
            self._note_learner(of_buffer)
            for what, at in zip(
                moved, (of_buffer.get("last_group_at"), of_buffer.get("last_step_at")), strict=True
            ):
                moved[what] = max(moved[what], at or 0.0)  # a restarted buffer does not know earlier times
            silent = {what: time.time() - at for what, at in moved.items()}
            late = [
                f"no {what} for {seconds:.0f} s"
                for what, seconds in silent.items()
                if seconds > self._watchdog_s
            ]
            if late and time.time() - said > self._watchdog_s:
                said = time.time()
                self._say(
                    "\n".join(
                        [f"watchdog: {' and '.join(late)}", *(f"  {line}" for line in status_lines(status))]
                    )
                )
            await asyncio.sleep(min(STATUS_EVERY_S, self._watchdog_s))


def _cluster_resources() -> tuple[dict[str, float], dict[str, float]]:
    """Return what the cluster has free, and what it has in all, by Ray's names of resources."""
    available: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
    total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return available, total


MAX_TOGETHER = 64
"""Most whole groups that go along the ring together."""
MAX_STARTS = 256
"""Most groups that are started by one call to the buffer."""

MAX_UNVERIFIED = 64
"""Groups that may wait for the verifiers, however few slots there are; beyond it, no group starts."""

STATUS_EVERY_S, BUFFER_ANSWERS_S = 5.0, 10.0
"""Seconds between two status reports, and seconds that a report waits for the buffer."""
