"""The engine that samples at an external OpenAI-compatible server.

The server's model is not the policy. Its completions are external data (source `offline:<pool>`), without
versions and log-probs.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import openai
import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.engines import PoolConfig, SamplingConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.data.rendering import completion_renderer
from gvpo_ray.engines.base import BaseEngine, InFlight, seed_beside, sort_out

NUM_RETRIES = 4
"""Retries of a request that found no connection or was answered with 408, 409, 429 or 5xx. The openai client
waits half a second, then twice as long each time, or as long as `Retry-After` says (up to two minutes)."""

TIMEOUT_S = 600.0
"""Time limit of one request with its retries, in seconds."""

CONNECT_TIMEOUT_S = 10.0
"""Time limit of one connection attempt, in seconds."""


class ServerEngine(BaseEngine):
    """A client of the server at pool.url, with at most pool.max_groups requests in flight.

    Args:
        name: name of the pool.
        model: the policy; its tokenizer turns the server's texts into the token ids that are trained on.
        pool: the pool's section, with its `url`.
        system_prompt: first message of every request.
        api_key: sent as a bearer token.
        drain_s: as for BaseEngine.
    """

    def __init__(
        self,
        name: str,
        model: ModelConfig,
        pool: PoolConfig,
        system_prompt: str | None = None,
        api_key: str | None = None,
        drain_s: float | None = None,
    ) -> None:
        super().__init__(drain_s)
        assert pool.url is not None
        self._source, self._model, self._url, self._system_prompt = (
            f"offline:{name}",
            model,
            pool.url.rstrip("/"),
            system_prompt,
        )
        self._key = "engines.url" if name == "engines" else f"engines.pools.{name}.url"
        self._model_name = pool.url_model
        self._knows_n = True
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
        self._renderer = completion_renderer(self._model)
        if self._renderer.end_id is None:
            raise ConnectionError(f"{self._key}: the policy's tokenizer has no end-of-sequence token")
        self._end_id = self._renderer.end_id
        try:
            models = await self._call("models", self._client.models.with_raw_response.list)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(f"{self._key}: {error}") from error
        if self._model_name is None:
            if not models.get("data"):
                raise ConnectionError(f"{self._key}: {self._url} lists no model; name one with url_model")
            self._model_name = models["data"][0]["id"]
        self._leave_on_sigterm()
        return {"seconds": time.perf_counter() - started, "pid": os.getpid()}

    async def generate(
        self,
        group: pa.Table,
        sampling: SamplingConfig,
        min_version: int = 0,
        seed: int | None = None,
        *kept: pa.Table,
    ) -> tuple[pa.Table, int]:
        """Sample the completions of one group, as Engine.generate does.

        A server cannot continue a completion that was cut off, so such a completion is sampled anew.

        Raises:
            ConnectionError: no answer, or none but 429 and 5xx.
            RuntimeError: the server refuses the request; the message holds the server's.
            Draining: the engine takes no new work.
        """
        await self._may_begin()
        done, _, num_new = sort_out(kept, sampling.num_completions)
        running = _Answers(group, num_new)
        with self._at_work(running):
            running.work = asyncio.ensure_future(
                self._ask_for_all(running, sampling, seed_beside(kept, sampling, seed))
            )
            try:
                await asyncio.wait([running.work])
            finally:
                running.work.cancel()
            if not running.work.cancelled():
                running.work.result()
        table = self._table(running, range(len(running.rows)))
        return groups.join(group, *done, table) if kept else table, num_new - len(running.rows)

    async def _ask_for_all(self, running: _Answers, sampling: SamplingConfig, seed: int | None) -> None:
        while missing := running.size - len(running.rows):
            sizes = [missing] if self._knows_n else [1] * missing
            seeds = [None if seed is None else seed + len(running.rows) + i for i in range(len(sizes))]
            await asyncio.gather(
                *(self._ask(running, sampling, *of_one) for of_one in zip(sizes, seeds, strict=True))
            )
            self._knows_n = self._knows_n and len(running.rows) >= running.size

    async def _ask(self, running: _Answers, sampling: SamplingConfig, n: int, seed: int | None) -> None:
        system = [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]
        answer = await self._call(
            "chat/completions",
            self._client.chat.completions.with_raw_response.create,
            model=self._model_name,
            messages=[*system, {"role": "user", "content": running.group["prompt"][0].as_py()}],
            n=n,
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            stop=sampling.stop or openai.omit,
            seed=openai.omit if seed is None else seed,
        )
        choices = answer.get("choices")
        if not choices:
            raise RuntimeError(f"{self._url}/chat/completions answered without choices: {_one_line(answer)}")
        for choice in choices[:n]:
            running.finished_at[len(running.rows)] = time.time()
            running.rows.append(self._completion(choice, sampling.max_tokens))
            self._num_tokens += len(running.rows[-1]["completion_ids"])

    def _completion(self, choice: dict[str, Any], max_tokens: int) -> dict[str, Any]:
        text = choice["message"].get("content") or ""
        (ids,) = self._renderer.encode([text])
        reason = "stop" if choice.get("finish_reason") == "stop" else "length"
        if reason == "stop":
            ids.append(self._end_id)
        if len(ids) > max_tokens:  # the policy's tokenizer needs more tokens than the server's
            ids, reason = ids[:max_tokens], "length"
            text = self._renderer.text(ids)
        return {"completions": text, "completion_ids": ids, "finish_reasons": reason, "sources": self._source}

    async def _call(
        self, path: str, method: Callable[..., Awaitable[Any]], **arguments: Any
    ) -> dict[str, Any]:
        """Send a request through a `with_raw_response` method of the client; return the JSON answer.

        The client's own parser takes an answer of any form and fails later, on a missing attribute.

        Raises:
            ConnectionError: no answer, or none but 429 and 5xx. The message is one line that names the URL.
            RuntimeError: the server refuses, or its answer is no JSON object. The message is one line that
                names the URL.
        """
        url = f"{self._url}/{path}"
        try:
            async with self._room, asyncio.timeout(TIMEOUT_S):
                response = await method(**arguments, extra_headers=self._headers)
            answer = response.http_response.json()
        except openai.APIStatusError as error:
            is_busy = error.status_code == 429 or error.status_code >= 500
            kind = ConnectionError if is_busy else RuntimeError
            raise kind(f"{url} answered {error.status_code}: {_message(error)}") from error
        except openai.APIConnectionError as error:
            raise ConnectionError(f"{url}: {_one_line(error.__cause__ or error)}") from error
        except TimeoutError as error:
            raise ConnectionError(f"{url}: no answer within {TIMEOUT_S:g} s") from error
        except ValueError as error:
            raise ConnectionError(f"{url}: {_one_line(error)}") from error
        if not isinstance(answer, dict):
            raise RuntimeError(f"{url} answered 200: {_one_line(answer)}")
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
    """A group whose requests are at the server."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work: asyncio.Future[None]


def _client(url: str, api_key: str | None) -> openai.AsyncOpenAI:
    """Make a client of this URL alone: the environment's proxies, organisations and projects do not apply."""
    http = openai.DefaultAsyncHttpxClient(
        trust_env=False,
        timeout=openai.Timeout(None, connect=CONNECT_TIMEOUT_S),
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
    return " ".join(str(text).split())[:300]
