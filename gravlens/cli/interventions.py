"""gravlens ablate, block: what v_rev does, and holding a fine-tune along it."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import gravlens as gl
from gravlens import studies, training
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
    flag,
    writable_folder,
)
from gravlens.cli.screen import print_json, print_table, records, tell, write_effect, wrote

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
        Path | None,
        typer.Option(
            callback=writable_folder, metavar="FOLDER", help="Folder for ablate_layer.csv and ablate_layer.png."
        ),
    ] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Does ablating v_rev in a fine-tuned checkpoint bring refusal back, more than random directions do?

    v_rev is located on the probes, at each layer by itself and at all together; docs/effects.md has the columns.
    """
    layers = chosen_layers(layer, all_layers)
    history = gl.ModelSequence.from_toml(sequence)
    question = studies.inputs.Question(
        history,
        studies.inputs.checkpoint_of(history, checkpoint),
        studies.inputs.prompts_of(history, prompts, max_prompts),
        studies.inputs.score_of(openings, compliances),
        gl.Placement(device, dtype),
    )
    found = studies.ablation.ablate_vrev(question, layers=layers, n_random=n_random, twins=twins)
    written = [] if out is None else write_effect(found.table, out / "ablate_layer")
    if json:
        print_json(_told(found))
    else:
        print_table(COLUMNS, map(_row, records(found.table)), title=f"{_words(found)}, mean over prompts")
        for line in found.lines():
            tell(line)
    for path in written:
        wrote(path, json)


MEASURED = {
    "alignment": "alignment",
    "fraction": "fraction",
    "fraction_probes": "on probes",
    "task_loss": "task loss",
}
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


def _words(found: Any) -> str:
    return str(found.table.attrs["score"]).replace("_", " ")


def _told(found: Any) -> dict[str, Any]:
    facts = {"checkpoint": found.checkpoint, "score": found.table.attrs["score"], "anchor": found.anchor}
    return {**facts, "comes_back": found.comes_back, "share": found.share, "rows": records(found.table)}


@commands.command(
    rich_help_panel=PANEL, epilog=example("gravlens block SEQUENCE.toml --data harmless.jsonl --out ft --steps 50")
)
def block(
    sequence: SEQUENCE,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="Harmless data to train on: prompt and answer, JSONL, CSV or JSON (docs/prompts.md)."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(callback=writable_folder, metavar="FOLDER", help="Folder for the runs, blocked/ and unblocked/."),
    ],
    kind: Annotated[
        Literal["penalty", "clamp", "projection"],
        typer.Option(
            metavar="KIND", help="penalty: motion back; clamp: motion both ways; projection: the probes' mean, exactly."
        ),
    ] = "penalty",
    strength: Annotated[
        float | None, typer.Option(min=0, metavar="X", help="λ of the penalty or the clamp. Default: 30.")
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Of the penalty: push the other way by this fraction. Default: 0."),
    ] = None,
    layer: Annotated[
        list[int],
        typer.Option("--layer", metavar="N", help="A layer that is held, from 0; repeat it. Default: the inner ones."),
    ] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, metavar="N", help="Optimizer steps.")] = 100,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Examples a step.")] = 4,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "--lr", min=0, metavar="X", help="AdamW's learning rate.")
    ] = 7e-5,
    lora: Annotated[int, typer.Option(min=0, metavar="N", help="Rank of LoRA adapters; 0: all weights.")] = 0,
    save_step: Annotated[
        list[int],
        typer.Option(min=1, metavar="N", help="Save after this step too; repeat it. The last step is always saved."),
    ] = [1, 2, 5, 10, 20, 50, 100],  # noqa: B006
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Of the data's order.")] = 0,
    only_blocked: Annotated[bool, flag("--only-blocked", "Leave out the run without a blocker.")] = False,
    prompts: PROMPTS = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Fine-tune the anchor on harmless data with a blocker along v_rev, and once more without; compare the two.

    An eighth of the data is kept for the task's loss. A stopped command goes on where it was (docs/blocking.md).
    """
    history = gl.ModelSequence.from_toml(sequence)
    history.require_probes()
    if prompts is not None:
        history = replace(history, held_out=studies.inputs.prompts_of(history, prompts))
    found = studies.paired.block_beside(
        history,
        gl.read_examples(data),
        out=out,
        block=studies.paired.Block(kind, strength, margin, tuple(layer)),
        training=studies.paired.Training(
            training.finetune.Recipe(steps, batch, learning_rate, lora=lora or None), tuple(save_step), seed
        ),
        only_blocked=only_blocked,
        placement=gl.Placement(device, dtype),
    )
    layers = list(found.trajectory.layers_in_mean)
    facts = {"layers": layers, "prompts": found.prompts, "n_trained": found.n_trained, "n_task": found.n_task}
    if json:
        print_json({**facts, "runs": records(found.table)})
        return
    _print_pair(found, f"held along v_rev at layers {', '.join(map(str, layers))}: {kind}")
    for run, folder in zip(found.table["run"][1:], found.table["folder"][1:], strict=True):
        tell(f'{run} = "{Path(folder).parent}/checkpoint-*"   for [runs] of {sequence}')


def _print_pair(found: Any, title: str) -> None:
    print_table(("run", "step", *MEASURED.values(), "s a step"), map(_run_row, records(found.table)), title=title)
    judged = "held-out prompts" if found.prompts == "held_out" else "the probes, for want of held_out prompts"
    data = f"trained on {found.n_trained} examples, task loss on {found.n_task} others"
    tell(f"alignment and fraction on {judged}; {data}")


def _run_row(row: dict[str, Any]) -> tuple[Any, ...]:
    numbers = ("" if row[key] is None else f"{row[key]:.3f}" for key in MEASURED)
    return (row["run"], str(row["step"]), *numbers, row["seconds_per_step"])
