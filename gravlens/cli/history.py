"""gravlens inspect, plan, locate, trajectory: what a history of your own holds, and how it moves."""

import re
from math import isnan
from pathlib import Path
from typing import Annotated, Any

import typer

import gravlens as gl
from gravlens import activations, core, studies
from gravlens.cli.options import (
    DEVICE,
    DTYPE,
    JSON,
    KEEP,
    LAYERS,
    PROMPTS,
    READ_PROMPTS,
    SEQUENCE,
    STORE,
    example,
    writable_file,
)
from gravlens.cli.screen import print_json, print_table, records, wrote

commands = typer.Typer()
PANEL = "Your own checkpoints"


@commands.command(rich_help_panel=PANEL, epilog=example("gravlens inspect SEQUENCE.toml --json"))
def inspect(sequence: SEQUENCE, json: JSON = False) -> None:
    """List a history: sources, steps, weights and their digests, distance from the anchor and share towards witness."""
    listed = studies.inspection.inspect_sequence(gl.ModelSequence.from_toml(sequence))
    rows = records(listed)
    if json:
        print_json(rows)
        return
    columns = ("role", "step", "source", "parameters", "dtype", "digest", "distance", "cosine", "remark")
    read = f"chat template: {listed.attrs['chat_template']}; system prompt: {listed.attrs['system'] or 'none'}"
    shown = [{**row, "digest": (row["digest"] or "")[:12]} for row in rows]
    cells = ([row[column] for column in columns] for row in shown)
    print_table(columns, cells, title="history", caption=read, wide=True)


@commands.command(rich_help_panel=PANEL, epilog=example("gravlens plan SEQUENCE.toml --layer 12 --workers 8"))
def plan(
    sequence: SEQUENCE,
    prompts: READ_PROMPTS = None,
    layer: LAYERS = [],  # noqa: B006 (typer copies it)
    positions: Annotated[
        str, typer.Option(metavar="WHERE", help="last, instruction, post_instruction, all, or as -2.")
    ] = "last",
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="Processes that share the work.")] = 1,
    peak_flops: Annotated[
        float,
        typer.Option(
            min=0, metavar="X", help="Of another machine's worker, FLOP/s as its maker says; 0: measured here."
        ),
    ] = 0,
    disk_gbps: Annotated[
        float, typer.Option(min=0, metavar="X", help="GB/s that its worker reads and writes files with.")
    ] = 0,
    json: JSON = False,
) -> None:
    """Forecast what reading a history will cost: tokens, operations, bytes, memory and seconds (docs/scale.md)."""
    named = activations.cost.named_machine
    found = activations.cost.plan_reading(
        gl.ModelSequence.from_toml(sequence),
        prompts,
        layers=layer or None,
        positions=int(positions) if re.fullmatch(r"-?\d+", positions) else positions,  # pyright: ignore[reportArgumentType]
        placement=gl.Placement(device, dtype),
        machine=named(peak_flops=peak_flops, disk=1e9 * disk_gbps) if peak_flops or disk_gbps else None,
        workers=workers,
    )
    if json:
        print_json(found.to_dict())
        return
    print_table(("", ""), found.lines(), title="forecast of cache_residuals with an empty store")


@commands.command(
    rich_help_panel=PANEL, epilog=example("gravlens locate SEQUENCE.toml --layer 12 --out vrev.safetensors")
)
def locate(
    sequence: SEQUENCE,
    layer: LAYERS = [],  # noqa: B006
    prompts: READ_PROMPTS = None,
    out: Annotated[
        Path | None,
        typer.Option(callback=writable_file, metavar="FILE", help="Write the directions to this safetensors file."),
    ] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    json: JSON = False,
) -> None:
    """Locate v_rev: the direction from the anchor towards the witness, layer by layer."""
    history = gl.ModelSequence.from_toml(sequence)
    place = gl.Placement(device, dtype)
    found = studies.inputs.located(studies.inputs.ends(history, prompts, layers=layer, placement=place), layer)
    if out is not None:
        found.save(out)
    if json:
        keys = ("layer", "distance", "reliability", "estimator", "prompts", "undefined")
        print_json([{key: getattr(v, key) for key in keys} for v in found])
    else:
        rows = ((v.layer, v.distance, f"{v.reliability:.3f}", v.undefined) for v in found)
        print_table(("layer", "distance", "reliability", "remark"), rows, title="v_rev")
    if out is not None:
        wrote(out, json)


@commands.command(rich_help_panel=PANEL, epilog=example("gravlens trajectory SEQUENCE.toml --out trajectory.csv"))
def trajectory(
    sequence: SEQUENCE,
    layer: Annotated[
        list[int],
        typer.Option("--layer", metavar="N", help="A layer of the mean, from 0; repeat it. Default: all with a v_rev."),
    ] = [],  # noqa: B006
    prompts: PROMPTS = None,
    out: Annotated[
        Path | None, typer.Option(callback=writable_file, metavar="FILE", help="Write the tidy table to this CSV file.")
    ] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    keep: KEEP = 0,
    store: STORE = None,
    json: JSON = False,
) -> None:
    """Follow every run along v_rev: alignment and fraction of the way back, mean ± SEM over runs."""
    history = gl.ModelSequence.from_toml(sequence)
    place = gl.Placement(device, dtype, keep=keep or None)
    asked, read = studies.inputs.followed_on(history, prompts), gl.cache_residuals
    sets = [read(history, one, layers=layer or None, placement=place, store=store) for one in asked]
    followed = gl.follow(sets, studies.inputs.located(sets[0], layer))
    if out is not None:
        core.files.write_table(out, followed.table)
    _print_summary(followed.summary(), json)
    if out is not None:
        wrote(out, json)


def _print_summary(summary: Any, json: bool) -> None:
    if json:
        flat = summary.set_axis([f"{measure}_{kind}" for measure, kind in summary.columns], axis=1)
        print_json(flat.to_dict(orient="index"))
        return
    rows = (
        (step, *(_mean_sem(row[measure, "mean"], row[measure, "sem"]) for measure in ("alignment", "fraction")), count)
        for (step, row), count in zip(summary.iterrows(), summary["alignment", "count"], strict=True)
    )
    print_table(("step", "alignment", "fraction", "runs"), rows, title="motion along v_rev, mean over layers")


def _mean_sem(mean: Any, sem: Any) -> str:
    return f"{mean:.3f}" + ("" if isnan(sem) else f" ± {sem:.3f}")
