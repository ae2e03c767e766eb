"""vLLM's own HTTP application stands around an engine's AsyncLLM; episodes ask the engine (serving.py).

All that the application asks vLLM for goes through one method, `generate`, whatever the route and the format:
chat, completions, responses, Anthropic's messages, or tokens. This module imports vLLM inside its functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from gvpo_ray.actors import Draining
from gvpo_ray.config.base import ConfigError
from gvpo_ray.data.vocabulary import beyond, unknown_token
from gvpo_ray.engines.rollout import Span
from gvpo_ray.engines.serving import App, Serve, is_of_episode, sample

SERVED = "policy"
"""The name of the model."""


async def vllm_app(llm: Any, model: str, serve: Serve, ready: Callable[[], Awaitable[None]]) -> App:
    """Build vLLM's application.

    Args:
        llm: an AsyncLLM.
        model: the path of its model.
        serve: how the run serves.
        ready: awaited before vLLM samples for anybody: weights may still be on their way.

    Raises:
        ConfigError: vLLM's server has no such argument.
    """
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = FlexibleArgumentParser  # vLLM's types are not all there
    frontend: Any = FrontendArgs
    arguments: Any = make_arg_parser(parser()).parse_args([])
    ours = {
        "model": model,
        "served_model_name": [SERVED],
        "api_key": [serve.token],
        "enable_scale_out": True,  # the route for tokens
        "disable_log_stats": True,
        "disable_fastapi_docs": True,
    }
    known = {field.name for field in dataclasses.fields(frontend)}  # others are the engine's
    for name, value in serve.arguments.items():
        if name == "reasoning_parser":
            arguments.structured_outputs_config.reasoning_parser = value
        elif name in known:
            setattr(arguments, name, value)
        else:
            raise ConfigError(f"engines.serve_arguments.{name}: vLLM's server has no such argument")
    vars(arguments).update(ours)
    tasks = await llm.get_supported_tasks()
    app = build_app(arguments, tasks, llm.model_config)
    client: Any = _Client(llm, ready)
    await init_app_state(client, app.state, arguments, tasks)
    # vLLM tells its server to stop when its core is dead; the engine ends its process itself
    app.state.server = SimpleNamespace()
    return app


class _Client:
    """A _Client is the AsyncLLM as the application sees it."""

    def __init__(self, llm: Any, ready: Callable[[], Awaitable[None]]) -> None:
        self._llm, self._ready = llm, ready

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    async def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, **arguments: Any
    ) -> AsyncIterator[Any]:
        """Sample, for an episode through the engine, and else as vLLM does."""
        self._refuse_unknown(prompt)
        if is_of_episode():
            yield await self._of_episode(prompt, sampling_params, request_id)
            return
        try:
            await self._ready()
        except Draining as error:
            from vllm.exceptions import RetryableRequestError

            raise RetryableRequestError(str(error)) from error
        async for output in self._llm.generate(prompt, sampling_params, request_id, **arguments):
            yield output

    def _refuse_unknown(self, prompt: Any) -> None:
        """Raise ValueError, which vLLM answers with 400, for a token that would end vLLM's core.

        vLLM itself lets pass what its tokenizer has and its model has not.
        """
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        size = int(self._llm.model_config.get_vocab_size()) if ids else None
        if size is not None and (token := beyond(ids or (), size)) is not None:
            raise ValueError(f"the prompt has {unknown_token(token, size)}")

    async def _of_episode(self, prompt: Any, params: Any, request_id: str) -> Any:
        from vllm.outputs import CompletionOutput, RequestOutput, WeightVersionSpan
        from vllm.v1.engine.exceptions import EngineDeadError

        _refuse(prompt, params)
        stop = [*(params.stop or ()), *(params.stop_token_ids or ())]
        decode, deaths = self._llm.get_tokenizer().decode, (EngineDeadError,)
        ids, span = await sample(list(prompt["prompt_token_ids"]), params.max_tokens, stop, decode, deaths)
        text = _text(self._llm.get_tokenizer(), span, params)
        output = CompletionOutput(
            index=0,
            text=text,
            token_ids=span.ids,
            cumulative_logprob=sum(span.logprobs),
            logprobs=None if params.logprobs is None else self._logprobs(span),
            finish_reason=span.finish_reason,
            stop_reason=span.stop_reason,
            weight_versions=[WeightVersionSpan(str(version), *place) for version, *place in _written(span)],
        )
        return RequestOutput(request_id, prompt.get("prompt"), ids, None, [output], finished=True)

    def _logprobs(self, span: Span) -> Any:
        from vllm.logprobs import Logprob

        decode = self._llm.get_tokenizer().decode
        return [
            {token: Logprob(logprob, decoded_token=decode([token]))}
            for token, logprob in zip(span.ids, span.logprobs, strict=True)
        ]


def _refuse(prompt: Mapping[str, Any], params: Any) -> None:
    """Raise ValueError, which vLLM answers with 400, where a call is none of a policy that is trained.

    The run's sampling section says how tokens are drawn, so a temperature and its like are not refused, but
    replaced. What takes tokens away from the policy is refused: the agent counts on it.
    """
    refused = {
        "n": params.n != 1,
        "images and other media": prompt.get("type") != "token",
        "structured outputs (response_format, tool_choice)": params.structured_outputs is not None,
        "allowed_token_ids": bool(params.allowed_token_ids),
        "bad_words": bool(params.bad_words),
        "logit_bias": bool(params.logit_bias),
        "prompt_logprobs": params.prompt_logprobs is not None,
    }
    for name, is_asked in refused.items():
        if is_asked:
            raise ValueError(
                f"{name}: an episode that is trained samples the policy alone, one answer a call"
            )


def _written(span: Span) -> Sequence[tuple[int, int, int]]:
    """Return which tokens the weights of which version have sampled: (version, begin, end) of each run."""
    only = {*span.versions}
    return span.written or ([(only.pop(), 0, len(span.ids))] if len(only) == 1 else [])


def _text(tokenizer: Any, span: Span, params: Any) -> str:
    """Return the text of what was sampled, without what ended it, as vLLM writes it."""
    is_ended = span.finish_reason == "stop"
    by_text = span.stop_reason if isinstance(span.stop_reason, str) else None
    ids: Sequence[int] = span.ids[:-1] if is_ended and by_text is None else span.ids
    text = str(tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens))
    if by_text is not None and by_text in text:
        end = text.rfind(by_text)
        return text[: end + len(by_text)] if params.include_stop_str_in_output else text[:end]
    return text
