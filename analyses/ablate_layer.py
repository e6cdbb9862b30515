"""python analyses/ablate_layer.py SEQUENCE.toml --layer 12    (or --all-layers)

Does ablating v_rev in the fine-tuned model bring refusal back? v_rev is located on the sequence's probes; the refusal
log-odds is measured on its held-out prompts, with and without v_rev, beside random directions ablated at the same
layer. Writes ablate_layer.csv and ablate_layer.png.
"""

from collections.abc import Sequence
from functools import partial
from math import ceil
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from matplotlib.figure import Figure

from gravlens.behavior import DEFAULT_REFUSAL_OPENINGS, Score, refusal_log_odds, two_sided_log_odds
from gravlens.checkpoints import Checkpoint, ModelSequence
from gravlens.directions import Directions, locate_vrev
from gravlens.effects import causal_effect, layerwise_effect
from gravlens.errors import GravlensError
from gravlens.interventions import Ablate
from gravlens.models import OpenModel, open_model
from gravlens.plots import plot_effect
from gravlens.prompts import PromptSet
from gravlens.residuals import cache_residuals
from gravlens.tokenizer import sequence_tokenizer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

SequenceFile = Annotated[Path, typer.Argument(help="Witness, anchor, runs and prompts (docs/sequence.md).")]
Layers = Annotated[list[int], typer.Option("--layer", help="A layer, counted from 0; repeat it for several.")]
EveryLayer = Annotated[bool, typer.Option("--all-layers", help="Each layer by itself.")]
Prompts = Annotated[Path | None, typer.Option(help="Prompts to measure on. Default: held_out, else probes.")]
MaxPrompts = Annotated[int | None, typer.Option(min=1, help="At most so many prompts, spread over the file.")]
Out = Annotated[Path, typer.Option(help="Folder for the table and the figure.")]
NRandom = Annotated[int, typer.Option(min=1, help="Random directions per row; the smallest p is 1/(1 + this).")]
Openings = Annotated[
    list[str], typer.Option(help="How this model's refusals begin; repeat it. Default: usual English openings.")
]
Compliances = Annotated[
    list[str],
    typer.Option(help="How its other answers begin; repeat it. Where given, whole openings of both kinds are weighed."),
]


@app.command()
def main(
    sequence: SequenceFile,
    layer: Layers = [],  # noqa: B006
    all_layers: EveryLayer = False,
    checkpoint: Annotated[str | None, typer.Option(help="RUN/STEP. Default: the first run's last.")] = None,
    prompts: Prompts = None,
    max_prompts: MaxPrompts = None,
    out: Out = Path("."),
    n_random: NRandom = 20,
    openings: Openings = list(DEFAULT_REFUSAL_OPENINGS),  # noqa: B006 (typer copies it)
    compliances: Compliances = [],  # noqa: B006
) -> None:
    """Does ablating v_rev in the fine-tuned model bring refusal back?"""
    try:
        history = ModelSequence.from_toml(sequence)
        tuned, asked = checkpoint_of(history, checkpoint), prompts_of(history, prompts, max_prompts)
        score, directions = score_of(openings, compliances), directions_of(history, layer, all_layers)
        anchor = float(score(opened(history, history.anchor), asked).mean())
        table = ablate(opened(history, tuned), directions, score, asked, n_random)
        write(table, out / "ablate_layer")
    except GravlensError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{tuned.name}, {len(asked)} prompts; {table.attrs['score']} of the anchor: {anchor:+.2f}")
    typer.echo(summary(table, anchor))


def ablate(
    model: OpenModel, directions: Directions, score: Score, prompts: PromptSet, n_random: int = 20
) -> pd.DataFrame:
    """Table of effects: v_rev ablated at each layer by itself and, where there are several, together (<NA>)."""
    ask = {"score": score, "prompts": prompts, "n_random": n_random}
    by_layer = layerwise_effect(model, directions, {"ablate": Ablate}, **ask).table
    if len(directions) == 1:
        return by_layer
    table = pd.concat([by_layer, causal_effect(model, {"ablate": Ablate(directions)}, **ask).table], ignore_index=True)
    table.attrs = by_layer.attrs
    return table


def summary(table: pd.DataFrame, anchor: float) -> str:
    """The row with the largest rise in words, and how far it leads back to the anchor's score."""
    row = table.sort_values("difference").iloc[-1]
    back = "comes back" if row["low"] > 0 and row["difference"] > row["random_high"] else "does not come back"
    share = row["difference"] / (anchor - row["baseline"]) if anchor > row["baseline"] else float("nan")
    return (
        f"largest rise of {len(table)}: {described(row)}\n"
        f"refusal {back} beyond random directions ({share:.0%} of the way to the anchor)"
    )


def described(row: pd.Series) -> str:
    """One row of a table of effects in words."""
    where = "all layers" if pd.isna(row["layer"]) else f"layer {row['layer']}"
    return (
        f"{row['condition']} at {where}: {row['baseline']:+.2f} to {row['with_intervention']:+.2f}, difference "
        f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}], random directions "
        f"{row['random_low']:+.2f} to {row['random_high']:+.2f}, p = {row['p_random']:.3f}"
    )


# --- what steer_sweep.py asks for in the same way ---------------------------------------------------------------


def checkpoint_of(sequence: ModelSequence, name: str | None) -> Checkpoint:
    """A checkpoint by its name; default: the last one of the first run."""
    if name is None and sequence.runs:
        return next(iter(sequence.runs.values()))[-1]
    for checkpoint in sequence:
        if checkpoint.name == name:
            return checkpoint
    raise GravlensError(
        "This sequence has no run." if name is None else f"This sequence has no checkpoint {name!r}.",
        f"It has {', '.join(checkpoint.name for checkpoint in sequence)}.",
        "--checkpoint with one of these, or [runs] in the sequence's file.",
    )


def prompts_of(sequence: ModelSequence, file: Path | None, most: int | None) -> PromptSet:
    """Prompts of a file, else the held-out ones, else the probes; `most` are spread evenly, files often go by topic."""
    chosen = PromptSet.of(file, "harmful") if file else sequence.held_out or sequence.require_probes()
    return chosen[:: ceil(len(chosen) / most)] if most else chosen


def directions_of(sequence: ModelSequence, layers: Sequence[int], all_layers: bool) -> Directions:
    """v_rev of some layers, or of every layer where it is defined."""
    if bool(layers) == all_layers:
        raise GravlensError(
            "Both --layer and --all-layers were given." if all_layers else "No layer was given.",
            "It is some layers, or all of them.",
            "--layer 12, or --all-layers.",
        )
    if all_layers:
        return locate_vrev(sequence).defined()
    states = cache_residuals(sequence, layers=layers, checkpoints=(sequence.witness, sequence.anchor))
    return Directions(tuple(locate_vrev(states, layer=layer) for layer in states.layers))


def score_of(openings: Sequence[str], compliances: Sequence[str]) -> Score:
    """Refusal log-odds by first tokens, or two-sided by whole openings where compliances are given."""
    if compliances:
        return partial(two_sided_log_odds, refusals=openings, compliances=compliances)
    return partial(refusal_log_odds, openings=openings)


def opened(sequence: ModelSequence, checkpoint: Checkpoint) -> OpenModel:
    """A checkpoint with the tokenizer of its history."""
    return open_model(checkpoint, tokenizer=sequence_tokenizer(sequence))


def write(table: pd.DataFrame, path: Path) -> None:
    """Write `path`.csv and `path`.png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path.with_suffix(".csv"), index=False)
    figure = plot_effect(table).figure
    assert isinstance(figure, Figure)
    figure.savefig(path.with_suffix(".png"))


if __name__ == "__main__":
    app()
