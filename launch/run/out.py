"""The folder of a run: its name if none is given, and what may happen to one that exists."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Literal, TypeVar

from opd import __version__
from opd.disk import is_left_aside, write_whole
from opd.errors import ConfigError, OpdError
from opd.launch.run import lock
from opd.launch.settings.config import Config
from opd.launch.settings.reader import RUN_MARK, holds_run, read_settings
from opd.secrets import MARK, redact

T = TypeVar("T")
Resume = bool | Literal["auto"]
"""True: go on with the run in the folder. False: begin one. auto: go on if there is one, for scripts that run again."""

ROOT = Path("runs")


def default_name(method: str, env: str, model: str) -> str:
    """Return the name a person would give the run: `opsd-lookup-tiny` for opsd, opd/Lookup-v0 and tiny:lookup."""
    env = re.sub(r"-v\d+$", "", re.split(r"[/:]", env)[-1])
    model = "tiny" if model.startswith("tiny:") else Path(model).name.removesuffix(".gguf")
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()).strip("-.") for part in (method, env, model))


def choose_out(config: Config, *, resume: Resume = False, overwrite: bool = False) -> Path:
    """Return the folder of a run by these settings; nothing is written. Raises what `choose` raises."""
    name = default_name(config.spec.name, redact(config.env.id), redact(config.model.name))
    return choose(config.out, name, resume=resume, overwrite=overwrite)


def choose(out: str | None, name: str, *, resume: Resume, overwrite: bool) -> Path:
    """Return the folder of a run; nothing is written yet.

    Without `out` it is `runs/NAME`, or `runs/NAME-2` and so on where earlier runs are; with `resume`, the
    newest of these.

    Raises ConfigError when the folder holds a run that is neither to be resumed nor overwritten, holds other
    files, or cannot be written; LockError when another process uses it.
    """
    if resume and overwrite:
        raise ConfigError("--resume goes on with a run and --overwrite deletes it: give one of them")
    if out is None:
        if overwrite:
            raise ConfigError("--overwrite deletes a run, so say which: --out DIR")
        folder = _numbered_folder(name, resume=bool(resume))
    else:
        folder = Path(out).expanduser()
    _check_folder(folder, resume=resumes(folder, resume), overwrite=overwrite)
    return folder


def resumes(folder: Path, resume: Resume) -> bool:
    """True: the run in the folder goes on (`auto`: there is one). False: a run begins."""
    return holds_run(folder) if resume == "auto" else resume


def write_config(config: Config, folder: Path) -> Path:
    """Make the folder and write `config.yaml`, which marks it as a run's; returns the folder.

    A secret that stands in the settings stands there and nowhere else: then only its owner may read the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = f"{RUN_MARK}, resolved by opd {__version__}\n{config.at(folder).to_yaml()}"
    write_whole(folder / "config.yaml", text, mode=0o600 if config.plain_secrets else 0o666)
    return folder


def recommend_variables(config: Config) -> None:
    """Say in a line which settings hold a secret that is written out, and what to write instead."""
    if found := config.plain_secrets:
        print(
            f"{', '.join(found)}: a secret is written out. It stays in config.yaml, which only you may read, and is "
            f"{MARK} in all else; better write ${{env:NAME}} in its place, and set the variable",
            file=sys.stderr,
            flush=True,
        )


def day_of(folder: Path, *, resumed: bool) -> str:
    """Return the day on which the run in a folder began, for the templates that ask: today, if it begins now."""
    chat = read_settings(folder / "config.yaml").get("chat") if resumed else None
    day = str((chat.get("date") if isinstance(chat, dict) else None) or date.today().isoformat())
    try:
        return date.fromisoformat(day).isoformat()
    except ValueError as error:
        raise ConfigError(
            f"{folder / 'config.yaml'}: chat.date = {day[:40]!r} is no day of the form YYYY-MM-DD"
        ) from error


def on_files(work: Callable[[], T], folder: Path) -> Callable[[], T]:
    """Return `work` on the files of a run, which raises ConfigError with the file's name where one is not what a run
    leaves there: a folder in place of a file, say."""

    def attempted() -> T:
        try:
            return work()
        except OpdError:
            raise
        except OSError as error:
            raise ConfigError(f"{folder}: {error}. Move that aside, or choose another folder (--out DIR)") from error

    return attempted


def remove_run(folder: Path) -> None:
    """Delete all files of a run, whose folder and lock stay.

    Raises ConfigError when the folder holds no run, or is where we stand.
    """
    if not folder.exists() or not _contents(folder):
        return
    if not holds_run(folder):
        raise ConfigError(f"out = {str(folder)!r} holds no run, so nothing there is deleted")
    if Path.cwd().resolve().is_relative_to(folder.resolve()):
        raise ConfigError(f"out = {str(folder)!r} holds the current folder, so it is not deleted")
    # The mark goes last: a process that is killed meanwhile leaves what can still be told for a run's.
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.yaml"):
        if path.name == lock.NAME:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _contents(folder: Path) -> list[Path]:
    """Return what a folder holds beside the lock of whoever is about to use it, and what a killed process left."""
    return [path for path in folder.iterdir() if path.name != lock.NAME and not is_left_aside(path)]


def _numbered_folder(name: str, *, resume: bool) -> Path:
    taken = ROOT / name
    folder, number = taken, 1
    while folder.exists():
        taken, number = folder, number + 1
        folder = ROOT / f"{name}-{number}"
    return taken if resume else folder


def _check_folder(folder: Path, *, resume: bool, overwrite: bool) -> None:
    named = f"out = {str(folder)!r}"
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{named} is a file; name a folder")
    if folder.is_symlink() and not folder.exists():
        raise ConfigError(f"{named} is a link to {str(folder.readlink())!r}, which does not exist; make that folder")
    if folder.is_dir():
        lock.check_free(folder)
    if resume:
        if not holds_run(folder):
            raise ConfigError(f"{named} holds no run to resume; without --resume a new one starts there")
    elif holds_run(folder):
        if not overwrite:
            left = lock.left_behind(folder)
            raise ConfigError(
                f"{named} already holds a run. Go on with it (--resume), delete it (--overwrite), "
                f"or choose another folder (--out DIR).{f' Its {lock.ended_without_a_word(left)}.' if left else ''}"
            )
    elif folder.is_dir() and _contents(folder):
        raise ConfigError(f"{named} holds files that are not a run's; choose another folder (--out DIR)")
    above = folder
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"{named} cannot be written: {str(above)!r} is {_why_not(above)}; choose another (--out DIR)")


def _why_not(path: Path) -> str:
    return "not a folder" if not path.is_dir() else "not writable"
