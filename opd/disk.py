"""The disk of a folder, which need not be there yet: its room, how fast it takes what is written, files on it that are
whole or absent, and errors that say that it is full."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

from opd.errors import CheckpointError, OpdError

_BLOCK, _BLOCKS, _SECONDS = 2**22, 16, 0.3
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_TEXTS = tuple(f"(os error {number})" for number in sorted(_REFUSED)) + tuple(map(os.strerror, sorted(_REFUSED)))
"""What stands in the errors of libraries that are not Python: Rust's, and those with the C library's own words."""


def size_in_words(count: int) -> str:
    """A number of bytes as a person reads it."""
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def free_bytes(folder: Path) -> int:
    """Return the bytes that this user may still write where the folder is, or is to be."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest above it that exists."""
    return next((place for place in (folder, *folder.absolute().parents) if place.is_dir()), Path("/"))


def bytes_per_second(folder: Path) -> float | None:
    """Measure, for some tenths of a second, how fast a folder takes what a save does: it writes, flushes, and reads
    again for a hash. Nothing stays there. None where it cannot be written."""
    block, written = os.urandom(_BLOCK), 0
    try:
        with tempfile.TemporaryFile(dir=existing(folder)) as file:
            since = time.perf_counter()
            for _ in range(_BLOCKS):
                written += file.write(block)
                if time.perf_counter() - since > _SECONDS:
                    break
            file.flush()
            os.fsync(file.fileno())
            file.seek(0)
            digest = sha256()
            while read := file.read(_BLOCK):
                digest.update(read)
            return written / (time.perf_counter() - since)
    except OSError:
        return None


def write_whole(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Write a file that is whole or absent, also after a loss of power; text as UTF-8.

    It is written aside, as `.NAME.partial`, which is gone after an error. `mode` are its rights, less the umask. Raises
    OSError.
    """
    aside = aside_of(path)
    aside.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content.encode(errors="replace") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def aside_of(path: Path) -> Path:
    """Return where `write_whole` writes a file before it has its name."""
    return path.with_name(f".{path.name}.partial")


def is_left_aside(path: Path) -> bool:
    """True: the path is one where something was written before it got its name, and a killed process left it."""
    return path.name.startswith(".") and path.name.endswith(".partial")


@contextmanager
def told_of_the_disk(folder: Path) -> Iterator[None]:
    """Raise CheckpointError, with the room that is left, in place of whatever error says that `folder`'s disk took no
    more."""
    try:
        yield
    except OpdError:
        raise
    except Exception as error:
        if not _is_the_disks(error):
            raise
        raise CheckpointError(
            f"the disk of {folder} takes no more: {str(error).splitlines()[0]}. Checkpoints are whole; make room or "
            "mend the disk, and go on with --resume auto"
        ) from error


def _is_the_disks(error: Exception) -> bool:
    """True: the error, whichever library raised it, says that a disk is full or refuses to be written."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _REFUSED
    return any(text in str(error) for text in _TEXTS)
