"""Edits of the residual stream that `intervene` applies: steering, directional ablation, clamping, patching."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol, Self, TypeAlias, TypeVar, overload

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gravlens.activations.residuals import Residuals, check_states
from gravlens.core.errors import GravlensError, check_layer, wrong_kind
from gravlens.directions.direction import Direction, Directions, Span, Spans, Subspace, Subspaces, each, undefined_error
from gravlens.models.forward import APART, Positions, Reading, check_positions, current_reading
from gravlens.models.opening import Openable, OpenModel, open_model

Hook = TypeVar("Hook")
UNIT_WITHIN = 1e-4  # of a direction's length; vectors are stored in fp32
States: TypeAlias = Float[Tensor, "*batch d_model"]
LensHook: TypeAlias = Callable[[States, Any], States]  # (activation, hook) -> activation, for TransformerLens


class Intervention(Protocol):
    """An edit of the hidden states at each layer of its directions or subspaces; `intervene` applies it."""

    @property
    def directions(self) -> Span | Spans: ...

    def edit(self, hidden: States, direction: Any, /) -> States:
        """The edited states, a new tensor of the same dtype; `hidden` itself if there is nothing to change."""
        ...

    def with_directions(self, directions: Any, /) -> Self:
        """The same edit along other directions, as random controls need it."""
        ...


def check_intervention(given: Any) -> Intervention:
    """Return an intervention; raise for a direction, a class or anything else that edits no states."""
    if hasattr(given, "edit") and not isinstance(given, type):  # Ablate instead of Ablate(v) has `edit` too
        return given
    remedy = "Ablate(direction) or Steer(direction, strength); for several conditions {'ablated': Ablate(direction)}."
    raise wrong_kind(given, "An intervention is needed: what to do along a direction.", remedy)


def check_fit(span: Span, model: OpenModel) -> int:
    """Return a span's layer; raise if the model has no such layer or another width."""
    layer = check_layer(span.layer, model.n_layers)
    if span.basis.shape[1:] != (model.d_model,):
        given = f"The direction of layer {layer} has the shape {span.basis.shape[1:]}."
        raise GravlensError(given, f"This model has width {model.d_model}.", "a direction of this model's history.")
    return layer


def fitted(model: OpenModel, interventions: Sequence[Intervention]) -> list[tuple[Intervention, Span]]:
    """Pair each intervention with each of its directions; raise where one does not fit the model."""
    pairs = [(edit, span) for edit in interventions for span in each(check_intervention(edit).directions)]
    for _, span in pairs:
        check_fit(span, model)
    return pairs


def fwd_hooks(model: Openable, *interventions: Intervention) -> list[tuple[str, LensHook]]:
    """Return `[(hook name, function), …]` for TransformerLens' `run_with_hooks` and `hooks`; they count no firings.

    At one layer interventions act in the order given. GravlensError for a Hugging Face model, a layer out of range
    (on which a bridge of 3.9 is silent) or a direction of another width.
    """
    opened = open_model(model)
    if opened.kind == "huggingface":
        given, wanted = f"A {type(opened.module).__name__} was given.", "Hook points are TransformerLens'."
        raise GravlensError(given, wanted, "with intervene(model, …): model(…), or a TransformerBridge.")
    return [(span.hook_name, _lens_hook(edit, span)) for edit, span in fitted(opened, interventions)]


def _lens_hook(edit: Intervention, span: Span) -> LensHook:
    def function(activation: States, hook: Any) -> States:  # TransformerLens passes its hook point by this name
        if activation.shape[-1] != (width := span.basis.shape[1]):  # attached by hand, as to the heads' hook_z
            given = f"Activations {tuple(activation.shape)} were given, a direction has width {width}."
            raise GravlensError(given, "Both need one width.", f"the hook point {span.hook_name}.")
        return edit.edit(activation, span)

    return function


class _LensHooks:
    """The functions that TransformerLens' `run_with_hooks`, `hooks` and `add_hook` take."""

    @property
    def hook(self: Intervention) -> LensHook:
        """`(activation, hook) -> activation` along one direction: `fwd_hooks=[(v.hook_name, Ablate(v).hook)]`."""
        if len(spans := each(self.directions)) == 1:
            return _lens_hook(self, spans[0])
        given = f"{type(self).__name__} acts at the layers {[span.layer for span in spans]}."
        raise GravlensError(given, "A hook acts at one.", ".fwd_hooks(model), which has one for each direction.")

    def fwd_hooks(self: Intervention, model: Openable) -> list[tuple[str, LensHook]]:
        """Return `[(hook name, function), …]`, one per direction; see `gravlens.interventions.fwd_hooks`."""
        return fwd_hooks(model, self)


@dataclass(frozen=True, eq=False)
class _Along(_LensHooks):
    """An intervention along directions, which are checked."""

    directions: Span | Spans

    def __post_init__(self) -> None:
        _check_spans(self.directions)

    def with_directions(self, directions: Any) -> Self:
        return replace(self, directions=directions)


@dataclass(frozen=True, eq=False)
class Steer(_Along):
    """Activation addition, h + strength · distance · v: strength 1 is the step from the anchor to the witness.

    Attributes:
        directions: a `Direction`, or `Directions`, each added at its own layer.
        strength: in units of each direction's distance.

    Examples:
        >>> with gl.intervene(model, gl.Steer(vs[1], -0.5)):  # half the distance away from the witness
        ...     answers = gl.generate_answers(model, prompts, max_new_tokens=8)
    """

    directions: Direction | Directions
    strength: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_strength(self)

    def edit(self, hidden: States, direction: Direction) -> States:
        wide, basis = _widened(hidden, direction)
        return (wide + self.strength * direction.distance * basis[0]).to(hidden.dtype)  # not in place: for autograd


@dataclass(frozen=True, eq=False)
class Ablate(_Along):
    """Directional ablation, h − ⟨h, v⟩ v; h − QᵀQ h for a subspace with the basis Q.

    Attributes:
        directions: one or several directions or subspaces, each ablated at its own layer; `everywhere` repeats one at
            all layers.

    Examples:
        >>> with gl.intervene(model, gl.Ablate(vs[2])) as fired:
        ...     scores = gl.refusal_log_odds(model, prompts)
    """

    def edit(self, hidden: States, direction: Span) -> States:
        return _put(hidden, direction, np.zeros(len(direction.basis)))


@dataclass(frozen=True, eq=False)
class Clamp(_Along):
    """h − QᵀQ (h − m): clamp the component to that of m, the anchor's mean state, plus strength · distance along v.

    Strength 0 is mean ablation (at the anchor's mean), 1 clamps to the witness's mean. For a value of your own, in
    residual units, ablate and then steer.

    Attributes:
        directions: one or several directions or subspaces.
        residuals: contain `anchor` at these layers.
        strength: in units of each direction's distance; 0 for subspaces.

    Examples:
        >>> with gl.intervene(model, gl.Clamp(vs, given)):  # to the anchor's mean at every layer
        ...     scores = gl.refusal_log_odds(model, prompts)
    """

    residuals: Residuals = field(repr=False)
    strength: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_source(self.directions, self.residuals, "anchor")
        if self.strength:  # 0 is defined along subspaces too
            _check_strength(self)

    def edit(self, hidden: States, direction: Span) -> States:
        component = direction.basis @ self._means[direction.layer]
        return _put(hidden, direction, component + self.strength * direction.distance if self.strength else component)

    @cached_property  # `edit` runs in every forward pass, and a mean over all prompts once is enough
    def _means(self) -> dict[int, Float[np.ndarray, " d_model"]]:
        return dict(zip(self.residuals.layers, self.residuals.of("anchor").mean(0, dtype=np.float64), strict=True))


@dataclass(frozen=True, eq=False)
class Patch(_Along):
    """Activation patching at the last token of each prompt x: h − QᵀQ (h − h_source(x)).

    Patching the anchor's component into a fine-tuned model tests whether a change of the component is necessary;
    patching the fine-tuned model's into the anchor tests whether it is sufficient.

    Attributes:
        directions: one or several directions or subspaces; `whole_state(directions)` patches the full state.
        residuals: contain the source at these layers, read at the last prompt token.
        ids: token ids of their prompts, in the same order: `encode(tokenizer, prompts)`.
        checkpoint: name of the source in `residuals`.

    Examples:
        >>> from gravlens.history.encoding import encode
        >>> patch = gl.Patch(vs[1], held_out, encode(model.tokenizer, prompts), checkpoint="anchor")
        >>> with gl.intervene(model, patch):
        ...     scores = gl.refusal_log_odds(model, prompts)
    """

    residuals: Residuals = field(repr=False)
    ids: Sequence[Sequence[int]] = field(repr=False)
    checkpoint: str = "anchor"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_source(self.directions, self.residuals, self.checkpoint)
        n_prompts, position = self.residuals.values.shape[1], self.residuals.meta.get("positions", "last")
        if len(self.ids) != n_prompts or position not in ("last", -1):
            given = f"Ids of {len(self.ids)} prompts were given, and states of {n_prompts} at position {position}."
            wanted = "Both must be of the same prompts, at the last token."
            raise GravlensError(given, wanted, "cache_residuals and encode of them.")

    def edit(self, hidden: Float[Tensor, "prompt pos d_model"], direction: Span) -> States:
        reading = current_reading(hidden)
        where = reading.chosen("last", hidden.shape[1])
        if not where.any():
            return hidden  # itself, not a copy: a decoding step must not count as a firing
        column = self.residuals.layers.index(direction.layer)
        source = self.residuals.of(self.checkpoint)[self._rows_of(reading), column].astype(np.float64)
        restored = _put(hidden, direction, (source @ direction.basis.T)[:, None])
        return torch.where(where.to(hidden.device)[..., None], restored, hidden)

    @cached_property
    def _row(self) -> dict[tuple[int, ...], int]:
        return {tuple(prompt): row for row, prompt in enumerate(self.ids)}

    def _rows_of(self, reading: Reading) -> list[int]:
        prompts = reading.prompts  # matched by token ids: batches are sorted by length
        if unknown := [list(prompt) for prompt in prompts if prompt not in self._row]:
            given = f"The prompt {unknown[0]} is not among the {len(self.ids)} prompts of the source."
            wanted = "A patch needs the source's state on the same tokens."
            raise GravlensError(given, wanted, "residuals and ids of these prompts.")
        return [self._row[prompt] for prompt in prompts]


@dataclass(frozen=True, eq=False)
class At(_LensHooks):
    """An intervention at some token positions only.

    Attributes:
        intervention: any.
        positions: `"last"` (the last prompt token), `"prompt"` (up to it), `"answer"` (after it), offsets such as
            `(-1, -2)` (the last prompt token is −1), or `"all"`, as without `At`.

    Examples:
        >>> with gl.intervene(model, gl.At(gl.Ablate(vs), "last")):  # the answer's tokens stay
        ...     scores = gl.refusal_log_odds(model, prompts)
    """

    intervention: Intervention
    positions: Positions

    def __post_init__(self) -> None:
        check_intervention(self.intervention)
        check_positions(self.positions)

    @property
    def directions(self) -> Span | Spans:
        return self.intervention.directions

    def edit(self, hidden: Float[Tensor, "prompt pos d_model"], direction: Span) -> States:
        if self.positions == "all":  # needs no `reading`, so it also works in passes outside gravlens
            return self.intervention.edit(hidden, direction)
        where = current_reading(hidden).chosen(self.positions, hidden.shape[1])
        edited = self.intervention.edit(hidden, direction) if where.any() else hidden
        # Edited everywhere, then selected: prompts differ in their number of positions, so a gather would be ragged.
        return hidden if edited is hidden else torch.where(where.to(hidden.device)[..., None], edited, hidden)

    def with_directions(self, directions: Any) -> "At":
        return replace(self, intervention=self.intervention.with_directions(directions))


def tokens_apart(edit: Intervention) -> int | None:
    """Return how many of the last prompt tokens an edit tells apart; None where a pass must not be cut into parts."""
    if type(edit) is At:
        inner, offsets = tokens_apart(edit.intervention), edit.positions
        return inner and max(inner, 1 if isinstance(offsets, str) else -min(offsets))
    # Exactly these: nothing is known of what somebody else's edit makes of a token's place in a pass.
    return 1 if type(edit) in (Steer, Ablate, Clamp, Patch) else None


def mark_apart(hook: Hook, edit: Intervention) -> Hook:
    """Let a hook say whether it may see a pass in parts (`APART` of models/forward.py)."""
    setattr(hook, APART, tokens_apart(edit))
    return hook


@overload
def everywhere(direction: Direction, model: Openable | int) -> Directions: ...


@overload
def everywhere(direction: Subspace, model: Openable | int) -> Subspaces: ...


def everywhere(direction: Span, model: Openable | int) -> Spans:
    """Repeat one layer's direction (or subspace) and distance at all layers of a model, or at `model` layers."""
    (direction,) = each(direction)
    layers = range(model if isinstance(model, int) else open_model(model).n_layers)
    if isinstance(direction, Direction):
        return Directions(tuple(replace(direction, layer=layer) for layer in layers))
    return Subspaces(tuple(replace(direction, layer=layer) for layer in layers))


def _put(hidden: Tensor, span: Span, component: np.ndarray) -> Tensor:
    """Replace the component along a span by another, [..., rank]."""
    # One update for ablation, clamping and patching alike, rounded to the model's dtype once.
    wide, basis = _widened(hidden, span)
    wanted = torch.tensor(component, dtype=wide.dtype, device=wide.device)
    return (wide + (wanted - wide @ basis.T) @ basis).to(hidden.dtype)


def _widened(hidden: Tensor, span: Span) -> tuple[Tensor, Tensor]:
    """States in fp32 at least (bf16 would round a small step away), and the basis [rank, d_model] in the same dtype."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide, torch.tensor(span.basis, dtype=wide.dtype, device=wide.device)


def _check_spans(spans: Span | Spans) -> None:
    if not each(spans):
        raise GravlensError("No direction was given.", "An intervention needs at least one.", "locate_vrev(sequence).")
    for one in each(spans):
        if not isinstance(one, Direction):
            continue  # a subspace has checked its basis itself
        if one.undefined is not None:
            raise undefined_error(one)
        length = float(np.linalg.norm(one.vector.astype(np.float64)))
        if not abs(length - 1) <= UNIT_WITHIN:  # not `>`: NaN must be refused too
            given = f"The direction of layer {one.layer} ({one.estimator}) has length {length:.4g}."
            wanted = "Unit length is needed: else ablation leaves a component and strength is not in units of distance."
            raise GravlensError(given, wanted, "direction_from(vector, layer=…), which normalises it.")


def _check_strength(edit: Steer | Clamp) -> None:
    """Raise unless strength and distances are finite, along directions: a subspace has no sign."""
    name, spans = type(edit).__name__, each(edit.directions)
    if not all(isinstance(span, Direction) for span in spans):
        given = f"{name}(strength={edit.strength}) was given along subspaces."
        raise GravlensError(given, "A subspace has no sign.", "directions, Ablate(subspaces), or Clamp at strength 0.")
    if not np.isfinite([edit.strength, *(span.distance for span in spans)]).all():
        given = f"{name}(strength={edit.strength}) was given with distances {[span.distance for span in spans]}."
        raise GravlensError(given, "Both must be finite.", "direction_from(vector, layer=…, distance=…).")


def _check_source(spans: Span | Spans, residuals: Residuals, checkpoint: str) -> None:
    """Raise unless the residuals contain the checkpoint at the spans' layers and width."""
    width = check_states(residuals).of(checkpoint).shape[-1]
    for span in each(spans):
        if span.layer not in residuals.layers or span.basis.shape[1] != width:
            given = f"A direction of layer {span.layer} and width {span.basis.shape[1]} was given."
            wanted = f"The residuals contain layers {list(residuals.layers)} of width {width}."
            remedy = "cache_residuals(sequence, prompts) of the same history, at these layers."
            raise GravlensError(given, wanted, remedy)
