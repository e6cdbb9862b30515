"""Project one layer's states onto a plane: v_rev and the first component of the rest."""

import numpy as np
import pandas as pd
from jaxtyping import Float

from gravlens.activations.residuals import Residuals, check_states, run_and_step
from gravlens.directions.direction import Direction, Directions, one_direction, undefined_error
from gravlens.directions.trajectory import check_comparable, drift_per_prompt

COLUMNS = ("checkpoint", "kind", "run", "step", "layer", "prompt", "along", "across")
NO_REST = 1e-4  # of the distance: a shorter rest is rounding, or is not seen


def residual_plane(residuals: Residuals, direction: Direction, *, prompts: bool = False) -> pd.DataFrame:
    """Place witness, anchor and runs on the plane of `direction` and the first component of the rest.

    The anchor is (0, 0), the witness–anchor distance is 1 on both axes. `along` is ⟨h − h(anchor), v⟩ / distance, the
    `fraction` of `follow`; `across` is the first principal component (centred) of all checkpoints' mean states without
    v, its sign the runs' mean. A plane shows 2 of d_model directions: near on it may be far apart. With `prompts` each
    prompt's drift is added, of the witness and each run's last step.

    Returns:
        A row per checkpoint (and prompt): `checkpoint`, `kind` (`witness`, `anchor`, `run`, `other`), `run`, `step`,
        `layer`, `prompt` (<NA>: the mean over prompts), `along`, `across` (both in distances);
        `attrs["across_share"]`: the component's share of the rest's variance over checkpoints.
    """
    check_states(residuals)
    one_direction(direction)
    if direction.undefined is not None:
        raise undefined_error(direction)
    check_comparable(Directions((direction,)), [residuals])

    def place(name: str) -> Float[np.ndarray, "prompt d_model"]:
        return drift_per_prompt(residuals, name, [direction.layer])[:, 0] / direction.distance

    v = direction.vector.astype(np.float64)
    means = np.stack([place(name).mean(0) for name in residuals.checkpoints])
    axis, share = _first_of_rest(means, v, moved=[_kind(name) == "run" for name in residuals.checkpoints])
    axes = np.stack([v, axis], axis=1)
    parts = [_rows(name, mean[None] @ axes) for name, mean in zip(residuals.checkpoints, means, strict=True)]
    if prompts:
        parts += [_rows(name, place(name) @ axes, per_prompt=True) for name in _ends(residuals)]
    table = pd.concat(parts, ignore_index=True).assign(layer=direction.layer)[list(COLUMNS)]
    table.attrs["across_share"] = share
    return table


def _first_of_rest(
    means: Float[np.ndarray, "checkpoint d_model"], v: Float[np.ndarray, " d_model"], *, moved: list[bool]
) -> tuple[Float[np.ndarray, " d_model"], float]:
    """First component of the states orthogonal to v and its share of their variance; (0, NaN) without a rest."""
    rest = means - np.outer(means @ v, v)
    _, lengths, rows = np.linalg.svd(rest - rest.mean(0), full_matrices=False)
    if lengths[0] < NO_REST:
        return np.zeros_like(v), float("nan")
    towards = rest[moved].mean(0) if any(moved) else rest.mean(0)
    axis = rows[0] - (rows[0] @ v) * v  # the SVD's row is orthogonal to v but for rounding
    # an SVD's signs are arbitrary, and differ between LAPACK builds
    return axis * (-1.0 if axis @ towards < 0 else 1.0), float(lengths[0] ** 2 / (lengths**2).sum())


def _kind(name: str) -> str:
    return name if name in ("witness", "anchor") else "run" if run_and_step(name) else "other"


def _ends(residuals: Residuals) -> list[str]:
    """The witness and each run's last checkpoint, where present."""
    witness = [name for name in residuals.checkpoints if name == "witness"]
    return witness + [f"{run}/{steps[-1]}" for run, steps in residuals.runs.items()]


def _rows(name: str, places: Float[np.ndarray, "row 2"], *, per_prompt: bool = False) -> pd.DataFrame:
    run, step = run_and_step(name) or (None, pd.NA)
    table = pd.DataFrame(places, columns=["along", "across"]).assign(checkpoint=name, kind=_kind(name), run=run)
    table["step"] = pd.array([step] * len(table), "Int64")  # nullable: a plain NaN would turn steps into floats
    table["prompt"] = pd.array(range(len(table)) if per_prompt else [pd.NA] * len(table), "Int64")
    return table
