"""WaitingTime measures how long anybody has waited for something."""

from __future__ import annotations

import time


class WaitingTime:
    """A WaitingTime counts the seconds in which at least one waited: `with waits: await …`."""

    def __init__(self) -> None:
        self._num, self._since, self._before = 0, 0.0, 0.0

    def __enter__(self) -> None:
        if self._num == 0:
            self._since = time.monotonic()
        self._num += 1

    def __exit__(self, *_: object) -> None:
        self._num -= 1
        if self._num == 0:
            self._before += time.monotonic() - self._since

    @property
    def seconds(self) -> float:
        """Seconds of waiting so far, including a wait that goes on."""
        return self._before + (time.monotonic() - self._since if self._num else 0.0)
