"""The engine is compared with the student on tokens of its own: first, after an update, when a copy came back.

Not covered: several ranks.
"""

from types import SimpleNamespace

import pytest
import torch

from opd.backends.config import TrainConfig
from opd.backends.local import LocalBackend
from opd.engines.base import Request, Sampling, generate
from opd.engines.preflight import TOKENS, choose, sample_plainly
from opd.engines.transformers import TransformersEngine
from opd.engines.vllm_http import FaultKind, ServerFault
from opd.engines.vllm_replicas import Replica, Replicas
from opd.episodes.config import RolloutConfig
from opd.errors import ModelError
from opd.losses import Sampler
from opd.trainers.loop import loop as loop_module
from opd.trainers.loop.loop import Loop
from opd.trainers.loop.reading import Models, check_sampler, probes
from opd.types import End, StopReason, Task, Trajectory, TrajectoryGroup, Turn

ROLLOUT = RolloutConfig(max_tokens=8, max_length=64, temperature=0.3, top_p=0.5, top_k=2)


@pytest.fixture
def student(make_model):
    return make_model(vocab=64)


def models(student):
    backend = LocalBackend(student, TrainConfig(steps=1), total_steps=1)
    return Models(student=student, teacher=None, backend=backend, sampler=Sampler(), pad_id=0, tokens_per_microbatch=64)


def groups(*sizes):
    task = Task(index=0, seed=0, split="train")
    made = []
    for size in sizes:
        turn = Turn(
            prompt_ids=list(range(5, 5 + size)),
            completion_ids=[7, 9],
            logprobs=[-9.0, -9.0],  # no engine said so: they are not what is compared
            stop_reason=StopReason.STOP,
            messages=[],
            text="",
        )
        made.append(Trajectory(task=task, member=0, turns=[turn], end=End.FINISHED))
    return [TrajectoryGroup(task=task, trajectories=made)]


def test_an_engine_that_samples_truncated_is_still_compared_and_passes(student):
    engine = TransformersEngine(student)
    engine.begin(Sampling(temperature=0.3, top_p=0.5, top_k=2), frozenset())
    asked = probes(engine, groups(4, 30, 11, 2, 7), ROLLOUT)
    assert [sum(sample.completion_mask) for sample in asked] == [TOKENS] * 4
    assert [len(sample.token_ids) - TOKENS for sample in asked] == [4, 6, 9, 32]  # three short ones and the longest
    assert check_sampler(models(student), asked, ROLLOUT)


def test_an_engine_with_old_weights_is_refused_whatever_it_samples_with(student, make_model):
    engine = TransformersEngine(make_model(vocab=64, seed=3))
    with pytest.raises(ModelError, match=r"differ from the trainer's by .* at temperature 1: the engine"):
        check_sampler(models(student), probes(engine, groups(4, 9), ROLLOUT), ROLLOUT)


def test_a_log_prob_that_is_no_number_is_refused(student):
    asked = probes(TransformersEngine(student), groups(4), ROLLOUT)
    asked[0].sampler_logprobs[-1] = float("nan")
    with pytest.raises(ModelError, match="by nan nats"):
        check_sampler(models(student), asked, ROLLOUT)


def test_without_an_episode_nothing_is_compared(student):
    assert probes(TransformersEngine(student), groups(), ROLLOUT) == []
    assert not check_sampler(models(student), [], ROLLOUT)


def test_a_sequence_without_room_loses_its_end(student):
    [(prompt, done)] = sample_plainly(TransformersEngine(student), [list(range(5, 60))], max_length=20)
    assert (prompt, len(done.token_ids)) == (list(range(5, 15)), 10)


def test_the_check_changes_nothing_of_what_comes_after_it(student):
    def play(checked):
        engine = TransformersEngine(student)
        torch.manual_seed(5)
        if checked:
            probes(engine, groups(4, 20), ROLLOUT)
        engine.begin(Sampling(temperature=0.7), frozenset())
        asked = [Request(session=n, prompt_ids=[5, 6, 7 + n], seed=n, max_tokens=5) for n in range(3)]
        return list(generate(engine, asked)), torch.rand(1)

    assert play(True) == play(False)


def test_as_many_sequences_are_asked_for_as_there_are_copies():
    assert choose([[1], [], [1, 2, 3], [1, 2]], 2) == [[1], [1, 2, 3]]
    assert len(choose([[n] for n in range(9)], 6)) == 6


def test_it_is_due_at_the_start_after_an_update_and_when_a_copy_came_back(monkeypatch):
    engine = SimpleNamespace(copies=1, revived=0)
    ranks = SimpleNamespace(any=bool, share=list)
    player = SimpleNamespace(scheduler=SimpleNamespace(engine=engine), ranks=ranks, rollout=ROLLOUT, models=None)
    order = []
    player.rest = lambda: order.append("rest")
    monkeypatch.setattr(loop_module, "probes", lambda *_: order.append("ask") or ["asked"])
    monkeypatch.setattr(loop_module, "check_sampler", lambda *_: order.append("compare") or True)
    loop = Loop(method=None, player=player)
    due = []
    for revived in (0, 0, 0, 1, 1):
        engine.revived = revived
        loop_module.check_engine(loop, [])
        due.append("ask" in order)
        assert order in (["rest"], ["ask", "rest", "compare"])
        order.clear()
    assert due == [True, True, False, True, False]


def test_a_server_that_lost_its_weights_counts_once_it_holds_them_again():
    replicas = Replicas([Replica(server=SimpleNamespace(url="http://here"))], None, model={}, sharing=None)
    [replica] = replicas.all
    counted = []
    for lost in (False, False, True):
        if lost:
            replicas.lose(replica, replica.epoch, ServerFault(FaultKind.LOST, "gone"))
        replicas._mark_ready(replica)
        counted.append(replicas.revived)
    assert counted == [1, 1, 2]
