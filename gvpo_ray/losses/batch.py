"""What an objective is given, and what it gives back: the seam between the learner and losses/.

An objective is a function `objective(batch: LossBatch, options) -> Computed` in a file of its own, a class of
options in config/loss.py and a line in registry.py. The learner knows none of them by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LossBatch:
    """The whole groups of one forward pass: T completion tokens, N completions.

    What the options say is not needed of sampler or reference (config/loss.py, `needs`) is None.
    """

    logprobs: Tensor
    """[T] log pi(y_t|x, y_<t), float32 or float64, carries the gradient."""
    completion_ids: Tensor
    """[T] which completion, 0..N-1, each token belongs to."""
    logprob_sums: Tensor
    """[N] log pi(y_i|x), float64, carries the gradient."""
    sampler_logprobs: Tensor | None
    """[T] of the policy that sampled, float64."""
    sampler_sums: Tensor | None
    """[N] its sums."""
    reference_logprobs: Tensor | None
    """[T] of the reference policy, float64; None also where it is asked for sums alone."""
    reference_sums: Tensor
    """[N] its sums."""
    rewards: Tensor
    """[N] float64."""
    group_ids: Tensor
    """[N] integers, equal for the completions of one prompt."""
    beta: float
    """Reward units per nat, of this step."""
    num_groups: float
    """|D|, the groups of the whole update."""


@dataclass(frozen=True)
class Computed:
    """The loss of a pass and its statistics."""

    loss: Tensor
    """A float64 scalar: this pass's share of the update's loss, so that passes and ranks add up."""
    sums: dict[str, Tensor]
    """For `diagnostics.finish`: those of `diagnostics.gvpo_sums`, and what else is reported of an objective;
    float64 scalars without gradient, with the same keys in the same order in every call."""
    residuals: Tensor
    """[N] (R_i - mean R) - beta (D_i - mean D), float64 without gradient."""
