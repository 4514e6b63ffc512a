"""What a model's config.json says of positions and attention is held against the run before a weight is read."""

import json

import pytest

from opd.errors import ConfigError
from opd.launch.checks.loading import config_from
from opd.models.description import attention_of, positions_of


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


def test_models_that_are_built_here_are_not_held_to_their_number(model):
    config_from(settings("tiny:lookup"))
    shape = {"hidden_size": 128, "num_hidden_layers": 3}
    config_from(settings(model(max_position_embeddings=1024, **shape)))


def test_a_config_that_cannot_be_read_is_left_to_the_loader(model, tmp_path):
    name = model()
    (tmp_path / "model" / "config.json").write_text("{")
    config_from(settings(name))


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
