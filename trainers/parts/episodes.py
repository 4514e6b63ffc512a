"""Episodes on disk: played once, kept as token ids, learned from later. For methods whose stages hand them on.

A log holds one JSON object a line: first who played, and under which settings; then an episode each, with its
messages to read and the ids and log-probs that were sampled, so that what trains is what was said, to the token. A
method may put more into a row (SD-Zero: how the episode was revised).
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.episodes.tasks import derive_seed
from opd.errors import DataError
from opd.secrets import redact, redacted
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
        plays=tasks,
        holds=partial(_holds_episodes, TEACHERS if model else OWN),
    )


def _holds_episodes(name: str, folder: Path, made: Mapping[str, float]) -> bool:
    return EpisodeLog(folder / name, read_episode).lines > made["collect/episodes"]


class Playing(Method):
    """Runs the stage that `playing` describes."""

    def __init__(self, config: Any, chat: ChatFormat, *, tasks: int, model: str | None) -> None:
        super().__init__(config, chat)
        self.tasks, self.model = tasks, model

    def prepare(self, player: Player, folder: Path) -> Prepared:
        log = EpisodeLog(folder / (TEACHERS if self.model else OWN), read_episode)
        return Prepared(summary(collect(player, self.chat, log, self.tasks, whole=False, name=self.model)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first line of a log: who played, and under which settings. All but `name` are fingerprints."""

    name: str
    """Of the model that played, for a person."""
    model: str
    """Its weights."""
    tokenizer: str
    template: str
    settings: str
    """All settings of the run that stored data depends on."""


class EpisodeLog:
    """A file of played episodes, a row each, to which rows are appended as they come; the first line is the header.

    Every line ends with a checksum, so that what trains is what was sampled, and not what became of it since.

    Args:
        read_row: turns a row into data; it raises ValueError, KeyError or TypeError for what is no such row.
    """

    def __init__(self, path: Path, read_row: Callable[[Row], object]) -> None:
        self.path = path
        self.read_row = read_row
        self._ends = [0]
        """Where each line ends that was read or written last, before them where the first one begins."""

    @property
    def lines(self) -> int:
        """The number of whole lines, the header's included; 0 where there is no file."""
        return self.path.read_bytes().count(b"\n") if self.path.exists() else 0

    def open(self, header: Header, *, wanted: int, whole: bool = False) -> list[Row]:
        """Return the rows so far, or begin a new file where none holds a whole line.

        A file that lacks some of the `wanted` rows must come from the header's model. One that has them need not: the
        model may have trained on them since.

        Args:
            whole: the model has trained on the file, so what the file lacks cannot be played by it any more.

        Raises DataError for a file that was made under another header, or that should be whole and is not.
        """
        rows: list[Row] = []
        lines = self._lines() if self.path.exists() else []
        if lines:
            like = asdict(header)
            if whole or len(lines) > wanted:
                del like["model"]
            _, rows = self._parsed(lines, like)
        if whole and len(rows) < wanted:
            raise DataError(
                f"{self.path} holds {len(rows)} of {wanted} episodes, and the weights that played them have trained "
                "since. Put the file back, or start afresh (--overwrite)"
            )
        if not lines:
            self._append([asdict(header)], after=0)
        return rows

    def read(self, like: Mapping[str, str] | None = None) -> tuple[Header, list[Row]]:
        """Return the header and the rows; a half-written last row is not counted.

        Raises DataError, with the line's number, for what is damaged, and for a header that differs from `like`, which
        gives the wanted values of some of its fields by name.
        """
        return self._parsed(self._lines(), like)

    def header(self) -> Header:
        """Return the header, and read no more than that. Raises DataError as `read` does."""
        try:
            with self.path.open("rb") as file:
                line = file.readline()
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        return self._header(line[:-1] if line.endswith(b"\n") else b"")

    def write(self, rows: Sequence[Row], *, after: int) -> None:
        """Append rows behind the first `after` of those that are there; what else is there is cut."""
        self._append(rows, after=after + 1)

    def _lines(self) -> list[bytes]:
        """Return the whole lines of the file, and note where each ends. Raises DataError where it cannot be read."""
        try:
            lines = self.path.read_bytes().split(b"\n")[:-1]
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error}") from error
        self._ends = [0, *accumulate(len(line) + 1 for line in lines)]
        return lines

    def _parsed(self, lines: Sequence[bytes], like: Mapping[str, str] | None) -> tuple[Header, list[Row]]:
        """Return what `read` does, of the lines of a file."""
        first, *rest = lines or [b""]
        header = self._header(first)
        differing = [name for name, value in (like or {}).items() if getattr(header, name) != value]
        if differing:
            raise DataError(
                f"{self.path} was not played with this run's {' and '.join(differing)}; delete the file, or go on with "
                "what it was made with"
            )
        return header, [self._row(line, number) for number, line in enumerate(rest, start=2)]

    def _header(self, line: bytes) -> Header:
        try:
            header = Header(**_unsealed(line))
            if not all(isinstance(value, str) for value in asdict(header).values()):
                raise ValueError("it holds what is no text")
        except (ValueError, TypeError) as error:
            raise DataError(
                f"{self.path}, line 1 does not say who played: it is damaged, or an older version wrote it. Delete the "
                "file; its episodes are then played again"
            ) from error
        return header

    def _row(self, line: bytes, number: int) -> Row:
        try:
            row = _unsealed(line)
            self.read_row(row)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.path}, line {number} is not as it was written: cut short, or changed since ({error}). Delete "
                "it and what follows; the run then plays that again"
            ) from error
        return row

    def _append(self, rows: Sequence[Row], *, after: int) -> None:
        """Append lines behind the first `after` of the file, which is made if need be; what else is there is cut."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        if after >= len(self._ends) or self._ends[-1] > self.path.stat().st_size:  # somebody else has written since
            self._lines()
        del self._ends[after + 1 :]
        lines = [_sealed(row) for row in rows]
        with self.path.open("r+b") as file:
            file.truncate(self._ends[-1])
            file.seek(0, os.SEEK_END)
            file.write(b"".join(lines))
        self._ends += [*accumulate(map(len, lines), initial=self._ends[-1])][1:]


_SEAL = re.compile(rb',? ?"seal": "([0-9a-f]{16})"}$')
"""What a line ends with: the checksum of all before it, with the brace that this took."""


def _sealed(row: Row) -> bytes:
    """Write a row as a line that ends with the row's checksum."""
    text = json.dumps(row, default=str).encode()
    return text[:-1] + b'%s"seal": "%s"}\n' % (b", " if row else b"", _seal(text))


def _unsealed(line: bytes) -> Row:
    """Read a line that `_sealed` wrote. Raises ValueError where it is not as it was."""
    end = _SEAL.search(line[-64:])
    text = b"" if end is None else line[: len(line) - len(end[0])] + b"}"
    if end is None or _seal(text) != end[1]:
        raise ValueError("its checksum is another")
    row: Row = json.loads(text)
    return row


def _seal(text: bytes) -> bytes:
    return sha256(text).hexdigest()[:16].encode()


def collect(
    player: Player,
    chat: ChatFormat,
    log: EpisodeLog,
    tasks: int,
    *,
    whole: bool,
    name: str | None = None,
    play: Callable[[Sequence[Task]], list[Row]] | None = None,
    each: int = 1,
) -> list[Row]:
    """Play the stage's first `tasks` tasks, `rollout.group_size` times each; return a row for each, as `log` holds it.

    As many tasks are played at a time as there are episodes at once, and each round's rows are appended before the
    next. What the log holds is not played again; what was cut there, or left at a signal (Interrupted), is, to the same
    ids. Ends early, with what there is, once `player.stopping()` is true. Raises DataError where the log cannot be gone
    on with, and HealthError if every episode failed.

    Args:
        whole: the log must hold all of it, as the weights that played have trained since.
        name: of the model that plays, for the log's header, where it is not the run's own.
        play: plays tasks and returns their rows, in order, of at most `each` episodes; by default plain episodes.
    """
    run, size = player.standing, player.standing.rollout.group_size
    header = Header(
        name=redact(name or "the run's model"), model=player.fingerprint(), **rendering(chat), settings=run.settings
    )
    rows = player.ranks.from_first(lambda: log.open(header, wanted=tasks * size, whole=whole))
    at_once = max(1, run.rollout.concurrency // size)
    rows = drop_broken_end(rows, at_once=at_once * size, wanted=tasks * size)
    player.progress.say_kept(log.path.name, len(rows), tasks * size)
    while len(rows) < tasks * size and not player.stopping():
        goals = [player.task(i) for i in range(tasks)[len(rows) // size :][:at_once]]
        player.progress.expect((tasks * size - len(rows)) * each)
        with player.progress.told_if_left(log.path.name, len(rows)):
            more = play(goals) if play is not None else _played(player, goals)
        player.ranks.from_first(partial(log.write, more, after=len(rows)))
        rows += more
    check_collected([row["failed"] for row in rows], run.give_up_after)
    return rows


def _played(player: Player, tasks: Sequence[Task]) -> list[Row]:
    """Play plain episodes of these tasks; return their rows."""
    groups = player.play(tasks, seed=derive_seed("episodes", player.standing.seed))
    return [to_row(trajectory) for group in groups for trajectory in group.trajectories]


def drop_broken_end(rows: list[Row], *, at_once: int, wanted: int) -> list[Row]:
    """Return the rows of a collection that stand: whole rounds of `at_once` rows, unless it is complete.

    Rounds at its end that broke as a whole are played anew, where the collection is not complete or holds nothing else:
    what broke them may be mended.
    """
    failures = [row["failed"] for row in rows]
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
        "messages": redacted(trajectory.messages),  # for readers: what is learned stands in the ids
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
