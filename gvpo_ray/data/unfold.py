"""A row that holds a preference or a whole conversation becomes rows of one completion each.

    prompt, chosen, rejected       TRL's preference with its prompt; each is a text or a list of messages, and
                                   rejected may be a list of several
    chosen, rejected               the same with the prompt in both: what they have in common at the beginning
    prompt, completions, scores    several completions with a number each, as in UltraFeedback
    messages                       a conversation, for objectives that imitate: the prompt is what comes
                                   before the assistant's first turn

What one row becomes is a group by itself: chosen has the reward 1, rejected 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import SourceConfig
from gvpo_ray.config.loss import LossOptions
from gvpo_ray.data.files import Columns, to_list
from gvpo_ray.data.messages import Message, as_messages, from_json, is_messages, of_assistant

CONVERSATIONS = ("messages", "conversations")
"""Names of columns with whole conversations."""


@dataclass(frozen=True)
class Unfolded:
    """An Unfolded holds rows of one completion each, and what they were made from."""

    data: Columns
    """The columns prompt, completion and `reward_column`."""
    reward_column: str
    """The column of the rewards; null: the data have none."""
    rows: list[int]
    """The row of the data, from 0, that each one was a part of."""
    note: str
    """A line that a person should read of it before a run."""


Completion = tuple[Any, Any, Any]
"""A prompt, a completion (both a text or a list of messages) and a reward or None."""


def unfold(data: Columns, config: SourceConfig, key: str, loss: LossOptions) -> Unfolded | None:
    """Return the rows of one completion each; None: the data have these already.

    The columns tell, where neither `completion_column` nor the layout of the config does.

    Args:
        data: the columns of the data set.
        config: the section of the source.
        key: where the section stands in the config, for messages.
        loss: the objective.

    Raises:
        ConfigError: one line that names the row and the column.
    """
    if config.completion_column in data or "completion_column" in config.model_fields_set:
        return None
    prompt = config.prompt_column or "prompt"
    conversation = next((name for name in CONVERSATIONS if name in data), "")
    read: Callable[[dict[str, Any], str], list[Completion]]
    if {"chosen", "rejected"} <= data.keys():
        taken, note = {prompt, "chosen", "rejected"}, "preferences: chosen has the reward 1, rejected 0"
        read, reward_column = _preference, "reward"
    elif {prompt, "completions", "scores"} <= data.keys():
        taken, note = {prompt, "completions", "scores"}, "completions with their scores as rewards"
        read, reward_column = _scored, "scores"
    elif conversation and config.prompt_column is None and loss.least == 1:
        taken, note = {conversation}, f"conversations: the assistant's turns in {conversation} are trained"
        read, reward_column = _conversation, config.reward_column or "reward"
        if config.reward_column is not None and config.reward_column in data:
            taken.add(config.reward_column)
    else:
        return None
    if config.reward_column is not None and read is not _conversation:
        raise ConfigError(f"{key}.reward_column: {config.reward_column} is not read: these are {note}")
    names = {prompt: "prompt", conversation: "messages", config.reward_column: "reward"}
    rows: list[int] = []
    found: list[Completion] = []
    columns = {name: to_list(data[name]) for name in taken if name in data}
    num_rows = len(next(iter(columns.values())))
    for row in range(num_rows):
        own = {names.get(name, name): from_json(column[row]) for name, column in columns.items()}
        of_row = read(own, f"{key}.path: {config.path}: row {row}")
        found += of_row
        rows += [row] * len(of_row)
    prompts, completions, rewards = (list(column) for column in zip(*found, strict=True))
    unfolded: Columns = {"prompt": prompts, "completion": completions, reward_column: rewards}
    return Unfolded(unfolded, reward_column, rows, note)


def _preference(row: dict[str, Any], where: str) -> list[Completion]:
    chosen, several = row["chosen"], row["rejected"]
    rejected = several if isinstance(several, list) and not is_messages(several) else [several]
    if not rejected:
        raise ConfigError(f"{where}: rejected is empty")
    for name, value in (("chosen", chosen), *(("rejected", value) for value in rejected)):
        if not is_messages(value) and not isinstance(value, str):
            raise ConfigError(f"{where}: {name} is {type(value).__name__}, not text or a list of messages")
        if is_messages(value) != is_messages(chosen):
            raise ConfigError(f"{where}: one of chosen and rejected is a text, and one a list of messages")
    sides = [from_json(value) for value in (chosen, *rejected)]
    if is_messages(sides[0]):
        names = ["chosen", *["rejected"] * len(rejected)]
        sides = [as_messages(side, f"{where}: {name}") for side, name in zip(sides, names, strict=True)]
    if sides[0] in sides[1:]:
        raise ConfigError(f"{where}: chosen and rejected are equal")
    prompt, sides = _prompt_of(row.get("prompt"), sides, where)
    sides = [_said(side, f"{where}: {'rejected' if i else 'chosen'}") for i, side in enumerate(sides)]
    if sides[0] in sides[1:]:
        raise ConfigError(f"{where}: what the assistant says in chosen and rejected is equal")
    return [(prompt, side, 0.0 if i else 1.0) for i, side in enumerate(sides)]


def _prompt_of(given: Any, sides: list[Any], where: str) -> tuple[Any, list[Any]]:
    """Return the prompt of a preference, and the completions without it."""
    if given is not None and given != []:
        if not isinstance(sides[0], list) or sides[0][0]["role"] == "assistant":
            return given, sides
        # chosen and rejected repeat the prompt, as in UltraFeedback's binarized form
        begin = as_messages(given, f"{where}: prompt") if is_messages(given) else None
        size = next((i for i, m in enumerate(sides[0]) if m["role"] == "assistant"), 0)
        size = size if begin is None else len(begin)
        repeats = (
            [side[:size] == sides[0][:size] for side in sides]
            if begin is None
            else [side[:size] == begin for side in sides]
        )
        is_said = begin is not None or any(message["content"] == given for message in sides[0][:size])
        if not all(repeats) or not is_said:
            raise ConfigError(f"{where}: prompt is not how chosen and rejected begin")
        return sides[0][:size], [side[size:] for side in sides]
    if isinstance(sides[0], str):
        size = _num_alike(sides)
        # as TRL does: the blank before the first difference belongs to the completions
        size -= sides[0][:size].endswith(" ")
    else:
        size = _num_alike(sides)
        while size and sides[0][size - 1]["role"] == "assistant":  # completions begin with the assistant
            size -= 1
    if not size:
        raise ConfigError(f"{where}: chosen and rejected have no common beginning, which would be the prompt")
    return sides[0][:size], [side[size:] for side in sides]


def _num_alike(sides: Sequence[Sequence[Any]]) -> int:
    """Return how many characters, or messages, all of these have in common at their beginning."""
    places = enumerate(zip(*sides, strict=False))
    return next((i for i, at in places if any(x != at[0] for x in at)), min(map(len, sides)))


def _scored(row: dict[str, Any], where: str) -> list[Completion]:
    completions, scores = row["completions"], row["scores"]
    if not isinstance(completions, list) or not isinstance(scores, list) or len(completions) != len(scores):
        raise ConfigError(f"{where}: completions and scores are not lists of one length")
    if not completions:
        raise ConfigError(f"{where}: completions is empty")
    for completion in completions:
        if not isinstance(completion, str) and not is_messages(completion):
            kind = type(completion).__name__
            raise ConfigError(f"{where}: completions has {kind}, not text or a list of messages")
    said = [_said(completion, f"{where}: completions") for completion in completions]
    return [(row["prompt"], completion, score) for completion, score in zip(said, scores, strict=True)]


def _conversation(row: dict[str, Any], where: str) -> list[Completion]:
    if not is_messages(row["messages"]):
        raise ConfigError(f"{where}: messages is no list of messages")
    messages = as_messages(row["messages"], f"{where}: messages")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ConfigError(f"{where}: messages has no turn of the assistant")
    if not turns[0]:
        raise ConfigError(f"{where}: messages begins with the assistant, and has no prompt")
    return [(messages[: turns[0]], _said(messages[turns[0] :], f"{where}: messages"), row.get("reward"))]


def _said(completion: Any, where: str) -> str | list[Message]:
    """Return a completion, a text or messages, up to where the assistant has said its last.

    Raises:
        ConfigError: it is empty, or a turn of the assistant in it is that calls no tool; or it begins with
            somebody else.
    """
    if isinstance(completion, str):
        said: str | list[Message] = completion
        is_empty = not completion.strip()
    else:
        said = of_assistant(as_messages(completion, where), where) if completion else []
        own = [message for message in said if message["role"] == "assistant"]
        is_empty = not own or not all(m["content"].strip() or m.get("tool_calls") for m in own)
    if is_empty:
        raise ConfigError(f"{where} is empty")
    return said
