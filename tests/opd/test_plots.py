"""What stands in the pictures of curves, read from the figure that is saved."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Text

from opd.errors import DataError
from opd.tracking.intervals import wilson
from opd.tracking.plots import COLORS, Curve, curves, run_picture, running_mean, spread, success_curve


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draw with a function of `opd.tracking.plots`; the figure that it saved, fully laid out."""
    saved = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (save(self, path), saved.append(self)))

    def draw(function, *args, **kwargs):
        function(tmp_path / "picture.png", *args, **kwargs)
        return saved[-1]

    return draw


def flat(label: str, value: float) -> Curve:
    return Curve(label=label, steps=[0, 10], values=[0.5, value])


def test_the_picture_is_a_png_wide_enough_for_a_page(tmp_path):
    curves(tmp_path / "c.png", [flat("a", 0.2)], ylabel="Solved")
    height, width, _ = imread(tmp_path / "c.png").shape
    assert (width, height) == (1440, 800)


def test_both_axes_are_labelled(drawn):
    axes = drawn(curves, [flat("a", 0.2)], ylabel="Solved held-out tasks").axes[0]
    assert axes.get_xlabel() == "Training step"
    assert axes.get_ylabel() == "Solved held-out tasks"


def test_each_curve_bears_its_name_and_last_value_in_its_own_color(drawn):
    axes = drawn(curves, [flat("OPSD", 0.963), flat("control", 0.127)], ylabel="y", percent=True).axes[0]
    labels = {text.get_text(): text.get_color() for text in axes.texts}
    lines = {line.get_ydata()[-1]: line.get_color() for line in axes.lines}
    assert labels == {"OPSD 96%": lines[0.963], "control 13%": lines[0.127]}
    assert labels["OPSD 96%"] != labels["control 13%"]


def test_shares_are_shown_from_0_to_100_percent(drawn):
    axes = drawn(curves, [flat("a", 0.6)], ylabel="y", percent=True).axes[0]
    assert axes.get_ylim() == (0, 1)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "20%", "40%", "60%", "80%", "100%"]


def test_labels_of_curves_that_end_together_do_not_touch(drawn):
    figure = drawn(curves, [flat(f"run {i}", 0.98 + 0.005 * i) for i in range(4)], ylabel="y", percent=True)
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y1) for box in boxes)


def test_a_band_is_drawn_from_the_lower_to_the_upper_ends(drawn):
    curve = Curve(label="a", steps=[0, 1], values=[0.3, 0.5], low=[0.2, 0.4], high=[0.45, 0.75])
    [band] = drawn(curves, [curve], ylabel="y").axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert {0.2, 0.4, 0.45, 0.75} <= set(heights)


def test_a_curve_without_intervals_has_no_band(drawn):
    assert not drawn(curves, [flat("a", 0.2)], ylabel="y").axes[0].collections


def test_a_dollar_sign_in_a_name_is_no_formula(drawn):
    figure = drawn(curves, [flat("a$_b$", 0.2)], ylabel="y", title="$x^2$", note="$y$")
    shown = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert len(shown) == 3
    assert not any(text.get_parse_math() for text in shown)


def test_more_curves_than_colors_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"7 curves in one picture cannot be told apart; at most 6"):
        curves(tmp_path / "c.png", [flat(str(i), 0.5) for i in range(len(COLORS) + 1)], ylabel="y")


def test_a_picture_without_curves_is_refused(tmp_path):
    with pytest.raises(DataError, match="no curve to draw"):
        curves(tmp_path / "c.png", [], ylabel="y")


def test_a_curve_of_uneven_columns_is_refused():
    with pytest.raises(DataError, match="'a' has 2 steps but 1 in low"):
        Curve(label="a", steps=[0, 1], values=[0.1, 0.2], low=[0.0], high=[1.0, 1.0])


def test_a_success_curve_has_the_rates_and_their_wilson_intervals():
    curve = success_curve("a", [0, 5], [3, 9], [10, 10])
    assert list(curve.values) == [0.3, 0.9]
    assert [(curve.low[i], curve.high[i]) for i in range(2)] == [wilson(3, 10), wilson(9, 10)]


def test_a_running_mean_averages_about_each_step():
    curve = running_mean("a", [1, 2, 3, 4], [0.0, 3.0, 6.0, 0.0], window=3)
    assert list(curve.values) == [1.5, 3.0, 3.0, 3.0]
    error = 1.96 * 3.0 / math.sqrt(3)  # 0, 3, 6 have a standard deviation of 3
    assert (curve.low[1], curve.high[1]) == pytest.approx((3.0 - error, 3.0 + error))


def test_a_run_of_one_step_has_a_picture(drawn):
    figure = drawn(run_picture, [{"step": 1, "reward/mean": 0.5}], title="run")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.5"]


def test_a_run_without_evaluation_has_one_panel_and_with_it_two(drawn):
    rewards = [{"step": s, "reward/mean": s / 10} for s in range(1, 11)]
    scores = [{"step": s, "eval/success": 0.29, "eval/tasks": 100.0} for s in (0, 10)]
    assert len(drawn(run_picture, rewards, title="run").axes) == 1
    panels = drawn(run_picture, rewards + scores, title="run").axes
    assert [axes.get_ylabel() for axes in panels] == ["Reward per episode", "Solved held-out tasks"]
    [band] = panels[1].collections
    assert set(wilson(29, 100)) <= set(band.get_paths()[0].vertices[:, 1])


def test_a_step_whose_reward_was_no_number_is_left_out(drawn):
    rows = [{"step": 1, "reward/mean": 1.0}, {"step": 2, "reward/mean": None}, {"step": 3, "reward/mean": 2.0}]
    [line] = drawn(run_picture, rows, title="run").axes[0].lines
    assert list(line.get_xdata()) == [1, 3]


def test_a_run_without_numbers_leaves_no_picture(tmp_path):
    run_picture(tmp_path / "c.png", [{"step": 1, "train/loss": 0.1}], title="run")
    assert not list(tmp_path.iterdir())


@given(st.lists(st.floats(-0.5, 1.5), min_size=1, max_size=8))
def test_spread_positions_keep_their_order_and_their_distance(wanted):
    placed = spread(wanted, 0.1)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    assert all(placed[b] - placed[a] >= 0.1 - 1e-9 for a, b in itertools.pairwise(order))
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in placed)


def test_positions_that_are_far_apart_stay():
    assert spread([0.9, 0.1, 0.5], 0.1) == [0.9, 0.1, 0.5]
