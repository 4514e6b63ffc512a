"""A safe place for the extensions that DeepSpeed compiles, prepared before any of them is used.

DeepSpeed compiles small extensions when they are first used. torch keeps them in one folder for all installations of
a user, so that two of these (two environments, two versions) overwrite each other's, also while a run loads them:
here every installation has a folder of its own.

torch guards each extension by a file called `lock`. Whoever compiles creates the file, keeps it open, and deletes it
in the end; the others wait until it is gone. A process that is killed while it compiles leaves the file behind, and
every later one waits for ever, in silence.
"""

from __future__ import annotations

import os
import sys
import time
from hashlib import sha256
from pathlib import Path

_PATIENCE = 180.0
"""Seconds without a change in its folder after which a lock that no process here holds counts as left behind. A
process on another machine with the same home may hold it, and cannot be seen from here."""
_PAUSE = 1.0


def prepare(*, first: bool) -> None:
    """Choose the folder, unless TORCH_EXTENSIONS_DIR names one, and remove locks that a killed process left there.

    Every process calls it; `first` is true for one of each machine.
    """
    import torch

    root = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(own_folder())))
    settle(root, first=first)
    if first and not torch.cuda.is_available() and not list(root.glob("deepspeed_shm_comm/*.so")):
        _say("DeepSpeed compiles a part of itself for this machine, once: about a minute, or several on a busy one")


def own_folder() -> Path:
    """The default folder for this installation of Python, torch and DeepSpeed."""
    import deepspeed
    import torch
    from torch.utils.cpp_extension import get_default_build_root

    parts = [sys.version, torch.__file__, torch.__version__, deepspeed.__file__, deepspeed.__version__]
    return Path(get_default_build_root()) / f"opd-{sha256(repr(parts).encode()).hexdigest()[:12]}"


def settle(root: Path, *, first: bool, patience: float = _PATIENCE) -> None:
    """Wait until every lock under `root` is held by a process of this machine.

    The `first` process of a machine prints what it waits for, and deletes what was left behind. The others wait for
    that, or they would find the lock gone and nothing compiled.
    """
    told: set[Path] = set()
    while unheld := [lock for lock in _locks(root) if not _is_held(lock)]:
        for lock in unheld if first else ():
            if _idle_seconds(lock) > patience:
                lock.unlink(missing_ok=True)
                _say(f"deleted {lock}, which a process left that was killed while it compiled")
            elif lock not in told:
                told.add(lock)
                _say(
                    f"waiting for {lock}: it says that another process compiles a part of DeepSpeed, but none on "
                    f"this machine does. If none on another one does, delete it, as is done here after "
                    f"{patience:.0f} seconds without progress."
                )
        time.sleep(_PAUSE)


def _locks(root: Path) -> list[Path]:
    return sorted(root.glob("*/lock"))


def _is_held(lock: Path) -> bool:
    """True if a process of this machine has the file open, as one that compiles has, or where that cannot be seen."""
    if not Path("/proc/self/fd").is_dir():
        return True
    try:
        own = lock.stat()
    except OSError:  # released meanwhile
        return True
    return any(_is_same(handle, own) for handle in Path("/proc").glob("[0-9]*/fd/*"))


def _is_same(handle: Path, own: os.stat_result) -> bool:
    try:
        return os.path.samestat(handle.stat(), own)
    except OSError:  # closed meanwhile, or another user's
        return False


def _idle_seconds(lock: Path) -> float:
    """Seconds since a file in the lock's folder was written."""
    newest = 0.0
    for path in lock.parent.iterdir():
        try:
            newest = max(newest, path.stat().st_mtime)
        except OSError:  # a file of the compiler's that is gone again
            continue
    return time.time() - newest


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
