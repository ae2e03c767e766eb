"""DAPO is GRPO with four changes (arXiv 2503.14476): the objective on one page.

A prompt x has m completions y_i with rewards R_i, sampled by pi_old. With r = pi(y_t|x, y_<t) / pi_old(y_t|x,
y_<t) for each token, and T the number of all tokens of all completions in the update,

    loss = -1/T sum_x sum_i sum_t min[ r A_i, clip(r, 1 - clip_low, 1 + clip_high) A_i ]
    A_i  = (R_i - mean R) / std R           as in losses/grpo.py

1. Clip higher: clip_high is above clip_low (0.28 and 0.2), so that rare tokens can become likely.
2. Token mean: every token of the update counts alike, so long completions count more than short ones. The
   equation of the paper takes this mean within each prompt; that of the update is TRL's and verl's.
3. Groups whose rewards are all equal are left out before T is counted; rewards are totals, with that of 4.
   The paper samples until a batch is full without them; here a step is as much smaller as its share of such
   groups (metric groups/equal).
4. Completions that are too long are punished softly: the reward `length`, which is verifiers.rewards' and not
   this function's.

There is no KL term. The equation is known here from the implementations in TRL and verl.
"""

from __future__ import annotations

from torch import Tensor

from gvpo_ray.losses.grpo import grpo_advantages
from gvpo_ray.losses.token_losses import Batch, LossAndSums
from gvpo_ray.losses.within_groups import rewards_differ


def dapo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor,
    completion_ids: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    num_tokens: float | None = None,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> LossAndSums:
    """Return the loss of this module's docstring; autograd differentiates it as it stands.

    Arguments and result are those of losses/token_losses.py but for one: `num_tokens` is T, the number of
    trained tokens of the whole update in groups whose rewards differ; default: those in this call. The sums
    have `num_counted` as well, the tokens of this call that T counts.

    Raises:
        ValueError: num_tokens is not positive, or as for Batch.
    """
    if num_tokens is not None and num_tokens <= 0:
        raise ValueError(f"num_tokens must be positive, not {num_tokens}")
    batch = Batch(logprobs, old_logprobs, reference_logprobs, completion_ids, rewards, group_ids)
    counted = rewards_differ(batch.rewards, batch.index, len(batch.counts))[completion_ids]
    terms, clipped = batch.clipped_terms(grpo_advantages(batch), clip_low, clip_high, 0.0)
    objective = -terms[counted].sum()
    num = counted.sum().double()
    sums = {
        "objective": objective.detach(),
        "num_tokens": num,
        "clipped_tokens": (counted & clipped).sum().double(),
        "num_counted": num,
    }
    return objective / (num.clamp(min=1) if num_tokens is None else num_tokens), sums
