"""Adapts TextWorld's games and other Z-machine stories: `textworld:games/1.z8`, or `textworld:games` for a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from opd.envs.text_env import SPLITS, Reply, Start, TextEnv, task_split
from opd.errors import ConfigError, EnvError

_ENDINGS = (".z1", ".z2", ".z3", ".z4", ".z5", ".z6", ".z7", ".z8")
_LONGEST = 190
"""Characters of a command; the interpreter is a C program with buffers of its own."""
_REFUSED = {"quit", "q", "save", "restore", "restart", "script", "transcript", "unscript"}
"""Commands to the interpreter instead of the game: they write files, or end a game without a verdict."""
_STRANGE = re.compile(r"[^A-Za-z0-9 ,.'-]")
_CHAINED = re.compile(r"[,.]|\bthen\b|\band\b")
_STATUS_LINE = re.compile(r"\n>[^\n]*\Z")


class TextWorldEnv(TextEnv):
    """Plays one game an episode. The last line of the model's text is the command; a gain of score is the reward.

    A game that was made by TextWorld tells whether it was won, and its walkthrough is the privileged `solution`.
    Tasks are files: a folder's `train` and `eval` folders are the splits; where it has none, a share of the files
    is held out, chosen by a hash of their names. `tw-make` writes such files.

    Args:
        name: a .z8 file (or .z1 to .z7), or a folder.
        config: fields of `textworld.EnvInfos` to show in each observation: `{admissible_commands: true}`.
    """

    def __init__(self, name: str, *, config: Mapping[str, bool] | None = None) -> None:
        super().__init__()
        self._games = _files_by_split(Path(name).expanduser())
        self._shown = _wanted_fields(config or {})
        if len(self._games) > 1 or len(self._games["train"]) > 1:
            self.metadata = {**self.metadata, "tasks": {split: len(files) for split, files in self._games.items()}}
        self._env: Any = None
        self._file: Path | None = None
        self._score = 0.0

    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        files = self._games[split]
        number = int(rng.integers(len(files))) if index is None else index
        if not 0 <= number < len(files):
            raise EnvError(f"index {number} is outside the {split} split, which has {len(files)} games")
        self._open(files[number])
        self._env.seed(int(rng.integers(2**15)))
        state = self._env.reset()
        self._score = 0.0
        walkthrough = state.get("extra.walkthrough") or state.get("policy_commands")
        solution = {"solution": "\n".join(walkthrough)} if walkthrough else {}
        return Start(prompt=self._shown_text(state), privileged=solution)

    def respond(self, action: str) -> Reply:
        command = _last_command(action)
        if _is_refused(command):
            text = f"{command!r} is not available here."
            return Reply(messages=[{"role": "user", "content": text}], feedback=text)
        state, score, done = self._env.step(command)
        gain, self._score = float(score) - self._score, float(score)
        return Reply(
            messages=[{"role": "user", "content": self._shown_text(state)}],
            reward=gain,
            terminated=bool(done),
            success=bool(done and state.get("won")),
        )

    def close(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = self._file = None

    def _open(self, file: Path) -> None:
        """Start the interpreter, unless it has this game already: loading takes longer than an episode's steps."""
        import textworld

        if self._file == file:
            return
        self.close()
        wanted = {"won": True, "score": True, "objective": True, "policy_commands": True, "extras": ["walkthrough"]}
        self._env = textworld.start(str(file), textworld.EnvInfos(**wanted, **dict.fromkeys(self._shown, True)))
        self._file = file

    def _shown_text(self, state: Any) -> str:
        """Return what the game printed, without banner and status line, and the fields that `config` asked for."""
        text = _STATUS_LINE.sub("", str(state.feedback))
        objective = state.get("objective")
        if objective and objective in text:
            text = text[text.index(objective) :]  # the title is art of a thousand characters
        text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in text.split("\n"))).strip()
        return "\n\n".join([text, *(f"{name.replace('_', ' ')}: {_listed(state.get(name))}" for name in self._shown)])


def _last_command(action: str) -> str:
    """Take the last line that is not empty, in the characters that games know.

    Others are blanks: a backslash, say, begins a command to the interpreter itself.
    """
    lines = [line.strip() for line in action.splitlines() if line.strip()]
    line = lines[-1].removeprefix(">") if lines else ""
    return " ".join(_STRANGE.sub(" ", line).split())[:_LONGEST]


def _is_refused(command: str) -> bool:
    """True if one of the commands in a line is not meant for the game. Games split a line at full stops and `then`."""
    return any(part.strip() in _REFUSED for part in _CHAINED.split(command.lower()))


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _files_by_split(path: Path) -> dict[str, list[Path]]:
    """Return the files of each split. Raises ConfigError when there are none."""
    if path.is_file() and path.suffix in _ENDINGS:
        return {"train": [path]}
    if not path.is_dir():
        raise ConfigError(f"env.id: {str(path)!r} is neither a Z-machine story ({', '.join(_ENDINGS)}) nor a folder")
    splits = {split: _stories(path / split) for split in SPLITS if (path / split).is_dir()}
    if not splits:
        files = _stories(path)
        splits = {split: [f for f in files if task_split(f.name, warm=0.0) == split] for split in ("train", "eval")}
        splits = splits if all(splits.values()) else {"train": files}
    if empty := [split for split in ("train", *splits) if not splits.get(split)]:
        raise ConfigError(f"env.id: {str(path)!r} has no {empty[0]} games; `tw-make` writes some")
    return splits


def _stories(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in _ENDINGS)


def _wanted_fields(config: Mapping[str, bool]) -> list[str]:
    import textworld

    known = [name for name in textworld.EnvInfos.__slots__ if name != "extras"]
    if unknown := sorted(set(config) - set(known)):
        raise ConfigError(f"env.kwargs.config: textworld.EnvInfos has no {unknown[0]!r}. It has: {', '.join(known)}")
    return [name for name, wanted in config.items() if wanted]
