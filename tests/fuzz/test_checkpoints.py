"""Runs that something happened to are resumed: to the bits of the run that nothing happened to, or refused by name.

Not covered: several ranks (`tests/zero/test_checkpoints.py`), and kills, which leave other traces.
"""

import re
import shutil
import time
from functools import cache
from pathlib import Path

import pytest
import torch

from opd.checkpoint import Checkpoint
from opd.errors import OpdError
from opd.launch.train import train
from opd.tracking import read_rows
from tests.fuzz.checkpoints import hurt, linked
from tests.fuzz.limits import Hang, time_limit, told

MOST_LINES, MOST_CHARACTERS, MOST_SECONDS = 20, 3000, 20
SMALL, WHOLE, PARTS = 5, 500, 4
DONE, END = 3, 4
"""The last checkpoint of the run that is hurt, and the steps of the whole one."""
OWN = re.compile(r"time|seconds|per_s|memory|rss")
"""Numbers of rows that no two runs share."""
METHODS = {
    "opsd": {
        "env": "opd/Lookup-v0",
        "opsd": {"privileged": "plan", "teacher": {"weights": "ema", "rate": 0.1}, "divergence": {"clip": None}},
    },
    # Two stages of two steps each: what is collected, trained on and exported stands beside the checkpoints.
    "sd_zero": {"env": "coin_env:CoinEnv", "sd_zero": {"questions": 6, "revisions": 2}},
}


@pytest.fixture(scope="module")
def settings(tiny_model):
    """`settings(out, method)`: a run with a teacher, which saves each step."""

    def make(out, method):
        train = {"tasks_per_step": 2, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1}
        own = METHODS[method]
        steps = END if method == "opsd" else END // 2
        return {
            "method": method,
            "out": str(out),
            "model": str(tiny_model()),
            "rollout": {"max_tokens": 6, "max_length": 256},
            "train": {**train, "steps": steps, "save_every": 1, "keep_last": END},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            **own,
        }

    return make


@pytest.fixture(scope="module")
def whole_run(settings, tmp_path_factory):
    """`whole_run(method)`: the folder of a run that nothing happened to, and what it came to."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def make(method):
        out = train(settings(folder / method, method)).out
        return out, final(out)

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "zero"))  # coin_env
        yield make


def left_before_the_end(whole, to):
    """A copy of a run as it is where the process was killed in its last step."""
    out = linked(whole, to)
    shutil.rmtree(out / f"checkpoints/step-{END}")
    shutil.rmtree(out / "export")
    return out


def final(out):
    """What a run came to: its weights, the teacher's, and rows without what depends on the machine."""
    saved = Checkpoint(out / f"checkpoints/step-{END}")
    tensors = {path.stem: saved.tensors(path.stem) for path in sorted(saved.folder.glob("*.safetensors"))}
    rows = [{k: v for k, v in row.items() if not OWN.search(k)} for row in read_rows(out / "metrics.jsonl")]
    return tensors, rows, [row["step"] for row in read_rows(out / "rollouts.jsonl")]


def same(ours, theirs):
    """True if two dictionaries of tensors, by file, are equal to the bit."""
    return ours.keys() == theirs.keys() and all(
        ours[file].keys() == theirs[file].keys()
        and all(torch.equal(ours[file][k], theirs[file][k]) for k in ours[file])
        for file in ours
    )


def faults(number, method, settings, whole_run, said):
    """What was done to a run, and what is wrong with what a resume makes of that; `said()` is what it told."""
    whole, wanted = whole_run(method)
    out, found = left_before_the_end(whole, whole.with_name("hurt")), []
    what, began = hurt(out, number), time.process_time()
    try:
        with time_limit(3 * MOST_SECONDS):
            train(settings(out, method), resume=True)
        found += faults_of_a_resumed(out, what, wanted, said())
    except OpdError as error:
        found += faults_of_a_refusal(what, str(error))
    except (Exception, Hang) as error:
        found.append(f"raises {type(error).__name__}: {str(error)[:300]}")
    finally:
        shutil.rmtree(out, ignore_errors=True)
    if (took := time.process_time() - began) > MOST_SECONDS:
        found.append(f"takes {took:.1f} s")
    return what, found


def faults_of_a_refusal(what, message):
    names = {part.strip() for place in what.split("; ") for part in place.partition(":")[0].split("/")}
    found = [] if any(name.removesuffix("s") in message for name in names) else [f"does not name it: {message[:300]}"]
    if len(message.splitlines()) > MOST_LINES or len(message) > MOST_CHARACTERS:
        found.append(f"a message of {len(message.splitlines())} lines, {len(message)} characters")
    return found


def faults_of_a_resumed(out, what, whole, said):
    try:
        tensors, rows, rollouts = final(out)
    except Exception as error:
        return [f"leaves what cannot be read: {type(error).__name__}: {str(error)[:300]}"]
    found = [] if same(tensors, whole[0]) else ["other weights"]
    lost = re.search(r"no row|has no rows|missing", said)
    if rows != whole[1] and not lost:
        found.append(f"other rows: {[row['step'] for row in rows]}")
    if rollouts != whole[2] and not lost:
        found.append(f"other rollouts: {rollouts}")
    if what.startswith(f"step-{DONE}/") and "older" not in said:
        found.append("goes on without a word")
    left = [path.name for path in (out / "checkpoints").glob(".*")]
    return found + [f"leaves {left}"] * bool(left)


@pytest.fixture
def faults_by_number(settings, whole_run, caplog, capsys):
    """`faults_by_number(numbers, method)`: what is wrong with the resumes of runs that something happened to."""

    def find(numbers, method):
        found = {}
        for number in numbers:
            caplog.clear()
            capsys.readouterr()
            what, wrong = faults(number, method, settings, whole_run, lambda: caplog.text + capsys.readouterr().err)
            if wrong:
                found[number] = (what, wrong)
        return found

    return find


@pytest.mark.slow
def test_a_run_that_something_happened_to_comes_to_the_same_or_is_refused_by_name(faults_by_number):
    found = faults_by_number(range(SMALL), "opsd")
    assert not found, told(found)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_five_hundred_runs_that_something_happened_to_come_to_the_same_or_are_refused_by_name(faults_by_number, part):
    method = "sd_zero" if part == PARTS - 1 else "opsd"
    found = faults_by_number(range(part, WHOLE, PARTS), method)
    assert not found, told(found)
