"""The buffer controls the learner: what it does next, what it was told, and how often it died.

    learner   next_command(step) ─ train, save or stop?      saved(step)      learner_started(step)
    driver    permit(step) · save()
    Ray Train learner_failed(cause)

GroupBuffer is built on it; the groups and the weights are there.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from gvpo_ray.buffer.states import Command, LearnerState
from gvpo_ray.buffer.waits import WaitingTime
from gvpo_ray.files import append_line, read_lines

ORDERS = "orders.jsonl"
"""The file in the log's folder with the commands to the learner; each driver process starts a new one."""

RESTARTS = "learner_restarts.jsonl"
"""The file in the log's folder with every restart of the learner: when, from which step and why."""

MAX_LEARNER_DEATHS = 3
"""Learner deaths without a finished step in between after which the run stops."""


class LearnerControl:
    """A LearnerControl gives every rank of the learner the same command, and knows what the learner does.

    Args:
        folder: the log's folder; the commands and the restarts are kept there.
        version: version of the weights that the learner starts from.
    """

    def __init__(self, folder: Path, version: int) -> None:
        self._commands_path = folder / ORDERS
        self._commands = {
            (entry["step"], entry["saved"]): Command(entry["order"])
            for entry in read_lines(self._commands_path)
        }
        self._allowed = 0
        self._learner_version = version  # of the last published weights
        self._saved_step = version if version > 0 else -1  # a resumed run starts from a checkpoint
        self._save_wanted = -1  # save() waits for a checkpoint of this version or a newer one
        self._closed = False
        self.error: str | None = None
        self._learner_state, self._learner_detail = LearnerState.NOT_STARTED, ""
        self._learner_waits_for: int | None = None  # the step whose groups it has asked for
        self._learner_since = time.time()
        self._learner_from: int | None = None  # the version that it started from last
        self._learner_deaths = 0  # since the last finished step
        self._learner_cause = "no cause is known"
        self._learner_is_up = False
        self._restarts_path = folder / RESTARTS
        self._learner_restarts: list[dict[str, Any]] = read_lines(self._restarts_path)
        self._waits = {"learner": WaitingTime(), "bound": WaitingTime(), "driver": WaitingTime()}
        # One condition per kind of event: hundreds of free slots may wait to start, and a finished group must
        # not wake them all.
        self._new_version, self._new_group, self._new_command = (asyncio.Condition() for _ in range(3))

    def _must_save(self, step: int) -> bool:
        return self._saved_step < self._save_wanted < step

    def set_learner_state(self, state: LearnerState, detail: str = "", waits_for: int | None = None) -> None:
        """Record what the learner does, and since when."""
        before = self._learner_state, self._learner_detail, self._learner_waits_for
        if before != (state, detail, waits_for):
            self._learner_state, self._learner_detail, self._learner_waits_for = state, detail, waits_for
            self._learner_since = time.time()

    def learner_is_beyond(self, version: int) -> bool:
        """Return whether the learner is past `version`, whose weights come while it does other things."""
        following = f"step {version + 1}"
        after = LearnerState.WAITS_FOR_DRIVER, LearnerState.SAVES, LearnerState.SAVED, LearnerState.STOPPED
        return (
            self._learner_waits_for == version + 1
            or self._learner_state in after
            or (self._learner_state is LearnerState.TRAINS and self._learner_detail == following)
        )

    async def learner_started(self, step: int) -> None:
        """Record that the learner is up with the weights of `step`, for the first time or after a failure.

        MAX_LEARNER_DEATHS restarts without a finished step in between close the run.
        """
        if self._learner_from is not None:
            self._learner_restarts.append({"time": time.time(), "step": step, "cause": self._learner_cause})
            # On disk, because the driver may die before it hears of the restart.
            append_line(self._restarts_path, self._learner_restarts[-1])
            self._learner_deaths += 1
            if self._learner_deaths >= MAX_LEARNER_DEATHS:
                await self.close(
                    f"the learner died {self._learner_deaths} times in a row without a step between: "
                    f"{self._learner_cause}"
                )
        async with self._new_version:
            self._learner_from = step
            self._new_version.notify_all()
        async with self._new_command:
            # It starts from a checkpoint, which the one before may have written and not reported.
            self._saved_step = max(self._saved_step, step or -1)
            self._new_command.notify_all()
        self.set_learner_state(LearnerState.STARTS, f"from step {step}")

    async def learner_waits(self, why: str) -> None:
        """Record that the learner waits for another one, which writes the run's checkpoints."""
        self.set_learner_state(LearnerState.WAITS_FOR_ANOTHER, why)

    async def learner_failed(self, cause: str) -> None:
        """Record that the learner died and is about to be restarted."""
        self._learner_cause, self._learner_is_up = cause, False
        self.set_learner_state(LearnerState.DIED, f"and is started again: {cause}")

    async def next_command(self, step: int, saved: bool = False) -> Command:
        """Return what the learner does next: train step `step`, save a checkpoint of step - 1, or stop.

        Waits for permit(), save() or close(). Every rank gets the same answer to the same question, whenever
        it asks.

        Args:
            step: the step that the learner would train next.
            saved: a checkpoint of step - 1 exists, or is being written.
        """
        key = (step, saved)
        async with self._new_command:
            if not self._has_command(step, saved):
                self.set_learner_state(LearnerState.WAITS_FOR_DRIVER)
                with self._waits["driver"]:
                    await self._new_command.wait_for(lambda: self._has_command(step, saved))
            if key not in self._commands:
                if self._closed:
                    self.set_learner_state(LearnerState.STOPPED)
                    return Command.STOP
                self._commands[key] = Command.SAVE if self._must_save(step) and not saved else Command.TRAIN
                # On disk, because other ranks may ask a restarted buffer.
                append_line(self._commands_path, {"step": step, "saved": saved, "order": self._commands[key]})
            if self._commands[key] is Command.TRAIN:
                self.set_learner_state(LearnerState.TRAINS, f"step {step}")
            else:
                self.set_learner_state(LearnerState.SAVES, f"step {step - 1}")
            return self._commands[key]

    def _has_command(self, step: int, saved: bool) -> bool:
        return (
            self._closed
            or (step, saved) in self._commands
            or (self._must_save(step) and not saved)
            or step <= self._allowed
        )

    async def saved(self, step: int) -> None:
        """Record that the learner has written the checkpoint of `step`, perhaps while it trained on."""
        async with self._new_command:
            self._saved_step = step
            if self._learner_state is LearnerState.SAVES:
                self.set_learner_state(LearnerState.SAVED, f"step {step}")
            self._new_command.notify_all()

    async def permit(self, step: int) -> None:
        """Let the learner train up to and including this step."""
        async with self._new_command:
            self._allowed = max(self._allowed, step)
            self._new_command.notify_all()

    async def save(self) -> int | None:
        """Wait for a checkpoint of the last published version and return its step; None: the run was closed.

        The learner writes the checkpoint now unless there is one.
        """
        async with self._new_command:
            wanted = self._save_wanted = self._learner_version
            self._new_command.notify_all()
            await self._new_command.wait_for(lambda: self._closed or self._saved_step >= wanted)
            return self._saved_step if self._saved_step >= wanted else None

    async def close(self, error: str | None = None) -> None:
        """End the run and wake everybody who waits; the first error is kept."""
        self.error = self.error or error
        self._closed = True
        for condition in (self._new_version, self._new_group, self._new_command):
            async with condition:
                condition.notify_all()
