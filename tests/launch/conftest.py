"""What the tests of whole runs share."""

from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="session")
def tiny(tiny_model):
    """A model that knows the format a little: a tenth of the warm start."""
    return tiny_model(steps=50)


@pytest.fixture
def settings(tiny, tmp_path):
    """`settings(name, **sections)`: a short run of OPSD in the folder `name`, as plain data."""

    def make(name, **sections):
        data = {
            "method": "opsd",
            "out": str(tmp_path / name),
            "model": str(tiny),
            "env": "opd/Lookup-v0",
            "rollout": {"max_tokens": 24, "max_length": 256},
            "train": {"steps": 4, "tasks_per_step": 6, "lr": 1e-3, "tokens_per_microbatch": 512, "threads": 1},
            "tracking": {"wandb": "disabled", "console": False, "plot": False},
            "opsd": {"privileged": "plan", "divergence": {"clip": None}},
        }
        for section, values in sections.items():
            own = data.get(section)
            data[section] = own | values if isinstance(own, dict) and isinstance(values, dict) else values
        return data

    return make


LITTLE = {
    "rollout.max_tokens": 24,
    "rollout.max_length": 512,
    "train.steps": 2,
    "train.tasks_per_step": 4,
    "eval.tasks": 2,
    "tracking.wandb": "disabled",
    "tracking.console": False,
    "tracking.plot": False,
}
COIN = "coin_env:CoinEnv"
"""In tests/zero: of its episodes about half are right, whatever the model knows."""
OWN = {
    "frozen_lake": {"rollout.max_tokens": 8, "train.tasks_per_step": 2},
    "opsd_smollm2": {"rollout.max_tokens": 16, "train.tasks_per_step": 2},
    "opsd_zero3_vllm": {"rollout.vllm.kv_cache_gib": 0.25},
    "opsd_vllm": {"rollout.vllm.kv_cache_gib": 0.25},
    "sft": {"sft.tasks": 5, "sft.keep": "all"},
    "lightning_opd": {"lightning_opd.sft_tasks": 4, "lightning_opd.tasks": 6},
    "sd_zero": {"env": COIN, "sd_zero.questions": 8, "sd_zero.revisions": 2},
    "skill_sd": {
        "env": COIN,
        "rollout.group_size": 4,
        "skill_sd.distill": 1.0,
        "skill_sd.skills": {"min_support": 0.0, "min_lift": -100.0, "min_pdi": -100.0, "trials": 2},
    },
    **{name: {"env": COIN, "rollout.group_size": 4} for name in ("grpo", "sdpo", "srpo")},
}
"""What else makes an example small, or lets a model that can do nothing learn from it; by the file's name."""


@pytest.fixture(scope="session")
def small_example():
    """`small_example(name, out, student=..., teacher=...)`: the file of an example, and the changes that make it small.

    Its tiny models, if it has any, become the two folders.
    """

    def make(name, out, *, student, teacher):
        path = EXAMPLES / f"{name}.yaml"
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        changes = {**LITTLE, "out": str(out), **OWN.get(name, {})}
        for key, value in flat(written):
            if str(value).startswith("tiny:"):
                changes[key] = str(student if key == "model" else teacher)
        return path, changes

    return make


def flat(settings, prefix=""):
    """Every setting by its dotted key."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
