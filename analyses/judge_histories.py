"""python analyses/judge_histories.py --seeds 40    (simulated histories; --organisms 24 adds trained ones, resumable)

Calibration of the claim: does its level ever exceed the truth, and does it reach it? Histories with a highest true
level that was fixed beforehand (`worlds/truth.py`) are judged by `claim` as a user's would be. Some are trained
organisms, some move an organism's weights without training, some are simulated states with simulated arms. Writes
verdicts.csv (one row per history, seed and mode) and placebo.csv, and prints over-claims and power.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from scipy import stats
from tqdm.auto import tqdm
from worlds.behavior import ANCHOR, Rule, arms_of
from worlds.simulated import PLANS, Plan, evidence_of, simulate
from worlds.truth import SIMULATED, TRUTH, WAY

from gravlens.claims.claim import LEVELS, Claim, claim
from gravlens.claims.criteria import causal
from gravlens.claims.evidence import Case, Evidence
from gravlens.core.files import write_table

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ALPHA = 0.05
COLUMNS = ["history", "seed", "mode", "highest_true_level", "level", "sentence", "capped_by"]
PLACEBO_SEEDS = (5, 6, 10, 20)
RANKED = "holds more than clamps along matched random directions"


# --- one verdict ------------------------------------------------------------------------------------------------------
def simulated(name: str, plan: Plan, *, seed: int) -> list[Evidence]:
    """Return the evidence on the anchors of one simulated history."""
    truth, rng = SIMULATED[name], np.random.default_rng([seed, plan.anchors, *name.encode()])
    assert truth.world is not None  # of every simulated history
    found = []
    for i, history in enumerate(simulate(truth.world, plan, rng=rng)):
        given = vars(evidence_of(history, name=f"anchor{i}", rng=rng))
        if truth.rule is not None:
            arms = arms_of(truth.rule, seeds=plan.runs, directions=plan.directions, rng=rng)
            given = {**given, "arms": arms, "anchor": ANCHOR}
        found.append(Evidence(**{key: value for key, value in given.items() if key in Evidence.__dataclass_fields__}))
    return found


def row(name: str, seed: int, mode: str, found: Claim) -> dict[str, Any]:
    """Return a row of verdicts.csv."""
    values = (name, seed, mode, TRUTH[name].level, found.level, found.sentence, found.capped_by)
    return dict(zip(COLUMNS, values, strict=True))


def simulated_rows(seeds: int) -> Iterator[dict[str, Any]]:
    """Judge every simulated history, as one anchor and as six."""
    for name in tqdm(SIMULATED, "simulated"):
        for mode, plan in PLANS.items():
            for seed in range(seeds):
                yield row(name, seed, mode, claim(simulated(name, plan, seed=seed)))


# --- the placebo ------------------------------------------------------------------------------------------------------
def placebo(draws: int) -> pd.DataFrame:
    """How often v_rev passes level 4, or its test among directions, where it is one direction of many.

    Everything else is in its favor: harm returns, the clamp costs nothing, and no curve is asked of directions so far
    from v_rev.
    """
    rows = []
    for mode, plan in PLANS.items():
        for seeds in PLACEBO_SEEDS if plan.anchors == 1 else (plan.runs,):
            passed = []
            for draw in range(draws):
                rng = np.random.default_rng([draw, seeds, plan.anchors])
                passed.append(_passes(plan, seeds, rng))
            share, ranked = np.mean(passed, axis=0)
            rows.append((mode, seeds, plan.directions, draws, share, ranked, bound(draws)))
    return pd.DataFrame(rows, columns=["mode", "seeds", "directions", "draws", "level_4", "rank_test", "bound"])


def _passes(plan: Plan, seeds: int, rng: np.random.Generator) -> tuple[bool, bool]:
    anchors = []
    for history in simulate(SIMULATED["planted"].world, plan, rng=rng):  # pyright: ignore[reportArgumentType]
        arms = arms_of(Rule(placebo=True, spread=0.05), seeds=seeds, directions=plan.directions, rng=rng)
        anchors.append(Evidence(evidence_of(history, name="", rng=rng).trajectory, arms=arms, anchor=ANCHOR))
    demands = list(causal(Case(anchors, ALPHA)))
    return all(one.holds for one in demands), any(one.holds for one in demands if one.name == RANKED)


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
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("."),
) -> None:
    """Does the claim level ever exceed the truth, and how often does it reach it?"""
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(simulated_rows(seeds), columns=COLUMNS)
    placebos = placebo(draws)
    write_table(out / "verdicts.csv", table)
    write_table(out / "placebo.csv", placebos)
    typer.echo(rates(table).round(3).to_string())
    typer.echo(f"\nplacebo:\n{placebos.round(3).to_string()}")


if __name__ == "__main__":
    app()
