"""The scheduler: scripted environments on the real engine with a random model.

Not covered: an environment that holds the interpreter's lock while it hangs (nothing in this process can help).
"""

import dataclasses
import itertools
import math
import os
import re
import threading
import time

import numpy as np
import pytest

from opd.engines.base import Sampling
from opd.engines.transformers import TransformersEngine
from opd.episodes.answers import MOST_CHARACTERS
from opd.episodes.config import EnvConfig, RolloutConfig
from opd.episodes.scheduler import RolloutScheduler
from opd.episodes.tasks import derive_seed, task
from opd.errors import DataError
from opd.grading import grading
from opd.rewards import Rubric
from opd.types import ONLY_TEXT, Fault, StopReason

TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "", "parameters": {"type": "object"}}}]


def flat(groups):
    return [t for group in groups for t in group.trajectories]


def told(groups):
    """All of the episodes that a seed must fix: everything but wall time."""
    return [dataclasses.replace(t, seconds={}) for t in flat(groups)]


# -- the accounts of an episode -----------------------------------------------------------------------


def test_an_episode_runs_until_its_environment_ends_it(play, scripted_env, turns_then_end):
    [episode] = flat(play(lambda: scripted_env(turns_then_end(3)), tasks=1))
    assert (episode.terminated, episode.truncated, episode.failed) == (True, False, None)
    assert len(episode.turns) == 3


def test_the_ids_of_the_turns_are_what_the_engine_saw_and_sampled(play, scripted_env, turns_then_end, make_model):
    engine = TransformersEngine(make_model(stops=True))
    seen, completions = {}, {}
    submit, step = engine.submit, engine.step

    def watching_submit(request):
        seen.setdefault(request.session, []).append(list(request.prompt_ids))
        submit(request)

    def watching_step():
        done = step()
        for c in done:
            completions.setdefault(c.session, []).append(c)
        return done

    engine.submit, engine.step = watching_submit, watching_step
    episodes = flat(play(lambda: scripted_env(turns_then_end(3)), tasks=4, group_size=2, engine=engine))
    for number, episode in enumerate(episodes):
        ids = []
        for turn, prompt, completion in zip(episode.turns, seen[number], completions[number], strict=True):
            ids += turn.prompt_ids
            assert ids == prompt
            assert turn.completion_ids == completion.token_ids
            assert turn.logprobs == completion.logprobs
            ids += turn.completion_ids
    assert sum(t.stop_reason is StopReason.STOP for e in episodes for t in e.turns) > 3
    assert sum(t.stop_reason is StopReason.LENGTH for e in episodes for t in e.turns) > 3


def test_the_action_is_the_text_of_the_completion(play, scripted_env, make_chat):
    actions = []

    def answers(env, action):
        actions.append(action)
        return "", 0.0, True, False, {}

    [episode] = flat(play(lambda: scripted_env(answers), tasks=1))
    assert actions == [make_chat().text(episode.turns[0].completion_ids)] == [episode.turns[0].text]


def test_the_reward_is_the_sum_over_the_steps(play, scripted_env):
    def pays(env, action):
        return "on", 0.25 * env.turn, env.turn == 3, False, {}

    [episode] = flat(play(lambda: scripted_env(pays), tasks=1))
    assert [t.reward for t in episode.turns] == [0.25, 0.5, 0.75]
    assert episode.reward == 1.5


def test_an_environment_may_truncate_and_that_is_no_failure(play, scripted_env):
    [episode] = flat(play(lambda: scripted_env(lambda env, _: ("", 1.0, False, True, {})), tasks=1))
    assert (episode.terminated, episode.truncated, episode.failed, episode.success) == (False, True, None, False)


def test_too_many_turns_truncate(play, scripted_env, turns_then_end):
    [episode] = flat(play(lambda: scripted_env(turns_then_end(5)), tasks=1, max_turns=3))
    assert (episode.terminated, episode.truncated, episode.failed) == (False, True, None)
    assert len(episode.turns) == 3


def test_a_last_allowed_turn_that_ends_the_episode_is_not_truncated(play, scripted_env, turns_then_end):
    [episode] = flat(play(lambda: scripted_env(turns_then_end(3)), tasks=1, max_turns=3))
    assert (episode.terminated, episode.truncated) == (True, False)


def test_a_sequence_never_grows_beyond_its_limit_and_is_then_truncated(play, scripted_env, turns_then_end, make_model):
    options = {"max_turns": 9, "max_length": 100, "max_tokens": 25, "model": make_model()}
    episodes = flat(play(lambda: scripted_env(turns_then_end(9)), tasks=6, **options))
    lengths = [sum(len(t.prompt_ids + t.completion_ids) for t in e.turns) for e in episodes]
    assert max(lengths) == 100
    assert min(lengths) > 100 - 45  # the next prompt would not have fitted
    assert [(e.truncated, e.terminated, e.failed) for e in episodes] == [(True, False, None)] * 6


def test_a_first_prompt_that_is_too_long_truncates_before_a_word_is_said(play, scripted_env, turns_then_end):
    [episode] = flat(play(lambda: scripted_env(turns_then_end(1), first="x" * 500), tasks=1, max_length=100))
    assert (episode.truncated, episode.failed, episode.turns) == (True, None, [])


def test_success_is_what_the_environment_says(play, scripted_env):
    def says(env, action):
        return "", 1.0 if env.seed % 2 else 0.0, True, False, {"success": env.seed % 2 == 0}

    for episode in flat(play(lambda: scripted_env(says), tasks=6)):
        assert episode.success is (episode.reward == 0)


def test_an_environment_that_does_not_say_succeeds_by_a_positive_reward(play, scripted_env):
    def pays(env, action):
        return "", float(env.seed % 2), True, False, {}

    for episode in flat(play(lambda: scripted_env(pays), tasks=6)):
        assert episode.success is (episode.reward > 0)


def test_an_episode_that_broke_later_was_no_success(play, scripted_env):
    def breaks(env, action):
        return ("on", 1.0, False, False, {"success": True}) if env.turn == 1 else 1 / 0

    [episode] = flat(play(lambda: scripted_env(breaks), tasks=1))
    assert (episode.success, episode.terminated) == (False, False)
    assert episode.failed.startswith("step 2: ZeroDivisionError")


def test_a_group_holds_its_members_in_order_and_groups_come_in_the_order_of_the_tasks(
    play, scripted_env, turns_then_end
):
    def slow_first(env, action):
        time.sleep(0.02 * (env.seed % 3))
        return turns_then_end(1)(env, action)

    for deterministic in (True, False):
        groups = play(lambda: scripted_env(slow_first), tasks=5, group_size=3, deterministic=deterministic)
        assert [g.task for g in groups] == [task(n, split="train") for n in range(5)]
        assert [[t.member for t in g.trajectories] for g in groups] == [[0, 1, 2]] * 5
        assert all(t.task == g.task for g in groups for t in g.trajectories)


def test_members_of_a_group_draw_differently(play, scripted_env, turns_then_end):
    groups = play(lambda: scripted_env(turns_then_end(1)), tasks=4, group_size=3)
    assert sum(len({tuple(t.turns[0].completion_ids) for t in g.trajectories}) for g in groups) >= 10


def test_messages_with_roles_take_the_place_of_the_observation(play, scripted_env, make_tokenizer):
    first = ("unseen", {"messages": [{"role": "system", "content": "Rules."}, {"role": "user", "content": "Go."}]})
    second = {"messages": [{"role": "tool", "content": "42"}]}
    env = lambda: scripted_env(lambda e, _: ("unseen", 0.0, e.turn == 2, False, second), first=first)  # noqa: E731
    [episode] = flat(play(env, tasks=1))
    text = make_tokenizer().decode([i for t in episode.turns for i in t.prompt_ids])
    assert "<|im_start|>system\nRules.<|im_end|>" in text
    assert "<|im_start|>tool\n42<|im_end|>" in text
    assert "unseen" not in text


def test_tools_reach_the_prompt_and_the_trajectory(play, scripted_env, turns_then_end, make_tokenizer):
    [episode] = flat(play(lambda: scripted_env(turns_then_end(2), first=("Go.", {"tools": TOOLS})), tasks=1))
    assert episode.tools == TOOLS
    assert "look_up" in make_tokenizer().decode(episode.turns[0].prompt_ids)


def test_feedback_belongs_to_the_turn_that_it_is_about(play, scripted_env):
    def complains(env, action):
        return "on", 0.0, env.turn == 3, False, {"feedback": f"bad {env.turn}"} if env.turn != 2 else {}

    [episode] = flat(play(lambda: scripted_env(complains), tasks=1))
    assert [t.feedback for t in episode.turns] == ["bad 1", None, "bad 3"]


def test_privileged_text_and_feedback_never_reach_the_student(play, scripted_env, make_tokenizer, make_chat):
    def whispers(env, action):
        info = {"privileged": {"later": "SECRET"}, "feedback": "SECRET", "success": True}
        return "on", 0.0, env.turn == 3, False, info

    def first(env):
        return "Go.", {"privileged": {"solution": "SECRET"}, "tools": TOOLS}

    for template in ("chatml", "forgetful", "no_tools", "strict"):
        groups = play(lambda: scripted_env(whispers, first=first), tasks=3, group_size=2, chat=make_chat(template))
        for episode in flat(groups):
            assert episode.failed is None
            assert episode.privileged == {"solution": "SECRET", "later": "SECRET"}
            for turn in episode.turns:
                assert "SECRET" not in make_tokenizer().decode(turn.prompt_ids)
                assert not any("SECRET" in m["content"] for m in turn.messages)


def test_the_acting_model_can_be_shown_other_first_messages(play, scripted_env, turns_then_end, make_tokenizer):
    def rewrite(messages, privileged):
        return [{**messages[0], "content": f"{messages[0]['content']} ({privileged['solution']})"}]

    env = lambda: scripted_env(turns_then_end(2), first=("Go.", {"privileged": {"solution": "left"}}))  # noqa: E731
    [episode] = flat(play(env, tasks=1, rewrite=rewrite))
    assert make_tokenizer().decode(episode.turns[0].prompt_ids).count("Go. (left)") == 1
    assert "left" not in make_tokenizer().decode(episode.turns[1].prompt_ids)


def test_a_conversation_forks_where_the_template_rewrites_the_past(
    play, scripted_env, scripted_engine, make_chat, make_tokenizer
):
    chat = make_chat("forgetful", on_rewrite="fork")
    thought = make_tokenizer()("<think>hm</think>a", add_special_tokens=False)["input_ids"]
    engine = scripted_engine([[[*thought, chat.end_id], [5, chat.end_id], [6, chat.end_id]]])
    answers = iter([{}, {"messages": [{"role": "tool", "content": "1"}]}, {}])
    env = lambda: scripted_env(lambda e, _: ("on", 0.0, e.turn == 3, False, next(answers)))  # noqa: E731
    [episode] = flat(play(env, tasks=1, engine=engine, chat=chat))
    assert [t.forked for t in episode.turns] == [False, True, False]
    _, second = episode.segments()
    [prompts] = engine.prompts
    assert prompts[1] == second.turns[0].prompt_ids
    assert prompts[2] == [*second.turns[0].prompt_ids, 5, chat.end_id, *second.turns[1].prompt_ids]
    text = make_tokenizer().decode(second.turns[0].prompt_ids)
    assert text == (
        "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\non<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [m["content"] for m in second.turns[0].messages] == ["What is it?", "<think>hm</think>a", "on"]


def test_a_trajectory_carries_the_version_of_the_policy_that_sampled_it(
    play, scripted_env, scripted_engine, turns_then_end
):
    [episode] = flat(play(lambda: scripted_env(turns_then_end(1)), tasks=1, engine=scripted_engine([[[5]]])))
    assert episode.policy_version == 3


# -- what depends on the seed, and on nothing else ------------------------------------------------------


def jittery(turns_then_end):
    """Environments that take their time, differently in every run."""
    counter = itertools.count()

    def play(env, action):
        time.sleep(0.004 * (next(counter) * 7 % 5))
        return turns_then_end(1 + env.seed % 3)(env, action)

    return play


def test_two_deterministic_runs_are_equal_to_the_bit_however_slow_the_environments_are(
    play, scripted_env, turns_then_end, make_model
):
    model = make_model(stops=True)
    runs = [
        told(play(lambda: scripted_env(jittery(turns_then_end)), tasks=6, group_size=2, model=model, workers=workers))
        for workers in (1, 5)
    ]
    assert runs[0] == runs[1]


def test_who_shares_a_batch_does_not_depend_on_whose_environment_is_quick(
    play, scripted_env, turns_then_end, make_model
):
    orders = []
    for _ in range(2):
        engine, order = TransformersEngine(make_model(stops=True)), []
        submit = engine.submit

        def watching(request, submit=submit, order=order):
            order.append((request.session, len(request.prompt_ids)))
            submit(request)

        engine.submit = watching
        play(lambda: scripted_env(jittery(turns_then_end)), tasks=8, engine=engine, workers=8)
        orders.append(order)
    assert orders[0] == orders[1]


def test_free_running_samples_the_same_text(play, scripted_env, turns_then_end, make_model):
    model = make_model(stops=True)
    runs = [
        flat(
            play(
                lambda: scripted_env(jittery(turns_then_end)),
                tasks=6,
                group_size=2,
                model=model,
                deterministic=deterministic,
                concurrency=concurrency,
            )
        )
        for deterministic, concurrency in ((True, 64), (False, 64), (True, 5), (False, 3), (True, 1))
    ]
    texts = [[[t.completion_ids for t in episode.turns] for episode in run] for run in runs]
    assert all(other == texts[0] for other in texts)
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            for ours, theirs in zip(a.turns, b.turns, strict=True):
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)


def test_another_round_draws_other_tokens_for_the_same_tasks(play, scripted_env, turns_then_end, make_model):
    model = make_model(stops=True)
    first, second = (
        flat(play(lambda: scripted_env(turns_then_end(1)), tasks=6, model=model, seed=seed)) for seed in (0, 1)
    )
    assert [e.task for e in first] == [e.task for e in second]
    assert sum(a.turns[0].completion_ids != b.turns[0].completion_ids for a, b in zip(first, second, strict=True)) >= 4


def test_no_more_environments_exist_than_may_run_at_once(play, scripted_env, turns_then_end):
    for deterministic in (True, False):
        made = []

        def make(made=made):
            made.append(scripted_env(turns_then_end(2)))
            return made[-1]

        episodes = flat(play(make, tasks=7, concurrency=3, deterministic=deterministic))
        assert len(episodes) == 7
        assert all(e.terminated for e in episodes)
        assert len(made) <= 3


def test_environments_work_at_the_same_time(play, scripted_env):
    barrier = threading.Barrier(4)

    def meets(env, action):
        barrier.wait(timeout=10)
        return "", 0.0, True, False, {}

    for deterministic in (True, False):
        episodes = flat(play(lambda: scripted_env(meets), tasks=4, workers=4, deterministic=deterministic))
        assert [e.failed for e in episodes] == [None] * 4


def test_a_seed_is_the_same_on_every_machine():
    assert derive_seed("rollout", 0, 1) == 3212554230238907754
    assert derive_seed("a", 1) != derive_seed("a", "1") != derive_seed("a1")
    assert 0 <= derive_seed() < 1 << 63


def test_seeds_of_two_splits_never_meet():
    ranges = {}
    for split in ("train", "eval", "warm"):
        seeds = [task(n, split=split, run_seed=run).seed for n in range(300) for run in range(3)]
        ranges[split] = (min(seeds), max(seeds))
    assert 0 <= ranges["train"][0] < ranges["train"][1] < 1 << 29 <= ranges["eval"][0]
    assert ranges["eval"][1] < 1 << 30 <= ranges["warm"][0] < ranges["warm"][1] < 3 << 29


def test_the_seed_of_a_run_changes_its_training_tasks_and_not_its_evaluation():
    assert task(3, split="train", run_seed=0) != task(3, split="train", run_seed=1)
    assert task(3, split="eval", run_seed=0) == task(3, split="eval", run_seed=1)
    assert len({task(n, split="train").seed for n in range(2000)}) >= 1999


def test_an_unknown_split_is_refused():
    with pytest.raises(KeyError, match="evl"):
        task(0, split="evl")


def test_training_goes_through_a_table_again_and_an_evaluation_does_not(make_scheduler, scripted_env):
    asked, failed = [], {}

    def first(env):
        asked.append(env.options)
        return "Go."

    metadata = {"tasks": {"train": 3, "eval": 3, "warm": None}}
    scheduler = make_scheduler(
        lambda: scripted_env(lambda *_: ("", 0.0, True, False, {}), first=first, metadata=metadata), workers=1
    )
    for split in ("train", "eval", "warm"):
        tasks = [task(n, split=split) for n in range(5)]
        groups = scheduler.run(tasks, group_size=1, sampling=Sampling(temperature=1.0), seed=0)
        failed[split] = [t.failed for t in flat(groups) if t.failed]
    assert [a["split"] for a in asked] == ["train"] * 5 + ["eval"] * 3 + ["warm"] * 5
    assert [a["index"] for a in asked] == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 3, 4]
    assert (failed["train"], failed["warm"]) == ([], [])
    assert ["has 3 tasks in its eval split. Set eval.tasks" in reason for reason in failed["eval"]] == [True, True]


def test_an_environment_without_numbered_tasks_gets_no_options(play, scripted_env, turns_then_end):
    seen = []

    def first(env):
        seen.append((env.seed, env.options))
        return "Go."

    play(lambda: scripted_env(turns_then_end(1), first=first), tasks=2, workers=1)
    assert seen == [(task(n, split="train").seed, None) for n in range(2)]


# -- environments that break the contract ----------------------------------------------------------------


def raises(error):
    def play(*_):
        raise error

    return play


def answers(*result):
    return lambda *_: result


IMAGE = f"reset: BadAnswer: an observation holds 'image_url': {ONLY_TEXT}"


def shows(content):
    """Answer a reset with one message of this content."""
    return answers("", {"messages": [{"role": "tool", "content": content}]})


class Speechless(Exception):
    def __str__(self):
        raise ValueError


HUGE = "x" * (MOST_CHARACTERS + 1)
BROKEN = {
    "raises": (raises(ValueError("no luck")), r"step 1: ValueError: no luck"),
    "exits": (raises(SystemExit(3)), r"step 1: SystemExit: 3"),
    "raises what is no Exception": (raises(KeyboardInterrupt()), r"step 1: KeyboardInterrupt"),
    "says bytes": (answers(b"hm", 0.0, False, False, {}), r"step 1: BadAnswer: an observation must be a str.*b'hm'"),
    "says None": (answers(None, 0.0, False, False, {}), r"an observation must be a str.*None"),
    "pays nan": (answers("", math.nan, True, False, {}), r"step 1: BadAnswer: the reward is nan"),
    "pays infinity": (answers("", -math.inf, True, False, {}), r"the reward is -inf"),
    "pays what overflows a sum": (answers("", 1e308, False, False, {}), r"the reward is 1e\+308"),
    "pays words": (answers("", "much", True, False, {}), r"the reward is 'much'"),
    "pays nothing": (answers("", None, True, False, {}), r"step must return .* bad operand type"),
    "returns too little": (
        answers("", 0.0, True, {}),
        r"step must return \(observation, .*; it returned .*not enough values",
    ),
    "returns None": (lambda *_: None, r"step must return .*; it returned None"),
    "has no info": (answers("", 0.0, True, False, None), r"step must return .*AttributeError"),
    "says numbers": (answers("", 0.0, False, False, {"messages": [{"role": "user", "content": 3}]}), r"must be a str"),
    "speaks without a role": (answers("", 0.0, False, False, {"messages": [{"content": "x"}]}), r"must be a str"),
    "speaks in no list": (
        answers("", 0.0, False, False, {"messages": 3}),
        r"step must return .*'int' object is not iterable",
    ),
    "feeds back a number": (answers("", 0.0, True, False, {"feedback": 3}), r'info\["feedback"\] is int'),
    "whispers a list": (answers("", 0.0, True, False, {"privileged": ["x"]}), r'info\["privileged"\] must be a dict'),
    "whispers None": (answers("", 0.0, True, False, {"privileged": None}), r'info\["privileged"\] must be a dict'),
    "whispers numbers": (answers("", 0.0, True, False, {"privileged": {"a": 1}}), r"must be a dict of str to str"),
    "succeeds in many ways": (answers("", 0.0, True, False, {"success": np.ones(2)}), r"step must return .*ValueError"),
    "ends in words": (answers("", 0.0, "False", False, {}), r"terminated is 'False'; it must be a bool"),
    "succeeds in words": (answers("", 0.0, True, False, {"success": "no"}), r"success.* is 'no'; it must be a bool"),
    "attaches a novel": (
        answers("", 0.0, False, False, {"messages": [{"role": "user", "content": "", "x": HUGE * 9}]}),
        r"messages.* holds 9,000,0\d\d characters",
    ),
    "cannot even say what broke": (raises(Speechless()), r"step 1: Speechless$"),
    "says half an emoji": (answers("\ud83d", 0.0, False, False, {}), r"lone surrogate \('\\ud83d'\)"),
    "whispers half an emoji": (answers("", 0.0, True, False, {"privileged": {"a": "\ud83d"}}), r"lone surrogate"),
    "says a novel": (answers(HUGE, 0.0, False, False, {}), r"1,000,001 characters; at most 1,000,000"),
    "feeds back a novel": (answers("", 0.0, True, False, {"feedback": HUGE}), r"1,000,001 characters"),
}


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_an_environment_that_breaks_fails_its_own_episode_and_no_other(
    play, scripted_env, turns_then_end, name, deterministic
):
    breaks, reason = BROKEN[name]
    bad = task(1, split="train").seed

    def sometimes(env, action):
        return breaks(env, action) if env.seed == bad else turns_then_end(2)(env, action)

    episodes = flat(play(lambda: scripted_env(sometimes), tasks=3, deterministic=deterministic))
    assert [e.failed is None for e in episodes] == [True, False, True]
    assert [e.terminated for e in episodes] == [True, False, True]
    assert re.search(reason, episodes[1].failed), episodes[1].failed
    assert not episodes[1].success
    assert len(episodes[1].failed) <= 500


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (raises(OSError("no such table")), "reset: OSError: no such table"),
        (answers(b"bytes", {}), "reset: BadAnswer: an observation must be a str"),
        (
            shows([{"type": "image_url", "image_url": {"url": "x"}}]),
            IMAGE,
        ),
        (
            shows([{"type": "input_audio", "input_audio": {}}]),
            IMAGE.replace("image_url", "input_audio"),
        ),
        (answers("Go.", {"tools": "hammer"}), r'reset: BadAnswer: info\["tools"\] must be a list'),
        (
            answers("Go.", {"tools": [{"function": {"name": {1, 2}}}]}),
            "reset: BadAnswer: reset must return .*Object of type set",
        ),
        (answers("Go.", {"tools": [{"type": "function"}]}), r'reset: BadAnswer: info\["tools"\] must be a list'),
        (answers("", {"messages": []}), "prompt of turn 0: the chat template"),
        (answers("Go.", 3), "reset: BadAnswer: reset must return .*AttributeError"),
    ],
    ids=[
        "raises",
        "bytes",
        "image",
        "sound",
        "tools as text",
        "tools not in JSON",
        "tools without a function",
        "silence",
        "no info",
    ],
)
def test_an_environment_that_breaks_at_its_reset_fails_before_the_first_turn(
    play, scripted_env, turns_then_end, make_chat, first, reason
):
    bad = task(1, split="train").seed

    def sometimes(env):
        return first() if env.seed == bad else "Go."

    chat = make_chat("no_tools")
    episodes = flat(play(lambda: scripted_env(turns_then_end(1), first=sometimes), tasks=3, chat=chat))
    assert [e.failed is None for e in episodes] == [True, False, True]
    assert re.match(reason, episodes[1].failed), episodes[1].failed
    assert episodes[1].turns == []


def test_a_constructor_that_raises_fails_every_episode_and_the_round_still_ends(play):
    episodes = flat(play(raises(ImportError("no simulator")), tasks=3))
    assert [e.failed.partition(" (")[0] for e in episodes] == ["reset: ImportError: no simulator"] * 3
    assert all(e.failed.startswith("reset: ImportError: no simulator (test_rollout.py, line ") for e in episodes)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("where", ["reset", "step"])
def test_an_environment_that_hangs_is_given_up_and_the_others_go_on(
    play, scripted_env, turns_then_end, where, deterministic
):
    gate, bad = threading.Event(), task(1, split="train").seed

    def hangs(env, *_):
        if env.seed == bad:
            gate.wait()
        return turns_then_end(2)(env, "") if where == "step" else "Go."

    options = {"first": hangs} if where == "reset" else {}
    since = time.monotonic()
    episodes = flat(
        play(
            lambda: scripted_env(hangs if where == "step" else turns_then_end(2), **options),
            tasks=4,
            deterministic=deterministic,
            step_timeout=0.3,
            reset_timeout=0.3,
            workers=1,
        )
    )
    gate.set()
    assert time.monotonic() - since < 20
    assert [e.failed is None for e in episodes] == [True, False, True, True]
    assert f"TimeoutError: no answer within 0.3 s (rollout.{where}_timeout)" in episodes[1].failed
    assert episodes[1].fault is Fault.TIMEOUT
    assert episodes[1].failed.startswith("reset" if where == "reset" else "step 1")


def test_roles_that_the_template_refuses_fail_the_episode(play, scripted_env, turns_then_end, make_chat):
    two = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}

    def sometimes(env, action):
        if env.seed == task(0, split="train").seed:
            return "", 0.0, False, False, two
        return turns_then_end(2)(env, action)

    episodes = flat(play(lambda: scripted_env(sometimes), tasks=2, chat=make_chat("strict")))
    assert episodes[0].failed.startswith("prompt of turn 1: the chat template")
    assert "roles must alternate" in episodes[0].failed
    assert episodes[1].failed is None


def test_broken_environments_are_closed_and_never_used_again(make_scheduler, scripted_env):
    made = []

    def make():
        made.append(scripted_env(lambda env, _: 1 / 0 if env.seed % 2 else ("", 0.0, True, False, {})))
        return made[-1]

    scheduler = make_scheduler(make)
    tasks = [task(n, split="train") for n in range(12)]
    for _ in range(2):
        scheduler.run(tasks, group_size=1, sampling=Sampling(temperature=1.0), seed=0)
    broken = 2 * sum(t.seed % 2 for t in tasks)
    assert sum(env.closed for env in made) == broken
    assert len(made) == broken + 12 - broken // 2
    scheduler.close()
    assert all(env.closed for env in made)


def test_environments_that_hang_or_raise_when_they_are_closed_do_not_hold_up_the_end(
    make_scheduler, scripted_env, turns_then_end, caplog
):
    gate = threading.Event()
    closings = iter([lambda: gate.wait(), lambda: 1 / 0])

    def make():
        env = scripted_env(turns_then_end(1))
        env.close = next(closings)
        return env

    scheduler = make_scheduler(make, step_timeout=0.2)
    scheduler.run([task(n, split="train") for n in range(2)], group_size=1, sampling=Sampling(temperature=1.0), seed=0)
    scheduler.close()
    gate.set()
    assert "could not be closed: TimeoutError" in caplog.text
    assert "could not be closed: ZeroDivisionError" in caplog.text


def test_what_an_environment_changes_later_does_not_change_what_was_said(play, scripted_env, make_chat):
    message = {"role": "user", "content": "first"}
    tools = [{"type": "function", "function": {"name": "a", "parameters": {}}}]
    privileged = {"solution": "s"}

    def meddles(env, action):
        message["content"] = "changed"
        tools[0]["function"]["name"] = "changed"
        privileged["solution"] = "changed"
        return "on", 0.0, env.turn == 2, False, {}

    first = ("", {"messages": [message], "tools": tools, "privileged": privileged})
    [episode] = flat(play(lambda: scripted_env(meddles, first=first), tasks=1))
    assert episode.turns[0].messages == [{"role": "user", "content": "first"}]
    assert episode.tools[0]["function"]["name"] == "a"
    assert episode.privileged == {"solution": "s"}


def test_an_unprepared_teacher_is_an_error_of_the_run_and_not_of_an_episode(play, scripted_env, turns_then_end):
    with pytest.raises(DataError, match="no solution"):
        play(lambda: scripted_env(turns_then_end(1)), rewrite=raises(DataError("no solution")))


def test_a_round_that_was_interrupted_leaves_nothing_to_the_next(make_scheduler, scripted_env, turns_then_end):
    tasks, gate = [task(n, split="train") for n in range(4)], threading.Event()

    def waits(env, action):
        if env.seed != tasks[0].seed:
            gate.wait()
        return turns_then_end(2 if gate.is_set() else 1)(env, action)

    def interrupts(_):
        raise KeyboardInterrupt

    interrupted = make_scheduler(lambda: scripted_env(waits), deterministic=False)
    asked = {"group_size": 1, "sampling": Sampling(temperature=1.0), "seed": 0}
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(tasks, **asked, on_finish=interrupts)
    gate.set()
    time.sleep(0.2)  # the other episodes' answers are there now, under the numbers of the next round
    fresh = make_scheduler(lambda: scripted_env(waits), deterministic=False)
    texts = [
        [[t.completion_ids for t in e.turns] for e in flat(one.run(tasks, **asked))] for one in (interrupted, fresh)
    ]
    assert texts[0] == texts[1]


def test_every_episode_is_reported_once_when_it_ends(make_scheduler, scripted_env, turns_then_end):
    reported = []
    scheduler: RolloutScheduler = make_scheduler(lambda: scripted_env(turns_then_end(2)), concurrency=2)
    groups = scheduler.run(
        [task(n, split="train") for n in range(3)],
        group_size=2,
        sampling=Sampling(temperature=1.0),
        seed=0,
        on_finish=reported.append,
    )
    key = [(t.task.index, t.member) for t in reported]
    assert sorted(key) == [(n, m) for n in range(3) for m in range(2)]
    assert {id(t.turns) for t in reported} == {id(t.turns) for t in flat(groups)}


# -- what becomes of a failure ---------------------------------------------------------------------------


def breaks_on(attempts, turns_then_end):
    """A play that raises at its first step, in the given attempts at the second task's first member."""
    seen = itertools.count()
    bad = task(1, split="train").seed

    def play(env, action):
        if env.seed == bad and env.turn == 1 and not hasattr(env, "tried"):
            env.tried = next(seen)
            if env.tried in attempts:
                raise ValueError("no luck")
        return turns_then_end(2)(env, action)

    return play


def outcome(groups):
    return [[t.failed is None for t in g.trajectories] for g in groups]


@pytest.mark.parametrize("deterministic", [True, False])
def test_retry_plays_a_failed_episode_again_in_a_fresh_environment(play, scripted_env, turns_then_end, deterministic):
    made, broken = [], breaks_on({0}, turns_then_end)

    def make():
        made.append(scripted_env(broken))
        return made[-1]

    groups = play(make, tasks=3, on_failure="retry", deterministic=deterministic, concurrency=2)
    assert outcome(groups) == [[True]] * 3
    assert [len(g.replaced) for g in groups] == [0, 1, 0]
    assert groups[1].replaced[0].failed.startswith("step 1: ValueError: no luck (test_rollout.py, line ")
    assert len(groups[1].attempts) == 2
    assert len(made) == 3  # an idle one is not fresh enough for a retry


def test_a_retry_changes_nobody_elses_draws_and_not_its_own(play, scripted_env, turns_then_end, make_model):
    model = make_model(stops=True)
    for deterministic in (True, False):
        options = {"tasks": 5, "group_size": 2, "model": model, "concurrency": 3, "deterministic": deterministic}
        calm = flat(play(lambda: scripted_env(turns_then_end(2)), **options))
        broken = breaks_on({0}, turns_then_end)
        groups = play(lambda broken=broken: scripted_env(broken), on_failure="retry", **options)
        assert sum(len(g.replaced) for g in groups) == 1
        assert [[t.completion_ids for t in e.turns] for e in flat(groups)] == [
            [t.completion_ids for t in e.turns] for e in calm
        ]


def test_who_is_played_again_shares_no_batch_with_a_first_attempt(play, scripted_env, turns_then_end, make_model):
    engine, batches, fresh = TransformersEngine(make_model(stops=True)), [], []
    submit, step = engine.submit, engine.step

    def watching_submit(request):
        fresh.append(request.session)
        submit(request)

    def watching_step():
        if fresh:
            batches.append(sorted(fresh))
            fresh.clear()
        return step()

    engine.submit, engine.step = watching_submit, watching_step
    broken = breaks_on({0}, turns_then_end)
    play(lambda: scripted_env(broken), tasks=5, engine=engine, concurrency=2, on_failure="retry")
    assert batches == [[0, 1], [0], [1], [1], [2, 3], [2, 3], [4], [4]]


def test_retries_are_bounded_and_the_last_failure_counts(play, scripted_env, turns_then_end):
    broken = breaks_on(range(9), turns_then_end)
    groups = play(lambda: scripted_env(broken), tasks=3, on_failure="retry", retries=3)
    assert outcome(groups) == [[True], [False], [True]]
    assert [len(g.replaced) for g in groups] == [0, 3, 0]
    assert [g.dropped for g in groups] == [False, True, False]


def test_keep_trains_on_the_members_that_are_left_unless_they_are_too_few(play, scripted_env, turns_then_end):
    options = {"tasks": 2, "group_size": 3, "on_failure": "keep"}
    for attempts, least, dropped in (({0}, 2, False), ({0, 1}, 2, True), ({0}, 3, True), ({0, 1}, 1, False)):
        broken = breaks_on(attempts, turns_then_end)
        groups = play(lambda broken=broken: scripted_env(broken), min_group_size=least, **options)
        assert [g.dropped for g in groups] == [False, dropped]
        assert len(groups[0].usable) == 3
        assert len(groups[1].usable) == (0 if dropped else 3 - len(attempts))
        assert groups[1].replaced == []


def test_drop_trains_on_no_member_of_a_group_in_which_one_failed(play, scripted_env, turns_then_end):
    broken = breaks_on({0}, turns_then_end)
    groups = play(lambda: scripted_env(broken), tasks=3, group_size=3, on_failure="drop")
    assert [len(g.usable) for g in groups] == [3, 0, 3]
    assert sum(outcome(groups)[1]) == 2


def test_truncated_episodes_are_no_failures_to_any_policy(play, scripted_env, turns_then_end):
    for policy in ("retry", "keep", "drop"):
        [group] = play(lambda: scripted_env(turns_then_end(9)), tasks=1, group_size=2, max_turns=2, on_failure=policy)
        assert [t.truncated for t in group.usable] == [True, True]
        assert (group.dropped, group.replaced) == (False, [])


def test_episodes_that_are_played_again_are_reported_once(make_scheduler, scripted_env, turns_then_end):
    reported = []
    broken = breaks_on({0}, turns_then_end)
    make_scheduler(lambda: scripted_env(broken), on_failure="retry").run(
        [task(n, split="train") for n in range(2)],
        group_size=2,
        sampling=Sampling(temperature=1.0),
        seed=0,
        on_finish=reported.append,
    )
    assert len(reported) == 4
    assert all(t.failed is None for t in reported)


def test_a_round_with_failures_says_so_once_with_the_reasons(play, scripted_env, turns_then_end, caplog):
    broken = breaks_on({0, 1}, turns_then_end)
    play(lambda: scripted_env(broken), tasks=3, group_size=3)
    [record] = caplog.records
    assert record.getMessage().partition(" (test_rollout.py")[0] == (
        "2 of 9 episodes failed (2 attempts): 2 x step 1: ValueError: no luck"
    )


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"on_failure": "keep", "retries": 2}, "retries\n  is used by on_failure = retry alone, but on_failure = keep"),
        (
            {"on_failure": "drop", "min_group_size": 2, "group_size": 4},
            "min_group_size\n  is used by on_failure = retry or keep alone",
        ),
        ({"min_group_size": 3, "group_size": 2}, "rollout.min_group_size = 3 is more than group_size = 2"),
    ],
)
def test_a_policy_that_contradicts_itself_is_refused(settings, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        RolloutConfig(**settings)


def test_processes_are_refused_where_there_is_no_fork(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(ValueError, match=r"env\.workers = processes needs fork"):
        EnvConfig(id="opd/Lookup-v0", workers="processes")


def test_terminated_and_truncated_at_once_is_terminated(play, scripted_env):
    [episode] = flat(play(lambda: scripted_env(lambda *_: ("", 1.0, True, True, {})), tasks=1))
    assert (episode.terminated, episode.truncated) == (True, False)


# -- limits of time --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_episode_whose_time_is_over_is_truncated_and_its_environment_not_used_again(
    play, scripted_env, turns_then_end
):
    gate, bad, made = threading.Event(), task(1, split="train").seed, []

    def hangs(env, action):
        if env.seed == bad and env.turn == 2:
            gate.wait()
        return turns_then_end(3)(env, action)

    def make():
        made.append(scripted_env(hangs))
        return made[-1]

    for deterministic in (True, False):
        episodes = flat(
            play(make, tasks=3, episode_timeout=1.5, concurrency=1, deterministic=deterministic, on_failure="retry")
        )
        assert [(e.terminated, e.truncated, e.failed) for e in episodes] == [
            (True, False, None),
            (False, True, None),
            (True, False, None),
        ]
        assert len(episodes[1].turns) == 2
    gate.set()
    assert len(made) == 4


def test_no_turn_is_begun_once_the_time_of_an_episode_is_over(play, scripted_env, turns_then_end):
    def slow(env, action):
        time.sleep(0.4)
        return turns_then_end(9)(env, action)

    [episode] = flat(play(lambda: scripted_env(slow), tasks=1, episode_timeout=1.0, max_turns=9))
    assert (episode.truncated, episode.failed) == (True, None)
    assert 1 <= len(episode.turns) <= 3


def test_grading_has_a_limit_of_its_own(play, scripted_env):
    def grades(seconds):
        def play(env, action):
            with grading():
                time.sleep(seconds)
            return "", 1.0, True, False, {}

        return play

    [fine] = flat(play(lambda: scripted_env(grades(0.6)), tasks=1, step_timeout=0.2, grading_timeout=20.0))
    assert fine.terminated
    [late] = flat(play(lambda: scripted_env(grades(30.0)), tasks=1, step_timeout=20.0, grading_timeout=0.3))
    assert late.failed == "step 1: TimeoutError: no answer within 0.3 s (rollout.grading_timeout)"


def test_time_after_grading_counts_to_the_step_again(play, scripted_env):
    def dawdles(env, action):
        with grading(), grading():
            time.sleep(0.5)
        time.sleep(30.0)

    [late] = flat(play(lambda: scripted_env(dawdles), tasks=1, step_timeout=0.3, grading_timeout=20.0))
    assert late.failed == "step 1: TimeoutError: no answer within 0.3 s (rollout.step_timeout)"


def test_rubrics_count_as_grading(play, scripted_env):
    def slow(prompts, completions):
        time.sleep(0.6)
        return [1.0]

    def graded(env, action):
        return "", Rubric(slow).score("", action, {}).total, True, False, {}

    [episode] = flat(play(lambda: scripted_env(graded), tasks=1, step_timeout=0.2))
    assert episode.reward == 1.0


# -- the watchdog ----------------------------------------------------------------------------------------


def stalls(caplog):
    return [r.getMessage() for r in caplog.records if "nothing has finished" in r.getMessage()]


@pytest.mark.slow
def test_a_stall_names_which_episodes_wait_for_their_environment_and_for_how_long(
    play, scripted_env, turns_then_end, caplog
):
    gate = threading.Event()

    def waits(env, action):
        if env.turn == 2 and env.seed == task(1, split="train").seed:
            gate.wait(2.3)
        return turns_then_end(2)(env, action)

    play(lambda: scripted_env(waits), tasks=2, deterministic=False, stall_warning=0.5, workers=1, concurrency=1)
    gate.set()
    said = stalls(caplog)
    assert 2 <= len(said) <= 5  # once an interval, and not more
    assert re.search(r"waiting for train/1 member 0: its environment \(step 2\) since [01] s", said[0])
    idle = [float(re.search(r"for (\d+) s", line)[1]) for line in said]
    assert idle == sorted(idle)


@pytest.mark.slow
def test_a_stall_tells_episodes_that_find_no_free_worker_grade_or_have_not_begun(
    make_scheduler, scripted_env, turns_then_end, caplog
):
    def grades(env, action):
        with grading():
            time.sleep(1.2)
        return "", 0.0, True, False, {}

    play = make_scheduler(lambda: scripted_env(grades), stall_warning=0.5, workers=1, concurrency=2)
    play.run([task(n, split="train") for n in range(3)], group_size=1, sampling=Sampling(temperature=1.0), seed=0)
    text = "\n".join(stalls(caplog))
    assert "its environment (step 1, grading)" in text
    assert "its environment (step 1, no worker is free)" in text
    assert "1 not begun" in text


def test_a_stall_of_the_engine_is_called_that(play, scripted_env, scripted_engine, turns_then_end, caplog):
    engine = scripted_engine([[[5]]])
    step = engine.step

    def slow():
        time.sleep(1.2)
        return step()

    engine.step = slow
    play(lambda: scripted_env(turns_then_end(1)), tasks=1, engine=engine, stall_warning=0.5)
    assert "train/0 member 0: the engine (turn 0) since" in stalls(caplog)[0]


def test_a_round_that_goes_on_warns_of_nothing(play, scripted_env, turns_then_end, caplog):
    def slow(env, action):
        time.sleep(0.15)
        return turns_then_end(8)(env, action)

    play(lambda: scripted_env(slow), tasks=1, max_turns=9, stall_warning=1.0)
    assert stalls(caplog) == []
    assert not [t for t in threading.enumerate() if t.name == "opd-watchdog"]
