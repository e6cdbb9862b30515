"""Ledoit–Wolf covariance of a few samples in many dimensions: its matrix, draws from it, whitening by it.

The sample covariance S of n samples in d > n dimensions is singular. Ledoit and Wolf ("A well-conditioned estimator for
large-dimensional covariance matrices", J. Multivariate Analysis 88, 2004) shrink it towards a multiple of the identity:
Σ = (1 − δ) S + δ μ I, μ = tr(S)/d, with δ estimated from the samples (`sklearn.covariance`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from jaxtyping import Float
from numpy.random import Generator
from sklearn.covariance import ledoit_wolf_shrinkage

from gravlens.core.errors import GravlensError

Samples: TypeAlias = Float[np.ndarray, "sample d_model"]
SamplesByLayer: TypeAlias = Float[np.ndarray, "sample layer d_model"]
Matrix: TypeAlias = Float[np.ndarray, "d_model d_model"]
SINGULAR_BELOW = 1e-12  # share of the mean eigenvalue: below it is rounding, which must not be divided by


@dataclass(frozen=True, eq=False)
class Covariance:
    """A covariance Σ, shrunk or not, stored as its samples: no [d, d] matrix until one is needed.

    Attributes:
        deviations: [sample, d_model], (centred) samples divided by √n, so that S is their Gram matrix.
        shrinkage: δ, 0 (the sample covariance S) to 1 (a multiple of the identity).
        scale: μ, the mean eigenvalue, squared residual units.
    """

    deviations: Samples = field(repr=False)
    shrinkage: float
    scale: float

    @property
    def matrix(self) -> Matrix:
        """Σ itself."""
        plain = self.deviations.T @ self.deviations
        return (1 - self.shrinkage) * plain + self.shrinkage * self.scale * np.eye(len(plain))

    def draw(self, mixture: Float[np.ndarray, "draw sample"], rng: Generator) -> Float[np.ndarray, "draw d_model"]:
        """Draw √(1 − δ) gᵀX/√n + √(δμ) z, with covariance Σ for standard normal g (`mixture`) and z."""
        drawn = np.sqrt(1 - self.shrinkage) * (mixture @ self.deviations)
        if self.shrinkage:
            drawn += np.sqrt(self.shrinkage * self.scale) * rng.standard_normal(drawn.shape)
        return drawn


def estimate_covariance(samples: Samples, *, centred: bool = True, shrunk: bool = True) -> Covariance:
    """Estimate the covariance of samples [sample, d_model] in fp64.

    Args:
        samples: residual units; GravlensError for fewer than two, or a value that is not finite.
        centred: about the samples' mean; False: about 0 (second moment), so that what all samples share counts.
        shrunk: by Ledoit and Wolf; False: the sample covariance.
    """
    values = np.asarray(samples, dtype=np.float64)
    if values.ndim != 2 or len(values) < 2 or not np.isfinite(values).all():
        given = f"Samples of shape {values.shape}{'' if np.isfinite(values).all() else ', not all finite,'} were given."
        raise GravlensError(given, "A covariance needs two finite samples or more.", "the states of more prompts.")
    values = values - values.mean(0) if centred else values
    scale = float((values**2).mean())
    # δ does not depend on the unit; samples without spread have none
    shrink = shrunk and scale > 0
    shrinkage = float(ledoit_wolf_shrinkage(values / np.sqrt(scale), assume_centered=True)) if shrink else 0.0
    return Covariance(values / np.sqrt(len(values)), shrinkage, scale)


def shrunk_covariance(samples: Samples, *, centred: bool = True) -> Matrix:
    """The Ledoit–Wolf matrix (1 − δ) S + δ μ I, squared residual units; arguments as `estimate_covariance`."""
    return estimate_covariance(samples, centred=centred).matrix


def whitening(samples: Samples, *, centred: bool = True) -> Matrix:
    """The symmetric Σ^(−1/2) of the Ledoit–Wolf covariance, in 1 / residual units; arguments as `estimate_covariance`.

    GravlensError where Σ is singular: samples without spread in some direction, and no shrinkage.
    """
    covariance = estimate_covariance(samples, centred=centred)
    # SVD of the samples: forming S would square the condition number
    _, lengths, rows = np.linalg.svd(covariance.deviations, full_matrices=False)
    floor = covariance.shrinkage * covariance.scale  # the eigenvalue of every direction that the samples do not span
    values = (1 - covariance.shrinkage) * lengths**2 + floor
    width = rows.shape[1]
    least = min(values.min(), floor) if len(rows) < width else values.min()
    if not least > SINGULAR_BELOW * covariance.scale:
        given = f"The covariance of {len(samples)} samples in {width} dimensions is singular."
        raise GravlensError(given, "Whitening divides by it.", "more samples.")
    if len(rows) == width:  # the samples span everything: no floor to add
        return (rows.T / np.sqrt(values)) @ rows
    return (rows.T * (values**-0.5 - floor**-0.5)) @ rows + np.eye(width) / np.sqrt(floor)


def participation_ratio(samples: Samples, *, centred: bool = True, shrunk: bool = False) -> float:
    """(Σλ)² / Σλ² over the covariance's eigenvalues: the effective number of dimensions, 1 to d_model.

    Unshrunk it is at most n − 1 for n samples; shrinkage pulls it towards d_model. NaN without variance. Arguments as
    `estimate_covariance`.
    """
    covariance = estimate_covariance(samples, centred=centred, shrunk=shrunk)
    deviations, delta, mean = covariance.deviations, covariance.shrinkage, covariance.scale
    width = deviations.shape[1]
    # the traces need no eigenvalues, and the smaller Gram matrix has the same
    gram = deviations @ deviations.T if len(deviations) < width else deviations.T @ deviations
    # of the eigenvalues (1 − δ) λ + δ μ, whose sum is d μ
    squares = (1 - delta) ** 2 * (gram**2).sum() + (2 - delta) * delta * width * mean**2
    return float((width * mean) ** 2 / squares) if squares else float("nan")


def draw_from_covariance(
    samples: SamplesByLayer, *, draws: int, rng: Generator, centred: bool = True, shrunk: bool = True
) -> Float[np.ndarray, "draw layer d_model"]:
    """Draw from N(0, Σ) of each layer, with the layers of a draw correlated as those of a sample.

    √(1 − δ) gᵀX/√n + √(δμ) z: one mixture g of the samples serves all layers of a draw, so the covariance *between*
    layers is the samples' own, times √(1 − δ) of either; z is drawn per layer. Arguments as `estimate_covariance`.
    """
    return np.stack(list(draws_by_layer(samples, draws=draws, rng=rng, centred=centred, shrunk=shrunk)), axis=1)


def draws_by_layer(
    samples: SamplesByLayer, *, draws: int, rng: Generator, centred: bool = True, shrunk: bool = True
) -> Iterator[Float[np.ndarray, "draw d_model"]]:
    """`draw_from_covariance` layer by layer, for draws that do not fit into memory at once."""
    mixture = rng.standard_normal((draws, len(samples)))  # once: the layers of a draw belong together
    for layer in range(samples.shape[1]):
        yield estimate_covariance(samples[:, layer], centred=centred, shrunk=shrunk).draw(mixture, rng)
