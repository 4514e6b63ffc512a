"""Files of rows are read as they were written, or refused with the file, the line and the mend.

Whatever else may happen to a file is drawn at random in `tests/test_mutants_of_tables.py`.
"""

import gzip
import json
import os
import re
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opd.errors import ConfigError, DataError
from opd.rows import read_file
from opd.rows.lines import MOST_LINE

BREAKS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


@pytest.fixture
def read(tmp_path):
    """`read(name, data, ...)`: the rows of a file with these bytes."""

    def read_one(name, data, **options):
        path = tmp_path / name
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return read_file(path, **options)

    return read_one


# -- read right ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("last", [True, False])
def test_lines_end_as_on_any_system_and_a_byte_order_mark_is_no_text(read, end, mark, last):
    lines = {"a.jsonl": ['{"a": "1"}', "", '{"a": "2"}'], "a.json": ['{"a": "1"}', "", '{"a": "2"}'],
             "a.csv": ["a", "1", "", "2"]}  # fmt: skip
    for name, texts in lines.items():
        file = read(name, mark + end.join(texts) + end * last)
        assert file.rows == [{"a": "1"}, {"a": "2"}]
        assert [file.where(n).rpartition("/")[2] for n in range(2)] == (
            ["a.csv, line 2", "a.csv, line 4"] if name == "a.csv" else [f"{name}, line 1", f"{name}, line 3"]
        )


def test_what_python_calls_a_line_break_is_text(read):
    text = f"one{BREAKS}two"
    assert read("a.csv", f"a,b\n{text},1\n").rows == [{"a": text, "b": "1"}]
    assert read("a.csv", f'a,b\n"{text}\r\nx",1\n').rows == [{"a": text + "\r\nx", "b": "1"}]
    for name in ("a.jsonl", "a.json"):
        assert read(name, '{"a": "' + text + '"}\n').rows == [{"a": text}]
    assert read("a.json", '[{"a": "' + text + '"}]').rows == [{"a": text}]


def test_cells_of_csv_stay_text_unless_their_column_has_a_type(read):
    data = 'name,age,share,right,more\nNone,007,0.50,TRUE,[1]\nNA,,1e3,false,\nnull,-3,.5,,"{""a"": 1}"\n'
    plain = read("a.csv", data).rows
    assert plain[0] == {"name": "None", "age": "007", "share": "0.50", "right": "TRUE", "more": "[1]"}
    assert [row["name"] for row in plain] == ["None", "NA", "null"]
    assert [row["age"] for row in plain] == ["007", "", "-3"]
    types = {"name": "str", "age": "int", "share": "float", "right": "bool", "more": "json"}
    typed = read("a.csv", data, columns=types).rows
    assert [list(row.values()) for row in typed] == [
        ["None", 7, 0.5, True, [1]], ["NA", None, 1000.0, False, None], ["null", -3, 0.5, None, {"a": 1}]
    ]  # fmt: skip
    assert [type(row["age"]) for row in typed] == [int, type(None), int]


@pytest.mark.parametrize(
    ("type_", "cell"),
    [("int", "1.0"), ("int", "1_000"), ("int", "٣"), ("int", "x"), ("float", "nan"), ("float", "inf"), ("bool", "1"),
     ("float", "1e400"), ("bool", "no"), ("json", "{'a': 1}"), ("json", "NaN"), ("int", "9" * 400)],
)  # fmt: skip
def test_a_cell_that_is_not_of_its_columns_type_is_named_with_its_line(read, type_, cell):
    quoted = '"' + cell.replace('"', '""') + '"'
    with pytest.raises(DataError, match=rf"a\.csv, line 3, b: .* is no {type_}.*Mend it, or change columns\.b"):
        read("a.csv", f"a,b\nx,\ny,{quoted}\n", columns={"b": type_})


def test_a_type_holds_for_every_format_and_is_checked(read):
    assert read("a.jsonl", '{"a": "7"}\n{"a": 8}\n{"b": 1}\n', columns={"a": "int"}).rows == [
        {"a": 7},
        {"a": 8},
        {"b": 1},
    ]
    with pytest.raises(DataError, match=r"line 1, a: True is no int"):
        read("a.jsonl", '{"a": true}\n', columns={"a": "int"})
    with pytest.raises(ConfigError, match=r"columns\.b: .*a\.jsonl has no such column. Its columns: a"):
        read("a.jsonl", '{"a": 1}\n', columns={"b": "int"})
    with pytest.raises(ConfigError, match=r"columns\.a = 'integer' is no type. Allowed: str, int, float, bool, json"):
        read("a.jsonl", '{"a": 1}\n', columns={"a": "integer"})


def test_json_is_read_value_by_value_whatever_else_stands_in_its_column(read):
    rows = [{"a": "1"}, {"a": 1}, {"a": None}, {"a": [1, "x"]}, {"a": {"b": None}}, {"b": 0.1}]
    for data in (json.dumps(rows), json.dumps(rows, indent=2), "".join(json.dumps(row) + "\n" for row in rows)):
        assert repr(read("a.json", data).rows) == repr(rows)
    assert read("a.json", json.dumps(rows, indent=2)).columns == ["a", "b"]


def test_an_array_is_told_by_line_where_its_objects_have_lines_and_else_by_row(read):
    spread = read("a.json", '\n[\n{"a": 1},\n\n{"a": 2}\n]\n')
    assert [spread.where(n).rpartition(", ")[2] for n in range(2)] == ["line 3", "line 5"]
    together = read("a.json", '[{"a": 1}, {"a": 2}]')
    assert [together.where(n).rpartition(", ")[2] for n in range(2)] == ["row 1", "row 2"]


def test_parquet_is_told_by_row(read, tmp_path):
    rows = [{"a": f"{n}\u2028", "b": [{"c": n}]} for n in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    file = read_file(tmp_path / "a.parquet")
    assert file.rows == rows
    assert file.where(2400).endswith("a.parquet, row 2401")


def test_a_column_without_a_name_gets_one(read):
    assert read("a.csv", ",a\n0,x\n1,y\n").rows == [{"column_1": "0", "a": "x"}, {"column_1": "1", "a": "y"}]


def test_long_cells_and_the_case_of_an_ending_do_not_matter(read):
    assert read("a.CSV", f"a\n{'x' * 300_000}\n").rows == [{"a": "x" * 300_000}]


# -- refused by name -----------------------------------------------------------------------------------

DEEP = '{"a": ' + "[" * 100_000
REFUSED = {
    "latin-1": ("a.jsonl", '{"a": "x"}\n{"a": "é"}\n'.encode("latin-1"), r"line 2, byte 8: 0xe9 is not .* iconv"),
    "latin-1 in CSV": ("a.csv", "a,b\nx,é\n".encode("latin-1"), r"a\.csv, line 2, byte 3: 0xe9 is not UTF-8"),
    "latin-1 in an array": ("a.json", '[\n{"a": "é"}]'.encode("latin-1"), r"line 2, byte 8: 0xe9 is not UTF-8"),
    "a surrogate's bytes": ("a.csv", b"a\n\xed\xa0\x80\n", "line 2, byte 1: 0xed is not UTF-8"),
    "utf-16": ("a.csv", "a,b\nx,y\n".encode("utf-16"), r"it is UTF-16, not UTF-8\. Convert it: iconv -f utf-16"),
    "utf-16 without its mark": ("a.csv", "a,b\nx,y\n".encode("utf-16-le"), "line 1 holds a zero byte: .* is UTF-16"),
    "utf-32": ("a.jsonl", '{"a": 1}'.encode("utf-32"), "it is UTF-32"),
    "zeros": ("a.jsonl", b'{"a": 1}\n' + bytes(99), "line 2 holds a zero byte: .*a disk lost a part of it"),
    "gzip": ("a.jsonl", gzip.compress(b'{"a": 1}'), "compressed with gzip. Unpack it: gunzip"),
    "a workbook": ("a.csv", b"PK\x03\x04" + bytes(20), "a zip archive or a workbook"),
    "a page": ("a.csv", " \n<!DOCTYPE html><p>404", "it is a page of HTML .*Download it again"),
    "a pointer": ("a.parquet", "version https://git-lfs.github.com/spec/v1\noid 1\n", "of Git LFS .*git lfs pull"),
    "parquet by another name": ("a.jsonl", b"PAR1" + bytes(9), "it is a Parquet file. Let its name end in .parquet"),
    "no parquet": ("a.parquet", '{"a": 1}\n', "is no Parquet file: it does not begin as one"),
    "cut parquet": ("a.parquet", b"PAR1" + bytes(99), r"a\.parquet: the Parquet file is damaged \(ArrowInvalid"),
    "empty": ("a.csv", "", r"a\.csv is empty"),
    "blank": ("a.jsonl", "\n \n", r"a\.jsonl has no rows"),
    "only a header": ("a.csv", "a,b\n", r"a\.csv has no rows"),
    "an empty array": ("a.json", " [ ]\n", r"a\.json has no rows"),
    "a huge line": ("a.jsonl", b'{"a": "' + b"x" * MOST_LINE + b'"}', "line 1 has more than 16,777,216 bytes"),
    "deep": ("a.jsonl", DEEP + "]" * 100_000 + "}", "line 1: .*nested too deeply"),
    "rather deep": ("a.jsonl", '{"a": ' + "[" * 70 + "]" * 70 + "}", "line 1: .*nested too deeply"),
    "deep in an array": ("a.json", "[" + DEEP, "line 1.*nested too deeply"),
    "nan": ("a.jsonl", '{"a": 1}\n{"a": NaN}\n', "line 2: not JSON .NaN is not JSON"),
    "infinity": ("a.json", '[{"a": -Infinity}]', "line 1.*-Infinity is not JSON"),
    "a number beyond floats": ("a.jsonl", '{"a": 1e400}\n', "line 1: .*the number 1e400 is out of range"),
    "a whole number beyond floats": ("a.jsonl", '{"a": 1%s}\n' % ("0" * 400), "401 digits is out of range; write"),
    "a key twice": ("a.jsonl", '{"a": 1, "a": 2}\n', "line 1: .*the key 'a' stands twice"),
    "half a pair": ("a.jsonl", '{"a": "\\ud800"}\n', r"line 1: it holds a lone surrogate \('\\ud800'\)"),
    "half a pair in an array": ("a.json", '[{"a": "\\udc00"}]', r"row 1: it holds a lone surrogate"),
    "a trailing comma": ("a.jsonl", '{"a": 1,}\n', "line 1: not JSON .column 9: "),
    "a comma behind": ("a.jsonl", '{"a": 1},\n{"a": 2},\n', "line 1: a comma stands behind the object. Take it away"),
    "two on a line": ("a.jsonl", '{"a": 1}\n{"a": 2}{"a": 3}\n', "line 2: a second object stands on the line"),
    "a list": ("a.jsonl", "[1, 2]\n", "line 1: a row must be a JSON object, not list"),
    "an array as lines": ("a.jsonl", '[{"a": 1}, {"a": 2}]', r"line 1: a row must be .*An array of objects is a"),
    "a spread array as lines": ("a.jsonl", '[\n{"a": 1}\n]', r"line 1: .*an array over several lines is a \.json file"),
    "lists in an array": ("a.json", "[[1, 2], [3]]", "row 1: a row must be a JSON object, not list"),
    "a pretty object": ("a.jsonl", '{\n  "a": 1\n}\n', "line 1: .*does not end on its line. Write each on one"),
    "pretty objects": ("a.json", '{\n  "a": 1\n}\n{\n  "a": 2\n}', "line 1: .*the object does not end on its line"),
    "a text of JSON": ("a.jsonl", '"{\\"a\\": 1}"\n', "line 1: .*not a text. It was written as JSON twice"),
    "python": ("a.jsonl", "{'a': 1}\n", "line 1: not JSON"),
    "joined with a mark": ("a.jsonl", '{"a": 1}\n\ufeff{"a": 2}\n', "line 2: a byte order mark stands in the middle"),
    "a cut array": ("a.json", '[{"a": 1},\n{"a"', "line 2: not JSON .the array does not end: the file was cut"),
    "an array's comma": ("a.json", '[{"a": 1},\n]', "line 2: not JSON .a comma stands before the closing bracket"),
    "no comma": ("a.json", '[{"a": 1}\n{"a": 2}]', "line 2: not JSON .a comma is missing between two rows"),
    "two arrays": ("a.json", '[{"a": 1}]\n[{"a": 2}]', "line 2: something stands behind the array"),
    "old line ends": ("a.csv", "a,b\r1,2\r", "line 1: no CSV: a carriage return stands in a cell"),
    "short": ("a.csv", "a,b\n1,2\n3\n", "line 3 has 1 cell, and the header 2"),
    "long": ("a.csv", "a,b\n1,2,3\n", "line 2 has 3 cells, and the header 2.*stands in quotes"),
    "a quote that is open": ("a.csv", 'a,b\n1,2\n"3,4\n5,6\n', "line 3: no CSV: a quote that opens .*not close"),
    "a quote in the middle": ("a.csv", 'a,b\n"x"y,2\n', "line 2: no CSV: a cell goes on behind its closing quote"),
    "columns twice": ("a.csv", "a,b,a\n1,2,3\n", "line 1: two columns are called 'a'. Rename or remove one"),
    "the header again": ("a.csv", "a,b\n1,2\na,b\n3,4\n", "line 3 is the header once more, where files were joined"),
    "semicolons": ("a.csv", "a;b\n1;2\n", "line 1: its cells are parted by semicolons. Write the file with commas"),
    "tabs": ("a.csv", "a\tb\n1\t2\n", "line 1: its cells are parted by tabs"),
    "a note on separators": ("a.csv", "sep=,\na,b\n1,2\n", "line 1 is a spreadsheet's note"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_file_of_rows_is_refused_within_a_second_by_file_and_line(read, tmp_path, what):
    name, data, message = REFUSED[what]
    since = time.monotonic()
    with pytest.raises(DataError, match=message) as raised:
        read(name, data)
    assert time.monotonic() - since < 3  # a second, on a machine three times slower
    assert str(tmp_path / name) in str(raised.value)
    assert len(str(raised.value)) < 500


def test_parquet_with_a_column_twice_or_bytes_that_changed_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["a", "a"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: two columns are called 'a'"):
        read_file(path)
    text = pa.array([b"fine", b"\xff\xfe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": text}), path)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: the Parquet file is damaged \(UnicodeDecodeError"):
        read_file(path)


def test_what_is_no_file_is_refused_and_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "gone.csv").symlink_to("nowhere")
    for name, message in {
        "pipe.jsonl": "is a pipe or a device, not a file of rows",
        "folder.csv": "is a folder, not a file of rows",
        "a.txt": r"cannot be read as a file of rows; allowed endings: \.jsonl, \.json, \.csv, \.parquet",
        "a.jsonl.gz": "cannot be read as a file of rows",
        "gone.csv": "there is no file",
        "x" * 300 + ".csv": "cannot be read: File name too long",
        "a\0.csv": "cannot be read: embedded null byte",
    }.items():
        with pytest.raises(ConfigError, match=re.compile(message)):
            read_file(tmp_path / name)
