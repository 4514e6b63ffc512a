"""A teacher behind vLLM servers: asked about a step's samples before each pass over them, never held in memory.

It answers what vLLM can (`opd.engines.scoring`): the log-prob of each sampled id, or its own top k, at temperature 1.
Its scores are written into the samples as stored ones are (`opd.teachers.store`), so the losses are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from opd.engines.scoring import Scores, VllmScorer
from opd.types import Sample


class ServedTeacher:
    """Asks servers for scores: of the sampled ids, and with `top_k` > 0 of that many likeliest ids too."""

    def __init__(self, scorer: VllmScorer, top_k: int) -> None:
        self.scorer = scorer
        self.top_k = top_k

    def asked(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples with the teacher's scores of their ids, in the context of their teacher's views.

        Samples without a view are not sent, and get scores that carry no weight. Raises EngineError once every retry is
        spent.
        """
        views = [s.teacher_view for s in samples if s.teacher_view is not None]
        if not views:
            return list(samples)
        found = self.scorer.score([v.token_ids for v in views], [v.rows for v in views], top_k=self.top_k or None)
        scores = iter(found)
        return [
            _with_scores(s, next(scores) if s.teacher_view else self._weightless_scores(sum(s.completion_mask)))
            for s in samples
        ]

    def _weightless_scores(self, count: int) -> Scores:
        ids, logprob = list(range(self.top_k)), -math.log(max(self.top_k, 1))
        return Scores([0.0] * count, [ids] * count, [[logprob] * self.top_k] * count)


def _with_scores(sample: Sample, scores: Scores) -> Sample:
    top = bool(scores.top_ids and scores.top_ids[0])
    return replace(
        sample,
        teacher_view=None,
        teacher_logprobs=sample.spread(scores.logprobs),
        teacher_top_ids=scores.top_ids if top else None,
        teacher_top_logprobs=scores.top_logprobs if top else None,
    )
