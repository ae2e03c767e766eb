"""Verifier and sandbox's processes speak over a channel, and what those print is taken.

Frames are lines of ASCII JSON over a socket pair. They are JSON because the child's answers are untrusted,
and unpickling would run code.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import sys
import time
from collections.abc import Mapping
from typing import Any

from gvpo_ray.config.shown import mask
from gvpo_ray.errors import GvpoError

MAX_FRAME_BYTES = 1 << 20
"""Size at which an answer without an end is refused, unless a channel says another."""

MAX_PRINTED_BYTES, MAX_PRINTED_BYTES_IN_ALL = 16 << 10, 4 << 20
"""How much of what a child prints, and of what all children of a sandbox print, is passed on."""


class GoneError(GvpoError):
    """The process at the other end is gone, or it wrote something that our code never writes.

    Without a message it is gone, and its exit status says why.
    """


class Printed:
    """A Printed takes what children print, so that they never wait, and passes some of it on to stderr."""

    def __init__(self) -> None:
        self._left_in_all = MAX_PRINTED_BYTES_IN_ALL
        self._left = 0

    def begin(self) -> None:
        """Allow for another child."""
        self._left = MAX_PRINTED_BYTES

    def take(self, output: socket.socket) -> bool:
        """Take what there is, without waiting; return whether there may be more later."""
        try:
            data = output.recv(1 << 16, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:
            return False
        left = min(self._left, self._left_in_all)
        text = data[:left].decode("utf-8", "backslashreplace")
        if len(data) > left > 0:
            text += "\n(the rest of what this reward function prints is left out)\n"
        self._left, self._left_in_all = self._left - len(data), self._left_in_all - len(data[:left])
        if text:
            # no escape sequence of a completion may reach a terminal, and a full disk costs no check
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(
                    "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in mask(text))
                )
        return bool(data)


class Channel:
    """A Channel is one end of a socket pair, over which JSON objects are sent and received, one per line.

    Deadlines are times of time.monotonic(). An end that is gone, or a line that is no JSON object, raises
    GoneError; a missed deadline raises TimeoutError.

    Args:
        end: the socket.
        output: what the process at the other end prints; it is taken while an object is awaited.
        printed: what takes it.
    """

    def __init__(
        self, end: socket.socket, output: socket.socket | None = None, printed: Printed | None = None
    ) -> None:
        self.socket = end
        self._output, self._printed = output, printed
        self._received, self._searched, self._unsent = bytearray(), 0, memoryview(b"")
        self.max_bytes = MAX_FRAME_BYTES
        """Size at which an object without an end is refused."""
        self._is_open = output is not None

    def send(self, frame: Mapping[str, Any], deadline: float) -> None:
        """Send one object; after a missed deadline, `flush` sends the rest of it."""
        self._unsent = memoryview(as_frame(frame))
        self.flush(deadline)

    def flush(self, deadline: float) -> None:
        """Send what is left of an object."""
        while self._unsent:
            self.socket.settimeout(_remaining(deadline))
            try:
                self._unsent = self._unsent[self.socket.send(self._unsent) :]
            except TimeoutError:
                raise
            except OSError as error:
                raise GoneError from error

    def receive(self, deadline: float) -> dict[str, Any]:
        """Wait for the next object and return it; after a missed deadline, it can be waited for again."""
        while (end := self._received.find(b"\n", self._searched)) < 0:
            self._searched = len(self._received)
            if self._searched > self.max_bytes:
                raise GoneError("an answer without end")
            self._wait(deadline)
            self.socket.settimeout(_remaining(deadline))
            try:
                data = self.socket.recv(1 << 18)
            except TimeoutError:
                raise
            except OSError as error:
                raise GoneError from error
            if not data:
                raise GoneError
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        self._searched = 0
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise GoneError("an answer that is not JSON") from error
        if not isinstance(answer, dict):
            raise GoneError("an answer that is not an object")
        return answer

    def is_ready(self) -> bool:
        """Return whether something has come that was not received yet."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def _wait(self, deadline: float) -> None:
        """Wait until there is something to receive, and take what is printed meanwhile."""
        while self._is_open and self._output and self._printed:
            poll = select.poll()  # unlike select.select, it takes descriptors beyond 1023
            poll.register(self.socket, select.POLLIN)
            poll.register(self._output, select.POLLIN)
            ready = dict(poll.poll(1000 * _remaining(deadline)))
            if self._output.fileno() in ready:
                self._is_open = self._printed.take(self._output)
            if self.socket.fileno() in ready:
                return

    def close(self) -> None:
        """Take what is still printed, and close the sockets."""
        self.socket.close()
        if self._output and self._printed:
            for _ in range(16):  # enough for what a socket holds
                if not (self._is_open and self._printed.take(self._output)):
                    break
            self._output.close()


def as_frame(message: Mapping[str, Any]) -> bytes:
    """Encode a message as one line of ASCII JSON; NUL, newlines and lone surrogates are escaped."""
    return json.dumps(message, default=str).encode("ascii") + b"\n"


def _remaining(deadline: float) -> float:
    """Return the seconds to a deadline; raise TimeoutError if there are none left.

    Zero must not be returned: for a socket it means "do not wait".
    """
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining
