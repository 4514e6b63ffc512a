"""The accidents of docs/accidents.md: what is done to a run, how it should end, and what should be said and kept.

Each is a function of a `Ward` that does it and returns what was seen.
"""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.accidents.ward import PATIENCE, Run, Seen, Ward, digest, disk, fill, remount


@dataclass(frozen=True, slots=True)
class Accident:
    name: str
    do: Callable[[Ward], Seen]
    codes: tuple[int | str, ...]
    text: str
    """A pattern that what was said must hold."""
    kept: str = ""
    """A pattern that what was kept must hold."""
    root: bool = False


ACCIDENTS: list[Accident] = []


def accident(name: str, *codes: int | str, text: str = "", kept: str = "", root: bool = False) -> Callable[..., Any]:
    def note(do: Callable[[Ward], Seen]) -> Callable[[Ward], Seen]:
        ACCIDENTS.append(Accident(name, do, codes, text, kept, root))
        return do

    return note


SAME = r"goes on to the same weights"
SLOW = {"ACCIDENT_PAUSE": "0.25"}


def on_small_disk(ward: Ward, act: Callable[[Run], None], *, leave: int | None = None) -> Seen:
    """A run on a disk of its own, to which `act` does something; then the disk gets room, and the run goes on."""
    room = ward.folder / "disk"
    with disk(room, "200m"):
        ward.out = room / "run"
        if leave is not None:
            with (room / "ballast").open("wb") as file:
                file.write(bytes(shutil.disk_usage(room).free - leave))
        run = ward.start(ward.settings(), **SLOW)
        act(run)
        run.end()
        kept, text = ward.kept(), run.said
        remount(room, "size=2g,rw")
        kept += "; " + ward.ways_on()
        return Seen(run.told, run.ended, run.code, text, kept)


@accident("the disk is full at the first checkpoint", 1, 2, text="No space left|free", kept=SAME, root=True)
def _(ward: Ward) -> Seen:
    return on_small_disk(ward, lambda run: None, leave=500_000)


@accident("the disk is full at a later checkpoint", 1, 2, text="No space left|free", kept=SAME, root=True)
def _(ward: Ward) -> Seen:
    def act(run: Run) -> None:
        run.until(lambda: (ward.out / "checkpoints/step-2").is_dir())
        fill(ward.out, 400_000)
        run.now()

    return on_small_disk(ward, act)


@accident(
    "the disk is full at a row", 1, 2, text=r"metrics.jsonl|evals.jsonl|rollouts.jsonl|free", kept=SAME, root=True
)
def _(ward: Ward) -> Seen:
    def act(run: Run) -> None:
        run.until(lambda: (ward.out / "checkpoints/step-2").is_dir())
        fill(ward.out, 0)
        run.now()

    return on_small_disk(ward, act)


@accident("kill -9", -9, kept=SAME)
def _(ward: Ward) -> Seen:
    run = ward.start(ward.settings(), **SLOW)
    run.until(lambda: ward.rows() >= 2)
    run.send(signal.SIGKILL)
    return ward.seen(run)


def signalled(name: str, when: str) -> Callable[[Ward], Seen]:
    """A signal in a step, in an evaluation, or while a stage collects."""

    def do(ward: Ward) -> Seen:
        number = getattr(signal, name)
        settings = ward.settings()
        if when == "in an evaluation":
            settings["eval"] = {"tasks": 60, "every": 1}
        if when == "while a stage collects":
            settings = ward.settings(method="sd_zero", sd_zero={"questions": 200, "revisions": 2})
        run = ward.start(settings, **SLOW)
        if when == "in a step":
            run.until(lambda: ward.rows() >= 2)
        elif when == "in an evaluation":
            run.until(lambda: ward.rows("evals.jsonl") >= 1 and ward.rows() < 1)
            time.sleep(2.0)  # the first step is over by then, and the evaluation after it takes longer
        else:
            run.until(lambda: ward.rows("data/revisions.jsonl") > 3)
        time.sleep(0.1)
        run.send(number)
        return ward.seen(run, settings=settings, like=when != "while a stage collects")

    return do


for _code, _name, _called in (
    (143, "SIGTERM", "SIGTERM"),
    (129, "SIGHUP", "SIGHUP"),
    (75, "SIGUSR1", "SIGUSR1"),
    (130, "SIGINT", "Ctrl-C"),
):
    for _when in ("in a step", "in an evaluation", "while a stage collects"):
        if _when == "in a step" or _name in ("SIGTERM", "SIGINT"):
            _kept = "goes on to its end" if _when == "while a stage collects" else SAME
            accident(f"{_called} {_when}", _code, text="stopping", kept=_kept)(signalled(_name, _when))


@accident("Ctrl-C twice", 130, -2, text="stopping", kept=SAME)
def _(ward: Ward) -> Seen:
    run = ward.start(ward.settings(), **SLOW)
    run.until(lambda: ward.rows() >= 2)
    run.process.send_signal(signal.SIGINT)
    time.sleep(1.05)
    run.send(signal.SIGINT)  # while the first one's checkpoint and export are written
    return ward.seen(run)


@accident("train.max_hours", 75, text="stopped after step", kept=SAME)
def _(ward: Ward) -> Seen:
    run = ward.start(ward.settings(train={"max_hours": 4.0 / 3600}), ACCIDENT_PAUSE="0.8")
    return ward.seen(run)


def finished(ward: Ward, steps: int, **sections: Any) -> None:
    """A run that has so many steps behind it."""
    sections["train"] = sections.get("train", {}) | {"steps": steps}
    run = ward.start(ward.settings(**sections))
    run.end()
    assert run.code == 0, run.said


def resumed(ward: Ward, *extra: str, settings: dict[str, Any] | None = None, on: bool = False) -> Seen:
    run = ward.start(settings or ward.settings(), "--resume", *extra)
    run.end()
    kept = ward.kept()
    if run.code == 0:
        kept += "; the same weights" * (digest(ward.out) == ward.whole)
    elif on:
        kept += "; " + ward.ways_on()
    return Seen(run.told, run.ended, run.code, run.said, kept)


@accident("the newest checkpoint is damaged", 0, text="Going on from the older step-1", kept="the same weights")
def _(ward: Ward) -> Seen:
    finished(ward, 2)
    file = ward.out / "checkpoints/step-2/student.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))
    return resumed(ward)


@accident("all checkpoints are damaged", 1, 2, text="step-1.*step-2|step-2.*step-1")
def _(ward: Ward) -> Seen:
    finished(ward, 2)
    for folder in (ward.out / "checkpoints").iterdir():
        (folder / "run.json").write_text("{")
    return resumed(ward)


@accident("rows are missing beside a checkpoint", 0, text="no row of step 1", kept="the same weights")
def _(ward: Ward) -> Seen:
    finished(ward, 2)
    path = ward.out / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    return resumed(ward)


@accident("a row stands twice", 1, 2, text="has two rows")
def _(ward: Ward) -> Seen:
    finished(ward, 2)
    path = ward.out / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines(keepends=True)[-1])
    return resumed(ward)


@accident("a second process on the same out", 2, text="in use by process", kept=SAME)
def _(ward: Ward) -> Seen:
    first = ward.start(ward.settings(), **SLOW)
    first.until(lambda: ward.rows() >= 1)
    run = ward.start(ward.settings(), "--resume", "auto", **SLOW)
    run.end()
    first.process.wait(timeout=PATIENCE)
    kept = "the first run finishes: exit " + str(first.process.returncode) + "; " + ward.kept()
    kept += "; " + ward.ways_on()
    return Seen(run.told, run.ended, run.code, run.said, kept)


@accident("other settings at a resume", 1, 2, text=r"other settings: train\.lr")
def _(ward: Ward) -> Seen:
    finished(ward, 2)
    return resumed(ward, "--train.lr", "0.1", on=True)


@accident("other data at a resume", 0, text=r"dialogues\.jsonl.*has changed")
def _(ward: Ward) -> Seen:
    path = ward.folder / "dialogues.jsonl"

    def write(answer: str) -> None:
        turns = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": answer}]
        path.write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)))

    write("Hi.")
    own = {"method": "sft", "sft": {"source": "file", "file": str(path)}}
    finished(ward, 2, **own)
    write("No.")
    return resumed(ward, settings=ward.settings(**own))


@accident("out is deleted while the run lives", 1, 2, text="is gone|deleted|cannot be written")
def _(ward: Ward) -> Seen:
    run = ward.start(ward.settings(), **SLOW)
    run.until(lambda: ward.rows() >= 2)
    run.now()
    shutil.rmtree(ward.out, ignore_errors=True)
    return ward.seen(run, on=False)


@accident("out is moved while the run lives", 1, 2, text="is gone|moved|cannot be written")
def _(ward: Ward) -> Seen:
    run = ward.start(ward.settings(), **SLOW)
    run.until(lambda: ward.rows() >= 2)
    run.now()
    ward.out.rename(ward.folder / "moved")
    run.end()
    ward.out = ward.folder / "moved"
    return Seen(run.told, run.ended, run.code, run.said, "moved: " + ward.kept())


@accident("out is on a disk that is read-only", 2, text="[Rr]ead-only|not writable", root=True)
def _(ward: Ward) -> Seen:
    room = ward.folder / "disk"
    with disk(room, "20m"):
        ward.out = room / "run"
        remount(room, "ro")
        run = ward.start(ward.settings())
        return ward.seen(run, on=False)


for _name, _around, _console in (
    ("stdout is closed (>&-)", "{} >&-", True),
    ("stdout and stderr are closed", "{} >&- 2>&-", True),
    ("stdout is a full disk (>/dev/full)", "{} >/dev/full", True),
    ("| head -1", "set -o pipefail; {} | head -1", True),
    ("2>&1 | head -1", "set -o pipefail; {} 2>&1 | head -1", True),
):

    def _piped(ward: Ward, around: str = _around) -> Seen:
        run = ward.start(ward.settings(tracking={"console": True}), around=around)
        run.end()
        same = digest(ward.out) == ward.whole
        return Seen(run.told, run.ended, run.code, run.said, ward.kept() + ("; finished" if same else ""))

    accident(_name, 0, kept="; finished")(_piped)


def acted(how: str, workers: str, at: int = 5, **sections: Any) -> Callable[[Ward], Seen]:
    """An environment does something at its `at`-th call."""

    def do(ward: Ward) -> Seen:
        settings = ward.settings(env={"workers": workers}, **sections)
        run = ward.start(settings, ACCIDENT_HOW=how, ACCIDENT_AT=str(at))
        run.end()
        reasons = [f for f in failures(ward.out) if f]
        kept = ward.kept() + (f"; failed episodes: {reasons[0]}" if reasons else "")
        if run.code != 0:
            kept += "; " + ward.ways_on(settings)
        return Seen(run.told, run.ended, run.code, run.said, kept)

    return do


def failures(out: Path) -> list[str | None]:
    path = out / "rollouts.jsonl"
    rows = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(row)["failed"] for row in rows]


for _workers in ("threads", "processes"):
    accident(f"an environment raises ({_workers})", 0, kept="no luck")(acted("raise", _workers))
    accident(f"an environment hangs ({_workers})", 0, kept="failed episodes")(acted("hang", _workers))
    accident(f"an environment has no memory, MemoryError ({_workers})", 0, kept="MemoryError")(
        acted("memory", _workers)
    )
    accident(f"an environment closes stdout ({_workers})", 0)(acted("close stdout", _workers))
    accident(f"an environment changes the folder ({_workers})", 0)(acted("chdir", _workers))
accident("an environment ends its process, os._exit (threads)", 7, text="", kept="goes on")(acted("exit", "threads"))
accident("an environment ends its process, os._exit (processes)", 0, kept="failed episodes")(acted("exit", "processes"))
accident("the process gets no more memory", 1, 2, text="memory|allocate")(acted("no more memory", "threads"))


@accident("a model whose weights are not numbers", 1, 2, text="not finite|NaN|nan")
def _(ward: Ward) -> Seen:
    import torch
    from safetensors.torch import load_file, save_file

    broken = ward.folder / "broken"
    shutil.copytree(ward.model, broken)
    weights = load_file(broken / "model.safetensors")
    first = next(name for name, tensor in weights.items() if tensor.ndim == 2)
    weights[first][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    run = ward.start(ward.settings(model=str(broken)))
    return ward.seen(run, on=False)


@accident("weights that become infinite (train.lr: 1e30)", 1, 2, text="not finite|finite|NaN|nan")
def _(ward: Ward) -> Seen:
    run = ward.start(ward.settings(train={"lr": 1e30, "max_grad_norm": 1e30}))
    return ward.seen(run, on=False)


@accident("wandb cannot be reached", 0, text="wandb", kept="; finished")
def _(ward: Ward) -> Seen:
    settings = ward.settings(tracking={"wandb": "online"})
    run = ward.start(settings, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40)
    run.end()
    same = digest(ward.out) == ward.whole
    return Seen(run.told, run.ended, run.code, run.said, ward.kept() + ("; finished" if same else "; OTHER WEIGHTS"))


for _name, _sections, _extra, _text in (
    ("a typo in a setting", {"rollout": {"temprature": 1.0}}, (), "temprature.*temperature"),
    ("a typo in an option", {}, ("--train.stps", "3"), r"train\.stps.*train\.steps"),
    ("a typo in the method", {"method": "opsdd"}, (), "opsdd.*opsd"),
    ("a typo in the model", {"model": "tiny:lokup"}, (), "tiny:lokup.*tiny:lookup"),
    ("a typo in the environment", {"env": {"id": "opd/Lokup-v0"}}, (), r"opd/Lokup-v0"),
    ("${env:X} that is not set", {"env": {"kwargs": {"key": "${env:NOT_SET}"}}}, (), "NOT_SET.*not set"),
):

    def _mistaken(ward: Ward, sections: Any = _sections, extra: Any = _extra) -> Seen:
        run = ward.start(ward.settings(**sections), *extra)
        run.end()
        return Seen(run.told, run.ended, run.code, run.said, "nothing is written" if not ward.out.exists() else "RUN")

    accident(_name, 2, text=_text, kept="nothing is written")(_mistaken)
