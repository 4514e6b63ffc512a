"""The embedded engine on small random models, against a full forward pass of the same model.

Other architectures, and windows, are in `test_engine_architectures`. Not covered: a GPU, 16-bit weights, prompts longer
than one prefill.
"""

import math
import re
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from opd.engines.base import Request, Sampling, generate
from opd.engines.slots import GROW
from opd.engines.transformers import TransformersEngine
from opd.errors import ModelError, NumbersError
from opd.models.causal import CausalModel
from opd.types import StopReason

STOP = frozenset({0, 1, 2, 3, 4})
PLAIN = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model(vocab=64, seed=1)


@pytest.fixture
def engine(model):
    return TransformersEngine(model)


def ids(count, seed):
    return torch.randint(5, 64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(lengths, *, max_tokens=8, seed=0):
    return [
        Request(session=n, prompt_ids=ids(length, 100 * seed + n), seed=1000 * seed + n, max_tokens=max_tokens)
        for n, length in enumerate(lengths)
    ]


def run(engine, asked, *, sampling=PLAIN, stop=STOP):
    engine.begin(sampling, stop)
    return {done.session: done for done in generate(engine, asked)}


def next_turn(asked, done, *, added=3, seed=9):
    """Requests that continue every conversation with its completion and some new ids."""
    return [
        replace(r, prompt_ids=r.prompt_ids + done[r.session].token_ids + ids(added + r.session % 3, seed + r.session))
        for r in asked
    ]


def full_forward(model, prompt, completion, temperature=1.0):
    """The log-probs of a completion by one plain forward pass of its whole sequence."""
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
    rows = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return (logits[rows] / temperature).log_softmax(-1)[range(len(completion)), completion].tolist()


def assert_as_in_full(model, asked, done, temperature=1.0):
    for r in asked:
        expected = full_forward(model, r.prompt_ids, done[r.session].token_ids, temperature)
        assert done[r.session].logprobs == pytest.approx(expected, abs=1e-5)


# -- the log-probs are the model's ---------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_equal_a_full_forward_over_turns_of_unequal_length(model, engine, temperature):
    asked = requests([3, 40, 1, 17, 9])
    for _ in range(4):
        done = run(engine, asked, sampling=Sampling(temperature=temperature))
        assert_as_in_full(model, asked, done, temperature)
        asked = next_turn(asked, done)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logprobs_are_right_for_either_attention_and_for_learned_positions_that_end_early(attention):
    torch.manual_seed(0)
    # The longest row ends at position 63; a short row padded beside it must not ask for position 64.
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1)
    inner = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in inner.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.3)
    model = CausalModel(inner)
    engine = TransformersEngine(model)
    asked = requests([50, 5], max_tokens=4)
    done = run(engine, asked, stop=frozenset())
    assert_as_in_full(model, asked, done)
    asked = [
        replace(asked[0], prompt_ids=asked[0].prompt_ids + done[0].token_ids + ids(2, 1)),
        replace(asked[1], prompt_ids=asked[1].prompt_ids + done[1].token_ids + ids(30, 2)),
    ]
    assert_as_in_full(model, asked, run(engine, asked, stop=frozenset()))


def test_a_double_precision_model_is_served_too(make_model):
    model = make_model(vocab=64, dtype=torch.float64)
    asked = requests([3, 7])
    assert_as_in_full(model, asked, run(TransformersEngine(model), asked))


@pytest.mark.parametrize(
    "options", [{"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}]
)
def test_tied_heads_and_every_grouping_of_key_heads_are_served(make_model, options):
    model = make_model(vocab=64, **options)
    asked = requests([3, 7, 2])
    assert_as_in_full(model, asked, run(TransformersEngine(model), asked))


# -- the cache -----------------------------------------------------------------------------------------


@pytest.fixture
def fed(model, monkeypatch):
    """How many ids, padding included, each forward pass was fed."""
    counts = []
    original = CausalModel.hidden

    def counting(self, input_ids, **options):
        counts.append(input_ids.numel())
        return original(self, input_ids, **options)

    monkeypatch.setattr(CausalModel, "hidden", counting)
    return counts


def test_a_new_turn_feeds_only_what_was_added(engine, fed):
    asked = requests([50], max_tokens=4)
    done = run(engine, asked, stop=frozenset())
    assert fed == [50, 1, 1, 1]
    fed.clear()
    run(engine, next_turn(asked, done, added=6), stop=frozenset())
    assert fed == [7, 1, 1, 1]  # the last sampled id was not fed yet


def test_a_conversation_that_forks_keeps_only_the_common_prefix(model, engine, fed):
    [asked] = requests([50])
    run(engine, [asked])
    forked = replace(asked, prompt_ids=asked.prompt_ids[:30] + ids(15, 77))
    fed.clear()
    done = run(engine, [forked])
    assert fed[0] == 15
    assert_as_in_full(model, [forked], done)


def test_a_prompt_that_is_cached_whole_is_still_fed_its_last_id(model, engine, fed):
    [asked] = requests([20])
    first = run(engine, [asked])
    fed.clear()
    again = run(engine, [asked])
    assert fed[0] == 1
    assert again[0].token_ids == first[0].token_ids
    assert_as_in_full(model, [asked], again)


def test_a_shorter_prompt_after_a_longer_one_sees_nothing_of_it(model, engine):
    [asked] = requests([40])
    run(engine, [asked])
    shorter = replace(asked, prompt_ids=asked.prompt_ids[:10])
    assert_as_in_full(model, [shorter], run(engine, [shorter]))


def test_the_cache_grows_over_many_slots_and_columns_without_losing_a_conversation(model, engine):
    asked = requests([2 + n % 5 for n in range(GROW + 6)], max_tokens=3)
    done = run(engine, asked)
    for added in (3, 70, 80):
        asked = next_turn(asked, done, added=added)
        done = run(engine, asked)
    assert_as_in_full(model, asked[::9], done)


def test_a_released_slot_is_used_again_and_its_past_is_not_seen(model, engine):
    run(engine, requests([30, 30, 30]))
    for session in (1, 0, 2):
        engine.release(session)
    asked = [replace(r, session=r.session + 10) for r in requests([4, 9, 6], seed=3)]
    assert_as_in_full(model, asked, run(engine, asked))
    assert sorted(row.slot for row in engine._rows.values()) == [0, 1, 2]


def test_slots_are_shared_by_no_two_conversations(model, engine):
    run(engine, requests([5] * 6))
    for session in (4, 1, 2):
        engine.release(session)
    asked = [replace(r, session=r.session + 10) for r in requests([5] * 5, seed=2)]
    done = run(engine, asked)
    slots = [row.slot for row in engine._rows.values()]
    assert sorted(slots) == list(range(8))
    assert_as_in_full(model, asked, done)


def test_releasing_what_is_unknown_is_harmless(engine):
    engine.release(99)


def test_new_weights_drop_the_cache_and_count_a_version(make_model):
    model = make_model(vocab=64, seed=4)
    engine = TransformersEngine(model)
    asked = requests([12, 5])
    done = run(engine, asked)
    assert {d.policy_version for d in done.values()} == {0}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    engine.update_weights([], 1)
    asked = next_turn(asked, done)
    done = run(engine, asked)
    assert {d.policy_version for d in done.values()} == {1}
    assert_as_in_full(model, asked, done)


# -- seeds ---------------------------------------------------------------------------------------------


def test_the_same_request_gives_the_same_ids_whoever_shares_the_batch(model):
    alone = run(TransformersEngine(model), requests([11])[:1])
    together = run(TransformersEngine(model), requests([11, 3, 60, 24]))
    assert together[0].token_ids == alone[0].token_ids
    assert together[0].logprobs == pytest.approx(alone[0].logprobs, abs=1e-5)


def test_the_same_requests_in_the_same_order_give_the_same_logprobs_to_the_bit(model):
    asked = requests([11, 3, 60, 24, 24, 2])
    first, second = (run(TransformersEngine(model), asked) for _ in range(2))
    assert first == second


def test_another_seed_gives_other_ids(model):
    asked = requests([11] * 8)
    other = [replace(r, seed=r.seed + 1) for r in asked]
    ours, theirs = run(TransformersEngine(model), asked), run(TransformersEngine(model), other)
    assert sum(ours[n].token_ids != theirs[n].token_ids for n in range(8)) >= 6


def test_a_seed_of_63_bits_is_taken(engine):
    assert run(engine, [replace(requests([4])[0], seed=(1 << 63) - 1)])[0].token_ids


def test_cached_and_uncached_turns_draw_the_same_ids(model, engine):
    asked = requests([12, 30])
    later = next_turn(asked, run(engine, asked))
    warm, cold = run(engine, later), run(TransformersEngine(model), later)
    assert [warm[n].token_ids for n in (0, 1)] == [cold[n].token_ids for n in (0, 1)]


def test_greedy_takes_the_likeliest_id_at_every_step(model, engine):
    [asked] = requests([6], max_tokens=12)
    done = run(engine, [asked], sampling=Sampling(temperature=0.0), stop=frozenset())[0]
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([asked.prompt_ids + done.token_ids])).logits[0]
    assert done.token_ids == logits[5:-1].argmax(-1).tolist()


# -- how a completion ends -----------------------------------------------------------------------------


def test_a_stop_id_ends_the_completion_and_is_its_last_id(engine):
    done = run(engine, requests([5] * 12, max_tokens=30))
    stopped = [d for d in done.values() if d.stop_reason is StopReason.STOP]
    assert len(stopped) >= 6
    for d in stopped:
        assert d.token_ids[-1] in STOP
        assert not STOP & set(d.token_ids[:-1])


def test_the_limit_cuts_a_completion_and_says_so(engine):
    done = run(engine, requests([5, 9], max_tokens=7), stop=frozenset())
    assert [(len(d.token_ids), d.stop_reason) for d in done.values()] == [(7, StopReason.LENGTH)] * 2


def test_a_stop_id_in_the_last_place_is_a_stop_and_no_cut(engine):
    asked = requests([5] * 12, max_tokens=30)
    done = run(engine, asked)
    exact = [replace(r, max_tokens=len(done[r.session].token_ids)) for r in asked]
    again = run(TransformersEngine(engine.model), exact)
    reasons = [(d.token_ids, d.stop_reason) for d in done.values()]
    assert [(again[n].token_ids, again[n].stop_reason) for n in done] == reasons


def test_requests_may_come_in_while_others_are_sampled(model, engine):
    first, second = requests([20, 6], max_tokens=10)
    engine.begin(PLAIN, frozenset())
    engine.submit(first)
    done = [*engine.step(), *engine.step()]
    engine.submit(second)
    while len(done) < 2:
        done += engine.step()
    assert_as_in_full(model, [first, second], {d.session: d for d in done})


def test_a_prefill_stays_within_its_budget_of_padded_ids(model, fed):
    asked = requests([10, 30, 29, 5, 4, 31])
    done = run(TransformersEngine(model, prefill_tokens=64), asked)
    assert max(fed) <= 64
    assert_as_in_full(model, asked, done)
    fed.clear()
    run(TransformersEngine(model, prefill_tokens=8), asked)  # a prompt beyond the budget goes alone
    assert sorted(fed, reverse=True)[:6] == [31, 30, 29, 10, 5, 4]


# -- what is refused -----------------------------------------------------------------------------------


def test_a_second_request_of_a_session_waits_for_the_first(engine):
    engine.begin(PLAIN, STOP)
    [asked] = requests([5])
    engine.submit(asked)
    with pytest.raises(RuntimeError, match="session 0 already has a request in flight"):
        engine.submit(asked)


@pytest.mark.parametrize("call", ["begin", "update_weights", "sleep"])
def test_nothing_changes_under_a_request_in_flight(engine, call):
    engine.begin(PLAIN, STOP)
    engine.submit(requests([5])[0])
    with pytest.raises(RuntimeError, match=rf"{call}\(\) while requests are in flight"):
        getattr(engine, call)(*{"begin": (PLAIN, STOP), "update_weights": ([], 1), "sleep": ()}[call])


@pytest.mark.parametrize("change", [{"prompt_ids": []}, {"max_tokens": 0}])
def test_a_request_without_prompt_or_room_is_refused(engine, change):
    engine.begin(PLAIN, STOP)
    with pytest.raises(ValueError, match="needs a prompt and room"):
        engine.submit(replace(requests([5])[0], **change))


def test_an_unknown_attention_implementation_is_refused(make_model):
    model = make_model(vocab=64)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match=r"needs a model with sdpa or eager attention; this one uses flash"):
        TransformersEngine(model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_no_numbers_are_named_and_no_id_is_drawn_from_them(make_model, temperature):
    """Before, an index was out of bounds."""
    broken = make_model(vocab=64, seed=1)
    name, weight = list(broken.named_parameters())[4]
    with torch.no_grad():
        weight[0] = math.nan
    engine = TransformersEngine(broken)
    engine.update_weights(None, version=7)
    engine.begin(Sampling(temperature=temperature), frozenset())
    [one] = requests([3])
    engine.submit(one)
    with pytest.raises(
        NumbersError, match=rf"after step 7: {re.escape(name)} holds nan .* a lower train\.lr"
    ) as raised:
        engine.step()
    assert raised.value.exit_code == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_told_from_weights_that_are_none(engine, monkeypatch, value):
    logits = CausalModel.logits
    monkeypatch.setattr(CausalModel, "logits", lambda self, hidden: logits(self, hidden).fill_(value))
    engine.begin(PLAIN, frozenset())
    engine.submit(requests([3])[0])
    with pytest.raises(NumbersError, match=r"as it was loaded: all its weights are finite, so that float32 overflows"):
        engine.step()
