"""The first look: a task of training and one of evaluation are begun before a model is loaded.

Each is played for one turn with a scripted answer, through the scheduler that will play the run, with the seeds that
the run gives them; the method then makes its samples of it. So whatever an environment, its table, its rewards or the
method's settings get wrong is told in the first seconds. Nothing here touches the draws of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from opd.engines.base import Sampling
from opd.engines.scripted import ScriptedEngine
from opd.envs.factory import make_for, module_of
from opd.episodes.scheduler import RolloutScheduler
from opd.episodes.tasks import task
from opd.errors import ConfigError, DataError, EnvError, OpdError
from opd.launch.checks.text import tool_format
from opd.launch.run.build import workers_of
from opd.launch.settings.config import Config
from opd.models.chat import ChatFormat
from opd.models.loading import generation_ends, load_tokenizer
from opd.trainers.loop.method import Method
from opd.trainers.loop.stage import Stage
from opd.types import Task, Trajectory, TrajectoryGroup

SCRIPTED = "I do not know."
"""What the student is made to say."""
_ROOM = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What was seen of a task."""

    task: Task
    student: str
    """The first prompt as the student reads it, control tokens and all."""
    student_tokens: int
    tools: list[str]
    """The names of the tools that it is offered."""
    answered: str
    """What the environment answered to the scripted text, in a few words."""
    teacher: str | None = None
    """What the teacher reads of the scripted episode, the student's tokens included; None where it reads nothing."""
    teacher_tokens: int = 0
    notes: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str]]:
        """The lines of a dry run: a name, and what was seen."""
        offered = f"; tools: {', '.join(self.tools)}" if self.tools else ""
        rows = [
            (f"{self.task.id}: the student reads", f"{self.student_tokens:,} tokens{offered}\n{self.student}"),
            (f'{self.task.id}: to "{SCRIPTED}"', self.answered),
        ]
        if self.teacher is not None:
            rows.append((f"{self.task.id}: the teacher reads", f"{self.teacher_tokens:,} tokens\n{self.teacher}"))
        return [*rows, *(("note", note) for note in self.notes)]


def first_look(config: Config, *, training: bool = True) -> list[Look]:
    """Begin a task of each kind that the run will play; without `training`, those of evaluation alone.

    Raises what is wrong with the settings (ConfigError), the data (DataError) or the environment (EnvError), naming
    the task, the setting and the mend; nothing with `env.probe: false`.
    """
    if not config.env.probe:
        return []
    chat = _chat_of(config)
    looks = []
    stage = next((stage for stage in config.stages if stage.acts), None) if training else None
    if stage is not None:
        played = _play(config, chat, task(stage.first_task, split="train", run_seed=config.seed), config.env.kwargs)
        looks.append(replace(_look(config, chat, played), **_taught(config, chat, stage, played)))
    if config.eval.tasks:
        kwargs = {**config.env.kwargs, **config.eval.env_kwargs}
        last = task(
            config.eval.first + config.eval.tasks - 1, split="eval"
        )  # the last one, to see that there are as many
        looks.append(_look(config, chat, _play(config, chat, last, kwargs)))
    return looks


def _chat_of(config: Config) -> ChatFormat:
    """The chat format of the run, by its tokenizer alone."""
    name = config.model.name
    if name.startswith("tiny:"):
        from opd.launch.tiny.build import tokenizer_of  # late: nothing else here needs it

        tokenizer, ends = tokenizer_of(name.removeprefix("tiny:")), []
    else:
        tokenizer, ends = load_tokenizer(config.model), generation_ends(config.model)
    return ChatFormat(
        tokenizer,
        template_kwargs=config.rollout.chat_template_kwargs,
        on_rewrite=config.rollout.on_rewrite,
        stop_ids=ends,
        form=tool_format(config.env),
        date=config.chat.day,
    )


def _play(config: Config, chat: ChatFormat, goal: Task, kwargs: dict[str, Any]) -> Trajectory:
    """Play one turn of a task. Raises EnvError where it breaks, as often as `rollout.on_failure` lets it try."""
    make = partial(make_for, config.env.id, kwargs, tool_format=chat.format.name, starts_thinking=chat.starts_thinking)
    alone = {"concurrency": 1, "workers": 1, "max_length": _ROOM, "max_tokens": _ROOM // 2}
    scheduler = RolloutScheduler(
        ScriptedEngine([*chat.encode(SCRIPTED), chat.end_id]),
        chat,
        make,
        config.rollout.model_copy(update=alone),
        max_turns=1,
        workers=workers_of(config.env),
        preload=["opd.envs.factory", module_of(config.env.id)],
    )
    with closing(scheduler):
        [group] = scheduler.run([goal], group_size=1, sampling=Sampling(temperature=1.0), seed=0)
    [played] = group.trajectories
    if played.failed is not None:
        why = " ".join(played.failed.split())  # an exception may be of many lines
        raise EnvError(
            f"env.id = {config.env.id}: {goal.id} cannot be played: {why}. Mend that (`opd envs check {config.env.id}` "
            "plays more), or begin all the same with env.probe: false"
        )
    if not played.turns:  # `rollout.episode_timeout` was over
        raise EnvError(f"env.id = {config.env.id}: {goal.id} ended by {played.end} before its first turn")
    return played


def _look(config: Config, chat: ChatFormat, played: Trajectory) -> Look:
    """Compare the first prompt with the room for it. Raises ConfigError where no completion fits."""
    turn, rollout = played.turns[0], config.rollout
    size = len(turn.prompt_ids)
    room = rollout.max_length - size
    if room < 1:
        raise ConfigError(
            f"rollout.max_length = {rollout.max_length} leaves no room for a completion: the first prompt of "
            f"{played.task.id} alone has {size:,} tokens. Raise it to {size + rollout.max_tokens:,} or more"
        )
    notes = []
    if room < rollout.max_tokens:
        notes.append(
            f"after the first prompt of {played.task.id}, {size:,} tokens, {room:,} are left within rollout.max_length "
            f"= {rollout.max_length:,}: fewer than rollout.max_tokens = {rollout.max_tokens:,}"
        )
    return Look(
        task=played.task,
        student=_decode(chat, turn.prompt_ids),
        student_tokens=size,
        tools=[str(tool["function"].get("name")) for tool in played.tools or ()],
        answered=_answer_in_words(played),
        notes=tuple(notes),
    )


def _answer_in_words(played: Trajectory) -> str:
    turn = played.turns[0]
    parts = [f"reward {turn.reward:g}", *(f"{name} {value}" for name, value in turn.rewards.items())]
    said = f"\nfeedback, which a teacher may read: {turn.feedback}" if turn.feedback else ""
    return f"{', '.join(parts)}; {'the episode ended' if played.terminated else 'it goes on'}{said}"


def _taught(config: Config, chat: ChatFormat, stage: Stage, played: Trajectory) -> dict[str, Any]:
    """Return what the teacher reads of the episode, as fields of a `Look`; none of a stage that has yet to prepare.

    Raises ConfigError or DataError where the method's settings and what the environment offers do not go together.
    """
    method: Method = stage.make(chat)
    try:
        method.teacher_messages(played.turns[0].messages, played.privileged)
        samples = method.annotate(TrajectoryGroup(task=played.task, trajectories=[played]))
    except (ConfigError, DataError) as error:
        raise type(error)(f"{error} (seen at {played.task.id} of env.id = {config.env.id})") from error
    except OpdError:
        raise
    except Exception:
        if type(method).prepare is Method.prepare:
            raise
        return {}  # it has not been prepared, which takes a model
    views = [sample.teacher_view for sample in samples if sample.teacher_view is not None]
    if not views:
        return {}
    return {"teacher": _decode(chat, views[0].token_ids), "teacher_tokens": len(views[0].token_ids)}


def _decode(chat: ChatFormat, token_ids: list[int]) -> str:
    return str(chat.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def rows_of(looks: list[Look]) -> Iterator[tuple[str, str]]:
    """The lines of all looks."""
    for look in looks:
        yield from look.rows()
