"""When two tokenizers are one, and when two models are."""

import copy
import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from opd.errors import ModelError
from opd.models.causal import CausalModel
from opd.models.identity import (
    check_same_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
    weights_fingerprint,
)


def changed(tokenizer, change):
    """The same tokenizer after `change` of its JSON."""
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    change(data)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=tokenizer.chat_template,
    )


def swap_two_words(data):
    vocabulary = data["model"]["vocab"]
    vocabulary["on"], vocabulary["er"] = vocabulary["er"], vocabulary["on"]


def make_plain(data):
    """`<think>` becomes a special token, which decoding leaves out."""
    next(token for token in data["added_tokens"] if token["content"] == "<think>")["special"] = True


def test_a_tokenizer_that_was_saved_and_loaded_is_the_same_whatever_it_ends_with_and_renders(make_tokenizer, tmp_path):
    ours = make_tokenizer()
    ours.save_pretrained(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.eos_token = "<|endoftext|>"
    theirs.chat_template = make_tokenizer("no_tools").chat_template
    check_same_tokenizer(ours, theirs, names=("a", "b"))
    assert tokenizer_fingerprint(ours) == tokenizer_fingerprint(theirs)
    assert template_fingerprint(ours, {}) != template_fingerprint(theirs, {})
    assert template_fingerprint(ours, {}) != template_fingerprint(ours, {"enable_thinking": False})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swap_two_words, "vocabulary: 273 entries of the student, 273 of the teacher"),
        (make_plain, r"added tokens: .* '<think>' is \[269, False\] to the one, \[269, True\] to the other"),
        (lambda data: data["model"]["merges"].reverse(), "other merges"),
        (lambda data: data["pre_tokenizer"].update(add_prefix_space=True), "other pre-tokeniser"),
        (lambda data: data.update(normalizer={"type": "NFC"}), "other normaliser"),
    ],
)
def test_a_tokenizer_that_differs_in_anything_that_matters_is_refused_by_name(make_tokenizer, change, message):
    ours = make_tokenizer()
    theirs = changed(ours, change)
    with pytest.raises(ModelError, match=message) as error:
        check_same_tokenizer(ours, theirs, names=("models/small", "models/large"))
    for word in ("models/small", "models/large", tokenizer_fingerprint(ours), tokenizer_fingerprint(theirs)):
        assert word in str(error.value)


def test_a_teacher_that_knows_one_token_more_is_refused(make_tokenizer):
    ours, theirs = make_tokenizer(), copy.deepcopy(make_tokenizer())
    theirs.add_tokens([AddedToken("<more>", special=False)])
    with pytest.raises(ModelError, match="'<more>' is unknown to the one, 273 to the other"):
        check_same_tokenizer(ours, theirs, names=("a", "b"))


def test_the_fingerprint_of_weights_changes_with_one_value_and_with_the_type(make_model, tmp_path):
    model = make_model()
    before = weights_fingerprint(model)
    model.model.save_pretrained(tmp_path)
    assert weights_fingerprint(CausalModel(type(model.model).from_pretrained(tmp_path))) == before
    assert weights_fingerprint(make_model(dtype=torch.bfloat16)) != before
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    assert weights_fingerprint(model) != before
