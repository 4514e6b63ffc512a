"""Skill-SD as whole runs: a random model, an environment that gives feedback over two turns, a bank that survives."""

import pytest
import torch

from opd.checkpoint import Checkpoint
from opd.errors import ConfigError, DataError
from opd.launch.checks.loading import config_from
from opd.launch.train import train
from opd.tracking import read_rows
from opd.trainers.skill_sd import file
from opd.trainers.skill_sd.makers import Rules

pytestmark = pytest.mark.slow

ENV = """
import gymnasium
from opd.envs import TextSpace

class Vowels(gymnasium.Env):
    '''Two actions, after either of three questions; solved where their length is even.'''

    observation_space, action_space = TextSpace(), TextSpace()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.turn = 0, 0
        return ["Say a word.", "Sing a song.", "Draw a line."][(seed or 0) % 3], {"privileged": {"solution": "Hum."}}

    def step(self, action):
        self.length, self.turn = self.length + len(action), self.turn + 1
        right = self.length % 2 == 0
        info = {"success": right and self.turn == 2}
        if not right:
            info["feedback"] = "It was odd."
        return "Go on.", float(info["success"]), self.turn == 2, False, info
"""


@pytest.fixture(scope="module")
def model(make_model, make_tokenizer, tmp_path_factory):
    """A folder that transformers loads."""
    folder = tmp_path_factory.mktemp("model")
    make_model(stops=True).model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(model, tmp_path, monkeypatch):
    """`settings(skills, section, ...)`: a run's, as plain data; `train.tasks` come round again in the third step."""
    (tmp_path / "tuneful_env.py").write_text(ENV)
    monkeypatch.syspath_prepend(tmp_path)

    def make(skills=None, section=None, *, out="run", train=None, **sections):
        skills = {"min_support": 0.0, "min_lift": -100.0, "min_pdi": -100.0, "shown": 2} | (skills or {})
        return {
            "method": "skill_sd",
            "skill_sd": {"distill": 1.0, "skills": skills, **(section or {})},
            "out": str(tmp_path / out),
            "model": str(model),
            "env": {"id": "tuneful_env:Vowels"},
            "rollout": {"group_size": 4, "max_tokens": 6, "max_length": 256},
            "train": {"steps": 4, "tasks_per_step": 3, "tasks": 6, "lr": 1e-3, "threads": 1} | (train or {}),
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            **sections,
        }

    return make


def student(folder, step):
    return Checkpoint(folder / "checkpoints" / f"step-{step}").tensors("student")


def bank(folder):
    return {skill.id: skill for skill in file.read(folder / "data" / "skills.jsonl")}


def test_skills_of_earlier_steps_teach_later_ones_and_all_are_written_down(settings, tmp_path, caplog):
    train(settings())
    rows, skills = read_rows(tmp_path / "run" / "metrics.jsonl"), bank(tmp_path / "run")
    for row in rows[:2]:  # tasks that nobody has played yet, and which are like none
        assert row["route/policy_share"] == 1
        assert "shown/skill" not in row
    assert all(row["shown/skill"] == row["route/distill_share"] > 0 for row in rows[2:])
    assert all(row["skills/known"] >= row["skills/usable"] > 0 for row in rows)
    assert "skills fits" not in caplog.text
    assert rows[-1]["skills/known"] == len(skills)
    for skill in skills.values():
        assert skill.source.summariser == "rules"
        assert all(name.startswith(f"step-{skill.source.step}/train/") for name in skill.source.episodes)
        assert skill.source.policy_version == skill.source.step - 1
        assert "Avoid: It was odd." in skill.lesson.text or skill.lesson.workflow
    assert any(skill.shown for skill in skills.values())


def test_a_run_that_goes_on_has_the_same_bank_and_the_same_weights(settings, tmp_path):
    train(settings())
    train(settings(out="cut", train={"steps": 2}))
    train(settings(out="cut"), resume=True)
    whole, cut = student(tmp_path / "run", 4), student(tmp_path / "cut", 4)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert bank(tmp_path / "run") == bank(tmp_path / "cut")
    saved = [Checkpoint(tmp_path / name / "checkpoints" / "step-4").record("method") for name in ("run", "cut")]
    assert saved[0] == saved[1]
    assert saved[0]["bank"]["skills"]


def test_a_file_that_cannot_be_read_is_put_aside_and_the_run_goes_on(settings, tmp_path, caplog):
    train(settings(train={"steps": 2}))
    path = tmp_path / "run" / "data" / "skills.jsonl"
    whole = bank(tmp_path / "run")
    path.write_text(path.read_text() + "a slip of the pen\n")
    train(settings(train={"steps": 3}), resume=True)
    assert "nothing is taken from it" in caplog.text
    assert path.with_suffix(".unreadable").read_text().endswith("a slip of the pen\n")
    assert set(whole) <= set(bank(tmp_path / "run"))


def test_without_skills_to_show_skill_sd_is_grpo_to_the_bit(settings, tmp_path):
    train(settings({"per_step": 1, "min_support": 1.0, "min_pdi": 1e9}))
    grpo = settings(out="grpo")
    del grpo["skill_sd"]
    train(grpo | {"method": "grpo"})
    one, two = student(tmp_path / "run", 4), student(tmp_path / "grpo", 4)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert bank(tmp_path / "run") == {}


def test_a_person_s_change_is_taken_up_and_kept(settings, tmp_path):
    train(settings(train={"steps": 2}))
    path = tmp_path / "run" / "data" / "skills.jsonl"
    [first, second, *others] = file.read(path)
    changed = file.edit(first, first.lesson.map(lambda _: "Say it twice."), who="a person")
    file.write(path, [changed, file.retire(second, who="a person"), *others])
    train(settings(), resume=True)
    after = bank(tmp_path / "run")
    assert (after[first.id].lesson.workflow, after[first.id].version) == ("Say it twice.", first.version + 1)
    assert (after[first.id].source, after[first.id].edited) == (first.source, "a person")
    assert after[first.id].history[-1] == first.lesson.text
    assert after[second.id].retired
    assert after[second.id].shown == second.shown


def test_a_person_s_change_while_skills_are_written_is_taken_up_too(settings, tmp_path, monkeypatch):
    path = tmp_path / "run" / "data" / "skills.jsonl"
    changed = []

    def slowly(self, cases):
        if path.exists() and not changed:
            [first, *others] = file.read(path)
            changed.append(file.edit(first, first.lesson.map(lambda _: "Say it twice."), who="a person"))
            file.write(path, [*changed, *others])
        return by_rules(self, cases)

    by_rules = Rules.summarise
    monkeypatch.setattr(Rules, "summarise", slowly)
    train(settings(train={"steps": 2}))
    [mine] = changed
    assert bank(tmp_path / "run")[mine.id].lesson == mine.lesson


def test_a_persons_change_outlives_a_checkpoint_that_does_not_know_the_skill(settings, tmp_path):
    train(settings())
    path = tmp_path / "run" / "data" / "skills.jsonl"
    train(settings(out="cut", train={"steps": 1}))
    known = bank(tmp_path / "cut")
    *others, last = file.read(path)
    assert last.id not in known
    mine = file.edit(last, last.lesson.map(lambda _: "Say it twice."), who="a person")
    file.write(tmp_path / "cut" / "data" / "skills.jsonl", [*others, mine])
    train(settings(out="cut"), resume=True)
    after = bank(tmp_path / "cut")
    assert (after[last.id].lesson, after[last.id].source) == (mine.lesson, last.source)
    assert len(after) > len(known) + 1


def test_a_file_ahead_of_the_checkpoint_changes_nothing(settings, tmp_path):
    train(settings())
    ahead = (tmp_path / "run" / "data" / "skills.jsonl").read_text()
    train(settings(out="cut", train={"steps": 2}))
    (tmp_path / "cut" / "data" / "skills.jsonl").write_text(ahead)
    train(settings(out="cut"), resume=True)
    assert bank(tmp_path / "cut") == bank(tmp_path / "run")


def test_fixed_solutions_take_the_place_of_skills_where_one_compares(settings, tmp_path):
    plain = settings()
    plain["skill_sd"] = {"distill": 1.0, "fixed": "solution", "estimator": "k3"}
    train(plain)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert all(row["shown/solution"] == 1 for row in rows)
    assert not (tmp_path / "run" / "data" / "skills.jsonl").exists()
    plain["skill_sd"]["fixed"] = "answer"
    with pytest.raises(DataError, match=r"skill_sd\.fixed = 'answer', but the environment offers \['solution'\]"):
        train(plain | {"out": str(tmp_path / "other")})


def test_a_teacher_of_each_iteration_is_synced_where_a_step_has_several_updates(settings, tmp_path):
    several = {"steps": 3, "updates_per_step": 3}
    train(settings(section={"teacher": {"weights": "synced", "every": 3}}, train=several))
    train(settings(train=several, out="live"))
    one, two = student(tmp_path / "run", 3), student(tmp_path / "live", 3)
    assert not all(torch.equal(one[name], two[name]) for name in one)
    train(settings(section={"teacher": {"weights": "synced", "every": 1}}, out="each"))
    train(settings(out="also live"))
    one, two = student(tmp_path / "each", 4), student(tmp_path / "also live", 4)
    assert all(torch.equal(one[name], two[name]) for name in one)  # with one update, live is synced each iteration


def test_the_policy_writes_skills_through_the_engine_and_rubbish_is_not_believed(settings, tmp_path, caplog):
    train(settings({"summariser": "policy", "max_tokens": 16}, rollout={
        "group_size": 4, "max_tokens": 6, "max_length": 2048,
    }))  # fmt: skip
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert all(row["skills/unanswered"] > 0 for row in rows)  # a random model says no JSON
    assert "no question" not in caplog.text
    assert bank(tmp_path / "run") == {}


def test_a_policy_whose_question_never_fits_is_warned_of_once(settings, tmp_path, caplog):
    train(settings({"summariser": "policy", "max_tokens": 16}))
    assert all(row["skills/made"] == 0 for row in read_rows(tmp_path / "run" / "metrics.jsonl"))
    [said] = [r.message for r in caplog.records if "no question" in r.message]
    assert "max_tokens = 16 for the answer it is longer than rollout.max_length = 256" in said
    assert said.endswith("raise rollout.max_length")


def test_a_run_whose_trials_never_fit_is_warned_of_once(settings, tmp_path, caplog):
    train(settings(section={"max_teacher_tokens": 8}))
    assert all(row["skills/tried"] == 0 for row in read_rows(tmp_path / "run" / "metrics.jsonl"))
    [said] = [r.message for r in caplog.records if "trials of skills" in r.message]
    assert "fits skill_sd.max_teacher_tokens, and what is not tried is not shown; raise it" in said


WRONG = {
    "a server without an address": (
        {"summariser": "server"}, {}, r"server needs server\.url",
    ),
    "an address without http": (
        {"summariser": "server", "server": {"url": "127.0.0.1:8000/v1", "model": "m"}}, {},
        r"skill_sd\.skills\.server\.url.* does not begin with http:// or https://; it must be like http://127",
    ),
    "a port in words": (
        {"summariser": "server", "server": {"url": "http://127.0.0.1:port/v1", "model": "m"}}, {},
        r"skill_sd\.skills\.server\.url.* is no address: Invalid port: 'port'; it must be like http://127",
    ),
    "an address for nobody": (
        {"server": {"url": "http://127.0.0.1/v1"}}, {},
        r"skills.server is used by summariser = server alone, but summariser = rules",
    ),
    "tokens for nobody": ({"max_tokens": 64}, {}, r"skills.max_tokens is used by summariser = policy or server alone"),
    "a lift without trials": ({"trials": 0}, {}, r"skills.min_lift is used with trials alone; set trials"),
    "a bound on no ratio": (
        {},
        {"estimator": "k3", "max_ratio": 3.0},
        r"max_ratio is used by estimator = weighted_k3 or policy_gradient alone, but",
    ),
    "skills beside a fixed text": (
        {}, {"fixed": "solution"}, r"skill_sd\.skills is used by fixed = null alone, but fixed = solution; remove it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_settings_that_do_not_belong_together_are_refused(settings, case):
    skills, section, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        config_from(settings(skills, section))


def test_fewer_tasks_than_a_step_plays_are_refused(settings):
    with pytest.raises(ConfigError, match=r"train\.tasks = 2 is less than train\.tasks_per_step = 3"):
        config_from(settings(train={"tasks": 2}))
