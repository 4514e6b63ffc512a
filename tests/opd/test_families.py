"""Each family's template renders through its tokenizer, and what its replies end in can be sampled."""

import importlib.util

import pytest
from jinja2.exceptions import TemplateError

from tests.families import FAMILIES, WRITTEN, Family, make_tokenizer, template

CONVERSATION = [
    {"role": "user", "content": "What is 6 times 7?"},
    {"role": "assistant", "content": "The answer is 42."},
    {"role": "user", "content": "And half of it?"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
KNOWS_NO_SYSTEM = {"gemma2"}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def tokenizer_of(family: Family):
    if template(family) is None:
        pytest.skip(f"the installed packages have no template {family.source}, so {family.name} is not tested")
    if family.kind == "sentencepiece":
        pytest.importorskip("mistral_common", reason="mistral_common, which carries the pieces, is not installed")
    return make_tokenizer(family)


@every_family
@pytest.mark.parametrize("first", [[], [SYSTEM]], ids=["no system", "system"])
def test_a_conversation_renders(family, first):
    tokenizer = tokenizer_of(family)
    if first and family.name in KNOWS_NO_SYSTEM:
        with pytest.raises(TemplateError, match=r"System role not supported"):
            tokenizer.apply_chat_template(first + CONVERSATION, tokenize=False)
        return
    text = tokenizer.apply_chat_template(first + CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert all(message["content"] in text for message in first + CONVERSATION)
    assert text.index("The answer is 42.") < text.index("And half of it?")


@every_family
def test_added_tokens_are_single_ids_with_the_flags_they_are_listed_with(family):
    tokenizer = tokenizer_of(family)
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    assert set(family.special) | set(family.markup) == set(added)
    assert all(added[text].special for text in family.special)
    assert not any(added[text].special for text in family.markup)
    for text in added:
        assert len(tokenizer.encode(text, add_special_tokens=False)) == 1
        assert len(tokenizer.encode(f"a{text}b", add_special_tokens=False)) >= 3
    dropped = tokenizer.decode(tokenizer.convert_tokens_to_ids(list(added)), skip_special_tokens=True)
    assert all((text in dropped) == (text in family.markup) for text in added)


@every_family
def test_ends_are_in_the_vocabulary_and_a_template_of_theirs_ends_a_turn(family):
    tokenizer = tokenizer_of(family)
    assert family.ends
    assert len(set(family.ends)) == len(family.ends)
    assert set(family.ends) <= set(family.special)
    assert {family.eos, family.bos or family.eos} <= set(family.special)
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    said = text.index("The answer is 42.") + len("The answer is 42.")
    assert any(end in text[said : text.index("And half of it?")] for end in (*family.ends, "<|end|>"))


@pytest.mark.parametrize(
    ("spaces", "pieces"), [("prepend", ["▁The", "▁end"]), ("first", ["▁The", "▁end"]), ("none", ["The", "▁end"])]
)
def test_a_sentencepiece_family_knows_words_and_any_character(spaces, pieces):
    family = next(family for family in FAMILIES.values() if family.kind == "sentencepiece" and family.spaces == spaces)
    tokenizer = tokenizer_of(family)
    assert tokenizer.tokenize("The end") == pieces
    for text in ("The end.\n\n  indented", "naïve 漢字 🦙 \x07"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_text_behind_a_special_token_gains_a_space_in_the_legacy_form_alone():
    behind = {}
    for name in ("llama2", "mistral-v0.3", "gemma2"):
        family = FAMILIES[name]
        tokenizer = tokenizer_of(family)
        behind[name] = tokenizer.convert_ids_to_tokens(tokenizer.encode(f"{family.eos}The", add_special_tokens=False))
    assert {name: pieces[-1] for name, pieces in behind.items()} == {
        "llama2": "▁The",
        "mistral-v0.3": "The",
        "gemma2": "The",
    }


def test_the_written_templates_are_all_in_use():
    used = {family.source for family in FAMILIES.values() if ":" not in family.source}
    assert used == {path.name for path in WRITTEN.iterdir()}


def test_most_families_are_there():
    present = [family.name for family in FAMILIES.values() if template(family) is not None]
    assert len(present) >= 26
    assert importlib.util.find_spec("trl"), "trl carries half of them"
