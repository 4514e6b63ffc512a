"""What several adapters need: tasks drawn into splits, functions from import paths, one global `random` for many."""

from __future__ import annotations

import pkgutil
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from opd.envs.text_env import task_split
from opd.errors import ConfigError, EnvError
from opd.sandbox import GraderSession, Ungraded

T = TypeVar("T")

_DRAWS = 1_000
ALL_SPLITS: Mapping[str, None] = {"train": None, "eval": None, "warm": None}
"""`metadata["tasks"]` of an environment that can draw any number of tasks of each split."""


def draw(begin: Callable[[int], T], key: Callable[[T], object], rng: np.random.Generator, split: str | None) -> T:
    """Begin tasks with seeds from `rng` until one belongs to `split`; what makes it this task is its `key`.

    With `split` None the first one is taken. Raises EnvError after many draws: the source has too few tasks.
    """
    for _ in range(_DRAWS):
        drawn = begin(int(rng.integers(2**31)))
        if split is None or task_split(key(drawn)) == split:
            return drawn
    raise EnvError(f"none of {_DRAWS} tasks is in split {split!r}: the environment has too few different ones")


def resolve(given: Callable[..., Any] | str, *, setting: str) -> Callable[..., Any]:
    """A function, or what its import path `package.module:name` leads to. Raises ConfigError, naming the setting."""
    if callable(given):
        return given
    try:
        found = pkgutil.resolve_name(given)
    except (AttributeError, ImportError, ValueError) as error:
        raise ConfigError(f"env.kwargs.{setting}: {given!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"env.kwargs.{setting}: {given!r} is a {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]  # any callable


class Unprotected:
    """An object in this process, called as a `GraderSession` calls one in a process of its own.

    For code that must have what is refused there. `close` is the object's own.
    """

    def __init__(self, made: Any) -> None:
        self._made = made

    def call(self, method: str, **arguments: Any) -> Any:
        """What the method returns. Raises Ungraded where it raises."""
        try:
            return getattr(self._made, method)(**arguments)
        except Exception as error:  # code that met a text it was not made for
            raise Ungraded(f"it raised {type(error).__name__}: {error}") from error

    def close(self) -> None:
        self._made.close()


Session = GraderSession | Unprotected


class OwnRandom:
    """A stream of Python's global `random` for each holder, whatever other threads do.

    Games that draw from the global generator would otherwise mix their draws, and a seed would decide nothing.
    """

    _lock = threading.RLock()

    def __init__(self) -> None:
        self._state: object = None

    @contextmanager
    def __call__(self, seed: int | None = None) -> Iterator[None]:
        """Code inside draws from this stream, begun anew with `seed` where one is given."""
        with self._lock:
            outer = random.getstate()
            try:
                if seed is not None:
                    random.seed(seed)
                elif self._state is not None:
                    random.setstate(self._state)  # type: ignore[arg-type]  # what getstate gave
                yield
            finally:
                self._state = random.getstate()
                random.setstate(outer)
