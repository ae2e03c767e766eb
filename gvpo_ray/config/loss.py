"""The section `loss`: one class of options for each objective, and what the objective needs.

A new objective is a class here, its name in `LossConfig`, a file in losses/ and a line in losses/registry.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, field_validator, model_validator

from gvpo_ray.config.base import Section

START_BETA = 0.1
"""The paper's beta: where `loss.beta: auto` begins, and what gvpo's statistics of other objectives use."""


@dataclass(frozen=True)
class Need:
    """What a loss needs of a policy that it measures the current one against."""

    detail: Literal["nothing", "sums", "tokens"]
    """Nothing, one log-prob per completion, or one per token."""
    policy: Literal["behaviour", "previous", "model"]
    """The policy that sampled the completion, the one at the start of the step, or a model of its own."""


class LossOptions(Section):
    """The options that every objective has, and what the learner asks it. Subclasses name the objective."""

    objective: str
    """`gvpo`; the others are for comparison, on the same data and in the same training loop."""
    reference: str = "behaviour"
    """Which policy is pi_ref: `behaviour` (the one that sampled the completion; of one from elsewhere the one
    that the run began with), `previous` (the policy at the start of the step), `initial` (frozen), or `every:
    N` (refreshed every N steps)."""

    @field_validator("reference", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> str:
        if isinstance(value, dict) and set(value) == {"every"}:
            value = f"every: {value['every']}"
        name, _, number = str(value).partition(":")
        if name == "every" and number.strip().isdigit() and int(number) > 0:
            return f"every: {int(number)}"
        if value in ("behaviour", "previous", "initial"):
            return str(value)
        raise ValueError("must be behaviour, previous, initial or every: N")

    @property
    def sampler_need(self) -> Need:
        """What the loss needs of the policy that sampled."""
        return Need("nothing", "behaviour")

    @property
    def reference_need(self) -> Need:
        """What the loss, or a statistic of it, needs of the reference policy."""
        return Need("sums", self._reference_policy)

    @property
    def foreign_is_initial(self) -> bool:
        """Whether a completion that no policy of this run wrote counts as the initial policy's.

        Otherwise it counts as that of the policy at the start of the step.
        """
        return False

    @property
    def start_beta(self) -> float:
        """The beta of the first step."""
        return START_BETA

    @property
    def adapts_beta(self) -> bool:
        """Whether beta is adapted after each step."""
        return False

    @property
    def is_damped(self) -> bool:
        """Whether the learning rate is scaled by how much of the residuals the rewards explain."""
        return False

    @property
    def depends_on_beta(self) -> bool:
        """Whether beta is a part of the loss, and not of its statistics alone."""
        return False

    @property
    def has_reference_model(self) -> bool:
        """Whether the reference has weights of its own."""
        return self.reference not in ("behaviour", "previous")

    @property
    def caches_reference(self) -> bool:
        """Whether the reference model is asked for one number per completion, which then follows it."""
        return self.reference_need == Need("sums", "model")

    @property
    def reference_every(self) -> int | None:
        """N of `every: N`."""
        return int(self.reference.partition(":")[2]) if self.reference.startswith("every") else None

    @property
    def _reference_policy(self) -> Literal["behaviour", "previous", "model"]:
        if self.has_reference_model:
            return "model"
        return "previous" if self.reference == "previous" else "behaviour"


PAPER: dict[str, Any] = {"beta": START_BETA, "importance_cap": None, "damped": False, "reference": "previous"}
"""What `loss.preset: paper` stands for."""


class GvpoLoss(LossOptions):
    """GVPO's options. The paper is `{preset: paper}`; by default our rules for old data are on."""

    objective: Literal["gvpo"] = "gvpo"
    preset: Literal["paper"] | None = None
    """`paper`: the paper's loss and nothing else: beta 0.1 unless another number is given, the reference
    `previous`, no importance weights, no likelihood floor, no damping."""
    beta: float | Literal["auto"] = "auto"
    """Reward units per nat of log-ratio: the optimum is pi_ref exp(R / beta) / Z, so 1/beta nats are worth
    one unit of reward. It is the trust region: gvpo/binding says how often it binds, and a run in which it
    hardly ever does says so. auto: 0.1, the paper's, and with the `behaviour` reference moved from there
    after each step until beta D varies half as much as the rewards do."""
    importance_cap: float | None = Field(default=1.0, gt=0)
    """A completion is weighted by min(importance_cap, pi / pi_sampled), relative to its group: one that the
    policy would not write any more counts less. No bias with one reference per prompt: GVPO's optimum is the
    same for every sampler, and weights choose one. Where right completions have become less likely since they
    were sampled, the others are pushed down less (the likelihood floor, gvpo/kept): no bias where residuals
    can vanish; where rewards are noisy, completions gain whose rewards vary most. null: neither, as in the
    paper; the same thing where an update trains what was sampled just before. Old data is then followed where
    the policy no longer goes."""
    damped: bool = True
    """With the `behaviour` reference, multiply the learning rate of an update by the squared correlation of
    its residuals with its rewards (gvpo/damping): what is left of a residual beside the reward is where the
    policy has gone since the completion was sampled, and a step of full length after it overshoots. 1 for
    what was sampled at the start of the step. false: the schedule's learning rate as it is."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, value: Any) -> Any:
        if not isinstance(value, dict) or value.get("preset") != "paper":
            return value
        for name, paper in PAPER.items():
            given = value.get(name, paper)
            if given != paper and (name != "beta" or given == "auto"):
                raise ValueError(
                    f"preset: paper has {name}: {'null' if paper is None else str(paper).lower()}, and "
                    f"{str(given).lower()} is given: leave one of them out"
                )
        return {**PAPER, **value}

    @field_validator("beta", mode="plain")
    @classmethod
    def _beta(cls, value: Any) -> float | str:
        if value == "auto":
            return "auto"
        try:
            number = float(math.nan if isinstance(value, bool) else value)  # YAML takes 1e-2 for text
        except (TypeError, ValueError):
            raise ValueError("should be auto or a valid number") from None
        if not math.isfinite(number):
            raise ValueError("should be auto or a finite number")
        if number <= 0:
            raise ValueError("should be auto or greater than 0")
        return number

    @property
    def sampler_need(self) -> Need:
        """The importance weights need sums of the policy that sampled."""
        return Need("nothing" if self.importance_cap is None else "sums", "behaviour")

    @property
    def foreign_is_initial(self) -> bool:
        """With the `behaviour` reference: against the policy that meets it D would always be 0, and nothing
        would limit the update.
        """
        return self.reference == "behaviour"

    @property
    def start_beta(self) -> float:
        """The beta of the first step, and of every one where it is not adapted."""
        return START_BETA if self.beta == "auto" else self.beta

    @property
    def adapts_beta(self) -> bool:
        """With `beta: auto` and the `behaviour` reference; other references are targets to return to."""
        return self.beta == "auto" and self.reference == "behaviour"

    @property
    def is_damped(self) -> bool:
        """With `damped` and the `behaviour` reference; other references are targets to return to."""
        return self.damped and self.reference == "behaviour"

    @property
    def depends_on_beta(self) -> bool:
        """It does."""
        return True


class _WithKL(LossOptions):
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference, which `reference` names."""

    @property
    def reference_need(self) -> Need:
        """The KL term needs tokens; without one there are statistics, of sums."""
        return Need("tokens" if self.kl_coefficient else "sums", self._reference_policy)


class _Clipped(_WithKL):
    clip_low: float = Field(default=0.2, gt=0)
    """The probability ratio is clipped at 1 - clip_low …"""
    clip_high: float = Field(default=0.2, gt=0)
    """… and at 1 + clip_high."""
    old_policy: Literal["behaviour", "previous"] = "behaviour"
    """What the ratio is taken to: the policy that sampled the token, or the one at the start of the step, as
    if that had sampled it. Bias: older data then counts as if it were new."""

    @property
    def sampler_need(self) -> Need:
        """The ratio of each token needs the policy that sampled it."""
        return Need("tokens", self.old_policy)


class GrpoLoss(_Clipped):
    """GRPO's options."""

    objective: Literal["grpo"] = "grpo"


class DrGrpoLoss(_Clipped):
    """Dr. GRPO's options."""

    objective: Literal["dr_grpo"] = "dr_grpo"


class RlooLoss(_WithKL):
    """RLOO's options."""

    objective: Literal["rloo"] = "rloo"


class ReinforceLoss(_WithKL):
    """REINFORCE's options."""

    objective: Literal["reinforce"] = "reinforce"
    baseline: float = 0.0
    """Subtracted from every reward."""


_Any = GvpoLoss | GrpoLoss | DrGrpoLoss | RlooLoss | ReinforceLoss
_BY_NAME: dict[str, type[LossOptions]] = {
    options.model_fields["objective"].default: options for options in get_args(_Any)
}


def _of_the_objective(value: Any) -> Any:
    """Fill in the default objective, and leave out defaults of other objectives' options.

    So an override of `loss.objective` needs no other one, where a file writes out the defaults.
    """
    if not isinstance(value, dict):
        return value
    name = value.get("objective", "gvpo")
    if name not in _BY_NAME:
        raise ValueError(f"objective must be one of {', '.join(_BY_NAME)}, not {name}")
    own = _BY_NAME[name].model_fields
    kept = {"objective": name}
    for key, given in value.items():
        fields = [options.model_fields[key] for options in _BY_NAME.values() if key in options.model_fields]
        if key in own or not fields:  # what no objective has is refused as an unknown key
            kept[key] = given
        elif given != fields[0].default:
            options = ", ".join(sorted(set(own) - {"objective"}))
            raise ValueError(f"{key} is not an option of {name}; it has {options}")
    return kept


LossConfig = Annotated[_Any, Field(discriminator="objective"), BeforeValidator(_of_the_objective)]
"""The section `loss`: the options of one objective."""

_ADAPTER: TypeAdapter[_Any] = TypeAdapter(LossConfig)


def loss_config(**options: Any) -> _Any:
    """The section `loss` with these keys, as a config file would have them."""
    return _ADAPTER.validate_python(options)
