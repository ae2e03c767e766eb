"""The environment of jobs/tools_cpu.yaml: a number from 1 to 7 is found with three questions to a tool.

    python jobs/tools_cpu.py                          # writes the data, in a second
    gvpo-ray train jobs/tools_cpu.yaml                # makes the model, then trains it

A class with `reset`, tools (public methods with types and a docstring) and `get_reward` is an environment;
TRL's `environment_factory` takes the same. It needs nothing of this project.
"""

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

MOST, QUESTIONS = 7, 3
PROMPT = f"Find the number from 1 to {MOST}."


class Search:
    """Holds a secret number, which is the row's `answer`; the policy is right once it has asked for it."""

    def reset(self, answer: str, **row: object) -> None:
        self.secret, self.is_found, self.num_asked = int(answer), False, 0

    def ask(self, n: int) -> str:
        """Compare the secret number with another one.

        Args:
            n: The other number.
        """
        if not isinstance(n, int):
            raise TypeError("n must be a number")
        self.num_asked += 1
        if self.num_asked > QUESTIONS:  # a turn may have several calls
            raise RuntimeError("no question is left")
        self.is_found = self.is_found or n == self.secret
        return "right" if n == self.secret else "less" if self.secret < n else "more"

    def get_reward(self) -> float:
        return float(self.is_found)


END = "<|endoftext|>"
"""The token that ends a turn of the model that the warm start makes."""
SLIP = 0.15
"""Probability that a call of the simulated hurried person is malformed."""


def worked(secret: int, rng: random.Random) -> str:
    """What a hurried person does, who asks at random, and forgets quotation marks or a brace now and then."""
    text = ""
    for _ in range(QUESTIONS):
        n, world = rng.randint(1, MOST), Search()
        world.reset(str(secret))
        call, said = f'{{"name": "ask", "arguments": {{"n": {n}}}}}', world.ask(n)
        if rng.random() < SLIP:
            call = rng.choice((call[:-1], call.replace('"n"', "n")))
            try:
                json.loads(call)
            except ValueError as error:
                said = f"Error: the tool call is not JSON: {error}"
        text += f"<tool_call>{call}</tool_call>{END}<tool_response>\n{said}\n</tool_response>\n"
        if said == "right":
            return text + "Done."
    return text


def main(folder: Path = Path("runs/tools/data")) -> None:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in (("train", 700), ("heldout", 210), ("worked", 8_000)):
        secrets = [i % MOST + 1 for i in range(size)]
        columns = {"prompt": [PROMPT] * size, "answer": [str(secret) for secret in secrets]}
        if name == "worked":
            columns["solution"] = [worked(secret, rng) for secret in secrets]
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
