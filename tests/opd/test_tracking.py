"""A run's files, its wandb run and its terminal, each read back as a user or a tool would."""

import glob
import io
import json
import logging
import math
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from opd.errors import ConfigError, DataError
from opd.tracking import Tracker, read_rows, wandb_run
from opd.tracking.config import TrackingConfig
from opd.tracking.console import RunConsole, span
from opd.tracking.files import JsonLines
from opd.tracking.wandb_run import auto_mode, open_run
from opd.types import End, StopReason, Task, Trajectory, Turn

QUIET = TrackingConfig(wandb="disabled", console=False, plot=False)


def tracker(folder: Path, config: TrackingConfig = QUIET, *, resume_step: int = 0, **kwargs) -> Tracker:
    return Tracker(folder, config, run_config={"train": {"lr": 0.5}}, total_steps=10, resume_step=resume_step, **kwargs)


def turn(text: str, messages: list[dict], *, reward: float = 0.0, forked: bool = False) -> Turn:
    return Turn(
        prompt_ids=[1], completion_ids=[2], logprobs=[-0.5], stop_reason=StopReason.STOP,
        messages=messages, text=text, reward=reward, forked=forked,
    )  # fmt: skip


def episode(index: int = 0, member: int = 0, turns: list[Turn] | None = None, end=End.FINISHED, **kwargs) -> Trajectory:
    turns = turns or [turn("hi", [{"role": "user", "content": "hello"}])]
    return Trajectory(task=Task(index=index, seed=7), member=member, turns=turns, end=end, **kwargs)


# -- metrics.jsonl ------------------------------------------------------------------------------------


def test_a_row_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with tracker(tmp_path) as run:
        run.log(1, {"reward/mean": 0.25, "tokens/sampled": 12})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "reward/mean": 0.25, "tokens/sampled": 12}\n'


def test_nan_and_infinity_are_written_as_null(tmp_path):
    with tracker(tmp_path) as run:
        run.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e300})
    assert read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None, "b": None, "c": None, "d": 1e300}]


def test_a_metric_that_is_no_number_is_refused_by_name(tmp_path):
    with tracker(tmp_path) as run, pytest.raises(DataError, match=r"metric 'train/loss' must be a number, got \[1\]"):
        run.log(1, {"train/loss": [1]})


@pytest.mark.parametrize("step", [2, 1])
def test_a_step_is_logged_once_and_in_order(tmp_path, step):
    with tracker(tmp_path) as run:
        run.log(2, {"a": 1})
        with pytest.raises(DataError, match=f"step {step} cannot be logged after step 2"):
            run.log(step, {"a": 2})
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


def test_an_evaluation_before_training_is_no_training_step(tmp_path):
    with tracker(tmp_path) as run:
        run.log_eval(0, {"eval/success": 0.5})
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert read_rows(tmp_path / "evals.jsonl") == [{"step": 0, "eval/success": 0.5}]


def test_a_later_evaluation_joins_the_row_of_its_step(tmp_path):
    with tracker(tmp_path) as run:
        run.log_eval(3, {"eval/success": 0.5})
        run.log(3, {"train/loss": 1.0})
        run.log(4, {"train/loss": 2.0})
    assert read_rows(tmp_path / "metrics.jsonl") == [
        {"step": 3, "eval/success": 0.5, "train/loss": 1.0},
        {"step": 4, "train/loss": 2.0},
    ]


def test_the_seconds_of_a_phase_join_the_next_row(tmp_path):
    with tracker(tmp_path) as run:
        with run.phase("evaluate"):
            pass
        run.log(1, {})
        run.log(2, {})
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert 0 <= first["time/evaluate"] < 1
    assert "time/evaluate" not in second


# -- resuming -----------------------------------------------------------------------------------------


def write_steps(run: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        run.log(step, {"reward/mean": step / 7})
        run.log_rollouts(step, [episode(step)])


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(tmp_path):
    with tracker(tmp_path / "whole") as run:
        write_steps(run, 1, 6)
    with tracker(tmp_path / "cut") as run:
        write_steps(run, 1, 5)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rewa')  # the process was killed while it wrote
    with tracker(tmp_path / "cut", resume_step=3) as run:
        assert [row["step"] for row in read_rows(tmp_path / "cut" / "rollouts.jsonl")] == [1, 2, 3]
        write_steps(run, 4, 6)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_resumed_run_says_which_rows_are_missing_and_refuses_two_of_one_step(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 5, 6)))
    tracker(tmp_path, resume_step=5).finish()
    assert "metrics.jsonl has no row of step 3, 4, which the checkpoint has" in caplog.text
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 2, 3)))
    with pytest.raises(DataError, match=r"step 2 has two rows, lines 2 and 3; remove one to go on"):
        tracker(tmp_path, resume_step=3)


def test_a_resume_tells_which_steps_have_lost_their_episodes(tmp_path, caplog):
    with tracker(tmp_path) as run:
        for step in range(1, 5):
            run.log(step, {"tokens/sampled": 7.0 if step < 4 else 0.0})
            if step != 2:
                run.log_rollouts(step, [episode(step)])
    tracker(tmp_path, resume_step=4).finish()
    assert "rollouts.jsonl has no row of step 2, which the checkpoint has" in caplog.text


def test_a_folder_in_place_of_a_file_of_rows_is_named(tmp_path):
    (tmp_path / "rollouts.jsonl").mkdir()
    with pytest.raises(DataError, match=r"rollouts\.jsonl (is no file|cannot be written)"):
        tracker(tmp_path, resume_step=3)
    (tmp_path / "rollouts.jsonl").rmdir()
    (tmp_path / "rollouts.jsonl").write_text("[" * 5000 + "\n")
    with pytest.raises(DataError, match=r"rollouts\.jsonl, line 1 is damaged"):
        read_rows(tmp_path / "rollouts.jsonl")


def test_a_full_disk_is_said_with_the_file_and_the_mend(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")  # the disk that takes nothing
    rows = JsonLines(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match=r"metrics\.jsonl cannot be written: .*No space left.*--resume"):
        rows.write({"step": 1})
    rows.close()


@pytest.mark.parametrize("how", ["deleted", "moved", "replaced"])
def test_a_row_whose_file_is_gone_is_said_at_once_and_not_written_into_nothing(tmp_path, monkeypatch, how):
    """Its folder too: a relative name means what it meant when the file was opened."""
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    rows = JsonLines(Path("run/metrics.jsonl"))
    rows.write({"step": 1})
    monkeypatch.chdir("/")
    rows.write({"step": 2})
    if how == "deleted":
        shutil.rmtree(tmp_path / "run")
    else:
        (tmp_path / "run").rename(tmp_path / "other")
    if how == "replaced":
        (tmp_path / "run").mkdir()
        (tmp_path / "run/metrics.jsonl").write_text("")
    with pytest.raises(
        DataError, match=r"run/metrics\.jsonl cannot be written: .*(No such file|another file).*--resume"
    ):
        rows.write({"step": 3})
    rows.close()


def test_a_crash_while_rows_are_cut_loses_no_row(tmp_path, monkeypatch):
    with tracker(tmp_path) as run:
        write_steps(run, 1, 5)
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="no space left"):
        tracker(tmp_path, resume_step=3)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_a_new_run_does_not_overwrite_the_rows_of_another(tmp_path):
    with tracker(tmp_path) as run:
        run.log(1, {"a": 1})
    with pytest.raises(DataError, match=r"metrics.jsonl already has rows of another run"):
        tracker(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{oops", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[1]", "has no step"),
        ("{}", "has no step"),
        ('{"step": true}', "has no step"),
    ],
)
def test_a_damaged_row_is_named_by_its_line(tmp_path, line, reason):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(DataError, match=rf"metrics.jsonl, line 2 {reason}"):
        read_rows(path)


def test_a_byte_order_mark_that_an_editor_left_is_no_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\r\n', encoding="utf-8-sig", newline="")
    assert read_rows(path) == [{"step": 1}]


# -- rollouts.jsonl -----------------------------------------------------------------------------------


def test_an_episode_is_written_as_the_conversation_that_took_place(tmp_path):
    turns = [
        turn("<tool>look</tool>", [{"role": "system", "content": "s"}, {"role": "user", "content": "find it"}]),
        turn("red", [{"role": "tool", "content": "found"}], reward=0.5),
    ]
    with tracker(tmp_path) as run:
        run.log_rollouts(4, [episode(3, 1, turns, success=True, privileged={"plan": "look"})])
    [row] = read_rows(tmp_path / "rollouts.jsonl")
    assert row == {
        "step": 4, "task": "train/3", "seed": 7, "member": 1, "reward": 0.5, "success": True,
        "end": "finished", "failed": None, "tokens": 2, "rewards": [0.0, 0.5],
        "reward_parts": {},
        "stop_reasons": ["stop", "stop"], "feedback": [None, None], "policy_version": 0,
        "privileged": {"plan": "look"},
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "find it"},
            {"role": "assistant", "content": "<tool>look</tool>"},
            {"role": "tool", "content": "found"},
            {"role": "assistant", "content": "red"},
        ],
    }  # fmt: skip


def test_a_forked_turn_does_not_repeat_the_conversation(tmp_path):
    asked, answered = {"role": "user", "content": "a"}, {"role": "user", "content": "b"}
    past = [asked, {"role": "assistant", "content": "rewritten"}, answered]
    with tracker(tmp_path) as run:
        run.log_rollouts(1, [episode(turns=[turn("one", [asked]), turn("two", past, forked=True)])])
    [row] = read_rows(tmp_path / "rollouts.jsonl")
    assert [m["content"] for m in row["messages"]] == ["a", "one", "b", "two"]


def test_the_episodes_of_a_step_are_limited_and_of_many_tasks(tmp_path):
    played = [episode(task, member) for task in range(3) for member in range(4)]
    config = QUIET.model_copy(update={"rollouts_per_step": 4})
    with tracker(tmp_path, config) as run:
        run.log_rollouts(1, played)
    rows = read_rows(tmp_path / "rollouts.jsonl")
    assert [(row["task"], row["member"]) for row in rows] == [
        ("train/0", 0), ("train/1", 0), ("train/2", 0), ("train/0", 1),
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["naïve 好", "a\nb", "line\u2028separator", "lone \udcff surrogate", '"quoted"'])
def test_whatever_was_sampled_is_one_row_that_reads_back(tmp_path, text):
    with tracker(tmp_path) as run:
        run.log_rollouts(1, [episode(turns=[turn(text, [{"role": "user", "content": "x"}])])])
    [row] = read_rows(tmp_path / "rollouts.jsonl")
    assert row["messages"][-1]["content"] == text


# -- wandb --------------------------------------------------------------------------------------------

OFFLINE = TrackingConfig(wandb="offline", console=False, plot=False)
KEY = "0123456789" * 4


@pytest.fixture
def wandb(monkeypatch, tmp_path):
    """wandb as on a fresh machine: no key, no settings, no open session."""
    module = pytest.importorskip("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))
    (tmp_path / "home").mkdir()
    module.teardown()
    yield module
    module.teardown()


def wandb_records(path: str) -> list:
    """The records of a finished .wandb file, which wandb's process may still be about to write."""
    for _ in range(500):
        records = list(parsed(Path(path).read_bytes()))
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.02)
    raise AssertionError(f"{path} has no exit record")


def parsed(data: bytes):
    """A .wandb file is a LevelDB log (blocks of 32 KiB; checksum, length, type before each part) of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    assert data[:4] == b":W&B"
    position, whole = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # no header fits into the rest of a block
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def wandb_files(folder: Path) -> list[str]:
    return sorted(glob.glob(str(folder / "wandb" / "offline-run-*" / "*.wandb")), key=os.path.getmtime)


def wandb_rows(path: str) -> list[dict]:
    """The logged rows, in the form of metrics.jsonl (nan and inf as null, none of wandb's own keys)."""
    rows = []
    for record in wandb_records(path):
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            row = {"step": items["_step"]} | {key: value for key, value in items.items() if key[0] != "_"}
            rows.append({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})
    return rows


@pytest.mark.slow
def test_the_offline_wandb_file_has_the_rows_of_metrics_jsonl(tmp_path, wandb):
    draw = random.Random(0)
    with tracker(tmp_path / "run", OFFLINE) as run:
        run.log_eval(0, {"eval/success": 0.125})
        for step in range(1, 301):  # past one block of the file
            loss = math.nan if step == 40 else math.inf if step == 41 else draw.gauss(0, 1)
            run.log(step, {"reward/mean": draw.random(), "train/loss": loss, "tokens/sampled": 10_000 + step})
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    [path] = wandb_files(tmp_path / "run")
    assert len(rows) == 300
    assert wandb_rows(path) == [{"step": 0, "eval/success": 0.125}, *rows]
    assert os.path.getsize(path) > 2 * 32768


@pytest.mark.slow
def test_a_resumed_offline_run_keeps_its_id_and_its_newest_file_has_every_row(tmp_path, wandb):
    folder = tmp_path / "run"
    with tracker(folder, OFFLINE) as run:
        write_steps(run, 1, 5)
    with tracker(folder, OFFLINE, resume_step=3) as run:
        write_steps(run, 4, 6)
    first, second = wandb_files(folder)
    assert Path(first).name == Path(second).name == f"run-{(folder / 'wandb' / 'run-id.txt').read_text().strip()}.wandb"
    assert wandb_rows(second) == read_rows(folder / "metrics.jsonl")


def test_a_new_run_has_a_new_id_even_where_one_was_before(tmp_path, wandb):
    ids = set()
    for _ in range(2):
        tracker(tmp_path, OFFLINE).finish()
        ids.add((tmp_path / "wandb" / "run-id.txt").read_text())
    assert len(ids) == 2


def test_a_row_is_with_wandb_before_the_next_one_comes(tmp_path, wandb):
    opened = open_run(tmp_path, OFFLINE, run_config={}, history=[], say=print)
    opened.log(1, {"a": 1})
    assert opened._run.step == 2
    opened.finish(0)


def test_wandb_gets_the_config_the_project_and_the_name_of_the_run_folder(tmp_path, wandb):
    tracker(tmp_path / "lookup-1", OFFLINE).finish()
    [run] = [r.run for r in wandb_records(*wandb_files(tmp_path / "lookup-1")) if r.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.display_name, config["train"]) == ("opd", "lookup-1", {"lr": 0.5})


def wandb_run_record(folder: Path):
    """What the newest .wandb file under a folder says of its run."""
    return next(r.run for r in wandb_records(wandb_files(folder)[-1]) if r.WhichOneof("record_type") == "run")


def test_wandbs_own_variables_count_where_the_settings_say_nothing_and_after_a_restart(tmp_path, wandb, monkeypatch):
    told = {"PROJECT": "theirs", "NAME": "named", "RUN_ID": "abc123", "RUN_GROUP": "sweep", "NOTES": "a note",
            "TAGS": "one,two", "ENTITY": "team", "MODE": "offline", "RESUME": "allow"}  # fmt: skip
    for name, value in told.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    auto = OFFLINE.model_copy(update={"wandb": "auto"})
    for resume_step in (0, 1):
        with tracker(tmp_path / "run", auto, resume_step=resume_step) as run:
            run.log(resume_step + 1, {"reward/mean": 0.5})
        found = wandb_run_record(tmp_path / "elsewhere")
        assert (found.project, found.display_name, found.run_id, found.run_group) == (
            "theirs", "named", "abc123", "sweep")  # fmt: skip
        assert (found.notes, list(found.tags), found.entity) == ("a note", ["one", "two"], "team")
    assert not wandb_files(tmp_path / "run")
    monkeypatch.delenv("WANDB_RUN_ID")
    wandb.teardown()  # it has read the variables once
    with tracker(tmp_path / "run", auto, resume_step=2):
        assert (tmp_path / "run/wandb/run-id.txt").read_text() == "abc123\n"  # the run stays the same one
    assert wandb_run_record(tmp_path / "elsewhere").run_id == "abc123"


def test_what_the_settings_say_of_wandb_wins_over_its_variables(tmp_path, wandb, monkeypatch):
    for name, value in {"PROJECT": "theirs", "NAME": "named", "MODE": "disabled"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    with tracker(tmp_path / "run", OFFLINE.model_copy(update={"project": "ours", "name": "mine"})) as run:
        run.log(1, {"a": 1})
    found = wandb_run_record(tmp_path / "run")
    assert (found.project, found.display_name) == ("ours", "mine")


@pytest.mark.parametrize(("whole", "code"), [(True, 0), (False, 1)])
def test_wandb_is_told_whether_the_run_came_to_its_end(tmp_path, wandb, whole, code):
    with tracker(tmp_path / "run", OFFLINE) as run:
        run.log(1, {"a": 1})
        if whole:
            run.summary()
    [end] = [r.exit for r in wandb_records(*wandb_files(tmp_path / "run")) if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == code


def test_wandb_writes_nothing_to_the_console_even_in_a_session_that_does(tmp_path, wandb, capfd, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.setup(wandb.Settings(silent=False))
    with tracker(tmp_path / "run", OFFLINE.model_copy(update={"wandb": "auto"})) as run:
        run.log(1, {"a": math.nan})
        run.summary()
    assert capfd.readouterr() == ("", "")
    assert len(wandb_files(tmp_path / "run")) == 1


def test_wandb_draws_no_number_from_the_generator_of_the_run(tmp_path, wandb):
    state = random.getstate()
    tracker(tmp_path / "run", OFFLINE).finish()
    assert random.getstate() == state


def test_a_run_that_the_caller_has_open_goes_on(tmp_path, wandb):
    own = wandb.init(mode="offline", dir=str(tmp_path), settings=wandb.Settings(silent=True, console="off"))
    with tracker(tmp_path / "run", OFFLINE) as run:
        run.log(1, {"a": 1})
    own.log({"mine": 2})
    own.finish()
    [path] = glob.glob(str(tmp_path / "wandb" / "offline-run-*" / "*.wandb"))
    assert wandb_rows(path) == [{"step": 0, "mine": 2}]


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": KEY}, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_API_KEY": "too short"}, "offline"),
    ],
)
def test_auto_is_online_with_a_key_unless_the_user_says_otherwise(monkeypatch, wandb, environment, mode):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    wandb.setup(wandb.Settings(silent=True))
    assert auto_mode() == mode


def test_auto_finds_a_key_in_netrc(tmp_path, wandb):
    netrc = tmp_path / "home" / ".netrc"
    netrc.write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    netrc.chmod(0o600)
    wandb.setup(wandb.Settings(silent=True))
    assert auto_mode() == "online"


@pytest.mark.slow
def test_a_service_that_never_answers_is_told_once_and_the_rows_go_to_offline_files(
    tmp_path, wandb, monkeypatch, caplog
):
    monkeypatch.setattr(wandb_run, "INIT_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        with tracker(tmp_path / "run", OFFLINE.model_copy(update={"wandb": "auto"})) as run:
            run.log(1, {"reward/mean": 0.5})
    [path] = wandb_files(tmp_path / "run")
    assert wandb_rows(path) == [{"step": 1, "reward/mean": 0.5}]
    [record] = [record for record in caplog.records if record.name.startswith("opd")]
    assert "wandb cannot go online" in record.message


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
def test_training_survives_the_death_of_wandbs_process(tmp_path, wandb):
    script = f"""
import os, signal
from pathlib import Path
from opd.tracking.config import TrackingConfig
from opd.tracking import Tracker

def is_service(pid):
    stat = Path("/proc", pid, "stat").read_text()
    return "wandb-core" in stat and int(stat.rsplit(")", 1)[1].split()[1]) == os.getpid()

config = TrackingConfig(wandb="offline", console=False)
with Tracker(Path({str(tmp_path / "run")!r}), config, run_config={{}}, total_steps=9) as run:
    run.log(1, {{"a": 1}})
    [service] = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and is_service(pid)]
    os.kill(service, signal.SIGKILL)
    os.waitpid(service, 0)
    for step in range(2, 6):
        run.log(step, {{"a": 1}})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 5
    assert done.stdout == ""
    assert re.fullmatch(r"wandb failed and is off from here on \(.*\); metrics.jsonl goes on\n", done.stderr)


def test_without_wandb_auto_says_so_in_one_line_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    out = io.StringIO()
    with tracker(tmp_path, TrackingConfig(plot=False), console=Console(file=out)) as run:
        run.log(1, {"a": 1})
    lines = [line for line in out.getvalue().splitlines() if "wandb" in line]
    assert lines == ["wandb is not installed: metrics go to the run folder alone"]
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_that_is_asked_for_by_name_must_be_installed(tmp_path, monkeypatch, mode):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=rf"tracking.wandb = {mode} needs the package wandb: pip install"):
        tracker(tmp_path, QUIET.model_copy(update={"wandb": mode}))


def test_a_run_without_wandb_and_pictures_imports_nothing_heavy(tmp_path):
    script = f"""
import sys
from pathlib import Path
from opd.tracking.config import TrackingConfig
from opd.tracking import Tracker
Tracker(Path({str(tmp_path / "run")!r}), TrackingConfig(wandb="disabled"), run_config={{}}, total_steps=1).finish()
print([name for name in ("wandb", "matplotlib", "torch") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


# -- the terminal -------------------------------------------------------------------------------------


class Clock:
    """A clock that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def plain_console(total: int, clock: Clock) -> tuple[RunConsole, io.StringIO]:
    out = io.StringIO()
    return RunConsole(total_steps=total, console=Console(file=out, width=200), clock=clock), out


def shown_steps(out: io.StringIO) -> list[int]:
    return [int(step) for step in re.findall(r"^step +(\d+)/", out.getvalue(), flags=re.MULTILINE)]


@pytest.mark.parametrize(("seconds", "most"), [(0.05, 6), (60.0, 51)])
def test_a_thousand_steps_without_a_terminal_are_few_lines(seconds, most):
    clock = Clock()
    console, out = plain_console(1000, clock)
    for step in range(1, 1001):
        clock.now += seconds
        console.step(step, {"train/loss": 0.5})
    steps = shown_steps(out)
    assert 4 <= len(steps) <= most
    assert steps[-1] == 1000


def test_few_slow_steps_without_a_terminal_are_a_line_each():
    clock = Clock()
    console, out = plain_console(20, clock)
    for step in range(1, 21):
        clock.now += 30
        console.step(step, {"train/loss": 0.5})
    assert shown_steps(out) == list(range(1, 21))


def test_a_line_has_reward_loss_phases_and_remaining_time():
    clock = Clock()
    console, out = plain_console(10, clock)
    clock.now += 20
    console.step(1, {"reward/mean": 0.625, "train/loss": 0.0312, "time/rollout": 1.5, "time/sync": 0.0})
    assert out.getvalue() == "step  1/10  reward 0.62  loss 0.0312  rollout 1.5s  eta 3:00\n"


def test_what_takes_long_without_a_terminal_says_every_ten_seconds_how_far_it_has_come():
    clock = Clock()
    console, out = plain_console(10, clock)
    try:
        with console.phase("prepare"):
            console.expect(40)
            for second in range(1, 31):
                clock.now += 1
                console.advance(2 * (second < 20))
                console.tick()
        lines = out.getvalue().splitlines()
        assert lines == [
            "prepare: 20 of 40 episodes, 2/s, 0:10 left",
            "prepare: 38 of 40 episodes, 1.9/s, 0:01 left",
            "prepare: 38 of 40 episodes, 1.27/s, 0:02 left",
        ]
        console.expect(8)
        for _ in range(130):
            clock.now += 1
            console.tick()
        assert out.getvalue().splitlines()[3:] == [
            "step 1: 0 of 8 episodes, 1:00 so far",
            "step 1: 0 of 8 episodes, 2:00 so far",
        ]
        with console.phase("prepare"):
            console.expect(9, "sequences")
            clock.now += 11
            console.tick()
        assert out.getvalue().splitlines()[5:] == ["prepare: 0 of 9 sequences, 0:11 so far"]
    finally:
        console.close()


def test_a_console_without_a_terminal_asks_for_its_lines_by_itself(monkeypatch):
    monkeypatch.setattr("opd.tracking.console.PLAIN_SECONDS", 0.0)
    console, out = plain_console(10, Clock())
    threads = set(threading.enumerate())
    with console.phase("evaluate"):
        until = time.monotonic() + 20
        while "evaluate: 0:00 so far" not in out.getvalue() and time.monotonic() < until:
            time.sleep(0.05)
    console.close()
    assert "evaluate: 0:00 so far" in out.getvalue()
    assert set(threading.enumerate()) == threads


def test_an_evaluation_always_has_its_line():
    clock = Clock()
    console, out = plain_console(1000, clock)
    console.step(0, {"eval/success": 0.125})
    console.step(1, {"train/loss": 1.0})
    console.step(2, {"train/loss": 1.0, "eval/success": 0.5})
    assert shown_steps(out) == [0, 2]
    assert "held-out 50%" in out.getvalue()


def test_the_remaining_time_of_a_resumed_run_counts_its_own_steps():
    clock = Clock()
    out = io.StringIO()
    console = RunConsole(total_steps=100, done=90, console=Console(file=out, width=200), clock=clock)
    clock.now += 12
    console.step(91, {"train/loss": 1.0})
    assert "eta 1:48" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(None, "-:--"), (7.4, "0:07"), (754, "12:34"), (3723, "1:02:03")])
def test_durations_read_like_a_clock(seconds, text):
    assert span(seconds) == text


def live_console() -> tuple[RunConsole, io.StringIO]:
    out = io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=100, _environ={"TERM": "xterm-256color"})
    return RunConsole(total_steps=10, console=terminal), out


def test_what_others_print_and_log_lands_above_the_bar():
    early = logging.StreamHandler()  # keeps the stderr of before the bar, as the handlers of libraries do
    logger = logging.getLogger("test_tracking.early")
    logger.addHandler(early)
    logger.propagate = False
    stream = early.stream
    console, out = live_console()
    console.step(1, {"reward/mean": 0.5})
    try:
        print("a printed line")
        logger.warning("a logged line")
        assert "a printed line\n" in out.getvalue()
        assert "a logged line\n" in out.getvalue()
    finally:
        console.close()
        logger.removeHandler(early)
    assert early.stream is stream
    assert out.getvalue().rindex("step 1/10") > out.getvalue().rindex("a logged line")


def test_a_handler_that_follows_stderr_by_itself_is_left_alone():
    logger = logging.getLogger("test_tracking.following")
    logger.addHandler(logging.lastResort)
    console, _ = live_console()
    try:
        console.step(1, {"reward/mean": 0.5})
        console.close()
    finally:
        logger.removeHandler(logging.lastResort)
    assert logging.lastResort.stream is sys.stderr


def test_the_bar_shows_what_is_going_on():
    console, out = live_console()
    with console.phase("evaluate"):
        console._live.refresh()
        assert "evaluate" in out.getvalue()
        console.advance()
        console._live.refresh()
        assert "evaluate, 1 episodes, 0:00 so far" in out.getvalue()
    console.expect(4)
    console.advance(2)
    console._live.refresh()
    assert "2 of 4 episodes" in out.getvalue()
    console.step(1, {"reward/mean": 0.25, "train/loss": 0.125, "time/rollout": 1.0, "time/teacher": 0.5})
    console._live.refresh()
    assert "working" in out.getvalue()[out.getvalue().rindex("step 1/10") :]
    console.close()
    last = out.getvalue()[out.getvalue().rindex("step ") :]
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last)
    assert re.search(r"1/10 .*reward 0.25 loss 0.125 .*rollout 1.0s  teacher 0.5s", text.replace("\n", " "))


def test_streams_are_given_back_when_training_fails(tmp_path):
    streams = sys.stdout, sys.stderr
    terminal = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})
    config = QUIET.model_copy(update={"console": True})

    def fail() -> None:
        with tracker(tmp_path, config, console=terminal) as run:
            run.log(1, {"a": 1})
            assert (sys.stdout, sys.stderr) != streams
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert (sys.stdout, sys.stderr) == streams


def test_a_quiet_run_prints_nothing(tmp_path, capfd):
    with tracker(tmp_path) as run:
        with run.phase("evaluate"):
            run.log(1, {"train/loss": 1.0})
        run.episode_finished(episode())
        run.summary(before=Score(1, 2), after=Score(2, 2))
    assert capfd.readouterr() == ("", "")


@dataclass
class Score:
    solved: int
    played: int
    broken: int = 0


def test_the_table_at_the_end_sums_up_the_whole_run(tmp_path):
    config = TrackingConfig(wandb="disabled")
    with tracker(tmp_path / "lookup", config, console=Console(file=io.StringIO())) as run:
        run.log(1, {"tokens/sampled": 1000, "time/rollout": 60.0, "time/train": 20.0, "reward/mean": 0.1})
    out = io.StringIO()
    with tracker(tmp_path / "lookup", config, resume_step=1, console=Console(file=out, width=200)) as run:
        run.log(2, {"tokens/sampled": 2500, "time/rollout": 60.0, "time/train": 20.0, "reward/mean": 0.2})
        run.summary(before=Score(36, 300), after=Score(276, 300), change=(0.8, 0.75, 0.84))
    text = out.getvalue()
    assert "12.0%  (95%: 8.8% to 16.2%)  36 of 300 held-out tasks" in text
    assert "92.0%  (95%: 88.4% to 94.6%)  276 of 300 held-out tasks" in text
    assert "+80.0 points  (95%: +75.0 to +84.0, same tasks)" in text
    assert "3,500 sampled" in text
    assert "2:40: rollout 2:00 (75%), train 0:40 (25%)" in text
    assert str(tmp_path / "lookup") in text
    assert "curves.png, evals.jsonl, metrics.jsonl, rollouts.jsonl" in text
    assert (tmp_path / "lookup" / "curves.png").stat().st_size > 1000


def test_no_picture_is_drawn_when_plot_is_off(tmp_path):
    with tracker(tmp_path) as run:
        run.log(1, {"reward/mean": 0.5})
        run.summary()
    assert not (tmp_path / "curves.png").exists()


def test_what_was_not_measured_is_said_and_counts_for_nothing(tmp_path):
    out = io.StringIO()
    with tracker(tmp_path, TrackingConfig(wandb="disabled"), console=Console(file=out, width=200)) as run:
        run.log_eval(0, {"eval/success": math.nan, "eval/broken": 300})
        run.log(1, {"reward/mean": 0.0})
        run.summary(before=Score(0, 0, broken=300), after=Score(3, 4, broken=2))
    shown = " ".join(out.getvalue().split())
    assert "held-out not measured" in shown
    assert "not measured: the environment broke in all of 300 episodes" in shown
    assert "75.0% (95%: 30.1% to 95.4%) 3 of 4 held-out tasks, 2 more not measured: their environment broke" in shown
