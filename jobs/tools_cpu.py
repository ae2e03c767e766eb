"""The environment of jobs/tools_cpu.yaml: a trail of three boxes, each of which says where the next one is.

    python jobs/tools_cpu.py                          # writes the data, in a second
    gvpo-ray train jobs/tools_cpu.yaml                # makes the model, then trains it

A class with `reset`, tools (public methods with types and a docstring) and `get_reward` is an environment;
TRL's `environment_factory` takes the same. It needs nothing of this project.
"""

import itertools
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

BOXES, LENGTH = 9, 3


class Trail:
    """Holds a trail, the row's `answer`; each box on it has to be opened, and there is no try to spare."""

    def reset(self, answer: str, **row: object) -> None:
        self.trail = [int(n) for n in answer.split()]
        self.num_found = self.num_opened = 0

    def open(self, n: int) -> str:
        """Open a box.

        Args:
            n: The number of the box.
        """
        if not isinstance(n, int):
            raise TypeError("n must be a number")
        self.num_opened += 1
        if self.num_opened > LENGTH:  # a turn may have several calls
            raise RuntimeError("no box is opened any more")
        if n != self.trail[self.num_found]:
            return "empty"
        self.num_found += 1
        return "treasure" if self.num_found == LENGTH else f"go to {self.trail[self.num_found]}"

    def get_reward(self) -> float:
        return float(self.num_found == LENGTH)


END = "<|endoftext|>"
"""The token that ends a turn of the model that the warm start makes."""
CARE, SLIP = 0.7, 0.1
"""Probabilities that a hurried person opens the box that was said, and that a call is malformed."""


def worked(answer: str, rng: random.Random) -> str:
    """What a hurried person does, who opens any box now and then, and forgets a brace."""
    text, world = "", Trail()
    world.reset(answer)
    for _ in range(LENGTH):
        n = world.trail[world.num_found] if rng.random() < CARE else rng.randint(1, BOXES)
        call = f'{{"name": "open", "arguments": {{"n": {n}}}}}'
        if rng.random() < SLIP:
            call = call[:-1]
        try:
            said = world.open(json.loads(call)["arguments"]["n"])
        except ValueError as error:
            said = f"Error: the tool call is not JSON: {error}"
        text += f"<tool_call>{call}</tool_call>{END}<tool_response>\n{said}\n</tool_response>\n"
        if said == "treasure":
            return text + "Done."
    return text


def trails() -> tuple[list[str], list[str]]:
    """Return those that are trained, 400, and those that are held out, 104."""
    every = [" ".join(map(str, trail)) for trail in itertools.permutations(range(1, BOXES + 1), LENGTH)]
    random.Random(0).shuffle(every)
    return every[104:], every[:104]


def main(folder: Path = Path("runs/tools/data")) -> None:
    rng = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    train, held_out = trails()
    for name, answers in (("train", train), ("heldout", held_out), ("worked", train * 20)):
        prompts = [f"The trail begins at box {answer[0]}." for answer in answers]
        columns = {"prompt": prompts, "answer": answers}
        if name == "worked":
            columns["solution"] = [worked(answer, rng) for answer in answers]
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
