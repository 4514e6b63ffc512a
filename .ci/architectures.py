"""The second table of docs/models.md: a small model of each architecture is loaded, trained, exported and sampled from.

`.ci/models.py` writes it. The models are those of tests/architectures.py, on a CPU in float32; vLLM is asked where it
is installed.
"""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from opd.engines.config import Limits, VllmConfig
from opd.engines.transformers import TransformersEngine
from opd.engines.weights import ModelWeights
from opd.errors import OpdError
from opd.models.config import ModelConfig
from opd.models.loading import Loaded, export, load
from tests.architectures import ARCHITECTURES, VOCABULARY, Architecture, engine_gap, write_checkpoint

BEGIN, END = "<!-- make models, architectures: begin -->", "<!-- make models, architectures: end -->"
COLUMNS = ("architecture", "layers", "log-probs", "trains", "export equal", "embedded engine", "vLLM")
NOT_RUN = "not run here"
STEPS = 12
SMALL = 1e-5
"""Nats that are no difference in float32."""


def row(architecture: Architecture) -> list[str]:
    """What is found of one architecture, as the cells of its row; an error is told in the cell where it arose."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        write_checkpoint(architecture, folder)
        cells = [f"`{architecture.name}`", architecture.kind]
        try:
            loaded = load(ModelConfig(name=str(folder)), device="cpu")
        except Exception as error:
            return [*cells, _why(error), *[""] * (len(COLUMNS) - len(cells) - 1)]
        return [
            *cells,
            _told(lambda: _nats(_loading_gap(loaded, folder))),
            _told(lambda: _training(loaded)),
            _told(lambda: _exporting(loaded, folder, Path(made) / "export")),
            _told(lambda: _nats(engine_gap(loaded.model.model, TransformersEngine(loaded.model)))),
            _told(lambda: _vllm(loaded)) if architecture.vllm else NOT_RUN,
        ]


def _told(find: Callable[[], str]) -> str:
    try:
        return find()
    except Exception as error:  # it belongs on the page, whatever it is
        return _why(error)


def _why(error: Exception) -> str:
    """The first sentence of a message, without the folder that was made for the model."""
    text = str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")
    text = " ".join("..." if word.startswith(("/", "'/", '"/')) else word for word in text.split()).replace("|", "\\|")
    return f"refused: {text}" if isinstance(error, OpdError) else f"fails: {type(error).__name__}: {text}"


def _nats(gap: float) -> str:
    return "equal" if gap <= SMALL else f"{gap:.0e} nats off"


@torch.no_grad()
def _log_probs(model: Any, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)  # type: ignore[no-any-return]


def _batch() -> Tensor:
    """Ids of four sequences, longer than the windows: [4, 48] long."""
    return torch.randint(3, VOCABULARY - 64, (4, 48), generator=torch.Generator().manual_seed(0))


def _whole(loaded: Loaded, folder: Path) -> Any:
    """Load a folder with transformers alone, with the attention that the trained model has."""
    kind = loaded.model.config._attn_implementation
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=kind)


def _loading_gap(loaded: Loaded, folder: Path) -> float:
    """How far our log-probs lie from those of transformers' whole model, with eager attention, in nats."""
    ids = _batch()
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        own = loaded.model.logits(loaded.model(ids, torch.arange(ids.numel()))).float().log_softmax(-1)
    return float((own - _log_probs(whole, ids).flatten(0, 1)).abs().max())


def _training(loaded: Loaded) -> str:
    """Train some steps on one batch: its loss must fall, and each trained weight must get a gradient."""
    model, ids = loaded.model, _batch()
    rows = torch.arange(ids.numel()).view(ids.shape)[:, :-1].flatten()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, reached = [], set()
    for _ in range(STEPS):
        model.train()
        loss = torch.nn.functional.cross_entropy(model.logits(model(ids, rows)), ids[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        reached |= {name for name, p in model.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        optimiser.step()
        losses.append(float(loss))
    model.eval()
    unreached = [name for name, p in model.named_parameters() if p.requires_grad and name not in reached]
    if unreached:
        return f"no gradient for {len(unreached)}, such as `{unreached[0]}`"
    return "yes" if losses[-1] < losses[0] - 0.1 else f"loss {losses[0]:.2f} to {losses[-1]:.2f}"


def _exporting(loaded: Loaded, base: Path, folder: Path) -> str:
    """Export, and compare the tensors' names, shapes and types with the base's, and log-probs after loading it."""
    export(loaded, folder)
    before, after = _headers(base), _headers(folder)
    if before != after:
        differing = sorted({name for name, _ in before.items() ^ after.items()})
        return f"{len(differing)} tensors differ, such as `{differing[0]}`"
    ids = _batch()
    gap = (_log_probs(_whole(loaded, folder).eval(), ids) - _log_probs(loaded.model.model, ids)).abs().max().item()
    return "yes" if gap <= SMALL else _nats(gap)


def _headers(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def _vllm(loaded: Loaded) -> str:
    if importlib.util.find_spec("vllm") is None:
        return NOT_RUN
    from opd.engines.vllm import VllmEngine

    with closing(VllmEngine(loaded.model, VllmConfig(kv_cache_gib=0.1), Limits(256, 8))) as engine:
        engine.update_weights(ModelWeights(loaded.model), 0)
        return _nats(engine_gap(loaded.model.model, engine))


def table() -> str:
    """Make the table: minutes on two cores."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about configs that nobody will use
        lines = [list(COLUMNS), ["---"] * len(COLUMNS), *(row(architecture) for architecture in ARCHITECTURES.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def rows_error(page: str) -> str | None:
    """Say why a page's table is not the one of these architectures, without running any; None where it is."""
    lines = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    if not cells or [cell.strip() for cell in cells[0]] != list(COLUMNS):
        return f"its columns are not {COLUMNS}"
    shown = [(row[0], row[1]) for row in cells[2:]]
    wanted = [(f"`{a.name}`", a.kind) for a in ARCHITECTURES.values()]
    if shown != wanted:
        return f"its rows differ: {sorted(set(shown) ^ set(wanted)) or 'their order'}"
    ragged = [row[0] for row in cells[2:] if len(row) != len(COLUMNS)]
    return f"rows lack cells: {ragged}" if ragged else None
