"""The data of the jobs of one objective each: sft_cpu.yaml, dpo_cpu.yaml and so on.

    python jobs/family_cpu.py                         # in some seconds
    gvpo-ray train jobs/sft_cpu.yaml                  # makes the model that the others begin with

All is the task `sort`: the digits of a number in order. A person in a hurry, whom the warm start imitates,
writes a digit that comes twice only once; a careful one's answers are right (careful.jsonl). Of four hurried
answers the one with most digits in their place is preferred to those with fewer (pairs.jsonl). In noisy.jsonl
two answers of three are right, and the third is another number's.
"""

import json
import random
from pathlib import Path

from gvpo_ray.data import tasks
from gvpo_ray.verifiers.rewards import in_place

NUM_CAREFUL, NUM_SCORED, NUM_NOISY = 3_000, 2_000, 6_000


def main(folder: Path = Path("runs/family/data")) -> None:
    rng = random.Random(0)
    if not folder.exists():
        tasks.make("sort", folder)
    train, _ = tasks.split(tasks.sort(random.Random(0)), random.Random(0))
    right = [{"prompt": p.prompt, "completion": boxed(p.answer)} for p in rng.sample(train, NUM_CAREFUL)]
    write(folder / "careful.jsonl", right)
    scored = [(problem, several(problem, rng)) for problem in rng.choices(train, k=NUM_SCORED)]
    rows = [
        {
            "prompt": p.prompt,
            "completions": texts,
            "scores": in_place([], texts, answer=[p.answer] * len(texts)),
        }
        for p, texts in scored
    ]
    write(folder / "pairs.jsonl", filter(None, map(preference, rows)))
    noisy = []
    for i, problem in enumerate(rng.choices(train, k=NUM_NOISY)):
        of = problem if i % 3 else rng.choice(train)
        noisy.append({"prompt": problem.prompt, "completion": boxed(of.answer), "is_noise": i % 3 == 0})
    write(folder / "noisy.jsonl", noisy)
    print(f"wrote {folder}")


def boxed(answer: str) -> str:
    return rf"\boxed{{{answer}}}"


def several(problem: tasks.Problem, rng: random.Random) -> list[str]:
    """Four answers to a problem, no two alike: two digits of some are swapped."""
    texts: dict[str, None] = {}
    while len(texts) < 4:
        digits = list(problem.solve(rng)[7:-1])
        if rng.random() < 0.5:
            i, j = rng.sample(range(len(digits)), 2) if len(digits) > 1 else (0, 0)
            digits[i], digits[j] = digits[j], digits[i]
        texts[boxed("".join(digits))] = None
    return list(texts)


def preference(row: dict) -> dict | None:
    """The best of a row's completions above those that have less; None where none has."""
    best = max(row["scores"])
    chosen = row["completions"][row["scores"].index(best)]
    worse = [text for text, score in zip(row["completions"], row["scores"], strict=True) if score < best]
    return {"prompt": row["prompt"], "chosen": chosen, "rejected": worse} if worse else None


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
