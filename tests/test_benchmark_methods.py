"""The comparison of methods: equal tokens, what has finished is kept, one table and one picture."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from opd.envs.text_env import Reply
from opd.errors import ConfigError

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks/methods.py"


@pytest.fixture(scope="module")
def methods():
    spec = importlib.util.spec_from_file_location("benchmark_methods", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where pydantic looks for names
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def file(make_model, make_tokenizer, tmp_path):
    """A comparison of a few steps, on a random model."""
    folder = tmp_path / "model"
    make_model(stops=True).model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)

    def write(**changed):
        content = {
            "title": "a few steps",
            "tokens": 600,
            "points": 2,
            "seeds": [0, 1],
            "base": {
                "model": str(folder),
                "env": "opd/Arithmetic-v0",
                "rollout": {"group_size": 4, "max_tokens": 8, "max_length": 512},
                "train": {"tasks_per_step": 4, "threads": 1},
                "eval": {"tasks": 5},
            },
            "methods": {"GRPO": {"method": "grpo", "train.lr": 1e-4}, "SRPO": {"method": "srpo"}},
        } | changed
        path = tmp_path / "few.yaml"
        path.write_text(json.dumps(content))  # JSON is YAML
        return path

    return write


@pytest.mark.slow
def test_every_method_samples_as_many_tokens_for_each_seed_and_finished_runs_are_kept(methods, file, tmp_path, capsys):
    out = tmp_path / "results"
    methods.main([str(file()), "--out", str(out), "--seeds", "0"])
    first = {path.name: path.read_text() for path in out.glob("*.json")}
    assert sorted(first) == ["GRPO-seed-0.json", "SRPO-seed-0.json"]
    for text in first.values():
        points = json.loads(text)["points"]
        assert [point["tokens"] for point in points] == [0, 300, 600]
        assert all(0 <= p["sampled"] - p["tokens"] <= 4 * 4 * 8 for p in points)  # less than a step too many
        assert points[-1]["steps"] > 2
        assert [len(p["outcomes"]) for p in points] == [5, 5, 5]
    capsys.readouterr()
    methods.main([str(file()), "--out", str(out)])
    said = capsys.readouterr().out
    assert "GRPO, seed 1: " in said
    assert "seed 0: " not in said
    assert {name: (out / name).read_text() for name in first} == first
    lines = [line for line in said.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == ["| method", "| ---", "| GRPO", "| SRPO"]
    assert lines[2].startswith("| GRPO | 2 | 0.0% | 0.0% (0.0% to ")
    assert (out / "success.png").stat().st_size > 10_000
    methods.main([str(file()), "--out", str(out), "--table"])
    assert "\n".join(lines) in capsys.readouterr().out


@pytest.mark.slow
def test_what_a_stage_collects_counts_and_does_not_teach_before_it_trains(methods, file, tmp_path, monkeypatch):
    solved = Reply(reward=1.0, terminated=True, success=True)
    monkeypatch.setattr("opd.envs.worlds.arithmetic.ArithmeticEnv.respond", lambda env, action: solved)
    settings = {"train.steps": 3, "sd_zero.questions": 8, "sd_zero.revisions": 1}
    path = file(methods={"A": {"method": "sd_zero", **settings}}, seeds=[0], points=6, tokens=900)
    methods.main([str(path), "--out", str(tmp_path / "results")])
    points = json.loads((tmp_path / "results/A-seed-0.json").read_text())["points"]
    # 8 tasks x 4 attempts x 2 of up to 8 tokens are sampled by the model as it was, which then trains for 3 steps.
    collected = points[1]["sampled"]
    early = [p for p in points[1:] if p["tokens"] < collected]
    assert 0 < len(early) < 5
    assert {(p["sampled"], p["steps"]) for p in early} == {(collected, 0)}
    late = points[1 + len(early) :]
    assert all(p["steps"] > 3 for p in late)
    assert late[-1]["sampled"] >= 900
    assert [p["outcomes"] for p in points] == [[True] * 5] * 7


def test_results_of_other_settings_are_refused_before_anything_runs(methods, file, tmp_path):
    out = tmp_path / "results"
    methods.main([str(file(methods={"GRPO": {"method": "grpo"}}, seeds=[0], points=1, tokens=1)), "--out", str(out)])
    with pytest.raises(ConfigError, match=r"GRPO-seed-0\.json was made with other settings; delete it"):
        methods.main([str(file(methods={"GRPO": {"method": "grpo"}}, seeds=[0], points=1)), "--out", str(out)])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": 0}, "tokens"),
        ({"methods": {}}, "methods"),
        ({"methods": {str(n): {"method": "grpo"} for n in range(7)}}, r"methods\n.*at most 6 items"),
        ({"methods": {"A": {"method": "grpo", "train.lrr": 1.0}}}, r"train\.lrr is unknown"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(methods, file, tmp_path, changed, message):
    with pytest.raises(ConfigError, match=message):
        methods.main([str(file(**changed)), "--out", str(tmp_path / "results")])


def test_the_table_pools_seeds_and_pairs_their_tasks(methods):
    def result(seed, *outcomes):
        points = [
            methods.Point(tokens=n, sampled=n, steps=n, outcomes=[bool(int(bit)) for bit in bits])
            for n, bits in enumerate(outcomes)
        ]
        return methods.Result(settings={"seed": seed}, tokens=9, points=points, seconds=60.0 * (seed + 1))

    runs = {
        "A": [result(0, "0000", "1000"), result(1, "0000", "1100")],
        "B": [result(0, "0000", "1111"), result(1, "0001", "1111")],
    }
    _, _, first, second = methods.table(runs).splitlines()
    assert first == "| A | 2 | 0.0% | 37.5% (13.7% to 69.4%) | 25.0%, 50.0% | 37.5% | 18.8% |  | 1 to 1 | 1.5 |"
    assert second.startswith("| B | 2 | 12.5% | 100.0% (67.6% to 100.0%) | 100.0%, 100.0% | 100.0% | 56.2% | +62.5% (")
