"""Signs flipped at random, unit by unit: all patterns of few units, draws of many."""

from itertools import product

import numpy as np
from einops import einsum
from jaxtyping import Float

# Up to here all patterns of signs are gone through (4,095 of them), above it random ones are drawn.
ALL_SIGNS_UP_TO = 12


def sign_patterns(units: int) -> Float[np.ndarray, "pattern unit"]:
    """All 2ⁿ patterns of signs; the first flips nothing."""
    return np.array(list(product((1.0, -1.0), repeat=units)))


def mean_under_signs(
    values: Float[np.ndarray, "unit step layer"], draws: int, rng: np.random.Generator
) -> Float[np.ndarray, "draw step layer"]:
    """Means over units whose signs are flipped at random; of few units, under every pattern but the true one."""
    units = len(values)
    few = units <= ALL_SIGNS_UP_TO
    signs = sign_patterns(units)[1:] if few else rng.choice((1.0, -1.0), (draws, units))
    return einsum(signs, values, "draw unit, unit step layer -> draw step layer") / units
