"""Locate v_rev: the direction from the anchor towards the witness."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn

from gravlens.activations.residuals import EPSILON as EPSILON
from gravlens.activations.residuals import NOISE_ROUNDINGS as NOISE_ROUNDINGS
from gravlens.activations.residuals import Cache, Residuals, cache_residuals, noise_floor
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction, Directions, undefined_error
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.opening import OpenModel
from gravlens.models.placement import Placement

Source: TypeAlias = ModelSequence | Residuals | Path | str
Model: TypeAlias = OpenModel | Checkpoint | Path | str | nn.Module | Cache
States: TypeAlias = Float[np.ndarray, "prompt d_model"]
Vector: TypeAlias = Float[np.ndarray, " d_model"]
Estimator = Callable[[States, States], np.ndarray]
# Of the residuals, in `made_from`.
FACTS = ("positions", "chat_template", "chat_template_kwargs", "system", "contrast", "geometry")


def difference_of_means(witness: States, anchor: States) -> Vector:
    """mean(witness) − mean(anchor) in fp64, residual units: h_l(witness) − h_l(anchor) of the paper."""
    return witness.mean(0, dtype=np.float64) - anchor.mean(0, dtype=np.float64)


@overload
def locate_vrev(
    source: Source | Model, anchor: Model | None = None, *, layer: int, prompts: Any = None,
    estimator: Estimator = difference_of_means, placement: Placement = Placement(),
) -> Direction: ...  # fmt: skip


@overload
def locate_vrev(
    source: Source | Model, anchor: Model | None = None, *, layer: Sequence[int] | None = None, prompts: Any = None,
    estimator: Estimator = difference_of_means, placement: Placement = Placement(),
) -> Directions: ...  # fmt: skip


def locate_vrev(
    source: Source | Model,
    anchor: Model | None = None,
    *,
    layer: int | Sequence[int] | None = None,
    prompts: Any = None,
    estimator: Estimator = difference_of_means,
    placement: Placement = Placement(),
) -> Direction | Directions:
    """Locate v_rev at one layer or all: the unit vector from the anchor's mean state towards the witness's.

    v_rev,l = unit(h_l(witness) − h_l(anchor)), h_l the mean over the prompts of `resid_post` at the last prompt token
    ("The Gravitational Interpretation of Fine-Tuning Reversion", arXiv 2606.28525). GravlensError for a
    layer out of range, or a difference within the forward pass's own noise (with several layers it is marked
    `.undefined` instead).

    Args:
        source: a sequence or its TOML file (reads its probes), or residuals that hold `witness` and `anchor`. Or the
            witness alone: a folder, a hub id, a model, or a cache of TransformerLens' `run_with_cache`.
        anchor: then the anchor; a Hugging Face model in memory as `open_model(model, tokenizer=tokenizer)`.
        layer: one layer (returns a `Direction`), several, or None for all (`Directions`).
        prompts: replace the sequence's probes; of caches `(tokens, attention_mask)`, as for `Residuals.from_caches`.
        estimator: (witness states, anchor states) [prompt, d_model] -> [d_model]; its length is the distance.
        placement: device and dtype for reading a sequence.

    Examples:
        >>> vs = gl.locate_vrev(seq)  # every layer; vs[2].vector, vs[2].distance
        >>> v = gl.locate_vrev(seq, layer=2)
        >>> v.vector.shape, v.distance > 0
        ((32,), True)
    """
    if anchor is not None:
        source, prompts = _pair({"witness": source, "anchor": anchor}, prompts), None
    if not isinstance(source, Residuals):
        sequence = ModelSequence.of(source)  # pyright: ignore[reportArgumentType]
        pair = (sequence.witness, sequence.anchor)
        source = cache_residuals(sequence, prompts, layers=layer, checkpoints=pair, placement=placement)
    elif prompts is not None:
        remedy = "locate_vrev(sequence, prompts=...) or locate_vrev(residuals)."
        raise GravlensError("Residuals and prompts were given.", "Residuals hold their own prompts' states.", remedy)
    witness, anchor = source.of("witness"), source.of("anchor")
    if layer is None:
        each = ((number, witness[:, i], anchor[:, i]) for i, number in enumerate(source.layers))
        return Directions(tuple(_estimate(source, *one, estimator) for one in each))
    if np.ndim(layer):  # 0 for a NumPy integer too
        return locate_vrev(source, estimator=estimator).at(layer)  # marks undefined layers instead of raising
    if layer not in source.layers or isinstance(layer, bool):  # True would pass for 1
        given = f"Layer {layer!r} was asked for."
        raise GravlensError(given, f"These residuals hold layers {list(source.layers)}.", "one of these.")
    i = source.layers.index(layer)
    direction = _estimate(source, source.layers[i], witness[:, i], anchor[:, i], estimator)
    if direction.undefined is not None:
        raise undefined_error(direction)
    return direction


def _pair(roles: dict[str, Any], prompts: Any) -> ModelSequence | Residuals:
    """Return the states of two caches, or the sequence of two models."""
    if prompts is None:
        remedy = "locate_vrev(witness, anchor, prompts=[…]); of caches, prompts=(tokens, attention_mask)."
        raise GravlensError("No prompts were given.", "Both are read on the same ones.", remedy)
    if not any(isinstance(one, OpenModel | Checkpoint | Path | str | nn.Module) for one in roles.values()):
        # tokens alone are an error there, which tells how to get the mask
        return Residuals.from_caches(roles, *(prompts[:2] if isinstance(prompts, tuple) else (prompts,)))
    for name, one in roles.items():
        one = Checkpoint(name, one.module, tokenizer=one.tokenizer) if isinstance(one, OpenModel) else one
        roles[name] = replace(one, name=name) if isinstance(one, Checkpoint) else Checkpoint(name, one)
    return ModelSequence(**roles, probes=prompts)


def direction_from(
    vector: Float[np.ndarray | Tensor, " d_model"], *, layer: int, distance: float | None = None, name: str = "given"
) -> Direction:
    """Scale any vector to a unit direction; GravlensError for a vector of length 0.

    Args:
        vector: [d_model], any length but 0.
        distance: strength 1, residual units; default: the vector's length.
        name: the `estimator` in results.

    Examples:
        >>> v = gl.directions.direction_from(np.arange(32.0), layer=1, name="mine")
        >>> round(float(np.linalg.norm(v.vector)), 3), v.distance > 100
        (1.0, True)
    """
    vector = np.asarray(vector.detach().cpu().float() if isinstance(vector, Tensor) else vector)  # numpy has no bf16
    length = float(np.linalg.norm(vector.astype(np.float64)))
    if not np.isfinite(length) or length == 0:
        raise GravlensError(f"The vector ({name}) has length {length}.", "A direction has a length.", "another vector.")
    return Direction(vector / length, layer, length if distance is None else distance, estimator=name)


def _estimate(residuals: Residuals, layer: int, witness: States, anchor: States, estimator: Estimator) -> Direction:
    difference = estimator(witness, anchor)
    distance = float(np.linalg.norm(difference))
    noise = noise_floor(residuals, layer)
    undefined = None
    if not distance > noise:  # not `<=`: a NaN distance is undefined too
        geometry = residuals.meta.get("geometry", "raw")
        where = "" if geometry == "raw" else f" in the {geometry} geometry"
        undefined = f"witness and anchor differ by {distance:.2g}{where}, the forward pass's own noise reaches "
        undefined += f"{noise:.2g}"
    return Direction(
        vector=difference / distance if undefined is None else np.full_like(difference, np.nan),
        layer=layer,
        distance=distance,
        # of noise it would be a number without meaning
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


def _reliability(witness: np.ndarray, anchor: np.ndarray, estimator: Estimator) -> float:
    if len(witness) < 2:
        return float("nan")
    # even and odd rather than first and last: prompt files are often sorted by topic
    halves = [estimator(witness[start::2], anchor[start::2]) for start in (0, 1)]
    norms = np.prod([np.linalg.norm(half) for half in halves])
    return float(spearman_brown(halves[0] @ halves[1] / norms)) if norms else float("nan")


def spearman_brown(r: Float[np.ndarray, "*cell"] | float) -> Float[np.ndarray, "*cell"]:
    """Spearman–Brown correction 2r / (1 + r) of a split-half correlation, at least −1."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # without the bound a pair of opposed halves would give −∞, and r = −.9 a reliability of −18
        return np.clip(2 * np.asarray(r) / (1 + np.asarray(r)), -1.0, 1.0)
