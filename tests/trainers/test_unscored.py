"""Episodes that nobody could score, and groups that are scored together, on their way into a step."""

import json
import logging
import time

import pytest

from opd.envs import Reply, Start, TextEnv
from opd.envs.dataset_env import DatasetEnv
from opd.launch.run.score import Score
from opd.maths.advantage import group_advantage
from opd.trainers.loop.health import Health
from opd.trainers.loop.metrics import of_groups
from opd.trainers.parts.policy import PolicyConfig


class Judged(TextEnv):
    """Scores the texts it can tell of, by their length."""

    def start(self, rng, split, index):
        return Start(prompt="Say something.")

    def respond(self, action):
        if action == "hm":
            return Reply(terminated=True, unscored=True, rewards={"judge": None})
        return Reply(reward=float(len(action)), terminated=True, success=len(action) > 3, rewards={"judge": 1.0})


@pytest.fixture
def group(play, make_tokenizer, scripted_engine):
    def run(make_env, texts, **options):
        tokenizer = make_tokenizer()
        turns = [[[*tokenizer.encode(text), tokenizer.eos_token_id]] for text in texts]
        [played] = play(make_env, tasks=1, group_size=len(texts), engine=scripted_engine(turns), **options)
        return played

    return run


def test_an_episode_without_a_reward_is_in_no_baseline_and_has_no_advantage(group):
    played = group(Judged, ["a", "hm", "aaaa"])
    assert [t.unscored for t in played.trajectories] == [False, True, False]
    assert len(played.usable) == 3
    for scale in ("std", "none"):
        first, second = group_advantage([1.0, 4.0], scale=scale).tolist()
        assert PolicyConfig(scale=scale).advantages(played.usable) == [first, 0.0, second]
    assert PolicyConfig().advantages([played.trajectories[1]]) == [0.0]


def test_an_episode_without_a_reward_is_counted_and_in_no_mean(group, caplog):
    played = group(Judged, ["a", "hm", "aaaa"])
    row = of_groups([played])
    assert (row["rollout/unscored"], row["reward/mean"], row["reward/success"]) == (1.0, 2.5, 0.5)
    assert "rollout/unscored" not in of_groups([group(Judged, ["a"])])
    assert Score.of([played]).outcomes == (False, None, True)
    with caplog.at_level(logging.WARNING):
        Health(0).warn(4, row | {"signal/zero": 0.0})
    assert "step 5: 1 of 3 episodes have no reward (1 such steps in a row)" in caplog.text


def test_a_function_of_a_table_that_compares_sees_its_group(group, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    rows = [json.dumps({"prompt": f"{n}?", "answer": "aa"}) for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))

    def longest(completions, **kwargs):
        return [float(len(one) == max(map(len, completions))) for one in completions]

    rewards = {"exact_match": 1.0, "longest": {"reward": longest, "weight": 0.5, "group": True}}
    played = group(lambda: DatasetEnv(path, rewards=rewards), ["a", "aa", "aaa"])
    assert [t.reward for t in played.trajectories] == [0.0, 1.0, 0.5]
    assert [t.success for t in played.trajectories] == [False, True, False]
    assert [t.turns[-1].feedback for t in played.trajectories] == [
        "The answer scored 0; 1 is needed (exact_match: 0, longest: 0).",
        None,
        "The answer scored 0.5; 1 is needed (exact_match: 0, longest: 1).",
    ]
    alone = DatasetEnv(path, rewards=rewards)
    alone.reset(seed=0)
    assert alone.step("b")[1] == 0.5  # where no trainer plays, an episode is its own group


def hangs_at_bad(completions, **kwargs):
    time.sleep(60 if "bad" in completions else 0)
    return [1.0] * len(completions)


@pytest.mark.slow
def test_a_text_at_which_a_grader_hangs_is_counted_told_and_written_beside_its_episode(group, tmp_path, caplog):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}?"}) for n in range(9)))
    rewards = {"judge": {"reward": hangs_at_bad, "isolated": True, "time_limit": 1}}
    played = group(lambda: DatasetEnv(str(tmp_path / "rows.jsonl"), rewards=rewards), ["good", "bad"])
    assert [t.reward for t in played.trajectories] == [1.0, 0.0]
    assert [t.ungraded for t in played.trajectories] == [[], ["reward judge: no answer within 1 s (time_limit)"]]
    row = of_groups([played])
    assert row["failures/grading"] == 1.0
    assert "failures/grading" not in of_groups([group(Judged, ["a"])])
    with caplog.at_level(logging.WARNING):
        Health(0).warn(0, row | {"signal/zero": 0.0})
    assert "step 1: graders hung, died or raised at 1 texts" in caplog.text


class Comparing(TextEnv):
    """Compares its episodes itself."""

    fail = 0

    def start(self, rng, split, index):
        return Start(prompt="Say something.")

    def respond(self, action):
        return Reply(terminated=True, member=action)

    def score_group(self, members, ids):
        type(self).fail -= 1
        if self.fail >= 0:
            raise OSError("the judge is away")
        return [Reply(reward=sorted(members).index(one), metrics={"size": len(members)}) for one in members]


def test_an_environment_that_compares_by_itself_is_asked_once_its_group_is_over(group):
    Comparing.fail = 0
    played = group(Comparing, ["b", "c", "a"], concurrency=2)
    assert [t.reward for t in played.trajectories] == [1.0, 2.0, 0.0]
    assert of_groups([played])["reward/logged/size"] == 3.0


@pytest.mark.parametrize(("times", "failed"), [(1, 0), (2, 3)])
def test_a_comparison_that_fails_is_tried_again_and_then_fails_the_group(group, times, failed):
    Comparing.fail = times
    played = group(Comparing, ["b", "c", "a"], on_failure="retry", retries=1)
    reasons = [t.failed for t in played.trajectories if t.failed]
    assert len(reasons) == failed
    assert all(reason.startswith("scoring its group: OSError: the judge is away") for reason in reasons)
