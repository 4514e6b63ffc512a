"""Checkpoints that are whole or absent: written aside, flushed, hashed, renamed.

A checkpoint is a folder of files and a `manifest.json` with the hash and size of each. The caller decides what is in
it: plain JSON, and whatever its parts write, each rank its own. Ranks share the folder's disk.
"""

from __future__ import annotations

import errno
import json
import logging
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

from opd.disk import free_bytes, size_in_words
from opd.errors import CheckpointError, OpdError
from opd.ranks.ranks import Ranks, SharedError
from opd.standing import ADVICE

logger = logging.getLogger(__name__)
T = TypeVar("T")

FORMAT = 1
"""The number of this layout of folders; a checkpoint of another one is refused, not passed over as damaged."""
_STEP = re.compile(r"step-(\d+)")


def save(
    folder: Path,
    *,
    parts: Sequence[Callable[[Path], None]],
    records: dict[str, Any],
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
) -> None:
    """Let every rank write its `parts`, and the first one `<name>.json` for each record, as one atomic folder.

    Raises CheckpointError on all ranks, with the old checkpoints intact and nothing left behind, whatever goes wrong:
    the disk is full or not writable, or a part cannot be written.
    """
    aside = folder.with_name(f".{folder.name}.partial")

    def begin() -> None:
        check_room(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, record in records.items():
            (aside / f"{name}.json").write_text(json.dumps(record), encoding="utf-8")

    def write() -> None:
        for part in parts:
            part(aside)

    def attempt(work: Callable[[], T]) -> Callable[[], T]:
        return partial(_or_checkpoint_error, work, folder)

    try:
        ranks.from_first(attempt(begin))
        ranks.agree(attempt(write))
        described = ranks.gather(ranks.agree(attempt(lambda: _describe(aside, ranks.share(_files(aside))))))
        ranks.from_first(attempt(lambda: _publish(aside, folder, described)))
    except (CheckpointError, SharedError):  # by then no rank writes any more
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def check_room(root: Path) -> None:
    """Raise CheckpointError where the disk has less room than the newest checkpoint under `root` takes."""
    for newest in step_folders(root)[-1:]:
        needed, free = sum(path.stat().st_size for path in _files(newest)), free_bytes(root)
        if free < needed:
            raise CheckpointError(
                f"no checkpoint is written: {newest.name} took {size_in_words(needed)}, and the disk of {root} has "
                f"{size_in_words(free)} free. Earlier checkpoints are untouched. Make room, and go on with --resume"
            )


def _publish(aside: Path, folder: Path, described: Sequence[dict[str, Any]]) -> None:
    """Write the manifest, flush every file, and give the folder its name."""
    known = {name: file for share in described for name, file in share.items()}
    (aside / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": known}, indent=1), encoding="utf-8")
    for path in [*_files(aside), aside]:
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    _flush(folder.parent)


def _or_checkpoint_error(work: Callable[[], T], folder: Path) -> T:
    try:
        return work()
    except OpdError:
        raise
    except Exception as error:  # a full disk is an OSError to us, a RuntimeError to torch, its own to safetensors
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise CheckpointError(
                f"could not write {folder}: {error.strerror}: something in this process opens files and does not close "
                f"them. Earlier checkpoints are untouched; go on with --resume. {ADVICE}"
            ) from error
        why, free = (str(error) or repr(error)).splitlines()[0], size_in_words(free_bytes(folder))
        raise CheckpointError(
            f"could not write {folder}: {why} ({free} are free there). Earlier checkpoints are untouched; "
            "make room or mend the disk, and go on with --resume"
        ) from error


class FormatError(CheckpointError):
    """A checkpoint is of another format: no damage, and no reason to go on from an older one."""


class Checkpoint:
    """A saved folder, verified against its manifest when it is opened; of several ranks each verifies a share.

    Raises CheckpointError on all ranks when the folder is not whole, or is of another format.
    """

    def __init__(self, folder: Path, ranks: Ranks = Ranks()) -> None:  # noqa: B008  (frozen)
        self.folder = folder
        ranks.agree(partial(self._verify, ranks))

    def _verify(self, ranks: Ranks) -> None:
        for name, known in ranks.share(sorted(_manifest(self.folder).items())):
            path = self.folder / name
            inside = not Path(name).is_absolute() and ".." not in Path(name).parts
            if not (inside and path.is_file()) or {"bytes": path.stat().st_size, "sha256": _digest(path)} != known:
                raise CheckpointError(f"{path} is missing or damaged; resume from an older checkpoint")

    def tensors(self, name: str) -> dict[str, Tensor]:
        loaded: dict[str, Tensor] = load_file(self.folder / f"{name}.safetensors")
        return loaded

    def record(self, name: str) -> Any:
        """Read a record. Raises CheckpointError where there is none that can be read."""
        try:
            return json.loads((self.folder / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{self.folder}: its {name}.json cannot be read ({error!r})") from error


def _check_format(folder: Path) -> None:
    """Raise FormatError where a checkpoint is of another format; what cannot be read is damage."""
    try:
        _manifest(folder)
    except FormatError:
        raise
    except CheckpointError:
        return


def _manifest(folder: Path) -> dict[str, Any]:
    """Read the hash and size that each file should have. Raises CheckpointError where the manifest cannot be read."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        files, found = dict(manifest["files"]), manifest["format"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a whole checkpoint: its manifest is unreadable ({error!r})") from error
    if found != FORMAT:
        raise FormatError(
            f"{folder} is of format {found!r}, and this version of opd reads format {FORMAT}. Go on with the version "
            "that wrote it, or begin anew in another folder (out)"
        )
    if not files:
        raise CheckpointError(f"{folder} is not a whole checkpoint: its manifest names no file")
    return files


def step_folders(root: Path) -> list[Path]:
    """The `step-N` folders under `root`, oldest first."""
    found = [(int(match.group(1)), path) for path in root.glob("step-*") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def latest(
    root: Path,
    ranks: Ranks = Ranks(),  # noqa: B008  (frozen)
    *,
    check: Callable[[Checkpoint], object] = lambda _: None,
) -> Checkpoint:
    """Open the newest whole checkpoint; damaged ones are passed over, with a warning that names them.

    `check` raises CheckpointError where what stands in one is not what its caller saves.

    Raises CheckpointError when none is left, and FormatError where the newest is of another format.
    """
    problems: list[str] = []
    for folder in reversed(ranks.from_first(lambda: step_folders(root))):
        ranks.from_first(partial(_check_format, folder))
        try:
            found = Checkpoint(folder, ranks)
            ranks.agree(partial(check, found))
        except (CheckpointError, SharedError) as error:
            problems.append(str(error))
            continue
        if problems and ranks.first:
            logger.warning("%s. Going on from the older %s", "; ".join(problems), folder.name)
        return found
    raise CheckpointError("; ".join(problems) or f"there is no checkpoint under {root}")


def put_aside_after(folder: Path) -> list[Path]:
    """Rename the checkpoints that are newer than this one, from which the run goes on; return the new names.

    They were passed over as damaged, and would be taken for the run's future.
    """
    moved = []
    for newer in [path for path in step_folders(folder.parent) if _number(path) > _number(folder)]:
        aside, count = newer.with_name(f"{newer.name}.damaged"), 1
        while aside.exists():
            count += 1
            aside = newer.with_name(f"{newer.name}.damaged-{count}")
        moved.append(newer.rename(aside))
    return moved


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def rotate(root: Path, keep_last: int, *, keep: Sequence[Path] = ()) -> None:
    """Delete all checkpoints but the newest `keep_last` and those in `keep`."""
    for folder in step_folders(root)[:-keep_last]:
        if folder not in keep:  # a run that is killed meanwhile leaves no half of one under its name
            gone = folder.with_name(f".{folder.name}.deleted")
            shutil.rmtree(gone, ignore_errors=True)
            folder.rename(gone)
    for gone in root.glob(".step-*.deleted"):
        shutil.rmtree(gone, ignore_errors=True)


def sweep(root: Path) -> None:
    """Delete what a run that was killed while it saved or deleted has left under `root`."""
    for pattern in (".step-*.partial", ".step-*.deleted"):
        for left in root.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _describe(root: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The manifest's entries for these files under `root`: the hash and size of each, by name."""
    return {str(path.relative_to(root)): {"sha256": _digest(path), "bytes": path.stat().st_size} for path in files}


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
