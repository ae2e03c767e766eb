"""The layouts of other systems' data sets: which columns hold the prompt and the gold.

`prompts.layout` names one; without it, a known layout is found by its columns. A layout is one line here.
"""

from __future__ import annotations

from typing import NamedTuple

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.columns import has, paths, sample
from gvpo_ray.data.files import Columns
from gvpo_ray.data.messages import as_messages, is_messages, split_answer

LAST = "the assistant's last message"
"""The place of a gold that is the last message of the prompt's own list."""


class Layout(NamedTuple):
    """A layout says where a data set holds prompt and gold: paths, of which the first one there is read."""

    prompts: tuple[str, ...]
    golds: tuple[str, ...]
    """Paths, or LAST."""
    marks: tuple[str, ...] = ()
    """Paths of which one must be there for the layout to be recognised, if not `golds` alone tell."""


LAYOUTS = {
    "plain": Layout(("prompt",), ("answer",)),
    "skyrl": Layout(("prompt",), ("reward_spec.ground_truth", "reward_model.ground_truth"), ("env_class",)),
    "verl": Layout(("prompt",), ("reward_model.ground_truth",)),
    "nemo_gym": Layout(
        ("responses_create_params.input",), ("expected_answer", "ground_truth", "answer", "verifier_metadata")
    ),
    "openrlhf": Layout(("input", "context_messages"), ("label", "answer")),
    "slime": Layout(("prompt", "text"), ("label",)),
    "areal": Layout(("prompt", "messages"), ("solutions",)),
    "trl": Layout(("prompt",), ("ground_truth", "solution", "answer")),
    "rlvr": Layout(("messages",), ("ground_truth", "answer", "expected_answer")),
    "deepscaler": Layout(("problem",), ("answer", "expected_answer", "solution")),
    "gsm8k": Layout(("question",), ("answer",)),
    "olympiadbench": Layout(("question",), ("final_answer", "final_answers", "ground_truth")),
    "orz": Layout(
        ("messages", "conversations"),
        ("messages[-1].ground_truth.value", "conversations[-1].ground_truth.value"),
    ),
    "nemo": Layout(("messages", "input", "problem"), ("expected_answer", "output", LAST)),
    "sharegpt": Layout(("conversations",), (LAST,)),
}
"""By the values of prompts.layout; a layout above another is recognised first."""


class Found(NamedTuple):
    """What was found out about a data set's columns."""

    prompt: str
    """Path of the prompt, or a template over columns."""
    gold: str
    """Path of the gold, or LAST; "": the data has none."""
    layout: str
    """Name of the layout that said one of them; "": the config said both, or they are `prompt`, `answer`."""

    def description(self) -> str:
        """Return what a person should read of it; "" where the config said it all."""
        gold = f"the gold is {self.gold}" if self.gold else "no gold"
        return f"layout {self.layout}: the prompt is {self.prompt}, {gold}" if self.layout else ""


def columns_of(config: PromptsConfig, data: Columns, key: str) -> Found:
    """Return where a data set holds prompt and gold.

    The keys prompt_column and answer_column of the config hold first, then its layout, then a layout that
    the columns fit, then `prompt` and `answer`.

    Raises:
        ConfigError: the data does not have what the config's layout says.
    """
    prompt, gold = config.prompt_column, config.answer_column
    if prompt is not None and gold is not None:
        return Found(prompt, gold, "")
    rows = sample(data)
    if config.layout is not None:
        layout = LAYOUTS[config.layout]
        prompts, answers = ([p for p in tried if _is_there(rows, layout, p)] for tried in layout[:2])
        if (prompt is None and not prompts) or (gold is None and not answers):
            what, tried = (
                ("prompt", layout.prompts) if prompt is None and not prompts else ("gold", layout.golds)
            )
            raise ConfigError(
                f"{key}.layout: {config.layout} has the {what} in {' or '.join(tried)}, and "
                f"{config.path} has {', '.join(paths(rows)[:20])}"
            )
        return Found(prompt or prompts[0], answers[0] if gold is None else gold, config.layout)
    for name, layout in LAYOUTS.items():
        prompts, answers = ([p for p in tried if _is_there(rows, layout, p)] for tried in layout[:2])
        is_plain = name == "plain"
        if (
            (not layout.marks or any(has(rows, mark) for mark in layout.marks))
            and (prompts if prompt is None else is_plain or prompt in layout.prompts)
            and (answers if gold is None else True)
        ):
            return Found(prompt or prompts[0], answers[0] if gold is None else gold, "" if is_plain else name)
    return Found("prompt" if prompt is None else prompt, "answer" if gold is None else gold, "")


def _is_there(rows: list[dict[str, object]], layout: Layout, path: str) -> bool:
    if path != LAST:
        return has(rows, path)
    for prompt in layout.prompts:
        lists = [row[prompt] for row in rows if is_messages(row.get(prompt))]
        if lists:
            return split_answer(as_messages(lists[0], prompt))[1] is not None
    return False
