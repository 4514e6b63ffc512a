"""Plays episodes into a file of token ids, and reads them back: for methods whose stages hand episodes on.

A file holds one JSON object a line: the first names the model and the settings that played; each other holds an
episode, its messages for people, and the ids and log-probs that were sampled, so that what trains is what was said, to
the token.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from opd.episodes.tasks import derive_seed
from opd.errors import DataError
from opd.trainers.loop.health import check_collected
from opd.trainers.loop.method import Method
from opd.trainers.loop.stage import Prepared, Stage
from opd.types import End, Segment, StopReason, Task, Trajectory, Turn

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player

Row = dict[str, Any]
TEACHERS, OWN = "episodes-teacher.jsonl", "episodes-own.jsonl"
"""The files in a run's `data/` with the episodes of another model, and with those of the model that trains."""


def playing(config: Any, *, tasks: int, first: int = 0, model: str | None = None) -> Stage:
    """Return the stage that plays episodes of so many tasks into a file, as another model or as the run's own."""
    return Stage(
        kind="play",
        make=partial(Playing, config, tasks=tasks, model=model),
        model=model,
        first_task=first,
        holds=partial(_holds_episodes, TEACHERS if model else OWN),
    )


def _holds_episodes(name: str, folder: Path, made: Mapping[str, float]) -> bool:
    return EpisodeFile(folder / name).lines > made["collect/episodes"]


class Playing(Method):
    """Runs the stage that `playing` describes."""

    def __init__(self, config: Any, chat: ChatFormat, *, tasks: int, model: str | None) -> None:
        super().__init__(config, chat)
        self.tasks, self.model = tasks, model

    def prepare(self, player: Player, folder: Path) -> Prepared:
        file = EpisodeFile(folder / (TEACHERS if self.model else OWN))
        return Prepared(summary(collect(player, self.chat, file, self.tasks, name=self.model or "the run's model")))


class Appendable(Protocol):
    """A file of rows."""

    def write(self, rows: Sequence[Row], *, after: int) -> None:
        """Append rows behind the first `after` of those that are there; what else is there is cut."""


class EpisodeFile:
    """A file of episodes, appended as they come; its first line, the header, says what they depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> int:
        """The number of whole lines, the header's included; 0 where there is no file."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def open(self, header: Mapping[str, Any], *, wanted: int) -> list[dict[str, Any]]:
        """Read the episodes so far, or begin a new file. Raises DataError for a file that has another header.

        Where all `wanted` episodes are there, the model is not compared: it may have been trained on them since.
        """
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_bytes(_line(header))
            return []
        known, rows = self.read()
        differing = [key for key in header if known.get(key) != header[key]]
        if len(rows) >= wanted and "model" in differing:
            differing.remove("model")
        if differing:
            raise DataError(
                f"{self.path} was played with another {' and '.join(differing)}; delete the file, or go on with what "
                "it was made with"
            )
        return rows

    def read(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Read the header and the episodes, without a half-written last row.

        Raises DataError, with the line's number, for a line that is damaged.
        """
        try:
            *whole, _ = self.path.read_bytes().split(b"\n")
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        found = []
        for number, line in enumerate(whole, start=1):
            try:
                found.append(json.loads(line))
                if number > 1:
                    read_episode(found[-1])
                elif not all(isinstance(found[0][name], str) for name in ("model", "tokenizer", "template")):
                    raise ValueError("it does not say who played")
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(f"{self.path}, line {number} is damaged ({error}); delete the file") from error
        if not found:
            raise DataError(f"{self.path} is empty; delete the file")
        return found[0], found[1:]

    def write(self, rows: Sequence[Mapping[str, Any]], *, after: int) -> None:
        """Append rows behind the first `after` episodes that are there; what else is there is cut."""
        append_lines(self.path, map(_line, rows), after=after + 1)


def append_lines(path: Path, lines: Iterable[bytes], *, after: int) -> None:
    """Append lines to a file, which is made if need be, behind its first `after` lines; what else is there is cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    before = path.read_bytes().split(b"\n")[:after]
    with path.open("r+b") as file:
        file.truncate(sum(len(line) + 1 for line in before))
        file.seek(0, os.SEEK_END)
        file.write(b"".join(lines))


def _line(data: Mapping[str, Any]) -> bytes:
    return json.dumps(data, default=str).encode() + b"\n"


def collect(player: Player, chat: ChatFormat, file: EpisodeFile, tasks: int, *, name: str) -> list[dict[str, Any]]:
    """Collect `rollout.group_size` episodes of each of the first `tasks` tasks; return the rows in `file`.

    What the file holds already is not played again; a file that was cut is completed with the same ids. Ends early,
    with the rows so far, once `player.stopping()` is true.
    """
    run = player.standing
    header = {"model": player.fingerprint(), **rendering(chat), "settings": run.settings}
    rows = player.ranks.from_first(lambda: file.open(header | {"name": name}, wanted=tasks * run.rollout.group_size))

    def play(goals: Sequence[Task]) -> list[Row]:
        groups = player.play(goals, seed=derive_seed("episodes", run.seed))
        return [to_row(trajectory) for group in groups for trajectory in group.trajectories]

    return in_rounds(player, file, rows, tasks, play=play, failure=lambda row: row["failed"])


def in_rounds(
    player: Player,
    file: Appendable,
    rows: list[Row],
    tasks: int,
    *,
    play: Callable[[Sequence[Task]], list[Row]],
    failure: Callable[[Row], str | None],
) -> list[Row]:
    """Go on from `rows` until there is one for each member of each of the stage's first `tasks` tasks.

    A round plays as many tasks as there are episodes at once; its rows are appended to `file` before the next round.
    Ends early, with the rows so far, once `player.stopping()` is true. Raises HealthError if every episode failed.

    Args:
        rows: what the file holds already, the same on all ranks.
        play: the rows of a round, from its tasks, in their order.
        failure: why a row's episode failed, or None.
    """
    run, size = player.standing, player.standing.rollout.group_size
    at_once = max(1, run.rollout.concurrency // size)
    rows = drop_broken_end(rows, list(map(failure, rows)), at_once=at_once * size, wanted=tasks * size)
    while len(rows) < tasks * size and not player.stopping():
        first = len(rows) // size
        more = play([player.task(i) for i in range(first, min(first + at_once, tasks))])
        player.ranks.from_first(partial(file.write, more, after=len(rows)))
        rows += more
    check_collected(list(map(failure, rows)), run.give_up_after)
    return rows


def drop_broken_end(
    rows: list[dict[str, Any]], failures: Sequence[str | None], *, at_once: int, wanted: int
) -> list[dict[str, Any]]:
    """Return the rows of a collection that need not be played anew: its whole rounds, or all rows if it is complete.

    Rounds at its end whose episodes all failed are left out, where the collection is not complete or holds nothing
    else: what broke them may be mended.

    Args:
        failures: why each row's episode failed, or None.
        at_once: rows in a round.
    """
    kept = len(rows)
    if kept == wanted and None in failures:
        return rows
    if kept < wanted:
        kept -= kept % at_once
    while kept and None not in failures[max(0, kept - at_once) : kept]:
        kept = max(0, kept - at_once)
    return rows[:kept]


def rendering(chat: ChatFormat) -> dict[str, str]:
    """Return the fingerprints of the tokenizer and of the chat template, which make ids of messages."""
    from opd.models.identity import template_fingerprint, tokenizer_fingerprint  # late: it needs torch

    return {
        "tokenizer": tokenizer_fingerprint(chat.tokenizer),
        "template": template_fingerprint(chat.tokenizer, chat.template_kwargs),
    }


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """Return an episode as a row of the file: outcome first, ids last."""
    return {
        "task": trajectory.task.id,
        "seed": trajectory.task.seed,
        "member": trajectory.member,
        "success": trajectory.success,
        "reward": trajectory.reward,
        "end": trajectory.end,
        "failed": trajectory.failed,
        "tokens": trajectory.completion_tokens,
        "messages": trajectory.messages,
        "turns": [
            {
                "prompt_ids": turn.prompt_ids,
                "completion_ids": turn.completion_ids,
                "logprobs": turn.logprobs,
                "stop_reason": turn.stop_reason,
                "forked": turn.forked,
            }
            for turn in trajectory.turns
        ],
    }


def read_episode(row: Mapping[str, Any]) -> Trajectory:
    """Return the episode of a row by `to_row`, as far as learning needs it. Raises ValueError for any other row."""
    try:
        split, index = row["task"].split("/")
        turns = [
            Turn(
                prompt_ids=[int(i) for i in turn["prompt_ids"]],
                completion_ids=[int(i) for i in turn["completion_ids"]],
                logprobs=[float(value) for value in turn["logprobs"]],
                stop_reason=StopReason(turn["stop_reason"]),
                messages=[],
                text="",
                forked=turn["forked"],
            )
            for turn in row["turns"]
        ]
        return Trajectory(
            task=Task(index=int(index), seed=row["seed"], split=split),
            member=row["member"],
            turns=turns,
            end=End(row["end"]),
            success=row["success"],
            failed=row["failed"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is no episode ({error!r})") from error


def unsampled_turn(prompt_ids: list[int], completion_ids: list[int]) -> Turn:
    """Make a turn that is learned as it stands: its log-probs are nan, as the model that learns did not sample it."""
    return Turn(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        logprobs=[math.nan] * len(completion_ids),
        stop_reason=StopReason.STOP,
        messages=[],
        text="",
    )


def segments(rows: Sequence[Mapping[str, Any]], *, only_right: bool = False) -> Iterator[tuple[Trajectory, Segment]]:
    """Yield the sequences with a sampled token of the episodes that did not fail; `only_right`: and that were right."""
    for trajectory in map(read_episode, rows):
        if trajectory.failed is None and (trajectory.success or not only_right):
            yield from ((trajectory, s) for s in trajectory.segments() if any(turn.completion_ids for turn in s.turns))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Count the episodes and their tokens, and the share that was right, as metrics."""
    return {
        "collect/episodes": float(len(rows)),
        "collect/right": sum(row["success"] for row in rows) / max(1, len(rows)),
        "tokens/collected": float(sum(row["tokens"] for row in rows)),
    }
