"""The backend of many processes: DeepSpeed with the user's own JSON (ZeRO 0 to 3, offload, several machines).

DeepSpeed wraps a module whose forward pass runs the work at hand: ZeRO-3 gathers a module's weights when its forward
pass is called inside the wrapped one, and so finds the decoder's layers. The head is no module that is called: it is
gathered when it is asked for, and held until the backward pass of the micro-batch is over, since its gradient needs a
place of its size.
"""

from __future__ import annotations

import math
import shutil
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar, cast

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from opd.backends.config import TrainConfig
from opd.backends.schedule import schedule_of
from opd.errors import CheckpointError, ConfigError, ModelError
from opd.models.causal import CausalModel
from opd.models.sharding import is_sharded, whole
from opd.objective.objective import Objective
from opd.ranks.ranks import Ranks

T = TypeVar("T")

_TAG = "deepspeed"
"""The folder inside a checkpoint to which DeepSpeed writes."""


class _Wrapped(nn.Module):
    """Holds the model; its forward pass runs the work at hand and leaves the result in `result`."""

    def __init__(self, model: CausalModel) -> None:
        super().__init__()
        self.model = model
        self.work: Callable[[], Any] = lambda: None
        self.result: Any = None

    def forward(self) -> Tensor:
        self.result = self.work()
        loss = self.result.loss if isinstance(self.result, Objective) else None
        # DeepSpeed's hooks look for tensors among the outputs; work that only looks has none for them.
        return torch.zeros(()) if loss is None else loss


class ZeroModel:
    """A model in a DeepSpeed engine that does not train; with ZeRO-3 it is cut into slices.

    `settings` is a DeepSpeed configuration without "auto" (`opd.backends.deepspeed_json.fill`, `reading`). Every rank
    does the same with it, in the same order.
    """

    def __init__(self, model: CausalModel, settings: dict[str, Any], **options: Any) -> None:
        self.model = model
        self._wrapped = _Wrapped(model)
        try:
            self._engine, _, _, self._schedule = deepspeed.initialize(
                model=self._wrapped, config=settings, dist_init_required=False, **options
            )
        except (AssertionError, ValueError, TypeError, KeyError, ImportError) as error:
            raise ConfigError(f"deepspeed: DeepSpeed cannot work by these settings: {error!r}") from error
        self._engine.eval()  # no dropout: the loop decides what is recomputed
        self._stage = int(self._engine.zero_optimization_stage())
        self._open = ExitStack()
        if self._stage == 3:
            model.gather_head, model.release = self._gather_head, self._release

    @torch.no_grad()
    def look(self, work: Callable[[], T]) -> T:
        """Run `work`, which uses the model, without making a graph; every rank must call it."""
        self._run(work)
        self._open.close()
        result: T = self._wrapped.result
        self._wrapped.result = None
        return result

    def _gather_head(self) -> None:
        self._open.close()
        # A pass that asks for the head alone was expected to begin with the embedding, which is on its way already; if
        # it is the head, gathering it would find nothing to do, and not wait.
        if any(p.ds_status is ZeroParamStatus.INFLIGHT for p in self.model.head_parameters):  # type: ignore[attr-defined]
            self._engine.optimizer.empty_partition_cache()
        self._open.enter_context(whole(self.model.head_parameters))

    def _release(self) -> None:
        self._open.close()
        self._engine.optimizer.empty_partition_cache()  # the engine's own also collects garbage, which takes seconds

    def _run(self, work: Callable[[], Any]) -> Tensor:
        self._wrapped.work = work
        try:
            output: Tensor = self._engine()
        finally:
            self._wrapped.work = lambda: None  # it holds the batch
        return output

    def close(self) -> None:
        """Free what weights, gradients and optimiser take.

        DeepSpeed's caches keep modules and hooks reachable for as long as the process lives: their memory would be
        there twice when a method's next stage begins.
        """
        engine = self._engine
        engine.destroy()
        for parameter in self.model.parameters():
            parameter.grad = None
            for store in (parameter, parameter.ds_tensor) if is_sharded(parameter) else (parameter,):  # type: ignore[attr-defined]
                store.data = store.data.new_empty(0)
        for optimizer in (engine.optimizer, engine.basic_optimizer):
            if optimizer is not None:
                vars(optimizer).clear()
        engine.optimizer = None  # it is destroyed


class ZeroBackend(ZeroModel):
    """One of the ranks that train `model` together.

    The optimiser is DeepSpeed's, by `settings`, and so is the schedule, if there is one in it; else `config` says.
    """

    def __init__(
        self, model: CausalModel, config: TrainConfig, settings: dict[str, Any], ranks: Ranks, *, total_steps: int
    ) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ModelError("no parameter of the model requires a gradient: there is nothing to train")
        self.ranks = ranks
        self._waiting = False  # whether gradients wait for a step

        def schedule(optimizer: Any) -> Any:
            return schedule_of(config, optimizer, total_steps)

        lr_scheduler = None if "scheduler" in settings else schedule
        super().__init__(model, settings, model_parameters=trained, lr_scheduler=lr_scheduler)
        if self._engine.dp_world_size != ranks.world_size:
            raise ConfigError(
                f"the DeepSpeed settings leave {self._engine.dp_world_size} data-parallel ranks of {ranks.world_size}: "
                "only data parallelism is supported; remove tensor, sequence and pipeline parallelism"
            )
        # Then DeepSpeed leaves all to the optimiser, and neither tells a norm nor stops at one that is not finite.
        self._bare = self._stage == 0 and not (self._engine.fp16_enabled() or self._engine.bfloat16_enabled())

    @property
    def device(self) -> torch.device:
        return torch.device(self._engine.device)

    @property
    def lr(self) -> float:
        return float(self._engine.get_lr()[0])

    @property
    def scales_loss(self) -> bool:
        """True where the loss scale is dynamic: DeepSpeed lowers it at every overflow, and raises at its least."""
        return bool(self._engine.fp16_enabled() and self._engine.dynamic_loss_scale())

    def train(self, work: Callable[[], Objective], *, last: bool) -> Objective:
        """Run the forward and the backward pass of one micro-batch; `last` marks the step's last one on every rank."""
        self._engine.set_gradient_accumulation_boundary(last)
        loss = self._run(work)
        # DeepSpeed averages the ranks' gradients; ours are to be summed.
        self._engine.backward(loss * self.ranks.world_size)
        self._open.close()
        self._waiting = True
        return replace(cast(Objective, self._wrapped.result), loss=loss.detach())

    def step(self) -> float:
        """Clip, update and advance the schedule unless the gradients' norm is not finite; return the norm."""
        if not self._waiting:  # no rank had anything to train
            self._schedule.step()
            return 0.0
        self._waiting = False
        if self._bare and not math.isfinite(norm := self._norm()):
            self._engine.zero_grad()
            return norm
        self._engine.step()
        return norm if self._bare else float(self._engine.get_global_grad_norm())

    def _norm(self) -> float:
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]))

    def save(self, folder: Path) -> None:
        """Write DeepSpeed's own checkpoint of what trains to `deepspeed/`; every rank writes its part."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)

    def load(self, folder: Path, *, saved_ranks: int) -> None:
        """Read what `save` wrote, through a universal checkpoint where the number of ranks was another."""
        if self._stage == 0 or saved_ranks == self.ranks.world_size:
            self._load(folder)
            return
        aside = folder.with_name(f".{folder.name}.universal")
        self.ranks.from_first(lambda: _make_universal(folder / _TAG, aside / _TAG))
        settings = self._engine._config
        settings.load_universal_checkpoint = True
        try:
            self._load(aside)
        finally:
            settings.load_universal_checkpoint = False
        self.ranks.wait()
        if self.ranks.first:
            shutil.rmtree(aside)

    def _load(self, folder: Path) -> None:
        try:
            self._engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        except (RuntimeError, KeyError, AssertionError, OSError) as error:
            raise CheckpointError(f"DeepSpeed cannot load {folder / _TAG}: {error}") from error


def _make_universal(source: Path, target: Path) -> None:
    """Convert to files that any number of ranks can load, with DeepSpeed's tool; they take the checkpoint's size."""
    from deepspeed.checkpoint import ds_to_universal

    shutil.rmtree(target.parent, ignore_errors=True)
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,  # more would be forked from a process that has threads
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        ds_to_universal.main(options)
