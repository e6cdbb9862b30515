"""Changes to the residual stream while a model runs: frozen, h -> h'. `intervene` (hooks.py) carries them out."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self, TypeAlias, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gravlens.activations.residuals import Residuals, check_states
from gravlens.core.errors import GravlensError, wrong_kind
from gravlens.directions.direction import Direction, Directions, Span, Spans, Subspace, Subspaces, each
from gravlens.models.forward import Positions, Reading, check_positions, current_reading
from gravlens.models.opening import Openable, open_model

UNIT_WITHIN = 1e-4
States: TypeAlias = Float[Tensor, "*batch d_model"]


class Intervention(Protocol):
    """What `intervene` carries out: directions or subspaces, each at its layer, and what to do with states there."""

    @property
    def directions(self) -> Span | Spans:
        """Where, and along what."""
        ...

    def edit(self, hidden: States, direction: Any, /) -> States:
        """The changed states, a new tensor of the same dtype; the very tensor given where nothing was to be changed."""
        ...

    def with_directions(self, directions: Any, /) -> Self:
        """The same with other directions: how a random control is made."""
        ...


def check_intervention(given: Any) -> Intervention:
    """An intervention as it is; GravlensError for a direction, a class or anything else that changes no state."""
    if hasattr(given, "edit") and not isinstance(given, type):
        return given
    raise wrong_kind(
        given,
        "An intervention is needed, which says what happens along a direction.",
        "Ablate(direction) or Steer(direction, strength); for several conditions {'ablated': Ablate(direction)}.",
    )


@dataclass(frozen=True, eq=False)
class Steer:
    """h + strength · distance · v: strength 1 is the way from the anchor to the witness, −1 the way away from it.

    Attributes:
        directions: a `Direction`, or `Directions`, each added at its own layer.
        strength: in units of each direction's distance.
    """

    directions: Direction | Directions
    strength: float = 1.0

    def __post_init__(self) -> None:
        _check_spans(self.directions)
        _check_strength(self)

    def edit(self, hidden: States, direction: Direction) -> States:
        """h + strength · distance · v, computed in fp32 at least."""
        wide, basis = _widened(hidden, direction)
        return (wide + self.strength * direction.distance * basis[0]).to(hidden.dtype)

    def with_directions(self, directions: Direction | Directions) -> "Steer":
        """The same strength along other directions."""
        return replace(self, directions=directions)


@dataclass(frozen=True, eq=False)
class Ablate:
    """h − ⟨h, v⟩ v: nothing is left along v; h − QᵀQ h where a subspace has the basis Q.

    Attributes:
        directions: one or several directions or subspaces, each removed at its own layer; for one at every layer see
            `everywhere`.
    """

    directions: Span | Spans

    def __post_init__(self) -> None:
        _check_spans(self.directions)

    def edit(self, hidden: States, direction: Span) -> States:
        """h − QᵀQ h, computed in fp32 at least."""
        return _put(hidden, direction, np.zeros(len(direction.basis)))

    def with_directions(self, directions: Span | Spans) -> "Ablate":
        """The same along others."""
        return replace(self, directions=directions)


@dataclass(frozen=True, eq=False)
class Clamp:
    """h − QᵀQ (h − m): the component is held at that of m, the anchor's mean state, plus strength · distance along v.

    Strength 0 is ablation pinned to the anchor's mean, 1 holds the component at the witness's mean. To hold it at a
    number of residual units of your own, ablate and then steer.

    Attributes:
        directions: one or several directions or subspaces.
        residuals: hold `anchor`, at these layers.
        strength: in units of each direction's distance; 0 for subspaces.
    """

    directions: Span | Spans
    residuals: Residuals = field(repr=False)
    strength: float = 0.0

    def __post_init__(self) -> None:
        _check_spans(self.directions)
        _check_source(self.directions, self.residuals, "anchor")
        if self.strength:
            _check_strength(self)

    def edit(self, hidden: States, direction: Span) -> States:
        """h − QᵀQ (h − m − strength · distance · v), computed in fp32 at least."""
        component = direction.basis @ self._means[direction.layer]
        return _put(hidden, direction, component + self.strength * direction.distance if self.strength else component)

    def with_directions(self, directions: Span | Spans) -> "Clamp":
        """The same along others: held at the anchor's mean there."""
        return replace(self, directions=directions)

    @cached_property
    def _means(self) -> dict[int, Float[np.ndarray, " d_model"]]:
        return dict(zip(self.residuals.layers, self.residuals.of("anchor").mean(0, dtype=np.float64), strict=True))


@dataclass(frozen=True, eq=False)
class Patch:
    """h − QᵀQ (h − h_source(x)) at the last token of each prompt x: the source checkpoint's own component, restored.

    Mediation: with the anchor as the source in a fine-tuned model it asks whether the component is necessary, with the
    fine-tuned checkpoint as the source in the anchor whether it suffices.

    Attributes:
        directions: one or several directions or subspaces; `whole_state(directions)` patches all of the state.
        residuals: hold the source at these layers, read at the last prompt token.
        ids: token ids of their prompts, in their order: `encode(tokenizer, prompts)`.
        checkpoint: the source's name there.
    """

    directions: Span | Spans
    residuals: Residuals = field(repr=False)
    ids: Sequence[Sequence[int]] = field(repr=False)
    checkpoint: str = "anchor"

    def __post_init__(self) -> None:
        _check_spans(self.directions)
        _check_source(self.directions, self.residuals, self.checkpoint)
        n_prompts, position = self.residuals.values.shape[1], self.residuals.meta.get("positions", "last")
        if len(self.ids) != n_prompts or position not in ("last", -1):
            raise GravlensError(
                f"Token ids of {len(self.ids)} prompts were given, and states of {n_prompts} at position {position}.",
                "A patch restores the state at the last token of each prompt.",
                "cache_residuals(sequence, prompts, …) and encode(tokenizer, prompts) of the same prompts.",
            )

    def edit(self, hidden: Float[Tensor, "prompt pos d_model"], direction: Span) -> States:
        """The states with each prompt's own component restored at its last token."""
        reading = current_reading(hidden)
        where = reading.chosen("last", hidden.shape[1])
        if not where.any():
            return hidden
        column = self.residuals.layers.index(direction.layer)
        source = self.residuals.of(self.checkpoint)[self._rows_of(reading), column].astype(np.float64)
        restored = _put(hidden, direction, (source @ direction.basis.T)[:, None])
        return torch.where(where.to(hidden.device)[..., None], restored, hidden)

    def with_directions(self, directions: Span | Spans) -> "Patch":
        """The same source along others."""
        return replace(self, directions=directions)

    @cached_property
    def _row(self) -> dict[tuple[int, ...], int]:
        return {tuple(prompt): row for row, prompt in enumerate(self.ids)}

    def _rows_of(self, reading: Reading) -> list[int]:
        prompts = reading.prompts
        if unknown := [list(prompt) for prompt in prompts if prompt not in self._row]:
            raise GravlensError(
                f"The prompt {unknown[0]} is not among the {len(self.ids)} that the source has read.",
                "A patch restores what the source read on the very same tokens.",
                "residuals of these prompts, read and encoded with the same tokenizer and chat template.",
            )
        return [self._row[prompt] for prompt in prompts]


@dataclass(frozen=True, eq=False)
class At:
    """An intervention at some token positions only.

    Attributes:
        intervention: any.
        positions: `"last"` (the last prompt token), `"prompt"` (up to it), `"answer"` (after it), offsets that count
            the last prompt token as −1, such as `(-1, -2)`, or `"all"`, as without `At`.
    """

    intervention: Intervention
    positions: Positions

    def __post_init__(self) -> None:
        check_intervention(self.intervention)
        check_positions(self.positions)

    @property
    def directions(self) -> Span | Spans:
        """Those of the intervention."""
        return self.intervention.directions

    def edit(self, hidden: Float[Tensor, "prompt pos d_model"], direction: Span) -> States:
        """The states, changed at the positions."""
        if self.positions == "all":
            return self.intervention.edit(hidden, direction)
        where = current_reading(hidden).chosen(self.positions, hidden.shape[1])
        edited = self.intervention.edit(hidden, direction) if where.any() else hidden
        return hidden if edited is hidden else torch.where(where.to(hidden.device)[..., None], edited, hidden)

    def with_directions(self, directions: Any) -> "At":
        """The same at the same positions, along others."""
        return replace(self, intervention=self.intervention.with_directions(directions))


@overload
def everywhere(direction: Direction, model: Openable | int) -> Directions: ...


@overload
def everywhere(direction: Subspace, model: Openable | int) -> Subspaces: ...


def everywhere(direction: Span, model: Openable | int) -> Spans:
    """One layer's direction (or subspace) and distance at every layer of a model (or of so many layers)."""
    (direction,) = each(direction)
    layers = range(model if isinstance(model, int) else open_model(model).n_layers)
    if isinstance(direction, Direction):
        return Directions(tuple(replace(direction, layer=layer) for layer in layers))
    return Subspaces(tuple(replace(direction, layer=layer) for layer in layers))


def _put(hidden: Tensor, span: Span, component: np.ndarray) -> Tensor:
    """The states with another component [..., rank] along a span."""
    wide, basis = _widened(hidden, span)
    wanted = torch.tensor(component, dtype=wide.dtype, device=wide.device)
    return (wide + (wanted - wide @ basis.T) @ basis).to(hidden.dtype)


def _widened(hidden: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """States in fp32 at least (bf16 would round a small step away), and the basis [rank, d_model] beside them."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide, torch.tensor(span.basis, dtype=wide.dtype, device=wide.device)


def _check_spans(spans: Span | Spans) -> None:
    if not each(spans):
        raise GravlensError("No direction was given.", "An intervention has at least one.", "locate_vrev(sequence).")
    for span in each(spans):
        if isinstance(span, Direction):
            _check_direction(span)


def _check_direction(direction: Direction) -> None:
    if direction.undefined is not None:
        raise GravlensError(
            f"The direction of layer {direction.layer} is undefined: {direction.undefined}.",
            "An intervention needs one at each of its layers.",
            "directions.defined() leaves the undefined ones out.",
        )
    length = float(np.linalg.norm(direction.vector.astype(np.float64)))
    if not abs(length - 1) <= UNIT_WITHIN:
        raise GravlensError(
            f"The direction of layer {direction.layer} ({direction.estimator}) has length {length:.4g}.",
            "Its vector has length 1, else ablation would not remove and strength would not be in distances.",
            "direction_from(vector, layer=…), which scales it.",
        )


def _check_strength(edit: Steer | Clamp) -> None:
    """Strength is counted in distances along one direction a layer."""
    name, spans = type(edit).__name__, each(edit.directions)
    if not all(isinstance(span, Direction) for span in spans):
        raise GravlensError(
            f"{name}(strength={edit.strength}) was given along subspaces.",
            "A subspace has no way to go: strength is counted along one direction a layer.",
            "directions, Ablate(subspaces), or Clamp(subspaces, residuals) at strength 0.",
        )
    if not np.isfinite([edit.strength, *(span.distance for span in spans)]).all():
        raise GravlensError(
            f"{name}(strength={edit.strength}) was given along directions of "
            f"distance {[span.distance for span in spans]}.",
            "Strength is counted in distances, and both are finite numbers.",
            "direction_from(vector, layer=…, distance=…).",
        )


def _check_source(spans: Span | Spans, residuals: Residuals, checkpoint: str) -> None:
    """The residuals hold the checkpoint, the layers, and states of the spans' width."""
    width = check_states(residuals).of(checkpoint).shape[-1]
    for span in each(spans):
        if span.layer not in residuals.layers or span.basis.shape[1] != width:
            raise GravlensError(
                f"A direction of layer {span.layer} and width {span.basis.shape[1]} was given.",
                f"The residuals hold layers {list(residuals.layers)} of width {width}.",
                "cache_residuals(sequence, prompts) of the same history, at these layers.",
            )
