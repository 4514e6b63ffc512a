"""A tokenizer is what its own tokenizer.json says: byte-level files under classes that would build another one.

Not covered: tokenizers that are a repository's own code; hubs.
"""

import json
import logging

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from opd.models.chat import ChatFormat
from opd.models.check import check_text
from opd.models.config import ModelConfig
from opd.models.loading import export, load, load_tokenizer, tokenizer_file
from opd.models.tokenizers import SAMPLE, misbuilt_class, read_tokenizer

WRONG = ["LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer"]


@pytest.fixture
def base(tmp_path, make_model, make_tokenizer):
    """`base(cls)`: a model's folder whose tokenizer_config.json names this class for a byte-level tokenizer."""

    def made(cls):
        folder = tmp_path / "base"
        make_model().model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": cls}))
        return folder

    return made


def encoded(tokenizer, text=SAMPLE):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("cls", WRONG)
def test_a_tokenizer_does_what_its_file_says_whatever_class_is_named(base, cls, make_tokenizer, caplog):
    folder = base(cls)
    told = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(SAMPLE, add_special_tokens=False).ids
    assert encoded(AutoTokenizer.from_pretrained(folder)) != told  # what this is about
    with caplog.at_level(logging.WARNING, logger="opd.models.tokenizers"):
        found = read_tokenizer(str(folder))
    expected = make_tokenizer()
    assert encoded(found) == told == encoded(expected)
    assert found.decode(told) == SAMPLE
    assert found.chat_template == expected.chat_template
    assert (found.eos_token_id, found.pad_token_id) == (expected.eos_token_id, expected.pad_token_id)
    assert len(found) == len(expected)
    assert misbuilt_class(found) == type(AutoTokenizer.from_pretrained(folder)).__name__
    assert "is loaded as its tokenizer.json says" in caplog.text


def test_a_tokenizer_whose_class_fits_is_left_alone(base):
    found = read_tokenizer(str(base("PreTrainedTokenizerFast")))
    assert misbuilt_class(found) is None


def test_the_special_tokens_that_only_the_class_knows_are_kept(base, make_tokenizer):
    folder = base("LlamaTokenizerFast")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for name in ("eos_token", "pad_token"):
        del settings[name]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    file = json.loads((folder / "tokenizer.json").read_text().replace("<|endoftext|>", "</s>"))
    (folder / "tokenizer.json").write_text(json.dumps(file))
    found = read_tokenizer(str(folder))
    assert misbuilt_class(found) == "LlamaTokenizer"
    assert found.eos_token == "</s>"
    assert found.pad_token is None
    assert found.bos_token is None  # `<s>`, the class's own, is no token of this file


def test_the_check_says_in_whose_place_the_file_was_taken(base):
    config = ModelConfig(name=str(base("LlamaTokenizerFast")))
    tokenizer = load_tokenizer(config)
    report = check_text(tokenizer, lambda: ChatFormat(tokenizer), file=tokenizer_file(config))
    assert report.problems == []
    assert report.facts["as_its_file"]
    assert report.facts["round_trip"]
    said = dict(report.rows)["tokenizer"]
    assert said.endswith("as its file says, and not as LlamaTokenizer, which its tokenizer_config.json names")


def test_an_export_keeps_the_bases_files_and_cuts_text_as_the_base(base, tmp_path):
    folder = base("LlamaTokenizerFast")
    loaded = load(ModelConfig(name=str(folder)))
    out = tmp_path / "out"
    export(loaded, out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / file).read_bytes() == (folder / file).read_bytes()
    assert encoded(read_tokenizer(str(out))) == encoded(loaded.tokenizer)
    ids = torch.tensor([encoded(loaded.tokenizer)])
    assert torch.equal(load(ModelConfig(name=str(out))).model.model(ids).logits, loaded.model.model(ids).logits)
