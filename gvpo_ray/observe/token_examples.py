"""A run directory has the token log-probs of a few trained completions, by which its report colours tokens.

    RUN_DIR/tokens/step-000008.json     a list of TokenExample, made in the step before its updates

The learner writes the files of steps 1, 2, 4, 8, … and of the newest step with a checkpoint, so that a run of
any length keeps few.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator

from gvpo_ray.files import make_folder, write_whole, writing

FOLDER = "tokens"
KINDS = ("less likely", "more likely", "pushed down", "pushed up")
"""What a completion is an example of: it is less or more likely than when it was sampled, and the update
makes its tokens less or more likely."""
MAX_FIRST, MAX_LAST = 384, 128
"""The numbers of tokens of a longer completion that are kept from its beginning and from its end."""


class TokenExample(BaseModel):
    """A TokenExample is one completion with what the learner knew of each of its tokens.

    Its lists have one entry per kept token: the first MAX_FIRST and the last MAX_LAST, or all where these are
    not fewer. They have None for a token that the environment wrote, and for what is not finite.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kinds: list[str]
    """Those of KINDS of which it is the extreme example among what the writer trained in the step."""
    group_id: int
    completion: int
    """Its place among the trained completions of its group."""
    prompt: str
    answer: str
    source: str
    version_min: int | None
    version_max: int | None
    """The versions that sampled it, and None: no policy of this run."""
    num_tokens: int
    """The number of all of its tokens."""
    ids: list[int]
    policy: list[float | None]
    """log pi(y_t) of the policy that the step updates, in nats."""
    sampler: list[float | None] | None
    """log mu(y_t) of the policy that sampled it; None: not known."""
    reference: list[float | None] | None
    """log pi_ref(y_t); None: the learner knows the sum alone."""
    push: list[float | None]
    """-d loss / d log pi(y_t): above 0 the update makes the token more likely, below 0 less likely."""
    sampler_ratio: float | None
    """log pi(y|x) - log mu(y|x), the sum over all tokens."""
    reference_ratio: float | None
    """D = log pi(y|x) - log pi_ref(y|x)."""
    group_reference_ratio: float | None
    """The mean of D over the group."""
    reward: float
    group_reward: float
    """The mean reward of the group."""

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for values in (self.policy, self.sampler, self.reference, self.push):
            if values is not None and len(values) != len(self.ids):
                raise ValueError("a list of values is not as long as ids")
            if not all(value is None or math.isfinite(value) for value in values or ()):
                raise ValueError("a value is not finite")
        return self


FILE = TypeAdapter(list[TokenExample])


def stays(step: int) -> bool:
    """Return whether the examples of a step stay when there are newer ones: those of 1, 2, 4, 8, … do."""
    return step & (step - 1) == 0


def write_examples(run_dir: str | Path, step: int, examples: Sequence[TokenExample]) -> None:
    """Write a step's examples, and remove those of other steps that are not kept, or that came later.

    Raises:
        DiskFull: there is no room for them.
    """
    folder = Path(run_dir) / FOLDER
    with writing(folder):
        make_folder(folder)
        write_whole(folder / f"step-{step:06}.json", FILE.dump_json(list(examples)).decode())
    for other, file in example_files(run_dir):
        if other > step or (other < step and not stays(other)):
            file.unlink(missing_ok=True)


def example_files(run_dir: str | Path) -> list[tuple[int, Path]]:
    """Return the steps of a run that have examples, in their order, and the files."""
    files = (Path(run_dir) / FOLDER).glob("step-*.json")
    names = ((file.stem.removeprefix("step-"), file) for file in files)
    return sorted((int(digits), file) for digits, file in names if digits.isdecimal())


def read_examples(file: Path) -> list[TokenExample] | None:
    """Return the examples of a file; None where it is gone, or somebody has edited it."""
    try:
        return FILE.validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None
