"""Verifiers, and models that score, are actors. Ray restarts an actor that dies.

This module imports neither torch nor vLLM, because actors import it.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import inspect
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from gvpo_ray.actors import EventCallback, actor_name, cause_of, is_death
from gvpo_ray.config.verifiers import RewardConfig, VerifiersConfig
from gvpo_ray.data.hub import revision_of
from gvpo_ray.groups import from_wire, to_wire
from gvpo_ray.sandbox.functions import OutOfReach
from gvpo_ray.verifiers.outages import Failure, Outages, Record
from gvpo_ray.verifiers.reward_model import RewardModel
from gvpo_ray.verifiers.rewards import Rewards
from gvpo_ray.verifiers.verifier import Verifier


class ElasticGroup(abc.ABC):
    """An ElasticGroup is actors of one kind; a call goes to the actor with the fewest calls in hand.

    Ray restarts an actor that dies, alone or with its node, and repeats the calls that it had in hand. That
    is safe because a call has no effect but its result. Up to `max_num` actors are added while every actor
    has calls waiting, and removed when idle.

    Args:
        kind: the kind of the actors, for their names and for notes.
        num: the smallest number of actors.
        max_num: the largest; None: `num`.
        note: called with every restart of an actor.
    """

    def __init__(self, kind: str, num: int, max_num: int | None, note: EventCallback) -> None:
        self._kind, self._num, self._max_num, self._note = kind, num, max_num or 0, note
        self._processes: dict[Any, int] = {}
        self._in_hand: dict[Any, int] = {}
        self._idle_since: dict[Any, float] = {}
        self._endings: set[asyncio.Future[None]] = set()
        self._num_started = 0
        for _ in range(num):
            self._grow()

    @property
    def actors(self) -> list[Any]:
        """Return the handles of the actors."""
        return list(self._in_hand)

    def status(self) -> dict[str, int]:
        """Return the number of calls in hand of each actor, by its name."""
        return {f"{self._kind}-{i}": number for i, number in enumerate(self._in_hand.values())}

    @contextlib.contextmanager
    def _hold(self) -> Iterator[Any]:
        """Take the actor with the fewest calls in hand for one call."""
        if len(self._in_hand) < self._max_num and min(self._in_hand.values()) >= GROW_AT:
            self._grow()
        actor = min(self._in_hand, key=lambda each: self._in_hand[each])
        self._in_hand[actor] += 1
        try:
            yield actor
        finally:
            self._in_hand[actor] -= 1
            self._shrink()

    def _answered(self, actor: Any, pid: int, redone: str) -> None:
        """Note a restart of the actor if another process than before has answered."""
        if self._processes.setdefault(actor, pid) != pid:
            self._processes[actor] = pid
            number = list(self._in_hand).index(actor)
            why = f"its process or its node died; what it had in hand was {redone} again"
            self._note(self._kind, f"{self._kind}-{number}", why)

    def _grow(self) -> None:
        self._in_hand[self._start()] = 0
        self._num_started += 1

    @abc.abstractmethod
    def _start(self) -> Any:
        """Start an actor."""

    def _options(self) -> dict[str, Any]:
        """Return the options of Ray that all these actors have."""
        # A group's table may arrive late from another node; later groups must not wait for it.
        return {
            "name": actor_name(f"{self._kind}-{self._num_started}"),
            "max_concurrency": 1,
            "allow_out_of_order_execution": True,
            "scheduling_strategy": "SPREAD",
            "max_restarts": -1,
            "max_task_retries": MAX_VERIFIER_DEATHS,
        }

    def _shrink(self) -> None:
        """End actors beyond `num` that have been idle for IDLE_S, and note which have become idle."""
        now = time.monotonic()
        for actor, in_hand in self._in_hand.items():
            if in_hand:
                self._idle_since.pop(actor, None)
            else:
                self._idle_since.setdefault(actor, now)
        for actor, since in list(self._idle_since.items()):
            if len(self._in_hand) > self._num and now - since > IDLE_S:
                del self._in_hand[actor], self._idle_since[actor]
                self._processes.pop(actor, None)
                ending = asyncio.ensure_future(self._end(actor))
                self._endings.add(ending)
                ending.add_done_callback(self._endings.discard)

    async def _end(self, actor: Any) -> None:
        """End an actor for good; Ray would restart one whose process ends by itself."""
        try:
            with contextlib.suppress(ray.exceptions.RayError):
                await actor.close.remote()  # ends its sandbox
        finally:
            ray.kill(actor, no_restart=True)

    async def close(self) -> None:
        """End all actors."""
        await asyncio.gather(*map(self._end, self._in_hand), *self._endings, return_exceptions=True)


class VerifierGroup(ElasticGroup):
    """A VerifierGroup is the verifier actors, seen from the driver.

    Args:
        config: the number of verifiers, their resources and the reward functions.
        rewards: reward functions passed as callables, by name.
        note: called with every restart of a verifier.
        say: called with lines for the user: services out of reach, and what a kernel does not protect.
    """

    def __init__(
        self,
        config: VerifiersConfig,
        rewards: Rewards | None,
        note: EventCallback,
        say: Callable[[str], None],
    ) -> None:
        for function in (rewards or {}).values():
            # Functions of the user's own files are pickled by value: the actors' machines may lack the files.
            module = inspect.getmodule(function)
            if (
                module is not None
                and module.__name__ != "__main__"
                and "site-packages" not in (module.__file__ or "site-packages")
            ):
                ray.cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
        self.config, self._rewards = config, dict(rewards or {})
        self._models: list[Any] = []
        self._model_rewards = {
            name: self._reward_model(name, reward) for name, reward in config.rewards.items() if reward.model
        }
        self._say, self._said = say, set[str]()
        self._record, self._outages = Record(), Outages(say)
        super().__init__("verifier", config.num, config.max_num, note)

    def outages(self) -> list[str]:
        """Describe the services of reward functions that do not answer, in a line each."""
        return self._outages.lines()

    async def score(self, sampled: Any) -> Any:
        """Score a group, given as an object ref; return the ref of the scored group as soon as it exists.

        While a service that a reward function calls does not answer, the group waits and is tried again.

        Raises:
            RewardError: a reward function has failed on every row so far, in all verifiers together.
        """
        failures: dict[str, Failure] = {}
        try:
            while True:
                scored, answer = await self._ask(sampled, self._outages.without(failures))
                self._take(answer)
                if answer.failure is None:
                    return scored
                await self._outages.wait(answer.failure, failures)
        finally:
            self._outages.leave(failures)

    def _take(self, answer: _Answer) -> None:
        """Take down what a verifier says beside the scored group."""
        for sentence in answer.unprotected:
            if sentence not in self._said:
                self._said.add(sentence)
                self._say(f"not protected: {sentence}")
        if answer.failure is None:
            self._record.merge(answer.record)
            self._record.check()
        else:  # the group is tried again, and what fails at it then counts once
            self._record.learn(answer.record)
        self._outages.answered(answer.record.worked)

    async def _ask(self, sampled: Any, without: list[str]) -> tuple[Any, _Answer]:
        """Have one verifier score a group; return the scored group's ref, and what else it has to say."""
        with self._hold() as verifier:
            known = Record(self._record.worked, given=self._record.given)
            scored, answer = verifier.score_group.remote(sampled, known, without)
            answer = await answer
            self._answered(verifier, answer.pid, "checked")
            return scored, answer

    def _start(self) -> Any:
        options = self._options() | {"num_cpus": self.config.num_cpus, "resources": self.config.resources}
        return (
            ray.remote(_VerifierActor)
            .options(**options)
            .remote(self.config, self._rewards, self._model_rewards)
        )

    def _reward_model(self, name: str, config: RewardConfig) -> Callable[..., Any]:
        """Start the actors of a reward model; return the reward function that calls them."""
        actor, path = ray.remote(RewardModel), str(config.model)
        arguments = (path, config.batch_size, config.num_gpus > 0, revision_of(path))
        actors = [
            actor.options(
                name=actor_name(f"reward-model-{name}-{i}"),
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                max_concurrency=1,
                max_restarts=-1,
                max_task_retries=MAX_VERIFIER_DEATHS,
            ).remote(*arguments)
            for i in range(config.num)
        ]
        self._models += actors
        return _RemoteReward(actors)

    async def close(self) -> None:
        """End all verifiers and reward models."""
        for model in self._models:
            ray.kill(model, no_restart=True)
        await super().close()


GROW_AT = 2
"""Smallest number of calls in hand of every actor at which one more actor is started."""

IDLE_S = 30.0
"""Seconds without work after which an actor beyond the smallest number is ended."""

MAX_VERIFIER_DEATHS = 1000
"""Deaths of its actor that a call survives, those while it waits for its turn included. If there are more,
what it does kills the actors."""


@dataclass
class _Answer:
    """An _Answer is what a verifier says beside the scored group."""

    pid: int
    record: Record
    """What the reward functions did with this group."""
    unprotected: list[str]
    failure: OutOfReach | None = None
    """Why there is no scored group."""


class _VerifierActor(Verifier):
    @ray.method(num_returns=2)
    def score_group(
        self, sampled: pa.Buffer, known: Record, without: list[str]
    ) -> tuple[pa.Buffer | None, _Answer]:
        """Score a group.

        Two return values, so that the driver can await the answer while the table stays in the object store.

        Args:
            sampled: the group.
            known: what the reward functions have given before, in whichever verifier.
            without: names of the reward functions whose service is not waited for.
        """
        self.record, self.known, self._checks_record = Record(), known, False
        answer = _Answer(os.getpid(), self.record, self.unprotected)
        scored = None
        try:
            scored = to_wire(self.score(from_wire(sampled), without))
        except OutOfReach as error:
            answer.failure = error
        return scored, answer


class _RemoteReward:
    """A _RemoteReward is a reward function in the verifiers that calls a reward model's actors in turn."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors
        self._next = random.randrange(len(actors))

    def __call__(self, prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        self._next += 1
        actor = self._actors[self._next % len(self._actors)]
        try:
            scores: list[float] = ray.get(actor.score.remote(prompts, completions))
        except ray.exceptions.RayError as error:
            # a model that cannot be loaded is a mistake; one that is gone for now is waited for
            if is_death(error) and "creation task" not in str(error):
                raise OutOfReach(cause_of(error)) from error
            raise
        return scores
