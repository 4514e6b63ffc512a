"""A run looks at a task of each kind before it loads a model: what is wrong with the task ends it there."""

import json

import pytest
import yaml

from opd.errors import ConfigError, DataError, EnvError, OpdError
from opd.launch.checks.loading import config_from
from opd.launch.cli.main import main
from opd.launch.run.first_look import first_look
from opd.launch.train import train

ENVS = """
from opd.envs.worlds.lookup import LookupEnv


class Breaks(LookupEnv):
    def reset(self, *, seed=None, options=None):
        raise ValueError("the shop's database is gone")


class BreaksLater(LookupEnv):
    def respond(self, action):
        raise KeyError("price")


class Few(LookupEnv):
    metadata = {"tasks": {"train": 5, "eval": 2}}


class OneSplit(LookupEnv):
    metadata = {"tasks": {"train": 5}}


class NoEnv:
    pass


class Once(LookupEnv):
    resets = 0

    def reset(self, *, seed=None, options=None):
        Once.resets += 1
        return super().reset(seed=seed, options=options)
"""


@pytest.fixture
def look(settings, tmp_path, monkeypatch):
    """`look(**sections)`: what is seen of a run with a teacher that reads the plan."""
    (tmp_path / "look_env.py").write_text(ENVS)
    monkeypatch.syspath_prepend(tmp_path)
    return lambda **sections: first_look(config_from(settings("run", **sections)))


def test_a_look_tells_what_the_student_and_its_teacher_read(look):
    train_, eval_ = look(eval={"tasks": 3})
    assert (train_.task.id, eval_.task.id) == ("train/0", "eval/2")
    assert train_.student.endswith("<|im_start|>assistant\n")
    assert train_.tools == ["get", "answer"]
    assert "I do not know." in train_.teacher
    assert "reference solution" in train_.teacher
    assert "reference solution" not in train_.student
    assert eval_.teacher is None
    assert "Call a tool" in train_.answered


WRONG = {
    "raises in reset": (
        {"env": "look_env:Breaks"},
        r"train/0 cannot be played: reset: ValueError: the shop's database is gone \(look_env.py, line 7\)",
    ),
    "raises in a step": ({"env": "look_env:BreaksLater"}, r"step 1: KeyError: 'price' \(look_env.py, line 12\)"),
    "raises in its process": (
        {"env": {"id": "look_env:Breaks", "workers": "processes"}},
        r"the shop's database is gone \(look_env.py, line 7\)",
    ),
    "is no environment": ({"env": "look_env:NoEnv"}, "makes a NoEnv, which is no gymnasium.Env"),
    "does not exist": ({"env": "look_env:Neverland"}, "has no attribute 'Neverland'"),
    "has too few tasks": (
        {"env": "look_env:Few", "eval": {"tasks": 3}},
        "2 tasks in its eval split. Set eval.tasks",
    ),
    "has no split to hold out": (
        {"env": "look_env:OneSplit", "eval": {"tasks": 1}},
        "no eval split; its splits: train",
    ),
    "offers no such text": (
        {"opsd": {"privileged": "hint"}},
        r"privileged = 'hint', but .*\['plan', 'solution'\]",
    ),
    "has a long prompt": (
        {"rollout": {"max_tokens": 4, "max_length": 10}},
        r"rollout.max_length = 10 leaves no room .* train/0 alone has \d+ tokens. Raise it to \d+",
    ),
}


@pytest.mark.parametrize(("sections", "text"), WRONG.values(), ids=WRONG)
def test_a_task_that_cannot_be_played_as_asked_is_told_before_a_model_loads(look, sections, text):
    with pytest.raises((ConfigError, DataError, EnvError), match=text):
        look(**sections)


def test_a_prompt_that_leaves_little_room_is_a_note(look):
    [seen] = look(rollout={"max_tokens": 100, "max_length": 110})
    assert "fewer than rollout.max_tokens = 100" in seen.notes[0]


def test_a_table_that_is_wrong_is_told_too(look, tmp_path):
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"prompt": f"{n}?", "answer": str(n)}) + "\n" for n in range(40)))
    kwargs = {"path": str(table), "rewards": "exact_match", "privileged_columns": {"plan": "answer"}}
    env = {"id": "opd/Dataset-v0", "kwargs": kwargs}
    [seen] = look(env=env)
    assert "reward 0" in seen.answered
    for change, text in {
        "path": (str(tmp_path / "none.jsonl"), "there is no file"),
        "prompt_column": ("question", "has no column 'question'"),
        "rewards": ("exact_mach", "exact_mach"),
    }.items():
        with pytest.raises(OpdError, match=text[1]):
            look(env={**env, "kwargs": kwargs | {change: text[0]}})
    with pytest.raises(OpdError, match=r"tasks in its eval split\. Set eval\.tasks"):
        look(env=env, eval={"tasks": 100})


def test_an_environment_can_ask_to_be_left_alone(look):
    look(env="look_env:Once")
    import look_env

    assert look_env.Once.resets == 1
    assert look(env={"id": "look_env:Once", "probe": False}) == []
    assert look_env.Once.resets == 1


def test_a_run_refuses_before_its_folder_is_there_and_a_dry_run_shows_the_task(look, settings, tmp_path, capsys):
    with pytest.raises(EnvError, match="cannot be played"):
        train(settings("run", env="look_env:Breaks"))
    assert not (tmp_path / "run").exists()
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings("run")))
    assert main(["train", str(path), "--dry-run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "train/0: the student reads" in shown
    assert "Here is a reference solution" in shown
    assert main(["train", str(path), "--dry-run", "--env", "look_env:Breaks"]) == 2


def test_a_group_of_one_that_nothing_else_teaches_is_refused(settings):
    for method in ("grpo", "srpo"):
        data = settings("run", method=method, rollout={"group_size": 1})
        del data["opsd"]
        with pytest.raises(ConfigError, match=f"method = {method}: rollout.group_size = 1: .* nothing can be learned"):
            config_from(data)
