"""python analyses/calibrate_endpoints.py

How often does `independent_endpoints` reject an endpoint that shares the anchor with v_rev and nothing else? No model
is opened: witness, endpoint and sibling anchors are independent vectors about one mean, as in the worlds of
`calibrate_nulls.py`; the variance of the anchors is `r` times the witness's. `independent_endpoints` are the rates of
the null, `estimate` those of the draws of r/(1 + r) over siblings, which spread as an expectation does and were once
offered as a null. Writes calibrate_endpoints.csv. About a minute of one core.
"""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from calibrate_nulls import AT_ONCE, DRAWS, LEVELS, WIDTH, spectrum
from tqdm.auto import tqdm

from gravlens.activations.residuals import Residuals
from gravlens.cli.options import OUT_FOLDER
from gravlens.cli.output import Script
from gravlens.core.files import write_table
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import locate_vrev
from gravlens.stats.controls import anchor_ratio, independent_endpoints
from gravlens.stats.nulls import NullDraws, compare

PROMPTS = 64
# World -> participation ratios of the endpoints and of the states over prompts; the null assumes that they are equal.
RATIOS = {"isotropic": (None, None), "34": (34, 34), "5.4": (5.4, 5.4), "2.5": (2.5, 2.5), "other_spectrum": (2.5, 34)}
VARIANCES, SIBLINGS = (0.1, 1.0), (3, 6)  # r; siblings, the anchor among them
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def simulate(world: str, r: float, siblings: int, number: int, rng: np.random.Generator) -> Residuals:
    """So many histories of independent endpoints, a layer each: `a/1` is an endpoint that is no run's."""
    (spread, of_states), anchors = map(spectrum, RATIOS[world]), [f"s{i}" for i in range(1, siblings)]
    scales = {"witness": 1.0, "a/1": 1.0, "anchor": r**0.5, **dict.fromkeys(anchors, r**0.5)}
    prompts = of_states * rng.standard_normal((PROMPTS, number, WIDTH))
    prompts -= prompts.mean(0)  # the means are the endpoints themselves
    states = [scale * spread * rng.standard_normal((number, WIDTH)) + prompts for scale in scales.values()]
    values = np.stack(states).astype(np.float32)
    return Residuals(values, tuple(scales), tuple(range(number)), "prompts", {"dtype": ["float32"]})


def p_values(residuals: Residuals, siblings: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Null -> p-value of each history's endpoint."""
    names, ask = [f"s{i}" for i in range(1, siblings)], {"draws": DRAWS, "rng": rng}
    followed = follow(residuals, locate_vrev(residuals))
    estimate = anchor_ratio(residuals, siblings=names, layers=residuals.layers, **ask)
    nulls = [
        NullDraws("estimate", estimate.draws[:, None], (1,), residuals.layers),
        independent_endpoints(residuals, names, steps=(1,), **ask),
    ]
    return {null.name: compare(followed, null, prompts="given").table.p_value.to_numpy() for null in nulls}


def rates(simulations: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """One row per world, null and nominal rate."""
    for world, r, siblings in tqdm(list(product(RATIOS, VARIANCES, SIBLINGS)), "worlds"):
        sizes = [min(AT_ONCE, simulations - start) for start in range(0, simulations, AT_ONCE)]
        parts = [p_values(simulate(world, r, siblings, size, rng), siblings, rng) for size in sizes]
        for null, level in product(parts[0], LEVELS):
            p = np.concatenate([part[null] for part in parts])
            found = {"world": world, "r": r, "siblings": siblings, "null": null, "nominal": level}
            yield found | {"rejection_rate": float((p <= level + 1e-9).mean()), "n_simulations": simulations}


@app.command(cls=Script)
def main(
    simulations: Annotated[int, typer.Option(min=10, help="Simulated histories in each world.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of the random numbers.")] = 0,
    out: OUT_FOLDER = Path("."),
) -> None:
    """How often is an endpoint rejected that shares the anchor with v_rev and nothing else?"""
    table = pd.DataFrame(rates(simulations, np.random.default_rng(seed)))
    write_table(out / "calibrate_endpoints.csv", table)
    shown = table.pivot(index=["world", "r", "siblings"], columns=["null", "nominal"], values="rejection_rate")
    typer.echo(f"rejected of {simulations} endpoints that share the anchor alone:\n{shown.round(3).to_string()}")


if __name__ == "__main__":
    app()
