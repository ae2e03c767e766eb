"""The fused output head against log_softmax, and that it is one call of its module per pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    OlmoConfig,
    Qwen2Config,
)

from gvpo_ray.config.learner import LearnerConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.learner import head, logprobs
from gvpo_ray.learner.head import linear_logprobs
from gvpo_ray.learner.logprobs import CompletionLogprobs, padded_inputs
from gvpo_ray.learner.policy import Policy

VOCABULARY = 64
CONFIG = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
)


@pytest.fixture(
    params=[1 << 22, VOCABULARY * 5, VOCABULARY * 37, 1], ids=["whole", "5 tokens", "exactly all", "1 token"]
)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Logits at a time: of all 37 tokens, of some, of one."""
    monkeypatch.setitem(head.ELEMENTS, "cpu", request.param)
    yield


def _inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = ((37, 16), (VOCABULARY, 16), (VOCABULARY,))
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )
    return hidden, weight, bias, torch.randint(VOCABULARY, (37,))


@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.25, None), (1.0, 3.0), (2.5, 5.0)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(
    has_bias: bool, scale: float, softcap: float | None, chunks: None
) -> None:
    hidden, weight, bias, targets = _inputs(torch.float64)
    given = [hidden, weight, *([bias] if has_bias else [])]
    logits = scale * linear(*given)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    want = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]

    ours = linear_logprobs(hidden, weight, targets, bias if has_bias else None, scale, softcap)
    torch.testing.assert_close(ours, want, rtol=0, atol=1e-12)
    factors = torch.randn(len(want), dtype=torch.float64)
    gradients = [torch.autograd.grad((result * factors).sum(), given) for result in (ours, want)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_only_what_takes_a_gradient_gets_one(chunks: None) -> None:
    hidden, weight, _, targets = _inputs(torch.float64)
    linear_logprobs(hidden, weight.detach(), targets).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    linear_logprobs(hidden.detach(), weight, targets).sum().backward()
    assert weight.grad is not None
    assert len(linear_logprobs(hidden[:0], weight, targets[:0])) == 0


@pytest.mark.parametrize("autocast", [False, True])
def test_products_of_bfloat16_come_out_in_float32(autocast: bool, chunks: None) -> None:
    """Under autocast too, which would take the float32 products back to bfloat16: an eighth of a nat near a
    logit of 20.
    """
    hidden, weight, _, targets = _inputs(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = linear_logprobs(hidden, weight, targets)
    exact = torch.log_softmax(hidden.bfloat16().double() @ weight.bfloat16().double().t(), -1).gather(
        1, targets[:, None]
    )[:, 0]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=1e-5)
    got.sum().backward()
    assert (
        hidden.grad is not None
        and hidden.grad.dtype == hidden.dtype
        and weight.grad is not None
        and weight.grad.dtype == weight.dtype
    )


@pytest.mark.parametrize("length", [1, 3, 40])
def test_a_pass_is_one_call_of_the_heads_module_whatever_its_length(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under ZeRO-3 each call gathers the weight: ranks whose passes are of different lengths would wait for
    each other for ever.
    """
    monkeypatch.setitem(head.ELEMENTS, "cpu", 4 * VOCABULARY)
    model = AutoModelForCausalLM.from_config(CONFIG)
    calls: list[str] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: calls.append("forward"))
    model.get_output_embeddings().register_full_backward_pre_hook(lambda *_: calls.append("backward"))
    module = CompletionLogprobs(model)
    rows = [{"prompt_ids": [1, 2], "completion_ids": [list(range(length)), [3]]}]
    module(**padded_inputs(rows, "cpu")[0]).sum().backward()
    assert calls == ["forward", "backward"]
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits  # its usual form is still there
    assert logits.shape == (1, 3, VOCABULARY)


def test_another_head_than_a_plain_linear_one_is_refused_by_name() -> None:
    class Scaled(nn.Linear):
        pass

    model = AutoModelForCausalLM.from_config(CONFIG)
    model.set_output_embeddings(Scaled(16, VOCABULARY))
    with pytest.raises(TypeError, match="Scaled"):
        CompletionLogprobs(model)


SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": tiny.EOS,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Any] = {
    "gemma2": Gemma2Config(
        **SIZES,
        head_dim=8,
        query_pre_attn_scalar=8,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=1.0,
        sliding_window=64,
    ),
    "cohere": CohereConfig(**SIZES, logit_scale=0.0625),
    "granite": GraniteConfig(**SIZES, logits_scaling=8.0),
    "olmo": OlmoConfig(**SIZES),
    "llama": LlamaConfig(**SIZES),
}
ROWS = [{"prompt_ids": [5, 9, 11], "completion_ids": [list(range(10, 30)), [7, 8], [40, 3, 3]]}]


def _folder(path: Path, family: str) -> Path:
    tiny.make_model(path)  # for its tokenizer
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(path)
    return path


def _policy(path: Path, **learner: Any) -> Policy:
    return Policy(ModelConfig(path=str(path)), LearnerConfig(backend="ddp", **learner), path)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_models_own_logits_and_so_are_gradients(
    tmp_path: Path, family: str, packing: bool
) -> None:
    """Gemma 2 caps logits after the head (and in attention), Cohere and Granite scale them."""
    policy = _policy(_folder(tmp_path, family), packing=packing)
    whole = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    want = []
    for ids in ROWS[0]["completion_ids"]:
        tokens = torch.tensor([ROWS[0]["prompt_ids"] + ids])
        every = torch.log_softmax(whole(tokens).logits[0, :-1], -1).gather(1, tokens[0, 1:, None])
        want.append(every[len(ROWS[0]["prompt_ids"]) - 1 :].sum())
    got = policy.logprobs(ROWS)
    torch.testing.assert_close(got, torch.stack(want).double(), rtol=0, atol=2e-4)
    torch.stack(want).sum().backward()
    got.sum().backward()
    theirs = dict(whole.named_parameters())
    for name, parameter in policy._module.model.named_parameters():
        gradient = theirs[name].grad
        assert (parameter.grad - gradient).norm() <= 1e-4 * gradient.norm() + 1e-4, name


@pytest.mark.parametrize(
    "family, attribute",
    [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale"), ("granite", "logits_scaling")],
)
def test_a_model_that_does_something_unknown_to_its_logits_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, attribute: str
) -> None:
    path = _folder(tmp_path, family)
    monkeypatch.setattr(logprobs, "logit_transform", lambda model: (1.0, None))
    with pytest.raises(ValueError, match=f"^{family}: .*nats.*{attribute}") as caught:
        _policy(path)
    assert "\n" not in str(caught.value)
