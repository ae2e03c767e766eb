"""A renderer turns the rows of a data set into the model's token ids, and token ids back into text.

Special tokens are those that a template writes. Where a problem or a completion spells one, such as
<|endoftext|>, it stays text: a data set cannot end a turn or begin one of another speaker.

No other file calls a tokenizer for prompts and completions. A renderer for another kind of data, such as
images, is another class with the methods of Renderer and a line in renderer_of.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow as pa

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.data.turns import end_of_turn, fixed_time, one_begin_no_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rendered(NamedTuple):
    """A rendered prompt is what the model gets of a row."""

    prompt_ids: list[int]
    extras: dict[str, Any]
    """Further columns of the group table that belong to the prompt, such as its images."""


class Renderer(Protocol):
    """The Renderer protocol says what data sets and engines need of a renderer."""

    @property
    def end_id(self) -> int | None:
        """The end-of-sequence token; None where the tokenizer has none."""

    def render(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """Render prompts. A row has `prompt`, a text, and may have `messages`: then it is a conversation."""

    def encode(self, completions: Sequence[str]) -> list[list[int]]:
        """Tokenise completions as they are, without special tokens of the tokenizer's own."""

    def text(self, ids: Sequence[int], with_special: bool = False) -> str:
        """Decode tokens, without special tokens or with them."""


MakeRenderer = Callable[[PromptsConfig, "PreTrainedTokenizerBase", str], Renderer]
"""renderer_of, or another function that makes the renderer of a data set."""


def renderer_of(config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> Renderer:
    """Return the renderer of a data set; `key` names the section `config` in messages."""
    return TextRenderer(tokenizer, **rendering_options(config), key=key)


def rendering_options(config: PromptsConfig) -> dict[str, Any]:
    """Return those arguments of a TextRenderer that a data set's section sets."""
    return {name: getattr(config, name) for name in ("template", "system_prompt", "template_arguments")}


def completion_renderer(model: ModelConfig) -> Renderer:
    """Return a renderer with the tokenizer of a model folder, for completions only."""
    from transformers import AutoTokenizer

    return TextRenderer(AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code))


def messages_of(prompt: str, template: str | None, system_prompt: str | None) -> list[dict[str, str]]:
    """Return a prompt as the messages of a chat, for a chat template or a server; `template` holds it."""
    system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    # str.replace: problems are full of braces that str.format would read as fields.
    content = prompt if template is None else template.replace("{prompt}", prompt)
    return [*system, {"role": "user", "content": content}]


def chat_of(group: pa.Table, template: str | None, system_prompt: str | None) -> list[dict[str, Any]]:
    """Return the prompt of a one-row group as the messages of a chat: its own, if it is a conversation."""
    data = group["data"][0].as_py() if "data" in group.column_names else None
    given: list[dict[str, Any]] = json.loads(data or "{}").get("messages") or []
    if not given or template is not None:
        return messages_of(group["prompt"][0].as_py(), template, system_prompt)
    return _with_system(given, system_prompt)


def _with_system(messages: list[dict[str, Any]], system_prompt: str | None) -> list[dict[str, Any]]:
    """Return a chat with a system message: its own holds, and the config's is for the others."""
    if messages[0]["role"] == "system" or system_prompt is None:
        return list(messages)
    return [{"role": "system", "content": system_prompt}, *messages]


def _texts_in(value: Any) -> Iterator[str]:
    """Yield all texts of nested data, such as messages with calls of tools."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts_in([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts_in(entry)


def _absent_from(text: str, skip: int = 0) -> str:
    """Return a character that is not in a text, the one after `skip` others."""
    return [sign for sign in map(chr, range(0xFDD0, 0xFDF0)) if sign not in text][skip]


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of these texts."""
    spellings = sorted(texts, key=len, reverse=True)  # <|end|> may begin <|end|>2
    return re.compile("|".join(map(re.escape, spellings)) or r"(?!)")


class TextRenderer:
    """A TextRenderer renders text with the config's template, or with the tokenizer's chat template.

    Args:
        tokenizer: the model's tokenizer.
        template: text with `{prompt}`; None: the tokenizer's chat template.
        system_prompt: first message of a chat that has no system message; the config refuses it beside a
            template.
        template_arguments: further arguments of the chat template.
        key: section of the config that the template belongs to, for messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        system_prompt: str | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        key: str = "prompts",
    ) -> None:
        self._tokenizer, self._template, self._system_prompt = tokenizer, template, system_prompt
        self._key, self._arguments = key, template_arguments or {}
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named = {
            str(token): int(tokenizer.convert_tokens_to_ids(str(token)))  # type: ignore[arg-type]
            for token in tokenizer.all_special_tokens
        }
        self._special_ids: dict[str, int] = {text: i for text, i in (added | named).items() if text}
        self._special = _any_of(self._special_ids)

    @property
    def end_id(self) -> int | None:
        """The token that ends completions of people and servers; None where the tokenizer has none.

        It is the one that ends a turn of the chat template, or with a template of the config the tokenizer's.
        """
        end: int | None = self._tokenizer.eos_token_id
        return end if self._template is not None else end_of_turn(self._tokenizer)

    def render(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """Render prompts; each row has the column `prompt`, a text, and `messages` if it is a conversation.

        A chat template writes special tokens itself; with a template of the config the tokenizer adds its
        own.

        Raises:
            ConfigError: there is neither a template nor a chat template, or the chat template fails.
        """
        ids = self._ids(self._texts(rows), add_special_tokens=self._template is not None)
        for i, row in enumerate(rows):
            if self._special.search(self._written(row)):
                ids[i] = self._around(row)
        return [Rendered(one_begin_no_end(of_prompt, self._tokenizer), {}) for of_prompt in ids]

    def encode(self, completions: Sequence[str]) -> list[list[int]]:
        """Tokenise completions as they are, without special tokens of the tokenizer's own.

        Only an end token that is the end of a text counts as one: logs may have it.
        """
        end_id = self.end_id
        end = "" if end_id is None else str(self._tokenizer.convert_ids_to_tokens(end_id))
        bodies = [text.removesuffix(end) for text in completions]
        ids = self._ids(bodies, add_special_tokens=False)
        for i, (text, body) in enumerate(zip(completions, bodies, strict=True)):
            if self._special.search(body):
                ids[i] = self._plain(body)
            if body != text and end_id is not None:
                ids[i] = [*ids[i], end_id]
        return ids

    def text(self, ids: Sequence[int], with_special: bool = False) -> str:
        """Decode tokens, without special tokens or with them."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not with_special))

    def _written(self, row: Mapping[str, Any]) -> str:
        """Return the texts of a row that its prompt is made of."""
        return "\n".join(_texts_in(self._messages(row)))

    def _messages(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the chat of a row."""
        messages = row.get("messages") or messages_of(row["prompt"], None, None)
        return _with_system(messages, self._system_prompt)

    def _texts(self, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return what the model reads, as text, of each row."""
        template = self._template
        if template is not None:
            # str.replace: problems are full of braces that str.format would read as fields.
            return [template.replace("{prompt}", row["prompt"]) for row in rows]
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{self._key}.template: required, because the tokenizer has no chat template; for example "
                '"Question: {prompt}\\nAnswer:"'
            )
        return [self._chat(self._messages(row)) for row in rows]

    def _chat(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=False,
                tools=tools or None,  # type: ignore[arg-type]
                **{"strftime_now": fixed_time, **self._arguments},
            )
        # what a program of a model's folder may raise: Jinja's errors and those of its expressions
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if messages[0]["role"] == "system" and messages[1:]:
                self._chat(messages[1:], tools)  # raises if the template fails without it as well
                where = "path: a prompt's system message" if self._system_prompt is None else "system_prompt"
                raise ConfigError(
                    f"{self._key}.{where}: the tokenizer's chat template does not take one: {why}"
                ) from error
            raise ConfigError(
                f"model.path: the chat template of the tokenizer fails ({why}); {self._key}.template "
                "replaces it"
            ) from error
        return str(text)

    def _around(self, row: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a row that spells special tokens: those of the template alone count."""
        mark = _absent_from(self._written(row))
        messages = [self._marked_message(message, mark) for message in row.get("messages") or ()]
        (text,) = self._texts([{"prompt": self._marked(row["prompt"], mark), "messages": messages}])
        ids = self._without_marks(text, mark)
        return ids if self._template is None else self._with_ends(ids)

    def _marked(self, text: str, mark: str, role: str = "user") -> str:
        """Put `mark`, a character, behind the first of each special token that a speaker's text spells."""
        return self._spelled(role).sub(lambda found: found[0][0] + mark + found[0][1:], text)

    def _spelled(self, role: str) -> re.Pattern[str]:
        """Return what finds the tokens that the text of a speaker may not write."""
        return self._special

    def _marked_message(self, message: Mapping[str, Any], mark: str) -> dict[str, Any]:
        """Return a message with `mark` in the special tokens that its texts and its calls of tools spell."""

        def marked(value: Any) -> Any:
            if isinstance(value, str):
                return self._marked(value, mark, message["role"])
            if isinstance(value, Mapping):
                return {marked(key): marked(entry) for key, entry in value.items()}
            return [marked(entry) for entry in value] if isinstance(value, (list, tuple)) else value

        return {key: value if key == "role" else marked(value) for key, value in message.items()}

    def _without_marks(self, text: str, mark: str) -> list[int]:
        """Tokenise a text in which a special token is one where `mark` does not break it."""
        own = [found[0] for found in self._special.finditer(text)]
        added = self._tokenizer.added_tokens_decoder
        ids: list[int] = []
        for i, part in enumerate(self._special.split(text)):
            # some special tokens take the white space beside them
            before, after = (
                added.get(self._special_ids.get(token, -1)) for token in (["", *own][i], [*own, ""][i])
            )
            part = part.lstrip() if before and before.rstrip else part
            part = part.rstrip() if after and after.lstrip else part
            ids += [
                *self._plain(part.replace(mark, "")),
                *(self._special_ids[token] for token in own[i : i + 1]),
            ]
        return ids

    def _with_ends(self, ids: list[int]) -> list[int]:
        """Add the special tokens that the tokenizer puts around every text."""
        with_ends, bare = (self._ids(["1"], add_special_tokens=each)[0] for each in (True, False))
        begin = next(i for i in range(len(with_ends)) if with_ends[i : i + len(bare)] == bare)
        return [*with_ends[:begin], *ids, *with_ends[begin + len(bare) :]]

    def _plain(self, text: str) -> list[int]:
        """Tokenise a text in which special tokens are text, in one piece if the tokenizer can do that."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)[
            "input_ids"
        ]
        spelled = [*self._special.finditer(text)]
        if any(self._special_ids[found[0]] in ids for found in spelled):
            # its vocabulary has them as ordinary entries too: cut each after its first character
            cuts = [0, *(found.start() + 1 for found in spelled), len(text)]
            parts = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
            return [i for of_part in self._ids(parts, add_special_tokens=False) for i in of_part]
        return ids

    def _ids(self, texts: Any, *, add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
        return ids
