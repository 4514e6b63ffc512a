"""The environment of the accidents: a turn takes a moment, and at a chosen call something happens.

What happens is told by variables of the environment, so that the settings are those of a run to which nothing happens.
"""

import os
import resource
import sys
import threading
import time

import gymnasium

from opd.envs import TextSpace


class AccidentEnv(gymnasium.Env):
    """One turn, right by its length. ACCIDENT_HOW happens at the step call number ACCIDENT_AT of this process, from 1;
    each takes ACCIDENT_PAUSE seconds."""

    calls = 0
    lock = threading.Lock()

    def __init__(self, key=None):
        self.observation_space = self.action_space = TextSpace()
        self.pause = float(os.environ.get("ACCIDENT_PAUSE", 0))
        self.how, self.at = os.environ.get("ACCIDENT_HOW"), int(os.environ.get("ACCIDENT_AT", 1))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return f"Task {seed % 97}.", {"privileged": {"solution": f"Say {seed % 7}."}}

    def step(self, action):
        time.sleep(self.pause)
        with AccidentEnv.lock:
            AccidentEnv.calls += 1
            now = AccidentEnv.calls
        if self.how is not None and now == self.at:
            WAYS[self.how]()
        right = len(action) % 2 == 0
        return "", float(right), True, False, {"success": right}


def _raise(error):
    raise error


def _no_more_memory():
    """The process gets no more address space than it has, as where a container's limit is reached."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(),) * 2)


WAYS = {
    "raise": lambda: _raise(ValueError("no luck")),
    "memory": lambda: _raise(MemoryError()),
    "hang": lambda: time.sleep(3600),
    "exit": lambda: os._exit(7),
    "close stdout": lambda: sys.stdout.close(),
    "chdir": lambda: os.chdir("/"),
    "no more memory": _no_more_memory,
}
