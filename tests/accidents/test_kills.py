"""A run that is killed, or whose disk is full, at any of its operations on files ends as the run that never was hurt.

Real processes, real SIGKILLs. Not covered: a machine that loses power (what the kernel had not written is there after
a kill), several ranks, DeepSpeed's and vLLM's processes.
"""

import json
import os
import random
import shutil
import subprocess
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.accidents.hurting import AFTER, BEFORE, FULL, HALF

pytestmark = pytest.mark.slow
EXTERNAL = {"weights": "external"}
METHODS = {
    "sd_zero": {"env": "coin_env:CoinEnv", "sd_zero": {"questions": 6, "revisions": 1, "revising": {"steps": 2}}},
    "lightning_opd": {
        "env": {"id": "opd/Lookup-v0", "max_turns": 2},
        "lightning_opd": {"teacher": EXTERNAL, "sft_tasks": 4, "tasks": 6, "shard_tokens": 1},
    },
    "skill_sd": {
        "env": "coin_env:CoinEnv",
        "train": {"steps": 4},
        "rollout": {"group_size": 2},
        "skill_sd": {
            "distill": 1.0,
            "skills": {"min_support": 0.0, "min_lift": -100.0, "min_pdi": -100.0, "trials": 2, "min_likeness": 0.0},
        },
    },
}
CLOCKS = ("time/", "memory/")
"""What no two runs have in common in their rows."""
LEFT = ("partial", "deleted", "damaged", ".tmp", ".lock", "tmp")


@pytest.fixture(scope="module")
def models(tiny_model):
    return tiny_model(), tiny_model(seed=1)


@pytest.fixture(scope="module")
def settings(models, tmp_path_factory):
    """`settings(method, out)`: a run of several stages that saves after each step and keeps two."""

    def make(method, out):
        common = {
            "method": method,
            "out": str(out),
            "model": str(models[0]),
            "rollout": {"max_tokens": 8, "max_length": 384, "concurrency": 4},
            "train": {"steps": 2, "tasks_per_step": 3, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "eval": {"tasks": 2, "every": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
        }
        own = json.loads(json.dumps(METHODS[method]))
        if own[method].get("teacher") == EXTERNAL:
            own[method]["teacher"]["model"] = str(models[1])
        data = common | {
            key: common[key] | value if isinstance(common.get(key), dict) and isinstance(value, dict) else value
            for key, value in own.items()
        }
        data["train"] |= {"save_every": 1, "keep_last": 2}
        return data

    return make


@pytest.fixture(scope="module")
def unhurt(hospital, settings, tmp_path_factory):
    """`unhurt(method)`: the run that nothing happened to, and how many operations it took."""
    known = {}

    def made(method):
        if method not in known:
            out = tmp_path_factory.mktemp("whole") / "run"
            ended = hospital.run(settings(method, out))
            assert ended.code == 0, ended.said
            known[method] = SimpleNamespace(out=out, operations=ended.operations)
        return known[method]

    return made


def names(out):
    """Every file and folder of a run but the rows that were put aside when it began anew."""
    found = {str(path.relative_to(out)) for path in out.rglob("*")}
    return sorted(name for name in found if ".lost-" not in name)


def rows(out, name):
    """The rows of a file, without what a clock says."""
    lines = [json.loads(line) for line in (out / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(CLOCKS)} for row in lines]


def differing(ours, theirs):
    """The numbers that differ: step, key, both values; or how many rows there are."""
    if [row["step"] for row in ours] != [row["step"] for row in theirs]:
        return [("rows", [row["step"] for row in ours], [row["step"] for row in theirs])]
    pairs = [(row, other, key) for row, other in zip(ours, theirs, strict=True) for key in row.keys() | other.keys()]
    return [(a["step"], key, a.get(key), b.get(key)) for a, b, key in pairs if a.get(key) != b.get(key)]


def check_same(out, whole):
    """Everything that a run leaves is what the unhurt one has left."""
    assert names(out) == names(whole)
    assert not [name for name in names(out) if any(part in name for part in LEFT)]
    for name in ("metrics.jsonl", "rollouts.jsonl", "evals.jsonl"):
        assert differing(rows(out, name), rows(whole, name)) == [], name
    weights = [name for name in names(whole) if name.endswith(".safetensors") and not name.startswith("data/")]
    assert any(name.startswith("export/") for name in weights)
    assert any(name.startswith("checkpoints/") for name in weights)
    for name in weights:
        ours, theirs = load_file(out / name), load_file(whole / name)
        assert ours.keys() == theirs.keys(), name
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    for name in names(whole):
        if name.startswith("data/") and (whole / name).is_file() and "store" not in name and "stage" not in name:
            assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def told(ended):
    """A run that its disk ended says so in a few lines, and not in a traceback."""
    assert ended.code not in (0, 70, -9), ended
    assert "Traceback" not in ended.said, ended.said
    assert "error: " in ended.said, ended.said
    assert len(ended.said.splitlines()) <= 20, ended.said


@contextmanager
def small_disk(folder, size):
    """A file system of `size` bytes at `folder`; yields a function that gives it room. Needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 4096 * 4096}", "tmpfs", str(folder)], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def can_mount(folder):
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False).returncode == 0
    if done:
        subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()
    return done


def size_of(out):
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def kill_and_go_on(hospital, data, whole, dice):
    """Kill the run at a random operation, half of the time once more where it goes on; then let it end."""
    most = whole.operations
    for _ in range(dice.choice((1, 1, 2))):
        at, how = dice.randint(1, most), dice.choice((BEFORE, HALF, AFTER))
        ended = hospital.run(data, at=at, how=how)
        assert ended.code in (-9, 0), (at, how, ended)
        if ended.code == 0:  # it had fewer operations left
            return
    ended = hospital.run(data)
    assert ended.code == 0, (at, how, ended.said)


def one(number, hospital, data, whole, folder, *, full):
    """One run that is hurt, as its number says: with `full`, its disk is full before it is killed."""
    dice = random.Random(number)
    if full == "disk":
        peak = size_of(whole.out)
        with small_disk(folder, int(peak * dice.uniform(0.05, 0.95))) as give_room:
            ended = hospital.run(data)
            told(ended)
            give_room()
            kill_and_go_on(hospital, data, whole, dice)
            check_same(folder / "run", whole.out)
        return
    if full == "fault":
        ended = hospital.run(data, at=dice.randint(1, whole.operations), how=FULL)
        if ended.code != 0:
            told(ended)
    kill_and_go_on(hospital, data, whole, dice)
    check_same(folder / "run", whole.out)


@pytest.mark.parametrize(("number", "full"), [(1, None), (2, "fault")])
def test_a_run_of_stages_that_is_killed_ends_as_if_it_had_not_been(hospital, settings, unhurt, tmp_path, number, full):
    one(number, hospital, settings("sd_zero", tmp_path / "run"), unhurt("sd_zero"), tmp_path, full=full)


@pytest.mark.long
@pytest.mark.parametrize("number", range(100, 125))
def test_25_kills_five_of_them_on_a_full_disk(hospital, settings, unhurt, tmp_path, number):
    method = list(METHODS)[number % 3]
    folder = tmp_path / "disk"
    full = None
    if number % 5 == 0:
        full = "disk" if number % 10 and can_mount(folder) else "fault"
    out = folder / "run" if full == "disk" else tmp_path / "run"
    one(number, hospital, settings(method, out), unhurt(method), out.parent, full=full)
