"""Locate v_rev: the direction from the anchor towards the witness."""

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
from jaxtyping import Float
from torch import Tensor

from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction, Directions, Source, undefined_error
from gravlens.history.sequence import ModelSequence, Prompts
from gravlens.models.placement import Placement

Estimator = Callable[[Float[np.ndarray, "prompt d_model"], Float[np.ndarray, "prompt d_model"]], np.ndarray]
FACTS = ("positions", "chat_template", "system", "contrast", "geometry")  # of the residuals, in `made_from`
# A difference below this many units of the dtype's rounding, relative to the state's norm, is the pass's own noise
# (the same prompt in another batch or with other padding differs by less: tests/test_directions.py).
NOISE_ROUNDINGS = 16.0
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def difference_of_means(
    witness: Float[np.ndarray, "prompt d_model"], anchor: Float[np.ndarray, "prompt d_model"]
) -> Float[np.ndarray, " d_model"]:
    """mean(witness) − mean(anchor), residual units, accumulated in fp64: h_l(witness) − h_l(anchor) of the paper."""
    return witness.mean(0, dtype=np.float64) - anchor.mean(0, dtype=np.float64)


@overload
def locate_vrev(
    source: Source, *, layer: int, prompts: Any = None, estimator: Estimator = difference_of_means,
    placement: Placement = Placement(),
) -> Direction: ...  # fmt: skip


@overload
def locate_vrev(
    source: Source, *, layer: Sequence[int] | None = None, prompts: Any = None,
    estimator: Estimator = difference_of_means, placement: Placement = Placement(),
) -> Directions: ...  # fmt: skip


def locate_vrev(
    source: Source,
    *,
    layer: int | Sequence[int] | None = None,
    prompts: Prompts | None = None,
    estimator: Estimator = difference_of_means,
    placement: Placement = Placement(),
) -> Direction | Directions:
    """v_rev of one layer or of all: the unit vector from the anchor's states towards the witness's.

    v_rev,l = unit(h_l(witness) − h_l(anchor)), h_l the mean over the prompts of `resid_post` at the last prompt token
    ("The Gravitational Interpretation of Fine-Tuning Reversion", arXiv 2606.28525).

    Args:
        source: a sequence or its TOML file (its probes are read), or residuals that hold `witness` and `anchor`.
        layer: one layer (a `Direction` is returned), several, or None for all (`Directions`).
        prompts: prompts to read a sequence on, instead of its probes.
        estimator: (witness states, anchor states) [prompt, d_model] -> [d_model], its length is the distance.
        placement: device and dtype that a sequence is read on (`Placement`).

    Raises:
        GravlensError: no prompts; a layer out of range; witness and anchor do not differ at the layer asked for
            beyond the forward pass's own noise. With all layers such a layer is marked (`.undefined`) instead.
    """
    if not isinstance(source, Residuals):
        sequence = ModelSequence.of(source)
        pair = (sequence.witness, sequence.anchor)
        source = cache_residuals(sequence, prompts, layers=layer, checkpoints=pair, placement=placement)
    elif prompts is not None:
        raise GravlensError(
            "Residuals and prompts were given.",
            "Residuals hold the states of their own prompts.",
            "locate_vrev(sequence, prompts=...) or locate_vrev(residuals).",
        )
    witness, anchor = source.of("witness"), source.of("anchor")
    if layer is None:
        return Directions(
            tuple(
                _estimate(source, number, witness[:, i], anchor[:, i], estimator)
                for i, number in enumerate(source.layers)
            )
        )
    if np.ndim(layer):
        return locate_vrev(source, estimator=estimator).at(layer)
    if layer not in source.layers:
        raise GravlensError(
            f"Layer {layer!r} was asked for.", f"These residuals hold layers {list(source.layers)}.", "one of these."
        )
    i = source.layers.index(layer)
    direction = _estimate(source, layer, witness[:, i], anchor[:, i], estimator)
    if direction.undefined is not None:
        raise undefined_error(direction)
    return direction


def direction_from(
    vector: Float[np.ndarray | Tensor, " d_model"], *, layer: int, distance: float | None = None, name: str = "given"
) -> Direction:
    """A direction from any vector, scaled to unit length.

    Args:
        vector: [d_model], of any length but 0.
        layer: number of the layer.
        distance: what strength 1 is, residual units; default: the vector's length.
        name: how results call it.

    Raises:
        GravlensError: the vector has no length.
    """
    vector = np.asarray(vector.detach().cpu().float() if isinstance(vector, Tensor) else vector)
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(length) or length == 0:
        raise GravlensError(f"The vector ({name}) has length {length}.", "A direction has a length.", "another vector.")
    return Direction(vector / length, layer, length if distance is None else distance, estimator=name)


def _estimate(
    residuals: Residuals, layer: int, witness: np.ndarray, anchor: np.ndarray, estimator: Estimator
) -> Direction:
    difference = estimator(witness, anchor)
    distance = float(np.linalg.norm(difference))
    noise = noise_floor(residuals, layer)
    undefined = None
    if not distance > noise:
        undefined = f"witness and anchor differ by {distance:.2g}, the forward pass's own noise reaches {noise:.2g}"
    return Direction(
        vector=difference / distance if undefined is None else np.full_like(difference, np.nan),
        layer=layer,
        distance=distance,
        reliability=_reliability(witness, anchor, estimator) if undefined is None else float("nan"),
        estimator=getattr(estimator, "__name__", type(estimator).__name__),
        prompts=residuals.prompts,
        made_from={
            **{name: residuals.meta.get("sources", {}).get(name, name) for name in ("witness", "anchor")},
            **{key: residuals.meta[key] for key in FACTS if key in residuals.meta},
            "n_prompts": len(witness),
        },
        undefined=undefined,
    )


def noise_floor(residuals: Residuals, layer: int) -> float:
    """How far the forward pass's own rounding may move a mean state, residual units (docs/directions.md)."""
    i = residuals.layers.index(layer)
    # Contrasts are shorter than the states that they are differences of, and whose rounding they have.
    lengths = residuals.meta.get("state_lengths")
    anchor = residuals.of("anchor")[:, i].astype(np.float64)
    length = lengths[i] if lengths else float(np.linalg.norm(anchor, axis=1).mean())
    # quantised weights may compute in less than their dtype says: the coarsest is taken
    epsilon = max((EPSILON.get(name, 2.0**-8) for name in residuals.meta.get("dtype", ["float32"])), default=2.0**-23)
    return NOISE_ROUNDINGS * epsilon * length


def _reliability(witness: np.ndarray, anchor: np.ndarray, estimator: Estimator) -> float:
    if len(witness) < 2:
        return float("nan")
    halves = [estimator(witness[start::2], anchor[start::2]) for start in (0, 1)]
    norms = np.prod([np.linalg.norm(half) for half in halves])
    return float(spearman_brown(halves[0] @ halves[1] / norms)) if norms else float("nan")


def spearman_brown(r: Float[np.ndarray, "*cell"] | float) -> Float[np.ndarray, "*cell"]:
    """Reliability of the whole from the correlation of its halves, 2r / (1 + r), at least −1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # without the bound a pair of opposed halves would give −∞, and r = −.9 a reliability of −18
        return np.clip(2 * np.asarray(r) / (1 + np.asarray(r)), -1.0, 1.0)
