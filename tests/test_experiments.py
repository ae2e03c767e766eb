"""bench paper and bench staleness without their runs: which cells there are, what is run again, what the
tables say.
"""

from __future__ import annotations

import json
import math
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_ray.bench.experiments import cells as experiments
from gvpo_ray.bench.experiments import paper, staleness
from gvpo_ray.bench.experiments.cells import Cell, Results, run_all
from gvpo_ray.bench.experiments.tables import mean_and_interval, percent, picture
from gvpo_ray.cli import benches
from gvpo_ray.config.run import GVPOConfig


def row(cell: Cell, **values: Any) -> dict[str, Any]:
    curve = [{"step": 0, "pass@1": 0.25, "kl": 0.0}, {"step": 100, "pass@1": 0.5, "kl": 2.0}]
    return {
        "cell": cell.key,
        "task": cell.task,
        "seed": cell.seed,
        "age": cell.age,
        "overrides": json.dumps(dict(cell.overrides)),
        "start": 0.25,
        "start_greedy": 0.2,
        "pass@1": 0.5,
        "kl": 2.0,
        "greedy": 0.6,
        "train": 0.5,
        "reward": 0.5,
        "curve": curve,
        "staleness": 0.0,
        "kl_active_share": 0.5,
        "steps": "[]",
        "seconds": 1.0,
        **values,
    }


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Cells that were run, in order; the higher learning rate, beta and clip, the better."""
    cells: list[Cell] = []

    def run(cell: Cell, folder: Path) -> dict[str, Any]:
        config = experiments.config_of(cell, folder)  # a config that is not valid would show here
        cells.append(cell)
        beta = getattr(config.loss, "beta", 0.0)
        clip = getattr(config.loss, "clip_low", 0.2)
        return row(cell, train=config.learner.learning_rate + (0.0 if beta == "auto" else beta) + clip)

    def draw(path: Path, *arguments: Any, **options: Any) -> None:
        if not path.exists():  # after each stage, and each takes a second
            picture(path, *arguments, **options)

    monkeypatch.setattr(experiments, "run", run)
    for bench in (paper, staleness):
        monkeypatch.setattr(bench, "picture", draw)
    return cells


def test_a_finished_cell_is_not_run_again_and_a_killed_bench_goes_on(tmp_path: Path, ran: list[Cell]) -> None:
    cells = [Cell("sort", {"loss.beta": beta}, seed) for beta in (0.1, 0.5) for seed in (0, 1)]
    (tmp_path / "cells" / cells[0].key / "groups").mkdir(parents=True)
    run_all(cells[:3], Results(tmp_path))
    assert not (tmp_path / "cells" / cells[0].key / "groups").exists()
    again = Results(tmp_path)
    run_all([*cells, cells[0]], again)
    assert ran == cells and len({cell.key for cell in cells}) == 4
    assert [row["seed"] for row in Results(tmp_path).of(cells)] == [0, 1, 0, 1]


def test_two_benches_in_one_folder_share_their_cells(tmp_path: Path, ran: list[Cell]) -> None:
    cells, taken, results = (
        [Cell("sort", {}, seed) for seed in range(3)],
        threading.Event(),
        Results(tmp_path),
    )

    def another_bench() -> None:
        """Is at one cell until it has its row, and adds another's meanwhile."""
        with experiments.locked(tmp_path / "cells" / f"{cells[0].key}.lock"):
            Results(tmp_path).add(row(cells[1]))
            taken.set()
            time.sleep(1)
            Results(tmp_path).add(row(cells[0]))

    thread = threading.Thread(target=another_bench)
    thread.start()
    assert taken.wait(10)
    run_all(cells, results)
    thread.join()
    assert ran == cells[2:] and len(results.rows) == 3


def test_the_paper_bench_tunes_each_method_with_the_same_budget_and_writes_its_tables(
    tmp_path: Path, ran: list[Cell]
) -> None:
    paper.main(["arithmetic"], 3, tmp_path)
    trials = [cell for cell in ran if cell.seed == experiments.TUNING_SEED]
    assert len(trials) == 4 * len(paper.METHODS) == len({cell.key for cell in trials})
    others = [cell.seed for cell in ran[len(trials) :]]
    # whole tables early
    assert others == sorted(others) and [others.count(seed) for seed in range(3)] == [len(others) // 3] * 3
    for name, best in (("replay.share", "auto"), ("sampling.num_completions", None)):
        (rate,) = {cell.overrides["learner.learning_rate"] for cell in ran if name in cell.overrides}
        betas = {cell.overrides.get("loss.beta") for cell in ran if name in cell.overrides}
        assert rate == max(experiments.RATES["arithmetic"]) and best in (None, *betas)
    text = (tmp_path / "paper.md").read_text()
    for line in (
        "| base | 25.0 | 20.0 |",
        "| GVPO | 50.0 ± 0.0 | 60.0 ± 0.0 |",
        "| 0.01 | 50.0 ± 0.0 | 50.0 ± 0.0 |",
        "| 16 | 50.0 ± 0.0 |  |",
        "| 32 | 50.0 ± 0.0 | 50.0 ± 0.0 |",
        "| 3:5 | 50.0 ± 0.0 |",
        "| GRPO | loss.clip | 0.0008, 0.4 |",
        "| GVPO |  | 0.0008 |",
    ):
        assert line in text
    assert (tmp_path / "frontier-arithmetic.png").read_bytes().startswith(b"\x89PNG") and (
        tmp_path / "beta-arithmetic.png"
    ).exists()
    count = len(ran)
    paper.main(["arithmetic"], 3, tmp_path)
    assert len(ran) == count


def test_the_staleness_bench_has_every_method_at_every_age(tmp_path: Path, ran: list[Cell]) -> None:
    staleness.main(["arithmetic"], 2, tmp_path)
    trials = [cell for cell in ran if cell.seed == experiments.TUNING_SEED]
    assert (
        len(trials) == 4 * len(staleness.METHODS)
        and ran[: len(trials)] == trials
        and {cell.age for cell in trials} == {16}
    )
    cells, foreign = ran[len(trials) : -4], ran[-4:]
    assert len(cells) == 2 * (7 * len(staleness.AGES) + 3 * len(staleness.FEW))
    assert len(staleness.METHODS) == 10
    assert [cell.seed for cell in cells] == sorted(cell.seed for cell in cells)  # a whole table early
    assert [cell.overrides["sources.people.group_share"] for cell in foreign] == [0.5, 0.5, 1.0, 1.0] and {
        cell.age for cell in foreign
    } == {0}
    text = (tmp_path / "staleness.md").read_text()
    assert all(
        f"| {how}, age in steps | 0 | 1 | 4 | 16 | 64 | unbounded |" in text
        for how in ("at temperature 1", "greedy")
    )
    # pass@1 at temperature 1, and greedy
    assert text.count("50.0 ± 0.0") == text.count("60.0 ± 0.0") == len(cells) / 2 + 3
    assert all(
        (tmp_path / f"{name}-arithmetic.png").read_bytes().startswith(b"\x89PNG")
        for name in ("staleness", "curves")
    )
    staleness.main(["sort"], 2, tmp_path)
    assert len([cell for cell in ran if cell.task == "sort"]) == 4 * 4 + 2 * 4 * 3
    # both tasks
    assert (
        "age in steps | 0 | 16 | unbounded |" in (text := (tmp_path / "staleness.md").read_text())
        and "| 64 |" in text
    )
    paper.write(Results(tmp_path), range(2))
    # nothing of its own was run
    assert not any(task in (tmp_path / "paper.md").read_text() for task in experiments.TASKS)


def test_the_staleness_bench_runs_the_methods_of_some_objectives_alone(
    tmp_path: Path, ran: list[Cell]
) -> None:
    assert list(staleness.OBJECTIVES) == benches.STALE
    staleness.main(["arithmetic"], 1, tmp_path, ["oapl", "gspo"])
    objectives = [cell.overrides["loss.objective"] for cell in ran]
    assert sorted({*objectives}) == ["gspo", "oapl"] and len(ran) == 2 * 4 + 2 * 3
    text = (tmp_path / "staleness.md").read_text()
    assert "| oapl | 50.0 |" in text and "| gspo | 50.0 |" in text
    assert "| oapl | loss.beta | 0.0008, 0.3 |" in text and "| gspo | loss.clip | 0.0008, 0.1 |" in text


@pytest.mark.parametrize(
    ("scores", "rates"),
    [
        ({2e-4: 0.8, 4e-4: 0.7, 1e-4: 0.75}, [1e-4, 2e-4, 4e-4, 1.4e-4]),
        ({2e-4: 0.8, 4e-4: 0.7, 1e-4: 0.6}, [1e-4, 2e-4, 4e-4, 2.8e-4]),
        ({2e-4: 0.8, 4e-4: 0.81, 8e-4: 0.9}, [2e-4, 4e-4, 8e-4, 5.7e-4]),
    ],
)
def test_without_an_option_the_last_trial_is_the_rate_beside_the_best(
    scores: dict[float, float], rates: list[float], tmp_path: Path
) -> None:
    method, results = staleness.METHODS["gvpo (default)"], Results(tmp_path)
    for _ in range(3):
        cells = experiments.trials("arithmetic", method, 16, results)
        for cell in cells:
            results.rows[cell.key] = row(cell, train=scores.get(cell.overrides["learner.learning_rate"], 0.5))
    assert [cell.overrides["learner.learning_rate"] for cell in cells] == rates


@pytest.mark.parametrize("task", experiments.TASKS)
def test_every_cell_of_a_task_starts_from_one_model_and_is_aged_by_the_bound(
    task: str, tmp_path: Path
) -> None:
    configs = [
        experiments.config_of(Cell(task, {"loss.beta": 0.3}, seed, age), tmp_path)
        for seed in (0, 1)
        for age in (0, 16)
    ]
    assert (
        len({config.model.path for config in configs}) == 1
        and len({config.run_dir for config in configs}) == 4
    )
    assert [config.max_staleness for config in configs] == [0, 16, 0, 16] and {
        config.loss.beta for config in configs
    } == {0.3}
    assert all(
        isinstance(config, GVPOConfig) and config.evaluation.of("greedy")[1] == 0 for config in configs
    )
    model = AutoModelForCausalLM.from_pretrained(configs[0].model.path)
    # as its YAML makes it
    assert (
        configs[0].warm_start is not None
        and configs[0].warm_start.architecture.items() <= model.config.to_dict().items()
    )
    assert len(AutoTokenizer.from_pretrained(configs[0].model.path)) == model.config.vocab_size


def test_intervals_over_seeds_are_students() -> None:
    mean, half = mean_and_interval([0.1, 0.2, 0.3])
    assert mean == pytest.approx(0.2) and half == pytest.approx(4.3027 * 0.1 / math.sqrt(3), rel=1e-4)
    # Nine seeds: the spread of 0..8 is sqrt(7.5), the quantile for 8 degrees of freedom 2.3060.
    _, half = mean_and_interval([0.1 * i for i in range(9)])
    assert half == pytest.approx(2.3060 * 0.1 * math.sqrt(7.5) / 3, rel=1e-4)
    assert percent([0.5]) == "50.0" and percent([]) == "" and percent([0.5, 0.5]) == "50.0 ± 0.0"
