"""The weights that a teacher has of its own: copied from the student, moved after it, saved and loaded.

Only what trains is copied. Of sharded weights each rank keeps its own slices, as it does of the student's. Who reads
them is in `opd.teachers.teacher`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd.errors import CheckpointError
from opd.models.causal import CausalModel
from opd.models.sharding import full_shape, held_part, is_sharded, part_of, swap_weights
from opd.ranks.ranks import Ranks
from opd.teachers.config import TeacherConfig

_WHOLE = "teacher.safetensors"


class OwnWeights:
    """A teacher's copy of the student's trained weights; empty where the teacher is live or another model."""

    def __init__(self, config: TeacherConfig, student: CausalModel) -> None:
        self._config = config
        self._student = student
        self.by_name: dict[str, Tensor] = {}
        """The weights; this rank's slices where they are sharded."""
        if config.weights not in ("live", "external"):
            # An average that moves by a rate of 0.01 a step stands still in bfloat16: it is kept in float32.
            dtype = torch.float32 if config.weights == "ema" else None
            self.by_name = {
                name: held_part(parameter).clone().to(dtype=_wider(parameter, dtype))
                for name, parameter in _trained(student).items()
            }

    @torch.no_grad()
    def follow(self, updates: int) -> None:
        """Move the average, or catch up with the student, after its optimiser update number `updates` (from 1)."""
        if self._config.weights == "synced":
            assert self._config.every is not None
            if updates % self._config.every == 0:
                for name, parameter in _trained(self._student).items():
                    self.by_name[name].copy_(held_part(parameter))
        if self._config.weights == "ema":
            assert self._config.rate is not None
            for name, parameter in _trained(self._student).items():
                self.by_name[name].lerp_(held_part(parameter).to(self.by_name[name].dtype), self._config.rate)

    @contextmanager
    def in_student(self) -> Iterator[None]:
        """Put these weights into the student's network for a while; nothing where there are none."""
        if not self.by_name:
            yield
            return
        self._student.release()  # what was gathered of the student's weights is not the teacher's
        with swap_weights(_trained(self._student), self.by_name):
            yield
            self._student.release()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy these into the weights. Raises CheckpointError when the names differ."""
        if set(state) != set(self.by_name):
            raise CheckpointError(
                f"the checkpoint's teacher holds {len(state)} weights, this run's ({self._config.weights}) "
                f"{len(self.by_name)}, under other names; resume with the settings of the saved run"
            )
        for name, weight in state.items():
            if weight.shape != self.by_name[name].shape:  # which copying would stretch where it can
                shapes = f"{[*weight.shape]}, not {[*self.by_name[name].shape]}"
                raise CheckpointError(f"the checkpoint's teacher holds {name} as {shapes}")
            self.by_name[name].copy_(weight)

    def save(self, folder: Path, ranks: Ranks) -> None:
        """Write the weights as `teacher.safetensors`, or the slices of each rank in a file of its own."""
        weights = {name: weight.cpu().contiguous() for name, weight in self.by_name.items()}
        if any(is_sharded(parameter) for parameter in _trained(self._student).values()):
            save_file(weights, folder / _slices(ranks.rank))
        elif ranks.first:
            save_file(weights, folder / _WHOLE)

    def load(self, folder: Path, ranks: Ranks, *, saved_ranks: int) -> None:
        """Read what `save` wrote, cut anew where there were other ranks. Raises CheckpointError as `load_state_dict`.

        `saved_ranks` is how many ranks wrote it.
        """
        if (folder / _WHOLE).is_file():
            saved = [load_file(folder / _WHOLE)]
        elif saved_ranks == ranks.world_size:
            self.load_state_dict(load_file(folder / _slices(ranks.rank)))
            return
        else:
            saved = [load_file(folder / _slices(rank)) for rank in range(saved_ranks)]
        parameters = _trained(self._student)
        state = {}
        for name in saved[0]:
            if name in parameters:
                size = full_shape(parameters[name]).numel()
                full = torch.cat([part[name].flatten() for part in saved])[:size]
                state[name] = part_of(parameters[name], full, ranks.rank)
        self.load_state_dict(state if len(state) == len(saved[0]) else saved[0])


def _slices(rank: int) -> str:
    return f"teacher-rank-{rank}.safetensors"


def _trained(student: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def _wider(parameter: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return parameter.dtype if dtype is None else torch.promote_types(parameter.dtype, dtype)
