"""A run in Weights & Biases. A failure here is logged once and never ends the training.

wandb's files live in `<run>/wandb/`, or where WANDB_DIR says. The run's id is kept in the run's folder, so that a
resumed run goes on under the same id: online the service appends to it. Offline wandb cannot append and opens a new
folder, so the rows before the resumed step are written again: the newest folder, synced alone, gives the whole run.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from opd.errors import ConfigError
from opd.secrets import redact, redacted
from opd.tracking.config import TrackingConfig

_log = logging.getLogger(__name__)

INIT_SECONDS = 30.0
"""Seconds that the service may take to open a run; wandb's own default is 90."""
PROJECT = "opd"
"""The project where neither the settings nor WANDB_PROJECT name one."""
VARIABLES = {
    "project": "WANDB_PROJECT",
    "name": "WANDB_NAME",
    "id": "WANDB_RUN_ID",
    "dir": "WANDB_DIR",
    "resume": "WANDB_RESUME",
}
"""wandb's own variables for what we give it ourselves; it reads the others (WANDB_ENTITY, WANDB_TAGS) without help."""
FINISH_SECONDS = 60.0
"""Seconds that uploading may take at the end; wandb's own default is for ever. The rest stays on disk."""


class WandbRun:
    """One open wandb run; every call on it is safe."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log one row under our own step number. nan and inf go as they are: wandb has a form for them."""
        # commit: without it the row of a given step is held back until the next step comes.
        self._safely(lambda: self._run.log(dict(metrics), step=step, commit=True))

    def finish(self, exit_code: int) -> None:
        """Close the run; waits `FINISH_SECONDS` at most.

        wandb's own process may still write the end of an offline file for a moment; it is whole when this
        process exits.
        """
        self._safely(lambda: self._run.finish(exit_code=exit_code))

    def _safely(self, call: Callable[[], object]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:
            self._run = None
            _log.warning("wandb failed and is off from here on (%s); metrics.jsonl goes on", _first_line(error))
            if isinstance(error, ConnectionError):
                _forget_service()


def open_run(
    folder: Path,
    config: TrackingConfig,
    *,
    run_config: Mapping[str, Any],
    history: Sequence[tuple[int, Mapping[str, float | None]]],
    say: Callable[[str], None],
) -> WandbRun | None:
    """Open the wandb run of a run folder, or None where wandb is off.

    `history` holds the rows of earlier processes of this run, [] for a new run; `say` prints a line.
    Raises ConfigError when wandb is asked for by name but not installed.
    """
    if config.wandb == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        if config.wandb != "auto":
            raise ConfigError(
                f"tracking.wandb = {config.wandb} needs the package wandb: pip install 'opd[wandb]', "
                "or set tracking.wandb to auto or disabled"
            ) from error
        say("wandb is not installed: metrics go to the run folder alone")
        return None
    arguments = _arguments(folder, config, run_config, going_on=bool(history))
    try:
        with _redacted_command_line():
            wandb.setup(wandb.Settings(silent=True, console="off"))
            mode = auto_mode() if config.wandb == "auto" else config.wandb
            return None if mode == "disabled" else _start(mode, arguments, history)
    except Exception as error:
        _log.warning("wandb cannot start (%s); metrics go to the run folder alone", _first_line(error))
        return None


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """Let wandb, which writes down how the process was started, see no secret that was given there."""
    before = sys.argv
    sys.argv = [redact(argument) for argument in before]
    try:
        yield
    finally:
        sys.argv = before


def _arguments(
    folder: Path, config: TrackingConfig, run_config: Mapping[str, Any], *, going_on: bool
) -> dict[str, Any]:
    """The arguments of `wandb.init`; `going_on` is true where earlier processes logged rows of this run.

    wandb's own variables stand above our defaults and below what the settings say: an argument hides its variable, so
    that a default whose variable is set is not among them.
    """
    given = {"project": config.project, "name": config.name}
    defaults = {"project": PROJECT, "name": redact(folder.resolve().name), "dir": str(folder), "resume": "allow"}
    own = {name: value for name, value in defaults.items() if not os.environ.get(VARIABLES[name])}
    return {
        **own,
        **{name: redact(value) for name, value in given.items() if value is not None},
        "id": _run_id(folder / "wandb" / "run-id.txt", keep=going_on),
        "reinit": "create_new",  # leave alone any run that the caller's own code has open
        "config": redacted(run_config),
    }


def _start(
    mode: Literal["online", "offline"],
    arguments: Mapping[str, Any],
    history: Sequence[tuple[int, Mapping[str, float | None]]],
) -> WandbRun:
    import wandb

    settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS)
    try:
        run = wandb.init(mode=mode, settings=settings, **arguments)
    except Exception as error:
        if mode == "offline":
            raise
        _log.warning("wandb cannot go online (%s); it writes offline files instead", _first_line(error))
        wandb.teardown()  # else the half-opened run keeps its id in use
        return _start("offline", arguments, history)
    opened = WandbRun(run)
    if not run.resumed:
        for step, metrics in history:
            opened.log(step, {key: value for key, value in metrics.items() if value is not None})
    return opened


def auto_mode() -> Literal["online", "offline", "disabled"]:
    """Choose the mode: the user's WANDB_MODE if there is one, else online if wandb finds a key and offline if not."""
    import wandb

    wanted = wandb.setup().settings.mode
    if wanted == "disabled":
        return "disabled"
    if wanted in ("offline", "dryrun"):
        return "offline"
    try:
        # Looks where wandb would: WANDB_API_KEY, its settings files, netrc. It neither asks nor calls out.
        found = wandb.login(prompt=False, verify=False)
    except Exception as error:
        _log.warning("wandb cannot use the key that it finds (%s); it writes offline files", _first_line(error))
        found = False
    return "online" if found else "offline"


def _forget_service() -> None:
    """Remove the exit hook of wandb's dead process, which would print a traceback at the very end."""
    import wandb

    with suppress(Exception):  # it fails as the call before it did, after the hook is gone
        wandb.teardown()


def _run_id(path: Path, *, keep: bool) -> str:
    """Return the id that WANDB_RUN_ID gives, or else that in this file when the run goes on, or else a new one; it
    stands in the file from then on."""
    told = os.environ.get(VARIABLES["id"])
    if not told and keep and path.exists():
        return path.read_text(encoding="utf-8").strip()
    path.parent.mkdir(parents=True, exist_ok=True)
    run_id = told or secrets.token_hex(6)  # not `random`: its state belongs to the run
    path.write_text(run_id + "\n", encoding="utf-8")
    return run_id


def _first_line(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}".splitlines()[0])
