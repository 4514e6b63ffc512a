"""Files on a disk that may be full: whole or absent, and errors that say so."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opd.errors import CheckpointError, OpdError

_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}
_TEXTS = tuple(f"(os error {number})" for number in sorted(_REFUSED)) + tuple(map(os.strerror, sorted(_REFUSED)))
"""What stands in the errors of libraries that are not Python: Rust's, and those with the C library's own words."""


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
