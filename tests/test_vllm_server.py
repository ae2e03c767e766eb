"""What vLLM's application sees of an engine, and what it may not ask for an episode; vLLM does not run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from episodes import END, tokenizer

from gvpo_ray.engines.rollout import Span
from gvpo_ray.engines.vllm_server import _Client, _refuse, _text, _written


def test_a_request_waits_for_the_first_weights_and_is_vllms_own_if_it_is_no_episodes() -> None:
    class Llm:
        model_config = "of vLLM"

        async def generate(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
            yield arguments, options

    async def main() -> None:
        ready = asyncio.Event()

        async def is_ready() -> None:
            await ready.wait()

        client = _Client(Llm(), is_ready)
        assert client.model_config == "of vLLM"
        asking = asyncio.ensure_future(anext(client.generate("prompt", "params", "name", priority=1)))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not asking.done()
        ready.set()
        assert await asking == (("prompt", "params", "name"), {"priority": 1})

    asyncio.run(main())


@pytest.mark.parametrize("ids", [[3, 44], [44, 3], [3, 43]])
def test_a_prompt_with_a_token_that_the_model_lacks_is_refused_before_vllms_core_has_it(
    ids: list[int],
) -> None:
    class Llm:
        model_config = SimpleNamespace(get_vocab_size=lambda: 44)

        async def generate(self, *arguments: Any, **options: Any) -> AsyncIterator[Any]:
            yield arguments

    async def main() -> None:
        async def is_ready() -> None:
            pass

        asked = anext(_Client(Llm(), is_ready).generate({"prompt_token_ids": ids}, "params", "name"))
        if max(ids) < 44:
            assert (await asked)[0] == {"prompt_token_ids": ids}
            return
        with pytest.raises(ValueError, match=r"^the prompt has token 44, and the model has 44 "):
            await asked

    asyncio.run(main())


def test_a_client_reads_which_weights_have_sampled_which_tokens() -> None:
    """Weights change in flight: then an answer has several versions."""
    ids = [5, 6, 7]
    assert _written(Span(ids, [], "stop", [2, 3], written=[(2, 0, 1), (3, 1, 3)])) == [(2, 0, 1), (3, 1, 3)]
    assert _written(Span(ids, [], "stop", [2])) == [(2, 0, 3)]
    assert _written(Span(ids, [], "stop", [2, 3])) == []


PLAIN = {
    "n": 1,
    "structured_outputs": None,
    "allowed_token_ids": None,
    "bad_words": [],
    "logit_bias": None,
    "prompt_logprobs": None,
}


@pytest.mark.parametrize(
    ("asked", "kind", "name"),
    [
        ({"temperature": 0.0, "top_p": 0.1, "presence_penalty": 2.0}, "token", None),
        ({"n": 2}, "token", "n"),
        ({"structured_outputs": object()}, "token", "structured outputs"),
        ({"allowed_token_ids": [1]}, "token", "allowed_token_ids"),
        ({"bad_words": ["no"]}, "token", "bad_words"),
        ({"logit_bias": {1: 1.0}}, "token", "logit_bias"),
        ({"prompt_logprobs": 0}, "token", "prompt_logprobs"),
        ({}, "multimodal", "images"),
    ],
)
def test_what_takes_tokens_from_the_policy_is_refused_and_how_they_are_drawn_is_not(
    asked: dict[str, Any], kind: str, name: str | None
) -> None:
    params = SimpleNamespace(**PLAIN | asked)
    if name is None:
        _refuse({"type": kind}, params)
        return
    with pytest.raises(ValueError, match=f"^{name}"):
        _refuse({"type": kind}, params)


@pytest.mark.parametrize(
    ("said", "finish", "stop", "include", "text"),
    [
        (f"two{END}", "stop", None, False, "two"),
        ("two", "length", None, False, "two"),
        ("two, three", "stop", ", three", False, "two"),
        ("two, three", "stop", ", three", True, "two, three"),
    ],
)
def test_an_answer_is_the_text_without_what_ended_it(
    said: str, finish: str, stop: str | None, include: bool, text: str
) -> None:
    names = tokenizer()
    ids = names(said, add_special_tokens=False)["input_ids"]
    params = SimpleNamespace(skip_special_tokens=True, include_stop_str_in_output=include)
    assert _text(names, Span(ids, [-1.0] * len(ids), finish, [0], stop), params) == text
