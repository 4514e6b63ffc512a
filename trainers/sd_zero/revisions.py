"""Self-revision: what a model makes of its own attempt once it is told how that went. For `trainers/sd_zero/method.py`.

An attempt is a finished episode, and a revision another one of the same task, whose first prompt also holds the
attempt and the cue that tells its outcome. A row of the log (`trainers/parts/episodes.py`) is the attempt's, with the
cue and the rows of its revisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opd.episodes.tasks import derive_seed
from opd.errors import DataError
from opd.teachers.privileged import episode_text, in_first_user_message, with_attempt
from opd.trainers.parts.episodes import read_episode, to_row, unsampled
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
        """Return the ids that come before a revision: the task, the attempt with what tools answered, and the cue."""
        first = segment.turns[0]
        if self.place == "prompt":
            return self.chat.start(self._told(attempt, first.messages), attempt.tools)
        return [*first.prompt_ids, *self._begun(attempt, segment)]

    def view(self, attempt: Trajectory, segment: Segment) -> TeacherView:
        """Return the teacher's ids: what a reviser reads, then the attempt once more, whose tokens are scored."""
        if self.place == "reply":
            return self.chat.view(attempt, segment, lambda _, messages: messages, opening=self._begun(attempt, segment))
        first = segment.start
        return self.chat.view(attempt, segment, lambda n, new: self._told(attempt, new) if n == first else new)

    def _told(self, attempt: Trajectory, messages: list[Message]) -> list[Message]:
        """Put the attempt as text, and the cue, into the first user message."""
        text, cue = episode_text(attempt.messages), self.cue(attempt.success)
        return in_first_user_message(messages, lambda prompt: with_attempt(prompt, text, cue=cue))

    def _begun(self, attempt: Trajectory, segment: Segment) -> list[int]:
        """Return the ids with which a reply begins: the attempt's own, behind its first prompt, and the cue."""
        first, *others = segment.turns
        said = [*first.completion_ids, *(i for turn in others for i in (*turn.prompt_ids, *turn.completion_ids))]
        return [*self._without_end(said), *self.chat.encode(f"{SEPARATOR}{self.cue(attempt.success)}{SEPARATOR}")]

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
            said = self._without_end(last.completion_ids)
            doubt = [*said, *self.chat.encode(f"{SEPARATOR}{cue}{SEPARATOR}"), *first.completion_ids]
        return [*before, unsampled(last.prompt_ids, doubt), *after]

    def _without_end(self, ids: list[int]) -> list[int]:
        """Without the token that ended the turn."""
        return ids[:-1] if ids and ids[-1] in self.chat.stop_ids else ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """An attempt, and what became of it."""

    task: Task
    cue: str
    attempt: list[list[Turn]]
    """Its segments: more than one where the template rewrote the past."""
    learnable: bool
    """True: the attempt itself may be learned from, as a revision may, since it was right."""
    revisions: list[list[list[Turn]]] = field(default_factory=list)
    """The segments of those that were right; the others are only in the file."""

    def samples(self, reviser: Reviser, weights: Mapping[Part, float]) -> Iterator[Sample]:
        """Yield what trains on it: each revision by itself, and as the end of what the model might say unasked; or the
        attempt, if it was right. Each segment is a sequence of its own; what the model might say unasked goes on from
        the attempt as it stood at its end."""
        if "attempt" in weights and self.learnable:
            for segment in self.attempt:
                yield to_supervised(segment, self.task, weights["attempt"])
        for first, *others in self.revisions:
            if "generation" in weights:
                for sequence in (reviser.generation(self.attempt[-1], self.cue, first), *others):
                    yield to_supervised(sequence, self.task, weights["generation"])
            if "revision" in weights:
                for segment in (first, *others):
                    yield to_supervised(segment, self.task, weights["revision"])


def reason_to_drop(episode: Trajectory, group: TrajectoryGroup) -> str | None:
    """Why an episode of a group is not learned from; None for one that is."""
    if episode.failed is not None or group.dropped:
        return "failed" if episode.failed is not None else "another of its group failed"
    if not (episode.success and episode.completion_tokens):
        return "cut by a limit" if episode.truncated else "wrong"
    return None


def to_trace(
    cue: str, attempt: Trajectory, group: TrajectoryGroup, revisions: TrajectoryGroup | None
) -> dict[str, Any]:
    """Return the row of an attempt of a group: that of its episode, with the cue and the rows of its revisions."""
    revised = [] if revisions is None else [_with_fate(r, revisions) for r in revisions.trajectories]
    return {
        "cue": cue,
        "kept": sum(revision["dropped"] is None for revision in revised),
        **_with_fate(attempt, group),
        "revisions": revised,
    }


def _with_fate(episode: Trajectory, group: TrajectoryGroup) -> dict[str, Any]:
    return {"dropped": reason_to_drop(episode, group), **to_row(episode)}


def read_trace(row: Mapping[str, Any]) -> Trace:
    """Read what `to_trace` wrote. Raises ValueError, KeyError or TypeError for what is no such row."""
    attempt = read_episode(row)
    revisions = [(revision["dropped"], read_episode(revision)) for revision in row["revisions"]]
    return Trace(
        task=attempt.task,
        cue=row["cue"],
        attempt=_segments(attempt),
        learnable=row["dropped"] is None,
        revisions=[_segments(revision) for reason, revision in revisions if reason is None],
    )


def _segments(episode: Trajectory) -> list[list[Turn]]:
    """Return the sequences of an episode, as if nobody had sampled them."""
    return [[unsampled(turn.prompt_ids, turn.completion_ids) for turn in s.turns] for s in episode.segments()]


@dataclass(frozen=True, slots=True)
class Collection:
    """What phase 1 plays: tasks, each attempted `rollout.group_size` times."""

    questions: int
    revisions: int
    """Of each attempt."""
    revise_right: bool
    """Or of the wrong attempts only."""

    def note(self, group_size: int) -> str:
        """What is ahead, for the plan."""
        attempts = self.questions * group_size
        revisions = f" and up to {attempts * self.revisions:,} revisions" if self.revisions else ""
        return f"phase 1 begins with {attempts:,} attempts{revisions}; its steps train on those that are right"


def attempted(player: Player, reviser: Reviser, collection: Collection, tasks: Sequence[Task]) -> list[dict[str, Any]]:
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
        to_trace(reviser.cue(attempt.success), attempt, group, revised.get((group.task, attempt.member)))
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
    second = [revision["success"] for row in rows if not row["success"] for revision in row["revisions"]]
    numbers = {
        "collect/attempts": float(len(rows)),
        "collect/right": sum(row["success"] for row in rows) / len(rows),
        "collect/revisions": float(len(revisions)),
        "collect/kept": float(sum(row["kept"] for row in rows)),
        "tokens/collected": float(sum(e["tokens"] for e in (*revisions, *rows))),
    }
    if revisions:
        numbers["collect/revisions_right"] = sum(revision["success"] for revision in revisions) / len(revisions)
    if second:
        numbers["collect/corrected"] = sum(second) / len(second)
    return numbers


def to_supervised(turns: Sequence[Turn], task: Task, weight: float = 1.0) -> Sample:
    """A sequence whose completions are learned as they stand."""
    whole = Trajectory(task=task, member=0, turns=list(turns), end=End.FINISHED, success=True)
    [segment] = whole.segments()
    return to_sample(whole, segment, ce=weight, route="ce")
