"""Environments in processes of their own: real processes, killed and crashing for real.

Not covered: a process that the system cannot kill, since it waits for a dead disk.
"""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from opd.engines.base import Sampling
from opd.envs.factory import make, module_of
from opd.episodes.faults import Failure
from opd.episodes.processes import Processes, Remote
from opd.episodes.tasks import task
from opd.errors import ConfigError
from opd.sandbox.forks import read_frame, write_frame
from opd.types import Fault

pytestmark = pytest.mark.slow

BAD = task(1, split="train").seed
HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _modules(monkeypatch):
    monkeypatch.syspath_prepend(HERE)  # environments are imported by name, there as here


@pytest.fixture
def start():
    """`start(env, **kwargs)`: a server, and a function that gives remote environments of it."""
    made = []

    def begin(env_id, *, preload=("wild_envs",), **kwargs):
        owner = Processes(partial(make, env_id if ":" in env_id else f"wild_envs:{env_id}", kwargs), preload=preload)
        made.append(owner)

        def remote():
            made.insert(0, Remote(owner))
            return made[0]

        return owner, remote

    yield begin
    for one in made:
        one.kill() if isinstance(one, Remote) else one.close()


def wild(env_id, **kwargs):
    return partial(make, f"wild_envs:{env_id}", kwargs)


def flat(groups):
    return [t for group in groups for t in group.trajectories]


def descendants(pid):
    """The living processes that descend from one."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # ended meanwhile
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            parents |= {int(stat.parent.name): int(parent)} if state != "Z" else {}
    result, frontier = set(), {pid}
    while frontier:
        frontier = {p for p, pp in parents.items() if pp in frontier}
        result |= frontier
    return result


def gone(pids, seconds=30.0):
    """Whether all of them end within that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(Path(f"/proc/{pid}").exists() and _state(pid) != "Z" for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


# -- the same episodes as in threads ---------------------------------------------------------------------


def test_episodes_in_processes_are_those_in_threads_to_the_bit(play, make_model):
    model = make_model(stops=True)
    runs = [
        [dataclasses.replace(t, seconds={}) for t in flat(play(wild("WildEnv"), tasks=4, group_size=2, **options))]
        for options in ({"model": model}, {"model": model, "hosts": "processes"})
    ]
    assert runs[0] == runs[1]
    assert all(t.terminated for t in runs[0])


@pytest.mark.parametrize("lock", [False, True])
def test_a_group_is_scored_by_copies_of_its_environments_or_refused_by_name(
    play, make_tokenizer, scripted_engine, lock
):
    tokenizer, call = make_tokenizer(), '<tool_call>{"name": "open", "arguments": {"number": 2}}</tool_call>'
    said = [["done"], [call, "done"], ["done"]]
    turns = [[[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts] for texts in said]
    kwargs = {"config": {"lock": lock}, "rewards": ["wild_envs:most_opened"]}
    settings = {"tasks": 1, "group_size": 3, "hosts": "processes", "engine": scripted_engine(turns), "max_turns": 4}
    [group] = play(partial(make, "trl:wild_envs:Box", kwargs), max_tokens=256, max_length=2048, **settings)
    if lock:
        assert "env.workers: threads, or group: false" in group.trajectories[0].failed
    else:
        assert [(t.failed, t.reward) for t in group.trajectories] == [(None, 0.0), (None, 1.0), (None, 0.0)]


def test_a_process_lives_for_many_episodes(play, tmp_path):
    log = tmp_path / "log"
    play(wild("WildEnv", log=str(log)), tasks=6, concurrency=2, hosts="processes")
    pids = log.read_text().split()
    assert len(pids) == 6
    assert len(set(pids)) == 2
    assert str(os.getpid()) not in pids


# -- what a process survives -----------------------------------------------------------------------------

BROKEN = {
    "raise": (Fault.RAISED, "step 1: ValueError: no luck"),
    "refuse": (Fault.CONNECTION, "step 1: ConnectionRefusedError: nobody there"),
    "hang": (Fault.TIMEOUT, "step 1: TimeoutError: no answer within 2 s (rollout.step_timeout)"),
    "hang deaf": (Fault.TIMEOUT, "step 1: TimeoutError: no answer within 2 s (rollout.step_timeout)"),
    "bytes": (Fault.INVALID, "step 1: BadAnswer: an observation must be a str"),
    "none": (Fault.INVALID, "step 1: BadAnswer: step must return (observation, reward"),
    "huge": (Fault.INVALID, "step 1: BadAnswer: an observation: 10,000,000 characters"),
    "nan": (Fault.INVALID, "step 1: BadAnswer: the reward is nan"),
    "sys.exit": (Fault.RAISED, "step 1: SystemExit: 3"),
    "exit": (Fault.DIED, "step 1: the environment's process ended with exit code 7"),
    "segfault": (Fault.DIED, "step 1: the environment's process was ended by SIGSEGV"),
    "kill": (Fault.DIED, "step 1: the environment's process was ended by SIGKILL"),
    "scribble": (Fault.DIED, "step 1: the environment's process was ended by SIGKILL"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_an_environment_that_breaks_in_its_process_fails_its_own_episode_and_no_other(play, how):
    fault, reason = BROKEN[how]
    groups = play(
        wild("ActsOut", how=how, bad=BAD), tasks=3, hosts="processes", step_timeout=2.0, deterministic=how != "hang"
    )
    episodes = flat(groups)
    assert [e.terminated for e in episodes] == [True, False, True]
    assert (episodes[1].fault, episodes[1].failed[: len(reason)]) == (fault, reason)


def test_a_step_that_hangs_is_killed_and_not_only_given_up(make_scheduler, tmp_path):
    log = tmp_path / "log"
    scheduler = make_scheduler(
        wild("ActsOut", how="hang deaf", bad=BAD, log=str(log)), hosts="processes", step_timeout=2.0, concurrency=1
    )
    tasks = [task(n, split="train") for n in range(3)]
    scheduler.run(tasks, group_size=1, sampling=Sampling(temperature=1.0), seed=0)
    first, hung, last = map(int, log.read_text().split())
    assert first == hung != last
    assert gone([hung], seconds=30.0)
    assert not gone([last], seconds=0.2)


def test_a_retry_plays_the_same_draws_in_a_fresh_process(play, tmp_path, make_model):
    model, log = make_model(stops=True), tmp_path / "log"
    options = {"tasks": 3, "group_size": 2, "hosts": "processes", "model": model, "concurrency": 3}
    [calm, wild_run] = [
        play(
            wild("ActsOut", how="segfault", bad=bad, marker=str(tmp_path / "once"), log=str(log)),
            on_failure="retry",
            **options,
        )
        for bad in (None, BAD)
    ]
    texts = [[[t.completion_ids for t in e.turns] for e in flat(groups)] for groups in (calm, wild_run)]
    assert texts[0] == texts[1]
    [replaced] = [t for group in wild_run for t in group.replaced]
    assert (replaced.task.index, replaced.fault, len(replaced.turns)) == (1, Fault.DIED, 1)
    assert replaced.turns[0].completion_ids == wild_run[1].trajectories[replaced.member].turns[0].completion_ids
    assert [g.replaced for g in calm] == [[], [], []]


def test_a_server_that_is_killed_is_started_again(make_scheduler):
    scheduler = make_scheduler(wild("WildEnv"), hosts="processes")
    asked = {"group_size": 1, "sampling": Sampling(temperature=1.0), "seed": 0}
    tasks = [task(n, split="train") for n in range(2)]
    assert all(t.terminated for t in flat(scheduler.run(tasks, **asked)))
    server = scheduler.environments.processes._server.pid
    children = descendants(server)
    assert len(children) == 2
    os.kill(server, signal.SIGKILL)
    assert gone(children), "environments outlived their server"
    # The environments that were idle have died; whoever comes after them lives.
    assert {t.fault for t in flat(scheduler.run(tasks, **asked))} == {Fault.DIED}
    assert all(t.terminated for t in flat(scheduler.run(tasks, **asked)))


# -- nothing stays ---------------------------------------------------------------------------------------


def test_no_process_is_left_after_close_whatever_environments_have_started(make_scheduler):
    scheduler = make_scheduler(wild("LeavesChildren"), hosts="processes")
    before = descendants(os.getpid())
    scheduler.run([task(0, split="train")], group_size=2, sampling=Sampling(temperature=1.0), seed=0)
    started = descendants(scheduler.environments.processes._server.pid) - before
    assert len(started) == 2 * (1 + 4)
    scheduler.close()
    assert gone(started)
    assert descendants(os.getpid()) <= before


def test_killing_one_environment_ends_what_it_started_and_leaves_the_others(start):
    owner, remote = start("LeavesChildren")
    one, other = remote(), remote()
    one.reset(task(0, split="train"))
    mine = descendants(owner._server.pid)
    other.reset(task(1, split="train"))
    theirs = descendants(owner._server.pid) - mine
    one.kill()
    assert gone(mine)
    assert len(theirs) == 5
    assert theirs <= descendants(owner._server.pid)
    assert other.step("hm").messages


def test_an_interrupted_round_leaves_no_process_at_work(make_scheduler, tmp_path):
    log = tmp_path / "log"
    scheduler = make_scheduler(
        wild("ActsOut", how="hang", bad=BAD, log=str(log)), hosts="processes", deterministic=False
    )

    def interrupts(_):
        deadline = time.monotonic() + 20
        while len(log.read_text().split()) < 2 and time.monotonic() < deadline:  # until the other is at work too
            time.sleep(0.01)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scheduler.run(
            [task(n, split="train") for n in range(2)],
            group_size=1,
            sampling=Sampling(temperature=1.0),
            seed=0,
            on_finish=interrupts,
        )
    working = [int(pid) for pid in log.read_text().split()]
    assert sum(gone([pid], seconds=3.0) for pid in working) == 1  # the other is idle, for the next round


TRAINER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell's children ignore it
sys.path.insert(0, {here!r})
from functools import partial
from opd.envs.factory import make
from opd.episodes.processes import Processes, Remote
from opd.types import Task
owner = Processes(partial(make, "wild_envs:LeavesChildren", {{}}), preload=["wild_envs"])
remotes = [Remote(owner) for _ in range(2)]
for remote in remotes:
    remote.reset(Task(index=0, seed=0))
print(owner._server.pid, flush=True)
{then}
"""


@pytest.mark.parametrize(
    ("then", "end"),
    [
        ("time.sleep(600)", signal.SIGKILL),
        ("time.sleep(600)", signal.SIGINT),
        ("raise SystemExit", None),
        ("import os; os._exit(1)", None),
        ("import os; os.fork() and os._exit(0); time.sleep(3)", None),
    ],
    ids=["kill -9", "ctrl-c", "forgot to close", "hard exit", "a fork holds the sockets"],
)
def test_environments_and_what_they_started_end_with_the_trainer_however_it_ends(then, end):
    program = TRAINER.format(here=HERE, then=then)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as trainer:
        server = int(trainer.stdout.readline())
        started = {server} | descendants(server)
        assert len(started) == 1 + 2 * (1 + 4) or end is None
        if end is not None:
            trainer.send_signal(end)
        trainer.wait(timeout=20)
        assert gone(started, seconds=10)


# -- the parts ---------------------------------------------------------------------------------------------


def test_a_factory_that_cannot_be_sent_is_refused_with_the_mend():
    with pytest.raises(ConfigError, match=r"env\.workers = processes: .* or set env\.workers: threads"):
        Processes(lambda: None)


def test_a_factory_that_fails_there_says_why(start):
    _, remote = start("ActsOut")  # its arguments are missing
    with pytest.raises(Failure, match=r"ConfigError: env\.kwargs: .*missing") as caught:
        remote().reset(task(0, split="train"))
    assert caught.value.fault is Fault.RAISED


def test_after_closing_nothing_is_forked(start):
    owner, remote = start("WildEnv")
    owner.close()
    with pytest.raises(Failure, match="its server ended"):
        remote().reset(task(0, split="train"))


def test_an_environment_given_up_before_its_process_was_there_leaves_none(start):
    owner, remote = start("WildEnv")
    late = remote()
    late.kill()
    with pytest.raises(Failure, match="process ended"):
        late.reset(task(0, split="train"))
    assert descendants(owner._server.pid) == set()


def test_a_module_that_starts_a_thread_is_not_forked_from(start, tmp_path, monkeypatch):
    (tmp_path / "threads_at_import.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(600,), daemon=True).start()\n"
        "from wild_envs import WildEnv\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    owner, remote = start("threads_at_import:WildEnv", preload=["threads_at_import"])
    assert remote().reset(task(0, split="train")).messages
    assert len(list(Path(f"/proc/{owner._server.pid}/task").iterdir())) == 1


def test_environments_have_draws_of_their_own(start, tmp_path, monkeypatch):
    (tmp_path / "draws.py").write_text(
        "import numpy, random\n"
        "from wild_envs import WildEnv\n"
        "class Draws(WildEnv):\n"
        "    def step(self, action):\n"
        "        return f'{random.random()} {numpy.random.random()}', 0.0, False, False, {}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    _, remote = start("draws:Draws", preload=["draws"])
    said = []
    for one in (remote(), remote()):
        one.reset(task(0, split="train"))
        said += one.step("x").messages[0]["content"].split()
    assert len(set(said)) == 4


def test_frames_that_are_cut_or_endless_are_no_frames():
    for sent in (b"", b"\0\0", b"\0\0\0\5abc", b"\xff\xff\xff\xff" + b"x" * 100):
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                theirs.sendall(sent)
            assert read_frame(ours) is None
    ours, theirs = socket.socketpair()
    with ours, theirs:
        write_frame(theirs, json.dumps({"ä": 1}).encode())
        assert json.loads(read_frame(ours)) == {"ä": 1}


def test_the_module_of_an_environment_is_told_without_importing_it():
    assert module_of("wild_envs:WildEnv") == "wild_envs"
    assert module_of("opd/Lookup-v0").startswith("opd.envs")
    assert module_of("pkg.mod:Some-v0") == "pkg.mod"
    assert module_of("nothing/At-v0") == "opd.envs"
