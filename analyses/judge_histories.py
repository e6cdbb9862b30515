"""python analyses/judge_histories.py --seeds 40    (simulated histories; --organisms 24 adds trained ones, resumable)

Calibration of the claim: does its level ever exceed the truth, and does it reach it? Histories with a highest true
level that was fixed beforehand (`worlds/truth.py`) are judged by `claim` as a user's would be. Some are trained
organisms, some move an organism's weights without training, some are simulated states with simulated arms. Writes
verdicts.csv (one row per history, seed and mode) and placebo.csv, and prints over-claims and power.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from scipy import stats
from tqdm.auto import tqdm
from worlds.behavior import ANCHOR, Rule, arms_of
from worlds.simulated import PLANS, Plan, evidence_of, simulate
from worlds.trained import FIRST, base_of, histories, make_organism, others_of, study_of, walks_of
from worlds.truth import SIMULATED, TRUTH

from gravlens.claims.claim import LEVELS, Claim, claim
from gravlens.claims.criteria import causal
from gravlens.claims.evidence import Case, Evidence
from gravlens.core.files import write_table
from gravlens.models.opening import quiet
from gravlens.organisms.fetch import cache_folder

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ALPHA = 0.05
COLUMNS = ["history", "seed", "mode", "highest_true_level", "level", "sentence", "capped_by"]
PLACEBO_SEEDS = (5, 6, 10, 20)
RANKED = "holds more than random directions"


# --- one verdict ------------------------------------------------------------------------------------------------------
def simulated(name: str, plan: Plan, *, seed: int) -> list[Evidence]:
    """Return the evidence on the anchors of one simulated history."""
    truth, rng = SIMULATED[name], np.random.default_rng([seed, plan.anchors, *name.encode()])
    assert truth.world is not None  # of every simulated history
    found = []
    for i, history in enumerate(simulate(truth.world, plan, rng=rng)):
        evidence = evidence_of(history, name=f"anchor{i}", rng=rng)
        if truth.rule is not None:
            arms = arms_of(truth.rule, seeds=plan.runs, directions=plan.directions, rng=rng)
            evidence = replace(evidence, arms=arms, anchor=ANCHOR)
        found.append(evidence)
    return found


def row(name: str, seed: int, mode: str, found: Claim) -> dict[str, Any]:
    """Return a row of verdicts.csv."""
    values = (name, seed, mode, TRUTH[name].level, found.level, found.sentence, found.capped_by)
    return dict(zip(COLUMNS, values, strict=True))


def simulated_rows(seeds: int, workers: int) -> Iterator[dict[str, Any]]:
    """Judge every simulated history, as one anchor and as six."""
    asked = [(name, mode) for name in SIMULATED for mode in PLANS]
    with processes(workers) as pool:
        jobs = [pool.submit(judged, name, mode, seeds) for name, mode in asked]
        for job in tqdm(jobs, "simulated"):
            yield from job.result()


def judged(name: str, mode: str, seeds: int) -> list[dict[str, Any]]:
    """Judge one simulated history in one mode."""
    drawn = (simulated(name, PLANS[mode], seed=seed) for seed in range(seeds))
    return [row(name, seed, mode, claim(found, alone=False)) for seed, found in enumerate(drawn)]


def processes(workers: int) -> ProcessPoolExecutor:
    """Return worker processes of one thread each."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,))


def make(ring: Sequence[int], cache: Path, workers: int) -> None:
    """Make the organisms that are not there yet."""
    with processes(workers) as pool:
        made = [pool.submit(make_organism, seed, cache) for seed in ring]
        for future in tqdm(as_completed(made), "organisms", len(made)):
            future.result()


def trained_rows(ring: Sequence[int], cache: Path) -> Iterator[dict[str, Any]]:
    """Judge every history of every organism by itself, all others being strangers, and in windows of the ring.

    A window is six consecutive organisms with the other five's witnesses as strangers. Neighboring windows share
    organisms, so their verdicts are not independent.
    """
    with quiet():
        studies = {str(seed): study_of(seed, cache) for seed in ring}
        parts = {name: (base_of(study, name), walks_of(study)) for name, study in tqdm(studies.items(), "states")}
        names, width = [*studies], PLANS["six anchors"].anchors
        windows = {name: [names[(i + k) % len(names)] for k in range(width)] for i, name in enumerate(names)}
        for mode, groups in {"one anchor": dict.fromkeys(names, names), "six anchors": windows}.items():
            if len(names) < width:
                continue
            for first, group in tqdm(groups.items(), mode):
                found: dict[str, list[Evidence]] = {}
                for name in group if mode == "six anchors" else [first]:
                    # the next of the ring comes first, and is the wrong witness
                    at = group.index(name)
                    others = others_of({other: studies[other] for other in (*group[at + 1 :], *group[:at])})
                    for history, evidence in histories(studies[name], *parts[name], others):
                        found.setdefault(history, []).append(evidence)
                for history, evidence in found.items():
                    yield row(history, int(first), mode, claim(evidence, alone=False))


# --- the placebo ------------------------------------------------------------------------------------------------------
def placebo(draws: int) -> pd.DataFrame:
    """How often v_rev passes level 4, or its test among directions, where it is one direction of many.

    Everything else is in its favor: harm returns, the clamp costs nothing, and no curve is asked of directions so far
    from v_rev.
    """
    rows, rule = [], Rule(placebo=True, spread=0.05)
    for mode, plan in PLANS.items():
        # level 4 reads arms alone, so the states are the same in all draws
        still = simulated("planted", plan, seed=0)
        for seeds in PLACEBO_SEEDS if plan.anchors == 1 else (plan.runs,):
            passed = []
            for draw in tqdm(range(draws), f"placebo, {mode}, {seeds} seeds"):
                rng = np.random.default_rng([draw, seeds, plan.anchors])
                drawn = [arms_of(rule, seeds=seeds, directions=plan.directions, rng=rng) for _ in still]
                anchors = [replace(one, arms=arms, anchor=ANCHOR) for one, arms in zip(still, drawn, strict=True)]
                demands = list(causal(Case(anchors, ALPHA)))
                ranked = next(one for one in demands if one.name == RANKED)
                passed.append((all(one.holds for one in demands), bool(ranked.holds)))
            share, first = np.mean(passed, axis=0)
            rows.append((mode, seeds, plan.directions, draws, share, first, bound(draws)))
    return pd.DataFrame(rows, columns=["mode", "seeds", "directions", "draws", "level_4", "rank_test", "bound"])


# --- the table --------------------------------------------------------------------------------------------------------
def bound(n: int) -> float:
    """97.5 % bound of the share of n independent tests that reject at α where there is nothing to find."""
    return float(stats.binom.ppf(0.975, n, ALPHA) / n)


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """Share of each history that was claimed beyond the truth, and of those that reached it, by mode."""
    rows = []
    for (name, mode), found in table.groupby(["history", "mode"], sort=False):
        n, highest = len(found), TRUTH[str(name)].level
        counts = [int((found.level == level).sum()) for level in range(len(LEVELS))]
        over, reached = float((found.level > highest).mean()), float((found.level >= highest).mean())
        rows.append((name, mode, highest, n, *counts, over, bound(n), over > bound(n), reached))
    levels = [f"level_{level}" for level in range(len(LEVELS))]
    return pd.DataFrame(rows, columns=["history", "mode", "highest", "n", *levels, "over", "bound", "fault", "reached"])


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=1, help="Simulated verdicts of each history and mode.")] = 40,
    draws: Annotated[int, typer.Option(min=1, help="Placebos at each number of seeds.")] = 400,
    organisms: Annotated[int, typer.Option(min=0, help="Trained organisms, six or more (0: none).")] = 0,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread each.")] = 2,
    cache: Annotated[Path | None, typer.Option(help="Folder of the organisms. Default: gravlens's cache.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("."),
) -> None:
    """Does the claim level ever exceed the truth, and how often does it reach it?"""
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(simulated_rows(seeds, workers), columns=COLUMNS)
    if organisms:
        ring, where = range(FIRST, FIRST + organisms), cache or cache_folder()
        make(ring, where, workers)
        table = pd.concat([table, pd.DataFrame(trained_rows(ring, where), columns=COLUMNS)], ignore_index=True)
    placebos = placebo(draws)
    write_table(out / "verdicts.csv", table)
    write_table(out / "placebo.csv", placebos)
    typer.echo(rates(table).round(3).to_string())
    typer.echo(f"\nplacebo:\n{placebos.round(3).to_string()}")


if __name__ == "__main__":
    app()
