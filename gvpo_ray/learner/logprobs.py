"""Log-probs of completions: the forward pass to the tokens' log-probs, its padded inputs, and the sums over
sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gvpo_ray.groups import Row


class CompletionLogprobs(nn.Module):
    """log pi(y_t | x, y_<t) for every token of every completion of a micro-batch. Prompt tokens never meet
    the head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Tensor, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """Token targets[i] is predicted at [rows[i], positions[i]] of what `inputs` (padded_inputs,
        packing.pack) lay out. Returns [N].

        In float32, or in the model's precision if that is higher.
        """
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[rows, positions]
        head = self.model.get_output_embeddings()
        size = max(1, HEAD_ELEMENTS[hidden.device.type] // self.model.config.vocab_size)
        if len(hidden) <= size:
            return _head_logprobs(head, hidden, targets)
        # The logits of a chunk are computed again in the backward pass: [tokens, vocabulary] never exists as
        # a whole.
        chunks = zip(hidden.split(size), targets.split(size), strict=True)
        return torch.cat([checkpoint(_head_logprobs, head, *chunk, use_reentrant=False) for chunk in chunks])


HEAD_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits at a time: 64 MB in float32; 1 GB on a GPU, where small products waste it and ZeRO-3 may gather the
head for each."""


def _head_logprobs(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """log softmax(head(hidden))[targets], [N, hidden] and [N] -> [N], without a second matrix of the logits'
    size.
    """
    logits = head(hidden)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.gather(1, targets[:, None]).squeeze(1) - torch.logsumexp(logits, dim=-1)


def padded_inputs(rows: Sequence[Row], device: torch.device | str) -> tuple[dict[str, Tensor], list[int]]:
    """Lay out every completion with its prompt, right-padded. Returns the arguments of CompletionLogprobs and
    the completions' lengths.
    """
    sequences = [(row["prompt_ids"], ids) for row in rows for ids in row["completion_ids"]]
    width = max(len(prompt) + len(ids) for prompt, ids in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    index: list[tuple[int, int, int]] = []
    for i, (prompt, ids) in enumerate(sequences):
        end = len(prompt) + len(ids)
        input_ids[i, :end] = torch.tensor([*prompt, *ids])
        mask[i, :end] = 1
        index += [(i, len(prompt) + t - 1, token) for t, token in enumerate(ids)]
    where = torch.tensor(index)
    tensors = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "rows": where[:, 0],
        "positions": where[:, 1],
        "targets": where[:, 2],
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}, [len(ids) for _, ids in sequences]


def sequence_sums(token_logprobs: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum token log-probs [sum of lengths] over each completion, in float64. Returns [number of completions].

    Bitwise the same for the same tokens (atomic additions on a GPU would not be): a log-ratio of 0 is 0.
    """
    sizes = torch.tensor(lengths, dtype=torch.long, device=token_logprobs.device)
    # unsafe: unchecked lengths, none of them too
    return torch.segment_reduce(token_logprobs.double(), "sum", lengths=sizes, unsafe=True)
