"""Dr. GRPO is GRPO without its length and difficulty biases (arXiv 2503.20783): the objective on one page.

A prompt x has m completions y_i with rewards R_i, sampled by pi_old. With r = pi(y_t|x, y_<t) / pi_old(y_t|x,
y_<t) for each token,

    loss = -1/|D| sum_x 1/m sum_i sum_t { min[ r A_i, clip(r, 1 - clip_low, 1 + clip_high) A_i ]
                                          - kl_coefficient k3 }
    A_i  = R_i - mean R    within the group

Two of GRPO's biases are gone: without 1/|y_i|, long wrong answers are no longer punished less than short
ones; without 1/std R, prompts on which nearly all answers are right or wrong no longer weigh more. The paper
trains with kl_coefficient = 0; k3 is defined as in GRPO (losses/grpo.py). At pi = pi_old the gradient is
(m - 1)/m times RLOO's, whose baseline leaves y_i out: m/(m - 1) (R_i - mean R) = R_i - mean_{j != i} R_j.

The arguments and the result are described in gvpo_ray/losses/token_losses.py.
"""

from __future__ import annotations

from gvpo_ray.losses.token_losses import Batch, LossAndSums, of_tokens


@of_tokens
def dr_grpo_loss(
    batch: Batch, *, clip_low: float = 0.2, clip_high: float = 0.2, kl_coefficient: float = 0.0
) -> LossAndSums:
    """Return the loss of this module's docstring, which autograd differentiates as it stands."""
    terms, clipped = batch.clipped_terms(batch.centred_rewards(), clip_low, clip_high, kl_coefficient)
    return batch.loss(batch.sum_tokens(terms), clipped)
