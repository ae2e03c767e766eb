"""GRPO is Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300): the objective on one page.

A prompt x has m completions y_i with rewards R_i, sampled by pi_old. With r = pi(y_t|x, y_<t) / pi_old(y_t|x,
y_<t) for each token,

    loss = -1/|D| sum_x 1/m sum_i 1/|y_i| sum_t { min[ r A_i, clip(r, 1 - clip_low, 1 + clip_high) A_i ]
                                                  - kl_coefficient k3 }                                (eq. 3)
    k3   = pi_ref/pi - log(pi_ref/pi) - 1  for each token, differentiated as it stands                 (eq. 4)
    A_i  = (R_i - mean R) / std R          within the group, the same for every token of y_i

The paper clips symmetrically (clip_low = clip_high) and does not say which standard deviation std is. Here it
is the sample standard deviation, with m - 1, as in the common implementations. Those add 1e-6 to 1e-4 to it;
here nothing is added, and A_i = 0 where all rewards of the group are equal.

The arguments and the result are described in gvpo_ray/losses/token_losses.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gvpo_ray.losses.token_losses import Batch, LossAndSums, of_tokens


@of_tokens
def grpo_loss(
    batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2, kl_coefficient: float = 0.0
) -> LossAndSums:
    """Return the paper's eq. 3, negated to be minimized; autograd differentiates it as it stands."""
    terms, clipped = batch.clipped_terms(grpo_advantages(batch), clip_low, clip_high, kl_coefficient)
    return batch.loss(batch.sum_tokens(terms) / batch.lengths.clamp(min=1), clipped)


def grpo_advantages(batch: Batch) -> Tensor:
    """Return the advantages (R_i - mean R) / std R, [N]; 0 where all rewards of the group are equal."""
    centred = batch.centred_rewards()
    squares = torch.zeros_like(batch.counts, dtype=centred.dtype).index_add(0, batch.index, centred.square())
    std = (squares / (batch.counts - 1).clamp(min=1)).sqrt()[batch.index]
    return torch.where(std > 0, centred / std, 0.0)
