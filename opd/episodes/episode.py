"""Follows one episode: its state, how a turn of it is taken, and how it ends.

When each of this happens is for `opd.episodes.scheduler` to say, on whose thread alone an episode changes. Nothing here
waits or calls anybody: requests come out, completions (`add_turn`) and answers of environments (`take_answer`) go in.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from opd.engines.base import Completion, Request
from opd.episodes.answers import Answer
from opd.episodes.config import RolloutConfig
from opd.episodes.faults import MOST_CHARACTERS, explain
from opd.episodes.tasks import derive_seed
from opd.errors import ModelError
from opd.models.chat import ChatFormat, Prompt
from opd.types import End, Fault, Message, StopReason, Task, Trajectory, Turn

PromptRewrite = Callable[[list[Message], dict[str, str]], list[Message]]
"""What the acting model reads in place of the first messages, given the privileged texts."""
Opening = Callable[[Task, list[Message], list[dict[str, Any]] | None], list[int]]
"""The first prompt of an episode in token ids, from its task, its first messages and its tools."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Holds what the episodes of one round have in common."""

    chat: ChatFormat
    config: RolloutConfig
    max_turns: int
    seed: int
    """Names the round in the draws."""
    rewrite: PromptRewrite | None
    opening: Opening | None
    """None: the chat format begins a conversation with the first messages."""
    stopped: Callable[[], bool] = lambda: False
    """True: the round is to be left."""


@dataclass(slots=True)
class Episode:
    """Holds the state of an episode that is being played, or that waits for its first turn."""

    number: int
    """Its place in the round; the engine's session, and the environment's key."""
    task: Task
    member: int
    attempt: int = 0
    """How often it was tried before."""
    turns: list[Turn] = field(default_factory=list)
    history: list[Message] = field(default_factory=list)
    """The conversation up to and with the last completion."""
    fresh: list[Message] = field(default_factory=list)
    """What the environment has added since; the next completion answers it."""
    token_ids: list[int] = field(default_factory=list)
    """The running sequence as the engine sees it; begins anew when the conversation forks."""
    prompt: Prompt = field(default_factory=lambda: Prompt([]))
    tools: list[dict[str, Any]] | None = None
    privileged: dict[str, str] = field(default_factory=dict)
    unscored: bool = False
    ungraded: list[str] = field(default_factory=list)
    handed: Any = None
    """What its environment wants to know of it once its group is scored; None: its reward is whole."""
    metrics: dict[str, float] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    success: bool | None = None
    """None where the environment has not said."""
    cut: End | None = None
    """How the episode ends should the environment end it now: the last completion was cut, and by what."""
    end: End | None = None
    """None while it goes on."""
    failed: str | None = None
    fault: Fault | None = None
    broken: bool = False
    """The environment raised or did not answer: it is not used again."""
    policy_version: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"env": 0.0, "engine": 0.0})
    until: float = math.inf
    """When `episode_timeout` ends it."""
    waits_for: Literal["env", "engine"] = "env"
    since: float = 0.0
    """Since when it waits for that."""

    @property
    def over(self) -> bool:
        return self.end is not None

    @property
    def out_of_time(self) -> bool:
        return time.perf_counter() > self.until

    @property
    def stage(self) -> str:
        """Name the call of the environment that is under way, or was the last."""
        return f"step {len(self.turns)}" if self.turns else "reset"

    def wait_for(self, what: Literal["env", "engine"]) -> None:
        self.waits_for, self.since = what, time.perf_counter()

    def fail(self, fault: Fault, stage: str, reason: str) -> None:
        self.end, self.failed, self.fault = End.BROKEN, f"{stage}: {reason}"[:MOST_CHARACTERS], fault

    def again(self) -> Episode:
        """Return the same episode from the start: the same task, the same draws."""
        return Episode(number=self.number, task=self.task, member=self.member, attempt=self.attempt + 1)

    def trajectory(self) -> Trajectory:
        """Return the finished episode. One whose environment does not say was solved if it ended with a reward."""
        assert self.end is not None
        solved = self.success
        if solved is None:
            solved = self.end.terminated and math.fsum(turn.reward for turn in self.turns) > 0
        return Trajectory(
            task=self.task,
            member=self.member,
            turns=self.turns,
            end=self.end,
            tools=self.tools,
            privileged=self.privileged,
            success=solved and self.failed is None,
            unscored=self.unscored,
            ungraded=self.ungraded,
            metrics=self.metrics,
            notes=self.notes,
            failed=self.failed,
            fault=self.fault,
            policy_version=self.policy_version,
            seconds=self.seconds,
        )


def next_request(episode: Episode, shared: Round) -> Request | None:
    """Return what to ask the engine for, the episode's next completion; None if it is over or a limit ends it."""
    if episode.over:
        return None
    if shared.rewrite is not None and not episode.turns:
        episode.fresh = shared.rewrite(episode.fresh, episode.privileged)
    try:
        episode.prompt = _next_prompt(episode, shared)
    except ModelError as error:  # roles in an order that the template refuses, say
        episode.fail(Fault.INVALID, f"prompt of turn {len(episode.turns)}", str(error))
        return None
    sequence = [] if episode.prompt.forked else episode.token_ids
    episode.token_ids = sequence + episode.prompt.token_ids
    room = shared.config.max_length - len(episode.token_ids)
    episode.end = _limit_reached(episode, shared.max_turns, room)
    if episode.end is not None:
        return None
    return Request(
        session=episode.number,
        prompt_ids=episode.token_ids,
        seed=derive_seed(shared.seed, episode.task.id, episode.member, len(episode.turns)),
        max_tokens=min(shared.config.max_tokens, room),
    )


def _next_prompt(episode: Episode, shared: Round) -> Prompt:
    """Return the ids of what was said since the last completion. Raises ModelError where the template refuses it."""
    chat = shared.chat
    if episode.turns:
        last = episode.turns[-1].completion_ids[-1]
        return chat.extend(episode.history, episode.fresh, episode.tools, last_id=last)
    if shared.opening is not None:
        return Prompt(shared.opening(episode.task, episode.fresh, episode.tools))
    return Prompt(chat.start(episode.fresh, episode.tools))


def _limit_reached(episode: Episode, max_turns: int, room: int) -> End | None:
    """Name the limit that keeps an episode from its next turn; the turns' first, since more room would not help."""
    if len(episode.turns) >= max_turns:
        return End.MAX_TURNS
    if room < 1:
        return End.CONTEXT_FULL
    return End.TIME if episode.out_of_time else None


def add_turn(episode: Episode, completion: Completion, shared: Round) -> str:
    """Append the turn that was sampled; return what the environment acts on."""
    episode.seconds["engine"] += time.perf_counter() - episode.since
    text = shared.chat.text(completion.token_ids)
    conversation = [*episode.history, *episode.fresh]
    episode.turns.append(
        Turn(
            prompt_ids=episode.prompt.token_ids,
            completion_ids=completion.token_ids,
            logprobs=completion.logprobs,
            stop_reason=completion.stop_reason,
            messages=conversation if episode.prompt.forked else episode.fresh,
            text=text,
            forked=episode.prompt.forked,
        )
    )
    episode.token_ids = episode.token_ids + completion.token_ids
    full = len(episode.token_ids) >= shared.config.max_length
    cut = End.CONTEXT_CUT if full else End.COMPLETION_CUT
    episode.cut = cut if completion.stop_reason is StopReason.LENGTH else None
    episode.history = [*conversation, {"role": "assistant", "content": text}]
    episode.policy_version = completion.policy_version
    return shared.chat.action(text)


def take_answer(episode: Episode, answer: Answer | BaseException) -> None:
    """Write an environment's answer, or its failure, into the episode."""
    if isinstance(answer, BaseException):
        _take_failure(episode, answer)
        return
    episode.fresh = answer.messages
    episode.seconds["env"] += answer.seconds
    if answer.terminated:
        episode.end = episode.cut or (End.UNREADABLE if answer.unreadable else End.FINISHED)
    elif answer.truncated:
        episode.end = End.ENVIRONMENT_LIMIT
    episode.privileged = {**episode.privileged, **answer.privileged}
    if answer.success is not None:
        episode.success = answer.success
    episode.unscored, episode.handed = answer.unscored, answer.member
    episode.ungraded = episode.ungraded + answer.ungraded
    episode.metrics, episode.notes = {**episode.metrics, **answer.metrics}, {**episode.notes, **answer.notes}
    if episode.turns:
        last = episode.turns[-1]
        episode.turns[-1] = replace(
            last,
            reward=answer.reward,
            feedback=answer.feedback,
            rewards=answer.rewards,
            unreadable=answer.unreadable,
        )
    else:
        episode.tools = answer.tools


def _take_failure(episode: Episode, error: BaseException) -> None:
    episode.broken = True
    if isinstance(error, TimeoutError) and episode.out_of_time:
        episode.end = End.TIME  # a limit of ours, and no fault of the environment
        return
    fault, reason = explain(error)
    episode.fail(fault, episode.stage, reason)
