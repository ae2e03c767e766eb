"""REINFORCE is the plain policy gradient (Williams, Machine Learning 8, 1992): the objective on one page.

A prompt x has m completions y_i with rewards R_i. With log pi(y_i|x) summed over the tokens of y_i and a
constant baseline b,

    grad loss = -1/|D| sum_x 1/m sum_i (R'_i - b) grad log pi(y_i|x)
    R'_i = R_i - kl_coefficient [ log pi(y_i|x) - log pi_ref(y_i|x) ]      not differentiated

The loss is the surrogate -1/|D| sum_x 1/m sum_i (R'_i - b) log pi(y_i|x), which has this gradient; its value
has no meaning of its own. The completions of a prompt are not compared with each other. Groups of one are
left out all the same, so that every objective trains on the same completions and |D| means the same. The
baseline changes only the noise of the gradient where pi itself samples; where it does not, the baseline
changes the result too.

The arguments and the result are described in gvpo_ray/losses/token_losses.py; old_logprobs is not used.
"""

from __future__ import annotations

from gvpo_ray.losses.token_losses import Batch, LossAndSums, of_tokens


@of_tokens
def reinforce_loss(batch: Batch, *, kl_coefficient: float = 0.0, baseline: float = 0.0) -> LossAndSums:
    """Return the surrogate loss of this module's docstring."""
    advantages = batch.penalized_rewards(kl_coefficient) - baseline
    return batch.loss(advantages * batch.sum_tokens(batch.logprobs))
