"""Chains of whole weights and deltas, and the one copy that the engines of a node share."""

import copy
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

from gvpo_ray.weights import deltas, node_copy
from gvpo_ray.weights.node_copy import NodeCopy
from gvpo_ray.weights.transfer import ObjectPublisher

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
