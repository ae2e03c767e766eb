"""The learner group runs the learner's loop in Ray Train workers.

The death of a worker or of its node costs the steps since the last checkpoint: Ray Train restarts the group,
which takes those steps' batches from the log again and ends in the same weights.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.util.placement_group import PlacementGroup

from gvpo_ray.actors import RunError, cause_of, innermost, resources_of, tag_of
from gvpo_ray.buffer.actor import LearnerBufferClient
from gvpo_ray.config.plan import cluster_address
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.files import DiskFull, lock, make_folder, write_whole
from gvpo_ray.home import ensure_home
from gvpo_ray.imports import large_imports
from gvpo_ray.learner.checkpoints import LOCK, latest_checkpoint

WRONG = (
    AssertionError,
    AttributeError,
    DiskFull,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
"""Errors of code or data, which would come again after a restart, and disks that are full.

Any other error of a worker may be a consequence of another worker's death.
"""

SAVE_END_S = 60.0
"""Seconds that a checkpoint which is being written when training fails gets to end."""

WRITER_END_S = 600.0
"""Seconds that a learner waits for the one of a driver that was killed, which first ends its step."""


class LearnerGroup:
    """A LearnerGroup runs the Ray Train workers from a thread.

    TorchTrainer.fit blocks that thread until the buffer tells the learner to stop.

    Args:
        config: the run's.
        run_dir: the run directory.
        buffer: the handle of the buffer's actor.
        engines: handles of the engines, where the transport of weights needs them (all but `objects`).
        last_step: the step after which nothing is left to train.
        probes: token ids of the sequences on which engines are compared with the learner at the start.
    """

    def __init__(
        self,
        config: GVPOConfig,
        run_dir: Path,
        buffer: Any,
        engines: list[Any],
        last_step: int,
        probes: Sequence[list[int]] = (),
    ) -> None:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        learner = config.learner
        # mypy reads the classes of Train v1, which had other types; Ray runs v2.
        workers: Any = (
            (learner.num_workers, learner.max_workers) if learner.max_workers else learner.num_workers
        )
        for left in run_dir.glob(".ray_train_*"):  # left by a driver that was killed
            shutil.rmtree(left, ignore_errors=True)
        if cluster_address(config.ray) or config.ray.dashboard:
            # With this the dashboard shows the run and what its workers do.
            os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
        if not cluster_address(config.ray):
            # Nobody drains a node of an embedded Ray, and this would be a process more.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Ray Train's own files, in a folder that every node can write to
        self._scratch = tempfile.mkdtemp(prefix=".ray_train_", dir=run_dir)
        self._controller = Path(self._scratch) / "controller"
        callbacks: list[Any] = [_ReportFailures(buffer), _RecordController(self._controller)]

        unused: list[type] = [DatasetsCallback]
        if not cluster_address(config.ray) and ray.get_runtime_context().get_actor_id() is None:
            unused.append(PlacementGroupCleanerCallback)

        class Trainer(TorchTrainer):
            """A Trainer starts without actors of Ray Train that have nothing to do here: 5 CPU seconds each.

            One hands out shards of datasets, of which a learner has none. Another removes the placement group
            of a controller that died, as `_remove_places` does; an embedded Ray ends with this process. It
            stays where this process may go and its job not, as on a cluster and in an actor. That all come
            from this method is private in Ray, and read from Ray 2.60.0.
            """

            def _create_default_callbacks(self) -> list[Any]:
                made = super()._create_default_callbacks()  # type: ignore[misc]  # of Train v2
                return [one for one in made if not isinstance(one, tuple(unused))]

        self._trainer = Trainer(
            train_loop,
            train_loop_config={
                "config": config,
                "run_dir": str(run_dir),
                "buffer": buffer,
                "engines": engines,
                "last_step": last_step,
                "probes": probes,
            },
            torch_config=TorchConfig(backend="nccl" if learner.num_gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=learner.num_gpus > 0,
                resources_per_worker=resources_of(learner),
            ),
            run_config=RunConfig(
                name=tag_of(run_dir.name),  # Ray Train makes it a tag of its metrics
                storage_path=self._scratch,
                failure_config=FailureConfig(max_failures=learner.max_restarts),
                callbacks=callbacks,
            ),
        )
        self._buffer, self._num_left = buffer, learner.max_restarts
        self._thread: threading.Thread | None = None
        self.ended: Future[None] = Future()

    def start(self) -> None:
        """Start the workers; `ended` gets their end, or the error that they end with."""

        def fit() -> None:
            while True:
                try:
                    self._trainer.fit()
                    self.ended.set_result(None)
                    return
                except RayActorError as error:  # Ray Train's controller has died
                    self._num_left -= 1
                    self._remove_places()
                    if self._num_left < 0:
                        self.ended.set_exception(error)
                        return
                    self._buffer.learner_failed.remote(cause_of(error))
                except BaseException as error:  # carried to the session, which reports it as the cause
                    self.ended.set_exception(error)
                    return

        self._thread = threading.Thread(target=fit, name="learner", daemon=True)
        self._thread.start()

    def has_places(self) -> bool:
        """Return whether the workers have resources in the cluster, which they get all at once."""
        return "CREATED" in self._places().values()

    def _places(self) -> dict[str, str]:
        """Return id and state of the placement groups that the newest of our controllers has made."""
        try:
            controller = self._controller.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}  # none has started
        return placement_groups_of(controller)

    def _remove_places(self) -> None:
        """Remove the placement groups of a controller that has died, and with them its workers."""
        for number, state in self._places().items():
            if state != "REMOVED":
                ray.util.remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(number))))

    def join(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for the workers to end; return whether they have."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        shutil.rmtree(self._scratch, ignore_errors=True)
        return self._thread is None or not self._thread.is_alive()


def placement_groups_of(actor: str) -> dict[str, str]:
    """Return id and state of the placement groups that an actor has made; both ids are hexadecimal.

    Other groups of the same job are those of the user's own program, of Tune, or of another run. Who made a
    group is private in Ray, and read from Ray 2.60.0: `ray.util.placement_group_table` leaves it out.
    """
    import ray._private.state
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]

    table = ray._private.state.state._connect_and_get_accessor().get_placement_group_table()
    return {
        group.placement_group_id.hex(): PlacementGroupTableData.PlacementGroupState.Name(group.state)
        for group in map(PlacementGroupTableData.FromString, table)
        if group.creator_actor_id.hex() == actor
    }


class _RecordController(ControllerCallback):
    """This callback runs in Ray Train's controller and writes its actor id to a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def after_controller_start(self, train_run_context: Any) -> None:
        """Write the file, before the controller asks for its workers' resources."""
        write_whole(self._file, str(ray.get_runtime_context().get_actor_id()))


class _ReportFailures(UserCallback):
    """This callback runs in Ray Train's controller and tells the buffer why the workers are restarted."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Report the error of a worker that has died, rather than that of one that lost its connection."""
        died = [error for error in worker_exceptions.values() if isinstance(innermost(error), RayActorError)]
        self._buffer.learner_failed.remote(cause_of((died or list(worker_exceptions.values()))[0]))


def train_loop(settings: dict[str, Any]) -> None:
    """Run the learner's loop on this worker; Ray Train calls this.

    Args:
        settings: `train_loop_config` of LearnerGroup.
    """
    # Imported here and in _train, so that the driver and Ray Train's controller, which import this file, need
    # not wait for the learner's libraries.
    with large_imports():
        from gvpo_ray.learner.step import NonFiniteGradient

    buffer = LearnerBufferClient(settings["buffer"])
    try:
        with _sole_writer(Path(settings["run_dir"]), buffer):
            _train(settings, buffer)
    except (NonFiniteGradient, RunError, *WRONG) as error:
        buffer.close(cause_of(error))  # after that a restarted group has nothing to do
        raise


def _train(settings: dict[str, Any], buffer: LearnerBufferClient) -> None:
    ensure_home()  # before torch, which asks for the account's name when it is imported
    with large_imports():
        import ray.train
        import torch
        from ray.train.torch import get_device

        from gvpo_ray.learner.behind import Behind
        from gvpo_ray.learner.loop import learn
        from gvpo_ray.learner.policy import Policy
        from gvpo_ray.learner.step import Settings
        from gvpo_ray.weights.direct import DirectPublisher
        from gvpo_ray.weights.transfer import ObjectPublisher

    config: GVPOConfig = settings["config"]
    torch.set_num_threads(config.learner.num_threads)
    torch.manual_seed(config.seed)
    takes_turns = config.engines.colocated == "sleep"
    if config.learner.num_gpus and config.engines.colocated:
        torch.cuda.set_per_process_memory_fraction(config.engines.memory_of_learner)
    rank = ray.train.get_context().get_world_rank()
    newest = [latest_checkpoint(settings["run_dir"])]
    # The other ranks may have looked before a group that was ending wrote its last checkpoint.
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(newest, src=0)
    (checkpoint,) = newest
    policy = Policy(
        config.model,
        config.learner,
        checkpoint[1] if checkpoint else config.model.path,
        get_device(),
        resumes=checkpoint is not None,
    )
    engines = settings["engines"]
    publisher: DirectPublisher | ObjectPublisher
    # An adapter is sent in float32, which the checkpoint's merge starts from too; it is small.
    dtype = torch.float32 if config.model.lora else getattr(torch, config.model.dtype)
    behind = None
    if config.engines.weight_transfer != "objects" and engines:

        def call(method: str, arguments: list[tuple[Any, ...]]) -> None:
            ray.get(
                [
                    getattr(engine, method).remote(*args)
                    for engine, args in zip(engines, arguments, strict=True)
                ]
            )

        address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        (pool,) = config.engines.all_pools().values()
        publisher = DirectPublisher(
            config.engines.weight_transfer,
            call,
            len(engines),
            pool.num_processes,
            rank,
            dtype,
            address,
            _free_port(address),
            ray.get_runtime_context().namespace,
        )
    else:
        publisher = ObjectPublisher(ray.put, dtype, is_sender=rank == 0, frees_memory=takes_turns)
        # Without staleness there is nothing to train before engines have the weights; a learner that takes
        # turns with them gives its turn with the weights.
        if config.max_staleness != 0 and not takes_turns:
            behind = Behind(dtype, is_sender=rank == 0)
    try:
        learn(
            policy,
            buffer,
            publisher,
            Settings(
                run_dir=settings["run_dir"],
                num_steps=config.num_steps,
                last_step=settings["last_step"],
                loss=config.loss,
                learner=config.learner,
                checkpoint=config.checkpoint,
                model_path=config.model.path,
                parity_every=config.engines.parity_every,
                seed=config.seed,
                probes=settings["probes"],
                reports_references=config.replay.share > 0,
            ),
            on_checkpoint=ray.train.report,
            behind=behind,
        )
    finally:  # before others may write checkpoints
        policy.wait_for_saving(SAVE_END_S)


@contextlib.contextmanager
def _sole_writer(run_dir: Path, buffer: LearnerBufferClient) -> Iterator[None]:
    """Wait on rank 0 until no other learner group writes checkpoints, and keep others waiting.

    The group of a driver that was killed may still be ending.

    Raises:
        RunError: it has not ended after WRITER_END_S.
    """
    import ray.train

    if ray.train.get_context().get_world_rank() != 0:
        yield
        return
    path = run_dir / LOCK
    make_folder(path.parent)
    try:
        held = lock(path)
    except BlockingIOError:
        buffer.learner_waits(f"which still writes to {path.parent}")
        try:
            held = lock(path, WRITER_END_S)
        except BlockingIOError:
            raise RunError(
                f"another learner still writes to {path.parent} after {WRITER_END_S:g} s: end its process "
                "(it has that folder's .lock open), or use another run_dir"
            ) from None
    with held:
        yield


def _free_port(address: str) -> int:
    with socket.socket() as free:
        free.bind((address, 0))
        return int(free.getsockname()[1])
