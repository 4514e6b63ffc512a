"""A whole user environment: guess a number in a few turns. `opd envs check examples.custom_env:GuessEnv`"""

import re

import gymnasium

from opd.envs import TextSpace


class GuessEnv(gymnasium.Env):
    def __init__(self, highest=20):
        self.observation_space = TextSpace()
        self.action_space = TextSpace()
        self.highest = highest

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(1, self.highest + 1))
        privileged = {"solution": f"The number is {self.number}."}
        return f"Guess my number, from 1 to {self.highest}.", {"privileged": privileged}

    def step(self, action):
        digits = re.findall(r"\d{1,9}", action)
        if not digits:
            return "Say a number.", 0.0, False, False, {"success": False, "feedback": "There was no number."}
        guess = int(digits[-1])
        if guess == self.number:
            return "Yes!", 1.0, True, False, {"success": True}
        hint = "Higher." if guess < self.number else "Lower."
        return hint, 0.0, False, False, {"success": False, "feedback": f"{guess} was wrong. {hint}"}
