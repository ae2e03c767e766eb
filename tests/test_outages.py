"""The pool's side of faults and outages, with verifiers that are functions and no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.sandbox.functions import OutOfReach, Part
from gvpo_ray.verifiers import outages, pool
from gvpo_ray.verifiers.outages import Record, RewardError
from gvpo_ray.verifiers.pool import VerifierGroup

Behave = Callable[[int, Any, list[str]], OutOfReach | list[Part]]
"""(number of the verifier, group, rewards that are not waited for) -> the parts of `judge`, or an outage."""


class _Verifier:
    """Scores like a verifier actor that has seen nothing before."""

    def __init__(self, number: int, behave: Behave, unprotected: list[str]) -> None:
        self.score_group, self._number, self._behave, self._unprotected = self, number, behave, unprotected
        self.calls: list[tuple[Any, set[str], list[str]]] = []

    def remote(self, sampled: Any, worked: set[str], without: list[str]) -> tuple[Any, Any]:
        self.calls.append((sampled, set(worked), without))
        answer = pool._Answer(self._number, Record(), self._unprotected)
        result = self._behave(self._number, sampled, without)
        if isinstance(result, OutOfReach):
            answer.failure = OutOfReach(str(result), result.is_answer, result.is_own, "judge")
        else:
            answer.record.add("judge", result, [0] * len(result))

        async def answers() -> Any:
            return answer

        return f"scored {sampled}", answers()


class _Group(VerifierGroup):
    def __init__(self, behave: Behave, num: int = 1, unprotected: tuple[str, ...] = ()) -> None:
        self._behave, self._unprotected = behave, list(unprotected)
        self.lines: list[str] = []
        super().__init__(VerifiersConfig(num=num), None, say=self.lines.append)

    def _grow(self) -> None:
        self._in_hand[_Verifier(self._num_started, self._behave, self._unprotected)] = 0
        self._num_started += 1


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outages, "MAX_PAUSE_S", 0.001)


GOOD, FAULTS = [Part(1.0)] * 8, [Part(None, "judge: the server answered 404", is_fault=True)] * 8
DOWN = OutOfReach("ClientConnectorError: refused")


def _score(group: VerifierGroup, number: int) -> list[Any]:
    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(group.score(i) for i in range(number)))

    return asyncio.run(asyncio.wait_for(all_of_them(), 60))


def test_groups_wait_while_a_service_is_out_of_reach_and_none_is_scored_without_it() -> None:
    tries: list[int] = []

    def behave(verifier: int, sampled: Any, without: list[str]) -> OutOfReach | list[Part]:
        assert without == []
        tries.append(sampled)
        return DOWN if len(tries) <= 200 else GOOD

    group = _Group(behave, num=2)
    assert _score(group, 12) == [f"scored {i}" for i in range(12)]
    assert len(group.lines) == 2 and group.outages() == []
    assert group.lines[0].startswith("verifiers.rewards.judge: out of reach for 0 s (ClientConnectorError: ")
    assert group.lines[1].startswith("verifiers.rewards.judge: answers again, after ")


def test_the_status_names_what_does_not_answer_and_how_many_wait() -> None:
    seen: list[list[str]] = []

    def behave(verifier: int, sampled: Any, without: list[str]) -> OutOfReach | list[Part]:
        seen.append(group.outages())
        return DOWN if len(seen) < 50 else GOOD

    group = _Group(behave)
    _score(group, 5)
    assert any("(ClientConnectorError: refused); 5 groups wait for it" in str(lines) for lines in seen)


def test_a_verifier_that_is_added_during_an_outage_stops_nothing() -> None:
    """Its server refuses every request, as for a judge whose key has run out: it knows of no success."""

    def behave(verifier: int, sampled: Any, without: list[str]) -> OutOfReach | list[Part]:
        return GOOD if verifier == 0 else FAULTS

    group = _Group(behave)
    _score(group, 1)
    group._grow()
    first, second = group.actors
    group._in_hand[first] = 100
    assert _score(group, 10) == [f"scored {i}" for i in range(10)]
    assert second.calls and all(worked == {"judge"} for _, worked, _ in second.calls)


def test_a_reward_that_fails_on_every_row_from_the_start_ends_the_run_with_its_cause() -> None:
    group = _Group(lambda *_: FAULTS, num=3)
    with pytest.raises(RewardError, match=r"judge fails on every row \(16 so far\).*answered 404"):
        _score(group, 6)


@pytest.mark.parametrize(
    ("error", "num_tries"),
    [(OutOfReach("the server answered 500", is_answer=True), 3), (DOWN, 10)],
)
def test_a_group_at_which_a_service_fails_that_answers_others_goes_on_without_it(
    error: OutOfReach, num_tries: int
) -> None:
    tries = []

    def behave(verifier: int, sampled: Any, without: list[str]) -> OutOfReach | list[Part]:
        if sampled == "poison" and without == []:
            tries.append(sampled)
            return error
        return GOOD if sampled != "poison" else FAULTS

    async def beside() -> Any:
        poisoned = asyncio.create_task(group.score("poison"))
        while not poisoned.done():
            assert await group.score("good") == "scored good"
            await asyncio.sleep(0)
        return poisoned.result()

    group = _Group(behave)
    assert asyncio.run(asyncio.wait_for(beside(), 60)) == "scored poison"
    assert len(tries) >= num_tries


def test_the_last_group_of_all_is_not_tried_for_ever_where_the_service_fails_at_it() -> None:
    tries = []

    def behave(verifier: int, sampled: Any, without: list[str]) -> OutOfReach | list[Part]:
        tries.append(without)
        return FAULTS if without else OutOfReach("the server answered 500", is_answer=True)

    group = _Group(behave)
    assert _score(group, 1) == ["scored 0"]
    assert tries == [[]] * 8 + [["judge"]]


def test_what_a_kernel_does_not_protect_is_said_once() -> None:
    group = _Group(lambda *_: GOOD, num=2, unprotected=("no Landlock here",))
    _score(group, 10)
    assert group.lines == ["not protected: no Landlock here"]


def test_pauses_grow_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert [outages.pause(i) for i in (1, 2, 3, 5, 6, 1000)] == [1.0, 2.0, 4.0, 16.0, 30.0, 30.0]


def test_a_fault_counts_once_however_often_its_group_is_tried_again() -> None:
    """Another reward function, the trusted one, fails at a group whose judge is out of reach for long."""

    class Both(_Verifier):
        def remote(self, sampled: Any, worked: set[str], without: list[str]) -> tuple[Any, Any]:
            scored, answers = super().remote(sampled, worked, without)

            async def with_fault() -> Any:
                answer = await answers
                answer.record.add("trusted", [Part(None, "trusted raised KeyError", is_fault=True)] * 4, None)
                return answer

            return scored, with_fault()

    tries = []

    def behave(verifier: int, sampled: Any, without: list[str]) -> OutOfReach | list[Part]:
        tries.append(sampled)
        return DOWN if len(tries) <= 40 else GOOD

    group = _Group(behave)
    group._in_hand = {Both(0, behave, []): 0}
    assert _score(group, 1) == ["scored 0"] and len(tries) == 41
    assert group._record.faults["trusted"] == 4
