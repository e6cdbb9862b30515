"""What was drawn: the data that each artist was handed, against means that the test takes itself; never pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from gravlens.core.errors import GravlensError
from gravlens.directions.trajectory import ByLayer
from gravlens.plot.lines import plot_alignment, plot_arms, plot_effect, plot_layers
from gravlens.plot.style import GREY
from gravlens.stats.nulls import NullDraws

RUNS, STEPS, LAYERS = ("a", "b", "c"), (1, 5, 20, 100), (0, 1, 2)
EFFECT_COLUMNS = ["condition", "layer", "difference", "low", "high", "random_low", "random_high"]


def made_up(run: str, step: int, layer: float) -> float:
    """An alignment that differs for every run, step and layer."""
    return 0.1 + 0.05 * RUNS.index(run) + 0.001 * step + 0.01 * layer


def measured(layers: Sequence[int]) -> pd.DataFrame:
    """Trajectory.table with layer 0 undefined, its first step too short to judge, and the given prompts 1 higher."""
    rows = [
        {"run": run, "step": step, "layer": layer, "prompts": prompts, "judged": step > 1}
        | {"alignment": np.nan if layer == 0 else made_up(run, step, layer) + extra}
        for run in RUNS
        for step in STEPS
        for layer in layers
        for prompts, extra in (("given", 1.0), ("held_out", 0.0))
    ]
    return pd.DataFrame(rows).assign(fraction=lambda rows: rows["alignment"] / 10)


@pytest.fixture
def table() -> pd.DataFrame:
    return measured(LAYERS)


@pytest.fixture
def mean() -> pd.DataFrame:
    """Trajectory.layer_mean, of the values that a layer 7 would have."""
    return measured([7]).drop(columns="layer")


@pytest.fixture
def nulls() -> pd.DataFrame:
    rows = [("isotropic", step, 0.2) for step in STEPS] + [("weight_noise", 100, 0.3), ("weight_noise", 100, 0.35)]
    return pd.DataFrame(rows, columns=["null", "step", "p99"])


@pytest.fixture
def effect() -> pd.DataFrame:
    rows = [
        (condition, layer, sign * (layer + 1.0), sign * layer - 1.0, sign * layer + 2.0, -0.5, 0.25)
        for condition, sign in (("ablated", 1), ("steered_back", -1))
        for layer in LAYERS
    ]
    return pd.DataFrame(rows, columns=EFFECT_COLUMNS).astype({"layer": "Int64"})


@pytest.fixture
def arms() -> pd.DataFrame:
    rows = [("unblocked", "a", 0.6, 0.25), ("unblocked", "b", 0.8, 0.35), ("penalty", "a", 0.1, 0.3)]
    return pd.DataFrame(
        [*rows, ("odd_one", "a", np.nan, np.nan)], columns=["arm", "run", "compliance_rate", "task_loss"]
    )


def bars(ax: Axes) -> dict[str, ErrorbarContainer]:
    return {bar.get_label(): bar for bar in ax.containers if isinstance(bar, ErrorbarContainer)}


def segments(bar: ErrorbarContainer | LineCollection) -> np.ndarray:
    """[bar, end, xy]"""
    collection = bar if isinstance(bar, LineCollection) else bar[2][0]
    return np.array(collection.get_segments())


def lines(ax: Axes, style: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_linestyle() == style]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def ticks(ax: Axes, axis: str) -> list[str]:
    ax.figure.draw_without_rendering()
    return [label.get_text() for label in getattr(ax, f"{axis}axis").get_ticklabels()]


# -- alignment ---------------------------------------------------------------------------------------------------------


def test_a_mean_over_fewer_runs_at_some_steps_says_so(mean: pd.DataFrame) -> None:
    lacking = mean[(mean["run"] != "b") | (mean["step"] > 5)]
    assert "mean ± SEM, runs: 2–3" in bars(plot_alignment(lacking))
    plot_alignment(mean.assign(alignment=np.nan))


def test_alignment_draws_each_run_and_their_mean_and_sem(mean: pd.DataFrame) -> None:
    ax = plot_alignment(mean)
    runs = np.array([[made_up(run, step, 7) for step in STEPS] for run in RUNS])
    thin = [line.get_xydata() for line in ax.lines if line.get_linewidth() < 1 and line.get_alpha()]
    np.testing.assert_allclose(thin, [np.column_stack([STEPS, run]) for run in runs])

    mean = bars(ax)["mean ± SEM, runs: 3"]
    np.testing.assert_allclose(mean[0].get_xydata(), np.column_stack([STEPS, runs.mean(0)]))
    half = np.diff(segments(mean)[..., 1], axis=1)[:, 0] / 2
    np.testing.assert_allclose(half, runs.std(0, ddof=1) / np.sqrt(3))


def test_alignment_takes_other_prompts_another_value_and_a_result_with_a_table(
    table: pd.DataFrame, mean: pd.DataFrame
) -> None:
    class Result:
        def __init__(self) -> None:
            self.table, self.layer_mean = table, mean

    def drawn(ax: Axes) -> np.ndarray:
        return next(iter(bars(ax).values()))[0].get_xydata()[:, 1]

    held_out = drawn(plot_alignment(mean))
    np.testing.assert_allclose(drawn(plot_alignment(mean, prompts="given")), held_out + 1)
    np.testing.assert_allclose(drawn(plot_alignment(mean, value="fraction")), held_out / 10)
    np.testing.assert_allclose(drawn(plot_alignment(Result())), held_out)


def test_each_kind_of_runs_has_a_mean_and_a_look_of_its_own(mean: pd.DataFrame, nulls: pd.DataFrame) -> None:
    ax = plot_alignment(mean, kinds={"harmless": ["a", "c"], "blocked": ["b"]}, nulls=nulls)
    assert {line.get_color() for line in ax.lines if "p99" in line.get_label()} == {GREY}, "no kind's colour"
    assert texts(ax)[:2] == ["harmless, runs: 2", "blocked, runs: 1"] and texts(ax).count("one run") == 1
    drawn = bars(ax)
    wanted = np.array([(made_up("a", step, 7) + made_up("c", step, 7)) / 2 for step in STEPS])
    np.testing.assert_allclose(drawn["harmless, runs: 2"][0].get_ydata(orig=False), wanted)
    np.testing.assert_allclose(
        drawn["blocked, runs: 1"][0].get_ydata(orig=False), [made_up("b", step, 7) for step in STEPS]
    )
    looks = [(line.get_color(), line.get_linestyle(), line.get_marker()) for line, *_ in drawn.values()]
    assert all(one != other for one, other in zip(*looks, strict=True)), "told apart by each of the three"
    thin = {line.get_color(): len(line.get_xdata()) for line in ax.lines if line.get_alpha()}
    assert [*thin] == [look[0] for look in looks]


def test_runs_of_no_kind_are_others_and_a_run_is_of_one_kind(mean: pd.DataFrame) -> None:
    assert [*bars(plot_alignment(mean, kinds={"blocked": ["b"]}))] == ["blocked, runs: 1", "other, runs: 2"]
    for kinds in ({"blocked": ["b", "d"]}, {"x": ["a"], "y": ["a", "b"]}):
        with pytest.raises(GravlensError, match=r"runs: \['a', 'b', 'c'\]"):
            plot_alignment(mean, kinds=kinds)
    with pytest.raises(GravlensError, match="mean=False"):
        plot_alignment(mean, kinds={"x": ["a"]}, mean=False)
    for kinds in ({"x": 3}, {"x": None}, ["a"]):
        with pytest.raises(GravlensError, match="kind"):
            plot_alignment(mean, kinds=kinds)  # type: ignore[arg-type]


def test_a_kind_that_is_named_other_keeps_its_runs(mean: pd.DataFrame) -> None:
    assert [*bars(plot_alignment(mean, kinds={"other": ["b"]}))] == ["other, runs: 3"]
    assert [*bars(plot_alignment(mean, kinds={"blocked": "b", "other": ["a", "c"]}))] == [
        "blocked, runs: 1",
        "other, runs: 2",
    ]


def test_a_null_is_dashed_and_labelled_and_its_strictest_p99_counts(mean: pd.DataFrame, nulls: pd.DataFrame) -> None:
    found = ByLayer(nulls.assign(layer=1, p99=9.0), nulls)
    several = [ByLayer(rows.assign(layer=1), rows) for _, rows in nulls.groupby("null", sort=False)]
    for given in (nulls, found, several):
        ax = plot_alignment(mean, nulls=given)
        drawn = {line.get_label(): line for line in ax.lines if "p99" in str(line.get_label())}
        np.testing.assert_allclose(drawn["isotropic, p99"].get_xydata(), [(step, 0.2) for step in STEPS])
        np.testing.assert_allclose(drawn["weight noise, p99"].get_xydata(), [(100, 0.35)])
        assert drawn["isotropic, p99"].get_linestyle() == "--"
        assert drawn["weight noise, p99"].get_marker() == "_"  # one step makes no line: it needs a mark of its own
        assert {"isotropic, p99", "weight noise, p99"} <= set(texts(ax))


def test_a_drift_too_small_to_judge_is_hollow_in_alignment_alone(mean: pd.DataFrame) -> None:
    hollow = [line for line in plot_alignment(mean).lines if str(line.get_markerfacecolor()) == "white"]
    assert [set(line.get_xdata()) for line in hollow] == [{1}]
    assert "drift too small to judge" in texts(plot_alignment(mean))
    assert "drift too small to judge" not in texts(plot_alignment(mean, value="fraction"))


def test_steps_are_legible(mean: pd.DataFrame) -> None:
    assert ticks(plot_alignment(mean), "x") == ["1", "5", "20", "100"]
    crowded = pd.concat([mean.assign(step=step) for step in range(1, 101)])
    shown = ticks(plot_alignment(crowded), "x")
    assert (shown[0], shown[-1]) == ("1", "100")
    assert len(shown) < 15


def test_axes_say_what_they_show_and_where_zero_is(mean: pd.DataFrame) -> None:
    ax = plot_alignment(mean)
    assert ax.get_xlabel() == "fine-tuning step"
    assert ax.get_ylabel() == r"alignment with $v_\mathrm{rev}$ (cosine)"
    assert any(set(line.get_ydata()) == {0} for line in ax.lines)
    assert plot_alignment(mean, value="fraction").get_ylabel() == "fraction of the way back to the witness"


# -- layers ------------------------------------------------------------------------------------------------------------


def test_layers_draws_a_line_per_step_and_names_what_is_undefined(table: pd.DataFrame) -> None:
    ax = plot_layers(table)
    drawn = bars(ax)
    assert list(drawn) == [f"step {step}" for step in STEPS]
    for step in STEPS:
        runs = np.array([[made_up(run, step, layer) for layer in (1, 2)] for run in RUNS])
        bar = drawn[f"step {step}"]
        np.testing.assert_allclose(bar[0].get_xydata(), np.column_stack([(1, 2), runs.mean(0)]))
        half = np.diff(segments(bar)[..., 1], axis=1)[:, 0] / 2
        np.testing.assert_allclose(half, runs.std(0, ddof=1) / np.sqrt(3))
    assert len({bar[0].get_color().tobytes() for bar in drawn.values()}) == len(STEPS)
    assert ax.get_xlabel() == "layer\nundefined, left out: 0"


def test_layers_names_the_undefined_ones_of_a_trajectory_in_spans(table: pd.DataFrame) -> None:
    @dataclass
    class Followed:
        table: pd.DataFrame
        undefined: dict[int, str] = field(default_factory=lambda: dict.fromkeys((3, 4, 5, 9), "no difference"))

    assert plot_layers(Followed(table)).get_xlabel() == "layer\nundefined, left out: 0, 3–5, 9"
    assert plot_layers(table[table["layer"] != 0]).get_xlabel() == "layer"


def test_layers_draws_the_steps_asked_for(table: pd.DataFrame) -> None:
    assert list(bars(plot_layers(table, step=20))) == ["step 20"]
    assert list(bars(plot_layers(table, step=[1, 100]))) == ["step 1", "step 100"]
    assert texts(plot_layers(table, step=table["step"].max())) == texts(plot_layers(table, step=100))  # of NumPy
    with pytest.raises(GravlensError, match=r"step=7 was asked for.*\[1, 5, 20, 100\]"):
        plot_layers(table, step=7)


def test_layers_marks_what_is_too_small_to_judge_once_in_the_legend(table: pd.DataFrame) -> None:
    ax = plot_layers(table.assign(judged=False))
    hollow = [line for line in ax.lines if str(line.get_markerfacecolor()) == "white"]
    assert [list(line.get_xdata()) for line in hollow] == [[1, 2]] * len(STEPS)
    assert texts(ax).count("drift too small to judge") == 1


# -- effect ------------------------------------------------------------------------------------------------------------


def test_effect_over_layers_draws_dots_intervals_and_the_random_range(effect: pd.DataFrame) -> None:
    effect.attrs["score"] = "refusal_log_odds"
    ax = plot_effect(effect)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "change of refusal log odds (nats)")
    random, interval, _, _ = (segments(collection) for collection in ax.collections)
    ablated = effect[effect["condition"] == "ablated"]
    np.testing.assert_allclose(random[..., 1], [[-0.5, 0.25]] * 3)
    np.testing.assert_allclose(interval[..., 1], ablated[["low", "high"]])
    dots = {line.get_label(): line for line in lines(ax, "None")}
    np.testing.assert_allclose(dots["ablated"].get_ydata(), ablated["difference"])
    np.testing.assert_array_equal(np.round(dots["steered back"].get_xdata().astype(float)), LAYERS)
    assert np.all(dots["ablated"].get_xdata() < dots["steered back"].get_xdata())  # beside each other, not behind
    assert texts(ax) == ["ablated", "steered back", "random directions"]


def test_effect_takes_a_result_with_a_table(effect: pd.DataFrame) -> None:
    class Result:
        def __init__(self) -> None:
            self.table = effect

    assert texts(plot_effect(Result())) == texts(plot_effect(effect))


def test_effect_at_all_layers_at_once_has_its_own_place(effect: pd.DataFrame) -> None:
    everywhere = effect.iloc[[0]].assign(layer=pd.array([pd.NA], "Int64"), difference=42.0)
    ax = plot_effect(pd.concat([effect, everywhere]))
    assert ticks(ax, "x") == ["0", "1", "2", "all"]
    ablated = next(line for line in ax.lines if line.get_label() == "ablated")
    assert np.round(ablated.get_xdata()[-1]) == 3
    assert ablated.get_ydata()[-1] == 42


@pytest.mark.parametrize("layers", [[2, 6, 10, 14, 18, 22, 26, 29], range(12), range(30), range(98), [0, 1, 2, 3, 28]])
def test_labels_of_layers_and_of_all_of_them_stand_apart(effect: pd.DataFrame, layers: Sequence[int]) -> None:
    one = effect.iloc[[0] * (len(layers) + 1)].assign(layer=pd.array([*layers, pd.NA], "Int64"))
    ax = plot_effect(one)
    shown = ticks(ax, "x")
    assert shown[-2:] == [str(layers[-1]), "all"] and len(shown) > 3
    boxes = [label.get_window_extent() for label in ax.xaxis.get_ticklabels()]
    gaps = [right.x0 - left.x1 for left, right in pairwise(boxes)]
    assert min(gaps) > 0.3 * boxes[0].width / len(shown[0]), "of a digit"


@pytest.mark.parametrize("layer", [2, pd.NA])
def test_effect_at_one_layer_has_a_row_per_condition(effect: pd.DataFrame, layer: object) -> None:
    one = effect[effect["layer"] == 1].assign(layer=pd.array([layer, layer], "Int64"))
    ax = plot_effect(one)
    assert ticks(ax, "y") == ["ablated", "steered back"]
    assert ax.yaxis_inverted()
    assert ax.get_xlabel() == "change of the score"
    random, interval = (segments(collection) for collection in ax.collections)
    np.testing.assert_allclose(interval[..., 0], one[["low", "high"]])
    np.testing.assert_allclose(random[..., 0], one[["random_low", "random_high"]])
    dots = next(line for line in ax.lines if line.get_label() == "difference, 95 % interval")
    np.testing.assert_allclose(dots.get_xydata(), np.column_stack([one["difference"], [0, 1]]))


# -- arms --------------------------------------------------------------------------------------------------------------


def test_arms_draws_every_run_and_mean_and_sem_in_the_tables_order(arms: pd.DataFrame) -> None:
    ax = plot_arms(arms)
    assert ticks(ax, "y") == ["unblocked", "penalty", "odd one"]
    assert ax.yaxis_inverted()
    points = [line.get_xdata().tolist() for line in ax.lines if line.get_marker() == "o" and line.get_alpha()]
    assert points == [[0.6, 0.8], [0.1]]
    unblocked, penalty = (bar for bar in ax.containers)
    np.testing.assert_allclose(unblocked[0].get_xydata()[:, 0], [0.7])
    np.testing.assert_allclose(segments(unblocked)[0, :, 0], [0.6, 0.8])  # SEM of .6 and .8 is .1
    np.testing.assert_allclose(penalty[0].get_xydata()[:, 0], [0.1])
    assert texts(ax) == ["mean ± SEM", "one run"]


def test_an_arm_without_a_value_reads_not_run(arms: pd.DataFrame) -> None:
    (text,) = plot_arms(arms).texts
    assert (text.get_text(), text.get_position()[1]) == ("not run", 2)
    assert not plot_arms(arms.iloc[:3]).texts


def test_shares_are_per_cent_and_a_loss_is_not_held_to_zero(arms: pd.DataFrame) -> None:
    shares, loss = plot_arms(arms), plot_arms(arms, measure="task_loss")
    assert shares.get_xlabel() == "harmful prompts answered (%)"
    assert "80" in ticks(shares, "x")
    assert loss.get_xlabel() == "held-out task loss (nats per token)"
    assert shares.get_xlim()[0] < 0 < loss.get_xlim()[0]


def test_references_are_dashed_and_labelled(arms: pd.DataFrame) -> None:
    ax = plot_arms(arms, reference={"witness": 1.0, "anchor": 0.05})
    drawn = {line.get_label(): line for line in ax.lines}
    assert set(drawn["witness"].get_xdata()) == {1.0}
    assert set(drawn["anchor"].get_xdata()) == {0.05}
    assert drawn["witness"].get_linestyle() == "--"
    assert {"witness", "anchor"} <= set(texts(ax))


# -- every plot --------------------------------------------------------------------------------------------------------

EVERY = pytest.mark.parametrize(
    ("plot", "name"),
    [(plot_alignment, "mean"), (plot_layers, "table"), (plot_effect, "effect"), (plot_arms, "arms")],
)


@EVERY
def test_a_notebook_shows_the_axes_and_nothing_is_cut_off(plot, name: str, request: pytest.FixtureRequest) -> None:
    ax = plot(request.getfixturevalue(name))
    assert ax._repr_png_().startswith(b"\x89PNG")
    ax.figure.draw_without_rendering()
    page, legend = ax.figure.bbox, ax.get_legend().get_window_extent()
    assert page.x0 <= legend.x0 < legend.x1 <= page.x1


@EVERY
def test_a_table_without_a_column_or_without_rows_says_so(plot, name: str, request: pytest.FixtureRequest) -> None:
    table = request.getfixturevalue(name)
    first = {"mean": "step", "table": "step", "effect": "low", "arms": "arm"}[name]
    with pytest.raises(GravlensError, match=f"no column {first}"):
        plot(table.drop(columns=first))
    with pytest.raises(GravlensError, match="no rows"):
        plot(table[:0])


def test_bad_input_names_what_would_do(
    table: pd.DataFrame, mean: pd.DataFrame, nulls: pd.DataFrame, arms: pd.DataFrame
) -> None:
    with pytest.raises(GravlensError, match=r"prompts='other'.*'held_out'"):
        plot_alignment(mean, prompts="other")
    with pytest.raises(GravlensError, match="no column alinement"):
        plot_layers(table, value="alinement")
    with pytest.raises(GravlensError, match="plot_layers"):
        plot_alignment(table)
    with pytest.raises(GravlensError, match="nulls=None"):
        plot_alignment(mean, value="fraction", nulls=nulls)
    with pytest.raises(GravlensError, match=r"NullDraws.*compare\(trajectory, null\)"):
        plot_alignment(mean, nulls=NullDraws("isotropic", np.zeros((3, 1, 1)), (1,), (0,)))  # type: ignore[arg-type]
    for axes in (np.array([Figure().add_subplot()]), Figure()):
        with pytest.raises(GravlensError, match="ax is one Axes"):
            plot_alignment(mean, ax=axes)  # type: ignore[arg-type]
    assert len(plot_alignment(mean, nulls=[]).lines) == len(plot_alignment(mean).lines)
    with pytest.raises(GravlensError, match=r"no column fun.*task_loss"):
        plot_arms(arms, measure="fun")
