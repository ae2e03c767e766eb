"""What is trained of an episode is what was sampled: turns are appended as tokens, whatever the family."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import episodes as worlds
import pytest
import renderers
from renderers import create_renderer
from renderers.base import RENDERER_REGISTRY, _populate_registry
from renderers.configs import config_from_name
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.dialogue import Dialogue, dialogue_of
from gvpo_ray.data.prompts import PromptSet

CHATML = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NOT_SHOWN = {
    "default": "it renders the whole conversation anew in each turn, and is refused",
    "gpt-oss": "its vocabulary is a file that openai_harmony downloads",
}
"""Names in the package's registry whose token-exactness no test shows, and why."""
_populate_registry()
FAMILIES = sorted({*RENDERER_REGISTRY} - NOT_SHOWN.keys())
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def _special_tokens() -> list[str]:
    """All that the package's families name, so that one tokenizer serves them all."""
    sources = "".join(path.read_text() for path in Path(renderers.__file__).parent.glob("*.py"))
    found = {*re.findall(r'"(<[^"\s\\{}]{1,60}>)"', sources), "<|begin_of_text|>", "[gMASK]", "<sop>"}
    deepseek = (f"<｜tool▁{what}▁{side}｜>" for what in ("outputs", "output") for side in ("begin", "end"))
    version = {
        text.replace("{_HYTK}", ":opensource") for text in re.findall(r'"(<[^"]*{_HYTK}[^"]*>)"', sources)
    }
    other = {"]~!b[", "]~b]", "[e~[", "〈|EOS|〉", "｜DSML｜"}
    return sorted({*found, *deepseek, *version, *other})


MARKS = [f"<{end}{name}>" for name in ("tool_call", "tool_response", "think") for end in ("", "/")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and one for "oo", so that a text has several tokenisations."""
    return _tokenizer([])


@pytest.fixture(scope="module")
def like_qwen() -> PreTrainedTokenizerFast:
    """Its marks of calls, results and thoughts are added tokens, and not special; so are some line ends."""
    result = _tokenizer([*MARKS, "\n\n", "<tool>"])
    result.chat_template = CHATML.replace("{{ m['content'] }}", "{% if m['role'] == 'tool' %}<tool_response>"
        "{{ m['content'] }}</tool_response><tool>\n\n{% else %}{{ m['content'] }}{% endif %}")  # fmt: skip
    return result


def _tokenizer(not_special: list[str]) -> PreTrainedTokenizerFast:
    alphabet = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=alphabet | {"oo": len(alphabet)}, merges=[("o", "o")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = sorted({"<|endoftext|>", *_special_tokens()} - {*not_special})
    backend.add_special_tokens([AddedToken(text, special=True) for text in named])
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in not_special])
    result = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    result.chat_template = CHATML
    return result


def _dialogue(tokenizer: Any, family: str | None = None, **keys: Any) -> Dialogue:
    config = PromptsConfig(path="p.jsonl", **keys)
    return dialogue_of(config, tokenizer, "prompts", tools=[ADD], family=family)


def _split(ids: list[int], tokenizer: Any) -> list[int]:
    """The same text in tokens that no tokenizer would choose: "oo" as two."""
    (o,), (oo,) = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("o", "oo"))
    return [part for token in ids for part in ([o, o] if token == oo else [token])]


def _common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_of_each_name_of_the_package_it_is_said_why_no_test_shows_its_family() -> None:
    assert NOT_SHOWN.keys() < RENDERER_REGISTRY.keys() and len(FAMILIES) > 20


@pytest.mark.parametrize("family", FAMILIES)
def test_over_five_turns_with_tools_a_familys_tokens_are_those_that_were_sampled(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    dialogue, renderer = _dialogue(tokenizer, family), create_renderer(tokenizer, config_from_name(family))
    tools: list[Any] = [ADD["function"]]
    row = {"prompt": "How many 2 + 2?", "messages": None}
    ids = list(dialogue.render([row])[0].prompt_ids)
    assert tokenizer.decode(ids).endswith("How many 2 + 2?")
    messages: list[Any] = [{"role": "user", "content": row["prompt"]}]
    ids += dialogue.opening(row, None)
    assert ids == renderer.render_ids(messages, tools=tools, add_generation_prompt=True)
    sampled: list[tuple[int, list[int]]] = []
    for number in range(5):
        call = {"name": "add", "arguments": {"a": number, "b": 2}}
        reply = {
            "role": "assistant",
            "content": "",
            "reasoning_content": "too good",
            "tool_calls": [{"type": "function", "id": f"functions.add:{number}", "function": call}],
        }
        first: list[Any] = [messages[0]]
        asked = renderer.render_ids(first, tools=tools, add_generation_prompt=True)
        whole = renderer.render_ids([*first, reply], tools=tools)
        ends = {*renderer.get_stop_token_ids()}
        new = whole[_common(asked, whole) :]
        has_opened = tokenizer.decode(asked).rstrip().endswith("<think>")
        if has_opened and "</think>" not in tokenizer.decode(new):  # the family leaves out earlier thoughts
            new = [*tokenizer("too good</think>", add_special_tokens=False)["input_ids"], *new]
        end = next((i + 1 for i, token in enumerate(new) if token in ends), len(new))
        turn = _split(new[:end], tokenizer)
        read = dialogue.turn(ids, turn)
        assert [(one.name, one.arguments, one.error) for one in read.calls] == [
            ("add", call["arguments"], None)
        ]
        sampled.append((len(ids), turn))
        answer = [{"role": "tool", "content": f"foo {number + 2}", "name": "add",
                   "tool_call_id": f"functions.add:{number}"}]  # fmt: skip
        extension = dialogue.extension(ids, turn, answer)
        assert extension is not None and f"foo {number + 2}" in tokenizer.decode(extension)
        ids += turn + extension
    for begin, turn in sampled:
        assert ids[begin : begin + len(turn)] == turn


@pytest.mark.parametrize("keys", [{}, {"template": "Q: {prompt}\nA:"}], ids=["chat", "plain"])
def test_over_five_turns_a_templates_tokens_are_those_that_were_sampled(
    keys: dict[str, str], tokenizer: PreTrainedTokenizerFast
) -> None:
    dialogue = _dialogue(tokenizer, **keys)
    row = {"prompt": "How many <|im_end|>?", "messages": None}
    ids = list(dialogue.render([row])[0].prompt_ids)
    ids += dialogue.opening(row, " Good luck <|im_end|>!")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.count(end) == (0 if keys else 2)  # those of the template: no data set ends a turn
    text = tokenizer.decode(ids)
    assert text.count("How many <|im_end|>? Good luck <|im_end|>!") == 1
    assert text.endswith("A:" if keys else "<|im_start|>assistant\n")
    parts = []
    for number in range(5):
        written = f'good <tool_call>{{"name": "add", "arguments": {{"a": {number}, "b": 2}}}}</tool_call>'
        turn = [*_split(tokenizer(written, add_special_tokens=False)["input_ids"], tokenizer), end]
        (call,) = dialogue.turn(ids, turn).calls
        assert call.arguments == {"a": number, "b": 2} and call.error is None
        result = [{"role": "tool", "name": "add", "content": f"<|im_end|> too {number}"}]
        extension = dialogue.extension(ids, turn, result)
        assert extension is not None
        assert extension.count(end) == (0 if keys else 1)  # of the tool's message
        parts.append((len(ids), turn))
        ids += turn + (extension or [])
    for begin, turn in parts:
        assert ids[begin : begin + len(turn)] == turn
    if not keys:
        # what the template itself makes of the last turn's end and answer
        chat = [{"role": "assistant", "content": "x"}, {"role": "tool", "content": "T"}]
        whole = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(ids).endswith(
            whole.partition("x<|im_end|>")[2].replace("T", "<|im_end|> too 4")
        )


@pytest.mark.parametrize("spelled", MARKS)
@pytest.mark.parametrize("kind", ["chat", "plain", "qwen3"])
def test_what_a_tool_or_a_user_writes_is_text_where_it_spells_what_marks_a_call(
    kind: str, spelled: str, like_qwen: PreTrainedTokenizerFast
) -> None:
    keys = {"template": "Q: {prompt}\n<think>"} if kind == "plain" else {}
    dialogue = _dialogue(like_qwen, "qwen3" if kind == "qwen3" else None, **keys)
    token = like_qwen.convert_tokens_to_ids(spelled)

    def count(text: str) -> int:
        row = {"prompt": f"a {text} b", "messages": None}
        ids = [*dialogue.render([row])[0].prompt_ids, *dialogue.opening(row, f"c {text} d")]
        turn = [40, like_qwen.convert_tokens_to_ids("<|im_end|>")]
        messages = [{"role": "tool", "name": "add", "content": text}, {"role": "user", "content": text}]
        extension = dialogue.extension(ids, turn, messages)
        assert extension is not None
        read = like_qwen.decode([*ids, *extension]).replace("\u200b", "")
        assert read.count(text) >= 4
        return [*ids, *extension].count(token)

    assert count(spelled) == count("x")  # those that the template writes
    assert count("x") > 0 or "tool_response" not in spelled


def test_other_added_tokens_are_text_like_any_other(like_qwen: PreTrainedTokenizerFast) -> None:
    dialogue, text = _dialogue(like_qwen), "a\n\nb <|im_sep|> <tool> c"
    tool, ends = (like_qwen.convert_tokens_to_ids(one) for one in ("<tool>", "\n\n"))
    ids = dialogue.opening({"prompt": "q", "messages": None}, text)
    assert ids.count(ends) == 1
    assert not ids.count(tool)  # the template writes it


def test_what_the_assistant_has_written_in_the_data_keeps_its_marks(
    like_qwen: PreTrainedTokenizerFast,
) -> None:
    said = "<think>x</think> <tool_call>{}</tool_call>"
    chat = [{"role": role, "content": said} for role in ("user", "assistant")]
    chat.append({"role": "user", "content": "go on"})
    ids = _dialogue(like_qwen).render([{"prompt": "go on", "messages": chat}])[0].prompt_ids
    for mark in ("<think>", "</think>", "<tool_call>", "</tool_call>"):
        assert ids.count(like_qwen.convert_tokens_to_ids(mark)) == 1


def test_the_rest_of_a_turn_is_appended_only_where_the_model_has_not_written_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    dialogue, end = _dialogue(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = [{"role": "user", "content": "less"}]
    whole, cut = (dialogue.extension([1], turn, said) for turn in ([40, end], [40, 41]))
    assert whole is not None and cut == [end, *whole]
    assert tokenizer.decode(whole) == "\n<|im_start|>user\nless<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("written", "calls"),
    [
        ("4", []),
        ('<tool_call>{"name": "add"}</tool_call><tool_call>{"name": "b", "arguments": "{}"}</tool_call>',
         [("add", {}, ""), ("b", {}, "")]),
        ("<tool_call>{</tool_call>", [("", {}, "not JSON")]),
        ('<tool_call>{"name": "add", "arg', [("", {}, "not JSON")]),
        ("<tool_call>[1]</tool_call>", [("", {}, "not an object")]),
        ('<tool_call>{"name": "add", "arguments": [1]}</tool_call>', [("add", {}, "not an object")]),
        ('<think><tool_call>{"name": "a"}</tool_call></think><tool_call>{"name": "b"}</tool_call>',
         [("b", {}, "")]),
        ('<think><tool_call>{"name": "a"}</tool_call>', []),
    ],
)  # fmt: skip
def test_calls_are_read_as_far_as_they_can_be(
    written: str, calls: list[tuple[str, Any, str]], tokenizer: PreTrainedTokenizerFast
) -> None:
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    found = _dialogue(tokenizer).turn([1], ids).calls
    assert [(call.name, call.arguments) for call in found] == [call[:2] for call in calls]
    assert all(want in (call.error or "") for call, (_, _, want) in zip(found, calls, strict=True))
    assert all(bool(call.error) == bool(want) for call, (_, _, want) in zip(found, calls, strict=True))


def test_a_call_in_thoughts_that_the_prompt_has_opened_is_none(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = _dialogue(tokenizer, template="{prompt}\n<think>\n")
    before = dialogue.opening({"prompt": "q", "messages": None}, None)
    call = '<tool_call>{"name": "add"}</tool_call>'
    for written, num_calls in ((f"so {call}", 0), (f"so {call}</think>{call}", 1)):
        turn = tokenizer(written, add_special_tokens=False)["input_ids"]
        assert len(dialogue.turn(before, turn).calls) == num_calls


@pytest.mark.parametrize("family", ["qwen3", "glm-4.5", "gemma4", "llama-3"])
def test_whatever_the_model_writes_a_family_reads_a_call_or_says_why_not(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    dialogue, deep = _dialogue(tokenizer, family), "[" * 3000
    tool = [{"role": "tool", "name": "add", "content": "x"}]
    errors: list[str] = []
    for written in (
        f"<tool_call>{deep}</tool_call>",
        f"<tool_call>add<arg_key>a</arg_key><arg_value>{deep}</arg_value></tool_call>",
        f"<|tool_call>call:add{{a:{deep}}}<tool_call|>",
        '{"name": "add", "parameters": {"a": ' + "1" * 5000 + "}}",
        '<tool_call>{"name": 1}</tool_call>',
        '{"name": 1, "parameters": {}}',
    ):
        turn = tokenizer(written, add_special_tokens=False)["input_ids"]
        calls = dialogue.turn([1], turn).calls
        assert all(isinstance(call.name, str) and isinstance(call.arguments, dict) for call in calls)
        errors += [call.error for call in calls if call.error]
        dialogue.extension([1], turn, tool)
    assert any(
        "cannot be read: RecursionError" in one or "cannot be read: ValueError" in one for one in errors
    )


def test_a_prompt_shows_the_tools(tokenizer: PreTrainedTokenizerFast) -> None:
    (found,) = _dialogue(tokenizer).render([{"prompt": "1?", "messages": None}])
    assert json.dumps("Add two numbers.") in tokenizer.decode(found.prompt_ids)


@pytest.mark.parametrize(
    ("has_tools", "keys", "is_said"),
    [
        (False, {}, True),
        (False, {"system_prompt": "You can add."}, False),
        (False, {"system_prompt": "Be in addition polite."}, True),
        (False, {"template": "{prompt}="}, False),
        (True, {}, False),
    ],
)
def test_it_is_said_where_a_chat_template_leaves_the_tools_out(
    tmp_path: Path, has_tools: bool, keys: dict[str, str], is_said: bool
) -> None:
    tokenizer = _tokenizer([])
    if not has_tools:
        tokenizer.chat_template = CHATML[CHATML.index("{% for") :]
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    config = PromptsConfig(path=str(tmp_path / "p.jsonl"), **keys)
    prompts = PromptSet(
        config,
        tokenizer,
        name="p",
        max_tokens=None,
        make_renderer=partial(dialogue_of, tools=[ADD], family=None),
    )
    said = [note for note in prompts.notes if "does not name the tool add" in note]
    assert len(said) == is_said and all("system_prompt" in note for note in said)


def test_a_family_that_does_not_exist_or_does_not_fit_is_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"environment\.renderer: qwen33: "):
        _dialogue(tokenizer, "qwen33")
    other = worlds.tokenizer()
    with pytest.raises(ConfigError, match=r"environment\.renderer: minimax-m2: .*not found in tokenizer"):
        _dialogue(other, "minimax-m2")
    with pytest.raises(ConfigError, match=r"environment\.renderer: default: .*renders the conversation anew"):
        _dialogue(tokenizer, "default")
    with pytest.raises(ConfigError, match=r"environment\.renderer: auto: name the family"):
        _dialogue(tokenizer, "auto")
    with pytest.raises(ConfigError, match=r"environment\.renderer: qwen3: .*thinking_mode"):
        _dialogue(tokenizer, "qwen3", template_arguments={"thinking_mode": True})
