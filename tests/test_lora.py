"""Adapters in a real vLLM engine on the CPU, against peft's own models: what is merged, what a swap leaves,
and what is refused.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gvpo_ray import groups
from gvpo_ray.config.engines import PoolConfig, SamplingConfig
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import LoraConfig, ModelConfig
from gvpo_ray.engines.vllm_engine import Engine
from gvpo_ray.learner.policy import Policy
from gvpo_ray.weights.transfer import ObjectPublisher, WeightMismatch

PROBE = [[2 + (7 * i + 5 * j) % (tiny.VOCAB_SIZE - 2) for i in range(24)] for j in range(2)]
RANK, ALPHA = 4, 6.0


class Adapted:
    """A peft model with a random adapter: its log-probs, and the adapter as the learner publishes one."""

    def __init__(self, folder: Path, seed: int, target_modules: str | list[str] = "all-linear") -> None:
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=target_modules, task_type="CAUSAL_LM"
        )
        self.model = peft.get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), config
        ).eval()
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        self.tensors: dict[str, torch.Tensor] = dict(peft.get_peft_model_state_dict(self.model))

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> list[float]:
        logits = self.model(torch.tensor([ids])).logits[0, :-1]
        return logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()

    def probe(self) -> dict[str, Any]:
        return {"ids": PROBE, "logprobs": [self.logprobs(ids) for ids in PROBE]}

    def published(self, version: int = 1) -> dict[str, Any]:
        weights = ObjectPublisher(lambda array: array, torch.float32, is_sender=True).publish(
            version, self.tensors.items()
        )
        assert weights is not None
        return {**weights, "adapter": self.model.peft_config["default"].to_dict()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that vLLM runs on a CPU (heads of 32), its embeddings tied, and that never ends by itself."""
    folder = tiny.make_model(tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    model = tiny.vllm_model(tie_word_embeddings=True, eos_token_id=None)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # of q, k and v: none may be lost
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


class Running:
    """An engine on an event loop of its own, which runs while it is asked something."""

    def __init__(self, folder: Path) -> None:
        model = ModelConfig(path=str(folder), lora=LoraConfig(rank=RANK, alpha=ALPHA))
        pool = PoolConfig(kv_cache_gib=1, num_threads=1)
        self.engine = Engine(model, pool, "objects", seed=0)
        self.runner = asyncio.Runner()
        self.runner.run(self.engine.start())
        self._version = 0

    def update(self, adapted: Adapted, probe: dict[str, Any] | None = None) -> dict[str, float]:
        self._version += 1
        return self.runner.run(self.engine.update(self._version, adapted.published(), probe))

    def check(self, probe: dict[str, Any]) -> dict[str, float]:
        return self.runner.run(self.engine._check(probe))


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    before = dict(os.environ)  # the engine's settings are for a process of its own
    running = Running(folder)
    os.environ.clear()
    os.environ.update(before)
    yield running
    running.runner.run(running.engine.close())
    running.runner.close()


def test_an_engine_with_an_adapter_is_the_learners_model_and_not_the_base(
    running: Running, folder: Path
) -> None:
    assert running.engine.version == -1  # the base model is loaded, but it is no version of the policy
    adapted = Adapted(folder, 1)
    parity = running.update(adapted, adapted.probe())
    assert running.engine.version == running._version and parity["parity_mean"] < 1e-4
    with adapted.model.disable_adapter():
        base = adapted.probe()
    with pytest.raises(WeightMismatch, match="engine and learner differ"):
        running.check(base)


def test_an_adapter_replaces_the_one_before_also_in_layers_that_it_leaves_as_they_are(
    running: Running, folder: Path
) -> None:
    running.update(Adapted(folder, 2))
    # one of the three that vLLM keeps in one matrix, and one that stands alone
    part = Adapted(folder, 3, ["q_proj", "down_proj"])
    assert running.update(part, part.probe())["parity_mean"] < 1e-4
    nothing = Adapted(folder, 4)
    for name, tensor in nothing.tensors.items():
        if "lora_B" in name:
            tensor.zero_()
    with nothing.model.disable_adapter():
        base = nothing.probe()
    assert running.update(nothing, base)["parity_mean"] < 1e-4


def test_what_a_policy_publishes_is_what_the_engine_runs(running: Running, folder: Path) -> None:
    policy = Policy(
        ModelConfig(path=str(folder), lora=LoraConfig(rank=RANK, alpha=ALPHA)),
        LearnerConfig(backend="ddp"),
        folder,
    )
    torch.manual_seed(5)
    for name, parameter in policy._module.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter.data, std=0.1)
    weights = ObjectPublisher(lambda array: array, torch.float32, is_sender=True).publish(
        1, policy.named_tensors()
    )
    assert weights is not None and weights["bytes"] < (folder / "model.safetensors").stat().st_size / 2
    adapted = Adapted(folder, 0)
    peft.set_peft_model_state_dict(adapted.model, dict(policy.named_tensors()))
    running._version += 1
    published = {**weights, "adapter": policy.adapter}
    parity = running.runner.run(running.engine.update(running._version, published, adapted.probe()))
    assert parity["parity_mean"] < 1e-4


def test_completions_in_flight_go_on_with_the_new_adapter(running: Running, folder: Path) -> None:
    old, new = Adapted(folder, 6), Adapted(folder, 7)
    running.update(old)
    engine, sampling = running.engine, SamplingConfig(num_completions=4, max_tokens=900)
    prompt = groups.table(
        [{"group_id": 0, "prompt": "p", "answer": "7", "dataset": "d", "prompt_ids": PROBE[0]}]
    )

    async def swap_while_it_samples() -> Any:
        # The prompt's keys and values of the old adapter are in the prefix cache, from here on.
        await engine.generate(prompt, SamplingConfig(num_completions=2, max_tokens=2))
        before = (await engine.status())["num_tokens"]
        completions = asyncio.create_task(engine.generate(prompt, sampling))
        while (await engine.status())["num_tokens"] < before + 100:
            await asyncio.sleep(0.01)
        assert not completions.done()
        await engine.update(running._version + 1, new.published(), None)
        assert not completions.done()
        return await completions, await engine.generate(
            prompt, SamplingConfig(num_completions=2, max_tokens=2)
        )

    over, after = (next(iter(groups.rows(table))) for table, _ in running.runner.run(swap_while_it_samples()))
    running._version += 1
    start = len(PROBE[0]) - 1
    for ids, sampled in zip(over["completion_ids"], over["sampling_logprobs"], strict=True):
        by_old, by_new = (
            np.abs(np.array(adapted.logprobs(PROBE[0] + ids)[start:]) - sampled) < 1e-3
            for adapted in (old, new)
        )
        # Beyond the swap, the whole sequence is seen as the new adapter sees it: also what was sampled before
        # it.
        swapped = int(np.argmin(by_old))
        assert 0 < swapped < len(ids) and by_new[swapped:].all() and not by_new[:swapped].all()
    assert over["version_min"] == [running._version - 1] * 4 and over["version_max"] == [running._version] * 4
    for ids, sampled in zip(after["completion_ids"], after["sampling_logprobs"], strict=True):
        assert new.logprobs(PROBE[0] + ids)[start:] == pytest.approx(sampled, abs=1e-3)
    assert after["version_min"] == [running._version] * 2


def test_an_adapter_that_does_not_fit_is_an_error_that_names_the_tensor(
    running: Running, folder: Path
) -> None:
    """Last: the run would end here, and vLLM's weights are in pieces."""
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    wrong = Adapted(folder, 8)
    wrong.tensors[name] = wrong.tensors[name][:-1]
    with pytest.raises(
        Exception, match=r"layers\.1\.mlp\.up_proj\.weight is \[96, 64\].*lora_B\.weight': \[95, 4\]"
    ):
        running.update(wrong)
