"""Geometries of the residual stream: what is long and what is parallel there, when a few dimensions carry a cosine.

A geometry is one linear map a layer. It is fitted on the anchor's states of the probes, never on a drift, and applied
to the states of every checkpoint; `follow` and the rest then work on the mapped states as on any others.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from typing import Any

import numpy as np
from jaxtyping import Float

from gravlens.activations.residuals import Residuals, check_states
from gravlens.core.errors import GravlensError
from gravlens.directions.covariance import whitening
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import Estimator, difference_of_means, locate_vrev, noise_floor

AXES = 512  # number of unit vectors mapped to see how much a map lengthens noise
LinearMap = Callable[[Float[np.ndarray, "*batch d_model"]], Float[np.ndarray, "*batch d_model"]]


@dataclass(frozen=True, eq=False)
class Geometry:
    """One linear map a layer.

    Attributes:
        name: its name in tables and in the metadata of mapped states and directions.
        maps: layer -> map of states [..., d_model] in fp64 to states of the same shape.
    """

    name: str
    maps: Mapping[int, LinearMap] = field(repr=False)

    def apply(self, residuals: Residuals) -> Residuals:
        """The residuals with every state mapped; `meta["geometry"]` and each source name the geometry.

        Raises:
            GravlensError: residuals of another geometry already, or of layers that it was not fitted on.
        """
        if check_states(residuals).meta.get("geometry", "raw") != "raw":
            raise GravlensError(
                f"These residuals are in the {residuals.meta['geometry']} geometry already.",
                f"A geometry ({self.name}) is fitted on raw states and applied to raw states.",
                "the residuals that cache_residuals returned.",
            )
        if missing := [layer for layer in residuals.layers if layer not in self.maps]:
            raise GravlensError(
                f"The {self.name} geometry has no map of layer {', '.join(map(str, missing))}.",
                f"It was fitted on layers {', '.join(map(str, self.maps))}.",
                "a geometry fitted on residuals with those layers.",
            )
        values = np.empty_like(residuals.values)
        for i, layer in enumerate(residuals.layers):
            values[:, :, i] = self.maps[layer](residuals.values[:, :, i].astype(np.float64))
        return replace(residuals, values=values, meta=residuals.meta | self._facts(residuals))

    def _facts(self, residuals: Residuals) -> dict[str, Any]:
        sources = residuals.meta.get("sources", {})
        named = {name: f"{sources.get(name, name)} ({self.name} geometry)" for name in residuals.checkpoints}
        return {"geometry": self.name} | ({"sources": named} if self.name != "raw" else {})


Fit = Callable[[Residuals], Geometry]


def locate_in(geometry: Geometry, residuals: Residuals, *, estimator: Estimator = difference_of_means) -> Directions:
    """v_rev of all layers in a geometry: unit vectors and distances of *its* space, for `geometry.apply(...)` alone.

    `locate_vrev(geometry.apply(residuals))`, but for layers where the difference is noise: a map can remove the
    difference and keep the noise, or lengthen it. The floor is the raw one (docs/directions.md) times the root mean
    square length that the map gives to a unit vector; a layer without a v_rev in the raw states has none here.

    Args:
        geometry: fitted on the same probes.
        residuals: raw states that hold `witness` and `anchor`.
        estimator: (witness states, anchor states) [prompt, d_model] -> [d_model], in the geometry.
    """
    width, plain = residuals.values.shape[-1], locate_vrev(residuals)
    found = []
    for direction in locate_vrev(geometry.apply(residuals), estimator=estimator):
        floor = noise_floor(residuals, direction.layer) * _gain(geometry.maps[direction.layer], width)
        undefined = plain[direction.layer].undefined or direction.undefined
        if undefined is None and not direction.distance > floor:
            undefined = f"witness and anchor differ by {direction.distance:.2g} in the {geometry.name} geometry, where "
            undefined += f"the forward pass's own noise reaches {floor:.2g}"
        facts: dict[str, Any] = {
            "made_from": {**direction.made_from, "geometry": geometry.name},
            "undefined": undefined,
        }
        if undefined is not None:
            facts |= {"vector": np.full_like(direction.vector, np.nan), "reliability": float("nan")}
        found.append(replace(direction, **facts))
    return Directions(tuple(found))


def raw(residuals: Residuals) -> Geometry:
    """The residual stream as it is, h ← h."""
    check_states(residuals)
    return Geometry("raw", dict.fromkeys(residuals.layers, _same))


def centred(residuals: Residuals) -> Geometry:
    """Each state's own mean over d_model removed, h ← h − mean(h), which every LayerNorm removes before it reads.

    Nothing is fitted. (Subtracting the prompts' mean state would change no difference between checkpoints.)
    """
    width = residuals.values.shape[-1]
    return Geometry("centred", dict.fromkeys(residuals.layers, partial(_without, np.full((1, width), width**-0.5))))


def standardised(residuals: Residuals) -> Geometry:
    """Each dimension in units of its own standard deviation over the anchor's states, h_j ← h_j / σ_j: none outweighs.

    A dimension in which the anchor's states do not vary has no such unit and is left out.

    Raises:
        GravlensError: states of fewer than two prompts.
    """
    return Geometry("standardised", _fitted(residuals, _standardising))


def whitened(residuals: Residuals) -> Geometry:
    """Σ^(−1/2) of the anchor's states, Σ shrunk by Ledoit and Wolf (2004): squared lengths are Mahalanobis distances.

    Chance alignment of drifts that are drawn from Σ is isotropic here. With fewer prompts than dimensions most of Σ is
    the shrinkage target: directions in which the probes do not vary all get one and the same unit.

    Raises:
        GravlensError: states of fewer than two prompts, or a singular Σ.
    """
    return Geometry("whitened", _fitted(residuals, lambda states: partial(_mixed, whitening(states))))


def without_top(residuals: Residuals, *, k: int = 1) -> Geometry:
    """The first k principal components of the anchor's states (centred over prompts) removed: h ← h − QᵀQ h.

    Args:
        residuals: hold the anchor's states of the probes.
        k: how many.

    Raises:
        GravlensError: k is not between 1 and the number of components, or there are fewer than two prompts.
    """
    check_states(residuals)
    most = min(residuals.values.shape[1] - 1, residuals.values.shape[-1])
    if not 1 <= k <= most:
        raise GravlensError(
            f"The first {k} components were to be removed.",
            f"States of {residuals.values.shape[1]} prompts in {residuals.values.shape[-1]} dimensions have {most}.",
            f"k from 1 to {most}, or more prompts.",
        )
    return Geometry(f"without_top_{k}", _fitted(residuals, lambda states: partial(_without, _components(states)[:k])))


# Each fits a geometry on residuals that hold the anchor's states of the probes.
GEOMETRIES: tuple[Fit, ...] = (raw, centred, standardised, whitened, without_top, partial(without_top, k=3))


def _fitted(residuals: Residuals, fit: Callable[[np.ndarray], LinearMap]) -> dict[int, LinearMap]:
    """layer -> map, each fitted on the anchor's states [prompt, d_model] in fp64."""
    check_states(residuals)
    states = residuals.of("anchor").astype(np.float64)
    if len(states) < 2:
        raise GravlensError(
            "The anchor's states of one prompt were given.",
            "A geometry needs their spread over prompts.",
            "two probes at least; raw and centred need none.",
        )
    return {layer: fit(states[:, i]) for i, layer in enumerate(residuals.layers)}


def _standardising(states: np.ndarray) -> LinearMap:
    spread = states.std(0)
    varies = spread > 2.0**-23 * np.abs(states).max(0)  # beyond the rounding of fp32
    return partial(_scaled, np.divide(1, spread, out=np.zeros_like(spread), where=varies))


def _components(states: np.ndarray) -> Float[np.ndarray, "component d_model"]:
    return np.linalg.svd(states - states.mean(0), full_matrices=False)[2]


def _gain(linear: LinearMap, width: int) -> float:
    """Root mean square length of mapped unit vectors, over axes spread evenly."""
    axes = np.eye(width)[:: ceil(width / AXES)]
    return float(np.sqrt(np.mean(np.sum(linear(axes) ** 2, axis=1))))


def _same(states: np.ndarray) -> np.ndarray:
    return states


def _scaled(weights: np.ndarray, states: np.ndarray) -> np.ndarray:
    return states * weights


def _without(rows: np.ndarray, states: np.ndarray) -> np.ndarray:
    return states - (states @ rows.T) @ rows


def _mixed(matrix: np.ndarray, states: np.ndarray) -> np.ndarray:
    return states @ matrix.T
