"""The first phase of SD-Zero, in which a model learns to revise, and the base class of both phases."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from opd.losses import CrossEntropy, Losses
from opd.trainers.loop.method import Method
from opd.trainers.loop.stage import Prepared, Stage
from opd.trainers.parts.episodes import EpisodeLog, collect
from opd.trainers.sd_zero.config import SdZeroConfig
from opd.trainers.sd_zero.revisions import Collection, Part, Reviser, attempted, read_trace, summary, to_samples

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player


def revising(config: SdZeroConfig, parts: dict[Part, float], *, collects: bool) -> Stage:
    """Return the stage of phase 1, or of a half of it, that trains `parts`; the first half collects for both."""
    collection = Collection(config.questions, config.revisions, revise_right=config.variant == "paper")
    return Stage(
        make=partial(Revising, config, parts=parts, collection=collection, collects=collects),
        over=config.revising,
        losses=Losses(ce=CrossEntropy()),
        on_dataset=True,
        plays=config.questions if collects else 0,
        played_again=config.revisions if collects else 0,
        notes=lambda rollout: [collection.note(rollout.group_size)] if collects else [],
    )


class Phase(Method):
    """A phase, which puts attempts before the model by its `reviser`."""

    config: SdZeroConfig

    def __init__(self, config: SdZeroConfig, chat: ChatFormat) -> None:
        super().__init__(config, chat)
        self.reviser = Reviser(chat, (config.cue_right, config.cue_wrong), config.place)


class Revising(Phase):
    """Runs phase 1, or a half of it: the model learns from revisions that turned out right."""

    def __init__(
        self,
        config: SdZeroConfig,
        chat: ChatFormat,
        *,
        parts: dict[Part, float],
        collection: Collection,
        collects: bool,
    ) -> None:
        super().__init__(config, chat)
        self.parts, self.collection, self.collects = parts, collection, collects

    def prepare(self, player: Player, folder: Path) -> Prepared:
        config, run = self.config, player.standing
        log = EpisodeLog(folder / "revisions.jsonl", read_trace)
        play = partial(attempted, player, self.reviser, self.collection)
        questions, each = self.collection.questions, 1 + self.collection.revisions
        rows = collect(player, self.chat, log, questions, whole=run.steps > 0, play=play, each=each)
        if player.stopping():
            return Prepared()
        dataset, too_long = to_samples(rows, self.reviser, self.parts, config.max_teacher_tokens, where=log.path)
        numbers = {"dropped/too_long": float(too_long)} | (summary(rows) if self.collects else {})
        return Prepared(numbers, dataset)
