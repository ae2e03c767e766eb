"""The config section `loss` has a class of options for each objective, and the log-probs that it needs.

A new objective is a class here, its name in `LossConfig`, a file in losses/ and a line in losses/registry.py.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, TypeAdapter, field_validator, model_validator

from gvpo_ray.config.loss_options import START_BETA as START_BETA
from gvpo_ray.config.loss_options import LossOptions as LossOptions
from gvpo_ray.config.loss_options import Need as Need
from gvpo_ray.config.model import ScoringModelConfig

PAPER: dict[str, Any] = {"beta": START_BETA, "importance_cap": None, "damped": False, "reference": "previous"}
"""The options that `loss.preset: paper` stands for."""


class _DependsOnBeta(LossOptions):
    depends_on_beta: ClassVar[bool] = True

    @property
    def external_is_initial(self) -> bool:
        """Return whether an external completion counts as the initial policy's, as it does with `behaviour`.

        If its reference were the policy at the start of the step, the first D would always be 0, and nothing
        would limit the update.
        """
        return self.reference == "behaviour"


class GvpoLoss(_DependsOnBeta):
    """GVPO corrects for old data by default; `{preset: paper}` is the paper."""

    objective: Literal["gvpo"] = "gvpo"
    preset: Literal["paper"] | None = None
    """Name of a set of options. `paper`: the paper's loss and nothing else, with beta 0.1 unless another
    number is given, the reference `previous`, no importance weights, no likelihood floor and no damping."""
    beta: float | Literal["auto"] = "auto"
    """Reward units per nat of log-ratio: with one reference the optimum is pi_ref exp(R / beta) / Z, so a
    log-ratio of 1/beta nats is worth one unit of reward. Beta is the trust region: gvpo/kl_active_share is
    the share of residuals in which it counts, and a run in which it hardly ever does says so. auto: 0.1 as in
    the paper, and with the `behaviour` reference adapted after each step until beta D varies half as much as
    the rewards."""
    importance_cap: float | None = Field(default=1.0, gt=0)
    """Upper bound of the importance weight pi / pi_sampled of a completion, relative to its group, so that
    completions which the policy would no longer write count less. With weights, the likelihood floor is on
    too (gvpo/likelihood_floor): where right completions have become less likely since they were sampled, the
    others are pushed down less. Neither moves the optimum where all completions of a prompt have one
    reference and residuals can vanish. Where references are mixed (`behaviour` on groups of several policies)
    both move the rest point, the more the policies differ; and where rewards are noisy, the floor favours
    completions whose rewards vary most. null: neither of them, as in the paper. This is the same for data
    that was sampled just before its update; old data then pulls the policy to completions that it no longer
    writes."""
    damped: bool = True
    """Multiply the learning rate of each update by the squared correlation of its residuals with its rewards
    (gvpo/damping); only with the `behaviour` reference. The part of a residual that the rewards do not
    explain is how far the policy has moved since the completion was sampled, and a full step would overshoot.
    The factor is 1 for completions sampled at the start of the step. false: the schedule's learning rate."""

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
        """The log-probs of the sampling policy that the loss needs: sums, for the importance weights."""
        return Need("nothing" if self.importance_cap is None else "sums", "behaviour")

    @property
    def start_beta(self) -> float:
        """The beta of the first step, and of all steps where it is not adapted."""
        return START_BETA if self.beta == "auto" else self.beta

    @property
    def adapts_beta(self) -> bool:
        """Return whether beta is adapted after each step: with `beta: auto` and the `behaviour` reference.

        Other references are targets to return to.
        """
        return self.beta == "auto" and self.reference == "behaviour"

    @property
    def is_damped(self) -> bool:
        """Return whether the learning rate is damped: with `damped` and the `behaviour` reference.

        Other references are targets to return to.
        """
        return self.damped and self.reference == "behaviour"


class _WithKL(LossOptions):
    kl_coefficient: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference policy (see `reference`); 0: none."""

    @property
    def reference_need(self) -> Need:
        """The log-probs of the reference that are needed: tokens for a KL term, sums for statistics."""
        return Need("tokens" if self.kl_coefficient else "sums", self._reference_policy)


class _WithRatio(LossOptions):
    old_policy: Literal["behaviour", "previous"] = "behaviour"
    """Policy in the denominator of the probability ratio: `behaviour`, the one that sampled the token, or
    `previous`, the one at the start of the step. `previous` is biased: it treats older data as if it were
    new."""

    @property
    def sampler_need(self) -> Need:
        """The log-probs that the probability ratio needs: one per token, of `old_policy`."""
        return Need("tokens", self.old_policy)


class _Clipped(_WithRatio, _WithKL):
    clip_low: float = Field(default=0.2, gt=0)
    """Lower end of clipping: the probability ratio is clipped at 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """Upper end of clipping: the probability ratio is clipped at 1 + clip_high."""


class GrpoLoss(_Clipped):
    """GRPO has these options."""

    objective: Literal["grpo"] = "grpo"


class DrGrpoLoss(_Clipped):
    """Dr. GRPO has these options."""

    objective: Literal["dr_grpo"] = "dr_grpo"


class RlooLoss(_WithKL):
    """RLOO has these options."""

    objective: Literal["rloo"] = "rloo"


class ReinforceLoss(_WithKL):
    """REINFORCE has these options."""

    objective: Literal["reinforce"] = "reinforce"
    baseline: float = 0.0
    """Constant that is subtracted from every reward."""


class GspoLoss(_WithRatio):
    """GSPO has these options."""

    objective: Literal["gspo"] = "gspo"
    clip_low: float = Field(default=3e-4, gt=0)
    """Lower end of clipping: the completion's probability ratio, its geometric mean per token, is clipped at
    1 - clip_low."""
    clip_high: float = Field(default=4e-4, gt=0)
    """Upper end of clipping: the completion's probability ratio is clipped at 1 + clip_high."""


class CispoLoss(_WithRatio):
    """CISPO has these options."""

    objective: Literal["cispo"] = "cispo"
    ratio_cap: float = Field(default=5.0, gt=0)
    """Upper bound of the probability ratio that multiplies a token's gradient."""


class DapoLoss(_WithRatio):
    """DAPO has these options."""

    objective: Literal["dapo"] = "dapo"
    clip_low: float = Field(default=0.2, gt=0)
    """Lower end of clipping: the probability ratio is clipped at 1 - clip_low."""
    clip_high: float = Field(default=0.28, gt=0)
    """Upper end of clipping: the probability ratio is clipped at 1 + clip_high."""
    trains_equal_rewards: ClassVar[bool] = False


class MaxrlLoss(LossOptions):
    """MaxRL has no options of its own."""

    objective: Literal["maxrl"] = "maxrl"


class _WithBeta(_DependsOnBeta):
    beta: float = Field(default=START_BETA, gt=0)
    """Reward units per nat of log-ratio."""

    @property
    def start_beta(self) -> float:
        """The beta of all steps."""
        return self.beta


class OaplLoss(_WithBeta):
    """OAPL has these options."""

    objective: Literal["oapl"] = "oapl"
    value_beta: float | None = Field(default=None, gt=0)
    """Temperature of the soft maximum of a group's rewards, in reward units; null: beta."""


class DpoLoss(_WithBeta):
    """DPO has these options."""

    objective: Literal["dpo"] = "dpo"
    reference: str | ScoringModelConfig = "initial"
    """Policy that is the reference, as for the other objectives: `initial` is the published one."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are taken to be labelled the wrong way round."""
    ipo: bool = False
    """Use IPO's squared loss in place of DPO's."""

    @model_validator(mode="after")
    def _ipo_has_no_labels(self) -> DpoLoss:
        if self.ipo and self.label_smoothing:
            raise ValueError("label_smoothing has no meaning with ipo: true: leave one of them out")
        return self


class EpaLoss(_WithBeta):
    """EPA has these options."""

    objective: Literal["epa"] = "epa"
    reference: str | ScoringModelConfig = "initial"
    """Policy that is the reference, as for the other objectives; `initial` is that of preferences."""
    num_weak: int = Field(default=0, ge=0)
    """Weak negatives of a group: completions of other prompts of the same update, scored under this one. The
    paper mixes them with strong ones; each costs as much as a completion of the group's own."""

    @property
    def num_weak_negatives(self) -> int:
        """Most completions of other prompts that join a group in an update."""
        return self.num_weak


class SftLoss(LossOptions):
    """SFT has no options of its own."""

    objective: Literal["sft"] = "sft"
    least: ClassVar[int] = 1
    reads_rewards: ClassVar[bool] = False


class PoftLoss(LossOptions):
    """PoFT takes for a completion's reward the mean log-prob per token that aligned models gave it.

    The source has it in its reward_column, or by name of the model in the column `aligned_logps`, which
    `gvpo-ray score` writes.
    """

    objective: Literal["poft"] = "poft"
    beta: float = Field(default=1.0, gt=0)
    """Factor of the difference of mean log-probs per token."""
    gamma: float = 0.0
    """Margin that is added to it."""
    aligned: dict[str, ScoringModelConfig] = {}
    """The aligned models by name, with which `gvpo-ray score` scores the source. Training starts none of
    them: it needs their log-probs in the data, and with {} takes those of all models that these name."""
    least: ClassVar[int] = 1


_Any = (
    GvpoLoss
    | GrpoLoss
    | DrGrpoLoss
    | RlooLoss
    | ReinforceLoss
    | GspoLoss
    | CispoLoss
    | DapoLoss
    | MaxrlLoss
    | OaplLoss
    | DpoLoss
    | EpaLoss
    | SftLoss
    | PoftLoss
)
_BY_NAME: dict[str, type[LossOptions]] = {
    options.model_fields["objective"].default: options for options in get_args(_Any)
}


def _of_the_objective(value: Any) -> Any:
    """Fill in the default objective, and drop options of other objectives that have their default value.

    A file that writes out all defaults then needs no override but `loss.objective`.
    """
    if not isinstance(value, dict):
        return value
    name = value.get("objective", "gvpo")
    if name not in _BY_NAME:
        raise ValueError(f"objective must be one of {', '.join(_BY_NAME)}, not {name}")
    own = _BY_NAME[name].model_fields
    result = {"objective": name}
    for key, given in value.items():
        fields = [options.model_fields[key] for options in _BY_NAME.values() if key in options.model_fields]
        if key in own or not fields:  # what no objective has is refused as an unknown key
            result[key] = given
        elif given != fields[0].default:
            known = ", ".join(sorted(set(own) - {"objective"}))
            raise ValueError(f"{key} is not an option of {name}; it has {known}")
    return result


LossConfig = Annotated[_Any, Field(discriminator="objective"), BeforeValidator(_of_the_objective)]
"""The section `loss`: the options of one objective."""

_ADAPTER: TypeAdapter[_Any] = TypeAdapter(LossConfig)


def loss_config(**options: Any) -> _Any:
    """Return the section `loss` with these keys, as a config file would give them."""
    return _ADAPTER.validate_python(options)
