"""Self-revision: a model tries its task again, given its own attempt and a cue that tells the outcome. For the phases.

An attempt is a finished episode, and a revision another one of the same task, whose first prompt also holds the
attempt and the cue. Each attempt is kept with its revisions as one readable row of JSON, with the ids that were
sampled, so that what trains is what was said, to the token.
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
from opd.trainers.parts.episodes import append_lines, in_rounds, unsampled_turn
from opd.types import End, Message, Sample, Segment, Task, TeacherView, Trajectory, TrajectoryGroup, Turn, to_sample

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player

Part = Literal["attempt", "generation", "revision"]
SEPARATOR = "\n\n"
"""Stands around the cue where the model says it, or reads it in its own turn, as in the released code."""


@dataclass(frozen=True, slots=True)
class Reviser:
    """Puts an attempt before the model that revises it, and before the teacher that scores it."""

    chat: ChatFormat
    cues: tuple[str, str]
    """The cue for an attempt that was right, and the cue for one that was not."""
    place: Literal["prompt", "reply"]
    """`prompt`: the attempt as text, and the cue, in the first user message. `reply`: as the paper has it for one turn,
    the attempt's own ids and the cue at the beginning of what the model says."""

    def cue(self, right: bool) -> str:
        """Return the cue that tells this outcome."""
        return self.cues[0] if right else self.cues[1]

    def opening(self, attempt: Trajectory, segment: Segment) -> list[int]:
        """Return the ids that come before a revision: the task, the attempt with what tools answered, and the cue."""
        cue = self.cue(attempt.success)
        if self.place == "prompt":
            text = episode_text(attempt.messages)
            messages = in_first_user_message(
                segment.turns[0].messages, lambda prompt: with_attempt(prompt, text, cue=cue)
            )
            return self.chat.start(messages, attempt.tools)
        ids = [i for turn in segment.turns for i in (*turn.prompt_ids, *turn.completion_ids)]
        return [*self._without_end(ids), *self.chat.encode(f"{SEPARATOR}{cue}{SEPARATOR}")]

    def view(self, attempt: Trajectory, segment: Segment) -> TeacherView:
        """Return the teacher's view: what a reviser reads, then the attempt once more, whose tokens are scored."""
        ids = self.opening(attempt, segment)
        rows: list[int] = []
        for number, turn in enumerate(segment.turns):
            ids += turn.prompt_ids if number else []
            rows += range(len(ids) - 1, len(ids) - 1 + len(turn.completion_ids))
            ids += turn.completion_ids
        return TeacherView(token_ids=ids, rows=rows)

    def generation(self, attempt: Sequence[Turn], cue: str, revision: Sequence[Turn]) -> list[Turn]:
        """Return the plain task, the attempt, the cue and the revision, as if the model had said it all by itself.

        An attempt of one turn is answered in the same turn, as in the paper. What ended an episode of several turns
        cannot be taken back there: the cue stands in place of the attempt's last action.
        """
        *before, last = attempt
        first, *after = revision
        if before:
            doubt = [*self.chat.encode(cue + SEPARATOR), *first.completion_ids]
        else:
            answer = self._without_end(last.completion_ids)
            doubt = [*answer, *self.chat.encode(f"{SEPARATOR}{cue}{SEPARATOR}"), *first.completion_ids]
        return [*before, unsampled_turn(last.prompt_ids, doubt), *after]

    def _without_end(self, ids: list[int]) -> list[int]:
        """Return the ids without the token that ended the turn."""
        return ids[:-1] if ids[-1] in self.chat.stop_ids else ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """An attempt and its revisions."""

    task: Task
    cue: str
    attempt: list[Turn]
    learnable: bool
    """True: the attempt itself may be learned from, as it was right."""
    revisions: list[list[Turn]] = field(default_factory=list)
    """The revisions that may be learned from; the others are only in the file."""

    def samples(self, reviser: Reviser, weights: Mapping[Part, float]) -> Iterator[Sample]:
        """Yield the samples of the parts that `weights` names.

        revision: each revision by itself. generation: each as the end of what the model might say unasked. attempt:
        the attempt, if it was right.
        """
        if "attempt" in weights and self.learnable:
            yield to_supervised(self.attempt, self.task, weights["attempt"])
        for revision in self.revisions:
            if "generation" in weights:
                sequence = reviser.generation(self.attempt, self.cue, revision)
                yield to_supervised(sequence, self.task, weights["generation"])
            if "revision" in weights:
                yield to_supervised(revision, self.task, weights["revision"])


def reason_to_drop(episode: Trajectory, group: TrajectoryGroup) -> str | None:
    """Return why an episode of a group is not learned from; None for one that is."""
    if episode.failed is not None or group.dropped:
        return "failed" if episode.failed is not None else "another of its group failed"
    if not (episode.success and episode.completion_tokens):
        return "cut by a limit" if episode.truncated else "wrong"
    return "rewritten by the chat template" if len(episode.segments()) > 1 else None


def to_row(
    origin: str, cue: str, attempt: Trajectory, group: TrajectoryGroup, revisions: TrajectoryGroup | None
) -> dict[str, Any]:
    """Return the row of one attempt of a group and of its revisions, if there are any: ids last."""
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
        "dropped": reason_to_drop(trajectory, group),
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
    """Return the trace of a row that `to_row` made."""
    split, index = row["task"].split("/")
    return Trace(
        task=Task(index=int(index), seed=row["seed"], split=split),
        cue=row["cue"],
        attempt=_turns(row["attempt"]),
        learnable=row["attempt"]["dropped"] is None,
        revisions=[_turns(r) for r in row["revisions"] if r["dropped"] is None],
    )


def _turns(episode: dict[str, Any]) -> list[Turn]:
    return [unsampled_turn(turn["prompt_ids"], turn["completion_ids"]) for turn in episode["turns"]]


def _seal(row: dict[str, Any]) -> str:
    """Return a row's checksum: 16 hex digits."""
    return sha256(json.dumps(row, default=str).encode()).hexdigest()[:16]


class TraceFile:
    """The file of a run's attempts, to which rows are appended as they come.

    A line ends with a checksum, so that nothing trains that was changed since it was sampled.
    """

    def __init__(self, path: Path, origin: str) -> None:
        self.path = path
        self.origin = origin

    def read(self) -> list[dict[str, Any]]:
        """Read the rows so far, without a half-written last one.

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
        """Read a line. Raises DataError, with its number, where the checksum does not fit."""
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
    """The size of phase 1's collection: tasks, each attempted `rollout.group_size` times, and their revisions."""

    questions: int
    """The number of tasks."""
    revisions: int
    """The number of revisions of each attempt."""
    revise_right: bool
    """True: right attempts are revised too. False: wrong ones only."""

    def note(self, group_size: int) -> str:
        """Say, for the plan, how much is played before phase 1 trains."""
        attempts = self.questions * group_size
        revisions = f" and up to {attempts * self.revisions:,} revisions" if self.revisions else ""
        return f"phase 1 begins with {attempts:,} attempts{revisions}; its steps train on those that are right"


def collect(
    player: Player, file: TraceFile, reviser: Reviser, collection: Collection, *, whole: bool
) -> list[dict[str, Any]]:
    """Collect attempts at the first tasks of the run, and their revisions; return their rows, which `file` holds too.

    As many tasks are played at a time as there are episodes at once. What the file holds already is not played again;
    a file that was cut is completed with the same ids. Ends early, with the rows so far, once `player.stopping()` is
    true.

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
        return _play_round(player, tasks, file.origin, reviser, collection)

    return in_rounds(player, file, rows, questions, play=play, failure=lambda row: row["attempt"]["failed"])


def _play_round(
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
    """Return the samples of these rows, and how many sequences more were left out as longer than `most_tokens`.

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
    """Count attempts, revisions and their tokens, and the shares that were right, as metrics.

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


def to_supervised(turns: Sequence[Turn], task: Task, weight: float = 1.0) -> Sample:
    """Make a sample whose completions are learned as they stand, with this weight."""
    whole = Trajectory(task=task, member=0, turns=list(turns), end=End.FINISHED, success=True)
    [segment] = whole.segments()
    return to_sample(whole, segment, ce=weight, route="ce")
