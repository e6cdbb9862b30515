"""Geometries of the residual stream: is an alignment more than a few dominant dimensions?

A geometry is one linear map per layer, fitted on the anchor's states of the probes, never on a drift. Map the residuals
with `apply`; `follow` and all else then work on them unchanged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float

from gravlens.activations.residuals import Residuals, check_states, state_length
from gravlens.core.errors import GravlensError
from gravlens.directions.covariance import whitening
from gravlens.directions.direction import TOP, Directions
from gravlens.directions.vrev import Estimator, difference_of_means, locate_vrev

__all__ = ["Geometry", "centred", "locate_in", "raw", "standardised", "whitened", "without_dimensions", "without_top"]

AXES = 512  # unit vectors mapped to estimate a map's gain; all d_model of a large model would take a [d, d] product
LinearMap = Callable[[Float[np.ndarray, "*batch d_model"]], Float[np.ndarray, "*batch d_model"]]


@dataclass(frozen=True, eq=False)
class Geometry:
    """One linear map per layer.

    Attributes:
        name: in tables and metadata.
        maps: layer -> map of fp64 states [..., d_model], shape preserved.

    Examples:
        >>> geometry = gl.geometry.Geometry("doubled", {layer: lambda states: 2 * states for layer in given.layers})
        >>> geometry.apply(given).values.shape
        (8, 6, 3, 32)
    """

    name: str
    maps: Mapping[int, LinearMap] = field(repr=False)

    def apply(self, residuals: Residuals) -> Residuals:
        """Map every state; `meta["geometry"]` and each source name the geometry.

        GravlensError for residuals that are already mapped, or of layers without a map.
        """
        if check_states(residuals).meta.get("geometry", "raw") != "raw":
            given = f"These residuals are in the {residuals.meta['geometry']} geometry already."
            raise GravlensError(given, f"The {self.name} geometry is for raw states.", "residuals of cache_residuals.")
        if missing := [layer for layer in residuals.layers if layer not in self.maps]:
            given = f"The {self.name} geometry has no map of layer {', '.join(map(str, missing))}."
            raise GravlensError(given, f"Fitted: {', '.join(map(str, self.maps))}.", "a geometry fitted on those too.")
        values = np.empty_like(residuals.values)
        for i, layer in enumerate(residuals.layers):
            # layer by layer: an fp64 copy of all residuals would double their memory
            values[:, :, i] = self.maps[layer](residuals.values[:, :, i].astype(np.float64))
        return replace(residuals, values=values, meta=residuals.meta | self._facts(residuals))

    def _facts(self, residuals: Residuals) -> dict[str, Any]:
        sources = residuals.meta.get("sources", {})
        named = {name: f"{sources.get(name, name)} ({self.name} geometry)" for name in residuals.checkpoints}
        facts: dict[str, Any] = {"geometry": self.name} | ({"sources": named} if self.name != "raw" else {})
        if "anchor" in residuals.checkpoints:  # the map shortens or lengthens the rounding's noise like the states
            gains = [_gain(self.maps[layer], residuals.values.shape[-1]) for layer in residuals.layers]
            lengths = [state_length(residuals, layer) for layer in residuals.layers]
            facts["state_lengths"] = [length * gain for length, gain in zip(lengths, gains, strict=True)]
        return facts


Fit = Callable[[Residuals], Geometry]


def locate_in(geometry: Geometry, residuals: Residuals, *, estimator: Estimator = difference_of_means) -> Directions:
    """Locate v_rev of all layers in a geometry; vectors and distances are for `geometry.apply(...)` alone.

    Like `locate_vrev(geometry.apply(residuals))`, but undefined where the difference is noise: a map can remove the
    difference and keep the noise, or lengthen it. The floor is the raw one (docs/directions.md) times the root mean
    square length of mapped unit vectors; a layer undefined in the raw states stays undefined. `residuals` are raw, on
    the probes that the geometry was fitted on.

    Examples:
        >>> geometry = gl.geometry.whitened(given)
        >>> tr = gl.follow(geometry.apply(held_out), gl.geometry.locate_in(geometry, given))
        >>> tr.layers_in_mean
        (0, 1, 2)
    """
    plain = locate_vrev(residuals)  # difference of means: is there any difference?
    found = []
    for direction in locate_vrev(geometry.apply(residuals), estimator=estimator):
        undefined = plain[direction.layer].undefined or direction.undefined
        made_from = {**direction.made_from, "geometry": geometry.name}
        facts: dict[str, Any] = {"made_from": made_from, "undefined": undefined}
        if undefined is not None:
            # as locate_vrev marks it
            facts |= {"vector": np.full_like(direction.vector, np.nan), "reliability": float("nan")}
        found.append(replace(direction, **facts))
    return Directions(tuple(found))


def raw(residuals: Residuals) -> Geometry:
    """The residual stream unchanged, h ← h.

    Examples:
        >>> gl.geometry.raw(given).name
        'raw'
    """
    check_states(residuals)
    return Geometry("raw", dict.fromkeys(residuals.layers, lambda states: states))


def centred(residuals: Residuals) -> Geometry:
    """Remove each state's mean over d_model, h ← h − mean(h), as every LayerNorm does before it reads.

    Nothing is fitted. (Subtracting the prompts' mean state would change no difference between checkpoints.)

    Examples:
        >>> states = gl.geometry.centred(given).apply(given).values
        >>> bool(abs(states.mean(-1)).max() < 1e-3)
        True
    """
    width = residuals.values.shape[-1]
    # the unit vector of ones: without it a mean is 0
    return Geometry("centred", dict.fromkeys(residuals.layers, partial(_without, np.full((1, width), width**-0.5))))


def standardised(residuals: Residuals) -> Geometry:
    """Divide each dimension by its standard deviation over the anchor's states, h_j ← h_j / σ_j.

    Dimensions without variation are dropped. GravlensError for fewer than two prompts.

    Examples:
        >>> geometry = gl.geometry.standardised(given)
        >>> geometry.apply(held_out).values.shape
        (8, 6, 3, 32)
    """
    return Geometry("standardised", _fitted(residuals, _standardising))


def whitened(residuals: Residuals) -> Geometry:
    """Σ^(−1/2) of the anchor's states, Σ shrunk (Ledoit and Wolf 2004): squared lengths are Mahalanobis distances.

    Drifts drawn from Σ are isotropic here. With fewer prompts than dimensions Σ is mostly the shrinkage target: all
    directions that the probes do not span get the same unit. GravlensError for fewer than two prompts or a singular Σ.

    Examples:
        >>> geometry = gl.geometry.whitened(given)
        >>> tr = gl.follow(geometry.apply(held_out), gl.geometry.locate_in(geometry, given))
    """
    return Geometry("whitened", _fitted(residuals, _whitening))


def without_top(residuals: Residuals, *, k: int = 1) -> Geometry:
    """Remove the first k principal components of the anchor's (centred) states: h ← h − QᵀQ h.

    GravlensError where k is not between 1 and the number of components, or for fewer than two prompts.

    Examples:
        >>> gl.geometry.without_top(given, k=1).apply(given).values.shape
        (8, 6, 3, 32)
    """
    check_states(residuals)
    most = min(residuals.values.shape[1] - 1, residuals.values.shape[-1])
    if not 1 <= k <= most:
        given = f"The first {k} components were to be removed."
        raise GravlensError(given, f"{residuals.values.shape[1]} prompts have {most}.", f"k from 1 to {most}.")

    def fit(states: np.ndarray) -> LinearMap:
        return partial(_without, np.linalg.svd(states - states.mean(0), full_matrices=False)[2][:k])

    return Geometry(f"without_top_{k}", _fitted(residuals, fit))


def without_dimensions(residuals: Residuals, *, k: int = TOP) -> Geometry:
    """Set the k dimensions to 0 that hold most of v_rev: h_j ← 0 where |v_j| is among the k largest, layer by layer.

    Is an alignment that of a few massive dimensions alone? `follow` in this geometry compares drift and v_rev in all
    others. Fitted on `witness` and `anchor`; GravlensError where k is not between 1 and d_model − 1.

    Examples:
        >>> states = gl.geometry.without_dimensions(given, k=3).apply(given).values
        >>> int((states[0, 0, 1] == 0).sum())
        3
    """
    width = check_states(residuals).values.shape[-1]
    if not 1 <= k < width:
        given = f"The {k} largest dimensions were to be removed."
        raise GravlensError(given, f"States have {width}.", f"k from 1 to {width - 1}.")
    kept = np.ones((len(residuals.layers), width))
    for row, direction in zip(kept, locate_vrev(residuals), strict=True):
        row[list(direction.top_dimensions(k))] = 0
    maps = {layer: partial(np.multiply, row) for layer, row in zip(residuals.layers, kept, strict=True)}
    return Geometry(f"without_dimensions_{k}", maps)


GEOMETRIES: tuple[Fit, ...] = (raw, centred, standardised, whitened, without_top, partial(without_top, k=3))


def _fitted(residuals: Residuals, fit: Callable[[np.ndarray], LinearMap]) -> dict[int, LinearMap]:
    """Fit a map per layer on the anchor's states [prompt, d_model] in fp64."""
    check_states(residuals)
    states = residuals.of("anchor").astype(np.float64)
    if len(states) < 2:
        given = "The anchor's states of one prompt were given."
        raise GravlensError(given, "A geometry is fitted on their spread.", "two probes; raw and centred need none.")
    return {layer: fit(states[:, i]) for i, layer in enumerate(residuals.layers)}


def _standardising(states: np.ndarray) -> LinearMap:
    spread = states.std(0)
    varies = spread > 2.0**-23 * np.abs(states).max(0)  # beyond the rounding of fp32
    weights = np.divide(1, spread, out=np.zeros_like(spread), where=varies)
    return lambda states: states * weights


def _whitening(states: np.ndarray) -> LinearMap:
    root = whitening(states)
    return lambda given: given @ root.T


def _gain(linear: LinearMap, width: int) -> float:
    """Root mean square length of mapped unit vectors, over evenly spaced axes."""
    axes = np.eye(width)[:: ceil(width / AXES)]
    return float(np.sqrt(np.mean(np.sum(linear(axes) ** 2, axis=1))))


def _without(rows: np.ndarray, states: np.ndarray) -> np.ndarray:
    return states - (states @ rows.T) @ rows
