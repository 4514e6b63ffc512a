"""Makes docs/accidents.md: each accident is done to a small real run, and what was seen is written down.

    python .ci/accidents.py               # all of them, and the page
    python .ci/accidents.py "kill -9"     # those whose names hold this; printed, not written

The exit code is 1 where something else was seen than should be. As root, a full and a read-only disk are real ones
(tmpfs); nobody else can mount, and these are left out. Each run is a process of its own, and times are of two cores.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.accidents.doing import ACCIDENTS, Accident  # noqa: E402
from tests.accidents.ward import Seen, Ward, digest, last_words  # noqa: E402

PAGE = ROOT / "docs" / "accidents.md"
TRACE = "Traceback (most recent call last)"


def right(one: Accident, seen: Seen) -> list[str]:
    """What is not as it should be."""
    wrong = []
    if seen.code not in one.codes:
        wrong.append(f"exit {seen.code}")
    if not re.search(one.text, seen.text, re.DOTALL):
        wrong.append(f"nothing says {one.text!r}")
    if not re.search(one.kept, seen.kept):
        wrong.append(f"not kept: {one.kept!r}")
    if TRACE in seen.text:
        wrong.append("a traceback")
    if "LEFT" in seen.kept or "OTHER" in seen.kept:
        wrong.append("leftovers or other weights")
    return wrong


def row(one: Accident, seen: Seen, wrong: list[str], folder: Path) -> str:
    told = last_words(seen.text)
    for path, name in ((str(folder), "…"), (str(Path.home()), "~"), (sys.executable, "python")):
        told = told.replace(path, name)
    told = re.sub(r"\s+", " ", told)
    told = (told[:300] + " …" if len(told) > 300 else told).replace("|", r"\|").replace("<", "&lt;")
    seconds = "–" if seen.seconds is None else f"{seen.seconds:.1f}"
    name = one.name.replace("|", r"\|")
    fault = f" **{'; '.join(wrong)}**" if wrong else ""
    kept = seen.kept.replace(str(folder), "…").replace("|", r"\|")
    return f"| {name}{fault} | {seconds} | {seen.ended:.1f} | {seen.code} | {told} | {kept[:300]} |"


HEAD = """# Accidents

Each of these was done to a small real run (a method, an evaluation, a checkpoint after each of 4 steps, of which two
are kept), by `.ci/accidents.py`, which wrote this page. Seconds count from the accident, or, for what is refused at
the start, from the start of the process, on two cores that others used too: to the message, and to the end of the
process. Where a run ended early it was resumed: "the same weights" are those of a run that nothing happened to, to the
bit. [A run](runs.md) says what is promised.

| what was done | message, s | end, s | exit | its text | what was kept |
| --- | ---: | ---: | ---: | --- | --- |
"""


def play(names: list[str], folder: Path, say: Callable[[str], None] = print) -> tuple[list[str], dict[str, list[str]]]:
    """Do the accidents whose names hold one of these; return the rows of the table, and what is wrong by name."""
    os.environ["OPD_CACHE"] = str(folder / "cache")
    from opd.launch.tiny.build import build_tiny

    model = build_tiny("lookup", seed=0, steps=3, quiet=True)
    first = Ward(made(folder, "whole"), model, {})
    run = first.start(first.settings())
    run.end()
    if run.code != 0:
        raise SystemExit(run.said)
    whole = digest(first.out)
    rows, wrong = [], {}
    for number, one in enumerate(ACCIDENTS):
        if names and not any(name in one.name for name in names):
            continue
        if one.root and os.geteuid() != 0:
            continue
        ward = Ward(made(folder, f"{number:02}"), model, whole)
        try:
            seen = one.do(ward)
        except Exception as error:  # the script's own trouble is a row too
            seen = Seen(None, 0.0, repr(error), "", "")
        bad = right(one, seen)
        if bad:
            wrong[one.name] = bad
        rows.append(row(one, seen, bad, ward.folder))
        say(rows[-1])
        if bad:
            say(seen.text[-3000:])
        shutil.rmtree(ward.folder, ignore_errors=True)
    return rows, wrong


def made(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help="part of an accident's name; none: all, and the page is written")
    names = parser.parse_args().name
    with tempfile.TemporaryDirectory() as folder:
        rows, wrong = play(names, Path(folder), say=lambda line: print(line, flush=True))
    if not names:
        PAGE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")
    for name, why in wrong.items():
        print(f"WRONG {name}: {'; '.join(why)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
