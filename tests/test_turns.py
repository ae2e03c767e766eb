"""The ends of prompts and completions, and the text of thoughts, by one rule over the habits of families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import ALPHABET
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.engines import SamplingConfig
from gvpo_ray.config.model import ModelConfig
from gvpo_ray.data.rendering import TextRenderer
from gvpo_ray.data.turns import Turns, check_stop_tokens, end_of_turn, one_begin_no_end
from gvpo_ray.verifiers.math.extract import extract

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<|bos|>{% for m in messages %}<|start|>{{ m.role }}<|mid|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|mid|>\n\n{% endif %}"
)
MISTRAL = (
    "<|bos|>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|eos|>{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}\n### {{ m.role }}:\n{{ m.content }}{% endfor %}\n### assistant:\n"
TURN_ENDS = {
    "chatml on a base model": (CHATML, "<|im_end|>"),
    "llama 3": (LLAMA3, "<|eot|>"),
    "mistral": (MISTRAL, "<|eos|>"),
    "no marks": (PLAIN, "<|eos|>"),
    "refuses assistants": ("{% if messages|length > 1 %}{{ 1 // 0 }}{% endif %}x", "<|eos|>"),
    "broken": ("{% for %}", "<|eos|>"),
    "none": (None, "<|eos|>"),
}
SPECIAL = ["<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|mid|>", "<|eot|>"]


def tokenizer_of(
    template: str | None = None, special: tuple[str, ...] = (), added: tuple[str, ...] = (), ends: str = ""
) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters. `ends`: what it puts around a text, of "b" and "e"."""
    signs = sorted({*ALPHABET, *"#:;[]/<>|_\n", *"TINSHUOBADQ"})
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *signs])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|pad|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        additional_special_tokens=[*SPECIAL[3:], *special],
    )
    made.add_tokens(list(added))
    if ends:
        around = f"{'<|bos|> ' * ends.count('b')}$A{' <|eos|>' * ends.count('e')}"
        pairs = [(token, vocabulary[token]) for token in ("<|bos|>", "<|eos|>")]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=around, pair=None, special_tokens=pairs
        )
    made.chat_template = template
    return made


def folder_of(
    path: Path, tokenizer: Any, config_ends: Any = None, generation_ends: Any = None
) -> ModelConfig:
    """A model's folder whose config files name ends of sequence."""
    config = {"model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": config_ends}
    (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if generation_ends is not None:
        text = json.dumps({"eos_token_id": generation_ends})
        (path / "generation_config.json").write_text(text, encoding="utf-8")
    return ModelConfig(path=str(path))


@pytest.mark.parametrize("name", TURN_ENDS)
def test_the_end_of_a_turn_is_the_one_that_the_template_writes(name: str) -> None:
    template, end = TURN_ENDS[name]
    tokenizer = tokenizer_of(template)
    assert tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer)) == end


@pytest.mark.parametrize(
    "config_ends, generation_ends, more",
    [
        (2, None, []),
        ([2, 7], None, ["<|eot|>"]),
        (2, [2, 7], ["<|eot|>"]),
        (2, 7, ["<|eot|>"]),
        (None, [7, 6], ["<|eot|>", "<|mid|>"]),
        (2, [7, None, "6", [6]], ["<|eot|>"]),  # what is no token id is none
        (2, {"end": 7}, []),
        (20, None, []),  # an ordinary letter, of a config that was not made for this tokenizer
        (9999, None, []),
    ],
)
def test_completions_end_at_every_token_that_any_file_names(
    tmp_path: Path, config_ends: Any, generation_ends: Any, more: list[str]
) -> None:
    tokenizer = tokenizer_of(CHATML)
    model = folder_of(tmp_path, tokenizer, config_ends, generation_ends)
    ends = Turns(model, tokenizer, SamplingConfig(stop_token_ids=[25])).ends
    names = {"<|eos|>", "<|im_end|>", *more}
    assert ends == sorted({*tokenizer.convert_tokens_to_ids(list(names)), 25})


def test_the_token_that_ends_a_completion_is_trained_and_not_graded(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(CHATML)
    turns = Turns(folder_of(tmp_path, tokenizer), tokenizer, SamplingConfig(stop_token_ids=[25]))
    body = tokenizer("7 + 1", add_special_tokens=False)["input_ids"]
    for end in turns.ends:
        assert turns.text([], [*body, end]) == "7 + 1"
    assert turns.text([], body) == "7 + 1" and turns.text([], []) == ""
    assert turns.text([], [*body, 25, *body]) == "7 + 1" + tokenizer.decode([25]) + "7 + 1"


def test_a_text_that_ends_a_completion_is_left_out_of_what_is_graded(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(CHATML)
    turns = Turns(folder_of(tmp_path, tokenizer), tokenizer, SamplingConfig(stop=["\nq:"]))
    ids = tokenizer("7 + 1\nq:", add_special_tokens=False)["input_ids"]
    assert turns.text([], ids, "\nq:") == "7 + 1"
    assert turns.text([], ids, None) == "7 + 1\nq:"


def test_a_stop_token_that_the_model_lacks_is_refused() -> None:
    tokenizer = tokenizer_of()
    with pytest.raises(ConfigError, match=r"^sampling\.stop_token_ids: 999: the model's tokenizer has "):
        check_stop_tokens(SamplingConfig(stop_token_ids=[1, 999]), tokenizer)
    check_stop_tokens(SamplingConfig(stop_token_ids=[1, len(tokenizer) - 1]), tokenizer)
    for bad in ({"stop_token_ids": [-1]}, {"stop": [""]}):
        with pytest.raises(ValueError):
            SamplingConfig(**bad)  # type: ignore[arg-type]


# --- prompts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ["", "b", "be", "e"])
@pytest.mark.parametrize("template", ["{prompt}=", "<|bos|>{prompt}=", "{prompt}=<|eos|>"])
def test_a_prompt_has_one_begin_and_no_end_whatever_tokenizer_and_template_do(
    ends: str, template: str
) -> None:
    tokenizer = tokenizer_of(ends=ends)
    ((ids, _),) = TextRenderer(tokenizer, template=template).render([{"prompt": "1 + 1"}])
    begins = "b" in ends or template.startswith("<|bos|>")
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|bos|>"] * begins + list("1 + 1=")


def test_a_chat_has_one_begin_where_its_template_writes_it() -> None:
    tokenizer = tokenizer_of(LLAMA3, ends="be")
    ((ids, _),) = TextRenderer(tokenizer).render([{"prompt": "1"}])
    assert ids.count(1) == 1 and ids[0] == 1 and ids[-1] != 2


def test_a_token_that_both_begins_and_ends_is_kept_at_the_begin() -> None:
    class Both:
        bos_token_id = eos_token_id = 5

    for ids, kept in (([5, 7], [5, 7]), ([5, 5, 7, 5, 5], [5, 7]), ([5], [5]), ([5, 5], [5]), ([], [])):
        assert one_begin_no_end(ids, Both()) == kept  # type: ignore[arg-type]


def test_a_template_that_asks_for_the_time_gets_the_same_at_each_start() -> None:
    template = "{{ strftime_now('%Y %m %d') }} {{ messages[0].content }}"
    tokenizer = tokenizer_of(template)
    ((ids, _),) = TextRenderer(tokenizer).render([{"prompt": "1"}])
    assert tokenizer.decode(ids) == "2025 01 01 1"


# --- completions of others ----------------------------------------------------------------------------------


def test_completions_of_others_end_with_the_turn_or_with_the_sequence() -> None:
    tokenizer = tokenizer_of(CHATML)
    assert TextRenderer(tokenizer).end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert TextRenderer(tokenizer, template="{prompt}").end_id == tokenizer.eos_token_id


# --- thoughts -----------------------------------------------------------------------------------------------

OPENS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
CLOSED = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n\n</think>\n\n{% endif")
MARKS = {
    "qwen 3": ("<think>", "</think>"),
    "magistral": ("[THINK]", "[/THINK]"),
    "seed": ("<seed:think>", "</seed:think>"),
    "cohere": ("<|START_THINKING|>", "<|END_THINKING|>"),
}


def text_of(path: Path, tokenizer: Any, completion: str, template: str = CHATML) -> str:
    """What is graded of a completion that the model writes behind a prompt."""
    tokenizer.chat_template = template
    turns = Turns(folder_of(path, tokenizer), tokenizer, SamplingConfig())
    ((prompt, _),) = TextRenderer(tokenizer).render([{"prompt": "1"}])
    return turns.text(prompt, tokenizer(completion, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("kind", ["special", "added", "letters"])
@pytest.mark.parametrize("family", MARKS)
def test_thoughts_are_between_the_same_marks_for_every_family(tmp_path: Path, family: str, kind: str) -> None:
    begin, end = MARKS[family]
    tokenizer = tokenizer_of(
        special=(begin, end) if kind == "special" else (), added=(begin, end) if kind == "added" else ()
    )
    if kind == "letters" and not set(begin + end) <= set(tokenizer.get_vocab()):
        begin, end = MARKS["qwen 3"]
    said = text_of(tmp_path, tokenizer, f"{begin}7?{end}8<|im_end|>")
    assert said == "<think>7?</think>8"


@pytest.mark.parametrize("kind", ["special", "added", "letters"])
def test_thoughts_that_the_prompt_has_opened_are_open_in_the_completion(tmp_path: Path, kind: str) -> None:
    marks = MARKS["qwen 3"]
    tokenizer = tokenizer_of(
        special=marks if kind == "special" else (), added=marks if kind == "added" else ()
    )
    assert text_of(tmp_path, tokenizer, "7?</think>8", OPENS) == "<think>\n7?</think>8"
    assert text_of(tmp_path, tokenizer, "7 is it", OPENS) == "<think>\n7 is it", "cut off inside its thoughts"
    assert text_of(tmp_path, tokenizer, "<think>7?</think>8", OPENS) == "<think>7?</think>8"
    assert text_of(tmp_path, tokenizer, "8", CLOSED) == "8"
    assert text_of(tmp_path, tokenizer, "8", CHATML) == "8"


def test_an_answer_that_is_cut_off_inside_thoughts_is_none(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    for completion, answer in (("\\boxed{7}", None), ("\\boxed{7}</think>\\boxed{8}", "8")):
        said = text_of(tmp_path, tokenizer, completion, OPENS)
        assert extract(said, truncated=answer is None).text == answer
