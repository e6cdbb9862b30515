"""Directions in the residual stream, and `locate_vrev`: from the anchor towards the witness."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import xarray
from jaxtyping import Float

from gravlens import html
from gravlens.checkpoints import ModelSequence, Prompts
from gravlens.errors import GravlensError
from gravlens.placement import Placement
from gravlens.residuals import Residuals, cache_residuals
from gravlens.store import read_tensors, write_tensors

Estimator = Callable[[Float[np.ndarray, "prompt d_model"], Float[np.ndarray, "prompt d_model"]], np.ndarray]

COLUMNS = ("layer", "distance", "reliability", "estimator", "made from")  # as a notebook shows them
FACTS = ("positions", "chat_template", "system", "contrast", "geometry")  # of the residuals, in `made_from`
# A difference below this many units of the dtype's rounding, relative to the state's norm, is the pass's own noise
# (the same prompt in another batch or with other padding differs by less: tests/test_directions.py).
NOISE_ROUNDINGS = 16.0
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}


@dataclass(frozen=True, eq=False)
class Direction:
    """One direction of one layer, frozen: it never refits.

    Attributes:
        vector: [d_model], of unit length (NaN where undefined).
        layer: `blocks.{layer}.hook_resid_post`.
        distance: length of the difference that it was made from, residual units; strength 1 is this length.
        reliability: split-half cosine over even and odd prompts, stepped up by Spearman–Brown; NaN for one prompt.
        estimator: name of the estimator.
        prompts: digest of the prompts.
        made_from: further facts (witness, anchor, position, chat template).
        undefined: why there is no direction here, or None.
    """

    vector: Float[np.ndarray, " d_model"] = field(repr=False)
    layer: int
    distance: float
    reliability: float = float("nan")
    estimator: str = "difference_of_means"
    prompts: str = ""
    made_from: Mapping[str, Any] = field(default_factory=dict)
    undefined: str | None = None

    def __post_init__(self) -> None:
        vector = np.array(self.vector, dtype=np.float32)
        vector.flags.writeable = False
        object.__setattr__(self, "vector", vector)

    @property
    def basis(self) -> Float[np.ndarray, "1 d_model"]:
        """The vector as the one row of a basis: a direction is a subspace of rank 1."""
        return self.vector[None]

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, with what it was made from."""
        return Directions((self,)).save(path)

    @classmethod
    def load(cls, path: Path | str) -> "Direction":
        """Read a file that holds one direction."""
        (direction,) = Directions.load(path)
        return direction

    def _repr_html_(self) -> str:
        return html.table(COLUMNS, [_row(self)], title="Direction")


@dataclass(frozen=True, eq=False)
class Directions:
    """Directions of several layers: `vs[12]` is layer 12's."""

    directions: tuple[Direction, ...]

    def __getitem__(self, layer: int) -> Direction:
        for direction in self.directions:
            if direction.layer == layer:
                return direction
        raise GravlensError(
            f"There is no direction of layer {layer!r} here.",
            f"Layers here: {', '.join(map(str, self.layers))}.",
            "one of these, or locate_vrev with that layer.",
        )

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.directions)

    def __len__(self) -> int:
        return len(self.directions)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in the order of the directions."""
        return tuple(direction.layer for direction in self)

    @property
    def vectors(self) -> Float[np.ndarray, "layer d_model"]:
        """The unit vectors, NaN where undefined."""
        return np.stack([direction.vector for direction in self])

    @property
    def distances(self) -> Float[np.ndarray, " layer"]:
        """The distances, residual units."""
        return np.array([direction.distance for direction in self])

    def defined(self) -> "Directions":
        """Those that are defined; raises where none is."""
        kept = tuple(direction for direction in self if direction.undefined is None)
        if not kept:
            raise _undefined(self.directions[0])
        return Directions(kept)

    def at(self, layers: Sequence[int]) -> "Directions":
        """Those of some layers."""
        return Directions(tuple(self[layer] for layer in layers))

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, with what they were made from."""
        meta = [{k: v for k, v in vars(d).items() if k != "vector"} | {"made_from": dict(d.made_from)} for d in self]
        return write_tensors(path, "directions", {"vectors": self.vectors}, {"directions": meta})

    @classmethod
    def load(cls, path: Path | str) -> "Directions":
        """Read a file of `save`."""
        arrays, meta = read_tensors(path, "directions")
        rows = zip(arrays["vectors"], meta["directions"], strict=True)
        numbers = ("distance", "reliability")  # JSON has no NaN
        return cls(tuple(Direction(v, **(m | {n: np.nan if m[n] is None else m[n] for n in numbers})) for v, m in rows))

    def to_xarray(self) -> xarray.Dataset:
        """`vector` [layer, d_model], and by layer `distance`, `reliability`, `estimator`, `undefined` ("": defined)."""
        columns = {
            "distance": self.distances,
            "reliability": [one.reliability for one in self],
            "estimator": [one.estimator for one in self],
            "undefined": [one.undefined or "" for one in self],
        }
        by_layer = {name: ("layer", values) for name, values in columns.items()}
        return xarray.Dataset(
            {"vector": (("layer", "d_model"), self.vectors), **by_layer}, {"layer": list(self.layers)}
        )

    def _repr_html_(self) -> str:
        return html.table(COLUMNS, [_row(one) for one in self], title="Directions", rest="vs[layer]")


def _row(direction: Direction) -> tuple[Any, ...]:
    made = direction.undefined or ", ".join(f"{name}: {value}" for name, value in direction.made_from.items())
    return direction.layer, direction.distance, direction.reliability, direction.estimator, made


def difference_of_means(
    witness: Float[np.ndarray, "prompt d_model"], anchor: Float[np.ndarray, "prompt d_model"]
) -> Float[np.ndarray, " d_model"]:
    """mean(witness) − mean(anchor), residual units, accumulated in fp64: h_l(witness) − h_l(anchor) of the paper."""
    return witness.mean(0, dtype=np.float64) - anchor.mean(0, dtype=np.float64)


@overload
def locate_vrev(
    source: ModelSequence | Residuals, *, layer: int, prompts: Any = None, estimator: Estimator = difference_of_means,
    placement: Placement = Placement(),
) -> Direction: ...  # fmt: skip
@overload
def locate_vrev(
    source: ModelSequence | Residuals, *, layer: None = None, prompts: Any = None,
    estimator: Estimator = difference_of_means, placement: Placement = Placement(),
) -> Directions: ...  # fmt: skip
def locate_vrev(
    source: ModelSequence | Residuals,
    *,
    layer: int | None = None,
    prompts: Prompts | None = None,
    estimator: Estimator = difference_of_means,
    placement: Placement = Placement(),
) -> Direction | Directions:
    """v_rev of one layer or of all: the unit vector from the anchor's states towards the witness's.

    v_rev,l = unit(h_l(witness) − h_l(anchor)), h_l the mean over the prompts of `resid_post` at the last prompt token
    ("The Gravitational Interpretation of Fine-Tuning Reversion", arXiv 2606.28525).

    Args:
        source: a sequence (its probes are read), or residuals that hold `witness` and `anchor`.
        layer: one layer (a `Direction` is returned), or None for all (`Directions`).
        prompts: prompts to read a sequence on, instead of its probes.
        estimator: (witness states, anchor states) [prompt, d_model] -> [d_model], its length is the distance.
        placement: device and dtype that a sequence is read on (`Placement`).

    Raises:
        GravlensError: no prompts; a layer out of range; witness and anchor do not differ at the layer asked for
            beyond the forward pass's own noise. With all layers such a layer is marked (`.undefined`) instead.
    """
    if isinstance(source, ModelSequence):
        layers = None if layer is None else [layer]
        pair = (source.witness, source.anchor)
        source = cache_residuals(source, prompts, layers=layers, checkpoints=pair, placement=placement)
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
    if layer not in source.layers:
        raise GravlensError(
            f"Layer {layer!r} was asked for.", f"These residuals hold layers {list(source.layers)}.", "one of these."
        )
    i = source.layers.index(layer)
    direction = _estimate(source, layer, witness[:, i], anchor[:, i], estimator)
    if direction.undefined is not None:
        raise _undefined(direction)
    return direction


def direction_from(
    vector: Float[np.ndarray, " d_model"], *, layer: int, distance: float | None = None, name: str = "given"
) -> Direction:
    """A direction from any vector, scaled to unit length.

    Args:
        vector: [d_model], of any length but 0.
        layer: whose residual stream it lies in.
        distance: what strength 1 is, residual units; default: the vector's length.
        name: how results call it.

    Raises:
        GravlensError: the vector has no length.
    """
    length = float(np.linalg.norm(np.asarray(vector, dtype=np.float64)))
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
    cosine = float(halves[0] @ halves[1] / norms) if norms else float("nan")
    return 2 * cosine / (1 + cosine) if cosine > -1 else float("nan")


def _undefined(direction: Direction) -> GravlensError:
    return GravlensError(
        f"v_rev is undefined at layer {direction.layer}: {direction.undefined}.",
        "Witness and anchor have to differ there.",
        "another layer, another witness, or locate_vrev(sequence) to see which layers are defined.",
    )


def random_directions(
    directions: Directions, *, rng: np.random.Generator, states: Float[np.ndarray, "prompt layer d_model"] | None = None
) -> Directions:
    """A random twin: one fresh unit vector a layer, at the same distances.

    Args:
        directions: whose layers and distances are kept; undefined layers are left out.
        rng: source of randomness.
        states: draw each vector from the covariance of these states (same layers, any unit), not isotropically: random
            mixtures of the centred states, Σ_i g_i (h_i − mean h), with g normal.

    Raises:
        GravlensError: states that do not vary.
    """
    twins = []
    for i, direction in enumerate(directions.defined()):
        if states is None:
            vector = rng.standard_normal(direction.vector.shape)
        else:
            centred = states[:, i].astype(np.float64) - states[:, i].mean(0, dtype=np.float64)
            vector = rng.standard_normal(len(centred)) @ centred
        name = "isotropic" if states is None else "covariance_matched"
        twin = direction_from(vector, layer=direction.layer, distance=direction.distance, name=name)
        twins.append(replace(twin, prompts=direction.prompts))
    return Directions(tuple(twins))
