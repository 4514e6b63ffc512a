"""Reads samples without training on them: what the teacher says, what the student said before its
first update, and whether the engine samples from the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from opd.backends.base import Backend
from opd.engines.base import Completion, RolloutEngine
from opd.engines.preflight import SEQUENCES, check_gap, choose, sample_plainly
from opd.episodes.config import RolloutConfig
from opd.errors import Interrupted
from opd.losses import Sampler, check_known
from opd.maths.logprobs import chunked_logprobs, chunked_scores, chunked_top_k
from opd.models.causal import CausalModel
from opd.objective.collate import Batch, collate, empty_batch, microbatches
from opd.teachers.teacher import Teacher
from opd.types import Sample, TrajectoryGroup

_TYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of an engine's weights, by their names in the settings; None: that of the model that trains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """The model that trains and the one that teaches, how both are held, and how samples become batches for them."""

    student: CausalModel
    teacher: Teacher
    backend: Backend
    sampler: Sampler
    pad_id: int
    tokens_per_microbatch: int

    def batch(self, samples: list[Sample]) -> Batch:
        """The samples as one batch; without samples, one for a rank that has nothing to do while another one does."""
        batch = collate(samples, self.pad_id) if samples else empty_batch(self.pad_id)
        return batch.to(self.backend.device)


def evaluate_in_batches(
    models: Models, samples: Sequence[Sample], indices: Sequence[int], work: Callable[[Batch], tuple[Tensor, ...]]
) -> Iterator[tuple[list[int], list[Sequence[Tensor]]]]:
    """Run `work` without gradients over the samples; yield its [N, ...] outputs split by sample.

    Yields, for each micro-batch, the indices of its samples and, for each output, one tensor a sample; on all ranks
    equally often.
    """
    parts = microbatches([samples[i] for i in indices], models.tokens_per_microbatch)
    for number in range(models.backend.ranks.most(len(parts))):
        part = [indices[i] for i in parts[number]] if number < len(parts) else []
        batch = models.batch([samples[i] for i in part])
        columns = models.backend.look(partial(work, batch))
        yield part, [column.split(batch.lengths) if part else () for column in columns]


def with_teacher_scores(
    models: Models, samples: Sequence[Sample], *, stopping: Callable[[], bool] = lambda: False
) -> tuple[list[Sample], dict[int, Tensor]]:
    """The samples with the teacher's log-probs and entropies, and its hidden states [tokens, H] by index of sample.

    Raises Interrupted, on all ranks, between two micro-batches once `stopping`, which says the same on all of them.
    """

    def score(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        taught = models.teacher.teach(batch)
        scores = chunked_scores(*taught, batch.targets, temperature=models.sampler.temperature)
        return taught.hidden, scores.logprobs.cpu(), scores.entropy.cpu()

    scored, hidden = list(samples), {}
    viewed = [i for i, s in enumerate(samples) if s.teacher_view is not None]
    for part, (states, logprobs, entropy) in evaluate_in_batches(models, samples, viewed, score):
        for i, own, likely, unsure in zip(part, states, logprobs, entropy, strict=True):
            hidden[i] = own
            scored[i] = replace(
                samples[i],
                teacher_logprobs=samples[i].spread(likely.tolist()),
                teacher_entropy=samples[i].spread(unsure.tolist()),
            )
        if stopping():
            raise Interrupted
    return scored, hidden


def with_old_logprobs(models: Models, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the log-probs of the student as it is now, before the first update."""

    def score(batch: Batch) -> tuple[Tensor]:
        hidden, head = models.student(batch.input_ids, batch.rows), models.student.head()
        return (chunked_logprobs(hidden, head, batch.targets, temperature=models.sampler.temperature).cpu(),)

    scored = list(samples)
    for part, (logprobs,) in evaluate_in_batches(models, samples, list(range(len(samples))), score):
        for i, values in zip(part, logprobs, strict=True):
            scored[i] = replace(samples[i], old_logprobs=samples[i].spread(values.tolist()))
    return scored


def own_scores(models: Models, top_k: int, batch: Batch) -> tuple[Tensor, ...]:
    """The student's word on each of a batch's N sampled tokens: its log-prob [N], the entropy [N], and the ids and
    log-probs [N, k] of the `top_k` likeliest entries."""
    hidden, head = models.student(batch.input_ids, batch.rows), models.student.head()
    temperature = models.sampler.temperature
    scores = chunked_scores(hidden, head, batch.targets, temperature=temperature)
    ids, logprobs = torch.empty(2, len(hidden), 0)
    if top_k:
        ids, logprobs = chunked_top_k(hidden, head, top_k, temperature=temperature)
    return scores.logprobs.cpu(), scores.entropy.cpu(), ids.cpu(), logprobs.cpu()


def probes(engine: RolloutEngine, groups: Sequence[TrajectoryGroup], rollout: RolloutConfig) -> list[Sample]:
    """Let the engine, which must be idle and awake, go on with some of these episodes; what it sampled, for
    `check_sampler`. Neither the episodes nor a random number of the run are touched."""
    segments = [segment for group in groups for t in group.trajectories for segment in t.segments()]
    sequences = [[i for turn in segment.turns for i in turn.prompt_ids + turn.completion_ids] for segment in segments]
    chosen = choose(sequences, max(SEQUENCES, engine.copies))
    return [_probe(prompt, done) for prompt, done in sample_plainly(engine, chosen, max_length=rollout.max_length)]


def _probe(prompt: list[int], done: Completion) -> Sample:
    """A sample that carries no weight, since nothing trains on it."""
    sampled = len(done.token_ids)
    ids, nothing = prompt + done.token_ids, [0.0] * (len(prompt) + sampled)
    return Sample(
        token_ids=ids,
        completion_mask=[0] * len(prompt) + [1] * sampled,
        turn=[0] * len(ids),
        sampler_logprobs=[float("nan")] * len(prompt) + done.logprobs,
        policy_weight=nothing,
        distill_weight=nothing,
        ce_weight=nothing,
        advantage=nothing,
    )


def check_sampler(models: Models, asked: Sequence[Sample], rollout: RolloutConfig) -> bool:
    """Compare the log-probs of `probes` with the student's (`opd.engines.preflight`).

    Returns False where no rank has any to compare. Raises ModelError, on all ranks, if they differ, and ConfigError for
    an engine's type that is not known.
    """
    check_known("rollout.vllm.dtype", rollout.vllm.dtype, _TYPES)
    ranks = models.backend.ranks
    if not ranks.any(bool(asked)):
        return False
    engine_dtype = None if rollout.engine == "transformers" else _TYPES[rollout.vllm.dtype]

    def score(batch: Batch) -> tuple[Tensor, Tensor]:
        own = chunked_logprobs(models.student(batch.input_ids, batch.rows), models.student.head(), batch.targets)
        return own.cpu(), batch.sampler_logprobs.cpu()

    found = [
        pair
        for _, columns in evaluate_in_batches(models, asked, range(len(asked)), score)
        for pair in zip(*columns, strict=True)
    ]

    def compare() -> None:
        if found:
            own, sampled = (torch.cat(column) for column in zip(*found, strict=True))
            check_gap(own, sampled, dtype=next(models.student.parameters()).dtype, engine_dtype=engine_dtype)

    ranks.agree(compare)
    return True
