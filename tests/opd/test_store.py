"""A store of scores: what goes in comes out, by the same scorer alone, and damage is found. No model here."""

import errno
import json
import os
from dataclasses import replace

import numpy as np
import pytest

from opd import disk
from opd.errors import DataError
from opd.teachers.store import Scorer, Store, StoredScores, Tokens, count, open_store, verify

SCORER = Scorer(teacher="t", tokenizer="k", template="c", temperature=0.8, top_k=2)
ABOUT = {"name": "a teacher", "student": "s", "sft_teacher": None}


def sequence(number, turns=2):
    """Two prompt ids, then three sampled ones, for each turn."""
    return Tokens((number, 5, 6, 7, 8) * turns, (0, 0, 1, 1, 1) * turns)


def scores(tokens, top_k=2):
    """Scores that tell whose they are."""
    count = sum(tokens.mask)
    values = [round(-tokens.token_ids[0] - n / 8, 3) for n in range(count)]
    ids = [[n + k for k in range(top_k)] for n in range(count)]
    return StoredScores(values, [0.5] * count, ids, [[value - k for k in range(top_k)] for value in values])


def entries(*numbers, **options):
    return [(sequence(n, **options), scores(sequence(n, **options))) for n in numbers]


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", SCORER, about=ABOUT)


def test_what_was_stored_comes_back_sequence_by_sequence_also_from_a_store_that_is_opened_again(store):
    store.append(entries(1, 2))
    store.append(entries(3, turns=1))
    for again in (store, open_store(store.folder), Store(store.folder, SCORER, about={})):
        assert (len(again), again.positions, again.about) == (3, 15, ABOUT)
        for tokens, expected in entries(1, 2) + entries(3, turns=1):
            assert tokens in again
            assert again.get(tokens) == StoredScores(*(list(values) for values in expected))
        assert [tuple(map(tuple, tokens)) for tokens in again.sequences()] == [
            tuple(sequence(1)),
            tuple(sequence(2)),
            tuple(sequence(3, turns=1)),
        ]
    assert store.bytes == sum(path.stat().st_size for path in store.folder.iterdir())


def test_the_same_ids_with_another_mask_are_another_sequence(store):
    store.append(entries(1))
    ids, mask = sequence(1)
    assert Tokens(ids, (*mask[:-1], 0)) not in store
    with pytest.raises(DataError, match="holds no scores of a sequence of 10 tokens; score it first"):
        store.get(Tokens(ids, (*mask[:-1], 0)))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("teacher", "u", "another teacher ('t' there, 'u' here)"),
        ("tokenizer", "l", "another tokenizer ('k' there, 'l' here)"),
        ("template", "d", "another template ('c' there, 'd' here)"),
        ("temperature", 1.0, "another temperature (0.8 there, 1.0 here)"),
        ("top_k", 0, "another top_k (2 there, 0 here)"),
    ],
)
def test_a_store_of_another_scorer_is_refused_by_all_that_differs(store, name, value, message):
    store.append(entries(1))
    with pytest.raises(DataError) as error:
        Store(store.folder, replace(SCORER, **{name: value}), about=ABOUT)
    assert message in str(error.value)
    with pytest.raises(DataError, match=r"another template .* and another temperature"):
        Store(store.folder, replace(SCORER, template="d", temperature=2.0), about=ABOUT)


def test_a_flipped_byte_anywhere_in_a_shard_is_found(store):
    store.append(entries(1, 2, 3))
    [shard] = store.folder.glob("shard-*")
    whole = shard.read_bytes()
    assert verify(store.folder) == []
    for place in [*range(16), *range(16, len(whole), 37), len(whole) - 1]:
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert [str(shard) in problem for problem in verify(store.folder)] == [True], place
        with pytest.raises(DataError, match="is damaged"):
            open_store(store.folder)
    shard.write_bytes(whole[:-1])
    with pytest.raises(DataError, match="is damaged"):
        open_store(store.folder)


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_shard_that_is_gone_is_found_also_the_last_and_its_place_is_taken_by_the_next(store, gone):
    for number in range(3):
        store.append(entries(number))
    assert count(store.folder) == len(store)
    next(store.folder.glob(f"shard-00000{gone}-*")).unlink()
    assert verify(store.folder) == [
        f"{store.folder}: shard {gone} is missing; what it held is scored anew when the run goes on"
    ]
    again = open_store(store.folder)
    assert count(store.folder) == len(again) < len(store)
    again.append(entries(gone))
    assert verify(store.folder) == []
    assert len(open_store(store.folder)) == len(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-5], "is damaged"),
        (lambda text: "[]", "is damaged"),
        (lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "teacher"}), "is damaged"),
        (lambda text: json.dumps(json.loads(text) | {"temperature": "hot"}), "is damaged"),
        (lambda text: json.dumps(json.loads(text) | {"shards": None}), "is damaged"),
    ],
)
def test_a_damaged_header_is_found(store, change, message):
    path = store.folder / "store.json"
    path.write_text(change(path.read_text()))
    assert len(verify(store.folder)) == 1
    with pytest.raises(DataError, match=message):
        open_store(store.folder)
    with pytest.raises(DataError, match="is no store"):
        open_store(store.folder / "nowhere")


def test_a_shard_that_was_not_finished_is_no_part_of_the_store_and_its_place_is_taken_again(store):
    store.append(entries(1))
    (store.folder / ".shard-000001-0123456789abcdef.safetensors.partial").write_bytes(b"half of it")
    again = open_store(store.folder)
    assert len(again) == 1
    again.append(entries(2))
    assert len(open_store(store.folder)) == 2
    assert verify(store.folder) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_is_an_error_that_loses_nothing(store, monkeypatch, code):
    store.append(entries(1))
    before = {path.name: path.read_bytes() for path in store.folder.iterdir()}

    def full(handle):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(disk.os, "fsync", full)
        with pytest.raises(DataError, match=rf"{os.strerror(code)}. The 1 sequences that were scored before are kept"):
            store.append(entries(2))
    assert {path.name: path.read_bytes() for path in store.folder.iterdir()} == before
    store.append(entries(2))
    assert len(open_store(store.folder)) == 2


def test_no_sequence_is_stored_twice(store):
    store.append(entries(1))
    for twice in (entries(1), entries(2, 2)):
        with pytest.raises(DataError, match="none that the store holds already"):
            store.append(twice)
    assert (len(store), len(list(store.folder.glob("shard-*")))) == (1, 1)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda s: s._replace(logprobs=s.logprobs[:-1]),
        lambda s: s._replace(entropy=[*s.entropy, 1.0]),
        lambda s: s._replace(top_ids=[row[:1] for row in s.top_ids]),
    ],
)
def test_scores_that_do_not_fit_their_sequence_are_refused(store, wrong):
    with pytest.raises(DataError, match="a sequence with 6 sampled tokens has scores of"):
        store.append([(sequence(1), wrong(scores(sequence(1))))])
    assert len(store) == 0


def test_a_store_of_sampled_ids_alone_holds_no_top_k_and_is_small(tmp_path):
    store = Store(tmp_path, replace(SCORER, top_k=0), about=ABOUT)
    long = Tokens(tuple(range(4000)), (0,) + (1,) * 3999)
    store.append([(long, StoredScores([-1.0] * 3999, [0.5] * 3999, [[]] * 3999, [[]] * 3999))])
    assert store.get(long).top_ids == [[]] * 3999
    assert store.bytes < 14 * 4000  # an id, a mask, a log-prob and an entropy
    assert np.float32(-1.0) == store.get(long).logprobs[0]
