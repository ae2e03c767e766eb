"""CISPO clips importance weights and keeps every token's gradient (MiniMax-M1, arXiv 2506.13585).

A prompt x has m completions y_i with rewards R_i, sampled by pi_old. With r = pi(y_t|x, y_<t) / pi_old(y_t|x,
y_<t) for each token,

    loss = -1/|D| sum_x 1/(sum_i |y_i|) sum_i sum_t min(r, ratio_cap) A_i log pi(y_t|x, y_<t)
    A_i  = (R_i - mean R) / std R           as in losses/grpo.py

in which min(r, ratio_cap) is not differentiated: the loss is a surrogate, whose value has no meaning of its
own. PPO's minimum gives a token beyond the clip interval no gradient; here it keeps one, of bounded weight.
Each prompt counts its tokens alike, so long completions count more than short ones. The equation is known
here from the implementations in TRL and verl.

The arguments and the result are described in gvpo_ray/losses/token_losses.py. `clipped_tokens` counts the
tokens whose weight is cut; they still have a gradient.
"""

from __future__ import annotations

from gvpo_ray.losses.grpo import grpo_advantages
from gvpo_ray.losses.token_losses import Batch, LossAndSums, of_tokens


@of_tokens
def cispo_loss(batch: Batch, *, ratio_cap: float = 5.0) -> LossAndSums:
    """Return the surrogate loss of this module's docstring."""
    ratios = (batch.logprobs.detach() - batch.old_logprobs).exp()
    advantages = grpo_advantages(batch)
    weighted = ratios.clamp(max=ratio_cap) * advantages[batch.completion_ids] * batch.logprobs
    # `loss` divides by m, and here every token of a prompt counts alike: times m / sum_i |y_i|.
    num_tokens = batch.sum_group(batch.lengths).clamp(min=1)
    clipped = (ratios > ratio_cap) & (advantages[batch.completion_ids] != 0)
    return batch.loss(batch.sum_tokens(weighted) * batch.sizes / num_tokens, clipped)
