"""The learner hands an objective a LossBatch, and the objective returns a Computed.

A new objective is a loss in a file of its own, a class of options in config/loss.py and a line in
registry.py. The learner does not know the objectives by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Total:
    """A Total counts what an update trains on, on all ranks: the denominators of the losses."""

    groups: float
    """|D|, the number of groups; of objectives that compare completions all have at least two."""
    completions: float
    tokens: float
    """The number of trained tokens."""


@dataclass(frozen=True)
class LossBatch:
    """A LossBatch holds the whole groups of one forward pass: T completion tokens in N completions.

    Log-probs that the options do not need (`sampler_need`, `reference_need` in config/loss.py) are None.
    """

    logprobs: Tensor
    """[T] log pi(y_t|x, y_<t), float32 or float64; this tensor carries the gradient."""
    completion_ids: Tensor
    """[T] The completion, 0..N-1, that each token belongs to."""
    logprob_sums: Tensor
    """[N] log pi(y_i|x), the sums of `logprobs` over each completion; float64, with gradient."""
    sampler_logprobs: Tensor | None
    """[T] Token log-probs by the policy that sampled the completions, float64."""
    sampler_sums: Tensor | None
    """[N] The sums of `sampler_logprobs` over each completion, float64."""
    reference_logprobs: Tensor | None
    """[T] Token log-probs by the reference policy, float64; also None where only its sums are needed."""
    reference_sums: Tensor
    """[N] log pi_ref(y_i|x), float64."""
    rewards: Tensor
    """[N] R(x, y_i), float64."""
    group_ids: Tensor
    """[N] Integers, equal for the completions of one prompt."""
    beta: float
    """The beta of this step, in reward units per nat."""
    is_weak: Tensor
    """[N] bool, the weak negatives: completions of other prompts that stand in the group (`epa`)."""
    total: Total
    """What the whole update holds, on all ranks."""

    @property
    def sequences(self) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """The first arguments of every loss over whole completions, as `gvpo_loss` takes them."""
        return self.logprob_sums, self.reference_sums, self.rewards, self.group_ids, self.beta


@dataclass(frozen=True)
class Computed:
    """A Computed holds the loss of one forward pass and its statistics."""

    loss: Tensor
    """A float64 scalar: this pass's share of the update's loss, so that passes and ranks add up."""
    sums: dict[str, Tensor]
    """The sums of `diagnostics.gvpo_sums` and those that an objective adds, for `diagnostics.finish`.

    They are float64 scalars without gradient, with the same keys in the same order in every call.
    """
    residuals: Tensor
    """[N] (R_i - mean R) - beta (D_i - mean D), float64 without gradient."""
