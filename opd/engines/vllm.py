"""vLLM in the trainer's own process: continuous batching over requests that come in at any time.

vLLM's queue is driven a step at a time, so that a new turn joins the running batch at once. What the engine holds
(weights, memory) is in `opd.engines.vllm_core`, servers are in `opd.engines.vllm_server`.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch

from opd.engines import vllm_life
from opd.engines.base import Completion, Request, Sampling, Weights, check_request
from opd.engines.config import Limits, VllmConfig
from opd.engines.scoring import Scores, check_rows, fits, scores_at, scoring_settings, values
from opd.engines.vllm_core import Core
from opd.engines.vllm_http import ServerFault
from opd.errors import ConfigError, EngineError, NumbersError
from opd.models.causal import CausalModel
from opd.types import StopReason

CPU_CACHE_GIB = 1.0


class VllmEngine:
    """Samples with vLLM's copy of the policy, whose log-probs are those of the distribution that was drawn from.

    Prefixes are cached across the turns of a conversation and between conversations that begin alike.
    """

    copies, revived = 1, 0

    def __init__(self, model: CausalModel, config: VllmConfig, limits: Limits) -> None:
        arguments = engine_args(model, config, limits)
        _refuse_lockstep(arguments)
        self.policy_version = 0
        self._sent = 0
        self._sessions: dict[str, Request] = {}
        self._seen: Counter[str] = Counter()
        """Tokens of prompts and of scored sequences, and of these in the cache."""
        self._core = Core(model, arguments, sleeps=config.sleep and model.device.type == "cuda")

    def begin(self, sampling: Sampling, stop_ids: frozenset[int]) -> None:
        self._check_ready("begin")
        self._sampling = sampling
        self._stop_ids = stop_ids

    def submit(self, request: Request) -> None:
        self._core.check_open("submit")
        check_request(request)
        if any(other.session == request.session for other in self._sessions.values()):
            raise RuntimeError(f"session {request.session} already has a request in flight")
        self._sent += 1
        name = f"{request.session}-{self._sent}"
        self._sessions[name] = request
        self._core.add(name, request.prompt_ids, sampling_settings(request, self._sampling, self._stop_ids))

    def step(self) -> list[Completion]:
        """Run one forward pass over everything that is in flight."""
        if not self._sessions:
            return []
        return [self._finish(output) for output in self._core.step()]

    def _finish(self, output: Any) -> Completion:
        request = self._sessions.pop(output.request_id)
        self._count("prompt", len(request.prompt_ids), output)
        [sampled] = output.outputs
        ids = list(sampled.token_ids)
        # Not strict: `completion` sees whether they are as many, and says so.
        logprobs = [at[token].logprob for at, token in zip(sampled.logprobs, ids, strict=False) if token in at]
        return completion(request, ids, logprobs, sampled.finish_reason, self._stop_ids, self.policy_version)

    def score(
        self, sequences: Sequence[list[int]], rows: Sequence[list[int]], *, top_k: int | None = None
    ) -> list[Scores]:
        """Score the ids that follow each row, and the top k there, at temperature 1 (`opd.engines.scoring`).

        At most `opd.engines.scoring.SCORE_VALUES` log-probs are in the engine at once. Nothing else may be in flight.
        """
        self._check_ready("score")
        check_rows(sequences, rows)
        waiting = deque(enumerate(sequences))
        running: dict[str, int] = {}
        found: dict[int, Scores] = {}
        while waiting or running:
            held = sum(values(sequences[number], top_k) for number in running.values())
            while waiting and fits(held, values(waiting[0][1], top_k)):
                number, ids = waiting.popleft()
                held += values(ids, top_k)
                self._sent += 1
                running[f"score-{self._sent}"] = number
                self._core.add(f"score-{self._sent}", ids, scoring_settings(top_k or 0))
            for output in self._core.step():
                number = running.pop(output.request_id)
                self._count("scored", len(sequences[number]), output)
                found[number] = _scores(output, sequences[number], rows[number], top_k or 0)
        return [found[number] for number in range(len(sequences))]

    def _count(self, what: str, tokens: int, output: Any) -> None:
        self._seen.update({what: tokens, f"{what}_cached": output.num_cached_tokens or 0})

    def release(self, session: int) -> None:
        """Abort what the conversation has in flight; its cached prefix goes when room is needed."""
        for name in [name for name, request in self._sessions.items() if request.session == session]:
            del self._sessions[name]
            self._core.abort(name)

    def update_weights(self, weights: Weights, version: int) -> None:
        self._check_idle("update_weights")
        self._core.load(weights)
        self.policy_version = version

    def sleep(self) -> None:
        self._check_idle("sleep")
        self._core.sleep()

    def metrics(self) -> dict[str, float]:
        """`prefix_hits`: the share of the prompts' tokens that were found in the cache; `score_prefix_hits`: the share
        of the scored tokens.
        """
        seen, self._seen = self._seen, Counter()
        names = {"prefix_hits": "prompt", "score_prefix_hits": "scored"}
        return {name: seen[f"{of}_cached"] / seen[of] for name, of in names.items() if seen[of]}

    def close(self) -> None:
        """End the engine and give its memory back (`opd.engines.vllm_core.Core.close`)."""
        self._sessions.clear()
        self._core.close()

    def _check_ready(self, call: str) -> None:
        self._check_idle(call)
        if not self._core.whole:
            raise RuntimeError(f"{call}() before the engine was given weights")

    def _check_idle(self, call: str) -> None:
        self._core.check_open(call)
        if self._sessions:
            raise RuntimeError(f"{call}() while requests are in flight")


def _refuse_lockstep(arguments: dict[str, Any]) -> None:
    """Raise ConfigError where one of several trainers asks for an engine of several workers."""
    trainers = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    split = vllm_life.split(arguments)
    if trainers > 1 and split:
        settings = ", ".join(f"rollout.vllm.{name} = {size}" for name, size in split.items())
        raise ConfigError(
            f"{settings} in the process of one of {trainers} trainers would need them in lockstep. "
            "Use rollout.engine: vllm_server, or 1."
        )


def engine_args(model: CausalModel, config: VllmConfig, limits: Limits) -> dict[str, Any]:
    """The arguments of vLLM for an engine that begins without weights and gets those of `model`."""
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return {
        "dtype": dtype if config.dtype == "auto" else config.dtype,
        "load_format": "dummy",
        **({} if model.whole_config is model.config else {"language_model_only": True}),
        **common_arguments(config, limits, on_cpu=model.device.type == "cpu"),
    }


def common_arguments(config: VllmConfig, limits: Limits, *, on_cpu: bool) -> dict[str, Any]:
    """The arguments with which vLLM samples from the policy and from nothing else, by vLLM's own names."""
    cache = config.kv_cache_gib or (CPU_CACHE_GIB if on_cpu else None)
    return {
        "max_model_len": limits.max_length,
        "max_num_seqs": limits.concurrency,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": config.tensor_parallel_size,
        "enforce_eager": config.enforce_eager or on_cpu,
        "max_logprobs": -1,  # a teacher may be asked for more than vLLM's 20
        "logprobs_mode": "processed_logprobs",  # after temperature and truncation, as they were drawn
        "generation_config": "vllm",  # not the checkpoint's own sampling settings
        "skip_tokenizer_init": True,
        "weight_transfer_config": {"backend": "opd_weights"},
        **({"kv_cache_memory_bytes": int(cache * 2**30)} if cache else {}),
        **({"block_size": 32} if on_cpu else {}),  # vLLM's 128 there would find no prefix of a short episode
        **config.engine_args,
    }


def _scores(output: Any, ids: list[int], rows: list[int], top_k: int) -> Scores:
    positions = [
        {token: (at.logprob, at.rank) for token, at in output.prompt_logprobs[row + 1].items()} for row in rows
    ]
    try:
        return scores_at(positions, [ids[row + 1] for row in rows], top_k)
    except ServerFault as fault:
        raise EngineError(f"vLLM scored a sequence wrongly: {fault}") from fault


def sampling_settings(request: Request, sampling: Sampling, stop_ids: frozenset[int]) -> dict[str, Any]:
    """The settings of a request: only our stop ids end it, and the sampled ids' log-probs come with them."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": request.seed,
        "max_tokens": request.max_tokens,
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }


def completion(
    request: Request,
    token_ids: list[int],
    logprobs: Sequence[float],
    finish_reason: str | None,
    stop_ids: frozenset[int],
    version: int,
) -> Completion:
    """Make a completion. Raises EngineError where the sampled ids cannot answer the request, and NumbersError where
    their log-probs are no numbers."""
    problem = None
    if any(map(math.isnan, logprobs)):
        raise NumbersError(
            f"vLLM gives log-probs that are nan with the weights after step {version}: they hold nan or infinity, or "
            "its type overflows. A lower train.lr, or model.dtype: float32, may help, or another checkpoint"
        )
    stopped = bool(token_ids) and token_ids[-1] in stop_ids
    if finish_reason not in ("stop", "length"):
        problem = f"it ended by {finish_reason!r}"
    elif not 1 <= len(token_ids) <= request.max_tokens:
        problem = f"it has {len(token_ids)} tokens, where 1 to {request.max_tokens} were asked for"
    elif len(logprobs) != len(token_ids):
        problem = f"it has {len(token_ids)} tokens but {len(logprobs)} log-probs"
    elif not all(-1e6 < value <= 1e-3 for value in logprobs):
        problem = f"a log-prob is {next(value for value in logprobs if not -1e6 < value <= 1e-3)}"
    elif any(token in stop_ids for token in token_ids[:-1]):
        problem = "it goes on after a stop token"
    elif not stopped and len(token_ids) < request.max_tokens:
        problem = f"it ends after {len(token_ids)} of {request.max_tokens} tokens without a stop token"
    if problem:
        raise EngineError(f"a completion of session {request.session} is not whole: {problem}")
    return Completion(
        session=request.session,
        token_ids=token_ids,
        logprobs=list(logprobs),
        stop_reason=StopReason.STOP if stopped else StopReason.LENGTH,
        policy_version=version,
    )
