"""The images of a cluster: the Dockerfile, and that manifests and pins name the same versions."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cluster import CLUSTER, CONTAINERS, IN_IMAGE, NODES, PODS, PROJECT, ROOT, SPEC

from gvpo_ray import __version__


def pin(package: str) -> str:
    """Version of a pin in constraints.txt, without the name of a build."""
    (found,) = re.findall(rf"^{package}==([^\s+]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(found)


@pytest.mark.parametrize("name", PODS)
def test_images_are_this_versions_and_the_gpu_build_is_where_gpus_are(name):
    build = "cuda" if NODES.get(name, {}).get("GPU") else "cpu"
    assert CONTAINERS[name]["image"] == f"gvpo-ray-{build}:{__version__}"


def test_ray_is_one_version_everywhere():
    assert SPEC["rayVersion"] == pin("ray")


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments) of each, comments left out and lines joined."""
    lines = [
        line
        for line in (CLUSTER / "Dockerfile").read_text().splitlines()
        if line.strip() and not line.startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def test_the_dockerfile_has_a_target_for_each_build_from_pinned_bases():
    stages = [re.fullmatch(r"(\S+) AS (\S+)", rest) for word, rest in dockerfile() if word == "FROM"]
    bases = {stage[2]: stage[1] for stage in stages if stage}
    assert len(bases) == len(stages) and set(bases) == {"cpu-system", "cuda-system", "cpu", "cuda"}
    for target in ("cpu", "cuda"):
        assert bases[target] == f"{target}-system"
        assert (
            re.search(r":\d+\.\d+", bases[f"{target}-system"]) and "latest" not in bases[f"{target}-system"]
        )
        (install,) = (rest for word, rest in dockerfile() if rest.endswith(f"jobs/setup.sh {target}"))
        assert "PIP_NO_CACHE_DIR=1" in install
    assert f"torch {pin('torch')}" in (CLUSTER / "Dockerfile").read_text()  # whose CUDA the base has


def test_an_edit_of_the_code_or_the_readme_is_no_reason_to_install_the_packages_again():
    read = {"pyproject.toml", "constraints.txt", "LICENSE", "jobs/setup.sh", "jobs/packages.py"}
    read |= {"gvpo_ray/__init__.py"}  # the version
    before: set[str] = set()
    for word, rest in dockerfile():
        if word == "FROM":
            before = set()
        elif word == "COPY":
            before |= set(rest.split()[:-1])
        elif word == "RUN" and "jobs/setup.sh" in rest:
            assert before == read


def test_hadolint_has_nothing_to_say_about_the_dockerfile():
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, CLUSTER / "Dockerfile"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_dockerfile_puts_the_code_where_the_manifests_look_for_it_and_ends_unprivileged():
    instructions = dockerfile()
    assert [rest for word, rest in instructions if word == "WORKDIR"] == [IN_IMAGE] * 2
    assert [rest for word, rest in instructions if word == "USER"] == ["1000:1000"] * 2
    for sources in (rest.split()[:-1] for word, rest in instructions if word == "COPY"):
        assert all((ROOT / source).exists() for source in sources)
    assert ("COPY", "jobs jobs") in instructions and ("COPY", "gvpo_ray gvpo_ray") in instructions
    assert ("ENV", f"PATH={IN_IMAGE}/.venv/bin:$PATH") in instructions
    for install in (rest for word, rest in instructions if word == "RUN" and "apt-get" in rest):
        # pgrep: the preStop hook
        assert {"g++", "procps", "rsync", "python3.12", "python3.12-dev", "python3.12-venv"} <= set(
            install.split()
        )
    assert PROJECT["requires-python"] == ">=3.11,<3.13"
