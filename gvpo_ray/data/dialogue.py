"""A dialogue turns a conversation of several turns into tokens, and what the model writes into tool calls.

Tokens that are there are never rendered again: a turn of a tool or of an environment is appended to what the
model has sampled, so that what is trained is what was sampled.

    prompt_ids   everything up to the last user message's content    `render`, the same for a whole group
    opening      what the environment adds to that message, and the rest of it up to the model's turn
    turn         sampled
    extension    what tools or the environment answer, up to the model's next turn
    turn …

Three classes do it: ChatDialogue with any chat template, FamilyDialogue with a model family's class of the
package `renderers`, and PlainDialogue with a template of the config.
"""

from __future__ import annotations

import abc
import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.calls import Call, call_of, well_formed
from gvpo_ray.data.rendering import Rendered, TextRenderer, _absent_from, _any_of, _texts_in
from gvpo_ray.data.turns import one_begin_no_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

ASSISTANT = "0"
"""Content of the assistant's message in a conversation that is rendered only for what comes behind it."""


class Turn(NamedTuple):
    """A Turn is what the model has written in one call of it."""

    text: str
    """Without thoughts, tool calls and the token that ends it."""
    calls: list[Call]


class Dialogue(TextRenderer, abc.ABC):
    """A Dialogue renders the prompts of episodes, and their turns.

    Args:
        tokenizer: the model's.
        tools: JSON schemas of the tools, as {"type": "function", "function": {...}}.
        arguments: keyword arguments of TextRenderer.
    """

    stop_token_ids: Sequence[int] = ()
    """Tokens that end a turn, beside those that engines know (data/turns.py)."""
    vocab_size: int | None = None
    """Tokens that the model has an embedding for; None: all of the tokenizer's."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tools: Sequence[dict[str, Any]], **arguments: Any
    ) -> None:
        super().__init__(tokenizer, **arguments)
        self._tools = list(tools)
        self._only_special = self._special
        self._special_ids |= self._marks()
        self._special = _any_of(self._special_ids)

    def _marks(self) -> dict[str, int]:
        """Return the tokens, beside the special ones, with which a model marks calls, results and thoughts.

        Families such as Qwen have them as added tokens that are not special. The template writes them, and
        the model; a tool that spells one writes text. Other added tokens, such as Gemma's line ends, are text
        like any other.
        """
        template = self._tokenizer.chat_template or ""
        written = template if isinstance(template, str) else "".join(template.values())
        return {
            text: i
            for i, token in self._tokenizer.added_tokens_decoder.items()
            if (text := str(token)) in MARKS or (text.strip() and text in written)
        }

    def render(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered]:
        """Render prompts up to the end of their last user message's content."""
        return [Rendered(self._halves(row)[0], {}) for row in rows]

    def opening(self, row: Mapping[str, Any], said: str | None) -> list[int]:
        """Return the tokens between the prompt and the model's first turn.

        Args:
            row: the prompt, as for `render`.
            said: what the environment appends to the last user message.
        """
        _, rest = self._halves(row)
        return [*self._plain_text(said or ""), *rest]

    def unshown(self, row: Mapping[str, Any]) -> list[str]:
        """Return the names of tools of which a prompt says nothing, as its chat template leaves them out."""
        return []

    @abc.abstractmethod
    def _halves(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt, and those behind its last user message's content."""

    @abc.abstractmethod
    def extension(
        self, before: Sequence[int], turn: Sequence[int], messages: Sequence[Message]
    ) -> list[int] | None:
        """Return the tokens of further messages behind a turn, up to the model's next one.

        Args:
            before: all tokens before the turn.
            turn: what the model has sampled, the token that ends it included if there is one.
            messages: of the roles "tool" and "user".

        Returns:
            The tokens to append; None: this family's conversations cannot go on from here.
        """

    def turn(self, before: Sequence[int], turn: Sequence[int]) -> Turn:
        """Read what the model has written.

        A call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>, the form of Hermes and Qwen; in
        thoughts it is none, also where it is the prompt that has opened them.
        """
        end = self.end_id
        body = turn[:-1] if turn and turn[-1] in {end, self._tokenizer.eos_token_id} else turn
        opened = self.text(before[-16:], with_special=True).rstrip().endswith("<think>")
        written = "<think>" * opened + self.text(body, with_special=True)
        written = written.rpartition("</think>")[2]
        if "<think>" in written:
            return Turn("", [])
        return Turn(CALL.sub("", written).strip(), [_call(found[1]) for found in CALL.finditer(written)])

    def _spelled(self, role: str) -> re.Pattern[str]:
        """Leave the assistant's own calls and thoughts, and those that instructions name, as they are."""
        return self._special if role in ("user", "tool") else self._only_special

    def _plain_text(self, text: str) -> list[int]:
        """Tokenise a text of the environment, in which special tokens are text."""
        if self._special.search(text):
            return self._plain(text)
        return self._ids([text], add_special_tokens=False)[0] if text else []


MARKS = {f"<{end}{name}>" for name in ("tool_call", "tool_response", "think") for end in ("", "/")}
"""Marks of calls, results and thoughts in most families."""

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
"""A tool call, or the beginning of one that has no end."""


def _call(text: str) -> Call:
    """Read the JSON of a call."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Call("", {}, f"the tool call is not JSON: {error}")
    if not isinstance(call, dict) or not isinstance(name := call.get("name"), str):
        return Call("", {}, 'the tool call is not an object with a "name"')
    arguments = call.get("arguments", call.get("parameters", {}))
    if isinstance(arguments, str):  # OpenAI's form
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as error:
            return call_of(name, {}, f"the arguments are not JSON: {error}")
    return call_of(name, arguments)


class PlainDialogue(Dialogue):
    """A PlainDialogue appends what the environment writes as it is, behind a template of the config."""

    def _halves(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        assert self._template is not None
        head, _, tail = self._template.rpartition("{prompt}")
        mark = _absent_from(head + row["prompt"])
        prompt = self._marked(row["prompt"], mark)
        ids = self._with_ends(self._without_marks(head.replace("{prompt}", prompt) + prompt, mark))
        rest = self._ids([tail], add_special_tokens=False)[0] if tail else []
        return one_begin_no_end(ids, self._tokenizer), rest

    def extension(
        self, before: Sequence[int], turn: Sequence[int], messages: Sequence[Message]
    ) -> list[int] | None:
        """Append texts as they are, and results of tools between <tool_response> and </tool_response>."""
        mark = _absent_from("".join(message["content"] for message in messages))
        parts = [(message["role"], self._marked(message["content"], mark)) for message in messages]
        text = "".join(
            f"<tool_response>\n{content}\n</tool_response>\n" if role == "tool" else content
            for role, content in parts
        )
        return self._without_marks(text, mark)


class ChatDialogue(Dialogue):
    """A ChatDialogue renders with the tokenizer's chat template.

    A template shows how it goes on behind an assistant's message when it renders a conversation that has one.
    """

    def unshown(self, row: Mapping[str, Any]) -> list[str]:
        """Return the names of tools of which a prompt says nothing, as its chat template leaves them out.

        Its system message may say them.
        """
        shown = self._halves(row)
        if not self._tools or shown != self._halves(row, has_tools=False):
            return []
        text = str(self._tokenizer.decode([i for half in shown for i in half]))
        names = [str(tool["function"]["name"]) for tool in self._tools]
        return [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]

    def _halves(self, row: Mapping[str, Any], has_tools: bool = True) -> tuple[list[int], list[int]]:
        given = self._messages(row)
        written = "".join(_texts_in(given))
        mark, here = _absent_from(written), _absent_from(written, 1)
        messages = [self._marked_message(message, mark) for message in given]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
        messages[last]["content"] += here
        head, found, tail = self._chat(messages, self._tools if has_tools else None).rpartition(here)
        if not found:
            raise ConfigError(f"{self._key}: the chat template leaves out the last user message")
        ids = one_begin_no_end(self._without_marks(head, mark), self._tokenizer)
        return ids, self._without_marks(tail, mark)

    def extension(
        self, before: Sequence[int], turn: Sequence[int], messages: Sequence[Message]
    ) -> list[int] | None:
        """Return what the template writes behind an assistant's message, less what the model wrote of it.

        Raises:
            ConfigError: the template fails, or leaves out the assistant's message.
        """
        written = "".join(message["content"] for message in messages)
        mark, here = _absent_from(written), _absent_from(written, 1)
        chat = [
            {"role": "user", "content": ASSISTANT},
            {"role": "assistant", "content": ASSISTANT + here},
            *({**message, "content": self._marked(message["content"], mark)} for message in messages),
        ]
        _, found, rest = self._chat(chat).rpartition(here)
        if not found:
            raise ConfigError("environment.renderer: the chat template leaves out the assistant's turns")
        ids = self._without_marks(rest, mark)
        # the token that ends the turn is there already, as the model has sampled it
        return ids[1:] if ids and turn and ids[0] == turn[-1] else ids


NO_WIDTH = "\u200b"
"""A space that breaks the special tokens which a text spells, as a family tokenises all that it renders."""


NO_FAMILIES = {
    "auto": "name the family",
    "default": "it renders the conversation anew in each turn, so what is trained would not be what was "
    "sampled; leave the key out, and the tokenizer's chat template is only ever extended",
}
"""Names that `renderers` has for no family, and why they are refused."""


class FamilyDialogue(Dialogue):
    """A FamilyDialogue renders with the class that the package `renderers` has for a model family.

    Args:
        tokenizer: the model's.
        tools: JSON schemas of the tools.
        family: the family's name in `renderers`, such as "qwen3".
        arguments: keyword arguments of TextRenderer; `template_arguments` are the family's.

    Raises:
        ConfigError: no such family, the tokenizer is not of this family, or an argument is not of its.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[dict[str, Any]],
        family: str,
        **arguments: Any,
    ) -> None:
        super().__init__(tokenizer, tools, **arguments)
        if family in NO_FAMILIES:
            raise ConfigError(f"environment.renderer: {family}: {NO_FAMILIES[family]}")
        from renderers import create_renderer
        from renderers.configs import config_from_name

        options = dict(self._arguments)
        try:
            of_family = type(config_from_name(family))
            if "thinking_retention" in of_family.model_fields:
                # thoughts of earlier turns stay where they were sampled
                options["thinking_retention"] = "all"
            self._renderer = create_renderer(tokenizer, of_family(**options))
        # a tokenizer of another family fails an assertion, and OpenAI's library has an error of its own
        except Exception as error:
            why = " ".join(str(error).split())[:300]
            raise ConfigError(f"environment.renderer: {family}: {type(error).__name__}: {why}") from error
        self._specs: list[Any] = [tool["function"] for tool in self._tools]
        self.stop_token_ids = self._renderer.get_stop_token_ids()

    def _halves(self, row: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        messages: list[Any] = [self._marked_message(message, NO_WIDTH) for message in self._messages(row)]
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=len(messages) - 1)
        found = self._renderer.render(messages, tools=self._specs or None, add_generation_prompt=True)
        of_last = [i for i, index in enumerate(found.message_indices) if index == last]
        content = [i for i in of_last if found.is_content[i]] if found.is_content else of_last
        end = (content or of_last)[-1] + 1
        return found.token_ids[:end], found.token_ids[end:]

    def extension(
        self, before: Sequence[int], turn: Sequence[int], messages: Sequence[Message]
    ) -> list[int] | None:
        """Bridge to the next turn as the family does."""
        harmless: list[Any] = [self._marked_message(message, NO_WIDTH) for message in messages]
        there = [*before, *turn]
        try:
            found = self._renderer.bridge_to_next_turn(
                list(before), list(turn), harmless, tools=self._specs or None
            )
        except Exception:  # some families read the turn once more, which the model may have written anyhow
            return None
        if found is None or found.token_ids[: len(there)] != there:
            return None
        return [*found.token_ids[len(there) :]]

    def turn(self, before: Sequence[int], turn: Sequence[int]) -> Turn:
        """Read what the model has written, as the family's parser does."""
        try:
            found = self._renderer.parse_response(
                list(turn), tools=self._specs or None, prompt_ids=list(before) or None
            )
        except Exception as error:  # of what the model wrote, such as brackets in thousands or a long number
            why = f"the tool call cannot be read: {type(error).__name__}: {str(error)[:300]}"
            return Turn("", [call_of("", {}, why)])
        calls = []
        for call in found.tool_calls:
            is_good = call.status == "ok" and isinstance(call.arguments, dict)
            wrong = None if is_good else f"the tool call cannot be read ({call.status}): {call.raw[:200]}"
            calls.append(call_of(call.name if isinstance(call.name, str) else "", call.arguments, wrong))
        return Turn(well_formed(found.content.strip()), calls)


def dialogue_of(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    key: str,
    *,
    tools: Sequence[dict[str, Any]],
    family: str | None,
) -> Dialogue:
    """Return the dialogue of a data set; `key` names the section `config` in messages.

    Args:
        config: with a `template`, a PlainDialogue.
        tokenizer: the model's.
        key: of the section.
        tools: JSON schemas of the tools.
        family: name of a model family in `renderers`; None: the tokenizer's chat template.

    Raises:
        ConfigError: the family or its arguments are wrong, or there is neither a template nor a chat
            template.
    """
    arguments: dict[str, Any] = {
        "template": config.template,
        "system_prompt": config.system_prompt,
        "template_arguments": config.template_arguments,
        "key": key,
    }
    if config.template is not None:
        return PlainDialogue(tokenizer, tools, **arguments)
    if family is not None:
        return FamilyDialogue(tokenizer, tools, family, **arguments)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{key}.template: required, because the tokenizer has no chat template; for example "
            '"Question: {prompt}\\nAnswer:"'
        )
    return ChatDialogue(tokenizer, tools, **arguments)
