"""Calls environments, and checks what they say. An environment is called nowhere else.

The contract is in `docs/environments.md`. Whatever breaks it becomes an exception here, on a worker's thread or in an
environment's process, and data in `opd.episodes.episode`. What comes through is plain text and numbers that the
environment cannot change later.
"""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from opd.errors import EnvError
from opd.grading import Trainer, noting
from opd.secrets import redacted
from opd.types import ONLY_TEXT, Message, Task, medium_in

MOST_CHARACTERS = 1_000_000
"""The most characters of one answer. A longer answer is a fault that would stall everybody's tokenizer."""
MOST_REWARD = 1e30
"""The size of a reward beyond which sums and float32 overflow."""
MOST_PARTS = 64
"""The most named parts of a reward: each becomes a metric of the run."""


class BadAnswer(EnvError):
    """An environment answered, and its answer breaks the contract."""


class TooFewTasks(EnvError):
    """An environment was asked for a task that it says it has not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Holds an environment's answer to a reset or a step, checked and copied: text and numbers alone, like JSON."""

    messages: list[Message]
    privileged: dict[str, str]
    feedback: str | None
    success: bool | None
    tools: list[dict[str, Any]] | None
    rewards: dict[str, float | None]
    seconds: float
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    unscored: bool = False
    """Nothing could tell what the episode is worth."""
    member: Any = None
    """What the environment wants to know of the episode once its group is scored; never looked into."""
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    ungraded: list[str] = field(default_factory=list)
    """Why graders had no result for what was to be scored; it scored 0, or ended the episode."""
    unreadable: bool = False
    """The environment could not read the action."""


def reset(env: Any, goal: Task, trainer: Trainer | None = None) -> Answer:
    """Begin an episode of a task; tell an environment that asks for it who plays.

    Raises whatever the environment raises, and BadAnswer for a broken contract.
    """
    since = time.perf_counter()
    with _close_on_error(env):
        if trainer is not None and (learn := getattr(_plain(env), "trained_by", None)):
            learn(trainer)
        said = env.reset(seed=goal.seed, options=_address(env, goal))
        seconds = time.perf_counter() - since
        with _blame_answer("reset", said, "(observation, info)"):
            observation, info = said
            return Answer(messages=messages_of(observation, info), **_read_info(info), seconds=seconds)


def step(env: Any, action: str) -> Answer:
    """Hand a completion's text over. Raises as `reset` does."""
    since = time.perf_counter()
    with _close_on_error(env), noting() as ungraded:
        said = env.step(action)
        seconds = time.perf_counter() - since
        with _blame_answer("step", said, "(observation, reward, terminated, truncated, info)"):
            observation, reward, terminated, truncated, info = said
            over = _flag("terminated", terminated)
            return Answer(
                messages=messages_of(observation, info),
                **_read_info(info),
                seconds=seconds,
                reward=_reward(reward),
                terminated=over,
                ungraded=ungraded,
                member=info.get("member"),
                unreadable=_flag('info["unreadable"]', info.get("unreadable", False)),
                truncated=_flag("truncated", truncated)
                and not over,  # gymnasium's TimeLimit says both at its last step
            )


def score_group(env: Any, members: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[Answer]:
    """Have an environment score what compares the episodes of a group; return for each its whole reward.

    Raises whatever the environment raises, and BadAnswer where it does not answer for each member.
    """
    with _close_on_error(env), noting() as ungraded:
        replies = _plain(env).score_group(list(members), [list(one) for one in ids])
        with _blame_answer("score_group", replies, "a Reply for each member"):
            if len(replies) != len(members):
                raise BadAnswer(f"score_group answered {len(replies)} times for {len(members)} members")
            scored = [_scored(reply) for reply in replies]
            return [replace(scored[0], ungraded=ungraded), *scored[1:]] if scored else []


def _scored(reply: Any) -> Answer:
    told = ("feedback", "success", "unscored", "rewards", "metrics", "notes")
    info = _read_info({name: value for name in told if (value := getattr(reply, name)) is not None})
    return Answer(messages=[], **info, reward=_reward(reply.reward), seconds=0.0)


def _plain(env: Any) -> Any:
    """Return an environment without gymnasium's wrappers."""
    return getattr(env, "unwrapped", env)


@contextmanager
def _blame_answer(call: str, said: Any, form: str) -> Iterator[None]:
    """Turn whatever goes wrong while an answer is read into a BadAnswer."""
    try:
        yield
    except BadAnswer:
        raise
    except Exception as error:
        raise BadAnswer(
            f"{call} must return {form}; it returned {_show(said)} ({type(error).__name__}: {error})"
        ) from None


def _show(value: Any) -> str:
    """Show a value in a message: short, without asking a megabyte or a broken `__repr__` for all of it."""
    return f"{reprlib.repr(redacted(value)):.200}"  # before it is cut: half a secret is one too


def _reward(value: Any) -> float:
    if isinstance(value, str | bytes) or not abs(value) < MOST_REWARD:  # a nan is not smaller either
        raise BadAnswer(f"the reward is {_show(value)}; it must be a finite number")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if value not in (True, False):  # numpy's are equal to Python's; the text "False" is true
        raise BadAnswer(f"{name} is {_show(value)}; it must be a bool")
    return bool(value)


def _address(env: Any, goal: Task) -> dict[str, Any] | None:
    """Return the options of a reset: which task, for an environment whose tasks are numbered; else None."""
    tasks = (env.metadata or {}).get("tasks")
    if tasks is None:
        return None
    # Training goes through a table again and again; an evaluation that did so would count a task twice.
    if goal.split not in tasks:
        raise TooFewTasks(
            f"{goal.id} is asked for, and the environment has no {goal.split} split; its splits: {', '.join(tasks)}"
        )
    count = tasks[goal.split]
    if count is None or goal.index < count:
        return {"split": goal.split, "index": goal.index}
    if goal.split != "train":
        raise TooFewTasks(
            f"{goal.id} is asked for, and the environment has {count} tasks in its {goal.split} split. Set eval.tasks "
            f"(and eval.first) to {count} or less together, or give it more"
        )
    return {"split": goal.split, "index": goal.index % count}


@contextmanager
def _close_on_error(env: Any) -> Iterator[None]:
    """Close an environment that broke. It is not used again, and what it holds (a process, a sandbox) must not stay."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the first error says what went wrong
            env.close()
        raise


def messages_of(observation: Any, info: dict[str, Any]) -> list[Message]:
    """Return the messages of an observation, copied. Raises BadAnswer where they are not text."""
    messages = info.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": observation}]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            content = message.get("content") if isinstance(message, dict) else message
            if medium := medium_in(content):
                raise BadAnswer(f"an observation holds {medium!r}: {ONLY_TEXT}; got {_show(message)}")
            raise BadAnswer(
                'an observation must be a str, or info["messages"] a list of {"role", "content"}; '
                f"got {_show(message)}"
            )
    _check_text("an observation", [message["content"] for message in messages])
    copied: list[Message] = _copy('info["messages"]', messages)
    return copied


def _read_info(info: dict[str, Any]) -> dict[str, Any]:
    """Return the rest of an environment's info, checked and copied. Raises BadAnswer."""
    feedback, privileged, tools = info.get("feedback"), info.get("privileged", {}), info.get("tools")
    if not isinstance(feedback, str | None):
        raise BadAnswer(f'info["feedback"] is {type(feedback).__name__}; it must be a str')
    if not isinstance(privileged, dict) or not all(isinstance(x, str) for pair in privileged.items() for x in pair):
        raise BadAnswer(f'info["privileged"] must be a dict of str to str; got {_show(privileged)}')
    if tools is not None and not (isinstance(tools, list) and all(map(_is_tool, tools))):
        raise BadAnswer(f'info["tools"] must be a list of {{"type", "function": {{...}}}} schemas; got {_show(tools)}')
    metrics = _read_parts("metrics", info.get("metrics", {}))
    _check_text('info["feedback"] and info["privileged"]', [feedback or "", *privileged.values()])
    return {
        "feedback": feedback,
        "privileged": _copy('info["privileged"]', privileged),
        "tools": _copy('info["tools"]', tools),
        "success": None if info.get("success") is None else _flag('info["success"]', info["success"]),
        "unscored": _flag('info["unscored"]', info.get("unscored", False)),
        "rewards": _read_parts("rewards", info.get("rewards", {})),
        "metrics": {name: value for name, value in metrics.items() if value is not None},
        "notes": _read_notes(info.get("notes", {})),
    }


def _read_notes(notes: Any) -> dict[str, Any]:
    """Return what is to stand beside the episode, copied. Raises BadAnswer where it is no plain data."""
    if not isinstance(notes, dict) or len(notes) > MOST_PARTS or not all(isinstance(name, str) for name in notes):
        raise BadAnswer(f'info["notes"] must be a dict of at most {MOST_PARTS} texts to plain data; got {_show(notes)}')
    copied: dict[str, Any] = _copy('info["notes"]', notes)
    return copied


def _read_parts(what: str, rewards: Any) -> dict[str, float | None]:
    """Return the named parts of a reward, or other numbers, checked and copied. Raises BadAnswer."""
    if not isinstance(rewards, dict) or len(rewards) > MOST_PARTS:
        raise BadAnswer(f'info["{what}"] must be a dict of at most {MOST_PARTS} parts; got {_show(rewards)}')
    for name, value in rewards.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 100:
            raise BadAnswer(f'info["{what}"]: a name must be 1 to 100 printable characters; got {_show(name)}')
        if value is not None and (isinstance(value, str) or not abs(value) < MOST_REWARD):
            raise BadAnswer(f'info["{what}"][{name!r}] is {_show(value)}; it must be a finite number or None')
    return {name: None if value is None else float(value) for name, value in rewards.items()}


def _copy(what: str, value: Any) -> Any:
    """Copy a value by way of JSON: the copy shares nothing, and a pipe or a file can hold it."""
    text = json.dumps(value, ensure_ascii=False)
    if len(text) > 8 * MOST_CHARACTERS:  # a control character takes six
        raise BadAnswer(f"{what} holds {len(text):,} characters as JSON; at most {8 * MOST_CHARACTERS:,} are taken")
    return json.loads(text)


def _is_tool(schema: Any) -> bool:
    return isinstance(schema, dict) and isinstance(schema.get("function"), dict)


def _check_text(what: str, texts: Sequence[str]) -> None:
    if (size := sum(map(len, texts))) > MOST_CHARACTERS:
        raise BadAnswer(f"{what}: {size:,} characters; at most {MOST_CHARACTERS:,} are taken. Cut long results")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BadAnswer(f"{what} holds a lone surrogate ({error.object[error.start]!a}), which is no text") from None
