"""Shows what strangers say: nothing in it steers a terminal, and a console that is gone ends nothing.

Each was seen to reach the terminal, or to raise, before.
"""

import io
import logging
import sys
import threading

import pytest
from rich.table import Table

from opd.episodes.faults import Failure, explain
from opd.errors import HealthError
from opd.launch.cli.main import main
from opd.launch.cli.streams import lasting_console
from opd.plain_text import LastingStream, drawable, printable
from opd.tracking.console import LastingConsole
from opd.tracking.shading import ShadedToken, shade_episode
from opd.types import Fault

HOSTILE = (
    "\x1b]0;title\x07\x1b[2J\x1b]52;c;aGk=\x07\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\\rover\x08\x9b31m\x90q\x9c"
    "\u202eabc\u2066"
)
STEERS = set("\x1b\x07\r\x08\x9b\x90\x9c\u202e\u2066\x00\x7f\u2028")


def test_only_what_steers_a_terminal_is_written_out():
    assert printable("a\tb\nc é 日本 👩‍🔧 \ufffd") == "a\tb\nc é 日本 👩‍🔧 \ufffd"
    assert printable("\x1b[2J\r\x9b\u202e\ud800\x00") == r"\x1b[2J\r\x9b\u202e\ud800\x00"
    assert not STEERS & set(printable(HOSTILE))
    assert drawable("a\x1b[2J\u202e") == "a\ufffd[2J\ufffd"


def test_a_message_of_an_error_steers_no_terminal_and_files_keep_what_was_said():
    assert not STEERS & set(str(HealthError(f"the first failure: {HOSTILE}")))
    assert explain(Failure(Fault.RAISED, HOSTILE))[1] == HOSTILE
    assert explain(ValueError(HOSTILE))[1] == f"ValueError: {HOSTILE}"


def test_what_rich_prints_steers_no_terminal_but_for_its_own_colours():
    out = io.StringIO()
    console = LastingConsole(file=out, force_terminal=True, width=300)
    table = Table(title=HOSTILE)
    table.add_row(HOSTILE, style="red")
    console.print(table, HOSTILE, shade_episode([ShadedToken(HOSTILE, "completion", 0.5)], title=HOSTILE))
    assert "\x1b[31m" in out.getvalue()
    codes = ("\x1b]", "\x1b[2J", "\r", "\x08", "\x9b", "\u202e", "\u2066", "\x07")
    assert [code for code in codes if code in out.getvalue()] == []


def test_what_threads_print_and_what_is_logged_steers_no_terminal_of_a_command(capsys):
    with lasting_console():
        thread = threading.Thread(target=lambda: print(HOSTILE))
        thread.start()
        thread.join()
        print("\r\x1b[32mours\x1b[0m\x1b[A \x1b[2J")
        logging.getLogger("opd.anything").warning("it said %s", HOSTILE)
    printed = capsys.readouterr()
    theirs, ours = printed.out.rstrip("\n").split("\n")
    assert not STEERS & set(theirs)
    assert ours == "\r\x1b[32mours\x1b[0m\x1b[A \\x1b[2J"


def test_a_line_of_the_log_is_plain(caplog):
    with lasting_console():
        logging.getLogger("opd.anything").warning("it said %s", HOSTILE)
    assert not STEERS & set(caplog.records[-1].getMessage())


class Gone(io.TextIOWrapper):
    """A stream that takes nothing."""

    def __init__(self, error):
        super().__init__(io.BytesIO(), encoding="ascii")
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        if not self.closed:
            raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(), OSError(28, "No space left"), OSError(5, "Input/output error")])
def test_a_stream_that_takes_nothing_is_written_to_no_more_and_that_is_said_once(error):
    said = []
    stream = LastingStream(Gone(error))
    stream.say = said.append
    print("a", "b", file=stream, flush=True)
    print("c", file=stream)
    assert said == [str(error)]
    assert stream.lost is error


def test_a_console_of_few_characters_gets_the_others_written_out():
    raw = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(raw, encoding="ascii"))
    print("é▁", file=stream, flush=True)
    assert raw.getvalue() == b"\\xe9\\u2581\n"


@pytest.mark.parametrize(
    ("error", "code"), [(BrokenPipeError(32, "Broken pipe"), 0), (OSError(28, "No space left on device"), 1)]
)
def test_text_that_was_asked_for_and_cannot_be_printed_is_an_error_unless_its_reader_left(
    monkeypatch, capsys, error, code
):
    monkeypatch.setattr(sys, "stdout", Gone(error))
    assert main(["methods"]) == code
    assert ("not all could be printed" in capsys.readouterr().err) == bool(code)


def test_a_command_runs_without_any_console(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["methods"]) == 0
    assert main(["config", "nothing.yaml"]) == 2


def test_an_argument_that_is_no_text_in_this_locale_is_refused_with_the_mend(capsys):
    assert main(["train", "x.yaml", "--out", b"\xc3\xbcn".decode("ascii", "surrogateescape")]) == 2
    assert "set LC_ALL=C.UTF-8, or PYTHONUTF8=1" in capsys.readouterr().err
