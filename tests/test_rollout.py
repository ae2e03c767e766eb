"""Completions that are made with several calls of the model, by FakeEngine: what is trained of them, and what
becomes of them when their engine leaves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from clocks import Run, leaping

from gvpo_ray import groups
from gvpo_ray.bench.scale import Turns
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.engines import base, fake_engine, rollout_engine
from gvpo_ray.engines.fake_engine import FakeEngine
from gvpo_ray.engines.rollout import Rollout, RolloutError, Sample, Span, Transcript, one_call

TOOL = [101, 102, 103]
PROMPT = [1, 2]
BOTH = (*groups.PROMPT_COLUMNS, *groups.COMPLETION_COLUMNS)


async def two_calls(prompt_ids: list[int], sample: Sample) -> list[int]:
    first = await sample(prompt_ids)
    return first + TOOL + await sample(prompt_ids + first + TOOL)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return leaping(monkeypatch, base, fake_engine, rollout_engine)


def prompt() -> pa.Table:
    row = {"group_id": 0, "prompt": "p", "answer": "1", "dataset": "d", "prompt_ids": PROMPT}
    return groups.table([row])


async def ready(function: Rollout = two_calls, **arguments: Any) -> FakeEngine:
    engine = FakeEngine(rollout=function, **arguments)
    await engine.start()
    await engine.update(0, {})
    return engine


def sampling(num_completions: int = 3, max_tokens: int = 1000) -> SamplingConfig:
    return SamplingConfig(num_completions=num_completions, max_tokens=max_tokens)


def row_of(table: pa.Table) -> dict[str, Any]:
    (row,) = groups.rows(groups.validate(table, BOTH))
    return row


def test_what_a_tool_writes_between_two_calls_is_there_and_not_trained(run: Run) -> None:
    async def main() -> None:
        engine = await ready(seconds_per_token=0.01, median_tokens=20, sigma=0.5)
        table, missing = await engine.generate(prompt(), sampling())
        row = row_of(table)
        assert missing == 0 and len(row["completion_ids"]) == 3 and row["finish_reasons"] == ["stop"] * 3
        columns = ("completion_ids", "trained_tokens", "sampling_logprobs")
        for ids, trained, logprobs in zip(*(row[name] for name in columns), strict=True):
            places = [i for i, is_trained in enumerate(trained) if not is_trained]
            assert [ids[i] for i in places] == TOOL and places == list(range(places[0], places[0] + 3))
            assert places[0] > 0 and places[-1] < len(ids) - 1  # tokens of the model before and behind them
            assert all(logprobs[i] == 0.0 for i in places)
            assert all(value < -1 for i, value in enumerate(logprobs) if i not in places)
        assert (await engine.status())["num_tokens"] == sum(map(len, row["completion_ids"])) - 3 * len(TOOL)

    run(main())


def test_a_completion_with_several_calls_is_no_longer_than_it_may_be(run: Run) -> None:
    async def main() -> None:
        engine = await ready(median_tokens=20, sigma=0.0)
        for most, trained in ((42, 20 + 19), (23, 20), (22, 20), (10, 10)):
            row = row_of((await engine.generate(prompt(), sampling(2, most)))[0])
            assert [len(ids) for ids in row["completion_ids"]] == [most] * 2
            assert row["finish_reasons"] == ["length"] * 2
            masks = [mask or [True] * most for mask in row["trained_tokens"]]
            assert [sum(mask) for mask in masks] == [trained] * 2

    run(main())


def test_one_call_through_a_function_trains_every_token_and_a_seed_decides_all_calls(run: Run) -> None:
    async def once(prompt_ids: list[int], sample: Sample) -> list[int]:
        return await sample(prompt_ids)

    async def main() -> None:
        row = row_of((await (await ready(once)).generate(prompt(), sampling()))[0])
        assert row["trained_tokens"] == [None] * 3
        plain = row_of((await (await ready(one_call)).generate(prompt(), sampling()))[0])
        assert "trained_tokens" not in plain
        first, second = await ready(seed=1, sigma=0.0), await ready(seed=2, sigma=0.0)
        one, two = [(await engine.generate(prompt(), sampling(), 0, 7))[0] for engine in (first, second)]
        assert one.equals(two)
        ids = row_of(one)["completion_ids"]
        half = (len(ids[0]) - 3) // 2
        assert len({tuple(part) for of_one in ids for part in (of_one[:half], of_one[half + 3 :])}) == 6

    run(main())


def test_a_completion_that_is_cut_off_in_its_second_call_is_continued_there_by_another_engine(
    run: Run,
) -> None:
    asked: list[int] = []

    async def counted(prompt_ids: list[int], sample: Sample) -> list[int]:
        asked.append(0)
        return await two_calls(prompt_ids, sample)

    async def main() -> None:
        engine = await ready(counted, seconds_per_token=0.01, median_tokens=100, sigma=0.0)
        work = asyncio.ensure_future(engine.generate(prompt(), sampling()))
        await asyncio.sleep(1.505)  # in the midst of the second calls
        await engine.drain(0)
        table, missing = await work
        cut = row_of(table)
        assert missing == 3 and cut["finish_reasons"] == ["abort"] * 3
        assert [len(ids) for ids in cut["completion_ids"]] == [153] * 3
        assert cut["trained_tokens"] == [[True] * 100 + [False] * 3 + [True] * 50] * 3
        leaving = await ready(counted, seconds_per_token=1000.0)
        await leaving.update(3, {})
        work = asyncio.ensure_future(leaving.generate(prompt(), sampling(), 0, None, table))
        await asyncio.sleep(1)
        await leaving.drain(0)
        assert row_of((await work)[0]) == cut  # it wrote nothing: not a version more
        other = await ready(counted, median_tokens=30, sigma=0.0, vocab_size=3)
        await other.update(4, {})
        table, missing = await other.generate(prompt(), sampling(), 0, None, table)
        whole = row_of(table)
        assert missing == 0 and whole["finish_reasons"] == ["stop"] * 3
        for before, after in zip(cut["completion_ids"], whole["completion_ids"], strict=True):
            assert after[:153] == before and len(after) == 153 + 30
        assert whole["trained_tokens"] == [[True] * 100 + [False] * 3 + [True] * 80] * 3
        assert whole["version_min"] == [0] * 3 and whole["version_max"] == [4] * 3
        assert (await other.status())["num_tokens"] == 3 * 30  # the first calls were not made again
        assert len(asked) == 9

    run(main())


def test_a_tool_that_answers_otherwise_the_second_time_makes_the_rest_anew(run: Run) -> None:
    answers = iter([[7], [8]])

    async def moody(prompt_ids: list[int], sample: Sample) -> list[int]:
        first = await sample(prompt_ids)
        said = next(answers)
        return first + said + await sample(prompt_ids + first + said)

    async def main() -> None:
        engine = await ready(moody, seconds_per_token=0.01, median_tokens=100, sigma=0.0)
        work = asyncio.ensure_future(engine.generate(prompt(), sampling(2), 0, None, whole_one()))
        await asyncio.sleep(1.505)
        await engine.drain(0)
        cut, _ = await work
        (other, _) = await (await ready(moody, median_tokens=10, sigma=0.0)).generate(
            prompt(), sampling(2), 0, None, cut
        )
        before, after = row_of(cut)["completion_ids"][1], row_of(other)["completion_ids"][1]
        assert after[:100] == before[:100] and before[100] == 7 and after[100] == 8 and len(after) == 111

    def whole_one() -> pa.Table:
        return groups.with_columns(
            prompt(),
            completions=[["x"]],
            completion_ids=[[[3]]],
            finish_reasons=[["stop"]],
            sources=[["policy"]],
            version_min=[[0]],
            version_max=[[0]],
            sampling_logprobs=[[[-1.0]]],
        )

    run(main())


def test_the_experts_of_each_token_are_those_with_which_it_was_first_read() -> None:
    """Over two calls, in a completion that another engine goes on with, and where an engine says nothing."""
    calls: list[int] = []

    async def call(ids: list[int], max_tokens: int, begin: int, stop: Any = ()) -> Span:
        calls.append(len(ids))
        new = [7, 8]
        # two bytes a token, the number of the call; the engine reads all but the last token
        experts = bytes([len(calls)] * 2 * (len(ids) + len(new) - 1))
        return Span(new, [-1.0] * 2, "stop", [0], None, None if len(calls) == 4 else experts)

    async def main() -> None:
        one = Transcript(PROMPT, 100, call, None)
        await one.run(two_calls)
        assert calls == [2, 7] and one.columns("")["routed_experts"] == bytes([1] * 6 + [2] * 10)
        begun = {**one.so_far(), "completion_ids": one.ids[:2], "routed_experts": bytes([1] * 6)}
        begun |= {"sampling_logprobs": one.logprobs[:2], "trained_tokens": None, "turn_ends": [2]}
        other = Transcript(PROMPT, 100, call, begun)
        await other.run(two_calls)
        assert calls == [2, 7, 7] and other.ids == one.ids
        assert other.columns("")["routed_experts"] == bytes([1] * 6 + [3] * 10)
        silent = Transcript(PROMPT, 100, call, None)
        await silent.run(one_call)
        assert silent.columns("")["routed_experts"] is None

    asyncio.run(main())


@pytest.mark.parametrize("says", [True, False])
def test_no_experts_stay_of_tokens_that_a_tool_did_not_add_again(says: bool) -> None:
    """Another engine's completion has seven tokens; as many stay as the tool has added again."""
    calls: list[int] = []

    async def call(ids: list[int], max_tokens: int, begin: int, stop: Any = ()) -> Span:
        calls.append(len(ids))
        experts = bytes([len(calls)] * 2 * (len(ids) + 1)) if says or len(calls) < 3 else None
        return Span([7, 8], [-1.0] * 2, "stop", [0], None, experts)

    def adds(tool: list[int], asks: bool = True) -> Rollout:
        async def rollout(prompt_ids: list[int], sample: Sample) -> list[int]:
            made = await sample(prompt_ids) + tool
            return made + await sample(prompt_ids + made) if asks else made

        return rollout

    async def main() -> None:
        one = Transcript(PROMPT, 100, call, None)
        await one.run(adds([50, 51, 52]))
        assert one.columns("")["routed_experts"] == bytes([1] * 6 + [2] * 10)
        for tool, num_same in (([60] * 6, 4), ([50], 5), ([50, 51, 52, 60], 7)):
            del calls[2:]
            two = Transcript(PROMPT, 100, call, one.so_far())
            await two.run(adds(tool))
            assert two.ids == [7, 8, *tool, 7, 8]
            # of the prompt, and of as many tokens as are the same
            kept = bytes([1] * 6 + [2] * 10)[: 2 * num_same]
            num_read = 2 + len(two.ids) - 1
            want = kept + bytes([3] * (2 * num_read - len(kept))) if says else None
            assert two.columns("")["routed_experts"] == want
        same = Transcript(PROMPT, 100, call, one.so_far())
        await same.run(adds([50, 51, 52]))
        assert same.columns("") == one.columns("")
        # no call has said how long a token's experts are
        silent = Transcript(PROMPT, 100, call, one.so_far())
        await silent.run(adds([60] * 6, asks=False))
        assert silent.columns("")["routed_experts"] is None
        # there is less room than where it was begun
        short = Transcript(PROMPT, 6, call, one.so_far())
        await short.run(adds([50, 51, 52]))
        assert len(short.ids) == 6 and short.columns("")["routed_experts"] is None

    asyncio.run(main())


def test_an_engine_that_says_its_experts_has_their_column_also_where_none_are_known(run: Run) -> None:
    """Engines put the tables of several groups together, and so does an evaluation."""

    async def main() -> None:
        engine = await ready()
        engine._returns_experts = True
        silent, _ = await engine.generate(prompt(), sampling(2))
        assert row_of(silent)["routed_experts"] == [None, None]
        spoken = groups.with_columns(silent, routed_experts=[[b"\x00", None]])
        assert len(pa.concat_tables([silent, spoken])) == 2
        engine._returns_experts = False
        assert "routed_experts" not in (await engine.generate(prompt(), sampling(2)))[0].column_names

    run(main())


def test_a_drain_does_not_wait_for_a_tool(run: Run) -> None:
    async def slow(prompt_ids: list[int], sample: Sample) -> list[int]:
        first = await sample(prompt_ids)
        await asyncio.sleep(1000)
        return first + TOOL

    async def main() -> None:
        engine = await ready(slow, seconds_per_token=0.01, median_tokens=100, sigma=0.0)
        work = asyncio.ensure_future(engine.generate(prompt(), sampling()))
        await asyncio.sleep(5)
        began = asyncio.get_running_loop().time()
        await engine.drain(0)
        assert asyncio.get_running_loop().time() - began < 1
        table, missing = await work
        assert missing == 3 and [len(ids) for ids in row_of(table)["completion_ids"]] == [100] * 3

    run(main())


def test_finished_siblings_are_handed_over_with_what_is_not_trained(run: Run) -> None:
    calls = iter(range(100))

    async def short_or_long(prompt_ids: list[int], sample: Sample) -> list[int]:
        if next(calls) == 0:
            return await sample(prompt_ids) + TOOL
        return await two_calls(prompt_ids, sample)

    async def main() -> None:
        engine = await ready(short_or_long, seconds_per_token=0.01, median_tokens=300, sigma=0.0)
        work = asyncio.ensure_future(engine.generate(prompt(), sampling()))
        ids, table = await engine.finished()
        assert ids == [0] and row_of(table)["trained_tokens"] == [[[True] * 300 + [False] * 3][0]]
        assert (await work)[1] == 0

    run(main())


async def rewrites(prompt_ids: list[int], sample: Sample) -> list[int]:
    first = await sample(prompt_ids)
    return [9, *first]


async def forgets_the_prompt(prompt_ids: list[int], sample: Sample) -> list[int]:
    return await sample([])


async def never_asks(prompt_ids: list[int], sample: Sample) -> list[int]:
    return TOOL


@pytest.mark.parametrize(
    ("function", "why"),
    [(rewrites, "only append"), (forgets_the_prompt, "needs the prompt"), (never_asks, "without a token")],
)
def test_a_function_that_does_not_append_to_what_the_model_wrote_is_named_as_wrong(
    run: Run, function: Callable[..., Any], why: str
) -> None:
    async def main() -> None:
        with pytest.raises(RolloutError, match=why):
            await (await ready(function)).generate(prompt(), sampling())

    run(main())


@pytest.mark.parametrize("num_turns", [2, 10])
def test_the_episodes_of_bench_scale_have_that_many_turns(run: Run, num_turns: int) -> None:
    async def main() -> None:
        engine = Turns(num_turns, 40.0)
        await engine.update(0, {})
        (row,) = groups.rows((await engine.generate(prompt(), sampling(4, 900)))[0])
        assert [mask.count(False) for mask in row["trained_tokens"]] == [num_turns - 1] * 4

    run(main())


def test_an_agent_that_asks_again_gets_another_answer_and_may_ask_for_no_token() -> None:
    asked: list[tuple[int, int]] = []

    async def call(ids: list[int], max_tokens: int, begin: int, stop: Any = ()) -> Span:
        asked.append((max_tokens, begin))
        return Span([9], [-1.0], "stop", [0])

    async def ask() -> None:
        transcript = Transcript(PROMPT, 10, call, None)
        for ids, most in ((PROMPT, None), (PROMPT, 3), ([1, 2, 3], 0), (PROMPT, 99)):
            await transcript.ask(ids, most, ())

    asyncio.run(ask())
    assert [most for most, _ in asked] == [10, 3, 0, 10]
    assert len({begin for _, begin in asked}) == 4  # which decides an evaluation's seed
