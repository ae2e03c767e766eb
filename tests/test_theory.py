"""What the paper proves, on problems small enough to enumerate: 3 prompts, 6 completions each, a table of
logits as policy.

The optimum is pi_ref(y|x) exp(R(x,y)/beta) / Z(x), whoever samples (Theorem 3.1, Corollary 3.2), for groups
of any sizes (Corollary 3.5), and 1/(m - 1) makes the loss of a group an unbiased estimate of the objective
(Theorem 3.4).
"""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gvpo_ray.losses.dr_grpo import dr_grpo_loss
from gvpo_ray.losses.grpo import grpo_loss
from gvpo_ray.losses.gvpo import gvpo_loss, gvpo_loss_squared
from gvpo_ray.losses.reinforce import reinforce_loss
from gvpo_ray.losses.rloo import rloo_loss
from gvpo_ray.losses.stale_data import importance_weights, likelihood_floor, stale_gvpo_loss

NUM_PROMPTS, NUM_COMPLETIONS, BETA = 3, 6, 0.25
GROUPS_PER_UPDATE, LAG = 8, 100
NUM_UPDATES = {0: 1200, 1: 700}
"""How many the problem of a seed takes until GVPO is at the optimum, whoever samples."""


class Problem:
    """Random rewards, a random reference and a random first policy that is not the reference;
    log-probabilities [prompt, completion].
    """

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.rewards = torch.rand(NUM_PROMPTS, NUM_COMPLETIONS, generator=self.random, dtype=torch.float64)
        self.reference = self.normal().log_softmax(1)
        self.first = self.normal().log_softmax(1)
        self.foreign = self.normal().log_softmax(1)
        self.target = (self.reference + self.rewards / BETA).log_softmax(1)

    def normal(self) -> Tensor:
        return torch.randn(NUM_PROMPTS, NUM_COMPLETIONS, generator=self.random, dtype=torch.float64)

    def distance(self, policy: Tensor) -> float:
        """The largest KL of any prompt, in either direction, between policy and target."""
        forward = (policy.exp() * (policy - self.target)).sum(1)
        backward = (self.target.exp() * (self.target - policy)).sum(1)
        return max(forward.max().item(), backward.max().item())


# (logprobs, reference, rewards, group ids) -> loss
Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# (problem, the policy, the policy LAG updates ago) -> probabilities [prompt, completion]; where problems are
# stacked, with one dimension more in front
Sampler = Callable[[Problem, Tensor, Tensor], Tensor]


def on_policy(problem: Problem, policy: Tensor, earlier: Tensor) -> Tensor:
    return policy.exp()


def uniform(problem: Problem, policy: Tensor, earlier: Tensor) -> Tensor:
    return torch.ones_like(problem.rewards) / NUM_COMPLETIONS


def stale(problem: Problem, policy: Tensor, earlier: Tensor) -> Tensor:
    return earlier.exp()


def foreign(problem: Problem, policy: Tensor, earlier: Tensor) -> Tensor:
    return problem.foreign.exp()


def mixed(problem: Problem, policy: Tensor, earlier: Tensor) -> Tensor:
    """Each completion of a group comes from one of the four: their mixture."""
    return sum(sampler(problem, policy, earlier) for sampler in (on_policy, uniform, stale, foreign)) / 4


def never_the_best(problem: Problem, policy: Tensor, earlier: Tensor) -> Tensor:
    """Uniform over all but the completion that the target likes most, as a truncating sampler would be."""
    best = problem.target.argmax(-1, keepdim=True)
    return uniform(problem, policy, earlier).scatter(-1, best, 0.0)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Completions [N] of the groups of an update, of all problems."""

    logprobs: Tensor
    sampled: Tensor
    """Log-probabilities by who sampled."""
    reference: Tensor
    rewards: Tensor
    group_ids: Tensor


def train(
    seeds: tuple[int, ...], samplers: tuple[Sampler, ...], objective: Callable[[Drawn], Tensor]
) -> dict[tuple[int, Sampler], float]:
    """The distance from the optimum, by seed of a problem and sampler, after NUM_UPDATES of Adam, each on
    GROUPS_PER_UPDATE groups of 2 to 32 sampled completions.

    All are trained at once: each has groups and logits of its own, and Adam's step does not depend on the
    scale of the loss, which is the mean over all groups.
    """
    each = [Problem(seed) for seed in seeds]
    problems = copy.copy(each[0])  # tensors are [seed, prompt, completion]
    for name in ("rewards", "reference", "first", "foreign", "target"):
        setattr(problems, name, torch.stack([getattr(problem, name) for problem in each]))
    num_updates = max(NUM_UPDATES[seed] for seed in seeds)
    num_cases, random = len(samplers) * len(seeds), torch.Generator().manual_seed(0)
    shape = (num_updates, num_cases, GROUPS_PER_UPDATE)
    # rows of tables [sampler * seed * prompt, completion], of each update's groups
    rows = (
        torch.randint(NUM_PROMPTS, shape, generator=random) + NUM_PROMPTS * torch.arange(num_cases)[:, None]
    )
    sizes = torch.randint(2, 33, shape, generator=random)
    references, rewards = (
        table.repeat(len(samplers), 1, 1).flatten(0, 1) for table in (problems.reference, problems.rewards)
    )
    first = problems.first.expand(len(samplers), *problems.first.shape)
    logits = first.clone().requires_grad_()
    # eps is to the loss's mean over all problems what 1e-8 is to that over one
    optimizer = torch.optim.Adam([logits], lr=0.05, eps=1e-8 / num_cases)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_updates)
    policies = [first]
    for own_rows, own_sizes in zip(rows, sizes, strict=True):
        policy, earlier = policies[-1], policies[max(len(policies) - 1 - LAG, 0)]
        probabilities = torch.stack(
            [sampler(problems, policy[i], earlier[i]) for i, sampler in enumerate(samplers)]
        ).flatten(0, 2)
        group_ids = torch.repeat_interleave(own_sizes.flatten())
        x = own_rows.flatten()[group_ids]
        at = (x, torch.multinomial(probabilities[x], 1, generator=random).squeeze(1))
        logprobs = logits.log_softmax(-1)
        drawn = Drawn(
            logprobs.flatten(0, 2)[at], probabilities[at].log(), references[at], rewards[at], group_ids
        )
        optimizer.zero_grad()
        objective(drawn).backward()
        optimizer.step()
        schedule.step()
        policies.append(logits.detach().log_softmax(-1))
    return {
        (seed, sampler): problem.distance(policies[-1][i, j])
        for i, sampler in enumerate(samplers)
        for j, (seed, problem) in enumerate(zip(seeds, each, strict=True))
    }


SAMPLERS = (on_policy, uniform, stale, foreign, mixed)


@functools.cache
def distances(
    objective: Callable[..., Tensor], seeds: tuple[int, ...], samplers: tuple[Sampler, ...], **options: Any
) -> dict[tuple[int, Sampler], float]:
    """What `train` returns by its cases: once for all tests that ask for one of them."""
    return train(seeds, samplers, functools.partial(objective, **options))


def gvpo(logprobs: Tensor, reference: Tensor, rewards: Tensor, group_ids: Tensor) -> Tensor:
    return gvpo_loss(logprobs, reference, rewards, group_ids, BETA)[0]


def gvpo_of(drawn: Drawn) -> Tensor:
    return gvpo(drawn.logprobs, drawn.reference, drawn.rewards, drawn.group_ids)


def gvpo_with_importance(drawn: Drawn, cap: float) -> Tensor:
    weights = importance_weights(drawn.logprobs, drawn.sampled, drawn.group_ids, cap)
    floor = likelihood_floor(drawn.logprobs, drawn.sampled, drawn.rewards, drawn.group_ids)
    given = (drawn.logprobs, drawn.reference, drawn.rewards, drawn.group_ids)
    return stale_gvpo_loss(*given, BETA, weights, floor)[0]


def gvpo_without_beta(drawn: Drawn) -> Tensor:
    """Policy gradient with a mean baseline: nothing holds the policy at the reference."""
    return gvpo(drawn.logprobs, drawn.logprobs.detach(), drawn.rewards, drawn.group_ids)


def of_completions(drawn: Drawn, loss: Callable[..., Any], **options: float) -> Tensor:
    """An objective that also takes the log-probabilities of who sampled; a completion is one token."""
    alone = torch.arange(len(drawn.rewards))
    given = (drawn.logprobs, drawn.sampled, drawn.reference, alone, drawn.rewards, drawn.group_ids)
    return loss(*given, **options)[0]


# --------------------------------------------------------------------------------------- the optimum, sampled


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gvpo_reaches_the_optimum_whoever_samples(sampler, seed):
    problem = Problem(seed)
    # there is a way to go
    assert problem.distance(problem.first) > 0.1 and problem.distance(problem.reference) > 0.1
    # nats; interpolation: no noise is left there
    assert distances(gvpo_of, (0, 1), (*SAMPLERS, never_the_best))[seed, sampler] < 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sampler_that_never_draws_one_completion_misses_the_optimum(seed):
    assert distances(gvpo_of, (0, 1), (*SAMPLERS, never_the_best))[seed, never_the_best] > 0.01


@pytest.mark.parametrize("sampler", [on_policy, uniform])
def test_policy_gradient_with_a_mean_baseline_misses_the_optimum(sampler):
    assert distances(gvpo_without_beta, (0,), (on_policy, uniform))[0, sampler] > 0.1


@pytest.mark.parametrize("cap", [1.0, 5.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_optimum_is_the_same_however_much_a_completion_counts(sampler, cap):
    """min(cap, pi/mu), which changes with the policy, is one more way to choose the sampler."""
    assert distances(gvpo_with_importance, (1,), SAMPLERS, cap=cap)[1, sampler] < 1e-6


# ---------------------------------------------------------------- one reference, and one for each completion

COUNTS = torch.tensor([[8, 6, 3, 2, 1], [1, 2, 2, 5, 10]])
"""How often each of two samplers writes each of five completions, in 20; no two of them are alike."""
TWO_REWARDS = torch.tensor([0.0, 0.3, 1.0, 0.2, 0.6], dtype=torch.float64)


class TwoSamplers:
    """One group in which `copies[a]` times 20 completions are sampler a's, each as often as it writes it.

    So the group's loss is the expected one, but for the factor m/(m - 1), and training ends where it rests.
    """

    def __init__(self, copies: tuple[int, int], is_shared: bool) -> None:
        self.counts = COUNTS * torch.tensor(copies)[:, None]
        self.samplers = (COUNTS / 20).double().log()
        self.initial = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64).log()
        pairs = [(a, y) for a in range(2) for y in range(5) for _ in range(int(self.counts[a, y]))]
        self.who, self.y = torch.tensor(pairs).T
        self.sampled = self.samplers[self.who, self.y]
        self.reference = self.initial[self.y] if is_shared else self.sampled
        self.group_ids = torch.zeros_like(self.y)

    def rest(self, floor: float | None = None, weighted: bool = False, num_updates: int = 700) -> Tensor:
        """Log-probabilities at which training rests.

        `weighted`: with importance weights. `floor`: with this factor on what pushes completions down.
        """
        logits = self.initial.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_updates)
        for _ in range(num_updates):
            logprobs = logits.log_softmax(0)[self.y]
            weights, k = torch.ones_like(self.sampled), None
            if weighted:
                weights = importance_weights(logprobs, self.sampled, self.group_ids)
            if floor is not None:
                k = torch.full_like(self.sampled, floor)
            loss, _ = stale_gvpo_loss(
                logprobs, self.reference, TWO_REWARDS[self.y], self.group_ids, BETA, weights, k
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        return logits.detach().log_softmax(0)

    def posterior_form(self, counted: Tensor | None = None) -> Tensor:
        """R/beta + sum_a w_a(y) log pi_a(y) + const; w_a(y) is sampler a's share of what counts at y."""
        counts = self.counts.double() if counted is None else counted
        shares = counts / counts.sum(0)
        return (TWO_REWARDS / BETA + (shares * self.samplers).sum(0)).log_softmax(0)

    def global_form(self) -> Tensor:
        """The same with a share of each sampler that is equal at all y, which is not where training rests."""
        shares = self.counts.sum(1, keepdim=True) / self.counts.sum()
        return (TWO_REWARDS / BETA + (shares * self.samplers).sum(0)).log_softmax(0)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize("copies", [(1, 1), (1, 3)])
def test_with_a_reference_of_its_own_for_each_completion_training_rests_at_the_posterior_of_who_wrote_it(
    copies,
):
    group = TwoSamplers(copies, is_shared=False)
    rest = group.rest()
    assert kl(group.posterior_form(), rest) < 1e-9
    # the samplers are unlike, so that shares which do not depend on y describe another policy
    assert kl(group.global_form(), rest) > 0.02


@pytest.mark.parametrize(
    "options", [{}, {"weighted": True}, {"floor": 0.5}, {"weighted": True, "floor": 0.5}]
)
def test_with_one_reference_two_samplers_and_all_corrections_end_at_the_theorems_optimum(options):
    group = TwoSamplers((1, 3), is_shared=True)
    optimum = (group.initial + TWO_REWARDS / BETA).log_softmax(0)
    assert kl(optimum, group.initial) > 0.1  # there is a way to go
    assert kl(optimum, group.rest(**options)) < 1e-9


def test_with_mixed_references_importance_weights_and_the_likelihood_floor_move_the_rest_point():
    group = TwoSamplers((1, 1), is_shared=False)
    plain, weighted, floored = group.rest(), group.rest(weighted=True), group.rest(floor=0.5)
    assert kl(plain, weighted) > 1e-3 and kl(plain, floored) > 1e-3
    # the weights change what counts, and the form stays: w_a(y) is the share of sampler a in that
    s = importance_weights(weighted[group.y], group.sampled, group.group_ids)
    counted = torch.zeros_like(group.samplers).index_put((group.who, group.y), s, accumulate=True)
    assert kl(group.posterior_form(counted), weighted) < 1e-9


# -------------------------------------------------------------------------------- the optimum, in expectation


def exact_objective(logprobs: Tensor, reference: Tensor, rewards: Tensor, sampling: Tensor) -> Tensor:
    """1/2 Var_{y ~ sampling}[beta D(y) - R(y)] for one prompt."""
    residual = BETA * (logprobs - reference) - rewards
    return (sampling * (residual - (sampling * residual).sum()).square()).sum() / 2


def expected_loss(
    objective: Objective, m: int, logprobs: Tensor, reference: Tensor, rewards: Tensor, sampling: Tensor
) -> Tensor:
    """The mean of a group's loss over every tuple of m completions, each as often as it is drawn."""
    total = torch.zeros(()).double()
    for drawn in product(range(len(rewards)), repeat=m):
        y = torch.tensor(drawn)
        total = total + sampling[y].prod() * objective(
            logprobs[y], reference[y], rewards[y], torch.zeros(m, dtype=torch.long)
        )
    return total


def over_m(logprobs: Tensor, reference: Tensor, rewards: Tensor, group_ids: Tensor) -> Tensor:
    """The wrong variant: 1/m in place of 1/(m - 1)."""
    residual = BETA * (logprobs - reference) - rewards
    return (residual - residual.mean()).square().mean() / 2


def squared(logprobs: Tensor, reference: Tensor, rewards: Tensor, group_ids: Tensor) -> Tensor:
    return gvpo_loss_squared(logprobs, reference, rewards, group_ids, BETA)


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("objective", [gvpo, squared])
def test_the_expected_loss_and_gradient_of_a_group_are_those_of_the_objective_for_each_size(objective, m):
    problem = Problem(3)
    reference, rewards, sampling = problem.reference[0], problem.rewards[0], problem.foreign[0].exp()
    logprobs = problem.first[0].clone().requires_grad_()
    want = exact_objective(logprobs, reference, rewards, sampling)
    got = expected_loss(objective, m, logprobs, reference, rewards, sampling)
    assert got.item() == pytest.approx(want.item(), rel=1e-12)
    (want_gradient,), (got_gradient,) = (
        torch.autograd.grad(want, logprobs),
        torch.autograd.grad(got, logprobs),
    )
    assert got_gradient.tolist() == pytest.approx(want_gradient.tolist(), rel=1e-10, abs=1e-13)


@pytest.mark.parametrize(("m", "share"), [(2, 1 / 2), (3, 2 / 3)])
def test_one_over_m_would_be_biased_and_differently_for_each_size(m, share):
    problem = Problem(3)
    reference, rewards, sampling, logprobs = (
        problem.reference[0],
        problem.rewards[0],
        problem.foreign[0].exp(),
        problem.first[0],
    )
    want = exact_objective(logprobs, reference, rewards, sampling)
    assert expected_loss(over_m, m, logprobs, reference, rewards, sampling).item() == pytest.approx(
        share * want.item(), rel=1e-12
    )


@pytest.mark.parametrize("sampling", [on_policy, uniform, foreign])
def test_the_exact_objective_is_zero_at_the_optimum_and_nowhere_near_it(sampling):
    """Interpolation: every group's loss is zero at the optimum, so the noise of sampled groups vanishes
    there.
    """
    problem = Problem(4)
    probabilities = sampling(problem, problem.target, problem.target)
    for x in range(NUM_PROMPTS):
        arguments = problem.reference[x], problem.rewards[x], probabilities[x]
        assert exact_objective(problem.target[x], *arguments) < 1e-28
        assert expected_loss(gvpo, 2, problem.target[x], *arguments) < 1e-28
        for y in range(NUM_COMPLETIONS):
            nudged = problem.target[x].clone()
            nudged[y] += 0.1
            assert exact_objective(nudged.log_softmax(0), *arguments) > 1e-6


def expected_gradient_of_logits_where_a_reward_is_noisy(floor: float) -> Tensor:
    """At the optimum of the mean rewards, over every group of three and every toss of what completion 2 gets:
    0.4 more or 0.4 less.
    """
    problem = Problem(4)
    logits = problem.target[0].clone().requires_grad_()
    logprobs, probabilities = logits.log_softmax(0), problem.target[0].exp()
    # a completion, and what its reward has more
    outcomes = [(y, more) for y in range(NUM_COMPLETIONS) for more in ((-0.4, 0.4) if y == 2 else (0.0,))]
    total = torch.zeros(()).double()
    for drawn in product(outcomes, repeat=3):
        y, more = torch.tensor([y for y, _ in drawn]), torch.tensor([more for _, more in drawn]).double()
        rewards = problem.rewards[0][y] + more
        arguments = logprobs[y], problem.reference[0][y], rewards, torch.zeros(3, dtype=torch.long), BETA
        loss, _ = stale_gvpo_loss(*arguments, torch.ones(3), torch.full((3,), floor))
        total = total + torch.where(y == 2, probabilities[y] / 2, probabilities[y]).prod() * loss
    return torch.autograd.grad(total, logits)[0]


def test_noisy_rewards_move_the_optimum_only_where_what_pushes_down_counts_less():
    """To the completions whose rewards vary most: their good luck counts more than their bad luck. Without
    noise k leaves it where it is (above).
    """
    assert expected_gradient_of_logits_where_a_reward_is_noisy(1.0).abs().max() < 1e-12
    gradient = expected_gradient_of_logits_where_a_reward_is_noisy(0.5)
    assert gradient[2] < -1e-4
    assert all(gradient[y] > 1e-6 for y in range(NUM_COMPLETIONS) if y != 2)


# ------------------------------------------------------------------ where the other objectives end up instead


@pytest.mark.parametrize("loss", [grpo_loss, dr_grpo_loss])
@pytest.mark.parametrize("sampler", [on_policy, uniform, stale, foreign])
def test_grpo_and_dr_grpo_with_a_penalty_of_beta_miss_the_optimum(sampler, loss):
    """GVPO reaches it from each of these samplers (above, below 1e-6). Why these do not, even where the
    policy itself samples:

    - GRPO divides by the std of the rewards, which makes the penalty of each prompt beta * std in units of
    its reward.
    - k3 as it stands has the gradient of KL(pi_ref || pi), not of KL(pi || pi_ref), and so another minimum.
      That alone is left of it for Dr. GRPO on its own samples, up to (m - 1)/m of the advantage, which
      differs between sizes of groups.
    - From another sampler, clipping stops the ratio from correcting, and the penalty is an average under that
    sampler.

    Seen with seed 1: GRPO 1.56, 0.12, 1.24, 0.55 and Dr. GRPO 0.11, 0.15, 0.17, 0.32 nats. How far off
    depends on the problem: with seed 0 Dr. GRPO comes as near as 0.012 on its own samples.
    """
    four = (on_policy, uniform, stale, foreign)
    assert distances(of_completions, (1,), four, loss=loss, kl_coefficient=BETA)[1, sampler] > 0.05


@pytest.mark.parametrize("loss", [grpo_loss, dr_grpo_loss])
@pytest.mark.parametrize("sampler", [on_policy, foreign])
def test_grpo_and_dr_grpo_without_a_penalty_miss_the_optimum(sampler, loss):
    """Nothing holds the policy at the reference; on its own samples it collapses onto the best completion."""
    assert distances(of_completions, (1,), (on_policy, foreign), loss=loss)[1, sampler] > 0.5


def test_reinforce_with_a_penalty_of_beta_in_the_reward_misses_the_optimum_on_samples_of_another_policy():
    """At the optimum the penalized reward is beta log Z for every completion: pushed up alike, those that are
    sampled more rise more.
    """
    found = distances(of_completions, (1,), (foreign,), loss=reinforce_loss, kl_coefficient=BETA)
    assert found[1, foreign] > 0.1


@pytest.mark.parametrize("sampler", [on_policy, foreign])
def test_rloo_with_the_penalty_of_the_trained_policy_in_the_reward_reaches_the_optimum(sampler):
    """It is GVPO divided by beta. With the penalty fixed when sampling, as it is often implemented, it would
    be so on-policy only.
    """
    found = distances(of_completions, (1,), (on_policy, foreign), loss=rloo_loss, kl_coefficient=BETA)
    assert found[1, sampler] < 1e-6
