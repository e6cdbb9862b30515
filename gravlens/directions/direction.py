"""Directions and subspaces of one layer's residual stream: frozen, with layer, distance and provenance."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import NormalDist
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import torch
import xarray
from jaxtyping import Float
from torch import Tensor

from gravlens.core import display as html
from gravlens.core.errors import SAVED, GravlensError, as_list, reading, wrong_kind
from gravlens.core.files import check_digest, read_tensors, write_tensors

Device: TypeAlias = torch.device | str | None
Samples: TypeAlias = Float[np.ndarray, "sample layer d_model"]
COLUMNS = ("layer", "distance", "reliability", "estimator", "made from")  # as a notebook shows them
TOP = 3  # dimensions: models have one to four massive ones (Sun et al., "Massive activations", 2024)
# Beyond chance: two vectors that have nothing else in common than these dimensions already have a cosine of .2.
LARGE_SHARE = 0.2


class _OfLayer:
    """What belongs to one layer."""

    layer: int

    @property
    def hook_name(self) -> str:
        """The layer as TransformerLens names it: `blocks.{layer}.hook_resid_post`."""
        return f"blocks.{self.layer}.hook_resid_post"


@dataclass(frozen=True, eq=False)
class Direction(_OfLayer):
    """One direction of one layer, frozen: it never refits.

    Attributes:
        vector: [d_model], unit length (NaN where undefined), of NumPy: in a hook `tensor(h.device, h.dtype)`.
        layer: `blocks.{layer}.hook_resid_post`.
        distance: length of the difference that the direction was made from, residual units; strength 1 is this length.
        reliability: split-half cosine over even and odd prompts, Spearman–Brown corrected; NaN for one prompt.
        estimator: name of the estimator.
        prompts: digest of the prompts' token ids.
        made_from: provenance (witness, anchor, position, chat template).
        undefined: why this layer has no direction, or None.

    Examples:
        >>> v = vs[2]
        >>> v.vector.shape, v.layer
        ((32,), 2)
        >>> again = gl.Direction.load(v.save("v.safetensors"))
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
        vector = np.array(self.vector, dtype=np.float32)  # a copy: the caller's array stays writeable
        vector.flags.writeable = False
        object.__setattr__(self, "vector", vector)  # the dataclass is frozen

    @property
    def basis(self) -> Float[np.ndarray, "1 d_model"]:
        """The vector as a basis of one row: a direction is a subspace of rank 1."""
        return self.vector[None]

    def tensor(self, device: Device = None, dtype: torch.dtype | None = None) -> Float[Tensor, " d_model"]:
        """Return the vector as a tensor, fp32 on the CPU by default; GravlensError where undefined."""
        if self.undefined is not None:  # NaN would spread over all states
            raise undefined_error(self)
        return torch.tensor(self.vector, device=device, dtype=dtype)

    def top_dimensions(self, k: int = TOP) -> tuple[int, ...]:
        """Return the k dimensions with the largest components, largest first; none where undefined."""
        order = np.argsort(-np.abs(self.vector), kind="stable")
        return () if self.undefined is not None else tuple(order[:k].tolist())

    def top_share(self, k: int = TOP) -> float:
        """Share of the squared vector in its k largest dimensions, 0 to 1; NaN where undefined.

        An isotropic direction has `isotropic_share(d_model, k)`, about 2 ln(d) / d in its largest.
        """
        squares = self.vector[list(self.top_dimensions(k))].astype(np.float64) ** 2
        return float(squares.sum()) if self.undefined is None else float("nan")

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, with the metadata."""
        return Directions((self,)).save(path)

    @classmethod
    def load(cls, path: Path | str) -> "Direction":
        """Read a file that holds one direction."""
        (direction,) = Directions.load(path)
        return direction

    def __repr__(self) -> str:
        shown = {one.name: getattr(self, one.name) for one in fields(self) if one.repr}
        given = ", ".join(f"{name}={value!r}" for name, value in shown.items())
        return "; ".join([f"Direction({given})", *_shares([self])])

    def _repr_html_(self) -> str:
        return html.table(COLUMNS, [_row(self)], title="Direction", notes=_shares([self]))


S = TypeVar("S", bound="Direction | Subspace")


class _OfLayers(Generic[S]):
    """Look up directions or subspaces of several layers by layer."""

    def __iter__(self) -> Iterator[S]:
        raise NotImplementedError

    def __getitem__(self, layer: int) -> S:
        if found := [one for one in self if one.layer == layer]:
            return found[0]
        given = f"There is no {type(self).__name__[:-1].lower()} of layer {layer!r} here."
        raise GravlensError(given, f"Layers: {', '.join(map(str, self.layers))}.", "one of these.")

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, in order."""
        return tuple(one.layer for one in self)

    @property
    def distances(self) -> Float[np.ndarray, " layer"]:
        """The witness–anchor distances, residual units."""
        return np.array([one.distance for one in self])


@dataclass(frozen=True, eq=False)
class Directions(_OfLayers["Direction"]):
    """Directions of several layers: `vs[12]` is layer 12's.

    Examples:
        >>> vs.layers, vs.at([0, 1]).vectors.shape
        ((0, 1, 2), (2, 32))
        >>> again = gl.Directions.load(vs.save("vs.safetensors"))
    """

    directions: tuple[Direction, ...]

    def __iter__(self) -> Iterator[Direction]:
        return iter(self.directions)

    @property
    def vectors(self) -> Float[np.ndarray, "layer d_model"]:
        """The unit vectors, NaN where undefined."""
        return np.stack([direction.vector for direction in self])

    def tensor(self, device: Device = None, dtype: torch.dtype | None = None) -> Float[Tensor, "layer d_model"]:
        """Return the vectors as one tensor, as `Direction.tensor` does."""
        return torch.stack([direction.tensor(device, dtype) for direction in self])

    def defined(self) -> "Directions":  # what follows divides by the distance and would spread NaN over means
        """Select the defined ones; raises where there is none."""
        kept = tuple(direction for direction in self if direction.undefined is None)
        if not kept:
            raise undefined_error(self.directions[0])
        return Directions(kept)

    def at(self, layers: int | Sequence[int]) -> "Directions":
        """Select layers."""
        return Directions(tuple(self[layer] for layer in as_list(layers)))

    @classmethod
    def of(cls, given: "Direction | Directions | Sequence[Direction]") -> "Directions":
        """Convert one or several directions to `Directions`; GravlensError for other types."""
        if isinstance(given, cls):
            return given
        found = (given,) if isinstance(given, Direction) else given  # a Direction is no Sequence
        if isinstance(found, Sequence) and found and all(isinstance(one, Direction) for one in found):
            return cls(tuple(found))
        raise no_direction(given)

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, with the metadata."""
        # JSON cannot hold arrays
        meta = [{k: v for k, v in vars(d).items() if k != "vector"} | {"made_from": dict(d.made_from)} for d in self]
        return write_tensors(path, "directions", {"vectors": self.vectors}, {"directions": meta})

    @classmethod
    def load(cls, path: Path | str) -> "Directions":
        """Read a file of `save`."""
        numbers = ("distance", "reliability")  # JSON has no NaN
        with reading(path, *SAVED):
            arrays, meta = read_tensors(path, "directions")
            for one in meta["directions"]:
                check_digest(one["prompts"], path)
                one |= {name: np.nan for name in numbers if one[name] is None}
            pairs = zip(arrays["vectors"], meta["directions"], strict=True)
            return cls(tuple(Direction(vector, **one) for vector, one in pairs))

    def to_xarray(self) -> xarray.Dataset:
        """`vector` [layer, d_model]; by layer `distance`, `reliability`, `estimator`, `undefined` ("": defined)."""
        names = ("distance", "reliability", "estimator", "undefined")
        by_layer = {name: ("layer", [getattr(one, name) for one in self]) for name in names}
        by_layer["undefined"] = ("layer", [one.undefined or "" for one in self])  # netCDF has no None
        vectors = {"vector": (("layer", "d_model"), self.vectors)}
        return xarray.Dataset({**vectors, **by_layer}, {"layer": list(self.layers)})

    def __repr__(self) -> str:
        shown = self.directions[: html.MAX_LISTED]
        rows = [
            f"  layer {v.layer}: distance {v.distance:.4g}, {html.cell(v.undefined or _reliable(v))}" for v in shown
        ]
        rest = [f"  and {len(self) - len(shown)} more: vs[layer]"] * (len(self) > len(shown))
        return "\n".join([f"Directions of {len(self)} layers", *rows, *rest, *_shares(self.directions)])

    def _repr_html_(self) -> str:
        rows = [_row(one) for one in self]
        return html.table(COLUMNS, rows, title="Directions", notes=_shares(self.directions), rest="vs[layer]")


def isotropic_share(d_model: int, k: int = TOP) -> float:
    """Share of the squared vector that an isotropic direction has in its k largest dimensions, on average.

    For k = 1 about 2 ln(d) / d. The largest of d normal components are near the quantiles 1 − (j − ½) / 2d.
    """
    # Of the standard library: scipy would take longer to import.
    quantiles = [NormalDist().inv_cdf(1 - (j + 0.5) / (2 * d_model)) for j in range(min(k, d_model))]
    return min(sum(one**2 for one in quantiles) / d_model, 1.0)


def carried_by_few(direction: Direction) -> bool:
    """Whether the top dimensions hold more than a fifth of the squared vector beyond chance."""
    return direction.top_share() > isotropic_share(len(direction.vector)) + LARGE_SHARE  # NaN: not


def _shares(directions: Sequence[Direction]) -> list[str]:
    """Describe how much of the vectors is in their top dimensions, and warn where it is much."""
    if not (defined := [one for one in directions if one.undefined is None]):
        return []
    top = max(defined, key=Direction.top_share)
    where = f" at most, at layer {top.layer}" if len(defined) > 1 else ""
    line = f"top dimension: {top.top_share(1):.1%} of the squared vector, top {TOP}: {top.top_share():.1%}{where}"
    notes = [f"{line} (isotropic: {isotropic_share(len(top.vector)):.1%})"]
    if few := [f"layer {one.layer} ({html.listed(one.top_dimensions())})" for one in defined if carried_by_few(one)]:
        warning = (
            f"a few massive dimensions hold much of the vector at {html.listed(few)}: a cosine with it may be theirs"
        )
        notes.append(f"{warning} alone; compare geometry.without_dimensions")
    return notes


def _reliable(direction: Direction) -> str:
    return f"reliability {direction.reliability:.3f}, top {TOP} dimensions {direction.top_share():.1%}"


def no_direction(given: object) -> GravlensError:
    """Error for an argument that is no direction: a bare vector does not say which layer it belongs to."""
    remedy = "direction_from(vector, layer=…), locate_vrev(sequence, layer=…), or Directions.load(path)."
    return wrong_kind(given, "A direction is a vector together with its layer.", remedy)


def one_direction(given: Direction) -> Direction:
    """Return the direction; GravlensError for directions of several layers and for other types."""
    if isinstance(given, Directions):
        raise wrong_kind(given, f"One layer's direction is needed, of {list(given.layers)}.", "directions[layer].")
    if not isinstance(given, Direction):
        raise no_direction(given)
    return given


def _row(one: "Direction | Subspace") -> tuple[Any, ...]:
    numbers = (one.distance, one.reliability) if isinstance(one, Direction) else (one.rank, one.distance)
    why = one.undefined if isinstance(one, Direction) else None
    made = why or ", ".join(f"{name}: {value}" for name, value in one.made_from.items())
    return one.layer, *numbers, one.estimator, made


def undefined_error(direction: Direction) -> GravlensError:
    """Error for a layer without a direction."""
    given = f"v_rev is undefined at layer {direction.layer}: {direction.undefined}."
    remedy = "another layer or witness; locate_vrev(sequence) shows which layers are defined."
    return GravlensError(given, "Witness and anchor have to differ there.", remedy)


def check_columns(samples: Samples, layers: Sequence[int], note: str = "") -> None:
    """GravlensError where samples do not have one column per layer."""
    if samples.shape[1] != len(layers):
        given = f"Samples of {samples.shape[1]} layers were given for the {len(layers)}{note}: {list(layers)}."
        wanted = "Samples [sample, layer, d_model] have one column per direction, in the same order."
        remedy = 'residuals.of("anchor")[:, [residuals.layers.index(layer) for layer in directions.layers]].'
        raise GravlensError(given, wanted, remedy)


def defined_columns(directions: Directions, samples: Samples) -> tuple[Directions, Samples]:
    """Select the defined directions and their columns of `samples` (of all layers, or of the defined ones)."""
    defined = directions.defined()
    if samples.shape[1] != len(defined):
        check_columns(samples, directions.layers, f" ({len(defined)} defined)")
        # samples of the defined layers alone are already in step
        samples = samples[:, [direction.undefined is None for direction in directions]]
    return defined, samples


ORTHONORMAL_WITHIN = 1e-4  # rows rounded to fp32 miss 1 and 0 by about 1e-7; a wrong basis by far more
SUBSPACE_COLUMNS = ("layer", "rank", "distance", "estimator", "made from")  # as a notebook shows them


@dataclass(frozen=True, eq=False)
class Subspace(_OfLayer):
    """A subspace of one layer's residual stream, frozen: it never refits.

    `basis` [rank, d_model] has orthonormal rows; `distance` is the witness–anchor distance at that layer, residual
    units; the rest as in `Direction`.

    Examples:
        >>> plane = gl.Subspace(np.eye(2, 32), layer=1, distance=vs[1].distance)
        >>> plane.rank
        2
    """

    basis: Float[np.ndarray, "rank d_model"] = field(repr=False)
    layer: int
    distance: float
    estimator: str = "given"
    prompts: str = ""
    made_from: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        basis = np.atleast_2d(np.array(self.basis, dtype=np.float32))
        gram = basis.astype(np.float64) @ basis.T.astype(np.float64)
        if not np.allclose(gram, np.eye(len(basis)), atol=ORTHONORMAL_WITHIN):
            given = f"The basis of layer {self.layer} ({self.estimator}) is not orthonormal."
            raise GravlensError(given, "Rows are orthogonal, of unit length.", "span_of(vectors, layer=…, distance=…).")
        basis.flags.writeable = False
        object.__setattr__(self, "basis", basis)

    @property
    def rank(self) -> int:
        """Number of directions."""
        return len(self.basis)

    def _repr_html_(self) -> str:
        return html.table(SUBSPACE_COLUMNS, [_row(self)], title="Subspace")


@dataclass(frozen=True, eq=False)
class Subspaces(_OfLayers["Subspace"]):
    """Subspaces of several layers: `spaces[12]` is layer 12's.

    Examples:
        >>> spaces = gl.subspaces.drift_subspaces(given, vs, at=["seed0/20", "seed1/20"], rank=2)
        >>> spaces.layers, spaces[1].rank
        ((0, 1, 2), 2)
    """

    subspaces: tuple[Subspace, ...]
    __repr__ = html.brief

    def __iter__(self) -> Iterator[Subspace]:
        return iter(self.subspaces)

    def at(self, layers: Sequence[int]) -> "Subspaces":
        """Select layers."""
        return Subspaces(tuple(self[layer] for layer in layers))

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file, with the metadata."""
        meta = [{k: v for k, v in vars(s).items() if k != "basis"} | {"made_from": dict(s.made_from)} for s in self]
        # one tensor per layer: ranks may differ
        arrays = {f"basis.{i}": subspace.basis for i, subspace in enumerate(self)}
        return write_tensors(path, "subspaces", arrays, {"subspaces": meta})

    @classmethod
    def load(cls, path: Path | str) -> "Subspaces":
        """Read a file of `save`."""
        with reading(path, *SAVED):
            arrays, meta = read_tensors(path, "subspaces")
            return cls(tuple(Subspace(arrays[f"basis.{i}"], **one) for i, one in enumerate(meta["subspaces"])))

    def _repr_html_(self) -> str:
        rows = [_row(one) for one in self]
        return html.table(SUBSPACE_COLUMNS, rows, title="Subspaces", rest="spaces[layer]")


Span: TypeAlias = Direction | Subspace
Spans: TypeAlias = Directions | Subspaces


def each(spans: Span | Spans) -> tuple[Span, ...]:
    """Flatten to a tuple of directions or subspaces."""
    found = as_list(spans)
    if not all(isinstance(one, Direction | Subspace) for one in found):
        raise no_direction(spans)
    return tuple(found)
