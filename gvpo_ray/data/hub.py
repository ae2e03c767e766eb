"""The Hugging Face hub is asked once whether it answers, before libraries ask it for a model or a data set.

`huggingface_hub` asks again for every file that is not on this machine: six times in half a minute where a
connection is refused, with up to a minute for each answer. `transformers` and `datasets` want several files.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.shown import visible

OFFLINE = "HF_HUB_OFFLINE"

CONNECT_S, ANSWER_S = 10.0, 30.0
"""Seconds that the hub gets to accept a connection, and to answer."""

AGAIN_S = 8.0
"""Seconds in which a hub that refuses a connection, breaks it off or fails is asked again."""

FIRST_FILES = {"model": "config.json", "dataset": "README.md"}
"""The file of a name on the hub that libraries want first."""


_out_of_reach: str | None = None
"""Why the hub does not answer, since this process does without it."""


@contextlib.contextmanager
def hub(key: str, name: str, kind: Literal["model", "dataset"]) -> Iterator[None]:
    """Let libraries load what is on the hub; where it does not answer, what they have downloaded from it.

    In that case this process, and what it starts, stay offline (HF_HUB_OFFLINE) to their end, also where the
    hub comes back: all parts of a run read the same downloaded files, and none waits for the hub again. Only
    where something is missing without the hub is the process as it was, so that a next try asks again.

    Args:
        key: where `name` stands in the run's config, for messages.
        name: a name on the hub; a file or folder of this machine is none.
        kind: of the name.

    Raises:
        ConfigError: a ConfigError in this context was caused by a hub that does not answer.
    """
    from huggingface_hub import constants

    global _out_of_reach
    if Path(name).exists():
        yield
        return
    silent = None if constants.HF_HUB_OFFLINE else silence(name, kind)
    if silent is not None:
        _out_of_reach = f"could not be reached ({silent})"
        _set_offline(True)
    why = _out_of_reach or f"is not asked ({OFFLINE} is set)"
    try:
        yield
    except ConfigError as error:
        is_absent = constants.HF_HUB_OFFLINE and _is_absence(error)
        if _out_of_reach is not None:
            _out_of_reach = None
            _set_offline(False)  # so that this process may try again
        if not is_absent:
            raise
        raise ConfigError(
            f"{key}: {name} is nothing on this machine, and the Hugging Face hub {why}: give a local folder, "
            f"or download it where there is a network, and set {OFFLINE}=1"
        ) from error
    if silent is not None:
        # not by a logger: a run loads libraries that configure loggers, and may silence those that are there
        line = f"{key}: the Hugging Face hub {why}: what was downloaded from it is used"
        print(visible(line), file=sys.stderr, flush=True)


def revision_of(name: str, kind: Literal["model", "dataset"] = "model") -> str:
    """Return the commit of a name on the hub that this machine has loaded last, which is what it stands for.

    It is "main" for a folder, and for a name of which nothing was loaded.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).exists():
        return "main"
    try:
        file = try_to_load_from_cache(name, FIRST_FILES[kind], repo_type=kind)
    except HFValidationError:
        return "main"  # no name of the hub
    return Path(file).parent.name if isinstance(file, str) else "main"


def silence(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Ask the hub for a file's head, and return why there is no answer; None: there is one, of any kind.

    An answer that the hub has a fault is none.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers, get_session, httpx  # type: ignore[attr-defined]

    try:
        url = hf_hub_url(name, FIRST_FILES[kind], repo_type=kind)
    except HFValidationError:
        return None  # the library says what is wrong with the name
    limits = httpx.Timeout(max(ANSWER_S, constants.HF_HUB_ETAG_TIMEOUT), connect=CONNECT_S)
    end, wait_s = time.monotonic() + AGAIN_S, 1.0
    while True:
        try:
            answer = get_session().head(url, headers=build_hf_headers(), timeout=limits)
            if answer.status_code < 500:
                return None
            why = f"{answer.status_code} {answer.reason_phrase}"
        except httpx.HTTPError as error:
            why = " ".join(str(error).split()) or type(error).__name__
        if time.monotonic() + wait_s > end:
            return f"{constants.ENDPOINT}: {why}"
        time.sleep(wait_s)
        wait_s *= 2


def _set_offline(on: bool) -> None:
    """Make the libraries of this process, and of those that it starts, ask the hub for nothing, or again."""
    from huggingface_hub import constants

    if on:
        os.environ[OFFLINE] = "1"
    else:
        os.environ.pop(OFFLINE, None)
    constants.HF_HUB_OFFLINE = on
    if loaded := sys.modules.get("datasets.config"):  # it has a copy
        loaded_config: Any = loaded
        loaded_config.HF_HUB_OFFLINE = on


def _is_absence(error: BaseException | None) -> bool:
    """Return whether an error goes back to a file that is not on this machine, and could not be fetched."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError)):
            return True
        error = error.__cause__
    return False
