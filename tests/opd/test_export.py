"""What an export holds beside the weights, that it is tried first and read back, and where it is written.

Not covered: tokenizers that are a repository's own code; models too large to be loaded twice, on a GPU.
"""

import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opd.errors import ModelError
from opd.models import export as module
from opd.models.config import LoraConfig, ModelConfig
from opd.models.loading import export, load, load_teacher, smollm2_folder

SINGLE = "model.safetensors"
PROMPT = torch.arange(5, 15)[None]


@pytest.fixture
def base(tmp_path, make_model, make_tokenizer):
    """`base(generation, **config)`: a folder with these generation settings, or without the file for None."""

    def made(generation=(), **config):
        folder = tmp_path / "base"
        make_model(**config).model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        if generation is None:
            (folder / "generation_config.json").unlink()
        else:
            text = json.dumps({"pad_token_id": 0, **dict(generation)}, indent=7)  # as nobody writes it
            (folder / "generation_config.json").write_text(text)
        return folder

    return made


def exported(folder, out, **settings):
    loaded = load(ModelConfig(name=str(folder), **settings))
    export(loaded, out)
    return loaded


def generated(folder):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [model.generate(PROMPT, max_new_tokens=12).tolist() for _ in range(2)]


GENERATION = {
    "nothing": {},
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.6, "top_k": 20},
    "greedy, with a temperature of 0": {"temperature": 0.0},
    "a nucleus without sampling": {"top_p": 0.8},
    "early stopping without beams": {"early_stopping": True},
    "a length penalty without beams": {"length_penalty": 2.0},
    "a key that nobody knows": {"my_own": [1, 2]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("generation", GENERATION.values(), ids=GENERATION)
def test_an_export_generates_as_its_base_does(base, tmp_path, generation):
    folder = base(generation)
    exported(folder, tmp_path / "export")
    exported(tmp_path / "export", tmp_path / "second")
    for out in (tmp_path / "export", tmp_path / "second"):
        assert (out / "generation_config.json").read_bytes() == (folder / "generation_config.json").read_bytes()
        assert generated(out) == generated(folder)


def test_the_models_own_generation_settings_stay_as_they_were(base, tmp_path):
    folder = base({"top_p": 0.8})
    loaded = exported(folder, tmp_path / "export")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.model.model.generation_config.to_dict() == plain.generation_config.to_dict()


def test_a_base_without_generation_settings_gives_those_of_its_config(base, tmp_path):
    folder = base(None, eos_token_id=7)
    exported(folder, tmp_path / "export")
    assert json.loads((tmp_path / "export" / "generation_config.json").read_text())["eos_token_id"] == 7
    assert generated(tmp_path / "export") == generated(folder)


def test_the_tokenizer_is_the_bases_own_byte_for_byte(base, tmp_path):
    folder = base()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"of_the_base": 1, "model_max_length": 99}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text('{"eos_token":   "<|im_end|>"}')
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "other.jinja").write_text("{{ messages }}")
    for other in ("README.md", "training_args.bin", "vocab.txt.orig", "optimizer.pt"):
        (folder / other).write_text("not for the export")
    exported(folder, tmp_path / "export")
    expected = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
                "additional_chat_templates/other.jinja", "generation_config.json"}  # fmt: skip
    written = {str(p.relative_to(tmp_path / "export")) for p in (tmp_path / "export").rglob("*") if p.is_file()}
    assert written == expected | {"config.json", SINGLE}
    for name in expected:
        assert (tmp_path / "export" / name).read_bytes() == (folder / name).read_bytes()


def test_a_linked_file_as_in_a_hubs_cache_is_copied(base, tmp_path):
    folder = base()
    (folder / "tokenizer.json").rename(tmp_path / "blob")
    (folder / "tokenizer.json").symlink_to(tmp_path / "blob")
    exported(folder, tmp_path / "export")
    assert not (tmp_path / "export" / "tokenizer.json").is_symlink()
    assert (tmp_path / "export" / "tokenizer.json").read_bytes() == (tmp_path / "blob").read_bytes()


def test_another_tokenizer_in_its_place_is_written_itself(base, tmp_path, make_tokenizer):
    loaded = load(ModelConfig(name=str(base())))
    loaded = type(loaded)(loaded.model, make_tokenizer("trimming"), loaded.stop_ids, loaded.base)
    export(loaded, tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export").chat_template == make_tokenizer("trimming").chat_template


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_smollm2_untrained_is_exported_as_it_was_and_served_by_vllm(tmp_path):
    source = smollm2_folder()
    export(load(ModelConfig(name="smollm2", dtype="float32")), tmp_path / "export")
    tokenizer = AutoTokenizer.from_pretrained(source)
    models = {f: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32) for f in (source, tmp_path / "export")}
    texts = []
    for question in ("What is 12 + 30?", "Why is the sky blue?", "Name three colours."):
        asked = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        one, other = (model.generate(ids, max_new_tokens=24).tolist() for model in models.values())
        assert one == other
        texts.append(one[0])
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed")
    settings = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    model = vllm.LLM(str(tmp_path / "export"), dtype="float32", max_model_len=128, max_num_seqs=4, enforce_eager=True,
                     skip_tokenizer_init=True, kv_cache_memory_bytes=2**28)  # fmt: skip
    for ids, made in zip(texts, model.generate([{"prompt_token_ids": ids} for ids in texts], settings), strict=True):
        with torch.no_grad():
            wanted = models[source](torch.tensor([ids])).logits[0].log_softmax(-1)
        for place, token in enumerate(ids[1:]):
            found = made.prompt_logprobs[place + 1][token].logprob
            assert found == pytest.approx(wanted[place, token].item(), abs=1e-3)
    model.llm_engine.engine_core.shutdown()


# -- tried before, and read back ----------------------------------------------------------------------


def test_what_cannot_be_exported_is_found_before_a_step_is_taken(base, monkeypatch, make_model):
    folder = str(base())

    def fails(*_, **__):
        raise ValueError("config says no")

    monkeypatch.setattr("transformers.LlamaConfig.save_pretrained", fails)
    with pytest.raises(ModelError, match=r"base' could be trained, but not exported: config says no\. Mend its"):
        load(ModelConfig(name=folder))
    load_teacher(ModelConfig(name=folder), make_model())  # what only teaches is never exported


def test_a_tokenizer_that_is_another_one_when_it_is_read_again_is_found_before(base, monkeypatch):
    real = module._write_beside

    def spoils(model, tokenizer, base, folder):
        real(model, tokenizer, base, folder)
        data = json.loads((folder / "tokenizer.json").read_text())
        data["pre_tokenizer"] = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
        (folder / "tokenizer.json").write_text(json.dumps(data))

    monkeypatch.setattr(module, "_write_beside", spoils)
    with pytest.raises(ModelError, match="not exported: its tokenizer cuts text in another way"):
        load(ModelConfig(name=str(base())))


def spoiled(edit):
    """A `save_pretrained` whose weights are edited once they are written."""
    real = PreTrainedModel.save_pretrained

    def saves(self, folder, **options):
        real(self, folder, **options)
        save_file(edit(load_file(folder / SINGLE)), folder / SINGLE, metadata={"format": "pt"})

    return saves


AGAIN = "loaded again, its log-probs of a short text differ by"
Q = "model.layers.0.self_attn.q_proj.weight"
SPOILED = {
    "a tensor gone": (lambda t: {n: v for n, v in t.items() if n != Q}, rf"it lacks 1 tensor \({Q}\)"),
    "one more": (lambda t: t | {"more": torch.ones(2)}, r"it has too much 1 tensor \(more\)"),
    "another name": (lambda t: {f"model.{n}": v for n, v in t.items()}, r"it lacks \d+ tensors"),
    "another shape": (lambda t: t | {Q: t[Q][:4].clone()}, rf"it has another shape or type of 1 tensor \({Q}\)"),
    "another type": (lambda t: t | {Q: t[Q].half()}, rf"it has another shape or type of 1 tensor \({Q}\)"),
    "another value": (lambda t: t | {Q: -t[Q]}, rf"{AGAIN} [\d.]+ nats"),
    "no numbers": (
        lambda t: t | {Q: t[Q] * torch.nan},
        rf"{AGAIN} nan nats",
    ),
}


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)], ids=["full", "lora"])
@pytest.mark.parametrize(("edit", "message"), SPOILED.values(), ids=SPOILED)
def test_an_export_that_is_not_the_model_is_refused_and_the_one_before_stays(
    base, tmp_path, monkeypatch, edit, message, lora
):
    loaded = exported(base(), tmp_path / "export", lora=lora)
    before = (tmp_path / "export" / SINGLE).read_bytes()
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoiled(edit))
    with pytest.raises(ModelError, match=rf"what was exported is not the model that was trained: {message}") as caught:
        export(loaded, tmp_path / "export")
    assert f"It lies in {tmp_path}/.export.partial" in str(caught.value)
    assert (tmp_path / "export" / SINGLE).read_bytes() == before


def test_weights_that_diverged_are_exported_as_they_are(base, tmp_path):
    loaded = load(ModelConfig(name=str(base())))
    with torch.no_grad():
        dict(loaded.model.model.named_parameters())[Q].fill_(torch.nan)
    export(loaded, tmp_path / "export")
    assert load_file(tmp_path / "export" / SINGLE)[Q].isnan().all()


def test_experts_go_out_under_the_names_that_they_came_in_with(tmp_path, make_tokenizer):
    config = Qwen3MoeConfig(vocab_size=273, hidden_size=16, intermediate_size=24, num_hidden_layers=2, head_dim=8,
                            num_attention_heads=2, num_key_value_heads=1, num_experts=4, num_experts_per_tok=2,
                            moe_intermediate_size=8, eos_token_id=None, bos_token_id=None)  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    exported(tmp_path / "base", tmp_path / "export")
    one, other = (load_file(tmp_path / name / SINGLE) for name in ("base", "export"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_model_too_large_to_be_loaded_twice_is_not_and_the_log_says_so(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with caplog.at_level(logging.INFO, logger="opd.models.export"):
        exported(base(), tmp_path / "export")
    assert "the export's log-probs are not compared with the model's: it has" in caplog.text


def test_reading_an_export_back_moves_no_random_number(base, tmp_path):
    loaded = load(ModelConfig(name=str(base())))
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    export(loaded, tmp_path / "export")
    assert torch.equal(torch.rand(3), expected)


# -- where it is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to nothing yet"])
def test_a_linked_export_is_written_through_its_link(base, tmp_path, there):
    disk, run = tmp_path / "disk", tmp_path / "run"
    run.mkdir()
    if there:
        disk.mkdir()
        (disk / "stale").touch()
    (run / "export").symlink_to(os.path.relpath(disk, run))
    for _ in range(2):
        exported(base(), run / "export")
        assert (run / "export").is_symlink()
        assert (disk / SINGLE).is_file()
        assert not (disk / "stale").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "disk", "run"]
    assert AutoConfig.from_pretrained(run / "export").model_type == "llama"
