"""Runs of `opd` in processes of their own, and what is seen of them: what was said and when, and what was kept."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
PATIENCE = 150.0
"""Seconds after which a run counts as hung."""
SAID = re.compile(r"error: |stopp(ing: |ed after)|[Ww]arning: |Going on|no row of|interrupted|Traceback|wandb")
NOISE = re.compile(r"real_accelerator|it/s\]|\?it/s")
"""Lines of libraries that say nothing of the accident."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What came of an accident."""

    seconds: float | None
    """From the accident, or from the start of the process, to the message; None where there was none."""
    ended: float
    """To the end of the process."""
    code: int | str
    text: str
    kept: str


@dataclass
class Run:
    """One process of `opd`, its output in a file."""

    command: list[str]
    folder: Path
    environment: dict[str, str]
    shell: bool = False
    since: float = field(default_factory=time.monotonic)
    """When the accident happened, or the process began."""
    told: float | None = None
    code: int | str = "hung"

    def __post_init__(self) -> None:
        self.log = self.folder / f"said-{time.monotonic_ns()}.txt"
        self._file = self.log.open("w")
        self.process = subprocess.Popen(
            " ".join(self.command) if self.shell else self.command,
            shell=self.shell,
            executable="/bin/bash" if self.shell else None,
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=self.environment,
            start_new_session=True,
        )

    @property
    def said(self) -> str:
        """Its output so far."""
        return self._whole if self._whole is not None else self.log.read_text(errors="replace")

    _whole: str | None = None

    def until(self, there: Callable[[], bool]) -> None:
        """Wait until something is there, or the process has ended."""
        until = time.monotonic() + PATIENCE
        while not there() and self.process.poll() is None and time.monotonic() < until:
            time.sleep(0.02)

    def now(self) -> None:
        """The accident happens now."""
        self.since, self.told, self._before = time.monotonic(), None, len(self.said)

    _before: int = 0

    def send(self, number: int) -> None:
        self.now()
        self.process.send_signal(number)

    def end(self) -> None:
        """Wait for the end, and note when something was said."""

        def over() -> bool:
            if self.told is None and SAID.search(NOISE.sub("", self.said[self._before :])):
                self.told = time.monotonic() - self.since
            return False

        self.until(over)
        over()
        self.ended = time.monotonic() - self.since
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        else:
            self.code = self.process.returncode
        self._file.close()
        self._whole = self.said


class Ward:
    """The folder of one accident: settings, runs, and what is left of them."""

    def __init__(self, folder: Path, model: Path, whole: dict[str, str]) -> None:
        self.folder, self.model, self.whole = folder, model, whole
        self.out = folder / "run"

    def settings(self, **sections: Any) -> dict[str, Any]:
        data: dict[str, Any] = {
            "method": "opsd",
            "out": str(self.out),
            "model": str(self.model),
            "env": {"id": "accident_envs:AccidentEnv"},
            "rollout": {"max_tokens": 8, "max_length": 384, "step_timeout": 3.0, "concurrency": 3},
            "train": {
                "steps": STEPS,
                "tasks_per_step": 3,
                "lr": 1e-3,
                "tokens_per_microbatch": 512,
                "threads": 1,
                "save_every": 1,
                "keep_last": 2,
            },
            "eval": {"tasks": 2, "every": 2},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            "opsd": {"privileged": "solution", "divergence": {"clip": None}},
        }
        for key, values in sections.items():
            held = data.get(key)
            data[key] = held | values if isinstance(held, dict) and isinstance(values, dict) else values
        if data["method"] != "opsd":
            del data["opsd"]
        return data

    def start(
        self, settings: dict[str, Any], *extra: str, command: str = "train", around: str = "{}", **variables: str
    ) -> Run:
        """Start `opd train` by these settings; `around` is a line of bash with {} for the command."""
        path = self.folder / "run.yaml"
        path.write_text(json.dumps(settings, indent=1))
        words = [sys.executable, "-m", "opd.launch.cli", command, str(path), *extra]
        paths = os.pathsep.join([str(ROOT / "tests/accidents"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""} | variables
        if around != "{}":
            return Run([around.format(" ".join(words))], self.folder, environment, shell=True)
        return Run(words, self.folder, environment)

    def rows(self, name: str = "metrics.jsonl") -> int:
        path = self.out / name
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def kept(self) -> str:
        """What is on the disk: the newest checkpoint, and the rows."""
        found = sorted((self.out / "checkpoints").glob("step-*"), key=lambda p: (len(p.name), p.name))
        newest = ", ".join(path.name for path in found[-2:]) or "no checkpoint"
        return f"{newest}; {self.rows()} rows"

    def ways_on(self, settings: dict[str, Any] | None = None, *, like: bool = True) -> str:
        """Resume the run, and say what came of it; `like`: it should end as the run that nothing happened to."""
        run = self.start(settings or self.settings(), "--resume", "auto")
        run.end()
        if run.code != 0:
            return f"does not go on ({run.code}): {last_words(run.said)}"
        left = [p.name for p in self.out.rglob("*") if re.search(r"\.partial|\.deleted|\.tmp|\.lock", p.name)]
        same = "the same weights" if digest(self.out) == self.whole else "OTHER WEIGHTS" if like else "its end"
        return f"goes on to {same}" + (f"; LEFT {', '.join(left)}" if left else "")

    def seen(self, run: Run, *, on: bool = True, settings: dict[str, Any] | None = None, like: bool = True) -> Seen:
        """Wait for the run's end, and write down what came of it; `on`: see how it goes on."""
        run.end()
        kept, text = self.kept(), run.said
        if on:
            kept += "; " + self.ways_on(settings, like=like)
        return Seen(run.told, run.ended, run.code, text, kept)


def digest(out: Path) -> dict[str, str]:
    """The hashes of the trained weights, by the file's name."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in (out / "export").glob("*.safetensors")}


def last_words(text: str) -> str:
    """The lines that say what happened, without what comes before them."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not NOISE.search(line)]
    told = [line for line in lines if SAID.search(line)] or lines[-1:]
    return " ".join(told[-2:])


@contextmanager
def disk(folder: Path, size: str) -> Iterator[None]:
    """A file system of that size at `folder`. Needs root."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Fill the disk of a folder but for about so many bytes; a run may write there meanwhile."""
    with (folder.parent / "ballast").open("wb") as file, suppress(OSError):
        while (free := shutil.disk_usage(folder).free - leave) > 0:
            file.write(bytes(min(free, 1_000_000)))
            file.flush()
