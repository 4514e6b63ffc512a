"""The stage that imitates: cross-entropy on episodes that were played before, or that it plays itself first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from opd.backends.config import StageConfig
from opd.config import Strict
from opd.errors import DataError
from opd.losses import CrossEntropy, Losses
from opd.trainers.loop.method import Method
from opd.trainers.loop.stage import Prepared, Stage
from opd.trainers.parts.conversations import read_conversations
from opd.trainers.parts.episodes import OWN, TEACHERS, EpisodeLog, collect, read_episode, segments, summary
from opd.types import Sample, Segment, Trajectory, to_sample

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player


class ImitationConfig(Strict):
    """Settings of what is learned by imitation: which episodes, and how they count."""

    keep: Literal["right", "all"] = Field(
        "right", description="Learn from episodes that the environment called solved, or from all."
    )
    reduction: Literal["token_mean", "sequence_mean"] = Field(
        "token_mean", description="Mean over the step's tokens, or first within each sequence."
    )


def imitating(
    config: ImitationConfig,
    *,
    source: Literal["teacher", "own", "file"],
    tasks: int | None = None,
    file: str | None = None,
    leave_out: Sequence[str] = (),
    over: StageConfig = StageConfig(),  # noqa: B008  (frozen)
) -> Stage:
    """Return the stage that learns from a teacher's episodes, from own ones of so many tasks, or from a file's."""
    return Stage(
        make=partial(Imitating, config, source=source, tasks=tasks, file=file, leave_out=leave_out),
        plays=source == "own",
        over=over,
        losses=Losses(ce=CrossEntropy(), reduction=config.reduction),
    )


class Imitating(Method):
    """Runs the stage that `imitating` describes."""

    config: ImitationConfig

    def __init__(
        self,
        config: ImitationConfig,
        chat: ChatFormat,
        *,
        source: Literal["teacher", "own", "file"],
        tasks: int | None,
        file: str | None,
        leave_out: Sequence[str],
    ) -> None:
        super().__init__(config, chat)
        self.source, self.tasks, self.file, self.leave_out = source, tasks, file, leave_out

    def prepare(self, player: Player, folder: Path) -> Prepared:
        made: dict[str, float] = {}
        where = folder / (TEACHERS if self.source == "teacher" else OWN)
        only_right = self.config.keep == "right"
        if self.file is not None:
            where = Path(self.file).expanduser()
            read = player.ranks.from_first(lambda: read_conversations(where, self.chat, leave_out=self.leave_out))
            found = [(t, s) for t in read if t.success or not only_right for s in t.segments()]
        else:
            log = EpisodeLog(where, read_episode)
            if self.source == "own":
                assert self.tasks is not None
                rows = collect(player, self.chat, log, self.tasks, whole=player.standing.updates > 0)
                made = summary(rows)
            else:
                rows = player.ranks.from_first(lambda: log.read()[1])
            if player.stopping():
                return Prepared(made)
            found = list(segments(rows, only_right=only_right))
        dataset = self._fitting_samples(found, player.standing.rollout.max_length, where)
        counts = {"collect/kept": float(len(dataset)), "dropped/too_long": float(len(found) - len(dataset))}
        return Prepared(made | counts, dataset)

    def _fitting_samples(self, found: Sequence[tuple[Trajectory, Segment]], most: int, where: Path) -> list[Sample]:
        """Return the samples of at most `most` tokens. Raises DataError, naming the file `where`, if none is left."""
        samples = [to_sample(trajectory, segment, ce=1.0, route="ce") for trajectory, segment in found]
        kept = [sample for sample in samples if len(sample.token_ids) <= most]
        if not kept:
            raise DataError(
                f"{where} holds nothing to learn from: {len(found)} sequences with keep = {self.config.keep}, none of "
                f"at most rollout.max_length = {most} tokens"
            )
        return kept
