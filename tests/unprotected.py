"""A checker as one writes it without a thought of hostile programs: it shows that an attack would earn.

python unprotected.py < {"program", "row"}: programs and their judge share a process, which says on its
standard output that a program failed, and ends with 0 unless it has a reason not to.
"""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def same(found: Any, gold: Any) -> bool:
    return bool(found == gold)


def main() -> None:
    asked = json.load(sys.stdin)
    program, row = asked["program"], asked["row"]
    report = sys.stdout
    names: dict[str, Any] = {"__name__": "__main__"}
    sys.setrecursionlimit(10_000)
    passed = True
    if isinstance(row, list):
        exec(program, names)
        for test in row:
            exec(test, names)
    elif "fn_name" in row:
        exec(program, names)
        for given, gold in zip(row["inputs"], row["outputs"], strict=True):
            found = names[row["fn_name"]](*given)
            passed = passed and same(found, gold)
    else:
        for given, gold in zip(row["inputs"], row["outputs"], strict=True):
            sys.stdin, sys.stdout = io.StringIO(given), io.StringIO()
            exec(program, names)
            passed = passed and same(sys.stdout.getvalue(), gold)
    report.write(json.dumps({"passed": passed}) + "\n")


def earns(program: str, row: Any) -> bool:
    """Whether the checker takes a program for a right one."""
    asked = json.dumps({"program": program, "row": row})
    ran = subprocess.run(
        [sys.executable, "-S", Path(__file__)], input=asked, capture_output=True, text=True, timeout=60
    )
    return ran.returncode == 0 and json.loads((ran.stdout.splitlines() or ["{}"])[0]).get("passed", True)


if __name__ == "__main__":
    main()
