"""Checks a run's model before anything is loaded: its chat template (`opd.models.check`), its weights' headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from opd.addressing import load
from opd.envs import adapters, factory
from opd.episodes import answers
from opd.episodes.config import EnvConfig, RolloutConfig
from opd.episodes.tasks import task
from opd.errors import ModelError, OpdError
from opd.formats import FORMATS
from opd.launch.checks.loading import sections_of
from opd.launch.checks.weights import settings_of
from opd.launch.settings.config import Config
from opd.models.config import ChatConfig, ModelConfig

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.models.check import Report

_REPORTS: dict[str, Report] = {}


def tool_format(env: EnvConfig) -> str | None:
    """Return the format of tool calls that a person has set for the environment; None: the model's template tells."""
    named = env.kwargs.get("tool_format")
    return str(named) if named in FORMATS else None  # of one that is unknown, the environment says so


def check_model_text(config: Config) -> Report | None:
    """Return what the model's tokenizer and template do in a run by these settings; asked again, the same report.

    None for `tiny:` models, whose template is ours. Raises ModelError where the tokenizer cannot be loaded.
    """
    if config.model.name.startswith("tiny:"):
        return None
    key = config.fingerprint
    if key not in _REPORTS:
        from opd.models.check import Report  # late: it imports torch

        report, _ = _check(settings_of(config, config.model.name), config.rollout, config.chat, config.env)
        for stage in config.stages:
            other = stage.model or stage.teacher.model
            if other and not other.startswith("tiny:"):
                report.notes += _differences(config, other)
                if stage.model or not stage.teacher.servers:
                    add_weights(Report(problems=report.problems), settings_of(config, other))
        _REPORTS[key] = report
    return _REPORTS[key]


def report_of(
    target: str, env: str | None, overrides: Mapping[str, Any]
) -> tuple[Report, ChatFormat | None, EnvConfig | None]:
    """Return the report on a model, or on that of a file of settings, its chat format, and the environment.

    Raises ConfigError for settings that are wrong, and ModelError where the tokenizer cannot be loaded.
    """
    sections = sections_of(target, overrides)
    acts = EnvConfig(id=env) if env else sections.get("env")
    return *_check(
        sections["model"],
        sections.get("rollout") or RolloutConfig(),
        sections.get("chat") or ChatConfig(),
        acts,
    ), acts


def _check(
    model: ModelConfig, rollout: RolloutConfig, chat: ChatConfig, env: EnvConfig | None
) -> tuple[Report, ChatFormat | None]:
    from opd.models.chat import ChatFormat  # late: it imports torch
    from opd.models.check import check_text
    from opd.models.loading import generation_ends, load_tokenizer, tokenizer_file

    tokenizer = load_tokenizer(model)
    ends = generation_ends(model)
    made: list[ChatFormat] = []

    def make() -> ChatFormat:
        made.append(
            ChatFormat(
                tokenizer,
                template_kwargs=rollout.chat_template_kwargs,
                on_rewrite=rollout.on_rewrite,
                stop_ids=ends,
                form=tool_format(env) if env else None,
                date=chat.day,
            )
        )
        return made[0]

    tools = env is None or offers_tools(env)
    report = check_text(tokenizer, make, own_ends=ends, file=tokenizer_file(model), tools=tools)
    add_weights(report, model)
    return report, made[0] if made else None


def add_weights(report: Report, model: ModelConfig) -> None:
    """Add to a report what the headers of a model's files tell of its weights."""
    from opd.models.headers import check_headers

    try:
        rows = check_headers(model)
    except ModelError as error:
        report.problems.append(str(error))
        return
    for name, text in rows:
        report.add(name, text)


def first_prompt(chat: ChatFormat, env: EnvConfig) -> tuple[str, int]:
    """Return the first prompt of a task of an environment, as the model reads it, and its length in tokens."""
    made = factory.make_for(env.id, env.kwargs, tool_format=chat.format.name, starts_thinking=chat.starts_thinking)
    try:
        answer = answers.reset(made, task(0, split="train"))
    finally:
        made.close()
    ids = chat.start(answer.messages, answer.tools)
    return str(chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)), len(ids)


def refuse_problems(report: Report | None) -> None:
    """Raise ModelError with what a run cannot go on with, if there is anything."""
    if report is not None and report.problems:
        raise ModelError("\n".join(report.problems))


def offers_tools(env: EnvConfig) -> bool:
    """True if the environment reads calls of tools, as far as its class tells without being made."""
    try:
        if adapters.find(env.id):
            return False  # what it offers is known once it is made
        module, _, name = env.id.rpartition(":")
        address = env.id if module and name.isidentifier() else str(factory.entry_point(env.id))
        made = load(address, setting="env.id")
    except OpdError:
        return False
    return hasattr(made, "read_calls_as")


def _differences(config: Config, other: str) -> list[str]:
    """Say where another model, a teacher, ends its turns otherwise than the student."""
    from opd.models.chat import ChatFormat
    from opd.models.loading import generation_ends, load_tokenizer

    theirs = config.model.model_copy(update={"name": other})
    try:
        student, tokenizer = load_tokenizer(config.model), load_tokenizer(theirs)
        ours = ChatFormat(student, template_kwargs=config.rollout.chat_template_kwargs)
        if tokenizer.chat_template is None:
            return [
                f"{other} has no chat template: it scores turns as the student's template writes them, which it may "
                "never have read"
            ]
        its = ChatFormat(tokenizer, stop_ids=generation_ends(theirs))
    except ModelError as error:
        return [f"{other}: {error}"]
    end, its_end = student.decode([ours.end_id]), tokenizer.decode([its.end_id])
    if end != its_end:
        return [
            f"{config.model.name} ends its turns with {end!r}, and {other} with {its_end!r}: the teacher will call "
            "each end a mistake. Give the student the teacher's chat template, or choose a teacher with the student's"
        ]
    return []
