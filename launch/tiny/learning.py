"""How a tiny model learns in its warm start: the loss, the two optimisers, and the steps of a round."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from opd.launch.tiny import muon
from opd.maths.logprobs import chunked_logprobs
from opd.models.causal import CausalModel
from opd.objective.collate import Batch, collate
from opd.types import Sample


def steps_of(
    student: CausalModel,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Iterable[list[Sample]],
    pad_id: int,
    count: int,
    peak: float,
) -> Iterator[float]:
    """Take `count` steps, whose rates rise to their `peak` share and fall to nothing again; yield the loss of each."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for step, samples in enumerate(batches):
        loss = cross_entropy(student, collate(samples, pad_id))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        factor = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / count))
        for group in groups:
            group["lr"] = group.setdefault("rate", group["lr"]) * factor * peak
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        yield float(loss.detach())


def cross_entropy(student: CausalModel, batch: Batch) -> Tensor:
    """Return the mean over what the assistant says, in nats.

    The objective of supervised training is the same; here it stands alone, so that the model depends on no other part.
    """
    hidden = student(batch.input_ids, batch.rows)
    return -chunked_logprobs(hidden, student.head(), batch.targets, weights=batch.ce_weight / len(batch.targets))


def optimizers_of(model: LlamaForCausalLM, inner_rate: float, outer_rate: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices inside the layers, AdamW for the rest.

    Copying from the prompt is learned all at once after a plateau; with AdamW alone this took three times as
    many steps, and on some seeds did not happen in a minute.
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in chosen]
    return [
        muon.Muon(inner, lr=inner_rate),
        torch.optim.AdamW(outer, lr=outer_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
