"""The user's own DeepSpeed JSON: what is refused, what is filled in, and what is left alone."""

import json
import re

import pytest

from opd.backends.config import TrainConfig
from opd.backends.deepspeed_json import Facts, dtype, fill, offloads, read, ready, stage

TRAIN = TrainConfig(lr=3e-4, betas=(0.8, 0.9), weight_decay=0.1, max_grad_norm=0.7, warmup_steps=5)


def facts(**changes):
    values = {"total_steps": 40, "ranks": 4, "dtype": "bfloat16", "hidden_size": 100, "gpu": True}
    return Facts(**(values | changes))


@pytest.mark.parametrize(
    ("key", "ours"),
    [
        ("train_batch_size", "train.tasks_per_step"),
        ("train_micro_batch_size_per_gpu", "train.tokens_per_microbatch"),
        ("gradient_accumulation_steps", "train.tokens_per_microbatch"),
    ],
)
def test_a_batch_size_in_numbers_is_an_error_that_names_our_key(key, ours):
    with pytest.raises(ValueError, match=rf"{key} = 8 must be \"auto\" or absent: .*{re.escape(ours)}"):
        read({key: 8})
    assert read({key: "auto"}) == {key: "auto"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is not supported: only data parallelism"),
        ({"autotuning": {"enabled": True}}, "autotuning is not supported: it would choose batch sizes"),
        ({"zero_optimization": {"zenflow": {}}}, "zero_optimization.zenflow is not supported"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm is not supported"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op = 'sum' is not supported"),
        ({"gradient_clipping": -1}, "gradient_clipping = -1 must be"),
        ({"optimizer": {"params": {"lr": 1}}}, 'optimizer.type = null must be a name, such as "AdamW"'),
        ({"scheduler": {"type": "WarmupLR", "params": [1]}}, r"scheduler.params = \[1\] must be an object"),
        ({"zero_optimization": {"stage": 4}}, "stage = 4 must be 0, 1, 2 or 3"),
        ({"zero_optimization": 3}, "zero_optimization = 3 must be an object"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "both true"),
        ({"bf16": {"enabled": "yes"}}, "bf16.enabled = 'yes' must be true, false"),
    ],
)
def test_what_cannot_be_is_refused_by_name(data, message):
    with pytest.raises(ValueError, match=message):
        read(data)


def test_what_is_switched_off_or_null_is_as_if_it_were_not_there():
    off = {"autotuning": {"enabled": False}, "zero_optimization": {"mics_shard_size": -1}}
    assert read({**off, "optimizer": None, "train_batch_size": None}) == off


def test_a_file_that_is_no_json_object_is_refused_with_the_mend(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read .* or one of zero2, zero3, zero3_offload"):
        read("zero4")
    for text, message in (("{", "is not JSON"), ("[1]", "holds list"), ('{"a": 1, "a": 2}', "a stands there twice")):
        (tmp_path / "ds.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            read(str(tmp_path / "ds.json"))


def test_a_file_is_read_as_it_is(tmp_path):
    data = {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}
    (tmp_path / "ds.json").write_text(json.dumps(data))
    assert read(str(tmp_path / "ds.json")) == data


@pytest.mark.parametrize(
    ("name", "number", "offload"), [("zero2", 2, None), ("zero3", 3, None), ("zero3_offload", 3, "cpu")]
)
def test_the_ready_files_fill_without_an_auto_left(name, number, offload):
    data = read(name)
    assert set(ready()) == {"zero2", "zero3", "zero3_offload"}
    assert (stage(data), offloads(data, "optimizer"), offloads(data, "param")) == (number, offload, offload)
    assert "auto" not in json.dumps(fill(data, TRAIN, facts()).settings)


def test_a_silent_json_gets_batch_sizes_a_clip_and_an_optimiser_by_our_settings():
    filled = fill({}, TRAIN, facts())
    assert filled.settings == {
        "train_batch_size": 4,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.7,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 3e-4, "betas": [0.8, 0.9], "weight_decay": 0.1, "eps": 1e-8},
        },
    }
    assert "gradient_clipping = 0.7 (train.max_grad_norm)" in filled.notes


def test_numbers_of_the_users_stay_and_are_noted():
    own = {"gradient_clipping": 0.2, "optimizer": {"type": "Lion", "params": {"lr": "auto", "betas": [0.5, 0.6]}}}
    filled = fill(own, TRAIN, facts())
    assert filled.settings["gradient_clipping"] == 0.2
    assert filled.settings["optimizer"] == {"type": "Lion", "params": {"lr": 3e-4, "betas": [0.5, 0.6]}}
    assert "gradient_clipping = 0.2 (as your JSON says; train.max_grad_norm: 0.7 is not used)" in filled.notes
    assert own["optimizer"]["params"]["lr"] == "auto"  # the user's object is not written to


def test_a_scheduler_of_the_users_is_filled_from_ours():
    names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
    own = {"scheduler": {"type": "WarmupDecayLR", "params": dict.fromkeys(names, "auto")}}
    filled = fill(own, TRAIN, facts()).settings["scheduler"]["params"]
    assert filled == {"warmup_min_lr": 0, "warmup_max_lr": 3e-4, "warmup_num_steps": 5, "total_num_steps": 40}


def test_buckets_follow_from_the_models_width_or_are_left_to_deepspeed():
    keys = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")
    own = {"zero_optimization": {"stage": 3, **dict.fromkeys(keys, "auto")}}
    zero = fill(own, TRAIN, facts()).settings["zero_optimization"]
    assert [zero[key] for key in keys] == [10000, 9000, 1000]
    assert fill(own, TRAIN, facts(hidden_size=None)).settings["zero_optimization"] == {"stage": 3}


def test_an_auto_that_nothing_fills_is_an_error_that_says_where_it_stands():
    with pytest.raises(ValueError, match=r'zero_optimization.sub_group_size cannot be "auto"'):
        fill({"zero_optimization": {"stage": 3, "sub_group_size": "auto"}}, TRAIN, facts())


@pytest.mark.parametrize(
    ("data", "known", "own"),
    [
        ({}, {"gpu": False}, True),
        ({}, {"gpu": True}, None),
        ({}, {"gpu": True, "nvcc": False}, True),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, {"gpu": True, "nvcc": False}, None),
        ({"optimizer": {"type": "Lamb", "params": {}}}, {"gpu": True, "nvcc": False}, None),
    ],
)
def test_adam_is_torchs_own_where_deepspeeds_gains_nothing_or_cannot_be_compiled(data, known, own):
    assert fill(data, TRAIN, facts(**known)).settings["optimizer"]["params"].get("torch_adam") is own


@pytest.mark.parametrize(
    ("data", "decided"),
    [
        ({}, None),
        ({"bf16": {"enabled": "auto"}}, None),
        ({"bf16": {"enabled": True}}, "bfloat16"),
        ({"fp16": {"enabled": True}}, "float16"),
    ],
)
def test_the_json_decides_the_type_of_the_weights_only_where_it_says_so(data, decided):
    assert dtype(data) == decided


@pytest.mark.parametrize("name", ["/dev/zero", "."])
def test_what_is_no_file_is_not_read_to_its_end(name):
    with pytest.raises(ValueError, match=rf"^'{name}' is no file\. Name a DeepSpeed JSON file, or one of zero2"):
        read(name)


def test_brackets_beyond_what_json_reads_are_named(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"deep\.json' is not JSON"):
        read(str(tmp_path / "deep.json"))
