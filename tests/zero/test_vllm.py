"""The whole shape: OPSD on a tool environment, ZeRO-3 on two ranks, and vLLM in each of them, or as its server."""

import json

import pytest

from opd.tracking import read_rows

pytest.importorskip("vllm", reason="the real vLLM is not installed")
ENGINES = ("vllm_server", "vllm")  # in this order: an engine in process, when it is closed, ends the process groups


@pytest.fixture(scope="module")
def runs(tmp_path_factory, zero_settings, launch):
    """Three steps with each engine; every step but the first samples after an update."""
    root = tmp_path_factory.mktemp("whole")

    def case(engine):
        rollout = {"engine": engine, "deterministic": False, "concurrency": 8}
        train = {"steps": 3, "tasks_per_step": 4, "lr": 1e-2}
        return {"do": "fresh", "config": zero_settings(root / engine, 3, rollout=rollout, train=train)}

    launch([case(engine) for engine in ENGINES])
    return root


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_after_every_update_vllm_samples_from_the_slices_that_train(runs, engine):
    gaps = json.loads((runs / engine / "gaps.json").read_text())
    assert len(gaps) == 3
    assert max(gaps) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_rank_played_its_share_and_what_it_played_was_trained(runs, engine):
    rows = read_rows(runs / engine / "metrics.jsonl")
    assert [row["rollout/episodes"] for row in rows] == [4.0] * 3
    assert [row["rollout/failed"] for row in rows] == [0.0] * 3
    assert all(row["tokens/trained"] == row["tokens/sampled"] > 0 for row in rows)
    assert len({row["train/loss"] for row in rows}) == 3
