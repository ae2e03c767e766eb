"""The weight wire: shards that hold what was sent, shared memory that is gone afterwards, and who is asked
what over NCCL.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load as from_bytes

from gvpo_ray.weights.transfer import NcclPublisher, ObjectPublisher, SharedMemory, merge, shards

# ----------------------------------------------------------------------------------------------------- shards


def named(*sizes: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, torch.Tensor]]:
    return [(f"layer.{i}", torch.arange(size).to(dtype) + 100 * i) for i, size in enumerate(sizes)]


def sizes_of(data: list[bytes]) -> list[dict[str, int]]:
    return [{name: tensor.numel() for name, tensor in from_bytes(shard).items()} for shard in data]


def test_a_shard_holds_as_many_tensors_as_fit_and_one_that_never_fits_alone():
    # 40 bytes to a shard, 4 bytes to a number
    data = list(shards(named(4, 6, 1, 30, 10, 0, 1), torch.float32, max_bytes=40))
    assert sizes_of(data) == [
        {"layer.0": 4, "layer.1": 6},
        {"layer.2": 1},
        {"layer.3": 30},
        {"layer.4": 10, "layer.5": 0},
        {"layer.6": 1},
    ]


def test_shards_come_one_at_a_time_and_gather_no_more_than_they_need():
    gathered = []

    def gather():
        for name, tensor in named(10, 10, 10):
            gathered.append(name)
            yield name, tensor

    stream = shards(gather(), torch.float32, max_bytes=40)
    assert gathered == []
    next(stream)
    assert gathered == ["layer.0", "layer.1"]  # the second showed that the first shard is full


def test_shards_hold_the_tensors_in_the_dtype_that_was_asked_for():
    tensors = [
        *named(3, 5, dtype=torch.float32),
        ("ids", torch.tensor([1, 2**40])),
        ("rng", torch.arange(4, dtype=torch.uint8)),
    ]
    tensors[0] = ("layer.0", torch.tensor([1.0, 1 / 3, -1e30]))
    for dtype in (torch.float32, torch.bfloat16):
        got = {name: tensor for shard in shards(tensors, dtype) for name, tensor in from_bytes(shard).items()}
        for name, tensor in tensors:
            want = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert got[name].dtype == want.dtype and torch.equal(got[name], want)


def test_tied_tensors_are_sent_under_each_of_their_names_and_views_as_they_look():
    tied = torch.arange(6.0).reshape(2, 3)
    got = from_bytes(next(shards([("embed", tied), ("head", tied), ("transposed", tied.T)], torch.float32)))
    assert (
        torch.equal(got["embed"], tied)
        and torch.equal(got["head"], tied)
        and torch.equal(got["transposed"], tied.T)
    )


def test_no_tensors_are_no_shards():
    assert list(shards([], torch.float32)) == []


def test_only_the_sender_puts_and_every_rank_gathers():
    gathered = []

    def gather():
        for name, tensor in named(2, 3):
            gathered.append(name)
            yield name, tensor

    put: list[Any] = []
    sender = ObjectPublisher(lambda array: put.append(array) or len(put), torch.bfloat16, is_sender=True)
    answer = sender.publish(1, gather())
    assert answer == {"shards": [1], "bytes": put[0].nbytes} and put[0].dtype == np.uint8
    assert from_bytes(put[0].tobytes())["layer.1"].tolist() == [100, 101, 102]
    assert ObjectPublisher(put.append, torch.bfloat16, is_sender=False).publish(1, gather()) is None
    assert gathered == ["layer.0", "layer.1"] * 2 and len(put) == 1


# ---------------------------------------------------------------------------------------------- shared memory


def test_shared_memory_is_there_inside_the_with_and_gone_after_it():
    tensors = named(3, 5)
    arrays = [np.frombuffer(data, dtype=np.uint8) for data in shards(tensors, torch.float32, max_bytes=12)]
    with SharedMemory(arrays) as memory:
        assert len(memory.paths) == 2
        folder = Path(memory.paths[0]).parent
        for path, (name, tensor) in zip(memory.paths, tensors, strict=True):
            with safe_open(path, framework="pt") as file:
                assert torch.equal(file.get_tensor(name), tensor)
        with SharedMemory(arrays) as other:  # another engine of this node, at the same time
            assert not set(other.paths) & set(memory.paths)
    assert not folder.exists()


def test_shared_memory_that_fills_up_while_it_is_written_is_in_the_temporary_folder_instead(
    tmp_path, monkeypatch
):
    shm, temporary = tmp_path / "shm", tmp_path / "tmp"
    shm.mkdir()
    temporary.mkdir()
    monkeypatch.setattr("gvpo_ray.weights.transfer.SHM", shm)
    monkeypatch.setattr("gvpo_ray.weights.transfer.tempfile.tempdir", str(temporary))

    class OfNineBytes:
        """As much of an array as is written: /dev/shm has room for one of two."""

        nbytes = 9

        def tofile(self, path: str) -> None:
            if Path(path).parent.parent == shm and Path(path).name[0] == "1":
                raise OSError(28, "9 requested and 0 written")
            Path(path).write_bytes(b"x" * 9)

    with SharedMemory([OfNineBytes(), OfNineBytes()]) as memory:
        assert [Path(path).parent.parent for path in memory.paths] == [temporary] * 2
        assert [Path(path).read_bytes() for path in memory.paths] == [b"x" * 9] * 2
        assert list(shm.iterdir()) == []
    assert list(temporary.iterdir()) == []
    monkeypatch.setattr("gvpo_ray.weights.transfer.SHM", tmp_path / "there is none")
    with SharedMemory([OfNineBytes()]) as memory:
        assert Path(memory.paths[0]).parent.parent == temporary


def test_what_a_killed_engine_left_in_shared_memory_is_removed_and_what_others_use_stays(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("gvpo_ray.weights.transfer.SHM", tmp_path)
    array = np.arange(4, dtype=np.uint8)
    killed, used = SharedMemory([array]), SharedMemory([array])
    foreign = tmp_path / "gvpo_weights_of somebody else"
    foreign.mkdir()
    killed._lock.close()  # as the end of its process does
    with SharedMemory([array]) as memory:
        left = {Path(path).parent for path in (*used.paths, *memory.paths)}
        assert {*tmp_path.iterdir()} == {*left, foreign}
    used.__exit__()
    assert [*tmp_path.iterdir()] == [foreign]


def test_shared_memory_is_gone_also_after_an_error_inside_and_while_it_is_filled(tmp_path, monkeypatch):
    monkeypatch.setattr("gvpo_ray.weights.transfer.tempfile.tempdir", str(tmp_path))
    # /dev/shm is full: a folder
    monkeypatch.setattr(
        "gvpo_ray.weights.transfer.shutil.disk_usage", lambda path: type("Usage", (), {"free": 0})
    )
    array = np.arange(4, dtype=np.uint8)
    with pytest.raises(ZeroDivisionError), SharedMemory([array]) as memory:
        assert Path(memory.paths[0]).parent.parent == tmp_path
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []

    class Full:
        nbytes = 4

        def tofile(self, path: str) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        SharedMemory([array, Full()])
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- adapters


def adapter(layer: str, inputs: int, outputs: int, rank: int = 2) -> dict[str, torch.Tensor]:
    sizes = {"A": (rank, inputs), "B": (outputs, rank)}
    return {
        f"base_model.model.{layer}.lora_{x}.weight": torch.randn(size, dtype=torch.bfloat16)
        for x, size in sizes.items()
    }


def test_an_adapter_is_added_to_its_layers_in_float32_and_rounded_once():
    base = {"q.weight": torch.randn(4, 6), "q.bias": torch.randn(4), "k.weight": torch.randn(2, 6)}
    base = {name: tensor.bfloat16() for name, tensor in base.items()}
    before = {name: tensor.clone() for name, tensor in base.items()}
    tensors = adapter("q", 6, 4)
    a, b = (tensors[f"base_model.model.q.lora_{x}.weight"].double() for x in "AB")
    for dtype in (torch.float32, torch.bfloat16):
        merged = dict(merge(base.items(), tensors, 1.5, dtype, torch.device("cpu")))
        want = base["q.weight"].double() + 1.5 * b @ a
        assert merged["q.weight"].dtype == dtype
        assert torch.allclose(
            merged["q.weight"].double(), want, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-5
        )
        assert (
            merged["q.bias"] is base["q.bias"]
            and merged["k.weight"] is base["k.weight"]
            and list(merged) == list(base)
        )
    assert all(torch.equal(base[name], before[name]) for name in base)


@pytest.mark.parametrize(
    ("tensors", "error"),
    [
        (adapter("q", 6, 5), r"q\.weight is \[4, 6\], but .*q\.lora_B\.weight': \[5, 2\]"),
        (adapter("q", 7, 4), r"q\.weight is \[4, 6\], but .*q\.lora_A\.weight': \[2, 7\]"),
        # it would have been broadcast
        (adapter("q", 6, 1), r"q\.weight is \[4, 6\], but .*q\.lora_B\.weight': \[1, 2\]"),
        (
            adapter("q", 6, 4) | adapter("x.1.q", 6, 4),
            r"no layer for base_model\.model\.x\.1\.q\.lora_A\.weight, .* \(2 in all\)",
        ),
        (dict(list(adapter("q", 6, 4).items())[:1]), r"has base_model\.model\.q\.lora_A\.weight or .* alone"),
        (
            {"base_model.model.q.lora_magnitude_vector": torch.ones(4)},
            r"no layer for base_model\.model\.q\.lora_magnitude_vector",
        ),
    ],
)
def test_a_tensor_of_an_adapter_that_does_not_fit_is_named(tensors, error):
    with pytest.raises(ValueError, match=error):
        dict(
            merge(
                [("q.weight", torch.zeros(4, 6)), ("q.bias", torch.zeros(4))],
                tensors,
                1.0,
                torch.float32,
                torch.device("cpu"),
            )
        )


# ------------------------------------------------------------------------------------------------------- NCCL


def test_every_engine_is_told_its_place_in_the_broadcast():
    calls: list[tuple[str, list[tuple[Any, ...]]]] = []
    publisher = NcclPublisher(lambda *call: calls.append(call), 3, 2, rank=0, address="10.0.0.1", port=99)
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

    def __init__(self, info: _InitInfo, client: NcclPublisher, source: Any) -> None:
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
        assert [(m.name, m.shape) for m in meta] == [
            (name, tuple(tensor.shape)) for name, tensor in sent.items()
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


def test_each_version_is_broadcast_whole_the_first_one_too(vllm):
    calls: list[str] = []
    publisher = NcclPublisher(
        lambda method, arguments: calls.append(f"{method} {len(arguments)}"),
        2,
        4,
        rank=0,
        address="host",
        port=5,
    )
    for version in (1, 2):
        assert publisher.publish(version, _Weights(float(version))) == {"shards": [], "bytes": 6 * 4 + 4 * 2}
    (trainer,) = vllm.made
    assert trainer.info == _InitInfo(0, "host", 5, world_size=9)
    assert [{name: float(tensor.mean()) for name, tensor in sent.items()} for sent in trainer.broadcast] == [
        {"a": 1, "b": 1},
        {"a": 2, "b": 2},
    ]
    assert calls == ["init_transfer 2", *["begin_update 2", "receive 2", "finish_update 2"] * 2]


def test_what_the_policy_publishes_can_be_broadcast(vllm, tmp_path):
    from tiny import make_model

    from gvpo_ray.config.learner import LearnerConfig
    from gvpo_ray.config.model import ModelConfig
    from gvpo_ray.learner.policy import Policy

    path = make_model(tmp_path)
    policy = Policy(ModelConfig(path=str(path)), LearnerConfig(backend="ddp"), path)
    NcclPublisher(lambda *call: None, 1, 1, rank=0, address="host", port=5).publish(1, policy.named_tensors())
    assert vllm.made[0].broadcast[0].keys() == dict(policy.named_tensors()).keys()


def test_other_learner_ranks_gather_and_ask_nothing_of_the_engines(vllm):
    calls: list[Any] = []
    publisher = NcclPublisher(lambda *call: calls.append(call), 2, 1, rank=1, address="host", port=5)
    assert publisher.publish(1, _Weights(1.0)) is None
    assert calls == [] and len(vllm.made[0].broadcast[0]) == 2


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
