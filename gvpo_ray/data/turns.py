"""The tokens at the ends of prompts and completions follow one rule, whatever tokenizer and template do.

A prompt has one beginning-of-sequence token where the tokenizer puts one, and no end-of-sequence token. A
completion ends at any token that ends a turn. Engines stop at these tokens and at no others, and the learner
trains each as the completion's last token; completions of people and servers get the one that the template
writes.

The text of a completion, which is what gets graded, has its thoughts between <think> and </think>, whatever
the family's marks are: also where they are special tokens, which are otherwise left out, and where the prompt
has opened them. So an answer that was cut off inside its thoughts is seen to be none.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<think>", "</think>"

MARKS = {
    "<think>": OPEN,
    "</think>": CLOSE,
    "[THINK]": OPEN,
    "[/THINK]": CLOSE,
    "<seed:think>": OPEN,
    "</seed:think>": CLOSE,
    "<|START_THINKING|>": OPEN,
    "<|END_THINKING|>": CLOSE,
}
"""How families mark thoughts (Qwen and DeepSeek; Mistral; Seed; Cohere), and what graders read for it."""

DAY = datetime(2025, 1, 1)
"""What chat templates get for the present time: a prompt must be the same when a run is resumed."""


def fixed_time(form: str) -> str:
    """Write DAY in strftime's form; chat templates get it as `strftime_now`."""
    return DAY.strftime(form)


def one_begin_no_end(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return a prompt with one of several beginning-of-sequence tokens, and without end-of-sequence tokens.

    Where a tokenizer has one token for both, it begins the prompt.
    """
    begin, end = 0, len(ids)
    while begin + 1 < end and ids[begin] == ids[begin + 1] == tokenizer.bos_token_id:
        begin += 1
    while end > begin + 1 and ids[end - 1] == tokenizer.eos_token_id:
        end -= 1
    return list(ids[begin:end])


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token with which the chat template ends the assistant's turn.

    That is the tokenizer's end-of-sequence token where there is no template, or where it writes none.
    """
    from jinja2 import TemplateError

    usual: int | None = tokenizer.eos_token_id
    if not tokenizer.chat_template:
        return usual
    mark = "GVPO"
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": mark}]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False, strftime_now=fixed_time))
    # what a program of a model's folder may raise; where prompts are rendered it is refused
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
        return usual
    tail = text.rpartition(mark)[2].lstrip()
    ids: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"] if tail else []
    return ids[0] if ids and ids[0] in _marks_of(tokenizer) else usual


def _marks_of(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special and added tokens: no others end a turn without being asked to."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}


def check_stop_tokens(sampling: SamplingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse sampling.stop_token_ids that the model lacks, which vLLM would do in the middle of a run.

    Raises:
        ConfigError: one line that names the token.
    """
    for token in sampling.stop_token_ids:
        if token >= len(tokenizer):
            raise ConfigError(
                f"sampling.stop_token_ids: {token}: the model's tokenizer has {len(tokenizer)} tokens"
            )


class Turns:
    """Turns knows where a model's completions end, and what their text is.

    Args:
        model: the section `model`; its folder's config.json and generation_config.json name more tokens.
        tokenizer: the model's.
        sampling: the section `sampling`.
    """

    def __init__(
        self, model: ModelConfig, tokenizer: PreTrainedTokenizerBase, sampling: SamplingConfig
    ) -> None:
        self._tokenizer = tokenizer
        known = _marks_of(tokenizer)
        named = {token for token in _named_ends(model) if token in known}
        found = {tokenizer.eos_token_id, end_of_turn(tokenizer), *named, *sampling.stop_token_ids}
        self.ends: list[int] = sorted(token for token in found if token is not None)
        """The tokens that end a completion: the tokenizer's, the template's, those that the model's files
        name, and those of sampling.stop_token_ids."""
        self._special = set(tokenizer.all_special_ids)
        # all completions of a group have the same prompt: it is decoded once
        self._opens = functools.lru_cache(maxsize=1024)(self._ends_open)
        self._thoughts = {
            token: MARKS[text]
            for token, text in zip(known, tokenizer.convert_ids_to_tokens(list(known)), strict=True)
            if text in MARKS
        }

    def text(self, prompt_ids: Sequence[int], ids: Sequence[int], stopped_by: Any = None) -> str:
        """Return the text of a completion without the token that ends it.

        Args:
            prompt_ids: its prompt's tokens.
            ids: its own.
            stopped_by: the entry of sampling.stop that ended it; anything else: a token or a limit did.
        """
        body = ids[:-1] if ids and ids[-1] in self.ends else ids
        text = "".join(self._parts(body))
        if isinstance(stopped_by, str):
            # the last one: earlier calls of a rollout may have ended with it too, and go on behind it
            text = text[: text.rfind(stopped_by)] if stopped_by in text else text
        for mark, plain in MARKS.items():
            text = text.replace(mark, plain)
        is_open = self._opens(tuple(prompt_ids[-16:]))
        return f"{OPEN}\n{text.lstrip()}" if is_open and not text.lstrip().startswith(OPEN) else text

    def _ends_open(self, tail: tuple[int, ...]) -> bool:
        """Return whether a prompt that ends with these tokens opens a thought."""
        before = str(self._tokenizer.decode(list(tail), skip_special_tokens=False)).rstrip()
        return any(before.endswith(mark) for mark, plain in MARKS.items() if plain == OPEN)

    def _parts(self, ids: Sequence[int]) -> Iterable[str]:
        """Yield the text between marks of thoughts that are special tokens, and these marks."""
        run: list[int] = []
        for token in ids:
            if token in self._thoughts and token in self._special:
                yield str(self._tokenizer.decode(run, skip_special_tokens=True))
                yield self._thoughts[token]
                run = []
            else:
                run.append(token)
        yield str(self._tokenizer.decode(run, skip_special_tokens=True))


def _named_ends(model: ModelConfig) -> set[int]:
    """Return the end-of-sequence tokens in a model's config.json and generation_config.json."""
    from transformers import AutoConfig
    from transformers.utils.hub import cached_file

    found: list[Any] = []
    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    found.append(getattr(config.get_text_config(), "eos_token_id", None))
    # Its absence is no error, and what else it holds need not be right.
    file = cached_file(model.path, "generation_config.json", _raise_exceptions_for_missing_entries=False)
    if file is not None:
        found.append(json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id"))
    tokens = (token for each in found for token in (each if isinstance(each, list) else [each]))
    return {token for token in tokens if isinstance(token, int)}
