"""A rollout function, or an environment or an agent with its episodes, makes the completions of this engine.

This module imports neither torch nor vLLM.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import json
import time
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.engines.base import ABORTED, BaseEngine, InFlight, Work
from gvpo_ray.engines.rollout import (
    Completions,
    Episode,
    Episodes,
    ModelCall,
    Rollout,
    Sample,
    Span,
    Transcript,
    one_call,
)
from gvpo_ray.engines.serving import Serving


@runtime_checkable
class Agents(Protocol):
    """The Agents protocol is Episodes that ask the engine's HTTP server for what the model writes."""

    serving: Serving | None
    """The engine's server; it is set by the engine."""

    def with_common_prompt(self, group: pa.Table) -> pa.Table:
        """Return a whole group with the prompt that its completions share."""


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
        self._returns_experts = False
        """Whether the engine says which experts it has chosen."""

    def _whole(self, table: pa.Table) -> pa.Table:
        """Give a group of agents, which write prompts of their own, the prompt that its completions share."""
        return self._rollout.with_common_prompt(table) if isinstance(self._rollout, Agents) else table

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

        async def call(ids: list[int], max_tokens: int, begin: int, stop: Sequence[str | int] = ()) -> Span:
            own = _with_stops(sampling, stop) if stop else sampling
            seed = None if work.seed is None else work.seed + index + sampling.num_completions * begin
            if not self._num_calls:  # the engine has waited for environments, and not for itself
                self._last_token_at = time.time()
            self._num_calls += 1
            try:
                return await self._span(ModelCall(running, index, ids, max_tokens, own, seed))
            finally:
                self._num_calls -= 1

        if episode is not None and episode.is_lost:
            assert begun is not None
            running.completions[index] = [{**begun, "finish_reasons": "stop", **episode.columns()}]
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
        running.completions[index] = [
            {**one.columns(self._written_text(one, sampling)), **(_of_branch(own, number) if number else own)}
            for number, one in enumerate((transcript, *transcript.further))
        ]
        if transcript.finish_reason != ABORTED:
            running.finished_at[index] = time.time()

    def _is_sampling(self) -> bool:
        return self._num_calls > 0 or not isinstance(self._rollout, Episodes)

    def _table(self, running: InFlight, which: Sequence[int]) -> pa.Table:
        assert isinstance(running, Completions)
        rows = [row for i in which for row in running.completions[i]]
        names = [*groups.COMPLETION_COLUMNS]
        if self._rollout is not one_call:
            names.append("trained_tokens")
        columns: dict[str, Any] = {name: [[row[name] for row in rows]] for name in names}
        experts = [row.get("routed_experts") for row in rows]
        if self._returns_experts or any(experts):  # also where none are known: tables are concatenated
            columns["routed_experts"] = [experts]
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


def _with_stops(sampling: SamplingConfig, stop: Sequence[str | int]) -> SamplingConfig:
    """Return the section with further texts and tokens that end a call."""
    texts, tokens = [one for one in stop if isinstance(one, str)], [t for t in stop if isinstance(t, int)]
    update = {"stop": [*sampling.stop, *texts], "stop_token_ids": [*sampling.stop_token_ids, *tokens]}
    return sampling.model_copy(update=update)


def _of_branch(own: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return an episode's own columns for its branch of this number; the first one is 0."""
    return {**own, "episodes": json.dumps({**json.loads(own["episodes"]), "branch": number})}
