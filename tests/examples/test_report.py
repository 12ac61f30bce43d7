"""The plot of a comparison: every curve is seen, named at its end, and the late phase is enlarged."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text

from common.report import COLOURS, Result, apart, draw_curves, plot_curves


START = 60


def results(last: int = 100) -> list[Result]:
    """Two methods with one curve, as late-phase training and its control often have, and a third."""
    made = []
    for method, ahead in (("late_phase", 0.0), ("accumulation", 0.0), ("base", 0.1)):
        curve = [{"step": step, "bpc": 8 / step + ahead} for step in range(10, last + 1, 10)]
        for point in curve[-2:]:
            point["bpc_averaged"] = point["bpc"] + 0.001
        made.append(Result(method, 1.0, {"test": 1.0}, averaged_scores={"test": 1.0}, curve=curve))
    return made


@pytest.fixture
def axes():
    figure = draw_curves(results(), "SWA", START, "bits")
    figure.canvas.draw()
    yield figure.axes
    plt.close(figure)


def test_the_late_phase_is_enlarged_beside_the_whole(axes) -> None:
    whole, late = axes
    assert whole.get_xlim()[0] < 10 and late.get_xlim()[0] == START
    low, high = late.get_ylim()
    values = [y for line in late.lines for x, y in line.get_xydata() if x >= START]
    assert low < min(values) and max(values) < high
    assert high - low < 1.2 * (max(values) - min(values)), "no more than what the late phase needs"


def test_curves_that_lie_on_each_other_are_both_seen(axes) -> None:
    for panel in axes:
        drawn = {line.get_label(): line for line in panel.lines}
        first, second = drawn["late_phase"], drawn["accumulation"]
        assert (first.get_xydata() == second.get_xydata()).all()
        # The later one is drawn on top and is narrower.
        assert panel.lines.index(first) < panel.lines.index(second)
        assert first.get_linewidth() > second.get_linewidth() + 1
        assert first.get_color() != second.get_color()


def test_every_curve_is_named_at_its_end_and_no_name_covers_another(axes) -> None:
    *_, late = axes
    assert late.get_legend() is None
    names = {text.get_text(): text for text in late.texts}
    assert set(names) == {
        name for method in ("late_phase", "accumulation", "base") for name in (method, f"{method}, SWA")
    }
    for line in late.lines:
        assert names[line.get_label()].get_color() == line.get_color()
    boxes = sorted((Text.get_window_extent(text) for text in names.values()), key=lambda box: box.y0)
    assert all(below.y0 + 0.7 * below.height < above.y0 for below, above in pairwise(boxes))


def test_without_a_late_phase_there_is_one_panel(tmp_path: Path) -> None:
    figure = draw_curves(results(last=50), "SWA", START, "bits")
    assert len(figure.axes) == 1
    plt.close(figure)
    empty = Result("base", 1.0, {"test": 1.0})
    plot_curves([empty], "SWA", START, "bits", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


@pytest.mark.parametrize("wanted", [[0.5] * 8, [0.0, 0.01, 0.5], [0.97, 0.98, 0.99, 1.0], [1.0] * 20, []])
def test_heights_are_moved_apart(wanted: list[float]) -> None:
    heights = apart(wanted, 0.05)
    assert len(heights) == len(wanted)
    assert all(above - below > 0.05 - 1e-9 for below, above in pairwise(heights))
    assert all(-1e-9 < height < 1 + 1e-9 for height in heights)
    assert apart([0.1, 0.5, 0.9], 0.05) == [0.1, 0.5, 0.9], "nothing moves without need"


def test_no_colour_stands_for_two_methods() -> None:
    assert len(set(COLOURS)) == len(COLOURS) >= 7
