"""A whole run on an environment that breaks all the time, in every way that we know."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest

from opd.engines.transformers import TransformersEngine
from opd.launch.train import train
from opd.types import Fault

STEPS = 50
WAYS = [*["refuse", "hang"] * 2, "raise", "sys.exit", "exit", "segfault", "kill", "scribble"]
WAYS += ["bytes", "none", "huge", "nan"]


def descendants_of_this_process():
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found, frontier = set(), {os.getpid()}
    while frontier:
        frontier = {pid for pid, parent in parents.items() if parent in frontier}
        found |= frontier
    return found


@pytest.fixture
def tiny_folder(make_model, make_tokenizer, tmp_path):
    folder = tmp_path / "model"
    make_model(stops=True).model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def sampled_by_the_engine(monkeypatch):
    """How many tokens the engine has sampled for episodes, by its own count; its check has sessions below 0."""
    counts = []
    step = TransformersEngine.step

    def watched(self):
        done = step(self)
        counts.extend(len(completion.token_ids) for completion in done if completion.session >= 0)
        return done

    monkeypatch.setattr(TransformersEngine, "step", watched)
    return counts


@pytest.mark.slow
def test_a_run_on_an_environment_that_breaks_in_every_way_ends_and_accounts_for_every_token(
    tiny_folder, sampled_by_the_engine, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "opd"))  # wild_envs
    before = descendants_of_this_process()
    config = {
        "method": "opsd",
        "model": tiny_folder,
        "out": str(tmp_path / "run"),
        "env": {
            "id": "wild_envs:ChaosEnv",
            "kwargs": {"share": 0.3, "ways": WAYS, "turns": 2},
            "max_turns": 3,
            "workers": "processes",
        },
        "rollout": {
            "group_size": 2,
            "max_tokens": 4,
            "max_length": 128,
            "step_timeout": 0.3,
            "deterministic": False,
            "on_failure": "retry",
            "min_group_size": 2,
        },
        # Of so few tasks, all of three rounds in a row break at times, on a machine that is busy.
        "train": {"steps": STEPS, "tasks_per_step": 2, "tokens_per_microbatch": 1024, "give_up_after": 0},
        "tracking": {"wandb": "disabled", "console": False, "plot": False},
    }
    assert train(config).steps == STEPS

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == STEPS
    totals = {}
    for row in rows:
        dropped = sum(count for key, count in row.items() if key.startswith("tokens/dropped/"))
        assert row["tokens/sampled"] == row["tokens/trained"] + row["tokens/masked"] + dropped
        assert row["failures/infrastructure"] + row["failures/environment"] == sum(
            row.get(f"failures/{fault}", 0) for fault in Fault
        )
        for key, value in row.items():
            totals[key] = totals.get(key, 0) + value
    assert totals["tokens/sampled"] == sum(sampled_by_the_engine)
    assert totals["tokens/trained"] > 0
    # With so many failures each kind occurs, and so does each way to lose a token.
    assert {key for key in totals if key.startswith("failures/")} == {
        f"failures/{name}" for name in ("infrastructure", "environment", *Fault)
    }
    assert {key for key in totals if key.startswith("tokens/dropped/")} >= {
        "tokens/dropped/retried",
        "tokens/dropped/small_group",
    }
    assert totals["rollout/groups_dropped"] > 0
    assert descendants_of_this_process() <= before
