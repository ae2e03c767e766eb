"""FakeEngine stands in for an engine in tests and in `gvpo-ray bench scale`."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.engines.base import ABORTED, InFlight, Work
from gvpo_ray.engines.rollout import Completions, Episodes, ModelCall, Rollout, Span, one_call
from gvpo_ray.engines.rollout_engine import RolloutEngine


class FakeEngine(RolloutEngine):
    r"""A FakeEngine is an engine without a model, for unit and scale tests.

    Tokens are random, texts are `\boxed{digit}`, and lengths have a heavy tail. The version stands for the
    weights. Its group tables have the same columns as those of Engine.

    Args:
        seed: seed of tokens and lengths, for groups without a seed of their own.
        vocab_size: token ids are below this.
        seconds_per_token: seconds that one token of a completion takes; all completions in flight are written
            at the same time.
        median_tokens: median of a completion's lognormal length, which is cut at sampling.max_tokens;
            default: a quarter of that.
        sigma: standard deviation of the logarithm of a completion's length.
        drain_s: as for BaseEngine.
        rollout: makes one completion, or the episodes of groups. With the default all of a group's tokens
            are drawn at once.
    """

    def __init__(
        self,
        seed: int = 0,
        vocab_size: int = 16,
        seconds_per_token: float = 0.0,
        median_tokens: float | None = None,
        sigma: float = 1.0,
        drain_s: float | None = None,
        rollout: Rollout | Episodes = one_call,
    ) -> None:
        super().__init__(drain_s, rollout)
        self._random = np.random.default_rng(seed)
        self._vocab_size, self._seconds_per_token, self._median_tokens, self._sigma = (
            vocab_size,
            seconds_per_token,
            median_tokens,
            sigma,
        )
        self._texts = [f"\\boxed{{{digit}}}" for digit in range(10)]

    async def start(self) -> dict[str, Any]:
        """Make the engine drain on SIGTERM; return the seconds of the start and the pid."""
        self._leave_on_sigterm()
        return {"seconds": 0.0, "pid": os.getpid()}

    async def _rest(self, work: Work) -> tuple[pa.Table, int]:
        if self._rollout is not one_call:
            return await super()._rest(work)
        group, size, begun, sampling, seed, _ = work
        random = self._random if seed is None else np.random.default_rng(seed)
        room = np.full(size, sampling.max_tokens)
        room[: len(begun)] -= np.array([len(row["completion_ids"]) for row in begun], np.int64)
        new = self._lengths(random, sampling, room)
        tokens = (
            np.split(
                random.integers(self._vocab_size, size=int(new.sum()), dtype=np.int32), np.cumsum(new)[:-1]
            )
            if size
            else []
        )
        running = _Tokens(group, size, version=self.version, begun=begun, tokens=tokens, is_full=new == room)
        running.finished_at = dict(enumerate((running.since + self._seconds_per_token * new).tolist()))
        with self._at_work(running):
            if seconds := self._seconds_per_token * int(new.max(initial=0)):
                timer = asyncio.get_running_loop().call_later(seconds, running.end)
                try:
                    await running.over
                finally:
                    timer.cancel()
            table = self._table(running, range(size))
        written = self._written(running)
        self._num_tokens += sum(written)
        missing = sum(n < len(ids) for n, ids in zip(written, running.tokens, strict=True))
        return table, missing

    def _lengths(self, random: np.random.Generator, sampling: SamplingConfig, room: np.ndarray) -> np.ndarray:
        """Draw lengths of at least 1, if there is room, and at most `room`."""
        median = self._median_tokens or sampling.max_tokens / 4
        lengths = median * np.exp(self._sigma * random.standard_normal(len(room)))
        return np.clip(np.rint(lengths).astype(np.int64), np.minimum(1, room), room)

    async def _span(self, call: ModelCall) -> Span:
        """Draw tokens, and wait as long as writing them takes, or until a drain cuts them off."""
        random = self._random if call.seed is None else np.random.default_rng(call.seed)
        (length,) = self._lengths(random, call.sampling, np.array([call.max_tokens])).tolist()
        tokens: list[int] = random.integers(self._vocab_size, size=length).tolist()
        reason, began = "length" if length == call.max_tokens else "stop", time.time()
        if seconds := self._seconds_per_token * length:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(call.running.cut.wait(), seconds)
                tokens = tokens[: int((time.time() - began) / self._seconds_per_token)]
                reason = ABORTED
        self._num_tokens += len(tokens)
        return Span(tokens, [-math.log(self._vocab_size)] * len(tokens), reason, [self.version])

    def _longest(self, running: Completions) -> int:
        return 1 << 30

    def _text(self, before: Any, ids: Sequence[int], stop_reason: Any, sampling: SamplingConfig) -> str:
        return self._texts[ids[-1] % 10]

    def _written(self, running: _Tokens, now: float = math.inf) -> list[int]:
        """Return the number of new tokens that each completion has at the time `now`."""
        seconds = min(now, running.cut_at) - running.since
        lengths = [len(ids) for ids in running.tokens]
        return (
            lengths
            if seconds == math.inf
            else [min(n, int(seconds / self._seconds_per_token)) for n in lengths]
        )

    def _table(self, running: InFlight, which: Sequence[int]) -> pa.Table:
        if not isinstance(running, _Tokens):
            return super()._table(running, which)
        ids, logprobs, reasons, oldest = [], [], [], []
        written = self._written(running)
        uniform = np.full(max(written, default=0), -math.log(self._vocab_size), np.float32)
        for i in which:
            new = running.tokens[i][: written[i]]
            old = running.begun[i] if i < len(running.begun) else None
            if old is None and not len(new):
                continue
            of_new = uniform[: len(new)]
            ids.append(
                new if old is None else np.concatenate([np.array(old["completion_ids"], np.int32), new])
            )
            logprobs.append(
                of_new
                if old is None
                else np.concatenate([np.array(old["sampling_logprobs"], np.float32), of_new])
            )
            reasons.append(
                ABORTED if len(new) < len(running.tokens[i]) else "length" if running.is_full[i] else "stop"
            )
            oldest.append(running.version if old is None else min(old["version_min"], running.version))
        return groups.with_columns(
            running.group,
            completions=[[self._texts[int(tokens[-1]) % 10] for tokens in ids]],
            completion_ids=[ids],
            finish_reasons=[reasons],
            sources=[["policy"] * len(ids)],
            version_min=[oldest],
            version_max=[[self.version] * len(ids)],
            sampling_logprobs=[logprobs],
        )

    async def _cut_off(self) -> None:
        await super()._cut_off()
        for running in self._in_flight:
            if isinstance(running, _Tokens) and not running.over.done():
                running.cut_at = time.time()
                running.end()

    async def update(
        self, version: int, weights: dict[str, Any], probe: dict[str, Any] | None = None
    ) -> dict[str, float]:
        """Take over the version alone; copy and pause take no time."""
        await self._has_version(version)
        return {"copy_s": 0.0, "pause_s": 0.0}

    async def status(self) -> dict[str, Any]:
        """Return the status of BaseEngine, with the tokens of the groups in flight."""
        now = time.time()
        live = sum(
            sum(self._written(running, now)) for running in self._in_flight if isinstance(running, _Tokens)
        )
        return {**await super().status(), "num_tokens": self._num_tokens + live, "last_token_at": now}


@dataclass(eq=False, kw_only=True)
class _Tokens(InFlight):
    """_Tokens is a group at a FakeEngine, whose tokens are all drawn at the beginning."""

    version: int
    """Version of the weights that it began with."""
    begun: list[dict[str, Any]]
    """Cut-off completions, which the first ones continue."""
    tokens: list[np.ndarray]
    """New token ids of each completion."""
    is_full: np.ndarray
    """Whether each completion ends at sampling.max_tokens."""
    cut_at: float = math.inf
    """When a drain cut the group off, in seconds of time.time()."""
    over: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
