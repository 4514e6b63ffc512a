"""Sizes and traffic of sharded runs, counted by hand; tests/zero holds them against real allocations."""

import importlib.util
from pathlib import Path

import pytest

from opd.episodes.config import RolloutConfig
from opd.launch.plan.memory import ModelSize
from opd.launch.plan.scaling import Sharding, Work, device_memory, host_memory, largest_layer, traffic
from opd.models.config import LoraConfig, ModelConfig
from opd.teachers.config import TeacherConfig

ROOT = Path(__file__).resolve().parents[2]
# 100 embeddings of width 10, and two layers of 300 weights: 1,600 in all.
SHAPES = {"model.embed_tokens.weight": (100, 10)}
for layer in range(2):
    SHAPES[f"model.layers.{layer}.q_proj.weight"] = (10, 10)
    SHAPES[f"model.layers.{layer}.up_proj.weight"] = (20, 10)
SIZE = ModelSize(shapes=SHAPES, layers=2, hidden=10, intermediate=20, key_value_width=5, vocabulary=100)


def work(dtype="bfloat16", teacher="frozen", *, embedded=True, lora=None):
    return Work(
        model=ModelConfig(name="x", dtype=dtype, lora=lora),
        rollout=RolloutConfig(concurrency=4, max_length=50, max_tokens=10),
        teacher=None
        if teacher is None
        else TeacherConfig(weights=teacher, rate=0.1 if teacher in ("ema", "trust_region") else None),
        tokens_per_microbatch=64,
        episodes=2,
        embedded=embedded,
        gpu=True,
    )


def memory(task, **sharding):
    parts = device_memory(SIZE, task, Sharding(**sharding))
    return {part.name: part.bytes for part in parts}


def test_zero_3_cuts_weights_gradients_optimiser_and_teacher():
    assert SIZE.parameters == 1600
    parts = memory(work(), stage=3, ranks=4)
    assert [parts[name] for name in ("weights", "gradients", "optimiser", "teacher")] == [800, 800, 4800, 800]
    assert parts["copy for rollouts"] == 3200
    assert parts["cache of rollouts"] == 2 * 50 * 2 * 2 * 5 * 2  # 2 of 6 episodes, keys and values, layers, width


@pytest.mark.parametrize(
    ("stage", "cut"), [(0, ()), (1, ("optimiser",)), (2, ("optimiser", "gradients"))], ids=["0", "1", "2"]
)
def test_lower_stages_cut_less(stage, cut):
    one, four = (memory(work(), stage=stage, ranks=ranks) for ranks in (1, 4))
    for name in ("weights", "gradients", "optimiser", "teacher"):
        assert four[name] == one[name] / (4 if name in cut else 1), name
    assert "copy for rollouts" not in four


def test_an_average_takes_twice_what_16_bit_weights_do_and_a_live_teacher_nothing():
    sizes = [memory(work(teacher=kind), stage=3, ranks=4)["teacher"] for kind in ("ema", "frozen", "live", None)]
    assert sizes == [1600, 800, 0, 0]


def test_only_adapters_have_gradients_moments_and_a_teacher():
    adapters = 2 * (4 * (10 + 10) + 4 * (20 + 10))
    parts = memory(work(lora=LoraConfig(r=4)), stage=3, ranks=4)
    assert parts["weights"] == (1600 + adapters) * 2 / 4
    assert parts["optimiser"] == adapters * 12 / 4
    assert parts["teacher"] == parts["gradients"] == adapters * 2 / 4


def test_what_is_gathered_is_two_layers_the_heads_and_the_heads_gradient():
    assert largest_layer(SIZE) == 1000  # the embedding
    parts = memory(work(), stage=3, ranks=4)
    assert parts["gathered"] == 4 * 1000 + 100 * 2 + 2 * 1000 * 2 + 2 * 1000 * 2


def test_a_trust_region_lays_two_heads_side_by_side_unless_no_head_trains_and_is_gathered_twice():
    for stage in (2, 3):
        one, both = (
            memory(work(teacher=kind), stage=stage, ranks=4)["gathered"] for kind in ("frozen", "trust_region")
        )
        assert both == one + 2 * 1000 * 2
    lora = LoraConfig(r=4)
    assert len({memory(work(teacher=t, lora=lora), stage=3, ranks=4)["gathered"] for t in ("ema", "trust_region")}) == 1
    sharding = Sharding(stage=3, ranks=4)
    sent = [traffic(SIZE, work(teacher=t), sharding, microbatches=3) for t in ("frozen", "trust_region")]
    one, two = ({part.name: part.bytes for part in parts}["teacher"] for parts in sent)
    assert two == 2 * one


def test_an_offload_moves_to_the_host():
    sharding = Sharding(stage=3, ranks=4, optimizer_on="cpu", weights_on="cpu")
    device = {part.name: part.bytes for part in device_memory(SIZE, work(), sharding)}
    host = {part.name: part.bytes for part in host_memory(SIZE, work(), sharding)}
    assert device["weights"] == device["optimiser"] == 0
    assert host == {"weights": 800, "optimiser": 4800}


def test_traffic_by_hand():
    def sent(stage, **changes):
        parts = traffic(SIZE, work(**changes), Sharding(stage=stage, ranks=4), microbatches=3)
        return {part.name: part.bytes for part in parts}

    whole = 3200 * 3 // 4
    assert sent(0) == {"gradients": 2 * whole}
    assert sent(1) == {"gradients": whole, "weights": whole}
    assert sent(2) == {"gradients": 3 * whole, "weights": whole}
    assert sent(3) == {"gradients": 3 * whole, "weights": 6 * whole, "teacher": 3 * whole, "engine": whole}
    assert sent(3, teacher=None, embedded=False) == {"gradients": 3 * whole, "weights": 6 * whole}
    assert traffic(SIZE, work(), Sharding(stage=3, ranks=1), microbatches=3) == []


def test_the_json_says_how_a_run_is_cut():
    data = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}}}
    assert Sharding.of(data, 8) == Sharding(stage=2, ranks=8, bucket=7, optimizer_on="cpu")
    assert Sharding.of({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, 8).bucket is None
    assert Sharding.of({}, 8).bucket == 500_000_000


def test_the_tables_of_the_page_are_what_the_function_says():
    spec = importlib.util.spec_from_file_location("benchmark_scaling", ROOT / "benchmarks" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert module.table(embedded=False) in page
    assert module.table(embedded=True) in page
