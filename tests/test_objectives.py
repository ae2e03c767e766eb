"""GRPO, Dr. GRPO, RLOO, REINFORCE: numbers redone by hand, each against its formula in plain loops, and what
must not change them.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gvpo_ray.losses.dr_grpo import dr_grpo_loss
from gvpo_ray.losses.grpo import grpo_loss
from gvpo_ray.losses.gvpo import gvpo_loss
from gvpo_ray.losses.reinforce import reinforce_loss
from gvpo_ray.losses.rloo import rloo_loss

LOSSES = [grpo_loss, dr_grpo_loss, rloo_loss, reinforce_loss]
STATS = ["objective", "num_tokens", "clipped_tokens"]
every_loss = pytest.mark.parametrize("loss", LOSSES)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss_and_grad(
    loss: Callable, logprobs: Tensor, *rest, **options
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    logprobs = logprobs.clone().requires_grad_()
    value, stats = loss(logprobs, *rest, **options)
    value.backward()
    return value.detach(), logprobs.grad, stats


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    scale = want.abs().max().clamp(min=1) if want.numel() else torch.tensor(1.0)
    assert got.shape == want.shape and (got - want).abs().max() <= tolerance * scale, (got, want)


def batch(sizes: list[int], seed: int = 0, spread: float = 0.4) -> tuple[Tensor, ...]:
    """The six leading arguments for groups with these sizes: completions of 1 to 7 tokens, everything
    shuffled.
    """
    random = torch.Generator().manual_seed(seed)
    group_ids = torch.repeat_interleave(
        torch.tensor([7 * g - 11 for g in range(len(sizes))]), torch.tensor(sizes)
    )
    n = len(group_ids)
    group_ids = group_ids[torch.randperm(n, generator=random)]
    completion_ids = torch.repeat_interleave(torch.arange(n), torch.randint(1, 8, (n,), generator=random))
    t = len(completion_ids)
    completion_ids = completion_ids[torch.randperm(t, generator=random)]
    logprobs = -3 * torch.rand(t, generator=random, dtype=torch.float64)
    old = logprobs + spread * torch.randn(t, generator=random, dtype=torch.float64)
    reference = logprobs + spread * torch.randn(t, generator=random, dtype=torch.float64)
    rewards = torch.randn(n, generator=random, dtype=torch.float64)
    return logprobs, old, reference, completion_ids, rewards, group_ids


MIXED = [2, 5, 3, 1, 8, 2, 16]


# ---------------------------------------------------------------------------------------------------- by hand

# Two rewards (1, 0) in group 5, three (0, 1, 2) in group -2, and one completion alone in group 9; 2, 3, 1, 1,
# 2 and 1 tokens.
HAND_IDS, HAND_GROUPS, HAND_REWARDS = (
    torch.tensor([0, 0, 1, 1, 1, 2, 3, 4, 4, 5]),
    torch.tensor([5, 5, -2, -2, -2, 9]),
    doubles(1, 0, 0, 1, 2, 9),
)
HAND_LOGPROBS = doubles(-1, -2, -1, -1, -1, -4, -5, -1, -2, -7)  # of the completions: -3, -3, -4, -5, -3, -7
HAND_RATIOS = doubles(1.5, 0.5, 0.5, 1.5, 1.0, 2.0, 4.0, 1.0, 1.25, 3.0)  # pi/pi_old
# log pi/pi_ref of the completions: 2, 0, 2, 0, -2, 5
HAND_REFERENCE = HAND_LOGPROBS - doubles(1, 1, 0, 0, 0, 2, 0, -1, -1, 5)
HAND = (HAND_LOGPROBS, HAND_LOGPROBS - HAND_RATIOS.log(), HAND_REFERENCE, HAND_IDS, HAND_REWARDS, HAND_GROUPS)


def test_grpo_by_hand():
    # std of (1, 0) is sqrt(1/2), of (0, 1, 2) it is 1: A = (a, -a) with a = 0.5/sqrt(1/2) = sqrt(1/2), and
    # (-1, 0, 1) completion 0: ratios 1.5 and 0.5 at A > 0: 1.2 a (clipped) and 0.5 a, mean 0.85 a completion
    # 1: ratios 0.5, 1.5, 1 at A < 0: -0.8 a (clipped), -1.5 a and -a, mean -1.1 a; group: (0.85 - 1.1) a / 2
    # = -0.125 a completion 2: -2. Completion 3: 0. Completion 4: 1 and 1.2 (clipped), mean 1.1; group: (-2 +
    # 0 + 1.1)/3 = -0.3 gradient: -1/2 1/m 1/|y| r A, and 0 where clipped
    a = math.sqrt(0.5)
    loss, gradient, stats = loss_and_grad(grpo_loss, *HAND)
    assert loss.item() == pytest.approx((0.125 * a + 0.3) / 2, rel=1e-14)
    assert gradient.tolist() == pytest.approx(
        [0, -a / 16, 0, a / 8, a / 12, 1 / 3, 0, -1 / 12, 0, 0], rel=1e-14
    )
    assert {name: value.item() for name, value in stats.items()} == pytest.approx(
        {"objective": 0.125 * a + 0.3, "num_tokens": 9.0, "clipped_tokens": 3.0}, rel=1e-14
    )


def test_dr_grpo_by_hand():
    # A = (0.5, -0.5) and (-1, 0, 1); the same ratios, summed: 0.5 * 1.7 = 0.85 and -0.5 * 3.3 = -1.65, group
    # -0.8/2 = -0.4; -2, 0 and 2.2, group 0.2/3
    loss, gradient, stats = loss_and_grad(dr_grpo_loss, *HAND)
    assert loss.item() == pytest.approx((0.4 - 0.2 / 3) / 2, rel=1e-14)
    assert gradient.tolist() == pytest.approx(
        [0, -0.0625, 0, 0.1875, 0.125, 1 / 3, 0, -1 / 6, 0, 0], rel=1e-14
    )
    assert [value.item() for value in stats.values()] == pytest.approx([0.4 - 0.2 / 3, 9, 3], rel=1e-14)


def test_clipping_has_two_sides_of_their_own():
    # clip_low = 0.6, clip_high = 1.0: of the ratios only 4 at A = 0 is outside, where there is nothing to
    # clip group 5: 0.5 * (1.5 + 0.5) - 0.5 * (0.5 + 1.5 + 1) = -0.5, halved; group -2: (-2 + 0 + 2.25)/3
    loss, _, stats = loss_and_grad(dr_grpo_loss, *HAND, clip_low=0.6, clip_high=1.0)
    assert loss.item() == pytest.approx((0.25 - 0.25 / 3) / 2, rel=1e-14) and stats["clipped_tokens"] == 0
    # 1.5 and 1.25 at A > 0
    assert loss_and_grad(dr_grpo_loss, *HAND, clip_low=0.6, clip_high=0.2)[2]["clipped_tokens"] == 2
    # 0.5 at A < 0
    assert loss_and_grad(dr_grpo_loss, *HAND, clip_low=0.2, clip_high=1.0)[2]["clipped_tokens"] == 1


@pytest.mark.parametrize(
    ("loss", "value", "second"), [(grpo_loss, 0.75 - math.log(2) / 2, 0.5), (dr_grpo_loss, 0.5, 1.0)]
)
def test_k3_by_hand(loss, value, second):
    # Rewards are equal, so only the penalty is left, at 0.1. pi_ref/pi = 2 in the one token of completion 0:
    # k3 = 2 - ln 2 - 1 = 1 - ln 2, slope 1 - 2 = -1. 1/2 and 1 in the two of completion 1: k3 = ln 2 - 1/2
    # and 0, slopes 1/2 and 0. GRPO: 0.1/2 (1 - ln 2 + (ln 2 - 1/2)/2); Dr. GRPO: 0.1/2 (1 - ln 2 + ln 2 -
    # 1/2)
    logprobs = doubles(-1, -1, -1)
    arguments = (
        logprobs,
        logprobs + 1,
        logprobs + doubles(2, 0.5, 1).log(),
        torch.tensor([0, 1, 1]),
        doubles(0.1, 0.1),
        torch.tensor([3, 3]),
    )
    got, gradient, stats = loss_and_grad(loss, *arguments, kl_coefficient=0.1)
    assert got.item() == pytest.approx(0.05 * value, rel=1e-14)
    assert gradient.tolist() == pytest.approx([-0.05, 0.05 * 0.5 * second, 0], abs=1e-16)
    assert stats["num_tokens"] == 3 and stats["clipped_tokens"] == 0


def test_rloo_by_hand():
    # A = (1 - 0, 0 - 1) and (0 - 1.5, 1 - 1, 2 - 0.5); -1/2 [ 1/2 (-3 + 3) + 1/3 (6 + 0 - 4.5) ] = -0.25;
    # gradient -1/2 1/m A
    loss, gradient, stats = loss_and_grad(rloo_loss, *HAND)
    assert loss.item() == pytest.approx(-0.25, rel=1e-14)
    assert gradient.tolist() == pytest.approx(
        [-0.25, -0.25, 0.25, 0.25, 0.25, 0.25, 0, -0.25, -0.25, 0], rel=1e-14
    )
    assert [value.item() for value in stats.values()] == pytest.approx([-0.5, 9, 0], rel=1e-14)


def test_rloo_with_a_penalty_in_the_reward_by_hand():
    # R' = R - 0.5 (2, 0 | 2, 0, -2) = (0, 0 | -1, 1, 3); A = (0, 0) and (-1 - 2, 1 - 1, 3 - 0); -1/2 [ 0 +
    # 1/3 (12 - 9) ] = -0.5
    loss, gradient, _ = loss_and_grad(rloo_loss, *HAND, kl_coefficient=0.5)
    assert loss.item() == pytest.approx(-0.5, rel=1e-14)
    assert gradient.tolist() == pytest.approx([0, 0, 0, 0, 0, 0.5, 0, -0.5, -0.5, 0], rel=1e-14)


def test_reinforce_by_hand():
    # A = R - 0.5 = (0.5, -0.5 | -0.5, 0.5, 1.5); -1/2 [ 1/2 (-1.5 + 1.5) + 1/3 (2 - 2.5 - 4.5) ] = 5/6;
    # gradient -1/2 1/m A
    loss, gradient, stats = loss_and_grad(reinforce_loss, *HAND, baseline=0.5)
    assert loss.item() == pytest.approx(5 / 6, rel=1e-14)
    assert gradient.tolist() == pytest.approx(
        [-0.125, -0.125, 0.125, 0.125, 0.125, 1 / 12, -1 / 12, -0.25, -0.25, 0], rel=1e-14
    )
    assert [value.item() for value in stats.values()] == pytest.approx([5 / 3, 9, 0], rel=1e-14)


def test_reinforce_with_a_penalty_in_the_reward_by_hand():
    # R' = (0, 0 | -1, 1, 3) as for RLOO; -1/2 [ 0 + 1/3 (4 - 5 - 9) ] = 5/3
    loss, gradient, _ = loss_and_grad(reinforce_loss, *HAND, kl_coefficient=0.5)
    assert loss.item() == pytest.approx(5 / 3, rel=1e-14)
    assert gradient.tolist() == pytest.approx([0, 0, 0, 0, 0, 1 / 6, -1 / 6, -0.5, -0.5, 0], rel=1e-14)


# ------------------------------------------------------------------------- against the formula in plain loops


def plain(
    objective: str,
    logprobs,
    old,
    reference,
    completion_ids,
    rewards,
    group_ids,
    low=0.2,
    high=0.2,
    kl=0.0,
    baseline=0.0,
) -> Tensor:
    """The formulas of the four pages, one group, completion and token after the other."""
    groups = [g for g in sorted(set(group_ids.tolist())) if (group_ids == g).sum() >= 2]
    total = torch.zeros((), dtype=torch.float64)
    for g in groups:
        members = [i for i in range(len(rewards)) if group_ids[i] == g]
        tokens = {i: [t for t in range(len(logprobs)) if completion_ids[t] == i] for i in members}
        log_pi = {i: sum(logprobs[t] for t in tokens[i]) for i in members}
        reward = {i: rewards[i].item() for i in members}
        if objective in ("rloo", "reinforce"):
            reward = {
                i: reward[i] - kl * (log_pi[i] - sum(reference[t] for t in tokens[i])).item() for i in members
            }
        mean = sum(reward.values()) / len(members)
        std = math.sqrt(sum((r - mean) ** 2 for r in reward.values()) / (len(members) - 1))
        for i in members:
            others = sum(reward[j] for j in members if j != i) / (len(members) - 1)
            if objective in ("rloo", "reinforce"):
                term = (reward[i] - (others if objective == "rloo" else baseline)) * log_pi[i]
            else:
                advantage = (reward[i] - mean) / (std if objective == "grpo" else 1)
                term = 0
                for t in tokens[i]:
                    ratio = torch.exp(logprobs[t]) / torch.exp(old[t])
                    k3 = torch.exp(reference[t] - logprobs[t]) - (reference[t] - logprobs[t]) - 1
                    term = term + min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage) - kl * k3
                term = term / (len(tokens[i]) if objective == "grpo" else 1)
            total = total - term / len(members)
    return total / len(groups)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (grpo_loss, {}),
        (grpo_loss, {"low": 0.1, "high": 0.3, "kl": 0.7}),
        (dr_grpo_loss, {}),
        (dr_grpo_loss, {"low": 0.1, "high": 0.3, "kl": 0.7}),
        (rloo_loss, {}),
        (rloo_loss, {"kl": 0.7}),
        (reinforce_loss, {}),
        (reinforce_loss, {"baseline": 0.4, "kl": 0.7}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_value_and_gradient_are_those_of_the_plain_formula(loss, options, seed):
    arguments = batch(MIXED, seed)
    full_names = {"low": "clip_low", "high": "clip_high", "kl": "kl_coefficient", "baseline": "baseline"}
    got, gradient, stats = loss_and_grad(
        loss, *arguments, **{full_names[name]: value for name, value in options.items()}
    )
    logprobs = arguments[0].clone().requires_grad_()
    want = plain(loss.__name__.removesuffix("_loss"), logprobs, *arguments[1:], **options)
    want.backward()
    assert_same(got, want.detach())
    assert_same(gradient, logprobs.grad)
    assert logprobs.grad.abs().max() > 0.01
    assert (stats["clipped_tokens"] > 10) == (loss in (grpo_loss, dr_grpo_loss))


# --------------------------------------------------------------------------------------- how they are related


def at_the_sampling_policy(seed: int = 0) -> tuple[Tensor, ...]:
    logprobs, _, *rest = batch(MIXED, seed)
    return logprobs, logprobs.clone(), *rest


def test_grpo_at_the_sampling_policy_is_the_policy_gradient_with_its_advantages():
    arguments = at_the_sampling_policy()
    _, gradient, stats = loss_and_grad(grpo_loss, *arguments)
    completion_ids, rewards, group_ids = arguments[3:]
    want = torch.zeros_like(gradient)
    for t, i in enumerate(completion_ids.tolist()):
        group = rewards[group_ids == group_ids[i]]
        if len(group) >= 2:
            advantage = (rewards[i] - group.mean()) / group.std()
            want[t] = -advantage / (completion_ids == i).sum() / len(group) / (len(MIXED) - 1)
    assert_same(gradient, want)
    assert stats["clipped_tokens"] == 0


def test_dr_grpo_at_the_sampling_policy_is_m_minus_one_over_m_times_rloo():
    arguments = at_the_sampling_policy()
    _, dr_grpo, _ = loss_and_grad(dr_grpo_loss, *arguments)
    _, rloo, _ = loss_and_grad(rloo_loss, *arguments)
    # the size of the group that each token belongs to
    m = (arguments[5][:, None] == arguments[5]).sum(1).double()[arguments[3]]
    assert_same(dr_grpo, (m - 1) / m * rloo)
    assert rloo.abs().max() > 0.01


def test_rloo_with_a_penalty_is_gvpo_over_beta():
    logprobs, old, reference, completion_ids, rewards, group_ids = batch(MIXED)
    _, gradient, _ = loss_and_grad(
        rloo_loss, logprobs, old, reference, completion_ids, rewards, group_ids, kl_coefficient=0.3
    )
    leaf = logprobs.clone().requires_grad_()
    sums = [
        torch.zeros(len(rewards)).double().index_add(0, completion_ids, values)
        for values in (leaf, reference)
    ]
    gvpo_loss(*sums, rewards, group_ids, 0.3)[0].backward()
    assert_same(gradient, leaf.grad / 0.3)


def test_reinforce_with_the_mean_reward_as_baseline_is_dr_grpo_at_the_sampling_policy():
    logprobs, old, reference, completion_ids, rewards, _ = at_the_sampling_policy()
    arguments = (
        logprobs,
        old,
        reference,
        completion_ids,
        rewards,
        torch.zeros(len(rewards), dtype=torch.long),
    )
    _, gradient, _ = loss_and_grad(reinforce_loss, *arguments, baseline=rewards.mean().item())
    assert_same(gradient, loss_and_grad(dr_grpo_loss, *arguments)[1])


# ----------------------------------------------------------------------------------- what must change nothing


@every_loss
@pytest.mark.parametrize("num_parts", [2, 3])
def test_calls_with_whole_groups_add_up(loss, num_parts):
    arguments = batch(MIXED)
    value, gradient, stats = loss_and_grad(loss, *arguments, kl_coefficient=0.5)
    names = arguments[5].unique().tolist()
    added_value, added_gradient, added = (
        torch.zeros(()).double(),
        torch.zeros_like(gradient),
        dict.fromkeys(STATS, 0.0),
    )
    for part in range(num_parts):
        completion = torch.isin(arguments[5], torch.tensor(names[part::num_parts]))
        token = completion[arguments[3]]
        renumbered = (completion.cumsum(0) - 1)[arguments[3][token]]
        tokens = (*(t[token] for t in arguments[:3]), renumbered)
        part_value, part_gradient, part_stats = loss_and_grad(
            loss,
            *tokens,
            arguments[4][completion],
            arguments[5][completion],
            len(MIXED) - 1,
            kl_coefficient=0.5,
        )
        added_value += part_value
        added_gradient[token] += part_gradient
        added = {name: added[name] + part_stats[name] for name in STATS}
    assert_same(added_value, value)
    assert_same(added_gradient, gradient)
    assert_same(torch.stack([*added.values()]), torch.stack([*stats.values()]))
    assert list(stats) == STATS and all(
        s.dtype == torch.float64 and s.ndim == 0 and not s.requires_grad for s in stats.values()
    )
    assert_same(stats["objective"], value * (len(MIXED) - 1))


@every_loss
def test_order_of_tokens_and_completions_and_names_of_groups_change_nothing(loss):
    logprobs, old, reference, completion_ids, rewards, group_ids = batch(MIXED)
    want = loss_and_grad(
        loss, logprobs, old, reference, completion_ids, rewards, group_ids, kl_coefficient=0.5
    )
    random = torch.Generator().manual_seed(5)
    token, completion = (
        torch.randperm(len(logprobs), generator=random),
        torch.randperm(len(rewards), generator=random),
    )
    moved_ids = completion.argsort()[completion_ids][token]  # where each completion has gone
    tokens = (logprobs[token], old[token], reference[token], moved_ids)
    got = loss_and_grad(
        loss, *tokens, rewards[completion], -(2**40) * group_ids[completion], kl_coefficient=0.5
    )
    assert_same(got[0], want[0])
    assert_same(got[1], want[1][token])
    assert_same(got[2]["clipped_tokens"], want[2]["clipped_tokens"])


@pytest.mark.parametrize("loss", [grpo_loss, dr_grpo_loss, rloo_loss])
def test_a_constant_added_to_the_rewards_of_a_group_changes_nothing(loss):
    *tokens, rewards, group_ids = batch(MIXED)
    want = loss_and_grad(loss, *tokens, rewards, group_ids)
    got = loss_and_grad(loss, *tokens, rewards + 2.0 * group_ids, group_ids)
    assert_same(got[0], want[0], 1e-11)
    assert_same(got[1], want[1], 1e-11)


def test_only_grpo_does_not_see_the_scale_of_the_rewards():
    *tokens, rewards, group_ids = batch(MIXED)
    assert_same(
        loss_and_grad(grpo_loss, *tokens, 10 * rewards, group_ids)[1],
        loss_and_grad(grpo_loss, *tokens, rewards, group_ids)[1],
    )
    for loss in (dr_grpo_loss, rloo_loss, reinforce_loss):
        want = loss_and_grad(loss, *tokens, rewards, group_ids)[1]
        assert_same(loss_and_grad(loss, *tokens, 10 * rewards, group_ids)[1], 10 * want)


# -------------------------------------------------------------------------------------------------- the edges


@pytest.mark.parametrize("loss", [grpo_loss, dr_grpo_loss, rloo_loss])
def test_equal_rewards_have_no_gradient(loss):
    # The mean of seven 0.1 is not 0.1 in float64; GRPO must not divide that rounding by itself, nor clipping
    # count it.
    *tokens, rewards, group_ids = batch([7, 3])
    value, gradient, stats = loss_and_grad(loss, *tokens, torch.full_like(rewards, 0.1), group_ids)
    assert value.abs() < 1e-14 and gradient.abs().max() < 1e-15
    assert stats["clipped_tokens"] == 0 and stats["num_tokens"] == len(tokens[0])


@every_loss
def test_a_group_of_one_counts_for_nothing(loss):
    logprobs, old, reference, completion_ids, rewards, group_ids = batch([3, 2])
    want = loss_and_grad(
        loss, logprobs, old, reference, completion_ids, rewards, group_ids, kl_coefficient=0.5
    )
    one = doubles(-4)
    tokens = [torch.cat([t, one]) for t in (logprobs, old + 9, reference)]
    tokens[1][:-1] = old
    ids = torch.cat([completion_ids, torch.tensor([5])])
    got = loss_and_grad(
        loss,
        *tokens,
        ids,
        torch.cat([rewards, one]),
        torch.cat([group_ids, torch.tensor([999])]),
        kl_coefficient=0.5,
    )
    assert_same(got[0], want[0])
    assert_same(got[1], torch.cat([want[1], doubles(0)]))
    assert [s.item() for s in got[2].values()] == pytest.approx(
        [s.item() for s in want[2].values()], rel=1e-12
    )


@every_loss
@pytest.mark.parametrize("num_groups", [None, 4])
@pytest.mark.parametrize(("completion_ids", "n"), [([], 0), ([], 2), ([0, 0, 1], 2)])
def test_nothing_to_train_on_is_a_loss_of_zero(loss, num_groups, completion_ids, n):
    logprobs = torch.full((len(completion_ids),), -1.0)
    arguments = (
        logprobs,
        logprobs - 1,
        logprobs - 1,
        torch.tensor(completion_ids, dtype=torch.long),
        torch.arange(float(n)),
        torch.arange(n),
    )
    value, gradient, stats = loss_and_grad(loss, *arguments, num_groups, kl_coefficient=0.5)
    assert value == 0 and not gradient.any()
    assert list(stats) == STATS and not any(stats.values())


@every_loss
def test_completions_without_tokens_still_are_in_their_group(loss):
    # Group of three, of which the first has no token: its reward is in the mean of the others.
    logprobs = doubles(-1, -2)
    arguments = (
        logprobs,
        logprobs,
        logprobs,
        torch.tensor([1, 2]),
        doubles(0, 1, 2),
        torch.zeros(3, dtype=torch.long),
    )
    _, gradient, _ = loss_and_grad(loss, *arguments)
    advantages = {grpo_loss: (0, 1), dr_grpo_loss: (0, 1), rloo_loss: (0, 1.5), reinforce_loss: (1, 2)}[loss]
    assert gradient.tolist() == pytest.approx([-a / 3 for a in advantages], abs=1e-15)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_float64_and_the_gradient_has_the_dtype_of_the_log_probabilities(loss, dtype):
    logprobs, old, reference, completion_ids, rewards, group_ids = batch([3, 4])
    value, gradient, _ = loss_and_grad(
        loss,
        logprobs.to(dtype),
        old.to(dtype),
        reference.to(dtype),
        completion_ids,
        rewards.float(),
        group_ids,
    )
    assert value.dtype == torch.float64 and gradient.dtype == dtype


@every_loss
def test_only_the_log_probabilities_take_gradient(loss):
    logprobs, old, reference, completion_ids, rewards, group_ids = batch([3, 2])
    for t in (logprobs, old, reference, rewards):
        t.requires_grad_()
    loss(logprobs, old, reference, completion_ids, rewards, group_ids, kl_coefficient=0.5)[0].backward()
    assert logprobs.grad.any() and old.grad is None and reference.grad is None and rewards.grad is None


@every_loss
def test_the_reference_is_not_read_without_a_penalty(loss):
    logprobs, old, reference, *rest = batch([3, 2])
    want = loss_and_grad(loss, logprobs, old, reference, *rest)
    got = loss_and_grad(loss, logprobs, old, torch.full_like(reference, math.nan), *rest)
    assert got[0] == want[0] and torch.equal(got[1], want[1])


@pytest.mark.parametrize("loss", [rloo_loss, reinforce_loss])
def test_the_sampling_policy_is_not_read_by_rloo_and_reinforce(loss):
    logprobs, old, *rest = batch([3, 2])
    assert loss(logprobs, torch.full_like(old, math.nan), *rest)[0] == loss(logprobs, old, *rest)[0]


@every_loss
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(3, 1)}, r"\[T\] alike, not \[\(3, 1\), \(3,\), \(3,\), \(3,\)\]"),
        ({"old_logprobs": torch.zeros(1)}, r"\[T\] alike"),  # would broadcast
        ({"reference_logprobs": torch.zeros(2)}, r"\[T\] alike"),
        ({"completion_ids": torch.zeros(4, dtype=torch.long)}, r"\[T\] alike"),
        ({"rewards": torch.zeros(1)}, r"\[N\] alike, not \[\(1,\), \(2,\)\]"),
        ({"rewards": torch.zeros(2, 1), "group_ids": torch.zeros(2, 1)}, r"\[N\] alike"),
        ({"completion_ids": torch.tensor([0, 1, 2])}, r"completion_ids must be in 0\.\.1"),
        ({"completion_ids": torch.tensor([0, 1, -1])}, r"completion_ids must be in 0\.\.1"),
        ({"num_groups": 0}, "num_groups must be positive, not 0"),
        ({"kl_coefficient": -0.1}, "kl_coefficient must not be negative, as -0.1 is"),
        ({"kl_coefficient": math.nan}, "kl_coefficient must not be negative, as nan is"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_that_do_not_fit_are_refused(loss, change, message):
    arguments = {name: torch.zeros(3) for name in ("logprobs", "old_logprobs", "reference_logprobs")}
    arguments |= {
        "completion_ids": torch.tensor([0, 1, 1]),
        "rewards": torch.zeros(2),
        "group_ids": torch.zeros(2, dtype=torch.long),
    }
    with pytest.raises(ValueError, match=message):
        loss(**{**arguments, **change})


@pytest.mark.parametrize("loss", [grpo_loss, dr_grpo_loss])
@pytest.mark.parametrize("side", ["clip_low", "clip_high"])
def test_negative_clipping_is_refused(loss, side):
    with pytest.raises(ValueError, match=f"{side} must not be negative"):
        loss(*batch([2]), **{side: -0.2})
