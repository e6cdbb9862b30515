"""gravlens ablate, block: intervene along v_rev, at inference and during fine-tuning."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import gravlens as gl
from gravlens import studies, training
from gravlens.cli import options as opt
from gravlens.cli.output import print_json, print_line, print_prose, print_table, print_written, records, write_effect

commands = typer.Typer()
PANEL = "Your own checkpoints"

# ablate
TWINS = Annotated[
    Literal["matched", "isotropic"],
    typer.Option(help="Random directions: with the covariance of the anchor's activations (matched), or isotropic."),
]
EFFECT_FOLDER = Annotated[
    Path | None, opt.place("FOLDER", "Folder for ablate_layer.csv, .pdf and .png.", check=opt.writable_folder)
]
COLUMNS = ("layer", "before", "ablated", "difference [95 %]", "random directions", "p", "cross 0")

# block
DATA = Annotated[
    Path, opt.place("FILE", "Harmless training data with prompt and answer, or conversations (docs/prompts.md).")
]
DATA_COLUMNS = Annotated[
    str | None,
    typer.Option(
        metavar="PROMPT,ANSWER",
        help="Columns of prompt and answer in the file of --data; one name for conversations. Default: by its columns.",
    ),
]
RUNS_FOLDER = Annotated[
    Path, opt.place("FOLDER", "Folder for the runs, blocked/ and unblocked/.", check=opt.writable_folder)
]
KIND = Annotated[
    Literal["penalty", "clamp", "projection"],
    typer.Option(
        metavar="KIND",
        help="penalty: penalize drift towards the witness; clamp: penalize drift either way; projection: project "
        "each update so that the mean over the probes does not move.",
    ),
]
STRENGTH = Annotated[float | None, opt.number("Weight λ of the penalty or the clamp. Default: 30.", metavar="X")]
MARGIN = Annotated[
    float | None,
    opt.number("Penalty only: push this fraction of the distance away from the witness. Default: 0.", metavar="X"),
]
BLOCKED_LAYERS = Annotated[
    list[int], opt.repeated_layer("Layer to block, from 0; repeat for several. Default: the middle layers.")
]
STEPS = Annotated[int, opt.number("Number of optimizer steps.", least=1)]
BATCH = Annotated[int, opt.number("Examples per step.", least=1)]
LEARNING_RATE = Annotated[
    float, typer.Option("--learning-rate", "--lr", min=0, metavar="X", help="Learning rate of AdamW.")
]
LORA = Annotated[int, opt.number("Rank of LoRA adapters; 0: train all weights.")]
SAVE_STEP = Annotated[
    list[int], opt.number("Save a checkpoint after step N; repeat for several. The last step is always saved.", least=1)
]
SEED = Annotated[int, opt.number("Seed of the data order.")]
ONLY_BLOCKED = Annotated[bool, opt.flag("--only-blocked", "Skip the unblocked control run.")]
MEASURED = {"alignment": "alignment", "fraction": "fraction", "fraction_probes": "on probes", "task_loss": "task loss"}


@commands.command(**opt.described(PANEL, "gravlens ablate SEQUENCE.toml --layer 12 --out results"))
def ablate(
    sequence: opt.SEQUENCE,
    layer: opt.LAYERS = [],  # noqa: B006 (typer copies it)
    all_layers: opt.EVERY_LAYER = False,
    checkpoint: opt.CHECKPOINT = None,
    prompts: opt.PROMPTS = None,
    column: opt.COLUMN = None,
    max_prompts: opt.MAX_PROMPTS = None,
    openings: opt.OPENINGS = [],  # noqa: B006
    compliances: opt.COMPLIANCES = [],  # noqa: B006
    n_random: opt.N_RANDOM = 20,
    twins: TWINS = "matched",
    out: EFFECT_FOLDER = None,
    device: opt.DEVICE = "cpu",
    dtype: opt.DTYPE = "float32",
    json: opt.JSON = False,
) -> None:
    """Test whether ablating v_rev in a fine-tuned checkpoint restores refusal more than random directions do.

    v_rev is located on the probes, then ablated at each layer separately and at all layers together; the table shows
    the mean refusal log-odds (columns: docs/effects.md). The verdict compares the largest rise with the largest rise of
    each random draw over the same rows.
    """
    layers = opt.chosen_layers(layer, all_layers)  # before the sequence is read: a wrong option fails at once
    history = gl.ModelSequence.from_toml(sequence)
    question = studies.inputs.Question(
        history,
        studies.inputs.checkpoint_of(history, checkpoint),
        studies.inputs.prompts_of(history, opt.asked(prompts, column), max_prompts),
        studies.inputs.score_of(openings, compliances),
        gl.Placement(device, dtype),
    )
    found = studies.ablation.ablate_vrev(question, layers=layers, n_random=n_random, twins=twins)
    written = [] if out is None else write_effect(found.table, out / "ablate_layer")
    if json:
        print_json(_told(found))
    else:
        print_prose("\n".join(found.lines()))
        rows, title = map(_row, records(found.table)), f"{_words(found)}, mean over prompts"
        print_table(COLUMNS, rows, title=title, least=("before", "cross 0", "ablated"))
    for path in written:
        print_written(path, json)


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    interval = f" [{row['low']:+.2f}, {row['high']:+.2f}]" if row["low"] is not None else ""
    return (
        "all" if row["layer"] is None else str(row["layer"]),
        f"{row['baseline']:+.2f}",
        f"{row['with_intervention']:+.2f}",
        f"{row['difference']:+.2f}{interval}",
        f"{row['random_low']:+.2f} to {row['random_high']:+.2f}",
        f"{row['p_random']:.3f}",
        f"{row['crossing']:.0%}",
    )


def _words(found: Any) -> str:
    return str(found.table.attrs["score"]).replace("_", " ")


def _told(found: Any) -> dict[str, Any]:
    facts = {"checkpoint": found.checkpoint, "score": found.table.attrs["score"], "anchor": found.anchor}
    (best,) = records(found.best.to_frame().T)
    return {**facts, "comes_back": found.comes_back, "share": found.share, "best": best, "rows": records(found.table)}


@commands.command(**opt.described(PANEL, "gravlens block SEQUENCE.toml --data harmless.jsonl --out ft --steps 50"))
def block(
    sequence: opt.SEQUENCE,
    data: DATA,
    out: RUNS_FOLDER,
    data_columns: DATA_COLUMNS = None,
    kind: KIND = "penalty",
    strength: STRENGTH = None,
    margin: MARGIN = None,
    layer: BLOCKED_LAYERS = [],  # noqa: B006
    steps: STEPS = 100,
    batch: BATCH = 4,
    learning_rate: LEARNING_RATE = 7e-5,
    lora: LORA = 0,
    save_step: SAVE_STEP = [1, 2, 5, 10, 20, 50, 100],  # noqa: B006
    seed: SEED = 0,
    only_blocked: ONLY_BLOCKED = False,
    prompts: opt.PROMPTS = None,
    column: opt.COLUMN = None,
    device: opt.DEVICE = "cpu",
    dtype: opt.DTYPE = "float32",
    json: opt.JSON = False,
) -> None:
    """Fine-tune the anchor on harmless data twice, with a blocker along v_rev and without, and compare the two runs.

    One eighth of the data is held out for the task loss. An interrupted command resumes (docs/blocking.md).
    """
    history = gl.ModelSequence.from_toml(sequence)
    history.require_probes()  # before the data is read and the anchor loaded
    if (asked := opt.asked(prompts, column)) is not None:
        history = replace(history, held_out=studies.inputs.prompts_of(history, asked))
    recipe = training.finetune.Recipe(steps, batch, learning_rate, lora=lora or None)
    found = studies.paired.block_beside(
        history,
        gl.read_examples(data, columns=_pair(data_columns)),
        out=out,
        block=studies.paired.Block(kind, strength, margin, tuple(layer)),
        training=studies.paired.Training(recipe, tuple(save_step), seed),
        only_blocked=only_blocked,
        placement=gl.Placement(device, dtype),
    )
    _print_pair(found, kind, sequence, json)


def _pair(columns: str | None) -> tuple[str, str] | None:
    names = columns.split(",") if columns else []
    if len(names) > 2:
        given, wanted = f"--data-columns {columns} was given.", "It names the columns of prompt and answer."
        raise gl.GravlensError(given, wanted, "--data-columns question,answer, or --data-columns messages.")
    return (names[0], names[-1]) if names else None


def _print_pair(found: Any, kind: str, sequence: Path, json: bool) -> None:
    layers = list(found.trajectory.layers_in_mean)
    if json:
        facts = {"layers": layers, "prompts": found.prompts, "n_trained": found.n_trained, "n_task": found.n_task}
        print_json({**facts, "runs": records(found.table)})
        return
    measured_on = "held-out prompts" if found.prompts == "held_out" else "the probes (there are no held-out prompts)"
    data = f"trained on {found.n_trained} examples, task loss on {found.n_task} others"
    print_prose(_pair_in_words(records(found.table)))
    columns, blocked = ("run", "step", *MEASURED.values(), "s / step"), ", ".join(map(str, layers))
    rows, title = map(_run_row, records(found.table)), f"drift along v_rev, blocked at layers {blocked} ({kind})"
    caption = f"alignment and fraction on {measured_on}; {data}"
    print_table(columns, rows, title=title, caption=caption, least=("s / step", "on probes"))
    print_line(f"To use these runs, add to [runs] of {sequence}:")
    for run, folder in zip(found.table["run"][1:], found.table["folder"][1:], strict=True):
        print_line(f'{run} = "{Path(folder).parent}/checkpoint-*"')


def _pair_in_words(rows: list[dict[str, Any]]) -> str:
    last = {row["run"]: row for row in rows[1:]}  # the first row is the anchor
    way = "the {run} run moved {fraction:.1%} of the way back, task loss {task_loss:.3f}".format_map
    told = "; ".join(way(row) for row in reversed(last.values()))
    return f"by step {rows[-1]['step']} {told} (anchor {rows[0]['task_loss']:.3f})"


def _run_row(row: dict[str, Any]) -> tuple[Any, ...]:
    numbers = ("" if row[key] is None else f"{row[key]:.3f}" for key in MEASURED)
    return (row["run"], str(row["step"]), *numbers, row["seconds_per_step"])
