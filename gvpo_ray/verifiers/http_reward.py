"""A reward function may be served over HTTP; it is called here."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import json
import time
from typing import Any

from gvpo_ray.config.verifiers import RewardConfig
from gvpo_ray.sandbox.functions import OutOfReach

RETRIED = (408, 425, 429)
"""Statuses of a server that may answer a moment later, beside those from 500 on."""

OF_THE_REQUEST = (400, 413, 414, 415, 422, 431, 500)
"""Statuses of a server that fails at one request and may answer others. With the rest (a key that has run
out, a server behind the gateway that is down) none is answered."""

PAUSE_S = 0.5
"""Seconds before the second try; they double with each further one. A server may ask for others."""

MAX_ANSWER_BYTES = 16 << 20
"""Largest body that is read, in bytes."""


class HttpReward:
    """An HttpReward is a reward function that is served over HTTP.

    It is called in the verifier's process, because the sandbox has no network. The request is POST
    {"prompts": [...], "completions": [...], "columns": {"answer": [...], ...}, **arguments} with at most
    `batch_size` completions, and the answer {"rewards": [number or null, ...]} or the list alone, not
    compressed. Connection errors, the statuses RETRIED and those from 500 on are tried again up to
    `num_retries` times. One request takes at most `timeout_s` in all: tries, pauses (Retry-After included)
    and bodies that come a byte at a time.
    """

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._loop = asyncio.new_event_loop()  # requests in it have a limit in all, which sockets have not
        self._session: Any = None

    def __call__(self, prompts: list[str], completions: list[str], **columns: Any) -> list[Any]:
        """Return the server's rewards, one per completion; the columns are lists of the same length.

        Raises:
            OutOfReach: no rewards, for whatever reason; the text does not name the URL, which may hold a key.
        """
        rewards: list[Any] = []
        for begin in range(0, len(completions), self._config.batch_size):
            part = slice(begin, begin + self._config.batch_size)
            body = {
                "prompts": prompts[part],
                "completions": completions[part],
                "columns": {name: values[part] for name, values in columns.items()},
                **self._config.arguments,
            }
            rewards += self._loop.run_until_complete(self._rewards(body, len(completions[part])))
        return rewards

    def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())
        self._loop.close()

    async def _rewards(self, body: dict[str, Any], number: int) -> list[Any]:
        """Make one request; return its rewards."""
        deadline = time.monotonic() + self._config.timeout_s
        for tries in range(self._config.num_retries + 1):
            pause_s = PAUSE_S * 2**tries
            try:
                status, head, text = await asyncio.wait_for(self._post(body), deadline - time.monotonic())
            except TimeoutError:
                raise OutOfReach(f"no answer within {self._config.timeout_s:g} s") from None
            except OutOfReach as error:
                failure = error
            else:
                if status < 400:
                    return _parsed(text, number)
                failure = OutOfReach(
                    f"the server answered {status}: {' '.join(text[:200].split())}",
                    is_answer=status in OF_THE_REQUEST,
                    is_own=status not in RETRIED and status < 500,
                )
                pause_s = _asked_pause(head, pause_s)
            if failure.is_own or pause_s >= deadline - time.monotonic():
                break
            if tries < self._config.num_retries:
                await asyncio.sleep(pause_s)
        raise failure

    async def _post(self, body: dict[str, Any]) -> tuple[int, str, str]:
        """Send one request; return the answer's status, its Retry-After and its text."""
        import aiohttp

        if self._session is None:
            # The deadline is ours, and proxies are taken from the environment, as other clients do. A body is
            # not decompressed: a small one could become one of any size.
            self._session = aiohttp.ClientSession(
                timeout=aiohttp.ClientTimeout(),
                trust_env=True,
                headers={"Accept-Encoding": "identity"},
                auto_decompress=False,
            )
        try:
            async with self._session.post(self._config.url, json=body) as response:
                status, head, read = response.status, response.headers.get("Retry-After", ""), bytearray()
                async for part in response.content.iter_any():
                    read += part
                    if len(read) > MAX_ANSWER_BYTES:
                        break
        except aiohttp.InvalidURL as error:
            raise OutOfReach(f"not a URL: {error}", is_own=True) from error
        except (aiohttp.ClientError, OSError) as error:
            is_answer = isinstance(error, (aiohttp.ClientPayloadError, aiohttp.ClientResponseError))
            raise OutOfReach(f"{type(error).__name__}: {error}", is_answer) from error
        if len(read) > MAX_ANSWER_BYTES:
            fault = f"the server answered {status} and more than {MAX_ANSWER_BYTES} bytes"
            raise OutOfReach(fault, is_answer=True, is_own=True)
        return status, head, read.decode("utf-8", "replace")


def _asked_pause(retry_after: str, pause_s: float) -> float:
    """Return the seconds that a server asks for, as a number or as a date; else `pause_s`.

    A date gives at least `pause_s`, because the server's clock may be behind ours.
    """
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        date = email.utils.parsedate_to_datetime(retry_after).replace(tzinfo=datetime.UTC)  # GMT in HTTP
    except ValueError:
        return pause_s
    return max(pause_s, date.timestamp() - time.time())


def _parsed(text: str, number: int) -> list[Any]:
    """Return the rewards in an answer."""
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = text
    found = answer.get("rewards") if isinstance(answer, dict) else answer
    if not isinstance(found, list) or len(found) != number:
        shown = " ".join(text[:200].split())
        raise OutOfReach(f"the server answered {shown}, not {number} rewards", is_answer=True, is_own=True)
    return found
