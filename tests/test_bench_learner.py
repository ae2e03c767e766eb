"""`bench learner`: the ways take turns, and the table has medians and ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gvpo_ray.bench.experiments import sft
from gvpo_ray.bench.gpu.models import TOY
from gvpo_ray.bench.learner import in_turn, make_model, ratios_of, spread


def test_the_ways_take_turns_and_one_without_memory_is_not_tried_again() -> None:
    called: list[str] = []

    def way(name: str, results: list[Any]) -> Any:
        left = iter(results)

        def call() -> Any:
            called.append(name)
            return next(left)

        return call

    ways = {"ours": way("ours", [(1.0,), (2.0,), (4.0,)]), "big": way("big", [(9.0,), None])}
    assert in_turn(ways, 3) == {"ours": [(1.0,), (2.0,), (4.0,)], "big": []}
    assert called == ["ours", "big", "ours", "big", "ours"]


def test_ratios_are_of_the_same_round_so_that_load_on_the_machine_cancels() -> None:
    # a machine that is three times as slow in the second round
    ours, padded = [(1.0, 0.0), (3.0, 0.0), (1.0, 0.0)], [(2.0, 0.0), (6.0, 0.0), (2.0, 0.0)]
    assert ratios_of(padded, ours) == [2.0, 2.0, 2.0] and ratios_of([], ours) == []


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([1.25, 0.25, 1.13], "1.13 (0.25 to 1.25)"),
        ([2.0, 2.0, 2.0], "2.00"),
        ([1.004, 1.001], "1.00"),
        ([], "no memory"),
    ],
)
def test_a_cell_has_the_median_and_the_range(values: list[float], text: str) -> None:
    assert spread("{:.2f}", values) == text


def test_updates_of_ragged_rows_have_about_as_many_tokens_and_ours_trains_them(tmp_path: Path) -> None:
    batches = sft.ragged_rows(sft.WARM + 1, 512, TOY.vocab)
    assert all(512 * 63 / 64 - 2 <= sft.num_tokens(batch) <= 512 for batch in batches)
    sizes = {len(row["prompt_ids"]) for batch in batches for row in batch}
    assert len(sizes) > 5 and max(sizes) <= 64
    make_model(tmp_path, TOY)
    (seconds,) = sft.ours(str(tmp_path), batches, 512)
    assert seconds > 0
