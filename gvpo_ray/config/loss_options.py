"""All objectives share some options; here is also what the learner and a run ask of an objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ValidationError, field_validator, model_validator

from gvpo_ray.config.base import Section
from gvpo_ray.config.loading import one_line
from gvpo_ray.config.model import ScoringModelConfig

START_BETA = 0.1
"""The paper's beta, with which `loss.beta: auto` begins and other objectives compute gvpo's statistics."""


@dataclass(frozen=True)
class Need:
    """A Need says with which log-probs a loss compares those of the current policy."""

    detail: Literal["nothing", "sums", "tokens"]
    """How many log-probs: none, one per completion (the sum over its tokens), or one per token."""
    policy: Literal["behaviour", "previous", "model", "other"]
    """Whose log-probs: `behaviour`, the policy that sampled the completion; `previous`, the policy at the
    start of the step; `model`, a reference model with weights of its own; or `other`, another model, whose
    sums come with the groups."""


class LossOptions(Section):
    """All objectives share these options, and answer the learner's questions by these properties."""

    objective: str
    """Name of the objective: `gvpo`, or one to compare it with, on the same data and in the same loop."""
    reference: str | ScoringModelConfig = "behaviour"
    """Policy that is the reference, pi_ref: `behaviour` (the one that sampled the completion), `previous`
    (the policy at the start of the step), `initial` (the policy that the run began with, frozen), `every: N`
    (a copy of the policy, refreshed every N steps), or `{model: PATH}` (another model, such as a teacher,
    with a tokenizer of its own: it scores a completion's text once, before the group is logged). For external
    completions gvpo's `behaviour` is `initial`. GVPO's theorems are about one reference per prompt. With
    `behaviour`, completions of several policies in a group have one each, and training rests at R / beta plus
    the mean of their log-probs, weighted by the posterior of who wrote the completion."""
    depends_on_beta: ClassVar[bool] = False
    """Whether the loss depends on beta, and not only its statistics."""
    least: ClassVar[int] = 2
    """Fewest completions of a group. 1: completions are not compared, and come from sources alone."""
    reads_rewards: ClassVar[bool] = True
    """Whether the loss reads rewards. If not, completions of sources need neither rewards nor golds."""
    trains_equal_rewards: ClassVar[bool] = True
    """Whether groups whose rewards are all equal stay in an update. If not, no denominator counts them."""

    @field_validator("reference", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> str | ScoringModelConfig:
        if isinstance(value, ScoringModelConfig):
            return value
        if isinstance(value, dict) and "model" in value:
            try:
                return ScoringModelConfig.model_validate(value)
            except ValidationError as error:
                raise ValueError(one_line(error, ScoringModelConfig)) from error
        if isinstance(value, dict) and set(value) == {"every"}:
            value = f"every: {value['every']}"
        name, _, number = str(value).partition(":")
        if name == "every" and number.strip().isdigit() and int(number) > 0:
            return f"every: {int(number)}"
        if value in ("behaviour", "previous", "initial"):
            return str(value)
        raise ValueError("must be behaviour, previous, initial or every: N, or {model: PATH}")

    @model_validator(mode="after")
    def _takes_another_model(self) -> LossOptions:
        if self.reference_model is None:
            return self
        if not self.depends_on_beta:
            raise ValueError(f"reference: {self.objective} is not compared with another model")
        if self.num_weak_negatives:
            raise ValueError("num_weak: another model as reference does not score weak negatives")
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the objective's loss: the options that are its alone."""
        shared = {*LossOptions.model_fields, "old_policy", "beta"}
        return {name: getattr(self, name) for name in type(self).model_fields if name not in shared}

    @property
    def sampler_need(self) -> Need:
        """The log-probs of the sampling policy that the loss needs."""
        return Need("nothing", "behaviour")

    @property
    def reference_need(self) -> Need:
        """The log-probs of the reference policy that the loss, or one of its statistics, needs."""
        return Need("sums", self._reference_policy)

    @property
    def external_is_initial(self) -> bool:
        """Return whether an external completion counts as one of the initial policy.

        Otherwise it counts as one of the policy at the start of the step.
        """
        return False

    @property
    def num_weak_negatives(self) -> int:
        """Most completions of other prompts that join a group in an update."""
        return 0

    @property
    def start_beta(self) -> float:
        """The beta of the first step."""
        return START_BETA

    @property
    def adapts_beta(self) -> bool:
        """Return whether beta is adapted after each step."""
        return False

    @property
    def is_damped(self) -> bool:
        """Return whether the learning rate is scaled by how much of the residuals the rewards explain."""
        return False

    @property
    def reference_model(self) -> ScoringModelConfig | None:
        """The other model that is the reference, in actors of its own; None: a policy of the run is."""
        return None if isinstance(self.reference, str) else self.reference

    @property
    def has_reference_model(self) -> bool:
        """Return whether the reference has weights of its own in the learner."""
        return self.reference == "initial" or self.reference_every is not None

    @property
    def caches_reference(self) -> bool:
        """Return whether the reference model's log-prob of a completion is computed once and kept with it."""
        return self.reference_need == Need("sums", "model")

    @property
    def reference_every(self) -> int | None:
        """Steps between refreshes of the reference, N of `every: N`; None for other references."""
        name, _, number = str(self.reference).partition(": ")
        return int(number) if name == "every" else None

    @property
    def _reference_policy(self) -> Literal["behaviour", "previous", "model", "other"]:
        if self.reference_model is not None:
            return "other"
        if self.has_reference_model:
            return "model"
        return "previous" if self.reference == "previous" else "behaviour"
