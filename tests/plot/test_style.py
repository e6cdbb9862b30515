"""The laws that every public plot keeps, and what is saved: vectors with text, the same bytes for the same figure."""

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from histories import refused
from matplotlib import colors, pyplot
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from planes import plane
from test_nulls_figure import followed, null

import gravlens
from gravlens.plot import lines as plots
from gravlens.plot import style
from gravlens.plot.style import CYCLE, GREY, save_figure


def trajectory() -> pd.DataFrame:
    rows = product(("a", "b"), (1, 20, 100), (0, 1, 2), ("given", "held_out"))
    table = pd.DataFrame(list(rows), columns=["run", "step", "layer", "prompts"])
    return table.assign(alignment=np.linspace(-0.2, 0.8, len(table)), judged=table["step"] > 1)


def layer_mean() -> pd.DataFrame:
    return trajectory().query("layer == 2").drop(columns="layer")


def nulls() -> pd.DataFrame:
    names = ("isotropic", "weight_noise", "covariance_of_states", "sign_flips")
    rows = [(null, step, 0.1 * (1 + number)) for number, null in enumerate(names) for step in (1, 20, 100)]
    return pd.DataFrame(rows, columns=["null", "step", "p99"])


def effect() -> pd.DataFrame:
    names = ["ablated", "steered", "clamped", "patched"]
    rows = [(name, layer, i - 1.5, i - 2.0, i - 1.0, -0.5, 0.5) for i, name in enumerate(names) for layer in (0, 1)]
    columns = ["condition", "layer", "difference", "low", "high", "random_low", "random_high"]
    table = pd.DataFrame(rows, columns=columns)
    table.attrs["score"] = "refusal_log_odds"
    return table


def arms() -> pd.DataFrame:
    rows = [(name, run, 0.1 * i + 0.05 * run, 1 + i) for i, name in enumerate("abcdefgh") for run in (0, 1)]
    return pd.DataFrame(rows, columns=["arm", "run", "compliance_rate", "task_loss"]).assign(blocker=lambda t: t["arm"])


def grid() -> pd.DataFrame:
    rows = [(layer, position, 0.1 * layer * position) for layer in range(4) for position in (-2, -1)]
    return pd.DataFrame(rows, columns=["layer", "position", "fraction"])


# public name -> calls with results of every shape that it takes
EXAMPLES: dict[str, list[Callable[..., Axes]]] = {
    "plot_alignment": [
        lambda **at: gravlens.plot_alignment(layer_mean(), nulls=nulls(), **at),
        lambda **at: gravlens.plot_alignment(
            layer_mean(), kinds={"kind": ["a"], "another": ["b"]}, nulls=nulls(), **at
        ),
        lambda **at: gravlens.plot_alignment(layer_mean().assign(fraction=0.5), value="fraction", **at),
    ],
    "plot_layers": [lambda **at: gravlens.plot.plot_layers(trajectory(), **at)],
    "plot_effect": [
        lambda **at: gravlens.plot.plot_effect(effect(), **at),
        lambda **at: gravlens.plot.plot_effect(effect().query("layer == 0"), **at),
    ],
    "plot_arms": [
        lambda **at: gravlens.plot.plot_arms(arms(), reference={"witness": 1.0, "anchor": 0.0}, **at),
        lambda **at: gravlens.plot.plot_arms(arms(), measure="task_loss", **at),
    ],
    "plot_frontier": [lambda **at: gravlens.plot.plot_frontier(arms(), twins=["h"], **at)],
    "plot_residual_plane": [lambda **at: gravlens.plot.plot_residual_plane(plane(prompts=True), **at)],
    "plot_nulls": [lambda **at: gravlens.plot.plot_nulls(followed(), [null(), null("sign_flips", of="mean")], **at)],
    "plot_heatmap": [lambda **at: gravlens.plot.plot_heatmap(grid(), **at)],
}
EVERY = pytest.mark.parametrize(
    "plot", [pytest.param(call, id=f"{name}-{i}") for name, calls in EXAMPLES.items() for i, call in enumerate(calls)]
)


def test_every_public_plot_is_held_to_the_laws() -> None:
    assert EXAMPLES.keys() == {name for name in [*gravlens.__all__, *gravlens.plot.__all__] if name.startswith("plot_")}


@EVERY
def test_a_given_ax_is_drawn_into_and_returned(plot: Callable[..., Axes]) -> None:
    left, right = Figure().subplots(1, 2)
    assert plot(ax=right) is right
    assert right.has_data() and not left.has_data()


@EVERY
def test_without_ax_it_makes_a_new_figure_which_is_pyplot_s_where_pyplot_is_loaded(plot: Callable[..., Axes]) -> None:
    others = pyplot.figure()
    one, two = plot(), plot()
    assert pyplot.get_fignums() == [others.number, one.figure.number, two.figure.number]
    assert pyplot.gcf() is two.figure
    assert one._repr_png_().startswith(b"\x89PNG"), "Agg shows no window: the picture is this"


@EVERY
def test_the_style_holds_inside_and_nothing_global_changes(plot: Callable[..., Axes]) -> None:
    with mpl.rc_context({"font.size": 31, "axes.labelsize": 31, "axes.spines.top": True, "lines.linewidth": 9}):
        before = dict(mpl.rcParams)
        ax = plot()
        save_figure(ax, Path("never"), formats=())
        assert dict(mpl.rcParams) == before
    assert ax.xaxis.label.get_size() == style.STYLE["axes.labelsize"]
    assert not ax.spines["top"].get_visible()


def frame(ax: Axes) -> tuple[bool, float, float]:
    ax.figure.draw_without_rendering()
    return ax.spines["top"].get_visible(), ax.xaxis.label.get_size(), ax.get_xticklabels()[0].get_size()


def test_axes_that_a_caller_makes_look_like_those_of_a_plot() -> None:
    """As `gravlens reproduce` makes them; those of matplotlib have a frame on four sides and larger letters."""
    table = pd.DataFrame({"arm": ["a"], "compliance_rate": [0.5]})
    own, made = frame(plots.plot_arms(table)), frame(plots.plot_arms(table, ax=style.axes_of(None, hidden=True)))
    assert own == made == (False, 8.0, 7.5)
    assert frame(plots.plot_arms(table, ax=Figure().add_subplot()))[0], "the user's own Axes stay the user's"


@EVERY
def test_both_axes_say_what_they_show(plot: Callable[..., Axes]) -> None:
    ax = plot()
    for said in (ax.get_xlabel(), ax.get_ylabel()):
        assert said.strip() and "_" not in said.replace(r"$v_\mathrm{rev}$", "")
    assert all(bar.get_ylabel() for bar in ax.figure.axes if bar is not ax)


@pytest.mark.parametrize("measure", style.LABELS)
def test_a_measure_with_a_unit_names_it(measure: str) -> None:
    """What is left without one is a fraction, which has none, or says it (seconds per step)."""
    bare = {"fraction", "fraction_final", "seconds_per_step"}
    assert bool(re.search(r"\((%|cosine|nats.*|residual units)\)", style.LABELS[measure])) is (measure not in bare)


def looks(ax: Axes) -> dict[str, tuple[object, ...]]:
    """Each entry of the legend: what is left of its look in grey print."""
    drawn = {line.get_label(): (line, False) for line in ax.lines}
    drawn |= {bar.get_label(): (bar[0], True) for bar in ax.containers if isinstance(bar, ErrorbarContainer)}
    found = {}
    for label in (text.get_text() for text in ax.get_legend().get_texts()):
        line, bars = drawn[label]
        dashes = (line.get_linestyle(), str(getattr(line, "_unscaled_dash_pattern", "")), line.get_linewidth())
        found[label] = (bars, *dashes, line.get_marker(), colors.to_hex(line.get_markerfacecolor()) == "#ffffff")
    return found


@EVERY
def test_entries_of_a_legend_differ_without_colour(plot: Callable[..., Axes]) -> None:
    ax = plot()
    numbered = ax.get_legend() and all(re.match(r"\d+  ", label) for label in looks(ax))
    if ax.get_legend() and not numbered:  # a numbered point carries its number
        assert len(set(looks(ax).values())) == len(looks(ax)), looks(ax)


@EVERY
def test_colours_are_those_of_the_palette_or_of_a_scale_in_lightness(plot: Callable[..., Axes]) -> None:
    ax = plot()
    named = {colors.to_rgb(colour) for colour in (*CYCLE, GREY, "black")}
    scale = {tuple(colour[:3]) for colour in mpl.colormaps["viridis"](np.linspace(0, 0.88, 3))}
    drawn = {colors.to_rgb(line.get_color()) for line in ax.lines}
    assert drawn <= named or drawn <= scale | named


def luminance(colour: str) -> float:
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colors.to_rgb(colour)]
    return float(np.dot(channels, (0.2126, 0.7152, 0.0722)))


def test_lines_stand_out_from_white_paper() -> None:
    """WCAG 2.2 asks 3:1 of graphics; the palette's two lightest are never a line by themselves before the fifth."""
    contrast = [1.05 / (luminance(colour) + 0.05) for colour in (*CYCLE[:3], GREY)]
    assert min(contrast) > 3


@EVERY
def test_nothing_is_cut_off(plot: Callable[..., Axes]) -> None:
    ax = plot()
    ax.figure.draw_without_rendering()
    page, inside = ax.figure.bbox, ax.get_tightbbox()
    assert page.x0 <= inside.x0 + 1 and inside.x1 <= page.x1 + 1
    assert page.y0 <= inside.y0 + 1 and inside.y1 <= page.y1 + 1


# -- saving ------------------------------------------------------------------------------------------------------------


def test_a_pdf_keeps_its_text_and_embeds_its_font(tmp_path: Path) -> None:
    paths = save_figure(plots.plot_arms(arms()), tmp_path / "new" / "by_arm")
    assert [path.name for path in paths] == ["by_arm.pdf", "by_arm.png"] and all(path.is_file() for path in paths)
    pdf = paths[0].read_bytes()
    assert b"/FontFile2" in pdf and b"/Subtype /Type3" not in pdf
    width, height = np.frombuffer(paths[1].read_bytes()[16:24], ">u4")
    assert (width, height) == (3.6 * 300, 2.9 * 300)


@pytest.mark.parametrize("name", ["pdf", "svg", "png"])
def test_the_same_figure_is_the_same_file(tmp_path: Path, name: str) -> None:
    one, two = (save_figure(plots.plot_arms(arms()), tmp_path / f"{i}.{name}") for i in (1, 2))
    assert [path.name for path in one] == [f"1.{name}"]
    assert one[0].read_bytes() == two[0].read_bytes()
    assert b"2026" not in one[0].read_bytes() or name != "svg"


def test_a_dot_in_a_name_is_no_ending_and_another_format_is_refused(tmp_path: Path) -> None:
    figure = Figure()
    assert [path.name for path in save_figure(figure, tmp_path / "strength_0.5", formats=["svg"])] == [
        "strength_0.5.svg"
    ]
    with refused("'bmp'"):
        save_figure(figure, tmp_path / "one", formats=["png", "bmp"])
    with refused("'jpg'"):  # an ending that matplotlib knows is meant as one
        save_figure(figure, tmp_path / "one.jpg")
    with refused("ndarray"):
        save_figure(np.array([figure.add_subplot()]), tmp_path / "one.png")  # type: ignore[arg-type]
    assert not [*tmp_path.glob("one*")]
