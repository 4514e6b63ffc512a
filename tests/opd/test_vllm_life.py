"""How an engine in this process starts and ends: on the rank's own device, and in nobody's process groups.

The groups of torch and of vLLM belong to the process, so each test begins and ends without any. Ranks that are really
several are in `tests/zero/test_vllm_stages.py`. Not covered: a GPU; there, what is freed of a sleeping engine is known
from vLLM's sources alone.
"""

import gc
import os
import random
import sys
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from opd.engines import vllm_core, vllm_life
from opd.engines.base import Request, Sampling, generate
from opd.engines.vllm import VllmEngine
from opd.engines.vllm_core import Core
from opd.engines.weights import ModelWeights
from opd.episodes.config import RolloutConfig
from opd.errors import ConfigError, ModelError
from opd.launch.checks.loading import config_from
from opd.launch.run import build as building
from opd.launch.tiny.build import build_tiny

pytest.importorskip("vllm", reason="vLLM is not installed: make test installs its CPU build where there is no GPU")
pytestmark = pytest.mark.slow

SHAPE = {"tie_word_embeddings": True, "max_position_embeddings": 512, "head_dim": 32}


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(**SHAPE)


@pytest.fixture(autouse=True)
def alone():
    """A process without groups, before and after."""
    assert no_groups()
    yield
    gc.collect()
    left = dist.is_initialized()
    if left:
        dist.destroy_process_group()
    assert not left


@pytest.fixture
def others(tmp_path):
    """The default group as DeepSpeed would have made it, and one beside it, which end with the test."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


def none_of_vllms():
    """Whether vLLM, if it was ever imported, holds no group."""
    state = sys.modules.get("vllm.distributed.parallel_state")
    return state is None or (state._WORLD is None and state._TP is None)


def no_groups():
    return not dist.is_initialized() and none_of_vllms()


def works(group):
    """Whether a group and the default one can still be asked."""
    for each in (None, group):
        value = torch.ones(2)
        dist.all_reduce(value, group=each)
        assert value.tolist() == [1, 1]
    return none_of_vllms()


def started(model, **vllm):
    config = RolloutConfig(max_length=512, concurrency=8, vllm={"kv_cache_gib": 0.125} | vllm)
    return VllmEngine(model, config.vllm, config.limits)


def sampled(engine, model):
    engine.update_weights(ModelWeights(model), 0)
    engine.begin(Sampling(temperature=1.0), frozenset())
    [done] = generate(engine, [Request(session=0, prompt_ids=[7, 8, 9], seed=1, max_tokens=4)])
    return done.token_ids


@pytest.mark.long
def test_an_engine_that_made_its_own_group_leaves_none_and_another_may_follow(model):
    engine = started(model)
    assert dist.is_initialized()
    ids = sampled(engine, model)
    engine.close()
    assert no_groups()
    engine.close()
    second = started(model)
    assert sampled(second, model) == ids
    second.close()
    assert no_groups()


@pytest.mark.long
def test_groups_that_others_made_survive_every_engine_of_the_process(model, others):
    for _ in range(2):
        engine = started(model)
        assert len(sampled(engine, model)) == 4
        engine.close()
        engine.close()
        assert works(others)


@pytest.mark.long
def test_an_engine_that_nobody_closed_takes_its_groups_along_and_no_others(model, others):
    engine = started(model)
    sampled(engine, model)
    del engine
    gc.collect()
    assert works(others)


@pytest.mark.long
def test_an_engine_that_nobody_closed_and_that_made_its_own_group_leaves_none(model):
    engine = started(model)
    del engine
    gc.collect()
    assert no_groups()


@pytest.mark.long
def test_the_first_of_two_engines_that_ends_leaves_the_other_its_groups(model):
    first, second = started(model), started(model)
    ids = sampled(first, model)
    first.close()
    assert sampled(second, model) == ids
    second.close()
    assert no_groups()


BROKEN = {
    "by its settings": {"engine_args": {"max_num_batched_tokens": 1}},
    "when its groups are there already": {"kv_cache_gib": 1e-5},
}


@pytest.mark.parametrize("vllm", BROKEN.values(), ids=BROKEN)
def test_a_start_that_fails_leaves_no_group_of_its_own(model, vllm):
    with pytest.raises(ModelError, match=r"vLLM does not start with these settings of rollout.vllm: ."):
        started(model, **vllm)
    assert no_groups()


@pytest.mark.long
def test_an_engine_ends_also_where_somebody_has_ended_all_groups_before(model):
    engine = started(model)
    dist.destroy_process_group()
    engine.close()
    assert no_groups()


@pytest.mark.long
def test_a_start_that_fails_leaves_others_theirs_and_another_engine_its_own(model, others):
    with pytest.raises(ModelError, match="vLLM does not start"):
        started(model, kv_cache_gib=1e-5)
    assert works(others)
    engine = started(model)
    with pytest.raises(ModelError, match="vLLM does not start"):
        started(model, kv_cache_gib=1e-5)
    assert len(sampled(engine, model)) == 4
    engine.close()
    assert works(others)


def test_a_closed_engine_says_so(model):
    engine = started(model)
    sampled(engine, model)
    engine.submit(Request(session=0, prompt_ids=[7], seed=1, max_tokens=400))
    engine.close()  # in the middle of a request, as after an error
    engine.release(0)
    assert engine.step() == []
    calls = {
        "begin": (Sampling(temperature=1.0), frozenset()),
        "submit": (Request(session=1, prompt_ids=[7], seed=1, max_tokens=4),),
        "score": ([], []),
        "update_weights": ([], 1),
        "sleep": (),
    }
    for call, arguments in calls.items():
        with pytest.raises(RuntimeError, match=rf"{call}\(\) of an engine that is closed"):
            getattr(engine, call)(*arguments)


def test_an_engine_is_on_the_local_rank_that_the_launcher_gave_it(model, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    engine = started(model)
    assert engine._core.llm.model_executor.driver_worker.worker.local_rank == 3
    assert os.environ["LOCAL_RANK"] == "3"
    assert "RANK" not in os.environ
    engine.close()


@pytest.mark.long
def test_an_engine_starts_by_itself_under_a_launcher_whose_groups_nobody_made(model, monkeypatch):
    told = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"}
    told |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    engine = started(model)
    assert engine._core.llm.model_executor.driver_worker.worker.local_rank == 1
    assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert {name: os.environ[name] for name in told} == told
    engine.close()


@pytest.mark.long
def test_an_engine_split_over_two_workers_is_no_rank_of_the_trainers(model, others):
    whole, parts = started(model), started(model, tensor_parallel_size=2)
    assert sampled(parts, model) == sampled(whole, model)
    parts.close()
    whole.close()
    assert works(others)


@pytest.mark.parametrize(
    ("vllm", "named"),
    [
        ({"tensor_parallel_size": 2}, "tensor_parallel_size = 2"),
        ({"engine_args": {"tensor_parallel_size": 4}}, "tensor_parallel_size = 4"),
        ({"engine_args": {"pipeline_parallel_size": 2}}, "pipeline_parallel_size = 2"),
    ],
)
def test_an_engine_that_is_split_is_refused_beside_other_trainers(model, monkeypatch, vllm, named):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(ConfigError, match=rf"rollout.vllm.{named} in the process of one of 2 trainers .*vllm_server"):
        started(model, **vllm)
    monkeypatch.undo()


@pytest.mark.parametrize("error", [None, ValueError("broken")])
def test_the_current_gpu_is_put_back_also_after_an_error(monkeypatch, error):
    chosen = [5]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # of generators, there are none to keep
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    state = random.getstate()
    with suppress(ValueError), vllm_core._process_restored():
        torch.cuda.set_device(0)
        random.seed(0)
        if error:
            raise error
    assert torch.cuda.current_device() == 5
    assert random.getstate() == state


class _Engine:
    """What `end` asks of an engine."""

    def __init__(self, done, *, broken=""):
        self.done, self.broken, self.engine_core = done, broken, self

    def wake_up(self):
        self._do("wake_up")

    def shutdown(self):
        self._do("shutdown")

    def _do(self, call):
        self.done.append(call)
        if call == self.broken:
            raise RuntimeError(f"{call} failed")


@pytest.mark.parametrize("asleep", [set(), {"weights"}, {"weights", "kv_cache"}], ids=["nothing", "weights", "both"])
@pytest.mark.parametrize("broken", ["", "wake_up", "shutdown"])
def test_memory_that_sleeps_is_mapped_again_before_it_is_freed(monkeypatch, asleep, broken):
    done = []
    monkeypatch.setattr(vllm_life._groups, "engines", 1)
    monkeypatch.setattr(vllm_life, "_clean_up", lambda: done.append(f"clean up, {vllm_life._groups.engines} left"))
    expected = ["wake_up"] * bool(asleep) + ["shutdown", "clean up, 0 left"]
    if broken in expected:
        with pytest.raises(RuntimeError, match=f"{broken} failed"):
            vllm_life.end(_Engine(done, broken=broken), asleep)
    else:
        vllm_life.end(_Engine(done, broken=broken), asleep)
    assert done == expected


def test_an_engine_that_is_closed_in_its_sleep_is_woken_before_its_memory_is_freed(model, monkeypatch):
    told = []
    monkeypatch.setattr("opd.engines.vllm_core._start", lambda arguments: SimpleNamespace(sleep=lambda level: None))
    monkeypatch.setattr(vllm_life, "end", lambda engine, asleep: told.append(sorted(asleep)))
    core = Core(model, {}, sleeps=True)
    core.sleep()
    core.close()
    assert told == [["kv_cache", "weights"]]


# -- a run that does not come to be --------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has hardly been warm-started: nothing is sampled from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPD_CACHE", str(tmp_path_factory.mktemp("cache")))
        return str(build_tiny("lookup", steps=2, quiet=True))


@pytest.mark.parametrize("missing", ["make_teacher", "Loop", "Run", None])
def test_what_was_open_when_a_run_could_not_be_built_is_closed(folder, monkeypatch, missing):
    done = []

    class Quick:
        def __init__(self, model, config, limits):
            done.append("started")

        def close(self):
            done.append("closed")

    def broken(*_, **__):
        raise ModelError("no such thing")

    monkeypatch.setattr("opd.engines.vllm.VllmEngine", Quick)
    if missing:
        monkeypatch.setattr(building, missing, broken)
    rollout = {"engine": "vllm", "max_tokens": 8, "max_length": 64, "deterministic": False}
    data = {"method": "opsd", "model": folder, "env": "opd/Lookup-v0", "opsd": {"privileged": "plan"}}
    config = config_from(data | {"rollout": rollout})
    if missing:
        with pytest.raises(ModelError, match="no such thing"):
            building.build(config)
    else:
        run = building.build(config)
        assert done == ["started"]
        run.close()
    assert done == ["started", "closed"]
