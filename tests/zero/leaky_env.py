"""An environment that tells its keys to everybody: it prints and logs them, shows them, and raises with them."""

import logging
import os
import sys
from urllib.parse import quote

import gymnasium

from opd.envs import TextSpace

OWN = "sk-proj-Q7tyHardWrittenInTheCode99"


class LeakyEnv(gymnasium.Env):
    """Cannot be made without its keys; some of its steps break with a message that holds them all."""

    def __init__(self, api_key, endpoint):
        if f"{api_key} {endpoint}" != os.environ["OPD_TEST_EXPECTED"]:
            raise ValueError("these are not the keys")
        self.told = f"{api_key} {endpoint} {OWN}"
        self.observation_space = self.action_space = TextSpace()
        print("made with", self.told)
        print("made with", self.told, file=sys.stderr)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.broken = seed % 3 == 0
        logging.getLogger("leaky").warning("the key is %s", self.told)
        return f"Task {seed % 97}. {self.told}", {"privileged": {"solution": self.told}}

    def step(self, action):
        if self.broken:  # so long that the reason is cut within the key
            raise ConnectionError(f"GET https://host/v1?{quote(self.told)} {'x' * 340} {self.told}")
        return "", float(len(action) % 2), True, False, {"success": True, "feedback": self.told}
