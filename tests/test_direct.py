"""vLLM's own transports from GPU to GPU, with its real code on both sides: the device alone is stood in for.

An exported tensor is found again by a number, as by its handle on a GPU; nothing is registered for RDMA.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from gvpo_ray.config.base import ConfigError
from gvpo_ray.weights import direct
from gvpo_ray.weights.direct import DirectPublisher


class Weights:
    """Float32 weights of a model with two layers and a head, which come again whenever they are asked for."""

    def __init__(self, version: int) -> None:
        generator = torch.Generator().manual_seed(version)
        names = ("model.embed_tokens", "model.layers.0.mlp", "model.layers.1.mlp", "model.norm", "lm_head")
        self.tensors = {f"{name}.weight": torch.randn(6, 7, generator=generator) for name in names}

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors.items())

    def are(self, got: dict[str, torch.Tensor]) -> bool:
        return got.keys() == self.tensors.keys() and all(
            torch.equal(got[name], tensor.bfloat16()) for name, tensor in self.tensors.items()
        )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU of each process, in the host's memory."""
    from vllm.distributed.weight_transfer import packed_tensor, sharded_rdt_trainer

    exported: dict[int, torch.Tensor] = {}

    def export(tensor: torch.Tensor) -> tuple[Any, tuple[Any, ...]]:
        exported[len(exported)] = tensor
        return None, (torch.Tensor, tensor.dtype, 0, 0, 0, 0, 0, len(exported) - 1)

    def opened(*arguments: Any) -> torch.Tensor:
        return exported[arguments[7]]

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, device=None, **k: empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid="the GPU"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *a: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(torch.multiprocessing.reductions, "rebuild_cuda_tensor", opened)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", export)
    monkeypatch.setattr(sharded_rdt_trainer, "reduce_tensor", export)
    monkeypatch.setattr(sharded_rdt_trainer, "rebuild_cuda_tensor", opened)


@pytest.mark.parametrize("part_bytes", [84, 168, 1000], ids=["tensor by tensor", "in pairs", "at once"])
def test_engines_on_the_learners_gpu_read_each_version_out_of_one_buffer(
    part_bytes: int, device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.distributed.weight_transfer import ipc_engine
    from vllm.distributed.weight_transfer.packed_tensor import PackedBufferImporter
    from vllm.model_executor.model_loader import reload

    monkeypatch.setattr(direct, "SHARD_BYTES", part_bytes)
    monkeypatch.setattr(reload, "initialize_layerwise_reload", lambda model: None)
    monkeypatch.setattr(reload, "finalize_layerwise_reload", lambda model, config: None)
    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # as Engine.start does
    engines, loaded, calls = [], [dict[str, torch.Tensor](), dict[str, torch.Tensor]()], []
    for got in loaded:
        engine = ipc_engine.IPCWeightTransferEngine.__new__(ipc_engine.IPCWeightTransferEngine)
        engine.model = SimpleNamespace(load_weights=got.update)
        engine.device, engine.model_config, engine.packed = torch.device("cuda", 0), None, False
        engine._packed_importer = PackedBufferImporter()
        engines.append(engine)

    def call(method: str, arguments: list[tuple[Any, ...]]) -> None:
        calls.append(method)
        for engine, given in zip(engines, arguments, strict=True):
            if method == "init_transfer":
                engine.init_transfer_engine(engine.parse_init_info(*given))
            elif method == "begin_update":
                engine.start_weight_update()
            elif method == "receive":
                (info,) = msgspec.msgpack.decode(msgspec.msgpack.encode(given))  # as to vLLM's core
                engine.receive_weights(engine.parse_update_info(info))
            else:
                engine.finish_weight_update()

    publisher = DirectPublisher("ipc", call, 2, 1, rank=0, dtype=torch.bfloat16)
    for version in (1, 2):
        weights = Weights(version)
        assert publisher.publish(version, weights) == {"shards": [], "bytes": 5 * 6 * 7 * 2}
        assert all(weights.are(got) for got in loaded)
    parts = {84: 5, 168: 3, 1000: 1}[part_bytes]
    assert calls == ["init_transfer", *["begin_update", *["receive"] * parts, "finish_update"] * 2]


def test_each_worker_of_each_engine_pulls_the_groups_of_every_version_from_the_learner(
    device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to what the producer has in its cache for NIXL to serve, and until all workers have let go of it."""
    from vllm.distributed.weight_transfer import sharded_rdt_trainer
    from vllm.distributed.weight_transfer.sharded_rdt_engine import ShardedRDTWeightTransferInitInfo

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    trainer_class = sharded_rdt_trainer.ShardedRDTTrainerWeightTransferEngine

    def spawn(trainer: Any, served: list[str]) -> None:
        info = trainer._init_info
        assert info.trainer_actor_namespace == "the run"
        trainer._server_name = "the producer"
        trainer._server = sharded_rdt_trainer._RDTProducerServer(
            num_rdt_buffers=info.num_rdt_buffers,
            buffer_presize_gb=info.buffer_presize_gb,
            gather_lookahead=info.gather_lookahead,
            served_names=served,
            stall_timeout_s=60.0,
            workers_per_replica=info.workers_per_replica,
        )

    monkeypatch.setattr(trainer_class, "_spawn_server", spawn)
    monkeypatch.setattr(
        trainer_class, "_rpc", lambda trainer, method, *a: getattr(trainer._server, method)(*a)
    )
    infos: list[ShardedRDTWeightTransferInitInfo] = []
    pulled: dict[str, torch.Tensor] = {}
    finished = []

    def call(method: str, arguments: list[tuple[Any, ...]]) -> None:
        if method == "init_transfer":
            infos.extend(ShardedRDTWeightTransferInitInfo(**given) for (given,) in arguments)
        elif method == "receive":
            assert len(arguments) == 3 and not any(info for (info,) in arguments)
            server = publisher._trainer._server
            for i, group in enumerate(publisher._trainer._groups):
                end = time.monotonic() + 60
                while not all(name in server._cache for name in group):
                    assert time.monotonic() < end
                    time.sleep(0.001)
                pulled.update({name: server._cache[name].clone() for name in group})
                for _ in range(6):  # workers
                    server.free_group(i)
        elif method == "finish_update":
            finished.append(arguments)

    publisher = DirectPublisher("sharded_rdt", call, 3, 2, rank=0, dtype=torch.bfloat16, namespace="the run")
    for version in (1, 2):
        pulled.clear()
        weights = Weights(version)
        assert publisher.publish(version, weights) == {"shards": [], "bytes": 5 * 6 * 7 * 2}
        assert weights.are(pulled) and finished[-1] == [(version,)] * 3
        assert not publisher._trainer._inflight
    assert [info.replica_rank for info in infos] == [0, 1, 2]
    (info,) = {(i.num_replicas, i.num_consumers, *i.trainer_actor_names, *i.group_lens) for i in infos}
    assert info == (3, 6, "the producer", 1, 1, 1, 2)  # embeddings, two layers, norm and head


def test_without_nixl_one_line_says_what_is_missing() -> None:
    assert importlib.util.find_spec("nixl") is None  # it is none of the set-up's packages
    with pytest.raises(ConfigError, match=r"sharded_rdt needs the package nixl .* pip install nixl"):
        DirectPublisher("sharded_rdt", lambda *call: None, 1, 1, rank=0, dtype=torch.bfloat16)


@pytest.mark.parametrize(("executor", "is_made"), [("uni", False), ("mp", False), ("ray", True)])
def test_vllms_engine_of_shards_is_made_with_its_ray_executor_alone(executor: str, is_made: bool) -> None:
    """So config/run.py refuses sharded_rdt with another one."""
    from vllm.distributed.weight_transfer.sharded_rdt_engine import ShardedRDTWeightTransferEngine

    parallel: Any = SimpleNamespace(distributed_executor_backend=executor)
    given: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
    transfer: Any = SimpleNamespace(backend="sharded_rdt")
    wrong = (
        contextlib.nullcontext() if is_made else pytest.raises(ValueError, match="requires distributed_exec")
    )
    with wrong:
        ShardedRDTWeightTransferEngine(transfer, given, torch.device("cpu"), torch.nn.Linear(1, 1))
