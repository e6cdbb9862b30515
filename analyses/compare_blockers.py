"""python analyses/compare_blockers.py SEQUENCE.toml --data harmless.jsonl    (or --organism 4, or --pretrained)

Ablation study of blockers: which one prevents harm, which one motion along v_rev, at what cost? Every arm fine-tunes
the anchor on the same harmless data in the same order, one run per seed; random twins, a push and the usual defences
are the controls. Complete runs are reused. Writes blockers.csv (one row per run), blockers_by_layer.csv and
blockers.png (harm against task loss), and prints the mean of each arm and its differences from the unblocked baseline.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from gravlens.behavior.answers import MAX_NEW_TOKENS
from gravlens.cli.options import JSON
from gravlens.cli.output import Script, print_json, print_prose, print_table, records
from gravlens.core.errors import GravlensError
from gravlens.core.files import write_table
from gravlens.organisms.arms import core_arms, dose_arms, further_arms
from gravlens.organisms.base import ENGLISH, UNBLOCKED, Arm, Measures, Organism
from gravlens.organisms.fetch import cache_folder
from gravlens.organisms.given import GivenHistory
from gravlens.organisms.pretrained import pretrained_organism
from gravlens.organisms.refusal import RefusalOrganism
from gravlens.plot.lines import plot_frontier
from gravlens.plot.style import save_figure
from gravlens.studies.comparison import compare_arms, compare_layers, orderings
from gravlens.studies.experiment import carry_out
from gravlens.training.recipe import Recipe

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SHOWN = [
    "compliance_rate",
    "fraction_heldout",
    "alignment_heldout",
    "over_refusal",
    "task_loss",
    "kl",
    "step_cost_ratio",
]


@app.command(cls=Script)
def main(
    sequence: Annotated[
        Path | None,
        typer.Argument(
            help="SEQUENCE.toml of your own checkpoints, with probes, held_out and harmless prompts (docs/sequence.md)."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Harmless data to fine-tune on: JSONL or CSV, prompt and answer.")
    ] = None,
    organism: Annotated[list[int], typer.Option(help="Compare on a refusal organism of this seed; repeatable.")] = [],  # noqa: B006
    pretrained: Annotated[bool, typer.Option(help="Compare on the real model that `gravlens fetch` brings.")] = False,
    arm: Annotated[list[str], typer.Option(help="Only these arms and the unblocked one; repeatable.")] = [],  # noqa: B006
    doses: Annotated[bool, typer.Option(help="Blockers at other strengths too (refusal organism).")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Fine-tuning seeds of each arm; a drift direction needs two.")] = 4,
    layer: Annotated[
        list[int], typer.Option(help="A layer of the blockers and of the mean; repeatable. Default: inner layers.")
    ] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run on your own data.")] = 50,
    learning_rate: Annotated[float, typer.Option(help="Learning rate on your own data.")] = 2e-5,
    lora: Annotated[int, typer.Option(min=0, help="Rank of LoRA adapters on your own data; 0: all weights.")] = 0,
    openings: Annotated[list[str], typer.Option(help="How your model's refusals begin; also rehearsed.")] = [],  # noqa: B006
    compliances: Annotated[list[str], typer.Option(help="How your model's other answers begin; repeatable.")] = [],  # noqa: B006
    workers: Annotated[int, typer.Option(min=0, help="Number of processes; 0: as many as the threads allow.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads per process; 0: the organism's own number.")] = 0,
    read_only: Annotated[bool, typer.Option(help="Train nothing: table and figure of the complete runs.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the figure.")] = Path("."),
    json: JSON = False,
) -> None:
    """Ablation study of blockers: which one prevents harm, which one motion along v_rev, at what cost?"""
    if (sequence is None) != (data is None) or sum([sequence is not None, bool(organism), pretrained]) != 1:
        raise GravlensError(
            "No organism, or several, were chosen to compare on.",
            "Exactly one of SEQUENCE.toml with --data, --organism and --pretrained is needed.",
            "--organism 4, which takes some minutes.",
        )
    chosen = organisms_of(organism, pretrained, runs=runs, threads=threads)
    if sequence is not None and data is not None:
        recipe = Recipe(steps, 8, learning_rate, weight_decay=0.0, lora=lora or None)
        own = {"layers": tuple(layer), "recipe": recipe, "measures": measures_of(openings, compliances)}
        threads = threads or GivenHistory.threads
        chosen["given"] = GivenHistory(sequence, data, runs=runs, threads=threads, **own)
    tables, layers = [], []
    for name, one in chosen.items():
        arms = arms_of(one, runs, arm, doses)
        made = carry_out({name: one}, cache_folder(), arms=[] if read_only else arms, workers=workers or None)
        study = made[name]
        tables.append(compare_arms(study, arms, organism=name))
        layers.append(compare_layers(study, arms, organism=name))
    table = pd.concat(tables, ignore_index=True)
    write(table, pd.concat(layers, ignore_index=True), out)
    if json:
        print_json(
            {"summary": [line for _, rows in table.groupby("data") for line in orderings(rows)], "runs": records(table)}
        )
    else:
        tell(table)


def organisms_of(organisms: Sequence[int], pretrained: bool, *, runs: int, threads: int) -> dict[str, Organism]:
    """Return the chosen organisms that gravlens makes itself, by name."""
    chosen: dict[str, Organism] = {f"organism{seed}": RefusalOrganism(organism=seed, runs=runs) for seed in organisms}
    return chosen | ({"pretrained": pretrained_organism(runs=runs, threads=threads)} if pretrained else {})


def measures_of(openings: Sequence[str], compliances: Sequence[str]) -> Measures:
    """Return how behavior is measured: in English, unless a model's own words are given."""
    markers = tuple(dict.fromkeys(marker.lower() for marker in (*openings, *ENGLISH.markers)))
    return Measures(
        tuple(openings) or ENGLISH.refusals, tuple(compliances) or ENGLISH.compliances, markers, MAX_NEW_TOKENS
    )


def arms_of(organism: Organism, runs: int, wanted: Sequence[str], doses: bool = False) -> tuple[Arm, ...]:
    """Return all arms of an organism, or the unblocked one and the wanted ones."""
    seeds = tuple(range(runs))
    if organism.name == "refusal":
        arms = core_arms(seeds, "harmless") + further_arms(seeds, "harmless", organism.layers_in_mean)
        arms += dose_arms(seeds, "harmless") if doses else ()
    elif organism.name == "pretrained":
        arms = core_arms(seeds, "given_answers") + core_arms(seeds, "own_answers", "_own_answers")
    else:
        arms = core_arms(seeds, "data")
    names = [one.name for one in arms]
    if unknown := [name for name in wanted if name not in names]:
        raise GravlensError(f"There is no arm {unknown[0]!r}.", f"Arms: {', '.join(names)}.", "--arm clamp.")
    return tuple(one for one in arms if not wanted or one.name in wanted or one.name.startswith(UNBLOCKED))


def write(table: pd.DataFrame, layers: pd.DataFrame, out: Path) -> None:
    """Write blockers.csv, blockers_by_layer.csv, and the frontier of each data set."""
    write_table(out / "blockers.csv", table, float_format="%.6g")
    write_table(out / "blockers_by_layer.csv", layers, float_format="%.6g")
    parts = list(table.groupby("data", sort=False))
    for name, rows in parts:
        twins = [blocker for blocker in rows.blocker.unique() if "twin" in blocker or "random" in blocker]
        save_figure(plot_frontier(rows, twins=twins), out / ("blockers" if len(parts) == 1 else f"blockers_{name}"))


def tell(table: pd.DataFrame) -> None:
    """Print in how many runs each arm is lower than the baseline, and means over organisms and runs."""
    for part, rows in table.groupby("data", sort=False):
        print_prose("\n".join(orderings(rows)))
        means = records(rows.groupby("blocker", sort=False)[SHOWN].mean().reset_index())
        names = ["blocker", *(name.replace("_", " ") for name in SHOWN)]
        title = f"{part}: mean over {rows.organism.nunique()} organisms and their runs"
        print_table(names, ([*row.values()] for row in means), title=title, least=names[:3:-1])


if __name__ == "__main__":
    app()
