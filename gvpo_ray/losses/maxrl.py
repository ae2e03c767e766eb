"""MaxRL is a policy gradient whose advantage is relative to the mean reward (arXiv 2602.02710).

A prompt x has m completions y_i with rewards R_i >= 0. With log pi(y_i|x) summed over the tokens of y_i,

    grad loss = -1/|D| sum_x 1/m sum_i A_i grad log pi(y_i|x)
    A_i = (R_i - mean R) / mean R           within the group; 0 where all rewards are equal

so that a rare success counts more than a common one. The loss is the surrogate -1/|D| sum_x 1/m sum_i A_i log
pi(y_i|x), which has this gradient; its value has no meaning of its own. The advantage is known here from a
summary of the paper, not from its text; that the estimator is otherwise plain REINFORCE, without a ratio and
without clipping, is an assumption. Where a reward is negative, mean R is no measure of success: a group whose
mean is not positive has no advantage.

The arguments and the result are described in gvpo_ray/losses/token_losses.py; old_logprobs and
reference_logprobs are not used.
"""

from __future__ import annotations

import torch

from gvpo_ray.losses.token_losses import Batch, LossAndSums, of_tokens


@of_tokens
def maxrl_loss(batch: Batch) -> LossAndSums:
    """Return the surrogate loss of this module's docstring."""
    mean = batch.sum_group(batch.rewards) / batch.sizes
    advantages = torch.where(mean > 0, batch.centred_rewards() / mean, 0.0)
    return batch.loss(advantages * batch.sum_tokens(batch.logprobs))
