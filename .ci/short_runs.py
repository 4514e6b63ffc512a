"""The runs that `.ci/same_numbers.py` records: every method, and every option that takes its own way through the code.

Two steps of a few small episodes each. This is plain data, and the one place that spells their settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STUDENT, TEACHER, CONVERSATIONS = "<student>", "<teacher>", "<conversations>"
"""Stand in the settings for paths that are known when the tool is started."""
EXTERNAL = {"weights": "external", "model": TEACHER}
EMA = {"weights": "ema", "rate": 0.2}

COMMON: dict[str, Any] = {
    "seed": 3,
    "model": STUDENT,
    "env": "opd/Lookup-v0",
    "rollout": {"max_tokens": 40, "max_length": 512, "group_size": 1},
    "train": {"steps": 2, "tasks_per_step": 4, "lr": 1e-3, "tokens_per_microbatch": 1024, "threads": 1},
    "eval": {"tasks": 0},
    "tracking": {"wandb": "disabled", "console": False, "plot": False, "rollouts_per_step": 1000},
}
"""What every case starts from; its own settings are laid over these, section by section."""

GROUPS: dict[str, Any] = {"rollout": {"group_size": 4}, "train": {"tasks_per_step": 3}}
TWICE: dict[str, Any] = {"rollout": {"group_size": 6}, "train": {"tasks_per_step": 6, "updates_per_step": 2}}
LORA = {"name": STUDENT, "lora": {"r": 4}}
ALL_SKILLS = {"min_support": 0.0, "min_lift": -100.0, "min_pdi": -100.0, "trials": 2, "min_likeness": 0.0}
"""Shows every skill: to a model that was not taught to read them, none would be good enough."""


def opsd(*, name: str = "opsd", **own: Any) -> dict[str, Any]:
    return {"method": name, name: {"privileged": "plan", **own}}


def sdpo(**own: Any) -> dict[str, Any]:
    return {"method": "sdpo", **GROUPS, "sdpo": {"teacher": EMA, "feedback_at": "start", **own}}


def srpo(**own: Any) -> dict[str, Any]:
    return {"method": "srpo", **GROUPS, "srpo": {"teacher": EMA, "feedback_at": "start", **own}}


def by_teacher(name: str = "opd", **own: Any) -> dict[str, Any]:
    return {"method": name, name: {"teacher": EXTERNAL, **own}}


def sd_zero(**own: Any) -> dict[str, Any]:
    return {"method": "sd_zero", "rollout": {"max_length": 700}, "sd_zero": {"questions": 8, "revisions": 2, **own}}


def lightning(**own: Any) -> dict[str, Any]:
    return by_teacher("lightning_opd", sft_tasks=6, tasks=8, **own)


def skill_sd(**own: Any) -> dict[str, Any]:
    return {"method": "skill_sd", **GROUPS, "skill_sd": {"distill": 1.0, "skills": ALL_SKILLS, **own}}


SAMPLED = {"form": "sampled"}

CASES: dict[str, dict[str, Any]] = {
    "grpo": {"method": "grpo", **GROUPS},
    "grpo, two updates": {"method": "grpo", **TWICE},
    "grpo, by sequence": {
        "method": "grpo",
        **TWICE,
        "grpo": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "reduction": "sequence_mean"},
    },
    "grpo, Dr.": {
        "method": "grpo",
        **GROUPS,
        "grpo": {"scale": "none", "leave_one_out": True, "entropy": 0.01, "reduction": "sequence_sum", "length": 40},
    },
    "grpo, mask": {"method": "grpo", **GROUPS, "rollout": {"group_size": 4, "correction": {"mode": "mask"}}},
    "opsd": opsd(),
    "opsd, no clip": opsd(divergence={"clip": None}),
    "opsd, jsd": opsd(divergence={"kind": "jsd", "beta": 0.1, "clip": None}),
    "opsd, jsd, clip": opsd(divergence="jsd"),
    "opsd, skew": opsd(divergence={"kind": "skew_kl", "clip": None}),
    "opsd, reverse": opsd(
        divergence={"kind": "reverse_kl", "clip": None, "temperature": 0.7}, reduction="sequence_mean"
    ),
    "opsd, ema": opsd(teacher=EMA),
    "opsd, trust region": opsd(teacher={"weights": "trust_region", "rate": 0.3}, divergence={"clip": None}),
    "opsd, live": opsd(teacher={"weights": "live"}),
    "opsd, synced": opsd(teacher={"weights": "synced", "every": 2}) | {"train": {"updates_per_step": 2}},
    "opsd, two updates": opsd(divergence={"clip": None}) | {"train": {"updates_per_step": 2}},
    "opsd, lora": opsd() | {"model": LORA},
    "opsd, lora, ema": opsd(teacher=EMA) | {"model": LORA},
    "opsd, recomputed": opsd() | {"model": {"name": STUDENT, "gradient_checkpointing": True}},
    "opsd, bfloat16": opsd(divergence={"clip": None}) | {"model": {"name": STUDENT, "dtype": "bfloat16"}},
    "opsd, truncate": opsd() | {"rollout": {"correction": {"mode": "truncate", "level": "sequence"}}},
    "opsd, entropy": opsd() | {"weighting": {"entropy": 1.0}},
    "opsd, steps": opsd() | {"weighting": {"steps": {}}},
    "opsd, turns": opsd() | {"weighting": {"turns": [0.5, 1.0, 0.0]}},
    "opsd, pass rate": opsd() | GROUPS | {"weighting": {"pass_rate": {"alpha": 0.5}}},
    "sdft": opsd(name="sdft"),
    "sdft, reverse": opsd(name="sdft", divergence="reverse_kl", teacher=EMA, reduction="token_mean", skip=1),
    "sdpo": sdpo(),
    "sdpo, full jsd": sdpo(divergence={"top_k": None, "beta": 0.3}),
    "sdpo, full forward": sdpo(divergence={"kind": "forward_kl", "top_k": None}),
    "sdpo, full reverse": sdpo(
        divergence={"kind": "reverse_kl", "top_k": None, "temperature": 1.3}, reduction="sequence_mean"
    ),
    "sdpo, top k forward": sdpo(divergence={"kind": "forward_kl", "top_k": 8, "support": "teacher"}),
    "sdpo, top k reverse": sdpo(divergence={"kind": "reverse_kl", "top_k": 8, "tail": False}),
    "sdpo, sampled": sdpo(**SAMPLED),
    "sdpo, sampled, full": sdpo(**SAMPLED, baseline="full", max_advantage=2.0),
    "sdpo, sampled, top k": sdpo(**SAMPLED, baseline="top_k", baseline_top_k=8),
    "sdpo, sampled, optimal": sdpo(**SAMPLED, baseline="optimal"),
    "sdpo, rewards": sdpo(policy_share=0.5, feedback="always", feedback_at="turn"),
    "sdpo, two updates": sdpo() | TWICE,
    "sdpo, pass rate on all": sdpo(policy_share=0.5) | {"weighting": {"pass_rate": {"on": "all"}}},
    "srpo": srpo(),
    "srpo, two updates": srpo() | TWICE,
    "srpo, sampled": srpo(**SAMPLED, entropy_beta=0.0),
    "opd": by_teacher(),
    "opd, full": by_teacher(form="exact", divergence={"top_k": None}),
    "opd, full jsd": by_teacher(form="exact", divergence={"kind": "jsd", "beta": 0.2, "top_k": None}),
    "opd, top k": by_teacher(form="exact", divergence={"top_k": 8}),
    "opd, rewards": by_teacher(policy_share=0.3) | GROUPS,
    "vopd": by_teacher("vopd") | {"train": {"variance_every": 1}},
    "vopd, top k": by_teacher("vopd", baseline="top_k", baseline_top_k=8),
    "vopd, optimal": by_teacher("vopd", baseline="optimal"),
    "sft": by_teacher("sft", source="teacher", tasks=8),
    "sft, own": {"method": "sft", "sft": {"source": "own", "tasks": 12, "reduction": "sequence_mean"}},
    "sft, file": {"method": "sft", "sft": {"source": "file", "file": CONVERSATIONS}},
    "sd_zero": sd_zero(),
    "sd_zero, code": sd_zero(variant="code"),
    "sd_zero, reply": sd_zero(place="reply", teacher={"weights": "synced", "every": 1}),
    "lightning_opd": lightning(),
    "lightning_opd, top k": lightning(form="exact", divergence={"kind": "jsd", "top_k": 8}),
    "skill_sd": skill_sd(),
    "skill_sd, two updates": skill_sd() | TWICE,
    "skill_sd, k3": skill_sd(estimator="k3") | TWICE,
    "skill_sd, k2": skill_sd(estimator="k2") | TWICE,
    "skill_sd, policy gradient": skill_sd(estimator="policy_gradient") | TWICE,
    "skill_sd, fixed": {"method": "skill_sd", **GROUPS, "skill_sd": {"distill": 1.0, "fixed": "plan"}},
}
"""On one process, by name: the settings of a run as plain data."""

ZERO = (
    *("grpo", "opsd", "sdft", "sdpo", "srpo", "opd", "vopd", "sft", "sd_zero", "sd_zero, code"),
    *("lightning_opd", "skill_sd"),
)
"""The cases that are also run with ZeRO-3 on two processes."""
ZERO_3: dict[str, Any] = {
    "backend": "deepspeed",
    "deepspeed": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}


def all_cases() -> dict[str, dict[str, Any]]:
    """Every case by name, those with ZeRO-3 last; the paths are not filled in yet."""
    return {name: merged(COMMON, own) for name, own in CASES.items()} | {
        f"zero, {name}": merged(COMMON, CASES[name]) | ZERO_3 for name in ZERO
    }


def merged(settings: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with `own` laid over them, section by section."""
    result = dict(settings)
    for key, value in own.items():
        held = result.get(key)
        result[key] = merged(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return result
