"""RLOO is REINFORCE with a leave-one-out baseline (arXiv 2402.14740): the objective on one page.

A prompt x has m completions y_i with rewards R_i. With log pi(y_i|x) summed over the tokens of y_i,

    grad loss = -1/|D| sum_x 1/m sum_i A_i grad log pi(y_i|x)
    A_i = R'_i - 1/(m - 1) sum_{j != i} R'_j                            the baseline is the mean of the others
    R'_i = R_i - kl_coefficient [ log pi(y_i|x) - log pi_ref(y_i|x) ]   the paper's reward, not differentiated

The loss is the surrogate -1/|D| sum_x 1/m sum_i A_i log pi(y_i|x), which has this gradient; its value has no
meaning of its own. There is no ratio and no clipping: a whole completion is one action. The paper samples
from pi itself. Here pi is the policy being trained, also in R'; implementations that fix R' when sampling
differ once pi has moved on. With R' as here, A_i = m/(m - 1) w_i with GVPO's w_i at beta = kl_coefficient,
and the gradient is GVPO's divided by beta: both push the same way, so their rest points are the same.

The arguments and the result are described in gvpo_ray/losses/token_losses.py; old_logprobs is not used.
"""

from __future__ import annotations

from gvpo_ray.losses.token_losses import Batch, LossAndSums, of_tokens


@of_tokens
def rloo_loss(batch: Batch, *, kl_coefficient: float = 0.0) -> LossAndSums:
    """Return the surrogate loss of this module's docstring."""
    # R_i - mean of the others = m/(m - 1) (R_i - mean of all)
    advantages = (
        batch.centre(batch.penalized_rewards(kl_coefficient)) * batch.sizes / (batch.sizes - 1).clamp(min=1)
    )
    return batch.loss(advantages * batch.sum_tokens(batch.logprobs))
