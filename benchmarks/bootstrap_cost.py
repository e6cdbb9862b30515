"""python benchmarks/bootstrap_cost.py    (see --help)

What the intervals of `bootstrap_alignment` cost, and whether they hold what they say. Two sizes are timed, 6 runs of 4
steps each: the organism's (96 prompts, 5 layers of width 128) and a small real model's (64 prompts, 30 layers of width
576). With --coverage N, N worlds of known truth are made in each of nine kinds, and the share whose interval holds the
truth is counted: of the mean over all runs that there could be, and of one run over all prompts that there could be.
Writes bootstrap_cost.csv, or bootstrap_coverage.csv.
"""

from itertools import product
from pathlib import Path
from time import perf_counter, process_time
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer

from gravlens.activations.residuals import Residuals
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.stats.bootstrap import Interval, bootstrap_alignment
from gravlens.stats.reliability import split_half_reliability

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TARGET = 10.0
SIZES = {"organism": (96, 5, 128), "real model": (64, 30, 576)}
RUNS, STEPS = 6, (1, 5, 20, 100)
WIDTH, PROMPTS = 64, 48


@app.command()
def main(
    draws: Annotated[int, typer.Option(min=1, help="Bootstrap draws.")] = 10_000,
    coverage: Annotated[int, typer.Option(min=0, help="Worlds of each kind; 0: time instead.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("."),
) -> None:
    """How many seconds do the intervals take, or how often do they hold the truth?"""
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    if coverage:
        kinds = product((0.2, 0.5, 1.0), (3, 6, 12))
        rows = [covered(spread, runs, coverage, min(draws, 2000), rng) for spread, runs in kinds]
    else:
        rows = [cost(name, draws, rng) for name in SIZES]
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows)
    table.to_csv(out / ("bootstrap_coverage.csv" if coverage else "bootstrap_cost.csv"), index=False)
    typer.echo(table.to_string(index=False, float_format="{:.2f}".format))


def cost(name: str, draws: int, rng: np.random.Generator) -> dict[str, Any]:
    """One row: seconds by the clock and of the processor for all intervals of a history."""
    prompts, layers, width = SIZES[name]
    names = ["witness", "anchor", *(f"run{run}/{step}" for run in range(RUNS) for step in STEPS)]
    values = rng.standard_normal((len(names), prompts, layers, width)).astype(np.float32)
    residuals = Residuals(values, tuple(names), tuple(range(layers)), "probes", {"dtype": ["float32"]})
    vs, began, clock = locate_vrev(residuals), process_time(), perf_counter()
    found = bootstrap_alignment(residuals, vs, draws=draws, rng=rng)
    rows = len(found.table) + len(found.layer_mean)
    return {"size": name, "intervals": rows, "draws": draws, "seconds": perf_counter() - clock,
            "cpu_seconds": process_time() - began, "target": TARGET}  # fmt: skip


def covered(spread: float, runs: int, worlds: int, draws: int, rng: np.random.Generator) -> dict[str, Any]:
    """One row: how often each interval holds the truth where a prompt's drift spreads by so much in each dimension.

    The worlds are layers of one history: their data are independent, and each has its own truth of run0.
    """
    everywhere, means = cosines(run_means(200_000, 1, rng)).mean(), run_means(runs, worlds, rng)
    residuals = history(means, spread, rng)
    vs = Directions(tuple(direction_from(np.eye(WIDTH)[0], layer=layer, distance=1.0) for layer in range(worlds)))
    held = {}
    intervals: dict[str, Interval] = {"": "basic", " percentile": "percentile"}
    for suffix, interval in intervals.items():
        table = bootstrap_alignment(residuals, vs, draws=draws, rng=rng, interval=interval).table
        table = table[table.measure == "alignment"].set_index("run")
        for name, run, truth in (("mean", "mean", everywhere), ("run", "run0", cosines(means)[0])):
            held[name + suffix] = ((table.low[run] <= truth) & (truth <= table.high[run])).mean()
    halves = split_half_reliability(residuals, repeats=20, rng=rng)
    reliability = halves[halves.of != "v_rev"].reliability.mean()
    return {"spread": spread, "runs": runs, "reliability": reliability, **held, "worlds": worlds}


def run_means(runs: int, worlds: int, rng: np.random.Generator) -> np.ndarray:
    """[run, world, d_model]: drift over all prompts, 1 along v, 1 elsewhere, and what differs from run to run."""
    means = 0.05 * rng.standard_normal((runs, worlds, WIDTH))
    means[..., 0] += 1 + 0.15 * rng.standard_normal((runs, worlds))
    means[..., 1] += 1
    return means


def cosines(drift: np.ndarray) -> np.ndarray:
    """Of drifts with v."""
    return drift[..., 0] / np.linalg.norm(drift, axis=-1)


def history(means: np.ndarray, spread: float, rng: np.random.Generator) -> Residuals:
    """The runs on some prompts: half of a prompt's variance is common to all runs."""
    runs, worlds, _ = means.shape
    common, own = (rng.standard_normal((n, PROMPTS, worlds, WIDTH)) for n in (1, runs))
    anchor = np.zeros((1, PROMPTS, worlds, WIDTH))
    values = [anchor + np.eye(WIDTH)[0], anchor, means[:, None] + spread * (common + own) / np.sqrt(2)]
    names = ("witness", "anchor", *(f"run{run}/1" for run in range(runs)))
    values = np.concatenate(values).astype(np.float32)
    return Residuals(values, names, tuple(range(worlds)), "probes", {"dtype": ["float32"]})


if __name__ == "__main__":
    app()
