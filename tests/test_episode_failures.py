"""What becomes of episodes when an engine or an environment's host dies, or an engine leaves: neither tokens
nor state are lost that need not be, and nothing is made twice.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import episodes as worlds
import pytest
from episodes import END, Guess, Policy, Scripted, environment_of, prompt
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from test_environments import binary, ends, text

from gvpo_ray import groups
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.config.environment import ENVIRONMENT
from gvpo_ray.environments import episode, pool
from gvpo_ray.environments.agent_host import AgentHost
from gvpo_ray.environments.client import Client, LostError, NoEnvironmentError
from gvpo_ray.environments.host import GONE, Host
from gvpo_ray.environments.pool import ActorClient

SAMPLING = SamplingConfig(num_completions=4, max_tokens=1000)
TWO = SAMPLING.model_copy(update={"num_completions": 2})


async def engine_of(made: Any, policy: Policy, version: int) -> Scripted:
    engine = Scripted(policy, made)
    await engine.update(version, {})
    return engine


class Stops:
    """A policy that says `policy`, until it stands before its turn of a number, where it waits for ever."""

    def __init__(self, turn: int, policy: Policy = binary) -> None:
        self._turn, self._policy, self.stands, self._num = turn, policy, asyncio.Event(), 0

    def __call__(self, turns: list[str], number: int) -> Any:
        if sum(turn.startswith("assistant\n") for turn in turns) < self._turn:
            return self._policy(turns, number)
        return self._wait()

    async def _wait(self) -> str:
        self._num += 1
        if self._num == SAMPLING.num_completions:
            self.stands.set()
        await asyncio.Event().wait()
        return ""


async def alone(made: Any, folder: Path) -> dict[str, Any]:
    """The group as one engine makes it."""
    engine = await engine_of(made, binary, 0)
    (row,) = groups.rows((await engine.generate(await prompt(made), SAMPLING))[0])
    return row


def test_an_engine_dies_in_mid_episode_and_another_goes_on_with_its_tokens(tmp_path: Path) -> None:
    async def main() -> None:
        made, clients = worlds.episodes(Guess, tmp_path, max_turns=4)
        whole = await alone(made, tmp_path)
        stops = Stops(2)
        first = await engine_of(made, stops, 3)
        work = asyncio.ensure_future(first.generate(await prompt(made, group_id=5), SAMPLING))
        await stops.stands.wait()
        environments = {name: environment_of(c.host, name) for c in clients for name in c.host._episodes}
        assert [guess.asked for guess in environments.values()].count([5]) == 3  # and one asked 1
        work.cancel()  # with its process
        second = await engine_of(made, binary, 4)
        table, missing = await second.generate(await prompt(made, group_id=5), SAMPLING)
        (row,) = groups.rows(table)
        assert not missing and sorted(row["completion_ids"]) == sorted(whole["completion_ids"])
        assert row["version_min"] == [3] * 4 and row["version_max"] == [4] * 4
        assert sorted(row["reward_parts"][ENVIRONMENT]) == [0.0, 1.0, 1.0, 1.0]
        assert {json.loads(one)["name"] for one in row["episodes"]} == {*environments}
        # no turn was made twice, in the environments or at the engine
        assert sorted(guess.asked for guess in environments.values()) == [[1] * 4, *[[5, 7]] * 3]
        assert second.num_calls == 3 + 3 * 1
        assert not any(client.host._episodes for client in clients)

    asyncio.run(main())


def test_an_engine_that_dies_has_lost_no_finished_episode_and_no_finished_one_is_made_again(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        made, _ = worlds.episodes(Guess, tmp_path, max_turns=4)

        def stuck(turns: list[str], number: int) -> Any:
            return binary(turns, number) if number != 2 or len(turns) < 4 else asyncio.Event().wait()

        first = await engine_of(made, stuck, 0)
        work = asyncio.ensure_future(first.generate(await prompt(made), SAMPLING))
        (running,) = [*first._in_flight] or await _until(lambda: [*first._in_flight])
        await _until(lambda: len(running.finished_at) == 3)
        kept = first._table(running, [1, 3])  # the driver has these; completion 0 is finished as well
        work.cancel()
        second = await engine_of(made, binary, 0)
        table, missing = await second.generate(await prompt(made), SAMPLING, 0, None, kept)
        (row,) = groups.rows(table)
        names = [json.loads(one)["name"] for one in row["episodes"]]
        assert not missing and len(set(names)) == 4
        assert sorted(end["turns"] for end in ends(row)) == [2, 2, 2, 4]
        assert second.num_calls == 1  # the last turn of the one that was in flight
        assert sorted(row["reward_parts"][ENVIRONMENT]) == [0.0, 1.0, 1.0, 1.0]

    asyncio.run(main())


def test_episodes_are_claimed_in_the_order_of_their_beginning_whichever_was_reset_first() -> None:
    """The place decides the seed: one that has no turn yet would repeat the first turn of another's place."""

    class World:
        def __init__(self, number: int) -> None:
            self.number = number

        async def open(self, row: Any) -> tuple[str, None]:
            await may_open[self.number].wait()
            return str(self.number), None

    async def main() -> None:
        may_open.extend(asyncio.Event() for _ in range(4))
        worlds = iter(map(World, range(4)))

        async def make() -> Any:
            return next(worlds)

        host = Host(make)
        opening = asyncio.ensure_future(host.open(0, {}, 4))
        for number in (2, 0, 3, 1):
            may_open[number].set()
            await _until(lambda number=number: len(host._episodes) == (2, 0, 3, 1).index(number) + 1)
        names = [opened.name for opened in await opening]
        assert [opened.name for opened in await host.claim(0)] == names
        assert [opened.name for opened in await host.claim(0, names[1:2])] == [names[0], *names[2:]]

    may_open: list[asyncio.Event] = []
    asyncio.run(main())


async def _until(condition: Any) -> Any:
    while not (found := condition()):
        await asyncio.sleep(0)
    return found


class Silent(Guess):
    """Says nothing, so that nothing tells its policy's turns apart."""

    def respond(self, message: str) -> str | None:
        return None if super().respond(message) is None else ""


@pytest.mark.parametrize("is_drained", [False, True], ids=["dies", "drains"])
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_where_nothing_is_said_between_two_turns_an_engine_that_goes_on_repeats_none(
    turn: int, is_drained: bool, tmp_path: Path
) -> None:
    async def main() -> None:
        made, (client,) = worlds.episodes(Silent, tmp_path, hosts=1, template="Q: {prompt}\n", max_turns=4)

        def counting(turns: list[str], number: int) -> str:
            said = turns[0].partition("(1 to 9)\n")[2].split(END)[:-1]
            assert said == ["4", "5", "6", "7"][: len(said)]
            return str(4 + len(said))

        async def stand() -> str:
            standing.append(1)
            await asyncio.Event().wait()
            return ""

        def stops(turns: list[str], number: int) -> Any:
            said = counting(turns, number)
            return stand() if said == str(4 + turn) else said

        standing: list[int] = []
        first = await engine_of(made, stops, 0)
        work = asyncio.ensure_future(first.generate(await prompt(made), TWO))
        await _until(lambda: len(standing) == 2)
        guesses = [environment_of(client.host, name) for name in client.host._episodes]
        kept: list[Any] = []
        if is_drained:
            await first.drain(0)
            kept = [(await work)[0]]
        work.cancel()
        second = await engine_of(made, counting, 0)
        (row,) = groups.rows((await second.generate(await prompt(made), TWO, 0, None, *kept))[0])
        assert [guess.asked for guess in guesses] == [[4, 5, 6, 7]] * 2
        assert second.num_calls == 2 * (4 - turn)
        whole = f" (1 to 9)\n4{END}5{END}6{END}7{END}"
        assert [text(ids) for ids in row["completion_ids"]] == [whole] * 2
        assert ends(row) == [{"turns": 4, "tool_calls": 0, "tool_errors": 0, "end": "stop"}] * 2

    asyncio.run(main())


def test_a_turn_that_was_whole_when_its_engine_drained_is_told_to_the_environment_and_not_gone_on_with(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        made, (client,) = worlds.episodes(Guess, tmp_path, hosts=1, max_turns=4)
        acts, on_the_way = client.host.act, list[int]()

        async def never(*args: Any) -> Any:
            on_the_way.append(1)
            await asyncio.Event().wait()

        client.host.act = never  # type: ignore[method-assign]
        first = await engine_of(made, lambda turns, number: "7", 0)
        work = asyncio.ensure_future(first.generate(await prompt(made), TWO))
        await _until(lambda: len(on_the_way) == 2)
        await first.drain(0)
        table, missing = await work
        assert missing == 2
        client.host.act = acts  # type: ignore[method-assign]
        second = await engine_of(made, lambda turns, number: "1", 0)
        (row,) = groups.rows((await second.generate(await prompt(made), TWO, 0, None, table))[0])
        assert not second.num_calls and row["reward_parts"] == {ENVIRONMENT: [1.0] * 2}

    asyncio.run(main())


@pytest.mark.parametrize("host_dies", [False, True], ids=["hosts live", "a host dies too"])
def test_an_engine_that_drains_hands_its_episodes_over(host_dies: bool, tmp_path: Path) -> None:
    async def main() -> None:
        made, clients = worlds.episodes(Guess, tmp_path, max_turns=4)

        def equal(turns: list[str], number: int) -> str:
            return binary(turns, 1)

        stops = Stops(2, equal)
        first = await engine_of(made, stops, 0)
        work = asyncio.ensure_future(first.generate(await prompt(made), SAMPLING))
        await stops.stands.wait()
        await first.drain(0)
        table, missing = await work
        (cut,) = groups.rows(table)
        assert missing == 4 and cut["finish_reasons"] == ["abort"] * 4
        assert all(ids == cut["completion_ids"][0] for ids in cut["completion_ids"])
        clients[0].is_dead = host_dies
        second = await engine_of(made, equal, 0)
        table, missing = await second.generate(await prompt(made), SAMPLING, 0, None, table)
        (row,) = groups.rows(table)
        assert not missing and len(row["completions"]) == 4
        lost = [reason is not None for reason in row["reward_reasons"]]
        assert row["reward_reasons"] == [GONE if one else None for one in lost]
        assert sum(lost) == (2 if host_dies else 0)
        for is_lost, ids, reward in zip(
            lost, row["completion_ids"], row["reward_parts"][ENVIRONMENT], strict=True
        ):
            asked = text(ids).split("assistant\n")[1:]
            assert [turn[:1] for turn in asked] == (["5", ""] if is_lost else ["5", "7"])
            assert (reward is None) == is_lost

    asyncio.run(main())


def test_a_host_that_dies_ends_its_episodes_with_that_reason_and_the_group_goes_on_smaller(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        made, clients = worlds.episodes(Guess, tmp_path, max_turns=4)

        def deadly(turns: list[str], number: int) -> str:
            clients[1].is_dead = clients[1].is_dead or len(turns) > 3
            return binary(turns, 1)

        engine = await engine_of(made, deadly, 0)
        table, missing = await engine.generate(await prompt(made), SAMPLING)
        (row,) = groups.rows(table)
        assert not missing and sorted(map(str, row["reward_reasons"])) == ["None"] * 2 + [GONE] * 2
        assert sorted(row["reward_parts"][ENVIRONMENT], key=str) == [1.0, 1.0, None, None]
        assert all(text(ids).endswith("7<|im_end|>") for ids in row["completion_ids"])

    asyncio.run(main())


def test_an_engine_that_lost_its_episodes_to_another_cannot_change_them(tmp_path: Path) -> None:
    async def main() -> None:
        _, (client,) = worlds.episodes(Guess, tmp_path, hosts=1)
        (opened,) = await client.host.open(0, {"answer": "7"}, 1)
        assert (await client.host.act(opened.name, 0, 0, {}, [], "5")).messages[0]["content"] == "more"
        (again,) = await client.host.claim(0)
        assert again.name == opened.name and again.lease == 1
        assert (await client.host.act(opened.name, 0, 1, {}, [], "7")).reason == GONE
        assert await client.host.finish(opened.name, 0, {}) == (None, GONE, False)
        for _ in range(2):  # the same turn again is answered, and not made
            assert (await client.host.act(opened.name, 1, 1, {}, [], "6")).messages[0]["content"] == "more"
        assert environment_of(client.host, opened.name).asked == [5, 6]

    asyncio.run(main())


def test_an_engine_whose_episodes_wait_for_their_environments_does_not_hang(tmp_path: Path) -> None:
    async def main() -> None:
        made, (client,) = worlds.episodes(Guess, tmp_path, hosts=1)
        engine, go, acts = await engine_of(made, binary, 0), asyncio.Event(), client.host.act

        async def slow(*args: Any) -> Any:
            await go.wait()
            return await acts(*args)

        client.host.act = slow  # type: ignore[method-assign]
        work = asyncio.ensure_future(engine.generate(await prompt(made), SAMPLING))
        await _until(lambda: engine.num_calls == 4 and not engine._num_calls)
        engine._last_token_at = 0.0
        status = await engine.status()
        assert status["num_completions"] == 4 and status["last_token_at"] > 1e9
        go.set()
        await work
        assert engine._last_token_at > 1e9  # the next calls of the model began anew

    asyncio.run(main())


class Handle:
    """An actor's handle whose calls end as `outcome` says."""

    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=self._call)

    async def _call(self, *args: Any) -> Any:
        if isinstance(self._outcome, Exception):
            raise self._outcome
        if self._outcome is None:
            await asyncio.Event().wait()
        return self._outcome


def test_a_dead_actor_is_lost_a_silent_one_is_killed_and_one_that_cannot_be_made_stops_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(pool.ray, "kill", lambda actor, no_restart: killed.append((actor, no_restart)))

    async def main() -> None:
        assert await ActorClient(Handle(["opened"])).claim(0, limit_s=60) == ["opened"]
        for death in (ActorDiedError(), ActorUnavailableError("away", None)):
            with pytest.raises(LostError):
                await ActorClient(Handle(death)).finish("an episode", 0, {}, limit_s=60)
        for wrong in (
            RayActorError(error_msg="an error raised in its creation task, ValueError: x"),
            RayError("a bug"),
        ):
            with pytest.raises(NoEnvironmentError, match="environment: "):
                await ActorClient(Handle(wrong)).open(0, {}, 1)
        assert not killed
        silent = Handle(None)
        with pytest.raises(LostError, match=r"no answer for 0\.01 s"):
            await ActorClient(silent).act("an episode", 0, 0, {}, [], "", limit_s=0.01)
        assert killed == [(silent, False)]  # and Ray starts it again

    asyncio.run(main())


def test_a_new_episode_begins_at_another_host_where_one_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def at_once(seconds: float) -> None:
        return None

    async def main() -> None:
        made, clients = worlds.episodes(Guess, tmp_path)
        monkeypatch.setattr(episode.asyncio, "sleep", at_once)
        clients[0].is_dead = True
        found = await made.of_group(await prompt(made), 4, [], [])
        assert len(found) == 4 and all(one.client is clients[1] for one in found)
        clients[1].is_dead = True
        with pytest.raises(NoEnvironmentError, match="no actor begins an episode: dead"):
            await made.of_group(await prompt(made), 1, [], [])

    asyncio.run(main())


@pytest.mark.parametrize(("host", "other"), [(Host, {"play"}), (AgentHost, {"act", "finish"})])
def test_a_client_has_a_method_for_each_method_of_a_host_with_the_same_arguments(
    host: type, other: set[str]
) -> None:
    def arguments(cls: type) -> dict[str, list[str]]:
        methods = inspect.getmembers(cls, inspect.isfunction)
        found = {name: list(inspect.signature(one).parameters) for name, one in methods if name[0] != "_"}
        # Ray gives methods of a class that was an actor in this process an argument of its own.
        hidden = {"limit_s", "_ray_trace_ctx"}
        return {name: [each for each in names if each not in hidden] for name, names in found.items()}

    called = arguments(Client)
    assert {name: called.pop(name) for name in other} and called == arguments(host)
    assert len(called) >= 5
