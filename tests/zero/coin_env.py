"""For a model that can do nothing yet: whether its one answer is right depends on the answer's length."""

import gymnasium

from opd.envs import TextSpace


class CoinEnv(gymnasium.Env):
    def __init__(self):
        self.observation_space = self.action_space = TextSpace()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"Task {seed % 97}.", {}

    def step(self, action):
        right = len(action) % 2 == 0
        return "", float(right), True, False, {"success": right}
