"""Untrusted programs, run apart from everything: `docs/sandbox.md` says what the sandbox stops and what it does not.

`Sandbox(limits).run(["ls", "-l"], files={"a.txt": "hello"})` gives an `Outcome`; a `Session` keeps a folder from
one run to the next. Mode "bwrap" is a sandbox; mode "limits" must be asked for by name and is none.

`Grader(make, name=...)` keeps third-party code that reads a model's text in locked processes.
"""

from opd.sandbox.folder import Entry, Folder
from opd.sandbox.graders import Grader, GraderSession, Ungraded
from opd.sandbox.limits import SandboxLimits
from opd.sandbox.run import MODES, Outcome, Sandbox, Session

__all__ = [
    "MODES",
    "Entry",
    "Folder",
    "Grader",
    "GraderSession",
    "Outcome",
    "Sandbox",
    "SandboxLimits",
    "Session",
    "Ungraded",
]
