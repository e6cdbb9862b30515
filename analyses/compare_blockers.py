"""python analyses/compare_blockers.py SEQUENCE.toml --data harmless.jsonl    (or --organism 4, or --pretrained)

Which blocker holds the harm, which holds v_rev, at what cost? Every arm fine-tunes the anchor on the same harmless data
in the same order, a run a seed; random twins, a push and the usual defences stand beside the blockers. What is complete
is cached and not made again. Writes blockers.csv (a row a run), blockers_by_layer.csv, blockers.png (harm against task
loss) and prints the table and its orderings.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import pandas as pd
import typer

from gravlens.cli.output import Script
from gravlens.core.errors import GravlensError
from gravlens.core.files import write_table
from gravlens.organisms.arms import UNBLOCKED, Arm, core_arms, dose_arms, further_arms
from gravlens.organisms.base import Measures, Setting
from gravlens.organisms.fetch import cache_folder
from gravlens.organisms.given import GivenHistory
from gravlens.organisms.pretrained import COMPLIANCES, MARKERS, REFUSALS, pretrained_setting
from gravlens.organisms.refusal import RefusalOrganism
from gravlens.plot.lines import plot_frontier
from gravlens.plot.style import save_figure
from gravlens.studies.comparison import compare_arms, compare_layers, orderings
from gravlens.studies.experiment import carry_out
from gravlens.training.finetune import Recipe

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
SHOWN = ["harmfulness", "fraction_heldout", "alignment_heldout", "over_refusal", "task_loss", "kl", "step_cost_ratio"]


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
    organism: Annotated[list[int], typer.Option(help="Compare on a refusal organism of this seed; repeat it.")] = [],  # noqa: B006
    pretrained: Annotated[bool, typer.Option(help="Compare on the real model that `gravlens fetch` brings.")] = False,
    arm: Annotated[list[str], typer.Option(help="Only these arms, beside the unblocked one; repeat it.")] = [],  # noqa: B006
    doses: Annotated[bool, typer.Option(help="Blockers at other strengths too (organisms).")] = False,
    runs: Annotated[int, typer.Option(min=1, help="Fine-tuning seeds of each arm; a drift direction needs two.")] = 4,
    layer: Annotated[
        list[int], typer.Option(help="Layers of the blockers and of the mean; repeat it. Default: inner ones.")
    ] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of a run on your own data.")] = 50,
    learning_rate: Annotated[float, typer.Option(help="On your own data.")] = 2e-5,
    lora: Annotated[int, typer.Option(min=0, help="Rank of LoRA adapters on your own data; 0: all weights.")] = 0,
    openings: Annotated[list[str], typer.Option(help="How your model's refusals begin, and what is rehearsed.")] = [],  # noqa: B006
    compliances: Annotated[list[str], typer.Option(help="How your model's other answers begin; repeat it.")] = [],  # noqa: B006
    workers: Annotated[int, typer.Option(min=0, help="Processes at a time; 0: as many as the threads allow.")] = 0,
    threads: Annotated[int, typer.Option(min=0, help="Threads of a process; 0: the setting's own number.")] = 0,
    read_only: Annotated[
        bool, typer.Option(help="Make nothing: table and figure of the runs that are complete.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder for the tables and the figure.")] = Path("."),
) -> None:
    """Which blocker holds the harm, which holds v_rev, at what cost?"""
    if (sequence is None) != (data is None) or sum([sequence is not None, bool(organism), pretrained]) != 1:
        raise GravlensError(
            "It is not clear what to compare on.",
            "One of: SEQUENCE.toml with --data, --organism, --pretrained.",
            "--organism 4, which takes some minutes.",
        )
    chosen = settings_of(organism, pretrained, runs=runs, threads=threads)
    if sequence is not None and data is not None:
        recipe = Recipe(steps, 8, learning_rate, weight_decay=0.0, lora=lora or None)
        own = {"layers": tuple(layer), "recipe": recipe, "measures": measures_of(openings, compliances)}
        threads = threads or GivenHistory.threads
        chosen["given"] = GivenHistory(sequence, data, runs=runs, threads=threads, **own)
    tables, layers = [], []
    for name, setting in chosen.items():
        arms = arms_of(setting, runs, arm, doses)
        home = carry_out(setting, cache_folder(), arms=[] if read_only else arms, workers=workers or None)
        tables.append(compare_arms(setting, home, arms, organism=name))
        layers.append(compare_layers(setting, home, arms, organism=name))
    table = pd.concat(tables, ignore_index=True)
    write(table, pd.concat(layers, ignore_index=True), out)
    tell(table)


def settings_of(organisms: Sequence[int], pretrained: bool, *, runs: int, threads: int) -> dict[str, Setting]:
    """The histories that gravlens makes itself, of those that were asked for, by name."""
    chosen: dict[str, Setting] = {f"organism{seed}": RefusalOrganism(organism=seed, runs=runs) for seed in organisms}
    return chosen | ({"pretrained": pretrained_setting(runs=runs, threads=threads)} if pretrained else {})


def measures_of(openings: Sequence[str], compliances: Sequence[str]) -> Measures:
    """English unless a model's own words are given."""
    markers = tuple(dict.fromkeys(marker.lower() for marker in (*openings, *MARKERS)))
    return Measures(tuple(openings) or REFUSALS, tuple(compliances) or COMPLIANCES, markers, 24)


def arms_of(setting: Setting, runs: int, wanted: Sequence[str], doses: bool = False) -> tuple[Arm, ...]:
    """All arms of a setting, or the unblocked one and those that are wanted."""
    seeds = tuple(range(runs))
    if setting.name == "refusal":
        arms = core_arms(seeds, "harmless") + further_arms(seeds, "harmless", setting.layers_in_mean)
        arms += dose_arms(seeds, "harmless") if doses else ()
    elif setting.name == "pretrained":
        arms = core_arms(seeds, "given_answers") + core_arms(seeds, "own_answers", "_own_answers")
    else:
        arms = core_arms(seeds, "data")
    names = [one.name for one in arms]
    if unknown := [name for name in wanted if name not in names]:
        raise GravlensError(f"There is no arm {unknown[0]!r}.", f"Arms: {', '.join(names)}.", "--arm clamp.")
    return tuple(one for one in arms if not wanted or one.name in wanted or one.name.startswith(UNBLOCKED))


def write(table: pd.DataFrame, layers: pd.DataFrame, out: Path) -> None:
    """blockers.csv, blockers_by_layer.csv, and the frontier of each data set."""
    write_table(out / "blockers.csv", table, float_format="%.6g")
    write_table(out / "blockers_by_layer.csv", layers, float_format="%.6g")
    parts = list(table.groupby("data", sort=False))
    for name, rows in parts:
        twins = [blocker for blocker in rows.blocker.unique() if "twin" in blocker or "random" in blocker]
        save_figure(plot_frontier(rows, twins=twins), out / ("blockers" if len(parts) == 1 else f"blockers_{name}"))


def tell(table: pd.DataFrame) -> None:
    """Means over histories and runs, and in how many runs each arm was lower than the unblocked one."""
    for part, rows in table.groupby("data", sort=False):
        typer.echo(f"\n{part}: mean over {rows.organism.nunique()} histories and their runs\n")
        typer.echo(rows.groupby("blocker", sort=False)[SHOWN].mean().to_string(float_format="{:.3f}".format))
        typer.echo("\n" + "\n".join(orderings(rows)))


if __name__ == "__main__":
    app()
