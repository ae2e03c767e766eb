"""A machine whose settings once broke the set-up: of pip, of Python, and packages that others installed.

    python3 tests/hostile_machine.py FOLDER COMMAND...    run a command on it

FOLDER gets the files that the settings name. jobs/setup.sh has to install constraints.txt all the same, and
leave nothing in FOLDER/target and FOLDER/user. CI sets itself up here, from nothing; tests/test_setup.py, a
folder in which large packages are there already.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

FOREIGN = ("einops", "torchvision")
"""Packages that others installed, on PYTHONPATH: an import of theirs fails."""


def variables(folder: Path) -> dict[str, str]:
    """Write the files, and return the environment variables."""
    (folder / "capped.txt").write_text("torch<=2.14.1\ntorchvision<=0.29.1\nsetuptools<79\n")
    foreign = folder / "foreign"
    (version,) = re.findall(r"^einops==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for name in FOREIGN:
        entry = foreign / f"{name}-{version}.dist-info"
        entry.mkdir(parents=True)
        (entry / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (entry / "RECORD").touch()
        (foreign / f"{name}.py").write_text("raise RuntimeError('a foreign package')\n")
    return {
        "PIP_CONSTRAINT": (folder.resolve() / "capped.txt").as_uri(),  # a path would end at a space
        "PIP_TARGET": str(folder / "target"),
        "PIP_DRY_RUN": "1",
        "PIP_USER": "1",
        "PIP_NO_BINARY": ":all:",
        "PYTHONPATH": str(foreign),
        "PYTHONHOME": str(foreign),
        "PYTHONUSERBASE": str(folder / "user"),
    }


if __name__ == "__main__":
    place, *command = sys.argv[1:]
    os.execvpe(command[0], command, os.environ | variables(Path(place)))
