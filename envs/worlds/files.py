"""Puts an agent at a shell, in a sandboxed folder of small text files: `opd/Files-v0`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opd.envs.text_env import Start, task_split
from opd.envs.tools import tool
from opd.envs.worlds.file_tasks import LEVELS, FileTask, Tree, draw_tree, pick
from opd.envs.worlds.sandbox import ShellTool
from opd.errors import ConfigError, EnvError
from opd.sandbox import SandboxLimits
from opd.tool_calls import CLOSE, OPEN

SYSTEM = (
    "You work in a folder of text files through a shell. Do the task, then call submit, with the answer if the task "
    "asks for one."
)
_DRAWS = 1000


class FilesEnv(ShellTool):
    """Find, count, edit and move files. Reward 1 when the files, or the answer, are right at `submit`, else 0.

    A task that asks a question is judged by the answer alone, any other by the files alone: every file must have the
    right place and content, and no other may be there. Privileged are `plan` (the steps in words) and `solution`
    (shell commands, and the answer). No task, by its wording, is in two splits.

    Args:
        levels: difficulties to draw from: 1 (one command), 2 (many files at a time), 3 (several steps); evenly
            mixed, by the task's index where there is one.
        max_steps: truncate after this many turns.
        sandbox, limits: see `SandboxEnv`.
        max_result_chars: see `ToolEnv`.
    """

    metadata: dict[str, Any] = {  # noqa: RUF012  (gymnasium's own declaration)
        "render_modes": [],
        "tasks": {"train": None, "eval": None, "warm": None},
    }

    def __init__(
        self,
        *,
        levels: Sequence[int] = (1, 2, 3),
        max_steps: int | None = 8,
        sandbox: str = "bwrap",
        limits: SandboxLimits | Mapping[str, Any] | None = None,
        max_result_chars: int = 2000,
    ) -> None:
        if not levels or set(levels) - set(LEVELS):
            raise ConfigError(f"levels = {list(levels)} must name some of {', '.join(map(str, LEVELS))}")
        super().__init__(sandbox=sandbox, limits=limits, max_steps=max_steps, max_result_chars=max_result_chars)
        self.levels = tuple(levels)
        self.task = FileTask(prompt="", plan="", commands=(), given={})

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        number = int(rng.integers(len(self.levels))) if index is None else index
        self.task = _draw(rng, self.levels[number % len(self.levels)], split)
        self.session = self.sandbox.session(self.task.given)
        answer = "submit" if self.task.answer is None else f"submit: {self.task.answer}"
        return Start(
            prompt=self.task.prompt,
            system=SYSTEM,
            privileged={"plan": self.task.plan, "solution": "\n".join([*self.task.commands, answer])},
        )

    @tool
    def submit(self, answer: str = "") -> str:
        """Say that the task is done. This ends the task.

        Args:
            answer: the answer, if the task asks for one
        """
        wrong = self._describe_problem(answer)
        self.finish(float(wrong is None), success=wrong is None, feedback=wrong)
        return "right" if wrong is None else "wrong"

    def oracle(self) -> list[str]:
        """Return the actions of a perfect episode."""
        return [
            *(_call("shell", command=command) for command in self.task.commands),
            _call("submit", answer=self.task.answer or ""),
        ]

    def _describe_problem(self, answer: str) -> str | None:
        """Say what keeps the task from being solved, without telling the answer; None if it is solved."""
        answer = answer.strip().strip("\"'`").removeprefix("./")
        if self.task.answer is not None and answer != self.task.answer:
            return f"The answer {answer[:80]!r} is wrong."
        return None if self.task.result is None else _describe_difference(self.session.files, self.task.result)


def _draw(rng: np.random.Generator, level: int, split: str) -> FileTask:
    for _ in range(_DRAWS):
        task = pick(rng, LEVELS[level])(rng, draw_tree(rng))
        if task_split(task.prompt) == split:
            return task
    raise EnvError(f"no task of level {level} is in split {split!r}")


def _describe_difference(files: Mapping[str, bytes], wanted: Tree) -> str | None:
    """Say where the files are not as they should be; None if they are. A missing last end of line is forgiven."""
    problems = {
        "missing": sorted(set(wanted) - set(files)),
        "too many": sorted(set(files) - set(wanted)),
        "with the wrong content": [
            path
            for path in sorted(set(wanted) & set(files))
            if _end_line(files[path]) != _end_line(wanted[path].encode())
        ],
    }
    told = [f"{len(paths)} {kind}, such as {paths[0][:80]!r}" for kind, paths in problems.items() if paths]
    return f"The files are not as they should be: {'; '.join(told)}." if told else None


def _end_line(data: bytes) -> bytes:
    return data if data.endswith(b"\n") or not data else data + b"\n"


def _call(name: str, **arguments: str) -> str:
    return f"{OPEN}{json.dumps({'name': name, 'arguments': arguments})}{CLOSE}"
