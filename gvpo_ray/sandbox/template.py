"""The template process is a fork server that has loaded the reward functions; its children are here too.

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

from gvpo_ray.sandbox import confine, guest
from gvpo_ray.sandbox.channel import Channel, as_frame
from gvpo_ray.sandbox.functions import RewardFunction, call, describe, load
from gvpo_ray.sandbox.landlock import Files, files_of_python, restrict_files
from gvpo_ray.sandbox.process import MAX_OPEN_FILES, MAX_SCRATCH_FILE_BYTES, OUT_OF_MEMORY


def main() -> None:
    """Load the reward functions, then fork children until the verifier closes the channel."""
    _die_with_parent(int(sys.argv[1]))
    # The channel moves away from descriptor 0, so that reading stdin finds nothing. Programs that user code
    # starts do not inherit a descriptor made by dup.
    control = Channel(socket.socket(fileno=os.dup(0)))
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    setup = json.loads(_read_line(control.socket))
    functions: dict[str, RewardFunction] = {}
    for name, source in setup["functions"].items():
        try:
            functions[name] = load(source, imports_ahead=True)
        # the import of a user's module may raise anything; the verifier reports it as one line
        except BaseException as error:
            control.socket.sendall(as_frame({"name": name, "error": describe(error)}))
            return
    files = files_of_python()
    gc.freeze()  # the children share these pages as long as nobody writes into them
    control.socket.sendall(as_frame({"ready": True}))
    while True:
        line, descriptors, _, _ = socket.recv_fds(control.socket, 4096, 2)
        if not line:
            return
        command = json.loads(line)
        if command["do"] == "wait":
            _, status, usage = os.wait4(command["pid"], 0)
            cpu_s = usage.ru_utime + usage.ru_stime
            control.socket.sendall(as_frame({"status": os.waitstatus_to_exitcode(status), "cpu_s": cpu_s}))
            continue
        template = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            control.socket.sendall(as_frame({"error": f"no process can be forked: {describe(error)}"}))
            return
        if pid == 0:
            control.socket.close()
            channel, output = descriptors
            for standard in (1, 2):
                os.dup2(output, standard)
            os.close(output)
            try:
                _serve(socket.socket(fileno=channel), functions, setup, files, template)
            finally:
                os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
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
    channel: socket.socket,
    functions: Mapping[str, RewardFunction],
    setup: Mapping[str, Any],
    files: Files,
    template: int,
) -> None:
    """Run the child: confine this process, then answer checks until the verifier closes the channel."""
    _die_with_parent(template)
    is_guest = any(source.get("place") == guest.PLACE for source in setup["functions"].values())
    try:
        file = os.memfd_create("stdin") if is_guest else -1  # which is not allowed later on
        _confine(setup, files, is_guest)
    except (OSError, ValueError) as error:
        channel.sendall(as_frame({"error": describe(error)}))
        return
    lines = channel.makefile("rb")
    for line in lines:
        check = json.loads(line)
        channel.sendall(as_frame({"begun": check["number"]}))
        if "guest" in check:
            guest.serve(channel, lines, check["guest"], file)
        columns = {key: [value] for key, value in check["columns"].items()}
        for name in check["functions"]:
            try:
                (part,) = call(
                    name,
                    functions[name],
                    [check["prompt"]],
                    [check["completion"]],
                    columns,
                    catch=BaseException,
                )
            except MemoryError:
                # the function's leftovers still fill the address space: only a new process is clean
                os._exit(OUT_OF_MEMORY)
            answer = {"number": check["number"], "part": part.value, "reason": part.reason}
            channel.sendall(as_frame({**answer, "fault": part.is_fault}))


def _confine(setup: Mapping[str, Any], files: Files, is_guest: bool) -> None:
    """Give up all that a check does not need, as far as this kernel can take it (confine.unprotected)."""
    confine.limit_resources(_address_space() + setup["memory_bytes"], MAX_SCRATCH_FILE_BYTES, MAX_OPEN_FILES)
    confine.drop_capabilities()
    is_restricted = restrict_files(setup["scratch"], *files)
    if confine.has_seccomp():
        confine.restrict_calls(files=not is_restricted, is_judged=is_guest)


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
