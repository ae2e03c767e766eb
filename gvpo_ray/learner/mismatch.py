"""Engine and learner differ by rounding in bfloat16, although they compute with the same weights.

The difference is measured on every token that the policy at the start of a step has sampled. Summed over a
long completion it is nats, of the size of what a ratio pi / pi_sampled is there to show: GVPO's importance
weights would choose among long completions mostly by rounding. So a ratio counts only beyond what rounding
explains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

ROUNDING = (1e-3, 0.3)
"""Root mean squares of the difference per token, in nats, that are rounding. Float32 is below (1e-6 and
less), and its ratios stay exactly as they are; what is beyond is no rounding, and may not be hidden."""

BAND = 2.0
"""Standard deviations of the difference of a whole completion that are taken for rounding."""


@dataclass(frozen=True)
class Mismatch:
    """A Mismatch holds number, sum and sum of squares of all differences that a run has measured so far.

    It is a function of the groups trained, and is kept in checkpoints, so that a resumed run has the same.
    """

    count: float = 0.0
    total: float = 0.0
    square: float = 0.0

    def plus(self, sums: Mapping[str, float]) -> Mismatch:
        """Return the mismatch with those of another step (objective.mismatch_sums, added up).

        A step whose sums are not finite is left out: the learner gave a token no probability at all, which is
        no rounding, and would be in the sums for ever.
        """
        if not math.isfinite(sums["mismatch_square"]):
            return self
        return Mismatch(
            self.count + sums["mismatch_count"],
            self.total + sums["mismatch"],
            self.square + sums["mismatch_square"],
        )

    @property
    def is_rounding(self) -> bool:
        """Return whether there is a difference of the size of rounding."""
        return self.count > 0 and ROUNDING[0] <= math.sqrt(self.square / self.count) <= ROUNDING[1]

    def beyond(self, log_ratios: Tensor, lengths: Tensor) -> Tensor:
        """Return log-ratios of completions without what rounding explains.

        The mean of the difference is taken away, and then BAND standard deviations, as far as there is
        anything left: a ratio that rounding explains is 1, and the others change continuously from there.

        Args:
            log_ratios: [N] learner less engine, float64.
            lengths: [N] the tokens of each completion.
        """
        mean = self.total / self.count
        deviation = math.sqrt(max(0.0, self.square / self.count - mean**2))
        centred = log_ratios - mean * lengths
        return centred.sign() * (centred.abs() - BAND * deviation * lengths.sqrt()).clamp(min=0)


NO_MISMATCH = Mismatch()
"""Nothing has been measured."""
