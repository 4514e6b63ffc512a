"""The files of a sandbox as plain data: writing them into its folder, and reading them back.

An untrusted program made what is read. So no link is followed, nothing but files, folders and links is read, and
size, number and depth are bounded; the program must have ended before.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

from opd.errors import ConfigError, DataError

_DEPTH = 40
_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # never follows a link, never waits for a pipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A file, a folder, or a symbolic link."""

    kind: Literal["file", "folder", "link"] = "file"
    data: bytes = b""
    """A file's content, or the target of a link."""
    mode: int = 0o644
    """Permission bits."""
    changed_ns: int | None = None
    """The time of a file's last change, in nanoseconds since 1970; None: now."""


Folder = dict[str, Entry]
"""Relative path -> entry. Parents of a path need no entry of their own."""


def to_folder(files: Mapping[str, str | bytes | Entry], *, most_bytes: int, most_files: int) -> Folder:
    """Make entries from text and bytes. Raises ConfigError for a path that leads out, or for too many bytes."""
    folder = {path: _entry(content) for path, content in files.items()}
    for path in folder:
        parts = path.split("/")
        if not path or not _is_name(path) or "\0" in path or {"", ".", ".."} & set(parts) or len(parts) > _DEPTH:
            raise ConfigError(f"files: {path!r} must be a relative path without '..', at most {_DEPTH} deep")
    size = sum(len(entry.data) for entry in folder.values())
    if size > most_bytes or len(folder) > most_files:
        raise ConfigError(
            f"files: {len(folder):,} of them with {size:,} bytes are more than the limits allow "
            f"(limits.files = {most_files:,}, limits.folder_mb = {most_bytes >> 20})"
        )
    return folder


def _is_name(path: str) -> bool:
    """True if a file may have this name: no lone surrogate is in it."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


def _entry(content: str | bytes | Entry) -> Entry:
    if isinstance(content, Entry):
        return content
    return Entry(data=content.encode("utf-8", "replace") if isinstance(content, str) else content)


def write_folder(root: int, folder: Folder, *, owner: int | None) -> None:
    """Fill an empty folder, given by its descriptor, to which nobody else writes. Raises OSError."""
    made: set[str] = set()
    kinds = {kind: [item for item in folder.items() if item[1].kind == kind] for kind in ("folder", "file", "link")}
    for path, _ in kinds["folder"]:
        _make_folders(root, [*_parents(path), path], made, owner)
    for path, entry in kinds["file"]:
        _make_folders(root, _parents(path), made, owner)
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | _NO_LINK, dir_fd=root)
        with os.fdopen(file, "wb") as opened:
            opened.write(entry.data)
            opened.flush()
            os.fchmod(file, entry.mode)
            if entry.changed_ns is not None:
                os.utime(file, ns=(entry.changed_ns, entry.changed_ns))
            if owner is not None:
                os.fchown(file, owner, owner)
    for path, _ in kinds["link"]:
        _make_folders(root, _parents(path), made, owner)
    for path, entry in kinds["link"]:  # after all else, so that nothing is written through one
        os.symlink(entry.data, os.fsencode(path), dir_fd=root)
    for path, entry in sorted(kinds["folder"], reverse=True):  # inner ones first: an outer one may be closed
        os.chmod(path, entry.mode, dir_fd=root)


def _parents(path: str) -> list[str]:
    return [str(parent) for parent in reversed(PurePosixPath(path).parents)][1:]


def _make_folders(root: int, paths: list[str], made: set[str], owner: int | None) -> None:
    for path in paths:
        if path not in made:
            os.mkdir(path, 0o755, dir_fd=root)
            if owner is not None:
                os.chown(path, owner, owner, dir_fd=root, follow_symlinks=False)
            made.add(path)


def read_folder(root: int, *, most_bytes: int, most_files: int) -> Folder:
    """Read a folder, given by its descriptor. Sockets, pipes and devices are left out.

    Raises DataError when the content exceeds the bounds, or is deeper than any sane tree.
    """
    folder: Folder = {}
    left = most_bytes
    for path, entry in _walk(root, "", 0, most_bytes):
        folder[path] = entry
        left -= len(entry.data)
        if left < 0 or len(folder) > most_files:
            raise DataError(
                f"the folder holds more than {most_files:,} files or {most_bytes >> 20} MB; its changes are undone"
            )
    return folder


def _walk(parent: int, prefix: str, depth: int, most_bytes: int) -> Iterator[tuple[str, Entry]]:
    if depth == _DEPTH:
        raise DataError(f"the folder is more than {_DEPTH} deep; its changes are undone")
    for name in sorted(os.listdir(parent)):
        found = os.lstat(name, dir_fd=parent)
        mode = stat.S_IMODE(found.st_mode) & 0o777
        if stat.S_ISLNK(found.st_mode):
            target = os.fsencode(os.readlink(name, dir_fd=parent))
            yield prefix + name, Entry(kind="link", data=target, mode=0o777)
        elif stat.S_ISDIR(found.st_mode):
            yield prefix + name, Entry(kind="folder", mode=mode)
            inner = _open(parent, name, mode, os.O_DIRECTORY)
            try:
                yield from _walk(inner, f"{prefix}{name}/", depth + 1, most_bytes)
            finally:
                os.close(inner)
        elif stat.S_ISREG(found.st_mode):
            with os.fdopen(_open(parent, name, mode, 0), "rb") as file:
                data = file.read(most_bytes + 1)
            yield prefix + name, Entry(data=data, mode=mode, changed_ns=found.st_mtime_ns)


def _open(parent: int, name: str, mode: int, flags: int) -> int:
    if not mode & 0o400 or (flags and not mode & 0o100):  # what its owner may not read is read all the same
        os.chmod(name, 0o700, dir_fd=parent)
    return os.open(name, os.O_RDONLY | flags | _NO_LINK, dir_fd=parent)
