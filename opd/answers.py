"""What an environment says, checked: the only place where one is called.

The contract is in `docs/environments.md`. Whatever breaks it becomes an exception here, on a worker's thread,
and data in `opd.rollout`; what comes through is plain text and numbers that the environment cannot change later.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from opd.errors import EnvError
from opd.types import Message, Task

MOST_CHARACTERS = 1_000_000
"""What one answer of an environment may hold; a longer one is a fault that would stall everybody's tokenizer."""
MOST_REWARD = 1e30
"""The size of a reward beyond which sums and float32 overflow."""
MOST_PARTS = 64
"""How many named parts a reward may have: each becomes a metric of the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an environment said to a reset or a step, checked and copied."""

    env: Any
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


def reset(env: Any, goal: Task) -> Answer:
    """Begin an episode of a task. Raises whatever the environment raises, and EnvError for a broken contract."""
    since = time.perf_counter()
    with _closed_on_error(env):
        observation, info = env.reset(seed=goal.seed, options=_address(env, goal))
        return Answer(
            env=env,
            messages=messages_of(observation, info),
            **_told(info),
            seconds=time.perf_counter() - since,
        )


def step(env: Any, action: str) -> Answer:
    """Hand a completion's text over. Raises as `reset` does."""
    since = time.perf_counter()
    with _closed_on_error(env):
        observation, reward, terminated, truncated, info = env.step(action)
        if not abs(reward) < MOST_REWARD:  # a nan is not smaller either
            raise EnvError(f"the reward is {reward}")
        return Answer(
            env=env,
            messages=messages_of(observation, info),
            **_told(info),
            seconds=time.perf_counter() - since,
            reward=float(reward),
            terminated=bool(terminated),
            truncated=bool(truncated),
        )


def _address(env: Any, goal: Task) -> dict[str, Any] | None:
    """The options of a reset: which task, for an environment whose tasks are numbered."""
    tasks = (env.metadata or {}).get("tasks")
    if tasks is None:
        return None
    # Training goes through a table again and again; an evaluation that did so would count a task twice.
    count = tasks.get(goal.split) if goal.split == "train" else None
    return {"split": goal.split, "index": goal.index if count is None else goal.index % count}


@contextmanager
def _closed_on_error(env: Any) -> Iterator[None]:
    """An environment that broke is not used again; what it holds (a process, a sandbox) must not stay."""
    try:
        yield
    except BaseException:
        with suppress(Exception):  # the first error says what went wrong
            env.close()
        raise


def messages_of(observation: Any, info: dict[str, Any]) -> list[Message]:
    """The messages of an observation, copied; raises EnvError where they are not text."""
    messages = info.get("messages")
    if messages is None:
        messages = [{"role": "user", "content": observation}]
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str) or "role" not in message:
            raise EnvError(
                'an observation must be a str, or info["messages"] a list of {"role", "content"}; '
                f"got {message!r:.200}"
            )
    _check_text("an observation", [message["content"] for message in messages])
    return copy.deepcopy(list(messages))


def _told(info: dict[str, Any]) -> dict[str, Any]:
    """What the rest of an environment's info says, checked and copied; raises EnvError."""
    feedback, privileged, tools = info.get("feedback"), info.get("privileged", {}), info.get("tools")
    if not isinstance(feedback, str | None):
        raise EnvError(f'info["feedback"] is {type(feedback).__name__}; it must be a str')
    if not isinstance(privileged, dict) or not all(isinstance(x, str) for pair in privileged.items() for x in pair):
        raise EnvError(f'info["privileged"] must be a dict of str to str; got {privileged!r:.200}')
    if tools is not None and not (isinstance(tools, list) and all(map(_is_tool, tools))):
        raise EnvError(f'info["tools"] must be a list of {{"type", "function": {{...}}}} schemas; got {tools!r:.200}')
    _check_text('info["feedback"] and info["privileged"]', [feedback or "", *privileged.values()])
    return {
        "feedback": feedback,
        "privileged": dict(privileged),
        "tools": json.loads(json.dumps(tools)),
        "success": bool(info["success"]) if "success" in info else None,
        "rewards": _parts(info.get("rewards", {})),
    }


def _parts(rewards: Any) -> dict[str, float | None]:
    """The named parts of a reward, checked and copied; raises EnvError."""
    if not isinstance(rewards, dict) or len(rewards) > MOST_PARTS:
        raise EnvError(f'info["rewards"] must be a dict of at most {MOST_PARTS} parts; got {rewards!r:.200}')
    for name, value in rewards.items():
        if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 100:
            raise EnvError(f'info["rewards"]: a name must be 1 to 100 printable characters; got {name!r:.200}')
        if value is not None and (isinstance(value, str) or not abs(value) < MOST_REWARD):
            raise EnvError(f'info["rewards"][{name!r}] is {value!r:.200}; it must be a finite number or None')
    return {name: None if value is None else float(value) for name, value in rewards.items()}


def _is_tool(schema: Any) -> bool:
    return isinstance(schema, dict) and isinstance(schema.get("function"), dict)


def _check_text(what: str, texts: Sequence[str]) -> None:
    if (size := sum(map(len, texts))) > MOST_CHARACTERS:
        raise EnvError(f"{what}: {size:,} characters; at most {MOST_CHARACTERS:,} are taken. Cut long results")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise EnvError(f"{what} holds a lone surrogate ({error.object[error.start]!a}), which is no text") from None
