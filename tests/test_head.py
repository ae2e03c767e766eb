"""The fused output head against log_softmax, and that it is one call of its module per pass."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, Qwen2Config

from gvpo_ray.learner import head
from gvpo_ray.learner.head import linear_logprobs
from gvpo_ray.learner.logprobs import CompletionLogprobs, padded_inputs

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


@pytest.mark.parametrize("has_bias", [False, True])
def test_values_and_gradients_are_those_of_log_softmax(has_bias: bool, chunks: None) -> None:
    hidden, weight, bias, targets = _inputs(torch.float64)
    given = [hidden, weight, *([bias] if has_bias else [])]
    want = torch.log_softmax(linear(*given), -1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(
        linear_logprobs(hidden, weight, targets, bias if has_bias else None), want, rtol=0, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda h, w, *b: linear_logprobs(h, w, targets, *b), given)


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
