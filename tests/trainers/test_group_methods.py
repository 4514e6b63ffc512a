"""GRPO, SDPO and SRPO as whole runs: a random model, an environment that gives feedback over two turns."""

import math

import pytest
import torch

from opd.backends.local import LocalBackend
from opd.checkpoint import Checkpoint
from opd.errors import ConfigError
from opd.launch.train import train
from opd.tracking import read_rows

pytestmark = pytest.mark.slow

ENV = """
import gymnasium
from opd.envs import TextSpace

class Vowels(gymnasium.Env):
    '''Two actions; the longer their text, the higher the reward. Solved (perhaps) where their length is even.'''

    observation_space, action_space = TextSpace(), TextSpace()

    def __init__(self, solvable=True, says=True):
        self.solvable, self.says = solvable, says

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.turn = 0, 0
        return "Say something.", {}

    def step(self, action):
        self.length, self.turn = self.length + len(action), self.turn + 1
        right = self.length % 2 == 0
        info = {"success": self.solvable and right and self.turn == 2}
        if self.says and not right:
            info["feedback"] = "It was odd."
        return "Go on.", min(self.length, 20) / 100 if self.turn == 2 else 0.0, self.turn == 2, False, info
"""
METHODS = ("grpo", "sdpo", "srpo")


@pytest.fixture(scope="module")
def model(make_model, make_tokenizer, tmp_path_factory):
    """A folder that transformers loads."""
    folder = tmp_path_factory.mktemp("model")
    make_model(stops=True).model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """`run(method, section, ...)`: trains; the rows of the metrics and the last weights."""
    (tmp_path / "vowels_env.py").write_text(ENV)
    monkeypatch.syspath_prepend(tmp_path)

    def go(method, section=None, *, env=None, updates=2, steps=2, group_size=4, **sections):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        train(
            {
                "method": method,
                method: section or {},
                "out": str(out),
                "model": str(model),
                "env": {"id": "vowels_env:Vowels", "kwargs": env or {}},
                "rollout": {"group_size": group_size, "max_tokens": 6, "max_length": 256},
                "train": {"steps": steps, "tasks_per_step": 4, "lr": 1e-3, "updates_per_step": updates, "threads": 1},
                "tracking": {"wandb": "disabled", "console": False, "plot": False},
                **sections,
            }
        )
        go.saved = Checkpoint(out / "checkpoints" / f"step-{steps}")
        return read_rows(out / "metrics.jsonl"), go.saved.tensors("student")

    return go


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_where_nothing_is_routed_srpo_is_grpo_to_the_bit(run):
    """Rewards differ, and no episode is right: each is left to the clipped policy gradient."""
    nobody = {"solvable": False}
    rows, weights = run("srpo", env=nobody)
    plain, expected = run("grpo", {"clip_high": 0.28}, env=nobody)
    assert same(weights, expected)
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in plain]
    assert all(row["route/policy_share"] == 1 for row in rows)
    assert any(row["policy/clipped"] > 0 for row in rows)
    rows, weights = run("srpo")
    _, expected = run("grpo", {"clip_high": 0.28})
    assert all(row["route/distill"] > 0 and row["route/policy"] > 0 for row in rows)
    assert not same(weights, expected)


def test_routes_add_up_and_follow_the_outcomes(run):
    rows, _ = run("srpo")
    for row in rows:
        assert row["route/distill"] + row["route/policy"] == row["rollout/episodes"] == 16
        assert row["shown/demonstration"] == row["route/distill_share"] > 0
        assert row["route/distill_share"] <= 1 - row["reward/success"]
        assert 0 < row["signal/solved_groups"] <= 1
    rows, _ = run("sdpo")
    for row in rows:
        assert row["route/distill"] + row.get("route/untaught", 0) == 16
        assert row["shown/demonstration"] + row.get("shown/feedback", 0) == pytest.approx(row["route/distill_share"])


COMPOSED = {
    "pass rates": ({}, {"weighting": {"pass_rate": {"on": "all"}}}),
    "vOPD's baseline": ({"form": "sampled", "baseline": "full"}, {}),
    "vOPD's baseline over the top k": (
        {"form": "sampled", "baseline": "top_k", "baseline_top_k": 5},
        {},
    ),
    "both": (
        {"form": "sampled", "baseline": "full"},
        {"weighting": {"pass_rate": {}, "turns": [1.0, 0.5]}},
    ),
    "a trust region": ({"teacher": {"weights": "trust_region", "rate": 0.05}}, {}),
}


@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("method", ["sdpo", "srpo"])
def test_weights_by_pass_rate_and_baselines_compose(run, method, name):
    section, sections = COMPOSED[name]
    rows, weights = run(method, section, **sections)
    _, plain = run(method)
    assert not same(weights, plain)
    assert all(row["train/skipped"] == 0 for row in rows)
    assert rows[0]["train/grad_norm"] > 0
    assert "distill/nats" in rows[0]


def test_pass_rates_and_baselines_compose_with_grpo(run):
    _, plain = run("grpo")
    _, weighed = run("grpo", weighting={"pass_rate": {"on": "all"}})
    assert not same(plain, weighed)
    vopd = {"policy_share": 0.9, "form": "sampled", "baseline": "full", "max_ratio": None}
    rows, mixed = run("sdpo", vopd)
    assert not same(plain, mixed)
    assert all("policy/ratio_p50" in row and "distill/nats" in row for row in rows)
    with pytest.raises(ConfigError, match=r"weighting\.pass_rate has no effect.*set weighting\.pass_rate\.on: all"):
        run("grpo", weighting={"pass_rate": {}})


@pytest.mark.parametrize("method", ["sdpo", "srpo"])
def test_the_average_moves_after_every_update_of_a_step(run, monkeypatch, method):
    """teacher <- 0.95 teacher + 0.05 student, from the initial weights on, once an optimiser update."""
    step, seen = LocalBackend.step, []

    def weights(backend):
        return {name: p.detach().clone() for name, p in backend.model.named_parameters()}

    def watched(backend):
        seen.append(weights(backend))
        return step(backend)

    monkeypatch.setattr(LocalBackend, "step", watched)
    _, last = run(method, steps=2, updates=3)
    assert len(seen) == 6
    teacher, (expected, *students) = run.saved.tensors("teacher"), [*seen, last]
    for student in students:
        assert not same(student, expected)
        expected = {name: 0.95 * weight + 0.05 * student[name] for name, weight in expected.items()}
    for name, weight in teacher.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-7)


def test_a_step_that_is_skipped_moves_no_average(run, monkeypatch):
    run("sdpo", steps=1, updates=1)
    after_one, step, calls = run.saved.tensors("teacher"), LocalBackend.step, []

    def then_infinite(backend):
        calls.append(backend)
        return step(backend) if len(calls) == 1 else math.inf

    monkeypatch.setattr(LocalBackend, "step", then_infinite)
    rows, _ = run("sdpo", steps=2, updates=1)
    assert [row["train/skipped"] for row in rows] == [0, 1]
    assert same(run.saved.tensors("teacher"), after_one)


@pytest.mark.parametrize("method", ["grpo", "srpo"])
def test_a_run_in_which_nothing_teaches_is_warned_of_once(run, caplog, method):
    alike = {"group_size": 2, "temperature": 1e-6, "max_tokens": 6, "max_length": 256}  # both of a group say the same
    run(method, rollout=alike, steps=3, updates=1)
    said = [record.message for record in caplog.records if "nothing teaches" in record.message]
    assert len(said) == 1
    assert said[0].startswith("step 1: nothing teaches")
    assert "rollout.group_size" in said[0]


@pytest.mark.parametrize("method", ["sdpo", "srpo"])
def test_a_run_whose_teacher_may_read_nothing_is_warned_of_once(run, caplog, method):
    """In SRPO rewards go on to teach, so that only this warning tells."""
    rows, _ = run(method, {"max_teacher_tokens": 10}, steps=3, updates=1)
    said = [record.message for record in caplog.records if "nothing is distilled" in record.message]
    assert len(said) == 1
    assert said[0].startswith("step 1: nothing is distilled")
    assert f"max_teacher_tokens of each of the {rows[0]['route/too_long']:.0f} sequences" in said[0]
    assert "route/distill" not in rows[0]
    caplog.clear()
    run(method, steps=1, updates=1)
    assert "nothing is distilled" not in caplog.text


def test_without_feedback_or_success_nothing_teaches_and_with_feedback_something_does(run, caplog):
    rows, _ = run("sdpo", env={"solvable": False, "says": False}, steps=1, updates=1)
    assert rows[0]["signal/zero"] == 1
    assert "nothing teaches" in caplog.text
    caplog.clear()
    rows, _ = run("sdpo", env={"solvable": False}, steps=1, updates=1)
    assert rows[0]["shown/feedback"] > 0
    assert "nothing teaches" not in caplog.text
