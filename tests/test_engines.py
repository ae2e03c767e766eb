"""Engines: what is kept, handed over, cut off and gone on with, by FakeEngine, one real vLLM on the CPU, Ray,
and a server on loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import tiny
import torch
from clocks import leaping
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from gvpo_ray import groups
from gvpo_ray.actors import Draining
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.config.engines import PoolConfig, SamplingConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines import base, fake_engine, openai_engine, rollout, vllm_engine
from gvpo_ray.engines.actor import ActorMethods
from gvpo_ray.engines.base import MIGRATE_AFTER_S, BaseEngine, split_kept
from gvpo_ray.engines.fake_engine import FakeEngine
from gvpo_ray.engines.openai_engine import ServerEngine
from gvpo_ray.engines.vllm_engine import Engine

PROMPT_IDS = [2 + (7 * i) % (tiny.VOCAB_SIZE - 2) for i in range(24)]


def prompt(group_id: int = 0) -> pa.Table:
    return groups.table(
        [{"group_id": group_id, "prompt": "1 + 1?", "answer": "2", "dataset": "d", "prompt_ids": PROMPT_IDS}]
    )


def part(
    *completions: list[int], reason: str = "stop", source: str = "policy", version: int | None = 0
) -> pa.Table:
    """A row of completions, as they are kept outside an engine."""
    m = len(completions)
    logprobs = [None if version is None else [-1.0] * len(ids) for ids in completions]
    return groups.with_columns(
        prompt(),
        completions=[["kept"] * m],
        completion_ids=[completions],
        finish_reasons=[[reason] * m],
        sources=[[source] * m],
        version_min=[[version] * m],
        version_max=[[version] * m],
        sampling_logprobs=[logprobs],
    )


def row_of(table: pa.Table) -> dict[str, Any]:
    (row,) = groups.rows(groups.validate(table, groups.PROMPT_COLUMNS + groups.COMPLETION_COLUMNS))
    return row


def sampling(num_completions: int = 4, max_tokens: int = 20) -> SamplingConfig:
    return SamplingConfig(num_completions=num_completions, max_tokens=max_tokens)


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
            for n, s in ((50, 20.0), (5000, 0.3))
        )
        pids = [
            ray.get([engine.start.remote(), engine.update.remote(0, {})])[0]["pid"]
            for engine in (patient, hurried)
        ]
        # a second, and 100
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
        assert missing == 0 and set(map(len, row_of(whole)["completion_ids"])) == {50}
        assert missing_of_cut == 4 and row_of(cut)["finish_reasons"] == ["abort"] * 4
        deadline = time.time() + 20
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.time() < deadline
            time.sleep(0.1)
    finally:
        ray.shutdown()


# --------------------------------------------------------------------------------------- a server on loopback


class Server:
    """An OpenAI-compatible server: `answer(body)` says what it answers to POSTs, (status, JSON) or (status,
    JSON, headers).
    """

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], tuple[Any, ...]],
        models: tuple[int, Any] = (200, {"data": [{"id": "m"}]}),
    ) -> None:
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._send(*models)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append({"path": self.path, **body})
                server.headers.append(self.headers)
                self._send(*answer(body))

            def _send(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tokenizer"))


@contextlib.contextmanager
def served(
    folder: Path, answer: Callable[[dict[str, Any]], tuple[Any, ...]], **pool: Any
) -> Iterator[tuple[Server, ServerEngine]]:
    server = Server(answer)
    model, config = ModelConfig(path=str(folder)), PoolConfig(url=server.url + "/", **pool)
    yield server, ServerEngine("big", model, config, system_prompt="Be brief.", api_key="secret")
    server.close()


def choices(*texts: str, reason: str = "stop") -> tuple[int, Any]:
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason} for text in texts]}


def ids_of(text: str) -> list[int]:
    return [2 + tiny.ALPHABET.index(letter) for letter in text]


def test_a_server_is_asked_for_what_is_missing_and_its_answers_are_foreign_data(
    tokenizer_folder: Path,
) -> None:
    async def run(server: Server, engine: ServerEngine) -> None:
        assert (await engine.start())["pid"] == os.getpid()
        finished = asyncio.ensure_future(engine.finished())
        begun = part([5, 6], reason="abort")
        table, missing = await engine.generate(prompt(), sampling(3), 99, 11, part([3, 1]), begun)
        row = row_of(table)
        assert missing == 0 and row["completion_ids"] == [[3, 1], [*ids_of("2"), 1], [*ids_of("so3"), 1]]
        assert row["completions"] == ["kept", "2", "so3"] and row["finish_reasons"] == ["stop"] * 3
        assert row["sources"] == ["policy", "offline:big", "offline:big"]
        assert row["version_min"] == row["version_max"] == [0, None, None] and row["sampling_logprobs"][
            1:
        ] == [None, None]
        (asked,) = server.asked
        seed = asked.pop("seed")
        assert asked == {
            "path": "/v1/chat/completions",
            "model": "m",
            "n": 2,
            "temperature": 1.0,
            "max_tokens": 20,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}],
        }
        # the kept one may be of the same model and seed
        assert seed != 11 and server.headers[0]["Authorization"] == "Bearer secret"
        status = await engine.status()
        assert status["num_tokens"] == 2 + 4 and status["num_groups"] == 0
        await engine.update(5, {})
        assert not finished.done()
        await engine.close()
        assert (await finished)[0] == []

    with served(tokenizer_folder, lambda body: choices("2", "so3")) as (server, engine):
        asyncio.run(run(server, engine))


def test_a_server_is_asked_what_the_template_makes_of_a_problem_and_ends_a_text_once(
    tokenizer_folder: Path,
) -> None:
    server = Server(lambda body: choices("2<eos>", "s<eos>o"))
    model, pool = ModelConfig(path=str(tokenizer_folder)), PoolConfig(url=server.url)
    engine = ServerEngine("big", model, pool, template="Sum: {prompt}\nAnswer:")

    async def run() -> None:
        await engine.start()
        table, _ = await engine.generate(prompt(), sampling(2), 0, 1)
        (asked,) = server.asked
        assert asked["messages"] == [{"role": "user", "content": "Sum: 1 + 1?\nAnswer:"}]
        ended, spelled = row_of(table)["completion_ids"]
        assert ended == [*ids_of("2"), 1] and spelled[-1] == 1 and 1 not in spelled[:-1]
        await engine.close()

    asyncio.run(run())
    server.close()


def test_a_server_that_ignores_n_is_asked_again_for_the_rest_with_other_seeds(tokenizer_folder: Path) -> None:
    async def run(server: Server, engine: ServerEngine) -> None:
        await engine.start()
        for group_id in range(2):
            row = row_of((await engine.generate(prompt(group_id), sampling(4, 3), 0, 100 * group_id))[0])
            # of four letters there is room for three
            assert row["completions"] == ["123"] * 4 and row["finish_reasons"] == ["length"] * 4
            assert row["completion_ids"] == [ids_of("123")] * 4
        assert [asked["n"] for asked in server.asked] == [4, 1, 1, 1] + [1] * 4
        assert sorted(asked["seed"] for asked in server.asked) == [0, 1, 2, 3, 100, 101, 102, 103]

    with served(tokenizer_folder, lambda body: choices("1234")) as (server, engine):
        asyncio.run(run(server, engine))


def test_a_server_that_is_busy_is_asked_again_and_one_without_our_model_is_quoted(
    tokenizer_folder: Path,
) -> None:
    answers = [
        (503, {}),
        (429, {}),
        choices("1", "2", reason="length"),
        (404, {"error": {"message": "no such\nmodel"}}),
    ]

    async def run(server: Server, engine: ServerEngine) -> None:
        await engine.start()
        row = row_of((await engine.generate(prompt(), sampling(2)))[0])
        assert (
            row["finish_reasons"] == ["length"] * 2
            and row["completion_ids"] == [ids_of("1"), ids_of("2")]
            and len(server.asked) == 3
        )
        with pytest.raises(RuntimeError, match=r"/v1/chat/completions answered 404: no such model$"):
            await engine.generate(prompt(), sampling(2))
        server.close()
        engine._client = engine._client.with_options(max_retries=0)
        with pytest.raises(ConnectionError, match=r"/v1/chat/completions: "):
            await engine.generate(prompt(), sampling(2))

    with served(tokenizer_folder, lambda body: answers.pop(0)) as (server, engine):
        asyncio.run(run(server, engine))


REFUSALS: list[tuple[tuple[int, Any], str]] = [
    ((400, {"error": {"message": "maximum context length is 4096"}}), "answered 400: maximum context length"),
    ((422, {"detail": "no"}), "answered 422"),
    ((200, {"error": {"message": "upstream"}}), "answered without choices"),
    ((200, {"choices": {}}), "answered without choices"),
    ((200, ["?"]), "answered 200"),
    ((200, {"choices": ["?"]}), "answered a choice without message"),
    ((200, {"choices": [{"text": "x"}]}), "answered a choice without message"),
    ((200, {"choices": [{"message": {"content": None}, "finish_reason": "stop"}]}), "a message without text"),
    ((200, {"choices": [{"message": {"content": 7}, "finish_reason": "stop"}]}), "a message without text"),
    ((200, {"choices": [{"message": {"content": []}, "finish_reason": "stop"}]}), "a message without text"),
    (choices("", reason="length"), "answered with no token"),
    (choices("half of it", reason="content_filter"), "answered with a refusal"),
]


@pytest.mark.parametrize(("answer", "why"), REFUSALS)
def test_a_prompt_that_a_server_refuses_is_a_group_without_its_completions_and_says_why(
    tokenizer_folder: Path, answer: tuple[int, Any], why: str
) -> None:
    class Actor(ActorMethods, ServerEngine):
        pass

    asked = iter([answer, choices("1", "2")])
    server = Server(lambda body: next(asked))
    engine = Actor("big", ModelConfig(path=str(tokenizer_folder)), PoolConfig(url=server.url))

    async def run() -> None:
        await engine.start()
        kept = groups.to_wire(part([3, 1]))
        for texts in (["kept"], ["kept", "1", "2"]):
            table, (missing, num_tokens, refusal) = await engine.sample(
                groups.to_wire(prompt()), sampling(3), 0, None, kept
            )
            row = row_of(groups.from_wire(table))
            assert row["completions"] == texts and missing == 0
            assert num_tokens == sum(map(len, row["completion_ids"][1:]))
            if texts == ["kept"]:
                assert refusal.startswith(server.url) and why in refusal and "\n" not in refusal
            else:
                assert refusal == ""
        await engine.close()

    asyncio.run(run())
    server.close()


def test_a_group_that_was_refused_wholly_is_logged_so_that_a_resumed_run_does_not_ask_again_and_not_trained(
    tmp_path: Path,
) -> None:
    nothing: dict[str, Any] = {name: [[]] for name in groups.COMPLETION_COLUMNS}
    group = groups.with_columns(prompt(3), **nothing, rewards=[[]], reward_parts=[[]], reward_reasons=[[]])

    async def run() -> None:
        buffer = GroupBuffer(tmp_path, groups_per_step=1, num_steps=1, max_staleness=None)
        assert not await buffer.put(group)
        assert (await buffer.status())["num_finished"] == 1

    asyncio.run(run())
    (row,) = groups.rows(groups.load(tmp_path))
    assert row["group_id"] == 3 and groups.trainable(row) is None


def test_a_refused_sibling_is_left_out_and_the_others_stay(tokenizer_folder: Path) -> None:
    answer = choices("1", "2", "3")
    answer[1]["choices"][1]["finish_reason"] = "content_filter"

    async def run(server: Server, engine: ServerEngine) -> None:
        await engine.start()
        table, missing = await engine.generate(prompt(), sampling(3))
        assert row_of(table)["completions"] == ["1", "3"] and missing == 0
        assert len(server.asked) == 1 and "content_filter" in engine.refusals[0]

    with served(tokenizer_folder, lambda body: answer) as (server, engine):
        asyncio.run(run(server, engine))


def test_a_server_that_refuses_every_prompt_stops_the_run_with_its_words(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_engine, "MAX_REFUSALS", 3)
    refused = (400, {"error": {"message": "n must be 1"}})
    answers = [refused, refused, choices("1", "2"), refused, refused, refused]

    async def run(server: Server, engine: ServerEngine) -> None:
        await engine.start()
        sizes = [
            len(row_of((await engine.generate(prompt(), sampling(2)))[0])["completions"]) for _ in range(5)
        ]
        assert sizes == [0, 0, 2, 0, 0]
        with pytest.raises(RuntimeError, match=r"answered 400: n must be 1 \(3 prompts in a row"):
            await engine.generate(prompt(), sampling(2))

    with served(tokenizer_folder, lambda body: answers.pop(0)) as (server, engine):
        asyncio.run(run(server, engine))


def test_texts_of_a_server_may_be_parts_or_hold_half_a_surrogate_pair(tokenizer_folder: Path) -> None:
    answers = [
        choices("1\ud83d", "\ud83d\ude00"),
        (
            200,
            {
                "choices": [
                    {"message": {"content": content}, "finish_reason": "stop"}
                    for content in (
                        [{"type": "text", "text": "1 "}, {"type": "image"}, {"type": "text", "text": "2"}],
                        "",
                    )
                ]
            },
        ),
    ]

    async def run(server: Server, engine: ServerEngine) -> None:
        await engine.start()
        texts = [row_of((await engine.generate(prompt(), sampling(2)))[0])["completions"] for _ in range(2)]
        assert texts == [["1\ufffd", "\U0001f600"], ["1 2", ""]]

    with served(tokenizer_folder, lambda body: answers.pop(0)) as (server, engine):
        asyncio.run(run(server, engine))


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "3600"},
        {"Retry-After": "inf"},
        {"Retry-After-Ms": "3600000"},
        {"Retry-After": "Fri, 31 Dec 2100 23:59:59 GMT"},
    ],
)
def test_a_server_that_asks_for_an_hour_is_asked_again_after_the_longest_wait(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch, headers: dict[str, str]
) -> None:
    monkeypatch.setattr(openai_engine, "MAX_RETRY_AFTER_S", 0.25)
    waited = []
    sleep = asyncio.sleep

    async def noted(seconds: float) -> None:
        waited.append(seconds)
        await sleep(0)

    answers: list[tuple[Any, ...]] = [(429, {}, headers), (503, {}, headers), choices("1", "2")]

    async def run(server: Server, engine: ServerEngine) -> None:
        await engine.start()
        monkeypatch.setattr("openai._base_client.anyio.sleep", noted)
        row = row_of((await engine.generate(prompt(), sampling(2)))[0])
        assert row["completions"] == ["1", "2"] and waited == [0.25, 0.25]

    with served(tokenizer_folder, lambda body: answers.pop(0)) as (server, engine):
        asyncio.run(run(server, engine))


def test_a_server_is_asked_at_its_url_whatever_the_environment_says_and_gets_no_key_of_another(
    tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "another-server's")
    server = Server(lambda body: choices("1", "2"))
    engine = ServerEngine("big", ModelConfig(path=str(tokenizer_folder)), PoolConfig(url=server.url))

    async def run() -> None:
        await engine.start()
        await engine.generate(prompt(), sampling(2))
        await engine.close()

    asyncio.run(run())
    server.close()
    (headers,) = server.headers
    assert not any("another-server's" in value for value in headers.values())
    assert "Authorization" not in headers and "seed" not in server.asked[0]


@pytest.mark.parametrize(
    ("status", "header", "is_repeated"),
    [
        (408, {}, True),
        (409, {}, True),
        (429, {"Retry-After": "121"}, False),
        (404, {}, False),
        (599, {}, True),
    ],
)
def test_the_openai_client_repeats_what_the_docstring_says(
    status: int, header: dict[str, str], is_repeated: bool
) -> None:
    import httpx2
    import openai

    client = openai.AsyncOpenAI(api_key="k", base_url="http://127.0.0.1:9")
    assert client._should_retry(httpx2.Response(status, headers=header)) is is_repeated


def test_a_server_engine_that_is_drained_leaves_its_requests_behind(tokenizer_folder: Path) -> None:
    over = threading.Event()

    async def run(server: Server, engine: ServerEngine) -> None:
        await engine.start()
        work = asyncio.ensure_future(engine.generate(prompt(), sampling(3), 0, None, part([3])))
        while not server.asked:
            await asyncio.sleep(0.01)
        assert (await engine.status())["num_completions"] == 2
        await engine.drain(0.1)
        table, missing = await work
        assert missing == 2 and row_of(table)["completion_ids"] == [[3]]
        with pytest.raises(Draining):
            await engine.generate(prompt(), sampling(2))
        over.set()

    with served(tokenizer_folder, lambda body: (over.wait(30), choices("1"))[1]) as (server, engine):
        asyncio.run(run(server, engine))


@pytest.mark.parametrize(
    ("models", "error"),
    [
        (
            (401, {"error": "no key"}),
            r"^engines\.pools\.big\.url: http://\S+/v1/models answered 401: no key$",
        ),
        (
            (200, {"data": [{}]}),
            r"^engines\.pools\.big\.url: http://\S+ lists no model; name one with url_model$",
        ),
        ((200, ["?"]), r"^engines\.pools\.big\.url: http://\S+/v1/models answered 200"),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line_that_names_the_key(
    tokenizer_folder: Path, models: tuple[int, Any], error: str
) -> None:
    server = Server(lambda body: choices(), models)
    engine = ServerEngine("big", ModelConfig(path=str(tokenizer_folder)), PoolConfig(url=server.url))
    with pytest.raises(ConnectionError, match=error):
        asyncio.run(engine.start())
    server.close()


# ------------------------------------------------------------------------------------------------ vLLM itself


class Running:
    """An engine on an event loop of its own, which runs while it is asked something."""

    def __init__(self, folder: Path) -> None:
        self.engine = Engine(
            ModelConfig(path=str(folder)),
            PoolConfig(kv_cache_gib=1, num_threads=1),
            "objects",
            seed=0,
            load_weights=True,
        )
        self.runner = asyncio.Runner()
        self.run = self.runner.run
        self.report = self.run(self.engine.start())
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def check(self, row: dict[str, Any], sizes: int) -> None:
        """That log-probs are those of teacher forcing and texts those of the tokens."""
        columns = ("completions", "completion_ids", "finish_reasons", "sampling_logprobs", "sources")
        for text, ids, reason, logprobs, source in zip(*(row[name] for name in columns), strict=True):
            if source != "policy":
                continue
            assert 0 < len(ids) <= sizes and (reason in ("stop", "abort") or len(ids) == sizes)
            with torch.no_grad():
                logits = self.model(torch.tensor([PROMPT_IDS + ids])).logits[0, len(PROMPT_IDS) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
            assert logprobs == pytest.approx(expected, abs=1e-3)
            assert text == self.tokenizer.decode(ids, skip_special_tokens=True) and (reason == "stop") == (
                ids[-1] == tiny.EOS
            )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model that vLLM runs on a CPU (heads of 32). Its completions end by themselves, but seldom within 300
    tokens: head of EOS at 0.
    """
    folder = tiny.make_model(tmp_path_factory.mktemp("model"))
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=tiny.EOS,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    model.lm_head.weight.data[tiny.EOS] = 0
    model.save_pretrained(folder)
    before = dict(os.environ)  # the engine's settings are for a process of its own
    running = Running(folder)
    os.environ.clear()
    os.environ.update(before)
    yield running
    running.run(running.engine.close())
    running.runner.close()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


def test_vllm_samples_only_what_is_missing_of_a_group(running: Running) -> None:
    assert running.report["pid"] == os.getpid()

    async def sample() -> list[dict[str, Any]]:
        engine, foreign = running.engine, part([9], [8], version=None, source="offline:people")
        with_kept, missing = await engine.generate(prompt(), sampling(5, 30), 0, None, foreign)
        assert missing == 0
        enough, missing = await engine.generate(prompt(), sampling(2, 30), 0, None, foreign)
        assert missing == 0 and row_of(enough)["completion_ids"] == [[9], [8]]
        seeded = [(await engine.generate(prompt(), sampling(3, 30), 0, 7))[0] for _ in range(2)]
        beside, _ = await engine.generate(prompt(), sampling(3, 30), 0, 7, groups.take(seeded[0], [1]))
        return [row_of(table) for table in (with_kept, *seeded, beside)]

    before = running.run(running.engine.status())["num_tokens"]
    with_kept, one, two, beside = running.run(sample())
    assert with_kept["completion_ids"][:2] == [[9], [8]] and len(with_kept["completion_ids"]) == 5
    assert (
        with_kept["version_max"] == [None, None, 0, 0, 0]
        and with_kept["sources"] == ["offline:people"] * 2 + ["policy"] * 3
    )
    assert one["completion_ids"] == two["completion_ids"]
    assert len({tuple(ids) for ids in one["completion_ids"] + beside["completion_ids"]}) == 3 + 2
    for row in (with_kept, one, beside):
        running.check(row, 30)
    rows = [
        with_kept["completion_ids"][2:],
        one["completion_ids"],
        two["completion_ids"],
        beside["completion_ids"][1:],
    ]
    status = running.run(running.engine.status())
    assert (
        status["num_tokens"] - before == sum(len(ids) for row in rows for ids in row)
        and status["num_completions"] == 0
    )


def test_what_a_seed_samples_is_the_same_alone_and_among_more_prompts_than_vllm_takes_at_a_time(
    running: Running,
) -> None:
    ids = [5 + i % 11 for i in range(60)]  # 60 of them are more tokens than vLLM computes in a step
    long = [groups.with_columns(prompt(i), prompt_ids=[[*ids, 5 + i % 7]]) for i in range(60)]

    async def run() -> None:
        (alone, _), (again, _) = [
            await running.engine.generate(long[59], sampling(2, 8), 0, seed) for seed in (59, 60)
        ]
        many = await asyncio.gather(
            *(running.engine.generate(group, sampling(2, 8), 0, i) for i, group in enumerate(long))
        )
        assert (
            row_of(many[59][0])["completion_ids"]
            == row_of(alone)["completion_ids"]
            != row_of(again)["completion_ids"]
        )

    running.run(run())


def test_vllm_hands_over_siblings_of_a_long_group_and_goes_on_where_another_engine_was_cut_off(
    running: Running,
) -> None:
    engine = running.engine

    async def run() -> None:
        whole, _ = await engine.generate(prompt(), sampling(12, 900))
        rows = row_of(whole)
        running.check(rows, 900)
        assert "stop" in rows["finish_reasons"]
        longest = max(range(12), key=lambda i: len(rows["completion_ids"][i]))
        ids, logprobs = rows["completion_ids"][longest][:-3], rows["sampling_logprobs"][longest][:-3]
        almost = groups.take(whole, [longest])
        almost = groups.with_columns(
            almost, finish_reasons=[["abort"]], completion_ids=[[ids]], sampling_logprobs=[[logprobs]]
        )
        long = asyncio.ensure_future(engine.generate(prompt(1), sampling(12, len(ids) + 2), 0, None, almost))
        short = asyncio.ensure_future(engine.generate(prompt(2), sampling(4, 4)))
        tokens, token_at, asked_at = [], [], []
        while not long.done():
            now, status = time.time(), await engine.status()
            if status["num_completions"]:  # else it has nothing to do, yet or any more
                asked_at.append(now)
                tokens.append(status["num_tokens"])
                token_at.append(status["last_token_at"])
            if len(tokens) == 3:
                assert status["oldest"]["group_id"] == 1 and 0 < status["num_completions"] <= 12 + 4
                handing_over = asyncio.ensure_future(engine.finished())
            await asyncio.sleep(0.05)
        assert tokens == sorted(tokens) and len(set(tokens)) > 10
        for i in range(1, len(tokens)):
            assert token_at[i] >= asked_at[i] if tokens[i] > tokens[i - 1] else token_at[i] == token_at[i - 1]
        ids_handed_over, table = await handing_over
        assert ids_handed_over == [1]  # not those of the short one
        assert any(row[: len(ids)] == ids for row in row_of(table)["completion_ids"])
        running.check(row_of(table), len(ids) + 2)
        (row, missing), (_, missing_of_short) = (row_of((await long)[0]), (await long)[1]), await short
        assert missing == missing_of_short == 0 and len(row["completion_ids"]) == 12
        assert (
            row["completion_ids"][0][: len(ids)] == ids
            and row["sampling_logprobs"][0][: len(ids)] == logprobs
        )
        running.check(row, len(ids) + 2)

    running.run(run())


def test_a_drained_vllm_returns_what_it_has_and_another_goes_on_with_it(running: Running) -> None:
    engine = running.engine

    async def run() -> None:
        work = asyncio.ensure_future(engine.generate(prompt(), sampling(12, 900)))
        before = (await engine.status())["num_tokens"]

        async def has_begun() -> bool:
            return bool((await engine.status())["num_tokens"] > before + 12 * 100)

        await until(has_begun)
        assert not work.done()
        drained = asyncio.ensure_future(engine.drain(0.1))
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            await engine.generate(prompt(1), sampling())
        table, missing = await work
        await drained
        cut = row_of(table)
        running.check(cut, 900)
        assert missing == cut["finish_reasons"].count("abort") > 0 and len(cut["completion_ids"]) == 12
        engine._is_draining = False  # from here on it is the other engine
        table, missing = await engine.generate(prompt(), sampling(12, 900), 0, None, table)
        whole = row_of(table)
        running.check(whole, 900)
        assert missing == 0 and "abort" not in whole["finish_reasons"]
        for ids in cut["completion_ids"]:
            assert sum(other[: len(ids)] == ids for other in whole["completion_ids"]) == 1
        # What is as long as it may be needs no engine.
        full = groups.with_columns(groups.take(table, [0]), finish_reasons=[["abort"]])
        size = len(whole["completion_ids"][0])
        assert (
            row_of((await engine.generate(prompt(), sampling(2, size), 0, None, full))[0])["completion_ids"][
                0
            ]
            == whole["completion_ids"][0]
        )

    running.run(run())


def test_everyone_who_waits_for_a_dead_core_is_told_and_the_process_ends(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last: there is no engine any more."""
    engine, ended = running.engine, []
    monkeypatch.setattr(vllm_engine, "ZOMBIE_S", 0.5)
    monkeypatch.setattr(vllm_engine.os, "_exit", ended.append)

    async def run() -> None:
        # some of 12 are long
        work = [asyncio.ensure_future(engine.generate(prompt(i), sampling(12, 900))) for i in range(3)]

        async def has_begun() -> bool:
            return bool((await engine.status())["num_groups"] == 3)

        await until(has_begun)
        (core,) = tiny.descendants("VLLM::EngineCore")
        os.kill(core, signal.SIGKILL)
        errors = await asyncio.wait_for(asyncio.gather(*work, return_exceptions=True), timeout=60)
        assert [type(error).__name__ for error in errors] == ["EngineDeadError"] * 3
        assert (await engine.status())["num_groups"] == 0

        async def has_ended() -> bool:
            return bool(ended)

        await until(has_ended, 10)
        await engine.close()
        assert ended == [1]

    running.run(run())


IN_FILES = """
import asyncio, os, subprocess, sys
sys.path.insert(0, {root!r})
from gvpo_ray.engines.process_log import ProcessLog
print("ValueError: of an earlier one", flush=True)
log = ProcessLog()
subprocess.run([sys.executable, "-c", {core!r}], check=True)
open({answer!r}, "w").write(f"{{log.last_error({after!r})}}|{{log.paths[0].name}}")
"""


@pytest.mark.parametrize(
    ("stdout", "stderr", "after", "error"),
    [
        (
            "(EngineCore pid=7) ERROR 11-27 [core.py:1510] EngineCore failed to start.\n"
            "(EngineCore pid=7) ERROR 11-27 [core.py:1510] ValueError: Seed must be between 0 and 2**32 - 1",
            "Exception: WorkerProc initialization failed. See stack trace for root cause.",
            "",
            "ValueError: Seed must be between 0 and 2**32 - 1",
        ),
        (
            "\x1b[31mtorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB\x1b[0m",
            "/usr/lib/x.py:3: UserWarning: an Error: is not one",
            "",
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB",
        ),
        ("KeyError: 1", "AssertionError", "", "AssertionError"),
        ("all is well", "", "", "None"),
        (
            "KeyError: before\nencountered a fatal error\nx.Y.KeyError: 2",
            "KeyError: 3",
            "fatal error",
            "x.Y.KeyError: 2",
        ),
        ("KeyError: before", "KeyError: 3", "fatal error", "None"),
    ],
)
def test_the_first_cause_is_read_from_what_a_child_process_writes_to_our_log(
    tmp_path: Path, stdout: str, stderr: str, after: str, error: str
) -> None:
    answer, root = str(tmp_path / "answer"), str(Path(__file__).parents[1])
    core = f"import sys; print({stdout!r}); print({stderr!r}, file=sys.stderr)"
    code = IN_FILES.format(root=root, core=core, after=after, answer=answer)
    with open(tmp_path / "1.out", "a") as out, open(tmp_path / "2.err", "a") as err:
        assert subprocess.run([sys.executable, "-c", code], stdout=out, stderr=err).returncode == 0
    assert Path(answer).read_text() == f"{error}|1.out"


def test_a_process_whose_output_goes_to_a_pipe_has_no_log_to_read() -> None:
    code = "from gvpo_ray.engines.process_log import ProcessLog as P; print(P().paths, P().last_error())"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert told.stdout == "[] None\n", told.stderr


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (
            "Engine core initialization failed. See root cause above. Failed core proc(s): {'Core': -9}",
            "vLLM did not start: its core process was ended by SIGKILL",
        ),
        ("CUDA is not\navailable", "CUDA is not available"),
    ],
)
def test_a_start_that_failed_without_a_word_says_by_which_signal(text: str, why: str) -> None:
    silent: Any = SimpleNamespace(paths=[], last_error=lambda: None)
    assert vllm_engine._why_not_started(RuntimeError(text), silent) == why


def test_what_vllm_cannot_start_with_is_said_itself_and_not_pointed_to(tmp_path: Path) -> None:
    folder = tiny.make_model(tmp_path)
    code = f"""
import asyncio, sys
from gvpo_ray.config.engines import PoolConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines.vllm_engine import Engine
if __name__ == "__main__":
    pool = PoolConfig(kv_cache_gib=1, num_threads=1)
    try:
        asyncio.run(Engine(ModelConfig(path={str(folder)!r}), pool, "objects", -1, True).start())
    except RuntimeError as error:
        open({str(tmp_path / "why")!r}, "w").write(str(error))
"""
    (tmp_path / "start.py").write_text(code)
    with open(tmp_path / "out", "a") as out, open(tmp_path / "err", "a") as err:
        subprocess.run([sys.executable, tmp_path / "start.py"], stdout=out, stderr=err)
    why = (tmp_path / "why").read_text()
    assert why == "vLLM did not start: ValueError: Seed must be between 0 and 2**32 - 1"


def test_vllm_is_given_what_the_pool_says_and_else_what_the_model_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.async_llm import AsyncLLM

    given: list[Any] = []

    def refuse(arguments: Any) -> None:
        given.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(AsyncLLM, "from_engine_args", refuse)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    model, gpu = ModelConfig(path=str(tmp_path), dtype="bfloat16"), {"num_gpus": 1, "memory_fraction": 0.5}
    for pool, drain_s in (
        (PoolConfig(), None),
        (PoolConfig(dtype="float16", quantization="fp8", vllm={"max_num_seqs": 7}, **gpu), 2.5),
    ):
        with pytest.raises(InterruptedError):
            asyncio.run(Engine(model, pool, "nccl", 3, drain_s=drain_s).start())
    plain, special = given
    assert (plain.dtype, plain.quantization, plain.seed, plain.load_format) == (
        "bfloat16",
        None,
        3,
        "dummy",
    ) and plain.shutdown_timeout == 0
    assert (special.dtype, special.quantization, special.max_num_seqs, special.gpu_memory_utilization) == (
        "float16",
        "fp8",
        7,
        0.5,
    )
    assert special.shutdown_timeout == 3  # a core that gets SIGTERM itself goes on with what it has, too
    assert special.weight_transfer_config.backend == "nccl"


class _Core:
    """As much of AsyncLLM as an update asks for."""

    def __getattr__(self, name: str) -> Any:
        async def method(*_: Any, **__: Any) -> None:
            await asyncio.sleep(0.05)

        return method


def test_an_update_is_a_sign_of_life() -> None:
    async def run() -> None:
        engine = Engine(ModelConfig(path="m"), PoolConfig(), "nccl", 0)
        core = _Core()
        core.output_processor = type("OutputProcessor", (), {"request_states": {}})
        engine._llm, engine._last_token_at = core, 0.0
        running = rollout.Completions(prompt(), 2)
        with engine._at_work(running):
            engine._last_token_at = 0.0
            assert (await engine.status())["last_token_at"] == 0.0
            began = time.time()
            await engine.begin_update()
            status = await engine.status()
            assert status["updating"] and status["last_token_at"] >= began
            began = time.time()
            await engine.finish_update(4)
            status = await engine.status()
            assert (
                not status["updating"]
                and status["last_token_at"] > began
                and status["version"] == 4
                and status["num_completions"] == 2
            )
        began = time.time()
        assert (await engine.status())["last_token_at"] >= began

    asyncio.run(run())


def test_every_engine_has_the_same_methods() -> None:
    for engine in (Engine, FakeEngine, ServerEngine):
        assert issubclass(engine, BaseEngine) and all(
            callable(getattr(engine, name)) for name in ("start", "generate", "update")
        )
