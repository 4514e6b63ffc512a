"""Keeps transformers' progress bars off the console, where a run shows its own state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import modeling_gguf_pytorch_utils as gguf
from transformers.utils import logging as hf_logging

from opd.ranks.deepspeed_log import quieten_deepspeed


@contextmanager
def no_bars() -> Iterator[None]:
    """Show no bar of weights that are read, dequantised or written; those of downloads, which may take long, stay."""
    quieten_deepspeed()  # which transformers imports when it writes weights
    shown, silent, bar = hf_logging.is_progress_bar_enabled(), are_progress_bars_disabled(), gguf.tqdm
    hf_logging.disable_progress_bar()  # and those of downloads
    if not silent:
        enable_progress_bars()
    gguf.tqdm = lambda tensors, **_: tensors
    try:
        yield
    finally:
        gguf.tqdm = bar
        if shown:
            hf_logging.enable_progress_bar()  # and those of downloads
        if silent:
            disable_progress_bars()
