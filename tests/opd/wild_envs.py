"""Environments that misbehave in ways that only a process of their own survives; imported there by name."""

import ctypes
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium

from opd.envs import TextSpace
from opd.grading import grading


class WildEnv(gymnasium.Env):
    """Ends after `turns` steps with a reward; `misbehave(env, how)` may happen before a step answers."""

    def __init__(self, turns=2, log=None):
        self.observation_space = self.action_space = TextSpace()
        self.turns, self.log = turns, log

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.turn = seed, 0
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{os.getpid()}\n")
        return f"Task {seed % 97}.", {"privileged": {"solution": f"Say {seed % 7}."}}

    def step(self, action):
        self.turn += 1
        done = self.turn == self.turns
        return f"{self.seed % 97} the {self.turn} on", float(done), done, False, {}


class ActsOut(WildEnv):
    """Does what it is told at its first step when the task's seed is `bad`; with a `marker`, only the first time."""

    def __init__(self, how, bad, marker=None, **options):
        super().__init__(**options)
        self.how, self.bad, self.marker = how, bad, marker

    def step(self, action):
        answer = super().step(action)
        if self.seed != self.bad or self.turn != 1:
            return answer
        if self.marker and Path(self.marker).exists():
            return answer
        if self.marker:
            Path(self.marker).touch()
        return WAYS[self.how](answer)


class ChaosEnv(WildEnv):
    """Each step goes wrong with probability `share`, in one of `ways`; another way in every attempt."""

    def __init__(self, share, ways, **options):
        super().__init__(**options)
        self.share, self.ways = share, ways
        self.dice = random.Random(os.urandom(8))

    def step(self, action):
        answer = super().step(action)
        return WAYS[self.dice.choice(self.ways)](answer) if self.dice.random() < self.share else answer


class GradesSlowly(WildEnv):
    """Its last step grades for `seconds`."""

    def __init__(self, seconds, **options):
        super().__init__(**options)
        self.seconds = seconds

    def step(self, action):
        answer = super().step(action)
        if answer[2]:
            with grading():
                time.sleep(self.seconds)
        return answer


class LeavesChildren(WildEnv):
    """Starts processes that outlive it: one in its group, one in a session of its own."""

    def reset(self, **options):
        for detached in (False, True):
            subprocess.Popen(["sleep", "600"], start_new_session=detached)
            # The second one's parent ends at once, as a daemon's does.
            subprocess.run(["sh", "-c", "setsid sleep 600 & exit 0"], check=True)
        return super().reset(**options)


def _raise(error):
    raise error


def _hang(answer):
    time.sleep(600)


def _hang_deaf(answer):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        sum(range(10_000))  # holds the interpreter's lock most of the time


def _scribble(answer):
    for descriptor in range(3, 64):  # among them the connection
        try:
            os.write(descriptor, b"\xff" * 64)
        except OSError:
            continue
    return answer


WAYS = {
    "raise": lambda answer: _raise(ValueError("no luck")),
    "refuse": lambda answer: _raise(ConnectionRefusedError("nobody there")),
    "hang": _hang,
    "hang deaf": _hang_deaf,
    "bytes": lambda answer: (b"\xff\x00", *answer[1:]),
    "none": lambda answer: None,
    "huge": lambda answer: ("x" * 10_000_000, *answer[1:]),
    "nan": lambda answer: (answer[0], math.nan, *answer[2:]),
    "sys.exit": lambda answer: sys.exit(3),
    "exit": lambda answer: os._exit(7),
    "segfault": lambda answer: ctypes.string_at(0),
    "kill": lambda answer: os.kill(os.getpid(), signal.SIGKILL),
    "scribble": _scribble,
}


class Box:
    """Is an environment for TRL. With a `lock` it cannot be sent anywhere."""

    def __init__(self, lock=False):
        self.lock = threading.Lock() if lock else None

    def reset(self, **row):
        self.opened = 0

    def open(self, number: int) -> str:
        """Open the box.

        Args:
            number: the one on its lid.
        """
        self.opened += number
        return "open"


def most_opened(environments, **kwargs):
    """Reward the member of a group that opened the most."""
    best = max(env.opened for env in environments)
    return [float(env.opened == best) for env in environments]
