"""SD-Zero: what the teacher sees and where its targets come from, what phase 1 trains on, and its file."""

import json
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from opd.engines.base import Sampling
from opd.episodes.config import RolloutConfig
from opd.episodes.tasks import task
from opd.errors import DataError, Interrupted
from opd.losses import Divergence
from opd.objective.collate import collate
from opd.objective.objective import objective
from opd.ranks.ranks import Ranks
from opd.teachers.config import TeacherConfig
from opd.teachers.privileged import CUE_RIGHT, CUE_WRONG
from opd.teachers.teacher import Teacher
from opd.trainers.loop.play import Standing
from opd.trainers.loop.progress import Progress
from opd.trainers.parts.episodes import EpisodeLog, collect, unsampled
from opd.trainers.sd_zero.method import Distilling, SdZero, SdZeroConfig
from opd.trainers.sd_zero.revisions import (
    Collection,
    Reviser,
    attempted,
    read_trace,
    summary,
    to_samples,
    to_supervised,
)
from opd.types import Sample, TeacherView

TOOLS = [{"type": "function", "function": {"name": "get", "description": "d", "parameters": {"type": "object"}}}]


def lucky(env_class, *, turns=2, tools=True):
    """An environment of `turns` turns whose even-numbered tasks are solved, whatever is said."""

    def play(env, action):
        done = env.turn == turns
        role = "tool" if tools else "user"
        info = {"messages": [{"role": role, "content": f"ab {env.turn}"}], "success": done and env.seed % 2 == 0}
        return "", float(info["success"]), done, False, info

    return lambda: env_class(play, first=lambda env: (f"Question {env.seed}", {"tools": TOOLS if tools else None}))


@torch.no_grad()
def one_by_one(model, token_ids, rows):
    """The log-probs [rows, V] after each row, from a forward pass over nothing but what stands up to it."""
    logits = [model.model(input_ids=torch.tensor([token_ids[: row + 1]])).logits[0, -1] for row in rows]
    return torch.stack(logits).log_softmax(-1)


@pytest.mark.parametrize("place", ["prompt", "reply"])
@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "turns"),
    [("chatml", 1), pytest.param("chatml", 3, marks=pytest.mark.long), ("no_tools", 2)],
)
def test_the_teachers_targets_are_the_second_copy_of_the_attempt_position_by_position(
    play, scripted_env, make_chat, make_model, place, template, turns
):
    chat, student = make_chat(template), make_model(dtype=torch.float64, stops=True)
    make_env = lucky(scripted_env, turns=turns, tools=template != "no_tools")
    groups = play(make_env, tasks=3, model=student, chat=chat)
    method = Distilling(SdZeroConfig(place=place), chat)
    attempts = [t for group in groups for t in group.trajectories]
    samples = [sample for group in groups for sample in method.annotate(group)]
    assert {t.success for t in attempts} == {True, False}
    assert [t.failed for t in attempts] == [None] * len(samples)
    teacher = Teacher(TeacherConfig(weights="live", rate=None), make_model(dtype=torch.float64, seed=7))
    batch = collate(samples, chat.end_id)
    nats = objective(student, batch, method.losses(method.config), teacher.teach(batch)).facts["nats"].tolist()
    brute = []
    for attempt, sample in zip(attempts, samples, strict=True):
        [segment] = attempt.segments()
        opening = method.reviser.opening(attempt, segment)
        view = sample.teacher_view
        # What the student said and was told, once more, to the id, behind the attempt and its cue.
        assert view.token_ids == opening + sample.token_ids[len(segment.turns[0].prompt_ids) :]
        assert view.rows == [row - len(segment.turns[0].prompt_ids) + len(opening) for row in sample.rows]
        shown = chat.tokenizer.decode(opening)
        assert [shown.count(cue) for cue in (CUE_RIGHT, CUE_WRONG)] == [attempt.success, not attempt.success]
        assert all(f"ab {n}" in shown for n in range(1, turns))
        assert not any(cue in chat.tokenizer.decode(sample.token_ids) for cue in (CUE_RIGHT, CUE_WRONG))
        ours = one_by_one(student, sample.token_ids, sample.rows)
        theirs = one_by_one(teacher.student, view.token_ids, range(len(view.token_ids)))[view.rows]
        brute += (ours.exp() * (ours - theirs)).sum(-1).tolist()
    assert nats == pytest.approx(brute, abs=1e-10)


def test_in_the_reply_both_copies_are_the_sampled_ids_and_the_first_is_left_open(
    play, scripted_env, make_chat, make_model
):
    chat = make_chat()
    [group] = play(lucky(scripted_env, turns=1), tasks=1, model=make_model(stops=True), chat=chat)
    [attempt] = group.trajectories
    [turn] = attempt.turns
    view = Reviser(chat, ("Right.", "Wrong."), "reply").view(attempt, attempt.segments()[0])
    said = [i for i in turn.completion_ids if i != chat.end_id]
    cue = chat.encode(f"\n\n{'Right.' if attempt.success else 'Wrong.'}\n\n")
    assert view.token_ids == [*turn.prompt_ids, *said, *cue, *turn.completion_ids]
    assert view.targets == turn.completion_ids


def test_where_the_template_rewrites_the_past_every_sequence_has_its_own_view(
    play, scripted_env, scripted_engine, make_chat
):
    chat = make_chat("forgetful", on_rewrite="fork")
    thought = [269, 65, 270, 66, chat.end_id]
    engine = scripted_engine([[thought, thought]])
    [group] = play(lucky(scripted_env, tools=False), tasks=1, engine=engine, chat=chat, max_tokens=20)
    samples = Distilling(SdZeroConfig(), chat).annotate(group)
    assert [s.completion_ids for s in samples] == [thought, thought]
    assert all(
        CUE_WRONG in chat.tokenizer.decode(s.teacher_view.token_ids) or group.trajectories[0].success for s in samples
    )


def test_an_attempt_that_is_too_long_is_dropped_whole_and_counted(play, scripted_env, make_chat, make_model):
    chat = make_chat()
    groups = play(lucky(scripted_env), tasks=4, model=make_model(stops=True), chat=chat)
    sizes = [
        len(sample.teacher_view.token_ids)
        for group in groups
        for sample in Distilling(SdZeroConfig(), chat).annotate(group)
    ]
    limit = sorted(sizes)[1]
    assert limit < max(sizes)
    method = Distilling(SdZeroConfig(max_teacher_tokens=limit), chat)
    kept = [sample for group in groups for sample in method.annotate(group)]
    assert [len(s.teacher_view.token_ids) for s in kept] == [size for size in sizes if size <= limit]
    assert method.dropped == {"too_long": sum(size > limit for size in sizes)}
    assert all(s.completion_ids == s.teacher_view.targets for s in kept)


def test_a_view_that_holds_fewer_tokens_than_were_sampled_is_refused():
    whole = to_supervised([unsampled([1, 2], [3, 4, 5])], task(0, split="train"))
    with pytest.raises(DataError, match="does not hold the sampled ids"):
        Sample(
            **{f: getattr(whole, f) for f in Sample.__slots__ if f != "teacher_view"},
            teacher_view=TeacherView(token_ids=[9, 9, 9, 3, 4], rows=[2, 3]),
        )


def test_an_attempt_of_one_turn_is_revised_in_the_same_turn(make_chat):
    chat = make_chat()
    reviser = Reviser(chat, (CUE_RIGHT, CUE_WRONG), "prompt")
    attempt, revision = [unsampled([1, 2], [70, 71, chat.end_id])], [unsampled([8, 8, 8], [72, chat.end_id])]
    [turn] = reviser.generation(attempt, CUE_WRONG, revision)
    doubt = chat.encode(f"\n\n{CUE_WRONG}\n\n")
    assert turn == unsampled([1, 2], [70, 71, *doubt, 72, chat.end_id])


def test_the_cue_stands_in_place_of_the_last_action_of_an_attempt_of_several_turns(make_chat):
    chat = make_chat()
    reviser = Reviser(chat, (CUE_RIGHT, CUE_WRONG), "prompt")
    attempt = [unsampled([1, 2], [70]), unsampled([3], [71])]
    revision = [unsampled([8, 8], [72]), unsampled([4], [73])]
    assert reviser.generation(attempt, CUE_WRONG, revision) == [
        unsampled([1, 2], [70]),
        unsampled([3], [*chat.encode(f"{CUE_WRONG}\n\n"), 72]),
        unsampled([4], [73]),
    ]
    sample = to_supervised(reviser.generation(attempt, CUE_WRONG, revision), task(0, split="train"), 0.5)
    assert [w for w, m in zip(sample.ce_weight, sample.completion_mask, strict=True) if m] == [0.5] * sum(
        sample.completion_mask
    )
    assert sample.completion_mask[:4] == [0, 0, 1, 0]


def test_the_switch_between_paper_and_code_makes_the_stages_and_their_losses():
    def stages(**settings):
        return SdZero.stages(SdZeroConfig(**settings))

    def of(stage):
        return stage.make.keywords

    revising, distilling = stages()
    assert of(revising)["parts"] == {"generation": 1.0, "revision": 1.0}
    assert distilling.losses.distill.divergence == Divergence("reverse_kl")
    first, second, third = stages(variant="code")
    assert (of(first)["parts"], of(second)["parts"]) == ({"generation": 1.0}, {"revision": 1.0})
    assert (of(first)["collects"], of(second)["collects"]) == (True, False)
    assert third.losses.distill.divergence == Divergence("mixed_kl", beta=0.5, top_k=64, tail=False)
    assert [s.make.func.__name__ for s in stages(phases="revision")] == ["Revising"]
    assert [(s.make.func.__name__, s.first_task) for s in stages(phases="distillation")] == [("Distilling", 0)]
    assert distilling.first_task == 256
    with pytest.raises(ValueError, match="phases: distillation"):
        SdZeroConfig(generation=0, revision=0)


def test_the_plan_tells_how_much_is_played_before_the_first_step():
    first, *rest = SdZero.stages(SdZeroConfig(questions=500, revisions=2, variant="code"))
    rollout = RolloutConfig(group_size=2)
    assert first.notes(rollout)[0].startswith("phase 1 begins with 1,000 attempts and up to 2,000 revisions; ")
    assert [stage.notes(rollout) for stage in rest] == [[], []]
    [rejecting] = SdZero.stages(SdZeroConfig(revisions=0, phases="revision"))
    assert rejecting.notes(rollout)[0].startswith("phase 1 begins with 512 attempts; ")


@pytest.fixture
def make_player(make_scheduler, scripted_env, make_chat, make_model):
    """What `collect` asks of a player, with a real scheduler; `rounds` counts what is played."""

    def make(*, concurrency=4, group_size=2, stop_after=math.inf):
        chat = make_chat()
        scheduler = make_scheduler(
            lucky(scripted_env), model=make_model(stops=True), chat=chat, concurrency=concurrency
        )
        standing = Standing(
            seed=0,
            settings="abc",
            rollout=RolloutConfig(concurrency=concurrency, group_size=group_size),
            give_up_after=3,
            steps=0,
            updates=0,
        )
        player = SimpleNamespace(standing=standing, ranks=Ranks(), rounds=0, fingerprint=lambda: "as it began")

        def play(tasks, *, seed, group_size=None, opening=None):
            player.rounds += 1
            return scheduler.run(
                tasks,
                group_size=group_size or standing.rollout.group_size,
                sampling=Sampling(temperature=1.0),
                seed=seed,
                opening=opening,
            )

        player.play, player.stopping = play, lambda: player.rounds >= stop_after
        player.task = lambda index: task(index, split="train")
        player.said, player.ahead = [], []
        player.progress = Progress(SimpleNamespace(say=player.said.append, expect=lambda n, _: player.ahead.append(n)))
        return player, chat

    return make


def gather(player, chat, path, *, revisions=2, revise_right=True, place="prompt", whole=False):
    reviser = Reviser(chat, (CUE_RIGHT, CUE_WRONG), place)
    collection = Collection(5, revisions, revise_right=revise_right)
    play = partial(attempted, player, reviser, collection)
    log, each = EpisodeLog(path, read_trace), 1 + revisions
    return collect(player, chat, log, collection.questions, whole=whole, play=play, each=each)


@pytest.mark.parametrize("place", ["prompt", "reply"])
def test_revisions_are_sampled_behind_the_attempt_and_only_those_that_are_right_are_kept(make_player, tmp_path, place):
    player, chat = make_player()
    rows = gather(player, chat, tmp_path / "r.jsonl", place=place)
    assert [(row["task"], row["member"]) for row in rows] == [(f"train/{n}", m) for n in range(5) for m in range(2)]
    for row in rows:
        right = row["seed"] % 2 == 0
        assert row["success"] == right
        assert row["cue"] == (CUE_RIGHT if right else CUE_WRONG)
        assert row["kept"] == (2 if right else 0)
        assert [r["dropped"] for r in row["revisions"]] == [None if right else "wrong"] * 2
        assert row["messages"][0]["content"] == f"Question {row['seed']}"
        for revision in row["revisions"]:
            shown = chat.tokenizer.decode(revision["turns"][0]["prompt_ids"])
            assert row["cue"] in shown
            assert row["messages"][1]["content"] in shown
    header, *written = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert (header["name"], header["model"], header["settings"]) == ("the run's model", "as it began", "abc")
    assert [{key: value for key, value in row.items() if key != "seal"} for row in written] == rows


def test_with_right_attempts_left_alone_only_the_wrong_ones_are_revised(make_player, tmp_path):
    player, chat = make_player()
    for row in gather(player, chat, tmp_path / "r.jsonl", revise_right=False):
        assert len(row["revisions"]) == (0 if row["success"] else 2)


def test_collecting_goes_on_where_it_was_stopped_to_the_same_bytes(make_player, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    gather(*make_player(), whole)
    player, chat = make_player(stop_after=3)  # attempts, and the revisions of both members, of two of the five tasks
    assert len(gather(player, chat, cut)) == 4
    assert player.ahead == [10 * 3]  # an attempt and two revisions each
    cut.write_bytes(whole.read_bytes()[: len(cut.read_bytes()) + 700])  # killed in the middle of the next part
    player, chat = make_player()
    gather(player, chat, cut)
    assert player.said == ["cut.jsonl holds 4 of 10 episodes, which are not played again"]
    assert player.ahead == [6 * 3, 2 * 3]
    assert cut.read_bytes() == whole.read_bytes()
    player, chat = make_player()
    gather(player, chat, cut)
    assert player.rounds == 0


def test_a_signal_in_a_round_keeps_the_rounds_before_it_and_says_so(make_player, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    gather(*make_player(), whole)
    player, chat = make_player()
    real = player.play

    def play(*arguments, **options):
        if player.rounds == 4:  # the revisions of the second round
            raise Interrupted
        return real(*arguments, **options)

    player.play = play
    with pytest.raises(Interrupted):
        gather(player, chat, cut)
    assert player.said == ["cut.jsonl keeps 4 episodes; the round at hand is played again"]
    assert whole.read_bytes().startswith(cut.read_bytes())
    gather(*make_player(), cut)
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda line: line[:-20],
        lambda line: "",
        lambda line: "[1]",
        lambda line: line.replace('"success": true', '"success": false', 1),
        lambda line: line.replace('"seed"', '"sed"'),
        lambda line: line.replace('"completion_ids": [', '"completion_ids": [7, ', 1),
    ],
)
def test_a_row_that_is_not_as_it_was_written_is_named(make_player, tmp_path, change):
    path = tmp_path / "r.jsonl"
    gather(*make_player(), path)
    whole = path.read_bytes()
    header, first, second, *rest = path.read_text().splitlines()
    assert change(second) != second
    path.write_text("\n".join([header, first, change(second), *rest]) + "\n")
    with pytest.raises(DataError, match="line 3 is not as it was written"):
        gather(*make_player(), path)
    path.write_text(f"{header}\n{first}\n")  # as the message says
    gather(*make_player(), path)
    assert path.read_bytes() == whole


def test_rows_of_other_settings_are_refused(make_player, tmp_path):
    player, chat = make_player()
    gather(player, chat, tmp_path / "r.jsonl")
    player.standing = replace(player.standing, settings="abd")
    with pytest.raises(DataError, match="was not played with this run's settings; delete the file"):
        gather(player, chat, tmp_path / "r.jsonl")


def test_what_is_lost_after_training_is_not_collected_again_by_other_weights(make_player, tmp_path):
    path = tmp_path / "r.jsonl"
    gather(*make_player(), path)
    player, chat = make_player()
    assert len(gather(player, chat, path, whole=True)) == 10
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
    with pytest.raises(DataError, match="8 of 10 episodes, and the weights that played them have trained since"):
        gather(player, chat, path, whole=True)
    assert player.rounds == 0


def test_without_revisions_the_attempts_that_were_right_are_learned_from_as_they_stand(make_player, tmp_path):
    player, chat = make_player()
    rows = gather(player, chat, tmp_path / "r.jsonl", revisions=0)
    [stage] = SdZero.stages(SdZeroConfig(revisions=0, phases="revision", generation=0.5))
    rejecting = stage.make(chat)
    samples, _ = to_samples(rows, rejecting.reviser, rejecting.parts, 10_000, where=tmp_path)
    right = [turns for row in rows if row["success"] for turns in [row["turns"]]]
    assert [s.completion_ids for s in samples] == [[i for t in turns for i in t["completion_ids"]] for turns in right]
    assert [s.token_ids for s in samples] == [
        [i for t in turns for i in (*t["prompt_ids"], *t["completion_ids"])] for turns in right
    ]
    assert {w for s in samples for w, m in zip(s.ce_weight, s.completion_mask, strict=True) if m} == {0.5}
    assert summary(rows)["collect/revisions"] == 0
    with pytest.raises(ValueError, match=r"sd_zero\.generation"):
        SdZeroConfig(revisions=0, generation=0)


def test_the_summary_tells_how_often_a_wrong_attempt_is_put_right():
    def row(right, *revisions):
        episodes = [{"success": s, "tokens": 3} for s in revisions]
        return {"success": right, "kept": sum(revisions), "tokens": 2, "revisions": episodes}

    numbers = summary([row(True, True), row(False, True, False), row(False, False, False), row(False)])
    assert numbers["collect/corrected"] == 1 / 4
    assert numbers["collect/revisions_right"] == 2 / 5
    assert (numbers["collect/right"], numbers["collect/kept"], numbers["tokens/collected"]) == (1 / 4, 2, 4 * 2 + 5 * 3)


def test_what_trains_is_what_was_said_and_what_is_too_long_is_counted(make_player, tmp_path):
    player, chat = make_player()
    rows = gather(player, chat, tmp_path / "r.jsonl")
    reviser = Reviser(chat, (CUE_RIGHT, CUE_WRONG), "prompt")
    samples, none = to_samples(rows, reviser, {"revision": 1.0}, 10_000, where=tmp_path)
    kept = [r for row in rows for r in row["revisions"] if r["dropped"] is None]
    assert none == 0
    assert [s.completion_ids for s in samples] == [[i for t in r["turns"] for i in t["completion_ids"]] for r in kept]
    limit = min(len(s.token_ids) for s in samples)
    some, dropped = to_samples(rows, reviser, {"revision": 1.0}, limit, where=tmp_path)
    assert len(some) + dropped == len(samples)
    assert dropped > 0
    with pytest.raises(DataError, match="holds nothing to learn from"):
        to_samples([row for row in rows if not row["success"]], reviser, {"revision": 1.0}, 10_000, where=tmp_path)
