"""One episode, token by token, shaded by how much the teacher disagreed: for the terminal and as a picture.

A token's value is the divergence, in nats, of the teacher's next-token distribution from the student's where
the token was sampled. The scale is logarithmic and fixed, so that two episodes can be compared. Every shade
sets its own ink and ground, so that it reads on light and on dark terminals; without colour the strong
tokens stand in marks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.style import Style
from rich.text import Text

from opd.errors import DataError
from opd.plain_text import drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, slots=True)
class ShadedToken:
    """One token of an episode."""

    text: str
    kind: Literal["prompt", "completion"]
    nats: float | None
    """The teacher's disagreement; None where it was not asked, as for every prompt token."""


@dataclass(frozen=True, slots=True)
class Shade:
    """The look of tokens from `least` nats on, up to the next shade's `least`."""

    least: float
    ground: str
    ink: str
    marks: tuple[str, str] = ("", "")
    """Text before and after the token where there is no colour."""


# From light to dark, so that the order survives every colour vision and a grey print.
SHADES = (
    Shade(0.01, "#fff0bd", "#000000"),
    Shade(0.03, "#fed47c", "#000000"),
    Shade(0.1, "#fc9f46", "#000000"),
    Shade(0.3, "#cc3d1f", "#ffffff", ("‹", "›")),
    Shade(1.0, "#8f0d2b", "#ffffff", ("«", "»")),
)


def shade_of(token: ShadedToken) -> Shade | None:
    """The shade of a token; None below the least of all, and for tokens without a value."""
    if token.nats is None:
        return None
    return next((shade for shade in reversed(SHADES) if token.nats >= shade.least), None)


# -- in the terminal ----------------------------------------------------------------------------------


def shade_episode(tokens: Sequence[ShadedToken], *, title: str) -> RenderableType:
    """Shade an episode for `rich.print` or `Console.print`; prompts are dim, a legend stands below.

    Raises DataError when nothing was sampled.
    """
    return _Episode(_check_tokens(tokens), title)


@dataclass(frozen=True, slots=True)
class _Episode:
    """Renders the episode when it is printed: only the console knows whether there is colour."""

    tokens: Sequence[ShadedToken]
    title: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        colored = console.color_system is not None and not console.no_color
        yield Text(self.title, style="bold")
        yield Text()
        yield Text("").join(_style_text(token, colored) for token in self.tokens)
        yield Text()
        yield _legend(colored)
        yield Text(_statistics(self.tokens), style="dim")


def _style_text(token: ShadedToken, colored: bool) -> Text:
    text = _make_visible(token)
    if token.kind == "prompt":
        return Text(text, style="dim")
    shade = shade_of(token)
    if shade is None:
        return Text(text)
    if colored:
        return Text(text, style=_style(shade))
    before, after = shade.marks
    return Text(f"{before}{text}{after}")


def _legend(colored: bool) -> Text:
    if not colored:
        marked = [shade for shade in SHADES if shade.marks != ("", "")]
        return Text(
            "the teacher disagreed:  " + ", ".join(f"{'token'.join(x.marks)} {x.least:g} nats or more" for x in marked)
        )
    legend = Text("the teacher disagreed, nats:  ")
    for shade in SHADES:
        legend.append(f" {shade.least:g}+ ", style=_style(shade))
    return legend


def _style(shade: Shade) -> Style:
    return Style(color=shade.ink, bgcolor=shade.ground)


def _statistics(tokens: Sequence[ShadedToken]) -> str:
    scored = [(token.nats, token.text) for token in tokens if token.nats is not None]
    if not scored:
        return "no token has a value"
    mean = sum(nats for nats, _ in scored) / len(scored)
    most, text = max(scored)
    return f"{len(scored)} sampled tokens, mean {mean:.2g} nats, most {most:.2g} at {text!r}"


def _make_visible(token: ShadedToken) -> str:
    """Remove what would steer a terminal (a model may sample escape codes), and make shaded line breaks visible."""
    text = token.text.replace("\t", "    ")
    text = drawable(text)
    return text if shade_of(token) is None else text.replace("\n", "↵\n")


def _check_tokens(tokens: Sequence[ShadedToken]) -> Sequence[ShadedToken]:
    if not any(token.kind == "completion" for token in tokens):
        raise DataError("there is no sampled token to shade")
    return tokens


# -- as a picture -------------------------------------------------------------------------------------

_COLUMNS = 92
_SIZE = 9.0  # of the font, in points, as all lengths below
_ADVANCE = 0.602 * _SIZE  # one character of DejaVu Sans Mono, which matplotlib ships
_LEADING = 1.75 * _SIZE
_SIDE = 84.0  # the column of the roles
_MARGIN = 16.0
_HEAD, _TAIL = 4, 2  # lines kept of a long prompt: the picture is about the completions
_AGENT, _FAINT, _INK = "#0072B2", "#7a7a7a", "#222222"

_Line = list[tuple[str, ShadedToken]]


@dataclass(frozen=True, slots=True)
class _Block:
    """The tokens of one speaker, set in lines."""

    role: str
    lines: list[_Line]


def episode_picture(path: Path, tokens: Sequence[ShadedToken], *, title: str) -> None:
    """Draw an episode as a PNG: who speaks on the left, tokens on grounds coloured by nats, a legend below.

    Raises DataError when nothing was sampled.
    """
    from matplotlib.figure import Figure

    blocks = list(_blocks(_check_tokens(tokens)))
    lines = sum(len(block.lines) + 0.6 for block in blocks)
    width = 2 * _MARGIN + _SIDE + _COLUMNS * _ADVANCE
    height = 2 * _MARGIN + (lines + 3.2) * _LEADING
    figure = Figure(figsize=(width / 72, height / 72), dpi=200, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()

    y = _MARGIN + 0.5 * _LEADING
    _write(axes, _MARGIN, y, title, fontsize=12.5, fontweight="bold", color=_INK)
    y += 1.7 * _LEADING
    for block in blocks:
        color = _AGENT if block.role.startswith("agent") else _FAINT
        _write(axes, _MARGIN, y, block.role, fontsize=9, fontweight="bold", color=color)
        for line in block.lines:
            _draw_line(axes, line, y)
            y += _LEADING
        y += 0.6 * _LEADING
    _draw_legend(axes, y + 0.2 * _LEADING, tokens)
    figure.savefig(path)


def _blocks(tokens: Sequence[ShadedToken]) -> Iterator[_Block]:
    turn = 0
    for kind, run in groupby(tokens, key=lambda token: token.kind):
        if kind == "completion":
            turn += 1
            yield _Block(f"agent, turn {turn}", _set_in_lines(run))
            continue
        lines = _set_in_lines(run)
        if len(lines) > _HEAD + _TAIL + 1:
            lines = [*lines[:_HEAD], [("⋯", ShadedToken("", "prompt", None))], *lines[-_TAIL:]]
        yield _Block("environment" if turn else "task", lines)


def _set_in_lines(tokens: Iterable[ShadedToken]) -> list[_Line]:
    """Break tokens into lines at line breaks and, between tokens if possible, at the right margin; drop empty lines."""
    lines: list[_Line] = [[]]
    used = 0
    for token in tokens:
        for number, part in enumerate(_make_visible(token).split("\n")):
            if number or (used + len(part) > _COLUMNS and used):
                lines.append([])
                used = 0
            for start in range(0, len(part), _COLUMNS):
                piece = part[start : start + _COLUMNS]
                if start:
                    lines.append([])
                lines[-1].append((piece, token))
                used = sum(len(text) for text, _ in lines[-1])
    return [line for line in lines if line]


def _draw_line(axes: Axes, line: _Line, y: float) -> None:
    x = _MARGIN + _SIDE
    for text, token in line:
        shade = shade_of(token)
        if shade is not None:
            _draw_ground(axes, x, y, len(text) * _ADVANCE, shade)
        ink = shade.ink if shade else _INK if token.kind == "completion" else _FAINT
        _write(axes, x, y, _replace_undrawable(text), fontsize=_SIZE, family="DejaVu Sans Mono", color=ink)
        x += len(text) * _ADVANCE


def _draw_legend(axes: Axes, y: float, tokens: Sequence[ShadedToken]) -> None:
    x = _MARGIN + _SIDE
    _write(axes, _MARGIN, y, "nats", fontsize=9, fontweight="bold", color=_FAINT)
    for shade in SHADES:
        _draw_ground(axes, x, y, 7 * _ADVANCE, shade)
        _write(axes, x + 3.5 * _ADVANCE, y, f"{shade.least:g}+", fontsize=_SIZE, color=shade.ink, ha="center")
        x += 7 * _ADVANCE
    _write(axes, x + 2 * _ADVANCE, y, _replace_undrawable(_statistics(tokens)), fontsize=9, color=_FAINT)


def _draw_ground(axes: Axes, x: float, y: float, width: float, shade: Shade) -> None:
    from matplotlib.patches import Rectangle

    # The thin white edge keeps neighbours apart, so that one can see where tokens end.
    corner = (x, y - 0.44 * _LEADING)
    axes.add_patch(Rectangle(corner, width, 0.88 * _LEADING, facecolor=shade.ground, edgecolor="white", linewidth=0.6))


def _write(axes: Axes, x: float, y: float, text: str, **font: Any) -> None:
    # By the baseline: centred on its own shape, a line of low or high characters would leave the row.
    axes.text(x, y + 0.35 * font["fontsize"], text, va="baseline", parse_math=False, **font)


def _replace_undrawable(text: str) -> str:
    """Replace characters that the picture's font has no shape for."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties(family="DejaVu Sans Mono")))
    return "".join(c if font.get_char_index(ord(c)) else "\ufffd" for c in text)
