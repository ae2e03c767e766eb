"""A renderer turns the rows of a data set into the model's token ids, and token ids back into text.

No other file calls a tokenizer for prompts and completions. A renderer for another kind of data, such as
images, is another class with the methods of Renderer and a line in renderer_of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

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
        """Render prompts. Each row has at least the column `prompt`, a text."""

    def encode(self, completions: Sequence[str]) -> list[list[int]]:
        """Tokenise completions as they are, without special tokens of the tokenizer's own."""

    def text(self, ids: Sequence[int]) -> str:
        """Decode the tokens of a completion without special tokens."""


def renderer_of(config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> Renderer:
    """Return the renderer of a data set; `key` names the section `config` in messages."""
    return TextRenderer(tokenizer, template=config.template, system_prompt=config.system_prompt, key=key)


def completion_renderer(model: ModelConfig) -> Renderer:
    """Return a renderer with the tokenizer of a model folder, for completions only."""
    from transformers import AutoTokenizer

    return TextRenderer(AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code))


class TextRenderer:
    """A TextRenderer renders text with the config's template, or with the tokenizer's chat template.

    Args:
        tokenizer: the model's tokenizer.
        template: text with `{prompt}`; None: the tokenizer's chat template.
        system_prompt: first message of a chat; a template does not use it.
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

    @property
    def end_id(self) -> int | None:
        """The token that ends completions of people and servers; None where the tokenizer has none.

        It is the one that ends a turn of the chat template, or with a template of the config the tokenizer's.
        """
        end: int | None = self._tokenizer.eos_token_id
        return end if self._template is not None else end_of_turn(self._tokenizer)

    def render(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """Render prompts; each row has the column `prompt`, a text.

        A chat template writes special tokens itself; with a template of the config the tokenizer adds its
        own.

        Raises:
            ConfigError: there is neither a template nor a chat template.
        """
        prompts = [row["prompt"] for row in rows]
        if self._template is not None:
            # str.replace: problems are full of braces that str.format would read as fields.
            texts = [self._template.replace("{prompt}", prompt) for prompt in prompts]
        else:
            texts = self._chats(prompts)
        ids = self._ids(texts, add_special_tokens=self._template is not None)
        return [Rendered(one_begin_no_end(of_prompt, self._tokenizer), {}) for of_prompt in ids]

    def encode(self, completions: Sequence[str]) -> list[list[int]]:
        """Tokenise completions as they are, without special tokens of the tokenizer's own."""
        return self._ids(list(completions), add_special_tokens=False)

    def text(self, ids: Sequence[int]) -> str:
        """Decode the tokens of a completion without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def _chats(self, prompts: list[str]) -> Any:
        if not self._tokenizer.chat_template:
            raise ConfigError(
                f"{self._key}.template: required, because the tokenizer has no chat template; for example "
                '"Question: {prompt}\\nAnswer:"'
            )
        system = [] if self._system_prompt is None else [{"role": "system", "content": self._system_prompt}]
        chats = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
        return self._tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=False, strftime_now=fixed_time
        )

    def _ids(self, texts: Any, *, add_special_tokens: bool) -> list[list[int]]:
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
        return ids
