"""The wires of weights from GPU to GPU: what each side says, with vLLM stood in for or its device alone."""

import asyncio
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch

from gvpo_ray.weights.direct import DirectPublisher
from gvpo_ray.weights.transfer import shards


def nccl(*arguments: Any, dtype: torch.dtype = torch.bfloat16, **options: Any) -> DirectPublisher:
    return DirectPublisher("nccl", *arguments, dtype=dtype, **options)


def test_every_engine_is_told_its_place_in_the_broadcast():
    calls: list[tuple[str, list[tuple[Any, ...]]]] = []
    publisher = nccl(lambda *call: calls.append(call), 3, 2, rank=0, address="10.0.0.1", port=99)
    publisher.init_weight_transfer_engine({"master_address": "10.0.0.1", "master_port": 99})
    publisher.start_weight_update()
    publisher.update_weights({"names": ["w"]})
    publisher._version = 7
    publisher.finish_weight_update("ignored: the version is ours")
    base = {"master_address": "10.0.0.1", "master_port": 99}
    # rank 0 is the learner; an engine of two shards takes two ranks
    assert calls == [
        ("init_transfer", [({**base, "rank_offset": offset},) for offset in (1, 3, 5)]),
        ("begin_update", [(), (), ()]),
        ("receive", [({"names": ["w"]},)] * 3),
        ("finish_update", [(7,)] * 3),
    ]


@dataclass
class _ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class _InitInfo:
    rank: int
    master_address: str
    master_port: int
    world_size: int


class _Trainer:
    """vLLM 0.32's NCCLTrainerWeightTransferEngine without NCCL: the shapes first, then the tensors, and both
    must agree.
    """

    made: list["_Trainer"]

    def __init__(self, info: _InitInfo, client: DirectPublisher, source: Any) -> None:
        self.info, self.client, self.source = info, client, source
        self.broadcast: list[dict[str, torch.Tensor]] = []
        if info.rank == 0:
            client.init_weight_transfer_engine({"world_size": info.world_size})
        _Trainer.made.append(self)

    def send_weights(self) -> None:
        meta = self.source.metadata()
        if self.info.rank == 0:
            self.client.start_weight_update()
            self.client.update_weights({"names": [m.name for m in meta]})
        sent = dict(self.source)
        assert [(m.name, m.dtype, m.shape) for m in meta] == [
            (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sent.items()
        ]
        self.broadcast.append(sent)
        if self.info.rank == 0:
            self.client.finish_weight_update()


@pytest.fixture
def vllm(monkeypatch):
    """The four names of vLLM that the publisher uses; importing the real ones takes longer than all tests of
    this file.
    """
    factory = type(
        "WeightTransferTrainerFactory",
        (),
        {"trainer_init": staticmethod(lambda info, client, source: _Trainer(info, client, source))},
    )
    names = {
        "vllm.distributed.weight_transfer.base": {"ParamMeta": _ParamMeta, "WeightSource": object},
        "vllm.distributed.weight_transfer.factory": {"WeightTransferTrainerFactory": factory},
        "vllm.distributed.weight_transfer.nccl_engine": {"NCCLTrainerInitInfo": _InitInfo},
    }
    for name in ("vllm", "vllm.distributed", "vllm.distributed.weight_transfer"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    for name, contents in names.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    _Trainer.made = []
    return _Trainer


class _Weights:
    """As Policy.named_tensors: gone through again, it gathers again."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __iter__(self):
        yield "a", torch.full((2, 3), self.value)
        yield "b", torch.full((4,), self.value, dtype=torch.bfloat16)
        yield "n", torch.full((5,), 7, dtype=torch.int64)


def test_each_version_is_broadcast_whole_the_first_one_too(vllm):
    calls: list[str] = []
    publisher = nccl(
        lambda method, arguments: calls.append(f"{method} {len(arguments)}"),
        2,
        4,
        rank=0,
        address="host",
        port=5,
    )
    for version in (1, 2):
        # a learner with float32 parameters sends half of them
        size = 6 * 2 + 4 * 2 + 5 * 8
        assert publisher.publish(version, _Weights(float(version))) == {"shards": [], "bytes": size}
    (trainer,) = vllm.made
    assert trainer.info == _InitInfo(0, "host", 5, world_size=9)
    assert [
        {name: float(tensor.double().mean()) for name, tensor in sent.items()} for sent in trainer.broadcast
    ] == [
        {"a": 1, "b": 1, "n": 7},
        {"a": 2, "b": 2, "n": 7},
    ]
    assert calls == ["init_transfer 2", *["begin_update 2", "receive 2", "finish_update 2"] * 2]


def test_what_the_policy_publishes_can_be_broadcast(vllm, tmp_path):
    from tiny import make_model

    from gvpo_ray.config.learner import LearnerConfig
    from gvpo_ray.config.model import ModelConfig
    from gvpo_ray.learner.policy import Policy

    path = make_model(tmp_path)
    policy = Policy(ModelConfig(path=str(path)), LearnerConfig(backend="ddp"), path)
    nccl(lambda *call: None, 1, 1, rank=0, address="host", port=5).publish(1, policy.named_tensors())
    assert vllm.made[0].broadcast[0].keys() == dict(policy.named_tensors()).keys()


def test_other_learner_ranks_gather_and_ask_nothing_of_the_engines(vllm):
    calls: list[Any] = []
    publisher = nccl(lambda *call: calls.append(call), 2, 1, rank=1, address="host", port=5)
    assert publisher.publish(1, _Weights(1.0)) is None
    assert calls == [] and len(vllm.made[0].broadcast[0]) == 3


@pytest.mark.parametrize("has_head", [True, False])
def test_an_engine_whose_model_has_no_head_of_its_own_gets_none(tmp_path, has_head):
    """vLLM's Gemma 2 and Cohere read the embeddings instead, and refuse a head."""
    from gvpo_ray.weights.vllm_worker import ObjectsUpdateInfo, ObjectsWeightTransferEngine

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = torch.nn.Linear(1, 1)
            if has_head:
                self.lm_head = torch.nn.Linear(1, 1)
            self.loaded = []

        def load_weights(self, weights):
            self.loaded += [name for name, _ in weights]

    (data,) = shards(
        [("lm_head.weight", torch.ones(2)), ("model.embed_tokens.weight", torch.ones(2))], torch.float32
    )
    (tmp_path / "0.safetensors").write_bytes(data)
    engine = ObjectsWeightTransferEngine.__new__(ObjectsWeightTransferEngine)
    engine.model, engine.model_config = Model(), type("Config", (), {"dtype": torch.float32})
    engine.receive_weights(ObjectsUpdateInfo(paths=[str(tmp_path / "0.safetensors")]))
    assert sorted(engine.model.loaded) == ["lm_head.weight"] * has_head + ["model.embed_tokens.weight"]


def test_an_engine_that_has_not_started_joins_once_it_has() -> None:
    """The learner, which starts faster, asks at once."""
    from gvpo_ray.config.engines import PoolConfig
    from gvpo_ray.config.model import ModelConfig
    from gvpo_ray.engines.vllm_engine import Engine

    joined = []

    class LLM:
        async def init_weight_transfer_engine(self, request: Any) -> None:
            joined.append(request.init_info)

    async def run() -> None:
        engine = Engine(ModelConfig(path="m"), PoolConfig(), "nccl", 0)
        asked = asyncio.ensure_future(engine.init_transfer({"rank_offset": 1}))
        await asyncio.sleep(0)
        assert not asked.done()
        engine._llm, engine._death = LLM(), asyncio.get_running_loop().create_future()
        engine._has_started.set()
        await asked
        assert joined == [{"rank_offset": 1}]

    asyncio.run(run())
