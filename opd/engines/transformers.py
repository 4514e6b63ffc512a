"""The embedded engine: batched sampling with the trainer's own model, on a CPU or a GPU.

Each conversation owns a slot of a key-value cache for as long as it lives, so that a new turn feeds only
the ids that were added. Rows need no padding on the left: a slot holds its tokens from column 0 on, new
ids are written behind them, and a query sees the columns up to its own position. A padded query writes
behind the row's end, and is overwritten before anything can see it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from opd.engines.base import Completion, Request, Sampling, Weights, check_request
from opd.engines.slots import SlotLayer, View, masks
from opd.errors import ModelError, NumbersError
from opd.models.causal import CausalModel
from opd.models.layers import NOT_EMBEDDED, USE_VLLM, Reach, reach_of
from opd.models.whole import why_not_finite
from opd.types import StopReason


@dataclass(slots=True)
class _Row:
    """A conversation in the engine: its slot, its cached ids, and the request in flight."""

    slot: int
    cached: list[int] = field(default_factory=list)
    """Ids whose keys and values lie in the slot, columns 0 on."""
    pending: list[int] = field(default_factory=list)
    """Ids to feed before the next one can be sampled."""
    request: Request | None = None
    uniforms: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class TransformersEngine:
    """Samples with `model` itself, so that an update of the weights needs no copy.

    Where the model that trains is cut into slices, `model` is a whole copy, and `refresh` brings it up to date.

    A forward pass feeds either new prompts (up to `prefill_tokens` padded ids) or one id for each running
    row. With the same requests in the same order, the same ids come out to the bit.
    """

    copies, revived = 1, 0

    def __init__(
        self, model: CausalModel, *, prefill_tokens: int = 8192, refresh: Callable[[], None] = lambda: None
    ) -> None:
        self._reach = _checked_reach(model.config)
        self.model = model
        self.refresh = refresh
        self.prefill_tokens = prefill_tokens
        self.policy_version = 0
        self._reset()

    def _reset(self) -> None:
        empty = torch.zeros(0, dtype=torch.long, device=self.model.device)
        self._view = View(slots=empty, columns=empty[:, None], span=0, room=(0, 0))
        layers = self.model.config.get_text_config().num_hidden_layers
        self._cache = Cache(layers=[SlotLayer(self._view) for _ in range(layers)])
        self._rows: dict[int, _Row] = {}
        self._free: list[int] = []

    def _check_idle(self, call: str) -> None:
        if any(row.request for row in self._rows.values()):
            raise RuntimeError(f"{call}() while requests are in flight")

    def begin(self, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        self._check_idle("begin")
        self.model.eval()  # gradient checkpointing would drop the cache
        self._sampling = sampling
        self._stop_ids = stop_ids

    def submit(self, request: Request) -> None:
        check_request(request)
        row = self._rows.get(request.session)
        if row is None:
            slot = self._free.pop() if self._free else len(self._rows)
            row = self._rows[request.session] = _Row(slot=slot)
        if row.request is not None:
            raise RuntimeError(f"session {request.session} already has a request in flight")
        # What the cache holds is a prefix of the new prompt unless the conversation forked.
        keep = _common_prefix(row.cached, request.prompt_ids[:-1])
        row.cached = row.cached[:keep]
        row.pending = request.prompt_ids[keep:]
        generator = torch.Generator().manual_seed(request.seed)
        row.uniforms = torch.rand(request.max_tokens, generator=generator, dtype=torch.float64).tolist()
        row.request, row.token_ids, row.logprobs = request, [], []

    def release(self, session: int) -> None:
        row = self._rows.pop(session, None)
        if row is not None:
            self._free.append(row.slot)

    def update_weights(self, weights: Weights, version: int) -> None:
        self._check_idle("update_weights")
        self.refresh()
        self._reset()
        self.policy_version = version

    def sleep(self) -> None:
        self._check_idle("sleep")
        self._reset()

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self._reset()

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """Run one forward pass: a prefill if anything waits for one, else one token for every running row.

        Raises NumbersError, with the weight that is to blame, where the model gives no finite log-probs.
        """
        running = [row for row in self._rows.values() if row.request is not None]
        rows = self._prefill_batch([row for row in running if len(row.pending) > 1]) or running
        if not rows:
            return []
        logits = self._forward(rows)
        ids, logprobs = sample(logits, [row.uniforms[len(row.token_ids)] for row in rows], self._sampling)
        if not all(map(math.isfinite, logprobs)):
            raise NumbersError(why_not_finite("the model that samples", self.model, self.policy_version))
        finished = []
        for row, token, logprob in zip(rows, ids, logprobs, strict=True):
            row.token_ids.append(token)
            row.logprobs.append(logprob)
            row.pending = [token]
            if token in self._stop_ids or len(row.token_ids) == row.request.max_tokens:  # type: ignore[union-attr]
                finished.append(self._finish(row))
        return finished

    def _finish(self, row: _Row) -> Completion:
        assert row.request is not None
        stopped = row.token_ids[-1] in self._stop_ids
        completion = Completion(
            session=row.request.session,
            token_ids=row.token_ids,
            logprobs=row.logprobs,
            stop_reason=StopReason.STOP if stopped else StopReason.LENGTH,
            policy_version=self.policy_version,
        )
        row.request, row.pending = None, []
        return completion

    def _prefill_batch(self, rows: list[_Row]) -> list[_Row]:
        """Choose as many waiting prompts as fit the budget once padded to the longest, the longest first."""
        rows = sorted(rows, key=lambda row: -len(row.pending))
        return rows[: max(1, self.prefill_tokens // len(rows[0].pending))] if rows else []

    def _forward(self, rows: list[_Row]) -> Tensor:
        """Feed every row's pending ids; return the logits after the last of them, [b, V] float32."""
        device = self.model.device
        width = max(len(row.pending) for row in rows)
        ids = torch.tensor([row.pending + [0] * (width - len(row.pending)) for row in rows], device=device)
        start = torch.tensor([len(row.cached) for row in rows], device=device)
        columns = start[:, None] + torch.arange(width, device=device)
        span = max(len(row.cached) + len(row.pending) for row in rows)
        self._view.slots = torch.tensor([row.slot for row in rows], device=device)
        self._view.columns = columns
        self._view.span = span
        self._view.room = max(row.slot for row in rows) + 1, max(len(row.cached) for row in rows) + width
        eager = self.model.config._attn_implementation == "eager"  # adds the mask to the scores
        mask = masks(self._view, self._reach, next(self.model.parameters()).dtype if eager else None)
        # A padded query's position must not lie beyond every real one: a table of learned positions may end there.
        hidden = self.model.hidden(ids, position_ids=columns.clamp(max=span - 1), mask=mask, cache=self._cache)
        last = torch.tensor([len(row.pending) - 1 for row in rows], device=device)
        for row in rows:
            row.cached = row.cached + row.pending
        return self.model.logits(hidden[torch.arange(len(rows), device=device), last])


def _checked_reach(config: Any) -> Reach:
    """Return how far the layers look back. Raises ModelError for a model that this engine would compute wrongly."""
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ModelError(
            f"rollout.engine = transformers needs a model with sdpa or eager attention; this one uses "
            f"{config._attn_implementation}."
        )
    try:
        return reach_of(config)
    except ValueError as error:
        raise ModelError(f"{NOT_EMBEDDED} this model: {error}. {USE_VLLM}") from error


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    size = min(len(a), len(b))
    return next((i for i in range(size) if a[i] != b[i]), size)


def sample(logits: Tensor, uniforms: Sequence[float], sampling: Sampling) -> tuple[list[int], list[float]]:
    """Draw one id a row by inverting the distribution function at that row's uniform number.

    `logits` is [b, V]. Returns ids and their natural log-probs under the distribution that was drawn from
    (temperature and truncation applied); greedy ids come with their log-probs at temperature 1. A row's
    draw depends on its own logits and number alone. Of logits that are not finite comes a log-prob that is not.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        logprobs = logits.log_softmax(-1)
        ids = logits.argmax(-1)
    else:
        logits = truncate(logits / sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        logprobs = logits.log_softmax(-1)
        # In float64: in float32 the sum over a large vocabulary swallows probabilities below 1e-7.
        mass = logprobs.double().exp().cumsum(-1)
        target = torch.tensor(uniforms, device=logits.device, dtype=mass.dtype)[:, None] * mass[:, -1:]
        # Rounding must not carry the target to the total: beyond it lies no id, or one of probability 0.
        target = torch.minimum(target, torch.nextafter(mass[:, -1:], torch.zeros_like(target)))
        # Where nothing is a number no id is found; the log-prob then says so, to whoever looks at it.
        ids = torch.searchsorted(mass, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    chosen = logprobs.gather(-1, ids[:, None])[:, 0]
    return ids.tolist(), chosen.tolist()


def truncate(logits: Tensor, *, top_p: float, top_k: int) -> Tensor:
    """Set what nucleus (`top_p`) and top-k sampling leave out to -inf; [b, V] -> [b, V]."""
    if top_k and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[:, -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        # An id stays if the ids before it hold less than top_p; the likeliest always stays.
        drop = (probs.cumsum(-1) - probs) >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(-1, index, drop), -torch.inf)
    return logits
