"""Hostile code is harmless in a user's reward function."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hostile import CODE, GOLD, NUM, files, network
from world import CODE_LIMITS, World, assert_harmless, report_of

from gvpo_ray.config.verifiers import VerifiersConfig


@pytest.mark.parametrize("kind", CODE)
def test_hostile_code_in_a_users_function_is_harmless(apart: Callable[..., None], kind: str) -> None:
    apart(_code, kind)


def _code(world: World, kind: str) -> None:
    def obeys(prompts: list[str], completions: list[str], answer: list[str], **_: Any) -> list[float]:
        if not completions[0].isdigit():
            exec(completions[0], {})
        return [float(completions[0] == answer[0])]

    make, endings = CODE[kind]
    report = report_of(
        world, make, VerifiersConfig(**CODE_LIMITS), {"math": obeys}, right=(GOLD,), wrong=("41",)
    )
    assert_harmless(report)
    reasons = [each.reason for each in report.scored if each.expected is None and each.reward is None]
    assert len(reasons) >= NUM // 3
    assert [
        reason for reason in reasons if not (reason or "").removeprefix("math raised ").startswith(endings)
    ] == []


def test_the_traps_work(apart: Callable[..., None]) -> None:
    """Without confinement the same programs leave what the tests above look for."""
    apart(_traps)


def _traps(world: World) -> None:
    traps = world.traps._replace(canary=world.traps.canary.with_name("control"))
    before = world.count()["files"]
    for program in (files(random.Random(0), traps)[0], network(random.Random(0), traps)[0]):
        subprocess.run([sys.executable, "-c", program], check=True)
    assert world.num_visitors() == 1
    assert world.count()["files"] != before
    traps.canary.unlink()
    assert world.count()["files"] == before
