"""Distillation from another model: what it reads, which models are refused, and that it stays what it was."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd.checkpoint import Checkpoint
from opd.errors import CheckpointError, ConfigError, ModelError
from opd.launch.checks.loading import config_from
from opd.launch.run import models as launch_models
from opd.launch.run.build import build
from opd.launch.train import train
from opd.losses import SampledDistill
from opd.models.config import ModelConfig
from opd.models.identity import weights_fingerprint
from opd.models.loading import load_teacher
from opd.objective.collate import collate
from opd.objective.objective import objective
from opd.teachers.config import TeacherConfig
from opd.teachers.teacher import Teacher
from opd.tracking import read_rows
from opd.trainers.opd import Opd, OpdConfig
from opd.trainers.vopd import VopdConfig

EXTERNAL = TeacherConfig(weights="external", model="some/model")


@pytest.fixture(scope="module")
def tiny(tiny_model):
    return tiny_model()


@pytest.fixture(scope="module")
def teacher(tiny, tmp_path_factory):
    """Another model with the same tokenizer: wider, and with a row of padding."""
    folder = tmp_path_factory.mktemp("teacher")
    base = AutoModelForCausalLM.from_pretrained(tiny)
    torch.manual_seed(1)
    config = type(base.config)(**{**base.config.to_dict(), "hidden_size": 96, "vocab_size": base.config.vocab_size + 8})
    type(base)(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(tiny, teacher, tmp_path):
    def make(name="run", method="opd", **sections):
        data = {
            "method": method,
            "out": str(tmp_path / name),
            "model": str(tiny),
            "env": {"id": "opd/Lookup-v0", "max_turns": 3},
            "rollout": {"max_tokens": 8, "max_length": 256},
            "train": {"steps": 2, "tasks_per_step": 4, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            method: {"teacher": {"weights": "external", "model": str(teacher)}},
        }
        for section, values in sections.items():
            own = data.get(section)
            data[section] = own | values if isinstance(own, dict) and isinstance(values, dict) else values
        return data

    return make


@torch.no_grad()
def one_by_one(model, token_ids, rows):
    """The log-probs [rows, V] after each row, from a forward pass over nothing but what stands up to it."""
    logits = [model.model(input_ids=torch.tensor([token_ids[: row + 1]])).logits[0, -1] for row in rows]
    return torch.stack(logits).log_softmax(-1)


@pytest.mark.parametrize("form", ["sampled", "exact"])
def test_another_model_scores_the_students_own_tokens_in_the_conversation_they_were_sampled_in(
    play, scripted_env, turns_then_end, make_chat, make_model, form
):
    chat, student, other = (
        make_chat(),
        make_model(dtype=torch.float64, stops=True),
        make_model(dtype=torch.float64, seed=7),
    )
    groups = play(lambda: scripted_env(turns_then_end(3)), tasks=3, model=student, chat=chat)
    whole = {"divergence": {"top_k": None}} if form == "exact" else {}
    method = Opd(OpdConfig(teacher=EXTERNAL, form=form, **whole), chat)
    samples = [sample for group in groups for sample in method.annotate(group)]
    assert [max(s.turn) for s in samples] == [2, 2, 2]
    assert all(s.teacher_view.token_ids == s.token_ids and s.teacher_view.rows == s.rows for s in samples)
    batch = collate(samples, chat.end_id)
    found = objective(
        student, batch, method.losses(method.config), Teacher(EXTERNAL, student, other).teach(batch)
    ).facts["nats"]
    brute = []
    for sample in samples:
        ours, theirs = (one_by_one(m, sample.token_ids, sample.rows) for m in (student, other))
        ids = torch.tensor(sample.completion_ids)[:, None]
        gap = (
            (ours - theirs).gather(-1, ids).squeeze(-1) if form == "sampled" else (ours.exp() * (ours - theirs)).sum(-1)
        )
        brute += gap.tolist()
    assert found.tolist() == pytest.approx(brute, abs=1e-10)


def test_rows_of_padding_that_only_the_teacher_has_are_left_out_and_a_smaller_head_is_refused(
    tiny, teacher, make_model
):
    student = launch_models.load(ModelConfig(name=str(tiny))).model
    other = load_teacher(ModelConfig(name=str(teacher)), student)
    assert (other.vocabulary, student.vocabulary) == (student.vocabulary + 8, student.vocabulary)
    assert not any(p.requires_grad for p in other.parameters())
    assert Teacher(EXTERNAL, student, other).head().vocabulary == student.vocabulary
    wide = make_model(vocab=student.vocabulary + 1)
    with pytest.raises(
        ModelError, match=rf"has {student.vocabulary} rows in its head, the student {student.vocabulary + 1}"
    ):
        load_teacher(ModelConfig(name=str(tiny)), wide)


def test_a_teacher_of_another_tokenizer_is_refused_by_both_names_before_any_weights_are_read(
    settings, make_model, make_tokenizer, tiny, tmp_path, monkeypatch
):
    make_model().model.save_pretrained(tmp_path / "stranger")
    make_tokenizer().save_pretrained(tmp_path / "stranger")
    monkeypatch.setattr(launch_models, "load", lambda *_, **__: pytest.fail("weights were read"))
    config = config_from(settings(opd={"teacher": {"weights": "external", "model": str(tmp_path / "stranger")}}))
    with pytest.raises(
        ModelError, match=f"{tmp_path}/stranger.*vocabulary: .* entries of the student, .* of the teacher"
    ) as error:
        build(config)
    assert str(tiny) in str(error.value)


def refused(data, *messages):
    with pytest.raises(ConfigError) as error:
        config_from(data)
    for message in messages:
        assert message in str(error.value)


def test_teachers_that_cannot_be_are_refused_before_anything_loads(settings):
    refused(settings(opd=None), "opd.teacher is missing")
    refused(
        settings(opd={"teacher": {"weights": "frozen"}}), "teacher.weights = frozen would see what the student sees"
    )
    refused(
        settings(opd={"teacher": {"weights": "external"}}), "opd.teacher.model is missing: weights = external needs it"
    )
    named = {"weights": "frozen", "model": "x"}
    refused(
        settings(method="opsd", opsd={"teacher": named}),
        "opsd.teacher.model is used by weights = external alone, but weights = frozen; remove it",
    )
    missing = {"teacher": {"weights": "external", "model": "./nowhere"}}
    refused(settings(opd=missing), 'opd.teacher.model = "./nowhere" does not exist')
    external = settings()["opd"]["teacher"]
    refused(
        settings(opd={"teacher": external, "policy": {"scale": "none"}}), "opd.policy is used with policy_share alone"
    )
    refused(
        settings(opd={"teacher": external, "divergence": "jsd"}),
        "opd.divergence is used by form = exact alone, but form =",
    )


def test_the_name_of_vopd_switches_the_baseline_on():
    assert VopdConfig(teacher=EXTERNAL).loss() == SampledDistill(baseline="full", max_ratio=2.0)
    assert OpdConfig(teacher=EXTERNAL).loss() == SampledDistill(max_ratio=2.0)
    by_top_k = VopdConfig(teacher=EXTERNAL, baseline="top_k", baseline_top_k=7).loss()
    assert (by_top_k.baseline, by_top_k.top_k, by_top_k.renormalise) == ("top_k", 7, True)


def test_rewards_come_beside_the_teacher_with_their_share(make_chat, make_group):
    method = Opd(OpdConfig(teacher=EXTERNAL, policy_share=0.25, policy={"scale": "none"}), make_chat())
    assert (method.losses(method.config).policy.coef, method.losses(method.config).distill.coef) == (0.25, 0.75)
    samples = method.annotate(make_group(method.chat, "RWW"))
    assert [s.advantage[-1] for s in samples] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    assert all(any(s.policy_weight) and any(s.distill_weight) for s in samples)


def test_training_leaves_the_teacher_alone_and_no_checkpoint_or_export_holds_it(settings, teacher, tiny):
    before = {path.name: path.read_bytes() for path in teacher.iterdir()}
    out = train(settings(train={"steps": 4})).out
    rows = read_rows(out / "metrics.jsonl")
    assert all(row["time/teacher"] > 0 and row["train/grad_norm"] > 0 for row in rows)
    assert {path.name: path.read_bytes() for path in teacher.iterdir()} == before
    assert load_file(out / "checkpoints/step-4/teacher.safetensors") == {}
    assert (out / "export/config.json").read_text() != (teacher / "config.json").read_text()


def test_a_run_goes_on_with_the_same_teacher_to_the_bit_and_refuses_another(settings, teacher, tmp_path):
    whole = train(settings("whole", train={"steps": 3, "save_every": 1})).out
    cut = settings("cut", train={"steps": 2})
    train(cut)
    cut["train"]["steps"] = 3
    resumed = train(cut, resume=True).out
    a, b = (Checkpoint(out / "checkpoints/step-3").tensors("student") for out in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = AutoModelForCausalLM.from_pretrained(teacher)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    saved = {path: path.read_bytes() for path in teacher.iterdir()}
    other.save_pretrained(teacher)
    cut["train"]["steps"] = 4
    with pytest.raises(CheckpointError, match="was taught by other weights"):
        train(cut, resume=True)
    for path, content in saved.items():
        path.write_bytes(content)


@pytest.mark.parametrize("method", ["opsd", "sdpo"])
def test_another_model_can_teach_any_method_that_distils(settings, method, teacher, tiny):
    own = {"teacher": {"weights": "external", "model": str(teacher)}}
    own |= {"privileged": "plan"} if method == "opsd" else {"feedback_at": "start"}
    run = build(config_from(settings(method=method, rollout={"group_size": 2}, **{method: own})))
    try:
        assert run.loop.models.teacher.fingerprint == weights_fingerprint(
            load_teacher(ModelConfig(name=str(teacher)), run.loaded.model)
        )
        row, _ = run.loop.step(0)
    finally:
        run.close()
    assert (
        row["distill/nats_max"] > 1e-4
    )  # a frozen teacher would say the same as the student, but for what it is shown
    assert row["train/grad_norm"] > 0


def test_evaluating_loads_no_teacher(settings):
    run = build(config_from(settings()), stage=None)
    run.close()
    assert run.loop.models.teacher.other is None


def test_the_plan_counts_the_teacher(settings, tmp_path, teacher):
    from opd.launch.plan.plan import plan

    made = plan(config_from(settings()), tmp_path, gpu=False)
    [part] = [part for part in made.memory if part.name == "teacher"]
    weights = json.loads((teacher / "config.json").read_text())
    assert part.note == str(teacher)
    assert part.bytes == 4 * sum(w.numel() for w in load_file(teacher / "model.safetensors").values())
    assert weights["hidden_size"] == 96
