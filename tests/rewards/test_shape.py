"""Rewards for format and length, value by value."""

import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trl.rewards import get_soft_overlong_punishment

from opd.errors import ConfigError
from opd.rewards import Length, Matches, SoftOverlong, Tags

ANY = st.text(max_size=30)


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        (r"<answer>.*</answer>", "<answer>\n4\n</answer>\n", 1.0),
        (r"<answer>.*</answer>", "So: <answer>4</answer>", 0.0),
        (r".*\d", "it is 4", 1.0),
        (r"\d", "it is 4", 0.0),
        ("", "", 1.0),
    ],
)
def test_a_pattern_matches_the_whole_completion(pattern, text, matches):
    assert Matches(pattern)([text]) == [matches]


def test_a_pattern_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"matches: pattern = '\(' is no regular expression"):
        Matches("(")


@pytest.mark.slow
def test_a_text_on_which_a_pattern_takes_for_ever_does_not_match_and_the_log_says_so(caplog):
    slow = Matches(r"(a|aa)+")
    since = time.monotonic()
    assert slow(["a" * 200 + "b", "aa"]) == [0.0, 1.0]
    assert time.monotonic() - since < 20
    assert "pattern = '(a|aa)+' took more than 2 s on the text 'aaaa" in caplog.text
    assert "avoid repeats inside repeats" in caplog.text


@pytest.mark.slow
def test_other_threads_run_while_a_pattern_takes_for_ever():
    ticks = []
    with ThreadPoolExecutor(1) as threads:
        late = threads.submit(Matches(r"(a|aa)+"), ["a" * 200 + "b"])
        while not late.done():
            ticks.append(time.monotonic())
            time.sleep(0.01)
    assert len(ticks) > 20


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think></think> so <answer>b</answer>.", 1.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a</think></answer><answer>", 0.0),
        ("<think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_tags_stand_once_each_and_in_order(text, right):
    assert Tags(["think", "answer"])([text]) == [right]


@given(ANY, ANY, ANY)
def test_tags_agree_with_a_regular_expression_where_no_tag_is_repeated(before, inside, after):
    text = f"{before}<a>{inside}</a>{after}"
    assert Tags("a")([text]) == [float(re.fullmatch(r".*<a>.*</a>.*", text, re.DOTALL) is not None)]


@pytest.mark.parametrize("tags", [[], [""], [3]])
def test_tags_need_names(tags):
    with pytest.raises(ConfigError, match="must name at least one tag"):
        Tags(tags)


def test_the_bounds_of_a_length_are_right_lengths():
    assert Length(2, 4)(["a", "ab", "abcd", "abcde"]) == [0.0, 1.0, 1.0, 0.0]
    assert Length(maximum=2, unit="words")(["a b", "a b c", ""]) == [1.0, 0.0, 1.0]
    assert Length(minimum=3)(["ab", "x" * 1_000_000]) == [0.0, 1.0]


def test_a_length_counts_what_messages_say():
    assert Length(2, 2)([[{"role": "assistant", "content": "ab"}]]) == [1.0]


@pytest.mark.parametrize("bounds", [(3, 2), (-1, 2)])
def test_a_length_that_none_can_have_is_refused(bounds):
    with pytest.raises(ConfigError, match="leave no length that is right"):
        Length(*bounds)


def test_the_soft_penalty_follows_equation_13_of_dapo():
    penalty = SoftOverlong(maximum=10, cache=4)
    assert penalty(["x" * n for n in (0, 6, 7, 8, 9, 10, 11, 1000)]) == [0.0, 0.0, -0.25, -0.5, -0.75, -1.0, -1.0, -1.0]


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 90))
def test_the_soft_penalty_is_that_of_trl_in_the_same_unit(maximum, cache, length):
    if cache > maximum:
        return
    theirs = get_soft_overlong_punishment(max_completion_len=maximum, soft_punish_cache=cache)
    assert SoftOverlong(maximum, cache)(["x" * length]) == pytest.approx(theirs(completion_ids=[[0] * length]))


def test_a_unit_that_is_none_is_refused():
    for make in (lambda: Length(unit="tokens"), lambda: SoftOverlong(2, 1, unit="tokens")):
        with pytest.raises(ConfigError, match=r"unit = 'tokens' is unknown. Allowed: characters, words"):
            make()
