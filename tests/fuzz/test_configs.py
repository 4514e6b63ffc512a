"""Settings with one thing wrong, each through `opd train FILE --dry-run` in this process: refused by name, or taken.

Not covered: that a launcher started other processes, and what a model's files say (`test_weight_checks.py`).
"""

import contextlib
import io
import os
import re
import sys
import time

import pytest

from opd.launch.checks.loading import load_config
from opd.launch.cli.main import main
from tests.fuzz.configs import BROKEN_MODULES, FIFO, FOLDER, LINK, config_case
from tests.fuzz.limits import Hang, time_limit, told

MOST_LINES, MOST_CHARACTERS, MOST_SECONDS = 20, 8000, 5
SMALL, WHOLE, PARTS = 50, 2000, 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with modules, paths and files that are no use."""
    for name, source in BROKEN_MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    os.mkfifo(tmp_path / FIFO)
    (tmp_path / FOLDER).mkdir()
    (tmp_path / LINK).symlink_to(LINK)
    for name, text in (("empty.json", ""), ("broken.json", "{"), ("list.json", "[]")):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if "__pycache__" not in path.parts)


def faults(case, folder):
    """What is wrong with what a command makes of a case; nothing where all is well."""
    (folder / "run.yaml").write_bytes(case.text)
    before, out, err = files_of(folder), io.StringIO(), io.StringIO()
    code, found, began = None, [], time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in case.environment.items():
            patch.setenv(name, value)
        try:
            with time_limit(6 * MOST_SECONDS), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main(["train", "run.yaml", "--dry-run", *case.options])
        except SystemExit as error:  # argparse's
            code = error.code
            if not err.getvalue().startswith("usage: opd"):
                found.append(f"SystemExit({error.code})")
        except Hang:
            found.append("hangs")
        except BaseException as error:
            found.append(f"raises {type(error).__name__}: {str(error)[:200]}")
    if (took := time.process_time() - began) > MOST_SECONDS:
        found.append(f"takes {took:.1f} s")
    if found:
        return found
    message = err.getvalue()
    if code not in (0, 2):
        found.append(f"exit code {code}")
    if len(message.splitlines()) > MOST_LINES or len(message) > MOST_CHARACTERS:
        found.append(f"a message of {len(message.splitlines())} lines, {len(message)} characters")
    if re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060\ufeff\u00ad]", message):
        found.append("control or invisible characters in the message")
    if code == 2 and not any(name in message for name in case.names):
        found.append(f"names none of {case.names}")
    if code == 0 and case.refused:
        found.append("is accepted")
    if code == 0 and case.given and not _took(case.given):
        found.append("is accepted and ignored")
    if files_of(folder) != before and not case.environment.keys() & {"OPD_CACHE", "HOME", "HF_HOME"}:
        found.append(f"leaves {set(files_of(folder)) - set(before)}")
    return [f"{each} | {message[:300]!r}" for each in found]


def _took(given):
    """True if a setting has the value that it was given."""
    key, value = given
    held = load_config("run.yaml", check_machine=False).dump()
    for part in key.split("."):
        held = held.get(part) if isinstance(held, dict) else None
    if isinstance(held, dict) and isinstance(value, str):  # a section that is written as a word
        return value in held.values() or key == "deepspeed"
    return value is None or held == value or (isinstance(held, dict) and isinstance(value, dict))


def faults_by_number(numbers, folder):
    """What is wrong with each of these cases, with what was done; nothing for those where all is well."""
    found = {}
    for number in numbers:
        case = config_case(number)
        if wrong := faults(case, folder):
            found[number] = (case.what, case.options, case.environment, wrong)
    return found


@pytest.mark.slow
def test_settings_with_something_wrong_are_refused_by_name_or_count(folder):
    found = faults_by_number(range(SMALL), folder)
    assert not found, told(found)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_two_thousand_settings_with_something_wrong_are_refused_by_name_or_count(folder, part):
    found = faults_by_number(range(part, WHOLE, PARTS), folder)
    assert not found, told(found)
