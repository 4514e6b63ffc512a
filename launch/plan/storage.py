"""What a run puts on its disk: its checkpoints and exports, the room for them, and how long one takes to write.

Sizes follow from counting; what torch, safetensors and DeepSpeed add are some kilobytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from opd.backends import deepspeed_json
from opd.disk import bytes_per_second, free_bytes, size_in_words
from opd.errors import CheckpointError
from opd.launch.plan.memory import BYTES, ModelSize, Part, has_gpu, known_size
from opd.launch.settings.config import Config
from opd.tracking.files import last_value

BEGINS_WITHIN = 5.0
"""Seconds after a signal within which a checkpoint begins."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The bytes of what a run saves."""

    parts: Sequence[Part]
    """Of one checkpoint."""
    export: int

    @property
    def checkpoint(self) -> int:
        return sum(part.bytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """What is known of a run's disk before the run."""

    sizes: Sizes | None
    """None: the model's size is not known before it is loaded."""
    free: int
    seconds: float | None
    """That a save takes; None: not known."""
    measured: str
    """How that was found."""

    def rows(self, config: Config) -> list[tuple[str, str]]:
        """Return the lines of the plan."""
        free = f"{size_in_words(self.free)} free"
        if self.sizes is None:
            return [("checkpoints", f"size not known before the model is loaded; {free}")]
        parts = ", ".join(f"{part.name} {size_in_words(part.bytes)}" for part in self.sizes.parts)
        exports = count_exports(config)
        each = f"{size_in_words(self.sizes.checkpoint)} each ({parts}), at most {most_at_once(config)} at once"
        export = f"{exports} export{'' if exports == 1 else 's'} of {size_in_words(self.sizes.export)}"
        rows = [("checkpoints", f"{each}, and {export}; {free}")]
        if self.seconds is not None:
            grace = f"train.stop_grace = {config.train.stop_grace:g} s"
            rows.append(("a save", f"about {self.seconds:.2g} s ({self.measured}), of {grace}"))
        return rows

    def notes(self, config: Config) -> list[str]:
        """Return what a person may want to change."""
        notes = []
        grace = config.train.stop_grace
        if self.seconds is not None and BEGINS_WITHIN + self.seconds > grace:
            notes.append(
                f"a save takes about {self.seconds:.2g} s and begins up to {BEGINS_WITHIN:g} s after a signal: a "
                f"scheduler that kills the run after train.stop_grace = {grace:g} s would kill it in its save. Ask for "
                f"an earlier signal (SLURM: --signal=TERM@{_rounded(BEGINS_WITHIN + 2 * self.seconds)}; Kubernetes: "
                "terminationGracePeriodSeconds) and set train.stop_grace to it, choose a faster disk (out), or train "
                "adapters alone (model.lora)"
            )
        if self.sizes is not None:
            needed = most_at_once(config) * self.sizes.checkpoint + count_exports(config) * self.sizes.export
            if needed > self.free:
                notes.append(
                    f"all that the run keeps takes {size_in_words(needed)}, and the disk has "
                    f"{size_in_words(self.free)} free: make room, or lower train.keep_last = "
                    f"{config.train.keep_last}"
                )
        return notes


def storage(config: Config, out: Path, *, gpu: bool) -> Storage:
    """Look at the disk of the folder `out`, and measure for a moment how fast it takes what a save writes."""
    size = known_size(config.model.name)
    sizes = sizes_of(config, size, gpu=gpu) if size else None
    free = free_bytes(out)
    took = last_value(out / "metrics.jsonl", "time/save")
    if took is not None:
        return Storage(sizes=sizes, free=free, seconds=took, measured="as the run's last one took")
    speed = None if sizes is None else bytes_per_second(out)
    seconds = None if speed is None or sizes is None else sizes.checkpoint / speed
    return Storage(sizes=sizes, free=free, seconds=seconds, measured="measured by writing there for a moment")


def check_room_before_loading(config: Config, out: Path) -> None:
    """Do what `check_room_at_first` does for a run that has no checkpoint yet, where the model's size is known."""
    size = known_size(config.model.name)
    if size is not None and not list((out / "checkpoints").glob("step-*")):
        check_room_at_first(config, out, sizes_of(config, size, gpu=has_gpu()))


def check_room_at_first(config: Config, out: Path, sizes: Sizes) -> None:
    """Raise CheckpointError where the disk has no room for one checkpoint of the run and for its export."""
    free, needed = free_bytes(out), sizes.checkpoint + sizes.export
    if free < needed:
        raise CheckpointError(
            f"out = {str(out)!r}: its disk has {size_in_words(free)} free, but the first checkpoint of the "
            f"run takes {size_in_words(sizes.checkpoint)} and the export at its end "
            f"{size_in_words(sizes.export)}. Make room, or choose another folder (--out DIR)"
        )


def sizes_of(config: Config, size: ModelSize, *, gpu: bool) -> Sizes:
    """Count what a run saves of a model of this size."""
    trained = size.parameters if config.model.lora is None else size.adapters(config.model.lora)
    return count_sizes(config, trained=trained, whole=size.parameters, dtype="bfloat16" if gpu else "float32")


def count_sizes(config: Config, *, trained: int, whole: int, dtype: str) -> Sizes:
    """Count what a run saves: of `trained` parameters a checkpoint, of the `whole` model an export; of the stage whose
    checkpoint is the largest. `dtype` is what model.dtype auto stands for."""
    told = deepspeed_json.dtype(config.deepspeed) if config.deepspeed else None
    name = told or (dtype if config.model.dtype == "auto" else config.model.dtype)
    width = BYTES[name]
    local = config.deepspeed is None
    own = max(4, width) if local and config.model.lora is not None else width
    if local:  # two moments like the weights, or in float32 with float32 weights beside those of 16 bits
        optimiser = 12 if own < 4 else 2 * own
    else:
        optimiser = 8 if deepspeed_json.stage(config.deepspeed or {}) == 0 and width == 4 else 12
    parts = [Part("weights", trained * own), Part("optimiser", trained * optimiser)]
    copies = {"live": 0, "external": 0, "ema": max(4, own)}
    teacher = max((copies.get(s.teacher.weights, own) for s in config.stages if s.listens), default=0)
    if teacher:
        parts.append(Part("teacher", trained * teacher))
    return Sizes(parts, whole * width)


def most_at_once(config: Config) -> int:
    """Count the checkpoints on the disk while one more is written: those kept, the best one, and that one."""
    return config.train.keep_last + bool(config.train.keep_best) + 1


def count_exports(config: Config) -> int:
    """Count the exports: of every stage that trains."""
    return sum(stage.trains for stage in config.stages)


def _rounded(seconds: float) -> int:
    """Return whole tens of seconds."""
    return 10 * -(-int(seconds) // 10)
