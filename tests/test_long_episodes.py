"""Long episodes hold nobody up: rollout loop, pool and buffer are the real ones, engines and learner fakes.

Everything is in this process, on a clock that leaps.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import episodes as worlds
import pytest
from episodes import Guess, Scripted
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
from gvpo_ray.engines import rollout_engine as rollout_module
from gvpo_ray.engines.actor import ActorMethods
from gvpo_ray.engines.rollout import Sample
from gvpo_ray.environments.host import Host
from gvpo_ray.environments.world import Answer, Outcome
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


async def learn(
    buffer: GroupBuffer, fleet: Fleet, num_steps: int, step_s: float, made: int = 0
) -> dict[int, list[int]]:
    """Take a batch after the other, from the version `made`; return the ids of the groups, by step."""
    await buffer.published(made, {"probe": None}, None)
    fleet.publish(made)
    seen = {}
    for step in range(made + 1, num_steps + 1):
        batch = await buffer.batch(step)
        assert batch is not None
        seen[step] = batch["group_id"].to_pylist()
        await asyncio.sleep(step_s)
        await buffer.published(step, {"probe": None}, {})
        fleet.publish(step)
    return seen


def ring_of(fleet: Fleet, buffer: GroupBuffer, folder: Path) -> Ring:
    return Ring(
        Inputs(Prompts(), {}, 1 << 20, {}, SourceSchedule({}), {}),  # type: ignore[arg-type]
        fleet.group,
        Verifiers(),  # type: ignore[arg-type]
        buffer,  # type: ignore[arg-type]
        Quarantine(folder / "quarantine.jsonl"),
        SamplingConfig(num_completions=K, max_tokens=1000),
        ReplayConfig(),
        300.0,
        folder,
        dict,
        lambda *_: None,
        print,
    )


@pytest.fixture
def simulated(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    for module in (buffer_module, rollout_module):
        monkeypatch.setattr(module, "time", base.time)
    return run


def test_with_one_episode_in_sixteen_ten_times_as_long_nine_slots_in_ten_are_in_use_and_nothing_is_discarded(
    simulated: Callable[..., Any], tmp_path: Path
) -> None:
    lengths = Lengths()

    async def main() -> None:
        rollout = play(lengths)
        config = {"num": NUM_ENGINES, "max_groups": MAX_GROUPS}
        fleet = Fleet(config, lambda i: Actor(i, rollout=rollout), num_completions=K)
        buffer = GroupBuffer(tmp_path, GROUPS_PER_STEP, NUM_STEPS, MAX_STALENESS)
        ring = ring_of(fleet, buffer, tmp_path)
        in_use: list[int] = []

        async def count() -> None:
            while buffer._may_start():  # before the tail
                await asyncio.sleep(5)
                states = [await handle.actor.status() for handle in fleet.handles]
                in_use.append(sum(state["num_completions"] for state in states))

        async with running(fleet), asyncio.TaskGroup() as tasks:
            learning = tasks.create_task(learn(buffer, fleet, NUM_STEPS, step_s=20.0))
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
        trained = [group_id for of_step in seen.values() for group_id in of_step]
        assert sorted(trained) == [*range(NUM_STEPS * GROUPS_PER_STEP)]
        assert len(trained) * K == lengths.num and lengths.num_long > lengths.num / 20

    simulated(main())


class Talk:
    """A world that answers after a while, and is over after three turns."""

    def __init__(self, random: random.Random) -> None:
        self._random, self._num = random, 0

    async def open(self, row: Any) -> tuple[str | None, str | None]:
        return f" ({row['answer']})", None

    async def act(self, calls: Any, message: str) -> Answer:
        await asyncio.sleep(self._random.expovariate(0.1))
        self._num += 1
        return Answer([{"role": "user", "content": message}], is_over=self._num == 3)

    async def score(self) -> Outcome:
        return Outcome(float(self._random.random() < 0.5))

    async def close(self) -> None: ...


class Talker(ActorMethods, Scripted):
    """An engine whose policy takes a while, too."""

    node = "n"

    async def start_here(self) -> dict[str, Any]:
        return {**await self.start(), "node": self.node}


@pytest.mark.parametrize("kept", [0, 2], ids="checkpoint of step {}".format)
def test_a_run_that_is_killed_in_mid_episode_and_taken_up_again_trains_nothing_twice(
    kept: int, simulated: Callable[..., Any], tmp_path: Path
) -> None:
    num_steps, per_step, rng = 5, 4, random.Random(0)

    async def make() -> Talk:
        return Talk(rng)

    async def speak(turns: list[str], number: int) -> str:
        await asyncio.sleep(rng.expovariate(0.1))
        return "go on"

    async def life(made: int, until: int | None) -> dict[int, list[int]]:
        """Run from a checkpoint to the end, or until step `until` has its batch and the driver is killed."""
        episodes, clients = worlds.episodes(Guess, tmp_path / "model", max_turns=8)
        for client in clients:
            client.host = Host(make)
        config = {"num": 2, "max_groups": 3}
        fleet = Fleet(config, lambda i: Talker(speak, episodes), num_completions=K)  # type: ignore[arg-type,return-value]
        buffer = GroupBuffer(tmp_path / "run", per_step, num_steps, 2, made)
        seen: dict[int, list[int]] = {}
        async with running(fleet), asyncio.TaskGroup() as tasks:
            going = tasks.create_task(ring_of(fleet, buffer, tmp_path)._start_groups(tasks))
            seen = await learn(buffer, fleet, until or num_steps, 5.0, made)
            open_episodes = [e for client in clients for e in client.host._episodes.values()]
            if until is None:
                assert not open_episodes
                await buffer.close()
            else:
                assert any(e.turns for e in open_episodes)
                for task in tasks._tasks - {asyncio.current_task()}:  # type: ignore[attr-defined]
                    task.cancel()
            await asyncio.gather(going, return_exceptions=True)
        buffer.release()  # as the end of its process does
        return seen

    first = simulated(life(0, until=2))
    second = simulated(life(kept, until=None))
    assert first.keys() == {1, 2} and second.keys() == {*range(kept + 1, num_steps + 1)}
    assert all(second[step] == first[step] for step in range(kept + 1, 3))  # the same batches once more
    trained = [group_id for of_step in {**first, **second}.values() for group_id in of_step]
    assert len(trained) == len(set(trained)) == num_steps * per_step
    rows = list(groups.rows(groups.load(tmp_path / "run")))
    assert sorted(row["group_id"] for row in rows) == sorted(trained)
    entries = [json.loads(entry) for row in rows for entry in row["episodes"]]
    assert len({entry["name"] for entry in entries}) == len(rows) * K
    assert {(entry["turns"], entry["end"]) for entry in entries} == {(3, "stop")}
