"""One shaded episode: in a terminal with and without colour, and as a picture."""

import io
import itertools
import math

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from opd.errors import DataError
from opd.tracking.shading import SHADES, ShadedToken, episode_picture, shade_episode, shade_of


def prompt(text: str) -> ShadedToken:
    return ShadedToken(text, "prompt", None)


def sampled(text: str, nats: float | None) -> ShadedToken:
    return ShadedToken(text, "completion", nats)


EPISODE = [prompt("Which hue?\n"), sampled("get", 0.002), sampled(" hue", 2.5), sampled(" now", 0.4), prompt("\nerror")]


def printed(tokens, **console) -> str:
    out = io.StringIO()
    Console(file=out, width=200, legacy_windows=False, _environ={}, **console).print(shade_episode(tokens, title="One"))
    return out.getvalue()


def in_color(tokens) -> str:
    return printed(tokens, force_terminal=True, color_system="truecolor")


@pytest.mark.parametrize("nats", [None, 0.0, 0.0099])
def test_tokens_that_the_teacher_would_have_sampled_too_have_no_shade(nats):
    assert shade_of(sampled("x", nats)) is None


def test_a_shade_begins_at_its_least_value():
    for below, shade in itertools.pairwise(SHADES):
        assert shade_of(sampled("x", shade.least)) is shade
        assert shade_of(sampled("x", math.nextafter(shade.least, 0))) is below
    assert shade_of(sampled("x", math.inf)) is SHADES[-1]


def luminance(color: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("shade", SHADES, ids=lambda shade: shade.ground)
def test_the_ink_of_every_shade_reads_on_its_ground(shade):
    light, dark = sorted((luminance(shade.ground), luminance(shade.ink)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2, level AA


def test_shades_darken_with_disagreement():
    grounds = [luminance(shade.ground) for shade in SHADES]
    assert all(a > b for a, b in itertools.pairwise(grounds))


def test_in_color_a_disputed_token_has_its_own_ink_and_ground():
    out = in_color(EPISODE)
    assert "\x1b[38;2;255;255;255;48;2;143;13;43m hue\x1b[0m" in out
    assert "\x1b[2mWhich hue?\x1b[0m" in out  # prompts are dim
    assert "«" not in out


@pytest.mark.parametrize("how", [{"force_terminal": True, "no_color": True}, {"force_terminal": False}])
def test_without_color_strong_tokens_stand_in_marks(how):
    out = printed(EPISODE, **how)
    assert "get« hue»‹ now›" in out
    assert "‹token› 0.3 nats or more, «token» 1 nats or more" in out


def test_the_environment_variable_no_color_is_honoured():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", _environ={"NO_COLOR": "1"})
    console.print(shade_episode(EPISODE, title="One"))
    assert "« hue»" in out.getvalue()
    assert "48;2;" not in out.getvalue()


def test_the_legend_names_every_shade():
    out = in_color(EPISODE)
    assert all(f" {shade.least:g}+ " in out for shade in SHADES)


def test_the_statistics_count_sampled_tokens_alone():
    assert "3 sampled tokens, mean 0.97 nats, most 2.5 at ' hue'" in printed(EPISODE)


def test_a_sampled_escape_code_does_not_reach_the_terminal():
    out = printed([sampled("\x1b[31mred\x07", 0.5)])
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "�[31mred�" in out


def test_a_disputed_line_break_is_seen():
    assert "‹a↵\n›" in printed([sampled("a\n", 0.5)])


def test_text_in_square_brackets_is_no_markup():
    assert "[bold]x[/bold]" in printed([sampled("[bold]x[/bold]", 0.5)])


def test_an_episode_without_sampled_tokens_is_refused(tmp_path):
    with pytest.raises(DataError, match="no sampled token"):
        shade_episode([prompt("x")], title="One")
    with pytest.raises(DataError, match="no sampled token"):
        episode_picture(tmp_path / "e.png", [prompt("x")], title="One")


@pytest.fixture
def texts(monkeypatch, tmp_path):
    """The texts of the picture of an episode, from top to bottom and left to right."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (save(self, path), figures.append(self)))

    def draw(tokens):
        episode_picture(tmp_path / "e.png", tokens, title="One")
        placed = [(*text.get_position()[::-1], text.get_text()) for text in figures[-1].axes[0].texts]
        return [text for _, _, text in sorted(placed)]

    return draw


def test_the_picture_names_who_speaks(texts):
    tokens = [prompt("Ask"), sampled("call", 0.0), prompt("result"), sampled("answer", 0.0)]
    shown = [text for text in texts(tokens) if text in ("task", "agent, turn 1", "environment", "agent, turn 2")]
    assert shown == ["task", "agent, turn 1", "environment", "agent, turn 2"]


def test_the_picture_shows_every_sampled_character(texts):
    long = [sampled(f"tok{i} ", i / 100) for i in range(60)] + [sampled("x" * 250, 0.02), sampled("a\nb", 0.0)]
    wanted = "".join(token.text for token in long).replace("\n", "")
    shown = texts([prompt("Ask"), *long])
    start = shown.index("tok0 ")
    assert "".join(shown[start:]).startswith(wanted)


def test_the_picture_cuts_a_long_prompt_in_its_middle(texts):
    shown = texts([prompt("\n".join(f"line {i}" for i in range(40))), sampled("x", 0.0)])
    assert [text for text in shown if text.startswith("line") or text == "⋯"] == [
        "line 0", "line 1", "line 2", "line 3", "⋯", "line 38", "line 39",
    ]  # fmt: skip


def test_the_picture_survives_what_its_font_cannot_draw(texts):
    assert "a�b" in texts([prompt("Ask"), sampled("a好b", 0.5)])
    assert "$x$" in texts([prompt("Ask"), sampled("$x$", 0.5)])
