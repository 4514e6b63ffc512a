"""YAML as people mean it."""

import math
import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import ConfigError
from opd.launch.settings.reader import RUN_MARK, holds_run, parse_yaml, read_settings, to_yaml

TEXT = st.text() | st.text(" \t\n\r\x85\u2028\ufeff:#-'\"\\|>&*!%@`?,[]{}ae1.~", max_size=12)
KEYS = TEXT.filter(bool)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=10,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-2.5e+3", -2500.0),
        (".5", 0.5),
        ("3.", 3.0),
        ("12:30", "12:30"),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("007", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("1_000", "1_000"),
        ("2026-01-31", "2026-01-31"),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("tiny:lookup", "tiny:lookup"),
        ("'1e-4'", "1e-4"),
        ("[1, a, true]", [1, "a", True]),
        ('"<<": {a: 1}', {"<<": {"a": 1}}),
    ],
)
def test_scalars_are_read_as_yaml_1_2_has_them(text, value):
    read = parse_yaml(text, "x")
    assert read == value
    assert type(read) is type(value)


@given(PLAIN)
def test_what_is_written_is_read_back(value):
    assert parse_yaml(to_yaml(value), "x") == value


def test_text_of_several_lines_is_written_as_lines():
    assert to_yaml({"a": "x: 1\n\ny\n"}) == "a: |\n  x: 1\n\n  y\n"


def test_a_duplicate_key_is_an_error_that_names_both_lines():
    with pytest.raises(ConfigError, match=r"^run\.yaml: line 4: lr is given twice \(lines 2 and 4\); remove one$"):
        parse_yaml("train:\n  lr: 1\n  steps: 2\n  lr: 3\n", "run.yaml")


def test_the_same_key_in_two_sections_is_no_duplicate():
    assert parse_yaml("a: {x: 1}\nb: {x: 2}", "x") == {"a": {"x": 1}, "b": {"x": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", r"^x\.yaml: line 1: "),
        ("a: 1\n b: 2\n", r"^x\.yaml: line 2: "),
        ("a: !!python/object:os.system {}", r"^x\.yaml: line 1: could not determine a constructor"),
        ("1: a", r"^x\.yaml: line 1: the key 1 is not text; put it in quotes$"),
        ("[1]: a", r"^x\.yaml: line 1: the key \[1\] is not text"),
        ("a: \x07", r"^x\.yaml: unacceptable character"),
        ("a: " + "1" * 5000, r"^x\.yaml: line 1: 1{40} is too large a number"),
    ],
)
def test_broken_yaml_is_an_error_that_names_the_place(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_yaml(text, "x.yaml")


def test_a_missing_file_is_named_with_the_nearest(tmp_path):
    (tmp_path / "opsd.yaml").write_text("method: opsd")
    with pytest.raises(ConfigError, match=r'opds\.yaml does not exist\. Did you mean ".*opsd\.yaml"\?$'):
        read_settings(tmp_path / "opds.yaml")


@pytest.mark.parametrize(
    ("text", "held"), [("", "is empty"), ("# nothing", "is empty"), ("- a", "holds a list"), ("a", "holds a str")]
)
def test_a_file_without_settings_is_an_error(tmp_path, text, held):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"x.yaml {held}, but must hold settings"):
        read_settings(tmp_path / "x.yaml")


def test_a_folder_without_a_run_is_no_file_of_settings(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder\."):
        read_settings(tmp_path)


def test_a_file_that_is_not_text_is_an_error(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 20_000, r"more than 64 levels of brackets or indentation"),
        ("{a: " * 100 + "1" + "}" * 100, r"line 1: more than 64 levels"),
        ("seed: 123456789012345678901234567890", r"line 1: 123456789012345678901234567890 is too large a number"),
        ("seed: " + "9" * 5000, r"line 1: 9{40} is too large a number"),
        ("a: 0xffffffffffffffffff", r"is too large a number"),
        ("train: {<<: {steps: 3}}", r"the merge key << is not read; write the settings out"),
        ("a: " + "x" * 1_000_001, r"has 1,000,004 characters, more than settings have"),
        (
            "a: &a [x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"{b}: &{b} [{f'*{a}, ' * 9}]\n" for a, b in pairwise("abcdefgh")),  # more than memory holds
            r"line 5: more than 50,000 values, those counted that aliases \(\*\) repeat",
        ),
        ("a: 1\nb: &b {c: [*b]}", r"line 2: \*b stands within what it repeats; write the settings out"),
        ('a: "\\ud800"', r"line 1: '\\ud800' is half of a character, which no file can hold"),
        ("a: !!timestamp x", r"line 1: could not determine a constructor for the tag '.*timestamp'"),
        ("a: !!binary ===", r"line 1: could not determine a constructor for the tag '.*binary'"),
        ("a: !!int abc", r"line 1: 'abc' is no int"),
        ("a: !!int 1_000", r"line 1: '1_000' is no int"),
        ("a: !!float x", r"line 1: 'x' is no float"),
        ("a: !!bool yes", r"line 1: 'yes' is no bool"),
        ("a: !!null x", r"line 1: 'x' is no null"),
    ],
)
def test_what_no_settings_hold_is_refused_in_a_line(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_yaml(text, "run.yaml")
    assert str(caught.value).startswith("run.yaml")
    assert len(str(caught.value)) < 200


def test_an_anchor_that_is_repeated_a_little_is_read():
    assert parse_yaml("a: &a {x: 1}\nb: [*a, *a]", "x") == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}]}


def test_what_stands_in_place_of_a_run_s_settings_is_no_run(tmp_path):
    """A pipe is not opened: that would wait for whoever writes to it."""
    assert not holds_run(tmp_path)
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe" + RUN_MARK.encode("utf-16-le"))
    assert not holds_run(tmp_path)
    (tmp_path / "config.yaml").unlink()
    os.mkfifo(tmp_path / "config.yaml")
    assert not holds_run(tmp_path)
    assert not holds_run(tmp_path / "\0")
