"""What rows show of a run that does not learn as it should, and when that is told."""

import logging
import re

import pytest

from opd.trainers.loop.health import Health
from opd.trainers.loop.symptoms import SYMPTOMS, remarks

WELL = {
    "rollout/episodes": 8.0,
    "rollout/cut_completions": 0.02,
    "rollout/unreadable": 0.1,
    "rollout/retried": 0.0,
    "end/max_turns": 0.1,
    "distill/nats": 0.02,
    "reward/success": 0.4,
    "tokens/trained": 100.0,
    "signal/zero": 0.0,
}
ILL = {
    "cut": (
        {"rollout/cut_completions": 0.92, "end/completion_cut": 1.0},
        "92% of the completions .* raise rollout.max_tokens",
    ),
    "full": ({"rollout/cut_completions": 0.6, "end/context_cut": 0.6}, "60% of the completions .* rollout.max_length"),
    "unreadable": ({"rollout/unreadable": 1.0}, "100% of the turns hold no call"),
    "turns": ({"end/max_turns": 0.7}, "70% of the episodes .* env.max_turns"),
    "time": ({"end/time": 0.5, "end/max_turns": 0.2}, "70% of the episodes .* rollout.episode_timeout"),
    "agrees": ({"distill/nats": 3e-6}, "agrees with the student .3.0e-06 nats"),
    "timeout": ({"failures/timeout": 3.0, "failures/raised": 1.0}, "fails in 50% .* timeout: rollout.reset_timeout"),
    "abstains": ({"reward/abstained/judge": 8.0}, "the reward judge had no score for any episode"),
}


def told(row):
    return [text for symptom in SYMPTOMS if (text := symptom.says(row))]


def test_a_run_that_is_well_is_silent():
    assert told(WELL) == []
    assert remarks([WELL] * 20) == []


@pytest.mark.parametrize(("change", "text"), ILL.values(), ids=ILL)
def test_each_symptom_is_told_in_one_sentence_with_the_setting_to_look_at(change, text):
    [said] = told(WELL | change)
    assert re.search(text, said)


def test_a_teacher_who_agrees_with_a_student_that_solves_all_is_no_symptom():
    assert told(WELL | {"distill/nats": 3e-6, "reward/success": 0.97}) == []


def test_a_reward_that_tells_of_some_episodes_is_no_symptom():
    assert told(WELL | {"reward/abstained/judge": 7.0, "reward/part/judge": 0.5}) == []


def test_a_symptom_is_told_once_it_has_stayed_and_again_much_later(caplog):
    health, ill = Health(), WELL | ILL["cut"][0]
    with caplog.at_level(logging.WARNING):
        for number, row in enumerate([ill, ill, WELL, *[ill] * 31]):
            health.warn(number, row)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(":")[0] for line in lines] == ["step 6 (3 in a row)", "step 33 (30 in a row)"]


def test_the_end_says_again_what_most_steps_or_the_last_ones_show():
    ill = WELL | ILL["unreadable"][0]
    assert remarks([ill] * 30 + [WELL] * 10)[0].startswith("in 30 of 40 steps: 100% of the turns")
    assert remarks([WELL] * 30 + [ill] * 10)[0].startswith("in 10 of 40 steps:")
    assert remarks([ill] * 10 + [WELL] * 30) == []
    assert remarks([]) == []
