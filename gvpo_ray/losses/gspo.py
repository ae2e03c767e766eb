"""GSPO is Group Sequence Policy Optimization (arXiv 2507.18071): the objective on one page.

A prompt x has m completions y_i with rewards R_i, sampled by pi_old. With log pi(y_i|x) summed over the
tokens of y_i, |y_i| of them,

    loss = -1/|D| sum_x 1/m sum_i min[ r_i A_i, clip(r_i, 1 - clip_low, 1 + clip_high) A_i ]
    r_i  = ( pi(y_i|x) / pi_old(y_i|x) )^(1/|y_i|)      one ratio for the whole completion
    A_i  = (R_i - mean R) / std R                       as in losses/grpo.py

The equation is known here from the implementations in TRL and verl, and so are the default widths of the clip
interval, which are far smaller than GRPO's because r_i is a geometric mean. There is no KL term.

The arguments and the result are described in gvpo_ray/losses/token_losses.py.
"""

from __future__ import annotations

import torch

from gvpo_ray.losses.grpo import grpo_advantages
from gvpo_ray.losses.token_losses import Batch, LossAndSums, of_tokens


@of_tokens
def gspo_loss(batch: Batch, *, clip_low: float = 3e-4, clip_high: float = 4e-4) -> LossAndSums:
    """Return the loss of this module's docstring; autograd differentiates it as it stands."""
    advantages = grpo_advantages(batch)
    log_ratios = batch.sum_tokens(batch.logprobs - batch.old_logprobs) / batch.lengths.clamp(min=1)
    ratios = log_ratios.exp()
    terms = torch.minimum(ratios * advantages, ratios.clamp(1 - clip_low, 1 + clip_high) * advantages)
    clipped = ((advantages > 0) & (ratios > 1 + clip_high)) | ((advantages < 0) & (ratios < 1 - clip_low))
    return batch.loss(terms, clipped[batch.completion_ids])
