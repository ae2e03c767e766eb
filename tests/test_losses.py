"""The objective: numbers redone by hand, squared against weighted form, and everything that must not change
it.
"""

import math

import pytest
import torch
from oracle import weighted_squared_loss, weights_floor_and_damping

from gvpo_ray.losses.diagnostics import finish
from gvpo_ray.losses.gvpo import gvpo_loss, gvpo_loss_squared, residuals
from gvpo_ray.losses.stale_data import (
    damping,
    importance_weights,
    likelihood_floor,
    stale_gvpo_loss,
    weighted_residuals,
)

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def batch(sizes: list[int], seed: int = 0, scale: float = 5.0) -> Batch:
    """logprobs, reference, rewards, group ids of groups with these sizes, in float64, shuffled."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.tensor([7 * g - 11 for g in range(len(sizes))]), torch.tensor(sizes))
    n = len(ids)
    reference = -100 * torch.rand(n, generator=random, dtype=torch.float64)
    logprobs = reference + scale * torch.randn(n, generator=random, dtype=torch.float64)
    rewards = torch.randn(n, generator=random, dtype=torch.float64)
    order = torch.randperm(n, generator=random)
    return logprobs[order], reference[order], rewards[order], ids[order]


def loss_and_grad(function, logprobs, *rest, **options) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = logprobs.clone().requires_grad_()
    loss = function(logprobs, *rest, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    loss.backward()
    return loss.detach(), logprobs.grad


def assert_same(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-12) -> None:
    scale = want.abs().max() if want.numel() else torch.tensor(1.0)
    assert (got - want).abs().max() <= tolerance * scale, (got, want)


MIXED = [2, 32, 3, 5, 2, 17, 8]


# ---------------------------------------------------------------------------------------------------- by hand


def test_pair_by_hand():
    # beta = 0.1; D = (2, 0), mean 1, so beta (D - mean D) = (0.1, -0.1); R - mean R = (0.5, -0.5); bracket =
    # (-0.4, 0.4) loss = 1/1 * 1/(2-1) * (0.16 + 0.16)/2 = 0.16; w = (0.4, -0.4); gradient = -0.1 * w =
    # (-0.04, 0.04)
    logprobs, reference, rewards = (
        torch.tensor([-1.0, -3.0]),
        torch.tensor([-3.0, -3.0]),
        torch.tensor([1.0, 0.0]),
    )
    ids = torch.tensor([4, 4])
    w = residuals(logprobs, reference, rewards, ids, 0.1)
    assert w.tolist() == pytest.approx([0.4, -0.4], abs=1e-15)
    loss, gradient = loss_and_grad(gvpo_loss, logprobs, reference, rewards, ids, 0.1)
    assert loss.item() == pytest.approx(0.16, abs=1e-15)
    assert gradient.tolist() == pytest.approx([-0.04, 0.04], rel=1e-6)


def test_two_groups_of_different_size_by_hand():
    # beta = 0.5. Group 1: D = (0, 0), R = (1, 0): w = (0.5, -0.5), term 1/1 * (0.25 + 0.25)/2 = 0.25 Group 0:
    # D = (2, 0, -2), R = (0, 0, 3): R - mean R = (-1, -1, 2), beta D = (1, 0, -1): w = (-2, -1, 3), term 1/2
    # * (4+1+9)/2 = 3.5 |D| = 2: loss = 3.75/2 = 1.875; gradient = -0.5/2 * w/(m-1) = (-0.125, 0.125) and
    # (0.25, 0.125, -0.375)
    logprobs = torch.tensor([-5.0, -1.0, -4.0, -7.0, -6.0], dtype=torch.float64)
    reference = torch.tensor([-5.0, -3.0, -4.0, -7.0, -4.0], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0])
    ids = torch.tensor([1, 0, 0, 1, 0])
    loss, gradient = loss_and_grad(gvpo_loss, logprobs, reference, rewards, ids, 0.5)
    assert loss.item() == 1.875
    assert gradient.tolist() == [-0.125, 0.25, 0.125, 0.125, -0.375]
    assert loss_and_grad(gvpo_loss_squared, logprobs, reference, rewards, ids, 0.5)[0].item() == 1.875


def test_statistics_of_these_two_groups_by_hand():
    # Group 1: Var R = 0.5, Var(beta D) = 0. Group 0: Var R = (1+1+4)/2 = 3, Var(beta D) = (1+0+1)/2 = 1,
    # covariance (-1+0-2)/2 = -1.5
    logprobs = torch.tensor([-5.0, -1.0, -4.0, -7.0, -6.0, -9.0], dtype=torch.float64)
    reference = torch.tensor([-5.0, -3.0, -4.0, -7.0, -4.0, -1.0], dtype=torch.float64)
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 3.0, 1.0])
    _, sums = gvpo_loss(logprobs, reference, rewards, torch.tensor([1, 0, 0, 1, 0, 2]), 0.5)
    assert all(
        value.dtype == torch.float64 and value.ndim == 0 and not value.requires_grad
        for value in sums.values()
    )
    metrics = finish(sums)
    histogram = {key.rpartition("/")[2]: metrics.pop(key) for key in list(metrics) if "histogram" in key}
    # w = R' - beta D': group 1 (0.5, -0.5); group 0 R' = (-1, -1, 2), beta D' = (1, 0, -1), so (-2, -1, 3)
    assert {edge: share for edge, share in histogram.items() if share} == {
        "-2.0": 0.2,
        "-1.0": 0.2,
        "-0.5": 0.2,
        "0.5": 0.2,
        "inf": 0.2,
    }
    assert metrics == pytest.approx(
        {
            "loss": 1.875,
            "gvpo/residual_var": 3.75,  # = 1.75 - 2 * (-0.75) + 0.5
            "gvpo/reward_var": 1.75,
            "gvpo/implicit_reward_var": 0.5,
            "gvpo/reward_correlation": -1.5 / math.sqrt(3.5 * 1.0),
            # log pi' = (1, -1) and, of (-1, -4, -6), (8, -1, -7)/3; log pi_ref' = (1, -1) and, of (-3, -4,
            # -4), (2, -1, -1)/3
            "gvpo/term_reward": (1.0 + (-8 + 1 - 14) / 3 / 2) / 2,
            "gvpo/term_reference": 0.5 * (2 + (16 + 1 + 7) / 9 / 2) / 2,
            "gvpo/term_variance": -0.25 * (2 + (64 + 1 + 49) / 9 / 2) / 2,
            "gvpo/effective_share": 1.0,
            "gvpo/likelihood_floor": 1.0,
            "gvpo/kl_active_share": 2 / 5,  # beta D' = 1 and -1 beside R' = -1 and 2
            "policy/kl_ref": 0.0,  # D = (0, 0) and (2, 0, -2)
            "policy/log_ratio_rms": math.sqrt(8 / 5),
            "gvpo/num_groups": 2.0,
            "gvpo/num_singletons": 1.0,  # its D of -8 is in no metric
        }
    )


def test_kl_estimate_is_the_mean_of_minus_the_log_ratio():
    # D = (-1, -2): the policy has left what the reference sampled, by 1.5 nats on average
    _, sums = gvpo_loss(
        torch.tensor([-2.0, -4.0]),
        torch.tensor([-1.0, -2.0]),
        torch.tensor([0.0, 1.0]),
        torch.tensor([0, 0]),
        0.1,
    )
    assert finish(sums)["policy/kl_ref"] == 1.5


# ------------------------------------------------------------------------------------ squared = weighted form


@pytest.mark.parametrize(
    "sizes",
    [[2], [3], [32], [2, 2, 2], MIXED, [1, 4, 1, 2], [*range(2, 33)]],
    ids=lambda sizes: str(sizes)[:24],
)
@pytest.mark.parametrize("beta", [0.01, 0.1, 3.0])
def test_weighted_form_has_value_and_gradient_of_the_squared_form(sizes, beta):
    data = batch(sizes)
    value, gradient = loss_and_grad(gvpo_loss, *data, beta)
    want_value, want_gradient = loss_and_grad(gvpo_loss_squared, *data, beta)
    assert_same(value, want_value)
    assert_same(gradient, want_gradient)
    assert want_gradient.abs().max() > 0


def test_gradient_is_minus_beta_w_over_m_minus_one_and_number_of_groups():
    logprobs, reference, rewards, ids = batch(MIXED)
    w = residuals(logprobs, reference, rewards, ids, 0.2)
    sizes = (ids[:, None] == ids).sum(1)
    _, gradient = loss_and_grad(gvpo_loss, logprobs, reference, rewards, ids, 0.2)
    assert_same(gradient, -0.2 * w / ((sizes - 1) * len(MIXED)))


def test_value_is_the_finite_difference_of_its_gradient():
    logprobs, *rest = batch([2, 5, 3])
    _, gradient = loss_and_grad(gvpo_loss, logprobs, *rest, 0.3)
    for i in range(len(logprobs)):
        step = torch.zeros_like(logprobs)
        step[i] = 1e-3
        slope = (gvpo_loss(logprobs + step, *rest, 0.3)[0] - gvpo_loss(logprobs - step, *rest, 0.3)[0]) / 2e-3
        assert slope.item() == pytest.approx(gradient[i].item(), abs=1e-9)  # exact for a quadratic


def test_gradient_reaches_the_parameters_behind_the_log_probabilities():
    theta = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    rewards, ids = torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3, dtype=torch.long)
    reference = torch.log_softmax(torch.zeros(3), 0)
    (fast,) = torch.autograd.grad(
        gvpo_loss(torch.log_softmax(theta, 0), reference, rewards, ids, 0.1)[0], theta
    )
    (plain,) = torch.autograd.grad(
        gvpo_loss_squared(torch.log_softmax(theta, 0), reference, rewards, ids, 0.1), theta
    )
    assert_same(fast, plain, 1e-6)


# ------------------------------------------------------------------------------------------------- importance


def test_importance_by_hand():
    # pi/mu = (1/4, 4, 1) is cut to (1/4, 1, 1); with mean 1: (1, 4, 4)/3. R = (1, 0, 3): mean_s R = (1 + 0 +
    # 12)/9 = 13/9; D = 0 w = (-4, -13, 14)/9: s w = (-4, -52, 56)/27 and adds up to 0; loss = 1/2 * (16 + 4 *
    # 169 + 4 * 196)/(3 * 81)/2 = 1476/972
    sampling = torch.zeros(3, dtype=torch.float64)
    logprobs, ids = (
        torch.tensor([-math.log(4), math.log(4), 0.0], dtype=torch.float64),
        torch.zeros(3, dtype=torch.long),
    )
    importance = importance_weights(logprobs, sampling, ids)
    assert importance.tolist() == pytest.approx([1 / 3, 4 / 3, 4 / 3], rel=1e-15)
    assert importance_weights(logprobs, sampling, ids, cap=8.0).tolist() == pytest.approx(
        [1 / 7, 16 / 7, 4 / 7], rel=1e-15
    )
    rewards = torch.tensor([1.0, 0.0, 3.0])
    loss, gradient = loss_and_grad(stale_gvpo_loss, logprobs, logprobs, rewards, ids, 0.5, importance)
    assert loss.item() == pytest.approx(1476 / 972, rel=1e-15)
    assert gradient.tolist() == pytest.approx(
        [0.5 / 2 * 4 / 27, 0.5 / 2 * 52 / 27, -0.5 / 2 * 56 / 27], rel=1e-14
    )
    metrics = finish(stale_gvpo_loss(logprobs, logprobs, rewards, ids, 0.5, importance)[1])
    assert metrics["gvpo/effective_share"] == pytest.approx(81 / 33 / 3) and metrics["loss"] == pytest.approx(
        1476 / 972
    )


def important(sizes: list[int], scale: float = 5.0, cap: float = 1.0) -> tuple[Batch, torch.Tensor]:
    data = batch(sizes, scale=scale)
    return data, importance_weights(
        data[0],
        data[1] + 3 * torch.randn(len(data[0]), generator=torch.Generator().manual_seed(9)),
        data[3],
        cap,
    )


@pytest.mark.parametrize("sizes", [[2], [3], [2, 2, 2], MIXED, [1, 4, 1, 2]], ids=str)
@pytest.mark.parametrize("cap", [0.1, 1.0, 30.0])
def test_with_importance_too_both_forms_are_one(sizes, cap):
    (logprobs, reference, rewards, ids), importance = important(sizes, cap=cap)
    data = (logprobs, reference, rewards, ids, 0.1, importance)
    value, gradient = loss_and_grad(stale_gvpo_loss, *data)
    want_value, want_gradient = loss_and_grad(weighted_squared_loss, *data)
    assert_same(value, want_value)
    assert_same(gradient, want_gradient)
    w, counts = weighted_residuals(*data), (ids[:, None] == ids).sum(1)
    num_groups = sum(size > 1 for size in sizes)
    assert_same(gradient, -0.1 * importance * w / ((counts - 1).clamp(min=1) * num_groups))
    metrics = finish(stale_gvpo_loss(*data)[1])
    assert (
        metrics["loss"] == pytest.approx(metrics["gvpo/residual_var"] / 2)
        and 0 < metrics["gvpo/effective_share"] < 1
    )


def test_importance_has_mean_one_in_each_group_and_is_exactly_one_where_there_is_nothing_to_weigh():
    (logprobs, _, _, ids), importance = important(MIXED, scale=500.0)
    assert importance.dtype == torch.float64 and importance.isfinite().all()
    for group in ids.unique():
        assert importance[ids == group].mean().item() == pytest.approx(1.0, rel=1e-14)
    assert torch.equal(importance_weights(logprobs, logprobs, ids), torch.ones_like(logprobs))
    assert torch.equal(importance_weights(logprobs.float(), logprobs.float(), ids), torch.ones_like(logprobs))
    far = importance_weights(torch.tensor([-9000.0, -9000.0, -1.0]), torch.zeros(3), torch.tensor([0, 0, 1]))
    assert far.tolist() == [1.0, 1.0, 1.0]  # of one likelihood in their group
    assert importance_weights(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_residuals_that_vanish_stay_zero_whatever_counts():
    _, reference, rewards, ids = batch(MIXED)
    optimum = reference + rewards / 0.1
    floor = torch.full_like(rewards, 0.5)
    _, gradient = loss_and_grad(
        stale_gvpo_loss, optimum, reference, rewards, ids, 0.1, important(MIXED)[1], floor
    )
    assert gradient.abs().max() < 1e-12


# ------------------------------------------------------------------------------------------- likelihood floor


def test_a_group_whose_best_got_less_likely_is_pushed_down_by_what_is_left_of_that_by_hand():
    # R = (1, 0), (0, 1), (1, 1); pi/mu = (1/8, 1), (1/4, 4), (1/8, 1/8): k = 1/8, 1 and, of equal rewards, 1
    # D = 0: w = (1/2, -1/2), (-1/2, 1/2), (0, 0); gradient -0.5/3 w, times k where w < 0
    sampling = torch.zeros(6, dtype=torch.float64)
    logprobs = torch.tensor([1 / 8, 1, 1 / 4, 4, 1 / 8, 1 / 8], dtype=torch.float64).log()
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    floor, ones = likelihood_floor(logprobs, sampling, rewards, ids), torch.ones_like(logprobs)
    assert floor.dtype == torch.float64 and floor.tolist() == pytest.approx(
        [1 / 8, 1 / 8, 1.0, 1.0, 1.0, 1.0], rel=1e-15
    )
    loss, gradient = loss_and_grad(stale_gvpo_loss, logprobs, logprobs, rewards, ids, 0.5, ones, floor)
    assert loss.item() == pytest.approx(1 / 6) and gradient.tolist() == pytest.approx(
        [-1 / 12, 1 / 96, 1 / 12, -1 / 12, 0, 0], rel=1e-15
    )
    assert finish(stale_gvpo_loss(logprobs, logprobs, rewards, ids, 0.5, ones, floor)[1])[
        "gvpo/likelihood_floor"
    ] == pytest.approx(17 / 24)
    assert torch.equal(
        likelihood_floor(logprobs.float(), logprobs.float(), rewards, ids), torch.ones_like(logprobs)
    )
    far = torch.tensor([-9000.0, -1.0, -9000.0, -9000.0])
    far = likelihood_floor(
        far, torch.zeros(4), torch.tensor([1.0, 0.0, 0.1, 0.1]), torch.tensor([0, 0, 1, 1])
    )
    assert far.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert likelihood_floor(*[torch.zeros(0)] * 3, torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_below_the_floor_what_goes_up_is_the_gradient_of_the_loss_and_what_goes_down_a_share_of_it():
    (logprobs, reference, rewards, ids), importance = important(MIXED)
    sampling = logprobs + torch.rand(len(logprobs), generator=torch.Generator().manual_seed(3))
    floor = likelihood_floor(logprobs, sampling, rewards, ids)
    data = (logprobs, reference, rewards, ids, 0.1, importance)
    value, want = loss_and_grad(stale_gvpo_loss, *data)
    got_value, got = loss_and_grad(stale_gvpo_loss, *data, floor)
    assert torch.equal(got_value, value) and torch.equal(got[want <= 0], want[want <= 0])
    assert_same(got[want > 0], (floor * want)[want > 0])
    assert (floor < 1)[want > 0].any() and (want < 0).any()


def test_with_weights_of_one_and_no_floor_it_is_the_papers_loss_to_the_last_bit():
    data = batch([*MIXED, 1])
    want, got = (
        loss_and_grad(gvpo_loss, *data, 0.1),
        loss_and_grad(stale_gvpo_loss, *data, 0.1, torch.ones_like(data[0])),
    )
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    sums = gvpo_loss(*data, 0.1)[1], stale_gvpo_loss(*data, 0.1, torch.ones_like(data[0]))[1]
    assert list(sums[0]) == list(sums[1]) and finish(sums[0]) == finish(sums[1])


# ---------------------------------------------------------------------------------------------------- damping


def test_damping_by_hand_and_in_plain_python():
    # R' = (0.5, -0.5), beta D' = (0.3, -0.3) and then (-0.3, 0.3) in another group: w = (0.2, -0.2), (0.8,
    # -0.8): of both together Var(R) 1, Var(w) 0.08 + 1.28 = 1.36, Cov(w, R) 0.2 + 0.8 = 1: squared
    # correlation 1/1.36
    logprobs, rewards = (
        torch.tensor([3.0, -3.0, -3.0, 3.0], dtype=torch.float64),
        torch.tensor([1.0, 0.0, 1.0, 0.0]),
    )
    sums = gvpo_loss(logprobs, torch.zeros(4), rewards, torch.tensor([0, 0, 1, 1]), 0.1)[1]
    assert damping(sums) == pytest.approx(1 / 1.36, rel=1e-14)
    (logprobs, reference, rewards, ids), _ = important(MIXED, scale=0.5)
    importance = importance_weights(logprobs, reference, ids)
    of_groups = [
        (rewards[ids == g].tolist(), (logprobs - reference)[ids == g].tolist()) for g in ids.unique()
    ]
    counts, floor, want = weights_floor_and_damping(of_groups, 0.3)
    sums = stale_gvpo_loss(logprobs, reference, rewards, ids, 0.3, importance)[1]
    assert damping(sums) == pytest.approx(want, rel=1e-12) and 0 < want < 1
    assert torch.cat([importance[ids == g] for g in ids.unique()]).tolist() == pytest.approx(
        counts.tolist(), rel=1e-12
    )
    ours = likelihood_floor(logprobs, reference, rewards, ids)
    assert torch.cat([ours[ids == g] for g in ids.unique()]).tolist() == pytest.approx(
        floor.tolist(), rel=1e-12
    )


def test_damping_is_exactly_one_at_the_reference_and_nothing_where_the_rewards_say_nothing_or_the_contrary():
    logprobs, _, rewards, ids = batch(MIXED)
    assert damping(gvpo_loss(logprobs, logprobs, rewards, ids, 0.1)[1]) == 1.0
    assert damping(gvpo_loss(logprobs, logprobs, torch.ones_like(rewards), ids, 0.1)[1]) == 0.0
    assert (
        damping(gvpo_loss(logprobs, torch.zeros_like(logprobs), torch.ones_like(rewards), ids, 0.1)[1]) == 0.0
    )
    # twice as far as they send it
    assert damping(gvpo_loss(20 * rewards, torch.zeros_like(rewards), rewards, ids, 0.1)[1]) == 0.0
    # at the optimum: rounding
    assert math.isfinite(damping(gvpo_loss(10 * rewards, torch.zeros_like(rewards), rewards, ids, 0.1)[1]))


# ----------------------------------------------------------------------------------- what must change nothing


def test_order_of_completions_and_of_groups_changes_nothing():
    data = batch(MIXED)
    value, gradient = loss_and_grad(gvpo_loss, *data, 0.1)
    for seed in range(5):
        order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(seed))
        shuffled, shuffled_gradient = loss_and_grad(gvpo_loss, *(t[order] for t in data), 0.1)
        assert_same(shuffled, value)
        assert_same(shuffled_gradient, gradient[order])


def test_names_of_groups_change_nothing():
    logprobs, reference, rewards, ids = batch([3, 2, 4])
    big = torch.where(ids == ids.min(), 2**62, torch.where(ids == ids.max(), -(2**62), 0))
    want = loss_and_grad(gvpo_loss, logprobs, reference, rewards, ids, 0.1)
    got = loss_and_grad(gvpo_loss, logprobs, reference, rewards, big, 0.1)
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])


@pytest.mark.parametrize("shifted", ["rewards", "reference", "logprobs"])
def test_a_constant_added_in_each_group_changes_nothing(shifted):
    data = dict(zip(("logprobs", "reference", "rewards", "ids"), batch(MIXED), strict=True))
    value, gradient = loss_and_grad(gvpo_loss, *data.values(), 0.1)
    data[shifted] = data[shifted] + data["ids"].double() * 2.0 + 16.0  # a different constant for each group
    moved, moved_gradient = loss_and_grad(gvpo_loss, *data.values(), 0.1)
    assert_same(moved, value, 1e-11)
    assert_same(moved_gradient, gradient, 1e-11)


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_micro_batches_of_whole_groups_add_up_to_the_whole(num_parts):
    data = batch([*MIXED, 1])  # one group without signal: it must not count
    value, gradient = loss_and_grad(gvpo_loss, *data, 0.1)
    sums = gvpo_loss(*data, 0.1)[1]
    names = data[3].unique().tolist()
    loss, parts_gradient, parts_sums = (
        torch.zeros(()).double(),
        torch.zeros_like(gradient),
        dict.fromkeys(sums, 0.0),
    )
    for part in range(num_parts):
        member = torch.isin(data[3], torch.tensor(names[part::num_parts]))
        part_value, part_gradient = loss_and_grad(
            gvpo_loss, *(t[member] for t in data), 0.1, num_groups=len(MIXED)
        )
        part_sums = gvpo_loss(*(t[member] for t in data), 0.1, num_groups=len(MIXED))[1]
        assert list(part_sums) == list(sums)
        loss += part_value
        parts_gradient[member] += part_gradient
        parts_sums = {name: parts_sums[name] + part_sums[name] for name in sums}
    assert_same(loss, value)
    assert_same(parts_gradient, gradient)
    assert finish(parts_sums) == pytest.approx(finish(sums), rel=1e-12)
    assert finish(sums)["loss"] == pytest.approx(value.item(), rel=1e-12)


def test_number_of_groups_is_the_only_denominator():
    data = batch([4, 4])
    assert_same(gvpo_loss(*data, 0.1, num_groups=8)[0], gvpo_loss(*data, 0.1)[0] / 4)
    assert_same(gvpo_loss_squared(*data, 0.1, num_groups=8), gvpo_loss_squared(*data, 0.1) / 4)
    assert finish(gvpo_loss(*data, 0.1, num_groups=8)[1]) == finish(gvpo_loss(*data, 0.1)[1])


# -------------------------------------------------------------------------------------------------- the edges


def test_residuals_sum_to_zero_in_each_group():
    logprobs, reference, rewards, ids = batch([*MIXED, 1], scale=50)
    weights = residuals(logprobs, reference, rewards, ids, 0.5)
    for group in ids.unique():
        assert abs(weights[ids == group].sum()) < 1e-12
    assert weights.abs().max() > 1


def test_a_group_of_one_has_no_weight_and_is_not_counted():
    logprobs, reference, rewards, ids = batch([3, 2])
    one = torch.tensor([-4.0], dtype=torch.float64)
    added = (one, 2 * one, one, torch.tensor([999]))
    with_one = [torch.cat(pair) for pair in zip((logprobs, reference, rewards, ids), added, strict=True)]
    value, gradient = loss_and_grad(gvpo_loss, *with_one, 0.1)
    want, want_gradient = loss_and_grad(gvpo_loss, logprobs, reference, rewards, ids, 0.1)
    assert value == want and gradient[-1] == 0 and torch.equal(gradient[:-1], want_gradient)
    assert loss_and_grad(gvpo_loss_squared, *with_one, 0.1)[0].item() == pytest.approx(want.item(), rel=1e-12)


@pytest.mark.parametrize("ids", [[], [5], [5, -5, 7]], ids=str)
def test_nothing_to_train_on_is_a_loss_of_zero(ids):
    n = len(ids)
    logprobs = torch.full((n,), -3.0, requires_grad=True)
    for loss, sums in (
        gvpo_loss(logprobs, torch.zeros(n), torch.ones(n), torch.tensor(ids, dtype=torch.long), 0.1),
        gvpo_loss(
            logprobs, torch.zeros(n), torch.ones(n), torch.tensor(ids, dtype=torch.long), 0.1, num_groups=4
        ),
    ):
        assert loss.item() == 0.0
        assert all(math.isfinite(value) for value in finish(sums).values())
        assert finish(sums)["gvpo/num_singletons"] == n
        loss.backward()
        assert not logprobs.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_policy_equal_to_reference_gives_a_log_ratio_of_exactly_zero(dtype):
    logprobs, _, rewards, ids = batch(MIXED)
    logprobs = logprobs.to(dtype)
    weights = residuals(logprobs, logprobs, rewards, ids, 0.1)
    _, sums = gvpo_loss(logprobs, logprobs, rewards, ids, 0.1)
    metrics = finish(sums)
    assert metrics["policy/kl_ref"] == 0.0 and math.copysign(1, metrics["policy/kl_ref"]) == 1
    assert (
        metrics["policy/log_ratio_rms"]
        == metrics["gvpo/implicit_reward_var"]
        == metrics["gvpo/reward_correlation"]
        == 0.0
    )
    # beta has nothing to act on
    assert torch.equal(weights, residuals(logprobs, logprobs, rewards, ids, 55.0))


def test_at_log_ratio_zero_the_gradient_is_reinforce_with_a_mean_baseline():
    # R = (1, 0, 0, 0), mean 0.25: gradient = -beta/(m - 1) (R - mean R) = -0.3/3 * (0.75, -0.25, -0.25,
    # -0.25)
    logprobs, rewards = torch.full((4,), -2.0, dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0, 0.0])
    _, gradient = loss_and_grad(
        gvpo_loss, logprobs, logprobs.clone(), rewards, torch.zeros(4, dtype=torch.long), 0.3
    )
    assert gradient.tolist() == pytest.approx([-0.075, 0.025, 0.025, 0.025], rel=1e-12)


def test_equal_rewards_pull_the_policy_back_to_the_reference():
    # D = (3, -1), all right: descent lowers the first, which has risen, and raises the second
    logprobs, reference = torch.tensor([-1.0, -5.0]), torch.tensor([-4.0, -4.0])
    _, gradient = loss_and_grad(
        gvpo_loss, logprobs, reference, torch.ones(2), torch.zeros(2, dtype=torch.long), 0.5
    )
    assert gradient.tolist() == [0.5, -0.5]  # -beta w, w = -beta (D - mean D) = -0.5 * (2, -2)


def test_the_optimum_has_loss_and_gradient_of_zero():
    # D_i = R_i / beta + a constant of the group (-log Z)
    _, reference, rewards, ids = batch(MIXED)
    logprobs = reference + rewards / 0.25 - 0.5 * ids.double()
    loss, gradient = loss_and_grad(gvpo_loss, logprobs, reference, rewards, ids, 0.25)
    assert loss < 1e-24 and gradient.abs().max() < 1e-12
    metrics = finish(gvpo_loss(logprobs, reference, rewards, ids, 0.25)[1])
    assert (
        metrics["gvpo/reward_correlation"] == pytest.approx(1.0, abs=1e-12)
        and metrics["gvpo/residual_var"] < 1e-24
    )


def test_beta_scales_the_log_ratio():
    logprobs, reference, rewards, ids = batch(MIXED)
    # loss(beta, D) = loss(1, beta D); and with rewards scaled alike the loss scales with the square
    want, _ = loss_and_grad(gvpo_loss, reference + 0.2 * (logprobs - reference), reference, rewards, ids, 1.0)
    assert_same(gvpo_loss(logprobs, reference, rewards, ids, 0.2)[0], want, 1e-11)
    assert_same(gvpo_loss(logprobs, reference, 3 * rewards, ids, 0.6)[0], 9 * want, 1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_is_float64_and_the_gradient_has_the_dtype_of_the_log_probabilities(dtype):
    logprobs, reference, rewards, ids = batch([3, 4])
    loss, gradient = loss_and_grad(gvpo_loss, logprobs.to(dtype), reference, rewards.float(), ids, 0.1)
    assert loss.dtype == torch.float64 and gradient.dtype == dtype


def test_float32_sums_of_long_answers_lose_nothing_more_in_the_loss():
    # -20000.5 nats and neighbours, exact in float32: the means and squares of them are not
    logprobs = torch.tensor([-20000.5, -20001.25, -19999.75, -20000.0], dtype=torch.float32)
    reference = torch.tensor([-20000.0, -20001.25, -20000.0, -20000.25], dtype=torch.float32)
    # D = (-0.5, 0, 0.25, 0.25), mean 0; R = (1, 0, 0, 0): w = R - mean R - D = (1.25, -0.25, -0.5, -0.5) at
    # beta = 1
    weights = residuals(
        logprobs, reference, torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long), 1.0
    )
    assert weights.tolist() == [1.25, -0.25, -0.5, -0.5]
    loss, _ = gvpo_loss(
        logprobs, reference, torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4, dtype=torch.long), 1.0
    )
    assert loss.item() == pytest.approx((1.5625 + 0.0625 + 0.25 + 0.25) / 2 / 3, rel=1e-15)


def test_log_ratio_is_taken_in_float64():
    # D = (-2**24 + 0.5, 0), whose first needs 25 bits, one more than float32 has; beta (D - mean D) = (-, +)
    # 8388607.75 at beta = 1
    weights = residuals(
        torch.tensor([-(2.0**24), 0.0]), torch.tensor([-0.5, 0.0]), torch.zeros(2), torch.zeros(2).long(), 1.0
    )
    assert weights.tolist() == [8388607.75, -8388607.75]


def test_a_million_float32_completions_are_averaged_without_drift():
    # rewards 0.1 as float32 in one huge group: the mean must be that number, to float64 accuracy
    n = 1_000_000
    rewards = torch.full((n,), 0.1)
    weights = residuals(torch.zeros(n), torch.zeros(n), rewards, torch.zeros(n, dtype=torch.long), 0.1)
    assert weights.abs().max() < 1e-10


def test_no_gradient_flows_into_the_reference_or_the_rewards():
    logprobs, reference, rewards, ids = batch([3, 2])
    reference.requires_grad_()
    rewards.requires_grad_()
    logprobs.requires_grad_()
    gvpo_loss(logprobs, reference, rewards, ids, 0.1)[0].backward()
    assert logprobs.grad is not None and reference.grad is None and rewards.grad is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, not 0.0"),
        ({"beta": float("nan")}, "beta must be positive, not nan"),
        ({"num_groups": 0}, "num_groups must be positive, not 0"),
        ({"rewards": torch.zeros(3)}, r"\[N\] alike, not \[\(2,\), \(2,\), \(3,\), \(2,\)\]"),
        ({"reference_logprobs": torch.zeros(1)}, r"\[N\] alike"),  # would broadcast
        ({"logprobs": torch.zeros(2, 1)}, r"\[N\] alike"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {
        "logprobs": torch.zeros(2),
        "reference_logprobs": torch.zeros(2),
        "rewards": torch.zeros(2),
        "beta": 0.1,
    }
    arguments["group_ids"] = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        gvpo_loss(**{**arguments, **change})


# ------------------------------------------------------------------------------------------------ readings


def test_the_three_terms_have_the_gradient_of_the_loss():
    logprobs, reference, rewards, ids = batch(MIXED)
    beta, num_groups = 0.3, len(set(ids.tolist()))
    _, want = loss_and_grad(gvpo_loss, logprobs, reference, rewards, ids, beta)
    variable = logprobs.double().clone().requires_grad_()
    terms = {"term_reward": 0.0, "term_reference": 0.0, "term_variance": 0.0}
    for group in set(ids.tolist()):
        own, ref, reward = (x.double()[ids == group] for x in (variable, reference, rewards))
        m = len(own)
        if m < 2:
            num_groups -= 1
            continue
        own, ref, reward = (x - x.mean() for x in (own, ref, reward))
        terms["term_reward"] += (reward * own).sum() / (m - 1)
        terms["term_reference"] += beta * (ref * own).sum() / (m - 1)
        terms["term_variance"] += -beta / 2 * own.square().sum() / (m - 1)
    (gradient,) = torch.autograd.grad(-beta * sum(terms.values()) / num_groups, variable)
    torch.testing.assert_close(gradient, want.double(), rtol=1e-6, atol=1e-9)
    metrics = finish(gvpo_loss(logprobs, reference, rewards, ids, beta)[1])
    for name, value in terms.items():
        assert metrics[f"gvpo/{name}"] == pytest.approx(value.item() / num_groups, rel=1e-9)


def test_the_histogram_counts_every_residual_once():
    metrics = finish(gvpo_loss(*batch(MIXED), 0.3)[1])
    assert sum(value for key, value in metrics.items() if "residual_histogram" in key) == pytest.approx(1.0)
