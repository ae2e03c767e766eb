"""The config section `environment` is in this file."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from gvpo_ray.config.base import DECIDES_SCORES, RESUMABLE, TASKSET, LocalPath, Resources, Section

ENVIRONMENT = "environment"
"""Name in verifiers.rewards of what the environment's get_reward returns."""

BROKEN = "broken"
"""How an episode has ended (`end` in the column `episodes`) whose environment a tool call brought down."""


class EnvironmentConfig(Section):
    """With an environment, a completion is an episode of several turns, in which the policy talks to it."""

    name: Annotated[str | None, LocalPath("function")] = Field(default=None, json_schema_extra=DECIDES_SCORES)
    """The class, as `path.py:Class` or `module:Class`: `reset(**row)`, tools, `respond(message)` and
    `get_reward()` (environments/contract.py). Or a task set of the package verifiers, `verifiers:package` or
    `verifiers:path.py`, whose harness asks the model at an address, as an agent does: it needs engines.serve,
    and its tasks are the prompts."""
    agent: Annotated[str | None, LocalPath("function")] = Field(
        default=None, json_schema_extra=DECIDES_SCORES
    )
    """In place of `name`: a function that asks its model at an address, as `path.py:function` or
    `module:function`: `agent(base_url, api_key, model, **row)` returns a reward, None, or a text for
    verifiers.rewards. It needs engines.serve; max_turns bounds its calls of the model, and timeout_s its time
    between two of them."""
    arguments: dict[str, Any] = Field(default={}, json_schema_extra=DECIDES_SCORES)
    """Keyword arguments of the class; of a task set, the settings of its verifiers environment: `taskset`,
    `id`, and `agent` or what its seat is called (harness, runtime)."""
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
    max_text: int = Field(default=100_000, ge=100, json_schema_extra=DECIDES_SCORES)
    """Most characters that the policy reads of a turn's tools together (each has an equal part), of respond
    or of reset; of a longer text it reads the beginning, and that it is cut off."""
    timeout_s: float = Field(default=60.0, gt=0, json_schema_extra=DECIDES_SCORES)
    """Time limit, in seconds, of one call of a tool, of respond, reset or get_reward. For a tool that exceeds
    it the policy reads an error, and the episode goes on; where one of the others does, the episode ends
    without a reward (never 0)."""
    sandbox: bool = Field(default=False, json_schema_extra=DECIDES_SCORES)
    """Whether the episodes' processes are confined as programs in the sandbox are: no network, no other
    programs, no files but Python's own to read, and a folder of their own as the one place to write."""
    variables: list[str] = Field(default=[], json_schema_extra=RESUMABLE)
    """Names of environment variables that the class and its tools read. Of others they have PATH, HOME,
    TMPDIR, PYTHONPATH and those of the language and time zone alone."""
    renderer: str | None = Field(default=None, json_schema_extra=DECIDES_SCORES)
    """Model family whose tool calls and turns the package `renderers` knows, such as `qwen3`, `glm-4.5` or
    `llama-3`; default: the tokenizer's chat template, and tool calls as in Hermes and Qwen."""

    @field_validator("name")
    @classmethod
    def _is_class(cls, value: str | None) -> str | None:
        if value == TASKSET:
            raise ValueError("verifiers: names no task set: verifiers:package or verifiers:path.py")
        if value is not None and ":" not in value:
            raise ValueError(f"must be path.py:Class or module:Class (got {value!r})")
        return value

    @field_validator("agent")
    @classmethod
    def _is_function(cls, value: str | None) -> str | None:
        if value is not None and ":" not in value:
            raise ValueError("must be path.py:function or module:function")
        return value

    @model_validator(mode="after")
    def _one_of_both(self) -> EnvironmentConfig:
        if (self.name is None) == (self.agent is None):
            raise ValueError("name, the class of an environment, or agent, a function: one of the two")
        of_classes = {"max_text", "renderer", "sandbox", "variables"}
        if self.agent is not None:
            of_classes.add("arguments")
        # what a run writes down has all keys, those too that say nothing
        own = {key for key in of_classes if getattr(self, key) != type(self).model_fields[key].default}
        if self.asks_by_http and own:
            what = "an agent" if self.agent is not None else "a task set"
            raise ValueError(f"{min(own)} is of an environment's class, and {what} has none")
        return self

    @property
    def taskset(self) -> str | None:
        """Return what stands behind `verifiers:`; None: it is no task set of verifiers."""
        is_one = self.name is not None and self.name.startswith(TASKSET)
        return self.name.removeprefix(TASKSET) if is_one and self.name is not None else None

    @property
    def asks_by_http(self) -> bool:
        """Return whether the episodes drive, and ask the model at an address."""
        return self.agent is not None or self.taskset is not None
