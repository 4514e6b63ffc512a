"""A method of several stages: one run, one file of metrics, each stage from the weights of the one before it."""

import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from opd.backends.config import StageConfig, TrainConfig
from opd.checkpoint import Checkpoint
from opd.config import Strict
from opd.errors import CheckpointError
from opd.launch.checks.loading import config_from
from opd.launch.plan.plan import plan
from opd.launch.run import training
from opd.launch.run.build import Run
from opd.launch.train import train
from opd.losses import CrossEntropy, Distill, Divergence, Losses
from opd.ranks.ranks import Ranks
from opd.teachers.config import TeacherConfig
from opd.tracking import read_rows
from opd.trainers.loop import registry
from opd.trainers.loop.loop import Loop
from opd.trainers.loop.method import Method
from opd.trainers.loop.play import draw
from opd.trainers.loop.registry import MethodSpec
from opd.trainers.loop.stage import Prepared, Stage
from opd.types import to_sample


class TwoStagesConfig(Strict):
    """Settings of the method that the tests register."""

    first: StageConfig = StageConfig()


class Imitate(Method):
    """Plays a few episodes before it trains on them, from the file that it wrote."""

    def prepare(self, player, folder):
        groups = player.play([player.task(n) for n in range(5)], seed=3)
        folder.mkdir(exist_ok=True)
        (folder / "played.txt").write_text(player.standing.settings)
        trajectories = [t for group in groups for t in group.usable]
        dataset = [to_sample(t, s, ce=1.0, route="ce") for t in trajectories for s in t.segments()]
        return Prepared({"tokens/collected": float(sum(t.completion_tokens for t in trajectories))}, dataset)


class Follow(Method):
    """Distils the model as it was when this stage began, on tasks of its own."""

    def annotate(self, group):
        samples = []
        for trajectory in group.usable:
            for segment in trajectory.segments():
                view = self.chat.view(trajectory, segment, lambda _, messages: messages)
                samples.append(to_sample(trajectory, segment, view=view, distill=1.0, route="distill"))
        return samples


class TwoStages(Method):
    """Imitates itself, then follows."""

    @classmethod
    def stages(cls, config):
        return (
            Stage(make=partial(Imitate, config), over=config.first, losses=Losses(ce=CrossEntropy())),
            Stage(
                make=partial(Follow, config),
                first_task=5,
                losses=Losses(distill=Distill(divergence=Divergence("reverse_kl"))),
                teacher=TeacherConfig(weights="frozen", rate=None),
            ),
        )


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(registry._registry, "two", MethodSpec("two", TwoStagesConfig, TwoStages, "for tests"))


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return tiny_model()


@pytest.fixture
def settings(tiny, tmp_path):
    def make(name, **sections):
        data = {
            "method": "two",
            "out": str(tmp_path / name),
            "model": str(tiny),
            "env": "opd/Lookup-v0",
            "rollout": {"max_tokens": 12, "max_length": 256},
            "train": {"steps": 2, "tasks_per_step": 3, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
        }
        for section, values in sections.items():
            own = data.get(section)
            data[section] = own | values if isinstance(own, dict) and isinstance(values, dict) else values
        return data

    return make


def test_all_stages_write_one_file_of_metrics_and_steps_are_counted_for_each(settings):
    out = train(settings("run", eval={"tasks": 2})).out
    rows = read_rows(out / "metrics.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [(1, 1), (2, 1), (3, 2), (4, 2)]
    assert all("train/loss" in row for row in rows)
    assert ["tokens/collected" in row for row in rows] == [True, False, False, False]
    assert [row["tokens/sampled"] > 0 for row in rows] == [False, False, True, True]
    assert [row["step"] for row in read_rows(out / "evals.jsonl")] == [0, 2, 4]


def test_a_stage_starts_from_the_weights_that_the_one_before_it_ended_with(settings):
    out = train(settings("run")).out
    first, last = Checkpoint(out / "checkpoints/step-2"), Checkpoint(out / "checkpoints/step-4")
    trained = {name.removeprefix("model."): weight for name, weight in first.tensors("student").items()}
    assert all(torch.equal(trained[k], w) for k, w in load_file(out / "export-stage-1/model.safetensors").items())
    teacher = last.tensors("teacher")  # frozen: what the second stage began with
    assert teacher
    assert all(torch.equal(first.tensors("student")[name], weight) for name, weight in teacher.items())
    # A teacher that sees nothing more than the student has nothing to say at first.
    assert read_rows(out / "metrics.jsonl")[2]["train/loss"] == pytest.approx(0, abs=1e-6)


def test_a_stage_plays_its_own_tasks(settings):
    out = train(settings("run", train={"steps": 1})).out
    assert [row["task"] for row in read_rows(out / "rollouts.jsonl")] == ["train/5", "train/6", "train/7"]


def test_a_stage_may_be_shorter_and_never_longer_than_the_runs_steps(settings):
    first = {"first": {"steps": 1, "lr": 5e-4, "tasks_per_step": 2}}
    rows = read_rows(train(settings("short", two=first)).out / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [1, 2, 2]
    assert [row["train/lr"] for row in rows] == [5e-4, 1e-3, 1e-3]
    assert StageConfig(steps=50).over(TrainConfig(steps=3)).steps == 3


@pytest.mark.parametrize("kept", ["before the second stage", "within it", "before the first export"])
def test_a_run_goes_on_from_any_point_as_if_it_had_not_been_cut(settings, kept):
    whole = train(settings("whole", train={"save_every": 1, "keep_last": 9})).out
    cut = whole.with_name("cut")
    shutil.copytree(whole, cut)
    for step in {"before the second stage": (3, 4), "within it": (4,), "before the first export": (3, 4)}[kept]:
        shutil.rmtree(cut / f"checkpoints/step-{step}")
    if kept == "before the first export":
        shutil.rmtree(cut / "export-stage-1")
    resumed = train(settings("cut", train={"save_every": 1, "keep_last": 9}), resume=True)
    assert resumed.steps == 4
    a, b = (Checkpoint(out / "checkpoints/step-4").tensors("student") for out in (whole, cut))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    timeless = [
        [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_rows(out / "metrics.jsonl")]
        for out in (whole, cut)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("deleted", "damaged", "named"),
    [
        ((), (4, 3, 2), "step-1"),  # back over the end of the first stage, whose export is there
        pytest.param((4,), (3,), "step-2", marks=pytest.mark.long),  # the first of the second stage
        pytest.param((3, 4), (2,), "step-1", marks=pytest.mark.long),  # the last of the first stage
        pytest.param((), (4, 3), "step-2", marks=pytest.mark.long),
    ],
)
def test_a_run_falls_back_over_the_end_of_a_stage_as_if_nothing_had_been_damaged(
    settings, caplog, deleted, damaged, named
):
    often = {"save_every": 1, "keep_last": 9}
    out = train(settings("run", train=often)).out
    whole = out.with_name("whole")
    shutil.copytree(out, whole)
    for step in deleted:
        shutil.rmtree(out / f"checkpoints/step-{step}")
    for step in damaged:
        (out / f"checkpoints/step-{step}/student.safetensors").write_bytes(b"")
    if deleted == (3, 4):  # what it left when it was killed while it put a newer checkpoint aside before
        (out / "checkpoints/step-2.damaged").mkdir()
        (out / "checkpoints/step-2.damaged/old").touch()
    assert train(settings("run", train=often), resume=True).steps == 4
    assert f"Going on from the older {named}" in caplog.text
    kept = load_file(out / "export-stage-1/model.safetensors")
    ended = Checkpoint(out / "checkpoints/step-2").tensors("student")
    assert all(torch.equal(kept[name.removeprefix("model.")], weight) for name, weight in ended.items())
    if named == "step-2":  # `Imitate` plays its data again, so that another attempt at its stage learns from others
        ours, theirs = (load_file(folder / "export/model.safetensors") for folder in (out, whole))
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert [row["step"] for row in read_rows(out / "metrics.jsonl")] == [1, 2, 3, 4]
    left = {path.name for path in (out / "checkpoints").iterdir()}
    assert {f"step-{step}" for step in (1, 2, 3, 4)} <= left
    assert {f"step-{step}.damaged" for step in damaged} <= left
    assert not [name for name in left if name.startswith(".")]


def test_a_signal_in_the_export_of_a_stage_ends_the_run_before_the_next_one_is_loaded(settings, monkeypatch):
    def export(run, folder):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(run, folder)

    def build(config, ranks, *, stage, model):
        built.append(stage)
        return make(config, ranks, stage=stage, model=model)

    real, make, built = Run.export, training.build, []
    monkeypatch.setattr(training, "build", build)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "export", export)
        result = train(settings("run"))
    assert (result.stopped_by, result.steps, built) == ("SIGTERM", 2, [0])
    assert train(settings("run"), resume=True).steps == 4
    assert built == [0, 1]


def test_a_run_that_was_stopped_before_its_first_checkpoint_begins_anew(settings):
    whole = train(settings("whole", eval={"tasks": 2})).out
    shutil.rmtree(whole / "checkpoints")
    shutil.rmtree(whole / "export-stage-1")
    before = read_rows(whole / "metrics.jsonl")
    assert train(settings("whole", eval={"tasks": 2}), resume="auto").steps == 4
    assert [row["train/loss"] for row in read_rows(whole / "metrics.jsonl")] == [row["train/loss"] for row in before]


def test_a_run_that_begins_anew_takes_nothing_of_what_an_earlier_one_exported(settings):
    out = train(settings("run")).out
    shutil.rmtree(out / "checkpoints")
    other = {"train": {"lr": 5e-3}}
    train(settings("run", **other), resume="auto")
    clean = train(settings("clean", **other)).out
    for file in ("export-stage-1/model.safetensors", "export/model.safetensors"):
        ours, theirs = load_file(out / file), load_file(clean / file)
        assert all(torch.equal(ours[name], weights) for name, weights in theirs.items()), file


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to nothing yet"])
def test_the_linked_export_of_a_stage_is_written_through_its_link(settings, tmp_path, there):
    disk, out = tmp_path / "disk", tmp_path / "run"
    train(settings("run", train={"steps": 1}))
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "export-stage-1")
    if there:
        disk.mkdir()
        (disk / "stale").touch()
    (out / "export-stage-1").symlink_to(disk)
    train(settings("run", train={"steps": 1}), resume="auto")
    assert (out / "export-stage-1").is_symlink()
    assert (disk / "model.safetensors").is_file()
    assert not (disk / "stale").exists()


def test_a_run_in_a_linked_folder_with_links_in_it_is_deleted_and_begins_anew(settings, tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "run"
    (disk / "elsewhere").mkdir(parents=True)
    (disk / "real").mkdir()
    out.symlink_to(disk / "real")
    train(settings("run", train={"steps": 1}))
    shutil.move(out / "export", disk / "elsewhere" / "export")
    (out / "export").symlink_to(disk / "elsewhere" / "export")
    (out / "to nothing").symlink_to(disk / "gone")
    train(settings("run", train={"steps": 1}), overwrite=True)
    assert out.is_symlink()
    assert (out / "export" / "model.safetensors").is_file()
    assert not (out / "export").is_symlink()
    assert not (out / "to nothing").is_symlink()
    assert (disk / "elsewhere" / "export" / "model.safetensors").is_file()  # what a link leads to is not the run's


def test_a_stage_whose_last_checkpoint_is_damaged_is_exported_as_it_ends_this_time(settings):
    often = {"train": {"save_every": 1, "keep_last": 9}}
    out = train(settings("run", **often)).out
    for step in (3, 4):
        shutil.rmtree(out / f"checkpoints/step-{step}")
    (out / "checkpoints/step-2/manifest.json").write_text("{")
    (out / "export-stage-1/model.safetensors").write_text("of the first time")
    assert train(settings("run", **often), resume=True).steps == 4
    first = Checkpoint(out / "checkpoints/step-2").tensors("student")
    exported = load_file(out / "export-stage-1/model.safetensors")
    assert all(torch.equal(first[f"model.{name}"], weights) for name, weights in exported.items())


def test_the_length_of_a_run_of_several_stages_is_fixed(settings):
    train(settings("run"))
    with pytest.raises(CheckpointError, match=r"train\.steps"):
        train(settings("run", train={"steps": 3}), resume=True)


def test_a_pass_over_stored_samples_takes_each_once_and_the_next_in_another_order():
    dataset = list(range(10))
    drawn = [sample for step in range(5) for sample in draw(dataset, step, 4, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == dataset
    assert drawn[:10] != drawn[10:]
    assert draw(dataset, 1, 4, seed=1) != drawn[4:8]


def test_a_step_on_stored_samples_takes_as_many_as_the_settings_say_in_the_order_of_the_runs_seed():
    dataset = [SimpleNamespace(task=n) for n in range(10)]
    for rank in range(2):
        player = SimpleNamespace(ranks=Ranks(rank=rank, world_size=2), train=TrainConfig(tasks_per_step=4), seed=7)
        for step in range(3):
            own, order = Loop(method=None, player=player, dataset=dataset)._samples(step, [])
            expected = draw(dataset, step, 4, seed=7)
            assert order == list(dict.fromkeys(sample.task for sample in expected))
            assert own == expected[rank::2]


def test_the_plan_counts_the_updates_and_evaluations_of_every_stage(settings, tmp_path):
    config = config_from(settings("run", eval={"tasks": 5, "every": 3}, two={"first": {"steps": 1}}))
    made = plan(config, tmp_path, gpu=False)
    assert dict(made.rows())["updates"] == "3 in 2 stages (1 + 2)"
    assert made.evaluations == 3  # before, after step 1, after step 3
    assert made.teacher.weights == "frozen"
