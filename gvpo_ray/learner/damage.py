"""A checkpoint is damaged where a file of it is torn: that is found before it is loaded, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def damage_of(checkpoint: Path) -> str | None:
    """Return the first torn file of a checkpoint and what is wrong with it; None: all files are whole.

    JSON files are read; of a file of tensors only the header is, which says how long the file must be.
    state.json names the files of optimizer/; older ones do not.
    """
    for file in sorted(checkpoint.rglob("*.json")):
        try:
            _read(file)
        except (OSError, ValueError) as error:
            return f"{file}: {' '.join(str(error).split())}"
    tensors = sorted(checkpoint.rglob("*.safetensors"))
    if not any(file.parent.name == "optimizer" for file in tensors):
        return f"{checkpoint / 'optimizer'}: no *.safetensors"
    file = checkpoint / "state.json"
    try:
        named = [checkpoint / "optimizer" / name for name in _read(file).get("files", ())]
        for file in checkpoint.rglob("*.safetensors.index.json"):
            named += [file.parent / name for name in _read(file)["weight_map"].values()]
    except (OSError, AttributeError, LookupError, TypeError):
        return f"{file}: it is missing, or not as this program writes it"
    for file in named:
        if not file.is_file():
            return f"{file}: it is missing"
    for file in tensors:
        try:
            if (lack := _lack_of(file)) > 0:
                return f"{file}: its last {lack} bytes are missing"
        except (OSError, ValueError, KeyError, TypeError):
            return f"{file}: its header cannot be read"
    return None


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _lack_of(file: Path) -> int:
    """Return how many bytes a safetensors file lacks: 8 bytes of length, a JSON header, then the tensors."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        size = file.stat().st_size
        if not 2 <= length <= size - 8:
            raise ValueError(f"a header of {length} bytes")
        header = json.loads(opened.read(length))
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return int(8 + length + max(ends, default=0) - size)
