"""Episodes: an engine samples, environments answer, and nobody's exception ends the run.

The scheduler plays any gymnasium environment with text observations and actions. Whatever an environment
does wrong (`opd.answers` sees it) becomes data: a trajectory with `failed` set, counted and never trained.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any

from opd import answers
from opd.answers import Answer
from opd.chat import ChatFormat, Prompt
from opd.config import RolloutConfig
from opd.engines.base import Completion, Request, RolloutEngine, Sampling
from opd.errors import ModelError
from opd.types import Message, Task, Trajectory, TrajectoryGroup, Turn
from opd.workers import Workers

logger = logging.getLogger(__name__)

EnvFactory = Callable[[], Any]
PromptRewrite = Callable[[list[Message], dict[str, str]], list[Message]]
"""What the acting model reads in place of the first messages, given the privileged texts."""

# Seeds of the splits lie in ranges of their own, so that no evaluation task is ever trained on by seed.
_SPLIT_BASE = {"train": 0, "eval": 1 << 29, "warm": 1 << 30}
_SPLIT_SIZE = 1 << 29


def derive_seed(*parts: object) -> int:
    """A 63-bit seed from anything printable; the same parts give the same seed on every machine."""
    return int.from_bytes(sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def task(index: int, *, split: str, run_seed: int = 0) -> Task:
    """The `index`-th task of a split. Evaluation tasks are the same for every `run_seed`."""
    offset = derive_seed("task", run_seed if split == "train" else 0, split, index) % _SPLIT_SIZE
    return Task(index=index, seed=_SPLIT_BASE[split] + offset, split=split)


@dataclass(slots=True)
class _Episode:
    """An episode on its way. Only the scheduler's own thread touches it."""

    number: int
    task: Task
    member: int
    env: Any = None
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
    success: bool | None = None
    terminated: bool = False
    truncated: bool = False
    failed: str | None = None
    policy_version: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"env": 0.0, "engine": 0.0})
    since: float = 0.0

    def trajectory(self) -> Trajectory:
        solved = self.success
        if solved is None:  # an environment that does not say: an episode that ended with a reward
            solved = self.terminated and math.fsum(turn.reward for turn in self.turns) > 0
        return Trajectory(
            task=self.task,
            member=self.member,
            turns=self.turns,
            tools=self.tools,
            privileged=self.privileged,
            success=solved and self.failed is None,
            terminated=self.terminated,
            truncated=self.truncated,
            failed=self.failed,
            policy_version=self.policy_version,
            seconds=self.seconds,
        )


class RolloutScheduler:
    """Runs episodes concurrently over one engine and a pool of environments.

    With `deterministic`, completions and environments wait for each other at every turn, so that who
    shares a batch depends on the seed alone; without, whoever has finished a turn goes on at once.
    """

    def __init__(
        self, engine: RolloutEngine, chat: ChatFormat, make_env: EnvFactory, config: RolloutConfig, *, max_turns: int
    ) -> None:
        self.engine = engine
        self.chat = chat
        self.config = config
        self.max_turns = max_turns
        self._make_env = make_env
        self._idle: list[Any] = []
        self._workers = Workers(config.workers, time_limit=config.step_timeout)

    def close(self) -> None:
        """Close the idle environments, each within the time limit of a step, and let the workers go."""
        closers = Workers(self.config.workers, time_limit=self.config.step_timeout)
        while self._idle:
            closers.start(len(self._idle), self._idle.pop().close)
        for _, answer in closers.finished(wait="all"):
            if isinstance(answer, BaseException):
                logger.warning("an environment could not be closed: %s: %s", type(answer).__name__, answer)
        closers.close()
        self._workers.close()

    def run(
        self,
        tasks: Sequence[Task],
        *,
        group_size: int,
        sampling: Sampling,
        seed: int,
        rewrite: PromptRewrite | None = None,
        on_finish: Callable[[Trajectory], None] = lambda _: None,
    ) -> list[TrajectoryGroup]:
        """Play every task `group_size` times; groups come back in the order of the tasks.

        `seed` names the round: a token's draw depends on it and on the task, the member and the turn.
        `rewrite` shows the acting model other first messages (a teacher that acts with its context).
        """
        copies = [(t, member) for t in tasks for member in range(group_size)]
        episodes = [_Episode(number=n, task=t, member=member) for n, (t, member) in enumerate(copies)]
        waiting = list(reversed(episodes))
        active: dict[int, _Episode] = {}
        sampled = 0  # completions in flight
        self.engine.begin(sampling, self.chat.stop_ids)
        with self._abandoned_on_error(active):
            while waiting or active:
                self._admit(waiting, active)
                for episode in self._answered(active, idle=sampled == 0):
                    if self._ask(episode, seed, rewrite):
                        sampled += 1
                    else:
                        self._retire(active.pop(episode.number))
                        on_finish(episode.trajectory())
                for completion in self._completions(sampled):
                    sampled -= 1
                    self._record(active[completion.session], completion)
        groups = [episodes[i : i + group_size] for i in range(0, len(episodes), group_size)]
        return [
            TrajectoryGroup(task=t, trajectories=[e.trajectory() for e in group])
            for t, group in zip(tasks, groups, strict=True)
        ]

    @contextmanager
    def _abandoned_on_error(self, active: dict[int, _Episode]) -> Iterator[None]:
        """Leave nothing behind (Ctrl-C, say) that the next round would take for its own."""
        try:
            yield
        except BaseException:
            self._workers.forget()
            for number in active:
                self.engine.release(number)
            raise

    def _admit(self, waiting: list[_Episode], active: dict[int, _Episode]) -> None:
        if self.config.deterministic and active:
            return  # the next wave starts when this one is over
        while waiting and len(active) < self.config.concurrency:
            episode = waiting.pop()
            active[episode.number] = episode
            self._workers.start(episode.number, partial(self._begin, episode.task))

    def _answered(self, active: dict[int, _Episode], *, idle: bool) -> list[_Episode]:
        """Episodes that their environment has answered, or that it lost, in the order of their number."""
        wait = "all" if self.config.deterministic else "any" if idle else "none"
        answers = sorted(self._workers.finished(wait=wait), key=lambda pair: pair[0])
        for number, answer in answers:
            _apply(active[number], answer)
        return [active[number] for number, _ in answers]

    def _completions(self, in_flight: int) -> list[Completion]:
        done = self.engine.step() if in_flight else []
        while self.config.deterministic and len(done) < in_flight:
            done += self.engine.step()
        return sorted(done, key=lambda completion: completion.session)

    def _begin(self, goal: Task) -> Answer:
        """On a worker's thread: a reset of an idle environment, or of a new one."""
        try:
            env = self._idle.pop()
        except IndexError:  # several threads may reach for the last one
            env = self._make_env()
        return answers.reset(env, goal)

    def _ask(self, episode: _Episode, seed: int, rewrite: PromptRewrite | None) -> bool:
        """Ask the engine for the next completion; False if the episode is over or a limit ends it."""
        if episode.terminated or episode.truncated or episode.failed is not None:
            return False
        if rewrite is not None and not episode.turns:
            episode.fresh = rewrite(episode.fresh, episode.privileged)
        try:
            episode.prompt = self._prompt(episode)
        except ModelError as error:  # roles in an order that the template refuses, say
            episode.failed = f"prompt of turn {len(episode.turns)}: {error}"[:500]
            return False
        sequence = [] if episode.prompt.forked else episode.token_ids
        episode.token_ids = sequence + episode.prompt.token_ids
        room = self.config.max_length - len(episode.token_ids)
        if len(episode.turns) >= self.max_turns or room < 1:
            episode.truncated = True
            return False
        episode.since = time.perf_counter()
        self.engine.submit(
            Request(
                session=episode.number,
                prompt_ids=episode.token_ids,
                seed=derive_seed(seed, episode.task.id, episode.member, len(episode.turns)),
                max_tokens=min(self.config.max_tokens, room),
            )
        )
        return True

    def _prompt(self, episode: _Episode) -> Prompt:
        if not episode.turns:
            return Prompt(self.chat.start(episode.fresh, episode.tools))
        last = episode.turns[-1].completion_ids[-1]
        return self.chat.extend(episode.history, episode.fresh, episode.tools, last_id=last)

    def _record(self, episode: _Episode, completion: Completion) -> None:
        """Append the sampled turn and hand its text to the environment."""
        episode.seconds["engine"] += time.perf_counter() - episode.since
        text = self.chat.text(completion.token_ids)
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
        episode.history = [*conversation, {"role": "assistant", "content": text}]
        episode.policy_version = completion.policy_version
        self._workers.start(episode.number, partial(answers.step, episode.env, text))

    def _retire(self, episode: _Episode) -> None:
        self.engine.release(episode.number)
        # An environment that broke, or may still be at work on a lost thread, is not used again.
        if episode.env is not None and episode.failed is None:
            self._idle.append(episode.env)
        episode.env = None


def _apply(episode: _Episode, answer: Answer | BaseException) -> None:
    """Write an environment's answer, or its failure, into the episode."""
    if isinstance(answer, BaseException):
        stage = f"step {len(episode.turns)}" if episode.turns else "reset"
        episode.failed = f"{stage}: {type(answer).__name__}: {answer}"[:500]
        return
    episode.env = answer.env
    episode.fresh = answer.messages
    episode.seconds["env"] += answer.seconds
    episode.terminated, episode.truncated = answer.terminated, answer.truncated
    episode.privileged = {**episode.privileged, **answer.privileged}
    if answer.success is not None:
        episode.success = answer.success
    if episode.turns:
        last = episode.turns[-1]
        episode.turns[-1] = replace(last, reward=answer.reward, feedback=answer.feedback, rewards=answer.rewards)
    else:
        episode.tools = answer.tools
