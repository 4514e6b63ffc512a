"""A real vLLM server: what it samples, and kill -9 in the middle of things, to be started again by a person.

One server serves the whole file; those that a run starts itself are in `tests/launch/test_vllm_runs.py`. Not covered:
servers on other nodes, and several GPUs.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import httpx
import pytest
import torch

from opd.engines.base import Request, Sampling, generate
from opd.engines.scoring import VllmScorer
from opd.engines.vllm import engine_args
from opd.engines.vllm_http import Server, sizes
from opd.engines.vllm_process import OwnServer
from opd.engines.vllm_replicas import Replica
from opd.engines.vllm_server import VllmServerEngine
from opd.engines.weights import ModelWeights
from opd.episodes.config import RolloutConfig
from opd.episodes.tasks import task
from opd.errors import EngineError

pytest.importorskip("vllm", reason="vLLM is not installed: make test installs its CPU build where there is no GPU")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SHAPE = {"tie_word_embeddings": True, "max_position_embeddings": 512, "head_dim": 32}
KEY = "a key for this test"


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(stops=True, **SHAPE)


@pytest.fixture(scope="module")
def own(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    model.config.save_pretrained(folder)
    config = RolloutConfig(max_length=512, concurrency=32, vllm={"kv_cache_gib": 0.25})
    server = OwnServer(str(folder), engine_args(model, config.vllm, config.limits), key=KEY, log=folder / "vllm.log")
    server.start()
    yield server
    server.stop()


def connect(own, model, *, key=KEY, retries=4, restart_timeout=900.0):
    """An engine over the server as one that a person has started: nothing here starts it again."""
    server = Server(own.url, key=key, timeout=120.0, connections=33)
    config = RolloutConfig(vllm={"retries": retries, "restart_timeout": restart_timeout}).vllm
    replica = Replica(server=server)
    return VllmServerEngine([replica], config, model=sizes(model.config), concurrency=32)


@pytest.fixture
def engine(own, model):
    engine = connect(own, model)
    engine.update_weights(ModelWeights(model), 0)
    yield engine
    engine.close()


def prompt(count, seed):
    return torch.randint(5, 200, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(count, *, max_tokens=12):
    return [Request(session=n, prompt_ids=prompt(20 + n, n), seed=n, max_tokens=max_tokens) for n in range(count)]


def run(engine, asked, *, stop=frozenset()):
    engine.begin(Sampling(temperature=1.0), stop)
    return {done.session: done for done in generate(engine, asked)}


@torch.no_grad()
def gap(model, asked, done):
    worst = 0.0
    for r in asked:
        sampled = done[r.session].token_ids
        logprobs = model.model(input_ids=torch.tensor([r.prompt_ids + sampled])).logits[0].log_softmax(-1)
        own = logprobs[range(len(r.prompt_ids) - 1, len(r.prompt_ids) + len(sampled) - 1), sampled]
        worst = max(worst, float((own - torch.tensor(done[r.session].logprobs)).abs().max()))
    return worst


def kill_and_restart(own):
    """kill -9 of the server itself, as the kernel out of memory would do it; a person starts it again later."""
    launcher = own._process
    children = ["pgrep", "-P", str(launcher.pid)]
    [server] = subprocess.run(children, capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(server), signal.SIGKILL)

    def restart():
        launcher.wait()
        time.sleep(1)
        own.start()

    threading.Thread(target=restart).start()


def test_a_server_samples_what_the_model_says_and_the_same_for_the_same_seed(engine, model):
    asked = requests(6)
    done, again = run(engine, asked), run(engine, asked)
    assert gap(model, asked, done) < 1e-4
    assert [done[n].token_ids for n in range(6)] == [again[n].token_ids for n in range(6)]


def test_after_an_update_the_server_samples_from_the_new_weights(engine, make_model):
    new = make_model(seed=7, **SHAPE)
    asked = requests(6)
    assert gap(new, asked, run(engine, asked)) > 0.1
    engine.update_weights(ModelWeights(new), 5)
    done = run(engine, asked)
    assert gap(new, asked, done) < 1e-4
    assert {d.policy_version for d in done.values()} == {5}


def test_a_server_of_ours_listens_on_loopback_alone_and_asks_for_the_key(own, engine, model):
    assert own.url.startswith("http://127.0.0.1:")
    for path in ("/v1/models", "/weight_info", "/collective_rpc", "/update_weights"):
        assert httpx.post(own.url + path, json={}).status_code == 401
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    [address] = [line.split()[1] for line in listening.splitlines() if f":{own.port:04X} " in line and " 0A " in line]
    assert address == f"0100007F:{own.port:04X}"
    stranger = connect(own, model, key="another")
    with pytest.raises(EngineError, match=r"status 401"):
        stranger.update_weights(ModelWeights(model), 1)
    stranger.close()


def test_a_server_that_holds_another_model_is_refused_by_its_sizes(own, engine, make_model):
    other = make_model(**(SHAPE | {"num_hidden_layers": 3, "hidden_size": 64}))
    stranger = connect(own, other)
    with pytest.raises(
        EngineError, match=r"another model .*: hidden_size is 32 there, 64 here, num_hidden_layers is 2"
    ):
        stranger.update_weights(ModelWeights(other), 1)
    stranger.close()


def test_the_same_seed_gives_the_same_episodes_whoever_else_is_in_flight(
    engine, model, make_scheduler, scripted_env, turns_then_end
):
    def play(pause):
        def answer(env, action):
            time.sleep(0.01 * (pause(env.seed, env.turn) % 5))
            return turns_then_end(3)(env, action)

        engine.update_weights(ModelWeights(model), 0)
        with closing(
            make_scheduler(
                lambda: scripted_env(answer), engine=engine, deterministic=False, concurrency=32, max_tokens=8
            )
        ) as scheduler:
            tasks = [task(n, split="train") for n in range(12)]
            groups = scheduler.run(tasks, group_size=2, sampling=Sampling(temperature=1.0), seed=3)
        return [[turn.completion_ids for turn in t.turns] for group in groups for t in group.trajectories]

    engine.metrics()
    first = play(lambda seed, turn: seed + turn)
    assert engine.metrics()["prefix_hits"] > 0.2
    assert play(lambda seed, turn: seed // 7 + 2 * turn) == first


def test_a_server_scores_what_the_model_says(own, engine, model):
    server = Server(own.url, key=KEY, timeout=120.0, connections=8)
    scorer = VllmScorer([server], vocabulary=model.config.vocab_size, retries=1, restart_timeout=10.0)
    sequences, rows = [prompt(40, 1), prompt(9, 2)], [[0, 7, 38], [3]]
    scores = scorer.score(sequences, rows, top_k=30)
    for sequence, own_rows, score in zip(sequences, rows, scores, strict=True):
        with torch.no_grad():
            logprobs = model.model(input_ids=torch.tensor([sequence])).logits[0].log_softmax(-1)
        assert score.logprobs == pytest.approx([float(logprobs[r, sequence[r + 1]]) for r in own_rows], abs=1e-4)
        assert score.top_ids == logprobs[own_rows].topk(30).indices.tolist()
    scorer.score(sequences, rows)
    assert scorer.metrics() == {"prefix_hits": 0.0}  # what was asked a moment ago as well
    server.close()


@pytest.mark.long
def test_a_server_killed_in_the_middle_of_a_rollout_costs_time_and_nothing_else(
    own, engine, model, make_scheduler, scripted_env, turns_then_end
):
    scheduler = make_scheduler(
        lambda: scripted_env(turns_then_end(4)), engine=engine, deterministic=False, concurrency=16, max_tokens=24
    )
    tasks = [task(n, split="train") for n in range(48)]
    finished = []

    def kill_once(trajectory):
        finished.append(trajectory)
        if len(finished) == 8:
            kill_and_restart(own)

    groups = scheduler.run(tasks, group_size=1, sampling=Sampling(temperature=1.0), seed=3, on_finish=kill_once)
    episodes = [t for group in groups for t in group.trajectories]
    assert [t.task.index for t in episodes] == list(range(48))
    assert all(t.failed is None and len(t.turns) == 4 for t in episodes)
    assert engine.metrics()["fault_lost"] >= 1
    for trajectory in episodes[::6]:
        turn = trajectory.turns[0]
        asked = Request(session=0, prompt_ids=turn.prompt_ids, seed=0, max_tokens=24)
        done = type("Done", (), {"token_ids": turn.completion_ids, "logprobs": turn.logprobs})
        assert gap(model, [asked], {0: done}) < 1e-4  # also those that a restarted server sampled


@pytest.mark.long
def test_a_server_killed_in_the_middle_of_an_update_is_given_all_of_it_again(own, engine, make_model):
    new = make_model(seed=9, **SHAPE)

    class Slow:
        collective = False
        passes = 0

        def __iter__(self):
            Slow.passes += 1
            for number, pair in enumerate(ModelWeights(new)):
                if number == 6 and Slow.passes == 1:
                    kill_and_restart(own)
                yield pair

    engine.update_weights(Slow(), 3)
    assert Slow.passes > 1
    asked = requests(6)
    done = run(engine, asked)
    assert gap(new, asked, done) < 1e-4
    assert {d.policy_version for d in done.values()} == {3}


@pytest.mark.long
def test_a_server_ends_with_the_process_that_started_it():
    # The command is a stand-in, quick to start: what is under test is who ends it.
    script = (
        "import subprocess as s, sys\n"
        "command = [sys.executable, '-m', 'opd.engines.vllm_process', 'sleep', '300']\n"
        "print(s.Popen(command, stdin=s.PIPE, start_new_session=True).pid, flush=True)\n"
        "sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as starter:
        launcher = int(starter.stdout.readline())
        starter.kill()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{launcher}").exists() and "Z" not in Path(f"/proc/{launcher}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
