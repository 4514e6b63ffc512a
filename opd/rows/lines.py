"""The lines of a text file, numbered from 1: they end at a line feed alone, and are UTF-8.

All other characters that Python calls line breaks (U+2028, NEL, form feed, the separators of ASCII) are text. What is
no text at all is told by its first bytes, with the mend.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from opd.errors import DataError

MOST_LINE = 1 << 24
"""The most bytes of a line: 16 MiB, beyond any row that a model could read."""
_HEAD = 512
_MARK = b"\xef\xbb\xbf"
_UTF_16 = "it is UTF-16, not UTF-8. Convert it: iconv -f utf-16 -t utf-8"
_BEGINNINGS = (
    (b"\xff\xfe\x00\x00", "it is UTF-32, not UTF-8. Convert it: iconv -f utf-32 -t utf-8"),
    (b"\x00\x00\xfe\xff", "it is UTF-32, not UTF-8. Convert it: iconv -f utf-32 -t utf-8"),
    (b"\xff\xfe", _UTF_16),
    (b"\xfe\xff", _UTF_16),
    (b"\x1f\x8b", "it is compressed with gzip. Unpack it: gunzip"),
    (b"BZh", "it is compressed with bzip2. Unpack it: bunzip2"),
    (b"\xfd7zXZ\x00", "it is compressed with xz. Unpack it: unxz"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd. Unpack it: unzstd"),
    (b"PK\x03\x04", "it is a zip archive or a workbook. Unpack it, or save the sheet as CSV in UTF-8"),
    (b"PAR1", "it is a Parquet file. Let its name end in .parquet"),
    (b"ARROW1", "it is an Arrow file. Save it as Parquet"),
    (b"%PDF", "it is a PDF. Give the data themselves"),
    (b"SQLite format 3", "it is an SQLite database. Export its table"),
    (b"version https://git-lfs", "it is a pointer of Git LFS in the file's place. Fetch the file: git lfs pull"),
    (b"/annex/objects/", "it is a pointer of git-annex in the file's place. Fetch the file: git annex get"),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml")


def check_beginning(path: Path, head: bytes) -> None:
    """Raise DataError where the first bytes of a file are those of something that holds no rows."""
    found = next((what for beginning, what in _BEGINNINGS if head.startswith(beginning)), None)
    if found is None and head.removeprefix(_MARK).lstrip().lower().startswith(_PAGES):
        found = "it is a page of HTML or XML, such as a server sends for a file that is not there. Download it again"
    if found is not None:
        raise DataError(f"{path} holds no rows that can be read: {found}")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield each line with its number, its line feed included. A byte order mark at the beginning is no text.

    Raises DataError, with the file and the line, for what is not UTF-8, holds a zero byte, or has no end.
    """
    with open_file(path) as file:
        check_beginning(path, file.read(_HEAD))
        file.seek(0)
        number = 0
        while line := file.readline(MOST_LINE + 1):
            number += 1
            if len(line) > MOST_LINE:
                raise DataError(
                    f"{path}, line {number} has more than {MOST_LINE:,} bytes, which is no row. Has it line feeds?"
                )
            yield number, _text(line.removeprefix(_MARK) if number == 1 else line, f"{path}, line {number}")


def text_of(path: Path) -> str:
    """Return the whole text of a file, however long its lines are. Raises DataError as `numbered_lines` does."""
    with open_file(path) as file:
        data = file.read()
    check_beginning(path, data[:_HEAD])
    try:
        if b"\0" not in data:
            return data.removeprefix(_MARK).decode("utf-8")
    except UnicodeDecodeError:
        pass
    lines = enumerate(data.split(b"\n"), start=1)
    return "\n".join(_text(line, f"{path}, line {number}") for number, line in lines)  # which raises


def open_file(path: Path) -> BinaryIO:
    """Open a file to read its bytes. Raises DataError where the system does not allow it."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _text(line: bytes, where: str) -> str:
    if b"\0" in line:
        raise DataError(
            f"{where} holds a zero byte: the file is UTF-16 or no text, or a disk lost a part of it. Write it again, "
            "as UTF-8"
        )
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = line[error.start]
        raise DataError(
            f"{where}, byte {error.start + 1}: 0x{byte:02x} is not UTF-8 there. Save the file as UTF-8; of Latin-1: "
            "iconv -f latin1 -t utf-8"
        ) from None
