"""Owns the environments that episodes are played in, calls them on workers under time limits, and keeps them for later.

Answers come out as they are (`opd.episodes.answers`), and failures as the exceptions they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from opd.episodes.answers import Answer
from opd.episodes.config import RolloutConfig
from opd.episodes.episode import Episode
from opd.episodes.faults import explain
from opd.episodes.hosts import Host, Local
from opd.episodes.processes import Processes, Remote
from opd.episodes.workers import TimeLimits, Workers
from opd.grading import Trainer
from opd.plain_text import printable
from opd.standing import ADVICE, Standing

logger = logging.getLogger(__name__)

EnvFactory = Callable[[], Any]

_Limit = Literal["reset_timeout", "step_timeout"]
_Finished = tuple[Sequence[Any], Sequence[Sequence[int]]]
"""Of a group: what the last answers of its episodes handed out, and the tokens of their completions."""


class Environments:
    """Lends each episode an environment of its own, which the next one gets if nothing broke. One thread may use it."""

    def __init__(
        self,
        make_env: EnvFactory,
        config: RolloutConfig,
        *,
        workers: Literal["threads", "processes"],
        preload: Sequence[str],
    ) -> None:
        """Start the workers. Raises ConfigError when `make_env` cannot be sent to a process."""
        self.processes = Processes(make_env, preload=preload) if workers == "processes" else None
        self._make_env = make_env
        self._config = config
        self._idle: list[Host] = []
        self._lent: dict[int, Host] = {}  # by number of the episode
        self._workers = Workers(min(config.workers, config.concurrency))
        self.trainer = Trainer()
        """What environments are told of who plays."""
        self._open = 0
        """Calls that nobody has answered yet."""
        self._standing: Standing | None = None
        """While a round is played in threads: this process as it was before."""
        self._told: set[str] = set()

    @contextmanager
    def round(self) -> Iterator[None]:
        """Hold for as long as a round is played: in threads, what environments change of this process is put back."""
        self._open = 0
        self._standing = Standing() if self.processes is None else None
        try:
            yield
        finally:
            self._put_back()
            if self._standing is not None:
                self._standing.close()
                self._standing = None

    def _put_back(self) -> None:
        """Put back what environments have changed of this process, and say once what that was."""
        changed = self._standing.restore() if self._standing is not None else []
        if news := [name for name in changed if name not in self._told]:
            self._told.update(news)
            _say_that_it_is_put_back(news)

    def reset(self, episode: Episode) -> None:
        """Have an environment begin the episode; one that is played again gets a new environment."""
        host = self._host(fresh=episode.attempt > 0)
        self._lent[episode.number] = host
        self._call(episode, partial(host.reset, episode.task, self.trainer), "reset_timeout")

    def step(self, episode: Episode, text: str) -> None:
        """Have the episode's environment act on a completion's text."""
        self._call(episode, partial(self._lent[episode.number].step, text), "step_timeout")

    def score_groups(
        self, groups: Sequence[_Finished], *, fresh: bool = False, stopped: Callable[[], bool] = lambda: False
    ) -> list[list[Answer] | BaseException]:
        """Score groups, each in an environment that no episode is played in; return what came of each.

        Raises Interrupted once `stopped` holds.
        """
        size = min(self._config.workers, self._config.concurrency)
        return [
            outcome
            for first in range(0, len(groups), size)
            for outcome in self._score(groups[first : first + size], fresh, stopped)
        ]

    def _score(
        self, groups: Sequence[_Finished], fresh: bool, stopped: Callable[[], bool]
    ) -> list[list[Answer] | BaseException]:
        """Score as many groups as there are workers."""
        hosts = [self._host(fresh=fresh) for _ in groups]
        outcomes = _score_each(self._workers, hosts, groups, self._config.grading_timeout, stopped)
        for host, outcome in zip(hosts, outcomes, strict=True):
            if isinstance(outcome, BaseException):
                host.kill()
            else:
                self._idle.append(host)
        return outcomes

    def answers(
        self, *, wait: str, stopped: Callable[[], bool] = lambda: False
    ) -> list[tuple[int, Answer | BaseException]]:
        """Return (number of the episode, answer or what went wrong), in the order of the numbers.

        `wait`: "none" returns what is there, "any" waits for at least one, "all" for every open call. Raises
        Interrupted once `stopped` holds while it waits.
        """
        found = sorted(self._workers.finished(wait=wait, stopped=stopped), key=lambda pair: pair[0])
        self._open -= len(found)
        if found and not self._open:  # not before: one that is still at work may mean it
            self._put_back()
        return found

    def running(self) -> dict[int, str]:
        """Say of each episode whose environment is at work what it does: "call" or "grading". For any thread."""
        return self._workers.running()

    def take_back(self, episode: Episode) -> None:
        """End what the episode was lent if it broke, or may still be at work on a lost thread; else keep it."""
        host = self._lent.pop(episode.number)
        if episode.broken or episode.failed is not None:
            host.kill()
        else:
            self._idle.append(host)

    def abandon(self) -> None:
        """Forget the calls that are open, and end all that is lent."""
        self._workers.forget()
        self._open = 0
        for host in self._lent.values():
            host.kill()
        self._lent.clear()

    def close(self) -> None:
        """Close the idle environments, each within the time limit of a step, and let the workers go."""
        with self.round():
            closers = Workers(min(self._config.workers, max(1, len(self._idle))))
            for number, host in enumerate(self._idle):
                closers.start(number, host.close, limits=self._limits("step_timeout"), give_up=host.kill)
            self._idle.clear()
            for _, answer in closers.finished(wait="all"):
                if isinstance(answer, BaseException):
                    logger.warning("an environment could not be closed: %s", printable(explain(answer)[1]))
            closers.close()
        self._workers.close()
        if self.processes is not None:
            self.processes.close()

    def _host(self, *, fresh: bool) -> Host:
        if self._idle and not fresh:
            return self._idle.pop()
        return Local(self._make_env) if self.processes is None else Remote(self.processes)

    def _call(self, episode: Episode, call: Callable[[], Answer], limit: _Limit) -> None:
        """Have a worker call the environment, within that limit and until the episode's own end."""
        episode.wait_for("env")
        self._open += 1
        limits = self._limits(limit)
        if (left := max(0.0, episode.until - episode.since)) < limits.call:
            limits = replace(limits, call=left, name="rollout.episode_timeout")
        self._workers.start(episode.number, call, limits=limits, give_up=self._lent[episode.number].kill)

    def _limits(self, name: _Limit) -> TimeLimits:
        config = self._config
        return TimeLimits(call=getattr(config, name), grading=config.grading_timeout, name=f"rollout.{name}")


def _say_that_it_is_put_back(names: Sequence[str]) -> None:
    logger.warning(
        "an environment changed %s of this process, which all of the run shares; it is put back. %s",
        ", ".join(names),
        ADVICE,
    )


def _score_each(
    workers: Workers,
    hosts: Sequence[Host],
    groups: Sequence[_Finished],
    seconds: float,
    stopped: Callable[[], bool],
) -> list[list[Answer] | BaseException]:
    """Have each host score a group; leave and end all of them where anything goes wrong here."""
    limits = TimeLimits(call=seconds, grading=seconds, name="rollout.grading_timeout")
    for number, (host, (members, ids)) in enumerate(zip(hosts, groups, strict=True)):
        workers.start(number, partial(host.score_group, members, ids), limits=limits, give_up=host.kill)
    try:
        outcomes = dict(workers.finished(wait="all", stopped=stopped))
    except BaseException:
        workers.forget()
        for host in hosts:
            host.kill()
        raise
    return [outcomes[number] for number in range(len(hosts))]
