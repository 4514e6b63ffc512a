"""Rows of Parquet, as Arrow's own reader gives them; only its errors are told otherwise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opd.errors import DataError
from opd.rows.lines import check_beginning, open_file

_MAGIC = b"PAR1"
_AT_ONCE = 1024


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each row with its number, from 1. Raises DataError for a file that is damaged or no Parquet."""
    import pyarrow.parquet as pq

    with open_file(path) as file:
        head = file.read(512)
    if not head.startswith(_MAGIC):
        check_beginning(path, head)
        raise DataError(f"{path} is no Parquet file: it does not begin as one. Write it again, or rename it")
    number = 0
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = Counter(file.schema_arrow.names)
            if doubled := [name for name, times in names.items() if times > 1]:
                raise DataError(f"{path}: two columns are called {doubled[0]!r:.80}. Rename or remove one")
            for batch in file.iter_batches(_AT_ONCE):
                for place in range(batch.num_rows):
                    number += 1
                    [row] = batch.slice(place, 1).to_pylist()
                    yield number, row
    except DataError:
        raise
    except Exception as error:  # Arrow raises its own errors, OSError, ValueError and more for damaged bytes
        where = f"{path}, row {number}" if number else str(path)
        raise DataError(f"{where}: the Parquet file is damaged ({_short(error)}). Write it again") from error


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
