"""An engine that is a server with an OpenAI-compatible API, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny
from sampled import part, prompt, row_of, sampling

from gvpo_ray import groups
from gvpo_ray.actors import Draining
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.log import EndedBy
from gvpo_ray.config.engines import PoolConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines import openai_engine
from gvpo_ray.engines.actor import ActorMethods
from gvpo_ray.engines.openai_engine import ServerEngine


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
        threading.Thread(target=self._http.serve_forever, args=[0.01], daemon=True).start()

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


@pytest.mark.parametrize("text", ["z", "a", "az"])
def test_a_text_with_a_token_that_the_policys_model_lacks_is_no_completion(tmp_path: Path, text: str) -> None:
    folder, lacking = tiny.make_model(tmp_path), ids_of("z")[0]
    config = (folder / "config.json").read_text(encoding="utf-8")
    known = f'"vocab_size": {tiny.VOCAB_SIZE}'
    assert known in config
    (folder / "config.json").write_text(config.replace(known, f'"vocab_size": {lacking}'), encoding="utf-8")

    async def run(engine: ServerEngine) -> None:
        await engine.start()
        table, missing = await engine.generate(prompt(), sampling(2), 0, 1)
        row = row_of(table)
        kept = ["b", text] if text == "a" else ["b"]
        assert sorted(row["completions"]) == sorted(kept) and missing == 0
        refusals = [*engine.refusals.values()]
        assert len(refusals) == (text != "a")
        assert all(f"with token {lacking}, and the model has {lacking} (" in one for one in refusals)
        await engine.close()

    with served(folder, lambda body: choices("b", text)) as (_, engine):
        asyncio.run(run(engine))


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
        assert await buffer.put(group) == [EndedBy.NONE]
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
