"""vLLM in each of two ranks, from its start to its end: a method of stages goes through all of them under ZeRO.

Not covered: GPUs, where a second engine in a process also needs the memory of the first.
"""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from opd.tracking import read_rows

pytest.importorskip("vllm", reason="the real vLLM is not installed")

STAGES = (3, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, zero_settings, launch):
    """SD-Zero, whose two stages train from each other's weights, with ZeRO-3 and then with ZeRO-2 in one process."""
    root = tmp_path_factory.mktemp("stages")

    def config(stage):
        return zero_settings(
            root / f"zero{stage}",
            stage,
            method="sd_zero",
            opsd=None,
            env={"id": "coin_env:CoinEnv"},
            rollout={
                "engine": "vllm",
                "deterministic": False,
                "max_tokens": 6,
                "max_length": 128,
                "concurrency": 4,
                "group_size": 2,
                "vllm": {"kv_cache_gib": 0.03},
            },
            train={"steps": 1, "tasks_per_step": 2, "tokens_per_microbatch": 512},
            sd_zero={"questions": 4, "revisions": 2, "teacher": {"weights": "synced", "every": 1}},
        )

    launch([{"do": "train", "config": config(stage), "resume": False} for stage in STAGES])
    return root


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_a_method_trains_with_an_engine_of_its_own(runs, stage):
    rows = read_rows(runs / f"zero{stage}" / "metrics.jsonl")
    assert [row["stage"] for row in rows] == [1, 2]
    assert all(row["tokens/trained"] > 0 for row in rows)
    assert rows[-1]["rollout/failed"] == 0
    first, last = (
        load_file(runs / f"zero{stage}" / name / "model.safetensors") for name in ("export-stage-1", "export")
    )
    assert any((first[name] != last[name]).any() for name in first)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, tiny_folder, launch):
    """What two ranks found, each of its two engines one after the other."""
    out = tmp_path_factory.mktemp("ranks")
    launch(
        [{"model": tiny_folder, "out": str(out)}],
        launcher=[sys.executable, str(Path(__file__).with_name("engines.py"))],
    )
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.long
def test_the_engine_of_a_rank_is_on_its_local_rank_and_the_rank_stays_who_it_is(ranks):
    for number, rank in enumerate(ranks):
        assert [engine["local_rank"] for engine in rank["engines"]] == [number, number]
        assert rank["told"] == {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2"}
        assert rank["kept"]


@pytest.mark.long
def test_every_rank_samples_by_itself_and_draws_by_the_seed_alone(ranks):
    first, second = ([engine["ids"] for engine in rank["engines"]] for rank in ranks)
    assert first[0] == first[1]
    assert second[0] == second[1]
    both = first[0].keys() & second[0].keys()
    assert len(both) == 3
    assert all(first[0][session] == second[0][session] for session in both)


@pytest.mark.long
def test_the_groups_of_the_ranks_outlive_every_engine(ranks):
    for rank in ranks:
        for engine in rank["engines"]:
            assert engine["sums"] == [3.0, 3.0]
            assert engine["ranks"] == [0, 1]
