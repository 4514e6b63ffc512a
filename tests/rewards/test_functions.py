"""The built-in reward functions, value by value."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.rewards import contains_answer, exact_match, last_number, number_match


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("85", "85"),
        ("The answer is 85.", "85"),
        ("47 + 38 = 85", "85"),
        ("47-38", "38"),
        ("It is -9!", "-9"),
        ("x=-9", "-9"),
        ("\N{MINUS SIGN}9", "-9"),
        ("$1,250.50 in all", "1250.50"),
        ("1,250,000", "1250000"),
        ("1,2", "2"),
        ("12,3456", "3456"),
        ("3.14", "3.14"),
        (".5", "0.5"),
        ("so ...85", "85"),
        (r"\boxed{85}", "85"),
        ("**85**", "85"),
        ("_85_", "85"),
        ("85%", "85"),
        ("version v2", None),
        ("1.5.2", "1.5"),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


@given(st.text())
def test_no_text_makes_the_last_number_raise(text):
    last_number(text)


def test_numbers_match_by_value():
    completions = ["It is 1,250.0", "1250 apples, no: 3", "no number", "1250"]
    assert number_match(completions, answer=["#### 1250"] * 4) == [1.0, 0.0, 0.0, 1.0]


def test_an_answer_without_a_number_cannot_be_matched():
    assert number_match(["3", "3"], answer=["three", 3]) == [None, 1.0]


def test_exact_match_ignores_outer_white_space_only():
    assert exact_match([" Paris\n", "paris", "Paris."], answer=["Paris"] * 3) == [1.0, 0.0, 0.0]


def test_contains_answer_looks_for_whole_words_in_any_case():
    completions = ["It's PARIS.", "Parisian", "paris", "in (Paris)"]
    assert contains_answer(completions, answer=["Paris"] * 4) == [1.0, 0.0, 1.0, 1.0]


def test_an_empty_answer_is_contained_in_nothing():
    assert contains_answer(["anything"], answer=[" "]) == [None]


def test_an_answer_may_hold_signs_that_patterns_use():
    assert contains_answer(["it is (a+b)*", "it is aab"], answer=["(a+b)*", "a+b"]) == [1.0, 0.0]


@pytest.mark.parametrize("function", [exact_match, contains_answer, number_match])
def test_messages_count_as_their_contents(function):
    assert function([[{"role": "assistant", "content": "12"}]], answer=["12"]) == [1.0]


@pytest.mark.parametrize("function", [exact_match, contains_answer, number_match])
def test_lists_of_different_lengths_are_refused(function):
    with pytest.raises(ValueError, match="zip"):
        function(["1", "2"], answer=["1"])
