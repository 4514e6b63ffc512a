"""Who teaches: the student's own network under other weights, without a second copy of it, or another model.

`live` is the student as it is. `frozen`, `ema` and `synced` are weights by name that take the place of the student's
for one forward pass: only what trains needs a copy, so that with LoRA a frozen teacher costs the adapters'
initial values and nothing more. Of sharded weights each rank keeps its own slices, as it does of the student's.
`trust_region` listens to both, the frozen one and the live one, for two forward passes. `external` is a model of its
own (`opd.models.loading.load_teacher`), here or behind servers, which never changes and is never saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd.errors import CheckpointError, ModelError
from opd.maths.head import Head
from opd.models.causal import CausalModel
from opd.models.sharding import full_shape, held, is_sharded, part_of, swapped
from opd.objective.collate import Batch, Taught
from opd.ranks.ranks import Ranks
from opd.teachers.config import TeacherConfig
from opd.teachers.served import ServedTeacher


class Teacher:
    """Scores sequences with weights derived from the student's, or with a model of its own.

    `other` is that model, of `external` alone, or `served` the servers that hold it, which answer ahead of a pass and
    are not taught by; `fingerprint` tells it from any other. `look` runs what uses it, where
    it is in slices (`opd.backends.zero.ZeroModel`), and `close` gives its memory back.
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
        """Optimiser updates that it was told of; a resumed run sets it."""
        # An average that moves by a rate of 0.01 a step stands still in bfloat16: it is kept in float32.
        self.weights: dict[str, Tensor] = {}
        if config.weights not in ("live", "external"):
            dtype = torch.float32 if config.weights == "ema" else None
            self.weights = {
                name: held(parameter).clone().to(dtype=_wider(parameter, dtype))
                for name, parameter in _trained(student).items()
            }
        if config.weights == "trust_region" and getattr(student.config, "final_logit_softcapping", None) is not None:
            raise ModelError(
                "teacher.weights = trust_region mixes logits, but this model bends its own (final_logit_softcapping), "
                "and a mixture of bent logits is no head's; use ema"
            )

    @torch.no_grad()
    def teach(self, batch: Batch) -> Taught:
        """The teacher's side of a micro-batch. Raises ValueError if the batch holds no teacher's views."""
        if batch.teacher_ids is None or batch.teacher_rows is None:
            raise ValueError("the method distils, but the samples hold no teacher's view")
        if self.other is not None:
            other, ids, rows = self.other, batch.teacher_ids, batch.teacher_rows
            taught: Taught = self._look(lambda: Taught(other(ids, rows), self._others_head(other)))
            return taught
        with self._in_place():
            own = Taught(self.student(batch.teacher_ids, batch.teacher_rows), self._head())
        if self.config.weights != "trust_region":
            return own
        live = self.student(batch.teacher_ids, batch.teacher_rows)
        return Taught(self._mixed_hidden(own.hidden, live), self._mixed_head(own.head))

    @torch.no_grad()
    def head(self) -> Head:
        """The teacher's map from hidden states to logits."""
        if self.other is not None:
            other = self.other
            head: Head = self._look(lambda: self._others_head(other))
            return head
        with self._in_place():
            own = self._head()
        return self._mixed_head(own) if self.config.weights == "trust_region" else own

    def _head(self) -> Head:
        """The student's head as it is now; what it is made of outlives the swap."""
        head = self.student.head()
        return Head(
            head.weight.detach(),
            bias=None if head.bias is None else head.bias.detach(),
            softcap=head.softcap,
            scale=head.scale,
        )

    def _others_head(self, other: CausalModel) -> Head:
        """Of another model, without the rows of padding that it has beyond the student's."""
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
        live = self._head()
        bias = None if own.bias is None or live.bias is None else own.bias.lerp(live.bias, self._rate)
        return Head(torch.cat([own.weight, live.weight], dim=1), bias=bias, scale=live.scale)

    @property
    def _one_head(self) -> bool:
        """Whether the head does not train, so that a frozen teacher's is the student's."""
        return not any(parameter.requires_grad for parameter in self.student.head_parameters)

    @property
    def _rate(self) -> float:
        assert self.config.rate is not None
        return self.config.rate

    @torch.no_grad()
    def update(self) -> None:
        """After an optimiser update: move the average, or catch up with the student. Others have nothing to do."""
        self.updates += 1
        if self.config.weights == "synced":
            assert self.config.every is not None
            if self.updates % self.config.every == 0:
                for name, parameter in _trained(self.student).items():
                    self.weights[name].copy_(held(parameter))
        if self.config.weights == "ema":
            for name, parameter in _trained(self.student).items():
                self.weights[name].lerp_(held(parameter).to(self.weights[name].dtype), self._rate)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """The student with the teacher's weights."""
        if not self.weights:
            yield
            return
        self.student.release()  # what was gathered of the student's weights is not the teacher's
        with swapped(_trained(self.student), self.weights):
            yield
            self.student.release()

    def state_dict(self) -> dict[str, Tensor]:
        """The teacher's own weights, of sharded ones this rank's slices; empty for a live one."""
        return self.weights

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """The reverse of `state_dict`. Raises CheckpointError when the names differ."""
        if set(state) != set(self.weights):
            raise CheckpointError(
                f"the checkpoint's teacher holds {len(state)} weights, this run's ({self.config.weights}) "
                f"{len(self.weights)}, under other names; resume with the settings of the saved run"
            )
        for name, weight in state.items():
            self.weights[name].copy_(weight)

    def save(self, folder: Path, ranks: Ranks) -> None:
        """The own weights as `teacher.safetensors`, or the slices of each rank in a file of its own."""
        weights = {name: weight.cpu().contiguous() for name, weight in self.weights.items()}
        if self._sharded:
            save_file(weights, folder / _slices(ranks.rank))
        elif ranks.first:
            save_file(weights, folder / _WHOLE)

    def load(self, folder: Path, ranks: Ranks, *, saved_ranks: int) -> None:
        """The reverse of `save`, cut anew where there were other ranks. Raises CheckpointError as `load_state_dict`."""
        if (folder / _WHOLE).is_file():
            saved = [load_file(folder / _WHOLE)]
        elif saved_ranks == ranks.world_size:
            self.load_state_dict(load_file(folder / _slices(ranks.rank)))
            return
        else:
            saved = [load_file(folder / _slices(rank)) for rank in range(saved_ranks)]
        parameters = _trained(self.student)
        state = {}
        for name in saved[0]:
            if name in parameters:
                size = full_shape(parameters[name]).numel()
                full = torch.cat([part[name].flatten() for part in saved])[:size]
                state[name] = part_of(parameters[name], full, ranks.rank)
        self.load_state_dict(state if len(state) == len(saved[0]) else saved[0])

    @property
    def _sharded(self) -> bool:
        return any(is_sharded(parameter) for parameter in _trained(self.student).values())


_WHOLE = "teacher.safetensors"


def _slices(rank: int) -> str:
    return f"teacher-rank-{rank}.safetensors"


def _trained(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def _wider(parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return parameter.dtype if dtype is None else torch.promote_types(parameter.dtype, dtype)
