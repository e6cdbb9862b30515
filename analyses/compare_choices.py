"""python analyses/compare_choices.py SEQUENCE.toml    (or --layer 4 --layer 5)

Robustness to analysis choices: v_rev is estimated on the sequence's probes with five estimators in six geometries of
the residual stream, and every run is followed along each of these directions on the held-out prompts. Writes
choices.csv (each choice, run, step and layer), choices_layer_mean.csv and choices.png, and prints the range over
choices and whether the sign changes. Nothing is trained or generated: each checkpoint reads the prompts once.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from matplotlib import rc_context
from matplotlib.figure import Figure

from gravlens.activations.residuals import cache_residuals
from gravlens.cli.options import DEVICE, DTYPE, JSON, MAX_PROMPTS, OUT_FOLDER, PROMPTS, SEQUENCE
from gravlens.cli.output import Script, print_answer
from gravlens.core.files import write_table
from gravlens.directions.geometry import centred, raw, standardised, whitened, without_top
from gravlens.directions.trajectory import ByLayer
from gravlens.history.sequence import ModelSequence
from gravlens.models.placement import Placement
from gravlens.plot.heatmap import plot_heatmap
from gravlens.plot.lines import plot_alignment
from gravlens.plot.style import STYLE, save_figure
from gravlens.stats.robustness import compare_choices, final_choices
from gravlens.studies.inputs import prompts_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Script)
def main(
    sequence: SEQUENCE,
    layer: Annotated[
        list[int], typer.Option(help="A layer of the mean, from 0; repeatable. Default: all with a v_rev.")
    ] = [],  # noqa: B006
    remove: Annotated[
        list[int], typer.Option(min=1, help="A geometry without this number of top components; repeatable.")
    ] = [1, 3],  # noqa: B006
    prompts: PROMPTS = None,
    max_prompts: MAX_PROMPTS = None,
    out: OUT_FOLDER = Path("."),
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Does the conclusion depend on how v_rev is estimated, and in which geometry a cosine is taken?"""
    history = ModelSequence.from_toml(sequence)
    where = Placement(device, dtype)
    layers, asked = sorted({*layer}) or None, prompts_of(history, prompts, max_prompts)
    states = [
        cache_residuals(history, one, layers=layers, placement=where) for one in (history.require_probes(), asked)
    ]
    geometries = [raw, centred, standardised, whitened, *(partial(without_top, k=k) for k in sorted({*remove}))]
    choices = compare_choices(*states, layers_in_mean=layers, geometries=geometries)
    write_table(out / "choices.csv", choices.table, float_format="%.6g")
    write_table(out / "choices_layer_mean.csv", choices.layer_mean, float_format="%.6g")
    save_figure(draw(choices), out / "choices")
    print_answer(summary(choices), json, choices=choices.layer_mean)


@rc_context(STYLE)
def draw(choices: ByLayer) -> Figure:
    """Draw alignment and fraction of each choice at the last step, and the range over choices at each step."""
    figure = Figure(figsize=(5.5, 8.8), layout="constrained")  # as wide as a page: side by side the letters are tiny
    axes, final = figure.subplots(3, 1), final_choices(choices)
    for ax, value in zip(axes[:2], ("alignment", "fraction"), strict=True):
        plot_heatmap(final, value=value, rows="estimator", columns="geometry", limit=1, ax=ax)
        ax.set_xticks(ax.get_xticks(), [text.get_text() for text in ax.get_xticklabels()], rotation=25, ha="right")
        ax.set_title(f"{final[value].min():.2f} to {final[value].max():.2f}", fontsize=8)
    table = choices.layer_mean
    means = table.groupby(["estimator", "geometry", "step"])["alignment"].mean()
    low, high = means.groupby("step").min(), means.groupby("step").max()
    axes[2].fill_between(low.index, low, high, color="0.85", lw=0, zorder=-1, label="all choices")
    usual = table[(table["estimator"] == "difference_of_means") & (table["geometry"] == "raw")]
    plot_alignment(usual, prompts=usual["prompts"].iloc[0], ax=axes[2])
    return figure


def summary(choices: ByLayer) -> str:
    """Describe the range of the alignment over the choices, and whether its sign changes."""
    final = final_choices(choices)
    found = final.dropna(subset=["alignment"]).sort_values("alignment")
    least, most = found.iloc[0], found.iloc[-1]
    usual = found[(found["estimator"] == "difference_of_means") & (found["geometry"] == "raw")]["alignment"].item()
    other = found[found["alignment"] * usual <= 0]
    same = "the sign is the same in all" if other.empty else f"the sign is another in {named(other)}"
    lines = [
        f"over {len(found)} choices {same}: alignment at the last step between {least['alignment']:+.2f} "
        f"({named(found[:1])}) and {most['alignment']:+.2f} ({named(found[-1:])})",
        f"difference of means in the raw geometry: {usual:+.2f}; median of the choices: "
        f"{found['alignment'].median():+.2f}; fraction between {found['fraction'].min():+.2f} and "
        f"{found['fraction'].max():+.2f}",
    ]
    if len(found) < len(final):
        lines.append(f"without a direction: {named(final[final['alignment'].isna()])}")
    if not found["judged"].all():
        lines.append(f"the drift is too small to judge in {named(found[~found['judged']])}")
    return "\n".join(lines)


def named(rows: pd.DataFrame) -> str:
    """Return the names of choices."""
    pairs = rows["estimator"].str.replace("_", " ") + ", " + rows["geometry"].str.replace("_", " ")
    return "; ".join(pairs)


if __name__ == "__main__":
    app()
