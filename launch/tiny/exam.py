"""The exam of a warm start: what the model does right so far, with privileged text and without, on tasks of its own.

Nothing is played. A scripted episode is right if each of its sampled tokens is the model's likeliest one where it
stands: a greedy model then says just this. That needs one pass over the episodes and no engine, on which a built model
would otherwise depend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch

from opd.launch.tiny.recipes import Aims
from opd.models.causal import CausalModel
from opd.objective.collate import collate
from opd.types import Sample

_FIRST_TASK = 1 << 24
"""Beyond every task that a warm start is trained on."""
_AT_ONCE = 50


class Writer(Protocol):
    """Writes the episodes of the exam, in the world as it is."""

    written: int
    """The number of the next task."""

    @property
    def pad_id(self) -> int: ...

    def sample(self, form: str | None = None) -> Sample: ...


class Marks(NamedTuple):
    """The shares of episodes that are right."""

    informed: float
    """Of those with the privileged text."""
    plain: float


class Exam:
    """Examines models of one warm start, all on the same episodes."""

    def __init__(self, aims: Aims, writer: Writer) -> None:
        writer.written = _FIRST_TASK
        self.aims = aims
        self.pad_id = writer.pad_id
        self._informed = [writer.sample(aims.form) for _ in range(aims.tasks)]
        self._plain = [writer.sample("plain") for _ in range(aims.tasks)]

    def marks(self, student: CausalModel) -> Marks:
        """Return what the model does right."""
        return Marks(*(right_share(student, samples, self.pad_id) for samples in (self._informed, self._plain)))

    def is_passed(self, marks: Marks) -> bool:
        """True: the model can teach and still has to learn. False: one of the two is not so."""
        low, high = self.aims.plain
        return marks.informed >= self.aims.informed and low <= marks.plain <= high


@torch.no_grad()
def right_share(student: CausalModel, samples: Sequence[Sample], pad_id: int) -> float:
    """Return the share of samples all of whose sampled tokens are the model's likeliest ones."""
    right = 0
    for start in range(0, len(samples), _AT_ONCE):
        batch = collate(samples[start : start + _AT_ONCE], pad_id)
        agrees = student.logits(student(batch.input_ids, batch.rows)).argmax(-1) == batch.targets
        right += sum(bool(own.all()) for own in agrees.split(batch.lengths))
    return right / len(samples)
