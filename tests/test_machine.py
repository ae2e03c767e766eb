"""Machines as they are: addresses, temporary folders, shared memory, accounts, locales and full disks."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import errno
import gc
import io
import os
import pickle
import pwd
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from gvpo_ray import groups
from gvpo_ray.actors import cause_of, tag_of
from gvpo_ray.cli.terminal import plain, print_plainly
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.plan import cluster_address
from gvpo_ray.config.run import GVPOConfig, RayConfig
from gvpo_ray.files import DiskFull, append_line, lock, replacing, room_in, writing
from gvpo_ray.home import ensure_home
from gvpo_ray.run import machine
from gvpo_ray.run.session import Session, executable, said_of_workers


@contextlib.contextmanager
def server(answer: bytes | None) -> Iterator[str]:
    """Accept connections on a port of this machine, and answer the first bytes with `answer`; None: never."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.recv(100)
                if answer is not None:
                    connection.sendall(answer)
                with contextlib.suppress(ConnectionError):
                    connection.recv(100)  # until the other end is closed

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"


def refused(address: str, key: str = "RAY_ADDRESS") -> str:
    with pytest.raises(ConfigError) as error:
        machine.check_address(address, key, answer_s=0.5)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8265", "https://cluster.example", "http://[::1]:8265/"]
)
def test_the_address_of_a_dashboard_is_refused_with_what_to_give(address: str) -> None:
    said = refused(address)
    assert said.startswith(f"RAY_ADDRESS: {address} is the address of a dashboard") and ":6379" in said


@pytest.mark.parametrize(
    "address", ["head", "head:", ":6379", "head:port", "head:99999", "redis://head:6379"]
)
def test_what_is_no_address_is_refused(address: str) -> None:
    assert refused(address, "ray.address").startswith(f"ray.address: {address} is not host:port")


def test_a_cluster_that_is_not_there_is_refused_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    began = time.monotonic()
    for at in (address, f"ray://{address}"):
        assert refused(at).startswith(f"RAY_ADDRESS: no Ray cluster answers at {at}")
    assert time.monotonic() - began < 30


def test_what_is_no_head_of_a_cluster_is_refused() -> None:
    with server(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        assert refused(address).startswith(f"RAY_ADDRESS: what answers at {address} is not the head")
    with server(None) as address:
        assert refused(address).startswith(f"RAY_ADDRESS: no Ray cluster answers at {address} (timed out)")


def test_a_head_of_a_cluster_is_accepted() -> None:
    with server(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])) as address:
        machine.check_address(address, "RAY_ADDRESS", answer_s=5)
    machine.check_address("auto", "RAY_ADDRESS")


def test_the_address_local_is_an_embedded_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster_address(RayConfig()) is None


@pytest.mark.parametrize("key", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_is_as_long_as_rays_sockets_allow(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    session = f"/ray/session_2026-11-27_06-35-02_123456_{os.getpid()}/sockets/plasma_store"
    most = 107 - len(session)
    monkeypatch.setenv(key, "/" + "x" * (most - 1))
    machine.check_temporary_folder()
    monkeypatch.setenv(key, "/" + "x" * most)
    with pytest.raises(ConfigError, match=f"^{key}: /x+ is too long .* set RAY_TMPDIR"):
        machine.check_temporary_folder()


def test_rays_own_temporary_folder_goes_before_a_long_one_and_holds_vllms_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.delenv("VLLM_RPC_BASE_PATH", raising=False)
    machine.check_temporary_folder()
    assert os.environ["VLLM_RPC_BASE_PATH"] == "/tmp"


def config_with(**sections: Any) -> GVPOConfig:
    data = {"run_dir": "run", "num_steps": 1, "model": {"path": "model"}, "prompts": {"path": "p.jsonl"}}
    return GVPOConfig.from_dict({**data, **sections})


def room(monkeypatch: pytest.MonkeyPatch, mib: int) -> None:
    """Shared memory has so much room."""
    monkeypatch.setattr(machine, "room_in", lambda path: mib * 2**20)
    monkeypatch.setenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "0")  # put back at the end of the test
    monkeypatch.delenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE")


def test_too_little_shared_memory_for_an_engine_is_refused_with_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, gpu = config_with(), config_with(engines={"num_gpus": 1})
    room(monkeypatch, 64)
    with pytest.raises(ConfigError, match=r"has 64 MiB of room, and an engine needs 240: .* --shm-size"):
        machine.check_shared_memory(usual, True, str(tmp_path))
    machine.check_shared_memory(usual, False, str(tmp_path))  # a run that only learns
    machine.check_shared_memory(gpu, True, str(tmp_path))  # one process, without a queue
    with pytest.raises(ConfigError, match="an engine needs 240"):
        two = config_with(engines={"num_gpus": 2, "tensor_parallel_size": 2})
        machine.check_shared_memory(two, True, str(tmp_path))
    with pytest.raises(ConfigError, match=r"absent is missing, .* --shm-size"):
        machine.check_shared_memory(usual, True, str(tmp_path / "absent"))


def test_what_another_rays_object_store_may_still_fill_is_no_room(tmp_path: Path) -> None:
    """A file that is as large as it may become, has no name, and takes room as it is filled."""
    before = room_in(tmp_path)
    size = 1 << 36  # beside which what others write to this disk meanwhile is little
    with tempfile.TemporaryFile(dir=tmp_path) as store, open(f"/proc/self/fd/{store.fileno()}", "rb"):
        store.truncate(size)
        assert before - room_in(tmp_path) == pytest.approx(size, rel=0.1)
        store.truncate(1 << 20)
        store.write(bytes(1 << 20))
        store.flush()
        os.fsync(store.fileno())
        assert before - room_in(tmp_path) < size / 10  # it is full: nothing is promised any more
    assert before - room_in(tmp_path) < size / 10


def test_an_object_store_that_does_not_fit_into_shared_memory_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room(monkeypatch, 300)
    machine.check_shared_memory(config_with(ray={"object_store_gib": 0.2}), True, str(tmp_path))
    assert "RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE" not in os.environ
    machine.check_shared_memory(config_with(ray={"object_store_gib": 16}), True, str(tmp_path))
    assert os.environ["RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE"] == "1"


def test_the_size_of_vllms_queue_is_the_one_that_is_checked() -> None:
    source = Path(find_spec("vllm").origin).parent / "distributed/device_communicators/shm_broadcast.py"  # type: ignore[arg-type,union-attr]
    text = source.read_text(encoding="utf-8")
    assert "max_chunk_bytes: int = 1024 * 1024 * 24" in text and "max_chunks: int = 10" in text


# --- accounts -----------------------------------------------------------------------------------------------


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user id without an entry in passwd, whose home cannot be written to."""

    def unknown(number: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "HF_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setenv("HOME", str(tmp_path / "absent"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def test_an_account_without_name_and_home_gets_both(no_account: Path) -> None:
    import getpass

    with pytest.raises((KeyError, OSError)):
        getpass.getuser()
    ensure_home()
    first = os.environ["HOME"]
    assert getpass.getuser() == f"user-{os.getuid()}"
    assert Path(first).parent == no_account and os.stat(first).st_mode & 0o777 == 0o700
    (Path(first) / ".cache").mkdir()
    os.environ["HOME"] = str(no_account / "absent")
    ensure_home()
    assert os.environ["HOME"] == first, "caches are found again"


def test_a_folder_that_another_account_could_have_made_is_no_home(no_account: Path) -> None:
    (no_account / "theirs").mkdir()
    (no_account / f"gvpo_ray-home-{os.getuid()}").symlink_to(no_account / "theirs")
    ensure_home()
    assert Path(os.environ["HOME"]).is_dir() and not Path(os.environ["HOME"]).is_symlink()


def test_models_in_a_home_that_is_only_read_are_still_found(
    no_account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (no_account / "home" / ".cache" / "huggingface").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(no_account / "home"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    ensure_home()
    assert os.environ["HF_HOME"] == str(no_account / "home" / ".cache" / "huggingface")
    assert os.environ["HOME"] != str(no_account / "home")


def test_an_account_with_name_and_home_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USER", "ada")
    before = dict(os.environ)
    ensure_home()
    assert dict(os.environ) == before


# --- locales ------------------------------------------------------------------------------------------------

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.components
def test_the_command_line_is_utf8_in_an_ascii_locale(tmp_path: Path) -> None:
    """The name reaches the file system as UTF-8, and the terminal gets plain signs."""
    (tmp_path / "läuf").mkdir()
    run = subprocess.run(
        [sys.executable, "-m", "gvpo_ray", "status", "läuf"],
        cwd=tmp_path,
        env={**os.environ, **ASCII, "PYTHONPATH": os.getcwd()},
        capture_output=True,
    )
    assert run.returncode == 2
    assert run.stderr == b"error: l\\xe4uf: no config.yaml: not the directory of a run\n"


@pytest.mark.components
def test_an_argument_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable.encode(), b"-m", b"gvpo_ray", b"status", b"l\xe4uf"],
        cwd=tmp_path,
        env={**os.environ, "LC_ALL": "C.UTF-8", "PYTHONPATH": os.getcwd()},
        capture_output=True,
    )
    assert run.returncode == 2
    assert run.stderr == b"error: l\\udce4uf: an argument is not UTF-8 text\n"


def test_signs_that_a_terminal_lacks_are_printed_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, text in (
        ("ascii", b"a | b -> 1.0 +- 2... \\u4e2d"),
        ("utf-8", "a · b → 1.0 ± 2… 中".encode()),
    ):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        print_plainly()
        print("a · b → 1.0 ± 2… 中", end="")
        out.flush()
        assert out.buffer.getvalue() == text  # type: ignore[attr-defined]
    with pytest.raises(UnicodeDecodeError):
        plain(UnicodeDecodeError("ascii", b"\xff", 0, 1, "no"))


def test_progress_bars_work_in_an_ascii_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    from gvpo_ray.observe import console as printed

    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stderr", out)
    print_plainly()

    def on_terminal(**arguments: object) -> Console:
        return Console(**{**arguments, "force_terminal": True})  # type: ignore[arg-type]

    monkeypatch.setattr(printed, "Console", on_terminal)
    with printed.evaluation_progress({"müller": (4, 2)}) as advance:
        advance("müller")
    out.flush()
    assert b"m\\xfcller" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_no_text_file_is_opened_in_the_encoding_of_the_locale() -> None:
    found = []
    gc.disable()  # ast.parse of Python 3.11 fails where the collector runs what parses something too
    try:
        paths = [path for room in ("gvpo_ray", "jobs") for path in Path(room).rglob("*.py")]
        trees = [(path, ast.parse(path.read_text(encoding="utf-8"))) for path in paths]
    finally:
        gc.enable()
    for file, tree in trees:
        for call in ast.walk(tree):
            name = (
                getattr(call.func, "attr", getattr(call.func, "id", "")) if isinstance(call, ast.Call) else ""
            )
            if name not in ("read_text", "write_text", "open"):
                continue
            text = ast.unparse(call)  # which takes longest
            opens = text.startswith("open(") or (
                isinstance(call.func, ast.Attribute)
                and call.func.attr in ("read_text", "write_text", "open")
                and not text.startswith(("os.", "gzip.", "host.", "world.", "client."))
            )
            mode = call.args[1:2] if text.startswith("open(") else call.args[:1] * (".open(" in text)
            is_bytes = any(
                isinstance(part, ast.Constant) and "b" in str(part.value)
                for argument in mode
                for part in ast.walk(argument)
            )
            if opens and not is_bytes and not any(word.arg == "encoding" for word in call.keywords):
                found.append(f"{file}:{call.lineno}: {text}")
    assert not found


# --- full disks ---------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_with_its_file_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskFull) as error:
        append_line(tmp_path / "metrics.jsonl", {"step": 1})
    said = str(error.value)
    assert (
        said.startswith(f"no room for {tmp_path}/metrics.jsonl on the file system at /") and "\n" not in said
    )
    assert said.endswith("make room there, and give the same command again")
    assert str(pickle.loads(pickle.dumps(error.value))) == said and error.value.errno == errno.ENOSPC
    assert said in cause_of(error.value)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),  # safetensors
        pa.ArrowInvalid("Error writing bytes to file. Detail: [errno 28] No space left on device"),
        OSError("5120 requested and 0 written"),  # numpy
    ],
)
def test_every_library_that_finds_a_disk_full_is_understood(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(DiskFull, match=r"no room for .*/a/b"), writing(tmp_path / "a" / "b"):
        raise error


def test_other_errors_of_a_write_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), writing(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_every_way_to_write_names_the_full_disk(tmp_path: Path) -> None:
    for name in (".whole.part", "table.arrow"):
        (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(DiskFull, match="/whole on"), replacing(tmp_path / "whole") as part:
        part.write_text("text", encoding="utf-8")
    with pytest.raises(DiskFull, match=r"/table\.arrow on"):
        groups.save(pa.table({"a": list(range(10_000))}), tmp_path / "table.arrow")
    with lock(tmp_path / "lock"):
        pass


# --- Ray ----------------------------------------------------------------------------------------------------


def test_a_name_of_any_signs_is_a_tag_of_rays_metrics() -> None:
    for name in ("run-1", "läuf", "实验", "a b#%?&'\n"):
        tag = tag_of(name)
        assert tag.isascii() and tag.isprintable() and len(tag) == len(name)
    assert tag_of("run-1") == "run-1"


def test_nothing_is_printed_after_the_first_cause(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Tasks that fail as a consequence, and that nobody awaits any more, are not reported."""
    monkeypatch.setattr(ray, "is_initialized", lambda: True)

    async def unseen() -> None:
        async def fail() -> None:
            raise RuntimeError("a consequence")

        asyncio.ensure_future(fail())  # noqa: RUF006 - nobody awaits it
        await asyncio.sleep(0)

    for cause, printed in ((None, True), (RuntimeError("the first cause"), False)):
        caplog.clear()
        session = Session(RayConfig())
        try:
            session.cause = cause
            session.call(unseen())
            session.call(asyncio.sleep(0))
        finally:
            session.stop()
        assert ("never retrieved" in caplog.text) is printed


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no GCS there"),
        RuntimeError("Version mismatch"),
        ValueError("The given object store memory is too small"),
        ray.exceptions.RaySystemError("System error"),
        Exception("The current node timed out\nduring startup."),
    ],
)
def test_a_ray_that_does_not_start_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(ConfigError) as said:
        Session(RayConfig(address="local"))
    assert str(said.value) == f"ray: cannot start on this machine: {' '.join(str(error).split())}"


@pytest.mark.parametrize(
    ("python", "option"),
    [
        ("/opt/venv/bin/python", {}),
        ("/home/a b/.venv/bin/python", {"runtime_env": {"py_executable": "'/home/a b/.venv/bin/python'"}}),
        ("/$x/python", {"runtime_env": {"py_executable": "'/$x/python'"}}),
    ],
)
def test_ray_is_given_the_path_of_python_as_bash_needs_it(python: str, option: dict[str, object]) -> None:
    assert executable(python) == option


def test_a_worker_that_cannot_start_is_shown_by_its_own_words(tmp_path: Path) -> None:
    log = tmp_path / "raylet.err"
    assert said_of_workers(log) == ""
    manager = "[2026-11-27 18:19:12,072 E 14541 14541] (raylet) worker_pool.cc:660: Some workers"
    log.write_text(f"{manager}\n")
    assert said_of_workers(log) == ""
    log.write_text(f"bash: line 1: /tmp/a: No such file\n{manager}\n\n")
    assert said_of_workers(log) == "; a worker said: bash: line 1: /tmp/a: No such file"


@pytest.mark.parametrize("error", [TypeError("a mistake"), KeyError("of code"), AssertionError()])
def test_a_mistake_of_the_code_that_starts_ray_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def init(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(type(error)):
        Session(RayConfig(address="local"))
