"""The objectives beside GVPO and GRPO's kin: published vectors, oracles in plain torch, and identities."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid, softplus

from gvpo_ray.config.loss import loss_config
from gvpo_ray.losses import dpo_loss, epa_loss, gvpo_loss, poft_loss, sft_loss
from gvpo_ray.losses.batch import LossBatch, Total
from gvpo_ray.losses.cispo import cispo_loss
from gvpo_ray.losses.dapo import dapo_loss
from gvpo_ray.losses.diagnostics import finish
from gvpo_ray.losses.gspo import gspo_loss
from gvpo_ray.losses.maxrl import maxrl_loss
from gvpo_ray.losses.oapl import oapl_loss
from gvpo_ray.losses.registry import OBJECTIVES


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def value_and_gradient(loss: Any, logprobs: Tensor, *rest: Any, **options: Any) -> tuple[float, list[float]]:
    leaf = logprobs.clone().requires_grad_()
    value, _ = loss(leaf, *rest, **options)
    assert value.dtype == torch.float64 and value.ndim == 0
    (gradient,) = torch.autograd.grad(value, leaf)
    assert gradient.dtype == logprobs.dtype
    return float(value), gradient.tolist()


def groups(sizes: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probs, reference, rewards with ties, and group ids of groups of these sizes, shuffled."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.repeat_interleave(torch.arange(len(sizes)) * 7 - 3, torch.tensor(sizes))
    ids = ids[torch.randperm(len(ids), generator=random)]
    logprobs = -40 * torch.rand(len(ids), generator=random, dtype=torch.float64)
    reference = logprobs + 3 * torch.randn(len(ids), generator=random, dtype=torch.float64)
    rewards = torch.randint(0, 4, (len(ids),), generator=random).double() / 3
    return logprobs, reference, rewards, ids


MIXED = [2, 5, 3, 1, 8, 2, 16]
PAIR = (doubles(2, -1), doubles(0, 0), doubles(1, 0), torch.tensor([4, 4]))

# ------------------------------------------------------------------------------------------------- vectors


def test_dpo_of_one_pair_is_the_published_number():
    value, gradient = value_and_gradient(dpo_loss, *PAIR, 0.1)
    assert value == pytest.approx(0.5543552444685, abs=1e-13)
    assert gradient == pytest.approx([-0.0425557483188, 0.0425557483188], abs=1e-13)


def test_epa_of_a_positive_a_strong_and_two_weak_negatives_is_the_published_number():
    weak = torch.tensor([False, False, True, True])
    value, gradient = value_and_gradient(
        epa_loss, doubles(2, -1, 0.5, -3), torch.zeros(4), doubles(1, 0, 5, 5), torch.zeros(4), 0.1, weak=weak
    )
    assert value == pytest.approx(1.1656654132947, abs=1e-13)
    assert gradient == pytest.approx([-0.0688284826, 0.0230924280, 0.0268295736, 0.0189064810], abs=1e-10)


def test_poft_of_one_completion_is_the_published_number_and_its_gradient_is_divided_by_the_length():
    aligned = doubles(-0.9, -1.5, -1.0).mean().reshape(1)
    for length in (1, 5):
        value, gradient = value_and_gradient(
            poft_loss, doubles(-1.2 * length), torch.tensor([length]), aligned
        )
        assert value == pytest.approx(0.7270359665986, abs=1e-13)
        assert gradient == pytest.approx([-0.5166604965694 / length], abs=1e-13)


def test_ipo_of_one_pair_is_the_published_number():
    assert value_and_gradient(dpo_loss, *PAIR, 0.1, ipo=True)[0] == pytest.approx(4.0, abs=1e-13)


# ------------------------------------------------------------------------------------ identities, oracles


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
def test_gvpo_of_a_pair_is_beta_squared_over_four_times_ipo_at_half_of_beta(beta):
    logprobs, reference, _, _ = groups([8])
    ids, rewards = torch.arange(8) // 2, doubles(1, 0, 0, 1, 1, 0, 0, 1)
    gvpo = value_and_gradient(gvpo_loss, logprobs, reference, rewards, ids, beta)
    ipo = value_and_gradient(dpo_loss, logprobs, reference, rewards, ids, beta / 2, ipo=True)
    assert gvpo[0] == pytest.approx(beta**2 / 4 * ipo[0], rel=1e-12)
    assert gvpo[1] == pytest.approx([beta**2 / 4 * entry for entry in ipo[1]], rel=1e-9, abs=1e-15)


def test_gvpo_is_the_mean_over_pairs_of_a_quarter_of_their_squared_difference():
    logprobs, reference, rewards, ids = groups(MIXED)
    x = 0.3 * (logprobs - reference) - rewards
    means = []
    for group in ids.unique():
        own = x[ids == group]
        if len(own) > 1:
            i, j = torch.triu_indices(len(own), len(own), 1)
            means.append(((own[i] - own[j]).square() / 4).mean())
    value = value_and_gradient(gvpo_loss, logprobs, reference, rewards, ids, 0.3)[0]
    assert value == pytest.approx(float(torch.stack(means).mean()), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_mean_over_a_groups_pairs(smoothing):
    logprobs, reference, rewards, ids = groups(MIXED)
    total = 0.0
    for group in ids.unique():
        own = torch.nonzero(ids == group).flatten().tolist()
        margins = [
            0.1 * (logprobs[i] - reference[i] - logprobs[j] + reference[j])
            for i in own
            for j in own
            if rewards[i] > rewards[j]
        ]
        if margins:
            margin = torch.stack(margins)
            total += float((-(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)).mean())
    value = value_and_gradient(dpo_loss, logprobs, reference, rewards, ids, 0.1, label_smoothing=smoothing)[0]
    assert value == pytest.approx(total / (len(MIXED) - 1), rel=1e-12)


def test_epa_is_the_cross_entropy_of_choosing_the_positive():
    logprobs, reference, _, _ = groups([20])
    rewards, ids = doubles(*[1, 0, 0, 0, 0] * 4), torch.arange(20) // 5
    value, gradient = value_and_gradient(epa_loss, logprobs, reference, rewards, ids, 0.1)
    leaf = logprobs.clone().requires_grad_()
    oracle = cross_entropy(0.1 * (leaf - reference).view(4, 5), torch.zeros(4, dtype=torch.long))
    (wanted,) = torch.autograd.grad(oracle, leaf)
    assert value == pytest.approx(oracle.item(), rel=1e-12)
    assert gradient == pytest.approx(wanted.tolist(), rel=1e-9, abs=1e-15)
    assert [sum(gradient[5 * g : 5 * g + 5]) for g in range(4)] == pytest.approx([0] * 4, abs=1e-15)


def test_epa_of_a_pair_is_dpo_and_several_best_are_no_negatives_of_each_other():
    assert value_and_gradient(epa_loss, *PAIR, 0.1)[0] == pytest.approx(
        value_and_gradient(dpo_loss, *PAIR, 0.1)[0], rel=1e-14
    )
    logprobs, reference = doubles(2, 1, -1), torch.zeros(3)
    best, other = [
        value_and_gradient(epa_loss, logprobs[[i, 2]], reference[:2], doubles(1, 0), torch.zeros(2), 0.1)[0]
        for i in (0, 1)
    ]
    both = value_and_gradient(epa_loss, logprobs, reference, doubles(1, 1, 0), torch.zeros(3), 0.1)[0]
    assert both == pytest.approx((best + other) / 2, rel=1e-14)


def test_epa_without_a_negative_has_a_loss_and_a_gradient_of_zero():
    value, gradient = value_and_gradient(
        epa_loss, doubles(1, 2, -700, 3), doubles(0, 0, 0, 0), doubles(1, 1, 1, 9), doubles(0, 0, 0, 1), 5.0
    )
    assert value == 0 and gradient == [0, 0, 0, 0]


def test_poft_is_a_mean_of_softplus():
    random = torch.Generator().manual_seed(0)
    logprobs, aligned = (-50 * torch.rand(2, 9, generator=random, dtype=torch.float64)).unbind()
    lengths = torch.arange(1, 10)
    value = value_and_gradient(poft_loss, logprobs, lengths, aligned, beta=0.7, gamma=0.2)[0]
    wanted = softplus(-(0.7 * (logprobs / lengths - aligned) + 0.2)).mean()
    assert value == pytest.approx(wanted.item(), rel=1e-12)
    halves = [
        value_and_gradient(poft_loss, logprobs[part], lengths[part], aligned[part], 9, beta=0.7, gamma=0.2)[0]
        for part in (slice(0, 4), slice(4, 9))
    ]
    assert sum(halves) == pytest.approx(value, rel=1e-14)


def test_at_the_reference_dpo_is_log_two_epa_the_log_of_the_candidates_and_oapl_the_rewards_alone():
    logprobs, ids, rewards = doubles(-300.5, -2, -7, -40), torch.zeros(4), doubles(1, 0, 0, 0)
    assert value_and_gradient(dpo_loss, logprobs, logprobs, rewards, ids, 0.1)[0] == pytest.approx(
        math.log(2), rel=1e-15
    )
    assert value_and_gradient(epa_loss, logprobs, logprobs, rewards, ids, 0.1)[0] == pytest.approx(
        math.log(4), rel=1e-15
    )
    value = 0.5 * math.log((math.exp(2) + 3) / 4)
    wanted = ((1 - value) ** 2 + 3 * value**2) / 4
    assert value_and_gradient(oapl_loss, logprobs, logprobs, rewards, ids, 0.5)[0] == pytest.approx(
        wanted, rel=1e-14
    )


def test_oapl_vanishes_at_gvpos_optimum_when_the_group_is_every_outcome_of_a_uniform_sampler():
    beta, rewards, ids = 0.5, doubles(1, 1, 0), torch.zeros(3)
    reference = doubles(1 / 3, 1 / 3, 1 / 3).log()
    optimum = (reference + rewards / beta).log_softmax(0)
    assert optimum.exp().tolist() == pytest.approx([0.468, 0.468, 0.063], abs=1e-3)
    for loss in (oapl_loss, gvpo_loss):
        value, gradient = value_and_gradient(loss, optimum, reference, rewards, ids, beta)
        assert value == pytest.approx(0, abs=1e-30) and gradient == pytest.approx([0] * 3, abs=1e-15)
    # For another temperature of V*, log Z is missed.
    assert value_and_gradient(oapl_loss, optimum, reference, rewards, ids, beta, value_beta=5.0)[0] > 0.01


def test_oapl_by_a_plain_loop():
    logprobs, reference, rewards, ids = groups(MIXED)
    total = 0.0
    for group in ids.unique():
        own = ids == group
        if own.sum() > 1:
            value = 0.2 * torch.logsumexp(rewards[own] / 0.2 - math.log(own.sum()), 0)
            total += float((0.1 * (logprobs - reference)[own] - rewards[own] + value).square().mean())
    got = value_and_gradient(oapl_loss, logprobs, reference, rewards, ids, 0.1, value_beta=0.2)[0]
    assert got == pytest.approx(total / (len(MIXED) - 1), rel=1e-12)


# ----------------------------------------------------------------------------- GSPO, CISPO, MaxRL by tokens

TOKENS = torch.tensor([0, 0, 1, 1, 1, 2, 3, 3])
"""Completions 0 and 1 are group 0, with 2 and 3 tokens; 2 and 3 are group 1, with 1 and 2."""
IDS, REWARDS = torch.tensor([0, 0, 1, 1]), doubles(1, 0, 0, 3)
A = math.sqrt(0.5)
"""GRPO's advantages of every group of two are (a, -a), the better one's positive."""
OLD = -torch.arange(1.0, 9.0, dtype=torch.float64)
RATIOS = doubles(2, 0.5, 4, 1, 2, 3, 1, 0.25)
TOKEN_ARGUMENTS = (OLD + RATIOS.log(), OLD, OLD, TOKENS, REWARDS, IDS)


def test_gspo_has_one_ratio_per_completion_and_clips_it():
    # geometric means: 1, 2, 3 and 1/2; completion 1 and 2 have negative advantages and are not clipped, 3 is
    # above nothing: r A = a/2 is the smaller one
    terms = [A * 1, -A * 2, -A * 3, A / 2]
    value, gradient = value_and_gradient(gspo_loss, *TOKEN_ARGUMENTS)
    assert value == pytest.approx(-sum(terms) / 4, rel=1e-12)
    per_token = [terms[i] / n / 4 for i, n in ((0, 2), (1, 3), (2, 1), (3, 2)) for _ in range(n)]
    assert gradient == pytest.approx([-term for term in per_token], rel=1e-12)
    # beyond the interval in the direction of its advantage a completion has no gradient
    value, gradient = value_and_gradient(gspo_loss, *TOKEN_ARGUMENTS[:4], -REWARDS, IDS)
    assert gradient[2:] == [0] * 6 and 0 not in gradient[:2]
    _, sums = gspo_loss(*TOKEN_ARGUMENTS[:4], -REWARDS, IDS)
    assert sums["clipped_tokens"] == 6  # completion 1 (ratio 2), 2 (3) are up, 3 (1/2) is down


def test_cispo_caps_the_weight_of_a_token_and_keeps_its_gradient():
    value, gradient = value_and_gradient(cispo_loss, *TOKEN_ARGUMENTS, ratio_cap=2.0)
    weights = [2, 0.5, 2, 1, 2, 2, 1, 0.25]
    signs = [1, 1, -1, -1, -1, -1, 1, 1]
    lengths = [5] * 5 + [3] * 3
    wanted = [-A * s * w / n / 2 for s, w, n in zip(signs, weights, lengths, strict=True)]
    assert gradient == pytest.approx(wanted, rel=1e-12)
    assert value == pytest.approx(float((doubles(*wanted) * TOKEN_ARGUMENTS[0]).sum()), rel=1e-12)
    assert cispo_loss(*TOKEN_ARGUMENTS, ratio_cap=2.0)[1]["clipped_tokens"] == 2


def test_dapo_is_the_mean_over_the_tokens_of_groups_whose_rewards_differ_and_clips_higher():
    # r A clipped at 0.8 and 1.28, the smaller one: A > 0 in completions 0 and 3, A < 0 in 1 and 2
    ups, downs = [1.28, 0.5, 1.0, 0.25], [4, 1, 2, 3]
    value, gradient = value_and_gradient(dapo_loss, *TOKEN_ARGUMENTS)
    assert value == pytest.approx(-A * (sum(ups) - sum(downs)) / 8, rel=1e-12)
    # d (r A) / d log pi = r A, but where the ratio is beyond the end of its advantage's side
    assert gradient == pytest.approx([-A * x / 8 for x in (0, 0.5, -4, -1, -2, -3, 1, 0.25)], rel=1e-12)
    assert dapo_loss(*TOKEN_ARGUMENTS)[1]["clipped_tokens"] == 1
    # of two groups with equal rewards in one, that one is nothing: no gradient, and no part of T
    for share in (None, 10.0):
        one, rest = value_and_gradient(
            dapo_loss, *TOKEN_ARGUMENTS[:4], doubles(0.3, 0.3, 0, 3), IDS, *([share] if share else [])
        )
        assert one == pytest.approx(-A * (1 + 0.25 - 3) / (share or 3), rel=1e-12) and rest[:5] == [0] * 5
    assert value_and_gradient(dapo_loss, *TOKEN_ARGUMENTS[:4], doubles(1, 1, 0, 0), IDS)[0] == 0
    with pytest.raises(ValueError, match="num_tokens must be positive, not 0"):
        dapo_loss(*TOKEN_ARGUMENTS, 0)


def test_maxrl_divides_by_the_mean_reward_and_has_nothing_to_say_of_equal_rewards_or_a_mean_of_zero():
    _, gradient = value_and_gradient(maxrl_loss, *TOKEN_ARGUMENTS)
    wanted = [-1.0 / 4, -1.0 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 4, -1 / 4, -1 / 4]
    assert gradient == pytest.approx(wanted, rel=1e-12)
    for rewards in (doubles(0, 0, 0.1, 0.1), doubles(-1, 1, -3, 1)):
        value, gradient = value_and_gradient(maxrl_loss, *TOKEN_ARGUMENTS[:4], rewards, IDS)
        assert value == 0 and gradient == [0] * 8


# --------------------------------------------------------------------------------------- what all have


@pytest.mark.parametrize("loss", [dpo_loss, epa_loss, oapl_loss])
def test_micro_batches_of_whole_groups_add_up_and_a_group_of_one_is_nothing(loss):
    logprobs, reference, rewards, ids = groups(MIXED)
    whole, gradient = value_and_gradient(loss, logprobs, reference, rewards, ids, 0.2)
    parts, gradients = 0.0, torch.zeros(len(ids), dtype=torch.float64)
    for own in (ids < 10, ids >= 10):
        value, part = value_and_gradient(
            loss, logprobs[own], reference[own], rewards[own], ids[own], 0.2, num_groups=6
        )
        parts += value
        gradients[own] = doubles(*part)
    assert parts == pytest.approx(whole, rel=1e-12)
    assert gradient == pytest.approx(gradients.tolist(), rel=1e-9, abs=1e-15)
    (single,) = [i for i, size in enumerate(torch.bincount(ids + 3)[ids + 3]) if size == 1]
    assert gradient[single] == 0


@pytest.mark.parametrize("loss", [dpo_loss, epa_loss])
def test_a_constant_added_in_each_group_changes_neither_dpo_nor_epa(loss):
    logprobs, reference, rewards, ids = groups(MIXED)
    value, gradient = value_and_gradient(loss, logprobs, reference, rewards, ids, 0.2)
    shifted, same = value_and_gradient(loss, logprobs + ids, reference, rewards, ids, 0.2)
    assert shifted == pytest.approx(value, rel=1e-11) and same == pytest.approx(gradient, rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("loss", [dpo_loss, epa_loss, oapl_loss])
def test_float32_log_probs_give_a_float64_loss_and_a_float32_gradient(loss):
    logprobs, reference, rewards, ids = groups([3, 4])
    value_and_gradient(loss, logprobs.float(), reference.float(), rewards.float(), ids, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpo", "ipo": True, "label_smoothing": 0.1}, "label_smoothing"),
        ({"objective": "dpo", "label_smoothing": 0.5}, "label_smoothing"),
        ({"objective": "oapl", "beta": 0}, "beta"),
        ({"objective": "gspo", "ratio_cap": 2}, "ratio_cap is not an option of gspo"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        loss_config(**options)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_of_the_registry_has_options_of_its_name_and_back(name):
    assert loss_config(objective=name).objective == name


def test_weak_negatives_alone_are_refused():
    with pytest.raises(ValueError, match="weak negatives only"):
        epa_loss(*PAIR, 0.1, weak=torch.tensor([True, True]))


# ----------------------------------------------------------------------------------- groups of one: SFT, PoFT


def loss_batch(sizes: list[int], rewards: list[float] | None = None, share: float = 1.0) -> LossBatch:
    """One forward pass: completions of 1, 2, 3, … tokens in groups of these sizes, of an update that is
    1/share times as large.
    """
    num = sum(sizes)
    lengths = torch.arange(1, num + 1)
    logprobs = (-torch.arange(1.0, int(lengths.sum()) + 1, dtype=torch.float64) / 7).requires_grad_()
    ids = torch.repeat_interleave(torch.arange(num), lengths)
    own = logprobs.detach()
    sums = torch.zeros(num, dtype=torch.float64).index_add(0, ids, own)
    return LossBatch(
        logprobs=logprobs,
        completion_ids=ids,
        logprob_sums=torch.zeros(num, dtype=torch.float64).index_add(0, ids, logprobs),
        sampler_logprobs=own,
        sampler_sums=sums,
        reference_logprobs=own,
        reference_sums=sums,
        rewards=doubles(*(rewards or [0.0] * num)),
        group_ids=torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)),
        beta=0.1,
        is_weak=torch.zeros(num, dtype=torch.bool),
        total=Total(len(sizes) / share, num / share, len(own) / share),
    )


def test_sft_is_torchs_cross_entropy_over_all_tokens_of_the_update():
    random = torch.Generator().manual_seed(1)
    logits = torch.randn(12, 9, generator=random, dtype=torch.float64)
    targets = torch.randint(9, (12,), generator=random)
    leaf = logits.clone().requires_grad_()
    chosen = leaf.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    loss, sums = sft_loss(chosen)
    loss.backward()
    other = logits.clone().requires_grad_()
    want = cross_entropy(other, targets)
    want.backward()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(leaf.grad, other.grad)
    assert float(sums["objective"]) == pytest.approx(12 * float(want))
    parts = [sft_loss(part, 12)[0] for part in chosen.detach().split([5, 0, 7])]  # they only add up
    torch.testing.assert_close(sum(parts), want.detach())


@pytest.mark.parametrize("sizes", [[1, 1, 1], [3], [2, 1]])
def test_sft_and_poft_count_tokens_and_completions_and_not_groups(sizes: list[int]):
    aligned = [-0.5, -0.25, -1.0]
    for name in ("sft", "poft"):
        options = loss_config(objective=name)
        computed = OBJECTIVES[name](loss_batch(sizes, aligned), options)
        half = OBJECTIVES[name](loss_batch(sizes, aligned, share=0.5), options)
        batch = loss_batch(sizes, aligned)
        means = [-1 / 7, -(2 + 3) / 2 / 7, -(4 + 5 + 6) / 3 / 7]
        want = {
            "sft": sum(range(1, 7)) / 7 / 6,
            "poft": sum(math.log1p(math.exp(a - own)) for a, own in zip(aligned, means, strict=True)) / 3,
        }[name]
        assert float(computed.loss) == pytest.approx(want) and float(half.loss) == pytest.approx(want / 2)
        assert finish({key: float(value) for key, value in computed.sums.items()})["loss"] == pytest.approx(
            want
        )
        (gradient,) = torch.autograd.grad(OBJECTIVES[name](batch, options).loss, batch.logprobs)
        weights = [
            1 / 6 if name == "sft" else 1 / (1 + math.exp(own - a)) / 3 / (i + 1)
            for i, (a, own) in enumerate(zip(aligned, means, strict=True))
        ]
        assert gradient.tolist() == pytest.approx([-weights[i] for i in (0, 1, 1, 2, 2, 2)])


def test_beta_and_gamma_of_poft_are_those_of_its_loss():
    batch = loss_batch([1, 1], [-0.5, -0.25])
    got = OBJECTIVES["poft"](batch, loss_config(objective="poft", beta=2.0, gamma=0.5)).loss
    want, _ = poft_loss(batch.logprob_sums, torch.tensor([1, 2]), batch.rewards, beta=2.0, gamma=0.5)
    torch.testing.assert_close(got, want)


def test_sft_refuses_what_is_no_row_of_tokens():
    with pytest.raises(ValueError, match=r"logprobs must be \[T\]"):
        sft_loss(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="num_tokens must be positive"):
        sft_loss(torch.zeros(2), 0)


@pytest.mark.parametrize(
    ("apart", "share"), [(2e-5, 1.0), (0.5e-5, 0.5), (1e-16, 0.5), (0.0, 0.5), (-0.5e-5, 0.5), (-2e-5, 0.0)]
)
def test_a_pair_whose_implicit_rewards_differ_by_rounding_alone_is_a_tie(apart: float, share: float) -> None:
    """Rounding depends on packing and ranks, and the metric does not: beta is 0.1, a tie up to 1e-6."""
    _, sums = dpo_loss(
        torch.tensor([apart, 0.0], dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([1.0, 0.0]),
        torch.tensor([0, 0]),
        0.1,
    )
    assert float(sums["pairs_ordered"]) == share


def test_what_the_objectives_report_of_their_own_are_means_over_what_they_count():
    logprobs = [-1.0, -3.0, -2.0, -2.5, -1.0]
    sizes, rewards = [2, 3], [1.0, 0.0, 0.0, 1.0, 0.5]
    start = loss_batch(sizes, rewards)
    moved = replace(
        start,
        logprob_sums=start.reference_sums + doubles(*logprobs) + 2,  # log-ratios of 1, -1, 0, -0.5, 1
    )

    def reported(name: str, **options: Any) -> dict[str, float]:
        sums = OBJECTIVES[name](moved, loss_config(objective=name, **options)).sums
        return finish({key: float(value) for key, value in sums.items()})

    dpo = reported("dpo")  # pairs (1, -1); (-0.5, 0), (-0.5, 1), (1, 0): of the second group one of three
    assert dpo["pairs/ordered"] == pytest.approx((1 + 1 / 3) / 2)
    assert dpo["pairs/margin"] == pytest.approx(0.1 * (2 + (-0.5 - 1.5 + 1) / 3) / 2)
    first, second = (
        math.exp(0.1 * up) / sum(math.exp(0.1 * x) for x in all_of)
        for up, all_of in ((1, (1, -1)), (-0.5, (0, -0.5, 1)))
    )
    assert reported("epa")["epa/positive_share"] == pytest.approx((first + second) / 2)
    means = [float(x) / (i + 1) for i, x in enumerate(moved.logprob_sums.detach())]
    weights = [1 / (1 + math.exp(own - a)) for own, a in zip(means, rewards, strict=True)]
    assert reported("poft")["poft/weight"] == pytest.approx(sum(weights) / 5)
    assert not {"pairs/ordered", "epa/positive_share", "poft/weight"} & reported("sft").keys()
