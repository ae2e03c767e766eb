"""Weights go from the learner's GPU to the engines' by vLLM's own transports; this is the learner's end.

`nccl`: a broadcast from learner rank 0 into engines with GPUs of their own.

`ipc`: engines on the learner's own GPUs read each version out of one buffer there, part by part, and nothing
passes through the host.

`sharded_rdt`: each worker of an engine pulls what it holds from the learner ranks, by RDMA (Ray Direct
Transport, over NIXL).

The fleet is fixed in all three: a later engine cannot join. Written after vLLM 0.32's source; on a CPU all is
tested but the copy itself.
"""

from __future__ import annotations

import base64
import importlib.util
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import torch

from gvpo_ray.config.base import ConfigError
from gvpo_ray.weights.transfer import SHARD_BYTES, NamedTensors

Call = Callable[[str, list[tuple[Any, ...]]], None]
"""(method name, one argument tuple per engine) -> None; runs that method of `Engine` on all engines at once,
and waits."""


class DirectPublisher:
    """A DirectPublisher sends each version of the weights by one of vLLM's transports.

    Args:
        transport: "nccl", "ipc" or "sharded_rdt".
        call: calls all engines.
        num_engines: how many engines receive.
        num_processes: of vLLM in each engine, which receive.
        rank: this learner worker's.
        dtype: the floating-point type that is sent.
        address: the host at which learner rank 0 listens, for `nccl`.
        port: the port at which learner rank 0 listens, for `nccl`.
        namespace: Ray's, in which engines find the learner, for `sharded_rdt`.

    Raises:
        ConfigError: `sharded_rdt` lacks NIXL.
    """

    def __init__(
        self,
        transport: str,
        call: Call,
        num_engines: int,
        num_processes: int,
        rank: int,
        dtype: torch.dtype,
        address: str = "",
        port: int = 0,
        namespace: str | None = None,
    ) -> None:
        if transport == "sharded_rdt" and importlib.util.find_spec("nixl") is None:
            raise ConfigError(
                "engines.weight_transfer: sharded_rdt needs the package nixl on the nodes of learner and "
                "engines: pip install nixl, or use objects"
            )
        self._transport, self._call, self._rank, self._dtype = transport, call, rank, dtype
        self._num_engines, self._num_processes = num_engines, num_processes
        self._address, self._port, self._namespace = address, port, namespace
        self._trainer: Any = None
        self._current: NamedTensors = ()
        self._version = 0

    # The next four methods are vLLM's VLLMWeightSyncClient, fanned out to all engines.
    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let each engine's processes join; each gets its place in the fleet."""
        places: list[dict[str, Any]] = [{} for _ in range(self._num_engines)]
        if self._transport == "nccl":  # ranks after the learner's
            places = [{"rank_offset": 1 + i * self._num_processes} for i in range(self._num_engines)]
        elif self._transport == "sharded_rdt":
            places = [
                {"replica_rank": i, "num_replicas": self._num_engines} for i in range(self._num_engines)
            ]
        self._call("init_transfer", [({**init_info, **place},) for place in places])

    def start_weight_update(self) -> None:
        """Prepare all engines for new weights."""
        self._call("begin_update", [()] * self._num_engines)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let all engines receive the tensors that `update_info` describes."""
        handles = update_info.get("ipc_handles")
        if handles is not None:  # tuples with types in them, which vLLM's messages do not carry
            pickled = base64.b64encode(pickle.dumps(handles)).decode("ascii")
            update_info = {**update_info, "ipc_handles": None, "ipc_handles_pickled": pickled}
        self._call("receive", [(update_info,)] * self._num_engines)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Let all engines run the new weights, under the version that `publish` was given."""
        self._call("finish_update", [(self._version,)] * self._num_engines)

    def publish(self, version: int, named_tensors: NamedTensors) -> dict[str, Any] | None:
        """Send the weights of `version` and wait until all engines run them; every rank calls this.

        The first call iterates over `named_tensors` twice, because vLLM asks for the shapes first.

        Returns:
            `shards`, empty, and `bytes`, what was sent; None on ranks other than 0.
        """
        self._version, self._current = version, named_tensors
        if torch.cuda.is_available():
            # vLLM reads the parameters on streams of its own, which do not wait for the optimizer's
            torch.cuda.synchronize()
        if self._trainer is None:
            self._trainer = self._make_trainer()
        self._trainer.send_weights()
        if self._rank != 0:
            return None
        return {
            "shards": [],
            "bytes": sum(math.prod(m.shape) * m.dtype.itemsize for m in self._trainer.source.metadata()),
        }

    def _make_trainer(self) -> Any:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

        publisher = self

        class Source(WeightSource):
            """A Source yields the tensors of the current version; their shapes are read once."""

            _metadata: list[ParamMeta] | None = None

            def metadata(self) -> list[ParamMeta]:
                """Return name, dtype and shape of each tensor, which are the same in each version."""
                if self._metadata is None:
                    self._metadata = [
                        ParamMeta(name, publisher._sent_as(t), tuple(t.shape))
                        for name, t in publisher._current
                    ]
                return self._metadata

            def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
                return ((name, t.detach().to(publisher._sent_as(t))) for name, t in publisher._current)

        source = Source()
        client: Any = self  # its methods are those of vLLM's client, fanned out to all engines
        return WeightTransferTrainerFactory.trainer_init(
            self._init_info(source.metadata()), client=client, source=source
        )

    def _sent_as(self, tensor: torch.Tensor) -> torch.dtype:
        """Return the type in which a tensor is sent: a learner with float32 parameters sends half."""
        return self._dtype if tensor.is_floating_point() else tensor.dtype

    def _init_info(self, metadata: list[Any]) -> Any:
        """Return what vLLM's trainer has to know of the fleet."""
        num_workers = self._num_engines * self._num_processes
        if self._transport == "nccl":
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            return NCCLTrainerInitInfo(
                rank=self._rank,
                master_address=self._address,
                master_port=self._port,
                world_size=1 + num_workers,
            )
        if self._transport == "ipc":
            from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

            largest = max(math.prod(m.shape) * m.dtype.itemsize for m in metadata)
            return IPCTrainerInitInfo(
                rank=self._rank, packed=True, packed_buffer_size_bytes=max(SHARD_BYTES, largest)
            )
        from vllm.distributed.weight_transfer.sharded_rdt_trainer import ShardedRDTTrainerInitInfo

        return ShardedRDTTrainerInitInfo(
            rank=self._rank,
            num_consumers=num_workers,
            workers_per_replica=self._num_processes,
            trainer_actor_namespace=self._namespace,
        )
