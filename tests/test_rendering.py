"""Rendering: what a data set spells is text, what a template writes is a special token."""

from __future__ import annotations

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.dialogue import dialogue_of
from gvpo_ray.data.rendering import TextRenderer, messages_of
from gvpo_ray.data.transcripts import Transcripts

SPECIAL = ["<s>", "<|end|>", "<|end|>2", "<|user|>"]
CHAT = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] | trim + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|user|>a\n' }}{% endif %}"
)


def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE as Qwen's and Llama 3's, whose merges include parts of the special tokens' texts."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["<|end|> the user is the end of <s>", "1 + 1 = 2 <|user|>"] * 9, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    begin = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>")


def unigram() -> PreTrainedTokenizerFast:
    """A model whose vocabulary has the special tokens as ordinary pieces too, as SentencePiece files do."""
    letters = {*"".join(SPECIAL), *"abcdefghijklmnopqrstuvwxyz0123456789+=.B \n"}
    pieces = [*((letter, -2.0) for letter in sorted(letters)), *((text, -1.0) for text in SPECIAL)]
    backend = Tokenizer(models.Unigram([("<unk>", -9.0), *pieces], unk_id=0))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<|end|>")


def slow() -> ByT5Tokenizer:
    tokenizer = ByT5Tokenizer(extra_ids=0, eos_token="<|end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer


TOKENIZERS = {"bpe": bpe, "unigram": unigram, "slow": slow}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = TOKENIZERS[request.param]()
    made.chat_template = CHAT
    return made


def problems(num: int, seed: int = 0) -> list[str]:
    """Texts of which most spell special tokens, at their ends, beside each other, and in parts."""
    draw = random.Random(seed)
    parts = [*SPECIAL, "<|", "|>", "1 + 1", " ", "the end", "\n", "2"]
    return ["x" + "".join(draw.choices(parts, k=draw.randint(1, 7))) + "y" for _ in range(num)]


def special_ids(tokenizer: Any) -> set[int]:
    return {tokenizer.convert_tokens_to_ids(text) for text in SPECIAL}


def test_special_tokens_that_a_problem_spells_are_text_and_those_of_the_chat_template_are_tokens(
    tokenizer: Any,
) -> None:
    texts = problems(40)
    rendered = TextRenderer(tokenizer, system_prompt="Be brief.").render([{"prompt": text} for text in texts])
    user, end = (tokenizer.convert_tokens_to_ids(text) for text in ("<|user|>", "<|end|>"))
    for text, (ids, _) in zip(texts, rendered, strict=True):
        whole = f"<|user|>system\nBe brief.<|end|>\n<|user|>user\n{text}<|end|>\n<|user|>a\n"
        assert tokenizer.decode(ids, skip_special_tokens=False) == whole
        assert [i for i in ids if i in special_ids(tokenizer)] == [user, end, user, end, user]


def test_special_tokens_that_a_call_of_a_tool_spells_are_text() -> None:
    tokenizer = bpe()
    calls = "{{ m.tool_calls | tojson if m.tool_calls else '' }}<|end|>"
    chat = CHAT.replace("'<|end|>\n' }}", f"'' }}}}{calls}")
    tokenizer.chat_template = chat.replace("<|user|>a\n", "<|user|>assistant\n")
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    call = {"type": "function", "function": {"name": "add", "arguments": {"<|end|>": "a<|end|>b"}}}
    user, tool = {"role": "user", "content": "1"}, {"role": "tool", "content": "2", "name": "<|end|>"}
    turns = [{"role": "assistant", "content": "", "tool_calls": [call]}, tool]
    row = {"prompt": "1", "messages": [user, *turns, user]}
    (made,) = TextRenderer(tokenizer).render([row])
    assert made.prompt_ids.count(end) == 4  # of the template, behind each message
    assert '{"<|end|>": "a<|end|>b"}' in tokenizer.decode(made.prompt_ids)
    (of_episode,) = dialogue_of(PromptsConfig(path="p"), tokenizer, "prompts", tools=[], family=None).render(
        [row]
    )
    assert of_episode.prompt_ids.count(end) == 3  # up to the last user message's content
    last = {"role": "assistant", "content": "3"}
    ids, mask = Transcripts(tokenizer).tokens([user], [*turns, last], "row 0")
    assert ids.count(end) == 3 and [i for i, own in zip(ids, mask, strict=True) if own].count(end) == 2


def test_special_tokens_of_the_configs_template_are_tokens_and_the_tokenizer_adds_its_own() -> None:
    tokenizer = bpe()
    rows = [{"prompt": text} for text in problems(40, 1)]
    for template, own in (("{prompt}", []), ("<|user|>{prompt}<|end|>\n", ["<|user|>", "<|end|>"])):
        for row, (ids, _) in zip(rows, TextRenderer(tokenizer, template=template).render(rows), strict=True):
            assert tokenizer.decode(ids) == "<s>" + template.replace("{prompt}", row["prompt"])
            found = [tokenizer.convert_ids_to_tokens(i) for i in ids if i in special_ids(tokenizer)]
            assert found == ["<s>", *own]


def test_without_special_tokens_a_problem_is_tokenised_in_one_piece_as_ever(tokenizer: Any) -> None:
    texts = ["x is the end of 1 + 1", "<|en d|> the user |>", "1 + 1 = 2\n"]
    rows = [{"prompt": text} for text in texts]
    whole = tokenizer(
        [f"<|user|>user\n{text.strip()}<|end|>\n<|user|>a\n" for text in texts], add_special_tokens=False
    )
    assert [ids for ids, _ in TextRenderer(tokenizer).render(rows)] == whole["input_ids"]
    plain = tokenizer([f"Q: {text}" for text in texts])["input_ids"]
    # no prompt ends in the end-of-sequence token, whatever the tokenizer adds (data/turns.py)
    plain = [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in plain]
    assert [ids for ids, _ in TextRenderer(tokenizer, template="Q: {prompt}").render(rows)] == plain


def test_a_completion_ends_with_the_end_token_once_and_spells_all_others(tokenizer: Any) -> None:
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    for text in (*problems(40, 2), "plain"):
        with_end, without = TextRenderer(tokenizer).encode([f"{text}<|end|>", text])
        assert with_end == [*without, end]
        assert tokenizer.decode(without) == text and not special_ids(tokenizer) & set(without)


def test_white_space_that_a_special_token_takes_is_taken_beside_a_problem_that_spells_one() -> None:
    backend = bpe().backend_tokenizer
    backend.add_special_tokens(
        [AddedToken("<|call|>", special=True, rstrip=True, lstrip=True, normalized=False)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    renderer = TextRenderer(tokenizer, template="a <|call|> \n{prompt}")
    call = tokenizer.convert_tokens_to_ids("<|call|>")
    spelled, plain = (renderer.render([{"prompt": text}])[0].prompt_ids for text in ("b<s>", "b"))
    assert spelled[: len(plain)] == plain and plain[2] == call


def test_a_chat_template_that_fails_is_one_line_that_names_what_to_change() -> None:
    def fails(template: str, **keys: str) -> str:
        tokenizer = bpe()
        tokenizer.chat_template = template
        with pytest.raises(ConfigError) as caught:
            TextRenderer(tokenizer, key="evaluation.sets.held", **keys).render([{"prompt": "1"}])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    gemma = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    assert fails(gemma, system_prompt="Be brief.") == (
        "evaluation.sets.held.system_prompt: the tokenizer's chat template does not take one: TemplateError: "
        "System role not supported"
    )
    for broken in (
        "{% for %}",
        "{{ messages[9].content + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages.x.y }}",
        "{{ 'a' + 1 }}",
    ):
        for keys in ({}, {"system_prompt": "Be brief."}):
            text = fails(broken, **keys)
            assert text.startswith("model.path: the chat template of the tokenizer fails (")
            assert text.endswith("; evaluation.sets.held.template replaces it")


def test_a_server_gets_the_text_that_the_template_makes_of_a_problem() -> None:
    assert messages_of("1{x}", "Q: {prompt}\nA:", None) == [{"role": "user", "content": "Q: 1{x}\nA:"}]
    assert messages_of("1", None, "Be brief.") == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1"},
    ]
