"""The config section `environment`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from gvpo_ray.config.base import DECIDES_SCORES, RESUMABLE, LocalPath, Resources, Section

ENVIRONMENT = "environment"
"""Name in verifiers.rewards of what the environment's get_reward returns."""

BROKEN = "broken"
"""How an episode has ended (`end` in the column `episodes`) whose environment a tool call brought down."""


class EnvironmentConfig(Section):
    """What the policy talks to: with an environment, a completion is an episode of several turns."""

    name: Annotated[str, LocalPath("function")] = Field(json_schema_extra=DECIDES_SCORES)
    """The class, as `path.py:Class` or `module:Class`: `reset(**row)`, tools, `respond(message)` and
    `get_reward()` (environments/contract.py)."""
    arguments: dict[str, Any] = Field(default={}, json_schema_extra=DECIDES_SCORES)
    """Keyword arguments of the class."""
    num: int = Field(default=2, ge=1, json_schema_extra=RESUMABLE)
    """Number of environment actors, spread over the nodes; each holds many episodes at once."""
    num_cpus: float = Field(default=0.1, ge=0, json_schema_extra=RESUMABLE)
    """CPUs that one environment actor asks Ray for."""
    resources: Resources = Field(default={}, json_schema_extra=RESUMABLE)
    """Custom Ray resources of one environment actor."""
    max_turns: int = Field(default=8, ge=1, json_schema_extra=DECIDES_SCORES)
    """Most turns of the policy in an episode. sampling.max_tokens bounds the whole episode, with what tools
    and environment write."""
    max_calls: int = Field(default=16, ge=1, json_schema_extra=DECIDES_SCORES)
    """Most tool calls of a turn that are made. For each further one the policy reads an error."""
    timeout_s: float = Field(default=60.0, gt=0, json_schema_extra=DECIDES_SCORES)
    """Time limit, in seconds, of one call of a tool, of respond, reset or get_reward. For a tool that exceeds
    it the policy reads an error, and the episode goes on; where one of the others does, the episode ends
    without a reward (never 0)."""
    renderer: str | None = Field(default=None, json_schema_extra=DECIDES_SCORES)
    """Model family whose tool calls and turns the package `renderers` knows, such as `qwen3`, `glm-4.5` or
    `llama-3`; default: the tokenizer's chat template, and tool calls as in Hermes and Qwen."""

    @field_validator("name")
    @classmethod
    def _is_class(cls, value: str) -> str:
        if value.startswith("verifiers:"):
            raise ValueError("task sets of the package verifiers are not supported yet: path.py:Class")
        if ":" not in value:
            raise ValueError(f"must be path.py:Class or module:Class (got {value!r})")
        return value
