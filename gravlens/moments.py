"""Mean and covariance of residual states, summed up while they are read: no state is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from gravlens.checkpoints import Checkpoint, ModelSequence, Prompts
from gravlens.errors import GravlensError
from gravlens.placement import Placement
from gravlens.positions import Positions
from gravlens.readings import read_each
from gravlens.residuals import prepare


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean, and covariance where it was asked for, of `resid_post` over prompts.

    Attributes:
        mean: [checkpoint, layer, d_model], fp64, in the residual stream's own units.
        covariance: [checkpoint, layer, d_model, d_model], fp64, divided by the number of rows; or None.
        rows: how many states each is over.
        checkpoints: names (`witness`, `anchor`, `{run}/{step}`).
        layers: layer numbers, ascending.
        prompts: digest of the prompt set.
        meta: what it was made from, as in `Residuals`.
    """

    mean: Float[np.ndarray, "checkpoint layer d_model"] = field(repr=False)
    covariance: Float[np.ndarray, "checkpoint layer d_model d_model"] | None = field(repr=False)
    rows: int
    checkpoints: tuple[str, ...]
    layers: tuple[int, ...]
    prompts: str
    meta: dict[str, Any] = field(default_factory=dict)


def residual_moments(
    sequence: ModelSequence,
    prompts: Prompts | None = None,
    *,
    reduce: Literal["mean", "covariance"] = "mean",
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    checkpoints: Sequence[Checkpoint] | None = None,
    placement: Placement = Placement(),
) -> Moments:
    """What `cache_residuals` reads, reduced over prompts in fp64 as it is read: memory does not grow with their number.

    Args:
        sequence: the history.
        prompts: default: the sequence's probes.
        reduce: `"mean"`, or `"covariance"`, which gives both.
        layers: default: all.
        positions: as in `cache_residuals`; where rows are tokens, the moments are over tokens.
        checkpoints: which ones; default: witness, anchor and every run's.
        placement: device, dtype and disk.

    Raises:
        GravlensError: what `cache_residuals` raises.
    """
    if reduce not in ("mean", "covariance"):
        raise GravlensError(
            f"reduce={reduce!r} was given.", "States are reduced over prompts.", '"mean" or "covariance".'
        )
    asked = prepare(sequence, prompts, layers=layers, positions=positions, checkpoints=checkpoints)
    shape = (len(asked.checkpoints), len(asked.plan.layers), asked.plan.d_model)
    # About the first batch's mean, which is near the whole mean: what is squared and summed is not far from 0.
    about, total, rows = np.zeros(shape), np.zeros(shape), np.zeros(shape[0], int)
    squares = np.zeros((*shape, shape[-1])) if reduce == "covariance" else None
    precisions: set[str] = set()
    for number, found, states, precision in read_each(asked.plan, asked.checkpoints, "huggingface", placement):
        if not rows[number]:
            about[number] = states.mean(0, dtype=np.float64)
        away = states - about[number]
        total[number] += away.sum(0)
        rows[number] += len(found)
        precisions.add(precision)
        if squares is not None:
            squares[number] += np.einsum("nld,nle->lde", away, away, optimize=True)
    offset = total / rows[:, None, None]
    if squares is not None:
        squares = squares / rows[:, None, None, None] - offset[..., :, None] * offset[..., None, :]
    return Moments(
        about + offset, squares, int(rows[0]), asked.names, asked.plan.layers, asked.prompts, asked.meta(precisions)
    )
