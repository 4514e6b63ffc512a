"""What a model writes is never code: every adapter, and every world, with texts that would run a program or hang.

Each environment plays in an interpreter of its own under a watchdog, so that one that hangs is a failure here and does
not hang the tests. Not covered: servers of MCP and OpenEnv, which are other people's processes, and a class for TRL
or a taskset of the user's own that runs text on purpose.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import textworld

pytestmark = pytest.mark.slow

WATCHDOG = 240
"""Seconds for a dozen texts, with the imports and on a busy machine."""

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
from opd.envs import make
env_id, kwargs, texts = json.loads(sys.stdin.read())
env = make(env_id, kwargs)
for text in texts:
    env.reset(seed=0)
    _, reward, terminated, truncated, info = env.step(text)
    print(json.dumps([reward, info.get("success")]), flush=True)
env.close()
print("alive")
"""

SHELL = "__import__('os').system('touch {marker}')"
WRAPPINGS = {
    "alone": "{}",
    "tags": "<answer>{}</answer>",
    "a list": "<answer>[{}]</answer>",
    "a matrix": "<answer>[[{}]]</answer>",
    "a number": "<answer>int({})</answer>",
    "a sum": "<answer>x + {}</answer>",
    "boxed": "\\boxed{{{}}}",
    "a move": "[{}]",
    "code": "```python\n{}\n```",
    "a solution": "<think>a</think><solution>{}</solution>",
    "a statement": "<think>a</think><sql>{}</sql>",
    "a call": '<tool_call>{{"name": "{tool}", "arguments": {{"{argument}": "{}"}}}}</tool_call>',
    "GSM8K": "#### {}",
    "AIME": "Answer: {}",
}
POWERS = ("9**9**9", "10**10**10", "1e999999999", "factorial(10**9)", "9!!!!!")
ODD = {
    "deep brackets": "<answer>" + "(" * 20_000 + "1" + ")" * 20_000 + "</answer>",
    "deep lists": "<answer>" + "[" * 20_000 + "]" * 20_000 + "</answer>",
    "many digits": "<answer>" + "9" * 50_000 + "</answer>",
    "a move of many digits": "[" + "9" * 5_000 + "]",
    "tags that never close": "<answer>" * 60_000,
    "no formula": "Answer: " + "a" * 200_000,
    "ten million characters": "1" * 10_000_000,
    "no text": "\ud800\0\uffff",
    "not a number": "<answer>nan</answer>",
    "without end": "<answer>inf</answer>",
    "format fields": "<answer>{0.__class__} %s %(a)s ${a}</answer>",
    "a pickle": "<answer>cos\nsystem\n(S'true'\ntR.</answer>",
}

SCORERS = (  # of reasoning-gym; these evaluate the answer, or took for ever over it
    *("binary_matrix", "coin_flip", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication"),
    *("puzzle24", "simple_integration", "spiral_matrix", "string_insertion", "complex_arithmetic", "gcd"),
)


def run(env_id, kwargs, texts):
    """Play each text in another interpreter; return its reward and success."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([env_id, kwargs, texts]),
        capture_output=True,
        text=True,
        timeout=WATCHDOG,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    assert last == "alive"
    return [json.loads(line) for line in lines]


def wrapped(inner, tool="answer", argument="value"):
    return [
        wrapping.replace("{{", "{").replace("}}", "}").replace("{tool}", tool).replace("{argument}", argument)
        .replace("{}", inner)
        for wrapping in WRAPPINGS.values()
    ]  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    """Write rows for the environments that begin with one, and a database for SQL."""
    path = tmp_path / "rows.jsonl"
    database = tmp_path / "spider" / "database" / "shop"
    database.mkdir(parents=True)
    import sqlite3

    with sqlite3.connect(database / "shop.sqlite") as connection:
        connection.execute("create table goods (name text, price int)")
        connection.execute("insert into goods values ('pen', 3)")
    connection.close()
    row = {
        "reward_spec": {"ground_truth": "select price from goods"},
        "reward_model": {"ground_truth": "7"},
        "extra_info": {"max_turns": 1},
        "db_id": "shop",
        "data": "spider",
        "max_turns": 1,
        "answer": "7",
    }
    path.write_text("".join(json.dumps({"prompt": f"What is {n}?", **row}) + "\n" for n in range(20)))
    return str(path)


@pytest.fixture
def game(tmp_path):
    options = textworld.GameOptions()
    options.seeds, options.path = 1, str(tmp_path / "game.z8")
    options.nb_rooms, options.nb_objects, options.quest_length = 1, 2, 1
    return textworld.make(options)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name in ("coin_flip", "gcd") else pytest.param(name, marks=pytest.mark.long) for name in SCORERS]
)
def test_a_scorer_of_reasoning_gym_runs_no_text_and_does_not_hang(name, tmp_path):
    marker = tmp_path / "marker"
    kwargs = {"config": {"size": 200}, "time_limit": 2}
    shell = wrapped(SHELL.format(marker=marker))
    powers = [f"<answer>{form.format(power)}</answer>" for power in POWERS for form in ("{}", "[{}]", "[[{}]]")]
    for reward, success in run(f"reasoning_gym:{name}", kwargs, [*shell, *powers, *ODD.values()]):
        assert 0.0 <= reward <= 0.1  # some give a hundredth for an answer of the right form
        assert not success
    assert not marker.exists()


def test_countdown_of_reasoning_gym_runs_no_text_and_does_not_hang(tmp_path):
    marker = tmp_path / "marker"
    texts = [f"<answer>{SHELL.format(marker=marker)}</answer>", "<answer>9**9**9</answer>"]
    assert run("reasoning_gym:countdown", {"time_limit": 2}, texts) == [[0.0, False]] * 2
    assert not marker.exists()


OTHERS = {
    "skyrl_gym:aime": {"time_limit": 2},
    "skyrl_gym:gsm8k": {"time_limit": 2},
    "skyrl_gym:gsm8k_multi_turn": {"time_limit": 2},
    "skyrl_gym:text2sql": {"time_limit": 2},
    "textarena:GuessTheNumber-v0": {"time_limit": 2},
    "textarena:Countdown-v0": {"time_limit": 2},
    "textarena:Sudoku-v0": {"time_limit": 2},
    "gymnasium:FrozenLake-v1": {},
    "textworld": {},
    "trl:hostile_words:Counter": {},
    "mcp": {},
    "opd/Arithmetic-v0": {},
    "opd/CountdownExpression-v0": {},
    "opd/Countdown-v0": {},
    "opd/Lookup-v0": {},
    "opd/Sql-v0": {},
    "opd/Sokoban-v0": {},
    "opd/Files-v0": {},
    "opd/Dataset-v0": {"rewards": ["number_match", "math_verify", "exact_match", "f1", "contains_answer"]},
}
COUNTER = """
class Counter:
    def reset(self, **row):
        return "Count."

    def answer(self, value: str) -> str:
        '''Answer.

        Args:
            value: what to say
        '''
        return str(len(value))

    def get_reward(self):
        return 0.0
"""


@pytest.mark.slow
@pytest.mark.parametrize("env_id", OTHERS)
def test_no_environment_runs_text_or_hangs_over_it(env_id, tmp_path, rows, game, monkeypatch):
    marker = tmp_path / "marker"
    kwargs = dict(OTHERS[env_id])
    if env_id.startswith("skyrl_gym"):
        kwargs |= {"data": rows, "config": {"db_path": str(tmp_path)} if env_id.endswith("sql") else {}}
    elif env_id.startswith("trl"):
        (tmp_path / "hostile_words.py").write_text(COUNTER)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    elif env_id == "mcp":
        server = Path(__file__).with_name("shop_server.py")
        env_id = f"mcp:{sys.executable} {server} {tmp_path / 'pids'}"
        kwargs = {"data": rows, "rewards": ["number_match"], "fresh": False}
    elif env_id == "textworld":
        env_id = f"textworld:{game}"
    elif env_id == "opd/Dataset-v0":
        kwargs |= {"path": rows}
    tools = {"opd/Sql-v0": ("query", "sql"), "opd/Files-v0": ("submit", "answer")}
    shell = wrapped(SHELL.format(marker=marker), *tools.get(env_id, ("answer", "value")))
    attach = wrapped(f"ATTACH DATABASE '{marker}' AS more", *tools.get(env_id, ("answer", "value")))
    powers = [text for power in POWERS[:2] for text in wrapped(power)]
    for reward, success in run(env_id, kwargs, [*shell, *attach, *powers, *ODD.values()]):
        assert -1.0 <= reward <= 0.2  # a fifth is what skyrl-gym gives for the form of an answer
        assert not success
    assert not marker.exists()


def test_a_table_that_would_never_end_is_no_answer_to_a_question_of_sql(tmp_path, rows):
    endless = "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT zeroblob(100000) FROM c"
    kwargs = {"data": rows, "config": {"db_path": str(tmp_path)}, "time_limit": 2}
    right = "<think>a</think><solution>select price from goods</solution>"
    texts = [f"<think>a</think><solution>{endless}</solution>", right]
    assert run("skyrl_gym:text2sql", kwargs, texts) == [[0.0, False], [1.0, True]]


HOSTILE_TASKSET = """
import verifiers.v1 as vf

__all__ = ["EvalTaskset"]


class EvalData(vf.TaskData):
    answer: str


class EvalTask(vf.Task[EvalData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(eval(trace.last_reply) == eval(self.data.answer))


class EvalTaskset(vf.Taskset[EvalTask, vf.TasksetConfig]):
    def load(self):
        for n in range(12):
            yield EvalTask(EvalData(prompt=f"Compute {n} * 3.", answer=f"{n} * 3"), self.config.task)
"""


@pytest.mark.slow
def test_a_taskset_of_verifiers_that_evaluates_an_answer_is_kept_from_running_it(tmp_path, monkeypatch):
    (tmp_path / "eval_words.py").write_text(HOSTILE_TASKSET)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    marker = tmp_path / "marker"
    texts = [SHELL.format(marker=marker), "9**9**9", "int('9' * 5000)", "float('nan')", "("]
    assert run("verifiers:eval-words", {"time_limit": 2}, texts) == [[0.0, False]] * len(texts)
    assert not marker.exists()


def test_a_move_that_breaks_a_game_ends_it_without_a_reward_and_costs_no_episode():
    huge = "[" + "9" * 5_000 + "]"  # more digits than Python converts
    assert run("textarena:GuessTheNumber-v0", {}, [huge]) == [[0.0, False]]
