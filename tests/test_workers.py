"""The learner's workers share a job with the user's own program, whose placement groups are not theirs."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import placement_group, placement_group_table

from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.learner import workers
from gvpo_ray.learner.workers import LearnerGroup
from gvpo_ray.run.session import executable


@pytest.fixture
def here() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        **executable(sys.executable),
    )
    yield
    ray.shutdown()


@ray.remote(num_cpus=0)
class Buffer:
    def __init__(self) -> None:
        self.failures: list[str] = []

    def learner_failed(self, why: str) -> None:
        self.failures.append(why)

    def told(self) -> list[str]:
        return self.failures


def until(condition: Callable[[], Any], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def of(title: str) -> list[psutil.Process]:
    """Ray's processes of a class of actors."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if " ".join(child.cmdline()).startswith(f"ray::{title}"):
                found.append(child)
    return found


def test_placement_groups_of_the_users_program_are_neither_taken_for_ours_nor_removed(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = GVPOConfig.from_dict(
        {
            "run_dir": str(tmp_path),
            "num_steps": 1,
            "model": {"path": "m"},
            "prompts": {"path": "p"},
            "learner": {"max_restarts": 1},
        },
        where="test",
    )
    theirs = placement_group([{"CPU": config.learner.num_cpus}])  # just like a worker's
    ray.get(theirs.ready())
    began = tmp_path / "began"

    def wait_for_the_end(settings: dict[str, Any]) -> None:
        began.touch()
        threading.Event().wait()

    monkeypatch.setattr(workers, "train_loop", wait_for_the_end)
    buffer: Any = Buffer.remote()
    learners = LearnerGroup(config, tmp_path, buffer, [], 1)
    assert not learners.has_places()
    learners.start()
    until(learners.has_places)
    (ours,) = learners._places()
    assert ours != theirs.id.hex()
    until(began.exists)
    assert not of("PreemptionWatcher")  # nobody drains a node of this Ray
    assert not of("DatasetManager") and not of("PlacementGroupCleaner")  # see workers.Trainer
    (process,) = of("TrainController")
    process.kill()
    until(lambda: learners.has_places() and ours not in learners._places())  # those of the next controller
    table = placement_group_table()
    assert table[ours]["state"] == "REMOVED" and table[theirs.id.hex()]["state"] == "CREATED"
    assert len(ray.get(buffer.told.remote())) == 1
    # its last death frees the places too, in a Ray that goes on
    (last,) = learners._places()
    (process,) = of("TrainController")
    process.kill()
    with pytest.raises(RayActorError):
        learners.ended.result(300)
    assert learners.join(60)
    table = placement_group_table()
    assert table[last]["state"] == "REMOVED" and table[theirs.id.hex()]["state"] == "CREATED"
