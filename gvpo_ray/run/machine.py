"""The machine is checked before a run starts Ray on it, or joins a cluster: each lack is one line.

A line says what to set or to make. Other modules make do with what a machine lacks: home.py (an account
without a name or home), cli/terminal.py (locales), files.py (full disks).
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.memory import check_memory
from gvpo_ray.config.plan import check_resources, cluster_address
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.files import room_in
from gvpo_ray.home import ensure_home
from gvpo_ray.run.inputs import machine_resources

ANSWER_S = 10.0
"""Seconds that the head of a cluster gets to accept a connection, and again to answer."""

SOCKET_BYTES = 107
"""Longest path of a Unix socket on Linux."""

VLLM_QUEUE_MIB = 240
"""Room in shared memory that vLLM wants for a queue between its core and a worker: the larger of its two,
shm_broadcast.MessageQueue's default of 10 chunks of 24 MiB. It writes to little of it."""


def check_machine(
    config: GVPOConfig, engines: bool = True, learner: bool = True, references: bool = True
) -> None:
    """Refuse a machine, or a cluster, on which the run cannot start, and set what libraries need of it.

    Args:
        config: of the run.
        engines: whether this run starts engines, verifiers and reward models.
        learner: whether this run starts a learner.
        references: whether engines' groups are scored by another model that is the reference.

    Raises:
        ConfigError: one line that says what to change.
    """
    import ray  # a bad config should fail before that

    ensure_home()
    check_memory(config, gpu_gb_here(config))
    if ray.is_initialized():
        return
    address = cluster_address(config.ray)
    if address is not None:
        check_address(address, "ray.address" if config.ray.address else "RAY_ADDRESS")
        return
    check_resources(config, *machine_resources(config), engines, learner, references)
    check_temporary_folder()
    check_shared_memory(config, engines)


def gpu_gb_here(config: GVPOConfig) -> float | None:
    """Return the memory of this machine's GPUs in GB; None: it has none, or the run asks for none."""
    from gvpo_ray.actors import num_gpus_here  # imports ray

    asks = config.learner.num_gpus or any(pool.num_gpus for pool in config.engines.all_pools().values())
    if not asks or not num_gpus_here():
        return None
    import torch  # takes seconds, which a machine without GPUs need not wait

    return float(torch.cuda.get_device_properties(0).total_memory) / 1e9


def check_address(address: str, key: str, answer_s: float = ANSWER_S) -> None:
    """Refuse the address of a cluster that is not one or that does not answer.

    Args:
        address: `host:port`, `ray://host:port`, or `auto`, which Ray resolves itself.
        key: where it was given, for the message.
        answer_s: seconds that it gets to accept a connection, and again to answer.

    Raises:
        ConfigError: it is another service's, or nothing answers there.
    """
    if address == "auto":
        return
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{key}: {address} is the address of a dashboard, which `ray job submit` takes; give the head's "
            f"own, such as {_host(address)}:6379, or unset {key} to run on this machine"
        )
    scheme, is_client, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    host = host.strip("[]")
    if (is_client and scheme != "ray") or not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"{key}: {address} is not host:port, such as {host or 'head'}:6379, nor ray://…")
    advice = f"start the cluster, or unset {key} to run on this machine"
    try:
        with socket.create_connection((host, int(port)), answer_s) as connection:
            if is_client or os.environ.get("RAY_USE_TLS", "0") == "1" or _speaks_http2(connection, answer_s):
                return
    except OSError as error:
        raise ConfigError(f"{key}: no Ray cluster answers at {address} ({error}): {advice}") from error
    raise ConfigError(f"{key}: what answers at {address} is not the head of a Ray cluster: {advice}")


def _host(url: str) -> str:
    return url.split("://")[1].split("/")[0].rpartition(":")[0] or url.split("://")[1].split("/")[0]


def _speaks_http2(connection: socket.socket, answer_s: float) -> bool:
    """Return whether the other end answers the preface of HTTP/2 with settings, as gRPC, and so Ray, does."""
    settings = 4
    connection.settimeout(answer_s)
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, settings, 0, 0, 0, 0, 0]))
    header = b""
    while len(header) < 9 and (more := connection.recv(9 - len(header))):
        header += more
    return len(header) == 9 and header[3] == settings


def check_temporary_folder() -> None:
    """Refuse a folder of temporary files in whose path Ray's sockets do not fit, or that is not writable.

    vLLM's sockets get Ray's folder where they would not fit either.

    Raises:
        ConfigError: one line that names the variable to set.
    """
    key = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    folder = os.environ[key] if key else "/tmp"
    # the longest name that Ray makes: ray/session_<date>_<time>_<microseconds>_<pid>/sockets/plasma_store
    session = f"/ray/session_0000-00-00_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    most = SOCKET_BYTES - len(session)
    if len(os.fsencode(folder)) > most:
        raise ConfigError(
            f"{key}: {folder} is too long for Ray's sockets ({len(os.fsencode(folder))} bytes, at most "
            f"{most}): set RAY_TMPDIR to a folder of a shorter name, such as /tmp"
        )
    if os.path.exists(folder) and not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            f"{key or '/tmp'}: {folder} cannot be written to: set RAY_TMPDIR to a folder that can"
        )
    if len(os.fsencode(tempfile.gettempdir())) + len("/") + 36 > SOCKET_BYTES:  # 36: a UUID
        os.environ.setdefault("VLLM_RPC_BASE_PATH", folder)


def check_shared_memory(config: GVPOConfig, engines: bool, path: str = "/dev/shm") -> None:
    """Refuse a machine with less shared memory than vLLM's queues need.

    Ray's object store is in the folder of temporary files where it does not fit into shared memory.

    Args:
        config: of the run.
        engines: whether this run starts engines.
        path: of the file system of shared memory.

    Raises:
        ConfigError: one line that says how to get more.
    """
    advice = "start the container with --shm-size=2g (Kubernetes: an emptyDir of medium Memory there)"
    if not Path(path).is_dir():
        raise ConfigError(f"{path} is missing, which Ray needs: {advice}")
    free = room_in(Path(path))
    pools = config.engines.all_pools().values()
    queues = any(
        (pool.num or pool.max_num) and not pool.url and (not pool.num_gpus or pool.num_processes > 1)
        for pool in pools
    )
    if engines and queues and free < VLLM_QUEUE_MIB * 2**20:
        raise ConfigError(
            f"{path} has {free / 2**20:.0f} MiB of room, and an engine needs {VLLM_QUEUE_MIB}: {advice}"
        )
    if free < config.ray.object_store_gib * 2**30:
        os.environ.setdefault("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", "1")
