"""Every ZeRO stage, fed the rollouts that the local backend played, must do what the local backend does.

One launch is for a case of each stage, of each kind of teacher and of each method; another, long one for all others.
"""

import json
import math
import pickle
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file

from opd.launch.checks.loading import config_from
from opd.launch.run.build import build
from opd.types import End

EMA = {"teacher": {"weights": "ema", "rate": 0.2}}
LIVE = {"teacher": {"weights": "live"}}
SYNCED = {"teacher": {"weights": "synced", "every": 2}}
TRUST = {"teacher": {"weights": "trust_region", "rate": 0.3}}
CPU = {"device": "cpu", "pin_memory": False}
LORA = {"lora": {"r": 4}}
GROUPS = {"opsd": None, "rollout": {"group_size": 2}}
CASES = {
    "spoiled-0": (0, {}),
    "spoiled-2": (2, {}),
    "spoiled-3": (3, {}),
    "frozen-0": (0, {}),
    "frozen-1": (1, {}),
    "frozen-2": (2, {}),
    "frozen-3": (3, {}),
    "untied-3": (3, {}),
    "ema-2": (2, {"opsd": EMA}),
    "ema-3": (3, {"opsd": EMA}),
    "synced-3": (3, {"opsd": SYNCED}),
    "lora-synced-2": (2, {"model": LORA, "opsd": SYNCED}),
    "untied-trust-3": (3, {"opsd": TRUST}),
    "untied-persistent-3": (3, {"opsd": EMA, "persistent": True, "train": {"tokens_per_microbatch": 256}}),
    "live-3": (3, {"opsd": LIVE}),
    "lora-frozen-2": (2, {"model": LORA}),
    "lora-frozen-3": (3, {"model": LORA}),
    "lora-ema-3": (3, {"model": LORA, "opsd": EMA}),
    "offloaded-3": (3, {"opsd": EMA, "zero": {"offload_optimizer": CPU, "offload_param": CPU}}),
    "recomputed-3": (3, {"model": {"gradient_checkpointing": True}}),
    "two-updates-3": (3, {"train": {"updates_per_step": 2}}),
    "weighted-3": (3, {"weighting": {"entropy": 1.0}}),
    "weighted-live-3": (3, {"opsd": LIVE, "weighting": {"entropy": 1.0}}),
    "trust-3": (3, {"opsd": TRUST}),
    "lora-trust-3": (3, {"model": LORA, "opsd": TRUST}),
    "external-2": (2, {"opsd": {"privileged": None, "divergence": {"clip": None}}}),
    "external-3": (3, {"opsd": {"privileged": None, "divergence": {"clip": None}}}),
    "external-weighted-3": (
        3,
        {"opsd": {"privileged": None, "divergence": {"clip": None}}, "weighting": {"entropy": 1.0}},
    ),
    "external-offloaded-3": (
        3,
        {
            "opsd": {"privileged": None, "divergence": {"clip": None}},
            "zero": {"offload_optimizer": CPU, "offload_param": CPU},
            "persistent": True,
        },
    ),
    "grpo-3": (3, {"method": "grpo", **GROUPS, "train": {"updates_per_step": 2}}),
    "srpo-3": (3, {"method": "srpo", **GROUPS, "srpo": TRUST | {"feedback_at": "start"}}),
    "srpo-2": (
        2,
        {"method": "srpo", **GROUPS, "train": {"updates_per_step": 2}, "srpo": {"divergence": {"top_k": None}}},
    ),
    "sdpo-3": (3, {"method": "sdpo", **GROUPS, "sdpo": {"policy_share": 0.5}}),
}


SHORT = (
    "spoiled-3",
    "frozen-0",
    "frozen-1",
    "ema-2",
    "untied-trust-3",
    "live-3",
    "lora-synced-2",
    "lora-frozen-3",
    "offloaded-3",
    "external-3",
    "srpo-3",
    "grpo-3",
)


def each(names):
    """As parameters, the long ones marked."""
    return [name if name in SHORT else pytest.param(name, marks=pytest.mark.long) for name in names]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, zero_settings):
    """Groups of five steps, as the local backend played them.

    Of two, the first one's episodes are all right, every second one of the other's is.
    In the third step the episodes of the second of two ranks are broken, in the fourth all of them.
    """
    folder = tmp_path_factory.mktemp("recorded")

    def record(group_size):
        run = build(config_from(zero_settings(folder / "x", rollout={"group_size": group_size})))
        groups = [group for number in range(5) for group in run.loop.player.play_step(number)]
        run.close()

        def broken(group):
            how = {"end": End.BROKEN, "failed": "broken", "success": False}
            return replace(group, trajectories=[replace(t, **how) for t in group.trajectories])

        lost = [n for n in range(12, 18) if n % 2] + list(range(18, 24))
        # Rewards of this model are all 0: with others there is something to reinforce.
        groups = [broken(_with_rewards(g)) if n in lost else _with_rewards(g) for n, g in enumerate(groups)]
        path = folder / f"{group_size}.pickle"
        path.write_bytes(pickle.dumps(groups))
        return path

    return {size: record(size) for size in (1, 2)}


def _with_rewards(group):
    def reward(trajectory):
        right = trajectory.member % 2 == 1 or group.task.index % 2 == 0
        value = right - 0.3 * (trajectory.member == 0)
        turns = [replace(turn, reward=value / len(trajectory.turns)) for turn in trajectory.turns]
        return replace(trajectory, turns=turns, success=right)

    return replace(group, trajectories=[reward(t) for t in group.trajectories])


@pytest.fixture(scope="module")
def results(tmp_path_factory, zero_settings, recorded, launch, replay, untied_folder, other_folder):
    """`results(name)`: of a case, locally and on two ranks: metrics of each step, weights after the last."""
    folder = tmp_path_factory.mktemp("results")
    local = folder / "local"
    local.mkdir()

    def case(name, stage, sections, place):
        if name.startswith("untied"):
            sections = sections | {"model": {"name": untied_folder}}
        if name.startswith("external"):
            teacher = {"weights": "external", "model": other_folder}
            sections = sections | {"opsd": sections["opsd"] | {"teacher": teacher}}
        config = zero_settings(place / "run", stage, **sections)
        size = config["rollout"].get("group_size", 1)
        return {
            "do": "replay",
            "config": config,
            "rollouts": str(recorded[size]),
            "out": str(place / name),
            "spoil": 1 if "spoiled" in name else None,
        }

    @cache
    def of(short):
        chosen = {name: made for name, made in CASES.items() if (name in SHORT) == short}
        launch([case(name, stage, sections, folder) for name, (stage, sections) in chosen.items()])
        found = {}
        for name, (_, sections) in chosen.items():
            replay(case(name, None, sections, local))
            found[name] = [_result(place / name) for place in (local, folder)]
        return found

    return lambda name: of(name in SHORT)[name]


def _result(path):
    weights, engine = (load_file(path.with_suffix(suffix)) for suffix in (".safetensors", ".engine.safetensors"))
    return {"rows": json.loads(path.read_text()), "weights": weights, "engine": engine}


@pytest.mark.parametrize("name", each(CASES))
def test_every_stage_and_teacher_ends_in_the_weights_of_one_process(results, name):
    local, zero = (result["weights"] for result in results(name))
    assert local.keys() == zero.keys()
    moved = 0.0
    for key, weight in local.items():
        # Adam's step is about lr whatever the gradient's size, so rounding of tiny gradients shows; 5e-5 is 1% of
        # what five steps of 1e-3 may do.
        torch.testing.assert_close(zero[key], weight, rtol=0, atol=5e-5, msg=lambda text, key=key: f"{key}: {text}")
        moved = max(moved, float(weight.abs().max()))
    assert moved > 0


@pytest.mark.parametrize("name", each(CASES))
def test_every_stage_and_teacher_measures_what_one_process_measures(results, name):
    local, zero = (result["rows"] for result in results(name))
    for one, two in zip(local, zero, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            if not key.startswith("time/"):
                assert _finite(two[key]) == pytest.approx(_finite(one[key]), rel=2e-4, abs=2e-6), key
    assert local[0]["train/loss"] != 0
    assert local[3]["tokens/trained"] == 0


def _finite(value):
    """DeepSpeed calls a norm infinite that is not a number."""
    return value if math.isfinite(value) else math.inf


@pytest.mark.parametrize("name", each(["srpo-2", "srpo-3"]))
def test_routed_counts_add_up_where_one_rank_has_only_successes(results, name):
    _, zero = results(name)
    right, mixed = 3 * 2, 3 * 2  # tasks times episodes of the ranks; of a mixed task one is right
    for row in zero["rows"][:2]:
        assert row["route/policy"] == right + mixed / 2
        assert row["route/distill"] == mixed / 2
        assert row["shown/demonstration"] == row["route/distill_share"] == 0.25
        assert row["signal/solved_groups"] == 1
    broken = zero["rows"][2]
    assert (broken["route/policy"], broken.get("route/distill")) == (right, None)


@pytest.mark.parametrize("name", each(name for name in CASES if name.endswith("-3")))
def test_the_engine_samples_from_the_weights_that_train(results, name, tmp_path):
    _, zero = results(name)
    assert zero["engine"].keys() == zero["weights"].keys()
    assert all(torch.equal(zero["engine"][key], weight) for key, weight in zero["weights"].items())


@pytest.mark.parametrize("name", each(name for name in CASES if name.startswith("spoiled")))
def test_a_step_by_gradients_of_one_rank_that_are_not_finite_is_not_taken(results, name):
    for result in results(name):
        assert [row["train/skipped"] for row in result["rows"]] == [0, 1, 0, 0, 0]
        assert all(weight.isfinite().all() for weight in result["weights"].values())
