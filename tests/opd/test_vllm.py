"""vLLM in this process, the real CPU build, on a small random model with a tied head (and on SmolLM2, slow).

One engine serves all tests of the file; each test gives it the weights it means. Not covered: a GPU, and so sleeping,
CUDA graphs and tensor parallelism; 16-bit weights.
"""

import os
import random
import time
from contextlib import closing
from dataclasses import replace

import pytest
import torch

from opd.engines.base import Request, Sampling, generate
from opd.engines.config import Limits, VllmConfig
from opd.engines.scoring import check_offered
from opd.engines.transformers import truncate
from opd.engines.vllm import VllmEngine, completion
from opd.engines.weights import ModelWeights
from opd.episodes.tasks import task
from opd.errors import ConfigError, EngineError, ModelError, NumbersError
from opd.losses import Correction, Losses, Policy, Sampler
from opd.models.config import ModelConfig
from opd.models.loading import load
from opd.objective.collate import collate
from opd.objective.objective import objective
from opd.types import StopReason, to_sample

pytest.importorskip("vllm", reason="vLLM is not installed: make test installs its CPU build where there is no GPU")
pytestmark = pytest.mark.slow

STOP = frozenset({0, 1, 2, 3, 4})
PLAIN = Sampling(temperature=1.0)


SHAPE = {"tie_word_embeddings": True, "max_position_embeddings": 512, "head_dim": 32}  # vLLM knows no smaller heads


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(stops=True, **SHAPE)


def process_state():
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTEST_"))}
    return random.getstate(), torch.get_num_threads(), torch.set_num_threads, variables


@pytest.fixture(scope="module")
def started(model):
    before = torch.get_rng_state(), *process_state()
    engine = VllmEngine(model, VllmConfig(kv_cache_gib=0.25), Limits(512, 64))
    after = torch.get_rng_state(), *process_state()
    yield engine, before, after
    engine.close()


@pytest.fixture
def engine(started, model):
    """The engine with the weights of `model`, as version 0."""
    started[0].update_weights(ModelWeights(model), 0)
    return started[0]


def ids(count, seed):
    return torch.randint(5, 200, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(lengths, *, max_tokens=8, seed=0):
    return [
        Request(session=n, prompt_ids=ids(length, 100 * seed + n), seed=2**62 + 1000 * seed + n, max_tokens=max_tokens)
        for n, length in enumerate(lengths)
    ]


def run(engine, asked, *, sampling=PLAIN, stop=STOP):
    engine.begin(sampling, stop)
    return {done.session: done for done in generate(engine, asked)}


@torch.no_grad()
def gap(model, asked, done, sampling=PLAIN):
    """Largest difference, in nats, between the engine's log-probs and those of one full forward pass."""
    worst = 0.0
    for r in asked:
        sampled = done[r.session].token_ids
        logits = model.model(input_ids=torch.tensor([r.prompt_ids + sampled])).logits[0]
        logits = logits[len(r.prompt_ids) - 1 : -1] / (sampling.temperature or 1)
        logits = truncate(logits, top_p=sampling.top_p, top_k=sampling.top_k)
        own = logits.log_softmax(-1)[range(len(sampled)), sampled]
        worst = max(worst, float((own - torch.tensor(done[r.session].logprobs)).abs().max()))
    return worst


def changed(make_model, seed=7):
    return make_model(seed=seed, **SHAPE)


# -- sampling ------------------------------------------------------------------------------------------


def test_starting_vllm_leaves_generators_threads_and_variables_as_they_were(started):
    _, before, after = started
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_the_same_seed_gives_the_same_ids_and_another_seed_others(engine):
    asked = requests([12, 5, 30, 7], max_tokens=12)
    first, again = run(engine, asked, stop=frozenset()), run(engine, asked, stop=frozenset())
    other = run(engine, requests([12, 5, 30, 7], max_tokens=12, seed=1), stop=frozenset())
    assert [first[n].token_ids for n in range(4)] == [again[n].token_ids for n in range(4)]
    assert [first[n].token_ids for n in range(4)] != [other[n].token_ids for n in range(4)]


@pytest.mark.parametrize(
    "sampling",
    [
        PLAIN,
        Sampling(temperature=0.6),
        Sampling(temperature=1.7),
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, top_k=5),
        Sampling(temperature=0.8, top_p=0.7),
    ],
    ids=str,
)
def test_log_probs_are_those_of_the_distribution_that_was_drawn_from(engine, model, sampling):
    asked = requests([12, 5, 30, 7, 64], max_tokens=12)
    done = run(engine, asked, sampling=sampling)
    assert gap(model, asked, done, sampling) < 1e-4
    if sampling.temperature not in (0.0, 1.0):
        assert gap(model, asked, done) > 1e-3


def test_a_stop_id_ends_a_completion_and_is_its_last_id(engine):
    done = run(engine, requests([9] * 32, max_tokens=6))
    stopped = [d for d in done.values() if d.stop_reason is StopReason.STOP]
    assert 0 < len(stopped) < 32
    assert all(d.token_ids[-1] in STOP for d in stopped)
    cut = [d for d in done.values() if d.stop_reason is StopReason.LENGTH]
    assert all(len(d.token_ids) == 6 and not STOP & set(d.token_ids) for d in cut)


def test_no_id_ends_a_completion_that_is_not_a_stop_id(engine):
    done = run(engine, requests([9] * 16, max_tokens=40), stop=frozenset())
    assert all(len(d.token_ids) == 40 for d in done.values())


def test_a_new_request_enters_the_batch_that_runs(engine):
    engine.begin(PLAIN, frozenset())
    long, short = requests([9, 9], max_tokens=60)[0], requests([9, 9], max_tokens=4)[1]
    engine.submit(long)
    for _ in range(10):
        assert engine.step() == []
    engine.submit(short)
    order = []
    while len(order) < 2:
        order += [done.session for done in engine.step()]
    assert order == [short.session, long.session]


def test_a_released_session_is_aborted_and_can_ask_again(engine):
    engine.begin(PLAIN, frozenset())
    [asked] = requests([9], max_tokens=60)
    engine.submit(asked)
    engine.step()
    engine.release(0)
    assert engine.step() == []
    assert len(run(engine, [asked], stop=frozenset())[0].token_ids) == 60


def test_prefixes_are_cached_within_a_group_and_across_turns(engine):
    first = [Request(session=n, prompt_ids=ids(96, 1), seed=n, max_tokens=8) for n in range(4)]
    engine.metrics()
    done = run(engine, first[:1], stop=frozenset()) | run(engine, first[1:], stop=frozenset())
    assert engine.metrics()["prefix_hits"] >= 3 * 64 / (4 * 96)
    second = [
        Request(session=n, prompt_ids=ids(96, 1) + done[n].token_ids + ids(8, n), seed=n, max_tokens=4)
        for n in range(4)
    ]
    run(engine, second)
    assert engine.metrics()["prefix_hits"] >= 96 / 112
    assert engine.metrics() == {}


# -- weights -------------------------------------------------------------------------------------------


def test_after_an_update_the_new_weights_sample_and_no_old_prefix_is_used(engine, model, make_model):
    asked = requests([64, 40, 12], max_tokens=12)
    old = run(engine, asked)
    new = changed(make_model)
    assert gap(new, asked, old) > 0.1
    engine.metrics()
    engine.update_weights(ModelWeights(new), 5)
    done = run(engine, asked)
    assert gap(new, asked, done) < 1e-4
    assert engine.metrics()["prefix_hits"] == 0
    assert {d.policy_version for d in old.values()} == {0}
    assert {d.policy_version for d in done.values()} == {5}


def test_adapters_are_served_merged_and_twice_is_no_drift(engine, make_model):
    adapted = make_model(stops=True, lora=True, **SHAPE)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    asked = requests([30, 12], max_tokens=12)
    logprobs = []
    for version in (1, 2, 3):
        engine.update_weights(ModelWeights(adapted), version)
        done = run(engine, asked)
        assert gap(adapted, asked, done) < 1e-4
        logprobs.append(done[0].logprobs)
    assert logprobs[0] == logprobs[1] == logprobs[2]


class _Broken:
    collective = False

    def __init__(self, weights):
        self.weights = weights

    def __iter__(self):
        for number, pair in enumerate(self.weights):
            if number == 5:
                raise OSError("lost in the middle")
            yield pair


def test_an_update_that_breaks_off_forbids_sampling_until_a_whole_one(engine, model, make_model):
    with pytest.raises(OSError, match="lost in the middle"):
        engine.update_weights(_Broken(ModelWeights(changed(make_model))), 1)
    with pytest.raises(RuntimeError, match="before the engine was given weights"):
        engine.begin(PLAIN, STOP)
    engine.update_weights(ModelWeights(model), 2)
    asked = requests([30, 12])
    assert gap(model, asked, run(engine, asked)) < 1e-4


def test_weights_that_never_come_are_named(engine, model):
    class Some:
        collective = False

        def __iter__(self):
            return iter([pair for pair in ModelWeights(model) if "layers.1.mlp.down_proj" not in pair[0]])

    with pytest.raises(ModelError, match=r"2 weights of the model were not sent, such as \['model.layers.1.mlp.down"):
        engine.update_weights(Some(), 1)


@pytest.mark.parametrize("call", ["begin", "update_weights", "sleep", "score"])
def test_nothing_changes_under_a_request_in_flight(engine, call):
    arguments = {"begin": (PLAIN, STOP), "update_weights": ([], 1), "sleep": (), "score": ([], [])}[call]
    engine.begin(PLAIN, STOP)
    engine.submit(requests([5])[0])
    with pytest.raises(RuntimeError, match=rf"{call}\(\) while requests are in flight"):
        getattr(engine, call)(*arguments)
    engine.release(0)


# -- episodes and training -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def play_on(make_scheduler, scripted_env, turns_then_end):
    """`play_on(engine, tasks, sampling)`: episodes of 3 turns, two of each task, none waiting for another.

    `pause(seed, turn)` says how many seconds an environment takes for its answer.
    """

    def run(engine, tasks, sampling=PLAIN, *, pause=lambda seed, turn: 0.0):
        def play(env, action):
            time.sleep(pause(env.seed, env.turn))
            return turns_then_end(3)(env, action)

        scheduler = make_scheduler(
            lambda: scripted_env(play), engine=engine, deterministic=False, concurrency=64, workers=64, max_tokens=8
        )
        with closing(scheduler):
            groups = scheduler.run(
                [task(n, split="train") for n in range(tasks)], group_size=2, sampling=sampling, seed=3
            )
        return [trajectory for group in groups for trajectory in group.trajectories]

    return run


@torch.no_grad()
def rescored(model, sample, temperature=1.0):
    """The sample with log-probs from one full forward pass of the trainer."""
    logits = model.model(input_ids=torch.tensor([sample.token_ids])).logits[0]
    logprobs = (logits / temperature).log_softmax(-1)
    own = [float(logprobs[row, sample.token_ids[row + 1]]) for row in sample.rows]
    return replace(sample, sampler_logprobs=sample.spread(own))


def sample_of(trajectory, **weights):
    [segment] = trajectory.segments()
    return to_sample(trajectory, segment, **weights)


def test_two_hundred_episodes_of_several_turns_are_whole(started, model, play_on):
    engine = started[0]
    engine.update_weights(ModelWeights(model), 7)
    engine.metrics()
    episodes = play_on(engine, 100)
    assert len(episodes) == 200
    assert engine.metrics()["prefix_hits"] > 0.3
    for trajectory in episodes:
        assert trajectory.terminated
        assert trajectory.failed is None
        assert len(trajectory.turns) == 3
        assert trajectory.policy_version == 7
        sample = sample_of(trajectory)
        assert sample.token_ids == [i for turn in trajectory.turns for i in turn.prompt_ids + turn.completion_ids]
        assert sample.sampler_logprobs == pytest.approx(rescored(model, sample).sampler_logprobs, abs=1e-4, nan_ok=True)


def test_the_same_seed_gives_the_same_episodes_whoever_else_is_in_flight(engine, model, play_on):
    engine.metrics()
    first = play_on(engine, 16, pause=lambda seed, turn: 0.01 * ((seed + turn) % 5))
    assert engine.metrics()["prefix_hits"] > 0.2
    engine.update_weights(ModelWeights(model), 1)  # an empty cache once more
    again = play_on(engine, 16, pause=lambda seed, turn: 0.01 * ((seed // 7 + 2 * turn) % 5))
    for one, other in zip(first, again, strict=True):
        assert [turn.completion_ids for turn in one.turns] == [turn.completion_ids for turn in other.turns]
        for turn, repeated in zip(one.turns, other.turns, strict=True):
            assert turn.logprobs == pytest.approx(repeated.logprobs, abs=1e-5)
    assert len({tuple(one.turns[0].completion_ids) for one in first}) > 16  # members of a group draw for themselves


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_loss_and_gradients_are_the_same_with_the_engines_log_probs_and_with_the_trainers(
    engine, model, play_on, temperature
):
    sampler = Sampler(temperature=temperature, correction=Correction(mode="truncate", high=2.0))

    def loss_and_gradients(samples):
        batch = collate(samples, 0)
        batch = replace(batch, policy_weight=batch.policy_weight / len(batch.policy_weight))
        model.model.zero_grad()
        result = objective(model, batch, Losses(policy=Policy()), None, sampler)
        result.loss.backward()
        return float(result.loss.detach()), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    episodes = play_on(engine, 12, Sampling(temperature=temperature))
    samples = [sample_of(t, policy=1.0, advantage=(-1.0) ** n) for n, t in enumerate(episodes)]
    loss, gradients = loss_and_gradients(samples)
    own_loss, own_gradients = loss_and_gradients([rescored(model, s, temperature) for s in samples])
    assert loss == pytest.approx(own_loss, abs=1e-5)
    assert max(float(g.abs().max()) for g in gradients) > 1e-3
    for ours, theirs in zip(gradients, own_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    other_loss, _ = loss_and_gradients([rescored(model, s, 2 * temperature) for s in samples])
    assert abs(other_loss - loss) > 1e-3  # at another temperature the correction would be another


# -- scoring -------------------------------------------------------------------------------------------


def test_scores_are_the_models_log_probs_at_temperature_1(engine, model):
    sequences = [ids(40, 1), ids(7, 2), ids(25, 3)]
    rows = [[0, 5, 38], [3], []]
    engine.begin(Sampling(temperature=0.3), STOP)  # a sampling temperature changes nothing
    scores = engine.score(sequences, rows, top_k=4)
    for sequence, own, score in zip(sequences, rows, scores, strict=True):
        with torch.no_grad():
            logprobs = model.model(input_ids=torch.tensor([sequence])).logits[0].log_softmax(-1)
        top = logprobs[own].topk(4)
        assert score.logprobs == pytest.approx([float(logprobs[r, sequence[r + 1]]) for r in own], abs=1e-4)
        assert score.top_ids == top.indices.tolist()
        for ours, theirs in zip(score.top_logprobs, top.values.tolist(), strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert engine.score(sequences, rows)[0].top_ids == [[], [], []]
    assert engine.metrics()["score_prefix_hits"] == 0.0  # the second time as well


def test_scores_that_do_not_fit_at_once_are_asked_for_one_after_the_other(engine, monkeypatch):
    sequences, rows = [ids(20, n) for n in range(5)], [[3], [18], [0, 7], [], [4]]
    expected = engine.score(sequences, rows, top_k=2)
    monkeypatch.setattr("opd.engines.scoring.SCORE_VALUES", 130)
    unfinished, most = engine._core.llm.get_num_unfinished_requests, 0
    add = engine._core.llm.add_request

    def counted(*arguments):
        nonlocal most
        add(*arguments)
        most = max(most, unfinished())

    monkeypatch.setattr(engine._core.llm, "add_request", counted)
    assert engine.score(sequences, rows, top_k=2) == expected
    assert most == 2


def test_what_vllm_cannot_score_is_refused_by_name():
    check_offered("top_k", temperature=1.0)
    with pytest.raises(ConfigError, match=r"cannot answer 'hidden'. It answers: sampled, top_k"):
        check_offered("hidden", temperature=1.0)
    with pytest.raises(ConfigError, match=r"at temperature 1, not 0.7"):
        check_offered("sampled", temperature=0.7)


# -- payloads and settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (([], [], "stop"), "it has 0 tokens, where 1 to 4"),
        (([9] * 5, [-1.0] * 5, "length"), "it has 5 tokens, where 1 to 4"),
        (([9] * 4, [-1.0] * 3, "length"), "it has 4 tokens but 3 log-probs"),
        (([9] * 4, [-1.0, -1.0, float("-inf"), -1.0], "length"), "a log-prob is -inf"),
        (([9] * 4, [-1.0, -1.0, 0.5, -1.0], "length"), "a log-prob is 0.5"),
        (([9, 3, 9, 9], [-1.0] * 4, "length"), "it goes on after a stop token"),
        (([9, 9], [-1.0] * 2, "stop"), "it ends after 2 of 4 tokens without a stop token"),
        (([9, 3], [-1.0] * 2, "abort"), "it ended by 'abort'"),
        (([9, 3], [-1.0] * 2, None), "it ended by None"),
    ],
)
def test_a_completion_that_is_not_whole_is_refused(given, problem):
    [asked] = requests([5], max_tokens=4)
    with pytest.raises(EngineError, match=problem):
        completion(asked, *given, STOP, 0)


def test_log_probs_that_are_no_numbers_are_the_weights_fault_and_told_as_that():
    [asked] = requests([5], max_tokens=4)
    with pytest.raises(NumbersError, match=r"nan with the weights after step 3: .* A lower train\.lr"):
        completion(asked, [9] * 4, [-1.0, -1.0, float("nan"), -1.0], "length", STOP, 3)


def test_settings_that_vllm_refuses_are_reported_as_settings(model):
    with pytest.raises(ModelError, match=r"does not start with these settings of rollout.vllm: .*"):
        VllmEngine(model, VllmConfig(kv_cache_gib=0.25), Limits(4096, 64))


@pytest.mark.long
def test_log_probs_of_a_real_model_agree_with_transformers():
    loaded = load(ModelConfig(name="smollm2", dtype="float32"))
    engine = VllmEngine(loaded.model, VllmConfig(kv_cache_gib=0.25), Limits(256, 8))
    try:
        engine.update_weights(ModelWeights(loaded.model), 0)
        asked = []
        for number, text in enumerate(["What is 12 + 30?", "Why is the sky blue?", "Name three colours."]):
            message = [{"role": "user", "content": text}]
            prompt = loaded.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            asked.append(Request(session=number, prompt_ids=prompt, seed=number, max_tokens=16))
        assert gap(loaded.model, asked, run(engine, asked, stop=frozenset())) < 1e-4
    finally:
        engine.close()
