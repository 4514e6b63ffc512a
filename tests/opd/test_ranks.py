"""Ranks without processes: how work is dealt, and what one rank does by itself."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.errors import DataError
from opd.ranks import Ranks, started_ranks, without_launcher


@given(st.integers(0, 40), st.integers(1, 9))
def test_what_is_dealt_to_ranks_comes_back_in_one_order(count, world):
    items = list(range(count))
    shares = [Ranks(rank=rank, world_size=world).share(items) for rank in range(world)]
    assert all(abs(len(a) - len(b)) <= 1 for a in shares for b in shares)
    assert Ranks(world_size=world).deal(shares) == items


def test_one_rank_exchanges_with_itself():
    alone = Ranks()
    assert alone.first
    assert alone.sum([1.5, 2.0]) == [1.5, 2.0]
    assert alone.gather("x") == ["x"] == alone.to_first("x")
    assert (alone.most(3), alone.any(False), alone.from_first(lambda: 4)) == (3, False, 4)
    alone.wait()


def test_an_error_of_one_rank_alone_stays_what_it_is():
    def fail():
        raise DataError("broken")

    with pytest.raises(DataError, match="broken"):
        Ranks().agree(fail)
    with pytest.raises(ZeroDivisionError):
        Ranks().agree(lambda: 1 / 0)


def test_a_process_that_is_no_rank_is_told_of_none():
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert without_launcher(told | {"PATH": "/bin", "OPD_CACHE": "x"}) == {"PATH": "/bin", "OPD_CACHE": "x"}


def test_how_many_processes_there_are_is_the_launchers_word(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert started_ranks() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert started_ranks() == 4
