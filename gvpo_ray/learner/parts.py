"""torch.distributed.checkpoint plans who writes which part of the training state; here the parts are written.

Each rank's part is one safetensors file. torch's HuggingFaceStorageReader reads them, for any number of
ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from gvpo_ray.files import sync_to_disk


class HostPlanner(DefaultSavePlanner):
    """A HostPlanner plans as torch does, and has the values from copies: training goes on meanwhile.

    Args:
        copies: this rank's part of each tensor, in the host's memory.
    """

    def __init__(self, copies: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._copies = copies

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """Return the copy of a tensor."""
        return self._copies[index.fqn]


class PartWriter(FileSystemWriter):
    """A PartWriter writes this rank's part to the disk, and lets rank 0 complete the checkpoint after that.

    torch's HuggingFaceStorageWriter would first make a second copy of the part in memory, and while it does
    no other thread of the process runs Python.

    Args:
        folder: of the parts.
        complete: called on rank 0 with the names of all ranks' files, once they are on the disk. What it
            raises is raised on every rank.
    """

    def __init__(self, folder: Path, complete: Callable[[list[str]], None]) -> None:
        super().__init__(folder)
        self._folder, self._complete = folder, complete

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        """Write what the plan gives to this rank."""
        tensors: dict[str, Any] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        name = f"{self.rank or 0:05d}.safetensors"
        for item in plan.items:
            assert item.tensor_data is not None
            tensors[item.index.fqn] = planner.resolve_data(item)
            offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        if tensors:
            # Under this key HuggingFaceStorageReader looks for where in the whole tensors the parts begin.
            # There is no second key: safetensors writes several in an order that differs by process, and
            # equal checkpoints are equal files.
            metadata = {"DCP_SHARDING_INFO": json.dumps(offsets)}
            save_file(tensors, self._folder / name, metadata=metadata)
            sync_to_disk(self._folder / name)
        written: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        written.set_result(
            [WriteResult(item.index, tensors[item.index.fqn].nbytes, name) for item in plan.items]
        )
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the checkpoint; torch calls this on rank 0, after all ranks have written."""
        self._complete(sorted({result.storage_data for of_rank in results for result in of_rank}))
