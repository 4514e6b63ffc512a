"""The plan of a run, by hand."""

from pathlib import Path

import pytest
from rich.console import Console

from opd.launch.checks.loading import config_from
from opd.launch.plan.memory import has_gpu
from opd.launch.plan.plan import plan, teacher_of
from opd.launch.settings.config import Config
from opd.launch.settings.reader import parse_yaml

GOOD = {"method": "opsd", "model": "smollm2", "env": "opd/Lookup-v0"}


def config(text: str = "", **settings: object) -> Config:
    return config_from({**GOOD, **(parse_yaml(text, "x") or {}), **settings}, check_machine=False)


def planned(text: str = "", **settings: object):
    return plan(config(text, **settings), Path("runs/a"), gpu=False)


def test_a_step_is_tasks_times_group_size_episodes():
    made = planned("train: {tasks_per_step: 6}\nrollout: {group_size: 4, max_tokens: 100}\nenv: {id: x, max_turns: 5}")
    assert made.episodes_per_step == 24
    assert made.tokens_per_episode == 500
    assert made.tokens_per_step == 24 * 500


def test_an_episode_samples_no_more_than_a_sequence_holds():
    assert planned("rollout: {max_tokens: 1000, max_length: 1500}").tokens_per_episode == 1500


@pytest.mark.parametrize(
    ("evaluation", "steps", "count"),
    [
        ("{tasks: 0}", 10, 0),
        ("{tasks: 5}", 10, 2),
        ("{tasks: 5, every: 3}", 10, 2 + 3),
        ("{tasks: 5, every: 5}", 10, 2 + 1),  # the one at step 10 is the one after
        ("{tasks: 5, every: 20}", 10, 2),
        ("{tasks: 5, every: 3}", 3 * 10**18, 1 + 10**18),  # which no list holds
    ],
)
def test_evaluations_are_counted_once_each(evaluation, steps, count):
    assert planned(f"eval: {evaluation}\ntrain: {{steps: {steps}}}").evaluations == count


def test_a_run_that_may_end_early_says_when():
    rows = dict(planned("eval: {tasks: 5, every: 3, stop_at: 0.985}\ntrain: {steps: 10, tasks_per_step: 4}").rows())
    assert rows["updates"] == "10 (40 episodes in all), or until 98.5% of held-out tasks are solved"


def test_the_teacher_is_the_one_that_the_method_names():
    assert teacher_of(config("opsd: {teacher: {weights: ema, rate: 0.05}}")).weights == "ema"
    made = planned("opsd: {teacher: {weights: live}}")
    assert next(part.bytes for part in made.memory if part.name == "teacher") == 0


def test_memory_is_the_sum_of_its_parts():
    made = planned()
    assert made.parameters == 134_515_008
    assert made.memory_bytes == sum(part.bytes for part in made.memory)
    weights = next(part for part in made.memory if part.name == "weights")
    assert weights.bytes == 4 * 134_515_008


def test_a_model_of_unknown_size_is_said_to_be_unknown():
    rows = dict(planned(model="tiny:lookup").rows())
    assert rows["model"] == "tiny:lookup, size not known before it is loaded"
    assert rows["memory"].startswith("not estimated")


def test_the_plan_tells_what_a_person_wants_to_know(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = dict(planned("train: {steps: 7}\neval: {tasks: 50}\nopsd: {teacher: {weights: frozen}}").rows())
    assert rows["method"] == "opsd, teacher: frozen"
    assert rows["model"] == "smollm2, 134,515,008 parameters"
    assert rows["environment"] == "opd/Lookup-v0, at most 8 turns"
    assert "at most 1 turn" in dict(planned("env: {id: x, max_turns: 1}").rows())["environment"]
    assert rows["a step"] == "32 tasks x 1 = 32 episodes, at most 65,536 sampled tokens (2,048 an episode)"
    assert rows["micro-batches"] == "at most 8,192 padded tokens, student and teacher"
    assert rows["updates"] == "7 (224 episodes in all)"
    assert rows["evaluation"] == "2 times on 50 held-out tasks"
    assert rows["outputs"].startswith("runs/a/ (config.yaml, metrics.jsonl,")
    assert rows["wandb"] == "offline, project opd"
    assert "note" not in rows
    lines = rows["memory"].splitlines()
    assert lines[1] == "    0.50  weights"
    assert lines[3] == "    1.00  AdamW (two moments for each trained parameter)"


def test_the_table_shows_every_row(capsys):
    made = planned()
    Console(width=200).print(made.table())
    shown = capsys.readouterr().out
    assert all(name in shown for name, _ in made.rows())
    assert "134,515,008" in shown


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("rollout: {top_p: 0.9}", "rollout.top_p and rollout.top_k narrow what is sampled"),
        ("rollout: {top_k: 20}", "rollout.top_p and rollout.top_k narrow what is sampled"),
        (
            "rollout: {temperature: 1.1}",
            "the loss is taken at opsd.divergence.temperature = 1, but rollout.temperature = 1.1",
        ),
        ("train: {steps: 3, warmup_steps: 3}", "train.warmup_steps = 3 never ends in 3 updates"),
        ("model: tiny:arithmetic", "the model was warmed up for arithmetic, but acts in opd/Lookup-v0"),
    ],
)
def test_what_may_surprise_is_noted(text, note):
    [said] = planned(text).notes
    assert said.startswith(note)


GROUP = "rollout: {group_size: 4, temperature: 1.0}\nmodel: tiny:lookup\n"
IDLE = "with one update a step all ratios are 1, and no clip acts"


@pytest.mark.parametrize(
    ("text", "notes"),
    [
        ("method: grpo", [IDLE]),
        ("method: srpo", [IDLE]),
        ("method: sdpo", [IDLE]),
        ("method: sdpo\nsdpo: {max_ratio: null}", []),
        ("method: grpo\ntrain: {updates_per_step: 2}", []),
        ("method: skill_sd\ntrain: {updates_per_step: 2}", ["a live teacher is another one at each of a step's 2"]),
        ("method: sdpo\ntrain: {updates_per_step: 2}\nrollout: {group_size: 1}", ["no sibling can demonstrate"]),
        (
            "method: srpo\nsrpo: {max_teacher_tokens: 500}\ntrain: {updates_per_step: 2}\n"
            "rollout: {group_size: 4, max_length: 501}",
            ["max_teacher_tokens = 500 is less than rollout.max_length = 501"],
        ),
        (
            "method: sdpo\nsdpo: {max_ratio: null, form: sampled}\nrollout: {group_size: 4, temperature: 0.7}",
            [],
        ),
    ],
)
def test_methods_of_groups_say_what_is_idle(text, notes):
    """A sampled token's log-ratio is always taken at the temperature that drew it."""
    said = planned(text if "rollout" in text else GROUP + text, model="tiny:lookup").notes
    assert len(said) == len(notes)
    assert all(one.startswith(note) for one, note in zip(said, notes, strict=True))


def test_equal_temperatures_and_the_own_environment_need_no_note():
    text = "rollout: {temperature: 1.1}\nmodel: tiny:lookup\ntrain: {warmup_steps: 5}\n"
    text += "opsd: {divergence: {temperature: 1.1}}"
    assert planned(text).notes == []
    assert planned(text, model="tiny:lookup-skills").notes == []


def test_a_hidden_gpu_is_no_gpu(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: "/usr/bin/nvidia-smi")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not has_gpu()


def test_a_plan_for_many_ranks_says_what_each_holds_and_sends_and_how_the_json_was_filled():
    made = plan(
        config("backend: deepspeed\ndeepspeed: {zero_optimization: {stage: 3}, gradient_clipping: 0.5}"),
        Path("runs/a"),
        gpu=True,
        ranks=4,
    )
    rows = dict(made.rows())
    assert rows["backend"] == "DeepSpeed, ZeRO-3, 4 processes"
    assert "on each of them" in rows["memory"]
    assert "sent by each process in a step" in rows["traffic"]
    assert "gradient_clipping = 0.5 (as your JSON says; train.max_grad_norm: 1.0 is not used)" in rows["deepspeed"]
    assert "optimizer.params.lr = 1e-05 (train.lr)" in rows["deepspeed"]


def test_an_offload_moves_the_optimiser_from_the_device_to_the_machine():
    text = "backend: deepspeed\ndeepspeed: {zero_optimization: {stage: 3, offload_optimizer: {device: cpu}}}"
    made = plan(config(text), Path("runs/a"), gpu=True, ranks=2)
    assert {part.name: part.bytes for part in made.memory}["optimiser"] == 0
    assert [part.name for part in made.host] == ["optimiser"]
    assert made.host[0].bytes == 12 * made.parameters // 2


@pytest.mark.parametrize(
    ("text", "ranks", "most"),
    [
        ("train: {tasks_per_step: 4}\nrollout: {group_size: 2}", 1, 8),
        ("train: {tasks_per_step: 4}\nrollout: {group_size: 2, concurrency: 3}", 1, 3),
        ("train: {tasks_per_step: 3}\nrollout: {group_size: 8}", 2, 16),  # two of the tasks, whole
        ("train: {tasks_per_step: 1}\neval: {tasks: 20}", 1, 20),
        ("train: {tasks_per_step: 1}\neval: {tasks: 20}", 4, 5),
        ("method: sft\nsft: {source: own, tasks: 12}\nrollout: {group_size: 2}", 1, 24),
        ("method: sd_zero\nsd_zero: {questions: 5, revisions: 3}\ntrain: {tasks_per_step: 1}", 1, 15),
    ],
)
def test_the_cache_has_room_for_the_episodes_that_are_played_at_once_and_no_more(text, ranks, most):
    if ranks > 1:
        text += "\nbackend: deepspeed\ndeepspeed: {zero_optimization: {stage: 2}}"
    made = plan(config(text), Path("runs/a"), gpu=False, ranks=ranks)
    [cache] = [part for part in made.memory if part.name == "cache of rollouts"]
    assert cache.note == f"at most {most} episodes of 2048 tokens"
    assert cache.bytes == most * 2048 * 2 * 30 * 192 * 4


@pytest.mark.parametrize(("engine", "where"), [("vllm", "in vLLM's share"), ("vllm_server", "another process's")])
def test_the_cache_of_vllm_is_not_counted_a_second_time(engine, where):
    [cache] = [part for part in planned(f"rollout: {{engine: {engine}}}").memory if part.name == "cache of rollouts"]
    assert (cache.bytes, cache.note) == (0, where)


def test_a_stage_that_trains_on_what_was_stored_plays_no_episodes_in_its_steps():
    rows = dict(planned("method: sft\nsft: {source: own, tasks: 12}\ntrain: {tasks_per_step: 4, steps: 3}").rows())
    assert rows["a step"] == "4 sequences of those that were stored"
    assert rows["ahead"] == "stage 1: 12 tasks x 1 = 12 episodes"
    assert rows["updates"] == "3 (no episodes)"
    rows = dict(planned("method: sd_zero\nsd_zero: {questions: 5}\ntrain: {tasks_per_step: 2, steps: 3}").rows())
    assert rows["a step"].splitlines()[0] == "stage 1: 2 sequences of those that were stored"
    assert rows["a step"].splitlines()[1].startswith("stage 2: 2 tasks x 1 = 2 episodes, at most")
