"""The environment of jobs/smollm2_tools_cpu.yaml: sums, by a calculator that has to be called rightly.

    python jobs/smollm2_tools_cpu.py                  # writes the data, in a second
    gvpo-ray train jobs/smollm2_tools_cpu.yaml

SmolLM2's chat template leaves tools out, so nothing tells the model of the calculator but three calls that
stand as earlier turns in each prompt.
"""

import json
import random
from pathlib import Path


class Sums:
    """Holds a sum, the row's `answer`, which the calculator has to have given in the last call."""

    def reset(self, answer: str, **row: object) -> None:
        self.answer, self.result = answer, ""

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: The first number.
            b: The second number.
        """
        self.result = str(a + b)
        return a + b

    def get_reward(self) -> float:
        return float(self.result == self.answer)


def row(rng: random.Random) -> dict[str, object]:
    """Return a sum after three others with their calls."""
    messages = []
    for _ in range(4):
        a, b = rng.randrange(100, 1000), rng.randrange(100, 1000)
        call = f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'
        messages += [
            {"role": "user", "content": f"What is {a} + {b}?"},
            {"role": "assistant", "content": call},
        ]
    return {"prompt": messages[:-1], "answer": str(a + b)}


def main(folder: Path = Path("runs/smollm2_tools/data")) -> None:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in (("train", 200), ("heldout", 40)):
        rows = [json.dumps(row(rng)) for _ in range(number)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
