"""The teacher: the student's own network under other weights, without a second copy of it, or another model.

`live` is the student as it is. `frozen`, `ema` and `synced` are weights by name (`opd.teachers.weights`) that take the
place of the student's for one forward pass, so that with LoRA a frozen teacher costs the adapters' initial values and
nothing more. `trust_region` reads with both, the frozen weights and the live ones, in two forward passes. `external` is
a model of its own (`opd.models.loading.load_teacher`), here or behind servers, which never changes and is never saved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from opd.errors import ModelError
from opd.maths.head import Head
from opd.models.causal import CausalModel
from opd.objective.collate import Batch, Taught
from opd.teachers.config import TeacherConfig
from opd.teachers.served import ServedTeacher
from opd.teachers.weights import OwnWeights


class Teacher:
    """Scores sequences with weights derived from the student's, or with a model of its own.

    An `external` teacher has either `other`, the model, or `served`, servers that hold it: these are asked before
    training, and `teach` does not use them. `fingerprint` tells the model from any other. `look` runs a function that
    reads the model, which may be in slices (`opd.backends.zero.ZeroModel`); `close` gives its memory back.
    """

    def __init__(
        self,
        config: TeacherConfig,
        student: CausalModel,
        other: CausalModel | None = None,
        *,
        served: ServedTeacher | None = None,
        fingerprint: str = "",
        look: Callable[[Callable[[], Any]], Any] = lambda work: work(),
        close: Callable[[], None] = lambda: None,
    ) -> None:
        assert (config.weights == "external") == ((other or served) is not None)
        self.config = config
        self.student = student
        self.other = other
        self.served = served
        self.fingerprint = fingerprint
        self.close = close
        self._look = look
        self.updates = 0
        """The number of optimiser updates that it followed; a resumed run sets it."""
        self.own = OwnWeights(config, student)
        if config.weights == "trust_region" and getattr(student.config, "final_logit_softcapping", None) is not None:
            raise ModelError(
                "teacher.weights = trust_region mixes logits, but this model bends its own (final_logit_softcapping), "
                "and a mixture of bent logits is no head's; use ema"
            )

    @torch.no_grad()
    def teach(self, batch: Batch) -> Taught:
        """Read a micro-batch's teacher views. Raises ValueError if it holds none."""
        if batch.teacher_ids is None or batch.teacher_rows is None:
            raise ValueError("the method distils, but the samples hold no teacher's view")
        if self.other is not None:
            other, ids, rows = self.other, batch.teacher_ids, batch.teacher_rows
            taught: Taught = self._look(lambda: Taught(other(ids, rows), self._external_head(other)))
            return taught
        with self.own.in_student():
            own = Taught(self.student(batch.teacher_ids, batch.teacher_rows), self._student_head())
        if self.config.weights != "trust_region":
            return own
        live = self.student(batch.teacher_ids, batch.teacher_rows)
        return Taught(self._mixed_hidden(own.hidden, live), self._mixed_head(own.head))

    @torch.no_grad()
    def head(self) -> Head:
        """The teacher's map from hidden states to logits."""
        if self.other is not None:
            other = self.other
            head: Head = self._look(lambda: self._external_head(other))
            return head
        with self.own.in_student():
            own = self._student_head()
        return self._mixed_head(own) if self.config.weights == "trust_region" else own

    def _student_head(self) -> Head:
        """The student's head with the weights that are in it now, still valid after they are swapped back."""
        head = self.student.head()
        return Head(
            head.weight.detach(),
            bias=None if head.bias is None else head.bias.detach(),
            softcap=head.softcap,
            scale=head.scale,
        )

    def _external_head(self, other: CausalModel) -> Head:
        """The head of another model, without the rows of padding that it has beyond the student's vocabulary."""
        head, rows = other.head(), self.student.vocabulary
        bias = None if head.bias is None else head.bias.detach()[:rows]
        return Head(head.weight.detach()[:rows], bias=bias, softcap=head.softcap, scale=head.scale)

    def _mixed_hidden(self, own: Tensor, live: Tensor) -> Tensor:
        """Hidden states whose logits are `(1 - rate) * own's + rate * live's`: [N, H], or [N, 2H] for both heads.

        The softmax of these is the normalised product of powers `q_own ** (1 - rate) * q_live ** rate`, at any
        temperature.
        """
        if self._one_head:
            return own.lerp(live, self._rate)
        return torch.cat([(1 - self._rate) * own, self._rate * live], dim=-1)

    def _mixed_head(self, own: Head) -> Head:
        """The head of `_mixed_hidden`: the weights side by side, [V, 2H], unless they are the same."""
        if self._one_head:
            return own
        live = self._student_head()
        bias = None if own.bias is None or live.bias is None else own.bias.lerp(live.bias, self._rate)
        return Head(torch.cat([own.weight, live.weight], dim=1), bias=bias, scale=live.scale)

    @property
    def _one_head(self) -> bool:
        """True if the head does not train: a frozen teacher's is then the student's."""
        return not any(parameter.requires_grad for parameter in self.student.head_parameters)

    @property
    def _rate(self) -> float:
        assert self.config.rate is not None
        return self.config.rate

    def update(self) -> None:
        """Let the teacher's weights follow an optimiser update of the student's."""
        self.updates += 1
        self.own.follow(self.updates)
