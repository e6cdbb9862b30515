"""Subspaces of one layer's residual stream: drift components, orthogonal parts, random controls."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from numpy.random import Generator
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

__all__ = ["drift_subspaces", "orthogonal_part", "principal_angles", "share_within", "span_of", "whole_state"]

NOTHING_LEFT = 1e-3  # of a unit vector: shorter remainders are rounding, not a direction


def span_of(
    vectors: Float[np.ndarray, "*vector d_model"], *, layer: int, distance: float, name: str = "given"
) -> Subspace:
    """Orthonormalise vectors of any length to a subspace; dependent ones add nothing.

    GravlensError where all are zero. `distance` is the witness–anchor distance there, residual units.

    Examples:
        >>> plane = gl.subspaces.span_of(rng.standard_normal((2, 32)), layer=1, distance=vs[1].distance)
        >>> plane.rank
        2
    """
    # by SVD: dependent vectors fall below machine precision
    basis = orth(np.atleast_2d(np.asarray(vectors, dtype=np.float64)).T).T
    if not len(basis):
        raise GravlensError(f"The vectors ({name}) are all zero.", "A subspace has a direction.", "other vectors.")
    return Subspace(basis, layer, distance, name)


def leading_components(
    drift: Float[np.ndarray, "prompt d_model"], *, rank: int
) -> tuple[Float[np.ndarray, "rank d_model"], Float[np.ndarray, " rank"]]:
    """First right singular vectors of per-prompt drifts (not centred: the mean counts), and their shares of Σ‖drift‖².

    Each vector points the way of the mean drift.
    """
    _, values, rows = np.linalg.svd(drift.astype(np.float64), full_matrices=False)
    if rank < 1 or rank > len(rows):
        given = f"{rank} components were asked for."
        raise GravlensError(given, f"{len(drift)} drifts have 1 to {len(rows)}.", "a smaller rank.")
    signs = np.where(rows[:rank] @ drift.mean(0, dtype=np.float64) < 0, -1.0, 1.0)
    return rows[:rank] * signs[:, None], values[:rank] ** 2 / (values**2).sum()


def drift_subspaces(residuals: Residuals, directions: Directions, *, at: Sequence[str], rank: int = 1) -> Subspaces:
    """Leading components of the drift h(θ_t; x) − h(anchor; x) over prompts, one subspace per layer.

    Defined by runs, to compare with the history-defined v_rev; fit on some runs, test on others. GravlensError for a
    missing layer or checkpoint, or more components than drifts.

    Args:
        residuals: hold `anchor` and the checkpoints.
        directions: v_rev, for layers and distances.
        at: checkpoints `"{run}/{step}"`, pooled.
        rank: number of components.

    Examples:
        >>> spaces = gl.subspaces.drift_subspaces(given, vs, at=["seed0/20", "seed1/20"], rank=2)
        >>> spaces[1].basis.shape
        (2, 32)
    """
    check_states(residuals)
    spaces = []
    for direction in Directions.of(directions).defined():
        drift = np.concatenate([drift_per_prompt(residuals, name, [direction.layer])[:, 0] for name in at])
        basis, shares = leading_components(drift, rank=rank)
        facts = {"checkpoints": list(at), "shares": shares.tolist()}
        place = (direction.layer, direction.distance, f"drift_rank_{rank}", residuals.prompts)
        spaces.append(Subspace(basis, *place, facts))
    return Subspaces(tuple(spaces))


def whole_state(directions: Directions) -> Subspaces:
    """The whole residual stream at each layer, Q = 1: a penalty on it anchors the full vector.

    Examples:
        >>> gl.subspaces.whole_state(vs)[1].rank
        32
    """
    whole = (
        Subspace(np.eye(d.vector.size), d.layer, d.distance, "whole_state", d.prompts)
        for d in Directions.of(directions)
    )
    return Subspaces(tuple(whole))


def orthogonal_part(spaces: Subspaces, directions: Spans) -> Subspaces:
    """Remove a span with basis P from each subspace, Q (1 − PᵀP); the rank may fall, GravlensError if to 0.

    Examples:
        >>> spaces = gl.subspaces.drift_subspaces(given, vs, at=["seed0/20"], rank=2)
        >>> rest = gl.subspaces.orthogonal_part(spaces, vs)
        >>> bool(abs(rest[1].basis @ vs[1].vector).max() < 1e-3)
        True
    """
    parts = []
    for space in spaces:
        out = directions[space.layer].basis.astype(np.float64)
        rest = space.basis - space.basis @ out.T @ out
        basis, lengths, _ = np.linalg.svd(rest.T, full_matrices=False)  # an SVD: QR would not reveal a fallen rank
        kept = basis.T[lengths > NOTHING_LEFT]
        if not len(kept):
            given = f"At layer {space.layer} nothing of {space.estimator} is orthogonal to {directions[space.layer]}."
            raise GravlensError(given, "An orthogonal part needs a direction.", "a subspace of higher rank.")
        # an SVD's signs are arbitrary: keep those of the subspace, for steering along it
        kept = kept * np.where((kept * rest.sum(0)).sum(1) < 0, -1.0, 1.0)[:, None]
        name, facts = f"{space.estimator}_orthogonal", dict(space.made_from)
        parts.append(Subspace(kept, space.layer, space.distance, name, space.prompts, facts))
    return Subspaces(tuple(parts))


def principal_angles(one: Span, other: Span) -> Float[np.ndarray, " rank"]:
    """Principal angles between two subspaces of a layer, degrees, ascending.

    Their cosines are the singular values of Q_1 Q_2ᵀ (Björck and Golub 1973; scipy).

    Examples:
        >>> spaces = gl.subspaces.drift_subspaces(given, vs, at=["seed0/20"], rank=2)
        >>> gl.subspaces.principal_angles(vs[1], spaces[1]).shape  # degrees
        (1,)
    """
    # scipy takes sines of small angles, whose cosines round to 1
    return np.degrees(subspace_angles(one.basis.T.astype(np.float64), other.basis.T.astype(np.float64)))[::-1]


def share_within(vectors: Float[np.ndarray, "prompt d_model"], span: Span) -> float:
    """Share of the vectors' summed squared length within a span with basis Q: Σ‖Q x‖² / Σ‖x‖².

    Examples:
        >>> drifts = given.of("seed0/20")[:, 1] - given.of("anchor")[:, 1]
        >>> 0 < gl.subspaces.share_within(drifts, vs[1]) < 1
        True
    """
    vectors = vectors.astype(np.float64)
    return float(((vectors @ span.basis.T.astype(np.float64)) ** 2).sum() / (vectors**2).sum())


Like = TypeVar("Like", bound=Span | Spans)


def random_like(
    spans: Like, *, rng: Generator, states: Float[np.ndarray, "prompt layer d_model"] | None = None
) -> Like:
    """Draw random directions or subspaces matched in layer, rank and distance: the placebo.

    GravlensError for no directions, states of other layers, or states that do not vary.

    Args:
        spans: one or several; undefined directions are left out.
        states: [prompt, layer, d_model]; draw random mixtures Σ_i g_i (h_i − mean h), g normal and the same at every
            layer, instead of isotropically (then one vector for all layers).

    Examples:
        >>> placebo = gl.directions.random_like(vs, rng=rng)
        >>> bool(np.allclose(placebo.distances, vs.distances))
        True
    """
    several: Any = Subspaces((spans,)) if isinstance(spans, Subspace) else spans
    if not isinstance(several, Subspaces):
        directions = Directions.of(several)
        several, states = (directions.defined(), None) if states is None else defined_columns(directions, states)
    elif states is not None:
        check_columns(states, several.layers)
    twins: Any = type(several)(tuple(_random_twins(tuple(several), rng, states)))
    return next(iter(twins)) if isinstance(spans, Direction | Subspace) else twins


def _random_twins(
    spans: Sequence[Any], rng: Generator, states: Float[np.ndarray, "prompt layer d_model"] | None
) -> Iterator[Any]:
    # One draw for all layers: v_rev of neighbouring blocks has a cosine of .90 to .99, and a twin drawn anew in each
    # block would be a weaker intervention than the direction that it stands for.
    width = spans[0].basis.shape[1] if states is None else len(states)
    drawn = rng.standard_normal((max(len(span.basis) for span in spans), width))
    for i, span in enumerate(spans):
        vectors, name = drawn[: len(span.basis)], "isotropic" if states is None else "covariance_matched"
        if states is not None:
            vectors = vectors @ (states[:, i].astype(np.float64) - states[:, i].mean(0, dtype=np.float64))
        place: dict[str, Any] = {"layer": span.layer, "distance": span.distance, "name": name}
        # span_of orthonormalises, which may flip a single vector
        twin = direction_from(vectors[0], **place) if isinstance(span, Direction) else span_of(vectors, **place)
        yield replace(twin, prompts=span.prompts)  # by the digest `follow` tells given from held out
