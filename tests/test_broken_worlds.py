"""Calls that hang, and worlds that are brought down or cannot be loaded, cost their own episode alone."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import episodes as worlds
import pytest
from episodes import (
    Calculator,
    environment_of,
    host_of,
)
from fragile import Fragile
from test_environments import call, ends, run

from gvpo_ray import groups
from gvpo_ray.config.environment import ENVIRONMENT
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.data.calls import Call
from gvpo_ray.environments.agent_host import AgentHost
from gvpo_ray.environments.forks import BrokenError, Forks
from gvpo_ray.environments.host import BY_POLICY, GONE, Host
from gvpo_ray.environments.world import Limits
from gvpo_ray.observe.metrics import is_correct, right_tries
from gvpo_ray.verifiers.outages import NUM_GROUPS, Given, Record
from gvpo_ray.verifiers.pool import _VerifierActor
from gvpo_ray.verifiers.verifier import Verifier


@pytest.fixture
def _hanging() -> Iterator[None]:
    Calculator.waiting.clear()
    yield
    Calculator.waiting.set()  # pytest would wait for the thread


@pytest.mark.parametrize("tool", ["hang", "sleep"])
def test_a_tool_that_hangs_is_an_error_that_the_policy_reads_and_the_environment_scores_the_episode(
    tool: str, tmp_path: Path, _hanging: None
) -> None:
    async def main() -> None:
        # 12 episodes with 3 calls that hang, each in a thread that nothing can end
        host = host_of(Calculator)
        for opened in await host.open(0, {}, 12):
            for turn in range(3):
                with hurried(host, opened.name):
                    answer = await host.act(opened.name, 0, turn, {}, [Call(tool, {})], "")
                (message,) = answer.messages
                assert message["content"] == "Error: no answer within 0.01 s"
                assert (answer.reason, answer.num_errors, answer.num_hung) == (None, 1, 1)
            assert host._episodes[opened.name].world.has_hung  # type: ignore[attr-defined]
            assert await host.finish(opened.name, 0, {}) == (0.0, None, False)  # the environment says so

    asyncio.run(main())


@contextlib.contextmanager
def hurried(host: Host, name: str) -> Iterator[None]:
    """Give an episode's calls, which hang, next to no time; all others have what a busy machine takes."""
    world: Any = host._episodes[name].world
    limits, world._limits = world._limits, Limits(timeout_s=0.01)
    yield
    world._limits = limits


def test_the_calls_of_a_turn_behind_one_that_hangs_are_not_made(_hanging: None) -> None:
    async def main() -> None:
        host = host_of(Calculator)
        (opened,) = await host.open(0, {}, 1)
        calls = [Call("hang", {}), Call("add", {"a": 1}), Call("hang", {})]
        with hurried(host, opened.name):
            answer = await host.act(opened.name, 0, 0, {}, calls, "")
        late, *others = (message["content"] for message in answer.messages)
        assert late == "Error: no answer within 0.01 s"
        assert others == ["Error: not made: an earlier call of this turn gave no answer"] * 2
        assert (answer.num_errors, answer.num_hung, answer.num_refused) == (3, 1, 0)
        answer = await host.act(opened.name, 0, 1, {}, [Call("add", {"a": 1})], "")
        assert answer.messages[0]["content"] == "2"

    asyncio.run(main())


@pytest.mark.parametrize("num", [1, 3, 4, 20])
def test_a_turn_has_a_number_of_calls_and_the_policy_reads_that_further_ones_were_not_made(num: int) -> None:
    async def main() -> None:
        host = host_of(Calculator, Limits(max_calls=3))
        (opened,) = await host.open(0, {}, 1)
        tools = ["add", "later"]  # asynchronous calls count as well
        calls = [Call(tools[i % 2], {"a": i}) for i in range(num)]
        answer = await host.act(opened.name, 0, 0, {}, calls, "")
        texts = [message["content"] for message in answer.messages]
        assert len(texts) == num and not any("Error" in text for text in texts[:3])
        assert texts[3:] == ["Error: not made: a turn may have 3 tool calls"] * max(0, num - 3)
        assert len(environment_of(host, opened.name).order) == min(num, 3)
        assert answer.num_errors == answer.num_refused == max(0, num - 3)

    asyncio.run(main())


def test_what_fails_after_a_call_that_hung_is_the_policys_doing(_hanging: None) -> None:
    class Held(Calculator):
        """Its score needs what the tool that hangs holds."""

        def get_reward(self) -> float | None:
            raise KeyError("held")

    async def main() -> None:
        host = host_of(Held)
        hung, fine = await host.open(0, {}, 2)
        with hurried(host, hung.name):
            await host.act(hung.name, 0, 0, {}, [Call("hang", {})], "")
        failed = "environment: get_reward raised KeyError: 'held'"
        assert await host.finish(fine.name, 0, {}) == (None, failed, False)
        reason = f"environment: brought down by a tool call: {failed}"
        assert await host.finish(hung.name, 0, {}) == (None, reason, True)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("others", "worth"), [([1.0, 1.0, 0.0], 0.0), ([1.0, 0.5, 0.5], 0.5), ([-2.0, None, 1.0], -2.0)]
)
def test_an_episode_whose_environment_the_policy_brings_down_is_worth_no_more_than_its_group(
    others: list[float | None], worth: float, tmp_path: Path
) -> None:
    async def down(calls: Any, message: str) -> Any:
        raise BrokenError("its process died")

    def policy(turns: list[str], number: int) -> str:
        return str(number) if number else call("add", a=1)

    async def main() -> None:
        made, (client,) = worlds.episodes(Calculator, tmp_path, hosts=1)

        async def acts(name: str, *args: Any) -> Any:
            world: Any = client.host._episodes[name].world
            *_, calls, message = args
            if calls:
                world.act = down
            world.environment.get_reward = lambda: others[int(message) - 1]
            return await Host.act(client.host, name, *args)

        client.host.act = acts  # type: ignore[method-assign,assignment]
        row = await run(made, policy, num=4)
        reason = "environment: brought down by a tool call: crash: environment: add: its process died"
        assert [end["end"] for end in ends(row)] == ["broken", "stop", "stop", "stop"]
        assert row["reward_parts"] == {ENVIRONMENT: [None, *others]} and row["reward_reasons"][0] == reason
        scored = Verifier(VerifiersConfig(rewards={ENVIRONMENT: RewardConfig()})).score(groups.table([row]))
        assert scored["rewards"][0].as_py() == [worth, *others]
        alone = {name: row[name][:1] for name in (*groups.COMPLETION_COLUMNS, "episodes", "reward_reasons")}
        alone = {**row, **alone, "trained_tokens": row["trained_tokens"][:1]}
        alone["reward_parts"] = {ENVIRONMENT: [None]}
        scored = Verifier(VerifiersConfig(rewards={ENVIRONMENT: RewardConfig()})).score(groups.table([alone]))
        assert scored["rewards"][0].as_py() == [None]  # nobody has said what it is worth
        assert not groups.all_cut_off(scored)  # and the prompt is not to blame

    asyncio.run(main())


def group_of(values: list[float | None], broken: int, completions: list[str] | None = None) -> dict[str, Any]:
    """A group of episodes, of which the last ones were brought down by a tool call."""
    num = len(values) + broken
    ends = ["stop"] * len(values) + ["broken"] * broken
    return {
        **{"group_id": 0, "prompt": "p", "answer": "7", "dataset": "d", "prompt_ids": [1]},
        **{"completions": completions or ["7"] * num, "completion_ids": [[1]] * num},
        **{
            "finish_reasons": ["stop"] * num,
            "sources": ["policy"] * num,
            "sampling_logprobs": [[-1.0]] * num,
        },
        **{"version_min": [0] * num, "version_max": [0] * num},
        "episodes": [json.dumps({"name": str(i), "end": end}) for i, end in enumerate(ends)],
        "reward_parts": {ENVIRONMENT: [*values, *[None] * broken]},
        "reward_reasons": [None if value is not None else GONE for value in values]
        + [BY_POLICY + "add: its process died"] * broken,
    }


def scored(verifier: Verifier, row: dict[str, Any]) -> dict[str, Any]:
    (found,) = groups.rows(verifier.score(groups.table([row])))
    return found


@pytest.mark.parametrize(
    ("weight", "before", "others", "worth"),
    [
        (1.0, [], [1.0, 1.0, 1.0], 1.0),  # nobody has failed yet, so nothing was escaped
        (1.0, [[0.0, 1.0]], [1.0, 1.0, 1.0], 0.0),
        (1.0, [[0.5, 1.0], [1.0, 1.0]], [1.0, 0.0, 1.0], 0.0),
        (1.0, [[1.0, 1.0]], [None, None], 1.0),
        (1.0, [[None, None]], [None, None], None),  # nobody has said what anything is worth
        (-1.0, [], [1.0, 5.0], 5.0),
        (-1.0, [[9.0, -3.0]], [1.0, 5.0], 9.0),
        # rewards without a bound: the worst of its group less what is usual between best and worst
        (1.0, [[-1e6, 1.0]], [1.0, 0.5, 0.0], -1.0),
        (1.0, [[0.0, 1.0], [-3e38, 1.0], [0.0, 2.0]], [1.0, 1.0], -1.0),
        (-1.0, [[0.0, 1.0], [3e38, 1.0], [0.0, 2.0]], [1.0, 1.0], 3.0),
        (1.0, [[-500.0, -300.0], [-900.0, -600.0], [-2000.0, -1900.0]], [-400.0, -350.0], -500.0),
        (1.0, [[0.0, 1.0], [-1e6, 1.0], [0.0, 1.0]], [None], -1.0),
    ],
)
def test_to_bring_the_environment_down_is_worth_no_more_than_any_of_its_group_and_is_never_right(
    weight: float, before: list[list[float | None]], others: list[float | None], worth: float | None
) -> None:
    verifier = Verifier(VerifiersConfig(rewards={ENVIRONMENT: RewardConfig(weight=weight)}))
    for values in before:
        scored(verifier, group_of(values, 1))
    row = scored(verifier, group_of(others, 2))
    want = [None if value is None else weight * value for value in (*others, worth, worth)]
    assert row["rewards"] == want
    known = [value for value in want if value is not None]
    assert worth is None or min(known) == weight * worth
    assert row["reward_reasons"][-1] == BY_POLICY + "add: its process died"
    right = [value is not None and value > 0 for value in others]
    assert is_correct(row) == right_tries(row) == [*right, False, False]
    assert not verifier.record.faults


@pytest.mark.parametrize(("value", "fits"), [(-3e38, True), (-1e39, False), (1e39, False), (math.nan, False)])
def test_a_reward_that_float32_does_not_hold_is_none_and_no_other_episode_notices(
    value: float, fits: bool
) -> None:
    async def main() -> None:
        host = host_of(Calculator)
        (opened,) = await host.open(0, {}, 1)
        environment_of(host, opened.name).get_reward = lambda: value
        reward, reason, _ = await host.finish(opened.name, 0, {})
        assert (reward, reason is None) == ((value, True) if fits else (None, False))
        assert fits or str(reason).startswith("environment: get_reward gave ")

    asyncio.run(main())
    judged, _, why = AgentHost(lambda base_url: 0.0, 60, 3, False)._judged(value)
    assert (judged, why is None) == ((value, True) if fits else (None, False))
    # nor does a table that says so
    verifier = Verifier(VerifiersConfig(rewards={ENVIRONMENT: RewardConfig()}))
    row = scored(verifier, group_of([value, 1.0], 0))
    assert row["rewards"] == [pytest.approx(value) if fits else None, 1.0]
    assert (row["reward_reasons"][0] is None) == fits
    assert (verifier.record.given[ENVIRONMENT, "d"].low == 1.0) == (not fits)
    assert scored(verifier, group_of([1.0, 0.5], 1))["rewards"][-1] is not None


def test_no_further_reward_makes_up_for_an_environment_that_was_brought_down() -> None:
    rewards = {ENVIRONMENT: RewardConfig(), "length": RewardConfig(weight=0.5, trusted=True)}
    length = {
        "length": lambda prompts, completions, **columns: [float(len(text)) or None for text in completions]
    }
    verifier = Verifier(VerifiersConfig(rewards=rewards), length)
    scored(verifier, group_of([1.0, 0.0], 0, ["ab", "abc"]))
    row = scored(verifier, group_of([1.0, 1.0], 2, ["abcd", "abc", "abcdefgh", ""]))
    assert row["rewards"] == [3.0, 2.5, 1.0, None]  # the last cannot be judged
    assert row["reward_parts"] == {ENVIRONMENT: [1.0, 1.0, 0.0, 0.0], "length": [4.0, 3.0, 2.0, None]}
    # an environment without rewards leaves them to the functions
    bare = {**group_of([1.0], 1, ["abcd", "abcdefgh"]), "reward_parts": {}}
    row = scored(verifier, bare)
    assert row["rewards"] == [2.0, 1.5] and is_correct(row) == [True, False]


def test_what_other_data_sets_were_given_and_groups_of_long_ago_do_not_decide_what_breaking_is_worth() -> (
    None
):
    verifier = Verifier(VerifiersConfig(rewards={ENVIRONMENT: RewardConfig()}))
    scored(verifier, {**group_of([-1000.0, 1000.0], 0), "dataset": "other"})
    scored(verifier, group_of([0.0, 1.0], 0))
    assert scored(verifier, group_of([1.0, 1.0], 1))["rewards"] == [1.0, 1.0, 0.0]
    for _ in range(NUM_GROUPS + 1):
        scored(verifier, group_of([-10.0, 0.0], 0))
    given = verifier.record.given[ENVIRONMENT, "d"]
    assert given == Given(-10.0, 1.0, [(-10.0, 0.0)] * NUM_GROUPS)
    assert scored(verifier, group_of([1.0, 1.0], 1))["rewards"] == [1.0, 1.0, -9.0]


def test_groups_of_equals_however_many_change_neither_the_usual_difference_nor_keep_old_lows() -> None:
    record, own = Record(), (ENVIRONMENT, "d")
    for values in ([[-5.0, 0.0]] * NUM_GROUPS, [[0.0, 1.0]] * NUM_GROUPS, [[0.5] * 7] * NUM_GROUPS):
        for group in values:
            record.add_group(*own, group)
    assert record.given[own] == Given(-5.0, 1.0, [(0.0, 1.0)] * NUM_GROUPS + [(0.5, 0.5)] * NUM_GROUPS)
    assert record.given[own].worst([1.0] * 7, 1.0) == 0.0
    assert record.given[own].worst([], 1.0) == -0.5  # the lows are those of the last groups of all
    for _ in range(3 * NUM_GROUPS):
        record.add_group(*own, [1.0, 1.0])
    assert record.given[own].groups == [(0.0, 1.0)] * NUM_GROUPS + [(1.0, 1.0)] * NUM_GROUPS
    other = Record()
    other.merge(record)
    assert other.given == record.given


def test_a_verifier_knows_what_the_environment_has_given_to_others() -> None:
    actor = _VerifierActor(VerifiersConfig(rewards={ENVIRONMENT: RewardConfig()}))
    whole = Record()
    for values, worth in (([1.0, 1.0], 1.0), ([0.5, 2.0], 0.5), ([1.0, 3.0], 0.5)):
        given, answer = actor.score_group(groups.to_wire(groups.table([group_of([*values], 1)])), whole, [])
        assert given is not None
        (row,) = groups.rows(groups.from_wire(given))
        assert row["rewards"] == [*values, worth]
        whole.merge(answer.record)
        span = min(values), max(values)
        assert answer.record.given == {(ENVIRONMENT, "d"): Given(*span, [span])}
    assert whole.given[ENVIRONMENT, "d"] == Given(0.5, 3.0, [(1.0, 1.0), (0.5, 2.0), (1.0, 3.0)])


@pytest.mark.components
def test_whatever_a_call_does_to_the_process_of_its_world_no_other_episode_notices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def main() -> None:
        made = Forks(Fragile, {"text": "say"}, Limits())
        host = Host(made.world)
        opened = await host.open(0, {"answer": "7"}, 7)
        assert {one.said for one in opened} == {"say 7"} and {one.reason for one in opened} == {None}
        pids = [host._episodes[one.name].world.pid for one in opened]  # type: ignore[attr-defined]
        assert len({*pids, os.getpid()}) == 8
        *broken, late, talker, fine = opened
        for i, one in enumerate(broken):
            tool = "die" if i % 2 else "freeze"
            host._episodes[one.name].world.limit_s = 60 if i % 2 else 0.01  # type: ignore[attr-defined]
            answer = await host.act(one.name, 0, 0, {}, [Call(tool, {})], "")
            how = "its process died" if i % 2 else "its process gave no sign of life and was killed"
            assert answer.reason is not None and answer.reason.endswith(f"environment: {tool}: {how}")
            assert answer.is_broken and answer.reason.startswith("environment: brought down by a tool call")
        answer = await host.act(talker.name, 0, 0, {}, [], "die")
        assert answer.reason == "crash: environment: respond: its process died" and not answer.is_broken
        answer = await host.act(fine.name, 0, 0, {}, [Call("add", {"a": 1})], "")
        assert answer.messages[0]["content"] == "2"
        assert await host.finish(fine.name, 0, {}) == (0.5, None, False)
        under_way = asyncio.ensure_future(host.act(late.name, 0, 0, {}, [Call("freeze", {})], ""))
        await asyncio.sleep(0.01)
        await host.release(0)
        assert (await under_way).is_broken
        await gone(pids)
        again, other = await host.open(1, {"answer": "8"}, 2)
        assert again.said == other.said == "say 8"
        made._server.kill()
        made.wait()
        (lost,) = await host.open(2, {"answer": "9"}, 1)
        assert lost.reason is not None
        assert lost.reason.endswith("the process that worlds are forked from died")
        made.close()

    asyncio.run(main())


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds, and fail where it does not within what a busy machine takes."""
    async with asyncio.timeout(120):
        while not holds():
            await asyncio.sleep(0.01)


async def gone(pids: list[int]) -> None:
    """Wait until these processes have ended."""
    await eventually(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


@pytest.mark.components
def test_a_class_that_another_process_cannot_load_is_an_error_with_its_cause() -> None:
    class Bad:
        at = Unloadable()

        def reset(self, **row: Any) -> None: ...

    with pytest.raises(RuntimeError, match="class cannot be loaded: ZeroDivisionError"):
        Forks(Bad, {}, Limits())


class Unloadable:
    def __reduce__(self) -> Any:
        return divmod, (1, 0)
