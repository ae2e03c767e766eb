"""A rollout function makes one completion of a prompt, with one call of the model or with several.

    async def with_a_tool(prompt_ids: list[int], sample: Sample) -> list[int]:
        call = await sample(prompt_ids)
        result = tokens_of(run(call))                          # written by the tool, and not trained
        return call + result + await sample(prompt_ids + call + result)

It runs in the engine's process, once per completion. This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.base import GvpoError
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.engines.base import ABORTED, BaseEngine, InFlight, Work

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
        """Whether its state is gone, so that it ends as `begun` is."""

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


class CutOff(Exception):
    """`sample` raises this inside a rollout function when a drain has cut the model's call off."""


Call = Callable[[list[int], int, int], Awaitable[Span]]
"""`await call(ids, max_tokens, begin)` -> at most `max_tokens` tokens behind `ids`; `begin` is the place in
the completion where the call began, also if another engine has sampled its first tokens."""


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
        self.turn_ends: list[int] = []
        """Number of tokens at the end of each call of the model, of those that no drain has cut off."""
        self.finish_reason = "length"
        self.stop_reason: Any = None
        """As in the last Span."""
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
            span = await self._one_call(begin)
            self._wrote(span.ids, span.logprobs, span.versions)
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
        if known is not None and end == len(trained):
            is_known = begun["finish_reasons"] != ABORTED
            self.finish_reason = begun["finish_reasons"] if is_known else "stop"
        return known is not None or begin < end < len(trained)

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
        }


@dataclass(eq=False)
class Completions(InFlight):
    """Completions is a group of which a rollout function makes each completion."""

    completions: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Index of a completion -> its completion columns, once it is finished or cut off."""
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


class RolloutEngine(BaseEngine):
    """A RolloutEngine is an engine whose completions are made by a rollout function, one call at a time.

    Args:
        drain_s: as for BaseEngine.
        rollout: makes one completion, or the episodes of groups.
    """

    def __init__(self, drain_s: float | None = None, rollout: Rollout | Episodes = one_call) -> None:
        super().__init__(drain_s)
        self._rollout = rollout
        self._num_calls = 0

    async def _rest(self, work: Work) -> tuple[pa.Table, int]:
        running = Completions(work.group, work.size)
        with self._at_work(running):
            tasks = [
                asyncio.create_task(self._complete(running, i, work, episode, begun))
                for i, (episode, begun) in enumerate(await self._begun(work))
            ]
            try:
                await self._unless_dead(asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()
        missing = work.size - len(running.finished_at)
        if isinstance(self._rollout, Episodes) and not missing:
            await self._rollout.release(work.group["group_id"][0].as_py())
        return self._table(running, sorted(running.completions)), missing

    async def _begun(self, work: Work) -> list[tuple[Episode | None, dict[str, Any] | None]]:
        """Return, for each completion, its episode if it is one, and what there is of it."""
        if isinstance(self._rollout, Episodes):
            episodes = await self._rollout.of_group(work.group, work.size, work.begun, work.done)
            return [(episode, episode.begun) for episode in episodes]
        return [(None, one) for one in (*work.begun, *([None] * (work.size - len(work.begun))))]

    async def _unless_dead(self, work: Awaitable[Any]) -> Any:
        """Return the result of `work`, or raise an error as soon as it can have none."""
        return await work

    async def _cut_off(self) -> None:
        for running in self._in_flight:
            if isinstance(running, Completions):
                running.cut.set()
                for transcript in running.transcripts:
                    transcript.cut()

    async def _complete(
        self,
        running: Completions,
        index: int,
        work: Work,
        episode: Episode | None,
        begun: dict[str, Any] | None,
    ) -> None:
        sampling = work.sampling
        if isinstance(self._rollout, Episodes) and (further := await self._rollout.stop_token_ids()):
            update = {"stop_token_ids": [*sampling.stop_token_ids, *further]}
            sampling = sampling.model_copy(update=update)

        async def call(ids: list[int], max_tokens: int, begin: int) -> Span:
            seed = None if work.seed is None else work.seed + index + sampling.num_completions * begin
            if not self._num_calls:  # the engine has waited for environments, and not for itself
                self._last_token_at = time.time()
            self._num_calls += 1
            try:
                return await self._span(ModelCall(running, index, ids, max_tokens, sampling, seed))
            finally:
                self._num_calls -= 1

        if episode is not None and episode.is_lost:
            assert begun is not None
            running.completions[index] = {**begun, "finish_reasons": "stop", **episode.columns()}
            running.finished_at[index] = time.time()
            return
        most = min(sampling.max_tokens, self._longest(running))
        transcript = Transcript(running.prompt_ids, most, call, begun)
        running.transcripts.append(transcript)
        if episode is None:
            assert not isinstance(self._rollout, Episodes)
            await transcript.run(self._rollout)
        else:
            of_episode = episode  # for the type checker

            async def rollout(prompt_ids: list[int], sample: Sample) -> list[int]:
                return await of_episode.run(prompt_ids, sample, transcript)

            await transcript.run(rollout, may_be_empty=True)
        if not any(transcript.trained) and transcript.finish_reason == ABORTED:
            return  # cut off before the model's first token
        own = {} if episode is None else episode.columns()
        running.completions[index] = {**transcript.columns(self._written_text(transcript, sampling)), **own}
        if transcript.finish_reason != ABORTED:
            running.finished_at[index] = time.time()

    def _is_sampling(self) -> bool:
        return self._num_calls > 0 or not isinstance(self._rollout, Episodes)

    def _table(self, running: InFlight, which: Sequence[int]) -> pa.Table:
        assert isinstance(running, Completions)
        rows = [running.completions[i] for i in which]
        names = [*groups.COMPLETION_COLUMNS]
        if self._rollout is not one_call:
            names.append("trained_tokens")
        columns: dict[str, Any] = {name: [[row[name] for row in rows]] for name in names}
        if isinstance(self._rollout, Episodes):
            columns |= self._rollout.table_columns(rows)
        return groups.with_columns(running.group, **columns)

    @abc.abstractmethod
    async def _span(self, call: ModelCall) -> Span:
        """Call the model."""

    @abc.abstractmethod
    def _longest(self, running: Completions) -> int:
        """Return the number of tokens for which the model has room behind the group's prompt."""

    def _written_text(self, transcript: Transcript, sampling: SamplingConfig) -> str:
        """Return what the model has written, its turns joined by line ends.

        What it has read in between is in the tokens alone: rewards grade no text of tools or environments.
        """
        texts, end = [], 0
        for is_trained, run in itertools.groupby(transcript.trained):
            begin, end = end, end + len(list(run))
            if is_trained:
                stop = transcript.stop_reason if end == len(transcript.ids) else None
                before = [*transcript.prompt_ids, *transcript.ids[:begin]]
                texts.append(self._text(before, transcript.ids[begin:end], stop, sampling))
        return "\n".join(texts)

    @abc.abstractmethod
    def _text(
        self, before: Sequence[int], ids: Sequence[int], stop_reason: Any, sampling: SamplingConfig
    ) -> str:
        """Return the text of a turn's tokens `ids`, which the tokens `before` came before."""
