"""The plane of v_rev and the first component of the rest: numbers against planted ones, and what is drawn of them."""

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from histories import refused
from matplotlib.colors import to_hex
from planes import PLACES, PROMPTS, WIDTH, plane, planted
from sklearn.decomposition import PCA

from gravlens.activations.residuals import Residuals
from gravlens.directions.plane import residual_plane
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.plot.plane import explore_residual_plane, plot_residual_plane


def placed(table: pd.DataFrame) -> dict[str, tuple[float, float]]:
    rows = table[table["prompt"].isna()]
    return dict(zip(rows["checkpoint"], zip(rows["along"], rows["across"], strict=True), strict=True))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_checkpoints_lie_where_they_were_planted() -> None:
    states = planted()
    table = residual_plane(states, locate_vrev(states, layer=7))
    found = placed(table)
    # the runs' mean is negative on the second axis, and its sign is the component's
    np.testing.assert_allclose([found[name] for name in PLACES], [(x, -y) for x, y in PLACES.values()], atol=1e-5)
    assert table.attrs["across_share"] == pytest.approx(1, abs=1e-6)
    assert table["kind"].tolist() == ["witness", "anchor", "run", "run", "run", "other"]
    assert table["run"].tolist()[2:5] == ["a", "a", "b"] and table["step"].tolist()[2:5] == [10, 2, 2]
    assert set(table["layer"]) == {7} and table["prompt"].isna().all()


def test_along_is_the_fraction_of_follow() -> None:
    states = planted()
    vs = locate_vrev(states)
    fractions = follow(states, vs).table.query("layer == 3").set_index(["run", "step"])["fraction"]
    runs = residual_plane(states, vs[3]).query("kind == 'run'").set_index(["run", "step"])["along"]
    pd.testing.assert_series_equal(runs.sort_index(), fractions.sort_index(), check_names=False, check_index_type=False)


def test_across_is_the_first_principal_component_of_the_rest() -> None:
    """Held against scikit-learn's PCA of the mean states, v projected out."""
    states = planted()
    v = locate_vrev(states, layer=3)
    table = residual_plane(states, v)
    means = states.values[:, :, 0].astype(np.float64).mean(1)
    rest = means - np.outer(means @ v.vector, v.vector.astype(np.float64))
    pca = PCA(1).fit(rest)
    scores = pca.transform(rest)[:, 0] / v.distance
    scores -= scores[1]  # the anchor's
    np.testing.assert_allclose(table["across"], scores * np.sign(scores[2:5].mean()), atol=1e-6)
    assert table.attrs["across_share"] == pytest.approx(pca.explained_variance_ratio_[0], rel=1e-5)
    assert table.attrs["across_share"] < 0.9


def test_prompts_are_those_of_the_ends_and_their_mean_is_the_checkpoint() -> None:
    states = planted()
    v = locate_vrev(states, layer=7)
    table = residual_plane(states, v, prompts=True)
    clouds = table[table["prompt"].notna()]
    assert clouds.groupby("checkpoint").size().to_dict() == {"witness": PROMPTS, "a/10": PROMPTS, "b/2": PROMPTS}
    for name, rows in clouds.groupby("checkpoint"):
        np.testing.assert_allclose(rows[["along", "across"]].mean(), placed(table)[str(name)], atol=1e-6)
        assert rows["along"].std() > 0.05
    one = (states.of("a/10")[4, 1].astype(np.float64) - states.of("anchor")[4, 1]) @ v.vector / v.distance
    assert clouds.query("checkpoint == 'a/10' and prompt == 4")["along"].item() == pytest.approx(one)


def test_where_nothing_is_left_there_is_no_component() -> None:
    states = planted({"witness": (1.0, 0.0), "anchor": (0.0, 0.0), "a/1": (0.5, 0.0)})
    table = residual_plane(states, locate_vrev(states, layer=7))
    assert set(table["across"]) == {0.0} and np.isnan(table.attrs["across_share"])
    assert placed(table)["a/1"][0] == pytest.approx(0.5, abs=1e-5)


def test_a_plane_needs_a_direction_of_these_states() -> None:
    states = planted()
    alike = planted({"witness": (0.0, 0.0), "anchor": (0.0, 0.0)}, noise=0.0)
    with refused("undefined at layer 7"):
        residual_plane(alike, locate_vrev(alike)[7])
    with refused("no layer 5"):
        residual_plane(states, direction_from(np.ones(WIDTH), layer=5))
    with refused("whitened"):
        meant = Residuals(states.values, states.checkpoints, states.layers, "given", {"geometry": "whitened"})
        residual_plane(meant, locate_vrev(states, layer=7))
    with refused("'anchor' is not in these residuals"):
        residual_plane(Residuals(states.values[:1], ("witness",), (3, 7), "given"), locate_vrev(states, layer=7))


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_a_run_is_drawn_from_the_anchor_step_by_step() -> None:
    ax = plot_residual_plane(plane())
    drawn = {line.get_label(): line for line in ax.lines}
    assert list(drawn) == ["_child0", "witness", "anchor", "a, to step 10", "b, to step 2", "_child5"]
    np.testing.assert_allclose(
        drawn["a, to step 10"].get_xydata(), [(0, 0), (0.125, -0.0625), (0.25, 0.125)], atol=1e-5
    )
    np.testing.assert_allclose(drawn["witness"].get_xydata(), [(1, 0)], atol=1e-5)
    np.testing.assert_allclose(drawn["_child5"].get_xydata(), [(0.5, -0.25)], atol=1e-5)
    assert [text.get_text() for text in ax.texts] == ["sibling"]
    assert ax.get_aspect() == 1
    assert ax.get_ylabel() == "rest, first component: 100% of its variance\n(witness–anchor distances)"
    assert plot_residual_plane(plane().copy(deep=True).map(lambda cell: cell)).get_ylabel().startswith("rest, first")


def test_prompts_are_faint_points_of_their_checkpoints_colour() -> None:
    table = plane(prompts=True)
    ax = plot_residual_plane(table)
    faint = [line for line in ax.lines if line.get_alpha() is not None]
    assert [len(line.get_xdata()) for line in faint] == [PROMPTS] * 3
    solid = {line.get_label(): to_hex(line.get_color()) for line in ax.lines}
    assert [to_hex(line.get_color()) for line in faint] == ["#000000", solid["a, to step 10"], solid["b, to step 2"]]
    assert [text.get_text() for text in ax.get_legend().get_texts()].count("one prompt's drift") == 1


def test_many_runs_share_one_look_and_one_line_of_the_legend() -> None:
    places = PLACES | {f"run{i}/1": (0.1 * i, 0.1) for i in range(7)}
    states = planted(places)
    ax = plot_residual_plane(residual_plane(states, locate_vrev(states, layer=7)))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["witness", "anchor", "runs: 9"]


def test_the_view_has_the_same_points_and_says_what_each_is() -> None:
    pytest.importorskip("plotly", reason="plotly is in the extra `plots`")
    table = plane(prompts=True).replace({"run": {"b": "<b>"}}).assign(
        checkpoint=lambda t: t["checkpoint"].str.replace("b/2", "<b>/2")
    )  # fmt: skip
    figure = explore_residual_plane(table)
    traces = {trace.name: trace for trace in figure.data}
    assert list(traces) == ["witness", "anchor", "other", "&lt;b&gt;", "a", "witness: prompts", "a: prompts",
                            "&lt;b&gt;: prompts"]  # fmt: skip
    assert traces["a"].mode == "lines+markers"
    np.testing.assert_allclose(traces["a"].x, [0, 0.125, 0.25], atol=1e-5)
    np.testing.assert_allclose(traces["a"].y, [0, -0.0625, 0.125], atol=1e-5)
    assert list(traces["a"].text) == ["anchor", "a, step 2", "a, step 10"]
    assert list(traces["&lt;b&gt;"].text) == ["anchor", "&lt;b&gt;, step 2"]
    assert list(traces["a: prompts"].text)[:2] == ["a, step 10, prompt 0", "a, step 10, prompt 1"]
    assert "%{x" in traces["a"].hovertemplate and "%{text}" in traces["a"].hovertemplate
    assert figure.layout.yaxis.scaleanchor == "x" and "witness–anchor distances" in figure.layout.xaxis.title.text


def test_the_view_is_written_as_one_page(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="plotly is in the extra `plots`")
    explore_residual_plane(plane()).write_html(tmp_path / "plane.html")
    page = (tmp_path / "plane.html").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)


def test_without_plotly_one_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    with refused("plotly is not installed"):
        explore_residual_plane(plane())
    with pytest.raises(ValueError, match=re.escape("pip install 'gravlens[plots]'")):
        explore_residual_plane(plane())


@pytest.mark.parametrize("draw", [plot_residual_plane, explore_residual_plane])
def test_another_table_is_refused(draw) -> None:
    pytest.importorskip("plotly", reason="plotly is in the extra `plots`")
    with refused("no column across"):
        draw(plane().drop(columns="across"))
    with refused("no rows"):
        draw(plane()[:0])
