"""Holds reward functions in TRL's signature, and the rubric that makes one number of several of them.

A reward function is called as `f(prompts=..., completions=..., **columns)`, where each argument is a list with
one entry a completion, and returns a list of floats, or None where it cannot tell. A completion is a string, or
a list of messages when the prompts are messages. Functions written for TRL's trainers, async ones included, work
as they are, except those that need token ids. `docs/rewards.md` has the whole story.
"""

from opd.rewards.code import CodeTests, code_tests
from opd.rewards.functions import (
    contains_answer,
    exact_match,
    f1,
    last_number,
    last_tagged,
    normalized_match,
    number_match,
)
from opd.rewards.mathematics import MathVerify
from opd.rewards.rubric import BUILT_IN, Part, Reward, RewardFunction, Rewards, Rubric, Score, resolve
from opd.rewards.shape import Length, Matches, SoftOverlong, Tags
from opd.rewards.trainer import TrainerState

__all__ = [
    "BUILT_IN",
    "CodeTests",
    "Length",
    "Matches",
    "MathVerify",
    "Part",
    "Reward",
    "RewardFunction",
    "Rewards",
    "Rubric",
    "Score",
    "SoftOverlong",
    "Tags",
    "TrainerState",
    "code_tests",
    "contains_answer",
    "exact_match",
    "f1",
    "last_number",
    "last_tagged",
    "normalized_match",
    "number_match",
    "resolve",
]
