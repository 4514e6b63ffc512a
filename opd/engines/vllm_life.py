"""How vLLM starts in the trainer's own process and how it ends: on this rank's GPU, in nobody's process groups.

vLLM takes the process for its own. It keeps its groups in a module, where all engines of the process share them, and
ends every group there is with the first engine that ends, whoever made it. Here an engine that ends takes away what
vLLM made, once no other engine of the process needs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from opd.errors import ModelError
from opd.ranks.ranks import local_device, without_launcher


@dataclass
class _Groups:
    """The process groups that vLLM's engines of this process share."""

    engines: int = 0
    """How many use them."""
    made_default: bool = False
    """Whether vLLM made torch's default group, too, because nobody else had."""


_groups = _Groups()


def split(arguments: dict[str, Any]) -> dict[str, int]:
    """By which of vLLM's arguments an engine is more than one worker, and into how many."""
    kinds = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
    return {kind: arguments[kind] for kind in kinds if arguments.get(kind, 1) > 1}


def start(arguments: dict[str, Any]) -> Any:
    """An LLMEngine in this process, by vLLM's own arguments, on the GPU of `opd.ranks.ranks.local_device`.

    One that is `split` has its workers in processes of their own, from the first GPU on. On several ranks all start
    theirs at the same point, since vLLM makes groups over all of them. Changes the environment, which the caller puts
    back. Raises ModelError where vLLM refuses to start (nothing of it is left then), ImportError where it is missing.
    """
    from vllm import EngineArgs, LLMEngine
    from vllm.config import WeightTransferConfig

    from opd.engines.vllm_worker import register

    register()
    _guard_groups()
    settings, alone = {"disable_log_stats": True, **arguments}, not split(arguments)
    if alone:  # the launcher is the trainer's: the one worker is one of its ranks, on that one's GPU
        _say_place()
        settings = {"distributed_executor_backend": "external_launcher", **settings}
    transfer = WeightTransferConfig(**settings.pop("weight_transfer_config"))
    if not _groups.engines:
        _groups.made_default = alone and not dist.is_initialized()
    _groups.engines += 1
    try:
        return LLMEngine.from_engine_args(EngineArgs(weight_transfer_config=transfer, **settings))
    except BaseException as error:
        _groups.engines -= 1
        _clean_up()
        if isinstance(error, (ValueError, TypeError, RuntimeError, NotImplementedError, AssertionError)):
            why = str(error) or repr(error)
            raise ModelError(f"vLLM does not start with these settings of rollout.vllm: {why}") from error
        raise


def end(engine: Any, asleep: set[str]) -> None:
    """End an LLMEngine of `start`; `asleep` names the parts whose memory it has given back, if any."""
    try:
        if asleep:  # vLLM frees what sleeps as if it were mapped, and its allocator then refuses all that comes after
            engine.wake_up()
    finally:
        _groups.engines -= 1
        try:
            engine.engine_core.shutdown()
        finally:
            _clean_up()


def _say_place() -> None:
    """Tell vLLM's external launcher where this process is, as torchrun would."""
    device, grouped = local_device(), dist.is_initialized()
    if not grouped:  # vLLM makes a group of one, on a port that it chooses, whatever launcher there was
        for name in set(os.environ) - set(without_launcher(os.environ)):
            del os.environ[name]
        os.environ.update(WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(RANK=str(dist.get_rank() if grouped else 0), LOCAL_RANK=str(device))


def _guard_groups() -> None:
    """Have vLLM's engines end by `_clean_up`, also one that is garbage before anybody has closed it."""
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = _clean_up


def _clean_up() -> None:
    """vLLM's own, unless another engine needs the groups, and without those that vLLM did not make."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if not _groups.engines:
        with _groups_of_others_kept():
            cleanup_dist_env_and_memory()


@contextmanager
def _groups_of_others_kept() -> Iterator[None]:
    """Nobody can end torch's default group, which takes all others along, unless vLLM has made it."""
    destroy = dist.destroy_process_group

    def destroy_own(group: Any = None) -> None:
        if (group is None or group is dist.group.WORLD) and not _groups.made_default:
            return
        with suppress(ValueError):  # somebody has ended the default group, and this one with it
            destroy(group)

    dist.destroy_process_group = destroy_own
    try:
        yield
    finally:
        dist.destroy_process_group = destroy
