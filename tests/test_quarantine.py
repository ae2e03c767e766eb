"""Prompts whose checks or environments all come to a limit go into quarantine: which, until when, and what is
left of a run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from buffers import make, run
from test_hangs import NUM_SLOTS, Prompts, ring_of
from tiny import make_group

from gvpo_ray import groups
from gvpo_ray.actors import RunError, cause_of
from gvpo_ray.buffer.buffer import GroupBuffer
from gvpo_ray.buffer.log import EndedBy, Quarantine
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.files import read_lines


@pytest.mark.parametrize("texts", [["a", "b", "c", "d"], ["a", "b", "c", "c"], ["a"], ["a", "a", "b", "a"]])
def test_a_run_whose_prompts_are_all_in_quarantine_ends_with_one_line(
    tmp_path: Path, texts: list[str]
) -> None:
    async def main() -> None:
        buffer = make(tmp_path / "groups", groups_per_step=4)
        await buffer.published(0, {})
        ring, _ = ring_of(tmp_path, buffer, texts, is_slow=lambda prompt: True)
        with pytest.raises(ExceptionGroup) as caught:
            await ring.run()
        assert cause_of(caught.value) == (
            f"RunError: every prompt is in {tmp_path / 'quarantine.jsonl'}: no check ends within the limits "
            "of the verifiers section (timeout_s, cpu_s, memory_gib); higher ones release the prompts"
        )
        buffer.release()
        # The same command again: nothing is sampled, and nothing is skipped for ever.
        again = make(tmp_path / "groups", groups_per_step=4)
        await again.published(0, {})
        ring, engines = ring_of(tmp_path, again, texts)
        with pytest.raises(RunError, match="every prompt is in"):
            await ring.run()
        assert engines.num_sampled == 0

    run(main)


@pytest.mark.parametrize("is_taken_up", [False, True])
def test_a_run_whose_prompts_are_all_in_quarantine_goes_on_with_whole_groups_of_a_source_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_taken_up: bool
) -> None:
    monkeypatch.setattr(ray, "put", groups.from_wire)

    async def main() -> None:
        buffer = make(tmp_path / "groups", groups_per_step=4, num_steps=5)
        await buffer.published(0, {})
        said: list[str] = []
        ring, engines = ring_of(
            tmp_path, buffer, ["a", "b"], lambda prompt: prompt in "ab", 0.25, ["x", "y"], said.append
        )
        if is_taken_up:
            for i in range(2):
                ring._quarantine.add(Prompts(["a", "b"]).all().slice(i, 1))
        running = asyncio.ensure_future(ring.run())
        while len(buffer.log) < 20:
            assert not running.done()
            await asyncio.sleep(0)
        datasets = buffer.log.read(0, 20)["dataset"].to_pylist()
        assert datasets.count("people") >= 16 and engines.num_sampled <= NUM_SLOTS
        assert engines.num_sampled == 0 or not is_taken_up
        assert said == [
            f"every prompt of prompts is in {tmp_path / 'quarantine.jsonl'}: the run goes on with "
            "sources.people"
        ]
        running.cancel()

    run(main)


@pytest.mark.parametrize(
    ("texts", "share", "offline", "is_slow"),
    [
        (["a"], 0.5, ["x"], lambda prompt: True),
        (["a"], 1.0, ["x", "y"], lambda prompt: prompt != "a"),  # no group has an ordinary prompt
        ([], 1.0, ["x"], lambda prompt: True),
    ],
)
def test_a_run_of_which_no_group_is_left_ends_with_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: list[str],
    share: float,
    offline: list[str],
    is_slow: Callable[[str], bool],
) -> None:
    monkeypatch.setattr(ray, "put", groups.from_wire)

    async def main() -> None:
        buffer = make(tmp_path / "groups", groups_per_step=4)
        await buffer.published(0, {})
        ring, _ = ring_of(tmp_path, buffer, texts, is_slow, share, offline)
        with pytest.raises(ExceptionGroup) as caught:
            await ring.run()
        assert "every prompt is in" in cause_of(caught.value)

    run(main)


def test_a_run_goes_on_while_one_prompt_is_not_in_quarantine(tmp_path: Path) -> None:
    async def main() -> None:
        buffer = make(tmp_path / "groups", groups_per_step=4, num_steps=3)
        await buffer.published(0, {})
        ring, _ = ring_of(tmp_path, buffer, ["a", "b", "c", "a"], is_slow=lambda prompt: prompt != "b")
        running = asyncio.ensure_future(ring.run())
        while len(buffer.log) < 12:
            await asyncio.sleep(0)
        texts = buffer.log.read(0, 12)["prompt"].to_pylist()
        assert texts.count("b") >= 8 and not running.done()
        running.cancel()

    run(main)


def test_higher_limits_release_prompts_from_quarantine_and_lower_ones_do_not(tmp_path: Path) -> None:
    prompts = Prompts(["a", "b"]).all()
    path, limits = tmp_path / "quarantine.jsonl", VerifiersConfig(timeout_s=10, cpu_s=5, memory_gib=2)
    first = Quarantine(path, limits)
    for i in range(2):
        first.add(prompts.slice(i, 1))
    assert first.holds_all(prompts)
    assert Quarantine(path).holds_all(prompts) and Quarantine(path, limits).holds_all(prompts)
    lower = limits.model_copy(update={"timeout_s": 5})
    assert Quarantine(path, lower).holds_all(prompts)
    for change in ({"timeout_s": 20}, {"cpu_s": 6}, {"memory_gib": 2.5, "timeout_s": 1}):
        higher = Quarantine(path, limits.model_copy(update=change))
        assert len(higher) == 0 == len(higher.entries()) and not higher.holds(prompts.slice(0, 1))
    higher.add(prompts.slice(1, 1))  # the limits were still too low
    again = Quarantine(path, limits.model_copy(update=change))
    assert [entry["prompt"] for entry in again.entries()] == ["b"] and not again.holds_all(prompts)


def _ended(buffer: GroupBuffer, reasons: list[str | None], **columns: Any) -> EndedBy:
    rewards = tuple(1.0 if reason is None else None for reason in reasons)
    episodes = ['{"name": "0"}'] * len(reasons)
    group = make_group(0, rewards, **{"reward_reasons": reasons, "episodes": episodes} | columns)
    (ended,) = asyncio.run(buffer.put(groups.table([group])))
    return ended


LATE = "timeout: environment: reset: no answer within 1 s"
AGENT = "timeout: environment: the agent: no call of the model"


@pytest.mark.parametrize(
    ("reasons", "cut_off"),
    [
        ([LATE, AGENT], EndedBy.LATE),
        ([LATE, f"math: no answer\n{LATE}"], EndedBy.LATE),
        ([LATE, "timeout: math took more than 1 s"], EndedBy.CHECKS),
        ([LATE, "crash: environment: reset: exited"], EndedBy.CHECKS),
        ([LATE, None], EndedBy.WELL),
        ([LATE, "environment: reset raised KeyError"], EndedBy.NONE),
        (["environment: lost", "environment: lost"], EndedBy.NONE),
        ([None, None], EndedBy.WELL),
    ],
)
def test_the_clock_of_an_environment_is_told_from_the_limits_of_a_check(
    tmp_path: Path, reasons: list[str | None], cut_off: EndedBy
) -> None:
    assert _ended(make(tmp_path), reasons) is cut_off


def test_a_group_in_which_nothing_was_played_says_nothing_about_the_environment(tmp_path: Path) -> None:
    whole = {"sources": ["offline:people"] * 2, "episodes": None}
    assert _ended(make(tmp_path / "whole"), [None, None], **whole) is EndedBy.NONE
    replayed = {"sources": ["replay", "policy"]}
    assert _ended(make(tmp_path / "replayed"), [None, LATE], **replayed) is EndedBy.NONE
    assert _ended(make(tmp_path / "played"), [LATE, None], **replayed) is EndedBy.WELL


class TakenUp:
    """A quarantine whose run is taken up before each group: nothing is left in memory."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.make = lambda: Quarantine(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.make(), name)


@pytest.mark.parametrize("kind", [Quarantine, TakenUp])
def test_an_environment_that_is_late_is_the_prompts_fault_if_others_go_well(
    tmp_path: Path, kind: Any
) -> None:
    a, b, c = (Prompts(["a", "b", "c"]).all().slice(i, 1) for i in range(3))
    path = tmp_path / "quarantine.jsonl"
    quarantine = kind(path, VerifiersConfig(), environment_s=60.0)
    quarantine.judge(c, EndedBy.WELL)  # before the first time: it says nothing
    # a busy machine: all are late
    assert not quarantine.judge(a, EndedBy.LATE) and not quarantine.judge(b, EndedBy.LATE)
    quarantine.judge(c, EndedBy.NONE)  # nothing was played, or all of it was lost
    assert not quarantine.judge(b, EndedBy.LATE)
    quarantine.judge(c, EndedBy.WELL)
    # a again, though another prompt's group went well meanwhile; b for the third time
    assert quarantine.judge(a, EndedBy.LATE) and quarantine.judge(b, EndedBy.LATE)
    assert not quarantine.judge(c, EndedBy.LATE) and not quarantine.holds(c)
    quarantine.judge(c, EndedBy.WELL)  # so it was not c's fault
    assert not quarantine.judge(c, EndedBy.LATE) and not quarantine.holds(c)
    assert quarantine.holds(a) and quarantine.holds(b)
    assert quarantine.what_ends().startswith("no environment answers within environment.timeout_s")
    # the limit that they hit releases them, and no other one
    assert len(Quarantine(path, VerifiersConfig(timeout_s=100), environment_s=60.0)) == 2
    assert len(Quarantine(path, VerifiersConfig(), environment_s=61.0)) == 0
    # a check's limit is certain at once
    assert quarantine.judge(c, EndedBy.CHECKS)
    assert quarantine.what_ends().startswith("no check ends within the limits of the verifiers section")
    assert len(Quarantine(path, VerifiersConfig(), environment_s=61.0)) == 1


def test_what_was_late_under_a_lower_limit_is_not_counted_under_a_higher_one(tmp_path: Path) -> None:
    a, b = (Prompts(["a", "b"]).all().slice(i, 1) for i in range(2))
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, VerifiersConfig(), environment_s=60.0).judge(a, EndedBy.LATE)
    Quarantine(path, VerifiersConfig(), environment_s=60.0).judge(b, EndedBy.WELL)
    higher = Quarantine(path, VerifiersConfig(), environment_s=61.0)
    assert not higher.judge(a, EndedBy.LATE) and higher.judge(a, EndedBy.CHECKS)
    assert Quarantine(path, VerifiersConfig(), environment_s=59.0).judge(a, EndedBy.LATE)


def test_what_goes_well_costs_a_line_only_where_a_late_prompt_waits_for_it(tmp_path: Path) -> None:
    a, b = (Prompts(["a", "b"]).all().slice(i, 1) for i in range(2))
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", environment_s=60.0)
    sizes = []
    for prompt, ended_by in ((b, EndedBy.WELL), (a, EndedBy.LATE), *[(b, EndedBy.WELL)] * 3):
        quarantine.judge(prompt, ended_by)
        sizes.append(len(read_lines(tmp_path / "late.jsonl")))
    assert sizes == [0, 1, 2, 2, 2]


def test_a_run_whose_environments_are_all_late_ends_with_one_line(tmp_path: Path) -> None:
    """Nobody has to wait for ever for a machine that does not recover, and the line names the limit."""
    prompts = Prompts(["a", "b"]).all()
    quarantine = Quarantine(tmp_path / "quarantine.jsonl", VerifiersConfig(), environment_s=60.0)
    for _ in range(2):
        assert not any(quarantine.judge(prompts.slice(i, 1), EndedBy.LATE) for i in range(2))
    assert all(quarantine.judge(prompts.slice(i, 1), EndedBy.LATE) for i in range(2))
    assert quarantine.holds_all(prompts)


def test_looking_for_a_prompt_that_is_left_looks_at_each_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = Prompts([f"p{i}" for i in range(50)]).all()
    quarantine = Quarantine(tmp_path / "quarantine.jsonl")
    looks: list[int] = []
    real = Quarantine.holds
    monkeypatch.setattr(Quarantine, "holds", lambda self, prompt: (looks.append(1), real(self, prompt))[1])
    for i in range(50):
        assert not quarantine.holds_all(prompts)
        quarantine.add(prompts.slice(i, 1))
    assert quarantine.holds_all(prompts) and len(looks) == 50 + 50  # one of each, and one at the first left
