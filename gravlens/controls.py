"""Controls: single contrasts that say how much of an alignment belongs to this history."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from einops import einsum

from gravlens.directions import Directions
from gravlens.errors import GravlensError
from gravlens.residuals import Residuals
from gravlens.trajectory import drifts


def substitute(residuals: Residuals, *, witness: str = "witness", anchor: str = "anchor") -> Residuals:
    """The pair of states that `locate_vrev` reads, with another checkpoint as witness or as anchor.

    A *wrong witness* (another initialisation or lineage) shares this anchor, so its baseline is not 0. A *sibling
    anchor* A′ (this witness, another alignment seed) gives cos(h(θ_t) − h(A), h(W) − h(A′)): no anchor in common.
    """
    values = np.stack([residuals.of(witness), residuals.of(anchor)])
    sources = residuals.meta.get("sources", {})
    meta = {
        **residuals.meta,
        "sources": {"witness": sources.get(witness, witness), "anchor": sources.get(anchor, anchor)},
    }
    return Residuals(values, ("witness", "anchor"), residuals.layers, residuals.prompts, meta)


def from_start(residuals: Residuals, *, start: str) -> Residuals:
    """Runs that start elsewhere (an unaligned twin starts at the witness): their drift is taken from there."""
    values = residuals.values.copy()
    values[residuals.checkpoints.index("anchor")] = residuals.of(start)
    return Residuals(values, residuals.checkpoints, residuals.layers, residuals.prompts, residuals.meta)


def closure(
    runs: Residuals,
    twins: Residuals,
    directions: Directions,
    *,
    pairs: Sequence[tuple[str, str]],
    layers: Sequence[int],
) -> pd.DataFrame:
    """How much of the gap between a run and its unaligned twin has closed.

    closure(t) = 1 − ⟨h(W_t) − h(θ_t), v_rev⟩ / distance: 0 where the same data moves both alike, 1 where the run has
    reached its twin; above 0 is reversion beyond the common drift.

    Args:
        runs: residuals with `anchor` and the runs.
        twins: residuals with `witness` and the twins, on the same prompts.
        directions: v_rev.
        pairs: (run, twin) names on the same data.
        layers: layers of the mean.

    Returns:
        Columns `run, step, layer` (<NA>: the mean over `layers`), `closure`.
    """
    chosen = directions.at(layers)
    gap = _mean(twins, "witness", layers) - _mean(runs, "anchor", layers)
    frames = []
    for run, twin in pairs:
        if runs.runs.get(run) != twins.runs.get(twin):
            raise GravlensError(
                f"{run} has steps {runs.runs.get(run)}, its twin {twin} {twins.runs.get(twin)}.",
                "Closure pairs a run and a twin step by step.",
                "the same save_steps for both.",
            )
        twin_drift = drifts(from_start(twins, start="witness"), twin, layers)
        apart = gap + twin_drift - drifts(runs, run, layers)
        closed = (
            1
            - einsum(apart, chosen.vectors.astype(np.float64), "step layer d, layer d -> step layer") / chosen.distances
        )
        frames.append(_tidy(run, runs.runs[run], layers, closed))
    return pd.concat(frames, ignore_index=True).astype({"layer": "Int64"})


def _mean(residuals: Residuals, checkpoint: str, layers: Sequence[int]) -> np.ndarray:
    return residuals.of(checkpoint).mean(0, dtype=np.float64)[[residuals.layers.index(layer) for layer in layers]]


def _tidy(run: str, steps: Sequence[int], layers: Sequence[int], closed: np.ndarray) -> pd.DataFrame:
    rows = [(run, step, layer, closed[i, j]) for i, step in enumerate(steps) for j, layer in enumerate(layers)]
    rows += [(run, step, pd.NA, closed[i].mean()) for i, step in enumerate(steps)]
    return pd.DataFrame(rows, columns=["run", "step", "layer", "closure"])
