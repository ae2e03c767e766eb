"""The template process, a fork server that has loaded the reward functions, and the children that it forks.

It runs as `python -m gvpo_ray.sandbox.template`, and only process.py starts it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gvpo_ray.sandbox.functions import RewardFunction, call, describe, load
from gvpo_ray.sandbox.process import MAX_OPEN_FILES, MAX_SCRATCH_FILE_BYTES, OUT_OF_MEMORY, Channel, as_frame


def main() -> None:
    """Load the reward functions, then fork children until the verifier closes the channel."""
    _die_with_parent(int(sys.argv[1]))
    # The channel moves away from descriptor 0, so that reading stdin finds nothing. Programs that user code
    # starts do not inherit a descriptor made by dup.
    control = Channel(socket.socket(fileno=os.dup(0)))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    setup = json.loads(_read_line(control.socket))
    functions: dict[str, RewardFunction] = {}
    for name, source in setup["functions"].items():
        try:
            functions[name] = load(source)
        # the import of a user's module may raise anything; the verifier reports it as one line
        except BaseException as error:
            control.socket.sendall(as_frame({"name": name, "error": describe(error)}))
            return
    gc.freeze()  # the children share these pages as long as nobody writes into them
    control.socket.sendall(as_frame({"ready": True}))
    while True:
        line, descriptors, _, _ = socket.recv_fds(control.socket, 4096, 1)
        if not line:
            return
        command = json.loads(line)
        if command["do"] == "wait":
            _, status = os.waitpid(command["pid"], 0)
            control.socket.sendall(as_frame({"status": os.waitstatus_to_exitcode(status)}))
            continue
        template = os.getpid()
        if (pid := os.fork()) == 0:
            control.socket.close()
            try:
                _serve(socket.socket(fileno=descriptors[0]), functions, setup, template)
            finally:
                os._exit(0)
        os.close(descriptors[0])
        control.socket.sendall(as_frame({"pid": pid}))


def _read_line(channel: socket.socket) -> bytes:
    """Read one line; nothing follows it, because the verifier waits for the answer."""
    received = b""
    while not received.endswith(b"\n"):
        data = channel.recv(1 << 20)
        if not data:
            os._exit(0)
        received += data
    return received


def _serve(
    channel: socket.socket, functions: Mapping[str, RewardFunction], setup: Mapping[str, Any], template: int
) -> None:
    """Run the child: confine this process, then answer checks until the verifier closes the channel."""
    from gvpo_ray.sandbox import confine

    _die_with_parent(template)
    confine.limit_resources(_address_space() + setup["memory_bytes"], MAX_SCRATCH_FILE_BYTES, MAX_OPEN_FILES)
    confine.restrict_calls(files=not confine.restrict_writes(setup["scratch"]))
    for line in channel.makefile("rb"):
        check = json.loads(line)
        channel.sendall(as_frame({"begun": check["number"]}))
        columns = {key: [value] for key, value in check["columns"].items()}
        for name, function in functions.items():
            try:
                (part,) = call(
                    name, function, [check["prompt"]], [check["completion"]], columns, catch=BaseException
                )
            except MemoryError:
                # the function's leftovers still fill the address space: only a new process is clean
                os._exit(OUT_OF_MEMORY)
            channel.sendall(
                as_frame(
                    {
                        "number": check["number"],
                        "part": part.value,
                        "reason": part.reason,
                        "fault": part.is_fault,
                    }
                )
            )


def _address_space() -> int:
    """Return the size of this process's address space, in bytes."""
    pages = (
        int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) if sys.platform == "linux" else 0
    )
    return pages * resource.getpagesize()


def _die_with_parent(parent: int) -> None:
    """Make the kernel kill this process when the parent's thread ends.

    The end of the channel alone does not stop a check that never returns.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)


if __name__ == "__main__":
    main()
