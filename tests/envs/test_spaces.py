"""TextSpace holds any text that UTF-8 can encode, and behaves as a gymnasium space."""

import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.envs.spaces import TextSpace, clean


@pytest.mark.parametrize("text", ["", " ", "\n\t", "é", "e\u0301", "漢字", "😀", "\0", "a" * 100_000, "عربى"])
def test_any_text_is_contained(text):
    assert text in TextSpace()


@pytest.mark.parametrize("other", [None, 3, b"bytes", ["a"], ("a",), "\ud83d", "a\udfffb"])
def test_what_is_no_encodable_text_is_not_contained(other):
    assert other not in TextSpace()


def test_longer_than_the_limit_is_not_contained():
    assert "abc" in TextSpace(max_length=3)
    assert "abcd" not in TextSpace(max_length=3)


def test_samples_are_contained_and_varied():
    space = TextSpace(max_length=20, seed=0)
    samples = [space.sample() for _ in range(300)]
    assert all(sample in space for sample in samples)
    assert "" in samples
    assert max(map(len, samples)) == 20
    assert any(not sample.isascii() for sample in samples)


def test_the_same_seed_samples_the_same():
    one, other = TextSpace(seed=5), TextSpace()
    other.seed(5)
    assert [one.sample() for _ in range(9)] == [other.sample() for _ in range(9)]
    assert [one.sample() for _ in range(9)] != [TextSpace(seed=6).sample() for _ in range(9)]


def test_a_mask_is_refused():
    with pytest.raises(ValueError, match="neither a mask nor a probability"):
        TextSpace().sample(mask=(3, None))


def test_a_negative_length_is_refused():
    with pytest.raises(ValueError, match=r"max_length = -1 must be 0 or more"):
        TextSpace(max_length=-1)


def test_spaces_are_equal_when_their_limits_are():
    assert TextSpace(max_length=3) == TextSpace(max_length=3, seed=1)
    assert TextSpace(max_length=3) != TextSpace(max_length=4)
    assert hash(TextSpace(max_length=3)) == hash(TextSpace(max_length=3))
    assert TextSpace() != "text"


def test_a_space_survives_pickling_with_its_random_state():
    space = TextSpace(seed=2)
    space.sample()
    copy = pickle.loads(pickle.dumps(space))
    assert copy == space
    assert copy.sample() == space.sample()


def test_samples_survive_json():
    space = TextSpace(seed=3)
    samples = [space.sample() for _ in range(20)]
    assert space.from_jsonable(json.loads(json.dumps(space.to_jsonable(samples)))) == samples


@given(st.text(st.characters(codec=None)))
def test_cleaning_gives_text_of_the_same_length_that_the_space_holds(text):
    assert clean(text) in TextSpace()
    assert len(clean(text)) == len(text)
