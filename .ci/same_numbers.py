"""Proves that a change of the code moved no number: records many short runs before and after it, and compares.

    python .ci/same_numbers.py record OLD.json --model STUDENT --teacher TEACHER     # in the tree before the change
    python .ci/same_numbers.py record NEW.json --model STUDENT --teacher TEACHER     # in the tree after it
    python .ci/same_numbers.py compare OLD.json NEW.json

STUDENT and TEACHER are the folders of two models of one tokenizer, the same folders both times; those that
`tiny:lookup` and `tiny:lookup-expert` are kept in do. `record` trains with the package of the tree that it stands in,
every method and every option that takes a way of its own through the code, two steps each, on one process and with
ZeRO-3 on two, and writes each step's metrics in full precision, digests of the episodes and of the exported tensors,
and beside OUT.json a folder with these tensors. `--only NAME ...` takes these cases alone. Every case is seeded by
itself, so that it has the same numbers alone and after others.

`compare` prints a line for each case and exits with 1 if a number moved or is gone. A metric that only the new tree has
moves none: it is named, and passes.

`.ci/short_runs.py` is the one place that spells settings: whoever renames one edits it there, in the same commit.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from short_runs import CONVERSATIONS, STUDENT, TEACHER, all_cases
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DONE = "same-numbers: "
"""Begins a line in which a worker says which case is over."""
EPISODE = ("step", "task", "seed", "member", "reward", "success", "end", "tokens", "messages")
"""The fields of rollouts.jsonl that are compared."""
KINDS = {"train/loss": "loss", "train/grad_norm": "norm"}
GONE = "gone"
# -- record -------------------------------------------------------------------------------------------


def record(out: Path, *, student: Path, teacher: Path, only: Sequence[str]) -> int:
    """Run the cases, and write what came out to `out` and, the tensors, beside it; 1 if a case failed."""
    wanted = all_cases()
    if unknown := [name for name in only if name not in wanted]:
        raise SystemExit(f"no such case: {', '.join(unknown)}. There are: {'; '.join(wanted)}")
    wanted = {name: wanted[name] for name in wanted if not only or name in only}
    kept = tensor_folder(out)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="same-numbers-") as scratch:
        place = Path(scratch)
        paths = {STUDENT: str(student.resolve()), TEACHER: str(teacher.resolve())}
        paths |= {CONVERSATIONS: str(conversations(place / "conversations.jsonl"))}
        configs = {
            name: filled(settings, paths) | {"out": str(place / f"run-{number}")}
            for number, (name, settings) in enumerate(wanted.items())
        }
        for name, seconds, error in run_all(configs, place):
            folder = Path(configs[name]["out"])
            found[name] = {"error": error} if error else numbers_of(folder, kept / slug(name))
            shutil.rmtree(folder, ignore_errors=True)
            print(f"{len(found):3} of {len(wanted)}  {seconds:6.1f} s  {name}{error and f': {error}'}", flush=True)
            out.write_text(json.dumps(found, indent=1) + "\n")
    return int(any("error" in case for case in found.values()))


def run_all(configs: Mapping[str, dict[str, Any]], place: Path) -> Iterator[tuple[str, float, str]]:
    """Run each case; yield its name, its seconds, and "" or why it failed.

    The first case of one process and the first with ZeRO-3 go through the commands that a user types, the others
    through `opd.train` in one process or in one pair of processes, which need not start anew for each.
    """
    local = [name for name, config in configs.items() if "backend" not in config]
    zero = [name for name in configs if name not in local]
    for name in local[:1]:
        yield (name, *by_command([str(Path(sys.executable).parent / "opd"), "train"], configs[name], place))
    for names, launcher in ((local[1:], []), (zero[1:], two_ranks())):
        if names:
            yield from by_worker(launcher, {name: configs[name] for name in names}, place)
    for name in zero[:1]:
        runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", free_port()]
        yield (name, *by_command([*runner, "--module", "opd.launch.train"], configs[name], place))


def by_command(command: Sequence[str], config: Mapping[str, Any], place: Path) -> tuple[float, str]:
    """`command FILE --key value ...`, with the sizes of a step on the command line; seconds, and "" or its last words.

    The file is JSON, which is YAML too."""
    file, since = place / "run.yaml", time.monotonic()
    file.write_text(json.dumps(dict(config)))
    options = ["--seed", str(config["seed"]), "--train.steps", str(config["train"]["steps"])]
    done = subprocess.run(
        [*command, str(file), *options], env=environment(), cwd=place, capture_output=True, text=True, check=False
    )
    return time.monotonic() - since, last_words(done.stdout + done.stderr) if done.returncode else ""


def by_worker(launcher: Sequence[str], configs: Mapping[str, Any], place: Path) -> Iterator[tuple[str, float, str]]:
    """The cases one after the other in the process (or processes) of `work`, as it gets done with them."""
    (place / "cases.json").write_text(json.dumps(configs))
    command = [sys.executable, *launcher, str(Path(__file__).resolve()), "work", str(place / "cases.json")]
    waiting = list(configs)
    with (place / "log").open("w+") as log:
        process = subprocess.Popen(command, env=environment(), cwd=place, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(DONE):
                name, seconds, error = json.loads(line.removeprefix(DONE))
                waiting.remove(name)
                yield name, seconds, error
        process.wait()
        words = last_words((place / "log").read_text())
    yield from ((name, 0.0, f"the process ended before: {words}") for name in waiting)


def work(cases: Path) -> None:
    """Run cases with `opd.train`, on as many ranks as a launcher started; the first one tells when each is over."""
    import opd
    from opd.errors import OpdError

    if not Path(opd.__file__).is_relative_to(ROOT):
        raise SystemExit(
            f"error: {sys.executable} has the opd of {opd.__file__}, not that of {ROOT}; take its own Python"
        )
    first = os.environ.get("RANK", "0") == "0"
    for name, config in json.loads(cases.read_text()).items():
        error, since = "", time.monotonic()
        torch.manual_seed(0)
        try:
            opd.train(config)
        except OpdError as failure:  # all ranks raise it together; any other error ends the worker
            error = f"{type(failure).__name__}: {failure}"
        if first:
            print(DONE + json.dumps([name, time.monotonic() - since, error]), flush=True)


def two_ranks() -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def environment() -> dict[str, str]:
    """One thread, no GPU, and the console scripts of this interpreter."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore", "PATH": path}
    return os.environ | own


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def last_words(log: str) -> str:
    """The error of a log, or how it ends."""
    errors = [line for line in log.splitlines() if line.startswith("error:")]
    return errors[0] if errors else log.strip()[-1500:]


def filled(settings: Any, paths: Mapping[str, str]) -> Any:
    """The settings with what stands for a path replaced by it."""
    if isinstance(settings, dict):
        return {key: filled(value, paths) for key, value in settings.items()}
    return paths.get(settings, settings) if isinstance(settings, str) else settings


def conversations(path: Path) -> Path:
    """Write a few conversations to learn from, for `sft.source: file`."""
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Count from {n}."},
                {"role": "assistant", "content": f"{n}, {n + 1}"},
            ]
        }
        for n in range(9)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# -- what a run left ----------------------------------------------------------------------------------


def numbers_of(run: Path, kept: Path) -> dict[str, Any]:
    """The numbers of a run's folder; its exported tensors are copied to `kept`.

    No number depends on where the run was: paths, times and the spelling of the settings are left out.
    """
    tensors = exported(run)
    stored = [row for path in sorted(run.glob("data/*.jsonl")) for row in rows_of(path)]
    kept.mkdir()
    for path in sorted(run.glob("export*/*.safetensors")):
        (kept / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, kept / path.parent.name)
    return {
        "steps": [
            {key: in_full(value) for key, value in row.items() if not is_time(key)}
            for row in rows_of(run / "metrics.jsonl")
        ],
        "episodes": digest(
            [[row.get(name) for name in EPISODE] for row in rows_of(run / "rollouts.jsonl")],
        ),
        "token ids": digest([ids for row in stored if (ids := list(ids_in(row)))]),  # a header has none
        "weights": {name: digest_of(tensor) for name, tensor in tensors.items()},
    }


def exported(run: Path) -> dict[str, Tensor]:
    """The tensors of every export in a folder, by file and name."""
    return {
        f"{path.parent.name}/{name}": tensor
        for path in sorted(run.glob("export*/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def is_time(key: str) -> bool:
    return key.startswith("time/") or "_per_second" in key


def in_full(value: float | None) -> str | None:
    """A number to the bit; None where the run wrote null for one that is not finite."""
    return None if value is None else float(value).hex()


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ids_in(value: Any) -> Iterator[list[int]]:
    """Every list of whole numbers in a row, in order, whatever the row calls it: sampled ids are such."""
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from ids_in(item)


def digest(data: Any) -> str:
    return sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def digest_of(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + data).hexdigest()


def slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() or c == "_" else " " for c in name).split())


def tensor_folder(out: Path) -> Path:
    return out.with_suffix(".weights")


# -- compare ------------------------------------------------------------------------------------------


def compare(old: Path, new: Path, *, only: Sequence[str]) -> int:
    """Print a line for each case; 1 if a number moved, or a case failed or is in one record alone."""
    before, after = (json.loads(path.read_text()) for path in (old, new))
    names = [name for name in {**before, **after} if not only or name in only]
    moved = 0
    for name in names:
        one, two = before.get(name), after.get(name)
        if one is None or two is None:
            wrong = f"only in {old if two is None else new}"
        elif error := two.get("error") or one.get("error"):
            wrong = f"failed: {error}"
        else:
            folders = [tensor_folder(path) / slug(name) for path in (old, new)]
            wrong = "; ".join([*moved_metrics(one, two), *moved_episodes(one, two), *moved_weights(one, two, folders)])
        moved += bool(wrong)
        print(f"{'MOVED' if wrong else 'same '}  {name}: {wrong or 'equal to the bit'}{new_metrics(one, two)}")
    print(f"{moved} of {len(names)} cases moved" if moved else f"no number of {len(names)} cases moved")
    return int(bool(moved) or not names)


def moved_metrics(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    """The greatest difference of the losses, of the norms and of the other metrics, each as a phrase."""
    if len(old["steps"]) != len(new["steps"]):
        yield f"{len(old['steps'])} steps, now {len(new['steps'])}"
    off: dict[str, list[tuple[float, str]]] = {}
    for number, (before, after) in enumerate(zip(old["steps"], new["steps"], strict=False), start=1):
        for key, a in before.items():
            b = after.get(key, GONE)
            if a != b:
                kind = KINDS.get(key, "metric")
                off.setdefault(kind, []).append((relative(a, b), f"{key} of step {number}: {show(a)} is now {show(b)}"))
    for kind, found in off.items():
        most, where = max(found)
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        yield f"{kind} by {most:.2g} ({where}{more})"


def moved_episodes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for what in ("episodes", "token ids"):
        if old[what] != new[what]:
            yield f"other {what}"


def moved_weights(old: Mapping[str, Any], new: Mapping[str, Any], folders: Sequence[Path]) -> Iterator[str]:
    """The greatest difference of a tensor, as a phrase."""
    one, two = old["weights"], new["weights"]
    names = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    if names:
        ours, theirs = (exported(folder) for folder in folders)
        most, where = max((apart(ours.get(name), theirs.get(name)), name) for name in names)
        yield f"weights by {most:.2g} ({where}, {len(names)} of {len(one)} tensors)"


def new_metrics(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str:
    """Names the metrics that only the new record has, in brackets; "" for none."""
    one, two = ({key for row in (case or {}).get("steps", []) for key in row} for case in (old, new))
    return f"   (new: {', '.join(sorted(two - one))})" if one and two - one else ""


def relative(old: str | None, new: str | None) -> float:
    """The distance of two numbers over the greater; infinite where one is not finite or gone."""
    if old is None or new is None or new == GONE:
        return math.inf
    a, b = float.fromhex(old), float.fromhex(new)
    return abs(a - b) / max(abs(a), abs(b)) if a != b else 0.0  # 0 and -0 are other bits


def apart(old: Tensor | None, new: Tensor | None) -> float:
    """The norm of the difference over the old norm; infinite where one is gone or has another shape."""
    if old is None or new is None or old.shape != new.shape:
        return math.inf
    return float((new.double() - old.double()).norm() / old.double().norm().clamp_min(1e-300))


def show(number: str | None) -> str:
    return "not finite" if number is None else number if number == GONE else repr(float.fromhex(number))


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run the cases with this tree, and write their numbers")
    recording.add_argument("out", type=Path)
    recording.add_argument("--model", type=Path, required=True, help="the student's folder")
    recording.add_argument("--teacher", type=Path, required=True, help="the external teacher's folder")
    comparing = commands.add_parser("compare", help="hold two records against each other")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    for command in (recording, comparing):
        command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these cases alone")
    working = commands.add_parser("work")  # of the tool's own processes
    working.add_argument("cases", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "work":
        work(given.cases)
        return 0
    if given.command == "compare":
        return compare(given.old, given.new, only=given.only)
    return record(given.out, student=given.model, teacher=given.teacher, only=given.only)


if __name__ == "__main__":
    sys.exit(main())
