"""The registry lists the objectives by their names in the config.

A new objective is a loss in a file of its own, a class of options in config/loss.py and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gvpo_ray.config.loss import LossOptions, PoftLoss
from gvpo_ray.losses import stale_data
from gvpo_ray.losses.batch import Computed, LossBatch, Total
from gvpo_ray.losses.cispo import cispo_loss
from gvpo_ray.losses.dapo import dapo_loss
from gvpo_ray.losses.diagnostics import gvpo_sums
from gvpo_ray.losses.dpo import dpo_loss
from gvpo_ray.losses.dr_grpo import dr_grpo_loss
from gvpo_ray.losses.epa import epa_loss
from gvpo_ray.losses.grpo import grpo_loss
from gvpo_ray.losses.gspo import gspo_loss
from gvpo_ray.losses.gvpo import residuals
from gvpo_ray.losses.maxrl import maxrl_loss
from gvpo_ray.losses.oapl import oapl_loss
from gvpo_ray.losses.poft import poft_loss
from gvpo_ray.losses.reinforce import reinforce_loss
from gvpo_ray.losses.rloo import rloo_loss
from gvpo_ray.losses.sft import sft_loss
from gvpo_ray.losses.token_losses import LossAndSums

Loss = Callable[..., LossAndSums]
"""A loss; its keyword arguments are the options of its class in config/loss.py."""

Objective = Callable[[LossBatch, Any], Computed]
"""A loss on one forward pass, with GVPO's statistics; its second argument is the section `loss`."""


def over_completions(loss: Loss) -> Objective:
    """Make the objective of a loss that compares whole completions, as `dpo_loss` does."""

    def objective(batch: LossBatch, options: LossOptions) -> Computed:
        return _computed(batch, *loss(*batch.sequences, batch.total.groups, **options.arguments))

    return objective


def over_tokens(loss: Loss, counted: Callable[[Total], float] = lambda total: total.groups) -> Objective:
    """Make the objective of one of the losses that token_losses.py describes.

    Where the options do not need the sampler's or the reference's log-probs, the loss does not read them, and
    the current policy's are passed in their place.

    Args:
        loss: the loss.
        counted: what it is the mean over, of the whole update.
    """

    def objective(batch: LossBatch, options: LossOptions) -> Computed:
        own = batch.logprobs.detach().double()
        result = loss(
            batch.logprobs,
            own if batch.sampler_logprobs is None else batch.sampler_logprobs,
            own if batch.reference_logprobs is None else batch.reference_logprobs,
            batch.completion_ids,
            batch.rewards,
            batch.group_ids,
            counted(batch.total),
            **options.arguments,
        )
        return _computed(batch, *result)

    return objective


def sft_objective(batch: LossBatch, options: LossOptions) -> Computed:
    """Return the loss of `sft_loss` on one forward pass."""
    value, sums = sft_loss(batch.logprobs, batch.total.tokens)
    return _computed(batch, value, sums | {"num_counted": sums["objective"].new_tensor(len(batch.logprobs))})


def poft_objective(batch: LossBatch, options: PoftLoss) -> Computed:
    """Return the loss of `poft_loss` on one forward pass: a reward is the aligned models' mean log-prob."""
    num = len(batch.rewards)
    lengths = torch.bincount(batch.completion_ids, minlength=num)
    value, sums = poft_loss(
        batch.logprob_sums, lengths, batch.rewards, batch.total.completions, options.beta, options.gamma
    )
    return _computed(batch, value, sums | {"num_counted": sums["objective"].new_tensor(num)})


def epa_objective(batch: LossBatch, options: LossOptions) -> Computed:
    """Return the loss of `epa_loss` on one forward pass."""
    return _computed(batch, *epa_loss(*batch.sequences, batch.total.groups, batch.is_weak))


OWN_SUMS = (
    *("num_tokens", "clipped_tokens", "num_counted"),
    *("pairs", "pairs_ordered", "margin", "positive_share", "weight"),
)
"""The sums of losses that `diagnostics.finish` reads, as far as a loss has them."""


def _computed(batch: LossBatch, value: Any, sums: dict[str, Any]) -> Computed:
    w = residuals(*batch.sequences)
    own = {name: sums[name] for name in OWN_SUMS if name in sums}
    return Computed(value, gvpo_sums(*batch.sequences, w, sums["objective"]) | own, w)


OBJECTIVES: dict[str, Objective] = {
    "gvpo": stale_data.objective,
    "grpo": over_tokens(grpo_loss),
    "dr_grpo": over_tokens(dr_grpo_loss),
    "rloo": over_tokens(rloo_loss),
    "reinforce": over_tokens(reinforce_loss),
    "gspo": over_tokens(gspo_loss),
    "cispo": over_tokens(cispo_loss),
    "dapo": over_tokens(dapo_loss, lambda total: total.tokens),
    "maxrl": over_tokens(maxrl_loss),
    "oapl": over_completions(oapl_loss),
    "dpo": over_completions(dpo_loss),
    "epa": epa_objective,
    "sft": sft_objective,
    "poft": poft_objective,
}
"""The objective of each `loss.objective`."""
