"""Tasks made from a seed: the split, the worked solutions, the partial credit."""

from __future__ import annotations

import random
import re

import pyarrow.parquet as pq
import pytest

from gvpo_ray.config.model import WarmStartConfig
from gvpo_ray.data.tasks import LAG, LINKS, NUM_HELD_OUT, TASKS, make, split
from gvpo_ray.verifiers.math.extract import extract
from gvpo_ray.verifiers.rewards import in_place


def test_the_config_knows_every_task():
    assert set(WarmStartConfig.model_fields["task"].annotation.__args__[0].__args__) == set(TASKS)


@pytest.mark.components
@pytest.mark.parametrize("task", TASKS)
def test_held_out_problems_are_none_of_the_training_ones_and_all_is_a_matter_of_the_seed(
    task, tmp_path, monkeypatch
):
    problems, num_worked = TASKS[task][0], 3000  # of up to 100,000
    monkeypatch.setitem(TASKS, task, (problems, num_worked))
    train, held_out = split(problems(random.Random(3)), random.Random(3))
    assert NUM_HELD_OUT <= len(held_out) < NUM_HELD_OUT + 50 and len(train) > 4 * len(held_out) > 0
    assert not {problem.key for problem in train} & {problem.key for problem in held_out}
    assert len({problem.prompt for problem in train + held_out}) == len(train) + len(held_out)
    for folder in (tmp_path / "one", tmp_path / "two"):
        make(task, folder, 3)
    for name, number in (("train", len(train)), ("heldout", len(held_out)), ("worked", num_worked)):
        one, two = (pq.read_table(tmp_path / folder / f"{name}.parquet") for folder in ("one", "two"))
        assert one.equals(two) and one.num_rows == number
    assert pq.read_table(tmp_path / "one" / "train.parquet")["prompt"].to_pylist() == [
        problem.prompt for problem in train
    ]
    worked = pq.read_table(tmp_path / "one" / "worked.parquet").to_pylist()
    assert {row["prompt"] for row in worked} <= {problem.prompt for problem in train}
    right = sum(extract(row["solution"]).text == row["answer"] for row in worked) / len(worked)
    assert 0.25 < right < 0.45


def test_the_answer_of_a_sum_is_the_sum_and_that_of_a_chain_its_last_two_digits():
    for problem in TASKS["arithmetic"][0](random.Random(0))[:2000]:
        assert sum(map(int, re.findall(r"\d+", problem.prompt))) == int(problem.answer)
    for problem in TASKS["chain"][0](random.Random(0))[:2000]:
        digits = [int(digit) for digit in re.findall(r"\d", problem.prompt)]
        length = ord(problem.prompt[-1]) - ord("a") + 1
        assert len(digits) == LAG and LINKS[0] <= length <= LINKS[1]
        while len(digits) < length:
            digits.append((digits[-1] + digits[-4]) % 10)
        assert f"{digits[-2]}{digits[-1]}" == problem.answer


def test_a_hurried_person_who_never_slips_is_right(monkeypatch):
    for name in ("SLIP", "GUESS", "FORGET", "NINE", "MISCOUNT", "ONCE", "SWAP"):
        monkeypatch.setattr(f"gvpo_ray.data.tasks.{name}", 0.0)
    for problems, _ in TASKS.values():
        for problem in problems(random.Random(0))[:500]:
            assert extract(problem.solve(random.Random(1))).text == problem.answer


@pytest.mark.parametrize(
    "completion, want",
    [
        (r"\boxed{0123}", 1),
        (r"\boxed{0132}", 0.5),
        (r"\boxed{012}", 0.75),
        (r"\boxed{01234567}", 0.5),
        (r"\boxed{}", 0),
        ("nothing", 0),
        ("", 0),
    ],
)
def test_each_digit_in_its_place_is_worth_its_share(completion, want):
    assert in_place(["Sort 3210"], [completion], answer=["0123"]) == [want]
