"""An episode is a completion of several turns, made in the engine's process with an environment in an actor.

    prompt ─► opening ─► turn ─► Host.act ─► extension ─► turn ─► … ─► Host.finish ─► reward
              (reset)   (model)  (tools)      (tokens)

Nothing of an episode is only here: its tokens are with the host since its last turn, and an engine that takes
over makes the same steps again, which cost nothing where they have been made.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.config.environment import BROKEN, ENVIRONMENT, EnvironmentConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.data.dialogue import Dialogue, dialogue_of
from gvpo_ray.data.vocabulary import beyond, unknown_token, vocab_size_of
from gvpo_ray.environments.client import Client, LostError, NoEnvironmentError
from gvpo_ray.environments.forks import START_S
from gvpo_ray.environments.host import GONE, Opened
from gvpo_ray.environments.world import Answer

MARGIN_S = 30.0
"""Seconds that a host has beside its calls' time limits before it counts as hanging."""

NO_ROOM = "untrained: what the environment has said leaves no room for a turn"
"""Reason of an episode that has no token of the model."""


class Progress(Protocol):
    """The Progress protocol is what an episode reads of the completion that it makes."""

    finish_reason: str
    """Of the last call of the model."""
    turn_ends: list[int]
    """Number of the completion's tokens at the end of each call of the model."""

    def so_far(self) -> dict[str, Any]:
        """Return the completion columns up to here."""


Sample = Callable[[list[int]], Awaitable[list[int]]]


@dataclass
class Episode:
    """An Episode makes one completion; `run` may be called again at another engine (see engines/rollout.py).

    Args:
        config: the section.
        dialogue: of the model.
        row: the group's prompt, its answer and the further columns of its data.
        client: of the host that has the environment; None: it is gone.
        opened: what is known of it.
        begun: completion columns of what there is of it.
    """

    config: EnvironmentConfig
    dialogue: Dialogue
    row: Mapping[str, Any]
    client: Client | None
    opened: Opened
    begun: dict[str, Any] | None = None
    num_turns: int = 0
    num_calls: int = 0
    num_errors: int = 0
    num_hung: int = 0
    num_refused: int = 0
    end: str = ""
    """How it has ended: "stop" (the policy or the environment), "max_turns", "length" (no room), "renderer"
    (the family's conversations cannot go on), "lost" (no reward, with a reason) or "broken" (the same, by a
    tool call of the policy); "": it has not."""
    reward: float | None = None
    reason: str | None = None
    _turn_ends: Sequence[int] = ()

    @property
    def is_lost(self) -> bool:
        """Return whether it cannot go on and is what `begun` is."""
        return self.client is None

    async def run(self, prompt_ids: list[int], sample: Sample, progress: Progress) -> list[int]:
        """Make the completion; return its tokens."""
        self._turn_ends = progress.turn_ends
        ids = self._readable(self.dialogue.opening(self.row, self.opened.said))
        if self.opened.reason is not None:
            self._lose(self.opened.reason)
            return ids
        while not self.end:
            before = [*prompt_ids, *ids]
            turn = await sample(before)
            ids += turn
            self.num_turns += bool(turn)
            if not turn or progress.finish_reason == "length":
                self.end = "length"
                break
            ids += await self._answered(before, turn, progress)
        if self.end not in ("lost", BROKEN):
            await self._finish(progress)
        return ids

    async def _answered(self, before: list[int], turn: list[int], progress: Progress) -> list[int]:
        """Let the environment answer a turn; return the tokens of its answer, or set how the episode ends."""
        read = self.dialogue.turn(before, turn)
        self.num_calls += len(read.calls)
        num_made = min(len(read.calls), self.config.max_calls)
        limit_s = self.config.timeout_s * max(1, num_made) + MARGIN_S
        try:
            answer = await self._host.act(
                self.opened.name,
                self.opened.lease,
                self.num_turns - 1,
                progress.so_far(),
                read.calls,
                read.text,
                limit_s,
            )
        except LostError:
            answer = Answer(reason=GONE)
        self.num_errors += answer.num_errors
        self.num_hung += answer.num_hung
        self.num_refused += answer.num_refused
        if answer.reason is not None:
            self._lose(answer.reason, answer.is_broken)
        elif answer.is_over:
            self.end = "stop"
        elif self.num_turns >= self.config.max_turns:
            self.end = "max_turns"
        else:
            extension = self.dialogue.extension(before, turn, answer.messages)
            if extension is not None:
                return self._readable(extension)
            self.end = "renderer"
        return []

    def _readable(self, ids: list[int]) -> list[int]:
        """Return the environment's tokens; none, and the episode is lost, if the model lacks one of them."""
        size = self.dialogue.vocab_size
        token = beyond(ids, size)
        if token is None or size is None:
            return ids
        self._lose(f"environment: what it has said has {unknown_token(token, size)}")
        return []

    async def _finish(self, progress: Progress) -> None:
        if not self.num_turns:
            self._lose(NO_ROOM)
            return
        try:
            limit_s = self.config.timeout_s + MARGIN_S
            outcome = await self._host.finish(self.opened.name, self.opened.lease, progress.so_far(), limit_s)
        except LostError:
            self._lose(GONE)
            return
        self.reward, self.reason = outcome.reward, outcome.reason
        if outcome.is_broken:
            self.end = BROKEN

    @property
    def _host(self) -> Client:
        assert self.client is not None
        return self.client

    def _lose(self, reason: str, is_broken: bool = False) -> None:
        self.end, self.reason = BROKEN if is_broken else "lost", reason

    def columns(self) -> dict[str, Any]:
        """Return what the group table holds of the episode beside its tokens."""
        entry: dict[str, Any] = {
            "name": self.opened.name,
            "turns": self.num_turns,
            "tool_calls": self.num_calls,
            "tool_errors": self.num_errors,
            "tool_hung": self.num_hung,
            "tool_refused": self.num_refused,
            "end": self.end,
        }
        if self.opened.said:
            entry["said"] = self.opened.said  # a part of the question, for reward functions
        if not self.end:
            entry["turn_ends"] = self._turn_ends  # for the engine that goes on
        return {
            "episodes": json.dumps(entry),
            "reward_parts": self.reward,
            "reward_reasons": self.reason,
        }


class Episodes:
    """Episodes makes the episodes of groups, in an engine's process.

    Args:
        config: the section.
        model: the policy; its tokenizer is loaded with the first group.
        prompts: of the training; the template is that of all data sets.
        tools: JSON schemas of the tools.
        clients: of the hosts.
        has_reward: whether the environment scores its episodes.
    """

    def __init__(
        self,
        config: EnvironmentConfig,
        model: ModelConfig,
        prompts: PromptsConfig,
        tools: Sequence[dict[str, Any]],
        clients: Sequence[Client],
        has_reward: bool = True,
    ) -> None:
        self._config, self._model, self._prompts, self._tools = config, model, prompts, tools
        self._clients, self.has_reward = clients, has_reward
        self._loading: asyncio.Future[Dialogue] | None = None
        self._next = random.randrange(len(clients))

    async def dialogue(self) -> Dialogue:
        """Return the model's dialogue."""
        if self._loading is None:
            self._loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        return await asyncio.shield(self._loading)

    async def stop_token_ids(self) -> Sequence[int]:
        """Return tokens that end a turn of this family, beside those that engines know."""
        return (await self.dialogue()).stop_token_ids

    def _load(self) -> Dialogue:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(
            self._model.path, trust_remote_code=self._model.trust_remote_code
        )
        dialogue = dialogue_of(
            self._prompts, tokenizer, "prompts", tools=self._tools, family=self._config.renderer
        )
        dialogue.vocab_size = vocab_size_of(self._model)
        return dialogue

    async def of_group(
        self, group: pa.Table, num: int, begun: Sequence[Mapping[str, Any]], done: Sequence[str]
    ) -> list[Episode]:
        """Return `num` episodes of a group: those that other engines have begun, and new ones.

        Args:
            group: its one row.
            num: completions that are missing.
            begun: completion columns of those that a drain has cut off.
            done: entries of the column `episodes` of those that are finished.

        Raises:
            NoEnvironmentError: no host takes a new episode.
        """
        group_id, row, dialogue = group["group_id"][0].as_py(), row_of(group), await self.dialogue()
        without = [name_of(entry) for entry in done]
        cut = {name_of(columns["episodes"]): dict(columns) for columns in begun}
        claims = await asyncio.gather(*(self._claimed(client, group_id, without) for client in self._clients))
        found: list[Episode] = []
        for client, opened in zip(self._clients, claims, strict=True):
            for one in opened:
                further = cut.pop(one.name, None)
                known = one.so_far
                # the host knows the last whole turn, and a drain what has been sampled since
                size = len(known["completion_ids"]) if known else 0
                if further is not None and len(further["completion_ids"]) > size:
                    known = {**further, "turn_ends": json.loads(further["episodes"]).get("turn_ends")}
                found.append(self._episode(dialogue, row, client, one, known))
        for name, columns in cut.items():
            lost = Episode(self._config, dialogue, row, None, Opened(name, 0, None), columns)
            lost.end, lost.reason = "lost", GONE
            lost.num_turns = json.loads(columns["episodes"])["turns"]
            found.append(lost)
        found = found[:num]
        return found + await self._opened(group_id, row, dialogue, num - len(found))

    def _episode(
        self,
        dialogue: Dialogue,
        row: Mapping[str, Any],
        client: Client,
        opened: Opened,
        begun: dict[str, Any] | None = None,
    ) -> Any:
        """Return an episode that a host has; an agent's is another one (agent.py)."""
        return Episode(self._config, dialogue, row, client, opened, begun)

    async def _claimed(self, client: Client, group_id: int, without: list[str]) -> list[Opened]:
        try:
            return await client.claim(group_id, without)
        except LostError:
            return []

    async def _opened(
        self, group_id: int, row: Mapping[str, Any], dialogue: Dialogue, num: int
    ) -> list[Episode]:
        """Begin new episodes, spread over the hosts."""
        counts = dict.fromkeys(range(len(self._clients)), 0)
        for _ in range(num):
            self._next = (self._next + 1) % len(self._clients)
            counts[self._next] += 1
        limit_s = START_S + 2 * self._config.timeout_s + MARGIN_S

        async def at(number: int, count: int) -> list[Episode]:
            for tries in range(MAX_TRIES):
                client = self._clients[(number + tries) % len(self._clients)]
                try:
                    opened = await client.open(group_id, row, count, limit_s)
                except LostError as error:
                    last = error
                    await asyncio.sleep(min(5.0, 0.2 * 2**tries))
                    continue
                return [self._episode(dialogue, row, client, one) for one in opened]
            raise NoEnvironmentError(f"environment: no actor begins an episode: {last}")

        parts = await asyncio.gather(*(at(number, count) for number, count in counts.items() if count))
        return [episode for part in parts for episode in part]

    async def release(self, group_id: int) -> None:
        """Let the hosts forget a group's episodes."""

        async def at(client: Client) -> None:
            try:
                await client.release(group_id)
            except LostError:
                return

        await asyncio.gather(*map(at, self._clients))

    def table_columns(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the columns of a group's row beside the tokens; `rows` are from Episode.columns."""
        columns: dict[str, Any] = {
            "episodes": [[row["episodes"] for row in rows]],
            "reward_reasons": [[row["reward_reasons"] for row in rows]],
        }
        if self.has_reward:
            columns["reward_parts"] = [{ENVIRONMENT: [row["reward_parts"] for row in rows]}]
        return columns


MAX_TRIES = 30
"""Tries to begin an episode, each at another host, before the run stops."""


def name_of(entry: str) -> str:
    """Return the name of an episode, from its entry in the column `episodes`."""
    return str(json.loads(entry)["name"])


def row_of(group: pa.Table) -> dict[str, Any]:
    """Return what reset gets of a group: prompt, answer, dataset, messages and the data's further columns."""
    (row,) = group.select([n for n in group.column_names if n in ("prompt", "answer", "dataset")]).to_pylist()
    data = json.loads((group["data"][0].as_py() if "data" in group.column_names else None) or "{}")
    return {**data.get("columns", {}), **row, "messages": data.get("messages")}
