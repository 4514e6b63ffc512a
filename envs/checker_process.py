"""Checks an environment in a process of its own, which is killed when it takes too long: nothing is waited for."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from opd.envs.checker import Finding, check
from opd.envs.checker_show import show
from opd.envs.checker_words import describe, listening_to_tools
from opd.errors import ConfigError
from opd.secrets import know_environment, know_settings, redact_console, redacted
from opd.variables import resolve

TIME_LIMIT = 120.0
"""Seconds that a check may take where nobody says."""


@dataclass(slots=True)
class Report:
    """Holds what a check found, and the lines of the episode that it shows."""

    findings: list[Finding] = field(default_factory=list)
    episode: list[str] = field(default_factory=list)

    @property
    def broken(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


def check_within(env_id: str, kwargs: Mapping[str, Any] | None = None, *, time_limit: float = TIME_LIMIT) -> Report:
    """Check an environment by its id, as `check` does, and show an episode of it, in at most so many seconds.

    An environment that hangs, or takes its process along, is an error like any other, which names the call. Raises
    ConfigError when it cannot be made as it is named, or the limit is no time.
    """
    if not time_limit > 0:
        raise ConfigError(f"--time-limit = {time_limit!r} must be more than 0 (seconds)")
    resolve(dict(kwargs or {}), "env.kwargs")  # what is not set is refused here; the process reads what is
    know_settings(kwargs or {})
    plan = json.dumps({"path": sys.path, "id": env_id, "kwargs": dict(kwargs or {})})
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1])['path']; import opd.envs.checker_process as c; "
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as told:
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", f"{code}c.main(sys.argv[1], int(sys.argv[2]))", plan, str(writing)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[writing],
                start_new_session=True,
            )
        finally:
            os.close(writing)
        try:
            return _follow(process, told, time_limit)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _follow(process: subprocess.Popen[bytes], told: BinaryIO, time_limit: float) -> Report:
    """Collect what the process tells until it is done, dies or is late."""
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(told, lines), name="opd-check", daemon=True).start()
    report, doing, until = Report(), "starting", time.monotonic() + time_limit
    while True:
        try:
            line = lines.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            late = f"no answer within {time_limit:g} s: {doing}. Mend it, or give more time (--time-limit)"
            report.findings.append(Finding("error", late))
            return report
        if line is None:
            report.findings.append(Finding("error", f"its process {_ended(process.wait())}: {doing}"))
            return report
        message = json.loads(line)
        match message["what"]:
            case "doing":
                doing = message["call"]
            case "episode":
                report.episode.append(message["line"])
            case "findings":
                report.findings += [Finding(**finding) for finding in message["findings"]]
            case "refused":
                raise ConfigError(message["reason"])
            case "done":
                return report


def _read(told: BinaryIO, lines: queue.SimpleQueue[bytes | None]) -> None:
    with suppress(ValueError, OSError):  # it is closed: nobody listens any more
        for line in told:
            lines.put(line)
    lines.put(None)


def _ended(code: int) -> str:
    with suppress(ValueError):
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"was ended by signal {-code}"


def main(plan: str, descriptor: int) -> None:
    """Check and show, in this process; write a line of JSON for everything that is to be known."""
    redact_console()
    know_environment()
    told = json.loads(plan)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:

        def tell(what: str, **rest: Any) -> None:
            print(json.dumps({"what": what, **redacted(rest)}), file=out, flush=True)

        try:
            findings = check(told["id"], told["kwargs"], doing=lambda call: tell("doing", call=call))
            tell("findings", findings=[asdict(finding) for finding in findings])
            tell("doing", call="showing an episode")
            try:
                with listening_to_tools() as raised:
                    for line in show(told["id"], told["kwargs"]):
                        tell("episode", line=line)
                tell("findings", findings=[asdict(Finding("warning", text)) for text in raised])
            except ConfigError:
                raise
            except Exception as error:  # an action that random text never was
                tell("findings", findings=[asdict(Finding("error", f"an episode raised {describe(error)}"))])
        except ConfigError as error:
            tell("refused", reason=str(error))
        tell("done")
        os._exit(0)  # threads that the environment has started are not waited for
