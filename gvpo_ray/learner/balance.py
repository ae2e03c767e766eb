"""The auxiliary loss of a mixture of experts evens out the load of its experts, as transformers computes it.

    aux = E sum_e f_e P_e      f_e = 1/N sum_t [e is chosen for t]      P_e = 1/N sum_t p_e(t)

E is the number of a layer's experts, t the N tokens of all layers with a router, p(t) the softmax of a
router's logits (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6; `load_balancing_loss_func`). It is of
a whole update: of all tokens of all ranks, every completion with its prompt and without its last token.

f has no gradient, so that the loss is linear in p once f is known. Then each pass adds its own share, and no
cut into passes, packing or number of ranks changes the sum. What is replayed is known beforehand, from the
column `routed_experts`. Where that does not say it of every token, the update's passes are made once more
before, without gradients, to count. transformers' own loss of each pass would be another one: f P is not
linear in the tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gvpo_ray.learner.microbatches import NOTHING, Plan
from gvpo_ray.learner.policy import Policy
from gvpo_ray.learner.routing import Load


class Balance:
    """A Balance is the auxiliary loss of one update.

    Args:
        coefficient: the model's.
        factors: [experts] what a probability of each expert adds to the loss.
    """

    def __init__(self, coefficient: float, factors: Tensor) -> None:
        self._coefficient, self._factors = coefficient, factors
        self._value = torch.zeros((), dtype=torch.float64, device=factors.device)

    def share(self, load: Load) -> Tensor:
        """Return what a pass adds to the update's loss, with gradients and the coefficient.

        Args:
            load: what the routers said in the pass.
        """
        share = (self._factors * load.probabilities).sum()
        self._value += share.detach()
        return self._coefficient * share

    def value(self, policy: Policy) -> float:
        """Return the loss of all passes so far, without the coefficient. Every rank."""
        return float(_over_ranks(policy, self._value * policy.num_parts))


def balance_of(policy: Policy, plan: Plan) -> Balance | None:
    """Count how often each expert is chosen in an update. Every rank.

    Args:
        policy: this rank's part of the policy.
        plan: this rank's passes through the update.

    Returns:
        The update's auxiliary loss; None: the model is to have none.
    """
    routers = policy.routers
    if routers is None or not policy.aux_loss_coefficient:
        return None
    known = routers.chosen(plan.rows)
    missing = known is None
    counts = torch.zeros(routers.num_experts) if known is None else torch.from_numpy(known)
    lengths = [
        len(row["prompt_ids"]) + max(0, len(ids) - 1) for row in plan.rows for ids in row["completion_ids"]
    ]
    first = _over_ranks(policy, torch.tensor([sum(lengths), missing, *counts.tolist()], dtype=torch.float64))
    num_tokens, num_missing, counts = first[0] * routers.num_layers, first[1], first[2:]
    if num_missing:  # some rank does not know all of its own, and a pass is a collective
        counts = torch.zeros_like(counts)
        for rows in plan.passes:
            counts += policy.loads(rows or [NOTHING]).chosen * bool(rows)
        counts = _over_ranks(policy, counts * policy.num_parts)
    return Balance(policy.aux_loss_coefficient, routers.num_experts * counts / num_tokens.square())


def _over_ranks(policy: Policy, values: Tensor) -> Tensor:
    """Add up numbers over the ranks, on the policy's device."""
    values = values.to(policy.device)
    if policy.data_size * policy.num_copies > 1:
        dist.all_reduce(values)
        values /= policy.num_copies  # each of which has added the same
    return values
