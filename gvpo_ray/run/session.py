"""A session runs Ray and an event loop in a thread, and ends what was started on them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray._private.node import Node

from gvpo_ray.actors import RunError, bundles_of, cause_of, first_of, resources_of
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.plan import cluster_address
from gvpo_ray.config.run import GVPOConfig, RayConfig

CLOSE_S = 4.0
"""Seconds that what was started gets to close; whatever does not finish in time ends with Ray."""

REFUSALS = (OSError, RuntimeError, ValueError, ray.exceptions.RayError)
"""Errors of `ray.init` where the machine, the cluster or what the user set is not as Ray needs it."""


AUTH_MODE = "RAY_AUTH_MODE"
"""ray.init sets it to `token` when it starts a Ray of its own, and ray.shutdown leaves it in the process."""


class Session:
    """A Session owns Ray, an event loop in a thread, and what was started on them; `stop` ends only that.

    A Ray that was initialised before is used and not shut down. `is_local`: Ray is embedded, so that all of
    it is on this machine.
    """

    def __init__(self, config: RayConfig) -> None:
        self._closers: list[Callable[[], Coroutine[Any, Any, Any]]] = []  # run together at the end
        self.cause: BaseException | None = None
        self._stopped = False
        self._owns_ray, self.is_local = not ray.is_initialized(), False
        self._had_auth_mode = AUTH_MODE in os.environ
        if self._owns_ray:
            address = cluster_address(config)
            self.is_local = address is None
            embedded: dict[str, Any] = {
                "num_cpus": config.num_cpus,
                "object_store_memory": int(config.object_store_gib * 2**30),
                "include_dashboard": config.dashboard,
            }
            os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
            # A call to an engine has two return values, and the driver reads one: when the engine dies, the
            # error of the other must not be printed.
            os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
            handler = signal.getsignal(signal.SIGTERM)
            try:
                start_ray(
                    address=address or "local",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **executable(sys.executable),
                    **({} if address else embedded),
                )
            except Exception as error:
                # Ray raises Exception itself, where a node does not start in time.
                if not isinstance(error, REFUSALS) and type(error) is not Exception:
                    raise  # a mistake of this code, or of Ray's: its traceback is needed
                what = f"cannot join the cluster at {address}" if address else "cannot start on this machine"
                raise ConfigError(f"ray: {what}: {' '.join(str(error).split())}") from error
            if threading.current_thread() is threading.main_thread():
                # ray.init replaces it by a handler that prints a stack trace.
                signal.signal(signal.SIGTERM, handler)
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(self._on_unseen)
        self._thread = threading.Thread(target=self.loop.run_forever, name="ring", daemon=True)
        self._thread.start()

    def _on_unseen(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Print an error that nobody awaited, unless the run is over: its first cause is printed last."""
        if self.cause is None and not self._stopped:
            loop.default_exception_handler(context)

    def call(self, coroutine: Coroutine[Any, Any, Any] | Any, timeout_s: float | None = None) -> Any:
        """Run a coroutine (or await an object ref) on the loop, and wait for its result.

        Raises:
            TimeoutError: there is no result after `timeout_s` seconds; the coroutine's own errors pass
                through.
        """

        async def run() -> Any:
            return await coroutine

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(timeout_s)

    def spawn(
        self,
        coroutine: Coroutine[Any, Any, Any],
        on_error: Callable[[BaseException], Coroutine[Any, Any, None]],
    ) -> None:
        """Run a coroutine in the background; the first exception of any becomes the session's cause.

        `on_error` is awaited with it.
        """
        if self._stopped:
            coroutine.close()
            return

        async def run() -> None:
            try:
                await coroutine
            except asyncio.CancelledError:
                raise
            # Supervision: the error is recorded as the cause and raised in the driver's thread.
            except BaseException as error:
                if self.cause is None and not self._stopped:
                    self.cause = error
                    await on_error(error)

        asyncio.run_coroutine_threadsafe(run(), self.loop)

    def guard(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine and wait for its result, or until something in the background fails.

        Without the latter, a coroutine that needs the failed part would wait for ever.

        Raises:
            RunError: the first cause of either.
        """

        async def watched() -> Any:
            work = asyncio.ensure_future(coroutine)
            while not work.done() and self.cause is None:
                await asyncio.wait([work], timeout=1.0)
            if not work.done():
                work.cancel()
                return None
            return work.result()

        try:
            result = self.call(watched())
        except (ray.exceptions.RayError, RunError, BaseExceptionGroup) as error:
            self.cause, result = self.cause or first_of(error), None
        if result is None:
            assert self.cause is not None
            raise RunError(cause_of(self.cause) + self._said_by_ray()) from self.cause
        return result

    def _said_by_ray(self) -> str:
        """Return what Ray's node manager wrote when it could not start a worker; nothing of other causes.

        Ray's own error says only that it happened; the manager's file is on this machine if Ray is.
        """
        node = ray._private.worker._global_node
        if (
            not isinstance(self.cause, ray.exceptions.ActorUnschedulableError)
            or not self._owns_ray
            or not node
        ):
            return ""
        return said_of_workers(Path(node.get_logs_dir_path()) / "raylet.err")

    def on_stop(self, close: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Register a coroutine function that `stop` calls."""
        self._closers.append(close)

    def stop(self) -> None:
        """Close what was started, within seconds, and then Ray, if this session started it."""
        if self._stopped:
            return
        self._stopped = True

        async def close() -> None:
            await asyncio.wait(
                [asyncio.ensure_future(closer()) for closer in self._closers]
                or [asyncio.ensure_future(asyncio.sleep(0))],
                timeout=CLOSE_S,
            )
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            # A thread that calls Ray while Ray shuts down would crash.
            await self.loop.shutdown_default_executor()

        with contextlib.suppress(TimeoutError):
            self.call(close(), timeout_s=CLOSE_S + 2)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=3)
        if self._owns_ray:
            ray.shutdown()
            if not self._had_auth_mode:
                forget_auth_mode()


def executable(python: str) -> dict[str, Any]:
    """Return the option of ray.init that is needed where the path of Python has a space or the like.

    Ray starts the workers of Ray Train by a line of bash in which that path is not quoted (2.60.0,
    `RuntimeEnvContext.exec_worker`), and gives up after minutes.
    """
    quoted = shlex.quote(python)
    return {} if quoted == python else {"runtime_env": {"py_executable": quoted}}


def said_of_workers(log: Path) -> str:
    """Return the last line of a node manager's error log that a worker wrote, if there is one."""
    with contextlib.suppress(OSError):
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if line.strip() and not re.match(r"\[[\d-]+ [\d:,]+ ", line)]
        if said:
            return f"; a worker said: {said[-1].strip()}"
    return ""


def start_ray(**options: Any) -> None:
    """Call ray.init; start an embedded Ray up to three times where it is too slow.

    Ray gives its node 30 s to start, which are too few on a busy machine, and has no option for that. It
    leaves the processes of a node that it gives up to the end of this process, which may be a notebook's.
    """
    for tries_left in (2, 1, 0):
        try:
            ray.init(**options)
            return
        except Exception as error:
            _end_nodes_of(error)
            if not tries_left or "timed out during startup" not in str(error):
                raise


def _end_nodes_of(error: Exception) -> None:
    """End the processes of nodes whose start an error has cut off; it alone still knows of them."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(node := frame.f_locals.get("self"), Node):
            node.kill_all_processes(check_alive=False)


def forget_auth_mode() -> None:
    """Make this process speak to the next Ray as if there had been none before.

    A cluster without tokens would take this process, which still asks for them, for dead, and end its actors.
    Ray keeps the setting and the token in private objects too, as read from Ray 2.60.0.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    os.environ.pop(AUTH_MODE, None)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()  # else the next driver's server asks for the token


def placement_notes(config: GVPOConfig, engines: bool) -> Iterator[str]:
    """Yield a line for each actor that no node of the cluster, as it is now, could hold even when empty.

    Such an actor waits for the autoscaler, or for ever.
    """
    wanted = {"learner worker": resources_of(config.learner)}
    if engines:
        wanted |= {
            f"engine of pool {name}": resources_of(pool)
            for name, pool in config.engines.all_pools().items()
            if pool.num or pool.max_num
        }
        wanted["verifier"] = {"CPU": config.verifiers.num_cpus, **config.verifiers.resources}
        if config.environment is not None:
            wanted["environment"] = {"CPU": config.environment.num_cpus, **config.environment.resources}
        if (other := config.loss.reference_model) is not None:
            wanted["reference"] = {"CPU": other.num_cpus, "GPU": other.num_gpus}
    spread = {
        f"engine of pool {name}": bundles_of(pool)
        for name, pool in config.engines.all_pools().items()
        if pool.is_spread
    }
    alive = (node for node in ray.nodes() if node["Alive"])  # type: ignore[no-untyped-call]
    nodes = [node["Resources"] for node in alive]
    for who, resources in wanted.items():
        if who in spread:
            if not _have_room(nodes, spread[who]):
                yield (
                    "placement: all nodes of this cluster together have no room for the "
                    f"{len(spread[who])} GPUs of an {who}: it waits until the autoscaler brings more; if "
                    "the cluster has no autoscaler, or no such node type, for ever"
                )
        elif not any(
            all(node.get(name, 0.0) >= number for name, number in resources.items()) for node in nodes
        ):
            text = ", ".join(f"{name}: {number:g}" for name, number in resources.items() if number)
            yield (
                f"placement: no node of this cluster has {{{text}}} for "
                f"a{'n' if who[0] in 'aeiou' else ''} {who}: it waits until the "
                "autoscaler brings one; if the cluster has no autoscaler, or no such node type, for ever"
            )


def _have_room(nodes: Sequence[Mapping[str, float]], bundles: Sequence[Mapping[str, float]]) -> bool:
    """Return whether empty nodes have room for all bundles, each on one of them.

    Bundles are put onto nodes in order; of an engine's the first asks for most.
    """
    free = [dict(node) for node in nodes]
    for bundle in bundles:
        for node in free:
            if all(node.get(name, 0.0) >= number for name, number in bundle.items()):
                for name, number in bundle.items():
                    node[name] -= number
                break
        else:
            return False
    return True
