"""Decides who plays when: an engine samples, environments answer, and nobody's exception ends the run.

The scheduler plays any gymnasium environment with text observations and actions. Whatever an environment
does wrong (`opd.episodes.answers` sees it) becomes data: a trajectory with `failed` set, counted and never trained.
What then becomes of it and its group is `rollout.on_failure`'s to say. `opd.episodes.episode` follows a single
episode, `opd.episodes.environments` calls what it is played in; `docs/rollouts.md` explains the whole.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from typing import Literal

from opd.engines.base import Completion, RolloutEngine, Sampling
from opd.episodes.config import RolloutConfig
from opd.episodes.environments import EnvFactory, Environments
from opd.episodes.episode import Episode, Opening, PromptRewrite, Round, add_turn, next_request, take_answer
from opd.episodes.grouped import Ended, score_groups
from opd.episodes.watchdog import Watchdog
from opd.errors import Interrupted
from opd.grading import Trainer
from opd.models.chat import ChatFormat
from opd.plain_text import printable
from opd.types import Task, Trajectory, TrajectoryGroup

logger = logging.getLogger(__name__)

_MOST_LINES = 8
"""Episodes that a warning names."""


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
        self.environments = Environments(make_env, config, workers=workers, preload=preload)

    def close(self) -> None:
        """Close the environments; the engine stays as it is."""
        self.environments.close()

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
        stopped: Callable[[], bool] = lambda: False,
        trainer: Trainer = Trainer(),  # noqa: B008  (it is frozen)
    ) -> list[TrajectoryGroup]:
        """Play every task `group_size` times; groups come back in the order of the tasks.

        `seed` names the round: a token's draw depends on it and on the task, the member and the turn.
        `rewrite` shows the acting model other first messages (a teacher with its context); `opening` gives the first
        prompt itself; `trainer` is what environments are told of who plays. Raises Interrupted once `stopped` holds.
        """
        shared = Round(
            chat=self.chat, config=self.config, max_turns=self.max_turns, seed=seed, rewrite=rewrite, opening=opening,
            stopped=stopped)  # fmt: skip
        episodes = [Episode(n, t, member) for n, (t, member) in enumerate(product(tasks, range(group_size)))]
        self.engine.begin(sampling, self.chat.stop_ids)
        self.environments.trainer = trainer
        ended = score_groups(self._play(episodes, shared, on_finish), group_size, self.environments, shared)
        _report_failures(ended)
        return [
            _group(t, ended[i : i + group_size], self.config)
            for t, i in zip(tasks, range(0, len(episodes), group_size), strict=True)
        ]

    def _play(self, episodes: Sequence[Episode], shared: Round, on_finish: Callable[[Trajectory], None]) -> Ended:
        """Play the episodes of a round; return the attempts at each, the last of which counts."""
        waiting = deque(episodes)
        active: dict[int, Episode] = {}
        ended: Ended = [[] for _ in episodes]
        sampled = 0  # completions in flight
        dog = Watchdog(
            self.config.stall_warning,
            lambda: _describe_waiting(list(active.values()), self.environments.running(), len(waiting)),
        )
        with self.environments.round(), self._abandoned_on_error(active), dog:
            while waiting or active:
                self._admit(waiting, active)
                for episode in self._answered(active, shared, idle=sampled == 0):
                    dog.progress()
                    if self._ask(episode, shared):
                        sampled += 1
                        continue
                    del active[episode.number]
                    self.engine.release(episode.number)
                    self.environments.take_back(episode)
                    ended[episode.number].append((episode.trajectory(), episode.handed))
                    if _plays_again(episode, self.config):
                        waiting.appendleft(episode.again())  # its group waits for it already
                    else:
                        on_finish(ended[episode.number][-1][0])
                for completion in self._completions(sampled, shared):
                    dog.progress()
                    sampled -= 1
                    episode = active[completion.session]
                    self.environments.step(episode, add_turn(episode, completion, shared))
        return ended

    @contextmanager
    def _abandoned_on_error(self, active: dict[int, Episode]) -> Iterator[None]:
        """Leave nothing behind (Ctrl-C, say) that the next round would take for its own."""
        try:
            yield
        except BaseException:
            self.environments.abandon()
            for number in active:
                self.engine.release(number)
            raise

    def _admit(self, waiting: deque[Episode], active: dict[int, Episode]) -> None:
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
            self.environments.reset(episode)

    def _answered(self, active: dict[int, Episode], shared: Round, *, idle: bool) -> list[Episode]:
        """Return the episodes that their environment has answered, or that it lost, in the order of their number."""
        wait = "all" if self.config.deterministic else "any" if idle else "none"
        answers = self.environments.answers(wait=wait, stopped=shared.stopped)
        for number, answer in answers:
            take_answer(active[number], answer)
        return [active[number] for number, _ in answers]

    def _ask(self, episode: Episode, shared: Round) -> bool:
        """Ask the engine for the next completion; False if the episode is over or a limit ends it."""
        request = next_request(episode, shared)
        if request is None:
            return False
        episode.wait_for("engine")
        self.engine.submit(request)
        return True

    def _completions(self, in_flight: int, shared: Round) -> list[Completion]:
        """Return what the engine has completed, with `deterministic` all that is in flight, in the episodes' order."""
        done: list[Completion] = []
        while len(done) < in_flight:
            if shared.stopped():
                raise Interrupted
            done += self.engine.step()
            if not self.config.deterministic:
                break
        return sorted(done, key=lambda completion: completion.session)


def _plays_again(episode: Episode, config: RolloutConfig) -> bool:
    """True: the episode failed, and `rollout.on_failure` grants it another attempt."""
    return episode.failed is not None and config.on_failure == "retry" and episode.attempt < config.retries


def _group(goal: Task, members: list[list[Trajectory]], config: RolloutConfig) -> TrajectoryGroup:
    """Make a group of the last attempt of each member; decide whether the others train without those that failed."""
    last = [attempts[-1] for attempts in members]
    alive = sum(t.failed is None for t in last)
    least = len(last) if config.on_failure == "drop" else min(config.min_group_size, len(last))
    replaced = [t for attempts in members for t in attempts[:-1]]
    return TrajectoryGroup(task=goal, trajectories=last, replaced=replaced, dropped=alive < least)


def _report_failures(ended: list[list[Trajectory]]) -> None:
    """Log one warning a round, with the reasons that come most often."""
    reasons = Counter(t.failed for attempts in ended for t in attempts if t.failed is not None)
    if not reasons:
        return
    lost = sum(attempts[-1].failed is not None for attempts in ended)
    listed = "; ".join(f"{count} x {reason:.200}" for reason, count in reasons.most_common(3))
    logger.warning("%d of %d episodes failed (%d attempts): %s", lost, len(ended), reasons.total(), printable(listed))


def _describe_waiting(active: list[Episode], running: dict[int, str], not_begun: int) -> str:
    """Say which episodes wait for what, and for how long; `running` holds what their environments do."""
    now = time.perf_counter()
    lines = []
    for episode in sorted(active, key=lambda e: e.since):
        if episode.waits_for == "engine":
            what = f"the engine (turn {len(episode.turns)})"
        else:
            doing = {"call": "", "grading": ", grading"}.get(running.get(episode.number, ""), ", no worker is free")
            what = f"its environment ({episode.stage}{doing})"
        lines.append(f"{episode.task.id} member {episode.member}: {what} since {now - episode.since:.0f} s")
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    rest = [f"{not_begun} not begun"] if not_begun else []
    return "; ".join([*lines[:_MOST_LINES], *more, *rest])
