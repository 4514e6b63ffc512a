"""What the commands share: their form, and the options that several of them take."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand of `opd`."""

    name: str
    summary: str
    example: str
    run: Callable[[argparse.Namespace, dict[str, Any]], int]
    arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None
    takes_settings: bool = False
    """True: it accepts `--key.sub value` for any setting. False: it accepts its own options alone."""
    runs: bool = False
    """True: it does something, and goes on where nothing can be printed. False: its text is what it is asked for."""


def add_resume_options(parser: argparse.ArgumentParser) -> None:
    """Add `--resume`, `--resume auto` and `--overwrite`."""
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in the folder; `--resume auto`: or begin one there"
    )
    parser.add_argument("--resume=auto", dest="resume", action="store_const", const="auto", help=argparse.SUPPRESS)
    parser.add_argument("--overwrite", action="store_true", help="delete the run in the folder first")


def put_option(overrides: dict[str, Any], key: str, value: str | None) -> None:
    """Put the value of an option that stands for a setting among the overrides; nothing if it was not given."""
    if value is not None:
        from opd.launch.settings.overrides import put
        from opd.launch.settings.reader import parse_yaml

        put(overrides, key, value if key == "out" else parse_yaml(value, f"command line: {key}"))


def positive(text: str) -> int:
    """Read a whole number of at least 1. Raises ArgumentTypeError for anything else."""
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a whole number of at least 1")
    return int(text)
