"""Supervised fine-tuning: which tokens of which episodes are learned, and where these come from."""

import datetime
import json
import math
import shutil
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from opd.checkpoint import Checkpoint
from opd.errors import ConfigError, DataError
from opd.launch.checks.loading import config_from
from opd.launch.run.build import build
from opd.launch.train import train
from opd.ranks.ranks import Ranks
from opd.tracking import read_rows
from opd.trainers.loop.stage import Prepared
from opd.trainers.parts.conversations import read_conversations
from opd.trainers.parts.episodes import EpisodeLog, Header, read_episode, segments, to_row
from opd.trainers.sft import Sft, SftConfig
from opd.types import to_sample


@pytest.fixture(scope="module")
def models(tiny_model):
    """A student, and a teacher of the same tokenizer."""
    return [tiny_model(seed=seed) for seed in (0, 1)]


@pytest.fixture
def settings(models, tmp_path):
    student, teacher = models

    def make(name="run", source="teacher", **sections):
        own = {"source": source, "keep": "all"}
        own |= {"tasks": 5} if source != "file" else {}
        own |= {"teacher": {"weights": "external", "model": str(teacher)}} if source == "teacher" else {}
        data = {
            "method": "sft",
            "out": str(tmp_path / name),
            "model": str(student),
            "env": {"id": "opd/Lookup-v0", "max_turns": 3},
            "rollout": {"max_tokens": 8, "max_length": 256, "concurrency": 2},
            "train": {"steps": 3, "tasks_per_step": 4, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            "sft": own,
        }
        for section, values in sections.items():
            before = data.get(section)
            data[section] = before | values if isinstance(before, dict) and isinstance(values, dict) else values
        return data

    return make


def timeless(out):
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in read_rows(out / "metrics.jsonl")]


def completions(row):
    return [turn["completion_ids"] for turn in row["turns"]]


def test_the_teacher_plays_first_and_the_student_learns_what_it_said(settings, models):
    out = train(settings()).out
    header, rows = EpisodeLog(out / "data/episodes-teacher.jsonl", read_episode).read()
    assert header.name == str(models[1])
    # The same episodes as the teacher would play by itself.
    own = settings("itself", source="own", train={"steps": 1}) | {"model": str(models[1])}
    _, alone = EpisodeLog(train(own).out / "data/episodes-own.jsonl", read_episode).read()
    assert [completions(row) for row in rows] == [completions(row) for row in alone]
    assert [row["task"] for row in rows] == [f"train/{n}" for n in range(5)]
    first = read_rows(out / "metrics.jsonl")[0]
    assert (first["stage"], first["collect/episodes"], first["tokens/sampled"]) == (2, 5, 0)
    assert first["tokens/collected"] == sum(row["tokens"] for row in rows)
    assert Checkpoint(out / "checkpoints/step-3").record("run")["step"] == 3


def test_what_trains_is_each_sampled_token_of_each_turn_and_nothing_else(settings):
    run = build(config_from(settings(source="own")))
    try:
        run.loop.prepare(_folder(run))
        dataset = run.loop.dataset
    finally:
        run.close()
    _, rows = EpisodeLog(_folder(run) / "episodes-own.jsonl", read_episode).read()
    assert len(dataset) == len(rows) == 5
    assert any(len(row["turns"]) > 1 for row in rows)
    for sample, row in zip(dataset, rows, strict=True):
        assert sample.completion_ids == [i for turn in completions(row) for i in turn]
        assert sample.ce_weight == [float(m) for m in sample.completion_mask]
        assert sample.token_ids == [i for turn in row["turns"] for i in turn["prompt_ids"] + turn["completion_ids"]]


def _folder(run):
    return Path(run.config.out) / "data"


def test_playing_that_was_cut_goes_on_to_the_same_bytes_and_loss(settings, tmp_path):
    whole = train(settings("whole")).out
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints")
    (cut / "data/stage-1.json").unlink()
    file = cut / "data/episodes-teacher.jsonl"
    full = file.read_bytes()
    file.write_bytes(full[: full.index(b"\n", len(full) // 2) + 50])  # killed within a row
    train(settings("cut"), resume="auto")
    assert file.read_bytes() == full
    assert timeless(cut) == timeless(whole)


def test_a_resumed_run_does_not_load_the_teacher_again(settings, models, tmp_path):
    _, teacher = models
    moved = tmp_path / "teacher"
    shutil.copytree(teacher, moved)
    own = {"sft": {"teacher": {"weights": "external", "model": str(moved)}}}
    whole = train(settings("whole", train={"save_every": 1, "keep_last": 9}, **own)).out
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for step in (2, 3):
        shutil.rmtree(cut / f"checkpoints/step-{step}")
    config = config_from(settings("cut", train={"save_every": 1, "keep_last": 9}, **own))
    shutil.rmtree(moved)
    train(config, resume=True)
    assert timeless(cut) == timeless(whole)


def test_only_right_episodes_are_kept_and_none_left_is_an_error(settings, play, scripted_env, make_chat, make_model):
    def outcome(env, action):
        return "", 0.0, True, False, {"success": env.seed % 2 == 0}

    groups = play(lambda: scripted_env(outcome), tasks=6, model=make_model(stops=True))
    rows = [to_row(t) for group in groups for t in group.trajectories]
    assert {row["success"] for row in rows} == {True, False}
    kept = [trajectory.task.seed for trajectory, _ in segments(rows, only_right=True)]
    assert kept == [row["seed"] for row in rows if row["seed"] % 2 == 0]
    assert len(list(segments(rows))) == 6
    with pytest.raises(DataError, match="holds nothing to learn from: 0 sequences with keep = right"):
        train(settings("run", sft={"keep": "right"}))


def test_an_episode_is_read_as_it_was_played(play, scripted_env, turns_then_end, make_chat, make_model):
    [group] = play(lambda: scripted_env(turns_then_end(3)), tasks=1, model=make_model(stops=True))
    [played] = group.trajectories
    back = read_episode(json.loads(json.dumps(to_row(played))))
    ours, theirs = ([to_sample(t, s, ce=1.0) for s in t.segments()] for t in (played, back))
    assert [s.token_ids for s in ours] == [s.token_ids for s in theirs]
    assert [s.turn for s in ours] == [s.turn for s in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.sampler_logprobs == pytest.approx(other.sampler_logprobs, nan_ok=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda line: line[:-30],
        lambda line: "[1]",
        lambda line: line.replace('"turns"', '"turn"'),
        lambda line: line.replace('"completion_ids": [', '"completion_ids": [7, ', 1),
    ],
)
def test_a_damaged_row_is_named(settings, change):
    path = train(settings(train={"steps": 1})).out / "data/episodes-teacher.jsonl"
    lines = path.read_text().splitlines()
    assert change(lines[2]) != lines[2]
    path.write_text("\n".join([*lines[:2], change(lines[2]), *lines[3:]]) + "\n")
    with pytest.raises(DataError, match=r"line 3 is not as it was written.*Delete it and what follows"):
        EpisodeLog(path, read_episode).read()


HEADER = Header(name="a model", model="m", tokenizer="t", template="x", settings="s")


@pytest.mark.parametrize(
    "first",
    [
        "",
        "[1]",
        json.dumps(asdict(HEADER)),  # as files of episodes began before
        '{"task": "train/0", "right": true, "attempt": {}, "revisions": [], "origin": "s", "seal": "01"}',  # SD-Zero
    ],
)
def test_a_file_that_does_not_begin_as_a_log_is_to_be_deleted(tmp_path, first):
    log = EpisodeLog(tmp_path / "e.jsonl", read_episode)
    log.path.write_text(first + "\n")
    for read in (log.read, lambda: log.open(HEADER, wanted=0)):
        with pytest.raises(DataError, match=r"line 1 does not say who played: .* an older version.*Delete the file"):
            read()


def test_a_row_whose_form_is_another_is_named_though_its_checksum_is_right(tmp_path):
    log = EpisodeLog(tmp_path / "e.jsonl", read_episode)
    log.open(HEADER, wanted=1)
    log.write([{"task": "train/0"}], after=0)
    with pytest.raises(DataError, match=r"line 2 is not as it was written: .*it is no episode"):
        log.read()


def test_a_log_that_was_killed_before_its_first_line_was_whole_is_begun_anew(tmp_path):
    log = EpisodeLog(tmp_path / "data/e.jsonl", read_episode)
    assert log.open(HEADER, wanted=1) == []
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-5])
    assert log.open(HEADER, wanted=1) == []
    assert log.path.read_bytes() == whole
    assert log.read() == (HEADER, [])


def test_a_log_is_read_once_and_each_row_that_comes_costs_what_it_weighs(tmp_path, monkeypatch):
    log = EpisodeLog(tmp_path / "e.jsonl", dict)
    reads = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: reads.append(path) or read_bytes(path))
    log.open(HEADER, wanted=4)
    for n in range(4):
        log.write([{"n": n}], after=n)
    assert reads == []
    again = EpisodeLog(log.path, dict)
    assert again.open(HEADER, wanted=4) == [{"n": n} for n in range(4)]
    again.write([{"n": 7}, {"n": 8}], after=1)
    assert again.header() == HEADER
    assert len(reads) == 1
    assert again.read()[1] == [{"n": 0}, {"n": 7}, {"n": 8}]
    fresh = EpisodeLog(log.path, dict)
    fresh.write([{"n": 9}], after=2)
    assert fresh.read()[1] == [{"n": 0}, {"n": 7}, {"n": 9}]


def test_a_line_of_a_log_is_a_row_and_the_checksum_of_its_text(tmp_path):
    """As earlier versions wrote it, whose files are read."""
    row = {"text": 'a "seal": "é', "n": [1, 2.5, math.nan]}
    log = EpisodeLog(tmp_path / "e.jsonl", dict)
    log.open(HEADER, wanted=1)
    log.write([row], after=0)
    seal = sha256(json.dumps(row).encode()).hexdigest()[:16]
    assert log.path.read_text().splitlines()[1] == json.dumps({**row, "seal": seal})


def test_the_model_may_have_moved_on_from_a_log_only_where_it_is_complete(tmp_path):
    log = EpisodeLog(tmp_path / "e.jsonl", dict)
    log.open(HEADER, wanted=2)
    rows = [{"n": 0}, {"n": 1}]
    moved = replace(HEADER, model="trained")
    log.write(rows[:1], after=0)
    with pytest.raises(DataError, match="was not played with this run's model; delete"):
        log.open(moved, wanted=2)
    with pytest.raises(DataError, match="holds 1 of 2 episodes, and the weights that played them have trained since"):
        log.open(moved, wanted=2, whole=True)
    log.write(rows[1:], after=1)
    assert log.open(moved, wanted=2) == log.open(moved, wanted=2, whole=True) == rows
    with pytest.raises(DataError, match="was not played with this run's model and settings; delete"):
        log.open(replace(moved, settings="other"), wanted=3)
    log.path.unlink()
    with pytest.raises(DataError, match="holds 0 of 2 episodes"):
        log.open(moved, wanted=2, whole=True)
    assert not log.path.exists()


def test_own_episodes_that_are_lost_are_not_played_again_by_weights_that_trained_on_them(settings):
    data = settings(source="own", train={"save_every": 1, "keep_last": 9})
    out = train(data).out
    shutil.rmtree(out / "checkpoints/step-3")
    (out / "data/episodes-own.jsonl").unlink()
    with pytest.raises(DataError, match="holds 0 of 5 episodes, and the weights that played them have trained since"):
        train(data, resume=True)


def test_episodes_of_other_settings_are_refused_by_what_differs(settings):
    out = train(settings(train={"steps": 1})).out
    header, _ = EpisodeLog(out / "data/episodes-teacher.jsonl", read_episode).read()
    with pytest.raises(DataError, match="was not played with this run's template; delete the file"):
        EpisodeLog(out / "data/episodes-teacher.jsonl", read_episode).open(replace(header, template="x"), wanted=5)


CALL = {"role": "assistant", "content": "ab the 1"}
SAID = [
    {"role": "user", "content": "Go on"},
    CALL,
    {"role": "tool", "content": "ab"},
    {"role": "assistant", "content": "in"},
]


def test_the_reading_of_a_file_is_counted_and_left_at_a_signal(make_chat, tmp_path):
    path, done, ahead = tmp_path / "c.jsonl", [], []
    path.write_text(20 * f"{json.dumps({'messages': SAID})}\n")
    player = SimpleNamespace(
        ranks=Ranks(),
        progress=SimpleNamespace(expect=lambda *more: ahead.append(more), advance=done.append),
        stopped=lambda: len(done) == 3,
    )
    [stage] = Sft.stages(SftConfig(source="file", file=str(path)))
    method = stage.make(make_chat())
    assert method.prepare(player, tmp_path) == Prepared()
    assert (ahead, done) == ([(None, "conversations")], [1, 1, 1])


def test_conversations_of_a_file_are_learned_where_the_assistant_speaks(make_chat, tmp_path):
    chat, path = make_chat(), tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": SAID}) + "\n\n" + json.dumps({"messages": SAID, "success": False}) + "\n")
    one, two = read_conversations(path, chat)
    assert (one.success, two.success) == (True, False)
    [segment] = one.segments()
    sample = to_sample(one, segment, ce=1.0)
    whole = chat.tokenizer.apply_chat_template(SAID, tokenize=True, return_dict=False)
    # What the template puts after the last answer is not learned, nor is it there.
    assert sample.token_ids == whole[: len(sample.token_ids)]
    learned = [i for i, w in zip(sample.token_ids, sample.ce_weight, strict=True) if w]
    assert learned == [*chat.encode("ab the 1"), chat.end_id, *chat.encode("in"), chat.end_id]
    assert all(math.isnan(value) for value in sample.sampler_logprobs)


def test_conversations_may_stand_in_an_array_or_in_parquet(make_chat, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"messages": [{**SAID[0], "content": text}, *SAID[1:]], "success": i > 0} for i, text in enumerate("abc")]
    write = {
        "c.jsonl": lambda path: path.write_text("\ufeff" + "\r\n".join(map(json.dumps, rows))),
        "c.json": lambda path: path.write_text(json.dumps(rows, indent=1)),
        "c.parquet": lambda path: pq.write_table(pa.Table.from_pylist(rows), path),
    }
    found = []
    for name, make in write.items():
        make(tmp_path / name)
        read = read_conversations(tmp_path / name, make_chat())
        found.append([(t.success, [(turn.prompt_ids, turn.completion_ids) for turn in t.turns]) for t in read])
    assert [success for success, _ in found[0]] == [False, True, True]
    assert found[0] == found[1] == found[2]


def test_line_breaks_that_python_knows_are_text_of_a_conversation(make_chat, tmp_path):
    path, text = tmp_path / "c.jsonl", "a\u2028b\x85c\x0cd\x1ce"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": text}, CALL]}, ensure_ascii=False) + "\n")
    path.write_text(path.read_text().replace("\\f", "\f").replace("\\u001c", "\x1c"))
    [read] = read_conversations(path, make_chat())
    assert text in make_chat().tokenizer.decode(read.turns[0].prompt_ids)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"success": "false"}, "success = 'false'; it may be true, false or null"),
        ({"success": "1"}, "success = '1'; it may be"),
        ({"success": 0.5}, "success = 0.5; it may be"),
        ({"success": []}, r"success = \[\]; it may be"),
        ({"reward": 0.0}, "reward = 0.0 does not say what is learned from. Write success: true or false"),
        ({"reward": "1"}, "reward = '1' does not say"),
        ({"Success": False}, "it has 'Success'; write success"),
        ({"messages ": []}, "it has 'messages '; write messages"),
        ({"messages": [SAID[0], {**CALL, "weight": "1"}]}, r"messages\[1\]: weight = '1'; an assistant's message may"),
        (
            {"messages": [SAID[0], {**CALL, "weight": True}]},
            r"messages\[1\]: weight = True; an assistant's message may",
        ),
        ({"messages": [SAID[0], {**CALL, "weight": 0.5}]}, r"messages\[1\]: weight = 0.5; an assistant's message may"),
        ({"messages": [{**SAID[0], "role": ["user"]}, CALL]}, r"messages\[0\]: role = \['user'\] is unknown"),
        ({"tools": "[" * 5_000}, "tools is no JSON: it is nested too deeply"),
    ],
)
def test_what_says_how_a_row_counts_is_read_strictly(make_chat, tmp_path, keys, message):
    path = tmp_path / "c.jsonl"
    path.write_text("\n" + json.dumps({"messages": SAID} | keys) + "\n")
    with pytest.raises(DataError, match=rf"c\.jsonl, line 2: {message}"):
        read_conversations(path, make_chat())


def test_dates_and_what_is_no_number_in_parquet_are_refused_by_their_row(make_chat, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for value, message in (
        (float("nan"), "Out of range float"),
        (datetime.date(2020, 1, 2), "what JSON does not know"),
    ):
        call = {"function": {"name": "look", "arguments": {"when": value}}}
        row = {"messages": [SAID[0], {"role": "assistant", "content": "x", "tool_calls": [call]}]}
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "c.parquet")
        with pytest.raises(DataError, match=rf"c\.parquet, row 1: .*{message}"):
            read_conversations(tmp_path / "c.parquet", make_chat())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: "),
        ('{"text": "x"}', r'line 1: it is no \{"messages"'),
        ('{"messages": [{"role": "user"}]}', r"line 1: messages\[0\]: content is null"),
        (json.dumps({"messages": SAID[:1]}), "line 1: there is no message of an assistant"),
        (json.dumps({"messages": [CALL]}), r"line 1: messages\[0\]: the assistant speaks first"),
        (
            json.dumps({"messages": [SAID[0], CALL, CALL]}),
            r"line 1: messages\[2\]: the assistant speaks first, or twice in a row",
        ),
    ],
)
def test_a_line_that_is_no_conversation_is_named(make_chat, tmp_path, line, message):
    path = tmp_path / "c.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        read_conversations(path, make_chat())


def test_a_file_that_is_not_there_is_said_before_the_model_loads(settings):
    with pytest.raises(ConfigError, match=r'sft.file = "/nonexistent.jsonl": there is no such file'):
        config_from(settings(source="file", sft={"file": "/nonexistent.jsonl"}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"messages": 1}', r"line 2: it is no \{\"messages\""),
        ('{"messages": []', r"line 2: not JSON .*does not end on its line"),
        (json.dumps({"messages": SAID, "success": "false"}), "line 2: success = 'false'"),
        (json.dumps({"messages": [*SAID, {"role": "user", "content": "\ud800"}]}), "line 2: it holds a lone surrogate"),
        ("é", "line 2, byte 1: 0xe9 is not UTF-8"),
    ],
)
def test_a_row_that_is_no_conversation_is_said_before_the_model_loads(settings, tmp_path, text, message):
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps({"messages": SAID}) + "\n" + text + "\n", encoding="latin-1")
    with pytest.raises(ConfigError, match=rf"sft\.file: .*c\.jsonl, {message}"):
        config_from(settings(source="file", sft={"file": str(path)}))
    with pytest.raises(ConfigError, match=r'sft\.file = ".*": it is no file'):
        config_from(settings(source="file", sft={"file": str(tmp_path)}))


def test_a_file_of_conversations_trains(settings, tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text((json.dumps({"messages": SAID}) + "\n") * 4)
    rows = read_rows(train(settings(source="file", sft={"file": str(path)}, train={"steps": 6})).out / "metrics.jsonl")
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"source": "teacher"}, "sft.teacher is missing: source = teacher needs it"),
        ({"source": "own"}, "sft.tasks is missing: source = own needs it"),
        (
            {"source": "file", "file": "x", "tasks": 3},
            "sft.tasks is used by source = teacher or own alone, but source = file; remove it",
        ),
        (
            {"source": "teacher", "tasks": 3, "teacher": {"weights": "frozen"}},
            "teacher.weights = frozen is the model itself",
        ),
        ({"source": "teacher", "tasks": 3, "teacher": {"weights": "external", "model": "./no"}}, "does not exist"),
    ],
)
def test_settings_that_do_not_belong_to_the_source_are_refused(settings, own, message):
    data = settings() | {"sft": own}
    with pytest.raises(ConfigError, match=message):
        config_from(data)


def test_a_borrowed_teacher_of_another_tokenizer_is_refused(settings, make_model, make_tokenizer, tmp_path):
    from opd.errors import ModelError

    make_model().model.save_pretrained(tmp_path / "stranger")
    make_tokenizer().save_pretrained(tmp_path / "stranger")
    own = {"teacher": {"weights": "external", "model": str(tmp_path / "stranger")}}
    with pytest.raises(ModelError, match="does not have the tokenizer of the student"):
        train(settings(sft=own))


def test_the_plan_counts_only_stages_with_steps(settings, tmp_path):
    from opd.launch.plan.plan import plan

    made = plan(config_from(settings(eval={"tasks": 5})), tmp_path, gpu=False)
    assert dict(made.rows())["updates"].startswith("3 ")
    assert made.evaluations == 2
    assert torch.get_num_threads() >= 1
