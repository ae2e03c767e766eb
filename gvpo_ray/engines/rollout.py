"""A rollout function makes one completion of a prompt, with one call of the model or with several.

    async def with_a_tool(prompt_ids: list[int], sample: Sample) -> list[int]:
        call = await sample(prompt_ids)
        result = tokens_of(run(call))                          # written by the tool, and not trained
        return call + result + await sample(prompt_ids + call + result)

It runs in the engine's process, once per completion. This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa

from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.engines.base import ABORTED, InFlight
from gvpo_ray.errors import GvpoError

Sample = Callable[[list[int]], Awaitable[list[int]]]
"""One call of the model: `await sample(ids)` -> the tokens that the model writes behind `ids`.

`ids` are the prompt and everything that is there of the completion. What was added since the last call is not
trained. An empty answer means that the completion is as long as it may be.
"""

Rollout = Callable[[list[int], Sample], Awaitable[list[int]]]
"""`await rollout(prompt_ids, sample)` -> the tokens of a completion, the untrained ones included.

When an engine leaves, another one calls the function again for the same completion, and `sample` answers with
the tokens that are there already, as long as the function adds the same tokens in between, and at least one.
"""


class Episode(Protocol):
    """The Episode protocol is a rollout function with a state outside of the engine."""

    begun: dict[str, Any] | None
    """Completion columns of what there is of it; `turn_ends`: where its calls of the model have ended."""

    @property
    def is_lost(self) -> bool:
        """Return whether its state is gone, so that it ends as `begun` is."""

    async def run(self, prompt_ids: list[int], sample: Sample, progress: Transcript) -> list[int]:
        """Make the completion, as a Rollout does; `progress` is what there is of it."""

    def columns(self) -> dict[str, Any]:
        """Return the episode's own entries of the group table."""


@runtime_checkable
class Episodes(Protocol):
    """The Episodes protocol makes the episodes of groups (environments/episode.py)."""

    async def of_group(
        self, group: pa.Table, num: int, begun: Sequence[Mapping[str, Any]], done: Sequence[str]
    ) -> Sequence[Episode]:
        """Return the episodes of a group: those that other engines have begun, and new ones."""

    async def release(self, group_id: int) -> None:
        """Forget a group that is whole."""

    async def stop_token_ids(self) -> Sequence[int]:
        """Return tokens that end a turn, beside those of the sampling section."""

    def table_columns(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the columns of a group's row; `rows` are from Episode.columns."""


class RolloutError(GvpoError, RuntimeError):
    """A rollout function that does not only append tokens to a completion raises this."""


async def one_call(prompt_ids: list[int], sample: Sample) -> list[int]:
    """Complete a prompt with one call of the model: the default rollout function."""
    return await sample(prompt_ids)


class Span(NamedTuple):
    """A Span is what one call of the model has written."""

    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    """"stop", "length", or ABORTED if a drain cut it off."""
    versions: list[int]
    """Versions of the weights that wrote it."""
    stop_reason: Any = None
    """The text of `sampling.stop` that ended it; anything else: a token or a limit did."""
    experts: bytes | None = None
    """The experts of all tokens from the first one of the prompt on (groups/experts.py); None: not known."""
    written: Sequence[tuple[int, int, int]] = ()
    """(version, begin, end) of runs of tokens that weights of one version have sampled; empty: not known."""


REPEATED = 1 << 24
"""Stands between the begins, and so the seeds, of calls with the same prompt; no context is as long."""


class CutOff(Exception):
    """`sample` raises this inside a rollout function when a drain has cut the model's call off.

    It is a signal and no GvpoError: a rollout function that handles errors must let it pass.
    """


class Call(Protocol):
    """The Call protocol is one call of the model."""

    async def __call__(
        self, ids: list[int], max_tokens: int, begin: int, stop: Sequence[str | int] = ()
    ) -> Span:
        """Sample at most `max_tokens` tokens behind `ids`.

        Args:
            ids: all tokens before.
            max_tokens: the most to sample.
            begin: the place in the completion where the call began, also if another engine has sampled its
                first tokens.
            stop: texts and tokens that end this call, beside those of the sampling section.
        """


class Transcript:
    """A Transcript is a completion while a rollout function makes it.

    Args:
        prompt_ids: of the group.
        max_tokens: longest completion.
        call: samples at this engine.
        begun: completion columns of what another engine has made of this completion, or None.
    """

    def __init__(
        self, prompt_ids: list[int], max_tokens: int, call: Call, begun: dict[str, Any] | None
    ) -> None:
        self.prompt_ids, self._max_tokens, self._call, self._begun = prompt_ids, max_tokens, call, begun
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        """One per token; 0 for those that the model has not written."""
        self.trained: list[bool] = []
        """Whether the model has written each token."""
        self.versions: list[int] = []
        self.experts = b""
        """The experts that the engine chose, as in Span, for as many tokens as are known."""
        self._token_bytes = 0
        """Bytes of `experts` per token; 0: not known, as long as no call of this engine has said any."""
        self.turn_ends: list[int] = []
        """Number of tokens at the end of each call of the model, of those that no drain has cut off."""
        self.finish_reason = "length"
        self.stop_reason: Any = None
        """As in the last Span."""
        self._asked: Counter[tuple[int, ...]] = Counter()
        self.further: list[Transcript] = []
        """Further branches of an agent's episode, each of which becomes a completion of its own."""
        self._work: asyncio.Future[list[int]] | None = None
        self._is_cut = self._is_in_call = False

    async def run(self, rollout: Rollout, may_be_empty: bool = False) -> None:
        """Make the completion, or as much of it as there is when a drain cuts it off.

        Args:
            rollout: makes it.
            may_be_empty: whether it may have no token of the model.

        Raises:
            RolloutError: the function does not only append, or has no token of the model.
        """
        self._work = asyncio.ensure_future(rollout(list(self.prompt_ids), self._sample))
        try:
            self._appended(await self._work)
        except CutOff:
            self.finish_reason = ABORTED
        except asyncio.CancelledError:
            if not self._is_cut:
                raise
            self.finish_reason = ABORTED
        if not may_be_empty and not any(self.trained) and self.finish_reason != ABORTED:
            raise RolloutError("a rollout function has made a completion without a token of the model")
        if len(self.ids) > self._max_tokens:
            self.finish_reason = "length"
            for column in (self.ids, self.logprobs, self.trained):
                del column[self._max_tokens :]
            if self._begun is not None and len(self._begun["completion_ids"]) > self._max_tokens:
                self.experts = self.experts[: (len(self.prompt_ids) + self._max_tokens) * self._token_bytes]

    def cut(self) -> None:
        """Let the completion end with what is there; a call of the model that is under way ends by itself."""
        if not self._is_cut and not self._is_in_call and self._work is not None:
            self._work.cancel()
        self._is_cut = True

    def _appended(self, ids: list[int]) -> None:
        """Take over the tokens that the function has added since the last call of the model."""
        if ids[: len(self.ids)] != self.ids:
            raise RolloutError("a rollout function may only append to what `sample` has returned")
        new = list(ids[len(self.ids) :])
        self.ids += new
        self.logprobs += [0.0] * len(new)
        self.trained += [False] * len(new)

    def _wrote(self, ids: Sequence[int], logprobs: Sequence[float], versions: Sequence[int]) -> None:
        self.ids += ids
        self.logprobs += logprobs
        self.trained += [True] * len(ids)
        self.versions += versions if ids else []

    async def _sample(self, ids: list[int]) -> list[int]:
        num_prompt = len(self.prompt_ids)
        if ids[:num_prompt] != self.prompt_ids:
            raise RolloutError("`sample` needs the prompt, and what is there of the completion behind it")
        self._appended(ids[num_prompt:])
        begin = len(self.ids)
        self.finish_reason = "stop"
        if not self._repeat():
            num_begun = self._num_begun()
            span = await self._one_call(begin)
            self._wrote(span.ids, span.logprobs, span.versions)
            self._read(span.experts, num_begun)
            self.finish_reason, self.stop_reason = span.finish_reason, span.stop_reason
            if span.finish_reason == ABORTED:
                raise CutOff
        self.turn_ends.append(len(self.ids))
        return self.ids[begin:]

    async def _one_call(self, begin: int) -> Span:
        room = self._max_tokens - len(self.ids)
        if room <= 0:
            return Span([], [], "length", [])
        if self._is_cut:
            return Span([], [], ABORTED, [])
        self._is_in_call = True
        try:
            return await self._call(self.prompt_ids + self.ids, room, begin)
        finally:
            self._is_in_call = False

    def _repeat(self) -> bool:
        """Write what another engine has sampled here; return whether that was the end of its call."""
        begun, begin = self._begun, len(self.ids)
        if begun is None or begun["completion_ids"][:begin] != self.ids:
            return False
        trained = begun.get("trained_tokens") or [True] * len(begun["completion_ids"])
        end = next((i for i in range(begin, len(trained)) if not trained[i]), len(trained))
        # where nothing was added between two calls, only this tells them apart
        known = next((place for place in begun.get("turn_ends") or () if begin < place <= end), None)
        end = end if known is None else known
        self._wrote(
            begun["completion_ids"][begin:end],
            begun["sampling_logprobs"][begin:end],
            [begun["version_min"], begun["version_max"]],
        )
        self._keep_begun(end)
        if known is not None and end == len(trained):
            is_known = begun["finish_reasons"] != ABORTED
            self.finish_reason = begun["finish_reasons"] if is_known else "stop"
        return known is not None or begin < end < len(trained)

    def _num_begun(self) -> int:
        """Return the number of the other engine's tokens that are there, up to the first that is another."""
        theirs = () if self._begun is None else self._begun["completion_ids"]
        both = zip(theirs, self.ids, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))

    def _keep_begun(self, num: int) -> None:
        """Take over the experts of the prompt and of the first `num` tokens of what another engine has made.

        All of them are taken as they are. A part can be taken only once it is known how long a token's are.
        """
        theirs = (self._begun and self._begun.get("routed_experts")) or b""
        if self._begun is None or num < len(self._begun["completion_ids"]):
            fits = self._token_bytes and len(theirs) % self._token_bytes == 0
            theirs = theirs[: (len(self.prompt_ids) + num) * self._token_bytes] if fits else b""
        self.experts = max(self.experts, theirs, key=len)

    def _read(self, experts: bytes | None, num_begun: int) -> None:
        """Take over the experts of the last call of the model, which has read all tokens but the last one.

        What was chosen when a token was first read stays: a later call may find it in a cache.
        """
        if not experts:
            return
        num_read = max(1, len(self.prompt_ids) + len(self.ids) - 1)
        self._token_bytes = 0 if len(experts) % num_read else len(experts) // num_read
        self._keep_begun(num_begun)
        self.experts += experts[len(self.experts) :]

    async def ask(self, ids: list[int], max_tokens: int | None, stop: Sequence[str | int]) -> Span:
        """Make a call of the model that is no part of the completion yet: `adopt` puts all of them together.

        Args:
            ids: all tokens before, the prompt included, which may be another one than the group's.
            max_tokens: the most to sample; None: as many as there is room for.
            stop: texts and tokens that end this call.

        Returns:
            What was sampled; nothing, with finish_reason "length", if there is no room.

        Raises:
            CutOff: a drain has cut the call off.
        """
        room = len(self.prompt_ids) + self._max_tokens - len(ids)
        if room <= 0:
            return Span([], [], "length", [])
        if not self._is_cut:
            # a prompt that is asked again, for a vote, has another seed
            begin = len(ids) + REPEATED * self._asked[tuple(ids)]
            self._asked[tuple(ids)] += 1
            most = room if max_tokens is None else min(room, max_tokens)
            span = await self._call(ids, most, begin, stop)
            if span.finish_reason != ABORTED:
                return span
        raise CutOff

    def adopt(self, branches: Sequence[Mapping[str, Any]]) -> None:
        """Take over an agent's episode: its first branch here, the others in `further`.

        Args:
            branches: completion columns of each; their first token is the first one of the agent's prompt, so
                that the transcript has no other prompt from here on.
        """
        self.further = [Transcript([], 0, self._call, None) for _ in branches[1:]]
        for one, columns in zip((self, *self.further), branches, strict=False):
            one.prompt_ids = []
            one.ids, one.logprobs = list(columns["completion_ids"]), list(columns["sampling_logprobs"])
            one.trained, one.versions = list(columns["trained_tokens"]), list(columns["versions"])
            one.finish_reason, one._max_tokens = columns["finish_reason"], len(one.ids)
            one.experts = b""

    def so_far(self) -> dict[str, Any]:
        """Return the completion columns up to the last call of the model, where another engine may go on."""
        return {
            "completion_ids": list(self.ids),
            "sampling_logprobs": list(self.logprobs),
            "trained_tokens": list(self.trained),
            "version_min": min(self.versions, default=0),
            "version_max": max(self.versions, default=0),
            "finish_reasons": self.finish_reason,
            "turn_ends": list(self.turn_ends),
            "routed_experts": self.experts or None,
        }

    def columns(self, text: str) -> dict[str, Any]:
        """Return the completion columns; trained_tokens is null where all tokens are trained.

        No version has written a completion without a token of the model.
        """
        return {
            "completions": text,
            "completion_ids": self.ids,
            "finish_reasons": self.finish_reason,
            "sources": "policy",
            "version_min": min(self.versions, default=None),
            "version_max": max(self.versions, default=None),
            "sampling_logprobs": self.logprobs,
            "trained_tokens": None if all(self.trained) else self.trained,
            "routed_experts": self.experts or None,
        }


@dataclass(eq=False)
class Completions(InFlight):
    """Completions is a group of which a rollout function makes each completion."""

    completions: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """Index of a completion -> its completion columns, once it is finished or cut off; an agent's episode has
    those of each branch."""
    transcripts: list[Transcript] = field(default_factory=list)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Different for each group; completion i has the name `name`-i at vLLM."""
    cut: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when a drain cuts the group off."""

    def __post_init__(self) -> None:
        self.prompt_ids: list[int] = self.group["prompt_ids"][0].as_py()


class ModelCall(NamedTuple):
    """A ModelCall is one call of the model: at most `max_tokens` tokens behind `ids`."""

    running: Completions
    """The group."""
    number: int
    """The completion, from 0."""
    ids: list[int]
    max_tokens: int
    sampling: SamplingConfig
    seed: int | None
