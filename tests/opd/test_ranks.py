"""Ranks without processes: how work is dealt, and what one rank does by itself."""

import logging
import os
import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from opd.errors import ConfigError, DataError
from opd.ranks import extensions
from opd.ranks.deepspeed_log import quieten_deepspeed
from opd.ranks.join import _meet
from opd.ranks.launcher import NEEDED, call_roll
from opd.ranks.ranks import Ranks, local_device, started_ranks, without_launcher


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


def test_deepspeeds_warnings_stay_off_the_console_and_its_errors_do_not(monkeypatch):
    monkeypatch.delenv("DS_LOG_LEVEL", raising=False)
    log, said = logging.getLogger("DeepSpeed"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    log.addHandler(handler)
    filters = [*log.filters]
    try:
        log.filters.clear()
        log.warning("found")
        quieten_deepspeed()
        log.warning("Setting accelerator to CPU")
        log.error("broken")
    finally:
        log.removeHandler(handler)
        log.filters[:] = filters
    assert said == ["found", "broken"]


def test_a_process_that_is_no_rank_is_told_of_none():
    told = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert without_launcher(told | {"PATH": "/bin", "OPD_CACHE": "x"}) == {"PATH": "/bin", "OPD_CACHE": "x"}


def test_how_many_processes_there_are_is_the_launchers_word(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert started_ranks() == 1
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert started_ranks() == 4


# -- which GPU -----------------------------------------------------------------------------------------

PLACES = [
    # GPUs that the process sees, the current one, LOCAL_RANK, and its own.
    (8, 0, "3", 3),  # torchrun and deepspeed: all of the machine's
    (8, 0, "0", 0),
    (1, 0, "3", 0),  # srun --gpus-per-task=1: its own alone
    (1, 0, "0", 0),
    (8, 5, None, 5),  # no launcher: where the process works already
    (8, 5, "", 5),
    (0, 0, "3", 3),  # no GPU: a number, and nothing else
    (0, 0, None, 0),
]


def machine(monkeypatch, gpus, current=0, told=None):
    """A machine with so many GPUs; the list of those that were made the current one."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in NEEDED:
        monkeypatch.setenv(name, "")  # so that it is put back, whatever is written there
        monkeypatch.delenv(name)
    if told is not None:
        monkeypatch.setenv("LOCAL_RANK", told)
    return chosen


@pytest.mark.parametrize(("gpus", "current", "told", "own"), PLACES)
def test_a_rank_is_on_the_gpu_of_its_local_rank_or_on_the_only_one_that_it_sees(monkeypatch, gpus, current, told, own):
    machine(monkeypatch, gpus, current, told)
    assert local_device() == own


@pytest.mark.parametrize("told", ["2", "7"])
def test_a_local_rank_beyond_the_gpus_that_are_seen_is_refused_with_both_numbers(monkeypatch, told):
    machine(monkeypatch, 2, told=told)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(ConfigError, match=rf"LOCAL_RANK = {told}, but this process sees 2 GPUs .*= 4,5\)\. Start at"):
        local_device()


@pytest.mark.parametrize("told", ["-1", "x", "1.0"])
def test_a_local_rank_that_is_no_number_is_refused(monkeypatch, told):
    machine(monkeypatch, 8, told=told)
    with pytest.raises(ConfigError, match=rf"LOCAL_RANK = '{told}' is no number of a rank"):
        local_device()


def met(monkeypatch):
    """Come as far as torch's default group; whether this process was the first of its machine."""
    deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    told = []

    def far(**_):
        raise EOFError("far enough")

    monkeypatch.setattr(extensions, "prepare", lambda *, first: told.append(first))
    monkeypatch.setattr(deepspeed, "init_distributed", far)
    monkeypatch.setattr("opd.ranks.join.call_roll", lambda: None)
    with pytest.raises(EOFError, match="far enough"):
        _meet()
    return told == [True]


@pytest.mark.parametrize(("gpus", "told", "own", "first"), [(8, "3", 3, False), (1, "3", 0, False), (1, "0", 0, True)])
def test_deepspeed_is_told_the_gpu_that_the_rank_is_on(monkeypatch, gpus, told, own, first):
    chosen = machine(monkeypatch, gpus, told=told)
    for name, value in zip(NEEDED, ("11", "12", told, "127.0.0.1", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    assert met(monkeypatch) is first
    assert chosen == [own]
    assert os.environ["LOCAL_RANK"] == str(own)


def test_a_process_without_a_launcher_stays_on_its_current_gpu(monkeypatch):
    chosen = machine(monkeypatch, 4, current=2)
    assert met(monkeypatch)
    assert chosen == [2]
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "2"]


WHOLE = dict(zip(NEEDED, ("0", "2", "0", "127.0.0.1", "29500"), strict=True))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"LOCAL_RANK": ""}, r"but no LOCAL_RANK: .* for one process\. Under srun: LOCAL_RANK=\$SLURM_LOCALID"),
        (
            {"LOCAL_RANK": "", "MASTER_ADDR": "", "MASTER_PORT": ""},
            r"^RANK = 0, WORLD_SIZE = 2, but no LOCAL_RANK, MASTER_ADDR, MASTER_PORT: a launcher sets all of them, for "
            r"each process that it starts\. Start the ranks by one \(torchrun .*\), or unset RANK and WORLD_SIZE",
        ),
        ({"RANK": ""}, r"^WORLD_SIZE = 2, .* but no RANK: .* or unset WORLD_SIZE for one process\.$"),
        ({"RANK": "2"}, r"^RANK = 2, but WORLD_SIZE = 2: ranks are numbered from 0 to 1$"),
        ({"MASTER_PORT": "none"}, r"^MASTER_PORT = 'none' is no port"),
    ],
)
def test_what_a_launcher_leaves_out_is_named_with_the_mend_before_anybody_waits(monkeypatch, changed, message):
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    machine(monkeypatch, 0)
    for name, value in (WHOLE | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        _meet()


def at_a_free_port(monkeypatch, rank):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, value in (WHOLE | {"RANK": str(rank), "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


@pytest.mark.parametrize(("rank", "other"), [(0, 1), (1, 0)])
def test_a_rank_that_waits_for_another_in_vain_names_it(monkeypatch, capfd, rank, other):
    port = at_a_free_port(monkeypatch, rank)
    monkeypatch.setattr("opd.ranks.launcher._LINE_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=rf"^rank {other} of the 2 .* did not come to 127.0.0.1:{port} .* within 1 s"):
        call_roll(1.0)
    assert f"note: waiting for rank {other} at 127.0.0.1:{port}" in capfd.readouterr().err


def test_a_rank_goes_on_once_the_others_have_come(monkeypatch):
    port = at_a_free_port(monkeypatch, 1)
    first = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    first.set("opd/0/0", "here")
    assert call_roll(20).get("opd/0/1") == b"here"


def test_a_port_that_another_program_has_is_named(monkeypatch):
    port = at_a_free_port(monkeypatch, 0)
    with (
        socket.create_server(("0.0.0.0", port)),
        pytest.raises(ConfigError, match=rf"cannot meet at 127.0.0.1:{port} .* Choose another MASTER_PORT"),
    ):
        call_roll(1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORLD_SIZE", value) for value in ("abc", "0", "-2", "\u0663")),
        *(("RANK", value) for value in ("x", "9" * 5000)),
    ],
)
def test_a_launcher_s_variable_that_is_no_number_is_named(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{name} = '{value[:40]}' is no number of processes"):
        started_ranks()
