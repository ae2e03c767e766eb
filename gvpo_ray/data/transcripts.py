"""A transcript is a completion of several turns that somebody else has recorded, turned into tokens.

Each turn of the assistant has the tokens that a policy would have sampled there: those of its text, and the
one that ends the turn. What the chat template writes in between is context, with the messages of users and
tools.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.data import PromptsConfig
from gvpo_ray.data.messages import Message
from gvpo_ray.data.rendering import TextRenderer, _absent_from, _texts_in, rendering_options

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Transcripts(TextRenderer):
    """Transcripts renders completions of several turns; its arguments are those of TextRenderer."""

    def tokens(
        self, prompt: Sequence[Message], completion: Sequence[Message], where: str
    ) -> tuple[list[int], list[bool]]:
        """Return the tokens of a completion behind its prompt, and whether each is the assistant's.

        Args:
            prompt: the messages before the completion.
            completion: messages, of which the first and the last are the assistant's.
            where: starts the message of an error.

        Raises:
            ConfigError: there is no chat template, or it does not keep what was said in earlier turns.
        """
        if self._template is not None:
            raise ConfigError(f"{where}: a conversation of several turns needs the tokenizer's chat template")
        messages = self._messages({"messages": [*prompt, *completion]})
        written = "".join(_texts_in(messages))
        mark, here = _absent_from(written), _absent_from(written, 1)
        messages = [self._marked_message(message, mark) for message in messages]
        end_id = self.end_id
        end = "" if end_id is None else str(self._tokenizer.convert_ids_to_tokens(end_id))
        ids: list[int] = []
        mask: list[bool] = []
        first = len(messages) - len(completion)
        held = self._chat(messages[:first])
        for place in range(first, len(messages)):
            if messages[place]["role"] != "assistant":
                continue
            before, after = self._chat(messages[:place]), self._chat(messages[: place + 1])
            if not before.startswith(held) or not after.startswith(before):
                raise ConfigError(
                    f"{where}: the chat template writes an earlier turn in another way once the conversation "
                    "goes on, so that no policy has sampled what it writes"
                )
            text, is_ended, _ = after[len(before) :].rpartition(end) if end else ("", "", "")
            if not is_ended:  # the template ends no turns: what it writes behind one is the next one's
                own_message = {**messages[place], "content": messages[place]["content"] + here}
                text = self._chat([*messages[:place], own_message])[len(before) :].partition(here)[0]
            context = self._without_marks(before[len(held) :], mark)
            own = [*self._without_marks(text, mark), *([] if end_id is None else [end_id])]
            ids += context + own
            mask += [False] * len(context) + [True] * len(own)
            held = before + text + is_ended
        return ids, mask


def transcripts_of(config: PromptsConfig, tokenizer: PreTrainedTokenizerBase, key: str) -> Transcripts:
    """Return the transcripts of a data set; `key` names the section `config` in messages."""
    return Transcripts(tokenizer, **rendering_options(config), key=key)
