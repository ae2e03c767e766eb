"""The weight wire: shards that hold what was sent, shared memory that is gone afterwards, and who is asked
what over NCCL.
"""

import copy
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load as from_bytes
from safetensors.torch import load_file

from gvpo_ray.weights import deltas, node_copy
from gvpo_ray.weights.node_copy import NodeCopy
from gvpo_ray.weights.transfer import NcclPublisher, ObjectPublisher, merge, shards

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
    assert answer is not None and put[0].dtype == np.uint8
    assert (answer["shards"], answer["deltas"]) == ([1], [])
    assert answer["size"] == answer["bytes"] == put[0].nbytes and "changed" not in answer
    assert from_bytes(put[0].tobytes())["layer.1"].tolist() == [100, 101, 102]
    assert ObjectPublisher(put.append, torch.bfloat16, is_sender=False).publish(1, gather()) is None
    assert gathered == ["layer.0", "layer.1"] * 2 and len(put) == 1


# ---------------------------------------------------------------------------------------------------- chains

NUM = 3 * deltas.BLOCK + 7
"""Elements of the larger tensor of a version: more than two blocks, and no whole number of eight bytes."""


class Learner:
    """A publisher, and a model in bfloat16 that is one shard of two tensors."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.publisher = ObjectPublisher(copy.deepcopy, dtype, is_sender=True)
        generator = torch.Generator().manual_seed(0)
        self.tensors = {
            "a": torch.randn(3, 5, generator=generator),
            "b": torch.randn(NUM, generator=generator),
        }
        self.version = -1

    def publish(self, **changes: int) -> dict[str, Any]:
        """Publish after changing the sign of so many elements of a tensor."""
        for name, number in changes.items():
            places = torch.randperm(self.tensors[name].numel())[:number]
            self.tensors[name].view(-1)[places] *= -1
        self.version += 1
        published = self.publisher.publish(self.version, self.tensors.items())
        assert published is not None
        return published

    def is_in(self, found: dict[str, torch.Tensor]) -> bool:
        return {*found} == {*self.tensors} and all(
            torch.equal(found[name].view(torch.int16), tensor.bfloat16().view(torch.int16))
            for name, tensor in self.tensors.items()
        )


def test_a_chain_is_a_whole_and_what_each_version_changes() -> None:
    learner = Learner()
    whole = learner.publish()
    first, second = learner.publish(b=10), learner.publish(a=1, b=20)
    assert learner.is_in(tiny.sent_weights(second))
    assert whole["chain"] == first["chain"] == second["chain"]
    assert [len(published["deltas"]) for published in (whole, first, second)] == [0, 1, 2]
    num_words = whole["size"] // 2  # the header's included, which never change
    blocks = 4 * -(-num_words // deltas.BLOCK)
    assert (first["bytes"], second["bytes"]) == (4 * 10 + blocks, 4 * 21 + blocks)
    assert first["changed"] == 10 / (15 + NUM)
    assert learner.publish()["bytes"] == blocks  # nothing has changed
    # a chain stays what it was when newer versions have come
    assert len(first["deltas"]) == 1


def test_a_new_chain_begins_where_its_deltas_would_be_half_of_the_whole() -> None:
    learner = Learner()
    size = learner.publish()["size"]
    overhead = 4 * -(-size // 2 // deltas.BLOCK)
    most = (size // 2 - overhead) // 4  # words that change for a delta of half of the whole
    assert learner.publish(b=most)["deltas"]
    again = learner.publish(b=1)  # beyond it
    assert again["deltas"] == [] and again["bytes"] == size and again["changed"] == 1 / (15 + NUM)
    assert learner.is_in(tiny.sent_weights(again))
    assert learner.publish(b=most + 1)["deltas"] == [] and learner.publish(b=1)["deltas"]


def test_float32_weights_that_all_change_are_published_whole() -> None:
    learner = Learner(torch.float32)
    chain = learner.publish()["chain"]
    for tensor in learner.tensors.values():
        tensor.mul_(1.001)
    published = learner.publish()
    assert published["deltas"] == [] and published["chain"] != chain and published["changed"] > 0.5
    assert all(torch.equal(tiny.sent_weights(published)[name], learner.tensors[name]) for name in ("a", "b"))


def test_a_tensor_of_an_odd_number_of_bytes_changes_by_bytes() -> None:
    publisher = ObjectPublisher(copy.deepcopy, torch.bfloat16, is_sender=True)
    weights = {
        "rng": torch.arange(255, dtype=torch.uint8),
        "w": torch.arange(200.0),
        "n": torch.tensor([2**40]),
    }
    publisher.publish(0, weights.items())
    weights["rng"][7], weights["w"][3], weights["n"][0] = 9, 0.5, 2**41
    published = publisher.publish(1, weights.items())
    assert published is not None and len(published["deltas"]) == 1
    got = tiny.sent_weights(published)
    assert all(torch.equal(got[name].double(), weights[name].double()) for name in weights)


def test_weights_of_another_model_are_refused() -> None:
    for name, tensor in (("b", torch.zeros(NUM + 1)), ("c", torch.zeros(2))):
        learner = Learner()
        learner.publish()
        learner.tensors[name] = tensor
        with pytest.raises(ValueError, match=f"the tensor {name} .* was not one of the version before"):
            learner.publish()
    learner = Learner()
    learner.publish()
    del learner.tensors["a"]
    with pytest.raises(ValueError, match="the tensor a of the version before is missing"):
        learner.publish()


# ------------------------------------------------------------------------------------------ a node's one copy


class Node:
    """The folder of a node's shared memory, and what its engines have fetched."""

    def __init__(self) -> None:
        self.fetched: list[int] = []
        """Number of shards or deltas of each fetch."""

    def fetch(self, parts: Sequence[Any]) -> list[Any]:
        self.fetched.append(len(parts))
        return [*parts]

    def read(self, engine: NodeCopy, published: dict[str, Any]) -> dict[str, torch.Tensor]:
        paths, reading = engine.take(published, self.fetch)
        with reading:
            return {name: tensor for path in paths for name, tensor in load_file(path).items()}


@pytest.fixture
def shm(tmp_path, monkeypatch) -> Path:
    for name in ("shm", "tmp"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(node_copy, "SHM", tmp_path / "shm")
    monkeypatch.setattr(node_copy.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "shm"


def test_engines_of_a_node_hold_the_same_bits_however_they_got_them(shm: Path) -> None:
    learner, node, steady, late, lossy = Learner(), Node(), NodeCopy(), NodeCopy(), NodeCopy()
    assert learner.is_in(node.read(steady, learner.publish()))
    assert node.fetched.pop() == 1
    for step in range(4):
        published = learner.publish(a=1, b=100)
        assert learner.is_in(node.read(steady, published)) and node.fetched.pop() == 1
        if step == 2:
            # the second engine of the node joins: what is there already is not fetched again
            assert learner.is_in(node.read(late, published)) and not node.fetched
    for _ in range(3):
        published = learner.publish(b=100)
    # three versions at once: two of them were lost
    assert learner.is_in(node.read(steady, published)) and node.fetched == [3]
    elsewhere, first = Node(), NodeCopy()
    for folder in shm.iterdir():
        folder.rename(shm / "other node")
    assert learner.is_in(elsewhere.read(first, published)) and elsewhere.fetched == [1, 7]
    assert learner.is_in(elsewhere.read(lossy, published)) and elsewhere.fetched == [1, 7]


def test_an_engine_that_is_behind_its_node_still_gets_the_version_that_it_asked_for(shm: Path) -> None:
    learner, node, fast, slow = Learner(), Node(), NodeCopy(), NodeCopy()
    learner.publish()
    older = learner.publish(b=5)
    of_older = {name: tensor.clone() for name, tensor in learner.tensors.items()}
    newer = learner.publish(b=5)
    assert learner.is_in(node.read(fast, newer))
    got = node.read(slow, older)
    assert all(torch.equal(got[name], of_older[name].bfloat16()) for name in of_older)
    assert learner.is_in(node.read(fast, newer))


def test_a_restarted_learner_begins_a_chain_of_its_own_and_the_old_copy_goes(shm: Path) -> None:
    learner, node, engines = Learner(), Node(), [NodeCopy(), NodeCopy()]
    learner.publish()
    published = learner.publish(b=5)
    for engine in engines:
        assert learner.is_in(node.read(engine, published))
    restarted = Learner()  # from a checkpoint: an older version, and no copy to compare with
    again = restarted.publish()
    assert again["deltas"] == [] and again["chain"] != published["chain"]
    assert restarted.is_in(node.read(engines[0], again))
    assert len([*shm.iterdir()]) == 2  # the other engine has not moved yet
    assert restarted.is_in(node.read(engines[1], again))
    (folder,) = shm.iterdir()
    # a buffer that was restarted tells of the same chain again
    node.fetched.clear()
    assert restarted.is_in(node.read(engines[0], again)) and node.fetched == []
    engines[0].close()
    assert [*shm.iterdir()] == [folder]
    engines[1].close()
    assert [*shm.iterdir()] == []


def test_an_engine_that_was_killed_as_it_wrote_costs_the_next_one_the_whole(shm: Path, monkeypatch) -> None:
    learner, node = Learner(), Node()
    node.read(NodeCopy(), learner.publish())
    killed, other = NodeCopy(), NodeCopy()
    published = learner.publish(b=50)

    def dies(data: Any, delta: Any) -> None:
        data[1000:] = 0
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(node_copy, "apply_delta", dies)
        node.read(killed, published)
    node.fetched.clear()
    assert learner.is_in(node.read(other, published)) and node.fetched == [1, 1]
    (state,) = shm.glob("*/state.json")
    state.write_text("")  # it was killed a moment later
    assert learner.is_in(node.read(other, published)) and node.fetched == [1, 1] * 2


def test_the_copy_is_not_changed_while_an_engine_reads_it(shm: Path) -> None:
    learner, node, reader, writer = Learner(), Node(), NodeCopy(), NodeCopy()
    paths, reading = reader.take(learner.publish(), node.fetch)
    before = [Path(path).read_bytes() for path in paths]
    published = learner.publish(b=50)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(node.read, writer, published)
        assert not wait([done], timeout=0.2).done
        assert [Path(path).read_bytes() for path in paths] == before
        reading.close()
        assert learner.is_in(done.result(timeout=60))


def test_what_killed_engines_left_in_shared_memory_is_removed_and_what_others_use_stays(shm: Path) -> None:
    node, one, two = Node(), Learner(), Learner()
    killed, used = NodeCopy(), NodeCopy()
    node.read(killed, one.publish())
    node.read(used, two.publish())
    foreign = shm / "gvpo_weights_of somebody else"
    foreign.mkdir()
    assert killed._life is not None
    killed._life.close()  # as the end of its process does
    NodeCopy()
    assert {path.name for path in shm.iterdir()} == {foreign.name, used._folder.name}
    used.close()
    assert [*shm.iterdir()] == [foreign]


@pytest.mark.parametrize("how", ["little room", "no room", "not there", "not writable"])
def test_without_room_in_shared_memory_the_copy_is_in_the_temporary_folder(
    how: str, shm: Path, monkeypatch
) -> None:
    learner, node, engine = Learner(), Node(), NodeCopy()
    published, temporary = learner.publish(), shm.parent / "tmp"
    free = {"little room": 2 * published["size"], "no room": 2 * published["size"] + 1}.get(how, 1 << 40)
    monkeypatch.setattr(node_copy, "room_in", lambda path: free)
    if how == "not there":
        shm.rmdir()
    monkeypatch.setattr(node_copy.os, "access", lambda path, mode: path.exists() and how != "not writable")
    real = os.posix_fallocate

    def fallocate(descriptor: int, begin: int, size: int) -> None:
        if how == "no room" and os.readlink(f"/proc/self/fd/{descriptor}").startswith(str(shm)):
            raise OSError(28, "No space left on device")
        real(descriptor, begin, size)

    monkeypatch.setattr(node_copy.os, "posix_fallocate", fallocate)
    for _ in range(2):
        assert learner.is_in(node.read(engine, published))
        assert len([*temporary.iterdir()]) == 1 and (how == "not there" or not [*shm.iterdir()])
        published = learner.publish(b=3)
    engine.close()
    assert [*temporary.iterdir()] == []


def test_an_engine_without_room_anywhere_says_so_and_leaves_nothing(shm: Path, monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node_copy.os, "posix_fallocate", full)
    engine = NodeCopy()
    with pytest.raises(OSError, match="No space"):
        engine.take(Learner().publish(), list)
    engine.close()
    assert [*shm.iterdir()] == [*(shm.parent / "tmp").iterdir()] == []


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
