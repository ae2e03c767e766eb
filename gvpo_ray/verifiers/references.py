"""Models that score texts are actors: those of `loss.reference: {model: …}`, and PoFT's aligned models.

This module imports neither torch nor transformers: its actors do that.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import ray

from gvpo_ray.actors import EventCallback
from gvpo_ray.config.model import ScoringModelConfig
from gvpo_ray.data.hub import revision_of
from gvpo_ray.groups import from_wire, to_wire
from gvpo_ray.verifiers.pool import ElasticGroup
from gvpo_ray.verifiers.scoring_model import Renderings, Score, ScoringModel, Text, with_references


class ReferenceGroup(ElasticGroup):
    """A ReferenceGroup is the actors of one scoring model, seen from the driver.

    Args:
        config: the model, the number of its actors and their resources.
        renderings: how the prompts of each data set are written.
        note: called with every restart of an actor.
        version: stands for the model in a group's `reference_versions`.
        kind: the kind of the actors, for their names and for notes.
    """

    def __init__(
        self,
        config: ScoringModelConfig,
        renderings: Renderings,
        note: EventCallback,
        version: int = 0,
        kind: str = "reference",
    ) -> None:
        self._config, self._renderings, self._version = config, renderings, version
        self._revision = revision_of(config.model)
        super().__init__(kind, config.num, config.max_num, note)

    async def score(self, scored: Any) -> Any:
        """Add the model's log-probs to a group, given as an object ref; return the ref of the result."""
        with self._hold() as actor:
            result, pid = actor.add_references.remote(scored, self._version)
            self._answered(actor, await pid, "scored")
            return result

    async def score_texts(self, texts: Sequence[Text], key: str) -> list[Score]:
        """Return the model's log-probs of texts of one data set."""
        with self._hold() as actor:
            scores, pid = await actor.score_texts.remote(texts, key)
            self._answered(actor, pid, "scored")
            return list(scores)

    def _start(self) -> Any:
        config = self._config
        options = self._options() | {"num_cpus": config.num_cpus, "num_gpus": config.num_gpus}
        arguments = (config.model, self._renderings, config.batch_size, config.num_gpus > 0, self._revision)
        return ray.remote(_ReferenceActor).options(**options).remote(*arguments)


class _ReferenceActor(ScoringModel):
    @ray.method(num_returns=2)
    def add_references(self, scored: pa.Buffer, version: int) -> tuple[pa.Buffer, int]:
        """Return a group with the model's log-probs, and the number of this process.

        Two return values, so that the driver can await the number while the table stays in the object store.
        """
        return to_wire(with_references(from_wire(scored), self, version)), os.getpid()

    def score_texts(self, texts: Sequence[Text], key: str) -> tuple[list[Score], int]:
        """Return the log-probs of texts, and the number of this process."""
        return self.score(texts, key), os.getpid()

    def close(self) -> None:
        """Do nothing: the process has no others to end."""
