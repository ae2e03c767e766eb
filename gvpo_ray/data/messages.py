"""Lists of messages, in the dialects of other systems, become lists of {"role", "content"} with text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gvpo_ray.config.base import ConfigError
from gvpo_ray.data.columns import as_text

Message = dict[str, Any]
"""One message: {"role": ..., "content": text}, and what else a chat template may read, such as tool_calls."""

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Names of roles in other dialects (ShareGPT and its kin) -> names that chat templates know."""

ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "text")

MEDIA = {
    kind + ending for kind in ("image", "video", "audio") for ending in ("", "s", "_url", "_urls", "_path")
}
"""Names of columns, and of keys of messages, that hold what is no text."""


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of messages in some dialect."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, Mapping) and any(key in message for key in ROLE_KEYS) for message in value
        )
    )


def from_json(value: Any) -> Any:
    """Return the list of messages that a text is the JSON of; any other value comes back as it is."""
    if not (isinstance(value, str) and value.lstrip()[:1] == "["):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return parsed if is_messages(parsed) else value


def ends_with_answer(value: Any) -> bool:
    """Return whether a value is a conversation, as a list or its JSON, in which the assistant speaks last."""
    messages = from_json(value)
    return is_messages(messages) and _role(messages[-1]) == "assistant"


def _role(message: Mapping[str, Any]) -> str:
    role = str(next(message[key] for key in ROLE_KEYS if key in message))
    return ROLES.get(role, role)


def as_messages(value: Any, where: str) -> list[Message]:
    """Return a list of messages in some dialect as [{"role", "content"}, ...].

    Dialects: role/content, from/value, and content in parts ([{"type": "text", "text": ...}, ...]).

    Raises:
        ConfigError: a message has no text, or a part is no text; `where` starts the message.
    """
    messages = []
    for i, message in enumerate(value):
        content = next((message[key] for key in CONTENT_KEYS if message.get(key) is not None), None)
        rest = {
            key: entry
            for key, entry in message.items()
            if key not in (*ROLE_KEYS, *CONTENT_KEYS) and entry is not None
        }
        if media := next((key for key, entry in rest.items() if key.lower() in MEDIA and entry), None):
            raise ConfigError(f"{where}[{i}] has {media}, and only text is trained")
        if content is None and not rest:
            raise ConfigError(f"{where}[{i}] has no content")
        messages.append({"role": _role(message), "content": _text(content, f"{where}[{i}]"), **rest})
    return messages


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if not isinstance(content, list):
        return as_text(content, f"{where}.content")
    texts = []
    for part in content:
        kind = "text" if isinstance(part, str) else part.get("type", "text") if isinstance(part, dict) else ""
        if kind not in ("text", "input_text", "output_text"):
            raise ConfigError(f"{where}.content has a part of type {kind or type(part).__name__}, not text")
        texts.append(as_text(part if isinstance(part, str) else part.get("text"), f"{where}.content"))
    return "".join(texts)


def of_assistant(messages: list[Message], where: str) -> list[Message]:
    """Return a completion up to the assistant's last turn: what others say behind it nobody is to write.

    Raises:
        ConfigError: it does not begin with the assistant; `where` starts the message.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise ConfigError(f"{where} has no turn of the assistant")
    if turns[0]:
        raise ConfigError(f"{where} begins with {messages[0]['role']}, not with the assistant")
    return messages[: turns[-1] + 1]


def split_answer(messages: list[Message]) -> tuple[list[Message], Any]:
    """Return a conversation without its last message of the assistant, and that message (None: it has none).

    What the assistant says last is what the policy is to write: it is the gold, or is left out.
    """
    if messages and messages[-1]["role"] == "assistant":
        return messages[:-1], messages[-1]
    return messages, None


def as_prompt(messages: list[Message]) -> str:
    """Return the text that stands for a conversation in tables and lines: what the only user message says.

    Where there is more than that, all messages are shown with their roles.
    """
    if len(messages) == 1 and messages[0]["role"] == "user":
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
