"""The built-in reward functions, value by value."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.rewards import contains_answer, exact_match, f1, last_number, normalized_match, number_match


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


@pytest.mark.parametrize("function", [exact_match, normalized_match, f1, contains_answer, number_match])
@pytest.mark.parametrize("nothing", [None, "", " "])
def test_where_no_answer_stands_nobody_is_right(function, nothing):
    assert function(["None"], [nothing]) == function([""], [nothing]) == [None]


def test_an_empty_answer_is_contained_in_nothing():
    assert contains_answer(["anything"], answer=[" "]) == [None]


def test_an_answer_may_hold_signs_that_patterns_use():
    assert contains_answer(["it is (a+b)*", "it is aab"], answer=["(a+b)*", "a+b"]) == [1.0, 0.0]


@pytest.mark.parametrize("function", [exact_match, normalized_match, contains_answer, number_match, f1])
def test_messages_count_as_their_contents(function):
    assert function([[{"role": "assistant", "content": "12"}]], answer=["12"]) == [1.0]


@pytest.mark.parametrize("function", [exact_match, normalized_match, contains_answer, number_match, f1])
def test_lists_of_different_lengths_are_refused(function):
    with pytest.raises(ValueError, match="zip"):
        function(["1", "2"], answer=["1"])


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        ("The  Eiffel-Tower!", "eiffeltower", 1.0),
        ("the cat", "A cat.", 1.0),
        ("STRASSE", "straße", 1.0),
        ("cats", "cat", 0.0),
        ("theatre", "atre", 0.0),
        ("Rome", ["Paris", "Rome"], 1.0),
        ("Rome", ["Paris", "Oslo"], 0.0),
        ("42", 42, 1.0),
        ("anything", "the ...", None),
        ("anything", [], None),
    ],
)
def test_a_normalised_match_ignores_case_articles_and_punctuation(completion, answer, right):
    assert normalized_match([completion], answer=[answer]) == [right]


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("the quick brown fox", "A quick fox!", 0.8),  # 2 of 3 words, 2 of 2
        ("fox fox", "fox", 2 / 3),
        ("fox", "fox fox", 2 / 3),
        ("dog", "fox", 0.0),
        ("", "fox", 0.0),
        ("fox", ["dog", "the red fox"], 2 / 3),
        ("fox", "the", None),
    ],
)
def test_f1_counts_the_words_that_both_have(completion, answer, score):
    assert f1([completion], answer=[answer]) == [pytest.approx(score) if score is not None else None]


@given(st.text(), st.text())
def test_f1_is_a_share_that_does_not_depend_on_who_is_right(one, other):
    forwards, backwards = f1([one], answer=[other])[0], f1([other], answer=[one])[0]
    assert None in (forwards, backwards) or (forwards == backwards and 0 <= forwards <= 1)


@pytest.mark.parametrize("function", [exact_match, normalized_match, contains_answer, number_match, f1])
def test_a_thought_is_no_part_of_the_answer(function):
    assert function(["<think>12</think> 13", "12</think>13", "<think>13</think>12"], answer=["12"] * 3) == [0, 0, 1]
