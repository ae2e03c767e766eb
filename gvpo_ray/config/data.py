"""The config sections `prompts`, `sources` and `replay` name the data that a run trains on."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from gvpo_ray.config.base import LocalPath, Section

DataLayout = Literal[
    "plain",
    "verl",
    "skyrl",
    "trl",
    "openrlhf",
    "slime",
    "areal",
    "nemo",
    "nemo_gym",
    "orz",
    "deepscaler",
    "alpaca",
    "gsm8k",
    "olympiadbench",
    "rlvr",
    "sharegpt",
]
"""Names of the layouts of data/layouts.py."""

Data = TypeVar("Data", bound="PromptsConfig")


class PromptsConfig(Section):
    """This section names a data set of prompts and reference answers, and says how a prompt is rendered."""

    path: Annotated[str | list[str], LocalPath()]
    """A file (Parquet, JSON, CSV, Arrow; text also compressed), a folder, a glob such as data/*.parquet, the
    name of a Hugging Face data set, or a list of these. Or a task set of the package verifiers:
    verifiers:package, or verifiers:path.py."""
    taskset: dict[str, Any] = {}
    """Settings of a task set of verifiers; default: those in environment.arguments."""
    split: str = "train"
    """Split, where the data has splits; refused where it has none. It may end in a slice of rows:
    train[:1000], train[10%:20%]."""
    subset: str | None = None
    """Configuration name of a Hugging Face data set ("main" for openai/gsm8k)."""
    layout: DataLayout | None = None
    """Layout of the data, by the system that it was made for; it says what the column keys leave open.
    Default: found by the columns, and said when the run starts."""
    prompt_column: str | None = None
    """Column of the problem: text, or a list of messages. It may be a path, such as messages[0].content, or a
    template over columns, such as "{question}\\nA. {choices[0]}". Default: the layout's, else prompt."""
    answer_column: str | None = None
    """Column of the reference answer: text, a number, a boolean or a list of these. It may be a path, such as
    reward_model.ground_truth. "": the data has no answers. Default: the layout's, else answer."""
    answer_match: Literal["any", "all"] = "any"
    """Where the reference answer is a list: whether a completion must match any or all of its entries."""
    template: str | None = None
    """Plain template such as "Question: {prompt}\\nAnswer:"; default: the tokenizer's chat template."""
    system_prompt: str | None = None
    """System message for the chat template, for prompts that have none of their own; a template is
    the whole prompt, and has none beside it."""
    template_arguments: dict[str, Any] = {}
    """Further arguments of the tokenizer's chat template, such as {enable_thinking: false}; a template has
    none beside it."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt, in tokens. Longer ones are left out, counted and reported, never cut. Default: the
    context less the longest completion."""
    limit: int | None = Field(default=None, ge=1)
    """Number of rows to use, from the first on; default: all."""
    shuffle: bool = True
    """Visit the rows in a new order in each epoch, fixed by the seed. Evaluations keep the file's order."""

    @field_validator("path")
    @classmethod
    def _has_a_path(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not all(value or [""]):
            raise ValueError("is empty: name a file, a folder, a glob or a data set")
        return value

    @field_validator("template")
    @classmethod
    def _template_has_prompt(cls, value: str | None) -> str | None:
        if value is not None and "{prompt}" not in value:
            raise ValueError("must contain {prompt}")
        return value

    @model_validator(mode="after")
    def _one_rendering(self) -> PromptsConfig:
        if self.template is not None and self.system_prompt is not None:
            raise ValueError(
                "system_prompt is not used beside a template, which is the whole prompt: write it into the "
                "template"
            )
        if self.template is not None and self.template_arguments:
            raise ValueError(
                "template_arguments are not used beside a template: they are those of the tokenizer's chat "
                "template"
            )
        if self.layout is not None and self.prompt_column is not None and self.answer_column is not None:
            raise ValueError("layout is not used where prompt_column and answer_column say all of it")
        return self

    def of_taskset(self: Data, settings: dict[str, Any]) -> Data:
        """Return a copy with these settings where it has none; a task set scores its tasks itself."""
        answer = {} if "answer_column" in self.model_fields_set else {"answer_column": ""}
        return self.model_copy(update={"taskset": {**settings, **self.taskset}, **answer})

    def rendered_like(self: Data, other: PromptsConfig, key: str) -> Data:
        """Return a copy that is rendered as `other` is, as far as it does not say itself how.

        A null that is written in the file is set too: the tokenizer's chat template without a system prompt.

        Raises:
            ValueError: it has arguments for a chat template, and takes another's template; `key` names it.
        """
        own = {"template", "system_prompt"}
        taken = set() if own & self.model_fields_set else own
        template = other.template if taken else self.template
        if template is not None and self.template_arguments:
            raise ValueError(
                f"{key}.template_arguments are not used beside the template of prompts; {key}.template: null "
                "is the tokenizer's chat template"
            )
        if template is None and "template_arguments" not in self.model_fields_set:
            taken = taken | {"template_arguments"}
        return self.model_copy(update={name: getattr(other, name) for name in taken})


class ReplayConfig(Section):
    """With replay, completions that the policy wrote earlier to the same prompt take the place of new ones.

    The paper's Figure 4 varies historical to current completions from 0:8 to 4:4. The log holds replayed
    completions with their log-probs, so they are trained like any others.
    """

    share: float = Field(default=0.0, ge=0, lt=1)
    """Share of each group's completions that are replayed, as far as the log has that many; the newest
    first."""
    window: int | None = Field(default=None, ge=1)
    """Number of the last steps whose completions may be replayed; default: all steps of the run."""


class SourceConfig(PromptsConfig):
    """An offline source holds completions from people, other models or logs.

    The file is Parquet or JSONL, with a prompt, a completion, and a reward or an answer in each row.
    """

    completion_column: str = "completion"
    """Column that holds the completion's text."""
    reward_column: str | None = None
    """Column that holds the reward, a number. Without it, the completions are verified, which needs
    answer_column."""
    share: float = Field(default=0.0, ge=0, lt=1)
    """Share of each group's completions that come from the source, where it has some for the prompt."""
    group_share: float = Field(default=0.0, ge=0, le=1)
    """Share of all groups that come from the source alone: one of its prompts and its completions."""

    @model_validator(mode="after")
    def _one_way(self) -> SourceConfig:
        if (self.share > 0) == (self.group_share > 0):
            raise ValueError("say either share (of each group's completions) or group_share (of all groups)")
        return self


NO_PROMPTS = "(none)"
"""The value of prompts.path where a config has no `prompts`: an evaluation, or offline sources alone."""
