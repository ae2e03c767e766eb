"""The verifiers as actors, and the reward models' beside them. A verifier that dies is started again by Ray.

Actors import this file: it imports neither torch nor vLLM.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import random
import time
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import ray

from gvpo_ray.actors import Note, actor_name
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.groups import from_wire, to_wire
from gvpo_ray.verifiers.reward_model import RewardModel
from gvpo_ray.verifiers.rewards import Rewards
from gvpo_ray.verifiers.verifier import Verifier


class VerifierGroup:
    """The verifier actors; a group goes to the one with the fewest in hand.

    A verifier that dies, alone or with its node, is started again by Ray, and what it had in hand is checked
    again: a check has no effect but its answer. With `max_num` the group grows while every verifier has
    groups waiting, and shrinks when one is idle.
    """

    def __init__(
        self, config: VerifiersConfig, rewards: Rewards | None, note: Note = lambda *_: None
    ) -> None:
        for function in (rewards or {}).values():
            # Functions of the user's own files travel by value: the actors' machines need not have the files.
            module = inspect.getmodule(function)
            if (
                module is not None
                and module.__name__ != "__main__"
                and "site-packages" not in (module.__file__ or "site-packages")
            ):
                ray.cloudpickle.register_pickle_by_value(module)
        self.config, self._rewards, self._note = config, dict(rewards or {}), note
        self._processes: dict[Any, int] = {}
        self._models: list[Any] = []
        self._model_rewards = {
            name: self._reward_model(name, reward) for name, reward in config.rewards.items() if reward.model
        }
        self._in_hand: dict[Any, int] = {}
        self._idle_since: dict[Any, float] = {}
        self._endings: set[asyncio.Future[None]] = set()
        self._num_started = 0
        for _ in range(config.num):
            self._grow()

    @property
    def actors(self) -> list[Any]:
        return list(self._in_hand)

    def status(self) -> dict[str, int]:
        """Groups in hand of each."""
        return {f"verifier-{i}": number for i, number in enumerate(self._in_hand.values())}

    async def score(self, sampled: Any) -> Any:
        """Object ref of a sampled group -> ref of the group with its rewards; returns when that is there."""
        if len(self._in_hand) < (self.config.max_num or 0) and min(self._in_hand.values()) >= GROW_AT:
            self._grow()
        verifier = min(self._in_hand, key=lambda actor: self._in_hand[actor])
        self._in_hand[verifier] += 1
        try:
            scored, process = verifier.score_group.remote(sampled)
            process = await process
            if self._processes.setdefault(verifier, process) != process:
                self._processes[verifier] = process
                number = list(self._in_hand).index(verifier)
                self._note(
                    "verifier",
                    f"verifier-{number}",
                    "its process or its node died; what it had in hand was checked again",
                )
            return scored
        finally:
            self._in_hand[verifier] -= 1
            self._shrink(verifier)

    def _grow(self) -> None:
        # A group's table may arrive late (from another node): a later one must not wait for it.
        actor = (
            ray.remote(_VerifierActor)
            .options(
                name=actor_name(f"verifier-{self._num_started}"),
                num_cpus=self.config.num_cpus,
                resources=self.config.resources,
                max_concurrency=1,
                allow_out_of_order_execution=True,
                scheduling_strategy="SPREAD",
                max_restarts=-1,
                max_task_retries=MAX_VERIFIER_DEATHS,
            )
            .remote(self.config, self._rewards, self._model_rewards)
        )
        self._num_started += 1
        self._in_hand[actor] = 0

    def _shrink(self, verifier: Any) -> None:
        """End a verifier beyond `num` that stays idle while others are, too."""
        now = time.monotonic()
        for actor, in_hand in self._in_hand.items():
            if in_hand:
                self._idle_since.pop(actor, None)
            else:
                self._idle_since.setdefault(actor, now)
        for actor, since in list(self._idle_since.items()):
            if len(self._in_hand) > self.config.num and now - since > IDLE_S:
                del self._in_hand[actor], self._idle_since[actor]
                self._processes.pop(actor, None)
                ending = asyncio.ensure_future(self._end(actor))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def _end(self, actor: Any) -> None:
        """For good: an actor that ends by itself is started again, and so would be its ending."""
        try:
            with contextlib.suppress(ray.exceptions.RayError):
                await actor.close.remote()  # its sandbox
        finally:
            ray.kill(actor, no_restart=True)

    def _reward_model(self, name: str, config: RewardConfig) -> Callable[..., Any]:
        actor = ray.remote(RewardModel)
        actors = [
            actor.options(
                name=actor_name(f"reward-model-{name}-{i}"),
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                max_concurrency=1,
                max_restarts=-1,
                max_task_retries=MAX_VERIFIER_DEATHS,
            ).remote(config.model, config.batch_size, config.num_gpus > 0)
            for i in range(config.num)
        ]
        self._models += actors
        return _RemoteReward(actors)

    async def close(self) -> None:
        for model in self._models:
            ray.kill(model, no_restart=True)
        await asyncio.gather(*map(self._end, self._in_hand), *self._endings, return_exceptions=True)


GROW_AT = 2
"""Groups in hand of every verifier at which one more is started."""

IDLE_S = 30.0
"""A verifier beyond verifiers.num that has had nothing to do for so long is ended."""

MAX_VERIFIER_DEATHS = 1000
"""Deaths of its verifier that a group survives, those while it waits for its turn included: more are not bad
luck but the reward function."""


class _VerifierActor(Verifier):
    @ray.method(num_returns=2)
    def score_group(self, sampled: pa.Buffer) -> tuple[pa.Buffer, int]:
        """The scored group, and this process's number: what the driver awaits, so that the table does not
        come to it.
        """
        return to_wire(self.score(from_wire(sampled))), os.getpid()


class _RemoteReward:
    """A reward model's actors as a reward function, called in the verifiers; each verifier goes round."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self._next = random.randrange(len(actors))

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self._next += 1
        return ray.get(self._actors[self._next % len(self._actors)].score.remote(prompts, completions))
