"""The pool's side of faults and outages, with verifiers that are functions and no Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.config.shown import MASK
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.run import once
from gvpo_ray.sandbox.functions import OutOfReach, Part
from gvpo_ray.verifiers import outages, pool, score_file
from gvpo_ray.verifiers.outages import Record, RewardError
from gvpo_ray.verifiers.pool import VerifierGroup
from gvpo_ray.verifiers.responses import Names
from gvpo_ray.verifiers.verifier import Check

Behave = Callable[[int, Any, list[str]], OutOfReach | list[Part]]
"""(number of the verifier, group, rewards that are not waited for) -> the parts of `judge`, or an outage."""


class _Verifier:
    """Scores like a verifier actor that has seen nothing before."""

    def __init__(self, number: int, behave: Behave, unprotected: list[str]) -> None:
        self.score_group, self._number, self._behave, self._unprotected = self, number, behave, unprotected
        self.calls: list[tuple[Any, set[str], list[str]]] = []

    def remote(self, sampled: Any, known: Record, without: list[str]) -> tuple[Any, Any]:
        self.calls.append((sampled, set(known.worked), without))
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
        super().__init__(VerifiersConfig(num=num), None, lambda *_: None, self.lines.append)

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


def test_the_only_group_waits_for_a_server_that_hangs_however_long_and_that_is_said_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outages, "SAY_AGAIN_S", 0.0)
    tries = []

    def behave(verifier: int, sampled: Any, without: list[str]) -> OutOfReach | list[Part]:
        tries.append(without)
        return OutOfReach("no answer within 30 s: ?api_key=Plant001ed") if len(tries) <= 40 else GOOD

    group = _Group(behave)
    assert _score(group, 1) == ["scored 0"]
    assert tries == [[]] * 41
    assert len(group.lines) == 40  # from the second try on, and the end
    said = f"verifiers.rewards.judge: out of reach for 0 s (no answer within 30 s: ?api_key={MASK}); "
    assert set(group.lines[:-1]) == {said + "1 group waits for it and is tried again"}


class _Served:
    """A verifier of `gvpo-ray verify` whose judge does what the next of its answers says."""

    def __init__(self, answers: list[OutOfReach | None]) -> None:
        self.answers, self.calls = answers, list[list[str]]()

    def check(self, _: Any, __: Any, ___: Any, without: list[str]) -> list[Check]:
        self.calls.append(without)
        answer = None if without else self.answers.pop(0)
        if answer is not None:
            raise OutOfReach(str(answer), answer.is_answer, reward="judge")
        value = None if without else 1.0
        return [Check(value, {"judge": value}, None, 0.0)]


def _row_of_a_file(pool: score_file._Pool, verifier: _Served) -> Check:
    pool._local.verifier = verifier
    return pool._checked("p", "a", {})


def test_a_row_of_a_file_waits_as_a_group_does() -> None:
    lines: list[str] = []
    pool = score_file._Pool(VerifiersConfig(), Names(), 1, lines.append)
    hangs = OutOfReach("no answer within 30 s")
    assert _row_of_a_file(pool, _Served([hangs] * 40 + [None])).reward == 1.0
    assert len(lines) == 2 and "(no answer within 30 s); 1 row waits for it and is tried again" in lines[0]
    assert "answers again" in lines[1]

    fails = OutOfReach("the server answered 500", is_answer=True)
    assert _row_of_a_file(pool, verifier := _Served([fails] * 40)).reward is None
    assert verifier.calls == [[]] * 8 + [["judge"]]


def test_a_row_at_which_a_server_hangs_that_answers_others_ends() -> None:
    pool = score_file._Pool(VerifiersConfig(), Names(), 2, lambda _: None)

    class Beside(_Served):
        def check(self, *arguments: Any) -> list[Check]:
            pool._outages.answered(["judge"])  # to the other thread's row
            return super().check(*arguments)

    assert _row_of_a_file(pool, verifier := Beside([OutOfReach("no answer within 30 s")] * 40)).reward is None
    assert len(verifier.calls) == 12  # the first failure has nothing before it


def test_what_runs_without_a_learner_says_outages_and_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Session:
        def on_stop(self, _: Any) -> None: ...

        def spawn(self, *_: Any) -> None: ...

    config = SimpleNamespace(
        model=ModelConfig(path="m"),
        engines=SimpleNamespace(serve=False),
        seed=0,
        environment=None,
        sampling=SamplingConfig(),
    )
    config.verifiers = VerifiersConfig()
    monkeypatch.setattr(once, "EngineGroup", Mock())
    monkeypatch.setattr(once, "VerifierGroup", verifiers := Mock())
    once.without_learner(Session(), config, 8, None)  # type: ignore[arg-type]
    *_, say = verifiers.call_args.args
    say("verifiers.rewards.judge: out of reach (\x1b[2J?api_key=Plant001ed)")
    said = capsys.readouterr()
    assert said.err == f"verifiers.rewards.judge: out of reach (\\x1b[2J?api_key={MASK}\n" and said.out == ""


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
        def remote(self, sampled: Any, known: Record, without: list[str]) -> tuple[Any, Any]:
            scored, answers = super().remote(sampled, known, without)

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
