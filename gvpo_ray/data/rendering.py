"""A renderer turns the rows of a data set into the model's token ids, and token ids back into text.

Special tokens are those that a template writes. Where a problem or a completion spells one, such as
<|endoftext|>, it stays text: a data set cannot end a turn or begin one of another speaker.

No other file calls a tokenizer for prompts and completions. A renderer for another kind of data, such as
images, is another class with the methods of Renderer and a line in renderer_of.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.config.model import ModelConfig

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
        """Render prompts. Each row has at least the column `prompt`, a text."""

    def encode(self, completions: Sequence[str]) -> list[list[int]]:
        """Tokenise completions as they are, without special tokens of the tokenizer's own."""

    def text(self, ids: Sequence[int], with_special: bool = False) -> str:
        """Decode tokens, without special tokens or with them."""


def renderer_of(config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> Renderer:
    """Return the renderer of a data set; `key` names the section `config` in messages."""
    return TextRenderer(tokenizer, template=config.template, system_prompt=config.system_prompt, key=key)


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


class TextRenderer:
    """A TextRenderer renders text with the config's template, or with the tokenizer's chat template.

    Args:
        tokenizer: the model's tokenizer.
        template: text with `{prompt}`; None: the tokenizer's chat template.
        system_prompt: first message of a chat; the config refuses it beside a template.
        key: section of the config that the template belongs to, for messages.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: str | None = None,
        system_prompt: str | None = None,
        key: str = "prompts",
    ) -> None:
        self._tokenizer, self._template, self._system_prompt = tokenizer, template, system_prompt
        self._key = key
        added = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        named: dict[str, Any] = {
            str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens
        }
        self._special_ids: dict[str, int] = {text: i for text, i in (added | named).items() if text}
        spellings = sorted(self._special_ids, key=len, reverse=True)  # <|end|> may begin <|end|>2
        self._special = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")

    @property
    def end_id(self) -> int | None:
        """The end-of-sequence token; None where the tokenizer has none."""
        end: int | None = self._tokenizer.eos_token_id
        return end

    def render(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """Render prompts; each row has the column `prompt`, a text.

        A chat template writes special tokens itself; with a template of the config the tokenizer adds its
        own.

        Raises:
            ConfigError: there is neither a template nor a chat template, or the chat template fails.
        """
        prompts = [row["prompt"] for row in rows]
        ids = self._ids(self._texts(prompts), add_special_tokens=self._template is not None)
        for i, prompt in enumerate(prompts):
            if self._special.search(prompt):
                ids[i] = self._around(prompt)
        return [Rendered(of_prompt, {}) for of_prompt in ids]

    def encode(self, completions: Sequence[str]) -> list[list[int]]:
        """Tokenise completions as they are, without special tokens of the tokenizer's own.

        Only an end-of-sequence token that is the end of a text counts as one: logs may have it.
        """
        end = str(self._tokenizer.eos_token or "")
        bodies = [text.removesuffix(end) for text in completions]
        ids = self._ids(bodies, add_special_tokens=False)
        for i, (text, body) in enumerate(zip(completions, bodies, strict=True)):
            if self._special.search(body):
                ids[i] = self._plain(body)
            if body != text and self.end_id is not None:
                ids[i] = [*ids[i], self.end_id]
        return ids

    def text(self, ids: Sequence[int], with_special: bool = False) -> str:
        """Decode tokens, without special tokens or with them."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=not with_special))

    def _texts(self, prompts: list[str]) -> list[str]:
        """Return what the model reads, as text, of each problem."""
        template = self._template
        if template is not None:
            # str.replace: problems are full of braces that str.format would read as fields.
            return [template.replace("{prompt}", prompt) for prompt in prompts]
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{self._key}.template: required, because the tokenizer has no chat template; for example "
                '"Question: {prompt}\\nAnswer:"'
            )
        return [self._chat(messages_of(prompt, None, self._system_prompt)) for prompt in prompts]

    def _chat(self, messages: list[dict[str, str]]) -> str:
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        # what a program of a model's folder may raise: Jinja's errors and those of its expressions
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            if messages[0]["role"] == "system":
                self._chat(messages[1:])  # raises if the template fails without it as well
                raise ConfigError(
                    f"{self._key}.system_prompt: the tokenizer's chat template does not take one: {why}"
                ) from error
            raise ConfigError(
                f"model.path: the chat template of the tokenizer fails ({why}); {self._key}.template "
                "replaces it"
            ) from error
        return str(text)

    def _around(self, prompt: str) -> list[int]:
        """Return the token ids of a problem that spells special tokens: those of the template alone count."""
        # A character that is in no text, behind the first of each: then no special token is spelled there.
        mark = next(sign for sign in map(chr, range(0xFDD0, 0xFDF0)) if sign not in prompt)
        marked = self._special.sub(lambda found: found[0][0] + mark + found[0][1:], prompt)
        (text,) = self._texts([marked])
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
        return ids if self._template is None else self._with_ends(ids)

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
