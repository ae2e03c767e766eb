"""Hostile text is harmless to the built-in reward functions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hostile import GOLD, NUM, RIGHT, TEXT, WRONG, Traps, in_forms
from world import (
    MATH_LIMITS,
    World,
    assert_harmless,
    close_fleet,
    open_fleet,
    report_of,
    report_of_fleet,
)

from gvpo_ray import groups
from gvpo_ray.config.verifiers import VerifiersConfig
from gvpo_ray.verifiers import score_file as verify


@pytest.fixture(scope="module")
def fleet(apart: Callable[..., None]) -> Iterator[None]:
    """Verifiers with the reward `math`, for all kinds."""
    apart(open_fleet, VerifiersConfig(**MATH_LIMITS))
    yield
    apart(close_fleet)


@pytest.mark.parametrize("kind", TEXT)
def test_hostile_text_is_harmless_to_math(apart: Callable[..., None], fleet: None, kind: str) -> None:
    apart(_text_to_math, kind)


def _text_to_math(world: World, kind: str) -> None:
    assert_harmless(report_of_fleet(world, TEXT[kind]))


def test_hostile_text_is_harmless_to_the_other_reward_functions_and_meets_no_limit(
    apart: Callable[..., None],
) -> None:
    apart(_text_to_others)


def _text_to_others(world: World) -> None:
    def all_kinds(rng: random.Random, traps: Traps) -> list[str]:
        return [text for kind in TEXT.values() for text in kind(rng, traps)[::4]]

    # The last two look at form and say nothing of right and wrong: they are here for their time and their
    # memory.
    rewards: Any = {"numeric": 0.5, "exact_match": 0.5, "format": 0.0, "length": 0.0}
    report = report_of(
        world,
        all_kinds,
        VerifiersConfig(rewards=rewards, **MATH_LIMITS),
        right=("\\boxed{42}", "I find \\boxed{ 42 }."),
    )
    assert_harmless(report)
    assert [(each.completion[:200], each.reason) for each in report.scored if each.reward is None] == []


# --- half a surrogate pair, and bytes that are not UTF-8 ----------------------------------------------------


def test_a_table_does_not_take_half_a_surrogate_pair() -> None:
    with pytest.raises(ValueError, match="surrogate"):
        groups.table([{"prompt": "What?", "answer": GOLD, "completions": ["\\boxed{4\ud8002}"]}])


def test_rows_of_a_file_with_half_surrogate_pairs_and_invalid_utf8_cost_only_themselves(
    apart: Callable[..., None],
) -> None:
    """JSON can escape half a pair; a line that is not UTF-8 is malformed."""
    apart(_file)


def _file(world: World) -> None:
    rng = random.Random("surrogates")
    halves = [chr(rng.randint(0xD800, 0xDFFF)) for _ in range(NUM)]
    hostile = [
        form.replace("43", f"4{half}3") for half, form in zip(halves, in_forms(lambda _: "43"), strict=True)
    ]
    lines, expected = [], []
    for text in hostile:
        broken = (
            json.dumps({"response": "\\boxed{@}", "gold": GOLD})
            .encode()
            .replace(b"@", b"42" + rng.randbytes(3) + b"\xff")
        )
        lines += [
            json.dumps({"response": text, "gold": GOLD}).encode(),
            json.dumps({"response": RIGHT[0], "gold": GOLD}).encode(),
            broken,
            json.dumps({"response": WRONG[0], "gold": GOLD}).encode(),
        ]
        expected += ["incorrect", "correct", "unverifiable", "incorrect"]
    source, out = world.root / "in.jsonl", world.root / "out.jsonl"
    before = world.count()
    source.write_bytes(b"\n".join(line.replace(b"\n", b"") for line in lines))
    summary = verify.main(str(source), str(out), VerifiersConfig(**MATH_LIMITS), num_workers=2)
    scored = [json.loads(line) for line in out.read_text().splitlines()]
    source.unlink()
    out.unlink()
    assert [row["verdict"] for row in scored] == expected
    assert summary["malformed"] == NUM
    assert [row["response"] for row in scored[::4]] == hostile
    assert world.count() == before
