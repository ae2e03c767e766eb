"""The sections `prompts`, `sources` and `replay`: what is trained on."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator, model_validator

from gvpo_ray.config.base import LocalPath, Section


class PromptsConfig(Section):
    path: Annotated[str, LocalPath()]
    """A Parquet or JSONL file, or the name of a Hugging Face data set."""
    split: str = "train"
    """Split of a Hugging Face data set; files have none."""
    subset: str | None = None
    """Configuration name of a Hugging Face data set ("main" for openai/gsm8k)."""
    prompt_column: str = "prompt"
    """Column of the problem's text."""
    answer_column: str = "answer"
    """Column of the reference answer, as text."""
    template: str | None = None
    """Plain template such as "Question: {prompt}\\nAnswer:"; default: the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message for the chat template."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longer prompts are left out, counted and reported (never cut). Default: what the context leaves beside
    a completion."""
    limit: int | None = Field(default=None, ge=1)
    """Use the first so many rows."""
    shuffle: bool = True
    """A new order, fixed by the seed, in each epoch. Evaluation always keeps the file's order."""

    @field_validator("template")
    @classmethod
    def _template_has_prompt(cls, value: str | None) -> str | None:
        if value is not None and "{prompt}" not in value:
            raise ValueError("must contain {prompt}")
        return value


class ReplayConfig(Section):
    """Completions of the same prompt that the policy wrote earlier, in place of new ones (paper, Figure 4:
    historical to current from 0:8 to 4:4). They are in the log with their log-probs, and so are data like any
    other."""

    share: float = Field(default=0.0, ge=0, lt=1)
    """Of each group's completions, as far as the log has that many; the newest first."""
    window: int | None = Field(default=None, ge=1)
    """Only completions of the last so many steps; default: of the whole run."""


class SourceConfig(PromptsConfig):
    """Completions from elsewhere: Parquet or JSONL of (prompt, completion, and reward or answer), from
    people, other models or logs.
    """

    completion_column: str = "completion"
    """Column of the completion's text."""
    reward_column: str | None = None
    """A number per row; without it the completions are verified, for which answer_column must be there."""
    share: float = Field(default=0.0, ge=0, lt=1)
    """Share of each group's completions that the source gives, where it has some for the prompt."""
    group_share: float = Field(default=0.0, ge=0, le=1)
    """Share of all groups that consist of one prompt of the file and its completions alone."""

    @model_validator(mode="after")
    def _one_way(self) -> SourceConfig:
        if (self.share > 0) == (self.group_share > 0):
            raise ValueError("say either share (of each group's completions) or group_share (of all groups)")
        return self


NO_PROMPTS = "(none)"
"""prompts.path of a file without `prompts`: for evaluations, and where offline sources are all there is."""
