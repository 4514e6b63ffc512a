"""Offers tools that run untrusted code: what the model writes goes into a sandbox, in a folder of the episode's own.

The sandbox itself is `opd.sandbox`, which rewards use too; `docs/sandbox.md` says what it stops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd.envs.tool_env import ToolEnv
from opd.envs.tools import tool
from opd.sandbox import Outcome, Sandbox, SandboxLimits, Session

__all__ = ["PythonTool", "SandboxEnv", "ShellTool", "report"]


class SandboxEnv(ToolEnv):
    """Is a `ToolEnv` with a sandboxed folder, `self.session`, which is empty again at each reset.

    Inherit from `PythonTool` or `ShellTool` or both, which bring the tools. `start` may put files there:
    `self.session = self.sandbox.session({"a.txt": "hello"})`.

    Args:
        sandbox: "bwrap", or "limits", which protects nothing and warns.
        limits: see `SandboxLimits`; `seconds` must be less than `rollout.step_timeout`.
        readable: see `Sandbox`.
        options: see `ToolEnv`.

    Raises ConfigError where there is no bubblewrap, and says how to get it.
    """

    def __init__(
        self,
        *,
        sandbox: str = "bwrap",
        limits: SandboxLimits | Mapping[str, Any] | None = None,
        readable: Sequence[str] = (),
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.sandbox = Sandbox(limits, mode=sandbox, readable=readable)
        self.session: Session = self.sandbox.session()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self.session = self.sandbox.session()
        return super().reset(seed=seed, options=options)

    def report(self, outcome: Outcome) -> str:
        """Tell the model what a program did. The text is so short that the notices at its end are never cut."""
        return report(outcome, self.sandbox.limits, most=self.max_result_chars)


class PythonTool(SandboxEnv):
    """Gives an environment the tool `python`."""

    @tool
    def python(self, code: str) -> str:
        """Run Python code in the working folder and read what it prints. Files last, variables do not.

        Args:
            code: a whole program; use print to see a value
        """
        return self.report(self.session.run_python(code))


class ShellTool(SandboxEnv):
    """Gives an environment the tool `shell`."""

    @tool
    def shell(self, command: str) -> str:
        """Run a command line in the working folder and read what it prints.

        Args:
            command: one or more shell commands
        """
        return self.report(self.session.run_shell(command))


def report(outcome: Outcome, limits: SandboxLimits, *, most: int) -> str:
    """Write output, errors, and why the program ended if not by itself: about `most` characters, cut in the middle."""
    ended = {
        None: f"[exit code {outcome.exit_code}]" if outcome.exit_code else "",
        "seconds": f"[stopped after {limits.seconds:g} s]",
        "cpu_seconds": f"[stopped after {limits.cpu_seconds} s of computing]",
        "memory": f"[stopped: more than {limits.memory_mb} MB of memory]",
        "processes": f"[stopped: more than {limits.processes} processes]",
        "output": f"[stopped: more than {limits.output_kb} kB of output]",
        "folder": f"[undone: more than {limits.files} files or {limits.folder_mb} MB in the folder]",
    }[outcome.killed_why]
    output = "\n".join(part.rstrip("\n") for part in (outcome.stdout, outcome.stderr) if part)
    return "\n".join(part for part in (_fit(output, most - len(ended) - 1), ended) if part) or "(no output)"


def _fit(text: str, most: int) -> str:
    """Return the text, or its beginning and end with a notice between them: an error stands at the end."""
    if len(text) <= most:
        return text
    half = max(0, most - 60) // 2
    return f"{text[:half]}\n[cut: {2 * half} of {len(text)} characters shown]\n{text[len(text) - half :]}"
