"""A scoring model says how likely texts are: a reference by another model, or an aligned model of PoFT.

It has a tokenizer of its own, so that what it scores is a text and not tokens: the prompt as its own chat
template or the config's template writes it, and the completion behind it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pyarrow as pa

from gvpo_ray import groups
from gvpo_ray.config.base import ConfigError
from gvpo_ray.data.messages import Message
from gvpo_ray.data.rendering import messages_of
from gvpo_ray.data.transcripts import Transcripts
from gvpo_ray.data.vocabulary import beyond, unknown_token

PROMPTS = "prompts"
"""The key of the run's own prompts among renderings; a source's whole groups have `sources.<name>`."""

Renderings = Mapping[str, Mapping[str, Any]]
"""Key of a data set in the config -> the arguments of a TextRenderer that its section sets."""


@dataclass(frozen=True)
class Text:
    """A Text is a completion of a prompt."""

    prompt: str
    messages: list[dict[str, Any]] | None
    """The conversation that the prompt is; None: the prompt is a text."""
    completion: str | Sequence[Message]
    """A text, or the messages of several turns, of which the assistant's are scored."""
    is_ended: bool = True
    """Whether the completion has come to its end, so that the end of its turn is scored too."""


@dataclass(frozen=True)
class Score:
    """A Score is what a scoring model says of a text."""

    logprob: float | None
    """Sum over the completion's tokens, in nats; None: the model cannot score the text."""
    num_tokens: int = 0
    """The completion's tokens, in the scoring model's own tokenizer."""
    reason: str | None = None
    """Why there is no log-prob."""

    @property
    def mean(self) -> float | None:
        """The mean log-prob per token."""
        return None if self.logprob is None else self.logprob / self.num_tokens


class _Tokens(NamedTuple):
    """A _Tokens holds the tokens of a text, and which of the completion's are scored."""

    prompt: list[int]
    ids: list[int]
    mask: list[bool]


class ScoringModel:
    """A ScoringModel is a causal language model that scores texts; references.py makes it an actor.

    Args:
        path: model folder or hub name, with a tokenizer.
        renderings: how the prompts of each data set are written.
        batch_size: texts in one forward pass.
        on_gpu: whether it runs in bfloat16 on the actor's GPU, or in float32 on CPU.
        revision: of a hub name, so that all actors have the same weights.
    """

    def __init__(
        self,
        path: str,
        renderings: Renderings,
        batch_size: int,
        on_gpu: bool = False,
        revision: str = "main",
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch, self._batch_size = torch, batch_size
        self._device = "cuda" if on_gpu else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
        self.renderings = renderings
        """How the prompts of each data set are written."""
        self._renderers = {
            key: Transcripts(tokenizer, **options, key=key) for key, options in renderings.items()
        }
        self._unknown = _unknown_tokens(tokenizer)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=torch.bfloat16 if on_gpu else torch.float32
        )
        self._model = model.to(self._device).eval()
        text = model.config.get_text_config()
        self._context = getattr(text, "max_position_embeddings", None) or math.inf
        self._vocab_size = int(text.vocab_size)

    def score(self, texts: Sequence[Text], key: str = PROMPTS) -> list[Score]:
        """Return the log-probs of completions; one that cannot be scored has a reason instead.

        Args:
            texts: of one data set.
            key: the data set's key among the renderings.
        """
        scores: dict[int, Score] = {}
        tokens: dict[int, _Tokens] = {}
        for i, text in enumerate(texts):
            own = self._tokens(text, key)
            if isinstance(own, str):
                scores[i] = Score(None, reason=own)
            else:
                tokens[i] = own
        # rows of like length pad little
        order = sorted(tokens, key=lambda i: len(tokens[i].prompt) + len(tokens[i].ids))
        for begin in range(0, len(order), self._batch_size):
            batch = order[begin : begin + self._batch_size]
            sums = self._sums([tokens[i] for i in batch])
            for i, value in zip(batch, sums, strict=True):
                scores[i] = (
                    Score(value, sum(tokens[i].mask))
                    if math.isfinite(value)
                    else Score(None, reason=f"its log-prob is {value}, not a finite number")
                )
        return [scores[i] for i in range(len(texts))]

    def _tokens(self, text: Text, key: str) -> _Tokens | str:
        """Return the tokens of a text, or why it cannot be scored."""
        renderer = self._renderers[key]
        try:
            (rendered,) = renderer.render([{"prompt": text.prompt, "messages": text.messages}])
            if isinstance(text.completion, str):
                (ids,) = renderer.encode([text.completion])
                end = renderer.end_id
                if text.is_ended and end is not None and ids[-1:] != [end]:
                    ids = [*ids, end]
                mask = [True] * len(ids)
            else:
                before = text.messages or messages_of(text.prompt, None, None)
                ids, mask = renderer.tokens(before, text.completion, key)
        except ConfigError as error:
            return str(error)
        if not rendered.prompt_ids or not any(mask):
            return f"the {'completion' if rendered.prompt_ids else 'prompt'} has no tokens"
        if self._unknown & {*rendered.prompt_ids, *ids}:
            return "its tokenizer has no tokens for a part of the text"
        if (token := beyond([*rendered.prompt_ids, *ids], self._vocab_size)) is not None:
            return f"its tokenizer writes {unknown_token(token, self._vocab_size)}"
        if (length := len(rendered.prompt_ids) + len(ids)) > self._context:
            return f"{length} tokens do not fit into its context of {self._context}"
        return _Tokens(rendered.prompt_ids, ids, mask)

    def _sums(self, rows: Sequence[_Tokens]) -> list[float]:
        """Return the sum of the scored tokens' log-probs of each row, in one forward pass."""
        torch = self._torch
        width = max(len(prompt) + len(ids) for prompt, ids, _ in rows)
        # logits of the positions before the first completion token of all rows are not computed
        skip = min(len(prompt) for prompt, _, _ in rows) - 1
        input_ids = torch.zeros(len(rows), width, dtype=torch.long)
        attention = torch.zeros_like(input_ids)
        for i, (prompt, ids, _) in enumerate(rows):  # padded on the right, which a causal model cannot see
            input_ids[i, : len(prompt) + len(ids)] = torch.tensor([*prompt, *ids])
            attention[i, : len(prompt) + len(ids)] = 1
        with torch.inference_mode():
            logits = self._model(
                input_ids=input_ids.to(self._device),
                attention_mask=attention.to(self._device),
                logits_to_keep=width - skip,
                use_cache=False,
            ).logits
            sums = []
            for i, (prompt, ids, mask) in enumerate(rows):
                begin = len(prompt) - 1 - skip
                own = logits[i, begin : begin + len(ids)].float().log_softmax(-1)
                chosen = own.gather(-1, torch.tensor(ids, device=own.device)[:, None])[:, 0]
                sums.append(float(chosen[torch.tensor(mask, device=own.device)].double().sum()))
        return sums


def _unknown_tokens(tokenizer: Any) -> set[int]:
    """Return the tokens that stand for what a tokenizer cannot spell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    named = getattr(getattr(backend, "model", None), "unk_token", None)
    ids = {tokenizer.unk_token_id, None if named is None else tokenizer.convert_tokens_to_ids(named)}
    # a family that has no such token may name its end of sequence here
    return {token for token in ids if token is not None and token != tokenizer.eos_token_id}


def with_references(group: pa.Table, model: ScoringModel, version: int) -> pa.Table:
    """Return a scored group with the reference's log-probs of its completions.

    A completion that this version has scored already, as in an earlier group, keeps its log-prob. One without
    a reward is not scored, and one that cannot be scored loses its reward: it is left out, with the reason.

    Args:
        group: one row with groups.LOGGED_COLUMNS.
        model: the reference.
        version: stands for the reference in `reference_versions`.
    """
    (row,) = groups.rows(groups.log_columns(group))
    num = len(row["completions"])
    versions = list(row["reference_versions"] or [None] * num)
    logprobs = list(row["reference_logprobs"] or [None] * num)
    rewards, reasons = list(row["rewards"]), list(row["reward_reasons"])
    asked = [i for i in range(num) if rewards[i] is not None and versions[i] != version]
    masks = row["trained_tokens"] or [None] * num
    several = [i for i in asked if masks[i] is not None and not all(masks[i])]
    for i in several:
        reasons[i] = _with(reasons[i], "a completion of several turns is no text that another model scores")
        rewards[i] = None
    asked = [i for i in asked if i not in several]
    messages = json.loads(row["data"] or "{}").get("messages")
    texts = [
        Text(row["prompt"], messages, row["completions"][i], row["finish_reasons"][i] == "stop")
        for i in asked
    ]
    for i, score in zip(asked, model.score(texts, _key(row, model)), strict=True):
        if score.logprob is None:
            rewards[i], reasons[i] = None, _with(reasons[i], str(score.reason))
        logprobs[i], versions[i] = score.logprob, None if score.logprob is None else version
    return groups.with_columns(
        group,
        rewards=[rewards],
        reward_reasons=[reasons],
        reference_logprobs=[logprobs],
        reference_versions=[versions],
    )


def _key(row: Mapping[str, Any], model: ScoringModel) -> str:
    """Return the key of the data set whose prompt a group has: a source's, if all of it comes from there."""
    name = row["dataset"]
    key = f"sources.{name}"
    is_whole = all(source == f"offline:{name}" for source in row["sources"])
    return key if is_whole and key in model.renderings else PROMPTS


def _with(known: str | None, reason: str) -> str:
    """Return an entry of `reward_reasons` with one more reason, the reference's."""
    return "\n".join([*([known] if known else []), f"reference: {reason}"])
