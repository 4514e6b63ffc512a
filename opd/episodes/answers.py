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
from dataclasses import dataclass
from typing import Any

from opd.errors import EnvError
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
    unreadable: bool = False
    """The environment could not read the action."""


def reset(env: Any, goal: Task) -> Answer:
    """Begin an episode of a task. Raises whatever the environment raises, and BadAnswer for a broken contract."""
    since = time.perf_counter()
    with _close_on_error(env):
        said = env.reset(seed=goal.seed, options=_address(env, goal))
        seconds = time.perf_counter() - since
        with _blame_answer("reset", said, "(observation, info)"):
            observation, info = said
            return Answer(messages=messages_of(observation, info), **_read_info(info), seconds=seconds)


def step(env: Any, action: str) -> Answer:
    """Hand a completion's text over. Raises as `reset` does."""
    since = time.perf_counter()
    with _close_on_error(env):
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
                unreadable=_flag('info["unreadable"]', info.get("unreadable", False)),
                truncated=_flag("truncated", truncated)
                and not over,  # gymnasium's TimeLimit says both at its last step
            )


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
    return f"{reprlib.repr(value):.200}"


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
            f"{goal.id} is asked for, and the environment has {count} tasks in its {goal.split} split. Set "
            f"eval.tasks to {count} or less, or give it more"
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
    _check_text('info["feedback"] and info["privileged"]', [feedback or "", *privileged.values()])
    return {
        "feedback": feedback,
        "privileged": _copy('info["privileged"]', privileged),
        "tools": _copy('info["tools"]', tools),
        "success": None if info.get("success") is None else _flag('info["success"]', info["success"]),
        "rewards": _read_parts(info.get("rewards", {})),
    }


def _read_parts(rewards: Any) -> dict[str, float | None]:
    """Return the named parts of a reward, checked and copied. Raises BadAnswer."""
    if not isinstance(rewards, dict) or len(rewards) > MOST_PARTS:
        raise BadAnswer(f'info["rewards"] must be a dict of at most {MOST_PARTS} parts; got {_show(rewards)}')
    for name, value in rewards.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 100:
            raise BadAnswer(f'info["rewards"]: a name must be 1 to 100 printable characters; got {_show(name)}')
        if value is not None and (isinstance(value, str) or not abs(value) < MOST_REWARD):
            raise BadAnswer(f'info["rewards"][{name!r}] is {_show(value)}; it must be a finite number or None')
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
