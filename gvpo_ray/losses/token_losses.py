"""The objectives of GRPO's kind share arguments, sums over tokens and groups, and the kind of result.

GRPO, Dr. GRPO, RLOO, REINFORCE, GSPO, CISPO, MaxRL and DAPO are called as `grpo_loss(logprobs, old_logprobs,
reference_logprobs, completion_ids, rewards, group_ids, num_groups, ...)`. With T the number of completion
tokens of a micro-batch and N that of its completions:

    logprobs            [T] log pi(y_t | x, y_<t), float32 or float64; the gradient comes back in this dtype
    old_logprobs        [T] log-probs by the policy that sampled; takes no gradient
    reference_logprobs  [T] log-probs by pi_ref; takes no gradient, and is read only if kl_coefficient > 0
    completion_ids      [T] the completion, 0..N-1, that each token belongs to, in any order
    rewards             [N]
    group_ids           [N] integers, equal for the completions of one prompt; groups of any size, in any
                        order
    num_groups          |D|, the groups with m >= 2 in the whole update; default: those in this call

A group of one has nothing to be compared with: it is not trained on and not counted, whatever the objective.
They return the loss, a float64 scalar, and these sums, float64 scalars without gradient, with the same
keys in the same order in every objective:

    objective       loss * |D|
    num_tokens      tokens trained on
    clipped_tokens  those whose gradient clipping has set to zero

|D| is the only thing shared between groups, so all of these add up over micro-batches and ranks that hold
whole groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, Protocol

import torch
from torch import Tensor

from gvpo_ray.losses.gvpo import number_of_groups
from gvpo_ray.losses.within_groups import deviations, partition, rewards_differ


class Batch:
    """A Batch holds the arguments of a loss, checked and in float64.

    Raises:
        ValueError: the shapes differ, a token belongs to no completion, or num_groups is not positive.
    """

    def __init__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        reference_logprobs: Tensor,
        completion_ids: Tensor,
        rewards: Tensor,
        group_ids: Tensor,
        num_groups: float | None = None,
    ) -> None:
        of_tokens = (logprobs, old_logprobs, reference_logprobs, completion_ids)
        if logprobs.ndim != 1 or any(tensor.shape != logprobs.shape for tensor in of_tokens):
            raise ValueError(
                "logprobs, old_logprobs, reference_logprobs and completion_ids must be [T] alike, not "
                f"{[tuple(tensor.shape) for tensor in of_tokens]}"
            )
        if rewards.ndim != 1 or rewards.shape != group_ids.shape:
            raise ValueError(
                "rewards and group_ids must be [N] alike, not "
                f"{[tuple(rewards.shape), tuple(group_ids.shape)]}"
            )
        num = len(rewards)
        if len(completion_ids) and not 0 <= int(completion_ids.min()) <= int(completion_ids.max()) < num:
            raise ValueError(f"completion_ids must be in 0..{num - 1}")
        self.logprobs = logprobs.double()  # [T], carries the gradient
        self.old_logprobs = old_logprobs.detach().double()  # [T]
        self.reference_logprobs = reference_logprobs.detach().double()  # [T]
        self.completion_ids = completion_ids  # [T]
        self.rewards = rewards.detach().double()  # [N]
        self.index, self.counts = partition(group_ids)  # [N] which group, 0..G-1; [G] sizes m of the groups
        self.num_groups = number_of_groups(self.counts, num_groups)

    @property
    def sizes(self) -> Tensor:
        """The size m of the group that each completion belongs to, [N]."""
        return self.counts[self.index]

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each completion, |y_i|, [N]."""
        return self.sum_tokens(torch.ones_like(self.old_logprobs))

    def centre(self, values: Tensor) -> Tensor:
        """Return each value minus the mean of its group; [N] -> [N]."""
        return deviations(values, self.index, self.counts)

    def centred_rewards(self) -> Tensor:
        """Return R_i - mean R, [N].

        It is exactly 0 where all rewards of the group are equal; the mean alone, rounded, may differ from
        them.
        """
        differ = rewards_differ(self.rewards, self.index, len(self.counts))
        return torch.where(differ, self.centre(self.rewards), 0.0)

    def sum_group(self, values: Tensor) -> Tensor:
        """Return for each completion the sum over its group; [N] -> [N]."""
        return self.rewards.new_zeros(len(self.counts)).index_add(0, self.index, values)[self.index]

    def sum_tokens(self, values: Tensor) -> Tensor:
        """Return the sum over the tokens of each completion; [T] -> [N]."""
        return self.rewards.new_zeros(len(self.rewards)).index_add(0, self.completion_ids, values)

    def penalized_rewards(self, kl_coefficient: float) -> Tensor:
        """Return R_i - kl_coefficient (log pi(y_i|x) - log pi_ref(y_i|x)), [N], without gradient.

        The penalty is a part of the reward, so it is not differentiated.

        Raises:
            ValueError: kl_coefficient is negative.
        """
        _check_not_negative(kl_coefficient=kl_coefficient)
        if not kl_coefficient:
            return self.rewards
        return self.rewards - kl_coefficient * self.sum_tokens(
            self.logprobs.detach() - self.reference_logprobs
        )

    def clipped_terms(
        self, advantages: Tensor, clip_low: float, clip_high: float, kl_coefficient: float
    ) -> tuple[Tensor, Tensor]:
        """Return min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) - kl_coefficient k3 for each token.

        k3 = pi_ref/pi - log(pi_ref/pi) - 1 is never negative, and its mean over completions of pi is KL(pi ||
        pi_ref).

        Args:
            advantages: [N] A of each completion.
            clip_low: largest decrease of the ratio r that still has a gradient where A < 0.
            clip_high: largest increase of the ratio r that still has a gradient where A > 0.
            kl_coefficient: weight of k3.

        Returns:
            The terms, [T], and whether the minimum no longer depends on r, [T] bool.

        Raises:
            ValueError: an option is negative.
        """
        _check_not_negative(clip_low=clip_low, clip_high=clip_high, kl_coefficient=kl_coefficient)
        advantage = advantages[self.completion_ids]
        ratio = (self.logprobs - self.old_logprobs).exp()
        terms = torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)
        clipped = ((advantage > 0) & (ratio > 1 + clip_high)) | ((advantage < 0) & (ratio < 1 - clip_low))
        if kl_coefficient:
            log_ratio = self.reference_logprobs - self.logprobs
            terms = terms - kl_coefficient * (torch.expm1(log_ratio) - log_ratio)
        return terms, clipped

    def loss(self, terms: Tensor, clipped: Tensor | None = None) -> LossAndSums:
        """Return the loss -1/|D| sum_x 1/m sum_i terms_i and the sums that are reported with it.

        Args:
            terms: [N] the objective of each completion.
            clipped: [T] bool, whether clipping has set a token's gradient to zero; default: nowhere.
        """
        trained = self.sizes >= 2
        objective = -(terms * trained / self.sizes).sum()
        token_trained = trained[self.completion_ids]
        stats = {
            "objective": objective.detach(),
            "num_tokens": token_trained.sum().double(),
            "clipped_tokens": (token_trained & clipped).sum().double()
            if clipped is not None
            else objective.new_zeros(()),
        }
        return objective / self.num_groups, stats


LossAndSums = tuple[Tensor, dict[str, Tensor]]
"""A loss, and the sums that are reported with it."""

Options = ParamSpec("Options")


class TokenLoss(Protocol[Options]):
    """A TokenLoss is a function with the arguments of this module's docstring, and options of its own."""

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        reference_logprobs: Tensor,
        completion_ids: Tensor,
        rewards: Tensor,
        group_ids: Tensor,
        num_groups: float | None = None,
        *args: Options.args,
        **options: Options.kwargs,
    ) -> LossAndSums:
        """Return the loss and the sums of this module's docstring."""
        ...


def of_tokens(loss: Callable[Concatenate[Batch, Options], LossAndSums]) -> TokenLoss[Options]:
    """Make a TokenLoss of a function of a Batch: its arguments are checked and made a Batch first."""

    @functools.wraps(loss)
    def checked(
        logprobs: Tensor,
        old_logprobs: Tensor,
        reference_logprobs: Tensor,
        completion_ids: Tensor,
        rewards: Tensor,
        group_ids: Tensor,
        num_groups: float | None = None,
        *args: Options.args,
        **options: Options.kwargs,
    ) -> LossAndSums:
        batch = Batch(
            logprobs, old_logprobs, reference_logprobs, completion_ids, rewards, group_ids, num_groups
        )
        return loss(batch, *args, **options)

    del checked.__wrapped__  # help() then shows the arguments of `checked`
    return checked


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must not be negative, as {value} is")
