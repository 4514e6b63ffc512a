"""Episodes: an engine samples, environments answer, and nobody's exception ends the run.

The scheduler plays any gymnasium environment with text observations and actions. Whatever an environment
does wrong (`opd.episodes.answers` sees it) becomes data: a trajectory with `failed` set, counted and never trained.
What then becomes of it and its group is `rollout.on_failure`'s to say. `docs/rollouts.md` explains the whole.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from typing import Any, Literal

from opd.engines.base import Completion, Request, RolloutEngine, Sampling
from opd.episodes.answers import Answer
from opd.episodes.config import RolloutConfig
from opd.episodes.faults import MOST_CHARACTERS, explain
from opd.episodes.hosts import Host, Local
from opd.episodes.processes import Processes, Remote
from opd.episodes.watchdog import Watchdog
from opd.episodes.workers import Limits, Workers
from opd.errors import ModelError
from opd.models.chat import ChatFormat, Prompt
from opd.types import End, Fault, Message, StopReason, Task, Trajectory, TrajectoryGroup, Turn

logger = logging.getLogger(__name__)

EnvFactory = Callable[[], Any]
PromptRewrite = Callable[[list[Message], dict[str, str]], list[Message]]
"""What the acting model reads in place of the first messages, given the privileged texts."""
Opening = Callable[[Task, list[Message], list[dict[str, Any]] | None], list[int]]
"""The first prompt of an episode in token ids, from its task, its first messages and its tools."""

_Limit = Literal["reset_timeout", "step_timeout"]

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
    """An episode on its way. Only the scheduler's own thread changes it."""

    number: int
    task: Task
    member: int
    attempt: int = 0
    """How often it was tried before."""
    host: Host | None = None
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
        return f"step {len(self.turns)}" if self.turns else "reset"

    def wait_for(self, what: Literal["env", "engine"]) -> None:
        self.waits_for, self.since = what, time.perf_counter()

    def fail(self, fault: Fault, stage: str, reason: str) -> None:
        self.end, self.failed, self.fault = End.BROKEN, f"{stage}: {reason}"[:MOST_CHARACTERS], fault

    def again(self) -> _Episode:
        """The same episode from the start: the same task, the same draws."""
        return _Episode(number=self.number, task=self.task, member=self.member, attempt=self.attempt + 1)

    def trajectory(self) -> Trajectory:
        assert self.end is not None
        solved = self.success
        if solved is None:  # an environment that does not say: an episode that ended with a reward
            solved = self.end.terminated and math.fsum(turn.reward for turn in self.turns) > 0
        return Trajectory(
            task=self.task,
            member=self.member,
            turns=self.turns,
            end=self.end,
            tools=self.tools,
            privileged=self.privileged,
            success=solved and self.failed is None,
            failed=self.failed,
            fault=self.fault,
            policy_version=self.policy_version,
            seconds=self.seconds,
        )


class RolloutScheduler:
    """Runs episodes concurrently over one engine and a pool of environments.

    With `deterministic`, completions and environments wait for each other at every turn, so that who
    shares a batch depends on the seed alone; without, whoever has finished a turn goes on at once.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        chat: ChatFormat,
        make_env: EnvFactory,
        config: RolloutConfig,
        *,
        max_turns: int,
        workers: Literal["threads", "processes"] = "threads",
        preload: Sequence[str] = (),
    ) -> None:
        """`workers` says where environments live; `preload` names the modules that their processes share.

        Raises ConfigError when `make_env` cannot be sent to a process.
        """
        self.engine = engine
        self.chat = chat
        self.config = config
        self.max_turns = max_turns
        self._processes = Processes(make_env, preload=preload) if workers == "processes" else None
        self._make_env = make_env
        self._idle: list[Host] = []
        self._workers = Workers(min(config.workers, config.concurrency))

    def close(self) -> None:
        """Close the idle environments, each within the time limit of a step, and let the workers go."""
        closers = Workers(min(self.config.workers, max(1, len(self._idle))))
        for number, host in enumerate(self._idle):
            closers.start(number, host.close, limits=self._limits("step_timeout"), give_up=host.kill)
        self._idle.clear()
        for _, answer in closers.finished(wait="all"):
            if isinstance(answer, BaseException):
                logger.warning("an environment could not be closed: %s", explain(answer)[1])
        closers.close()
        self._workers.close()
        if self._processes is not None:
            self._processes.close()

    def run(
        self,
        tasks: Sequence[Task],
        *,
        group_size: int,
        sampling: Sampling,
        seed: int,
        rewrite: PromptRewrite | None = None,
        opening: Opening | None = None,
        on_finish: Callable[[Trajectory], None] = lambda _: None,
    ) -> list[TrajectoryGroup]:
        """Play every task `group_size` times; groups come back in the order of the tasks.

        `seed` names the round: a token's draw depends on it and on the task, the member and the turn.
        `rewrite` shows the acting model other first messages (a teacher that acts with its context); `opening` gives
        the first prompt itself, for what differs from task to task or no message can say.
        """
        copies = [(t, member) for t in tasks for member in range(group_size)]
        waiting = deque(_Episode(number=n, task=t, member=member) for n, (t, member) in enumerate(copies))
        active: dict[int, _Episode] = {}
        ended: list[list[Trajectory]] = [[] for _ in copies]  # every attempt at each
        sampled = 0  # completions in flight
        self.engine.begin(sampling, self.chat.stop_ids)
        dog = Watchdog(self.config.stall_warning, lambda: self._waited_for(list(active.values()), len(waiting)))
        with self._abandoned_on_error(active), dog:
            while waiting or active:
                self._admit(waiting, active)
                for episode in self._answered(active, idle=sampled == 0):
                    dog.progress()
                    if self._ask(episode, seed, rewrite, opening):
                        sampled += 1
                        continue
                    self._retire(active.pop(episode.number))
                    ended[episode.number].append(episode.trajectory())
                    if not self._retry(episode, waiting):
                        on_finish(ended[episode.number][-1])
                for completion in self._completions(sampled):
                    dog.progress()
                    sampled -= 1
                    self._record(active[completion.session], completion)
        _report_failures(ended)
        return [
            self._group(t, ended[i : i + group_size])
            for t, i in zip(tasks, range(0, len(copies), group_size), strict=True)
        ]

    @contextmanager
    def _abandoned_on_error(self, active: dict[int, _Episode]) -> Iterator[None]:
        """Leave nothing behind (Ctrl-C, say) that the next round would take for its own."""
        try:
            yield
        except BaseException:
            self._workers.forget()
            for number, episode in active.items():
                self.engine.release(number)
                if episode.host is not None:
                    episode.host.kill()
            raise

    def _admit(self, waiting: deque[_Episode], active: dict[int, _Episode]) -> None:
        """Start episodes while there is room. Deterministic ones come in waves, and a wave never mixes attempts:
        whom an episode that is played again would join, would share its batch with another."""
        if self.config.deterministic and active:
            return  # the next wave starts when this one is over
        wave = waiting[0].attempt if waiting else 0
        while waiting and len(active) < self.config.concurrency:
            if self.config.deterministic and waiting[0].attempt != wave:
                return
            episode = waiting.popleft()
            active[episode.number] = episode
            if self.config.episode_timeout is not None:
                episode.until = time.perf_counter() + self.config.episode_timeout
            episode.host = self._host(fresh=episode.attempt > 0)
            self._call(episode, partial(episode.host.reset, episode.task), "reset_timeout")

    def _host(self, *, fresh: bool) -> Host:
        if self._idle and not fresh:
            return self._idle.pop()
        return Local(self._make_env) if self._processes is None else Remote(self._processes)

    def _call(self, episode: _Episode, call: Callable[[], Answer], limit: _Limit) -> None:
        """Have a worker call the environment, within that limit and until the episode's own end."""
        assert episode.host is not None
        episode.wait_for("env")
        limits = self._limits(limit)
        if (left := max(0.0, episode.until - episode.since)) < limits.call:
            limits = replace(limits, call=left, name="rollout.episode_timeout")
        self._workers.start(episode.number, call, limits=limits, give_up=episode.host.kill)

    def _limits(self, name: _Limit) -> Limits:
        config = self.config
        return Limits(call=getattr(config, name), grading=config.grading_timeout, name=f"rollout.{name}")

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

    def _ask(self, episode: _Episode, seed: int, rewrite: PromptRewrite | None, opening: Opening | None) -> bool:
        """Ask the engine for the next completion; False if the episode is over or a limit ends it."""
        if episode.over:
            return False
        if rewrite is not None and not episode.turns:
            episode.fresh = rewrite(episode.fresh, episode.privileged)
        try:
            episode.prompt = self._prompt(episode, opening or self._start)
        except ModelError as error:  # roles in an order that the template refuses, say
            episode.fail(Fault.INVALID, f"prompt of turn {len(episode.turns)}", str(error))
            return False
        sequence = [] if episode.prompt.forked else episode.token_ids
        episode.token_ids = sequence + episode.prompt.token_ids
        room = self.config.max_length - len(episode.token_ids)
        episode.end = self._limit_reached(episode, room)
        if episode.end is not None:
            return False
        episode.wait_for("engine")
        self.engine.submit(
            Request(
                session=episode.number,
                prompt_ids=episode.token_ids,
                seed=derive_seed(seed, episode.task.id, episode.member, len(episode.turns)),
                max_tokens=min(self.config.max_tokens, room),
            )
        )
        return True

    def _limit_reached(self, episode: _Episode, room: int) -> End | None:
        """The limit that keeps an episode from its next turn; the turns' first, since more room would not help."""
        if len(episode.turns) >= self.max_turns:
            return End.MAX_TURNS
        if room < 1:
            return End.CONTEXT_FULL
        return End.TIME if episode.out_of_time else None

    def _start(self, _: Task, messages: list[Message], tools: list[dict[str, Any]] | None) -> list[int]:
        return self.chat.start(messages, tools)

    def _prompt(self, episode: _Episode, opening: Opening) -> Prompt:
        if not episode.turns:
            return Prompt(opening(episode.task, episode.fresh, episode.tools))
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
        full = len(episode.token_ids) >= self.config.max_length
        cut = End.CONTEXT_CUT if full else End.COMPLETION_CUT
        episode.cut = cut if completion.stop_reason is StopReason.LENGTH else None
        episode.history = [*conversation, {"role": "assistant", "content": text}]
        episode.policy_version = completion.policy_version
        assert episode.host is not None
        self._call(episode, partial(episode.host.step, text), "step_timeout")

    def _retire(self, episode: _Episode) -> None:
        self.engine.release(episode.number)
        assert episode.host is not None
        if episode.broken or episode.failed is not None:  # or may still be at work on a lost thread
            episode.host.kill()
        else:
            self._idle.append(episode.host)
        episode.host = None

    def _retry(self, episode: _Episode, waiting: deque[_Episode]) -> bool:
        """Queue a failed episode once more, where the policy says so."""
        if episode.failed is None or self.config.on_failure != "retry" or episode.attempt >= self.config.retries:
            return False
        waiting.appendleft(episode.again())  # its group waits for it already
        return True

    def _group(self, goal: Task, members: list[list[Trajectory]]) -> TrajectoryGroup:
        """The last attempt of each member; whether the others may train without those that failed."""
        last = [attempts[-1] for attempts in members]
        alive = sum(t.failed is None for t in last)
        least = len(last) if self.config.on_failure == "drop" else min(self.config.min_group_size, len(last))
        replaced = [t for attempts in members for t in attempts[:-1]]
        return TrajectoryGroup(task=goal, trajectories=last, replaced=replaced, dropped=alive < least)

    def _waited_for(self, active: list[_Episode], waiting: int) -> str:
        """Which episodes wait for what, for how long; called on the watchdog's thread."""
        running, now = self._workers.running(), time.perf_counter()
        lines = []
        for episode in sorted(active, key=lambda e: e.since):
            if episode.waits_for == "engine":
                what = f"the engine (turn {len(episode.turns)})"
            else:
                doing = {"call": "", "grading": ", grading"}.get(running.get(episode.number, ""), ", no worker is free")
                what = f"its environment ({episode.stage}{doing})"
            lines.append(f"{episode.task.id} member {episode.member}: {what} since {now - episode.since:.0f} s")
        more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
        not_begun = [f"{waiting} not begun"] if waiting else []
        return "; ".join([*lines[:_MOST_LINES], *more, *not_begun])


_MOST_LINES = 8
"""Episodes that a warning names."""


def _report_failures(ended: list[list[Trajectory]]) -> None:
    """One warning a round, with the reasons that come most often."""
    reasons = Counter(t.failed for attempts in ended for t in attempts if t.failed is not None)
    if not reasons:
        return
    lost = sum(attempts[-1].failed is not None for attempts in ended)
    listed = "; ".join(f"{count} x {reason:.200}" for reason, count in reasons.most_common(3))
    logger.warning("%d of %d episodes failed (%d attempts): %s", lost, len(ended), reasons.total(), listed)


def _apply(episode: _Episode, answer: Answer | BaseException) -> None:
    """Write an environment's answer, or its failure, into the episode."""
    if isinstance(answer, BaseException):
        episode.broken = True
        if isinstance(answer, TimeoutError) and episode.out_of_time:
            episode.end = End.TIME  # a limit of ours, and no fault of the environment
            return
        fault, reason = explain(answer)
        episode.fail(fault, episode.stage, reason)
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
    if episode.turns:
        last = episode.turns[-1]
        episode.turns[-1] = replace(last, reward=answer.reward, feedback=answer.feedback, rewards=answer.rewards)
    else:
        episode.tools = answer.tools
