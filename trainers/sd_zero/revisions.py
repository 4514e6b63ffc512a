"""Self-revision: what a model makes of its own attempt once it is told how that went. For `trainers/sd_zero/method.py`.

An attempt is a finished episode, and a revision another one of the same task, whose first prompt also holds the
attempt and the cue that tells its outcome. Both are kept as one readable row of JSON for each attempt, with the ids
that were sampled, so that what trains is what was said, to the token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from opd.episodes.tasks import derive_seed
from opd.errors import DataError
from opd.teachers.privileged import episode_text, in_first_user_message, with_attempt
from opd.trainers.parts.episodes import append_lines, in_rounds, unsampled
from opd.types import End, Message, Sample, Segment, Task, TeacherView, Trajectory, TrajectoryGroup, Turn, to_sample

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player

Part = Literal["attempt", "generation", "revision"]
SEPARATOR = "\n\n"
"""Stands around the cue where the model says it, or reads it in its own turn, as in the released code."""


@dataclass(frozen=True, slots=True)
class Reviser:
    """How an attempt is put before the model that revises it, and before the teacher that scores it."""

    chat: ChatFormat
    cues: tuple[str, str]
    """For an attempt that was right, and for one that was not."""
    place: Literal["prompt", "reply"]
    """`prompt`: the attempt as text, and the cue, in the first user message. `reply`: as the paper has it for one turn,
    the attempt's own ids and the cue at the beginning of what the model says."""

    def cue(self, right: bool) -> str:
        return self.cues[0] if right else self.cues[1]

    def opening(self, attempt: Trajectory, segment: Segment) -> list[int]:
        """The ids that come before a revision: the task, the attempt with what tools answered, and the cue."""
        cue = self.cue(attempt.success)
        if self.place == "prompt":
            text = episode_text(attempt.messages)
            messages = in_first_user_message(
                segment.turns[0].messages, lambda prompt: with_attempt(prompt, text, cue=cue)
            )
            return self.chat.start(messages, attempt.tools)
        ids = [i for turn in segment.turns for i in (*turn.prompt_ids, *turn.completion_ids)]
        return [*self._open_ended(ids), *self.chat.encode(f"{SEPARATOR}{cue}{SEPARATOR}")]

    def view(self, attempt: Trajectory, segment: Segment) -> TeacherView:
        """The teacher's ids: what a reviser reads, then the attempt once more, whose tokens are scored."""
        ids = self.opening(attempt, segment)
        rows: list[int] = []
        for number, turn in enumerate(segment.turns):
            ids += turn.prompt_ids if number else []
            rows += range(len(ids) - 1, len(ids) - 1 + len(turn.completion_ids))
            ids += turn.completion_ids
        return TeacherView(token_ids=ids, rows=rows)

    def generation(self, attempt: Sequence[Turn], cue: str, revision: Sequence[Turn]) -> list[Turn]:
        """The plain task, the attempt, the cue and the revision, as if the model had said it all by itself.

        An attempt of one turn is answered in the same turn, as in the paper. What ended an episode of several turns
        cannot be taken back there: the cue stands in place of the attempt's last action.
        """
        *before, last = attempt
        first, *after = revision
        if before:
            doubt = [*self.chat.encode(cue + SEPARATOR), *first.completion_ids]
        else:
            said = self._open_ended(last.completion_ids)
            doubt = [*said, *self.chat.encode(f"{SEPARATOR}{cue}{SEPARATOR}"), *first.completion_ids]
        return [*before, unsampled(last.prompt_ids, doubt), *after]

    def _open_ended(self, ids: list[int]) -> list[int]:
        """Without the token that ended the turn."""
        return ids[:-1] if ids[-1] in self.chat.stop_ids else ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """An attempt, and what became of it."""

    task: Task
    cue: str
    attempt: list[Turn]
    learnable: bool
    """Whether the attempt itself may be learned from, as a revision may: it was right."""
    revisions: list[list[Turn]] = field(default_factory=list)
    """Those that were right; the others are only in the file."""

    def samples(self, reviser: Reviser, weights: Mapping[Part, float]) -> Iterator[Sample]:
        """What trains on it: each revision by itself, and as the end of what the model might say unasked; or the
        attempt, if it was right."""
        if "attempt" in weights and self.learnable:
            yield supervised(self.attempt, self.task, weights["attempt"])
        for revision in self.revisions:
            if "generation" in weights:
                sequence = reviser.generation(self.attempt, self.cue, revision)
                yield supervised(sequence, self.task, weights["generation"])
            if "revision" in weights:
                yield supervised(revision, self.task, weights["revision"])


def dropped(episode: Trajectory, group: TrajectoryGroup) -> str | None:
    """Why an episode of a group is not learned from; None for one that is."""
    if episode.failed is not None or group.dropped:
        return "failed" if episode.failed is not None else "another of its group failed"
    if not (episode.success and episode.completion_tokens):
        return "cut by a limit" if episode.truncated else "wrong"
    return "rewritten by the chat template" if len(episode.segments()) > 1 else None


def to_row(
    origin: str, cue: str, attempt: Trajectory, group: TrajectoryGroup, revisions: TrajectoryGroup | None
) -> dict[str, Any]:
    """One attempt of a group and its revisions, if there are any, as they stand in the file: ids last."""
    revised = [] if revisions is None else [_episode(r, revisions) for r in revisions.trajectories]
    return {
        "task": attempt.task.id,
        "seed": attempt.task.seed,
        "member": attempt.member,
        "right": attempt.success,
        "cue": cue,
        "kept": sum(revision["dropped"] is None for revision in revised),
        "attempt": _episode(attempt, group),
        "revisions": revised,
        "origin": origin,
    }


def _episode(trajectory: Trajectory, group: TrajectoryGroup) -> dict[str, Any]:
    return {
        "dropped": dropped(trajectory, group),
        "success": trajectory.success,
        "end": trajectory.end,
        "failed": trajectory.failed,
        "tokens": trajectory.completion_tokens,
        "messages": trajectory.messages,
        # The sequence as the model saw it at the end: where the template rewrote the past, only what followed.
        "turns": [
            {"prompt_ids": turn.prompt_ids, "completion_ids": turn.completion_ids}
            for segment in trajectory.segments()[-1:]
            for turn in segment.turns
        ],
    }


def read_trace(row: dict[str, Any]) -> Trace:
    """The reverse of `to_row`."""
    split, index = row["task"].split("/")
    return Trace(
        task=Task(index=int(index), seed=row["seed"], split=split),
        cue=row["cue"],
        attempt=_turns(row["attempt"]),
        learnable=row["attempt"]["dropped"] is None,
        revisions=[_turns(r) for r in row["revisions"] if r["dropped"] is None],
    )


def _turns(episode: dict[str, Any]) -> list[Turn]:
    return [unsampled(turn["prompt_ids"], turn["completion_ids"]) for turn in episode["turns"]]


def _seal(row: dict[str, Any]) -> str:
    return sha256(json.dumps(row, default=str).encode()).hexdigest()[:16]


class TraceFile:
    """The rows of a run's attempts, in a file to which they are appended as they come.

    A line ends with a checksum, so that what trains is what was sampled, and not what became of it since.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self.path = path
        self.origin = origin

    def read(self) -> list[dict[str, Any]]:
        """The rows so far; a half-written last one is not counted.

        Raises DataError, with the line's number, for a row that is damaged or was made under other settings.
        """
        if not self.path.exists():
            return []
        *whole, _ = self.path.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(whole, start=1):
            rows.append(self._row(line, number))
            if rows[-1]["origin"] != self.origin:
                raise DataError(
                    f"{self.path}, line {number} was collected under other settings; delete the file, or resume with "
                    "the settings that it was made with"
                )
        return rows

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
            if row.pop("seal") == _seal(row):
                return cast(dict[str, Any], row)
        except (ValueError, LookupError, AttributeError, TypeError):
            pass
        raise DataError(
            f"{self.path}, line {number} is not as it was written: cut short, or changed since. Delete it and what "
            "follows; the run then collects that again"
        )

    def write(self, rows: Sequence[dict[str, Any]], *, after: int) -> None:
        """Append rows behind the first `after` of those that are there; what else is there is cut."""
        sealed = (json.dumps({**row, "seal": _seal(row)}, default=str).encode() + b"\n" for row in rows)
        append_lines(self.path, sealed, after=after)


@dataclass(frozen=True, slots=True)
class Collection:
    """What phase 1 plays: tasks, each attempted `rollout.group_size` times."""

    questions: int
    revisions: int
    """Of each attempt."""
    revise_right: bool
    """Or of the wrong attempts only."""

    def announced(self, group_size: int) -> str:
        """What is ahead, for the plan."""
        attempts = self.questions * group_size
        revisions = f" and up to {attempts * self.revisions:,} revisions" if self.revisions else ""
        return f"phase 1 begins with {attempts:,} attempts{revisions}; its steps train on those that are right"


def collect(
    player: Player, file: TraceFile, reviser: Reviser, collection: Collection, *, whole: bool
) -> list[dict[str, Any]]:
    """Attempts at the first tasks of the run, and their revisions: as rows, which `file` holds too.

    As many tasks at a time as there are episodes at once. What the file holds already is not played again, and is
    played again to the same ids if it is cut there. Ends early, with what there is, once `player.stopping()` is true.

    Raises DataError where the file must be `whole`, because the weights that attempt have trained since, and is not.
    """
    questions, size = collection.questions, player.standing.rollout.group_size
    rows = player.ranks.from_first(file.read)
    if whole and len(rows) < questions * size:
        raise DataError(
            f"{file.path} holds {len(rows)} of {questions * size} attempts, and the weights that made them have "
            "trained since. Put the file back, or start afresh (--overwrite)"
        )

    def play(tasks: Sequence[Task]) -> list[dict[str, Any]]:
        return _attempted(player, tasks, file.origin, reviser, collection)

    return in_rounds(player, file, rows, questions, play=play, failure=lambda row: row["attempt"]["failed"])


def _attempted(
    player: Player, tasks: Sequence[Task], origin: str, reviser: Reviser, collection: Collection
) -> list[dict[str, Any]]:
    """Play each of these tasks and have its attempts revised; return a row for each attempt."""
    run = player.standing
    groups = player.play(tasks, seed=derive_seed("attempts", run.seed))
    revised: dict[tuple[Task, int], TrajectoryGroup] = {}
    for member in range(run.rollout.group_size):
        attempts = [t for group in groups for t in group.usable if t.member == member]
        wanted = [t for t in attempts if collection.revisions and (collection.revise_right or not t.success)]
        chosen = {t.task: t for t in wanted}

        def opening(task: Task, _: list[Message], __: Any, chosen: dict[Task, Trajectory] = chosen) -> list[int]:
            return reviser.opening(chosen[task], chosen[task].segments()[-1 if reviser.place == "reply" else 0])

        seed = derive_seed("revisions", run.seed, member)
        for group in player.play(list(chosen), seed=seed, group_size=collection.revisions, opening=opening):
            revised[group.task, member] = group
    return [
        to_row(origin, reviser.cue(attempt.success), attempt, group, revised.get((group.task, attempt.member)))
        for group in groups
        for attempt in group.trajectories
    ]


def to_samples(
    rows: Sequence[dict[str, Any]], reviser: Reviser, parts: Mapping[Part, float], most_tokens: int, *, where: Path
) -> tuple[list[Sample], int]:
    """What trains on these rows, and how many sequences more were longer than `most_tokens`.

    Raises DataError, naming the file `where` they stand, if nothing is left.
    """
    found = [sample for row in rows for sample in read_trace(row).samples(reviser, parts)]
    kept = [sample for sample in found if len(sample.token_ids) <= most_tokens]
    if not kept:
        raise DataError(
            f"{where} holds nothing to learn from: {len(rows)} attempts gave {len(found)} sequences that end right, "
            f"none of at most sd_zero.max_teacher_tokens = {most_tokens}. Raise sd_zero.questions or that limit, or "
            "choose easier tasks."
        )
    return kept, len(found) - len(kept)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What was collected, in numbers: attempts and revisions, the share of each that was right, and their tokens.

    `collect/corrected` is the share of the revisions of wrong attempts that are right: compare it with what attempting
    such tasks once more gives, which is less than `collect/right`.
    """
    revisions = [revision for row in rows for revision in row["revisions"]]
    second = [revision["success"] for row in rows if not row["right"] for revision in row["revisions"]]
    numbers = {
        "collect/attempts": float(len(rows)),
        "collect/right": sum(row["right"] for row in rows) / len(rows),
        "collect/revisions": float(len(revisions)),
        "collect/kept": float(sum(row["kept"] for row in rows)),
        "tokens/collected": float(sum(e["tokens"] for e in (*revisions, *(row["attempt"] for row in rows)))),
    }
    if revisions:
        numbers["collect/revisions_right"] = sum(revision["success"] for revision in revisions) / len(revisions)
    if second:
        numbers["collect/corrected"] = sum(second) / len(second)
    return numbers


def supervised(turns: Sequence[Turn], task: Task, weight: float = 1.0) -> Sample:
    """A sequence whose completions are learned as they stand."""
    whole = Trajectory(task=task, member=0, turns=list(turns), end=End.FINISHED, success=True)
    [segment] = whole.segments()
    return to_sample(whole, segment, ce=weight, route="ce")
