"""Engines: what is kept, handed over, cut off and gone on with, by FakeEngine and in a Ray actor."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from clocks import leaping
from sampled import part, prompt, row_of, sampling

from gvpo_ray import groups
from gvpo_ray.actors import Draining
from gvpo_ray.engines import base, fake_engine
from gvpo_ray.engines.base import MIGRATE_AFTER_S, BaseEngine, split_kept
from gvpo_ray.engines.fake_engine import FakeEngine
from gvpo_ray.engines.openai_engine import ServerEngine
from gvpo_ray.engines.vllm_engine import Engine


async def ready(engine: FakeEngine) -> FakeEngine:
    await engine.start()
    await engine.update(0, {})
    return engine


@pytest.fixture
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Coroutine[Any, Any, None]], None]:
    """Runs FakeEngines on a clock that leaps."""
    return leaping(monkeypatch, base, fake_engine)


# ------------------------------------------------------------------------------------ what is kept of a group


def test_what_was_gone_on_with_and_finished_since_is_not_gone_on_with_again() -> None:
    """An engine left with two cut off; the next one finished the first of them, handed it over, and died."""
    left = part([5, 6], [5], [7, 8], reason="abort")
    done, begun, num_new = split_kept([part([3]), left, part([5, 6, 9]), part([4, 4])], size=6)
    assert [row_of(table)["completion_ids"] for table in done] == [[[3]], [[5, 6, 9]], [[4, 4]]]
    assert [row["completion_ids"] for row in begun] == [[5], [7, 8]] and num_new == 3
    assert split_kept([part([3], [4], [5])], size=2)[1:] == ([], 0)
    assert [row["completion_ids"] for row in split_kept([left], size=2)[1]] == [[5, 6], [5]]


def test_kept_completions_come_first_and_only_the_rest_is_sampled() -> None:
    async def run() -> None:
        engine = await ready(FakeEngine())
        foreign, replayed = part([9], version=None, source="offline:people"), part([8], [7])
        table, missing = await engine.generate(prompt(), sampling(5), 0, None, foreign, replayed)
        row = row_of(table)
        assert (
            missing == 0 and row["completion_ids"][:3] == [[9], [8], [7]] and len(row["completion_ids"]) == 5
        )
        assert row["sources"] == ["offline:people"] + ["policy"] * 4 and row["sampling_logprobs"][0] is None
        assert (await engine.status())["num_tokens"] == sum(map(len, row["completion_ids"][3:]))
        # enough, and more than that
        for kept in ((foreign, replayed, part([1], [2])), (foreign, replayed, part([1], [2], [3]))):
            assert row_of((await engine.generate(prompt(), sampling(5), 0, None, *kept))[0])[
                "completion_ids"
            ][:4] == [[9], [8], [7], [1]]

    asyncio.run(run())


def test_a_group_with_a_seed_is_a_pure_function_of_it_and_of_what_is_kept() -> None:
    async def run() -> None:
        first, second = await ready(FakeEngine(seed=1)), await ready(FakeEngine(seed=2))
        one, two = [(await engine.generate(prompt(), sampling(), 0, 7))[0] for engine in (first, second)]
        assert one.equals(two)
        kept = groups.take(one, [0])
        more = [
            row_of((await engine.generate(prompt(), sampling(), 0, 7, kept))[0]) for engine in (first, second)
        ]
        assert more[0] == more[1] and more[0]["completion_ids"][1] != more[0]["completion_ids"][0]

    asyncio.run(run())


# ---------------------------------------------------------------------------------------------- a fake engine


def test_fake_lengths_have_a_heavy_tail_and_take_their_time(without_waiting: Callable[..., None]) -> None:
    async def run() -> None:
        engine = await ready(FakeEngine(median_tokens=100, sigma=1.0))
        table, _ = await engine.generate(prompt(), sampling(4000, 1000))
        lengths = np.array([len(ids) for ids in row_of(table)["completion_ids"]])
        assert 90 < np.median(lengths) < 110 and 250 < np.quantile(lengths, 0.84) < 300  # e times the median
        assert lengths.max() == 1000 and {*np.array(row_of(table)["finish_reasons"])[lengths == 1000]} == {
            "length"
        }
        slow = await ready(FakeEngine(seconds_per_token=0.002, median_tokens=100, sigma=0))
        began = (now := asyncio.get_running_loop().time)()
        await asyncio.gather(*(slow.generate(prompt(i), sampling(4, 1000)) for i in range(50)))
        assert now() - began == pytest.approx(0.2)  # all at the same time

    without_waiting(run())


def test_siblings_of_a_long_group_are_handed_over_once_and_those_of_short_groups_never(
    without_waiting: Callable[..., None],
) -> None:
    async def run() -> None:
        engine = await ready(FakeEngine(seconds_per_token=0.01, median_tokens=400, sigma=0))
        # 0.1 s and 0.8 s: over before the first one would be handed over
        short = asyncio.ensure_future(
            engine.generate(prompt(1), sampling(2, 80), 0, None, part([6] * 70, reason="abort"))
        )
        almost = part([3] * 380, [4] * 240, reason="abort")  # of 400: 0.2 s, 1.6 s, and 4 s for the new ones
        long = asyncio.ensure_future(engine.generate(prompt(2), sampling(4, 400), 0, None, part([5]), almost))
        began = (now := asyncio.get_running_loop().time)()
        # looked for as often as they have to be old
        for first, seconds in ((3, 2 * MIGRATE_AFTER_S), (4, 3 * MIGRATE_AFTER_S)):
            ids, table = await engine.finished()
            assert ids == [2] and now() - began == pytest.approx(seconds)
            (tokens,) = row_of(table)["completion_ids"]
            assert tokens[0] == first and len(tokens) == 400 and row_of(table)["finish_reasons"] == ["length"]
        assert (await short)[1] == 0
        row = row_of((await long)[0])
        assert (
            tokens in row["completion_ids"]
            and row["completion_ids"][0] == [5]
            and list(map(len, row["completion_ids"])) == [1, 400, 400, 400]
        )
        waiting = asyncio.ensure_future(engine.finished())
        await asyncio.sleep(100 * MIGRATE_AFTER_S)
        assert not waiting.done()
        await engine.close()
        ids, table = await waiting
        assert ids == [] and len(table) == 0

    without_waiting(run())


def test_a_drained_engine_refuses_new_work_and_returns_what_it_has(
    without_waiting: Callable[..., None],
) -> None:
    async def run() -> None:
        engine = await ready(FakeEngine(seconds_per_token=0.01, median_tokens=100, sigma=0))
        short = asyncio.ensure_future(engine.generate(prompt(0), sampling(2, 20)))
        almost = part([3] * 90, reason="abort")
        long = asyncio.ensure_future(engine.generate(prompt(1), sampling(3, 100), 0, None, almost))
        early = asyncio.ensure_future(engine.generate(prompt(2), sampling(3, 100), min_version=5))
        await asyncio.sleep(0)
        drained = asyncio.ensure_future(engine.drain(0.5))
        with pytest.raises(Draining):
            await early  # its weights may never come
        with pytest.raises(Draining):
            await engine.generate(prompt(3), sampling())
        table, missing = await short
        assert missing == 0 and not drained.done()
        table, missing = await long
        row = row_of(table)
        assert missing == 2 and row["finish_reasons"] == ["length", "abort", "abort"]
        assert len(row["completion_ids"][0]) == 100 and all(
            49 <= len(ids) <= 50 for ids in row["completion_ids"][1:]
        )
        await drained
        assert (await engine.status())["num_groups"] == 0
        other = await ready(FakeEngine(vocab_size=3))
        assert await other.update(1, {})
        whole, missing = await other.generate(prompt(1), sampling(3, 100), 1, None, table)
        after = row_of(whole)
        assert missing == 0 and "abort" not in after["finish_reasons"]
        for i in range(3):
            assert after["completion_ids"][i][: len(row["completion_ids"][i])] == row["completion_ids"][i]
            assert (
                after["sampling_logprobs"][i][: len(row["sampling_logprobs"][i])]
                == row["sampling_logprobs"][i]
            )
        assert after["version_min"] == [0, 0, 0] and after["version_max"] == [0, 1, 1]

    without_waiting(run())


def test_completions_without_a_token_are_missing_from_what_a_drained_engine_returns() -> None:
    async def run() -> None:
        engine = await ready(FakeEngine(seconds_per_token=10.0))
        work = asyncio.ensure_future(engine.generate(prompt(), sampling(3), 0, None, part([4])))
        await asyncio.sleep(0)
        await engine.drain(0)
        table, missing = await work
        assert missing == 2 and row_of(table)["completion_ids"] == [[4]]

    asyncio.run(run())


def test_the_status_says_what_is_in_flight_and_since_when(without_waiting: Callable[..., None]) -> None:
    async def run() -> None:
        engine = await ready(FakeEngine(seconds_per_token=0.01, median_tokens=40, sigma=0))
        began = asyncio.get_running_loop().time()
        assert (await engine.status())["oldest"] is None
        work = [asyncio.ensure_future(engine.generate(prompt(7 + i), sampling(4, 100))) for i in range(2)]
        waits = asyncio.ensure_future(engine.generate(prompt(9), sampling(), min_version=3))
        await asyncio.sleep(0.205)
        status = await engine.status()
        assert status["num_groups"] == 2 and status["num_completions"] == 8 and status["num_tokens"] == 8 * 20
        assert status["oldest"] == {"group_id": 7, "since": began}
        assert (
            not status["leaving"]
            and not status["updating"]
            and status["pid"] == os.getpid()
            and status["version"] == 0
        )
        await asyncio.gather(*work)
        assert (await engine.status())["num_tokens"] == 8 * 40
        await engine.update(3, {})
        assert row_of((await waits)[0])["version_min"] == [3] * 4

    without_waiting(run())


def test_a_process_for_a_fake_engine_imports_neither_torch_nor_vllm_nor_the_client_of_servers() -> None:
    code = (
        "import sys, gvpo_ray.engines.actor; sys.exit(any(name in sys.modules for name in "
        "('torch', 'vllm', 'transformers', 'openai')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ----------------------------------------------------------------------------------- a process that has to go


def test_sigterm_lets_an_actor_finish_its_work_and_ends_it() -> None:
    """In an async Ray actor, whose methods never run in the main thread."""
    ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=100_000_000)
    try:
        actor = ray.remote(FakeEngine).options(num_cpus=0.1, max_concurrency=100)
        patient, hurried = (
            actor.remote(seconds_per_token=0.02, median_tokens=n, sigma=0, drain_s=s)
            for n, s in ((200, 1000.0), (5000, 4.0))
        )
        pids = [
            ray.get([engine.start.remote(), engine.update.remote(0, {})])[0]["pid"]
            for engine in (patient, hurried)
        ]
        # 4 s, and 100
        work = [engine.generate.remote(prompt(), sampling(4, 10_000)) for engine in (patient, hurried)]
        while not all(ray.get(engine.status.remote())["num_tokens"] for engine in (patient, hurried)):
            time.sleep(0.01)
        for pid, engine in zip(pids, (patient, hurried), strict=True):
            os.kill(pid, signal.SIGTERM)
            while not ray.get(engine.status.remote())["leaving"]:
                time.sleep(0.01)
            with pytest.raises(Draining):
                ray.get(engine.generate.remote(prompt(1), sampling()))
        (whole, missing), (cut, missing_of_cut) = ray.get(work)
        assert missing == 0 and set(map(len, row_of(whole)["completion_ids"])) == {200}
        assert missing_of_cut == 4 and row_of(cut)["finish_reasons"] == ["abort"] * 4
        deadline = time.time() + 120
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.time() < deadline
            time.sleep(0.1)
    finally:
        ray.shutdown()


def test_every_engine_has_the_same_methods() -> None:
    for engine in (Engine, FakeEngine, ServerEngine):
        assert issubclass(engine, BaseEngine) and all(
            callable(getattr(engine, name)) for name in ("start", "generate", "update")
        )
