"""python analyses/decompose_drift.py SEQUENCE.toml --refusal refusal.safetensors --ancestor older-checkpoint

Decompose the drift of fine-tuning. In activations: the shares along v_rev, along the refusal direction, in the run's
own leading components, and the rest, with v_rev first and with refusal first; and the pull of each ancestor, if there
are several. In weights: the share of the update along witness − anchor. In the vocabulary: a logit-lens readout of the
directions. Writes drift_parts.csv, ancestors.csv, update_parts.csv, readout.csv and decompose_drift.png.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.behavior.scores import DEFAULT_REFUSAL_OPENINGS
from gravlens.cli.options import (
    COMPLIANCES,
    DEVICE,
    DTYPE,
    JSON,
    MAX_PROMPTS,
    OPENINGS,
    OUT_FOLDER,
    PROMPTS,
    SEQUENCE,
)
from gravlens.cli.output import Script, print_answer
from gravlens.core.files import write_table
from gravlens.directions.decomposition import OWN, REST, WHOLE, ancestor_pull, split_drift, split_update
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import ByLayer
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.interventions.readout import readout, readout_openings
from gravlens.interventions.refusal import refusal_candidates
from gravlens.models.opening import OpenModel
from gravlens.models.placement import Placement
from gravlens.plot.style import CYCLE, GREY, STYLE, save_figure
from gravlens.studies.inputs import checkpoint_of, file_at, opened, prompts_of, vrev_of

# part -> how it is called, in which colour, with which hatch (for grey print)
LOOK = {
    "v_rev": (r"$v_\mathrm{rev}$", CYCLE[0], ""),
    "refusal": ("refusal direction", CYCLE[1], "////"),
    OWN: ("run's own leading components", CYCLE[5], "...."),
    REST: ("rest", GREY, r"\\\\"),
}
SHOWN = 5  # printed tokens at either end
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Script)
def main(
    sequence: SEQUENCE,
    checkpoint: Annotated[
        list[str],
        typer.Option(help="RUN/STEP to compare in weights; repeatable. Default: all of every run."),
    ] = [],  # noqa: B006
    ancestor: Annotated[
        list[str], typer.Option(help="Folder of a further ancestor, which competes with the witness; repeatable.")
    ] = [],  # noqa: B006
    refusal: Annotated[
        Path | None,
        typer.Option(
            help="Refusal direction, a file of Directions.save; one alone serves all layers. Default: the anchor's "
            "states on the probes minus those on the sequence's harmless prompts, if it has any."
        ),
    ] = None,
    components: Annotated[int, typer.Option(min=0, help="Number of leading components of a run's own drift.")] = 3,
    layer: Annotated[
        list[int], typer.Option(help="A layer, counted from 0; repeatable. Default: every layer with a v_rev.")
    ] = [],  # noqa: B006
    top: Annotated[int, typer.Option(min=1, help="Number of tokens at either end of the vocabulary readout.")] = 10,
    prompts: PROMPTS = None,
    max_prompts: MAX_PROMPTS = None,
    out: OUT_FOLDER = Path("."),
    openings: OPENINGS = [],  # noqa: B006
    compliances: COMPLIANCES = [],  # noqa: B006
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Decompose the drift of fine-tuning in activations, in weights, and in the vocabulary."""
    history = ModelSequence.from_toml(sequence)
    chosen, asked = weights_of(history, checkpoint), prompts_of(history, prompts, max_prompts)
    where = Placement(device, dtype)
    anchor, parts = opened(history, history.anchor, where), {"v_rev": vrev_of(history, layer, placement=where)}
    if (direction := refusal_of(history, anchor, refusal, parts["v_rev"].layers)) is not None:
        parts["refusal"] = direction
    read = readouts(anchor, parts, top, openings, compliances)
    drift = states(history, ancestor, asked, parts["v_rev"].layers, where)
    split = splits(drift, parts, components)
    pulls = ancestors(drift, ancestor)
    update = split_update(history.anchor, history.witness, chosen)
    means = {"drift_parts_layer_mean": split.layer_mean, "ancestors_layer_mean": pulls.layer_mean}
    tables = {"drift_parts": split.table, "ancestors": pulls.table, "update_parts": update, "readout": read}
    write(out, tables | means)
    save_figure(draw(split.table), out / "decompose_drift")
    shown = {"drift_parts": split.layer_mean, "ancestors": pulls.layer_mean, "readout": read}
    shown["update"] = update[update["tensor"] == WHOLE]
    print_answer(summary(split.layer_mean, pulls.layer_mean, update, read), json, **shown)


def weights_of(history: ModelSequence, names: Sequence[str]) -> list[Checkpoint]:
    """Return the checkpoints to compare in weights: by name, or every one of every run."""
    return [checkpoint_of(history, name) for name in names] or [one for run in history.runs.values() for one in run]


def refusal_of(
    history: ModelSequence, anchor: OpenModel, file: Path | None, layers: Sequence[int]
) -> Directions | None:
    """Return the refusal direction of a file, or mean(probes) − mean(harmless) of the anchor's states, per layer."""
    if file is not None:
        return file_at(file, layers)
    if history.harmless is None:
        return None
    probes = history.require_probes()
    return Directions(refusal_candidates(anchor, harmful=probes, harmless=history.harmless)).at(layers)


def readouts(
    anchor: OpenModel,
    parts: Mapping[str, Directions],
    top: int,
    openings: Sequence[str],
    compliances: Sequence[str],
) -> pd.DataFrame:
    """Read each direction out in the anchor's vocabulary; with compliances, on whole openings too."""
    tables = []
    for name, directions in parts.items():
        for direction in directions:
            table = readout(anchor, direction, top=top)
            apart = np.nan
            if compliances:
                apart = readout_openings(
                    anchor, direction, refusals=openings or DEFAULT_REFUSAL_OPENINGS, compliances=compliances
                )
            tables.append(table.assign(direction=name, layer=direction.layer, refusals_minus_compliances=apart))
    return pd.concat(tables, ignore_index=True)[["direction", "layer", "token", "logit", "refusals_minus_compliances"]]


def states(
    history: ModelSequence, folders: Sequence[str], prompts: PromptSet, layers: Sequence[int], where: Placement
) -> Residuals:
    """Read residuals of the sequence and of further ancestors, named `ancestor 1` and so on."""
    further = [Checkpoint(f"ancestor {i}", folder) for i, folder in enumerate(folders, 1)]
    return cache_residuals(history, prompts, layers=layers, checkpoints=[*history, *further], placement=where)


def splits(residuals: Residuals, parts: Mapping[str, Directions], components: int) -> ByLayer:
    """Split the drift in each order of the parts: their common component is assigned to the first."""
    results = []
    for order in [list(parts)] if len(parts) == 1 else [list(parts), list(parts)[::-1]]:
        ordered = {name: parts[name] for name in order}
        found = split_drift(residuals, ordered, components=components, layers=parts["v_rev"].layers)
        results.append(found.assign({"order": ", ".join(order)}))
    return ByLayer.concat(results)


def ancestors(residuals: Residuals, folders: Sequence[str]) -> ByLayer:
    """Return the pulls of the witness and of further ancestors, the latter by folder."""
    names = {f"ancestor {i}": folder for i, folder in enumerate(folders, 1)}
    found = ancestor_pull(residuals, ["witness", *names])
    return ByLayer(*(table.replace({"witness": names}) for table in (found.table, found.layer_mean)))


# --- output -----------------------------------------------------------------------------------------------------


def write(out: Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write each table as CSV."""
    for name, table in tables.items():
        write_table(out / f"{name}.csv", table)


def last(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each run's last step."""
    return table[table["step"] == table.groupby("run")["step"].transform("max")]


@rc_context(STYLE)
def draw(split: pd.DataFrame) -> Figure:
    """Draw stacked shares of the drift by layer, in the order of the projection; last step, mean over runs."""
    rows = last(split)
    orders = rows["order"].unique()
    figure = Figure(figsize=(1 + 2.8 * len(orders), 2.8), layout="constrained")
    axes = figure.subplots(1, len(orders), sharey=True, squeeze=False)[0]
    for ax, order in zip(axes, orders, strict=True):
        stack(ax, rows[rows["order"] == order])
        ax.set_title(f"{LOOK[order.split(', ')[0]][0]} first", fontsize=8)
    axes[0].set(ylabel="share of the drift's squared length", ylim=(0, 1))
    axes[0].yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def stack(ax: Axes, rows: pd.DataFrame) -> None:
    """Draw the bars of one order, its first part at the bottom."""
    shares = rows.groupby(["layer", "part"], sort=False)["share"].mean().unstack()[rows["part"].unique()].sort_index()
    below = np.zeros(len(shares))
    for part in shares:
        label, colour, hatch = LOOK[str(part)]
        look: dict[str, Any] = {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "lw": 0, "width": 0.8}
        ax.bar(shares.index.astype(str), shares[part], bottom=below, label=label, **look)
        below += shares[part].to_numpy()
    ax.set(xlabel="layer")
    ax.set_xticks(range(0, len(shares), 1 + len(shares) // 16))


def summary(split: pd.DataFrame, pulls: pd.DataFrame, update: pd.DataFrame, read: pd.DataFrame) -> str:
    """Describe the means over runs and layers at the last step."""
    means = last(split).groupby(["order", "part"], sort=False)["share"].mean()
    pulled = last(pulls)
    coefficients = pulled.groupby("witness", sort=False)["coefficient"].mean()
    whole = update[update["tensor"] == WHOLE].assign(run=lambda table: table["checkpoint"].str.rpartition("/")[0])
    weights = last(whole)[["cosine", "fraction", "share_parallel"]].mean()
    lines = [
        *(f"drift: {shares_of(means.loc[order])}" for order in split["order"].unique()),
        "ancestors: " + ", ".join(f"{Path(str(name)).name} {value:+.2f}" for name, value in coefficients.items())
        + f" of the way, {pulled['explained'].mean():.0%} explained, condition {pulled['condition'].max():.1f}",
        f"weights: {weights['share_parallel']:.1%} of the update along witness − anchor (cosine "
        f"{weights['cosine']:+.2f}, fraction {weights['fraction']:+.3f})",
        *(spoken(rows) for _, rows in read[read["layer"] == read["layer"].max()].groupby("direction", sort=False)),
    ]  # fmt: skip
    own = means.loc[split["order"].iloc[0]]["v_rev"]
    return f"v_rev has {own:.1%} of the drift (last step, mean over runs and layers)\n" + "\n".join(lines)


def shares_of(shares: pd.Series) -> str:
    """Format the parts' shares in order."""
    return ", then ".join(f"{part} {share:.1%}" for part, share in shares.items())


def spoken(rows: pd.DataFrame) -> str:
    """Describe the tokens that one direction raises and lowers most, and the openings if measured."""
    raised, lowered = (", ".join(map(repr, tokens)) for tokens in (rows["token"][:SHOWN], rows["token"][::-1][:SHOWN]))
    name, layer, apart = rows[["direction", "layer", "refusals_minus_compliances"]].iloc[0]
    openings = "" if np.isnan(apart) else f"; refusals minus compliances {apart:+.2f}"
    return f"{name} of layer {layer} raises {raised}, lowers {lowered}{openings}"


if __name__ == "__main__":
    app()
