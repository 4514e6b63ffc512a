"""DeepSpeed's log. Other packages import DeepSpeed wherever it is installed, so it speaks in runs without it, too."""

from __future__ import annotations

import logging
import os


def quieten_deepspeed() -> None:
    """Keep DeepSpeed's warnings off the console, from its import on; its errors stay. `DS_LOG_LEVEL` leaves all in."""
    if "DS_LOG_LEVEL" not in os.environ:
        logging.getLogger("DeepSpeed").addFilter(_is_error)  # it sets the level itself when it is imported


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
