"""Whose a run's folder is, what is saved when, and where a run goes on. Real runs, real signals, real kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save

from opd import checkpoint
from opd.checkpoint import Checkpoint
from opd.envs.worlds.lookup import LookupEnv
from opd.errors import CheckpointError, ConfigError, LockError
from opd.launch.cli.main import main
from opd.launch.run import signals
from opd.launch.run.build import Run
from opd.launch.run.lock import NAME
from opd.launch.run.score import Score
from opd.launch.run.signals import stop_signals
from opd.launch.train import train
from opd.tracking import read_rows
from opd.trainers.loop.loop import Loop
from opd.trainers.loop.method import Method
from opd.trainers.loop.play import Player

pytestmark = pytest.mark.slow


def start(settings, folder):
    """`opd train` in a process of its own, once it has trained a few steps."""
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    command = [sys.executable, "-m", "opd.launch.cli", "train", str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 400
    while len(read_rows(folder / "run/metrics.jsonl")) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.1)
    return process


def steps_of(out):
    return [row["step"] for row in read_rows(out / "metrics.jsonl")]


def saved(out):
    return sorted(path.name for path in (out / "checkpoints").glob("*"))


def test_a_live_run_is_left_alone_and_a_killed_one_is_not_emptied(settings, tmp_path, capsys):
    data, run = settings("run", train={"steps": 5000}), tmp_path / "run"
    process = start(data, tmp_path)
    try:
        for options in ({"resume": True}, {"resume": "auto"}, {"overwrite": True}):
            with pytest.raises(LockError, match=rf"in use by process {process.pid} on .*, started 2"):
                train(data, **options)
        for options in (["--resume"], ["--overwrite"], []):
            assert main(["train", str(run), *options]) == 2
            assert f"in use by process {process.pid}" in capsys.readouterr().err
        before = len(steps_of(run))
        until = time.monotonic() + 300
        while len(steps_of(run)) <= before:
            assert time.monotonic() < until
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.kill()
        process.communicate()

    rows = (run / "metrics.jsonl").read_text()
    with pytest.raises(CheckpointError, match=r"rows up to step \d+, but no checkpoint to go on from.*--resume auto"):
        train(data, resume=True)
    assert (run / "metrics.jsonl").read_text() == rows
    assert not (run / NAME).exists()

    short = settings("run", train={"steps": 2})
    assert train(short, resume="auto").steps == 2
    assert (run / "metrics.lost-1.jsonl").read_text() == rows
    assert steps_of(run) == [1, 2]
    assert "its rows are kept in metrics.lost-1.jsonl, rollouts.lost-1.jsonl" in capsys.readouterr().err


def test_auto_begins_a_run_goes_on_with_it_and_has_nothing_to_do_once_it_is_over(settings):
    first = train(settings("run", train={"steps": 1}), resume="auto")
    longer = settings("run", train={"steps": 2}, eval={"tasks": 2})
    second = train(longer, resume="auto")
    rows = (second.out / "metrics.jsonl").read_text()
    third = train(longer, resume="auto")
    assert (first.steps, second.steps, third.steps) == (1, 2, 2)
    assert third.after == second.after
    assert (second.out / "metrics.jsonl").read_text() == rows


def test_resume_and_auto_are_told_apart_on_the_command_line(settings, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings("run", train={"steps": 1})))
    assert main(["train", "--resume", str(path)]) == 2
    assert "holds no run to resume" in capsys.readouterr().err
    assert main(["train", str(path), "--resume", "auto"]) == 0
    assert main(["train", "--resume=auto", str(path), "--train.steps", "2"]) == 0
    assert steps_of(tmp_path / "run") == [1, 2]


def test_a_run_that_is_overwritten_leaves_nothing_of_itself(settings):
    first = train(settings("run", train={"steps": 2}))
    (first.out / "more").mkdir()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(settings("run"))
    second = train(settings("run", train={"steps": 1}), overwrite=True)
    assert steps_of(second.out) == [1]
    assert not (second.out / "more").exists()


def test_a_refused_run_leaves_no_folder_behind(settings, tmp_path):
    with pytest.raises(Exception, match="broken"):
        train(settings("new", env={"id": "opd/Lookup-v0", "kwargs": {}}, model=str(tmp_path / "broken")))
    assert not (tmp_path / "new").exists()


NO_MANIFESTS = [
    "",
    "{",
    "[]",
    "null",
    "{}",
    '{"files": null}',
    '{"files": {}}',
    '{"files": {"run.json": {}}}',
    '{"files": 3}',
]


@pytest.mark.parametrize("manifest", NO_MANIFESTS)
def test_a_manifest_that_is_none_counts_as_damage(tmp_path, manifest):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"is not a whole checkpoint|is missing or damaged"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["student.safetensors", "run.json", "manifest.json"])
def test_a_damaged_checkpoint_is_named_put_aside_and_costs_no_good_one(settings, caplog, name):
    often = {"save_every": 1, "keep_last": 2}
    whole = train(settings("whole", train={"steps": 6})).out
    out = train(settings("run", train={"steps": 4, **often})).out
    assert saved(out) == ["step-3", "step-4"]
    file = out / "checkpoints/step-4" / name
    file.write_bytes(file.read_bytes()[:40])
    train(settings("run", train={"steps": 6, "save_every": 0, "keep_last": 1}), resume=True)
    assert saved(out) == ["step-4.damaged", "step-6"]
    assert "Going on from the older step-3" in caplog.text
    assert steps_of(out) == [1, 2, 3, 4, 5, 6]
    last = [Checkpoint(folder / "checkpoints/step-6").tensors("student") for folder in (whole, out)]
    assert all(torch.equal(last[0][key], weights) for key, weights in last[1].items())


SPOILED = {
    "a header that is none": ("student.safetensors", lambda content: content[:8] + b"[" + content[9:]),
    "a state that is cut": ("rng-0.pt", lambda content: content[:40]),
    "weights of another shape": (
        "student.safetensors",
        lambda content: save({name: tensor[:1] for name, tensor in load(content).items()}),
    ),
    "the record of another step": ("run.json", lambda content: content.replace(b'"step": 2', b'"step": 1')),
}


def test_a_checkpoint_whose_hashes_hold_and_whose_files_do_not_is_never_taken_up(settings, tmp_path, caplog):
    """A disk that fails is seen by the hashes; this is a save that went wrong, or somebody's hand."""
    run = train(settings("run", train={"steps": 2, "save_every": 1})).out
    for what, (name, spoil) in SPOILED.items():
        out = tmp_path / what
        newest = shutil.copytree(run, out) / "checkpoints/step-2"
        content = spoil((newest / name).read_bytes())
        (newest / name).write_bytes(content)
        manifest = json.loads((newest / "manifest.json").read_text(encoding="utf-8"))
        manifest["files"][name] = {"sha256": sha256(content).hexdigest(), "bytes": len(content)}
        (newest / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        if what != "the record of another step":
            with pytest.raises(
                CheckpointError, match=r"step-2 (cannot be taken up: .* rename this one|holds .* as \[1)"
            ):
                train(settings(what, train={"steps": 3}), resume=True)
    train(settings(what, train={"steps": 3}), resume=True)
    assert "step-2: its run.json is of step 1" in caplog.text
    assert steps_of(out) == [1, 2, 3]


def test_a_folder_in_place_of_a_file_of_the_run_is_named(settings):
    out = train(settings("run", train={"steps": 1})).out
    for name in ("stopped.json", "outside.json"):
        (out / name).unlink(missing_ok=True)
        (out / name).mkdir()
        with pytest.raises((ConfigError, CheckpointError), match=name):
            train(settings("run", train={"steps": 2}), resume=True)
        (out / name).rmdir()


def test_damaged_checkpoints_are_no_reason_to_begin_anew(settings):
    out = train(settings("run", train={"steps": 1})).out
    (out / "checkpoints/step-1/manifest.json").write_text("{")
    for resume in (True, "auto"):
        with pytest.raises(CheckpointError, match="step-1"):
            train(settings("run"), resume=resume)
    assert steps_of(out) == [1]


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"save_minutes": 1e-9}, ["step-1", "step-2", "step-3"]),
        ({"save_minutes": 1e9}, ["step-3"]),
        ({"save_minutes": 0}, ["step-3"]),
        ({"save_minutes": 1e9, "save_every": 2}, ["step-2", "step-3"]),
    ],
)
def test_a_checkpoint_is_due_by_steps_or_by_minutes_whichever_comes_first(settings, options, names):
    out = train(settings("run", train={"steps": 3, "keep_last": 9} | options)).out
    assert saved(out) == names


def signals_itself(monkeypatch, owner, name, *, after):
    """The process gets SIGTERM right before or after a call of this method."""
    real = getattr(owner, name)

    def call(*arguments, **options):
        if not after:
            os.kill(os.getpid(), signal.SIGTERM)
        result = real(*arguments, **options)
        if after:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129), ("SIGUSR1", 75), ("train.max_hours", 75)]
)
def test_whatever_ends_a_run_early_is_told_apart(settings, name, code):
    """Before the third step has its episodes; what was trained until then is saved."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started by nohup

    def play(player, number):
        if number == 2 and name != "train.max_hours":
            os.kill(os.getpid(), getattr(signal, name))
        elif number == 2:
            patch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + 3600))
        return real(player, number)

    real = Player.play_step
    data = settings("run", train={"steps": 5, "max_hours": 1.0 if name == "train.max_hours" else None})
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Player, "play_step", play)
            result = train(data)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.stopped_by, result.exit_code, result.steps) == (name, code, 2)
    assert saved(result.out) == ["step-2"]
    told = json.loads((result.out / "stopped.json").read_text())
    assert told == {
        "by": name,
        "exit_code": code,
        "step": 2,
        "steps": 5,
        "checkpoint": "checkpoints/step-2",
        "resume": f"opd train {result.out} --resume",
    }
    whole = train(settings("whole", train={"steps": 5})).out
    assert train(settings("run", train={"steps": 5}), resume=True).exit_code == 0
    assert not (result.out / "stopped.json").exists()
    last = [Checkpoint(folder / "checkpoints/step-5").tensors("student") for folder in (whole, result.out)]
    assert all(torch.equal(last[0][key], weights) for key, weights in last[1].items())
    assert steps_of(result.out) == [1, 2, 3, 4, 5]


class Slow(LookupEnv):
    """Takes half a minute for a call."""

    def step(self, action):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        return super().step(action)


def test_a_step_is_left_in_the_middle_of_an_environment_s_call(settings):
    since = time.monotonic()
    result = train(settings("run", env={"id": f"{__name__}:Slow", "max_turns": 2, "probe": False}, eval={"tasks": 0}))
    assert (result.stopped_by, result.steps) == ("SIGTERM", 0)
    assert time.monotonic() - since < 25
    told = json.loads((result.out / "stopped.json").read_text())
    assert (told["checkpoint"], told["resume"]) == (None, f"opd train {result.out} --resume auto")


def test_the_signals_of_a_launcher_count_once_and_what_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with stop_signals() as stops:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert stops.reason == "SIGINT"
            stops.since -= 2
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_updates_of_a_step_saves_it_and_evaluates_nothing(settings, monkeypatch):
    data = settings("run", eval={"tasks": 4, "every": 1})
    with monkeypatch.context() as patch:
        signals_itself(patch, Loop, "_update", after=False)
        result = train(data)
    assert (result.interrupted, result.steps, result.after) == (True, 1, None)
    assert saved(result.out) == ["step-1"]
    assert [row["step"] for row in read_rows(result.out / "evals.jsonl")] == [0]
    resumed = train(data, resume=True)
    assert [row["step"] for row in read_rows(result.out / "evals.jsonl")] == [0, 2, 3, 4]
    assert resumed.after.played == 4


def test_a_signal_in_a_save_ends_the_run_with_that_step_unless_it_was_the_last(settings, monkeypatch):
    data = settings("run", train={"steps": 3, "save_every": 1})
    with monkeypatch.context() as patch:
        signals_itself(patch, checkpoint, "save", after=False)
        first, second, third = (train(data, resume="auto") for _ in range(3))
    assert [(run.interrupted, run.steps) for run in (first, second, third)] == [(True, 1), (True, 2), (False, 3)]


def test_a_run_that_is_stopped_before_its_first_step_exports_nothing(settings, monkeypatch):
    with monkeypatch.context() as patch:
        signals_itself(patch, Method, "prepare", after=True)
        result = train(settings("run"))
    assert (result.interrupted, result.steps) == (True, 0)
    assert not (result.out / "export").exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_a_signal_in_an_evaluation_ends_it_with_the_episode_at_hand_and_saves(settings, monkeypatch, steps):
    """Of the last step too: then the weights are evaluated once the run goes on."""
    data = settings("run", train={"steps": steps}, eval={"tasks": 40, "every": 1}, rollout={"concurrency": 4})
    episodes = []

    def evaluate(run, **options):
        if run.loop.player.version == 0:
            return real(run, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        told = options.pop("on_finish")
        return real(run, on_finish=lambda episode: episodes.append(episode) or told(episode), **options)

    real = Run.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(Run, "evaluate", evaluate)
        result = train(data)
    assert (result.interrupted, result.steps, result.after) == (True, 1, None)
    assert len(episodes) == 0
    assert saved(result.out) == ["step-1"]
    whole = train(settings("whole", train={"steps": steps}, eval={"tasks": 40, "every": 1}, rollout={"concurrency": 4}))
    resumed = train(data, resume=True)
    assert resumed.after == whole.after
    assert not resumed.interrupted
    evaluated = (result.out / "evals.jsonl").read_text()
    assert train(data, resume=True).after == whole.after
    assert (result.out / "evals.jsonl").read_text() == evaluated


def test_a_run_without_its_folder_s_lock_writes_no_checkpoint(settings, monkeypatch):
    """Somebody on another machine broke it."""

    def taken(loop, number):
        shutil.copy(out / NAME, out / "aside")
        (out / NAME).unlink()
        (out / "aside").rename(out / NAME)
        return real(loop, number)

    real, data = Loop.step, settings("run")
    out = train(settings("run", train={"steps": 1})).out
    monkeypatch.setattr(Loop, "step", taken)
    with pytest.raises(LockError, match="was taken over by process"):
        train(data, resume=True)
    assert saved(out) == ["step-1"]


def trained(result):
    """The weights of a run's last step, as bytes."""
    return (result.out / f"checkpoints/step-{result.steps}/student.safetensors").read_bytes()


STOPS = {"tasks": 4, "first": 7, "every": 2, "stop_at": 0.6}


@pytest.fixture
def rising(monkeypatch):
    """Runs whose evaluations find as many tasks solved as there were steps; returns the seeds of the tasks played."""
    seen = []

    def evaluate(run, **options):
        _, groups = real(run, **options)
        seen.append([group.task.index for group in groups])
        return Score((True,) * min(4, run.loop.player.version) + (False,) * max(0, 4 - run.loop.player.version)), groups

    real = Run.evaluate
    monkeypatch.setattr(Run, "evaluate", evaluate)
    return seen


def test_a_run_is_over_once_enough_held_out_tasks_are_solved(settings, rising, capfd):
    data = settings("run", train={"steps": 9}, eval=STOPS)
    result = train(data)
    assert (result.steps, result.after.solved, result.interrupted) == (4, 4, False)
    assert saved(result.out) == ["step-4"]
    assert (result.out / "export/config.json").is_file()
    assert rising == [[7, 8, 9, 10]] * 3  # before, after 2 and after 4 steps
    assert capfd.readouterr() == ("", "")  # no bar of transformers, and no warning of DeepSpeed
    assert train(data, resume=True).steps == 4
    assert len(rising) == 3

    further = train(settings("run", train={"steps": 5}, eval={"tasks": 0}), resume=True)
    whole = train(settings("whole", train={"steps": 5}))
    assert further.steps == whole.steps == 5
    assert trained(further) == trained(whole)


def test_a_run_whose_evaluation_was_left_ends_at_the_same_step_when_it_goes_on(settings, rising, monkeypatch):
    whole = train(settings("whole", train={"steps": 9}, eval=STOPS))
    data = settings("run", train={"steps": 9}, eval=STOPS)
    real = Loop._update

    def update(loop, *arguments):
        if loop.player.version == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(loop, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_update", update)
        stopped = train(data)
    assert (stopped.interrupted, stopped.steps, stopped.after) == (True, 4, None)
    resumed = train(data, resume=True)
    assert (resumed.steps, resumed.after.solved) == (4, 4)
    assert trained(resumed) == trained(whole)
    played = len(rising)
    assert train(data, resume=True).after == resumed.after
    assert len(rising) == played
