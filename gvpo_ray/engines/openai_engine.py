"""ServerEngine: samples at a server with an OpenAI-compatible API that is not ours, behind the methods of
engines/base.py.

Its model is another one than the policy: what it writes is foreign data (source offline:<pool>), without
versions and log-probs.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from gvpo_ray import groups
from gvpo_ray.config.engines import PoolConfig, SamplingConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.engines.base import BaseEngine, InFlight, seed_beside, sort_out

NUM_RETRIES = 4
"""Of a request that found no connection, or was answered with 429 or 5xx, each after twice as long (from a
second)."""

TIMEOUT_S = 600.0
"""Of one answer."""


class ServerEngine(BaseEngine):
    """A client of pool.url; pool.max_groups bounds its requests in flight.

    Args:
        name: of the pool.
        model: the policy's, whose tokenizer the completions are to be trained with.
        system_prompt: first message of every request.
        api_key: sent as a bearer token.
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
        self._tokenizer: Any = None
        self._knows_n = True
        self._threads = ThreadPoolExecutor(pool.max_groups, thread_name_prefix="server")
        retry = Retry(
            NUM_RETRIES,
            read=0,
            backoff_factor=0.5,
            status_forcelist=(429, 500, 502, 503, 504),
            allowed_methods=None,
            raise_on_status=False,
        )
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=pool.max_groups))
        if api_key is not None:
            self._session.headers["Authorization"] = f"Bearer {api_key}"

    async def start(self) -> dict[str, Any]:
        """Ask the server for its models.

        Raises:
            ConnectionError: one line that names the config's key.
        """
        from transformers import AutoTokenizer

        started = time.perf_counter()
        self._tokenizer = AutoTokenizer.from_pretrained(
            self._model.path, trust_remote_code=self._model.trust_remote_code
        )
        try:
            models = (await self._call("GET", "models")).get("data") or []
            if self._model_name is None:
                self._model_name = next(model["id"] for model in models)
        except (OSError, RuntimeError) as error:
            raise ConnectionError(f"{self._key}: {error}") from error
        except StopIteration:
            raise ConnectionError(
                f"{self._key}: {self._url} lists no model; name one with url_model"
            ) from None
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
        """As Engine.generate. A server cannot go on with what an engine was cut off at: that is sampled anew.

        Raises:
            ConnectionError: no answer, or none but 429 and 5xx.
            RuntimeError: the server refuses; with its message.
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
        body = {
            "model": self._model_name,
            "messages": [*system, {"role": "user", "content": running.group["prompt"][0].as_py()}],
            "n": n,
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            **({} if seed is None else {"seed": seed}),
        }
        answer = await self._call("POST", "chat/completions", body)
        choices = answer.get("choices")
        if not choices:
            raise RuntimeError(f"{self._url}/chat/completions answered without choices: {_one_line(answer)}")
        for choice in choices[:n]:
            running.finished_at[len(running.rows)] = time.time()
            running.rows.append(self._completion(choice, sampling.max_tokens))
            self._num_tokens += len(running.rows[-1]["completion_ids"])

    def _completion(self, choice: dict[str, Any], max_tokens: int) -> dict[str, Any]:
        text = choice["message"].get("content") or ""
        ids = list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if choice.get("finish_reason") == "stop":
            ids.append(self._tokenizer.eos_token_id)
        reason = "stop" if choice.get("finish_reason") == "stop" else "length"
        if len(ids) > max_tokens:  # its tokenizer needs fewer than ours
            ids, reason = ids[:max_tokens], "length"
            text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return {"completions": text, "completion_ids": ids, "finish_reasons": reason, "sources": self._source}

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        return await asyncio.get_running_loop().run_in_executor(
            self._threads, self._call_here, method, f"{self._url}/{path}", body
        )

    def _call_here(self, method: str, url: str, body: dict[str, Any] | None) -> dict[str, Any]:
        try:
            response = self._session.request(method, url, json=body, timeout=(10, TIMEOUT_S))
            answer = response.json() if response.ok else None
        except requests.RequestException as error:  # not a JSON answer, too
            raise ConnectionError(f"{url}: {_one_line(error)}") from error
        if isinstance(answer, dict):
            return answer
        kind = ConnectionError if response.status_code == 429 or response.status_code >= 500 else RuntimeError
        raise kind(f"{url} answered {response.status_code}: {_one_line(_message(response))}")

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
        """The server has weights of its own."""
        return {"copy_s": 0.0, "pause_s": 0.0}

    async def status(self) -> dict[str, Any]:
        # Requests have a time limit of their own, and say nothing before they end.
        return {**await super().status(), "last_token_at": time.time()}

    async def close(self) -> None:
        await super().close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._session.close()


@dataclass(eq=False)
class _Answers(InFlight):
    """A group at the server."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.work: asyncio.Future[None]


def _message(response: requests.Response) -> Any:
    """What the server says of an error: OpenAI's {"error": {"message": ...}}, or all that it says."""
    try:
        error = response.json()["error"]
        return error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        return response.text or response.reason


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())[:300]
