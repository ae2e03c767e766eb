"""The section `loss`: the objective and its options."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from gvpo_ray.config.base import Section

START_BETA = 0.1
"""Of loss.beta: auto."""


class LossConfig(Section):
    objective: Literal["gvpo", "grpo", "dr_grpo", "rloo", "reinforce"] = "gvpo"
    """`gvpo`; the others are for comparison, on the same data and in the same ring."""
    beta: float | Literal["auto"] = "auto"
    """Reward units per nat of log-ratio: the optimum is pi_ref exp(R / beta) / Z, so 1/beta nats are worth
    one unit of reward. It is the trust region: gvpo/binding says how often it binds, and a run in which it
    hardly ever does says so. auto: 0.1, the paper's, and with the `behaviour` reference moved from there
    after each step until beta D varies half as much as the rewards do."""
    beta_end: float | None = Field(default=None, gt=0)
    """Move beta linearly from its first value to this one at the last step. Bias: each step then has an
    optimum of its own, the last one that of beta_end."""
    residual_clip: float | None = Field(default=None, gt=0)
    """Clip the residual beta (D - mean D) - (R - mean R) at so many reward units: Huber's loss in place of
    the square. Bias: where it clips, the optimum stays but the pull towards it is weaker; with noisy rewards
    it is no longer that of their mean."""
    importance_cap: float | None = Field(default=1.0, gt=0)
    """A completion counts min(importance_cap, pi / pi_sampled), relative to its group: what the policy would
    not write any more counts less. No bias: GVPO's optimum is the same for every sampler, and this is to
    choose one. And where what is right has become less likely since it was sampled, less is pushed down
    (gvpo/kept): no bias where residuals can vanish; where rewards are noisy, completions gain whose rewards
    vary most. null: all alike, as in the paper; the same thing where an update trains what was sampled just
    before. Old data is then followed where the policy no longer goes (README: data of any age)."""
    damped: bool = True
    """With the `behaviour` reference, multiply the learning rate of an update by the squared correlation of
    its residuals with its rewards (gvpo/damping): what is left of a residual beside the reward is where the
    policy has gone since the completion was sampled, and a step of full length after it overshoots. 1 for
    what was sampled at the start of the step. false: the schedule's learning rate as it is."""
    drop_equal_rewards: bool = False
    """Leave out groups whose rewards are all equal. Bias: they are what pulls the policy back to the
    reference once D differs from 0; without them the optimum holds only on prompts that are sometimes right
    and sometimes wrong."""
    length_normalised: bool = False
    """Divide each completion's log-ratio by its length in tokens. Bias: the optimum is then pi_ref exp(|y| (R
    / beta - c(x))): a token, not a completion, is worth 1/beta nats, and long right answers gain most."""
    clip_low: float = Field(default=0.2, gt=0)
    """grpo, dr_grpo: the probability ratio is clipped at 1 - clip_low …"""
    clip_high: float = Field(default=0.2, gt=0)
    """… and at 1 + clip_high."""
    old_policy: Literal["behaviour", "previous"] = "behaviour"
    """grpo, dr_grpo: what the ratio is taken to: the policy that sampled the token, or the one at the start
    of the step, as if that had sampled it. Bias: older data then counts as if it were new."""
    kl_coefficient: float = Field(default=0.0, ge=0)
    """All but gvpo: weight of the KL divergence from the reference, which `reference` names."""
    baseline: float = 0.0
    """reinforce: subtracted from every reward."""
    reference: str = "behaviour"
    """Which policy is pi_ref: `behaviour` (the one that sampled the completion; of one from elsewhere the one
    that the run began with), `previous` (the policy at the start of the step), `initial` (frozen), or `every:
    N` (refreshed every N steps)."""

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

    @model_validator(mode="after")
    def _of_the_objective(self) -> LossConfig:
        if self.beta == "auto" and self.beta_end is not None:
            raise ValueError("beta_end needs a number for beta to start from")
        options = {
            "gvpo": {
                "beta",
                "beta_end",
                "residual_clip",
                "importance_cap",
                "damped",
                "drop_equal_rewards",
                "length_normalised",
                "reference",
            },
            "grpo": {"clip_low", "clip_high", "old_policy", "kl_coefficient", "reference"},
            "dr_grpo": {"clip_low", "clip_high", "old_policy", "kl_coefficient", "reference"},
            "rloo": {"kl_coefficient", "reference"},
            "reinforce": {"kl_coefficient", "baseline", "reference"},
        }
        for name in sorted(self.model_fields_set - {"objective"} - options[self.objective]):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name} is not an option of {self.objective}; it has "
                    f"{', '.join(sorted(options[self.objective]))}"
                )
        return self

    def beta_at(self, version: int, num_steps: int) -> float:
        """beta of the step that starts from weights of `version`; of the first one, where it is steered."""
        beta = START_BETA if self.beta == "auto" else self.beta
        end = beta if self.beta_end is None else self.beta_end
        return beta + (end - beta) * min(1.0, version / max(1, num_steps - 1))

    @property
    def steers_beta(self) -> bool:
        """An older reference is what beta is about, and not only where the policy was."""
        return self.objective == "gvpo" and self.beta == "auto" and self.reference == "behaviour"

    @property
    def is_damped(self) -> bool:
        """An older reference is where to go back to, and not only where the policy was."""
        return self.objective == "gvpo" and self.damped and self.reference == "behaviour"

    @property
    def has_reference_model(self) -> bool:
        """Whether the reference has weights of its own."""
        return self.reference not in ("behaviour", "previous")

    @property
    def asks_reference_model_for_sums(self) -> bool:
        """Whether one number per completion is all that is asked of it; a KL term asks for every token."""
        return self.has_reference_model and self.kl_coefficient == 0

    @property
    def reference_every(self) -> int | None:
        """N of `every: N`."""
        return int(self.reference.partition(":")[2]) if self.reference.startswith("every") else None
