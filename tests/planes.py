"""Residuals whose checkpoints lie at known places of the plane of v_rev and the rest."""

import numpy as np
import pandas as pd

from gravlens.activations.residuals import Residuals
from gravlens.directions.plane import residual_plane
from gravlens.directions.vrev import locate_vrev

WIDTH, PROMPTS = 16, 9
PLACES = {  # (along, across) in witness–anchor distances
    "witness": (1.0, 0.0),
    "anchor": (0.0, 0.0),
    "a/10": (0.25, -0.125),
    "a/2": (0.125, 0.0625),
    "b/2": (0.0, -0.5),
    "sibling": (0.5, 0.25),
}


def axes(seed: int = 0) -> np.ndarray:
    """Two orthonormal directions [2, d_model]."""
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((WIDTH, 2)))[0].T


def planted(places: dict[str, tuple[float, float]] = PLACES, distance: float = 4.0, noise: float = 0.5) -> Residuals:
    """Layers 3 and 7; on 7 the mean states lie where `places` says, and each prompt has a drift of its own."""
    rng = np.random.default_rng(1)
    anchor = 10 * rng.standard_normal((PROMPTS, 1, WIDTH))
    own = rng.standard_normal((len(places), PROMPTS, 1, WIDTH))
    own = noise * (own - own.mean(1, keepdims=True))
    means = distance * np.array(list(places.values())) @ axes()
    values = anchor + own + means[:, None, None]
    values = np.concatenate([rng.standard_normal(values.shape), values], axis=2)
    return Residuals(values.astype(np.float32), tuple(places), (3, 7), "given")


def plane(prompts: bool = False) -> pd.DataFrame:
    states = planted()
    return residual_plane(states, locate_vrev(states, layer=7), prompts=prompts)
