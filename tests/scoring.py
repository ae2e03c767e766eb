"""Groups that are scored with reward functions, and the processes that score them: for tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.verifiers.verifier import Verifier

LIMIT_S = 60.0
"""Limit of a check that ends by itself, also on a busy machine."""

SHORT_S = 3.0
"""Limit of a check that must come to it, and long enough for the ones beside it, which end by themselves."""


def group_of(answer: str, completions: list[str], **more: Any) -> pa.Table:
    return groups.table(
        [
            {
                "group_id": 7,
                "prompt": "What?",
                "answer": answer,
                "dataset": "d",
                "completions": completions,
                **more,
            }
        ]
    )


def rewards_of(scored: pa.Table) -> list[float | None]:
    return scored["rewards"][0].as_py()


def reasons_of(scored: pa.Table) -> list[str | None]:
    return scored["reward_reasons"][0].as_py()


def score_with(function: Callable[..., Any], completions: list[str], **config: Any) -> pa.Table:
    """Score with `function` in the place of `math`, weight 1."""
    with Verifier(VerifiersConfig(**{"timeout_s": LIMIT_S, **config}), {"math": function}) as verifier:
        return verifier.score(group_of("1", completions))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> bool:
    deadline = time.monotonic() + LIMIT_S
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not is_running(pid)


def shared_pid(verifier: Verifier) -> int | None:
    """The pid of the child that serves many checks."""
    assert verifier._sandbox is not None
    return verifier._sandbox._child and verifier._sandbox._child.pid


def template_pid(verifier: Verifier) -> int:
    assert verifier._sandbox is not None and verifier._sandbox._template is not None
    return verifier._sandbox._template._process.pid


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
