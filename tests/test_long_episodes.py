"""Long episodes hold nobody up: rollout loop, pool and buffer are the real ones, engines and learner fakes.

Everything is in this process, on a clock that leaps.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_supervision import Actor, Fleet, running
from test_supervision import run as run  # the clock

from gvpo_ray import groups
from gvpo_ray.bench.scale import Prompts
from gvpo_ray.buffer import buffer as buffer_module
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.log import Quarantine
from gvpo_ray.config.data import ReplayConfig
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.data.mixture import SourceSchedule
from gvpo_ray.engines import base
from gvpo_ray.engines import rollout as rollout_module
from gvpo_ray.engines.rollout import Sample
from gvpo_ray.run.inputs import Inputs
from gvpo_ray.run.rollouts import Ring

K, NUM_ENGINES, MAX_GROUPS = 8, 2, 8
GROUPS_PER_STEP, MAX_STALENESS, NUM_STEPS = NUM_ENGINES * MAX_GROUPS, 4, 8
SLOTS = K * NUM_ENGINES * MAX_GROUPS
SHORT_S, LONG, TURNS = 30.0, 10, 2


class Lengths:
    """One episode in sixteen is ten times as long, at random."""

    def __init__(self) -> None:
        self._random, self.num, self.num_long = random.Random(0), 0, 0

    def seconds(self) -> float:
        is_long = self._random.random() < 1 / 16
        self.num += 1
        self.num_long += is_long
        return SHORT_S * (LONG if is_long else 1)


def play(lengths: Lengths) -> Any:
    """Return a rollout function: several turns, between which the policy waits for its environment."""

    async def episode(prompt_ids: list[int], sample: Sample) -> list[int]:
        ids, seconds = list[int](), lengths.seconds()
        for _ in range(TURNS):
            ids += await sample(prompt_ids + ids)
            await asyncio.sleep(seconds / TURNS)
            ids += [9]
        return ids

    return episode


class Verifiers:
    """Rewards cost nothing."""

    async def score(self, sampled: Any) -> Any:
        table = groups.from_wire(await sampled)
        none = [[None] * K]
        return groups.with_columns(
            table, rewards=[[1.0] + [0.0] * (K - 1)], reward_parts=[[]], reward_reasons=none
        )


async def learn(buffer: GroupBuffer, fleet: Fleet, step_s: float) -> list[list[int]]:
    """Take a batch after the other; return the staleness of every completion, by step."""
    await buffer.published(0, {"probe": None}, None)
    fleet.publish(0)
    seen = []
    for step in range(1, NUM_STEPS + 1):
        batch = await buffer.batch(step)
        assert batch is not None
        seen.append([step - 1 - version for row in groups.rows(batch) for version in row["version_min"]])
        await asyncio.sleep(step_s)
        await buffer.published(step, {"probe": None}, {})
        fleet.publish(step)
    return seen


def test_with_one_episode_in_sixteen_ten_times_as_long_nine_slots_in_ten_are_in_use_and_nothing_is_discarded(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lengths = Lengths()

    async def main() -> None:
        config = {"num": NUM_ENGINES, "max_groups": MAX_GROUPS}
        rollout = play(lengths)
        fleet = Fleet(config, lambda i: Actor(i, rollout=rollout), num_completions=K)
        for module in (buffer_module, rollout_module):
            monkeypatch.setattr(module, "time", base.time)
        buffer = GroupBuffer(tmp_path, GROUPS_PER_STEP, NUM_STEPS, MAX_STALENESS)
        ring = Ring(
            Inputs(Prompts(), {}, 1 << 20, {}, SourceSchedule({}), {}),  # type: ignore[arg-type]
            fleet.group,
            Verifiers(),  # type: ignore[arg-type]
            buffer,  # type: ignore[arg-type]
            Quarantine(tmp_path / "quarantine.jsonl"),
            SamplingConfig(num_completions=K, max_tokens=64),
            ReplayConfig(),
            300.0,
            tmp_path,
            dict,
            lambda *_: None,
            print,
        )
        in_use: list[int] = []

        async def count() -> None:
            while buffer._may_start():  # before the tail
                await asyncio.sleep(5)
                states = [await handle.actor.status() for handle in fleet.handles]
                in_use.append(sum(state["num_completions"] for state in states))

        async with running(fleet), asyncio.TaskGroup() as tasks:
            learning = tasks.create_task(learn(buffer, fleet, step_s=20.0))
            starting = tasks.create_task(ring._start_groups(tasks))
            await asyncio.sleep(SHORT_S)
            await count()
            seen = await learning
            await buffer.close()
            await starting
        assert max(in_use) < SLOTS + K  # a group goes to an engine that has any room
        share = sum(in_use) / len(in_use) / SLOTS
        assert share >= 0.9, share
        # whatever was begun was trained, however old it was
        assert sum(map(len, seen)) == NUM_STEPS * GROUPS_PER_STEP * K == lengths.num
        assert lengths.num_long > lengths.num / 20

    run(main())
