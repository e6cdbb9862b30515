"""python analyses/steer_sweep.py SEQUENCE.toml --all-layers    (or --layer 12)

Does adding v_rev in the anchor take refusal away? v_rev is located on the sequence's probes and added at each layer by
itself, at several strengths (1 is the whole way from the anchor to the witness); the refusal log-odds is measured on
the held-out prompts, beside random directions of the same length. Writes steer_sweep.csv and steer_sweep.png.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer
from ablate_layer import (
    Compliances,
    EveryLayer,
    Layers,
    MaxPrompts,
    NRandom,
    Openings,
    Out,
    Prompts,
    SequenceFile,
    checkpoint_of,
    described,
    directions_of,
    opened,
    prompts_of,
    score_of,
    write,
)

from gravlens.behavior import DEFAULT_REFUSAL_OPENINGS
from gravlens.checkpoints import ModelSequence
from gravlens.effects import layerwise_effect
from gravlens.errors import GravlensError
from gravlens.interventions import Steer

STRENGTHS = [0.25, 0.5, 1.0, 2.0]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    sequence: SequenceFile,
    layer: Layers = [],  # noqa: B006
    all_layers: EveryLayer = False,
    strength: Annotated[
        list[float], typer.Option(help="In units of the witness–anchor distance; repeat it.")
    ] = STRENGTHS,
    checkpoint: Annotated[str, typer.Option(help="The checkpoint that is steered: anchor, witness or RUN/STEP.")] = (
        "anchor"
    ),
    prompts: Prompts = None,
    max_prompts: MaxPrompts = None,
    out: Out = Path("."),
    n_random: NRandom = 20,
    openings: Openings = list(DEFAULT_REFUSAL_OPENINGS),  # noqa: B006
    compliances: Compliances = [],  # noqa: B006
) -> None:
    """Does adding v_rev in the anchor take refusal away?"""
    try:
        history = ModelSequence.from_toml(sequence)
        steered, asked = checkpoint_of(history, checkpoint), prompts_of(history, prompts, max_prompts)
        score, directions = score_of(openings, compliances), directions_of(history, layer, all_layers)
        witness = float(score(opened(history, history.witness), asked).mean())
        model = opened(history, steered)
        table = layerwise_effect(
            model, directions, steers(strength), score=score, prompts=asked, n_random=n_random
        ).table
        write(table, out / "steer_sweep")
    except GravlensError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{steered.name}, {len(asked)} prompts; {table.attrs['score']} of the witness: {witness:+.2f}")
    typer.echo(summary(table))


def steers(strengths: Sequence[float]) -> dict[str, partial[Steer]]:
    """One intervention per strength, under its name."""
    return {f"strength {strength:g}": partial(Steer, strength=strength) for strength in strengths}


def summary(table: pd.DataFrame) -> str:
    """The row with the largest fall in words."""
    row = table.sort_values("difference").iloc[0]
    gone = "falls" if row["high"] < 0 and row["difference"] < row["random_low"] else "does not fall"
    return f"largest fall of {len(table)}: {described(row)}\nrefusal {gone} beyond random directions"


if __name__ == "__main__":
    app()
