"""Covariance of a few samples in many dimensions, shrunk: its matrix, its draws, what whitens by it.

The sample covariance S of n samples in d > n dimensions is singular. Ledoit and Wolf ("A well-conditioned estimator for
large-dimensional covariance matrices", J. Multivariate Analysis 88, 2004) pull it towards a multiple of the identity:
Σ = (1 − δ) S + δ μ I with μ = tr(S)/d, and choose δ from the samples (`sklearn.covariance`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float
from sklearn.covariance import ledoit_wolf_shrinkage

from gravlens.core.errors import GravlensError

# An eigenvalue below this share of the mean one is rounding: nothing can be divided by it.
SINGULAR_BELOW = 1e-12


@dataclass(frozen=True, eq=False)
class Covariance:
    """A covariance Σ, shrunk or not, kept as the samples that it comes from: no [d, d] matrix until one is asked for.

    Attributes:
        deviations: [sample, d_model], samples less their mean (or as they are), divided by √n: S is their Gram matrix.
        shrinkage: δ, 0 (the sample covariance S) to 1 (a multiple of the identity).
        scale: μ, the mean eigenvalue, squared residual units.
    """

    deviations: Float[np.ndarray, "sample d_model"] = field(repr=False)
    shrinkage: float
    scale: float

    @property
    def matrix(self) -> Float[np.ndarray, "d_model d_model"]:
        """Σ itself."""
        plain = self.deviations.T @ self.deviations
        return (1 - self.shrinkage) * plain + self.shrinkage * self.scale * np.eye(len(plain))

    def draw(
        self, mixture: Float[np.ndarray, "draw sample"], rng: np.random.Generator
    ) -> Float[np.ndarray, "draw d_model"]:
        """√(1 − δ) gᵀX/√n + √(δμ) z: its covariance is Σ where g (`mixture`) and z are standard normal."""
        drawn = np.sqrt(1 - self.shrinkage) * (mixture @ self.deviations)
        if self.shrinkage:
            drawn += np.sqrt(self.shrinkage * self.scale) * rng.standard_normal(drawn.shape)
        return drawn


def estimate_covariance(
    samples: Float[np.ndarray, "sample d_model"], *, centred: bool = True, shrunk: bool = True
) -> Covariance:
    """The covariance of samples, in fp64.

    Args:
        samples: one per row, residual units.
        centred: about the samples' mean; False: about 0, so that what is common to all samples counts.
        shrunk: by Ledoit and Wolf; False: the sample covariance, which spans no more than the samples.

    Raises:
        GravlensError: fewer than two samples, or a value that is not finite.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
        raise GravlensError(
            f"Samples of shape {values.shape}{'' if np.isfinite(values).all() else ', not all finite,'} were given.",
            "A covariance needs at least two finite samples [sample, d_model].",
            "the states of more prompts.",
        )
    values = values - values.mean(0) if centred else values
    scale = float((values**2).mean())
    # δ does not depend on the unit; samples without spread have none
    shrink = shrunk and scale > 0
    shrinkage = float(ledoit_wolf_shrinkage(values / np.sqrt(scale), assume_centered=True)) if shrink else 0.0
    return Covariance(values / np.sqrt(len(values)), shrinkage, scale)


def shrunk_covariance(
    samples: Float[np.ndarray, "sample d_model"], *, centred: bool = True
) -> Float[np.ndarray, "d_model d_model"]:
    """The Ledoit–Wolf (2004) covariance matrix (1 − δ) S + δ μ I of samples, squared residual units.

    Args:
        samples: one per row, residual units.
        centred: S about the samples' mean, or about 0.

    Raises:
        GravlensError: fewer than two samples, or a value that is not finite.
    """
    return estimate_covariance(samples, centred=centred).matrix


def whitening(
    samples: Float[np.ndarray, "sample d_model"], *, centred: bool = True
) -> Float[np.ndarray, "d_model d_model"]:
    """The symmetric Σ^(−1/2) of the Ledoit–Wolf covariance: states times it have covariance 1 where Σ is theirs.

    Args:
        samples: one per row, residual units.
        centred: Σ about the samples' mean, or about 0.

    Returns:
        The matrix, in 1 / residual units.

    Raises:
        GravlensError: Σ is singular (samples without spread in some direction, and no shrinkage).
    """
    covariance = estimate_covariance(samples, centred=centred)
    _, lengths, rows = np.linalg.svd(covariance.deviations, full_matrices=False)
    floor = covariance.shrinkage * covariance.scale  # the eigenvalue of every direction that the samples do not span
    values = (1 - covariance.shrinkage) * lengths**2 + floor
    width = rows.shape[1]
    least = min(values.min(), floor) if len(rows) < width else values.min()
    if not least > SINGULAR_BELOW * covariance.scale:
        raise GravlensError(
            f"The covariance of {len(samples)} samples in {width} dimensions is singular.",
            "Whitening divides by its square root.",
            "samples that differ, or more of them.",
        )
    if len(rows) == width:
        return (rows.T / np.sqrt(values)) @ rows
    return (rows.T * (values**-0.5 - floor**-0.5)) @ rows + np.eye(width) / np.sqrt(floor)


def participation_ratio(
    samples: Float[np.ndarray, "sample d_model"], *, centred: bool = True, shrunk: bool = False
) -> float:
    """(Σλ)² / Σλ² over the covariance's eigenvalues: about how many directions share the variance, 1 to d_model.

    The plain one is at most n − 1 of n samples, the shrunk one is pulled towards d_model.

    Args:
        samples: one per row, in any unit.
        centred: about the samples' mean, or about 0.
        shrunk: by Ledoit and Wolf, or not.

    Returns:
        The ratio; NaN without any variance.

    Raises:
        GravlensError: fewer than two samples, or a value that is not finite.
    """
    covariance = estimate_covariance(samples, centred=centred, shrunk=shrunk)
    deviations, delta, mean = covariance.deviations, covariance.shrinkage, covariance.scale
    width = deviations.shape[1]
    gram = deviations @ deviations.T if len(deviations) < width else deviations.T @ deviations
    # of the eigenvalues (1 − δ) λ + δ μ, whose sum is d μ
    squares = (1 - delta) ** 2 * (gram**2).sum() + (2 - delta) * delta * width * mean**2
    return float((width * mean) ** 2 / squares) if squares else float("nan")


def draw_from_covariance(
    samples: Float[np.ndarray, "sample layer d_model"],
    *,
    draws: int,
    rng: np.random.Generator,
    centred: bool = True,
    shrunk: bool = True,
) -> Float[np.ndarray, "draw layer d_model"]:
    """Draws from N(0, Σ) of each layer; the layers of one draw are correlated as those of one sample are.

    √(1 − δ) gᵀX/√n + √(δμ) z: one mixture g of the samples serves all layers of a draw, so the covariance *between*
    layers is the samples' own, times √(1 − δ) of either; z is fresh in each layer. The draws are in the samples' unit,
    and no [d, d] matrix is made.

    Args:
        samples: a layer's one per row, residual units.
        draws: how many.
        rng: source of randomness.
        centred: about the samples' mean, or about 0.
        shrunk: by Ledoit and Wolf, or not.

    Raises:
        GravlensError: fewer than two samples, or a value that is not finite.
    """
    return np.stack(list(draws_by_layer(samples, draws=draws, rng=rng, centred=centred, shrunk=shrunk)), axis=1)


def draws_by_layer(
    samples: Float[np.ndarray, "sample layer d_model"],
    *,
    draws: int,
    rng: np.random.Generator,
    centred: bool = True,
    shrunk: bool = True,
) -> Iterator[Float[np.ndarray, "draw d_model"]]:
    """`draw_from_covariance` layer by layer, for where all layers at once would not fit into memory."""
    mixture = rng.standard_normal((draws, len(samples)))
    for layer in range(samples.shape[1]):
        yield estimate_covariance(samples[:, layer], centred=centred, shrunk=shrunk).draw(mixture, rng)
