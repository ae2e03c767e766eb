"""ServerEngine samples at an external OpenAI-compatible server.

The server's model is not the policy. Its completions are external data (source `offline:<pool>`), without
versions and log-probs. The openai client is imported only where there is a server: it takes more than a
second, and every engine's process and the driver import this module.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.engines import PoolConfig, SamplingConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.config.shown import know, mask, masked
from gvpo_ray.data.rendering import chat_of, completion_renderer
from gvpo_ray.data.vocabulary import beyond, unknown_token, vocab_size_of
from gvpo_ray.engines.base import BaseEngine, InFlight, Work

if TYPE_CHECKING:
    import openai

NUM_RETRIES = 4
"""Retries of a request that found no connection or was answered with 408, 409, 429 or 5xx; an answer's header
`x-should-retry` overrides its status.

The openai client (3.52) waits half a second before the first retry and twice as long before each next one,
less up to a quarter at random. If the answer has a `Retry-After` of at most two minutes, the client waits
that long instead; with a longer one it does not retry at all. So `_shorten_wait` bounds the header before.
"""

MAX_RETRY_AFTER_S = 60.0
"""Longest wait, in seconds, that a server's `Retry-After` may ask for between two tries."""

TIMEOUT_S = 600.0
"""Time limit of one request with its retries and the waits between them, in seconds."""

CONNECT_TIMEOUT_S = 10.0
"""Time limit of one connection attempt, in seconds."""

MAX_REFUSALS = 64
"""Number of prompts that a server may refuse in a row. After that it is the server or its section in the
config that is wrong, and not the prompts: the run stops."""


class ServerEngine(BaseEngine):
    """A ServerEngine is a client of the server at pool.url, with at most pool.max_groups requests in flight.

    Args:
        name: name of the pool.
        model: the policy; its tokenizer turns the server's texts into the token ids that are trained on.
        pool: the pool's section, with its `url`.
        system_prompt: first message of every request.
        template: makes the user's message of a problem, as it makes the policy's prompt; None: the problem.
        api_key: sent as a bearer token.
        drain_s: as for BaseEngine.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        pool: PoolConfig,
        system_prompt: str | None = None,
        template: str | None = None,
        api_key: str | None = None,
        drain_s: float | None = None,
    ) -> None:
        import openai

        super().__init__(drain_s)
        know({"url": pool.url, "api_key": api_key})
        assert pool.url is not None
        self._source, self._model, self._url = f"offline:{name}", model, pool.url.rstrip("/")
        self._template, self._system_prompt = template, system_prompt
        self._key = "engines.url" if name == "engines" else f"engines.pools.{name}.url"
        self._model_name = pool.url_model
        self._knows_n = True
        self._num_refusals = 0  # since the last prompt that was answered
        self._room = asyncio.Semaphore(pool.max_groups)
        self._client = _client(self._url, api_key)
        # Without a key in the config the client must send none, and not the OPENAI_API_KEY of another server.
        self._headers: dict[str, Any] = {"Authorization": openai.Omit()} if api_key is None else {}

    async def start(self) -> dict[str, Any]:
        """Ask the server for its models; return the seconds that took and the pid.

        Raises:
            ConnectionError: the server cannot be used, or the policy's tokenizer has no end-of-sequence
                token. The message is one line that names the config's key.
        """
        started = time.perf_counter()
        self._renderer, self._vocab_size = completion_renderer(self._model), vocab_size_of(self._model)
        if self._renderer.end_id is None:
            raise ConnectionError(f"{self._key}: the policy's tokenizer has no end-of-sequence token")
        self._end_id = self._renderer.end_id
        try:
            models = await self._call("models", self._client.models.with_raw_response.list)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(f"{self._key}: {error}") from error
        if self._model_name is None:
            listed = models.get("data")
            first = listed[0] if isinstance(listed, list) and listed else None
            if not isinstance(first, dict) or not isinstance(first.get("id"), str):
                raise ConnectionError(f"{self._key}: {self._url} lists no model; name one with url_model")
            self._model_name = first["id"]
        self._leave_on_sigterm()
        return {"seconds": time.perf_counter() - started, "pid": os.getpid()}

    async def _may_begin(self, min_version: int = -1) -> None:
        """Raise Draining if the engine drains; the server's weights have no version to wait for."""
        await super()._may_begin()

    async def _rest(self, work: Work) -> tuple[pa.Table, int]:
        """Sample the completions of a group.

        A server cannot continue a completion that was cut off, so such a completion is sampled anew. If the
        server refuses the prompt, the group gets no further completions, and `refusals` says why.

        Raises:
            ConnectionError: no answer, or none but 408, 409, 429 and 5xx.
            RuntimeError: the server cannot be used: it does not know the key, the model or the address, or it
                has refused MAX_REFUSALS prompts in a row. The message holds the server's.
        """
        running = _Answers(work.group, work.size)
        with self._at_work(running):
            running.work = asyncio.ensure_future(self._ask_for_all(running, work.sampling, work.seed))
            try:
                await asyncio.wait([running.work])
            finally:
                running.work.cancel()
            if not running.work.cancelled():
                running.work.result()
        table = self._table(running, range(len(running.rows)))
        if running.refusal is None:
            self._num_refusals = 0
            return table, work.size - len(running.rows)
        self._num_refusals += 1
        if self._num_refusals >= MAX_REFUSALS:
            raise RuntimeError(f"{running.refusal} ({MAX_REFUSALS} prompts in a row were refused)")
        self.refusals[work.group["group_id"][0].as_py()] = running.refusal
        return table, 0

    async def _ask_for_all(self, running: _Answers, sampling: SamplingConfig, seed: int | None) -> None:
        while running.refusal is None and (missing := running.size - len(running.rows)):
            sizes = [missing] if self._knows_n else [1] * missing
            seeds = [None if seed is None else seed + len(running.rows) + i for i in range(len(sizes))]
            await asyncio.gather(
                *(self._ask(running, sampling, *of_one) for of_one in zip(sizes, seeds, strict=True))
            )
            is_whole = len(running.rows) >= running.size or running.refusal is not None
            self._knows_n = self._knows_n and is_whole

    async def _ask(self, running: _Answers, sampling: SamplingConfig, n: int, seed: int | None) -> None:
        """Ask for `n` completions; note in `running` why there are fewer, if the server refuses some."""
        import openai

        path = "chat/completions"
        try:
            answer = await self._call(
                path,
                self._client.chat.completions.with_raw_response.create,
                model=self._model_name,
                messages=chat_of(running.group, self._template, self._system_prompt),
                n=n,
                temperature=sampling.temperature,
                max_tokens=sampling.max_tokens,
                stop=sampling.stop or openai.omit,
                seed=openai.omit if seed is None else seed,
            )
        except _Refusal as refusal:
            running.refusal = str(refusal)
            return
        choices = answer.get("choices")
        if not isinstance(choices, list) or not choices:
            running.refusal = f"{self._url}/{path} answered without choices: {_one_line(answer)}"
            return
        for choice in choices[:n]:
            try:
                row = self._completion(choice, sampling.max_tokens)
            except _Refusal as refusal:
                running.refusal = f"{self._url}/{path} answered {refusal}: {_one_line(choice)}"
                continue
            running.finished_at[len(running.rows)] = time.time()
            running.rows.append(row)
            self._num_tokens += len(row["completion_ids"])

    def _completion(self, choice: Any, max_tokens: int) -> dict[str, Any]:
        """Return one choice of an answer as completion columns.

        Raises:
            _Refusal: there is nothing in it to train on; the message says what is missing.
        """
        text = _text_of(choice)
        (ids,) = self._renderer.encode([text])
        reason = "stop" if choice.get("finish_reason") == "stop" else "length"
        if reason == "stop" and ids[-1:] != [self._end_id]:
            ids.append(self._end_id)
        if len(ids) > max_tokens:  # the policy's tokenizer needs more tokens than the server's
            ids, reason = ids[:max_tokens], "length"
            text = self._renderer.text(ids)
        if not ids:
            raise _Refusal("with no token")
        if (token := beyond(ids, self._vocab_size)) is not None:
            raise _Refusal(f"with {unknown_token(token, self._vocab_size)}")
        return {"completions": text, "completion_ids": ids, "finish_reasons": reason, "sources": self._source}

    async def _call(
        self, path: str, method: Callable[..., Awaitable[Any]], **arguments: Any
    ) -> dict[str, Any]:
        """Send a request through a `with_raw_response` method of the client; return the JSON answer.

        The client's own parser takes an answer of any form and fails later, on a missing attribute.

        Raises:
            ConnectionError: no answer, or none but 408, 409, 429 and 5xx.
            _Refusal: the server refuses what is asked, or its answer is no JSON object.
            RuntimeError: the server does not know the key, the model or the address.

        Every message is one line that names the URL.
        """
        import openai

        url = mask(f"{self._url}/{path}")
        try:
            async with self._room, asyncio.timeout(TIMEOUT_S):
                response = await method(**arguments, extra_headers=self._headers)
            answer = response.http_response.json()
        except openai.APIStatusError as error:
            status = error.status_code
            kind: type[Exception] = _Refusal
            if status in (408, 409, 429) or status >= 500:
                kind = ConnectionError
            elif status in (401, 402, 404, 405):  # whatever the prompt
                kind = RuntimeError
            raise kind(f"{url} answered {status}: {_message(error)}") from error
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{url}: {_one_line(error.__cause__ or error)}") from error
        except TimeoutError as error:
            raise ConnectionError(f"{url}: no answer within {TIMEOUT_S:g} s") from error
        except ValueError as error:
            raise ConnectionError(f"{url}: {_one_line(error)}") from error
        if not isinstance(answer, dict):
            raise _Refusal(f"{url} answered 200: {_one_line(answer)}")
        return answer

    def _table(self, running: InFlight, which: Sequence[int]) -> pa.Table:
        assert isinstance(running, _Answers)
        rows = [running.rows[i] for i in which]
        return groups.with_columns(
            running.group, **{name: [[row.get(name) for row in rows]] for name in groups.COMPLETION_COLUMNS}
        )

    async def _cut_off(self) -> None:
        for running in self._in_flight:
            assert isinstance(running, _Answers)
            running.work.cancel()

    async def update(
        self, version: int, weights: dict[str, Any], probe: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """Do nothing: the server has its own weights. Copy and pause take no time."""
        return {"copy_s": 0.0, "pause_s": 0.0}

    async def status(self) -> dict[str, Any]:
        """Return the status of BaseEngine; `last_token_at` is always now, so that it never looks hung."""
        # A request reports no tokens before it ends, and has a time limit of its own.
        return {**await super().status(), "last_token_at": time.time()}

    async def close(self) -> None:
        """End the engine and close its connections."""
        await super().close()
        await self._client.close()


@dataclass(eq=False)
class _Answers(InFlight):
    """_Answers is a group whose requests are at the server."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    refusal: str | None = None
    """Why the server gives this group no more completions."""

    def __post_init__(self) -> None:
        self.work: asyncio.Future[None]


class _Refusal(RuntimeError):
    """A server refuses to complete a prompt, or its answer has no completion in it; the engine notes it."""


def _text_of(choice: Any) -> str:
    """Return the text of one choice of an answer; half a surrogate pair in it becomes U+FFFD.

    Raises:
        _Refusal: the choice has no text; the message says why.
    """
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        raise _Refusal("a choice without message")
    if choice.get("finish_reason") == "content_filter" or message.get("refusal"):
        raise _Refusal("with a refusal")
    content = message.get("content")
    if isinstance(content, list):  # parts: texts, and things that are no text
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str)) if parts else None
    if not isinstance(content, str):
        raise _Refusal("a message without text")
    return _without_surrogates(content)


def _without_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


async def _shorten_wait(response: Any) -> None:
    """Bound the wait before the next try that an answer's headers ask for, in seconds or as a date."""
    for header, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = response.headers.get(header, "")
        try:
            seconds = float(value) / per_second
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
            except ValueError:  # no such header, or no date: the client does not read it either
                continue
        if seconds > MAX_RETRY_AFTER_S:
            response.headers[header] = f"{MAX_RETRY_AFTER_S * per_second:g}"


def _client(url: str, api_key: str | None) -> openai.AsyncOpenAI:
    """Make a client of this URL alone: the environment's proxies, organisations and projects do not apply."""
    import openai

    http = openai.DefaultAsyncHttpxClient(
        trust_env=False,
        timeout=openai.Timeout(None, connect=CONNECT_TIMEOUT_S),
        event_hooks={"response": [_shorten_wait]},
    )
    unset: Any = {name: openai.Omit() for name in ("OpenAI-Organization", "OpenAI-Project")}
    return openai.AsyncOpenAI(
        base_url=url,
        api_key=api_key or "none",
        max_retries=NUM_RETRIES,
        default_headers=unset,
        http_client=http,
    )


def _message(error: openai.APIStatusError) -> str:
    """Return a server's error message on one line: `{"error": {"message": ...}}`, or else the whole body."""
    said = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
    return _one_line(said or error.response.reason_phrase)


def _one_line(text: Any) -> str:
    return _without_surrogates(" ".join(masked(str(text), 3000).split())[:300])
