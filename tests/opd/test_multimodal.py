"""The language model of a composite checkpoint trains by itself, and all else goes into the export as it was.

The oracle is transformers' own class, from whose configurations `tests/composites.py` makes small models. Not covered:
checkpoints whose language model transformers builds by code of their repository; real weights.
"""

import json
import shutil
from contextlib import closing

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from opd.engines.base import Request, Sampling, generate
from opd.engines.config import Limits, VllmConfig
from opd.engines.transformers import TransformersEngine
from opd.engines.vllm import VllmEngine
from opd.engines.weights import ModelWeights
from opd.errors import ModelError
from opd.models.causal import CausalModel
from opd.models.config import LoraConfig, ModelConfig
from opd.models.files import tensors_of
from opd.models.loading import export, load
from opd.models.multimodal import Elsewhere
from tests.composites import COMPOSITES, composite

SINGLE = "model.safetensors"
OTHER_SCALE = {"aya-vision", "cohere2-vision"}
"""Of these transformers' class leaves out the scale of the logits that their language model has by itself."""
IDS = torch.arange(5, 69)[None]

LOOKS_AHEAD = {"paligemma"}
every_composite = pytest.mark.parametrize("name", sorted(COMPOSITES.keys() - OTHER_SCALE - LOOKS_AHEAD))


@pytest.fixture
def base(tmp_path, make_tokenizer):
    """`base(name, **options of save_pretrained)`: a folder of a composite model, with the files of a processor."""

    def made(name, config=(), **options):
        folder = tmp_path / "base"
        composite(name, **dict(config)).save_pretrained(folder, **options)
        make_tokenizer().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"of_the_base":  1}')
        (folder / "video_preprocessor_config.json").write_text('{"of_the_base":  2}')
        return folder

    return made


def bits(folder):
    """The type and the bytes of each tensor in a folder, by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            found[name] = (tensor.dtype, tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return found


def log_probs(folder, dtype=torch.float32):
    """Of transformers' own class, from the architecture that the folder names."""
    [kind] = json.loads((folder / "config.json").read_text())["architectures"]
    model = getattr(transformers, kind).from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return kind, model(input_ids=IDS).logits.log_softmax(-1)


def own_log_probs(loaded):
    with torch.no_grad():
        return loaded.model.logits(loaded.model.hidden(IDS)).log_softmax(-1)


def update(loaded):
    """Take a step on every weight that trains."""
    trained = [p for p in loaded.model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    logits = loaded.model.logits(loaded.model.hidden(IDS))[0, :-1]
    torch.nn.functional.cross_entropy(logits, IDS[0, 1:]).backward()
    optimizer.step()
    optimizer.zero_grad()


@every_composite
def test_only_the_language_model_trains_and_all_else_is_exported_to_the_bit(base, tmp_path, name):
    folder = base(name)
    kind, before = log_probs(folder)
    assert kind == COMPOSITES[name][1]
    loaded = load(ModelConfig(name=str(folder)))
    torch.testing.assert_close(own_log_probs(loaded), before, rtol=0, atol=1e-5)
    towers = set(loaded.base.carried.tensors)
    assert towers
    assert any(isinstance(module, Elsewhere) for module in loaded.model.modules())

    export(loaded, tmp_path / "untrained")
    assert bits(tmp_path / "untrained") == bits(folder)
    update(loaded)
    export(loaded, tmp_path / "trained")
    one, other = bits(folder), bits(tmp_path / "trained")
    assert list(one) == list(other)
    changed = {tensor for tensor in one if one[tensor] != other[tensor]}
    assert changed
    assert changed.isdisjoint(towers)
    again, after = log_probs(tmp_path / "trained")
    assert again == kind
    torch.testing.assert_close(after, own_log_probs(loaded), rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-3
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        assert (tmp_path / "trained" / file).read_bytes() == (folder / file).read_bytes()
    assert "text_config" in json.loads((tmp_path / "trained" / "config.json").read_text())


@pytest.mark.parametrize("name", ["gemma3", "qwen2.5-vl", "llava"])
def test_adapters_are_laid_over_the_language_model_alone(base, tmp_path, name):
    folder = base(name)
    loaded = load(ModelConfig(name=str(folder), lora=LoraConfig(r=2)))
    with torch.no_grad():
        for weight, values in loaded.model.named_parameters():
            if "lora_B" in weight:
                values.fill_(0.1)
    export(loaded, tmp_path / "export")
    one, other = bits(folder), bits(tmp_path / "export")
    assert one.keys() == other.keys()
    changed = {tensor for tensor in one if one[tensor] != other[tensor]}
    assert changed
    assert changed.isdisjoint(loaded.base.carried.tensors)
    torch.testing.assert_close(log_probs(tmp_path / "export")[1], own_log_probs(loaded), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gemma3", "qwen3-vl", "qwen3.5"])
def test_the_files_of_an_export_are_those_of_its_base_and_towers_keep_their_type(base, tmp_path, name):
    folder = base(name, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for file in folder.glob("*.safetensors"):  # as the hub has them: 16 bits
        save_file({n: t.to(torch.bfloat16) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = load(ModelConfig(name=str(folder), dtype="float32"))
    export(loaded, tmp_path / "export")
    made = json.loads((tmp_path / "export" / "model.safetensors.index.json").read_text())
    assert made["weight_map"] == index["weight_map"]
    assert {f.name for f in folder.glob("*.safetensors")} == {f.name for f in (tmp_path / "export").glob("*.safe*rs")}
    one, other = bits(folder), bits(tmp_path / "export")
    assert made["metadata"]["total_size"] == sum(len(data) for _, data in other.values())
    for tensor, (dtype, data) in other.items():
        if tensor in loaded.base.carried.tensors:
            assert (dtype, data) == one[tensor]
        else:
            assert dtype == torch.float32
    for file in (tmp_path / "export").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def former(name):
    """Names of tensors as older checkpoints of the hub have them."""
    for new, old in (
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


@pytest.mark.parametrize("name", ["gemma3", "llava", "mistral3"])
def test_tensors_keep_the_names_that_an_older_checkpoint_gave_them(base, tmp_path, name):
    folder = base(name)
    weights = {former(tensor): values for tensor, values in load_file(folder / SINGLE).items()}
    assert any(tensor.startswith("language_model.model.") for tensor in weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    loaded = load(ModelConfig(name=str(folder)))
    update(loaded)
    export(loaded, tmp_path / "export")
    assert bits(tmp_path / "export").keys() == weights.keys()
    torch.testing.assert_close(log_probs(tmp_path / "export")[1], own_log_probs(loaded), rtol=0, atol=1e-5)


def test_a_tied_head_that_the_base_holds_once_more_is_trained_with_the_embeddings(tmp_path, base):
    folder = base("gemma3")
    weights = load_file(folder / SINGLE)
    [own] = [tensor for tensor in weights if tensor.endswith("embed_tokens.weight")]
    head = own.replace("model.embed_tokens", "lm_head")
    assert head not in weights
    embeddings = weights[own]
    save_file(weights | {head: embeddings.clone()}, folder / SINGLE, metadata={"format": "pt"})
    loaded = load(ModelConfig(name=str(folder)))
    update(loaded)
    export(loaded, tmp_path / "export")
    written = load_file(tmp_path / "export" / SINGLE)
    assert torch.equal(written[head], written[own])
    assert not torch.equal(written[head], embeddings)


def test_an_export_is_trained_and_exported_again(base, tmp_path):
    folder = base("qwen2.5-vl")
    export(load(ModelConfig(name=str(folder))), tmp_path / "one")
    loaded = load(ModelConfig(name=str(tmp_path / "one")))
    update(loaded)
    export(loaded, tmp_path / "one")  # over its own base
    assert bits(tmp_path / "one").keys() == bits(folder).keys()


@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "llava", "smolvlm"])
def test_the_embedded_engine_samples_from_the_language_model(base, name):
    loaded = load(ModelConfig(name=str(base(name))))
    engine = TransformersEngine(loaded.model)
    engine.begin(Sampling(temperature=1.0), frozenset())
    requests = [Request(session=n, prompt_ids=list(range(5, 20 + n)), max_tokens=12, seed=n) for n in range(3)]
    completions = {made.session: made for made in generate(engine, requests)}
    for request in requests:
        made = completions[request.session]
        ids = torch.tensor([request.prompt_ids + made.token_ids])
        with torch.no_grad():
            scored = loaded.model.logits(loaded.model.hidden(ids)).log_softmax(-1)[0]
        first = len(request.prompt_ids) - 1
        expected = [scored[first + n, token].item() for n, token in enumerate(made.token_ids)]
        assert made.logprobs == pytest.approx(expected, abs=1e-4)


# -- what is refused ----------------------------------------------------------------------------------


def refused(folder, **config):
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | config))
    with pytest.raises(ModelError) as caught:
        load(ModelConfig(name=str(folder)))
    return str(caught.value)


def test_a_class_that_transformers_does_not_know_is_refused_before_a_weight_is_read(base, monkeypatch):
    folder = base("llava")
    monkeypatch.setattr("opd.models.loading.load_whole", None)
    said = refused(folder, architectures=["LlavaLlamaForCausalLM"])
    assert "its architecture LlavaLlamaForCausalLM is no class of transformers" in said
    assert "Name a checkpoint of the language model by itself" in said


INSIDE = {
    "idefics": ("Idefics", "IdeficsForVisionText2Text", "stand inside the language model"),
    "florence2": ("Florence2", "Florence2ForConditionalGeneration", "it is an encoder with a decoder"),
    "pi0": ("PI0", "PI0ForConditionalGeneration", "stand inside the language model"),
}


@pytest.mark.parametrize(("config", "kind", "why"), INSIDE.values(), ids=INSIDE)
def test_a_language_model_that_is_not_apart_is_refused_before_a_weight_is_read(
    tmp_path, monkeypatch, make_tokenizer, config, kind, why
):
    made = getattr(transformers, f"{config}Config")()
    made.architectures = [kind]
    made.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    monkeypatch.setattr("opd.models.loading.load_whole", None)
    assert why in refused(tmp_path)


def test_a_base_that_has_changed_since_it_was_loaded_is_not_exported_from(base, tmp_path):
    folder = base("llava")
    loaded = load(ModelConfig(name=str(folder)))
    weights = load_file(folder / SINGLE)
    gone = next(tensor for tensor in loaded.base.carried.tensors)
    del weights[gone]
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"base no longer holds 1 tensor"):
        export(loaded, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_a_base_without_safetensors_is_refused(base):
    folder = base("llava")
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    assert "has no safetensors, and its other parts can be carried from these alone" in refused(folder)


@pytest.mark.parametrize("name", sorted(OTHER_SCALE))
def test_a_model_whose_class_scores_otherwise_than_its_config_says_is_refused(base, name):
    assert "computes its logits in a way that is not known here" in refused(base(name))


def test_a_language_model_that_was_saved_with_the_config_of_the_whole_stays_one(tmp_path, make_tokenizer):
    whole = composite("qwen3.5")
    text = transformers.Qwen3_5ForCausalLM(whole.config.text_config)
    text.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    whole.config.architectures = ["Qwen3_5ForCausalLM"]
    whole.config.save_pretrained(tmp_path)
    loaded = load(ModelConfig(name=str(tmp_path)))
    assert loaded.base.carried is None
    shutil.rmtree(tmp_path / "export", ignore_errors=True)
    export(loaded, tmp_path / "export")
    assert tensors_of("", tmp_path / "export").keys() == tensors_of("", tmp_path).keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "mistral3", "llava"])
def test_vllm_serves_the_language_model_from_the_config_of_the_whole(base, name):
    pytest.importorskip("vllm", reason="vLLM is not installed: make test installs its CPU build where there is no GPU")
    pytest.importorskip("torchvision", reason="vLLM's classes for images need torchvision")
    loaded = load(ModelConfig(name=str(base(name, {"head_dim": 32}))))
    with closing(VllmEngine(loaded.model, VllmConfig(kv_cache_gib=0.1), Limits(256, 8))) as engine:
        for _ in range(2):
            engine.update_weights(ModelWeights(loaded.model), 1)
            [scores] = engine.score([IDS[0].tolist()], [list(range(63))])
            own = own_log_probs(loaded)[0, :-1].gather(-1, IDS[0, 1:, None])[:, 0]
            torch.testing.assert_close(torch.as_tensor(scores.logprobs), own, rtol=0, atol=1e-4)
            update(loaded)


def test_a_model_whose_tokens_look_ahead_is_refused_by_its_config_and_by_what_it_computes(tmp_path, make_tokenizer):
    folder = tmp_path / "model"
    composite("paligemma").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match=r"is no language model that goes on from left to right"):
        load(ModelConfig(name=str(folder)))
    with pytest.raises(ModelError, match=r"PaliGemmaForConditionalGeneration is no language model that goes on"):
        CausalModel(composite("paligemma"))
