"""The families of models that people train: packed, padded or refused, each with the log-probs of its own
forward pass.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import LoraConfig, ModelConfig
from gvpo_ray.learner.families import check_trainable, digest_of
from gvpo_ray.learner.policy import Policy

SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": tiny.EOS,
    "pad_token_id": 0,
}
HEAD, WINDOW = 8, 9
"""Sizes of what not all families have: one of a head, and the tokens that a layer with a window sees."""
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
"""Sizes of mixtures of experts, by keys of which a family has some."""
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
}
TRAINED = {
    "cohere": "packed",
    "cohere2": "packed",
    "falcon_h1": "padded",  # layers of a state-space model beside attention
    "gemma": "packed",
    "gemma2": "padded",  # its attention caps scores
    "gemma3": "packed",  # the class with images, whose text model is trained
    "gemma3_text": "packed",
    "glm4": "packed",
    "gpt2": "packed",
    "granite": "packed",
    "lfm2": "padded",  # layers of convolutions
    "llama": "packed",
    "ministral3": "packed",
    "mistral": "packed",
    "mixtral": "packed",
    "nemotron": "padded",
    "olmo2": "packed",
    "olmo3": "packed",
    "olmoe": "packed",
    "phi": "packed",
    "phi3": "packed",
    "qwen2": "packed",
    "qwen2_moe": "packed",
    "qwen3": "packed",
    "qwen3_moe": "packed",
    "qwen3_5": "padded",  # the class with images, whose text model is trained
    "qwen3_5_text": "padded",  # layers with linear attention
    "smollm3": "packed",
    "stablelm": "padded",
    "starcoder2": "packed",
}
"""How the learner computes each family that it trains."""

REFUSED = {
    "deepseek_v3": "is a mixture of experts of a family that is not known here (deepseek_v3, ",
    "gpt_oss": "is a mixture of experts of a family that is not known here (gpt_oss, ",
    "qwen3_5_moe": "is a mixture of experts of a family that is not known here (qwen3_5_moe, ",
    "qwen3_next": "is a mixture of experts of a family that is not known here (qwen3_next, ",
    "qwen3_vl": "(qwen3_vl) is no causal language model",
    "t5": "is an encoder and a decoder (t5)",
    "vit": "(vit) is no causal language model",
}
"""Why a family is refused, before anything is started."""

ROWS = [
    {"prompt_ids": [5, 9, 11], "completion_ids": [list(range(10, 30)), [7, 8], [40, 3, 3]]},
    {"prompt_ids": [6, 2, 2, 31, 7], "completion_ids": [[12, 13], [9, 9, 9, 1]]},
]


def config_of(family: str) -> Any:
    """A config of the family's own, made small."""
    usual = AutoConfig.for_model(family)
    text = usual.get_text_config()
    sizes = SIZES | {
        key: size
        for key, size in (("head_dim", HEAD), ("sliding_window", WINDOW), *EXPERTS.items())
        if hasattr(text, key)
    }
    if family == "lfm2":
        sizes["layer_types"] = ["conv", "full_attention"]
    if text is usual:
        return AutoConfig.for_model(family, **sizes)
    return AutoConfig.for_model(
        family, text_config={**sizes, "model_type": text.model_type}, vision_config=VISION
    )


def folder_of(path: Path, family: str) -> Path:
    """A folder with a random model of a family."""
    tiny.make_model(path)  # for its tokenizer
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(family)).save_pretrained(path)
    return path


@pytest.mark.parametrize("family", TRAINED)
def test_the_log_probs_of_a_family_are_those_of_its_own_forward_pass(tmp_path: Path, family: str) -> None:
    path = folder_of(tmp_path, family)
    check_trainable(ModelConfig(path=str(path)))
    policy = Policy(ModelConfig(path=str(path)), LearnerConfig(backend="ddp"), path)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    want = []
    with torch.no_grad():
        for row in ROWS:
            for ids in row["completion_ids"]:
                tokens = torch.tensor([row["prompt_ids"] + ids])
                logits = whole.eval()(tokens, use_cache=False).logits[0, :-1]
                each = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])
                want.append(each[len(row["prompt_ids"]) - 1 :].sum())
    torch.testing.assert_close(policy.logprobs(ROWS), torch.stack(want).double(), rtol=0, atol=1e-4)
    assert ("packed" if policy.packs else "padded") == TRAINED[family]


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_cannot_be_trained_is_refused_by_name(tmp_path: Path, family: str) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as error:
        check_trainable(ModelConfig(path=str(tmp_path)))
    assert str(error.value).startswith(f"model.path: {tmp_path} {REFUSED[family]}")
    assert "\n" not in str(error.value)


def test_the_page_of_families_says_how_each_is_trained_or_that_it_is_refused() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "families.md").read_text(encoding="utf-8")
    trained, _, refused = page.partition("Refused")
    assert (
        dict(re.findall(r"^\| `(\w+)` \| .+ \| (packed|padded) \| .+ \|$", trained, re.MULTILINE)) == TRAINED
    )
    reasons = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", refused, re.MULTILINE))
    assert set(reasons) == set(REFUSED)
    assert all(reasons[family] in why for family, why in REFUSED.items())


def test_no_dropout_is_left_in_attention(tmp_path: Path) -> None:
    """Layers that recompute are in training mode: with dropout, two passes would differ."""
    for family, key in (("gpt2", "attn_pdrop"), ("llama", "attention_dropout")):
        path = folder_of(tmp_path / family, family)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        (path / "config.json").write_text(json.dumps({**config, key: 0.5}), encoding="utf-8")
        learner = LearnerConfig(backend="ddp", gradient_checkpointing=True)
        policy = Policy(ModelConfig(path=str(path)), learner, path)
        assert torch.equal(policy.logprobs(ROWS), policy.logprobs(ROWS))
        assert getattr(policy._module.model.config, key) == 0.0


def test_an_adapter_of_a_family_starts_as_its_model(tmp_path: Path) -> None:
    path = folder_of(tmp_path, "gemma3")
    model = ModelConfig(path=str(path), lora=LoraConfig(rank=2))
    check_trainable(model)
    policy = Policy(model.model_copy(update={"lora": None}), LearnerConfig(backend="ddp"), path)
    adapted = Policy(model, LearnerConfig(backend="ddp"), path)
    torch.testing.assert_close(adapted.logprobs(ROWS), policy.logprobs(ROWS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "target_modules", "complaint"),
    [
        # its layers hold their weights as [in, out], and a square one would be merged wrongly without a word
        (
            "gpt2",
            "all-linear",
            "transformer.h.0.attn.c_attn of this gpt2 is no torch.nn.Linear but a layer Conv1D",
        ),
        (
            "qwen2",
            ["q_proj", "lm_head"],
            "lm_head of this qwen2 is the head, and cannot have an adapter",
        ),
        (
            "qwen2",
            ["embed_tokens"],
            "model.embed_tokens of this qwen2 is no torch.nn.Linear but a layer Embedding",
        ),
        ("qwen2", ["q_proj", "norm"], "Target module Qwen2RMSNorm((32,), eps=1e-06) is not supported."),
        ("qwen2", ["q_prj"], "Target modules {'q_prj'} not found in the base model."),
        ("qwen2", "q_proj(", "missing ), unterminated subpattern at position 6"),
    ],
)
def test_an_adapter_that_a_model_cannot_have_is_refused_before_anything_starts(
    tmp_path: Path, family: str, target_modules: str | list[str], complaint: str
) -> None:
    config_of(family).save_pretrained(tmp_path)  # no weights are read
    with pytest.raises(ConfigError) as error:
        check_trainable(ModelConfig(path=str(tmp_path), lora=LoraConfig(target_modules=target_modules)))
    assert str(error.value).startswith(f"model.lora.target_modules: {complaint}")
    assert "\n" not in str(error.value)


# --- folders of models --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content, keys",
    [
        ({"do_sample": False, "temperature": 0.7}, "temperature"),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, "temperature, top_p"),
        ({"do_sample": False, "min_p": 0.1}, "min_p"),
    ],
)
def test_a_generation_config_that_no_checkpoint_could_hold_is_refused_with_its_keys(
    tmp_path: Path, content: dict[str, Any], keys: str
) -> None:
    path = tiny.make_model(tmp_path)
    file = path / "generation_config.json"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        check_trainable(ModelConfig(path=str(path)))
    assert str(error.value).startswith(f"model.path: {file}: {keys}: no checkpoint") and "\n" not in str(
        error.value
    )
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.7}), encoding="utf-8")
    check_trainable(ModelConfig(path=str(path)))


def test_a_model_with_another_vocabulary_or_shape_has_another_digest(tmp_path: Path) -> None:
    def digest(name: str, **changes: Any) -> str:
        path = tiny.make_model(tmp_path / name, seed=changes.pop("seed", 0))
        for file, old, new in changes.values():
            text = (path / file).read_text(encoding="utf-8")
            assert old in text
            (path / file).write_text(text.replace(old, new), encoding="utf-8")
        return digest_of(ModelConfig(path=str(path)))["model.path"]

    first = digest("first")
    assert digest("other weights", seed=1) == first
    assert digest("tokens", change=("tokenizer.json", '"z"', '"Z"')) != first
    assert (
        digest("width", change=("config.json", '"intermediate_size": 48', '"intermediate_size": 64')) != first
    )
    assert digest("note", change=("config.json", '"use_cache": true', '"use_cache": false')) == first
