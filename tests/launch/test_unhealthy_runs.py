"""Runs that go on and cannot learn end with exit code 1 and say why: real environments that break, real nans."""

import json
import math
import re
from contextlib import suppress

import pytest

from opd.checkpoint import Checkpoint
from opd.errors import DataError, HealthError
from opd.launch.checks.loading import config_from, load_config
from opd.launch.cli.main import main
from opd.launch.run.evaluate import evaluate_run
from opd.launch.train import train
from opd.teachers.teacher import Teacher
from opd.tracking import read_rows

pytestmark = pytest.mark.slow

FICKLE = """
from pathlib import Path

from opd.envs.worlds.lookup import LookupEnv

class Fickle(LookupEnv):
    \"\"\"Breaks while the file `broken` exists; the file `good` says how many episodes go well before.\"\"\"

    def __init__(self, folder, only_if=True):
        super().__init__()
        self.folder, self.only_if = Path(folder), only_if

    def reset(self, *, seed=None, options=None):
        good = self.folder / "good"
        left = int(good.read_text()) if good.exists() else 0
        if left:
            good.write_text(str(left - 1))
        elif self.only_if and (self.folder / "broken").exists():
            raise ValueError("the shop's database is gone")
        return super().reset(seed=seed, options=options)
"""


@pytest.fixture
def fickle(settings, tmp_path, monkeypatch):
    """`fickle(name, **sections)`: a run in an environment that is broken from the start."""
    (tmp_path / "fickle_env.py").write_text(FICKLE)
    (tmp_path / "broken").touch()
    monkeypatch.syspath_prepend(tmp_path)
    env = {"id": "fickle_env:Fickle", "kwargs": {"folder": str(tmp_path)}, "probe": False}
    return lambda name="run", **sections: settings(name, **{"env": env, "rollout": {"workers": 1}} | sections)


def steps_of(out):
    return [row["step"] for row in read_rows(out / "metrics.jsonl")]


def test_an_environment_that_always_breaks_ends_the_run_with_exit_code_1_and_its_exception(fickle, tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(fickle(train={"steps": 50})))
    assert main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert "not one episode of the last 3 rounds can be used" in error
    assert "train/0 at reset: ValueError: the shop's database is gone" in error
    assert steps_of(tmp_path / "run") == [1, 2]


def test_what_was_learned_before_the_environment_broke_is_saved_and_gone_on_with(fickle, tmp_path):
    data = fickle(train={"steps": 5, "tasks_per_step": 3, "give_up_after": 1})
    (tmp_path / "good").write_text("6")  # two steps
    with pytest.raises(HealthError, match=r"Step 2 is saved: opd train .*run --resume"):
        train(data)
    (tmp_path / "broken").unlink()
    whole = train(fickle("whole", train={"steps": 5, "tasks_per_step": 3, "give_up_after": 1}))
    resumed = train(data, resume=True)
    assert steps_of(resumed.out) == [1, 2, 3, 4, 5]
    last = [Checkpoint(run.out / "checkpoints/step-5").tensors("student") for run in (whole, resumed)]
    assert all((last[0][name] == weights).all() for name, weights in last[1].items())


def test_a_run_that_is_told_to_wait_for_ever_does(fickle):
    assert train(fickle(train={"steps": 5, "give_up_after": 0})).steps == 5


def test_an_episode_that_is_merely_wrong_or_teaches_nothing_ends_no_run(settings):
    grpo = {"method": "grpo", "rollout": {"group_size": 2, "temperature": 1e-6}, "train": {"steps": 5}}
    data = settings("run", **grpo)
    del data["opsd"]
    out = train(data).out
    assert all(row["signal/zero"] == 1 for row in read_rows(out / "metrics.jsonl"))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_that_never_had_a_usable_episode_is_never_green_however_often_it_goes_on(fickle, tmp_path, steps):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(fickle(train={"steps": steps})))
    assert [main(["train", str(path), "--resume", "auto"]) for _ in range(4)] == [1] * 4
    assert not (tmp_path / "run/export").exists()


def test_an_evaluation_that_measured_nothing_ends_with_exit_code_1(fickle, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(fickle(eval={"tasks": 3})))
    assert main(["eval", str(path)]) == 1


COLLECTING = [
    ("sft", {"source": "own", "keep": "all", "tasks": 12}),
    ("sd_zero", {"questions": 12, "revisions": 1, "generation": 0}),
]


@pytest.mark.parametrize(("method", "own"), COLLECTING, ids=["sft", "sd_zero"])
def test_rounds_that_a_stage_collects_count_too_and_are_played_again_once_it_is_mended(fickle, tmp_path, method, own):
    sections = {"method": method, method: own, "train": {"steps": 1, "tasks_per_step": 2, "give_up_after": 2}}
    data = fickle(**sections, rollout={"workers": 1, "concurrency": 3})
    del data["opsd"]
    with pytest.raises(HealthError, match=r"last 2 rounds.*database is gone"):
        train(data)
    [path] = (tmp_path / "run/data").iterdir()
    assert len(path.read_text().splitlines()) == 1 + 3  # the second round ended the run
    (tmp_path / "broken").unlink()
    with suppress(DataError):  # such a model has no attempt right that SD-Zero could learn from
        train(data, resume=True)
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert [row["failed"] for row in rows] == [None] * 12


@pytest.mark.parametrize(("method", "own"), COLLECTING, ids=["sft", "sd_zero"])
def test_a_collection_of_few_rounds_that_all_broke_says_so_too(fickle, tmp_path, method, own):
    data = fickle(**{"method": method, method: own, "train": {"steps": 1, "tasks_per_step": 2}})
    del data["opsd"]
    with pytest.raises(HealthError, match=r"not one of the 12 episodes that were collected.*database is gone"):
        train(data)
    (tmp_path / "broken").unlink()
    with suppress(DataError):
        train(data, resume="auto")
    [path] = (tmp_path / "run/data").glob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()][1:]
    assert [row["failed"] for row in rows] == [None] * 12


@pytest.fixture
def said(tmp_path):
    path = tmp_path / "said.jsonl"
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "red"}]
    path.write_text((json.dumps({"messages": messages}) + "\n") * 8)
    return path


def test_updates_that_are_not_finite_end_the_run_and_the_last_good_checkpoint_stays(settings, said, tmp_path, capsys):
    """The first update, by an absurd rate, is finite; what it leaves behind gives nothing but nans."""
    sft = {"method": "sft", "sft": {"source": "file", "file": str(said)}}
    train_ = {"steps": 30, "tasks_per_step": 2, "lr": 1e30, "save_every": 1, "keep_last": 1}
    data = settings("run", **sft, train=train_)
    del data["opsd"]
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(data))
    assert main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"the last 3 updates are not finite \(loss .*, gradient norm nan\)", error)
    assert "step-1 is the last checkpoint whose updates were finite" in error
    rows = read_rows(tmp_path / "run/metrics.jsonl")
    assert [row["train/skipped"] for row in rows] == [0, 1, 1, 1]
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-1", "step-3"]


def test_a_model_that_gives_no_numbers_any_more_ends_the_run_by_name(settings, tmp_path, capsys, monkeypatch):
    """Before, the sampler's index was out of bounds. The update that did it was finite itself."""
    follow = Teacher.update

    def breaks(self):
        follow(self)
        if self.updates == 2:
            next(self.student.parameters()).data[0] = math.nan

    monkeypatch.setattr(Teacher, "update", breaks)
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings("run", train={"steps": 4, "save_every": 1})))
    assert main(["train", str(path)]) == 1
    error = capsys.readouterr().err
    assert re.search(r"that samples gives no finite log-probs after step 2: \S+ holds nan .* train\.lr", error)
    assert re.search(r"\S+/run/checkpoints/step-1 is the last checkpoint whose updates were finite", error)


def test_a_run_whose_updates_are_never_finite_is_not_green_however_short_it_is_or_often_it_goes_on(
    settings, said, tmp_path
):
    sft = {"method": "sft", "sft": {"source": "file", "file": str(said)}}
    data = settings("run", **sft, train={"steps": 6, "tasks_per_step": 2, "lr": 1e30, "save_every": 1})
    del data["opsd"]
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(data))
    assert [main(["train", str(path), "--resume", "auto"]) for _ in range(4)] == [1] * 4
    assert not (tmp_path / "run/export").exists()


def test_an_evaluation_whose_environment_breaks_is_not_measured(fickle, capsys):
    tracking = {"wandb": "disabled", "console": True, "plot": True}
    broken = fickle(train={"steps": 1, "give_up_after": 0}, eval={"tasks": 4}, tracking=tracking)
    result = train(broken)
    assert (result.before.played, result.before.broken) == (0, 4)
    shown = capsys.readouterr().out
    assert "not measured: the environment broke in all of 4 episodes" in " ".join(shown.split())
    assert [row["eval/success"] for row in read_rows(result.out / "evals.jsonl")] == [None, None]
    assert [row["eval/broken"] for row in read_rows(result.out / "evals.jsonl")] == [4, 4]
    evaluate_run(load_config(result.out), run=result.out)
    shown = " ".join(capsys.readouterr().out.split())
    assert "not measured" in shown
    assert "0.0%" not in shown


def test_a_score_is_of_the_episodes_that_were_measured(fickle, tmp_path, capsys):
    (tmp_path / "good").write_text("3")
    config = config_from(fickle(eval={"tasks": 4}, tracking={"console": False}))
    score = evaluate_run(config)
    assert (score.played, score.broken, len(score.outcomes)) == (3, 1, 4)
    assert score.outcomes[3] is None
    assert score.rate == score.solved / 3
    assert "1, not measured" in " ".join(capsys.readouterr().out.split())
