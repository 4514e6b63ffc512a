"""Checkpoints that are whole or absent: written aside, flushed, hashed, renamed.

A checkpoint is a folder of files and a `manifest.json` with the hash and size of each. What is in it is up
to the caller: tensors by name (safetensors), plain JSON, and torch states that load without running code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.errors import CheckpointError

_STEP = re.compile(r"step-(\d+)")


def save(
    folder: Path, *, tensors: dict[str, dict[str, Tensor]], states: dict[str, Any], records: dict[str, Any]
) -> None:
    """Write `<name>.safetensors`, `<name>.pt` and `<name>.json` files as one atomic folder.

    Raises CheckpointError, with the old checkpoints intact, when the disk is full or not writable.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, named in tensors.items():
            save_file({key: t.detach().cpu().contiguous() for key, t in named.items()}, aside / f"{name}.safetensors")
        for name, state in states.items():
            torch.save(state, aside / f"{name}.pt")
        for name, record in records.items():
            (aside / f"{name}.json").write_text(json.dumps(record))
        files = {path.name: {"sha256": _digest(path), "bytes": path.stat().st_size} for path in sorted(aside.iterdir())}
        (aside / "manifest.json").write_text(json.dumps({"files": files}, indent=1))
        for path in aside.iterdir():
            _flush(path)
        _flush(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"could not write {folder}: {error}; earlier checkpoints are untouched") from error


class Checkpoint:
    """A saved folder, verified against its manifest when it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            files = json.loads((folder / "manifest.json").read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{folder} is not a whole checkpoint: its manifest is unreadable ({error})"
            ) from error
        for name, known in files.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != known["bytes"] or _digest(path) != known["sha256"]:
                raise CheckpointError(f"{path} is missing or damaged; resume from an older checkpoint")

    def tensors(self, name: str) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = load_file(self.folder / f"{name}.safetensors")
        return loaded

    def state(self, name: str) -> Any:
        return torch.load(self.folder / f"{name}.pt", weights_only=True)

    def record(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())


def step_folders(root: Path) -> list[Path]:
    """The `step-N` folders under `root`, oldest first."""
    found = [(int(match.group(1)), path) for path in root.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest(root: Path) -> Checkpoint:
    """The newest whole checkpoint; damaged ones are passed over. Raises CheckpointError when none is left."""
    problems = []
    for folder in reversed(step_folders(root)):
        try:
            return Checkpoint(folder)
        except CheckpointError as error:
            problems.append(str(error))
    raise CheckpointError("; ".join(problems) or f"there is no checkpoint under {root}")


def rotate(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints."""
    for folder in step_folders(root)[:-keep]:
        shutil.rmtree(folder)


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
