"""The config section `verifiers` is in this file."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from gvpo_ray.config.base import DECIDES_SCORES, LocalPath, Resources, Section


class ReasonKind(StrEnum):
    """A ReasonKind is the limit that ended a check.

    A reason of a completion without a reward then begins with this word and a colon.
    """

    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASH = "crash"


class RewardConfig(Section):
    """A part of the reward is computed by a function, a server or a reward model.

    At most one of `function`, `url` and `model` may be set. Without any, the reward's name is the function.
    """

    weight: float = 1.0
    """Factor of this part in the weighted sum that is the reward."""
    function: Annotated[str | None, LocalPath("function")] = None
    """Name of the function: `math`, `exact_match`, `numeric`, `format`, `length`, `code`, `module:function`
    or `path.py:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function, such as {relative_tolerance: 0.01}; with `url`, further fields of
    every request."""
    trusted: bool = False
    """Run a user's function in the verifier itself and not in the sandbox: on whole groups at once, with
    network and files, and without any limit."""
    url: str | None = None
    """Address of a reward server: POST {prompts, completions, columns} answers {rewards}."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Time limit of one HTTP request in all, in seconds: retries, pauses that the server asks for and slow
    answers included."""
    num_retries: int = Field(default=3, ge=0)
    """Retries of a failed HTTP request within its time limit, with exponential back-off. A server that does
    not answer then is waited for, with all groups that need it."""
    batch_size: int = Field(default=32, ge=1)
    """Completions in one HTTP request or one forward pass of the reward model."""
    model: Annotated[str | None, LocalPath()] = None
    """Folder or hub name of a reward model: a Hugging Face sequence classifier with one output. It runs in
    actors of its own. A folder is, like that of `model.path`, on a file system that every node sees, and the
    driver, which reads its config.json before the start."""
    num: int = Field(default=1, ge=1)
    """Number of actors of the reward model."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that one actor of the reward model asks Ray for."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of one actor of the reward model; 0: run on CPU."""

    @property
    def is_elsewhere(self) -> bool:
        """Return whether the section says what computes it, so that the name is free."""
        return any((self.function, self.url, self.model))

    @model_validator(mode="after")
    def _one_kind(self) -> RewardConfig:
        kinds = [key for key in ("function", "url", "model") if getattr(self, key)]
        if len(kinds) > 1:
            raise ValueError(f"{kinds[0]} and {kinds[1]} exclude each other")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError("url must start with http:// or https://")  # not shown: it may hold a password
        return self


class VerifiersConfig(Section):
    """This section sets the reward functions, the verifiers that compute them, and the limits of a check."""

    num: int = Field(default=2, ge=1)
    """Number of verifier actors, spread over the nodes; each checks one group at a time. With max_num, the
    smallest number."""
    max_num: int | None = Field(default=None, ge=1)
    """Largest number of verifiers: there are more while every verifier has groups waiting, and fewer again
    afterwards. Default: num."""
    num_cpus: float = Field(default=0.1, ge=0)
    """CPUs that one verifier asks Ray for."""
    resources: Resources = {}
    """Custom Ray resources of one verifier."""
    rewards: dict[str, RewardConfig] = Field(
        default={"math": RewardConfig()}, json_schema_extra=DECIDES_SCORES
    )
    """Reward functions by name, each with its weight or a section. The name is `math`, `exact_match`,
    `numeric`, `format`, `length`, `code`, `module:function`, `path.py:function` or that of a callable
    passed from Python; it is free where the section has a function, url or model. The reward is the weighted
    sum. A completion is correct where the first function gives more than 0."""
    timeout_s: float = Field(default=10.0, gt=0, json_schema_extra=DECIDES_SCORES)
    """Wall-clock limit of one check, in seconds. A check that exceeds it is killed, and its completion has no
    reward (never 0); for `code` it is the limit of one test, and a program that exceeds it has 0."""
    cpu_s: int = Field(default=5, ge=1, json_schema_extra=DECIDES_SCORES)
    """CPU-time limit of one check, in whole seconds. Unlike wall-clock time, it does not depend on other load
    of the machine."""
    memory_gib: float = Field(default=2.0, gt=0, json_schema_extra=DECIDES_SCORES)
    """Memory, in GiB, that the process of the checks may allocate beyond its loaded functions."""
    max_checks: int = Field(default=10_000, ge=1)
    """Number of checks by built-in functions after which their process is replaced, because sympy's caches
    grow with each. A user's function has a new process for every check."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        """Expand `name: 0.5` to `name: {weight: 0.5}`, and set `function` where the name is `path.py:f`."""
        if not isinstance(value, dict) or not value:
            raise ValueError("name at least one reward function")
        for name, entry in value.items():
            if not isinstance(entry, (int, float, dict, RewardConfig)):
                raise ValueError(f"{name} must be a weight or a section (got {entry!r})")
        sections = {
            name: {"weight": entry} if isinstance(entry, (int, float)) else entry
            for name, entry in value.items()
        }
        return {
            name: {**entry, "function": name}
            if isinstance(entry, dict)
            and name.rpartition(":")[0].endswith(".py")
            and not any(entry.get(key) for key in ("function", "url", "model"))
            else entry
            for name, entry in sections.items()
        }

    @model_validator(mode="after")
    def _at_most(self) -> VerifiersConfig:
        if self.max_num is not None and self.max_num < self.num:
            raise ValueError(f"max_num ({self.max_num}) is less than num ({self.num})")
        return self
