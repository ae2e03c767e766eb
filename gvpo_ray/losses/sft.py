"""SFT is supervised fine-tuning: the completions of the data are imitated. The objective on one page.

With T the number of all trained tokens of the update, of all completions y_i of all prompts x,

    loss = -1/T sum_x sum_i log pi(y_i|x)

which is torch's cross-entropy with its default mean: every token counts alike, so long completions count more
than short ones. A group may be of any size, also of one completion; rewards are not read, and there is no
reference.
"""

from __future__ import annotations

from torch import Tensor


def sft_loss(logprobs: Tensor, num_tokens: float | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of this module's docstring; autograd differentiates it as it stands.

    Args:
        logprobs: [T] log pi(y_t|x, y_<t) of trained tokens, float32 or float64; the gradient comes back in
            this dtype.
        num_tokens: the number of trained tokens in the whole update; default: those in this call.

    Returns:
        The loss, a float64 scalar in nats per token, and the sum `objective`, the loss times the number of
        tokens, a float64 scalar without gradient.

    Raises:
        ValueError: logprobs is not [T], or num_tokens is not positive.
    """
    if logprobs.ndim != 1:
        raise ValueError(f"logprobs must be [T], not {tuple(logprobs.shape)}")
    if num_tokens is not None and not num_tokens > 0:
        raise ValueError(f"num_tokens must be positive, not {num_tokens}")
    total = -logprobs.double().sum()
    return total / (max(len(logprobs), 1) if num_tokens is None else num_tokens), {
        "objective": total.detach()
    }
