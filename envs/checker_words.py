"""Says what the check of an environment found: where an exception comes from, what tools have for names and raise."""

from __future__ import annotations

import inspect
import linecache
import logging
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opd.errors import EnvError
from opd.secrets import redact

_OURS = (str(Path(inspect.getfile(EnvError)).resolve().parent), str(Path(__file__).resolve().parent))
_PYTHON = str(Path(sysconfig.get_paths()["stdlib"]).resolve())


def describe(error: BaseException) -> str:
    """Describe an exception: its kind, its words, and the file and line of the user's code that it comes from."""
    said = redact(f"{type(error).__name__}: {error}".rstrip(": "))
    place = _origin(error)
    return f"{said:.500}" if place is None else f"{said:.500} ({place})"


def _origin(error: BaseException) -> str | None:
    """Name the last line of somebody's own code that an exception went through; the very last one if none is."""
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    if not frames:
        return None
    files = [str(Path(frame.f_code.co_filename).resolve()) for frame, _ in frames]
    mine = [n for n, file in enumerate(files) if not file.startswith((*_OURS, _PYTHON, "<frozen"))]
    written = [n for n in mine if "site-packages" not in files[n]]  # an installed package may be the user's too
    frame, line = frames[(written or mine or [-1])[-1]]
    source = linecache.getline(frame.f_code.co_filename, line).strip()
    where = f"{frame.f_code.co_filename}:{line}, in {frame.f_code.co_name}"
    return f"{where}: `{source:.120}`" if source else where


def names_of(tools: Any) -> frozenset[str]:
    """Return the names in tools' schemas: of tools, of arguments, and the choices of these."""
    names: set[str] = set()
    pending = [tools]
    while pending:
        one = pending.pop()
        if isinstance(one, dict):
            names |= {one["name"]} if isinstance(one.get("name"), str) else set()
            for key in ("properties", "enum"):
                held = one.get(key)
                names |= {name for name in held if isinstance(name, str)} if isinstance(held, dict | list) else set()
            pending += one.values()
        elif isinstance(one, list | tuple):
            pending += one
    return frozenset(names)


@contextmanager
def listening_to_tools() -> Iterator[list[str]]:
    """Collect what tools raise meanwhile: the model is answered, and whoever wrote the tool should know."""
    collected: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            if error is not None and len(collected) < 20:
                collected.append(f"{record.getMessage()} {describe(error)}")

    logger, handler = logging.getLogger("opd.envs.tool_runs"), Collector()
    logger.addHandler(handler)
    try:
        yield collected
    finally:
        logger.removeHandler(handler)
