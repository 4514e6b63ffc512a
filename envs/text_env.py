"""Defines the text environment: what the trainer reads from any `gymnasium.Env`, and a base class that writes it.

The contract (docs/environments.md shows it by example):

    obs, info = env.reset(seed=..., options={"split": "train", "index": 0})
    obs, reward, terminated, truncated, info = env.step(action)

`obs` is the next user message. The action is the decoded completion without its end-of-turn token, tool
markup kept. A trajectory's reward is the sum of the rewards of its steps. `info` may hold:

    messages    list of chat messages to append in place of the user message `obs` (a tool's result, say);
                at reset the first may be a system message
    tools       at reset: JSON schemas of the tools, in the form {"type": "function", "function": {...}}
    privileged  at reset: dict of str to str, what only a teacher may see; never part of obs or messages
    feedback    at a step: str, what the environment says about a failure
    success     at a step: bool, whether the task is solved
    unreadable  at a step: bool, whether the action could not be read (no tool call, no move of the game); logged only
    unscored    at the last step: bool, whether nothing could tell what the episode is worth; it is then compared with
                no other, and its reward of 0 stands for nothing
    member      at the last step: what `score_group` needs to know of the episode, where rewards compare a group
    metrics     at a step: dict of str to numbers, logged as `reward/logged/NAME`
    notes       at a step: dict of str to plain data, written beside the episode
    rewards     at a step: dict of str to float, the parts that the reward is made of, by name; logged only, the
                reward counts. None stands for a part that could not tell

The same seed gives the same task. An environment that knows splits says how many tasks each has in
`metadata["tasks"]` (`{"train": 7473, "eval": None}`; None is unlimited); only then does the trainer pass
`options`. Splits are disjoint as tasks, not only as seeds.

Here is the base class that keeps this contract for a subclass that answers two questions: how does an
episode start, and what does the environment reply to an action. A plain `gymnasium.Env` does as well.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np

from opd.envs.spaces import TextSpace, clean, without_addresses
from opd.errors import EnvError
from opd.grading import Trainer
from opd.types import Message

SPLITS = ("train", "eval", "warm")
"""The splits to train on, to hold out, and to show a warm start. No task is in two of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Describes how an episode begins."""

    prompt: str | list[Message]
    """The user message, or whole messages with roles."""
    system: str | None = None
    """A system message to put before the prompt."""
    privileged: dict[str, str] = field(default_factory=dict)
    """What only a teacher may see, by name (`solution`, `plan`, ...)."""

    @property
    def messages(self) -> list[Message]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        rest = [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt
        return [*first, *rest]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Describes what the environment does with one action."""

    messages: list[Message] = field(default_factory=list)
    """What the model reads next; empty when the episode ends without a word."""
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    """True if a limit of the environment's own ended the episode, which is no verdict on it."""
    success: bool = False
    unreadable: bool = False
    """The action could not be read: no call in the tool format, no move of the game. For the logs."""
    feedback: str | None = None
    """What to say about a failure; a teacher may be shown it, the student reads `messages` only."""
    rewards: dict[str, float | None] = field(default_factory=dict)
    """The parts that the reward is made of, by name, for the logs; None where a part abstained."""

    unscored: bool = False
    """Nothing could tell what the episode is worth: it is compared with no other."""
    member: Any = None
    """What `score_group` needs to know of the episode; its reward is then not whole. None: it is."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Numbers for the logs."""
    notes: dict[str, Any] = field(default_factory=dict)
    """Plain data to write beside the episode."""


class TextEnv(gymnasium.Env[str, str], ABC):
    """Is a gymnasium environment of text. Subclasses define `start` and `respond`, and call `super().__init__()`.

    Args:
        max_steps: truncate an episode after this many steps, for use without a trainer, which has its own limit.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (gymnasium's own declaration)

    def __init__(self, *, max_steps: int | None = None) -> None:
        self.observation_space = TextSpace()
        self.action_space = TextSpace()
        self.max_steps = max_steps
        self._steps = 0
        self._running = False
        self.trainer: Trainer | None = None

    def trained_by(self, trainer: Trainer) -> None:
        """Take note of the trainer that plays: it has `score_group` called. For the trainer, before each reset."""
        self.trainer = trainer

    def score_group(self, members: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[Reply]:
        """Return the whole reward of each member of a group, as one reply; for rewards that compare them.

        `members` are what the last steps of the group's episodes handed out, from this environment or others of its
        kind, and `ids` the tokens of their completions. Raises EnvError where nothing was handed out.
        """
        raise EnvError(f"{type(self).__name__} hands out members, and has no score_group")

    @abstractmethod
    def start(self, rng: np.random.Generator, split: str, index: int | None) -> Start:
        """Begin a task of `split`, drawn with `rng` alone.

        `index` numbers the tasks of a split from 0, for environments whose tasks are a list; it is None when
        the caller asked for no particular one.
        """

    @abstractmethod
    def respond(self, action: str) -> Reply:
        """React to the model's text."""

    def tool_schemas(self) -> list[dict[str, Any]]:
        """Return the JSON schemas of the tools that the model may call."""
        return []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """Start an episode. Options: `split` (default train) and `index`.

        Raises EnvError when an option is unknown, or a split is none of this environment's.
        """
        super().reset(seed=seed)
        split, index = self._address(options or {})
        start = self.start(self.np_random, split, index)
        self._running, self._steps = True, 0
        info: dict[str, Any] = {"privileged": {name: _plain(text) for name, text in start.privileged.items()}}
        if tools := self.tool_schemas():
            info["tools"] = tools
        return _to_observation(start.messages, info), info

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Pass the model's text on. Raises EnvError when no episode is running."""
        if not self._running:
            raise EnvError(f"{type(self).__name__}.step was called with no episode running; call reset first")
        reply = self.respond(action)
        self._steps += 1
        truncated = not reply.terminated and (reply.truncated or self._steps == self.max_steps)
        self._running = not (reply.terminated or truncated)
        info: dict[str, Any] = {"success": reply.success}
        if reply.unreadable:
            info["unreadable"] = True
        if reply.feedback is not None:
            info["feedback"] = _plain(reply.feedback)
        if reply.unscored:
            info["unscored"] = True
        if reply.member is not None:
            info["member"] = reply.member
        for name in ("rewards", "metrics", "notes"):
            if told := getattr(reply, name):
                info[name] = dict(told)
        return _to_observation(reply.messages, info), float(reply.reward), reply.terminated, truncated, info

    def _address(self, options: dict[str, Any]) -> tuple[str, int | None]:
        unknown = sorted(set(options) - {"split", "index"})
        if unknown:
            raise EnvError(f"{type(self).__name__}.reset: unknown options {unknown}; allowed: index, split")
        split = options.get("split", "train")
        known = self.metadata.get("tasks", {"train": None})
        if split not in known:
            raise EnvError(f"{type(self).__name__}.reset: there is no split {split!r}; there are: {', '.join(known)}")
        return split, options.get("index")


def _to_observation(messages: Sequence[Message], info: dict[str, Any]) -> str:
    """Return the messages as an observation. They go into `info` too, unless they are just one user message."""
    cleaned = [{**message, "content": _plain(message["content"])} for message in messages]
    if len(cleaned) != 1 or cleaned[0]["role"] != "user":
        info["messages"] = cleaned
    return "\n".join(message["content"] for message in cleaned if message["role"] != "system")


def _plain(text: str) -> str:
    """Return a text that any tokenizer takes, and that is the same in every run."""
    return without_addresses(clean(text))


def task_split(*key: object, held_out: float = 0.2, warm: float = 0.2) -> str:
    """Return the split that a task belongs to, from what makes it this task (its operands, its names).

    A stable hash decides, so a task is in one split whatever seed draws it, on any machine. `held_out` and
    `warm` are the shares of the eval and the warm split. Raises TypeError for a key that JSON does not know: the
    `repr` of numpy's integers, say, is not that of Python's.
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") / 2**64
    if share < held_out:
        return "eval"
    return "warm" if share < held_out + warm else "train"
