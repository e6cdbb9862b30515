"""gravlens ablate: what v_rev does."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from gravlens.cli import rooms
from gravlens.cli.files import write_effect
from gravlens.cli.options import (
    CHECKPOINT,
    COMPLIANCES,
    DEVICE,
    DTYPE,
    EVERY_LAYER,
    JSON,
    LAYERS,
    MAX_PROMPTS,
    N_RANDOM,
    OPENINGS,
    PROMPTS,
    SEQUENCE,
    chosen_layers,
    example,
    writable_folder,
)
from gravlens.cli.screen import print_json, print_table, records, say, tell

commands = typer.Typer()
PANEL = "Your own checkpoints"


@commands.command(rich_help_panel=PANEL, epilog=example("gravlens ablate SEQUENCE.toml --layer 12 --out results"))
def ablate(
    sequence: SEQUENCE,
    layer: LAYERS = [],  # noqa: B006 (typer copies it)
    all_layers: EVERY_LAYER = False,
    checkpoint: CHECKPOINT = None,
    prompts: PROMPTS = None,
    max_prompts: MAX_PROMPTS = None,
    openings: OPENINGS = [],  # noqa: B006
    compliances: COMPLIANCES = [],  # noqa: B006
    n_random: N_RANDOM = 20,
    twins: Annotated[
        Literal["matched", "isotropic"],
        typer.Option(help="Random directions from the covariance of the anchor's states, or from all directions."),
    ] = "matched",
    out: Annotated[
        Path | None, typer.Option(callback=writable_folder, help="Folder for ablate_layer.csv and ablate_layer.png.")
    ] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Does ablating v_rev in a fine-tuned checkpoint bring refusal back, more than random directions do?

    v_rev is located on the probes, at each layer by itself and at all together; docs/effects.md has the columns.
    """
    layers = chosen_layers(layer, all_layers)
    history = rooms.checkpoints.ModelSequence.from_toml(sequence)
    question = rooms.questions.Question(
        history,
        rooms.questions.checkpoint_of(history, checkpoint),
        rooms.questions.prompts_of(history, prompts, max_prompts),
        rooms.questions.score_of(openings, compliances),
        rooms.placement.Placement(device, dtype),
    )
    found = rooms.ablation.ablate_vrev(question, layers=layers, n_random=n_random, twins=twins)
    if out is not None:
        for path in write_effect(found.table, out / "ablate_layer"):
            say(f"written to {path}")
    if json:
        print_json(_told(found))
        return
    print_table(COLUMNS, map(_row, records(found.table)), title=f"{found.table.attrs['score']}, mean over prompts")
    for line in found.lines():
        tell(line)


COLUMNS = ("layer", "before", "ablated", "difference [95 %]", "random directions", "p")


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    interval = f" [{row['low']:+.2f}, {row['high']:+.2f}]" if row["low"] is not None else ""
    return (
        "all" if row["layer"] is None else str(row["layer"]),
        f"{row['baseline']:+.2f}",
        f"{row['with_intervention']:+.2f}",
        f"{row['difference']:+.2f}{interval}",
        f"{row['random_low']:+.2f} to {row['random_high']:+.2f}",
        f"{row['p_random']:.3f}",
    )


def _told(found: Any) -> dict[str, Any]:
    facts = {"checkpoint": found.checkpoint, "score": found.table.attrs["score"], "anchor": found.anchor}
    return {**facts, "comes_back": found.comes_back, "share": found.share, "rows": records(found.table)}
