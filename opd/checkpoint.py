"""Checkpoints that are whole or absent: written aside, flushed, hashed, renamed.

A checkpoint is a folder of files and a `manifest.json` with the hash and size of each. What is in it is up
to the caller: plain JSON, and whatever its parts write, each rank its own. Ranks share the folder's disk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from opd.errors import CheckpointError
from opd.ranks import Ranks, SharedError

T = TypeVar("T")

_STEP = re.compile(r"step-(\d+)")


def save(
    folder: Path,
    *,
    parts: Sequence[Callable[[Path], None]],
    records: dict[str, Any],
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
) -> None:
    """Let every rank write its `parts`, and the first one `<name>.json` for each record, as one atomic folder.

    Raises CheckpointError on all ranks, with the old checkpoints intact, when the disk is full or not writable.
    """
    aside = folder.with_name(f".{folder.name}.partial")

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, record in records.items():
            (aside / f"{name}.json").write_text(json.dumps(record))

    def write() -> None:
        for part in parts:
            part(aside)

    def look_over() -> dict[str, Any]:
        return {str(path.relative_to(aside)): _described(path) for path in ranks.share(_files(aside))}

    def finish() -> None:
        known = {name: file for share in described for name, file in share.items()}
        (aside / "manifest.json").write_text(json.dumps({"files": known}, indent=1))
        for path in [*_files(aside), aside]:
            _flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
        _flush(folder.parent)

    def attempt(work: Callable[[], T]) -> Callable[[], T]:
        return partial(_or_checkpoint_error, work, folder, aside)

    ranks.from_first(attempt(begin))
    ranks.agree(attempt(write))
    described = ranks.gather(ranks.agree(attempt(look_over)))
    ranks.from_first(attempt(finish))


def _or_checkpoint_error(work: Callable[[], T], folder: Path, aside: Path) -> T:
    try:
        return work()
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(f"could not write {folder}: {error}; earlier checkpoints are untouched") from error


class Checkpoint:
    """A saved folder, verified against its manifest when it is opened; of several ranks each verifies a share.

    Raises CheckpointError on all ranks when the folder is not whole.
    """

    def __init__(self, folder: Path, ranks: Ranks = Ranks()) -> None:  # noqa: B008  (frozen)
        self.folder = folder
        ranks.agree(partial(self._verify, ranks))

    def _verify(self, ranks: Ranks) -> None:
        try:
            files = json.loads((self.folder / "manifest.json").read_text())["files"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder} is not a whole checkpoint: its manifest is unreadable ({error})"
            ) from error
        for name, known in ranks.share(sorted(files.items())):
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != known["bytes"] or _digest(path) != known["sha256"]:
                raise CheckpointError(f"{path} is missing or damaged; resume from an older checkpoint")

    def tensors(self, name: str) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = load_file(self.folder / f"{name}.safetensors")
        return loaded

    def record(self, name: str) -> Any:
        return json.loads((self.folder / f"{name}.json").read_text())


def step_folders(root: Path) -> list[Path]:
    """The `step-N` folders under `root`, oldest first."""
    found = [(int(match.group(1)), path) for path in root.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest(root: Path, ranks: Ranks = Ranks()) -> Checkpoint:  # noqa: B008  (frozen)
    """The newest whole checkpoint; damaged ones are passed over. Raises CheckpointError when none is left."""
    problems = []
    for folder in reversed(ranks.from_first(lambda: step_folders(root))):
        try:
            return Checkpoint(folder, ranks)
        except (CheckpointError, SharedError) as error:
            problems.append(str(error))
    raise CheckpointError("; ".join(problems) or f"there is no checkpoint under {root}")


def rotate(root: Path, keep_last: int, *, keep: Sequence[Path] = ()) -> None:
    """Delete all but the newest `keep_last` checkpoints, and those to `keep`."""
    for folder in step_folders(root)[:-keep_last]:
        if folder not in keep:  # a run that is killed meanwhile leaves no half of one under its name
            folder.rename(folder.with_name(f".{folder.name}.deleted"))
    for gone in root.glob(".step-*.deleted"):
        shutil.rmtree(gone)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _described(path: Path) -> dict[str, Any]:
    return {"sha256": _digest(path), "bytes": path.stat().st_size}


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
