"""Curves over training steps as a PNG: one run, or several beside each other.

matplotlib is imported when something is drawn. Figures are built without pyplot, so that nothing global
(backend, style, open windows) changes under a caller who plots too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from opd.errors import DataError
from opd.tracking.intervals import wilson

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, Color universal design (2008): told apart with every common colour vision. Yellow and sky
# blue are left out: too faint for a line on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
_INK, _FAINT = "#222222", "#6b6b6b"
_LABEL_GAP = 0.075  # least distance of two labels, as a share of the height


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line of a picture; all sequences have one entry a point."""

    label: str
    """Text beside the last point, before the last value; may be empty where there is one curve."""
    steps: Sequence[float]
    values: Sequence[float]
    low: Sequence[float] | None = None
    """The lower ends of the intervals; with `high` drawn as a band."""
    high: Sequence[float] | None = None
    marked: bool = False
    """Draw a dot on each point: for the few points of an evaluation, not for each step."""

    def __post_init__(self) -> None:
        if not self.steps:
            raise DataError(f"curve {self.label!r} has no points")
        for name, values in (("values", self.values), ("low", self.low), ("high", self.high)):
            if values is not None and len(values) != len(self.steps):
                raise DataError(f"curve {self.label!r} has {len(self.steps)} steps but {len(values)} in {name}")


def success_curve(label: str, steps: Sequence[float], successes: Sequence[int], n: Sequence[int]) -> Curve:
    """Make a curve of success rates with 95% Wilson intervals: `successes[i]` of `n[i]` tasks after `steps[i]`."""
    bounds = [wilson(solved, played) for solved, played in zip(successes, n, strict=True)]
    return Curve(
        label=label,
        steps=steps,
        values=[solved / played for solved, played in zip(successes, n, strict=True)],
        low=[low for low, _ in bounds],
        high=[high for _, high in bounds],
        marked=True,
    )


def running_mean(label: str, steps: Sequence[float], values: Sequence[float], *, window: int | None = None) -> Curve:
    """Make a curve of the mean over `window` steps about each step, with its 95% confidence interval.

    It is meant for numbers that jump from step to step. By default the window is a tenth of the run, at least 5 steps.
    The band is 1.96 standard errors of the window's mean.
    """
    half = (window or max(5, len(values) // 10)) // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    means = [fmean(part) for part in windows]
    errors = [1.96 * stdev(part) / math.sqrt(len(part)) if len(part) > 1 else 0.0 for part in windows]
    return Curve(
        label=label,
        steps=steps,
        values=means,
        low=[mean - error for mean, error in zip(means, errors, strict=True)],
        high=[mean + error for mean, error in zip(means, errors, strict=True)],
    )


def curves(
    path: Path,
    runs: Sequence[Curve],
    *,
    ylabel: str,
    xlabel: str = "Training step",
    title: str = "",
    note: str = "",
    percent: bool = False,
) -> None:
    """Draw the curves into one picture at `path`; with `percent`, values are shares and the axis is 0 to 100%."""
    figure = _figure(7.2, 4.0)
    axes = figure.add_subplot()
    _draw(axes, runs, ylabel=ylabel, percent=percent, xlabel=xlabel)
    _write_title(axes, title, note)
    figure.savefig(path)


def run_picture(path: Path, rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draw one run from the rows of its metrics.jsonl: reward over steps, and held-out success.

    Draws the panels that there are numbers for; without any, writes no file.
    """
    panels: list[tuple[Curve, str, bool]] = []
    rewards = _series(rows, "reward/mean")
    if rewards:
        panels.append((running_mean("", *_columns(rewards)), "Reward per episode", False))
    scores = _series(rows, "eval/success")
    if scores:
        steps, rates = _columns(scores)
        tasks = [int(n) for n in _columns(_series(rows, "eval/tasks"))[1]]
        solved = [round(rate * n) for rate, n in zip(rates, tasks, strict=True)]
        panels.append((success_curve("", steps, solved, tasks), "Solved held-out tasks", True))
    if not panels:
        return
    figure = _figure(4.8 * len(panels), 3.7)
    for place, (curve, ylabel, percent) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        _draw(axes, [curve], ylabel=ylabel, percent=percent)
    heading = figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold", color=_INK)
    heading.set_parse_math(False)
    figure.savefig(path)


def _figure(width: float, height: float) -> Figure:
    """Make an empty figure of so many inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04)
    return Figure(figsize=(width, height), dpi=200, layout=layout, facecolor="white")


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _columns(pairs: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [step for step, _ in pairs], [value for _, value in pairs]


def _draw(axes: Axes, runs: Sequence[Curve], *, ylabel: str, percent: bool, xlabel: str = "Training step") -> None:
    if not runs:
        raise DataError("there is no curve to draw")
    if len(runs) > len(COLORS):
        raise DataError(f"{len(runs)} curves in one picture cannot be told apart; at most {len(COLORS)}")
    for curve, color, marker in zip(runs, COLORS, MARKERS, strict=False):
        if curve.low is not None and curve.high is not None:
            axes.fill_between(curve.steps, curve.low, curve.high, color=color, alpha=0.16, linewidth=0)
        axes.plot(
            curve.steps,
            curve.values,
            color=color,
            linewidth=2.2,
            solid_capstyle="round",
            marker=marker if curve.marked or len(curve.steps) == 1 else "",
            markersize=6,
            markeredgecolor="white",
            markeredgewidth=1.0,
            clip_on=False,
        )
    _dress(axes, xlabel, ylabel, percent)
    _label_ends(axes, runs, percent)


def _dress(axes: Axes, xlabel: str, ylabel: str, percent: bool) -> None:
    """Style the axes so that they stay out of the way of the data."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.set_xlabel(xlabel, fontsize=11, color=_FAINT)
    axes.set_ylabel(ylabel, fontsize=11, color=_FAINT)
    axes.tick_params(labelsize=10.5, colors=_FAINT, length=0)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.9)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True, steps=[1, 2, 5, 10]))
    axes.margins(x=0.02)
    if percent:
        axes.set_ylim(0, 1)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _label_ends(axes: Axes, runs: Sequence[Curve], percent: bool) -> None:
    """Write each curve's name and last value beside its last point, pushed apart where they would touch."""
    low, high = axes.get_ylim()
    wanted = [(curve.values[-1] - low) / (high - low) for curve in runs]
    for curve, color, height in zip(runs, COLORS, spread(wanted, _LABEL_GAP), strict=False):
        value = f"{curve.values[-1]:.0%}" if percent else f"{curve.values[-1]:.3g}"
        axes.text(
            1.015, height, f"{curve.label} {value}".strip(), transform=axes.transAxes, color=color, fontsize=11.5,
            fontweight="bold", va="center", ha="left", parse_math=False,
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move positions apart by at least `gap`, as little as possible and in their order; in [0, 1] if they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], 0.0), 1.0) for i in order]
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], 1.0 if i == len(placed) - 1 else placed[i + 1] - gap)
    return [place for _, place in sorted(zip(order, placed, strict=True))]


def _write_title(axes: Axes, title: str, note: str) -> None:
    if title:
        axes.set_title(
            title, loc="left", fontsize=13, fontweight="bold", color=_INK, pad=26 if note else 12
        ).set_parse_math(False)
    if note:
        axes.text(0, 1.035, note, transform=axes.transAxes, fontsize=10.5, color=_FAINT, va="bottom", parse_math=False)
