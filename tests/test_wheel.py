"""The wheel: what is in it, and that `gvpo-ray` runs the quickstart from it in an empty folder.

It is installed into an environment of its own, which finds the other packages where these tests have them.
"""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import gvpo_ray
from gvpo_ray.config.base import ConfigError
from gvpo_ray.config.loading import packaged_jobs, read_yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what git would have: no earlier build, no caches."""
    source = tmp_path_factory.mktemp("source") / "project"
    unwanted = shutil.ignore_patterns("__pycache__")
    for name in ("gvpo_ray", "jobs"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"  # as pip calls it
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, stdout=subprocess.DEVNULL)
    (found,) = (source / "dist").iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python of an environment with the wheel, which has the packages of this one behind its own.

    Its path has a space, which Ray does not quote by itself where Ray Train starts its workers.
    """
    folder = tmp_path_factory.mktemp("with space") / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (folder / "lib").glob("python3.*/site-packages")
    (site / "others.pth").write_text(
        sysconfig.get_path("purelib") + "\n"
    )  # whose own .pth files are not read
    yield python
    shutil.rmtree(folder)


def run(python: Path, folder: Path, *arguments: str) -> str:
    """What a command of the environment prints, in an empty folder and without this checkout."""
    command = [python.with_name(arguments[0]), *arguments[1:]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_has_all_of_the_package_and_the_jobs_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    kinds = {".py", ".typed", ".css", ".js", ".html"}
    package = {path for path in (ROOT / "gvpo_ray").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert {path.suffix for path in package} <= kinds
    jobs = {f"gvpo_ray/jobs/{path.name}" for path in (ROOT / "jobs").glob("*.yaml")}
    named = ("tools_cpu", "agent_cpu", "verifiers_cpu", "family_cpu", "smollm2_tools_cpu")
    jobs |= {f"gvpo_ray/jobs/{name}.py" for name in named}  # which YAML files name
    assert names == {path.relative_to(ROOT).as_posix() for path in package} | jobs


def test_its_version_is_the_packages(wheel: Path) -> None:
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("dist-info/METADATA"))
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(name))
    assert metadata["Version"] == gvpo_ray.__version__
    assert "version" not in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_it_needs_are_ranges_so_that_other_packages_fit_beside_it() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for needed in map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["cpu"]]):
        assert needed.specifier and all(rule.operator in (">=", "<") for rule in needed.specifier), needed


def test_the_jobs_of_a_checkout_are_its_own() -> None:
    assert set(packaged_jobs().values()) == set((ROOT / "jobs").glob("*.yaml"))


def test_a_file_goes_before_the_job_of_its_name_and_a_job_that_is_not_there_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_yaml("quickstart") == yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text())
    for path in ("jobs/quickstart.yaml", "quickstrat"):
        with pytest.raises(ConfigError) as caught:
            read_yaml(path)
        said = f"{path}: No such file or directory; did you mean quickstart, which comes with gvpo_ray?"
        assert str(caught.value) == said
    with pytest.raises(ConfigError) as caught:
        read_yaml("mine.yaml")
    assert str(caught.value) == "mine.yaml: No such file or directory"
    Path("quickstart").write_text("seed: 7\n")
    assert read_yaml("quickstart") == {"seed": 7}


def test_every_job_is_found_by_its_name_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    lines = run(installed, tmp_path, "gvpo-ray", "jobs").splitlines()
    assert [line.partition(":")[0] for line in lines[:-1]] == list(packaged_jobs())
    assert lines[list(packaged_jobs()).index("quickstart")] == (
        "quickstart: Two-digit addition, a model of 0.25 M parameters made on the spot, 2 CPU cores"
    )
    assert all(line.count("(") == line.count(")") for line in lines)  # none ends amid a sentence
    folder = Path(lines[-1].removeprefix("in "))
    assert folder.is_relative_to(installed.parents[1])
    for name, path in packaged_jobs().items():
        assert (folder / f"{name}.yaml").read_text() == path.read_text()


QUICK = ["num_steps=2", "learner.num_workers=1", "groups_per_step=8", "evaluation.every_limit=8"]
QUICK += ["evaluation.sets.heldout.limit=8", "warm_start.num_epochs=0.01", "learner.num_mini_batches=1"]
# neither DeepSpeed nor a second verifier is in the wheel
QUICK += ["learner.backend=ddp", "learner.zero_stage=0", "verifiers.num=1"]


@pytest.mark.end_to_end
def test_the_wheel_trains_the_quickstart_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    said = run(installed, tmp_path, "gvpo-ray", "train", "quickstart", *QUICK)
    assert "warm start: update 8/8" in said and "step 2/2 · " in said
    where = run(installed, tmp_path, "python", "-c", "import gvpo_ray; print(gvpo_ray.__file__)")
    assert Path(where).is_relative_to(installed.parents[1])
    config = yaml.safe_load((tmp_path / "runs" / "quickstart" / "config.yaml").read_text())
    assert config["num_steps"] == 2
    assert "interrupted" not in said and (tmp_path / "runs" / "quickstart" / "metrics.jsonl").is_file()
    assert run(installed, tmp_path, "gvpo-ray", "report", "runs/quickstart").startswith("wrote ")
