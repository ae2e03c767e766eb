"""The section `verifiers`."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from gvpo_ray.config.base import DECIDES_SCORES, LocalPath, Resources, Section


class ReasonKind(StrEnum):
    """Which limit ended a check. The reason of a completion without a reward then begins with it and a
    colon.
    """

    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASH = "crash"


class RewardConfig(Section):
    """One part of the reward. At most one of `function`, `url` and `model`; without any, the reward's name
    says which function it is.
    """

    weight: float = 1.0
    """Factor of this part in the sum that is the reward."""
    function: Annotated[str | None, LocalPath("function")] = None
    """`math`, `exact_match`, `numeric`, `format`, `length`, `module:function` or `path.py:function`."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the function, such as {relative_tolerance: 0.01}; fields of every request where
    there is a url."""
    trusted: bool = False
    """Run a user's function in the verifier itself, whole groups at once: with network and files, and without
    any limit."""
    url: str | None = None
    """A reward served over HTTP: POST {prompts, completions, columns} -> {rewards}."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Time limit of one HTTP request, in seconds."""
    num_retries: int = Field(default=3, ge=0)
    """Retries of a failed HTTP request, with exponential back-off."""
    batch_size: int = Field(default=32, ge=1)
    """Completions in one HTTP request or one forward pass of the reward model."""
    model: Annotated[str | None, LocalPath()] = None
    """A reward model: a Hugging Face sequence classifier with one output, a folder or hub name, in actors of
    its own."""
    num: int = Field(default=1, ge=1)
    """Actors of the reward model."""
    num_cpus: float = Field(default=1, ge=0)
    """CPUs that one of them asks Ray for."""
    num_gpus: float = Field(default=0, ge=0)
    """GPUs of one of them; 0: on CPU."""

    @model_validator(mode="after")
    def _one_kind(self) -> RewardConfig:
        kinds = [key for key in ("function", "url", "model") if getattr(self, key)]
        if len(kinds) > 1:
            raise ValueError(f"{kinds[0]} and {kinds[1]} exclude each other")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must start with http:// or https:// (got {self.url!r})")
        return self


class VerifiersConfig(Section):
    num: int = Field(default=2, ge=1)
    """Verifier actors, spread over the nodes; each checks one group at a time. The fewest, where max_num says
    more."""
    max_num: int | None = Field(default=None, ge=1)
    """Grow to so many while every verifier has groups waiting, and shrink again; default: num."""
    num_cpus: float = Field(default=0.1, ge=0)
    """CPUs that one verifier asks Ray for."""
    resources: Resources = {}
    """Custom Ray resources of one verifier."""
    rewards: dict[str, RewardConfig] = Field(
        default={"math": RewardConfig()}, json_schema_extra=DECIDES_SCORES
    )
    """Reward functions: `name: weight`, or a section. The name is `math`, `exact_match`, `numeric`, `format`,
    `length`, `module:function`, `path.py:function`, that of a callable passed from Python, or free where the
    section says what it is. The reward is the weighted sum; the first one named says whether a completion is
    correct (> 0)."""
    timeout_s: float = Field(default=10.0, gt=0, json_schema_extra=DECIDES_SCORES)
    """Wall-clock limit of one check; past it the child that runs it is killed and the completion has no
    reward (never 0)."""
    cpu_s: int = Field(default=5, ge=1, json_schema_extra=DECIDES_SCORES)
    """CPU-time limit of one check, in whole seconds; the verdict does not depend on what else the machine
    does."""
    memory_gib: float = Field(default=2.0, gt=0, json_schema_extra=DECIDES_SCORES)
    """What the child that runs the checks may allocate beside its loaded functions."""
    max_checks: int = Field(default=10_000, ge=1)
    """Checks after which a child is replaced: what sympy caches does not pile up."""

    @field_validator("rewards", mode="before")
    @classmethod
    def _weights(cls, value: Any) -> Any:
        """`name: 0.5` is short for `name: {weight: 0.5}`; a name such as `path.py:f` is its `function`."""
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
