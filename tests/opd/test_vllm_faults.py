"""What the engine over servers does about each kind of fault: retried within its budget or raised, never padded.

The server here is a stand-in that speaks the protocol and misbehaves on command, for faults that a real one cannot be
made to have. Real servers, killed in the middle of things, are in `test_vllm_server.py`.
"""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from opd.engines import vllm_replicas
from opd.engines.base import Request, Sampling, generate
from opd.engines.config import VllmConfig
from opd.engines.scoring import VllmScorer
from opd.engines.vllm_http import OTHER_MODEL, Server
from opd.engines.vllm_replicas import Replica
from opd.engines.vllm_server import VllmServerEngine
from opd.errors import DataError, EngineError

pytestmark = pytest.mark.slow

STOP = frozenset({7})
HANG_UP, HANG, CUT = object(), object(), object()
"""What a script may hold in place of an answer; CUT: the right one, broken off in the middle of its bytes."""


class FakeWeights:
    collective = False

    def __iter__(self):
        yield "a.weight", torch.ones(3)


class FakeServer:
    """Answers like a vLLM server, unless `script` has something else for the next request of a path."""

    def __init__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                self.do_POST()

            def do_POST(self):
                raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                answer = fake.answer(self.path.split("?")[0], json.loads(raw or b"{}"), self.headers)
                if answer is HANG:
                    time.sleep(3)
                if answer is HANG or answer is HANG_UP:
                    self.close_connection = True
                    return
                if answer is CUT:
                    body, status = fake.choice({"sampling_params": {"max_tokens": 4}, "token_ids": [1, 2]}), 200
                else:
                    status, body = answer if isinstance(answer, tuple) else (200, answer)
                data = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: len(data) // 2] if answer is CUT else data)
                self.close_connection = answer is CUT

        self.script: dict[str, list] = {}
        self.calls: list[str] = []
        self.keys: set = set()
        self.label = "default"
        self.updates = 0
        self.dead = False
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def answer(self, path, body, headers):
        if self.dead:
            return HANG_UP
        self.calls.append(path)
        self.keys.add(headers.get("Authorization"))
        scripted = self.script.get(path)
        if scripted:
            following = scripted.pop(0)
            return following(self.choice(body)) if callable(following) else following
        if path == "/inference/v1/generate":
            return self.choice(body)
        if path == "/update_weight_version":
            self.label = body["new_version"]
            self.updates += 1
        return {"success": True, "weight_version": self.label}

    def choice(self, body):
        count = body["sampling_params"]["max_tokens"]
        ids = [9] * (count - 1) + [7]
        content = [{"token_id": token, "logprob": -0.5} for token in ids]
        return {
            "choices": [
                {
                    "token_ids": ids,
                    "finish_reason": "stop",
                    "logprobs": {"content": content},
                    "weight_versions": [{"version": self.label, "start": 0, "end": count}],
                }
            ],
            "prompt_logprobs": [None, *({str(t): {"logprob": -1.0, "rank": 1}} for t in body["token_ids"][1:])],
        }

    def close(self):
        self.dead = True
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def fakes():
    servers = [FakeServer(), FakeServer()]
    yield servers
    for server in servers:
        server.close()


@pytest.fixture
def make_engine(monkeypatch):
    monkeypatch.setattr(vllm_replicas, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(vllm_replicas, "PROBE_EVERY", 0.05)
    made = []

    def make(*fakes, key=None, timeout=20.0, own=None, **config):
        settings = VllmConfig(**{"retries": 2, "restart_timeout": 1.0, **config})
        links = [Server(fake.url, key=key, timeout=timeout, connections=8) for fake in fakes]
        replicas = [Replica(server=link, **(own or {})) for link in links]
        engine = VllmServerEngine(replicas, settings, model={"vocab_size": 100}, concurrency=8)
        made.append(engine)
        engine.update_weights(FakeWeights(), 0)
        return engine

    yield make
    for engine in made:
        engine.close()


def asked(count=1, *, max_tokens=4, prompt=None):
    return [Request(session=n, prompt_ids=prompt or [n + 1, 2, 3], seed=n, max_tokens=max_tokens) for n in range(count)]


def run(engine, requests):
    engine.begin(Sampling(temperature=1.0), STOP)
    return {done.session: done for done in generate(engine, requests)}


def edit(**changes):
    """A script entry: the right answer with its choice changed."""

    def change(answer):
        answer["choices"][0].update(changes)
        return answer

    return change


GENERATE = "/inference/v1/generate"
BAD_ANSWERS = {
    "not JSON": (b'{"choices": [', "is not JSON"),
    "a list": ([1], "answered with a list"),
    "no choice": ({"choices": []}, "without a choice"),
    "fewer log-probs than ids": (edit(logprobs={"content": [{"token_id": 9, "logprob": -1.0}]}), "has 4 ids but 1"),
    "no log-probs": (edit(logprobs=None), "has 4 ids but no"),
    "log-probs of other ids": (
        edit(logprobs={"content": [{"token_id": 8, "logprob": -1.0}] * 4}),
        "belong to other ids",
    ),
    "nan": (edit(logprobs={"content": [{"token_id": t, "logprob": float("nan")} for t in (9, 9, 9, 7)]}), "has nan"),
    "a log-prob that is text": (
        edit(logprobs={"content": [{"token_id": t, "logprob": "-1"} for t in (9, 9, 9, 7)]}),
        "has '-1'",
    ),
    "an id beyond the vocabulary": (
        edit(token_ids=[100], logprobs={"content": [{"token_id": 100, "logprob": -1.0}]}),
        "outside the vocabulary",
    ),
    "cut short": (
        edit(token_ids=[9, 9], logprobs={"content": [{"token_id": 9, "logprob": -1.0}] * 2}),
        "after 2 of 4 tokens",
    ),
    "aborted": (edit(finish_reason="abort"), "ended by 'abort'"),
    "429": ((429, {"error": "slow down"}), "status 429"),
    "500": ((500, {"error": "boom"}), "status 500: .*boom"),
    "503": ((503, b""), "status 503"),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_a_bad_answer_is_asked_for_again_and_raised_when_the_budget_is_spent(fakes, make_engine, name):
    bad, message = BAD_ANSWERS[name]
    engine = make_engine(fakes[0])
    fakes[0].script[GENERATE] = [bad, bad]
    [done] = run(engine, asked()).values()
    assert done.token_ids == [9, 9, 9, 7]
    assert sum(engine.metrics().values()) == 2
    fakes[0].script[GENERATE] = [bad] * 3
    with pytest.raises(EngineError, match=rf"failed 3 times, at last with .*{message}.*rollout.vllm.retries = 2"):
        run(engine, asked())


def test_an_answer_that_breaks_off_in_the_middle_of_its_bytes_is_asked_for_again(fakes, make_engine):
    engine = make_engine(fakes[0])
    fakes[0].script[GENERATE] = [CUT]
    assert run(engine, asked())[0].token_ids == [9, 9, 9, 7]
    assert engine.metrics() == {"fault_lost": 1.0}


def test_what_a_server_refuses_is_not_asked_again(fakes, make_engine):
    engine = make_engine(fakes[0])
    fakes[0].script[GENERATE] = [(400, {"error": "the prompt is too long"})] * 5
    with pytest.raises(EngineError, match=r"failed 1 times.*the prompt is too long.*kind: refused"):
        run(engine, asked())
    assert len(fakes[0].script[GENERATE]) == 4


def test_an_answer_that_is_too_large_is_not_read_to_its_end(fakes, make_engine, monkeypatch):
    monkeypatch.setattr("opd.engines.vllm_http.ANSWER_BYTES", 10_000)
    engine = make_engine(fakes[0], retries=0)
    fakes[0].script[GENERATE] = [b" " * 20_000]
    with pytest.raises(EngineError, match="more than 10000 bytes"):
        run(engine, asked())


def test_a_server_that_is_late_is_asked_again(fakes, make_engine):
    engine = make_engine(fakes[0], timeout=0.5)
    fakes[0].script[GENERATE] = [HANG]
    assert run(engine, asked())[0].token_ids == [9, 9, 9, 7]
    assert engine.metrics() == {"fault_late": 1.0}


def test_a_broken_connection_is_no_reason_to_send_the_weights_again(fakes, make_engine):
    engine = make_engine(fakes[0])
    fakes[0].script[GENERATE] = [HANG_UP]
    assert run(engine, asked())[0].token_ids == [9, 9, 9, 7]
    assert engine.metrics() == {"fault_lost": 1.0}
    assert fakes[0].updates == 1


def test_a_server_that_lost_its_weights_is_given_them_again_before_it_counts(fakes, make_engine):
    engine = make_engine(fakes[0])
    fakes[0].label = "default"  # as after a restart
    done = run(engine, asked(4))
    assert {d.policy_version for d in done.values()} == {0}
    assert fakes[0].updates == 2
    assert engine.metrics()["fault_stale"] >= 1


def test_sharded_weights_cannot_be_sent_again_in_the_middle_of_a_step(fakes, make_engine, monkeypatch):
    monkeypatch.setattr(FakeWeights, "collective", True)
    engine = make_engine(fakes[0])
    fakes[0].label = "default"
    with pytest.raises(EngineError, match="sharded ones cannot be sent again in the middle of a step"):
        run(engine, asked())


def test_requests_of_a_dead_replica_go_to_another(fakes, make_engine):
    engine = make_engine(*fakes)
    fakes[0].close()
    done = run(engine, asked(8))
    assert sorted(done) == list(range(8))
    assert engine.metrics()["fault_lost"] >= 1


def test_with_every_server_dead_the_run_stops_within_the_limit(fakes, make_engine):
    engine = make_engine(fakes[0])
    fakes[0].close()
    since = time.monotonic()
    with pytest.raises(EngineError, match=r"did not come up within rollout.vllm.restart_timeout = 1 seconds.*--resume"):
        run(engine, asked())
    assert time.monotonic() - since < 10


@pytest.mark.parametrize("path", ["/start_weight_update", "/update_weights", "/finish_weight_update"])
@pytest.mark.parametrize("fault", [(500, {"error": "boom"}), HANG_UP])
def test_an_update_that_fails_is_made_again_as_a_whole(fakes, make_engine, path, fault):
    engine = make_engine(fakes[0])
    fakes[0].script[path] = [fault]
    engine.update_weights(FakeWeights(), 1)
    assert run(engine, asked())[0].policy_version == 1
    assert fakes[0].label.endswith("-1")


def test_an_update_that_is_refused_is_raised(fakes, make_engine):
    engine = make_engine(fakes[0])
    fakes[0].script["/start_weight_update"] = [(404, {"error": "no such path"})]
    with pytest.raises(EngineError, match=r"the weights cannot be sent to http.*status 404"):
        engine.update_weights(FakeWeights(), 1)


def test_an_update_that_fails_again_and_again_stops_the_run_long_before_the_time_limit(fakes, make_engine):
    engine = make_engine(fakes[0], restart_timeout=300.0)
    fakes[0].script["/start_weight_update"] = [(500, {"error": "boom"})] * 99
    with pytest.raises(EngineError, match=r"did not take the weights in 3 attempts: .*boom.*rollout.vllm.retries = 2"):
        engine.update_weights(FakeWeights(), 1)


def test_a_server_of_another_model_is_refused_before_a_weight_is_sent(fakes, make_engine):
    engine = make_engine(fakes[0])
    said = f"Worker failed with error '{OTHER_MODEL}: hidden_size is 8 there, 16 here', please check"
    fakes[0].script["/init_weight_transfer_engine"] = [(500, {"error": {"message": said}})]
    before = fakes[0].calls.count("/update_weights")
    with pytest.raises(
        EngineError, match=rf"cannot be sent to .*{OTHER_MODEL}: hidden_size is 8 there, 16 here. Start"
    ):
        engine.update_weights(FakeWeights(), 1)
    assert fakes[0].calls.count("/update_weights") == before


@pytest.mark.parametrize(
    "said",
    [
        "Worker failed with error 'Weight transfer not configured. Please set weight_transfer_config to enable it.'",
        "Worker failed with error 'Invalid init_info for NCCLWeightTransferEngine: unexpected keyword 'sizes''",
    ],
)
def test_a_server_that_somebody_started_to_take_no_weights_of_ours_is_refused_at_once(fakes, make_engine, said):
    engine = make_engine(fakes[0])
    fakes[0].script["/init_weight_transfer_engine"] = [(500, {"error": {"message": said}})]
    asked = fakes[0].calls.count("/init_weight_transfer_engine")
    with pytest.raises(
        EngineError, match=r"cannot be sent to .*not started to take the weights of a run. Start it with"
    ):
        engine.update_weights(FakeWeights(), 1)
    assert fakes[0].calls.count("/init_weight_transfer_engine") == asked + 1


def test_a_server_of_ours_that_never_gets_up_is_given_up_with_its_last_words(fakes, make_engine):
    starts = []

    def restart():
        starts.append(1)
        return True

    fakes[0].close()
    with pytest.raises(EngineError, match=r"ended 3 times before it was up. no such argument"):
        make_engine(fakes[0], restart_timeout=300.0, own={"restart": restart, "last_words": lambda: "no such argument"})
    assert len(starts) == 3


def test_a_replica_that_missed_an_update_gets_no_requests(fakes, make_engine):
    engine = make_engine(*fakes)
    fakes[1].script["/update_weights"] = [(500, {"error": "boom"})]
    engine.update_weights(FakeWeights(), 1)
    before = fakes[1].calls.count(GENERATE)
    assert {d.policy_version for d in run(engine, asked(8)).values()} == {1}
    assert fakes[1].calls.count(GENERATE) == before


def test_a_conversation_stays_with_its_replica_and_load_is_shared(fakes, make_engine):
    engine = make_engine(*fakes)
    run(engine, asked(8))
    first = [fake.calls.count(GENERATE) for fake in fakes]
    assert first == [4, 4]
    run(engine, [r for r in asked(8) if r.session % 2 == 0])
    moved = [fake.calls.count(GENERATE) - count for fake, count in zip(fakes, first, strict=True)]
    assert sorted(moved) == [0, 4]


def test_conversations_that_begin_alike_share_a_replica(fakes, make_engine):
    engine = make_engine(*fakes)
    run(engine, asked(4, prompt=[5, 5, 5]))
    assert sorted(fake.calls.count(GENERATE) for fake in fakes) == [0, 4]


def test_the_key_goes_with_every_call(fakes, make_engine):
    run(make_engine(fakes[0], key="secret"), asked())
    assert fakes[0].keys == {"Bearer secret"}


def test_a_released_session_is_aborted_on_the_server(fakes, make_engine):
    engine = make_engine(fakes[0])
    engine.begin(Sampling(temperature=1.0), STOP)
    fakes[0].script[GENERATE] = [HANG]
    engine.submit(asked()[0])
    while GENERATE not in fakes[0].calls:
        time.sleep(0.01)
    engine.release(0)
    assert "/inference/v1/abort_requests" in fakes[0].calls
    assert engine.step() == []


# -- scoring -------------------------------------------------------------------------------------------


@pytest.fixture
def scorer(fakes):
    server = Server(fakes[0].url, key=None, timeout=20.0, connections=8)
    yield VllmScorer([server], vocabulary=100, retries=1, restart_timeout=1.0)
    server.close()


def test_scores_come_back_in_order_at_their_rows(scorer):
    scores = scorer.score([[1, 2, 3], [4, 5], [6, 7, 8, 9]], [[0, 1], [], [2]])
    assert [s.logprobs for s in scores] == [[-1.0, -1.0], [], [-1.0]]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([None, {"2": {"logprob": -1.0, "rank": 1}}], "sent 2 positions for 3 ids"),
        (None, "sent no positions for 3 ids"),
        ([None, {"2": {"logprob": -1.0, "rank": 1}}, None], "came without log-probs"),
        ([None, {"9": {"logprob": -1.0, "rank": 1}}, {"3": {"logprob": -1.0, "rank": 1}}], "lacks 2"),
        ([None, {"2": {"logprob": -9999.0, "rank": 1}}, {"3": {"logprob": -1.0, "rank": 1}}], "is not one"),
        ([None, {"2": {"logprob": -1.0, "rank": None}}, {"3": {"logprob": -1.0, "rank": 1}}], "the rank None"),
        ([None, {"200": {"logprob": -1.0, "rank": 1}}, {"3": {"logprob": -1.0, "rank": 1}}], "'200', which is no id"),
    ],
)
def test_scores_that_are_not_whole_are_never_padded(fakes, scorer, said, message):
    fakes[0].script[GENERATE] = [lambda answer: {**answer, "prompt_logprobs": said}] * 2
    with pytest.raises(EngineError, match=rf"scoring failed 2 times, at last with .*{message}"):
        scorer.score([[1, 2, 3]], [[0, 1]])


def test_teachers_with_other_weights_are_not_mixed(fakes, scorer):
    scorer.score([[1, 2, 3]], [[0]])
    fakes[0].label = "another"
    with pytest.raises(EngineError, match=r"scored with the weights \{'another'\}, others with \{'default'\}"):
        scorer.score([[1, 2, 3]], [[0]])


def test_scores_are_asked_for_within_the_bound_and_come_back_in_order(fakes, scorer, monkeypatch):
    monkeypatch.setattr("opd.engines.scoring.SCORE_VALUES", 8)
    flying, most, lock = 0, 0, threading.Lock()

    def slow(answer):
        nonlocal flying, most
        with lock:
            flying += 1
            most = max(most, flying)
        time.sleep(0.05)
        with lock:
            flying -= 1
        return answer

    fakes[0].script[GENERATE] = [slow] * 6
    scores = scorer.score([[1, 2, 3, 4]] * 5 + [[1] * 20], [[n % 3] * n for n in range(6)])
    assert [len(s.logprobs) for s in scores] == [0, 1, 2, 3, 4, 5]
    assert most == 2


def test_what_a_server_tells_of_its_cache_is_reported_and_nonsense_is_not(fakes, scorer):
    details = [{"cached_tokens": 3}, {"cached_tokens": -1}, {"cached_tokens": "3"}, [], None]
    fakes[0].script[GENERATE] = [lambda a, d=d: {**a, "usage": {"prompt_tokens_details": d}} for d in details]
    scorer.score([[1] * 6] * 5, [[0]] * 5)
    assert scorer.metrics() == {"prefix_hits": 0.5}
    assert scorer.metrics() == {}


def test_a_row_without_an_id_after_it_is_refused(scorer):
    with pytest.raises(DataError, match=r"3 ids cannot be scored at rows \[2\]"):
        scorer.score([[1, 2, 3]], [[2]])
