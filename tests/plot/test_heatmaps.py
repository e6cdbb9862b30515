"""Heatmaps: what is drawn is the table's means, at their places."""

import numpy as np
import pandas as pd
from histories import refused
from matplotlib.axes import Axes

from gravlens.plot.heatmap import plot_heatmap


def drawn(ax: Axes) -> np.ndarray:
    (image,) = ax.images
    return np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)


def test_a_heatmap_puts_means_at_their_places_and_leaves_the_rest_empty() -> None:
    table = pd.DataFrame(
        {"layer": pd.array([1, 0, 0, 0, pd.NA], "Int64"), "position": [-1, -1, -1, -5, -1], "x": [-0.5, 0.2, 0.4, 1, 9]}
    )
    ax = plot_heatmap(table, value="x")
    np.testing.assert_allclose(drawn(ax), [[1, 0.3], [np.nan, -0.5]])  # layer 0 first, −5 before −1
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "1"] and not ax.yaxis_inverted()
    assert [label.get_text() for label in ax.get_xticklabels()] == ["−5", "−1"]
    assert sorted(text.get_text() for text in ax.texts) == ["0.30", "1.00", "−0.50"]
    assert ax.images[0].get_clim() == (-1, 1)
    assert plot_heatmap(table, value="x", limit=0.4).images[0].get_clim() == (-0.4, 0.4)


def test_names_stand_in_the_tables_order_from_the_top() -> None:
    table = pd.DataFrame({"span": ["v_rev", "drift", "drift"], "rank": [1, 1, 4], "share": [0.1, 0.5, 0.9]})
    ax = plot_heatmap(table, value="share", rows="span", columns="rank")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["v rev", "drift"] and ax.yaxis_inverted()
    np.testing.assert_allclose(drawn(ax), [[0.1, np.nan], [0.5, 0.9]])
    with refused("no column way"):
        plot_heatmap(table, value="way", rows="span", columns="rank")
    with refused("no rows"):
        plot_heatmap(table.assign(rank=np.nan), value="share", rows="span", columns="rank")


def test_many_cells_carry_a_dash_where_they_are_below_zero() -> None:
    """Red and blue are one grey in print."""
    rows = [(layer, position, (-1) ** layer * 0.1 * position) for layer in range(20) for position in range(5)]
    ax = plot_heatmap(pd.DataFrame(rows, columns=["layer", "position", "x"]), value="x")
    assert not ax.texts
    (dashes,) = ax.lines
    assert {(layer, position) for position, layer in dashes.get_xydata()} == {
        (layer, position) for layer, position, x in rows if x < -0.02
    }


def test_next_to_nothing_has_no_sign() -> None:
    table = pd.DataFrame({"layer": [0, 1], "position": -1, "x": [-0.001, -1.0]})
    assert [text.get_text() for text in plot_heatmap(table, value="x").texts] == ["0.00", "−1.00"]
