"""The check finds each breach of the contract, and nothing in an environment that keeps it."""

import sys
import time

import gymnasium
import pytest

from opd.envs import TextSpace, check
from opd.errors import ConfigError

sys.modules["checker_fixtures"] = sys.modules[__name__]  # so that import paths find the classes below


class Good(gymnasium.Env):
    """Repeat a number."""

    metadata = {"render_modes": [], "tasks": {"train": None, "eval": None}}  # noqa: RUF012

    def __init__(self):
        self.observation_space = TextSpace()
        self.action_space = TextSpace()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        split = (options or {}).get("split", "train")
        self.number = 2 * int(self.np_random.integers(10**8, 10**9)) + (split == "eval")
        return f"Repeat {self.number}.", {"privileged": {"solution": f"Just write\n{self.number} again."}}

    def step(self, action):
        right = str(self.number) in action
        return "", float(right), True, False, {"success": right}


class Leaky(Good):
    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        return obs + info["privileged"]["solution"], info


class LeakyLater(Good):
    def step(self, action):
        _, reward, *rest, info = super().step(action)
        messages = [{"role": "user", "content": f"Hint: Just write\n{self.number} again."}]
        return "Hint.", reward, *rest, info | {"messages": messages}


class RareLeak(Good):
    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        return obs + (info["privileged"]["solution"] if self.number % 8 < 2 else ""), info


class ShortLeak(Good):
    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed, options=options)
        return obs, {"privileged": {"answer": str(self.number)}}


class Coincidence(Good):
    """A short answer that stands in a prompt now and then is no leak."""

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed, options=options)
        return f"{obs} Item {self.np_random.integers(4)}.", {"privileged": {"answer": str(self.number % 4)}}


class Forgetful(Good):
    """Tasks depend on those before, not on the seed alone."""

    count = 0

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        self.count += 1
        return f"{obs} Task {self.count}.", info


class Moody(Good):
    """The task follows from the seed; what a step answers, from how often one was taken."""

    count = 0

    def step(self, action):
        type(self).count += 1
        return f"{self.count}", 0.0, True, False, {}


class EndsTwice(Good):
    def step(self, action):
        return "", 0.0, True, True, {}


class SharedSplits(Good):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)


class OneTask(Good):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.number = 5 if (options or {}).get("split") == "eval" else 6
        return f"Repeat {self.number}.", {}


class IntFlag(Good):
    def step(self, action):
        return "", 0.0, 1, False, {}


class NanReward(Good):
    def step(self, action):
        return "", float("nan"), True, False, {}


class BadInfo(Good):
    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed, options=options)
        return obs, {"privileged": {"solution": 3}, "messages": ["hi"], "tools": [{"name": "get"}]}

    def step(self, action):
        return "", 0.0, True, False, {"success": "yes", "feedback": None, "rewards": {"a": float("nan")}}


class UnreadableInWords(Good):
    def step(self, action):
        *answer, info = super().step(action)
        return *answer, info | {"unreadable": "no"}


class BadTasks(Good):
    metadata = {"render_modes": [], "tasks": {"train": 0}}  # noqa: RUF012


class Unreachable(Good):
    metadata = {"render_modes": [], "tasks": {"train": 5}}  # noqa: RUF012

    def reset(self, *, seed=None, options=None):
        if (options or {}).get("index") == 3:
            raise LookupError("no row 3")
        return super().reset(seed=seed, options=options)


class Unseeded(Good):
    def reset(self, *, seed=None, options=None):
        self.number = time.perf_counter_ns()
        return f"Repeat {self.number}.", {}


class Slow(Good):
    def step(self, action):
        time.sleep(0.002)
        return super().step(action)


def findings(name):
    return [(finding.severity, finding.message) for finding in check(f"checker_fixtures:{name}")]


@pytest.mark.parametrize("name", ["Good", "Coincidence"])
def test_a_good_environment_gets_a_note_on_its_speed_and_nothing_else(name):
    [(severity, message)] = findings(name)
    assert severity == "note"
    assert message.startswith("a reset takes ")


@pytest.mark.parametrize(
    ("name", "severity", "reason"),
    [
        ("Leaky", "error", 'info["privileged"]["solution"] stands in the observations of 48 episodes'),
        ("LeakyLater", "error", 'info["privileged"]["solution"] stands in the observations of 48 episodes'),
        ("RareLeak", "error", 'info["privileged"]["solution"] stands in the observations of'),
        ("ShortLeak", "error", 'info["privileged"]["answer"] stands in the observations'),
        ("Forgetful", "error", "gave two different tasks"),
        ("Moody", "error", "the same actions had other answers (step 1); draw with self.np_random alone"),
        ("EndsTwice", "warning", "a step said terminated and truncated at once, and is taken for terminated"),
        ("SharedSplits", "error", "the splits train and eval share tasks, such as"),
        ("OneTask", "warning", "the 24 tasks of the train split that were looked at are one task"),
        ("IntFlag", "error", "step returned terminated = 1; it must be a bool"),
        ("NanReward", "error", "step returned reward = nan; it must be a finite number"),
        ("BadInfo", "error", "reset: info[\"privileged\"] = {'solution': 3} must be a dict of str to str"),
        ("BadInfo", "error", 'reset: info["messages"] = [\'hi\'] must be a list of dicts with "role" and "content"'),
        ("BadInfo", "error", 'reset: info["tools"] must be a list of {"type": "function"'),
        ("BadInfo", "error", "step: info[\"success\"] = 'yes' must be a bool"),
        ("BadInfo", "error", 'step: info["feedback"] = None must be a str'),
        ("BadInfo", "error", "step: info[\"rewards\"] = {'a': nan} must be a dict of str to finite numbers or None"),
        ("UnreadableInWords", "error", "step: info[\"unreadable\"] = 'no' must be a bool"),
        ("BadTasks", "error", 'metadata["tasks"]["train"] = 0 must be a number of tasks, or None for unlimited'),
        ("Unreachable", "error", "an episode raised LookupError: no row 3"),
        ("Unseeded", "error", "gymnasium's check_env: "),
    ],
)
def test_each_breach_is_found(name, severity, reason):
    assert any(found == severity and reason in message for found, message in findings(name))


def test_a_slow_environment_is_remarked_on(monkeypatch):
    monkeypatch.setattr("opd.envs.checker._SLOW", 0.001)
    assert any(s == "warning" and m.startswith("the slowest reset or step took 0.0") for s, m in findings("Slow"))


def test_a_warning_of_gymnasium_is_passed_on_without_its_colours():
    messages = [message for severity, message in findings("IntFlag") if severity == "warning"]
    assert any("Expects `terminated` signal to be a boolean" in message for message in messages)
    assert not any("\x1b" in message for message in messages)


def test_what_cannot_be_made_is_no_finding_but_an_error():
    with pytest.raises(ConfigError, match="has no attribute 'Missing'"):
        check("checker_fixtures:Missing")
