"""`gvpo-ray bench family` asks what preferences, noisy data and a teacher are worth, on the task `sort`.

    preferences     EPA, DPO on pairs and GVPO on scores, all made from one reward
    noise           PoFT and SFT on data of which a third is noise
    distillation    a teacher with another tokenizer as GVPO's reference, beside rewards alone

Everything runs in this process with the learner's own steps, and neither Ray nor an engine is started. All
methods of the first two sections have one learning rate; those of the third have that of RATES with which a
trial of each ended best on training prompts. A finished run is a row of family.jsonl in the folder, and does
not run again; family.md is made from the rows.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from gvpo_ray.bench.experiments.cells import MODELS
from gvpo_ray.bench.experiments.small import Trained, encoded, epochs, group, load
from gvpo_ray.bench.experiments.tables import markdown, mean_and_interval, percent
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.loss import loss_config
from gvpo_ray.config.model import WarmStartConfig
from gvpo_ray.data import tasks
from gvpo_ray.files import new_folder
from gvpo_ray.groups import Row
from gvpo_ray.learner.warm_start import imitate, new_model, seeded, train_tokenizer
from gvpo_ray.verifiers.rewards import in_place
from gvpo_ray.verifiers.scoring_model import PROMPTS, ScoringModel, Text

START = MODELS / "sort"
"""The model that runs begin with: it has imitated people in a hurry."""
TEMPLATE: dict[str, Any] = {"template": "{prompt}\n", "system_prompt": None, "template_arguments": {}}
NUM_HELD_OUT = 500
"""Held-out prompts of a measurement, each with one completion at temperature 1 and one greedy one."""
SHARPNESS = 8.0
"""Nats of implicit reward that a right answer is worth above one with no digit in its place: r* = 8 R."""


@dataclass(frozen=True)
class Sides:
    """A Sides has the problems to train on, and those to measure with, which no run trains on."""

    train: list[tasks.Problem]
    measured: list[tasks.Problem]


# ------------------------------------------------------------------------------------------------ preferences

PREFERENCES: dict[str, dict[str, Any]] = {
    "GVPO on scores": {"objective": "gvpo", "importance_cap": None, "damped": False},
    "EPA": {"objective": "epa"},
    "EPA, 2 weak negatives": {"objective": "epa", "num_weak": 2},
    "DPO on pairs": {"objective": "dpo"},
}
"""Methods by name, and their options; all with beta 1 and the reference `initial`."""
NUM_PROMPTS, NUM_COMPLETIONS, NUM_SCORED = 600, 4, 200


def scored(trained: Trained, problems: Sequence[tasks.Problem], rng: random.Random) -> list[Row]:
    """Return a group of the start's own completions for each problem, with r* as rewards and a `chosen`.

    One of four is chosen with the probability softmax(r*), as an annotator would whose taste is r*.
    """
    prompts = [one.prompt for one in problems for _ in range(NUM_COMPLETIONS)]
    ids, texts = trained.sample(prompts)
    rows = []
    for i, problem in enumerate(problems):
        own = slice(i * NUM_COMPLETIONS, (i + 1) * NUM_COMPLETIONS)
        each = dict(zip(texts[own], ids[own], strict=True))  # equal completions once
        rewards = [SHARPNESS * x for x in in_place([], list(each), answer=[problem.answer] * len(each))]
        if len(each) > 1:
            (chosen,) = rng.choices(range(len(each)), [math.exp(r) for r in rewards])
            pairs = [(tokens, text) for text, tokens in each.items()]
            rows.append(group(i, trained.tokenizer, problem.prompt, pairs, rewards=rewards, chosen=chosen))
    return rows


def annotated(row: Row, objective: str, rng: random.Random) -> Row:
    """Return what an objective sees of a scored group: gvpo the scores, epa the choice, dpo a pair of it."""
    chosen = row["chosen"]
    others = [i for i in range(len(row["rewards"])) if i != chosen]
    kept = [chosen, *(rng.sample(others, 1) if objective == "dpo" else others)]
    rewards = (
        row["rewards"] if objective == "gvpo" else [float(i == chosen) for i in range(len(row["rewards"]))]
    )
    lists = {name: [row[name][i] for i in kept] for name, value in row.items() if isinstance(value, list)}
    return {**row, **lists, "rewards": [rewards[i] for i in kept], "prompt_ids": row["prompt_ids"]}


def preferences(method: str, rate: float, seed: int, sides: Sides, folder: Path) -> dict[str, float]:
    """Train one method on a seed's preferences; measure it, and how its implicit reward follows r*."""
    loss = loss_config(beta=1.0, reference="initial", **PREFERENCES[method])
    run, rng = load(START, loss, rate, num_steps := 4 * NUM_PROMPTS // 50), random.Random(seed)
    rows = scored(run, rng.sample(sides.train, NUM_PROMPTS), rng)
    unseen = scored(run, sides.measured[:NUM_SCORED], rng)
    before = logprobs(run, unseen)
    for batch in epochs([annotated(row, loss.objective, rng) for row in rows], 50, num_steps, seed):
        run.step(batch)
    implicit = [now - then for now, then in zip(logprobs(run, unseen), before, strict=True)]
    return run.measured(sides.measured) | follows(implicit, unseen)


def logprobs(run: Trained, rows: Sequence[Row]) -> list[float]:
    """Return the log-probs of all completions of some groups."""
    return [float(tokens.double().sum()) for tokens in run.policy.token_logprobs(list(rows))]


def follows(implicit: Sequence[float], rows: Sequence[Row]) -> dict[str, float]:
    """Return slope, correlation and slope-1 error of the implicit reward against r*, within prompts.

    The error is the mean square of their difference, as a share of the variance of r*: 0 at the optimum, 1
    for a policy that has not moved.
    """
    x: list[float] = []
    y: list[float] = []
    for row in rows:
        own = implicit[len(x) : len(x) + len(row["rewards"])]
        x += [reward - statistics.mean(row["rewards"]) for reward in row["rewards"]]
        y += [value - statistics.mean(own) for value in own]
    xx, yy, xy = (math.fsum(a * b for a, b in zip(*both, strict=True)) for both in ((x, x), (y, y), (x, y)))
    return {
        "slope": xy / xx,
        "correlation": xy / math.sqrt(xx * yy),
        "error": math.fsum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / xx,
    }


# ------------------------------------------------------------------------------------------------------ noise

NOISE = ("SFT", "PoFT", "SFT without the noise")
NUM_NOISY, NUM_CLEAN = 2400, 1500
"""Rows of which a third is noise, and rows without, which the aligned model has imitated."""


def answers(tokenizer: Any, problems: Sequence[tasks.Problem], others: Sequence[tasks.Problem]) -> list[Row]:
    """Return groups of one completion: the answer of the problem of `others` in the same place."""
    return [
        group(i, tokenizer, one.prompt, [encoded(tokenizer, rf"\boxed{{{other.answer}}}")])
        for i, (one, other) in enumerate(zip(problems, others, strict=True))
    ]


def noise(method: str, rate: float, seed: int, sides: Sides, folder: Path) -> dict[str, float]:
    """Train one method on right answers of which a third is another problem's."""
    rng = random.Random(seed)
    problems = rng.sample(sides.train, NUM_NOISY)
    others = [rng.choice(sides.train) if i % 3 == 0 else one for i, one in enumerate(problems)]
    loss = loss_config(objective="poft" if method == "PoFT" else "sft")
    if method == NOISE[-1]:
        problems, others = (
            list(itertools.compress(x, map(bool, itertools.cycle((0, 1, 1))))) for x in (problems, others)
        )
    num_steps = 3 * NUM_NOISY // 64
    run = load(START, loss, rate, num_steps)
    rows = answers(run.tokenizer, problems, others)
    found: dict[str, float] = {}
    if method == "PoFT":
        aligned = load(START, loss_config(objective="sft"), 1e-3, NUM_CLEAN // 32)
        clean = rng.sample(sides.train, NUM_CLEAN)
        for batch in epochs(answers(run.tokenizer, clean, clean), 64, NUM_CLEAN // 32, seed):
            aligned.step(batch)
        means = [float(tokens.double().mean()) for tokens in aligned.policy.token_logprobs(rows)]
        rows = [{**row, "rewards": [mean]} for row, mean in zip(rows, means, strict=True)]
        found |= {f"aligned_{name}": value for name, value in aligned.measured(sides.measured).items()}
    for batch in epochs(rows, 64, num_steps, seed):
        run.step(batch)
    if method == "PoFT":
        own = [float(tokens.double().mean()) for tokens in run.policy.token_logprobs(rows)]
        weights = [1 / (1 + math.exp(x - a)) for x, a in zip(own, means, strict=True)]
        found |= {
            "weight_noise": statistics.mean(weights[::3]),
            "weight_right": statistics.mean(w for i, w in enumerate(weights) if i % 3),
        }
    return run.measured(sides.measured) | found


# ----------------------------------------------------------------------------------------------- distillation

DISTILLATION: dict[str, dict[str, Any]] = {
    "rewards alone": {"preset": "paper"},
    "a teacher": {"beta": 1.0, "reference": {"model": "teacher"}, "importance_cap": None},
}
NUM_STEPS, GROUPS, K, EVERY = 30, 8, 8, 10


def teacher(sides: Sides, folder: Path) -> Path:
    """Make the teacher, once: a model whose tokens are bytes, from nothing, by imitation of right answers."""
    path = folder / "teacher"
    if not (path / "config.json").exists():
        problems = random.Random(0).choices(sides.train, k=32_000)
        texts = [rf"\boxed{{{one.answer}}}" for one in problems]
        shape = json.loads((START / "config.json").read_text(encoding="utf-8"))
        names = [
            *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"),
        ]
        with seeded(0, None), new_folder(path) as part:
            tokenizer = train_tokenizer(texts, 257)
            new_model(len(tokenizer), tokenizer, {name: shape[name] for name in names}).save_pretrained(part)
            tokenizer.save_pretrained(part)
            rows = [
                {
                    "prompt_ids": tokenizer(f"{one.prompt}\n").input_ids,
                    "completion_ids": [encoded(tokenizer, text)[0]],
                }
                for one, text in zip(problems, texts, strict=True)
            ]
            section = {"data": {"path": "worked"}, "batch_size": 64, "learning_rate": 3e-3}
            imitate(part, rows, WarmStartConfig.model_validate(section))
    return path


def distillation(method: str, rate: float, seed: int, sides: Sides, folder: Path) -> dict[str, float]:
    """Train one method on what the policy samples, and measure it on the way."""
    with_teacher = method == "a teacher"
    run, rng = load(START, loss_config(**DISTILLATION[method]), rate, NUM_STEPS, 2), random.Random(seed)
    scorer = ScoringModel(str(teacher(sides, folder)), {PROMPTS: TEMPLATE}, 64) if with_teacher else None
    found: dict[str, float] = {}
    for step in range(1, NUM_STEPS + 1):
        problems = rng.sample(sides.train, GROUPS)
        ids, texts = run.sample([one.prompt for one in problems for _ in range(K)])
        rows = []
        for i, problem in enumerate(problems):
            own = slice(i * K, (i + 1) * K)
            pairs = list(zip(ids[own], texts[own], strict=True))
            more: dict[str, Any] = {"rewards": in_place([], texts[own], answer=[problem.answer] * K)}
            if scorer is not None:
                end = run.tokenizer.eos_token_id
                asked = [Text(problem.prompt, None, text, tokens[-1] == end) for tokens, text in pairs]
                more = {"reference_logprobs": [score.logprob for score in scorer.score(asked)]}
            rows.append(group(i, run.tokenizer, problem.prompt, pairs, **more))
        run.step(rows)
        if step % EVERY == 0 and step < NUM_STEPS:
            found |= {f"{name}@{step}": value for name, value in run.measured(sides.measured).items()}
    return found | run.measured(sides.measured)


# ------------------------------------------------------------------------------------------------------- runs

Run = Callable[[str, float, int, Sides, Path], dict[str, float]]
SECTIONS: dict[str, tuple[Run, Sequence[str]]] = {
    "preferences": (preferences, tuple(PREFERENCES)),
    "noise": (noise, NOISE),
    "distillation": (distillation, tuple(DISTILLATION)),
}
"""By name of a section: what runs a method, and the methods."""
RATE = 5e-4
"""The learning rate of all methods. At 2e-3 GVPO and EPA ended with a third of the reward (one run each)."""
RATES, TUNING_SEED = {"distillation": tuple(RATE * 2.0**i for i in range(-3, 3))}, 1000
"""Rates that each method of a section tries, and the seed of these trials, which no other run has."""


class Rows:
    """Rows are the finished runs of a folder, in the file family.jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "family.jsonl"
        self.rows: list[dict[str, Any]] = []
        self.read()

    def read(self) -> None:
        """Read the file again, with rows that other processes have added."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines]

    def of(self, **what: Any) -> list[dict[str, Any]]:
        """Return the rows that have these values."""
        return [row for row in self.rows if what.items() <= row.items()]

    def add(self, row: dict[str, Any]) -> None:
        """Write a row behind the others."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.read()


def main(sections: Sequence[str], num_seeds: int, folder: Path) -> None:
    """Run what has no row yet, and write family.md to `folder`.

    Raises:
        ConfigError: this is no checkout of the repository.
    """
    if not START.is_dir():
        raise ConfigError(f"bench family runs from a checkout of the repository: there is no {START}")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of loading a model, for each run
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(folder)
    train, held_out = tasks.split(tasks.sort(random.Random(0)), random.Random(0))
    sides = Sides(train, held_out[:NUM_HELD_OUT])
    apart = Sides(train[NUM_HELD_OUT:], train[:NUM_HELD_OUT])  # no choice depends on what the tables report
    for section in sections:
        run, methods = SECTIONS[section]
        for method, rate in itertools.product(methods, RATES.get(section, ())):
            _run(run, section, method, rate, TUNING_SEED, apart, rows)
        for seed, method in itertools.product(range(num_seeds), methods):
            _run(run, section, method, tuned(section, method, rows), seed, sides, rows)
            write(rows)


def tuned(section: str, method: str, rows: Rows) -> float:
    """Return the rate of a method: that of its trial with the best pass@1, or RATE where there are none."""
    trials = rows.of(section=section, method=method, seed=TUNING_SEED)
    rate: float = max(trials, key=lambda row: row["pass@1"])["rate"] if trials else RATE
    return rate


def _run(run: Run, section: str, method: str, rate: float, seed: int, sides: Sides, rows: Rows) -> None:
    what = {"section": section, "method": method, "rate": rate, "seed": seed}
    if rows.of(**what):
        return
    began = time.monotonic()
    with seeded(seed, None):
        found = run(method, rate, seed, sides, rows.folder)
    rows.add({**what, **found, "seconds": time.monotonic() - began})
    said = " · ".join(f"{name} {value:.3f}" for name, value in found.items() if "@" not in name[1:-2])
    print(f"{section}, {method}, rate {rate:g}, seed {seed}: {said}", flush=True)


def number(values: Sequence[float]) -> str:
    """Write the mean with its 95 % interval where there are several values; "" for none."""
    if not values:
        return ""
    mean, interval = mean_and_interval(values)
    return f"{mean:.2f}" + ("" if math.isnan(interval) else f" ± {interval:.2f}")


COLUMNS: dict[str, dict[str, tuple[str, Callable[[Sequence[float]], str]]]] = {
    "preferences": {
        "slope": ("slope of βΔ against r*", number),
        "correlation": ("correlation", number),
        "error": ("slope-1 error", number),
        "reward": ("reward", percent),
        "pass@1": ("pass@1", percent),
        "greedy": ("greedy", percent),
    },
    "noise": {"reward": ("reward", percent), "pass@1": ("pass@1", percent), "greedy": ("greedy", percent)},
    "distillation": {
        **{
            f"pass@1@{step}": (f"pass@1 after {step} steps", percent)
            for step in range(EVERY, NUM_STEPS, EVERY)
        },
        "pass@1": (f"after {NUM_STEPS}", percent),
        "greedy": ("greedy", percent),
    },
}
"""Columns of the table of each section: by the measure's name its title, and how it is written."""


def trials_of(section: str, rows: Rows) -> list[str]:
    """Write the table of a section's trials; nothing where it has none."""
    if not (trials := rows.of(section=section, seed=TUNING_SEED)):
        return []
    head = ["rate", *(f"{rate:g}" for rate in RATES[section])]
    found = {(row["method"], row["rate"]): row["pass@1"] for row in trials}
    body = [
        [name, *(percent([found[name, rate]] if (name, rate) in found else []) for rate in RATES[section])]
        for name in SECTIONS[section][1]
    ]
    return [
        "One trial each, pass@1 at its end on training prompts that it was not given:",
        "",
        markdown(head, body),
    ]


def write(rows: Rows) -> None:
    """Write family.md from the rows so far."""
    seeds = len({row["seed"] for row in rows.rows} - {TUNING_SEED})
    text = [
        "# The family",
        "",
        f"Held-out prompts of `sort`; ± 95 % over up to {seeds} seeds; in %, but for βΔ.",
        "",
    ]
    for section, (_, methods) in SECTIONS.items():
        columns = COLUMNS[section]
        body = []
        for method in methods:
            rate = tuned(section, method, rows)
            alike = rows.of(section=section, method=method, rate=rate)
            found = [row for row in alike if row["seed"] != TUNING_SEED]
            cells = [form([row[name] for row in found]) for name, (_, form) in columns.items()]
            body += [[method, *cells]] if found else []
        if body:
            head = ["", *(title for title, _ in columns.values())]
            text += [f"## {section}", "", markdown(head, body)]
            text += trials_of(section, rows)
    (rows.folder / "family.md").write_text("\n".join(text), encoding="utf-8")
