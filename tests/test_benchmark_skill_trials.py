"""The benchmark of trials: what a verdict keeps and drops, and a study of a whole world."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/skill_trials.py"
ENV = """
import gymnasium
from opd.envs import TextSpace

class Even(gymnasium.Env):
    observation_space, action_space = TextSpace(), TextSpace()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"Say a word to {seed}.", {}

    def step(self, action):
        right = len(action) % 2 == 0
        return "", float(right), True, False, {"success": right, "feedback": "It was odd."}
"""


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_skill_trials", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_verdict_is_judged_by_what_its_skills_are_worth(benchmark):
    trials = [
        benchmark.Trial(True, (0.3, 0.2, -0.1), 0.5),
        benchmark.Trial(True, (0.1, -0.3, -0.2), -0.25),
        benchmark.Trial(False, (-0.2, 0.1, 0.4), 0.25),
    ]
    likelier, lift, few = benchmark.rows("a model", trials)
    assert likelier == "| a model | +12.5%, +25.0% | likelier | +0.50 | 2: +12.5% | 1: +25.0% |"
    assert "| lift | +1.00 | 2: +37.5% | 1: -25.0% |" in lift
    assert "| +0.50 | 1: +25.0% | 2: +12.5% |" in few


def test_ranks_with_ties_and_without_any_difference(benchmark):
    assert benchmark.spearman([1, 2, 2, 3], [10, 20, 20, 90]) == pytest.approx(1.0)
    assert benchmark.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert benchmark.spearman([1, 1, 1], [1, 2, 3]) != benchmark.spearman([1, 1, 1], [1, 2, 3])  # nan


def test_each_mixed_task_tries_its_own_skill_and_anothers(
    benchmark, make_model, make_tokenizer, tmp_path, monkeypatch, capsys
):
    (tmp_path / "even_env.py").write_text(ENV)
    monkeypatch.syspath_prepend(tmp_path)
    make_model(stops=True).model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    world = json.dumps({"id": "even_env:Even"})
    trials = benchmark.study(str(tmp_path / "model"), world, tasks=4, members=8)
    assert len([t for t in trials if t.own]) == len([t for t in trials if not t.own]) >= 2
    assert all(-1 <= t.worth <= 1 and any(t.verdicts) for t in trials)
    monkeypatch.setattr(benchmark, "study", lambda model, env, **_: trials)
    monkeypatch.setattr(sys, "argv", ["skill_trials", "--worlds", "a=b"])
    benchmark.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| a |")]
    assert len(rows) == len(benchmark.VERDICTS)
