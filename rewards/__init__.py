"""Reward functions in TRL's signature, and how several of them make one number.

A reward function is called as `f(prompts=..., completions=..., **columns)`, where each argument is a list with
one entry a completion, and returns a list of floats, or None where it cannot tell. A completion is a string, or
a list of messages when the prompts are messages. Functions written for TRL's trainers work as they are, except
those that need token ids.
"""

from opd.rewards.code import CodeTests, code_tests
from opd.rewards.functions import contains_answer, exact_match, last_number, number_match
from opd.rewards.rubric import BUILT_IN, Reward, RewardFunction, Rewards, Rubric, Score, resolve

__all__ = [
    "BUILT_IN",
    "CodeTests",
    "Reward",
    "RewardFunction",
    "Rewards",
    "Rubric",
    "Score",
    "code_tests",
    "contains_answer",
    "exact_match",
    "last_number",
    "number_match",
    "resolve",
]
