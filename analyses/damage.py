"""python analyses/damage.py SEQUENCE.toml --checkpoint seed0/100

Does damage alone move a model along v_rev, and does it undo refusal? Without any training, the anchor's weights are
rounded, pruned, and moved along the mirrored update of a run; rounding and pruning both as they are and scaled to the
total norm of that update (matched). The runs' own updates are the comparison. v_rev is located on the sequence's
probes; drift and refusal log-odds are measured on its held-out prompts. Writes damage.csv,
damage_layer_mean.csv and damage.png.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from matplotlib import rc_context
from matplotlib.figure import Figure

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
from gravlens.core.errors import GravlensError
from gravlens.core.files import write_table
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.placement import Placement
from gravlens.plot.heatmap import plot_heatmap
from gravlens.plot.style import STYLE, save_figure
from gravlens.stats.damage import UNDAMAGED, Damage, change_norm, measure_damage, pruned, rounded, sign_flipped, updated
from gravlens.studies.inputs import checkpoint_of, ends, located, opened, prompts_of, score_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Script)
def main(
    sequence: SEQUENCE,
    checkpoint: Annotated[
        str | None, typer.Option(help="RUN/STEP whose update is mirrored and matched. Default: the first run's last.")
    ] = None,
    bits: Annotated[list[int], typer.Option(help="Round every matrix to this number of bits; repeatable.")] = [8, 4],  # noqa: B006
    share: Annotated[
        list[float], typer.Option(help="Prune this share of every matrix, the smallest weights; repeatable.")
    ] = [0.1, 0.3],  # noqa: B006
    layer: Annotated[
        list[int], typer.Option(help="A layer of the mean, from 0; repeatable. Default: every layer with a v_rev.")
    ] = [],  # noqa: B006
    prompts: PROMPTS = None,
    max_prompts: MAX_PROMPTS = None,
    out: OUT_FOLDER = Path("."),
    openings: OPENINGS = [],  # noqa: B006
    compliances: COMPLIANCES = [],  # noqa: B006
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Does damage alone (rounding, pruning, a mirrored update) move a model along v_rev, and does it undo refusal?"""
    history = ModelSequence.from_toml(sequence)
    tuned, asked = checkpoint_of(history, checkpoint), prompts_of(history, prompts, max_prompts)
    where, score = Placement(device, dtype), score_of(openings, compliances)
    anchor, vs = opened(history, history.anchor, where), located(ends(history, placement=where))
    kinds = damages_of(anchor, tuned, bits, share, where) | {"run": runs_of(history, tuned, where)}
    damages = {name: damage for kind in kinds.values() for name, damage in kind.items()}
    found = measure_damage(anchor, vs, asked, damages=damages, layers_in_mean=layer or None, score=score)
    kind_of = {UNDAMAGED: "none"} | {name: kind for kind, named in kinds.items() for name in named}
    for name, table in (("damage", found.table), ("damage_layer_mean", found.layer_mean)):
        table.insert(1, "kind", table["damage"].map(kind_of))
        write_table(out / f"{name}.csv", table)
    save_figure(draw(found.layer_mean), out / "damage")
    print_answer(summary(found.layer_mean, tuned.name), json, damage=found.layer_mean)


def damages_of(
    anchor: OpenModel, tuned: Checkpoint, bits: Sequence[int], shares: Sequence[float], where: Placement
) -> dict[str, dict[str, Damage]]:
    """Return kind -> name -> damage: of its `own` size, or `matched` to the norm of the run's update."""
    after = open_model(tuned, **where.where)
    norm = change_norm(*(dict(model.module.named_parameters()) for model in (anchor, after)))
    if not norm:
        raise GravlensError(
            f"{tuned.name} has the anchor's weights.", "Damage is matched to a run's update.", "--checkpoint RUN/STEP."
        )
    kinds: dict[str, dict[str, Damage]] = {}
    for kind, size, word in (("own", None, ""), ("matched", norm, ", matched")):
        kinds[kind] = {f"{n} bits{word}": partial(rounded, bits=n, norm=size) for n in dict.fromkeys(bits)}
        kinds[kind] |= {f"{s:g} pruned{word}": partial(pruned, share=s, norm=size) for s in dict.fromkeys(shares)}
    kinds["own"][f"{tuned.name} mirrored"] = partial(sign_flipped, checkpoint=after)  # its size is matched as it is
    return kinds


def runs_of(history: ModelSequence, tuned: Checkpoint, where: Placement) -> dict[str, Damage]:
    """Return name -> update of the mirrored run, and of each other run's last checkpoint."""
    own = tuned.name.rpartition("/")[0]
    others = [checkpoints[-1] for name, checkpoints in history.runs.items() if name != own]
    return {checkpoint.name: partial(update_of, checkpoint=checkpoint, where=where) for checkpoint in [tuned, *others]}


def update_of(model: OpenModel, checkpoint: Checkpoint, where: Placement) -> AbstractContextManager[OpenModel]:
    """Move a model by the update of a run, opened only then: one checkpoint at a time is in memory."""
    return updated(model, open_model(checkpoint, **where.where))


@rc_context(STYLE)
def draw(mean: pd.DataFrame) -> Figure:
    """Draw layer means of alignment and fraction, and the score, one row per damage and run; grey: not judged."""
    mean = mean.assign(alignment=mean["alignment"].where(mean["judged"]))
    rows = mean.melt("damage", ["alignment", "fraction", "score"], "measure")
    scored = rows["measure"] == "score"
    figure = Figure(figsize=(6, 0.6 + 0.25 * len(mean)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    plot_heatmap(rows[~scored], value="value", rows="damage", columns="measure", limit=1, ax=left)
    plot_heatmap(rows[scored], value="value", rows="damage", columns="measure", ax=right)
    right.tick_params(labelleft=False)
    for ax, bar, words in zip(
        (left, right), figure.axes[2:], ("layer mean (1: the witness)", "refusal log-odds (nats)"), strict=True
    ):
        ax.set(xlabel="", ylabel="")
        bar.set_ylabel(words)
    return figure


def summary(mean: pd.DataFrame, tuned: str) -> str:
    """Compare the largest fraction and the lowest score under damage with those of the run."""
    damages = mean[mean["kind"].isin(["own", "matched"])]
    far, low = damages.sort_values("fraction").iloc[-1], damages.sort_values("score").iloc[0]
    run, none = (mean[mean["damage"] == name].iloc[0] for name in (tuned, UNDAMAGED))
    less = "less far along v_rev than" if far["fraction"] < run["fraction"] else "as far along v_rev as"
    return (
        f"damage alone goes {less} {tuned}\n"
        f"of {len(damages)} damages the farthest along v_rev is {far['damage']}: fraction {far['fraction']:+.3f} "
        f"(alignment {far['alignment']:+.2f}), {tuned} {run['fraction']:+.3f} ({run['alignment']:+.2f})\n"
        f"refusal log-odds of the anchor {none['score']:+.2f}, lowest under damage {low['score']:+.2f} "
        f"({low['damage']}), {tuned} {run['score']:+.2f}"
    )


if __name__ == "__main__":
    app()
