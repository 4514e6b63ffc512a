"""Starting and ending vLLM in the trainer's own process: on this rank's GPU, without touching others' process groups.

vLLM behaves as if the process were its own. It keeps its groups in a module, where all engines of the process share
them, and ends every group there is with the first engine that ends, whoever made it. Here an ending engine removes what
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
    """The number of engines that use them."""
    made_default: bool = False
    """True: vLLM made torch's default group, too, because nobody else had."""


_groups = _Groups()


def split(arguments: dict[str, Any]) -> dict[str, int]:
    """The arguments of vLLM that split an engine over several workers, each with the number of parts."""
    kinds = ("tensor_parallel_size", "pipeline_parallel_size", "prefill_context_parallel_size", "data_parallel_size")
    return {kind: arguments[kind] for kind in kinds if arguments.get(kind, 1) > 1}


def start(arguments: dict[str, Any]) -> Any:
    """Start an LLMEngine in this process, by vLLM's own arguments, on the GPU of `opd.ranks.ranks.local_device`.

    A `split` engine has its workers in processes of their own, from the first GPU on. Several ranks start their engines
    at the same point, since vLLM makes groups over all of them. The environment changes; the caller restores it. Raises
    ModelError where vLLM refuses to start (nothing of it is left then), ImportError where it is missing.
    """
    from vllm import EngineArgs, LLMEngine
    from vllm.config import WeightTransferConfig

    from opd.engines.vllm_worker import register

    register()
    _guard_groups()
    settings, alone = {"disable_log_stats": True, **arguments}, not split(arguments)
    if alone:  # the launcher is the trainer's: the one worker is one of its ranks, on that one's GPU
        _set_rank_variables()
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


def _set_rank_variables() -> None:
    """Tell vLLM's external launcher this process's rank and GPU, as torchrun would."""
    device, grouped = local_device(), dist.is_initialized()
    if not grouped:  # vLLM makes a group of one, on a port that it chooses, whatever launcher there was
        for name in set(os.environ) - set(without_launcher(os.environ)):
            del os.environ[name]
        os.environ.update(WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.update(RANK=str(dist.get_rank() if grouped else 0), LOCAL_RANK=str(device))


def _guard_groups() -> None:
    """Make vLLM's engines end with `_clean_up`, also one that is garbage before anybody has closed it."""
    from vllm.v1.engine import core

    core.cleanup_dist_env_and_memory = _clean_up


def _clean_up() -> None:
    """Run vLLM's own clean-up, unless another engine needs the groups, and keep groups that vLLM did not make."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    if not _groups.engines:
        with _keep_groups_of_others():
            cleanup_dist_env_and_memory()


@contextmanager
def _keep_groups_of_others() -> Iterator[None]:
    """Let nobody end torch's default group, which would end all others, unless vLLM has made it."""
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
