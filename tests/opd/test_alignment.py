"""From sampled ids to trained positions: nothing shifts, nothing is lost, nobody sees what they must not.

Real rollouts of random models, and scripted ones that end in every way, in environments with tools; then what
both sides say at every trained position against a brute-force score that feeds each prefix alone.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.episodes.tasks import task
from opd.maths.logprobs import chunked_logprobs
from opd.objective.collate import collate, microbatches
from opd.objective.objective import objective
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import in_first_user_message, with_solution
from opd.teachers.teacher import Teacher
from opd.trainers.opsd import Opsd, OpsdConfig
from opd.types import StopReason, to_sample

TOOLS = [{"type": "function", "function": {"name": "get", "description": "d", "parameters": {"type": "object"}}}]
TEXT = st.text(alphabet="ab the\n{}123é", max_size=12)


def conversation(env_class, replies, solution, tools):
    """Make an environment that says these texts, by turns as a tool and as a user, whatever it is told."""

    def first(env):
        return "Q" * (1 + env.seed % 5), {"tools": TOOLS if tools else None, "privileged": {"solution": solution}}

    def play(env, action):
        role = "tool" if tools and env.turn % 2 else "user"
        message = {"role": role, "content": replies[(env.turn + env.seed) % len(replies)]}
        return "", 0.0, env.turn == len(replies), False, {"messages": [message]}

    return lambda: env_class(play, first=first)


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples // 4)
@given(
    replies=st.lists(TEXT, min_size=1, max_size=3),
    solution=st.text(alphabet="xyz \n", min_size=1, max_size=40),
    template=st.sampled_from(["chatml", "forgetful", "trimming", "no_tools"]),
    max_tokens=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_trained_ids_are_the_sampled_ones_and_teacher_scores_equal_brute_force(
    play, scripted_env, make_chat, make_model, replies, solution, template, max_tokens, seed
):
    chat, model = make_chat(template, on_rewrite="fork"), make_model(dtype=torch.float64, stops=True)
    make_env = conversation(scripted_env, replies, solution, tools=template != "no_tools")
    groups = play(make_env, tasks=3, seed=seed, model=model, chat=chat, max_tokens=max_tokens)
    trajectories = [t for group in groups for t in group.trajectories]
    assert [t.failed for t in trajectories] == [None] * 3
    samples, sampled = [], []
    for number, trajectory in enumerate(trajectories):
        for segment in trajectory.segments():
            longer = solution * (number + 1)  # the teachers' contexts differ in length

            def rewrite(turn, messages, first=segment.start, text=longer):
                if turn != first:
                    return messages
                return in_first_user_message(messages, lambda prompt: with_solution(prompt, text))

            view = chat.view(trajectory, segment, rewrite)
            samples.append(to_sample(trajectory, segment, view=view, distill=1.0))
            sampled.append([i for turn in segment.turns for i in turn.completion_ids])
            assert view.token_ids != samples[-1].token_ids
    assert [s.completion_ids for s in samples] == sampled
    assert sum(sum(s.completion_mask) for s in samples) == sum(t.completion_tokens for t in trajectories)
    teacher = Teacher(TeacherConfig(weights="frozen", rate=None), model)
    for part in microbatches(samples, 256):
        batch = collate([samples[i] for i in part], 0)
        taught = teacher.teach(batch)
        assert batch.targets.tolist() == [i for n in part for i in sampled[n]]
        batched = chunked_logprobs(taught.hidden, taught.head, batch.targets).tolist()
        brute = []
        for view in (samples[n].teacher_view for n in part):
            brute += one_by_one(model, view.token_ids, view.rows)[range(len(view.rows)), view.targets].tolist()
        assert batched == pytest.approx(brute, abs=1e-10)


IDS = st.lists(st.sampled_from([*range(60, 80), 256, 257, 260, 271, 272]), max_size=4)  # bytes, merges, markup
THOUGHT = st.tuples(IDS, IDS).map(lambda parts: [269, *parts[0], 270, *parts[1]])  # makes "forgetful" fork
TURNS = st.lists(
    st.tuples(st.one_of(IDS, THOUGHT), st.sampled_from(["stop", "cut"]), st.sampled_from(["tool", "user"])).filter(
        lambda turn: turn[0] or turn[1] == "stop"
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.slow
@settings(max_examples=settings.default.max_examples * 2 // 5)
@given(
    episodes=st.lists(st.tuples(TURNS, st.text(alphabet="xyz \n", max_size=30)), min_size=1, max_size=3),
    template=st.sampled_from(["chatml", "forgetful", "forgetful", "trimming", "no_tools", "strict", "spaced"]),
    kind=st.sampled_from(["forward_kl", "reverse_kl"]),
)
def test_whatever_is_said_every_trained_position_of_both_sides_equals_brute_force(
    play, scripted_env, scripted_engine, make_chat, make_model, episodes, template, kind
):
    chat, student = make_chat(template, on_rewrite="fork"), make_model(dtype=torch.float64)
    said = [[[*ids, *([chat.end_id] if end == "stop" else [])] for ids, end, _ in turns] for turns, _ in episodes]
    tasks = {task(n, split="train").seed: n for n in range(len(episodes))}

    def first(env):
        solution = episodes[tasks[env.seed]][1]
        return "Q" * (1 + tasks[env.seed]), {"tools": TOOLS, "privileged": {"solution": solution}}

    def answer(env, _):
        turns, _ = episodes[tasks[env.seed]]
        message = {"role": turns[env.turn - 1][2], "content": "ab12 the"[: env.turn * 3]}
        return "", 0.0, env.turn == len(turns), False, {"messages": [message]}

    engine = scripted_engine(said)
    groups = play(
        lambda: scripted_env(answer, first=first),
        tasks=len(episodes),
        engine=engine,
        chat=chat,
        max_tokens=20,
        max_length=4096,
    )
    trajectories = [t for group in groups for t in group.trajectories]
    assert [t.failed for t in trajectories] == [None] * len(episodes)
    assert [[turn.completion_ids for turn in t.turns] for t in trajectories] == said
    method = Opsd(OpsdConfig(divergence={"kind": kind, "clip": None}), chat)
    samples = [sample for group in groups for sample in method.annotate(group)]
    assert [i for s in samples for i in s.completion_ids] == [i for turns in said for ids in turns for i in ids]
    rest = iter(samples)
    for number, trajectory in enumerate(trajectories):
        for segment in trajectory.segments():
            sample = next(rest)
            question = "Q" * (1 + number) + "\n\nHere is a reference solution"
            assert chat.tokenizer.decode(sample.teacher_view.token_ids).count(question) == 1
            ends = [i + 1 for i in range(len(sample.turn)) if sample.turn[i : i + 2] != [sample.turn[i]] * 2]
            for turn, end in zip(range(segment.start, segment.start + len(ends)), ends, strict=True):
                assert sample.token_ids[:end] == engine.prompts[number][turn] + said[number][turn]
    # Another model teaches than learns, and the id that ends a turn is the one that pads.
    teacher = Teacher(TeacherConfig(weights="live", rate=None), make_model(dtype=torch.float64, seed=7))
    batch = collate(samples, chat.end_id)
    result = objective(student, batch, method.losses(method.config), teacher.teach(batch))
    brute = []
    for sample in samples:
        ours = one_by_one(student, sample.token_ids, sample.rows)
        theirs = one_by_one(teacher.student, sample.teacher_view.token_ids, sample.teacher_view.rows)
        p, q = (theirs, ours) if kind == "forward_kl" else (ours, theirs)
        brute += (p.exp() * (p - q)).sum(-1).tolist()
    assert len(brute) == sum(len(ids) for turns in said for ids in turns)
    assert result.facts["nats"].tolist() == pytest.approx(brute, abs=1e-10)


@torch.no_grad()
def one_by_one(model, token_ids, rows):
    """Return the log-probs [rows, V] after each row, from a forward pass over nothing but what stands up to it."""
    logits = [model.model(input_ids=torch.tensor([token_ids[: row + 1]])).logits[0, -1] for row in rows]
    return torch.stack(logits).log_softmax(-1)


def test_the_sampled_log_probs_are_the_students_own_at_the_rows_that_train(play, scripted_env, make_model, make_chat):
    model = make_model(dtype=torch.float64, stops=True)
    make_env = conversation(scripted_env, ["one", "two"], "s", tools=True)
    groups = play(make_env, tasks=4, model=model, chat=make_chat(), max_tokens=5)
    samples = [to_sample(t, s, distill=1.0) for g in groups for t in g.trajectories for s in t.segments()]
    batch = collate(samples, 0)
    own = chunked_logprobs(model(batch.input_ids, batch.rows), model.head(), batch.targets)
    torch.testing.assert_close(own.float().detach(), batch.sampler_logprobs, rtol=0, atol=1e-5)


def test_a_completion_that_the_limit_cut_gets_an_end_of_turn_that_is_not_trained(
    play, scripted_env, make_model, make_chat
):
    chat = make_chat()
    make_env = conversation(scripted_env, ["one", "two"], "s", tools=True)
    [group] = play(make_env, tasks=1, model=make_model(), chat=chat, max_tokens=2)
    [trajectory] = group.trajectories
    assert trajectory.turns[0].stop_reason is StopReason.LENGTH
    [sample] = [to_sample(trajectory, segment) for segment in trajectory.segments()]
    place = len(trajectory.turns[0].prompt_ids) + 2
    assert sample.token_ids[place] == chat.end_id
    assert sample.completion_mask[place] == 0
    assert math.isnan(sample.sampler_logprobs[place])


def test_what_is_privileged_is_never_in_the_students_prompt(play, scripted_env, make_model, make_chat):
    secret = "zzzz zz"
    chat = make_chat()
    make_env = conversation(scripted_env, ["one", "two"], secret, tools=True)
    [group] = play(make_env, tasks=1, model=make_model(stops=True), chat=chat)
    [trajectory] = group.trajectories
    assert trajectory.privileged == {"solution": secret}
    prompts = [i for turn in trajectory.turns for i in turn.prompt_ids]
    assert secret not in chat.tokenizer.decode(prompts)
