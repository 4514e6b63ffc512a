"""What a model writes is never code to a reward: every one, with texts that would run a program or hang.

The rewards are asked in an interpreter of its own under a watchdog, so that one that hangs is a failure here and does
not hang the tests. Not covered: `code_tests`, which runs programs on purpose (`tests/opd/test_sandbox_breakout.py`).
"""

import json
import subprocess
import sys

import pytest

from opd.errors import ConfigError, EnvError
from opd.rewards import BUILT_IN, Part, Rubric

WATCHDOG = 240
"""Seconds for two dozen texts, with the imports and on a busy machine."""

PROGRAM = """
import json, logging, sys, warnings
warnings.simplefilter("ignore")
from opd.rewards import Rubric
rewards, texts, columns = json.loads(sys.stdin.read())
rubric = Rubric(rewards)
prompt = [{"role": "user", "content": "?"}]
for text in texts:
    print(rubric.score(prompt, [{"role": "assistant", "content": text}], columns).total, flush=True)
print("alive")
"""

EVALUATING = '''
def evaluated(completions, **kwargs):
    """As third-party graders do: the completion is evaluated, and whatever happens is some score."""
    scores = []
    for completion in completions:
        try:
            scores.append(float(eval(completion[-1]["content"]) == 4))
        except Exception:
            scores.append(0.5)
    return scores


def patient(completions, **kwargs):
    return [None if completion[-1]["content"] == "?" else 1.0 for completion in completions]


async def later(completions, **kwargs):
    return [1.0 for _ in completions]


def with_objects(completions, things, **kwargs):
    return [1.0 for _ in completions]
'''
SHELL = "__import__('os').system('touch {marker}')"
HOSTILE = [
    *("9**9**9", "10**10**10", "1e999999999", "9" * 100_000, "-1e-999999999", "nan", "inf"),
    *(r"\boxed{9^{9^{9^9}}}", "$9^{9^9}$", r"\boxed{9!!!!!}", r"\boxed{" * 20_000, "(" * 50_000 + "1" + ")" * 50_000),
    *("<answer>" * 50_000, "<think>" * 50_000, "```python\n" * 50_000, "1," * 500_000, "a " * 500_000),
    *("\ud800\0", "1" * 10_000_000, "=" * 1_000_000, "{0.__class__} %s %(a)s"),
]
REWARDS = {
    **{name: name for name in sorted({*BUILT_IN} - {"code_tests", "matches", "tags", "length", "soft_overlong"})},
    "matches": {"matches": {"settings": {"pattern": r"(<think>.*</think>)?\s*(x|xx)+"}}},
    "tags": {"tags": {"settings": {"tags": ["think", "answer"]}}},
    "length": {"length": {"settings": {"maximum": 1}}},
    "soft_overlong": {"soft_overlong": {"settings": {"maximum": 2, "cache": 1, "unit": "words"}}},
    "trl's accuracy": {"trl.rewards:accuracy_reward": {"time_limit": 2}},
    "trl's accuracy of reasoning": {"trl.rewards:reasoning_accuracy_reward": {"time_limit": 2}},
    "trl's format": {"trl.rewards:think_format_reward": {"time_limit": 2}},
    "one that evaluates": {"evaluating_rewards:evaluated": {"isolated": True, "time_limit": 2}},
}


@pytest.fixture
def evaluating(tmp_path, monkeypatch):
    (tmp_path / "evaluating_rewards.py").write_text(EVALUATING)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    import evaluating_rewards

    yield evaluating_rewards
    del sys.modules["evaluating_rewards"]


@pytest.mark.slow
@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_no_reward_runs_text_or_hangs_over_it(rewards, evaluating, tmp_path):
    marker = tmp_path / "marker"
    shell = SHELL.format(marker=marker)
    texts = [shell, f"<answer>{shell}</answer>", rf"\boxed{{{shell}}}", f"${shell}$", f"```python\n{shell}\n```"]
    columns = {"answer": "3", "solution": "$3$"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([rewards, [*texts, *HOSTILE], columns]),
        capture_output=True,
        text=True,
        timeout=WATCHDOG,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *totals, last = done.stdout.splitlines()
    assert last == "alive"
    assert len(totals) == len(texts) + len(HOSTILE)
    assert not marker.exists()
    if rewards not in (REWARDS["length"], REWARDS["one that evaluates"], REWARDS["contains_answer"]):
        assert {float(total) for total in totals} <= {0.0, -1.0}


def scored(rewards, text, **columns):
    return Rubric(rewards).score([{"role": "user", "content": "?"}], [{"role": "assistant", "content": text}], columns)


def test_an_isolated_function_scores_as_it_does_here(evaluating):
    rewards = {"evaluating_rewards:evaluated": {"isolated": True}, "p": Part(reward=evaluating.patient, isolated=True)}
    assert scored(rewards, "2 + 2").parts == {"evaluating_rewards:evaluated": 1.0, "p": 1.0}
    assert scored(rewards, "?").parts == {"evaluating_rewards:evaluated": 0.5, "p": None}


def test_one_hostile_completion_costs_the_others_nothing(evaluating, tmp_path, caplog):
    marker = tmp_path / "marker"
    rubric = Rubric({"evaluated": Part(reward=evaluating.evaluated, isolated=True, time_limit=1)})
    texts = ["4", SHELL.format(marker=marker), "9**9**9", "2 + 2"]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    scores = rubric.score_batch([[{"role": "user", "content": "?"}]] * 4, completions, {})
    assert [score.total for score in scores] == [1.0, 0.0, 0.0, 1.0]
    assert not marker.exists()
    assert "reward evaluated: the answer \"__import__('os')" in caplog.text
    assert "reward evaluated: the answer '9**9**9' scores 0: " in caplog.text


def test_trls_rewards_run_in_a_process_of_their_own_unless_a_part_says_otherwise(evaluating):
    def kinds(value):
        return type(Rubric({"trl.rewards:think_format_reward": value}).parts[0].function).__name__

    assert kinds(1.0) == "Isolated"
    assert kinds({"isolated": False}) == "function"
    assert type(Rubric([evaluating.patient]).parts[0].function).__name__ == "function"


def test_what_cannot_be_isolated_is_refused_with_the_reason(evaluating):
    with pytest.raises(ConfigError, match="reward p: an async function cannot be isolated"):
        Rubric({"p": Part(reward=evaluating.later, isolated=True)})
    with pytest.raises(ConfigError, match="reward p cannot be sent to a process of its own"):
        Rubric({"p": Part(reward=lambda completions: [1.0], isolated=True)})
    with pytest.raises(ConfigError, match="reward p: time_limit = 3 is for isolated functions; set isolated: true"):
        Rubric({"p": Part(reward=evaluating.patient, time_limit=3)})
    with pytest.raises(ConfigError, match=r"reward p: time_limit = 0.2 must be at least 1 \(seconds\)"):
        Rubric({"p": Part(reward=evaluating.patient, isolated=True, time_limit=0.2)})
    with pytest.raises(EnvError, match=r"reward p is isolated, and a column cannot be sent.*Set isolated: false"):
        Rubric({"p": Part(reward=evaluating.with_objects, isolated=True)}).score("?", "x", {"things": lambda: 1})
