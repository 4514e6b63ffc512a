"""Problems of settings that are fine by themselves and impossible together."""

from __future__ import annotations

from opd.errors import ConfigError
from opd.launch.checks.backends import check_backend
from opd.launch.checks.engines import check_vllm
from opd.launch.settings.config import Config
from opd.launch.settings.problems import Problem
from opd.losses import Distill, SampledDistill
from opd.teachers.config import TeacherConfig


def check_combinations(config: Config) -> list[Problem]:
    """Return the problems of settings that are fine by themselves and impossible together."""
    rollout, train = config.rollout, config.train
    problems = []
    if rollout.max_tokens >= rollout.max_length:
        problems.append(
            Problem(
                ("rollout.max_tokens", "rollout.max_length"),
                f"rollout.max_tokens = {rollout.max_tokens} leaves no room for a prompt in rollout.max_length = "
                f"{rollout.max_length}. Lower the one or raise the other.",
            )
        )
    if train.tokens_per_microbatch < rollout.max_length:
        problems.append(
            Problem(
                ("train.tokens_per_microbatch", "rollout.max_length"),
                f"train.tokens_per_microbatch = {train.tokens_per_microbatch} is too little for one sequence of "
                f"rollout.max_length = {rollout.max_length}. Raise the one or lower the other.",
            )
        )
    if config.eval.stop_at is not None and len(config.stages) > 1:
        text = f"eval.stop_at ends runs of one stage, but method = {config.method} has {len(config.stages)}. Remove it."
        problems.append(Problem(("eval.stop_at", "method"), text))
    problems += _problems_without_teacher(config) + _problems_of_served_teacher(config)
    problems += _problems_of_own_weightings(config) + _problems_of_method(config)
    problems += check_vllm(config)
    return problems + check_backend(config)


def _problems_without_teacher(config: Config) -> list[Problem]:
    """Return a problem for each setting about a teacher's scores, if the method uses none."""
    if any(stage.losses.distill and stage.listens for stage in config.stages):
        return []
    weighting = config.weighting
    asked = {
        "weighting.entropy": weighting.entropy,
        "weighting.pass_rate": weighting.pass_rate and weighting.pass_rate.on == "distilled",
        "weighting.steps": weighting.steps,
        "weighting.functions": any(function.found.needs_scores for function in weighting.functions),
        "train.variance_every": config.train.variance_every,
    }
    text = f"has no effect: method = {config.method} distils no token. Remove it, or choose a method with a teacher."
    mends = {"weighting.pass_rate": " To weigh what rewards teach, set weighting.pass_rate.on: all."}
    return [Problem((key,), f"{key} {text}{mends.get(key, '')}") for key, value in asked.items() if value]


def _problems_of_own_weightings(config: Config) -> list[Problem]:
    """Return a problem for each weighting of the user's own that multiplies nothing which the method trains."""
    losses = [stage.losses for stage in config.stages]
    fed = {
        "policy_weight": any(loss.policy for loss in losses),
        "distill_weight": any(loss.distill for loss in losses),
        "ce_weight": any(loss.ce for loss in losses),
    }
    return [
        Problem(
            ("weighting.functions", "method"),
            f"weighting.functions: {function.name} multiplies {', '.join(function.found.streams)}, and method = "
            f"{config.method} trains {', '.join(name for name, used in fed.items() if used)} alone. Remove it, or name "
            "such a stream where the function is registered.",
        )
        for function in config.weighting.functions
        if not any(fed[stream] for stream in function.found.streams)
    ]


def _problems_of_method(config: Config) -> list[Problem]:
    """Return what a stage's method itself calls impossible beside the settings of rollouts."""
    problems = []
    for stage in config.stages:
        try:
            stage.notes(config.rollout)
        except ConfigError as error:
            problems.append(Problem(("rollout.group_size", "method"), f"method = {config.method}: {error}"))
    return problems


def _problems_of_served_teacher(config: Config) -> list[Problem]:
    """Return a problem for each thing that is asked of a teacher behind servers and that servers cannot say.

    `opd.engines.scoring` tells what they can.
    """
    key = f"{config.spec.name}.teacher.servers"
    stage = next((s for s in config.stages if s.teacher.servers and s.listens), None)
    if stage is None:
        named = any(value.servers for _, value in config.section if isinstance(value, TeacherConfig))
        text = f"{key} has no effect: the method loads teacher.model to play or to score ahead. Remove it."
        return [Problem((key,), text)] if named else []
    distill, weighting = stage.losses.distill, config.weighting
    wanted = {
        "rollout.temperature other than 1": config.rollout.temperature != 1,
        "weighting.entropy": weighting.entropy,
        "weighting.steps": weighting.steps,
        "weighting.functions that read scores": any(function.found.needs_scores for function in weighting.functions),
        "train.variance_every": config.train.variance_every,
    }
    if isinstance(distill, SampledDistill):
        wanted["a baseline, which needs whole distributions"] = distill.needs_distributions
    elif isinstance(distill, Distill):
        rule, at = distill.divergence, f"{config.spec.name}.divergence"
        wanted[f"the whole vocabulary (set {at}.top_k, or form: sampled)"] = rule.top_k is None
        wanted[f"support = student (set {at}.support: teacher)"] = rule.support == "student"
        wanted["a temperature other than 1"] = rule.temperature not in (None, 1)
        wanted["clip"] = rule.clip is not None
        wanted["max_ratio, over several updates a step"] = bool(distill.max_ratio) and config.train.updates_per_step > 1
    wanted["scores that weigh the samples"] = stage.needs_scores
    text = f"{key}: a served teacher says the sampled token's log-prob, or its top k, at temperature 1. It cannot do"
    return [Problem((key,), f"{text}: {name}.") for name, asked in wanted.items() if asked]
