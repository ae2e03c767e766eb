"""Tokenizers may have more tokens than their models, which have no embedding for the last ones.

A model that reads such a token fails, and takes its engine or its learner along. So a run is refused if its
data have one, and an episode ends where its environment writes one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.model import ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def vocab_size_of(model: ModelConfig) -> int:
    """Return the number of tokens that a model has an embedding for, by its config."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    return int(config.get_text_config().vocab_size)


def beyond(ids: Iterable[int], vocab_size: int | None) -> int | None:
    """Return the first token that a model lacks, which has `vocab_size` (None: unknown); None: it has all."""
    return None if vocab_size is None else next((token for token in ids if token >= vocab_size), None)


def unknown_token(token: int, vocab_size: int, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Return words for a token that a model lacks, such as `token 45 ('<|x|>'), and the model has 44`."""
    text = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(token)!r})"
    return f"token {token}{text}, and the model has {vocab_size} (vocab_size of its config.json)"


def check_vocabulary(
    model: ModelConfig, tokens: Mapping[str, pa.ChunkedArray], tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse data with a token that the model lacks.

    Args:
        model: the policy.
        tokens: what has the tokens -> lists of them, also nested.
        tokenizer: the model's.

    Raises:
        ConfigError: one line that names the token and what has it.
    """
    vocab_size = vocab_size_of(model)
    for where, lists in tokens.items():
        flat: Any = lists
        while pa.types.is_list(flat.type):
            flat = pc.list_flatten(flat)
        largest = pc.max(flat).as_py()
        if largest is not None and largest >= vocab_size:
            raise ConfigError(
                f"model.path: {model.path}: the tokenizer is not the model's, or has grown without it: "
                f"{where} have {unknown_token(largest, vocab_size, tokenizer)}"
            )
