"""bench family: each section with toy sizes, and what the tables say of rows."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from gvpo_ray.bench.experiments import family, small
from gvpo_ray.data import tasks


def test_slope_correlation_and_error_are_of_differences_within_prompts() -> None:
    rows = [{"rewards": [0.0, 8.0]}, {"rewards": [1.0, 2.0, 3.0]}]
    # a constant of each prompt's own is nothing; deviations of r* are -4, 4, -1, 0, 1: 34 in squares
    same = [5.0, 13.0, -1.0, 0.0, 1.0]
    assert family.follows(same, rows) == pytest.approx({"slope": 1, "correlation": 1, "error": 0})
    half = [value / 2 for value in same]
    assert family.follows(half, rows) == pytest.approx({"slope": 0.5, "correlation": 1, "error": 0.25})
    # the second prompt the other way round: (32 - 2) / 34
    turned = [5.0, 13.0, 1.0, 0.0, -1.0]
    assert family.follows(turned, rows) == pytest.approx(
        {"slope": 30 / 34, "correlation": 30 / 34, "error": 8 / 34}
    )


def test_each_objective_sees_the_same_annotation_in_its_own_form() -> None:
    texts = [([i], str(i)) for i in range(4)]
    row = {"prompt_ids": [9] * 5, "rewards": [0.0, 4.0, 8.0, 2.0], "chosen": 1}
    row |= {"completions": [text for _, text in texts], "completion_ids": [ids for ids, _ in texts]}
    scores = family.annotated(row, "gvpo", random.Random(0))
    assert dict(zip(scores["completions"], scores["rewards"], strict=True)) == dict(
        zip("0123", row["rewards"], strict=True)
    )
    choice = family.annotated(row, "epa", random.Random(0))
    assert choice["completions"] == ["1", "0", "2", "3"] and choice["rewards"] == [1, 0, 0, 0]
    pair = family.annotated(row, "dpo", random.Random(0))
    assert pair["rewards"] == [1, 0] and pair["completions"][0] == "1" and len(pair["completion_ids"]) == 2
    assert scores["prompt_ids"] == choice["prompt_ids"] == pair["prompt_ids"] == [9] * 5


def test_batches_have_every_row_once_in_an_epoch() -> None:
    rows = [{"group_id": i} for i in range(7)]
    batches = list(small.epochs(rows, 3, 4, seed=0))
    assert [len(batch) for batch in batches] == [3] * 4
    first, second = (
        [row["group_id"] for batch in two for row in batch] for two in (batches[:2], batches[2:])
    )
    assert len({*first}) == len({*second}) == 6 and first != second


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> family.Sides:
    sizes = {
        "NUM_PROMPTS": 100,
        "NUM_SCORED": 8,
        "NUM_NOISY": 128,
        "NUM_CLEAN": 64,
        "NUM_STEPS": 2,
        "EVERY": 1,
    }
    for name, size in sizes.items():
        monkeypatch.setattr(family, name, size)
    monkeypatch.setattr(family, "teacher", lambda sides, folder: family.START)
    train, held_out = tasks.split(tasks.sort(random.Random(0)), random.Random(0))
    return family.Sides(train, held_out[:16])


@pytest.mark.components
@pytest.mark.parametrize(
    ("section", "method"),
    [
        ("preferences", "EPA, 2 weak negatives"),
        ("preferences", "DPO on pairs"),
        ("preferences", "GVPO on scores"),
        ("noise", "PoFT"),
        ("noise", "SFT without the noise"),
        ("distillation", "rewards alone"),
        ("distillation", "a teacher"),
    ],
)
def test_a_run_of_each_kind_has_every_measure_of_its_table(
    tmp_path: Path, toy: family.Sides, section: str, method: str
) -> None:
    run, methods = family.SECTIONS[section]
    assert method in methods
    found = run(method, 2e-3, 0, toy, tmp_path)
    wanted = {name for name in family.COLUMNS[section] if "@" not in name[len("pass@1") :]}
    assert wanted <= found.keys()
    assert all(-20 < value < 20 for value in found.values())
    if section == "preferences":  # eight updates at a high rate: it goes where r* points
        assert found["correlation"] > 0.2


def test_a_finished_run_is_not_run_again_and_the_table_has_intervals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def run(method: str, rate: float, seed: int, sides: family.Sides, folder: Path) -> dict[str, float]:
        ran.append((method, rate, seed))
        assert not {one.prompt for one in sides.train} & {one.prompt for one in sides.measured}
        return {"reward": 0.5 + 0.1 * seed, "pass@1": 0.5, "greedy": 0.75}

    monkeypatch.setitem(family.SECTIONS, "noise", (run, family.NOISE))
    family.main(["noise"], 1, tmp_path)
    assert "| PoFT | 50.0 | 50.0 | 75.0 |" in (tmp_path / "family.md").read_text()
    family.main(["noise"], 2, tmp_path)
    assert ran == [(method, family.RATE, seed) for seed in (0, 1) for method in family.NOISE]
    # 0.05 from the mean on both sides, times 12.706, Student's t of one degree of freedom
    assert "| PoFT | 55.0 ± 63.5 | 50.0 ± 0.0 | 75.0 ± 0.0 |" in (tmp_path / "family.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "family.jsonl").read_text().splitlines()]
    assert [(row["method"], row["rate"], row["seed"]) for row in rows] == ran


def test_the_methods_of_a_section_try_the_same_rates_apart_and_keep_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, measured = [], []
    best = {"rewards alone": 1e-3, "a teacher": 2e-3}

    def run(method: str, rate: float, seed: int, sides: family.Sides, folder: Path) -> dict[str, float]:
        ran.append((method, rate, seed))
        measured.append({one.prompt for one in sides.measured})
        assert not {one.prompt for one in sides.train} & measured[-1]
        value = 0.75 if rate == best[method] else 0.5
        return {name: value for name in family.COLUMNS["distillation"]}

    monkeypatch.setitem(family.SECTIONS, "distillation", (run, tuple(family.DISTILLATION)))
    family.main(["distillation"], 2, tmp_path)
    trials = [(method, rate, family.TUNING_SEED) for method in best for rate in family.RATES["distillation"]]
    assert ran == trials + [(method, best[method], seed) for seed in (0, 1) for method in best]
    assert not measured[0] & measured[-1] and measured[0] == measured[11]
    text = (tmp_path / "family.md").read_text()
    assert f"| a teacher |{' 50.0 |' * 5} 75.0 |" in text  # of the trials
    assert "| a teacher | 75.0 ± 0.0 | 75.0 ± 0.0 | 75.0 ± 0.0 | 75.0 ± 0.0 |" in text
    assert "up to 2 seeds" in text
