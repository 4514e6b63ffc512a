"""Lightning OPD, end to end: one model at a time, each position scored once, no teacher while it trains.

Killed processes and the command line are in the slow tests at the end.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from opd.checkpoint import Checkpoint
from opd.errors import CheckpointError, ConfigError, DataError
from opd.launch.checks.loading import config_from
from opd.launch.cli.main import main
from opd.launch.plan.stored import inspect, problems
from opd.launch.run import models as launch_models
from opd.launch.run import teachers as launch_teachers
from opd.launch.run.build import build
from opd.launch.train import train
from opd.losses import Divergence
from opd.maths.divergence import stored_divergence, token_divergence
from opd.maths.formulas import kinds
from opd.models.config import ModelConfig
from opd.models.identity import weights_fingerprint
from opd.models.loading import load
from opd.objective.collate import collate, normalise
from opd.objective.objective import objective
from opd.teachers.store import open_store
from opd.tracking import read_rows
from opd.trainers.lightning_opd.offline import episodes, tokens_of, with_scores
from opd.trainers.loop.loop import Loop
from opd.trainers.loop.play import Player
from opd.trainers.parts.episodes import EpisodeLog, read_episode


@pytest.fixture(scope="module")
def models(tiny_model):
    """A student, and two teachers of the same tokenizer."""
    return [tiny_model(seed=seed) for seed in (0, 1, 2)]


@pytest.fixture(scope="module")
def settings(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")

    def make(name, **sections):
        data = {
            "method": "lightning_opd",
            "out": str(folder / name),
            "model": str(models[0]),
            "env": {"id": "opd/Lookup-v0", "max_turns": 3},
            "rollout": {"max_tokens": 8, "max_length": 256, "concurrency": 3},
            "train": {"steps": 2, "tasks_per_step": 3, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            "lightning_opd": {
                "teacher": {"weights": "external", "model": str(models[1])},
                "sft_tasks": 4,
                "tasks": 6,
                "shard_tokens": 1,
            },
        }
        for section, values in sections.items():
            own = data.get(section)
            data[section] = own | values if isinstance(own, dict) and isinstance(values, dict) else values
        return data

    return make


@pytest.fixture(scope="module")
def whole(settings):
    """A run through all five stages."""
    return train(settings("whole", train={"save_every": 1, "keep_last": 9}, eval={"tasks": 2})).out


def timeless(out):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_rows(out / "metrics.jsonl")]


def chat_of(settings):
    run = build(config_from(settings("chat")), stage=None)
    run.close()
    return run.method.chat


def test_five_stages_write_one_file_of_metrics_and_the_models_before_and_after_are_evaluated(whole):
    rows = read_rows(whole / "metrics.jsonl")
    assert [(row["step"], row["stage"]) for row in rows] == [(1, 2), (2, 2), (3, 5), (4, 5)]
    assert [row["tokens/sampled"] for row in rows] == [0, 0, 0, 0]
    assert rows[0]["collect/episodes"] == 4
    assert rows[2]["collect/episodes"] == 6
    assert [row["step"] for row in read_rows(whole / "evals.jsonl")] == [0, 2, 4]
    first, last = rows[2], open_store(whole / "data/store")
    assert (first["store/hit_rate"], first["store/mismatch"]) == (1, 0)
    assert first["store/positions"] == first["store/scored"] == last.positions
    assert first["store/bytes"] == last.bytes


def test_the_student_that_plays_is_the_one_after_the_sft_and_the_last_stage_starts_from_it(whole, models):
    header, _ = EpisodeLog(whole / "data/episodes-own.jsonl", read_episode).read()
    store = open_store(whole / "data/store")
    student, teacher = (
        weights_fingerprint(load(ModelConfig(name=str(name))).model) for name in (whole / "export-stage-2", models[1])
    )
    assert header.model == store.about["student"] == student
    assert store.scorer.teacher == store.about["sft_teacher"] == teacher


def test_each_stored_score_is_what_the_teacher_says_of_that_token_in_its_own_conversation(whole, models, settings):
    _, samples = episodes(whole / "data/episodes-own.jsonl", chat_of(settings))
    store = open_store(whole / "data/store")
    teacher = load(ModelConfig(name=str(models[1]), dtype="float64")).model
    assert any(max(sample.turn) > 0 for sample in samples)
    for sample in samples:
        found = store.get(tokens_of(sample))
        with torch.no_grad():
            logprobs = [
                teacher.model(input_ids=torch.tensor([sample.token_ids[: row + 1]])).logits[0, -1].log_softmax(-1)
                for row in sample.rows
            ]
        for likely, unsure, logs, token in zip(
            found.logprobs, found.entropy, logprobs, sample.completion_ids, strict=True
        ):
            assert likely == pytest.approx(logs[token].item(), abs=1e-4)
            assert unsure == pytest.approx(-(logs.exp() * logs).sum().item(), abs=1e-4)


def test_the_last_stage_is_the_policy_gradient_of_the_stored_log_ratio(whole, settings, models):
    chat = chat_of(settings)
    _, plain = episodes(whole / "data/episodes-own.jsonl", chat)
    samples = with_scores(plain, open_store(whole / "data/store"))
    losses = config_from(settings("x")).stages[-1].losses
    student = load(ModelConfig(name=str(models[0]))).model
    batch = collate(normalise(samples, losses, lambda sums: sums), chat.end_id)
    objective(student, batch, losses, None).loss.backward()
    found = student.model.model.norm.weight.grad.clone()
    student.zero_grad()
    total = 0.0
    for sample in samples:
        logits = student.model(input_ids=torch.tensor([sample.token_ids])).logits[0]
        own = logits.log_softmax(-1)[sample.rows].gather(-1, torch.tensor(sample.completion_ids)[:, None])[:, 0]
        theirs = torch.tensor([v for v, m in zip(sample.teacher_logprobs, sample.completion_mask, strict=True) if m])
        total = total - ((theirs - own.detach()).clamp(-10, 10) * own).sum()
    (total / sum(len(sample.completion_ids) for sample in samples)).backward()
    torch.testing.assert_close(found, student.model.model.norm.weight.grad, rtol=1e-4, atol=1e-6)


def test_while_it_trains_no_teacher_is_loaded_or_asked_and_none_is_in_memory(whole, settings, models, monkeypatch):
    loaded, held = [], []
    load_model, step = launch_models.load, Loop.step

    def noted(config, **options):
        loaded.append(config.name)
        return load_model(config, **options)

    def counted(loop, number):
        teacher = loop.models.teacher
        held.append(teacher.own.by_name or teacher.other)
        teacher.teach = lambda batch: pytest.fail("the teacher was asked")
        return step(loop, number)

    monkeypatch.setattr(launch_models, "load", noted)
    monkeypatch.setattr(launch_teachers, "load_teacher", lambda *_: pytest.fail("a teacher was loaded"))
    monkeypatch.setattr(Loop, "step", counted)
    again = settings("again", lightning_opd={"data": str(whole / "data")}) | {"model": str(whole / "export-stage-2")}
    second = train(again).out
    assert loaded == [str(whole / "export-stage-2")]
    assert held == [None, None]
    losses = [[row["train/loss"] for row in read_rows(out / "metrics.jsonl")][-2:] for out in (whole, second)]
    assert losses[0] == losses[1]
    a = Checkpoint(whole / "checkpoints/step-4").tensors("student")
    b = Checkpoint(second / "checkpoints/step-2").tensors("student")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("stage", ["teacher plays", "student plays", "scoring", "training"])
def test_every_stage_goes_on_where_it_was_stopped(whole, settings, stage):
    cut = whole.with_name(f"cut-{stage.split()[0]}")
    shutil.copytree(whole, cut)
    later = {
        "teacher plays": ["data/stage-1.json", "data/stage-3.json", "data/stage-4.json", "export-stage-2"],
        "student plays": ["data/stage-3.json", "data/stage-4.json"],
        "scoring": ["data/stage-4.json"],
        "training": [],
    }[stage]
    for name in later:
        path = cut / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kept = {"teacher plays": 0, "training": 3}.get(stage, 2)
    for step in range(kept + 1, 5):
        shutil.rmtree(cut / f"checkpoints/step-{step}")
    if stage == "scoring":
        sorted((cut / "data/store").glob("shard-*"))[-1].unlink()
    if stage.endswith("plays"):
        shutil.rmtree(cut / "data/store")
        name = "episodes-teacher" if stage.startswith("teacher") else "episodes-own"
        file = cut / f"data/{name}.jsonl"
        file.write_bytes(file.read_bytes()[:-30])
    if stage == "teacher plays":
        (cut / "data/episodes-own.jsonl").unlink()
    data = settings(cut.name, train={"save_every": 1, "keep_last": 9}, eval={"tasks": 2})
    train(data, resume="auto")
    for name in ("episodes-teacher.jsonl", "episodes-own.jsonl"):
        assert (cut / "data" / name).read_bytes() == (whole / "data" / name).read_bytes()
    assert problems(cut) == []
    ours, theirs = timeless(cut), timeless(whole)
    changed = {"store/scored"} if stage == "scoring" else set()
    for mine, other in zip(ours, theirs, strict=True):
        assert {k for k in mine if mine[k] != pytest.approx(other[k], rel=1e-4, nan_ok=True)} <= changed


@pytest.mark.parametrize("gone", ["store/shard-000000-*", "store", "episodes-own.jsonl"])
def test_data_that_was_deleted_since_is_made_anew_and_the_run_ends_in_the_same_weights(whole, settings, gone):
    cut = whole.with_name(f"gone-{gone.split('-')[0].replace('/', '-')}")
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints/step-4")
    [path] = (cut / "data").glob(gone)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(settings(cut.name, train={"save_every": 1, "keep_last": 9}, eval={"tasks": 2}), resume=True)
    own = "data/episodes-own.jsonl"
    assert (cut / own).read_bytes() == (whole / own).read_bytes()
    assert problems(cut) == []
    assert len(open_store(cut / "data/store")) == len(open_store(whole / "data/store"))
    a, b = (Checkpoint(folder / "checkpoints/step-4").tensors("student") for folder in (cut, whole))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"lightning_opd": {"tasks": 7}}, "lightning_opd.tasks"),
        ({"lightning_opd": {"teacher": {"weights": "external", "model": "OTHER"}}}, "lightning_opd.teacher.model"),
        ({"rollout": {"temperature": 0.5}}, "rollout.temperature"),
    ],
)
def test_settings_that_changed_since_the_data_was_made_are_refused_by_name(whole, settings, models, changed, named):
    if "teacher" in changed.get("lightning_opd", {}):
        changed = {"lightning_opd": {"teacher": {"weights": "external", "model": str(models[2])}}}
    cut = whole.with_name(f"changed-{named}")
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints")  # as `opd precompute` leaves it, where no stage before had steps
    written = (cut / "config.yaml").read_text()
    with pytest.raises(CheckpointError, match=rf"stage-1.json was saved under other settings: {named}\."):
        train(settings(cut.name, **changed), resume="auto")
    assert (cut / "config.yaml").read_text() == written


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"form": "exact", "divergence": {"top_k": 100_000}},
            r"lightning_opd.divergence.top_k = 100000 is more than the \d+ entries",
        ),
        ({"data": "/nonexistent/data"}, r'lightning_opd.data = "/nonexistent/data": there is no such folder'),
        (
            {"sft_teacher": "/nonexistent", "mismatch": "allow"},
            r'lightning_opd.sft_teacher = "/nonexistent" ',
        ),
    ],
)
def test_what_a_later_stage_could_not_do_is_said_before_the_first(settings, own, message, monkeypatch):
    monkeypatch.setattr(Player, "play", lambda *_, **__: pytest.fail("a stage began"))
    with pytest.raises(ConfigError, match=message):
        train(settings("never", lightning_opd=own))
    assert not (Path(settings("never")["out"]) / "data").exists()


def test_a_run_on_anothers_data_has_nothing_to_prepare(whole, settings, tmp_path, capsys):
    data = settings("others", lightning_opd={"data": str(whole / "data")})
    (tmp_path / "run.json").write_text(json.dumps(data))
    shutil.move(tmp_path / "run.json", tmp_path / "run.yaml")  # JSON is YAML
    assert main(["precompute", str(tmp_path / "run.yaml")]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "prepares nothing ahead of training, with data: it trains on what an earlier run prepared" in said


def test_another_teacher_than_the_sfts_is_refused_unless_it_is_allowed_and_then_the_rows_say_so(
    settings, models, caplog
):
    other = {"sft_teacher": str(models[2])}
    with pytest.raises(ConfigError, match="is not the one that scores"):
        config_from(settings("x", lightning_opd=other))
    out = train(settings("mismatch", lightning_opd=other | {"mismatch": "allow"})).out
    assert read_rows(out / "metrics.jsonl")[2]["store/mismatch"] == 1
    assert "teacher consistency" in caplog.text
    assert dict(inspect(out))["teacher of the SFT"].startswith("another one")
    # The name is the same, the weights behind it are not: found where it is to score.
    data = settings("moved", lightning_opd={"teacher": {"weights": "external", "model": str(out.with_name("T"))}})
    shutil.copytree(models[1], out.with_name("T"))
    train(data, only_prepare=True)
    moved = out.with_name("moved")
    shutil.rmtree(moved / "data/store")
    (moved / "data/stage-4.json").unlink()
    shutil.rmtree(out.with_name("T"))
    shutil.copytree(models[2], out.with_name("T"))
    with pytest.raises(DataError, match=r"another model .* played the episodes of the SFT.*mismatch: allow"):
        train(data, resume=True)
    data["lightning_opd"] |= {"mismatch": "allow"}
    out = train(data, resume=True).out
    assert dict(inspect(out))["teacher of the SFT"].startswith("another one")


def test_a_store_that_was_made_under_other_settings_is_refused_by_what_differs(whole, settings, models, tmp_path):
    base = {"model": str(whole / "export-stage-2")}
    own = {"data": str(whole / "data")}
    hot = settings("hot", rollout={"temperature": 0.5}, lightning_opd=own) | base
    with pytest.raises(DataError, match=r"another temperature \(1.0 there, 0.5 here\)"):
        train(hot)
    with pytest.raises(DataError, match=r"another top_k \(0 there, 3 here\)"):
        train(settings("top", lightning_opd=own | {"form": "exact", "divergence": {"top_k": 3}}) | base)
    shutil.copytree(whole / "export-stage-2", tmp_path / "other")
    template = tmp_path / "other/chat_template.jinja"
    template.write_text(template.read_text() + "{#- another -#}")
    with pytest.raises(DataError, match="was not played with this run's template"):
        train(settings("template", lightning_opd=own) | {"model": str(tmp_path / "other")})
    with pytest.raises(DataError, match="were played by another model"):
        train(settings("other", lightning_opd=own) | {"model": str(models[0])})


def test_episodes_that_say_the_same_are_scored_once_and_trained_as_often_as_they_were_played(whole, settings):
    _, samples = episodes(whole / "data/episodes-own.jsonl", chat_of(settings))
    store = open_store(whole / "data/store")
    assert len(store) == len({tokens_of(sample) for sample in samples})
    assert len(with_scores([*samples, *samples], store)) == 2 * len(samples)


@pytest.mark.parametrize("kind", kinds())
@pytest.mark.parametrize("tail", [True, False])
def test_a_stored_top_k_gives_the_divergence_and_gradient_of_a_teacher_that_is_there(kind, tail):
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    teacher = (2 * torch.randn(7, 11, dtype=torch.float64) / 0.7).log_softmax(-1)
    weights = torch.rand(7, dtype=torch.float64)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    top = teacher.topk(4, dim=-1)
    part = stored_divergence(
        ours,
        head,
        top.indices,
        top.values,
        Divergence(kind, temperature=0.7, top_k=4, tail=tail),
        weights=weights,
        chunk_size=3,
    )
    part.total.backward()
    exact = token_divergence(theirs @ head.T / 0.7, teacher, Divergence(kind, top_k=4, tail=tail))
    (exact * weights).sum().backward()
    torch.testing.assert_close(part.per_token, exact.detach())
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_a_run_with_a_stored_top_k_trains_its_divergence_without_a_teacher(settings):
    out = train(
        settings("top_k", lightning_opd={"form": "exact", "divergence": {"kind": "forward_kl", "top_k": 5}})
    ).out
    rows = read_rows(out / "metrics.jsonl")[2:]
    assert all(row["distill/nats"] > 0 and 0 < row["distill/kept"] <= 1 for row in rows)
    assert dict(inspect(out))["top k"] == "5"


COMMAND = [sys.executable, "-W", "ignore", "-m", "opd.launch.cli"]


@pytest.mark.long
def test_a_precompute_that_is_killed_again_and_again_scores_each_position_once_and_misses_none(
    settings, whole, tmp_path
):
    data = settings("killed", lightning_opd={"tasks": 40})
    (tmp_path / "run.yaml").write_text(json.dumps(data))
    store = whole.with_name("killed") / "data/store"
    seen: list[int] = []
    command = [*COMMAND, "precompute", str(tmp_path / "run.yaml")]
    for number in range(3):
        process = subprocess.Popen([*command, *(["--resume"] if number else [])], env=os.environ)
        while process.poll() is None and len(list(store.glob("shard-*"))) <= len(seen):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen = list(store.glob("shard-*"))
    assert subprocess.run([*command, "--resume"], check=False).returncode == 0
    assert subprocess.run([*COMMAND, "store", "verify", str(store)], check=False).returncode == 0
    _, samples = episodes(store.parent / "episodes-own.jsonl", chat_of(settings))
    assert len(samples) >= 40
    stored = [tokens.key for tokens in open_store(store).sequences()]
    assert len(stored) == len(set(stored))
    assert set(stored) == {tokens_of(sample).key for sample in samples}
    assert set(seen) <= set(store.glob("shard-*"))  # what was there before is untouched
    shard = seen[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    bad = subprocess.run([*COMMAND, "store", "verify", str(store)], check=False, capture_output=True, text=True)
    assert (bad.returncode, str(shard) in bad.stdout) == (1, True)
