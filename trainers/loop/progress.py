"""How far the work at hand has come, for whoever shows it. All ranks tell the same; the first one's is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from opd.errors import Interrupted


class Shown(Protocol):
    """Shows a person how far the first rank has come."""

    def expect(self, more: int | None, what: str = "episodes") -> None:
        """Note that so many more of these are to come."""
        ...

    def advance(self, count: int) -> None:
        """Note that so many more are done."""
        ...

    def say(self, line: str) -> None:
        """Show a line."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Tells how far the work at hand has come. By default nobody sees it."""

    shown: Shown | None = None
    ranks: int = 1

    def expect(self, more: int | None, what: str = "episodes") -> None:
        """Tell that all ranks together have so many more of these ahead (None: nobody knows); `Player.play` counts the
        episodes that finish."""
        if self.shown is not None:
            self.shown.expect(None if more is None else -(-more // self.ranks), what)

    def advance(self, count: int) -> None:
        """Tell that this rank has done so many more."""
        if self.shown is not None:
            self.shown.advance(count)

    def say(self, line: str) -> None:
        """Tell a line."""
        if self.shown is not None:
            self.shown.say(line)

    def say_kept(self, where: str, kept: int, wanted: int) -> None:
        """Tell how many episodes are there already, where that is a part of those that are wanted."""
        if 0 < kept < wanted:
            self.say(f"{where} holds {kept:,} of {wanted:,} episodes, which are not played again")

    @contextmanager
    def told_if_left(self, where: str, kept: int) -> Iterator[None]:
        """Tell how many episodes stay where the round inside is left."""
        try:
            yield
        except Interrupted:
            self.say(f"{where} keeps {kept:,} episodes; the round at hand is played again")
            raise
