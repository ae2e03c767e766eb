"""A user's agent is trained: its calls of the model become the completions of a group.

    engine ─► AgentHost.play ─► agent(base_url, api_key, …) ─► forwarder ─► the engine's server
      ▲                                                                       │
      └──────────── its calls, with their tokens, and what it returns ◄───────┘

A call whose prompt begins with all tokens of an earlier call, its prompt and its answer, goes on with that
one, and both are one completion: what the agent added in between is read and not trained. Any other call
begins a branch (a sub-agent, a context that was made shorter, a template that leaves out earlier thoughts).
Each branch is a completion of its own in the group, with the reward of the episode, so that m counts
branches; a token is trained in the branch in which it was sampled, and only there. For pass@k and mean@n an
episode is one try, however many branches it has. The prompt of the group is what all of its completions begin
with.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.environment import EnvironmentConfig
from gvpo_ray.data.dialogue import Dialogue
from gvpo_ray.environments.agent_host import Call, Played
from gvpo_ray.environments.client import Client, LostError
from gvpo_ray.environments.episode import MARGIN_S, Episodes, name_of
from gvpo_ray.environments.host import GONE, Opened
from gvpo_ray.environments.tasksets import Tasks
from gvpo_ray.groups import Row
from gvpo_ray.sandbox.functions import find, of_user

PING_S = 30.0
"""Seconds between two looks at whether the host of an agent still answers."""

OTHER_BEGINNING = "environment: the agent's prompt shares no token with those of its group"
"""Reason of an episode that no group can hold with the others."""


class Serving(Protocol):
    """The Serving protocol is what an agent's episode needs of its engine's server (engines/serving.py)."""

    def episode(
        self, name: str, ask: Any, known: Sequence[list[int]]
    ) -> AbstractContextManager[tuple[str, str]]:
        """Answer the episode's requests meanwhile; give the URL and the token."""


class Progress(Protocol):
    """The Progress protocol is what an agent's episode needs of the completion that it makes."""

    ids: list[int]
    """The tokens that are there."""

    async def ask(self, ids: list[int], max_tokens: int | None, stop: Sequence[str | int]) -> Any:
        """Make a call of the model."""

    def adopt(self, branches: Sequence[Mapping[str, Any]]) -> None:
        """Take over the branches of an episode."""


def read_agent(config: EnvironmentConfig) -> Callable[..., Any]:
    """Load the agent's function; of a task set of verifiers, what plays its tasks.

    Raises:
        ConfigError: no such function, or one that does not take an address.
    """
    if config.taskset is not None:
        return Tasks(config)
    key = "environment.agent"
    assert config.agent is not None
    agent = of_user(key, partial(find, config.agent))
    if not inspect.isroutine(agent):
        raise ConfigError(f"{key}: {config.agent} is {type(agent).__name__}, not a function")
    parameters = inspect.signature(agent).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if "base_url" not in parameters and not takes_all:
        raise ConfigError(f"{key}: {config.agent} has no parameter base_url, the address of its model")
    return agent


def described_agent(config: EnvironmentConfig) -> Iterator[str]:
    """Yield a line about an agent for a person, after loading it."""
    read_agent(config)
    key, what = ("agent", config.agent) if config.agent is not None else ("name", config.name)
    yield (
        f"environment.{key}: {what}: at most {config.max_turns} calls of the model, and "
        f"{config.timeout_s:g} s between two of them"
    )


def branches(calls: Iterable[Call]) -> list[dict[str, Any]]:
    """Put calls of the model together, as this module says.

    Args:
        calls: in the order of their answers.

    Returns:
        One dict per branch, in the order of their first calls: completion_ids (from the first token of the
        prompt), sampling_logprobs, trained_tokens, versions and finish_reason.
    """
    found: list[dict[str, Any]] = []
    for call in calls:
        prompt, known = call["prompt_ids"], [(one, one["completion_ids"]) for one in found]
        fitting = [one for one, ids in known if ids == prompt[: len(ids)]]
        if fitting:
            one = max(fitting, key=lambda one: len(one["completion_ids"]))
        else:
            one = {"completion_ids": [], "sampling_logprobs": [], "trained_tokens": [], "versions": []}
            found.append(one)
        read = prompt[len(one["completion_ids"]) :]
        one["completion_ids"] += [*read, *call["ids"]]
        one["sampling_logprobs"] += [*([0.0] * len(read)), *call["logprobs"]]
        one["trained_tokens"] += [*([False] * len(read)), *([True] * len(call["ids"]))]
        one["versions"] += call["versions"]
        one["finish_reason"] = call["finish_reason"]
    return found


@dataclass
class AgentEpisode:
    """An AgentEpisode is the completion that an agent's calls make, or the completions of its branches.

    Args:
        agents: have the engine's server.
        client: of the host that runs the agent.
        opened: what is known of it.
    """

    agents: Agents
    client: Client
    opened: Opened
    begun: None = None
    """What there is of it is with its host."""
    is_lost = False

    def __post_init__(self) -> None:
        self._played = Played()

    async def run(
        self, prompt_ids: list[int], sample: Callable[[list[int]], Awaitable[list[int]]], progress: Progress
    ) -> list[int]:
        """Let the agent run, and take over its calls; return the tokens of the first branch."""
        serving = self.agents.serving
        assert serving is not None
        calls = (self.opened.so_far or {}).get("calls", ())
        known = [[*call["prompt_ids"], *call["ids"]] for call in calls]
        with serving.episode(self.opened.name, progress.ask, known) as (url, token):
            try:
                self._played = await self._result(url, token)
            except LostError:
                self._played = Played(reason=GONE, end="lost")
        found = branches(self._played.calls)
        if found and self._played.end == "length":
            found[-1]["finish_reason"] = "length"
        progress.adopt(found)
        return progress.ids

    async def _result(self, url: str, token: str) -> Played:
        """Let the host play the episode, which may take as long as it likes as long as the host is there."""
        playing = asyncio.ensure_future(self.client.play(self.opened.name, self.opened.lease, url, token))
        try:
            while not playing.done():
                await asyncio.wait([playing], timeout=PING_S)
                if not playing.done():
                    await self.client.status(MARGIN_S)
            return playing.result()
        finally:
            playing.cancel()

    def columns(self) -> dict[str, Any]:
        """Return what the group table holds of the episode beside its tokens."""
        played = self._played
        counts = {"turns": len(played.calls), "tool_calls": 0, "tool_errors": 0}
        text = {} if played.text is None else {"completions": played.text}
        return {
            "episodes": json.dumps({"name": self.opened.name, **counts, "end": played.end}),
            "reward_parts": played.reward,
            "reward_reasons": played.reason,
            **text,
        }


class Agents(Episodes):
    """Agents makes the episodes of an agent, in an engine's process."""

    serving: Serving | None = None
    """The engine's server; it is set by the engine."""

    def _episode(
        self,
        dialogue: Dialogue,
        row: Row,
        client: Client,
        opened: Opened,
        begun: dict[str, Any] | None = None,
    ) -> Any:
        return AgentEpisode(self, client, opened)

    def with_common_prompt(self, group: pa.Table) -> pa.Table:
        """Return a whole group whose prompt is what its completions begin with."""
        return with_common_prompt(group)


def with_common_prompt(group: pa.Table) -> pa.Table:
    """Move what all completions of a group begin with to its prompt.

    Args:
        group: one row, whose completions begin with their prompts.

    Returns:
        The group. A completion that does not begin with the token with which most episodes begin, each
        counted once however many branches it has, has a reason in place of its reward, and no tokens; one
        without a token of the model has none either.
    """
    (row,) = groups.rows(group)
    sampled = [any(mask or ()) for mask in row["trained_tokens"]]
    reasons, parts = list(row["reward_reasons"]), dict(row["reward_parts"])
    names = [name_of(entry) for entry in row["episodes"]]
    begun = zip(names, row["completion_ids"], sampled, strict=True)
    once = dict.fromkeys((name, ids[0]) for name, ids, is_any in begun if is_any)
    beginnings = Counter(token for _, token in once)
    usual = max(beginnings, key=lambda token: beginnings[token], default=None)  # the first of equals
    for i, ids in enumerate(row["completion_ids"]):
        if sampled[i] and ids[0] != usual:
            sampled[i], reasons[i] = False, reasons[i] or OTHER_BEGINNING
            parts = {name: [*values[:i], None, *values[i + 1 :]] for name, values in parts.items()}
    with_tokens = [i for i, is_any in enumerate(sampled) if is_any]
    whole = [row["completion_ids"][i] for i in with_tokens]
    most = min((row["trained_tokens"][i].index(True) for i in with_tokens), default=0)
    columns = zip(*(ids[:most] for ids in whole), strict=True)
    size = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))

    def rest(name: str) -> list[Any]:
        return [values[size:] if is_any else [] for values, is_any in zip(row[name], sampled, strict=True)]

    moved = {name: [rest(name)] for name in ("completion_ids", "sampling_logprobs", "trained_tokens")}
    if whole:
        moved["prompt_ids"] = [whole[0][:size]]
    return groups.with_columns(group, reward_reasons=[reasons], reward_parts=[parts], **moved)
