"""gravlens inspect, plan, locate, trajectory: measure a history of your own checkpoints."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

import gravlens as gl
from gravlens import activations, core, studies
from gravlens.cli import options as opt
from gravlens.cli.output import print_json, print_prose, print_table, print_written, records, shortened

commands = typer.Typer()
PANEL = "Your own checkpoints"
SAID = 3  # runs that the first sentence of trajectory tells of
POSITIONS = Annotated[
    str, typer.Option(metavar="WHERE", help="Token positions: last, instruction, post_instruction, all, or e.g. -2.")
]
PEAK_FLOPS = Annotated[
    float, opt.number("Peak FLOP/s of the target machine. 0: benchmark this machine instead.", metavar="X")
]
DISK_GBPS = Annotated[float, opt.number("Disk speed of the target machine in GB/s; needs --peak-flops.", metavar="X")]


@commands.command(**opt.described(PANEL, "gravlens inspect SEQUENCE.toml --json"))
def inspect(sequence: opt.SEQUENCE, json: opt.JSON = False) -> None:
    """List the checkpoints of a history: source, step, size, digest, and weight distance from the anchor.

    `cosine` compares the weight change with that of the witness (1: the same direction).
    """
    listed = studies.inspection.inspect_sequence(gl.ModelSequence.from_toml(sequence))
    rows = records(listed)
    if json:
        print_json(rows)
        return
    columns = ("role", "step", "source", "parameters", "dtype", "digest", "distance", "cosine", "remark")
    kwargs = "".join(f", {name}={value!r}" for name, value in listed.attrs["chat_template_kwargs"].items())
    read = f"chat template: {listed.attrs['chat_template']}{kwargs}; system prompt: {listed.attrs['system'] or 'none'}"
    print_prose(_history_in_words(rows))
    shown = [{**row, "digest": shortened(row["digest"] or "")} for row in rows]
    cells = ([row[column] for column in columns] for row in shown)
    least = ("parameters", "dtype", "digest", "cosine", "remark")
    print_table(columns, cells, title="distances in the weights, from the anchor", caption=read, least=least)


def _history_in_words(rows: list[dict[str, Any]]) -> str:
    steps: dict[str, list[str]] = {row["role"]: [] for row in rows[2:]}
    for row in rows[2:]:
        steps[row["role"]] += [] if row["step"] is None else [str(row["step"])]  # without one it was skipped
    runs = "; ".join(f"{run}: steps {core.display.listed(at)}" for run, at in steps.items()) or "none"
    strange = sum(bool(row["remark"]) for row in rows)
    remarks = f"remarks on {strange} of them" if strange else "all can be read, and all differ"
    return f"witness, anchor, {len(steps)} run{'s' * (len(steps) != 1)} ({runs}); {remarks}"


@commands.command(**opt.described(PANEL, "gravlens plan SEQUENCE.toml --layer 12 --workers 8"))
def plan(
    sequence: opt.SEQUENCE,
    prompts: opt.READ_PROMPTS = None,
    column: opt.COLUMN = None,
    layer: opt.LAYERS = [],  # noqa: B006 (typer copies it)
    positions: POSITIONS = "last",
    device: opt.DEVICE = "cpu",
    dtype: opt.DTYPE = "float32",
    workers: Annotated[int, opt.number("Number of processes that share the work.", least=1)] = 1,
    peak_flops: PEAK_FLOPS = 0,
    disk_gbps: DISK_GBPS = 0,
    json: opt.JSON = False,
) -> None:
    """Estimate the cost of reading activations: tokens, FLOPs, bytes, memory and time (docs/scale.md)."""
    named = activations.cost.named_machine
    found = activations.cost.plan_reading(
        gl.ModelSequence.from_toml(sequence),
        opt.asked(prompts, column),
        layers=layer or None,
        positions=int(positions) if re.fullmatch(r"-?\d+", positions) else positions,  # pyright: ignore[reportArgumentType]
        placement=gl.Placement(device, dtype),
        machine=named(peak_flops=peak_flops, disk=1e9 * disk_gbps) if peak_flops or disk_gbps else None,
        workers=workers,
    )
    if json:
        print_json(found.to_dict())
        return
    lines = dict(found.lines())
    print_prose(f"about {lines['time']}, for {lines['checkpoints × prompts']} (checkpoints × prompts)")
    print_table(("quantity", "estimate"), found.lines(), title="estimated cost, nothing cached")


@commands.command(**opt.described(PANEL, "gravlens locate SEQUENCE.toml --layer 12 --out vrev.safetensors"))
def locate(
    sequence: opt.SEQUENCE,
    layer: opt.LAYERS = [],  # noqa: B006
    prompts: opt.READ_PROMPTS = None,
    column: opt.COLUMN = None,
    out: Annotated[
        Path | None, opt.place("FILE", "Save the directions to this safetensors file.", check=opt.writable_file)
    ] = None,
    device: opt.DEVICE = "cpu",
    dtype: opt.DTYPE = "float32",
    json: opt.JSON = False,
) -> None:
    """Locate v_rev, the direction from the anchor to the witness, at each layer.

    `distance` is its length; `reliability` is the split-half reliability over the prompts (1: perfect).
    """
    history = gl.ModelSequence.from_toml(sequence)
    where = gl.Placement(device, dtype)
    found = studies.inputs.located(
        studies.inputs.ends(history, opt.asked(prompts, column), layers=layer, placement=where), layer
    )
    if out is not None:
        found.save(out)
    if json:
        keys = ("layer", "distance", "reliability", "estimator", "prompts", "undefined")
        print_json([{key: getattr(v, key) for key in keys} for v in found])
    else:
        rows = ((v.layer, v.distance, f"{v.reliability:.3f}", v.undefined) for v in found)
        print_prose(_directions_in_words(found))
        columns = ("layer", "distance", "reliability", "remark")
        print_table(columns, rows, title="v_rev, from anchor to witness", least=("remark",))
    if out is not None:
        print_written(out, json)


def _directions_in_words(found: "gl.Directions") -> str:
    defined = [v for v in found if not v.undefined]
    told = f"v_rev is defined at {len(defined)} of {len(found)} layers"
    if not defined:
        return told
    far, sure = max(defined, key=lambda v: v.distance), max(defined, key=lambda v: v.reliability)
    most = f"most reliable at layer {sure.layer} (split-half reliability {sure.reliability:.3f})"
    return f"{told}: longest at layer {far.layer} (distance {far.distance:.3g}), {most}"


@commands.command(**opt.described(PANEL, "gravlens trajectory SEQUENCE.toml --out trajectory.csv"))
def trajectory(
    sequence: opt.SEQUENCE,
    layer: Annotated[
        list[int],
        opt.repeated_layer(
            "Layer to average over, from 0; repeat for several. Default: all layers with a defined v_rev."
        ),
    ] = [],  # noqa: B006
    prompts: opt.PROMPTS = None,
    column: opt.COLUMN = None,
    mean: Annotated[
        bool, opt.flag("--mean", "Add the mean ± SEM over runs: only for runs of one kind, saved at the same steps.")
    ] = False,
    out: Annotated[
        Path | None, opt.place("FILE", "Save the tidy table to this CSV file.", check=opt.writable_file)
    ] = None,
    figure: Annotated[
        Path | None,
        opt.place("FILE", "Save a figure of the alignment (.pdf, .png or .svg).", check=opt.writable_file),
    ] = None,
    device: opt.DEVICE = "cpu",
    dtype: opt.DTYPE = "float32",
    keep: opt.KEEP = 0,
    store: opt.STORE = None,
    json: opt.JSON = False,
) -> None:
    """Track every run along v_rev, step by step, beside the alignment of random drifts.

    `alignment` is the cosine of the run's drift with v_rev; `p99` that of 99 % of uniformly random drifts, a weak null
    (docs/nulls.md); `fraction` is how far the run has moved from anchor (0) to witness (1).
    """
    history = gl.ModelSequence.from_toml(sequence)
    if mean:
        steps = {run: [checkpoint.step for checkpoint in saved] for run, saved in history.runs.items()}
        gl.directions.trajectory.check_same_steps(steps)
    where = gl.Placement(device, dtype, keep=keep or None)
    # Directions are estimated on the probes only; held-out prompts show whether the drift is the probes' own.
    asked, read = studies.inputs.followed_on(history, opt.asked(prompts, column)), gl.cache_residuals
    sets = [read(history, one, layers=layer or None, placement=where, store=store) for one in asked]
    vs = studies.inputs.located(sets[0], layer)
    followed = gl.follow(sets, vs)
    rows = gl.nulls.beside_random_drifts(followed, vs)
    written = [] if out is None else [core.files.write_table(out, followed.table)]
    if figure is not None:
        shown = {"nulls": rows, "prompts": rows["prompts"].iloc[0], "mean": mean}
        written += gl.plot.save_figure(gl.plot_alignment(followed, **shown), figure)
    _print_runs(rows, followed.summary() if mean else None, followed, json)
    for path in written:
        print_written(path, json)


def _print_runs(rows: Any, summary: Any, followed: "gl.Trajectory", json: bool) -> None:
    prompts, layers = rows["prompts"].iloc[0], list(followed.layers_in_mean)
    means = [] if summary is None else records(summary.set_axis(map("_".join, summary.columns), axis=1).reset_index())
    if json:
        facts = {"prompts": prompts, "layers": layers, "undefined": followed.undefined, "null": rows["null"].iloc[0]}
        print_json(facts | {"runs": records(rows)} | ({} if summary is None else {"mean": means}))
        return
    print_prose(_runs_in_words(records(rows)))
    title = f"drift along v_rev, mean over layers {core.display.listed(layers)}; {prompts.replace('_', ' ')} prompts"
    left_out = [f"; layer {layer} is undefined: {why}" for layer, why in followed.undefined.items()]
    caption = f"p99: 99 % of uniformly random drifts lie below{''.join(left_out)}"
    columns = ("run", "step", "alignment", "p99", "fraction", "remark")
    print_table(columns, map(_run_step, records(rows)), title=title, caption=caption, least=("remark",))
    if summary is not None:
        measures = ("alignment", "fraction")
        cells = ((row["step"], *(_mean_sem(row, one) for one in measures), row["fraction_count"]) for row in means)
        print_table(("step", *measures, "runs"), cells, title="mean ± SEM over runs")


def _runs_in_words(rows: list[dict[str, Any]]) -> str:
    last = {row["run"]: row for row in rows}  # rows are by step
    told = [_run_in_words(row) for row in [*last.values()][:SAID]]
    told += [f"{len(last) - SAID} more runs are in the table"] * (len(last) > SAID)
    return "\n".join([*told, "isotropic drifts are a weak null: gravlens audit says what may be claimed"])


def _run_in_words(row: dict[str, Any]) -> str:
    way = "back" if row["fraction"] >= 0 else "on, away from the witness"
    moved = f"{row['run']} moved {abs(row['fraction']):.0%} of the way {way} by step {row['step']}"
    if not row["judged"] or row["alignment"] is None:
        return f"{moved}: too little to judge"
    side = "above" if row["above"] else "not above"
    return f"{moved}, alignment {row['alignment']:.3f}, {side} the p99 of isotropic drifts ({row['p99']:.3f})"


def _run_step(row: dict[str, Any]) -> tuple[Any, ...]:
    alignment = "" if row["alignment"] is None else f"{row['alignment']:.3f}"
    remark = "" if row["judged"] else "drift too small to judge"
    return (row["run"], row["step"], alignment, f"{row['p99']:.3f}", f"{row['fraction']:.3f}", remark)


def _mean_sem(row: dict[str, Any], measure: str) -> str:
    mean, sem = row[f"{measure}_mean"], row[f"{measure}_sem"]
    return "" if mean is None else f"{mean:.3f}" + ("" if sem is None else f" ± {sem:.3f}")
