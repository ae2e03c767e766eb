"""Reward models are Hugging Face sequence classifiers with one output, in actors of their own."""

from __future__ import annotations

import math
from typing import Any

from gvpo_ray.data.vocabulary import beyond, unknown_token


class RewardModel:
    """A RewardModel scores completions; pool.py makes it an actor.

    Args:
        path: model folder or hub name of an `AutoModelForSequenceClassification` with one label and a
            tokenizer.
        batch_size: completions in one forward pass.
        on_gpu: whether it runs in bfloat16 on the actor's GPU, or in float32 on CPU.
        revision: of a hub name, so that all actors have the same weights.

    Raises:
        ValueError: the classifier has another number of outputs than one, or no token to pad with.
    """

    def __init__(self, path: str, batch_size: int, on_gpu: bool = False, revision: str = "main") -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._torch, self._batch_size = torch, batch_size
        self._device = "cuda" if on_gpu else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            path, revision=revision, dtype=torch.bfloat16 if on_gpu else torch.float32
        )
        if model.config.num_labels != 1:
            raise ValueError(f"the reward model {path} has {model.config.num_labels} outputs, not one")
        self._size = int(model.config.get_text_config().vocab_size)
        if not self._has(self._tokenizer.pad_token_id):
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if not self._has(self._tokenizer.pad_token_id):
            raise ValueError(f"the reward model {path} has no token to pad with")
        # the classifier reads the last token that is not padding
        model.config.pad_token_id = self._tokenizer.pad_token_id
        self._model = model.to(self._device).eval()

    def score(self, prompts: list[str], completions: list[str]) -> list[float | tuple[None, str]]:
        """Return the classifier's output for each completion.

        The text is a chat of prompt and completion if the tokenizer has a chat template, else the prompt
        followed by the completion. A text that does not fit into the model's context, or has a token that the
        model lacks, gets None and a remark.
        """
        texts = [
            self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)
        ]
        ids = self._tokenizer(texts, add_special_tokens=not self._tokenizer.chat_template)["input_ids"]
        text = self._model.config.get_text_config()
        context = getattr(text, "max_position_embeddings", None) or math.inf
        why: dict[int, str] = {}
        for i, row in enumerate(ids):
            if len(row) > context:
                why[i] = f"{len(row)} tokens do not fit into the reward model"
            elif (token := beyond(row, self._size)) is not None:
                why[i] = f"the reward model's tokenizer writes {unknown_token(token, self._size)}"
        fits = [i for i in range(len(ids)) if i not in why]
        rewards: dict[int, float] = {}
        for begin in range(0, len(fits), self._batch_size):
            rows = fits[begin : begin + self._batch_size]
            batch = self._tokenizer.pad({"input_ids": [ids[i] for i in rows]}, return_tensors="pt").to(
                self._device
            )
            with self._torch.inference_mode():
                outputs = self._model(
                    input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
                ).logits[:, 0]
            rewards |= zip(rows, outputs.float().tolist(), strict=True)
        return [(None, why[i]) if i in why else rewards[i] for i in range(len(ids))]

    def _has(self, token: int | None) -> bool:
        return token is not None and token < self._size

    def _text(self, prompt: str, completion: str) -> str:
        if not self._tokenizer.chat_template:
            return prompt + completion
        chat = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return str(self._tokenizer.apply_chat_template(chat, tokenize=False))
