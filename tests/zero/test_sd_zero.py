"""A method of stages on two ranks: they collect what one does, and go on from any point to the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from opd.launch.train import train
from opd.tracking import read_rows

pytestmark = pytest.mark.long

CUTS = {
    # What is missing of a whole run: files and folders, and bytes at the end of what was collected.
    "while it collects": (["checkpoints", "export-stage-1", "metrics.jsonl"], 3000),
    "before the first export": (["checkpoints/step-3", "checkpoints/step-4", "export-stage-1"], 0),
    "within the second stage": (["checkpoints/step-4"], 0),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, zero_settings, launch):
    """A whole run on two ranks, its copies that were cut and went on there, and a whole run of the local backend."""
    root = tmp_path_factory.mktemp("sd_zero")

    def config(out, stage):
        return zero_settings(
            root / out,
            stage,
            method="sd_zero",
            opsd=None,
            env={"id": "coin_env:CoinEnv"},
            rollout={"max_tokens": 6, "max_length": 128, "concurrency": 4, "group_size": 2},
            train={"steps": 2, "save_every": 1, "keep_last": 9, "tasks_per_step": 3, "tokens_per_microbatch": 512},
            sd_zero={"questions": 5, "revisions": 2, "teacher": {"weights": "synced", "every": 1}},
        )

    def copy(name):
        gone, short = CUTS[name]
        return {"do": "copy", "source": str(root / "whole"), "to": str(root / name), "gone": gone, "short": short}

    launch(
        [
            {"do": "train", "config": config("whole", 3), "resume": False},
            *map(copy, CUTS),
            *({"do": "train", "config": config(name, 3), "resume": "auto"} for name in CUTS),
        ]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(__file__).rpartition("/")[0])
        train(config("local", None))
    return root


def collected(folder):
    """The rows, without the header, which says under which settings they were played."""
    lines = (folder / "data" / "revisions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def measured(folder):
    rows = read_rows(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def exported(folder, name="export"):
    return load_file(folder / name / "model.safetensors")


def test_two_ranks_collect_what_one_does(runs):
    two, one = (collected(runs / name) for name in ("whole", "local"))
    assert two == one
    assert len(two) == 5 * 2
    assert 0 < sum(row["kept"] for row in two) < 5 * 2 * 2


def test_two_ranks_end_where_one_does(runs):
    two, one = (measured(runs / name) for name in ("whole", "local"))
    assert [row["stage"] for row in two] == [1, 1, 2, 2]
    for key in ("train/loss", "tokens/trained", "train/grad_norm"):
        assert [row[key] for row in two] == pytest.approx([row[key] for row in one], rel=1e-3), key
    for name in ("export-stage-1", "export"):
        local = exported(runs / "local", name)
        for key, weight in exported(runs / "whole", name).items():
            # Where a gradient is nearly nothing, Adam makes a step (1e-3) of its rounding.
            torch.testing.assert_close(weight, local[key], rtol=0, atol=1e-3)
            assert (weight - local[key]).abs().mean() < 1e-6


@pytest.mark.parametrize("name", CUTS)
def test_a_run_of_two_ranks_goes_on_from_any_point_to_the_same_bits(runs, name):
    whole, resumed = exported(runs / "whole"), exported(runs / name)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    assert measured(runs / "whole") == measured(runs / name)
    assert collected(runs / "whole") == collected(runs / name)
