"""Prompts that vLLM reads in pieces: what is sampled after them, and with what draws.

On a CPU vLLM cannot turn a request's generator back, which it does after each piece but the last. Whoever runs alone
with room for all of it is never cut, and is what the others are compared with. Not covered: a GPU.
"""

import pytest
import torch

from opd.engines.base import Request, Sampling, generate
from opd.engines.scoring import VllmScorer
from opd.engines.vllm import VllmEngine, engine_args
from opd.engines.vllm_http import Server, sizes
from opd.engines.vllm_process import OwnServer
from opd.engines.vllm_replicas import Replica
from opd.engines.vllm_server import VllmServerEngine
from opd.engines.weights import ModelWeights
from opd.episodes.config import RolloutConfig

pytest.importorskip("vllm", reason="vLLM is not installed: make test installs its CPU build where there is no GPU")
pytestmark = pytest.mark.slow

SHAPE = {"tie_word_embeddings": True, "max_position_embeddings": 2048, "head_dim": 32}
BUDGET = 4096
"""Tokens in one pass of a CPU, as vLLM chooses by itself."""
MIXES = {
    "8 prompts of 600": [600] * 8,
    "64 prompts of 64": [64] * 64,
    "long ones before short ones": [1500] * 3 + [30] * 40,
    "short ones before long ones": [30] * 40 + [1500, 700, 1999] * 2,
    "one more than fits": [1366, 1366, 1365],
}
SAMPLINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_p=0.9),
    Sampling(temperature=1.0, top_k=8),
    Sampling(temperature=0.0),
]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(**SHAPE)


def started(model, *, cache=0.25, **arguments):
    config = RolloutConfig(max_length=2048, concurrency=64, vllm={"kv_cache_gib": cache, "engine_args": arguments})
    return VllmEngine(model, config.vllm, config.limits)


@pytest.fixture(scope="module")
def engine(model):
    """An engine as it is without settings: it cuts what is more than `BUDGET`."""
    engine = started(model)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def tight(model):
    """A budget of 64 tokens, and a cache for little more than one of the longest prompts."""
    engine = started(model, cache=0.0022, max_num_batched_tokens=64, enable_chunked_prefill=True)
    yield engine
    engine.close()


def ids(count, seed):
    return torch.randint(5, 200, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(lengths, *, max_tokens=12):
    return [
        Request(session=n, prompt_ids=ids(length, n), seed=2**40 + n, max_tokens=max_tokens)
        for n, length in enumerate(lengths)
    ]


def run(engine, asked, sampling=SAMPLINGS[0]):
    engine.begin(sampling, frozenset())
    return {done.session: done for done in generate(engine, asked)}


def alone(engine, asked, sampling=SAMPLINGS[0]):
    """Each by itself, in one piece."""
    return {key: done for one in asked for key, done in run(engine, [one], sampling).items()}


def fresh(engine, model):
    engine.update_weights(ModelWeights(model), 0)  # with an empty cache of prefixes
    return engine


@torch.no_grad()
def gap(model, asked, done):
    """Largest difference, in nats, between the engine's log-probs and those of one full forward pass."""
    worst = 0.0
    for r in asked:
        sampled = done[r.session].token_ids
        logits = model.model(input_ids=torch.tensor([r.prompt_ids + sampled])).logits[0, len(r.prompt_ids) - 1 : -1]
        own = logits.log_softmax(-1)[range(len(sampled)), sampled]
        worst = max(worst, float((own - torch.tensor(done[r.session].logprobs)).abs().max()))
    return worst


def same(one, other):
    assert {n: done.token_ids for n, done in one.items()} == {n: done.token_ids for n, done in other.items()}
    for n, done in one.items():
        assert done.logprobs == pytest.approx(other[n].logprobs, abs=1e-4)


@pytest.mark.parametrize("mix", MIXES)
def test_a_prompt_read_in_pieces_is_answered_as_one_read_at_once(engine, model, mix):
    asked = requests(MIXES[mix])
    done = run(fresh(engine, model), asked)
    assert gap(model, asked, done) < 1e-4
    same(done, alone(fresh(engine, model), asked))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_the_draws_are_those_of_the_seed_under_a_budget_of_64_set_by_hand(engine, tight, model, sampling):
    asked = requests([64, 65, 300, 5, 640, 1, 63, 129, 1500])
    in_pieces = run(fresh(tight, model), asked, sampling)
    same(in_pieces, alone(fresh(engine, model), asked, sampling))


def test_a_cached_beginning_and_a_piece_of_the_rest_change_no_draw(tight, engine, model):
    shared = ids(320, 77)
    asked = [Request(session=n, prompt_ids=shared + ids(100 + n, n), seed=n, max_tokens=12) for n in range(6)]
    run(fresh(tight, model), asked[:1])
    tight.metrics()
    done = run(tight, asked)
    assert tight.metrics()["prefix_hits"] > 0.3
    assert gap(model, asked, done) < 1e-4
    same(done, alone(fresh(engine, model), asked))


def test_who_is_put_back_in_the_queue_goes_on_with_the_next_draw(tight, engine, model, monkeypatch):
    scheduler = tight._core.llm.engine_core.engine_core.scheduler
    again, preempt = [], scheduler._preempt_request

    def counted(request, *args, **options):
        again.append(request.num_output_tokens)
        preempt(request, *args, **options)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    asked = requests([800, 600, 500, 100], max_tokens=200)
    done = run(fresh(tight, model), asked)
    assert max(again, default=0) > 0  # some had sampled already
    assert gap(model, asked, done) < 1e-4
    same(done, alone(fresh(engine, model), asked))


def test_a_request_that_enters_and_one_that_leaves_between_pieces_move_nobodys_draws(tight, engine, model):
    asked = requests([400, 90, 350, 200])
    fresh(tight, model).begin(SAMPLINGS[0], frozenset())
    done = {}
    for one in asked:
        tight.submit(one)
        done |= {found.session: found for found in tight.step()}
    tight.release(1)
    while len(done) < 3:
        done |= {found.session: found for found in tight.step()}
    del asked[1]
    same(done, alone(fresh(engine, model), asked))


def test_a_step_leaves_the_generator_of_the_process_as_it_was(tight, model):
    fresh(tight, model)
    before = torch.get_rng_state()
    run(tight, requests([5, 200]))
    assert torch.equal(torch.get_rng_state(), before)


def scored(scorer, model):
    """Scores of sequences longer and shorter than any budget, by what has `score`, against the model's own."""
    sequences = [ids(900, 1), ids(65, 2), ids(64, 3), ids(1999, 4), *(ids(600, n) for n in range(5, 13))]
    rows = [[0, 62, 63, 64, 898], [63], [], [1000, 1997], *([0, 598] for _ in range(5, 13))]
    scores = scorer.score(sequences, rows, top_k=4)
    for sequence, own, score in zip(sequences, rows, scores, strict=True):
        with torch.no_grad():
            logprobs = model.model(input_ids=torch.tensor([sequence])).logits[0].log_softmax(-1)
        assert score.logprobs == pytest.approx([float(logprobs[r, sequence[r + 1]]) for r in own], abs=1e-4)
        assert score.top_ids == logprobs[own].topk(4).indices.tolist()


def test_scores_of_a_sequence_that_is_read_in_pieces_are_the_models(engine, tight, model):
    scored(fresh(engine, model), model)
    scored(fresh(tight, model), model)


# -- servers -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[{}, {"max_num_batched_tokens": 64}], ids=["its own budget", "64 tokens"])
def server(request, model, tmp_path_factory):
    """A server as a run starts it, and as `opd serve` starts it: they are told the same."""
    folder = tmp_path_factory.mktemp("served")
    model.config.save_pretrained(folder)
    config = RolloutConfig(max_length=2048, concurrency=64, vllm={"kv_cache_gib": 0.25, "engine_args": request.param})
    own = OwnServer(str(folder), engine_args(model, config.vllm, config.limits), key="k", log=folder / "vllm.log")
    own.start()
    client = Server(own.url, key="k", timeout=120.0, connections=65)
    settings = RolloutConfig(vllm={"restart_timeout": 900.0, "retries": 0}).vllm
    replica = Replica(server=client, last_words=own.last_words)
    engine = VllmServerEngine([replica], settings, model=sizes(model.config), concurrency=64, on_close=own.stop)
    engine.update_weights(ModelWeights(model), 0)
    yield engine, client
    engine.close()


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mix", MIXES)
def test_a_server_answers_a_prompt_read_in_pieces_as_one_read_at_once(server, engine, model, mix):
    asked = requests(MIXES[mix])
    done = run(server[0], asked)
    assert gap(model, asked, done) < 1e-4
    assert server[0].metrics().keys() == {"prefix_hits"}  # and no fault
    same(done, alone(fresh(engine, model), asked))


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_a_server_scores_what_it_reads_in_pieces(server, model):
    scored(VllmScorer([server[1]], vocabulary=model.vocabulary, retries=0, restart_timeout=10.0), model)
