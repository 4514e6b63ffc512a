"""What a model's config.json says of positions and attention is held against the run before a weight is read."""

import json
import struct

import pytest

from opd.errors import ConfigError
from opd.launch.checks.loading import config_from, model_to_serve
from opd.launch.checks.weights import check_weights, settings_of
from opd.models.description import attention_of, positions_of
from opd.models.gguf import positions_of_gguf


@pytest.fixture
def model(tmp_path):
    """`model(**config)`: a folder that passes for a model's, as far as its config.json goes."""

    def made(name="model", **config):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
        for file in ("tokenizer.json", "model.safetensors"):
            (folder / file).write_text("never read")
        return str(folder)

    return made


def settings(model, max_length=2048, **sections):
    rollout = {"max_tokens": 8, "max_length": max_length, **sections.pop("rollout", {})}
    run = {"method": "opsd", "env": "opd/Lookup-v0", "opsd": {"privileged": "plan"}, "train": {"steps": 1}}
    return run | {"model": model, "rollout": rollout} | sections


def problem(*given, **sections):
    with pytest.raises(ConfigError) as caught:
        config_from(settings(*given, **sections))
    return str(caught.value)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32768}
POSITIONS = {
    "Llama": ({"max_position_embeddings": 1024}, ("max_position_embeddings", 1024)),
    "GPT-2": ({"n_positions": 1024, "n_ctx": 512}, ("n_positions", 1024)),
    "MPT": ({"max_seq_len": 2048}, ("max_seq_len", 2048)),
    "a part for text": ({"text_config": {"max_position_embeddings": 64}}, ("max_position_embeddings", 64)),
    "linear": ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
    "YaRN": ({"max_position_embeddings": 32768, "rope_scaling": {"rope_type": "yarn", **YARN}}, 131072),
    "YaRN that is counted": ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "yarn", **YARN}},
                             ("max_position_embeddings", 131072)),
    "in transformers 5": ({"max_position_embeddings": 32768, "rope_parameters": {"rope_type": "yarn", **YARN}}, 131072),
    "by kind of layer": (
        {"max_position_embeddings": 100, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
        800,
    ),
    "Llama 3": ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
                ("max_position_embeddings", 131072)),
    "plain": ({"max_position_embeddings": 512, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
              ("max_position_embeddings", 512)),
    "no positions": ({"model_type": "mamba"}, None),
}  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), POSITIONS.values(), ids=POSITIONS)
def test_the_positions_that_a_model_knows_are_read(config, expected):
    if isinstance(expected, int):
        expected = ("max_position_embeddings with its rope scaling", expected)
    assert positions_of(config) == expected


@pytest.mark.parametrize("config", [{"max_position_embeddings": 1024}, {"n_positions": 1024, "model_type": "gpt2"}])
def test_longer_episodes_than_a_model_has_positions_are_refused(model, config):
    name = model(**config)
    said = problem(name, 1025)
    assert f'rollout.max_length = 1025 is more than the 1024 positions of model.name = "{name}" (config.json: ' in said
    assert "Set rollout.max_length to 1024 or less" in said
    config_from(settings(name, 1024))
    config_from(settings(name, 1025), check_machine=False)


def test_rope_scaling_makes_room(model):
    name = model(max_position_embeddings=1024, rope_scaling={"rope_type": "linear", "factor": 2.0})
    config_from(settings(name, 2048))
    assert "the 2048 positions of" in problem(name, 2049)


def test_a_teachers_positions_count_too(model):
    long, short = model("long", max_position_embeddings=4096), model("short", max_position_embeddings=512)
    run = settings(long) | {"method": "opd", "opd": {"teacher": {"weights": "external", "model": short}}}
    del run["opsd"]
    with pytest.raises(ConfigError) as caught:
        config_from(run)
    said = str(caught.value)
    assert f'the 512 positions of opd.teacher.model = "{short}"' in said


def test_a_model_of_the_shape_of_those_that_are_built_here_is_held_to_its_number(model):
    name = model(max_position_embeddings=1024, hidden_size=128, num_hidden_layers=3)
    assert "the 1024 positions of" in problem(name, 1025)
    config_from(settings("tiny:lookup", 4096))


def gguf(file, entries):
    """Write a GGUF file of these entries, each a key, the number of its type, and its bytes, and of no tensor."""
    text = lambda t: struct.pack("<Q", len(t)) + t.encode()  # noqa: E731
    body = b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in entries)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(entries)) + body)
    return str(file)


NAME = ("general.name", 8, struct.pack("<Q", 3) + b"abc")
NUMBERS = ("some.numbers", 9, struct.pack("<IQ3f", 6, 3, 1, 2, 3))
TEXTS = ("some.texts", 9, struct.pack("<IQQ2sQ", 8, 2, 2, b"ab", 0))
LENGTH = ("llama.context_length", 4, struct.pack("<I", 1024))


@pytest.mark.parametrize("entries", [[LENGTH], [NAME, NUMBERS, TEXTS, LENGTH, NAME]])
def test_the_positions_of_a_gguf_file_are_read(tmp_path, entries):
    name = gguf(tmp_path / "a.gguf", entries)
    assert positions_of_gguf(tmp_path / "a.gguf") == ("llama.context_length", 1024)
    said = problem(name, 1025)
    assert "1025 is more than the 1024 positions of model.name" in said
    assert "(context_length of its header)" in said
    config_from(settings(name, 1024))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"other", b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + b"\xff" * 9])
def test_a_gguf_file_that_says_nothing_bounds_nothing(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    assert positions_of_gguf(tmp_path / "a.gguf") is None


def test_what_is_served_is_held_to_the_positions_of_its_model(model):
    name = model(n_positions=1024)
    with pytest.raises(ConfigError, match=r"rollout\.max_length = 1025 is more than the 1024 positions of model\.name"):
        model_to_serve(name, {"rollout.max_length": 1025})
    assert model_to_serve(name, {"rollout.max_length": 1024})[1].max_length == 1024


@pytest.mark.parametrize(("key", "value"), [("dequantize", True), ("allow_missing", ["a"])])
def test_what_is_served_takes_no_setting_of_how_weights_are_loaded(model, key, value):
    with pytest.raises(ConfigError, match=f"model.{key} has no effect on vLLM"):
        model_to_serve(model(), {f"model.{key}": value, "rollout.max_length": 64})


# -- whose settings are whose -------------------------------------------------------------------------

FP8 = {"quantization_config": {"quant_method": "fp8"}}


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (FP8, {}, (True, False)),
        ({}, FP8, (False, True)),
        (FP8, FP8, (True, True)),
        ({}, {}, (True, True)),  # which loading refuses
    ],
)
def test_a_model_is_dequantised_where_it_is_quantised(model, student, teacher, expected):
    names = model("student", **student), model("teacher", **teacher)
    own = {"name": names[0], "dequantize": True, "allow_missing": ["a"]}
    run = settings(own) | {"method": "opd", "opd": {"teacher": {"weights": "external", "model": names[1]}}}
    del run["opsd"]
    config = config_from(run)
    assert tuple(settings_of(config, name).dequantize for name in names) == expected
    assert [settings_of(config, name).allow_missing for name in names] == [["a"], []]
    exported = settings_of(config, model("export"))
    assert (exported.dequantize, exported.allow_missing) == (not student and not teacher, [])


def test_a_config_that_cannot_be_read_is_left_to_the_loader(model, tmp_path):
    name = model()
    (tmp_path / "model" / "config.json").write_text("{")
    assert check_weights(config_from(settings(name)), read=True) == []


@pytest.mark.parametrize("nested", [False, True])
def test_attention_that_leaves_a_soft_cap_out_is_refused(model, nested):
    config = {"attn_logit_softcapping": 50.0}
    name = model(**({"text_config": config} if nested else config))
    said = problem({"name": name, "attention": "sdpa"})
    assert f"model.attention = sdpa leaves out the soft-cap of {name!r} (attn_logit_softcapping = 50.0)" in said
    for attention in ("auto", "eager"):
        config_from(settings({"name": name, "attention": attention}))
    config_from(settings({"name": model("plain", attn_logit_softcapping=None), "attention": "sdpa"}))


def test_the_attention_is_chosen_by_the_soft_cap():
    capped, plain = {"attn_logit_softcapping": 50.0}, {"attn_logit_softcapping": None}
    assert (attention_of("m", capped, "auto"), attention_of("m", plain, "auto")) == ("eager", None)
    assert attention_of("m", capped, "flex_attention") == "flex_attention"
    assert attention_of("m", plain, "sdpa") == "sdpa"


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_attention_without_a_mask_is_refused_for_the_embedded_engine(model, attention):
    given = {"name": model(), "attention": attention}
    said = problem(given)
    assert f"model.attention = {attention} does not work with rollout.engine = transformers" in said
    server = {"engine": "vllm_server", "vllm": {"servers": ["http://localhost:8000"]}}
    config_from(settings(given, rollout=server), check_machine=False)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "mamba"}, "layers of mamba keep a state of their own"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "it has layers of linear_attention, which keep"),
        ({"text_config": {"model_type": "qwen3_5_text"}}, "layers of qwen3_5_text keep a state of their own"),
        ({"model_type": "gpt_neo"}, "gpt_neo computes who sees whom by itself, for rows of one length"),
    ],
)
def test_layers_that_the_embedded_engine_cannot_run_are_refused_for_it_alone(model, config, reason):
    name = model(**config)
    said = problem(name)
    assert f'rollout.engine = transformers cannot generate with model.name = "{name}" (config.json): {reason}' in said
    assert "Set rollout.engine: vllm." in said
    server = {"engine": "vllm_server", "vllm": {"servers": ["http://localhost:8000"]}}
    config_from(settings(name, rollout=server))


@pytest.mark.parametrize("length", [128, 2048])
def test_windows_of_any_length_are_taken(model, length):
    for config in ({"sliding_window": 1024}, {"layer_types": ["chunked_attention"], "attention_chunk_size": 1024}):
        assert check_weights(config_from(settings(model(**config), length)), read=True) == []
