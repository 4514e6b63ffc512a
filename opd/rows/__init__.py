"""Rows of files, read one way for tables of tasks, conversations and skills: JSON Lines, JSON, CSV and Parquet.

`read_file` is the door. A file is read as it was written, or refused in a sentence that says where and what to do: no
value becomes another. What the rows mean is not known here.
"""

from opd.rows.cells import TYPES
from opd.rows.files import FORMATS, File, Row, read_file
from opd.rows.json_rows import parse_row
from opd.rows.lines import numbered_lines

__all__ = ["FORMATS", "TYPES", "File", "Row", "numbered_lines", "parse_row", "read_file"]
