"""Nothing that a run shows holds a secret, or a character that acts on a terminal.

Secrets of the config, of the environment and of URLs become "…". `hide` is for data (configs, parameters,
settings), `mask` for text (errors, reasons, events, pages), `visible` for text that goes to a terminal.
The only file that keeps secrets is run_dir/config.yaml, because a resumed run needs them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

from pydantic import BaseModel

MASK = "…"
"""The text that stands for a secret."""

SECRETS = re.compile(
    r"password|passwd|passphrase|passcode|secret|credential|authorization|apikey"
    r"|(^| )(api|access|auth|bearer|refresh|session|private|hf|hub|id|github|wandb) ?(key|token)s?( |$)"
)
"""What makes a name, as `_words` writes it, one of a secret, in data and in text."""

SECRETS_IN_DATA = re.compile(
    r"(^| )(pwd|creds?|cookies?|bearer)$|(^|(^| )(user|db|database|smtp|proxy|login|root|admin) ?)pass$"
)
"""The same in data alone: a text may be about twelve cookies, and `pass` ends other names, as in per_pass."""

AMBIGUOUS = re.compile(r"(^| )(key|token|auth|sig|signature)$|^(keys|tokens)$")
"""Ends of names of secrets, and of other names as well, such as the `key` of a sort."""


def is_secret(name: object) -> bool:
    """Return whether a key of this name may hold a secret, such as api_key, hf_token or X-Api-Key."""
    return _is_surely_secret(name) or AMBIGUOUS.search(_words(name)) is not None


def _is_surely_secret(name: object) -> bool:
    words = _words(name)
    return (SECRETS.search(words) or SECRETS_IN_DATA.search(words)) is not None


def _words(name: object) -> str:
    """Write a name in lower-case words: hf_token, hfToken and HF-Token are "hf token"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[^A-Za-z0-9]+", " ", str(name)).strip().lower()


# ---------------------------------------------------------------------------------------------- what is known

_known: set[str] = set()
_pattern: re.Pattern[str] | None = None
_longest = 1 << 12
"""Characters of the longest secret, and no fewer than a private key has."""


def know(data: Any) -> None:
    """Remember the secrets of a config or a part of one: `mask` hides them anywhere from now on.

    Each process remembers for itself. Those of its environment (HF_TOKEN, WANDB_API_KEY) come along.
    """
    global _pattern, _longest
    _known.update(_values(data.model_dump() if isinstance(data, BaseModel) else data))
    # not paths, such as SSH_AUTH_SOCK's and PWD's, nor words such as `token` in RAY_AUTH_MODE
    environment = {name: text for name, text in os.environ.items() if text[:1] != "/" and len(text) >= 8}
    _known.update(_values(environment))
    # The longest first: one secret may begin with another. A short one counts as a word of its own alone.
    texts = sorted({form for text in _known for form in _forms(text)}, key=len, reverse=True)
    parts = [re.escape(text) if len(text) >= 8 else rf"(?<!\w){re.escape(text)}(?!\w)" for text in texts]
    _pattern = re.compile("|".join(parts)) if parts else None
    _longest = max(_longest, *map(len, texts[:1]), 0)


def _forms(text: str) -> Iterable[str]:
    """Return how a text may be spelled: as it is, decoded from or for a URL, as repr and JSON write it."""
    written = (repr(text), json.dumps(text), json.dumps(text, ensure_ascii=False))
    return {text, unquote(text), quote(text, safe=""), *(form[1:-1] for form in written)}


def _values(data: Any, name: object = "") -> Iterator[str]:
    """Yield the secret values in nested data."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            # everything below a secret's name is secret: {auth: {user: …, bearer: …}}
            yield from _values(value, name if is_secret(name) else key)
    elif isinstance(data, (list, tuple, set)):
        for own_name, value in _named(data, name):
            yield from _values(value, own_name)
    elif isinstance(data, (str, int)) and not isinstance(data, bool):
        if is_secret(name):
            # "Bearer abc" is also looked for as "abc"
            spellings = {str(data).strip(), str(data).rpartition(" ")[2]}
            yield from (text for text in spellings if _is_distinct(text, name))
        if isinstance(data, str):
            yield from (secret for secret in _in_urls(data) if len(secret) >= 4)


def _named(data: Iterable[Any], name: object) -> Iterator[tuple[object, Any]]:
    """Yield the values of a list with their names: a flag before it, as in --api-key abc, or the list's."""
    before: Any = ""
    for value in data:
        is_of_flag = re.fullmatch(r"--?[A-Za-z][\w-]*", str(before)) and str(value)[:1] != "-"
        if is_of_flag and USER.fullmatch(f"{before} {value}"):
            before = "credentials"
        yield before if is_of_flag else name, value
        before = value


def _is_distinct(value: str, name: object) -> bool:
    """Return whether a value is hidden outside its key too, where it could be a word of any text."""
    if _is_surely_secret(name):
        return len(value) >= 4
    # words, and names of columns such as gold_answer, are what a `key` may hold; a `token` rarely is a word
    shortest = 8 if _words(name) in ("token", "tokens") else 16
    is_mixed = re.fullmatch(r"(?=.*[0-9A-Z])[\w.+/=~-]{6,}", value)
    return is_mixed is not None or re.fullmatch(rf"[a-z-]{{{shortest},}}", value) is not None


def _in_urls(text: str) -> Iterator[str]:
    for found in CREDENTIALS.finditer(text):
        user, _, password = found[0].removesuffix("@").partition(":")
        yield password or user
    for begin, end in _assigned(text):
        yield text[begin:end]


# ---------------------------------------------------------------------------------------------- what is shown

CREDENTIALS = re.compile(
    r"(?<=://)(?:[^/\s\"'<>?#]+@(?:[^\s\"'<>?#]*@)?|[^/\s\"'<>?#:@]+:(?!\d+[/?#])[^\s\"'<>@]{1,1024}@)"
)
"""User and password of a URL; a password may hold a slash or an @ that nobody encoded. The limit keeps the
time linear on a model's text, in which every :// may be followed by all the rest."""

QUERY = re.compile(r"(?P<before>[?&;](?P<name>[\w.-]+)=)(?P<value>[^&\s\"'<>\\#]+)")
"""A parameter of a URL, as in ?key=abc."""

ASSIGNED = re.compile(
    r"(?P<before>(?P<name>(?<![\w.-])[\w.-]+)\\?[\"']?\s?(?:=|:(?!//))\s?[ \t]*(?P<quote>\\?[\"'])?)"
    r"(?P<value>(?(quote)[^\\\"']+|(?:(?i:bearer|basic|token|apikey) )?[^\s&\"'<>\\,;)}\]]+))"
)
"""A name and its value, as in api_key=abc, api_key: 'abc', "api_key": "abc" and Authorization: Bearer abc."""

FLAG = re.compile(
    r"(?P<before>(?<![\w-])--?(?P<name>[A-Za-z][\w-]*)(?:=|\\?[\"']?,?\s+)\\?[\"']?)"
    r"(?P<value>[^\s\"'\\-][^\s\"'\\]*)"
)
"""A flag of a command line and its value, as in --api-key abc and '--api-key', 'abc'."""

TOKENS = re.compile(
    r"\b(?:(?:hf_|gsk_|gh[pousr]_|github_pat_)\w{16,}|(?:r8_|npm_)[A-Za-z0-9]{30,}"
    r"|(?:sk-|(?:sk|rk)_(?:live|test)_|gl(?:pat|rt|dt|ptt|cbt|soat)-|AIza|GOCSPX-|ya29\.|nvapi-|xai-|pplx-"
    r"|dckr_pat_|tgp_v1_|lsv2_[ps][tk]_|dop_v1_|pypi-AgE|gl(?:sa|c)_|lin_api_|ntn_|sntry[su]_"
    r"|shp(?:at|ss|ca)_|sbp_|figd_|fw_|hv[sbr]\.|tvly-|csk-|pul-|PMAK-)[\w-]{16,}"
    r"|dapi[0-9a-f]{32}|(?:xox[a-z]|xapp)-[\w-]{10,}"
    r"|A[KS]IA[A-Z0-9]{16}\b|SG\.[\w-]{16,}\.[\w-]{16,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
    r"|(?i:(?<=\bbearer ))(?=\S*\d)[\w.~+/=-]{8,}|(?i:(?<=\bcookie: ))[\w-]+=[^\r\n\"']+"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
)
"""Secrets that show by their form: keys of Hugging Face, OpenAI and their like, Google, NVIDIA, GitHub,
GitLab, Grafana, Slack, AWS, Stripe, Databricks, Vault and others, JSON web tokens, bearer tokens, cookies and
private keys."""

USER = re.compile(
    r"(?P<before>(?<![\w-])(?:-[uU]\s?|--(?:proxy-)?user(?=[=\s\\\"']))(?:=|\\?[\"']?,?\s*)\\?[\"']?)"
    r"(?P<value>(?!\d+:\d+(?!\S))[^\s\"':/\\]+:(?!//)[^\s\"'\\]+)"
)
"""User and password of a command line, as in curl -u bob:abc; two numbers are ids of a user and a group."""


def _assigned(text: str) -> Iterator[tuple[int, int]]:
    """Yield where the values of secret names are in a text: begin and end."""
    for found in QUERY.finditer(text):
        if is_secret(found["name"]):
            yield found.span("value")
    for found in ASSIGNED.finditer(text):
        # `key=` and `token:` alone may be anything outside a URL
        if SECRETS.search(_words(found["name"])):
            yield found.span("value")
    for found in USER.finditer(text):
        yield found.span("value")
    for found in FLAG.finditer(text):
        name, value = found["name"], found["value"]
        if _is_surely_secret(name) or (is_secret(name) and _is_distinct(value, name)):
            yield found.span("value")


def mask(text: str) -> str:
    """Return a text without secrets: known ones, credentials in URLs, and values of names such as api_key."""
    if _pattern is not None:
        text = _pattern.sub(MASK, text)
    text = TOKENS.sub(MASK, CREDENTIALS.sub(f"{MASK}@", text))
    masked, done = "", 0
    for begin, end in sorted(_assigned(text)):
        if begin >= done:  # else it overlaps with the one before
            masked += text[done:begin] + MASK
        done = max(done, end)
    return masked + text[done:]


ROOM = 1 << 16
"""Characters that `masked` reads beyond those that it shows, for secrets that become shorter."""


def masked(text: str, most: int) -> str:
    """Return the first `most` characters of a text without secrets.

    Of a long text no more is read than is needed, so that the time does not grow with its length. A secret
    that the end of what is read cuts in half is not known for one: the last characters, as many as a secret
    may have, are never shown.
    """
    part = text[: most + ROOM]
    shown = mask(part)
    return shown[:most] if len(part) == len(text) else shown[: min(most, max(0, len(shown) - _longest))]


def hide(data: Any, name: object = "") -> Any:
    """Return a copy of nested data in which every secret is "…"; what is null stays so."""
    if data is not None and is_secret(name):
        return MASK
    if isinstance(data, Mapping):
        return {key: hide(value, key) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [hide(value, own_name) for own_name, value in _named(data, "")]
    return mask(data) if isinstance(data, str) else data


def visible(text: str) -> str:
    """Return masked text whose control characters are spelled out, as repr does. Lines and tabs stay.

    A model's output may hold sequences that move the cursor, clear the screen or reorder the text.
    """
    return CONTROLS.sub(lambda found: ascii(found[0])[1:-1], mask(text))


CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters of C0 and C1, marks that change the direction of writing, and halves of surrogate pairs."""
