"""The policy: log-probs against plain transformers, checkpoints that load and resume bitwise on every
back-end, and none by halves.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from tiny import EOS, make_checkpoint, make_group, make_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.learner import packing
from gvpo_ray.learner import parts as parts_module
from gvpo_ray.learner.adapter import trained_parameters
from gvpo_ray.learner.backends.base import all_threads
from gvpo_ray.learner.checkpoints import latest_checkpoint, prune_checkpoints
from gvpo_ray.learner.logprobs import padded_inputs, sequence_sums
from gvpo_ray.learner.policy import Policy, recomputes_activations

BACKENDS = [("ddp", 0), ("fsdp", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]


def load(path, dtype="float32", base: Path | None = None, **learner: Any) -> Policy:
    """base: of an adapter."""
    model = ModelConfig(path=str(base or path), dtype=dtype, lora={"rank": 4} if base else None)
    return Policy(model, LearnerConfig(**{"backend": "ddp", "learning_rate": 1e-3, **learner}), path)


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.named_tensors()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def update(policy: Policy, step: int) -> float:
    """One update on groups that the step fixes, dealt to the ranks, in several micro-batches."""
    mine = [make_group(10 * step + i) for i in range(4)][policy.data_rank :: policy.data_size]
    for i, row in enumerate(mine):
        is_last = i == len(mine) - 1
        policy.backward(
            (policy.logprobs([row], is_last) * torch.tensor([1.0, -0.5, 0.25])).sum() / 4, is_last
        )
    norm = policy.update(1e-3)
    policy.step += 1
    return norm


# -------------------------------------------------------------------------------------------------- log-probs


@torch.no_grad()
def plain_token_logprobs(model, row) -> list[torch.Tensor]:
    """One completion at a time, without padding: softmax over every position, then pick."""
    result = []
    for ids in row["completion_ids"]:
        tokens = torch.tensor([row["prompt_ids"] + ids])
        everywhere = (
            torch.log_softmax(model(tokens).logits[0, :-1], dim=-1).gather(1, tokens[0, 1:, None]).squeeze(1)
        )
        result.append(everywhere[len(row["prompt_ids"]) - 1 :])
    return result


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_logprobs_are_those_of_a_plain_forward_of_each_sequence(tmp_path, kind, tie):
    path = make_model(tmp_path, kind, tie)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = [make_group(i, rewards=(0.0,) * m) for i, m in enumerate([3, 2, 5])]
    want = [tokens for row in rows for tokens in plain_token_logprobs(model, row)]
    policy = load(path)
    got = policy.token_logprobs(rows)
    assert [len(tokens) for tokens in got] == [len(tokens) for tokens in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    sums = policy.logprobs(rows)
    assert sums.dtype == torch.float64 and sums.requires_grad
    torch.testing.assert_close(
        sums.detach(), torch.stack([tokens.double().sum() for tokens in want]), rtol=0, atol=1e-5 * 8
    )
    assert sums.min() < -20, "a model this close to uniform proves nothing"


def test_the_end_of_sequence_token_is_counted_and_the_prompt_is_not(tmp_path):
    policy = load(make_model(tmp_path))
    row = make_group(3, rewards=(0.0, 0.0))
    assert all(ids[-1] == EOS for ids in row["completion_ids"])
    without = {**row, "completion_ids": [ids[:-1] for ids in row["completion_ids"]]}
    tokens = policy.token_logprobs([row])
    assert [len(t) for t in tokens] == [len(ids) for ids in row["completion_ids"]]
    torch.testing.assert_close(
        policy.logprobs([row]) - policy.logprobs([without]),
        torch.stack([t[-1] for t in tokens]).double(),
        rtol=0,
        atol=1e-5,
    )


def test_the_passes_with_and_without_gradients_agree_bitwise(tmp_path):
    policy = load(make_model(tmp_path))
    rows = [make_group(i) for i in range(3)]
    tokens = policy.token_logprobs(rows)
    assert torch.equal(
        sequence_sums(torch.cat(tokens), [len(t) for t in tokens]), policy.logprobs(rows).detach()
    )


def test_padding_is_laid_out_as_said():
    # prompt (5 6), completions (7 1) and (8); logits at position t predict the token at t + 1
    inputs, lengths = padded_inputs([{"prompt_ids": [5, 6], "completion_ids": [[7, 1], [8]]}], "cpu")
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 1], [5, 6, 8, 0]] and lengths == [2, 1]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert (inputs["rows"].tolist(), inputs["positions"].tolist(), inputs["targets"].tolist()) == (
        [0, 0, 1],
        [1, 2, 1],
        [7, 1, 8],
    )


def test_sequence_sums_are_in_float64():
    # 2^24 + 1 does not fit into float32
    got = sequence_sums(torch.tensor([2.0**24, 1.0, 1.0, -0.5]), [3, 1])
    assert got.dtype == torch.float64 and got.tolist() == [2.0**24 + 2, -0.5]
    assert sequence_sums(torch.tensor([2.0**24, 1.0]), [2]).tolist() == [2.0**24 + 1]


def test_gradient_checkpointing_changes_neither_values_nor_gradients(tmp_path):
    path = make_model(tmp_path)
    plain, recomputed = load(path), load(path, gradient_checkpointing=True)
    rows = [make_group(i) for i in range(2)]
    assert torch.equal(plain.logprobs(rows), recomputed.logprobs(rows))
    passes = [0, 0]
    for i, policy in enumerate((plain, recomputed)):

        def count(*_: Any, i: int = i) -> None:
            passes[i] += 1

        attention = policy._module.model.model.layers[0].self_attn
        attention.register_forward_pre_hook(count)
        assert not attention.training  # no dropout, whatever the model's config says
    assert update(plain, 1) == pytest.approx(update(recomputed, 1), rel=1e-6)
    assert passes == [4, 8]  # four micro-batches


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("kind, tie", [("qwen2", True), ("qwen2", False), ("llama", True)])
def test_a_checkpoint_loads_with_transformers(tmp_path, kind, tie):
    policy = load(make_model(tmp_path / "model", kind, tie))
    update(policy, 1)
    policy.save(tmp_path / "step-1")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "step-1", dtype=torch.float32)
    assert same(dict(model.named_parameters(remove_duplicate=False)), weights(policy))
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tie
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "step-1")
    assert tokenizer.eos_token_id == EOS and tokenizer.decode(tokenizer("a=7")["input_ids"]) == "a=7"


def test_named_tensors_are_every_name_and_can_be_gone_through_again(tmp_path):
    policy = load(make_model(tmp_path, tie=True))
    named = policy.named_tensors()
    once, again = dict(named), dict(named)
    assert (
        once.keys()
        == again.keys()
        == {name for name, _ in policy._module.model.named_parameters(remove_duplicate=False)}
    )
    assert once["lm_head.weight"].data_ptr() == once["model.embed_tokens.weight"].data_ptr()


def test_a_fresh_model_starts_at_step_zero_and_a_checkpoint_where_it_was(tmp_path):
    policy = load(make_model(tmp_path / "model"))
    assert (policy.step, policy.num_updates) == (0, 0)
    for step in (1, 2):
        update(policy, step)
    policy.save(tmp_path / "step-2")
    again = load(tmp_path / "step-2")
    assert (again.step, again.num_updates) == (2, 2) and not again.reference.exists


def test_random_state_is_resumed(tmp_path):
    policy = load(make_model(tmp_path / "model"))
    policy.save(tmp_path / "step-0")
    want = torch.rand(3)
    torch.manual_seed(99)
    load(tmp_path / "step-0")
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("broken", ["save_pretrained", "tokenizer", "part", "state", "fsync", "rename"])
def test_a_save_that_dies_is_never_taken_for_a_checkpoint(tmp_path, monkeypatch, broken):
    class Dies(Exception):
        pass

    def die(*args, **options):
        raise Dies

    def die_later(function, after):
        def call(*args, **options):
            nonlocal after
            after -= 1
            return function(*args, **options) if after >= 0 else die()

        return call

    def half(tensors, path, **options):
        path.write_bytes(b"12345678{")
        die()

    policy = load(make_model(tmp_path / "model"))
    checkpoints = tmp_path / "checkpoints"
    policy.save(checkpoints / "step-1")
    update(policy, 1)
    after = {name: tensor.clone() for name, tensor in weights(policy).items()}
    with monkeypatch.context() as patch:
        match broken:
            case "save_pretrained":
                patch.setattr(policy._module.model, "save_pretrained", die)
            case "tokenizer":
                patch.setattr(policy._tokenizer, "save_pretrained", die)
            case "part":
                patch.setattr(parts_module, "save_file", half)
            case "state":
                patch.setattr(json, "dumps", die_later(json.dumps, 0))
            case "fsync":
                patch.setattr(os, "fsync", die_later(os.fsync, 2))
            case "rename":
                patch.setattr(Path, "rename", die)
        if broken == "state":  # save_pretrained writes JSON too
            patch.setattr(Path, "write_text", die)
            patch.setattr(json, "dumps", json.dumps)
        with pytest.raises(Dies):
            policy.save(checkpoints / "step-2")
    assert latest_checkpoint(tmp_path) == (1, checkpoints / "step-1")
    policy.save(checkpoints / "step-2")  # what was left does not stand in the way
    assert latest_checkpoint(tmp_path) == (2, checkpoints / "step-2")
    assert same(weights(load(checkpoints / "step-2")), after)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-1", "step-2"]


def test_a_resumed_run_saves_when_the_checkpoint_that_it_came_from_is_gone(tmp_path):
    load(make_model(tmp_path / "model")).save(tmp_path / "checkpoints" / "step-1")
    policy = load(tmp_path / "checkpoints" / "step-1")
    for step in (2, 3):
        policy.save(tmp_path / "checkpoints" / f"step-{step}")
        prune_checkpoints(tmp_path, keep=1)
    assert (tmp_path / "checkpoints" / "step-3" / "tokenizer.json").is_file()


def test_a_removal_that_dies_leaves_no_checkpoint(tmp_path, monkeypatch):
    policy = load(make_model(tmp_path / "model"))
    for step in (1, 2):
        policy.save(tmp_path / "checkpoints" / f"step-{step}")

    def die_halfway(folder, **options):
        (Path(folder) / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", die_halfway)
        with pytest.raises(KeyboardInterrupt):
            prune_checkpoints(tmp_path, keep=1)
    shutil.rmtree(tmp_path / "checkpoints" / "step-2")  # so that the half-removed one would be the newest
    assert latest_checkpoint(tmp_path) is None
    policy.save(tmp_path / "checkpoints" / "step-3")
    prune_checkpoints(tmp_path, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_prune_keeps_the_newest_by_number(tmp_path):
    for name in ("step-2", "step-9", "step-10", "step-100", ".step-101.part"):
        make_checkpoint(tmp_path / "checkpoints" / name)
    assert latest_checkpoint(tmp_path) == (100, tmp_path / "checkpoints" / "step-100")
    prune_checkpoints(tmp_path, keep=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-10", "step-100"]


def test_a_run_without_checkpoints_has_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    prune_checkpoints(tmp_path, keep=1)


def test_the_reference_survives_a_resume(tmp_path):
    rows = [make_group(1)]
    policy = load(make_model(tmp_path / "model"))
    policy.reference.refresh(policy.step)
    update(policy, 1)
    was, now = policy.token_logprobs(rows, reference=True), policy.token_logprobs(rows)
    assert not torch.equal(was[0], now[0])
    policy.save(tmp_path / "step-1")
    again = load(tmp_path / "step-1")
    assert all(map(torch.equal, again.token_logprobs(rows, reference=True), was))
    again.reference.refresh(again.step)
    assert all(map(torch.equal, again.token_logprobs(rows, reference=True), now))


# ------------------------------------------------------------------------------------------------------ ranks


def resume(
    folder: Path, backend: str, zero_stage: int, dtype: str = "float32", tie: bool = True
) -> dict[str, Any]:
    """Two updates, save, two more; and from the checkpoint the same two."""
    path = shared_model(folder / "model", tie)
    options = {"backend": backend, "zero_stage": zero_stage, "dtype": dtype}
    policy = load(path, **options)
    start = weights(policy)
    norms = [update(policy, step) for step in (1, 2)]
    policy.save(folder / "step-2")
    saved, state = weights(policy), training_state(policy)
    norms += [update(policy, step) for step in (3, 4)]
    again = load(folder / "step-2", **options)
    model = AutoModelForCausalLM.from_pretrained(folder / "step-2", dtype="auto")
    in_dtype = {name: tensor.to(getattr(torch, dtype)) for name, tensor in saved.items()}
    return {
        "folder": folder / "step-2",
        "files": sorted(path.name for path in (folder / "step-2" / "optimizer").iterdir()),
        "state": state,
        "on disk": same(dict(model.named_parameters(remove_duplicate=False)), in_dtype),
        "loaded": same(weights(again), saved),
        "norms": norms,
        "norms again": [update(again, step) for step in (3, 4)],
        "bitwise": same(weights(again), weights(policy)),
        "moved": not same(start, saved) and not same(saved, weights(policy)),
        "counts": (again.step, again.num_updates),
        "weights": weights(policy),
    }


def training_state(policy: Policy) -> dict[str, torch.Tensor]:
    """Weights and moments, whole."""
    state = {}
    for name, parameter in trained_parameters(policy._module.model):
        for key, value in policy._backend.get_state(parameter).items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            state[f"{key}.{name}"] = whole.clone()
    return state


def goes_on(folder: Path, path: Path, backend: str) -> dict[str, Any]:
    """Two more updates from a checkpoint, which another number of ranks has written."""
    policy = load(path, backend=backend)
    state = training_state(policy)
    norms = [update(policy, step) for step in (3, 4)]
    return {"state": state, "norms": norms, "weights": weights(policy)}


def rank_0_cannot_write(folder: Path) -> dict[str, Any]:
    """The model is rank 0's to write, after all parts."""
    policy = load(shared_model(folder / "model"))
    policy.save(folder / "checkpoints" / "step-1")
    if policy.rank == 0:

        def die(*arguments: Any, **options: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        policy._module.model.save_pretrained = die
    try:
        policy.save(folder / "checkpoints" / "step-2")
    except OSError as error:
        return {"error": str(error), "latest": latest_checkpoint(folder)}
    return {"error": "none was raised"}


def other_backend(folder: Path, first: tuple[str, int], then: tuple[str, int]) -> dict[str, Any]:
    """Two updates here, and two there: what whoever runs out of memory does."""
    policy = load(shared_model(folder / "model"), backend=first[0], zero_stage=first[1])
    for step in (1, 2):
        update(policy, step)
    policy.save(folder / "step-2")
    again = load(folder / "step-2", backend=then[0], zero_stage=then[1])
    for step in (3, 4):
        update(policy, step)
        update(again, step)
    a, b = weights(policy), weights(again)
    return {"difference": max(float((a[name] - b[name]).abs().max()) for name in a)}


def sequence_logprobs(policy: Policy) -> torch.Tensor:
    return torch.stack([tokens.double().sum() for tokens in policy.token_logprobs([make_group(0)])])


def resume_adapter(folder: Path, backend: str, zero_stage: int, dtype: str) -> dict[str, Any]:
    """As `resume`; and the checkpoint's own model, which is the merged one, beside the adapter on the
    base.
    """
    from peft import PeftModel

    base = shared_model(folder / "model", tie=False)
    options = {"backend": backend, "zero_stage": zero_stage, "dtype": dtype, "base": base}
    policy = load(base, **options)
    start = sequence_logprobs(policy)
    unadapted = sequence_logprobs(load(base, dtype=dtype))
    for step in (1, 2):
        update(policy, step)
    policy.save(folder / "step-2")
    saved = weights(policy)
    again = load(folder / "step-2", **options)
    loaded = same(weights(again), saved)
    probe = sequence_logprobs(policy)
    for one in (policy, again):
        update(one, 3)
    model = AutoModelForCausalLM.from_pretrained(folder / "step-2", dtype=torch.float32).eval()
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder / "step-2" / "adapter"
    ).eval()
    plain = [
        torch.stack([t.double().sum() for t in plain_token_logprobs(m, make_group(0))]) for m in (model, peft)
    ]
    return {
        "names": sorted(saved)[:2],
        "starts as the model": float((start - unadapted).abs().max()),
        "loaded": loaded,
        "bitwise": same(weights(again), weights(policy)) and not same(saved, weights(policy)),
        "merged": float((plain[0] - probe).abs().max()),
        "adapter": float((plain[1] - probe).abs().max()),
        "moved": float((start - probe).abs().max()),
    }


def refreshed_reference(folder: Path, backend: str, zero_stage: int, lora: bool) -> dict[str, Any]:
    base = shared_model(folder / "model")
    policy = load(base, backend=backend, zero_stage=zero_stage, base=base if lora else None)
    update(policy, 1)
    policy.reference.refresh(policy.step)
    rows = [make_group(policy.rank)]
    a, b = policy.token_logprobs(rows), policy.token_logprobs(rows, reference=True)
    policy.save(folder / "step-1")
    again = load(folder / "step-1", backend=backend, zero_stage=zero_stage, base=base if lora else None)
    update(again, 2)
    c = again.token_logprobs(rows, reference=True)
    return {
        "same": all(map(torch.equal, a, b)),
        "resumed": all(map(torch.equal, b, c)),
        "moved": not torch.equal(again.token_logprobs(rows)[0], c[0]),
    }


def shared_model(path: Path, tie: bool = True) -> Path:
    if dist.get_rank() == 0:
        make_model(path, tie=tie)
    dist.barrier()
    return path


CASES = {
    f"resume {backend} {stage}": functools.partial(resume, backend=backend, zero_stage=stage)
    for backend, stage in BACKENDS
}
HALF = [("fsdp", 0), ("deepspeed", 0), ("deepspeed", 2), ("deepspeed", 3)]
CASES |= {
    f"resume bfloat16 {backend} {stage}": functools.partial(
        resume, backend=backend, zero_stage=stage, dtype="bfloat16", tie=False
    )
    for backend, stage in HALF
}
SWITCHES = [
    (("ddp", 0), ("deepspeed", 2)),
    (("deepspeed", 3), ("fsdp", 0)),
    (("deepspeed", 3), ("ddp", 0)),
    (("deepspeed", 1), ("deepspeed", 0)),
]
CASES |= {
    f"{first} then {then}": functools.partial(other_backend, first=first, then=then)
    for first, then in SWITCHES
}
CASES["rank 0 cannot write"] = rank_0_cannot_write
REFERENCES = [("fsdp", 0), ("deepspeed", 2), ("deepspeed", 3)]
CASES |= {
    f"reference {backend} {stage}{', adapter' * lora}": functools.partial(
        refreshed_reference, backend=backend, zero_stage=stage, lora=lora
    )
    for backend, stage in REFERENCES
    for lora in (False, True)
}
ADAPTERS = [(backend, stage, "bfloat16") for backend, stage in BACKENDS]
ADAPTERS += [("ddp", 0, "float32"), ("fsdp", 0, "float32"), ("deepspeed", 3, "float32")]
CASES |= {
    f"adapter {backend} {stage} {dtype}": functools.partial(
        resume_adapter, backend=backend, zero_stage=stage, dtype=dtype
    )
    for backend, stage, dtype in ADAPTERS
}


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("resume")])
def test_to_resume_is_bitwise_as_not_to_have_stopped(on_ranks, case):
    for result in on_ranks(2, case):
        assert result["on disk"] and result["loaded"] and result["bitwise"] and result["moved"]
        assert result["norms"][2:] == result["norms again"] and min(result["norms"]) > 0
        assert result["counts"] == (4, 4)


def test_every_backend_makes_the_same_updates(on_ranks):
    # In float32, where they differ by the order of sums alone: Adam turns 1e-7 of a gradient into at most
    # some 1e-4 of the step, 1e-3.
    reference = on_ranks(2, "resume ddp 0")[0]
    for backend, stage in BACKENDS[1:]:
        result = on_ranks(2, f"resume {backend} {stage}")[0]
        assert result["norms"] == pytest.approx(reference["norms"], rel=1e-5)
        for name, tensor in result["weights"].items():
            torch.testing.assert_close(tensor, reference["weights"][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("first, then", SWITCHES)
def test_a_checkpoint_resumes_on_another_backend(on_ranks, first, then):
    for result in on_ranks(2, f"{first} then {then}"):
        assert result["difference"] < 1e-6


def test_a_checkpoint_resumes_on_another_number_of_ranks(on_ranks, tmp_path):
    """Of each backend that writes parts: weights and moments are those that were saved, bit for bit, and the
    updates that follow are the same but for the order of sums.
    """
    backends = ("ddp", "fsdp")
    by_two = {backend: on_ranks(2, f"resume {backend} 0")[0] for backend in backends}

    def start(number: int, of: dict[str, Any], **more: Any) -> dict[str, Any]:
        cases = {b: functools.partial(goes_on, path=of[b]["folder"], backend=b) for b in of}
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))} on {number}"
        folder.mkdir()
        return {name: found[0] for name, found in tiny.run_on_ranks(number, cases | more, folder).items()}

    alone = {f"alone {b}": functools.partial(resume, backend=b, zero_stage=0) for b in backends}
    on_one = start(1, by_two, **alone)
    by_one = {backend: on_one[f"alone {backend}"] for backend in backends}
    on_two = start(2, by_one)
    for backend in backends:
        assert by_one[backend]["files"] == ["00000.safetensors"]
        assert by_two[backend]["files"] == ["00000.safetensors", "00001.safetensors"]
        for wrote, read in ((by_two[backend], on_one[backend]), (by_one[backend], on_two[backend])):
            assert same(read["state"], wrote["state"]) and len(read["state"]) == 3 * 26
            assert read["norms"] == pytest.approx(wrote["norms"][2:], rel=1e-5)
            for name, tensor in read["weights"].items():
                torch.testing.assert_close(tensor, wrote["weights"][name], rtol=0, atol=1e-6)


def test_what_rank_0_cannot_write_is_raised_on_every_rank_and_the_checkpoint_before_stays(on_ranks):
    for result in on_ranks(2, "rank 0 cannot write"):
        assert re.match(r"no room for .*step-2 on the file system at", result["error"])
        assert result["latest"][0] == 1


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("reference")])
def test_a_refreshed_reference_is_the_policy_and_stays_when_it_moves_and_resumes(on_ranks, case):
    for result in on_ranks(2, case):
        assert result["same"] and result["resumed"] and result["moved"]


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("adapter")])
def test_an_adapter_starts_as_the_model_resumes_bitwise_and_is_saved_merged_and_by_itself(on_ranks, case):
    for result in on_ranks(2, case):
        assert result["names"][0] == "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
        assert result["loaded"] and result["bitwise"] and result["moved"] > 0.03
        # of some -100 nats; in bfloat16 the merged weights are rounded
        near = 1e-5 if "float32" in case else 0.2
        assert result["starts as the model"] < near and result["merged"] < near and result["adapter"] < near


def test_one_rank_without_a_process_group_is_as_one_rank_with_one(tmp_path):
    assert not dist.is_initialized()
    policy = load(make_model(tmp_path))
    assert (policy.rank, policy.data_rank, policy.data_size) == (0, 0, 1)
    assert policy.vocab_size == tiny.VOCAB_SIZE and policy.max_length == 128


@pytest.mark.parametrize(
    "given, on_cpu, on_gpu", [(None, False, True), (True, True, True), (False, False, False)]
)
def test_activations_are_recomputed_on_gpus_unless_the_config_says_otherwise(given, on_cpu, on_gpu):
    config = LearnerConfig(gradient_checkpointing=given)
    assert recomputes_activations(config, torch.device("cpu")) == on_cpu
    assert recomputes_activations(config, torch.device("cuda")) == on_gpu


def test_an_offloaded_optimizer_computes_on_a_ranks_share_of_all_cpus(monkeypatch):
    usual, seen = torch.get_num_threads(), []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12 * usual)))
    for num_ranks in ("1", "4", "100"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", num_ranks)
        with all_threads():
            seen.append(torch.get_num_threads())
    assert seen == [12 * usual, 3 * usual, usual] and torch.get_num_threads() == usual


def test_the_policy_says_how_it_computes_and_what_a_fallback_costs(tmp_path, monkeypatch):
    path = make_model(tmp_path)
    assert load(path, gradient_checkpointing=True).computes == (
        "groups packed, a prompt once each; attention in padded blocks; fused head, float32 log-probs; "
        "activations recomputed for the backward pass"
    )
    asked = load(path, packing=False).computes
    assert asked.startswith("completions padded; the model's own attention; fused") and "because" not in asked

    def refuse(*_: Any, **__: Any) -> None:
        raise ValueError("its attention has softcap")

    monkeypatch.setattr(packing, "pack", refuse)
    fallen = load(path).computes
    assert (
        "padded; the model's own attention, because it cannot be packed by groups (its attention has "
        "softcap): a prompt is computed again for each completion" in fallen
    )
