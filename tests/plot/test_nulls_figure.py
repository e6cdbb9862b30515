"""The figure of nulls: what each histogram, p99 and dot was handed, against draws and quantiles taken here."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.patches import StepPatch

from gravlens.core.errors import GravlensError
from gravlens.directions.trajectory import Trajectory
from gravlens.plot.nulls import HEIGHT, plot_nulls
from gravlens.stats.nulls import NullDraws

RUNS, STEPS, LAYERS = ("a", "b", "c"), (5, 20), (0, 1, 2)
OBSERVED = {"a": 0.9, "b": 0.5, "c": 0.05}  # at every layer and step; above, among and below the draws


def followed() -> Trajectory:
    rows = [
        {"run": run, "prompts": "held_out", "step": step, "layer": layer, "alignment": OBSERVED[run] + 0.01 * layer}
        for run in RUNS
        for step in STEPS
        for layer in LAYERS
    ]
    measures = {"projection": 1.0, "fraction": 0.2, "drift_norm": 2.0, "judged": True}
    return Trajectory.from_table(pd.DataFrame(rows).assign(**measures))


def null(name: str = "weight_noise", *, steps: tuple[int, ...] = STEPS, seed: int = 0, **of: str) -> NullDraws:
    cosines = np.random.default_rng(seed).uniform(-0.2, 0.7, (400, len(steps), len(LAYERS)))
    return NullDraws(name, cosines, steps, LAYERS, **of)


def histogram(ax: Axes, place: int) -> tuple[np.ndarray, np.ndarray]:
    """Heights in rows, and edges."""
    data = [patch for patch in ax.patches if isinstance(patch, StepPatch)][place].get_data()
    return place - data.values, data.edges


def p99(ax: Axes) -> list[float]:
    return [float(line.get_xdata()[0]) for line in ax.lines if line.get_linestyle() == "--"]


def dots(ax: Axes, *, hollow: bool) -> list[float]:
    face = "white" if hollow else "#0072B2"
    drawn = [line for line in ax.lines if line.get_marker() == "o" and line.get_markerfacecolor() == face]
    return sorted(round(float(x), 6) for line in drawn for x in line.get_xdata())


def names(ax: Axes) -> list[str]:
    return [label.get_text() for label in ax.get_yticklabels()]


def test_the_mean_over_layers_is_taken_draw_by_draw_and_runs_lie_where_they_were_measured() -> None:
    one = null()
    ax = plot_nulls(followed(), one)
    drawn = one.cosines[:, 1].mean(-1)  # the last step
    heights, edges = histogram(ax, 0)
    count, wanted = np.histogram(drawn, len(heights))
    np.testing.assert_allclose(edges, wanted)
    np.testing.assert_allclose(heights, HEIGHT * count / count.max())
    np.testing.assert_allclose(p99(ax), [np.quantile(drawn, 0.99)])
    assert dots(ax, hollow=False) == [0.91] and dots(ax, hollow=True) == [0.06, 0.51]
    worst = (1 + (drawn >= 0.06).sum()) / 401
    (told,) = [text.get_text() for text in ax.texts]
    assert told == f"p = .0025 to {worst:.2g}".replace(" 0.", " .")
    assert "step 20" in ax.get_xlabel() and "mean over layers" in ax.get_xlabel()


def test_step_layer_and_run_choose() -> None:
    one = null()
    ax = plot_nulls(followed(), one, step=5, layer=2, run="b")
    np.testing.assert_allclose(p99(ax), [np.quantile(one.cosines[:, 0, 2], 0.99)])
    assert dots(ax, hollow=True) == [0.52] and dots(ax, hollow=False) == []
    assert "layer 2" in ax.get_xlabel() and "step 5" in ax.get_xlabel()


def test_each_null_has_a_row_and_says_its_step_where_they_differ() -> None:
    both = [null(), null("sign_flips", steps=(5,), seed=1, of="mean"), null("swapped_labels", seed=2, run="a")]
    ax = plot_nulls(followed(), both)
    assert names(ax) == ["weight noise, step 20", "sign flips, step 5", "swapped labels, step 20"]
    np.testing.assert_allclose(p99(ax)[1], np.quantile(both[1].cosines[:, 0].mean(-1), 0.99))
    mean = round(np.mean([*OBSERVED.values()]) + 0.01, 6)
    assert dots(ax, hollow=False) + dots(ax, hollow=True) == sorted([0.91, 0.91]) + sorted([0.06, 0.51, mean])
    assert names(plot_nulls(followed(), both[:1])) == ["weight noise"]


def test_draws_without_a_cosine_are_left_out_of_the_histogram_alone() -> None:
    one = null()
    one.cosines[:3] = np.nan
    heights, _ = histogram(plot_nulls(followed(), one), 0)
    count, _ = np.histogram(one.cosines[3:, 1].mean(-1), len(heights))
    np.testing.assert_allclose(heights, HEIGHT * count / count.max())


def test_no_such_place_says_which_there_are() -> None:
    with pytest.raises(GravlensError, match=r"step=7.*\[5, 20\].*'a', 'b', 'c'"):
        plot_nulls(followed(), null(), step=7)
    for several in ({"step": [5, 20]}, {"layer": [0, 1]}):
        with pytest.raises(GravlensError, match=r"\[5, 20\].*\[0, 1, 2\]"):
            plot_nulls(followed(), null(), **several)  # type: ignore[arg-type]
    with pytest.raises(GravlensError, match="run='d'"):
        plot_nulls(followed(), null(), run="d")
    with pytest.raises(GravlensError, match="No null"):
        plot_nulls(followed(), [])
