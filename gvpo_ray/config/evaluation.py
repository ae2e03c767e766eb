"""The config section `evaluation` is in this file."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from gvpo_ray.config.base import Section
from gvpo_ray.config.data import PromptsConfig


class EvaluationSet(PromptsConfig):
    """An evaluation set is a held-out data set; what it leaves out is set by the evaluation section."""

    num_samples: int | None = Field(default=None, ge=1)
    """Completions per prompt; default: as in the evaluation section."""
    temperature: float | None = Field(default=None, ge=0)
    """Sampling temperature; default: as in the evaluation section."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """Longest completion, in tokens (`max_tokens` is the longest prompt); default: as in the evaluation
    section."""


class EvaluationConfig(Section):
    """This section names held-out data sets, and says when they are evaluated and how they are sampled."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; the model is also evaluated before the first step and after the last. 0:
    only on request."""
    sets: dict[str, EvaluationSet] = {}
    """Held-out data sets by name. The metrics of each are named eval/<name>/pass@1 and so on. A set without
    template and system_prompt has those of prompts; a null that is written there says: neither."""
    num_samples: int = Field(default=1, ge=1)
    """Tries per prompt (n): completions, or episodes, of which an agent's branches are parts. pass@1 is the
    share of right ones."""
    pass_k: list[Annotated[int, Field(ge=1)]] = [1, 2, 4, 8, 16, 32, 64]
    """Values of k for which the unbiased pass@k is reported, as far as k is at most num_samples."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature. 0 is greedy decoding, which allows one sample only."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest completion, in tokens; default: as in sampling."""
    every_limit: int | None = Field(default=None, ge=1)
    """Prompts per set in the evaluations during training; the first and the last use the whole set."""

    @field_validator("sets")
    @classmethod
    def _names(cls, value: dict[str, EvaluationSet]) -> dict[str, EvaluationSet]:
        for name in value:
            if not re.fullmatch(r"[\w@+-][\w@+.-]*", name):
                raise ValueError(
                    f"the name {name!r} becomes a folder's: letters, digits and any of . _ - + @ (not . at "
                    "its start)"
                )
        return value

    def of(self, name: str) -> tuple[int, float, int | None]:
        """Return (num_samples, temperature, max_tokens) of a set; max_tokens None: as in sampling."""
        own = self.sets[name]
        return (
            self.num_samples if own.num_samples is None else own.num_samples,
            self.temperature if own.temperature is None else own.temperature,
            self.max_tokens if own.max_completion_tokens is None else own.max_completion_tokens,
        )

    @model_validator(mode="after")
    def _greedy_once(self) -> EvaluationConfig:
        for name in self.sets:
            num_samples, temperature, _ = self.of(name)
            if temperature == 0 and num_samples > 1:
                raise ValueError(
                    f"{name} has temperature 0 (greedy): all of its {num_samples} samples would be the "
                    "same; use num_samples: 1"
                )
        return self
