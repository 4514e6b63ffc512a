"""What DeepSpeed would stumble over is said ahead of a run, by its key; what it takes is let pass."""

import json

import deepspeed
import pytest
import yaml
from deepspeed.accelerator import get_accelerator

from opd.errors import ConfigError
from opd.launch.checks.deepspeed import check_deepspeed
from opd.launch.checks.loading import config_from


def check(data):
    settings = {"method": "opsd", "model": "tiny:lookup", "env": "opd/Lookup-v0", "opsd": {"privileged": "plan"}}
    data = yaml.safe_load(data) if isinstance(data, str) else data
    check_deepspeed(config_from(settings | {"backend": "deepspeed", "deepspeed": data}), source="run.yaml")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{zero_optimisation: {stage: 3}}", r"zero_optimisation is unknown .* Did you mean \"zero_optimization\""),
        ("{zero_optimization: {overlap_com: true}}", r"zero_optimization.overlap_com is unknown .* \"overlap_comm\""),
        ("{zero_optimization: {stage: 3, offload_param: {devise: cpu}}}", r"offload_param.devise is unknown .*device"),
        ("{zero_optimization: {stage: 3, offload_param: {device: gpu}}}", r"device = \"gpu\" is not possible: .*nvme"),
        ("{zero_optimization: {reduce_bucket_size: x}}", r"zero_optimization.reduce_bucket_size = \"x\" is not"),
        ("{zero_optimization: {stage: 2, offload_param: {device: cpu}}}", "no effect with .*stage = 2. Set that to 3"),
        ("{zero_optimization: {stage: 0, offload_optimizer: {device: cpu}}}", "Set that to 1, 2 or 3"),
        ("{fp16: {loss_scale: x}}", r"fp16.loss_scale = \"x\" is not possible"),
        ("{amp: {enabled: true}}", "is refused by DeepSpeed .*AMP integration has been removed"),
        ("{aio: {blocksize: 1}}", r"aio.blocksize is unknown .* Did you mean \"block_size\""),
        ("{optimizer: {type: AdamW}}", r"optimizer.params.lr is missing.* Set \"lr\": \"auto\""),
        ("{optimizer: {type: AdamWW, params: {lr: 1}}}", r"optimizer.type = \"AdamWW\" is neither .* \"AdamW\""),
        ("{optimizer: {type: AdamW, parameters: {}}}", r"optimizer.parameters is unknown .* \"params\""),
        ("{optimizer: {type: AdamW, params: {lr: 1, beta: 1}}}", r"params.beta is unknown to AdamW.* \"betas\""),
        ("{optimizer: {type: AdamW, params: {lr: -1}}}", r"optimizer.params = {\"lr\": -1} is refused: Invalid learn"),
        ("{optimizer: {type: SGD, params: {lr: 1, momentums: 1}}}", "refused: .*unexpected keyword .*momentums"),
        ("{scheduler: {type: WarmupLr}}", r"scheduler.type = \"WarmupLr\" is neither .* \"WarmupLR\""),
        (
            "{scheduler: {type: WarmupLR, params: {warm: 1}}}",
            "scheduler.params = .* unexpected keyword argument 'warm'",
        ),
    ],
)
def test_what_deepspeed_would_stumble_over_is_named_with_the_mend(data, message):
    with pytest.raises(ConfigError, match=rf"^run.yaml: deepspeed.*{message}"):
        check(data)


def test_every_problem_has_a_line_of_its_own():
    with pytest.raises(ConfigError) as raised:
        check("{steps: 1, optimizer: {type: Sgd, params: {}}}")
    assert [line.split()[1] for line in str(raised.value).splitlines()] == [
        "deepspeed.steps",
        "deepspeed.optimizer.type",
    ]


@pytest.mark.parametrize("data", ["zero2", "zero3", "zero3_offload"])
def test_the_ready_files_pass(data):
    check(data)


@pytest.mark.parametrize(
    "data",
    [
        "{_comment: ours, steps_per_print: 10, wall_clock_breakdown: false, communication_data_type: fp32}",
        "{prescale_gradients: false, aio: {queue_depth: 8}, autotuning: {enabled: false}}",
        "{flops_profiler: {enabled: false, profile_step: 1}, tensorboard: {enabled: false}, dump_state: false}",
        "{comms_logger: {enabled: false}, checkpoint: {tag_validation: Warn}, data_types: {grad_accum_dtype: fp32}}",
        "{activation_checkpointing: {partition_activations: false, number_checkpoints: null}}",
        "{fp16: {enabled: auto, loss_scale: 0, loss_scale_window: 1000, initial_scale_power: 16, hysteresis: 2}}",
        "{optimizer: {type: AdamW, params: {lr: auto, betas: auto, eps: auto, weight_decay: auto, torch_adam: true}}}",
        "{optimizer: {type: Lion, params: {lr: auto}}, scheduler: null}",
        "{optimizer: {type: SGD, params: {lr: 0.1, momentum: 0.9}}, scheduler: {type: StepLR, params: {step_size: 3}}}",
        "{scheduler: {type: WarmupDecayLR, params: {warmup_num_steps: auto, total_num_steps: auto}}}",
    ],
)
def test_what_deepspeed_takes_is_let_pass(data):
    check(data)


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_a_precision_that_the_device_lacks_is_refused_wherever_it_comes_from(name, monkeypatch):
    monkeypatch.setattr(get_accelerator(), f"is_{name}_supported", lambda: False)
    with pytest.raises(ConfigError, match=rf"deepspeed.{name}.enabled = true, but DeepSpeed has no {name} on this"):
        check({name: {"enabled": True}})
    check({name: {"enabled": False}})
    monkeypatch.setattr(get_accelerator(), f"is_{name}_supported", lambda: True)
    check({name: {"enabled": True}})


def offloaded(path):
    return {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": path}}}


@pytest.mark.parametrize(("path", "message"), [("/proc/here", "cannot be written"), (None, "nvme_path is missing")])
def test_an_offload_to_nowhere_is_refused(path, message):
    with pytest.raises(ConfigError, match=message):
        check(offloaded(path))


def test_an_offload_to_a_new_folder_needs_libaio_and_makes_no_folder_yet(tmp_path, monkeypatch):
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "async_io", False)
    with pytest.raises(ConfigError, match="device = nvme needs libaio"):
        check(offloaded(str(tmp_path / "a" / "b")))
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "async_io", True)
    check(offloaded(str(tmp_path / "a" / "b")))
    assert not (tmp_path / "a").exists()


def test_the_users_settings_are_as_they_were_after_the_check():
    data = {"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}
    before = json.dumps(data)
    check(data)
    assert json.dumps(data) == before
