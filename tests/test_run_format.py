"""Run directories have a format: one of another format is refused, and its groups are still read.

`format_1/` is the directory of a run as the package at commit 087fe7b wrote it: config.yaml, and a log of
five groups of which four are assigned to two steps.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import make_group, make_model, table

from gvpo_ray import GVPO, __version__, groups
from gvpo_ray.buffer.log import GroupLog
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.run import GVPOConfig
from gvpo_ray.run.run_dir import FORMAT, import_groups, open_run_dir, read_recorded

OLD = Path(__file__).parent / "format_1"
REFUSED = (
    f"run_dir: {{path}} was made by gvpo_ray 0.1.0 or older, in format 1; this is {__version__}, which goes "
    f"on with format {FORMAT}: use another run_dir (gvpo-ray learn --groups {{path}}/groups reads its groups)"
)


def config(folder: Path) -> GVPOConfig:
    """A config with the values of the old run's."""
    data = {
        "run_dir": str(folder / "run"),
        "num_steps": 2,
        "groups_per_step": 2,
        "model": {"path": "./model"},
        "prompts": {"path": "train.jsonl", "template": "{prompt}="},
        "sampling": {"num_completions": 3, "max_tokens": 16},
        "learner": {"num_mini_batches": 1},
    }
    return GVPOConfig.from_dict(data)


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def logged() -> list[dict[str, object]]:
    """The groups that are in the old log."""
    rewards = {2: (1.0, 0.0, None, 0.5)}
    return [make_group(i, rewards.get(i, (1.0, 0.0, 0.5))) for i in range(5)]


def test_a_new_run_says_its_format_and_the_version_that_made_it_once(tmp_path: Path) -> None:
    with open_run_dir(config(tmp_path)) as run_dir:
        made = run_dir / "format.json"
        assert json.loads(made.read_text()) == {"format": FORMAT, "gvpo_ray": __version__}
    made.write_text(json.dumps({"format": FORMAT, "gvpo_ray": "0.0.7"}))
    with open_run_dir(config(tmp_path)):
        assert json.loads(made.read_text())["gvpo_ray"] == "0.0.7"  # who made it, not who took it up


def test_a_folder_in_which_no_run_began_needs_no_format(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("of a person")
    with open_run_dir(config(tmp_path)) as run_dir:
        assert (run_dir / "format.json").is_file() and (run_dir / "notes.txt").is_file()


def test_a_run_dir_without_a_format_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    old = shutil.copytree(OLD, tmp_path / "run")
    before = contents(old)
    with pytest.raises(ConfigError) as caught, open_run_dir(config(tmp_path)):
        pass
    assert str(caught.value) == REFUSED.format(path=old)
    with pytest.raises(ConfigError, match="in format 1"):
        GVPO.from_run_dir(old)
    assert contents(old) == before


@pytest.mark.components
def test_train_ends_with_status_2_and_one_line_on_a_run_dir_without_a_format(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    (tmp_path / "train.jsonl").write_text('{"prompt": "1 + 2?", "answer": "3"}\n')
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tmp_path).model_dump(mode="json")))
    old = shutil.copytree(OLD, tmp_path / "run")
    before = contents(old)
    done = subprocess.run(
        [sys.executable, "-m", "gvpo_ray", "train", "config.yaml"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and done.stderr == f"error: {REFUSED.format(path=old)}\n"
    assert contents(old) == before


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"format": 3, "gvpo_ray": "9.1.0"}', "run was made by gvpo_ray 9.1.0, in format 3;"),
        ("{", "run/format.json does not say which format"),
        ("3", "run/format.json does not say which format"),
        ("{}", "run/format.json does not say which format"),
    ],
)
def test_a_run_dir_of_a_later_format_or_of_one_that_cannot_be_read_is_refused(
    tmp_path: Path, text: str, complaint: str
) -> None:
    with open_run_dir(config(tmp_path)) as run_dir:
        (run_dir / "format.json").write_text(text)
    with pytest.raises(ConfigError) as caught, open_run_dir(config(tmp_path)):
        pass
    assert complaint in str(caught.value)


def test_the_groups_of_an_old_run_are_read_with_their_assignment(tmp_path: Path) -> None:
    recorded, assigned, steps = read_recorded(OLD / "groups", 2, tmp_path / "groups")
    assert assigned == {1: (0, 2), 2: (2, 4)} and steps == 2
    columns = list(groups.LOGGED_COLUMNS)
    want = table(*logged()).select(columns).to_pylist()
    assert recorded.read(0, len(recorded)).select(columns).to_pylist() == want
    import_groups(recorded, assigned, tmp_path / "groups")
    log = GroupLog(tmp_path / "groups")
    assert log.assigned == assigned
    assert log.read(0, len(log)).select(columns).to_pylist() == want
