"""Distils from stored scores: a teacher is asked once about episodes that are over, then nobody is.

The stage that scores borrows the teacher in place of the run's model, so that it is held, or sharded, as that one is,
and is gone before anything trains. For `trainers/lightning_opd/method.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.backends.config import StageConfig
from opd.errors import DataError
from opd.losses import Losses
from opd.teachers.store import Scorer, Store, StoredScores, Tokens, count, open_store
from opd.trainers.loop.method import Method
from opd.trainers.loop.stage import Prepared, Stage
from opd.trainers.parts.episodes import OWN, TEACHERS, EpisodeLog, Header, read_episode, rendering, segments
from opd.types import Sample, to_sample

if TYPE_CHECKING:
    from opd.models.chat import ChatFormat
    from opd.trainers.loop.play import Player

logger = logging.getLogger(__name__)
STORE = "store"
"""The store's folder in a run's `data/`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Holds what the stage that scores and the one that trains agree on."""

    top_k: int
    shard_tokens: int
    allow_mismatch: bool


def scoring(config: Any, terms: Terms, *, model: str | None) -> Stage:
    """Make the stage in which a teacher, held as the run's model, scores each token of the student's episodes once."""
    return Stage(
        kind="score",
        make=partial(Scoring, config, terms=terms, model=model),
        model=model,
        holds=_holds_scores,
    )


def _holds_scores(folder: Path, made: Mapping[str, float]) -> bool:
    return count(folder / STORE) >= made["store/sequences"]


def offline(config: Any, terms: Terms, losses: Losses, *, over: StageConfig, data: str | None) -> Stage:
    """Make the stage that trains on the stored episodes and scores in `data`, by default in the run's own folder."""
    make = partial(Offline, config, terms=terms, data=data)
    return Stage(make=make, over=over, losses=losses, stored=True, on_dataset=True)


class Scoring(Method):
    """Runs the stage that `scoring` describes."""

    def __init__(self, config: Any, chat: ChatFormat, *, terms: Terms, model: str | None) -> None:
        super().__init__(config, chat)
        self.terms, self.model = terms, model

    def prepare(self, player: Player, folder: Path) -> Prepared:
        ranks = player.ranks
        header, samples = ranks.from_first(lambda: episodes(folder / OWN, self.chat))
        scorer = Scorer(
            teacher=player.fingerprint(),
            **rendering(self.chat),
            temperature=player.standing.rollout.temperature,
            top_k=self.terms.top_k,
        )
        sft_teacher = ranks.from_first(partial(_sft, folder))
        about = {"name": self.model, "student": header.model, "sft_teacher": sft_teacher}
        mismatch = sft_teacher not in (None, scorer.teacher)
        if mismatch:
            _object(
                f"{self.model!r} ({scorer.teacher}) is to score, but another model ({sft_teacher}) played the "
                "episodes of the SFT: the student would be drawn to another fixed point (teacher consistency)",
                allow=self.terms.allow_mismatch,
            )
        scored, store = score(player, samples, folder / STORE, scorer, about, shard_tokens=self.terms.shard_tokens)
        return Prepared(summary(store, samples) | {"store/scored": float(scored), "store/mismatch": float(mismatch)})


class Offline(Method):
    """Runs the stage that `offline` describes."""

    def __init__(self, config: Any, chat: ChatFormat, *, terms: Terms, data: str | None) -> None:
        super().__init__(config, chat)
        self.terms, self.data = terms, data

    def prepare(self, player: Player, folder: Path) -> Prepared:
        ranks, temperature = player.ranks, player.standing.rollout.temperature
        folder = folder if self.data is None else Path(self.data).expanduser()
        header, samples = ranks.agree(lambda: episodes(folder / OWN, self.chat))
        store = ranks.agree(lambda: self._store(folder / STORE, temperature))
        sft_teacher = ranks.from_first(partial(_sft, folder)) or store.about["sft_teacher"]
        mismatch = sft_teacher not in (None, store.scorer.teacher)
        if mismatch and self.data is not None:
            _object(
                f"the store {store.folder} was scored by another model ({store.scorer.teacher}) than played the "
                f"episodes of the SFT ({sft_teacher})",
                allow=self.terms.allow_mismatch,
            )
        mismatch |= self._is_another_student(player, header.model)
        dataset = ranks.agree(lambda: with_scores(samples, store))
        return Prepared(summary(store, samples) | {"store/mismatch": float(mismatch)}, dataset)

    def _store(self, folder: Path, temperature: float) -> Store:
        """Open the store, made under the settings of this run. Raises DataError naming what differs."""
        store = open_store(folder)
        wanted = replace(store.scorer, **rendering(self.chat), temperature=temperature, top_k=self.terms.top_k)
        store.check(wanted)
        return store

    def _is_another_student(self, player: Player, played: str) -> bool:
        """True: the stage starts from other weights than `played` the episodes. A resumed one has moved since."""
        if player.standing.updates or (now := player.fingerprint()) == played:
            return False
        _object(
            f"the stored episodes were played by another model ({played}) than the one that is to train ({now}): they "
            "are not its own",
            allow=self.terms.allow_mismatch,
        )
        return True


def _object(problem: str, *, allow: bool) -> None:
    """Raise DataError, or warn where the user has allowed it."""
    if not allow:
        raise DataError(f"{problem}. Use the same one, or set mismatch: allow")
    logger.warning("mismatch: allow: %s", problem)


def _sft(folder: Path) -> str | None:
    """Return the fingerprint of who played the episodes that the SFT learned from; None where there was none."""
    path = folder / TEACHERS
    return EpisodeLog(path, read_episode).header().model if path.exists() else None


def episodes(path: Path, chat: ChatFormat) -> tuple[Header, list[Sample]]:
    """Read a file of episodes: return its header, which says who played, and their sequences, all to be distilled.

    Raises DataError where they were rendered by another tokenizer or template than this run's.
    """
    header, rows = EpisodeLog(path, read_episode).read(rendering(chat))
    samples = [to_sample(trajectory, segment, distill=1.0, route="distill") for trajectory, segment in segments(rows)]
    if not samples:
        raise DataError(f"{path} holds nothing that could be scored: {len(rows)} episodes were played, and all broke")
    return header, samples


def score(
    player: Player,
    samples: Sequence[Sample],
    folder: Path,
    scorer: Scorer,
    about: Mapping[str, Any],
    *,
    shard_tokens: int,
) -> tuple[int, Store]:
    """Have the player's model score what the store lacks; return how many positions it scored, and the store.

    The store holds each sequence once. After every `shard_tokens` tokens the scores are on disk, and stay there
    whatever happens. Ends early, with what there is, once `player.stopping()` is true. Raises DataError where the store
    is another scorer's, or cannot be written.
    """
    ranks = player.ranks
    store = ranks.agree(lambda: Store(folder, scorer, about=about) if ranks.first else None)
    unique = list({tokens_of(sample): sample for sample in samples}.values())
    missing = _missing(player, unique, store)
    pending: list[tuple[Tokens, StoredScores]] = []
    scored = 0
    for part, columns in player.read(unique, ranks.share(missing), top_k=scorer.top_k):
        found = [
            (tokens_of(unique[n]), StoredScores(*(values.tolist() for values in scores)))
            for n, *scores in zip(part, *columns, strict=True)
        ]
        pending += [entry for share in ranks.to_first(found) for entry in share]
        scored += sum(sum(unique[n].completion_mask) for n in part)
        ranks.from_first(partial(_write, store, pending, least=shard_tokens))
        player.progress.advance(len(part))
        if player.stopping():
            break
    ranks.from_first(partial(_write, store, pending, least=1))
    return int(ranks.sum([scored])[0]), ranks.agree(lambda: open_store(folder) if store is None else store)


def _missing(player: Player, unique: Sequence[Sample], store: Store | None) -> list[int]:
    """Return the indices of the samples that the first rank's store lacks, and tell how many are ahead."""
    missing = player.ranks.from_first(
        lambda: [n for n, s in enumerate(unique) if store is not None and tokens_of(s) not in store]
    )
    kept = len(unique) - len(missing)
    if kept and missing:
        player.progress.say(f"{kept:,} of {len(unique):,} sequences have their scores, and keep them")
    player.progress.expect(len(missing), "sequences")
    return missing


def _write(store: Store | None, pending: list[tuple[Tokens, StoredScores]], *, least: int) -> None:
    """Move what is pending into the store if it holds `least` tokens or more."""
    if store is not None and pending and sum(len(tokens.token_ids) for tokens, _ in pending) >= least:
        store.append(pending)
        pending.clear()


def tokens_of(sample: Sample) -> Tokens:
    """Return what a store knows a sample by."""
    return Tokens(tuple(sample.token_ids), tuple(sample.completion_mask))


def with_scores(samples: Sequence[Sample], store: Store) -> list[Sample]:
    """Return the samples with their stored scores. Raises DataError for one that has none."""
    scored = []
    for sample in samples:
        found = store.get(tokens_of(sample))
        scored.append(
            replace(
                sample,
                teacher_logprobs=sample.spread(found.logprobs),
                teacher_entropy=sample.spread(found.entropy),
                teacher_top_ids=[list(row) for row in found.top_ids] if store.scorer.top_k else None,
                teacher_top_logprobs=[list(row) for row in found.top_logprobs] if store.scorer.top_k else None,
            )
        )
    return scored


def summary(store: Store, samples: Sequence[Sample]) -> dict[str, float]:
    """Count what is stored, and the share of the samples' sequences whose scores are there, as metrics."""
    hits = sum(tokens_of(sample) in store for sample in samples)
    return {
        "store/sequences": float(len(store)),
        "store/positions": float(store.positions),
        "store/bytes": float(store.bytes),
        "store/hit_rate": hits / len(samples),
    }
