"""Examples are the few completions of a step whose token log-probs are kept for the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gvpo_ray import groups
from gvpo_ray.groups import Row
from gvpo_ray.learner.logprobs import trained_tokens
from gvpo_ray.learner.references import ReferenceLogprobs
from gvpo_ray.observe.metrics import mean
from gvpo_ray.observe.token_examples import KINDS, MAX_FIRST, MAX_LAST, TokenExample

LEAST_RATIO = 0.01
"""Nats by which the likelihood of a completion has changed, for the report to say that it did."""


class Examples:
    """Examples are the extreme completions of each kind among those that this rank trains in a step."""

    def __init__(self) -> None:
        self._most: dict[str, tuple[float, TokenExample]] = {}

    def add(
        self, rows: Sequence[Row], logprobs: Tensor, measured: ReferenceLogprobs, gradient: Tensor
    ) -> None:
        """Consider the completions of whole groups, but for weak negatives.

        Args:
            rows: the groups.
            logprobs: [T] log-probs of all their trained tokens.
            measured: the sampler's and the reference's log-probs of the same tokens.
            gradient: [T] d loss / d log-prob of these tokens.
        """
        sampler, reference = measured.sampler, measured.reference
        tensors = {
            "policy": logprobs,
            "sampler": None if sampler is None else sampler.beside(logprobs),
            "reference": None if reference is None else reference.beside(logprobs),
            "push": -gradient,
        }
        values = {name: None if of is None else of.tolist() for name, of in tensors.items()}
        end = 0
        for row in rows:
            completions, ratios = [], []
            for i, places in enumerate(trained_tokens(row)):
                start, end = end, end + len(places)
                one = {name: None if of is None else of[start:end] for name, of in values.items()}
                if row["version_min"][i] is None or row["sampling_logprobs"][i] is None:
                    one["sampler"] = None  # what stands for it is another policy's
                elif one["sampler"] is None:
                    one["sampler"] = [row["sampling_logprobs"][i][place] for place in places]
                known = one["reference"]
                ratios.append(
                    sum(one["policy"] or ()) - (row["reference_logprobs"][i] if known is None else sum(known))
                )
                completions.append((i, places, one))
            for i, places, one in completions:
                if not row["sources"][i].startswith(groups.WEAK):
                    self._consider(row, i, places, one, ratios)

    def _consider(
        self,
        row: Row,
        i: int,
        places: Sequence[int],
        values: dict[str, Any],
        reference_ratios: Sequence[float],
    ) -> None:
        """Keep completion `i` of a group for the kinds of which it is more than what was kept before."""
        ratio = None if values["sampler"] is None else sum(values["policy"]) - sum(values["sampler"])
        changed = 0.0 if ratio is None or abs(ratio) < LEAST_RATIO else ratio
        push = mean(values["push"])
        strengths = dict(zip(KINDS, (-changed, changed, -push, push), strict=True))
        for kind, strength in strengths.items():
            if strength > self._most.get(kind, (0.0,))[0]:  # which a NaN is not
                example = _example(row, i, places, values, ratio, reference_ratios)
                self._most[kind] = strength, example

    def chosen(self) -> list[TokenExample]:
        """Return the examples, each once with all its kinds."""
        found: dict[tuple[int, int], TokenExample] = {}
        for kind in (kind for kind in KINDS if kind in self._most):
            example = self._most[kind][1]
            place = (example.group_id, example.completion)
            kinds = [*(found[place].kinds if place in found else ()), kind]
            found[place] = example.model_copy(update={"kinds": kinds})
        return list(found.values())


def _example(
    row: Row,
    i: int,
    places: Sequence[int],
    values: dict[str, Any],
    sampler_ratio: float | None,
    reference_ratios: Sequence[float],
) -> TokenExample:
    ids = row["completion_ids"][i]

    def by_token(name: str) -> list[float | None] | None:
        if values[name] is None:
            return None
        whole: list[float | None] = [None] * len(ids)
        for place, value in zip(places, values[name], strict=True):
            whole[place] = float(f"{value:.5g}") if math.isfinite(value) else None
        return _ends(whole)

    return TokenExample(
        kinds=[],
        group_id=row["group_id"],
        completion=i,
        prompt=row["prompt"],
        answer=row["answer"],
        source=row["sources"][i],
        version_min=row["version_min"][i],
        version_max=row["version_max"][i],
        num_tokens=len(ids),
        ids=_ends(ids),
        policy=by_token("policy") or [],
        sampler=by_token("sampler"),
        reference=by_token("reference"),
        push=by_token("push") or [],
        sampler_ratio=sampler_ratio,
        reference_ratio=reference_ratios[i],
        group_reference_ratio=mean(reference_ratios),
        reward=row["rewards"][i],
        group_reward=mean(row["rewards"]),
    )


def _ends(values: list[Any]) -> list[Any]:
    """Return both ends of what the tokens of a long completion have, and a shorter list as it is."""
    return values if len(values) <= MAX_FIRST + MAX_LAST else values[:MAX_FIRST] + values[-MAX_LAST:]
