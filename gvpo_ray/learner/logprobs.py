"""Log-probs of completions: the forward pass to the tokens' log-probs, its padded inputs, and the sums over
sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gvpo_ray.groups import Row
from gvpo_ray.learner.head import linear_logprobs


class CompletionLogprobs(nn.Module):
    """log pi(y_t | x, y_<t) for every token of every completion of a micro-batch. Prompt tokens never meet
    the head.

    The head is called once per pass, whatever a rank's pass holds: under ZeRO-3 and FSDP every call of a
    module is a collective. So its module gets a second form, head(hidden, targets), which is the fused
    function of head.py.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise TypeError(
                f"the model's output head is a {type(head).__name__}: only a plain linear one is known"
            )
        usual = head.forward

        def forward(hidden: Tensor, targets: Tensor | None = None) -> Tensor:
            return (
                usual(hidden) if targets is None else linear_logprobs(hidden, head.weight, targets, head.bias)
            )

        head.forward = forward

    def forward(self, rows: Tensor, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """Token targets[i] is predicted at [rows[i], positions[i]] of what `inputs` (padded_inputs,
        packing.pack) lay out. Returns [N].

        In float32, or in the model's precision if that is higher.
        """
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state[rows, positions]
        return self.model.get_output_embeddings()(hidden, targets)


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
