"""Episodes on disk: played once, kept as token ids, learned from later. For methods whose stages hand them on.

A file holds one JSON object a line: first who played, and under which settings; then an episode each, with its
messages to read and the ids and log-probs that were sampled, so that what trains is what was said, to the token.
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
"""Files in a run's `data/`: of another model, and of the model that trains."""


def playing(config: Any, *, tasks: int, first: int = 0, model: str | None = None) -> Stage:
    """The stage that plays episodes of so many tasks into a file, as another model or as the run's own."""
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
    """Episodes as rows, appended as they come; the first line says what they depend on."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lines(self) -> int:
        """Whole lines, the header's included; none where there is no file."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def open(self, header: Mapping[str, Any], *, wanted: int) -> list[dict[str, Any]]:
        """The episodes so far, or a new file. Raises DataError for one that was played under another header.

        Where all that are `wanted` are there, the model is not compared: it may have been trained on them since.
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
        """The header and the episodes; a half-written last row is not counted.

        Raises DataError, with the line's number, for what is damaged.
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
    """Episodes of the first `tasks` tasks of the stage, `rollout.group_size` of each, which `file` holds too.

    What the file holds already is not played again, and is played again to the same ids if it is cut there. Ends
    early, with what there is, once `player.stopping()` is true.
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

    As many tasks at a time as there are episodes at once; each round's rows are appended to `file` before the next.
    Ends early, with what there is, once `player.stopping()` is true. Raises HealthError if every episode failed.

    Args:
        rows: what the file holds already, the same on all ranks.
        play: the rows of a round, from its tasks, in their order.
        failure: why a row's episode failed, or None.
    """
    run, size = player.standing, player.standing.rollout.group_size
    at_once = max(1, run.rollout.concurrency // size)
    rows = without_broken_end(rows, list(map(failure, rows)), at_once=at_once * size, wanted=tasks * size)
    while len(rows) < tasks * size and not player.stopping():
        first = len(rows) // size
        more = play([player.task(i) for i in range(first, min(first + at_once, tasks))])
        player.ranks.from_first(partial(file.write, more, after=len(rows)))
        rows += more
    check_collected(list(map(failure, rows)), run.give_up_after)
    return rows


def without_broken_end(
    rows: list[dict[str, Any]], failures: Sequence[str | None], *, at_once: int, wanted: int
) -> list[dict[str, Any]]:
    """The rows of a collection that stand: whole rounds, unless it is complete.

    Rounds at its end that broke as a whole are played anew, where the collection is not complete or holds nothing else:
    what broke them may be mended.

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
    """Fingerprints of what makes ids of messages."""
    from opd.models.identity import template_fingerprint, tokenizer_fingerprint  # late: it needs torch

    return {
        "tokenizer": tokenizer_fingerprint(chat.tokenizer),
        "template": template_fingerprint(chat.tokenizer, chat.template_kwargs),
    }


def to_row(trajectory: Trajectory) -> dict[str, Any]:
    """An episode as it stands in the file: outcome first, ids last."""
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
    """The reverse of `to_row`, as far as learning needs it. Raises ValueError for what is no such row."""
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


def unsampled(prompt_ids: list[int], completion_ids: list[int]) -> Turn:
    """A turn that is learned as it stands: without log-probs, as nobody sampled it from the model that learns."""
    return Turn(
        prompt_ids=prompt_ids,
        completion_ids=completion_ids,
        logprobs=[math.nan] * len(completion_ids),
        stop_reason=StopReason.STOP,
        messages=[],
        text="",
    )


def segments(rows: Sequence[Mapping[str, Any]], *, only_right: bool = False) -> Iterator[tuple[Trajectory, Segment]]:
    """The sequences that may train: nothing broke, something was sampled and, if asked, the episode was right."""
    for trajectory in map(read_episode, rows):
        if trajectory.failed is None and (trajectory.success or not only_right):
            yield from ((trajectory, s) for s in trajectory.segments() if any(turn.completion_ids for turn in s.turns))


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What was played, in numbers."""
    return {
        "collect/episodes": float(len(rows)),
        "collect/right": sum(row["success"] for row in rows) / max(1, len(rows)),
        "tokens/collected": float(sum(row["tokens"] for row in rows)),
    }
