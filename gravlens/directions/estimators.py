"""Alternative estimators of v_rev for `locate_vrev(..., estimator=...)`.

Each estimates only the direction. Its length is the mean difference's projection on it, so that distances and fractions
are comparable between estimators; the projection also orients the direction from anchor to witness.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression

from gravlens.core.errors import GravlensError
from gravlens.directions.covariance import whitening
from gravlens.directions.vrev import States, Vector, difference_of_means

__all__ = ["difference_of_means", "first_component", "geometric_median", "lda", "logistic_probe"]


STEPS, TOLERANCE = 1000, 1e-9  # of Weiszfeld's iteration; the tolerance is a share of the longest difference


def geometric_median(witness: States, anchor: States) -> Vector:
    """Geometric median of the paired differences Δ = h(x; witness) − h(x; anchor): argmin_m Σ ‖Δ − m‖ (Weiszfeld 1937).

    Robust to odd prompts up to half of them; its length, the mean difference's projection, is not. GravlensError for
    states of different prompts.

    Examples:
        >>> vs = gl.locate_vrev(given, estimator=gl.estimators.geometric_median)
        >>> vs[1].estimator
        'geometric_median'
    """
    differences = _paired(witness, anchor)
    near = TOLERANCE * float(np.linalg.norm(differences, axis=1).max())
    if near == 0:
        return np.zeros(differences.shape[1])
    median = differences.mean(0)
    for _ in range(STEPS):
        # bounded: a difference on which the median falls would get infinite weight
        weights = 1 / np.maximum(np.linalg.norm(differences - median, axis=1), near)
        last, median = median, weights @ differences / weights.sum()
        if np.linalg.norm(median - last) <= near:
            break
    return _along(median, witness, anchor)


def first_component(witness: States, anchor: States) -> Vector:
    """First right singular vector of the paired differences Δ, not centred: the unit v with the largest Σ⟨Δ, v⟩².

    Centring would remove the mean difference itself. Prompts that differ more strongly than the mean dominate it.
    GravlensError for states of different prompts.

    Examples:
        >>> vs = gl.locate_vrev(given, estimator=gl.estimators.first_component)
        >>> vs[1].estimator
        'first_component'
    """
    return _along(np.linalg.svd(_paired(witness, anchor), full_matrices=False)[2][0], witness, anchor)


def logistic_probe(witness: States, anchor: States) -> Vector:
    """Weights of a logistic regression of witness against anchor states (scikit-learn, ridge, C = 1).

    Where they are separable, as usual with fewer prompts than dimensions, the ridge selects one of many directions.

    Examples:
        >>> vs = gl.locate_vrev(given, estimator=gl.estimators.logistic_probe)
        >>> vs[1].estimator
        'logistic_probe'
    """
    states = np.concatenate([anchor, witness]).astype(np.float64)
    states -= states.mean(0)
    spread = np.sqrt(np.mean(states**2))  # one number for all dimensions: C then means the same at every layer
    if spread == 0:
        return np.zeros(states.shape[1])
    labels = np.repeat([0, 1], [len(anchor), len(witness)])
    probe = LogisticRegression(max_iter=10_000, tol=1e-6).fit(states / spread, labels)
    return _along(probe.coef_[0], witness, anchor)


def lda(witness: States, anchor: States) -> Vector:
    """Shrinkage LDA: Σ⁻¹ (mean(witness) − mean(anchor)), Σ the pooled within covariance (Ledoit and Wolf 2004).

    This direction *reads out* the difference best; states do not move along it: a move along the mean difference has a
    small cosine with it where Σ is anisotropic. So read its cosine with a drift in whitened geometry:
    ⟨drift, Σ⁻¹ difference⟩ = ⟨Σ^(−1/2) drift, Σ^(−1/2) difference⟩, and the lengths are those of the right side.
    GravlensError for states that do not vary over prompts (a single prompt, for example).

    Examples:
        >>> vs = gl.locate_vrev(given, estimator=gl.estimators.lda)
        >>> vs[1].estimator
        'lda'
    """
    # pooled about each mean: centring both together would count the difference itself as spread
    within = np.concatenate([states - states.mean(0, dtype=np.float64) for states in (witness, anchor)])
    if not within.any():
        given = f"The states of {len(witness)} prompts do not vary within witness or anchor."
        wanted = "lda needs a covariance, in each half of the prompts for the reliability."
        raise GravlensError(given, wanted, "four prompts or more, or estimator=difference_of_means.")
    root = whitening(within)  # Σ^(−1/2), symmetric
    return _along(root @ (root @ difference_of_means(witness, anchor)), witness, anchor)


def _paired(witness: States, anchor: States) -> States:
    if len(witness) != len(anchor):
        given = f"{len(witness)} states of the witness and {len(anchor)} of the anchor were given."
        raise GravlensError(given, "This estimator takes paired differences.", "residuals of one prompt set.")
    return witness.astype(np.float64) - anchor


def _along(direction: Vector, witness: States, anchor: States) -> Vector:
    """Project the mean difference onto a direction; a zero direction gives zeros."""
    squares = float(direction @ direction) or 1.0
    return direction * (direction @ difference_of_means(witness, anchor) / squares)
