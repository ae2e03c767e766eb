"""Layouts say which columns of other systems' data sets hold the prompt and the gold.

`prompts.layout` names one; without it, a known layout is found by its columns. A layout is one line here.
"""

from __future__ import annotations

from typing import NamedTuple

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.columns import column_of, fields, has, paths, present, sample
from gvpo_ray.data.files import Columns
from gvpo_ray.data.messages import ends_with_answer

LAST = "the assistant's last message"
"""The place of a gold that is the last message of the prompt's own list."""

VERDICT = "label"
"""A column that is a gold in some layouts, and in others says whether a completion is good. Where it is only
true or false, it is taken for a gold if the config says so, and not by itself."""


class Layout(NamedTuple):
    """A layout says where a data set holds prompt and gold: paths, of which the first one there is read.

    A file that several layouts fit is read alike by all of them, or one of them has a mark or a lack that the
    others have not (tests/test_layouts.py has each file of each layout).
    """

    prompts: tuple[str, ...]
    """Paths, or templates over columns."""
    golds: tuple[str, ...]
    """Paths, or LAST."""
    marks: tuple[str, ...] = ()
    """Paths of which one must be there for the layout to be recognised, if not `golds` alone tell."""
    lacks: tuple[str, ...] = ()
    """Columns of other layouts, with any of which this one is not recognised."""


LAYOUTS = {
    "plain": Layout(("prompt",), ("answer",), lacks=("reward_model", "reward_spec")),
    "skyrl": Layout(
        ("prompt",), ("reward_spec.ground_truth", "reward_model.ground_truth"), ("env_class", "reward_spec")
    ),
    "verl": Layout(("prompt",), ("reward_model.ground_truth",)),
    "nemo_gym": Layout(
        ("responses_create_params.input",), ("expected_answer", "ground_truth", "answer", "verifier_metadata")
    ),
    "openrlhf": Layout(("input", "context_messages"), (VERDICT, "answer"), lacks=("instruction",)),
    "slime": Layout(("prompt", "text"), (VERDICT,)),
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
    "alpaca": Layout(("{instruction}\n\n{input}", "instruction"), ("output",)),
    "nemo": Layout(
        ("messages", "input", "problem"), ("expected_answer", "output", LAST), lacks=("instruction",)
    ),
    "sharegpt": Layout(("conversations",), (LAST,)),
}
"""By the values of prompts.layout; a layout above another is recognised first."""


class Found(NamedTuple):
    """A Found is what was found out about a data set's columns."""

    prompt: str
    """Path of the prompt, or a template over columns."""
    gold: str
    """Path of the gold, or LAST; "": the data has none."""
    layout: str
    """Name of the layout that said one of them; "": the config said both, or they are `prompt`, `answer`."""
    is_json: bool = False
    """Whether the prompts are messages that the data hold as JSON text."""
    not_gold: tuple[str, ...] = ()
    """Places of golds in other layouts, which these data have beside the gold that nobody named."""

    def description(self) -> str:
        """Return what a person should read of it; "" where the config said it all."""
        prompt = " ".join(self.prompt.split()) + (" (messages in JSON text)" if self.is_json else "")
        if not self.layout and not self.not_gold:
            return f"the prompt is {prompt}" if self.is_json else ""
        gold = f"the gold is {self.gold}" if self.gold else "no gold"
        others = f", and not {' or '.join(self.not_gold)}" if self.not_gold else ""
        return f"layout {self.layout or 'plain'}: the prompt is {prompt}, {gold}{others}"


def columns_of(config: PromptsConfig, data: Columns, key: str) -> Found:
    """Return where a data set holds prompt and gold.

    The keys prompt_column and answer_column of the config hold first, then its layout, then a layout that
    the columns fit, then `prompt` and `answer`.

    Raises:
        ConfigError: the data does not have what the config's layout says, or may have it and does not show.
    """
    prompt, gold = config.prompt_column, config.answer_column
    if prompt is not None and gold is not None:
        return Found(prompt, gold, "")
    if config.layout is not None:
        layout = LAYOUTS[config.layout]
        prompts, golds = _places(data, layout)
        if (prompt is None and not prompts) or (gold is None and not golds):
            what, tried = (
                ("prompt", layout.prompts) if prompt is None and not prompts else ("gold", layout.golds)
            )
            shown = " or ".join(" ".join(place.split()) for place in tried)
            raise ConfigError(
                f"{key}.layout: {config.layout} has the {what} in {shown}, and {config.path} has "
                f"{', '.join(paths(sample(data))[:20])}"
            )
        return Found(prompt or prompts[0], golds[0] if gold is None else gold, config.layout)
    are_verdicts = has(data, VERDICT) and all(isinstance(value, bool) for value in present(data, VERDICT))
    for name, layout in LAYOUTS.items():
        prompts, golds = _places(data, layout)
        golds = [place for place in golds if not (place == VERDICT and are_verdicts)]
        is_plain = name == "plain"
        if (
            (not layout.marks or any(has(data, mark) for mark in layout.marks))
            and not any(column in data for column in layout.lacks)
            and (prompts if prompt is None else is_plain or _reads(prompt, layout, data))
            and (golds if gold is None else True)
        ):
            others = _other_golds(data, golds[0], are_verdicts) if gold is None and is_plain else ()
            found = Found(prompt or prompts[0], golds[0] if gold is None else gold, "" if is_plain else name)
            return found._replace(not_gold=others)
    if gold is None and are_verdicts and "answer" not in data:
        raise ConfigError(
            f"{key}.answer_column: {config.path} has no column 'answer', and its {VERDICT} is true or false, "
            "which may say whether a completion is good: name it here if it is the gold answer"
        )
    return Found("prompt" if prompt is None else prompt, "answer" if gold is None else gold, "")


def _other_golds(data: Columns, gold: str, are_verdicts: bool) -> tuple[str, ...]:
    """Return the columns of a data set that are the gold of some layout, beside the one that is taken."""
    places = dict.fromkeys(place for layout in LAYOUTS.values() for place in layout.golds if place != LAST)
    return tuple(
        place
        for place in places
        if place in data and place != gold and not (place == VERDICT and are_verdicts)
    )


def _places(data: Columns, layout: Layout) -> tuple[list[str], list[str]]:
    """Return the places of prompts and of golds of a layout that a data set has."""
    prompts = [place for place in layout.prompts if all(has(data, path) for path in _paths(place))]
    return prompts, [
        place
        for place in layout.golds
        if (
            any(ends_with_answer(value) for prompt in layout.prompts for value in present(data, prompt))
            if place == LAST
            else has(data, place)
        )
    ]


def _reads(prompt: str, layout: Layout, data: Columns) -> bool:
    """Return whether a prompt column or template of the config reads a column that is a layout's prompt."""
    own = {column_of(data, path) for place in layout.prompts for path in _paths(place)} - {None}
    return any(column_of(data, path) in own for path in _paths(prompt))


def _paths(place: str) -> list[str]:
    """Return the paths in a template over columns; a place that is none is a path itself."""
    return fields(place) or [place]
