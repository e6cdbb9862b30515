"""Subspaces of one layer's residual stream: the leading components of a drift, the whole state, what is orthogonal."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from scipy.linalg import orth, subspace_angles

from gravlens.activations.residuals import Residuals, check_states
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import (
    Direction,
    Directions,
    Span,
    Spans,
    Subspace,
    Subspaces,
    check_columns,
    defined_columns,
)
from gravlens.directions.trajectory import drift_per_prompt
from gravlens.directions.vrev import direction_from

# What is left of a unit vector below this length is rounding, not a direction.
NOTHING_LEFT = 1e-3


def span_of(
    vectors: Float[np.ndarray, "*vector d_model"], *, layer: int, distance: float, name: str = "given"
) -> Subspace:
    """The subspace that some vectors span; linearly dependent ones add nothing.

    Args:
        vectors: [vector, d_model], or one; of any length.
        layer: number of the layer.
        distance: the witness–anchor distance there, residual units; strength is counted in it.
        name: how the subspace was made.

    Raises:
        GravlensError: the vectors are all zero.
    """
    basis = orth(np.atleast_2d(np.asarray(vectors, dtype=np.float64)).T).T
    if not len(basis):
        raise GravlensError(f"The vectors ({name}) are all zero.", "A subspace has a direction.", "other vectors.")
    return Subspace(basis, layer, distance, name)


def leading_components(
    drift: Float[np.ndarray, "prompt d_model"], *, rank: int
) -> tuple[Float[np.ndarray, "rank d_model"], Float[np.ndarray, " rank"]]:
    """The first right singular vectors of per-prompt drifts (not centred: the mean counts), and their shares.

    The first vector points the way of the mean drift; a share is its part of the drifts' summed squared length.
    """
    _, values, rows = np.linalg.svd(drift.astype(np.float64), full_matrices=False)
    if rank < 1 or rank > len(rows):
        raise GravlensError(
            f"{rank} components were asked for.", f"{len(drift)} drifts have 1 to {len(rows)}.", "a smaller rank."
        )
    signs = np.where(rows[:rank] @ drift.mean(0, dtype=np.float64) < 0, -1.0, 1.0)
    return rows[:rank] * signs[:, None], values[:rank] ** 2 / (values**2).sum()


def drift_subspaces(residuals: Residuals, directions: Directions, *, at: Sequence[str], rank: int = 1) -> Subspaces:
    """The leading components of the drift h(θ_t; x) − h(anchor; x) over prompts, one subspace per layer.

    Directions defined by runs, to compare with the history-defined v_rev; fit them on some runs, use them on others.

    Args:
        residuals: hold `anchor` and the checkpoints.
        directions: v_rev; its layers and distances are used.
        at: names of checkpoints, `"{run}/{step}"`; drifts of several are put together.
        rank: how many components.

    Raises:
        GravlensError: a layer or checkpoint that is missing from the residuals, or more components than drifts.
    """
    directions = Directions.of(directions)
    check_states(residuals)
    spaces = []
    for direction in directions.defined():
        drift = np.concatenate([_drift(residuals, name, direction.layer) for name in at])
        basis, shares = leading_components(drift, rank=rank)
        facts = {"checkpoints": list(at), "shares": shares.tolist()}
        name = f"drift_rank_{rank}"
        spaces.append(Subspace(basis, direction.layer, direction.distance, name, residuals.prompts, facts))
    return Subspaces(tuple(spaces))


def whole_state(directions: Directions) -> Subspaces:
    """All of the residual stream at each layer, Q = 1: with it a penalty is the full-vector anchor."""
    directions = Directions.of(directions)
    return Subspaces(
        tuple(Subspace(np.eye(len(d.vector)), d.layer, d.distance, "whole_state", d.prompts) for d in directions)
    )


def orthogonal_part(spaces: Subspaces, directions: Spans) -> Subspaces:
    """Remove a span with basis P from each subspace: Q (1 − PᵀP); the rank may fall.

    Raises:
        GravlensError: nothing is left.
    """
    parts = []
    for space in spaces:
        out = directions[space.layer].basis.astype(np.float64)
        rest = space.basis - space.basis @ out.T @ out
        basis, lengths, _ = np.linalg.svd(rest.T, full_matrices=False)
        kept = basis.T[lengths > NOTHING_LEFT]
        if not len(kept):
            raise GravlensError(
                f"At layer {space.layer} nothing of {space.estimator} is orthogonal to {directions[space.layer]}.",
                "A part has a direction.",
                "a subspace of a higher rank.",
            )
        kept = kept * np.where((kept * rest.sum(0)).sum(1) < 0, -1.0, 1.0)[:, None]
        name, facts = f"{space.estimator}_orthogonal", dict(space.made_from)
        parts.append(Subspace(kept, space.layer, space.distance, name, space.prompts, facts))
    return Subspaces(tuple(parts))


def principal_angles(one: Span, other: Span) -> Float[np.ndarray, " rank"]:
    """Angles between two subspaces of a layer, degrees, ascending; the cosine of the first is their largest overlap.

    The singular values of Q_1 Q_2ᵀ are their cosines (Björck and Golub 1973; scipy).
    """
    return np.degrees(subspace_angles(one.basis.T.astype(np.float64), other.basis.T.astype(np.float64)))[::-1]


def share_within(vectors: Float[np.ndarray, "prompt d_model"], span: Span) -> float:
    """Share of the vectors' summed squared length within a span with basis Q: Σ‖Q x‖² / Σ‖x‖²; 1: all of it."""
    vectors = vectors.astype(np.float64)
    return float(((vectors @ span.basis.T.astype(np.float64)) ** 2).sum() / (vectors**2).sum())


Like = TypeVar("Like", bound=Span | Spans)


def random_like(
    spans: Like, *, rng: np.random.Generator, states: Float[np.ndarray, "prompt layer d_model"] | None = None
) -> Like:
    """Random directions or subspaces with the layers, ranks and distances of the given ones: the matched control.

    Args:
        spans: one direction or subspace, or those of several layers; undefined directions are left out.
        rng: source of randomness; each vector is a new draw.
        states: draw from the covariance of these states (one column per layer, any unit) instead of isotropically: each
            vector is a random mixture Σ_i g_i (h_i − mean h), with g normal.

    Raises:
        GravlensError: no directions, states of other layers, or states that do not vary.
    """
    several: Any = Subspaces((spans,)) if isinstance(spans, Subspace) else spans
    if not isinstance(several, Subspaces):
        directions = Directions.of(several)
        several, states = (directions.defined(), None) if states is None else defined_columns(directions, states)
    elif states is not None:
        check_columns(states, several.layers)
    twins: Any = type(several)(tuple(_random_twins(several, rng, states)))
    return next(iter(twins)) if isinstance(spans, Direction | Subspace) else twins


def _random_twins(
    spans: Iterable[Any], rng: np.random.Generator, states: Float[np.ndarray, "prompt layer d_model"] | None
) -> Iterator[Any]:
    for i, span in enumerate(spans):
        rows, name = len(span.basis), "isotropic" if states is None else "covariance_matched"
        if states is None:
            vectors = rng.standard_normal(span.basis.shape)
        else:
            centred = states[:, i].astype(np.float64) - states[:, i].mean(0, dtype=np.float64)
            vectors = rng.standard_normal((rows, len(centred))) @ centred
        place: dict[str, Any] = {"layer": span.layer, "distance": span.distance, "name": name}
        # a basis is orthonormalised, which may turn a single vector round
        twin = direction_from(vectors[0], **place) if isinstance(span, Direction) else span_of(vectors, **place)
        yield replace(twin, prompts=span.prompts)


def _drift(residuals: Residuals, checkpoint: str, layer: int) -> Float[np.ndarray, "prompt d_model"]:
    if layer not in residuals.layers:
        raise GravlensError(f"The residuals hold no layer {layer}.", f"They hold {list(residuals.layers)}.", "another.")
    return drift_per_prompt(residuals, checkpoint, [layer])[:, 0]
