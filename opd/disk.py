"""The disk of a folder, which need not be there yet: its room, and how fast it takes what is written."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from hashlib import sha256
from pathlib import Path

_BLOCK, _BLOCKS, _SECONDS = 2**22, 16, 0.3


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
