"""Other estimators of v_rev: each an `Estimator` for `locate_vrev(..., estimator=...)`.

Only the direction is the estimator's. The length is the mean difference's projection on it, so that distances and
fractions of different estimators are of one kind; it also turns the direction from the anchor towards the witness.
"""

import numpy as np
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression

from gravlens.core.errors import GravlensError
from gravlens.directions.covariance import whitening
from gravlens.directions.vrev import difference_of_means

__all__ = ["difference_of_means", "first_component", "geometric_median", "lda", "logistic_probe"]

STEPS, TOLERANCE = 1000, 1e-9  # of Weiszfeld's iteration; the tolerance is a share of the longest difference


def geometric_median(
    witness: Float[np.ndarray, "prompt d_model"], anchor: Float[np.ndarray, "prompt d_model"]
) -> Float[np.ndarray, " d_model"]:
    """The point m nearest to all paired differences Δ = h(x; witness) − h(x; anchor): argmin_m Σ ‖Δ − m‖.

    Robust: prompts that differ in some odd way move it little as long as they are less than half (Weiszfeld 1937). Its
    length is the mean difference's projection, which is not robust.

    Raises:
        GravlensError: witness and anchor were not read on the same prompts.
    """
    differences = _paired(witness, anchor)
    near = TOLERANCE * float(np.linalg.norm(differences, axis=1).max())
    if near == 0:
        return np.zeros(differences.shape[1])
    median = differences.mean(0)
    for _ in range(STEPS):
        # a difference on which the median falls would weigh infinitely much
        weights = 1 / np.maximum(np.linalg.norm(differences - median, axis=1), near)
        last, median = median, weights @ differences / weights.sum()
        if np.linalg.norm(median - last) <= near:
            break
    return _along(median, witness, anchor)


def first_component(
    witness: Float[np.ndarray, "prompt d_model"], anchor: Float[np.ndarray, "prompt d_model"]
) -> Float[np.ndarray, " d_model"]:
    """First right singular vector of the paired differences Δ, not centred: the unit v with the largest Σ⟨Δ, v⟩².

    Centring would take out the mean difference itself. Where single prompts differ more strongly than the mean does,
    they and not the mean give the direction. Its length is the mean difference's projection, residual units.

    Raises:
        GravlensError: witness and anchor were not read on the same prompts.
    """
    return _along(np.linalg.svd(_paired(witness, anchor), full_matrices=False)[2][0], witness, anchor)


def logistic_probe(
    witness: Float[np.ndarray, "prompt d_model"], anchor: Float[np.ndarray, "prompt d_model"]
) -> Float[np.ndarray, " d_model"]:
    """Weights of a logistic regression that tells the witness's states from the anchor's (scikit-learn, ridge, C = 1).

    The states are divided by one number, their spread, so that C means the same at every layer. Where the two are
    separable, as usual with fewer prompts than dimensions, the ridge decides which of many directions it is. Its length
    is the mean difference's projection, residual units.
    """
    states = np.concatenate([anchor, witness]).astype(np.float64)
    states -= states.mean(0)
    spread = np.sqrt(np.mean(states**2))
    if spread == 0:
        return np.zeros(states.shape[1])
    labels = np.repeat([0, 1], [len(anchor), len(witness)])
    probe = LogisticRegression(max_iter=10_000, tol=1e-6).fit(states / spread, labels)
    return _along(probe.coef_[0], witness, anchor)


def lda(
    witness: Float[np.ndarray, "prompt d_model"], anchor: Float[np.ndarray, "prompt d_model"]
) -> Float[np.ndarray, " d_model"]:
    """Shrinkage LDA: Σ⁻¹ (mean(witness) − mean(anchor)), Σ the covariance within the two (Ledoit and Wolf 2004).

    This direction *reads out* the difference best; it is not where the states move. A state that moves along the mean
    difference has a small cosine with it where Σ is anisotropic. So read its cosine with a drift in whitened geometry:
    ⟨drift, Σ⁻¹ difference⟩ = ⟨Σ^(−1/2) drift, Σ^(−1/2) difference⟩, and the lengths are those of the right side.

    Raises:
        GravlensError: the states do not vary over prompts, so there is no covariance (one prompt, for example).
    """
    within = np.concatenate([states - states.mean(0, dtype=np.float64) for states in (witness, anchor)])
    if not within.any():
        raise GravlensError(
            f"The states of {len(witness)} prompts do not vary within witness or anchor.",
            "lda needs their covariance, and the reliability that of each half of the prompts: four prompts at least.",
            "more prompts, or estimator=difference_of_means.",
        )
    root = whitening(within)  # Σ^(−1/2), symmetric
    return _along(root @ (root @ difference_of_means(witness, anchor)), witness, anchor)


def _paired(witness: np.ndarray, anchor: np.ndarray) -> Float[np.ndarray, "prompt d_model"]:
    if len(witness) != len(anchor):
        raise GravlensError(
            f"{len(witness)} states of the witness and {len(anchor)} of the anchor were given.",
            "This estimator takes the difference at each prompt, so both are read on the same prompts.",
            "residuals of one prompt set, or estimator=difference_of_means.",
        )
    return witness.astype(np.float64) - anchor


def _along(direction: np.ndarray, witness: np.ndarray, anchor: np.ndarray) -> Float[np.ndarray, " d_model"]:
    """The mean difference's part along a line, which points towards the witness; no direction gives no length."""
    squares = float(direction @ direction)
    if squares == 0:
        return np.zeros_like(direction)
    return direction * (direction @ difference_of_means(witness, anchor) / squares)
