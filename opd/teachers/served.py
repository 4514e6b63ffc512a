"""A teacher behind vLLM servers: asked about a step's samples before each pass over them, never held in memory.

It says what vLLM can (`opd.engines.scoring`): the log-prob of each sampled id, or its own top k, at temperature 1.
What came back stands on the samples as a stored teacher's word does (`opd.teachers.store`), so the losses are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from opd.engines.scoring import Scores, VllmScorer
from opd.types import Sample


class ServedTeacher:
    """Asks the servers. With `top_k` it learns their likeliest ids too; 0: of the sampled ones alone."""

    def __init__(self, scorer: VllmScorer, top_k: int) -> None:
        self.scorer = scorer
        self.top_k = top_k

    def asked(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the teacher's word on their own ids, in the context of their teacher's views.

        Those that it is not to see are not sent, and get a word without weight. Raises EngineError once every retry is
        spent.
        """
        views = [s.teacher_view for s in samples if s.teacher_view is not None]
        if not views:
            return list(samples)
        found = self.scorer.score([v.token_ids for v in views], [v.rows for v in views], top_k=self.top_k or None)
        scores = iter(found)
        return [_told(s, next(scores) if s.teacher_view else self._nothing(sum(s.completion_mask))) for s in samples]

    def _nothing(self, count: int) -> Scores:
        ids, logprob = list(range(self.top_k)), -math.log(max(self.top_k, 1))
        return Scores([0.0] * count, [ids] * count, [[logprob] * self.top_k] * count)


def _told(sample: Sample, scores: Scores) -> Sample:
    top = bool(scores.top_ids and scores.top_ids[0])
    return replace(
        sample,
        teacher_view=None,
        teacher_logprobs=sample.spread(scores.logprobs),
        teacher_top_ids=scores.top_ids if top else None,
        teacher_top_logprobs=scores.top_logprobs if top else None,
    )
