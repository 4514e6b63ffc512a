"""The run in the terminal: a live bar where there is a terminal, a line now and then where there is none.

Other code may print and log meanwhile: its lines appear above the bar.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from opd.plain_text import LastingStream, drawable
from opd.secrets import redact
from opd.tracking.progress import Progress, Ticker

PLAIN_SECONDS = 10.0
"""Without a terminal: the least seconds between two lines."""
STEP_SECONDS = 60.0
"""Without a terminal: the seconds of a step between two lines on its progress."""
PLAIN_LINES = 50
"""Without a terminal: about the most lines in a run."""
ETA_STEPS = 20
"""The remaining time is estimated from this many last steps."""

_SPARK = "▁▂▃▄▅▆▇█"


@dataclass(slots=True, kw_only=True)
class _State:
    """The state of a run, and the texts that show it."""

    total: int
    done: int
    clock: Callable[[], float]
    row: Mapping[str, float] = field(default_factory=dict)
    rewards: deque[float] = field(default_factory=lambda: deque(maxlen=16))
    held_out: float | None = None
    phase: str | None = None
    progress: Progress = field(init=False)
    """Of the phase, or of the step at hand."""
    started: float = 0.0
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=ETA_STEPS + 1))

    def __post_init__(self) -> None:
        self.started = self.clock()
        self.progress = Progress(clock=self.clock, since=self.started)
        self.ends.append(self.started)

    def add(self, step: int, row: Mapping[str, float]) -> None:
        self.done, self.row = step, row
        self.progress.begin()
        if step == 0:
            self.ends.clear()  # an evaluation before training says nothing of the pace
        self.ends.append(self.clock())
        if math.isfinite(row.get("reward/mean", math.nan)):
            self.rewards.append(row["reward/mean"])
        self.held_out = row.get("eval/success", self.held_out)

    @property
    def remaining(self) -> float | None:
        """Estimate the seconds to the run's end from the last steps; None before the first."""
        if len(self.ends) < 2:
            return None
        return (self.total - self.done) * (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)

    @property
    def figures(self) -> list[tuple[str, str]]:
        shown = []
        if "reward/mean" in self.row:
            shown.append(("reward", f"{self.row['reward/mean']:.2f}"))
        if "train/loss" in self.row:
            shown.append(("loss", f"{self.row['train/loss']:.3g}"))
        if self.held_out is not None:
            shown.append(("held-out", "not measured" if math.isnan(self.held_out) else f"{self.held_out:.0%}"))
        return shown

    @property
    def phases(self) -> list[tuple[str, str]]:
        seconds = {key.removeprefix("time/"): value for key, value in self.row.items() if key.startswith("time/")}
        return [(name, f"{value:.1f}s") for name, value in seconds.items() if value >= 0.05]

    @property
    def doing(self) -> str:
        counted = self.progress.done or self.progress.total is not None
        played = [self.progress.in_words(span)] if counted else []
        return ", ".join([self.phase, *played] if self.phase else played) or "working"

    @property
    def plain_progress(self) -> str:
        return f"{self.phase or f'step {self.done + 1}'}: {self.progress.in_words(span)}"

    @property
    def sparkline(self) -> str:
        """Draw the last rewards as bars, from the lowest to the highest among them."""
        low, high = min(self.rewards, default=0.0), max(self.rewards, default=0.0)
        scale = (len(_SPARK) - 1) / (high - low) if high > low else 0.0
        return "".join(_SPARK[round((value - low) * scale)] for value in self.rewards)


class LastingConsole(Console):
    """A console that may go away, as that of `opd train FILE | head` does: the run goes on without it.

    Texts that it is given to print, wherever they come from, do not steer the terminal.
    """

    @property
    def file(self) -> IO[str]:
        """The stream that is written to, which lets our own drawing through."""
        file = Console.file.fget(self)  # type: ignore[attr-defined]
        return file.as_it_is() if isinstance(file, LastingStream) else file  # type: ignore[return-value]

    @file.setter
    def file(self, new: IO[str]) -> None:
        Console.file.fset(self, new)  # type: ignore[attr-defined]

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render as rich does, with what would steer a terminal taken out of every text."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else drawable(text), style, control)

    def on_broken_pipe(self) -> None:
        """Show nothing more, and say so once where somebody may still read it."""
        self.quiet = True
        with suppress(OSError, ValueError):  # what is left in the buffers must not fail once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        with suppress(OSError, ValueError):
            print("nobody reads the console any more; the run goes on without it", file=sys.stderr, flush=True)


class RunConsole:
    """Shows one run. Prints nothing when `enabled` is false."""

    def __init__(
        self,
        *,
        total_steps: int,
        done: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or LastingConsole(highlight=False)
        self._enabled = enabled
        self._animated = enabled and self._console.is_terminal and not self._console.is_dumb_terminal
        self._state = _State(total=total_steps, done=done, clock=clock)
        self._spinner = Spinner("dots", style="cyan")
        self._live: Live | None = None
        self._streams: tuple[TextIO, TextIO] = (sys.stdout, sys.stderr)
        self._last_line = (-math.inf, -math.inf)
        self._ticker: Ticker | None = None
        self._ticked = -math.inf

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self.show(Text(redact(line), style="dim"))

    def show(self, renderable: RenderableType) -> None:
        """Print anything that rich can print."""
        if not self._enabled:
            return
        try:
            self._console.print(renderable, soft_wrap=isinstance(renderable, Text))
        except (OSError, ValueError):  # stdout was closed, or its terminal is gone
            self._enabled = False
            LastingConsole.on_broken_pipe(self._console)  # type: ignore[arg-type]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show the name of what is going on."""
        self._open()
        self._state.phase = name
        self._state.progress.begin()
        try:
            yield
        finally:
            self._state.phase = None
            self._state.progress.begin()

    def expect(self, more: int | None, what: str = "episodes") -> None:
        """Note that so many more episodes (or `what`) of the current step or phase are to come."""
        self._open()
        self._state.progress.expect(more, what)

    def advance(self, count: int = 1) -> None:
        """Count so many more finished episodes, or what is expected, of the current step or phase."""
        self._open()
        self._state.progress.done += count

    def tick(self) -> None:
        """Without a terminal: print how far the work at hand has come, where the last line is long ago."""
        state = self._state
        quiet = min(state.progress.seconds, state.clock() - max(self._ticked, self._last_line[0]))
        if quiet >= (PLAIN_SECONDS if state.phase else STEP_SECONDS):
            self._ticked = state.clock()
            self.say(state.plain_progress)

    def step(self, step: int, row: Mapping[str, float]) -> None:
        """Count a finished step; `row` holds its numbers."""
        self._open()
        self._state.add(step, row)
        if not self._animated and self._line_is_due():
            self._last_line = (self._state.clock(), step)
            self.show(self._line())

    def close(self) -> None:
        """Take the bar down; its last state stays on the screen. May be called twice."""
        if self._ticker is not None:
            ticker, self._ticker = self._ticker, None
            ticker.close()
        if self._live is None:
            return
        live, self._live = self._live, None
        proxies = (sys.stdout, sys.stderr)
        live.stop()
        # After the streams are back: a handler that looks up sys.stderr itself then needs no moving, and allows none.
        _move_log_handlers(proxies, self._streams)

    def _open(self) -> None:
        if self._enabled and not self._animated and self._ticker is None:
            self._ticker = Ticker(self.tick)
        if not self._animated or self._live is not None:
            return
        self._streams = (sys.stdout, sys.stderr)
        self._live = Live(console=self._console, get_renderable=self._view, refresh_per_second=5)
        self._live.start()
        # Live has replaced both streams by its own, but a handler keeps the stream that it was made with.
        _move_log_handlers(self._streams, (sys.stdout, sys.stderr))

    def _view(self) -> RenderableType:
        state = self._state
        bar = Table.grid(padding=(0, 1), expand=True)
        cells: list[RenderableType] = [
            Text(f"step {state.done}/{state.total}", style="bold"),
            ProgressBar(total=state.total, completed=state.done, complete_style="cyan", finished_style="green"),
            *(Text.assemble((f"{name} ", "dim"), value) for name, value in state.figures),
            Text.assemble(span(state.clock() - state.started), (f" < {span(state.remaining)}", "dim")),
        ]
        for cell in cells:
            bar.add_column(no_wrap=True, ratio=1 if isinstance(cell, ProgressBar) else None)
        bar.add_row(*cells)

        below = Table.grid(padding=(0, 2))
        phases = "  ".join(f"{name} {seconds}" for name, seconds in state.phases)
        running = self._live is not None  # the state that stays on the screen has no spinner
        self._spinner.update(text=Text(state.doing, style="cyan"))
        spark = "" if self._console.options.ascii_only else state.sparkline
        below.add_row(self._spinner if running else "", Text(phases, style="dim"), Text(spark, style="cyan"))
        return Group(bar, below) if state.total else below

    def _line_is_due(self) -> bool:
        state = self._state
        seconds, steps = state.clock() - self._last_line[0], state.done - self._last_line[1]
        worth_it = state.done == state.total or "eval/success" in state.row
        return worth_it or (seconds >= PLAIN_SECONDS and steps >= state.total / PLAIN_LINES)

    def _line(self) -> Text:
        state = self._state
        parts = [f"step {state.done:>{len(str(state.total))}}/{state.total}"]
        parts += [f"{name} {value}" for name, value in (*state.figures, *state.phases)]
        if state.done < state.total:
            parts.append(f"eta {span(state.remaining)}")
        return Text("  ".join(parts))


def _move_log_handlers(old: tuple[TextIO, TextIO], new: tuple[TextIO, TextIO]) -> None:
    """Point the log handlers that write to a stream of `old` at its counterpart in `new`."""
    loggers = [logging.root, *(x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger))]
    for handler in [h for logger in loggers for h in logger.handlers if isinstance(h, logging.StreamHandler)]:
        for before, after in zip(old, new, strict=True):
            if handler.stream is before:
                handler.setStream(after)
                break


def span(seconds: float | None) -> str:
    """Write a duration as 0:07, 12:34 or 1:02:03."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
