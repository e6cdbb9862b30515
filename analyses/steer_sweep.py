"""python analyses/steer_sweep.py SEQUENCE.toml --all-layers    (or --layer 12)

Does v_rev as a steering vector in the anchor remove refusal? v_rev is located on the sequence's probes and added at
each layer alone, at several strengths (1 is the whole way from the anchor to the witness). The refusal log-odds is
measured on the held-out prompts; random directions of the same length, with the covariance of the anchor's states,
are the control. The largest fall is tested as the largest of all layers and strengths. Writes steer_sweep.csv and
steer_sweep.png.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gravlens.cli.options import (
    COMPLIANCES,
    DEVICE,
    DTYPE,
    EVERY_LAYER,
    JSON,
    LAYERS,
    MAX_PROMPTS,
    N_RANDOM,
    OPENINGS,
    OUT_FOLDER,
    PROMPTS,
    SEQUENCE,
    chosen_layers,
)
from gravlens.cli.output import Script, print_answer, write_effect
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.edits import Steer
from gravlens.interventions.effects import Effect, layerwise_effect
from gravlens.models.placement import Placement
from gravlens.studies.ablation import LEVEL, described
from gravlens.studies.inputs import checkpoint_of, ends, located, opened, prompts_of, score_of

STRENGTHS = [0.25, 0.5, 1.0, 2.0]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Script)
def main(
    sequence: SEQUENCE,
    layer: LAYERS = [],  # noqa: B006
    all_layers: EVERY_LAYER = False,
    strength: Annotated[
        list[float], typer.Option(help="In units of the witness–anchor distance; repeatable.")
    ] = STRENGTHS,
    checkpoint: Annotated[str, typer.Option(help="Checkpoint to steer: anchor, witness or RUN/STEP.")] = ("anchor"),
    prompts: PROMPTS = None,
    max_prompts: MAX_PROMPTS = None,
    out: OUT_FOLDER = Path("."),
    n_random: N_RANDOM = 20,
    openings: OPENINGS = [],  # noqa: B006
    compliances: COMPLIANCES = [],  # noqa: B006
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Does v_rev as a steering vector in the anchor remove refusal?"""
    history = ModelSequence.from_toml(sequence)
    steered, asked = checkpoint_of(history, checkpoint), prompts_of(history, prompts, max_prompts)
    score, layers = score_of(openings, compliances), chosen_layers(layer, all_layers)
    where = Placement(device, dtype)
    states = ends(history, layers=layers, placement=where)
    witness = float(score(opened(history, history.witness, where), asked).mean())
    model = opened(history, steered, where)
    ask = {"score": score, "prompts": asked, "n_random": n_random, "states": states}
    effect = layerwise_effect(model, located(states, layers).defined(), steers(strength), **ask)
    write_effect(effect.table, out / "steer_sweep")
    about = f"{steered.name}, {len(asked)} prompts; {effect.table.attrs['score']} of the witness: {witness:+.2f}"
    print_answer(f"{summary(effect)}\n{about}", json, rows=effect.table)


def steers(strengths: Sequence[float]) -> dict[str, partial[Steer]]:
    """Return one intervention per strength, by name."""
    return {f"strength {strength:g}": partial(Steer, strength=strength) for strength in strengths}


def summary(effect: Effect) -> str:
    """Describe the largest decrease, tested against the largest of each random draw."""
    row, n = effect.largest(sign=-1), len(effect.table)
    gone = "falls" if row["high"] < 0 and row["p_largest"] <= LEVEL else "does not fall"
    return (
        f"refusal {gone} beyond random directions: p = {row['p_largest']:.3f} for the largest fall of {n} against that "
        f"of each of {row['n_random']} random directions\nlargest fall of {n}: {described(row)}"
    )


if __name__ == "__main__":
    app()
