"""PoFT is Preference-Oriented supervised Fine-Tuning (arXiv 2412.12865): the objective on one page.

A prompt x has one completion y of T tokens, which one or more other models, the aligned ones, have scored.
With the mean log-prob per token l = 1/T log pi(y|x) of the policy, and a, the mean over the aligned models of
theirs,

    loss = 1/|D| sum_x -log sigma( beta (l - a) + gamma )
    d loss / d l = -beta/|D| sigma( -(beta (l - a) + gamma) )

so each completion is imitated with a weight between 0 and beta: little where the aligned models find it
unlikely (noisy data) or where the policy is ahead of them already. The equation and its constants beta = 1,
gamma = 0 are read in the authors' code. Means per token make models with different tokenizers comparable.
That code takes assistant tokens of the aligned models, but all tokens, also those of the prompt, of the
policy; here both are those of the completion.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def poft_loss(
    logprobs: Tensor,
    lengths: Tensor,
    aligned_logprobs: Tensor,
    num_completions: float | None = None,
    beta: float = 1.0,
    gamma: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of this module's docstring; autograd differentiates it as it stands.

    Args:
        logprobs: [N] log pi(y_i|x), sums over the tokens, float32 or float64; the gradient comes back in this
            dtype.
        lengths: [N] T_i, the number of tokens of each completion, at least 1.
        aligned_logprobs: [N] a_i, the mean log-prob per token, averaged over the aligned models; takes no
            gradient.
        num_completions: |D|, the number of completions in the whole update; default: those in this call.
        beta: factor of the difference of mean log-probs.
        gamma: margin that is added to it.

    Returns:
        The loss, a float64 scalar, and these sums, float64 scalars without gradient: `objective`, the loss
        times |D|; `weight`, the sum of the weights sigma(-z_i), with which completions are imitated.

    Raises:
        ValueError: the shapes differ, a length is below 1, or beta or num_completions is not positive.
    """
    if logprobs.ndim != 1 or not logprobs.shape == lengths.shape == aligned_logprobs.shape:
        shapes = [tuple(tensor.shape) for tensor in (logprobs, lengths, aligned_logprobs)]
        raise ValueError(f"logprobs, lengths and aligned_logprobs must be [N] alike, not {shapes}")
    if len(lengths) and not int(lengths.min()) >= 1:
        raise ValueError("every completion must have at least one token")
    if not beta > 0:
        raise ValueError(f"beta must be positive, not {beta}")
    if num_completions is not None and not num_completions > 0:
        raise ValueError(f"num_completions must be positive, not {num_completions}")
    z = beta * (logprobs.double() / lengths - aligned_logprobs.detach().double()) + gamma
    total = softplus(-z).sum()
    sums = {"objective": total.detach(), "weight": (-z.detach()).sigmoid().sum()}
    return total / (max(len(logprobs), 1) if num_completions is None else num_completions), sums
