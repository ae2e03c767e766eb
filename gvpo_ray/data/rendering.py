"""From text or chat to token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def tokenise(
    prompts: list[str], config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, key: str
) -> list[list[int]]:
    """Template and tokenise; the template decides about special tokens in a chat, the tokenizer elsewhere."""
    if config.template is not None:
        # str.replace: problems are full of braces that str.format would read as fields.
        return token_ids(
            tokenizer,
            [config.template.replace("{prompt}", prompt) for prompt in prompts],
            add_special_tokens=True,
        )
    if not tokenizer.chat_template:
        raise ConfigError(
            f'{key}.template: required, because the tokenizer has no chat template; for example "Question: '
            f'{{prompt}}\\nAnswer:"'
        )
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt is not None else []
    chats = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
    texts = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
    return token_ids(tokenizer, texts, add_special_tokens=False)


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Any, *, add_special_tokens: bool) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
    return ids
