"""Changes to the residual stream while a model runs: frozen, pure h -> h', and `intervene`, which owns the hooks."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gravlens.directions import Direction, Directions
from gravlens.errors import GravlensError, check_layer
from gravlens.models import OpenModel, open_model, resid_post

UNIT_WITHIN = 1e-4


class Intervention(Protocol):
    """What `intervene` carries out: directions, each at its own layer, and what to do with a state there."""

    @property
    def directions(self) -> Direction | Directions:
        """Where, and along what."""
        ...

    def edit(self, hidden: Float[Tensor, "*batch d_model"], direction: Direction) -> Float[Tensor, "*batch d_model"]:
        """The changed states, as a new tensor of the same dtype."""
        ...

    def with_directions(self, directions: Direction | Directions) -> Self:
        """The same with other directions: how a random control is made."""
        ...


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
        _check_directions(self.directions)
        if not np.isfinite([self.strength, *(direction.distance for direction in each(self.directions))]).all():
            raise GravlensError(
                f"Steer(strength={self.strength}) was given along directions of "
                f"distance {[direction.distance for direction in each(self.directions)]}.",
                "Strength is counted in distances, and both are finite numbers.",
                "direction_from(vector, layer=…, distance=…).",
            )

    def edit(self, hidden: Float[Tensor, "*batch d_model"], direction: Direction) -> Float[Tensor, "*batch d_model"]:
        """h + strength · distance · v, computed in fp32 at least."""
        wide, vector = _widened(hidden, direction)
        return (wide + self.strength * direction.distance * vector).to(hidden.dtype)

    def with_directions(self, directions: Direction | Directions) -> "Steer":
        """The same strength along other directions."""
        return replace(self, directions=directions)


@dataclass(frozen=True, eq=False)
class Ablate:
    """h − ⟨h, v⟩ v: nothing is left along v.

    Attributes:
        directions: a `Direction`, or `Directions`, each removed at its own layer; for one vector at every layer see
            `everywhere`.
    """

    directions: Direction | Directions

    def __post_init__(self) -> None:
        _check_directions(self.directions)

    def edit(self, hidden: Float[Tensor, "*batch d_model"], direction: Direction) -> Float[Tensor, "*batch d_model"]:
        """h − ⟨h, v⟩ v, computed in fp32 at least."""
        wide, vector = _widened(hidden, direction)
        return (wide - (wide @ vector)[..., None] * vector).to(hidden.dtype)

    def with_directions(self, directions: Direction | Directions) -> "Ablate":
        """The same along other directions."""
        return replace(self, directions=directions)


def each(directions: Direction | Directions) -> tuple[Direction, ...]:
    """The directions one by one, also where there is only one."""
    return (directions,) if isinstance(directions, Direction) else tuple(directions)


def everywhere(direction: Direction, model: OpenModel | int) -> Directions:
    """One layer's vector and distance at every layer of a model (or of so many layers)."""
    n_layers = model.n_layers if isinstance(model, OpenModel) else model
    return Directions(tuple(replace(direction, layer=layer) for layer in range(n_layers)))


class Firings:
    """How often each layer's states were changed: one forward pass of a block is one firing of each edit there."""

    def __init__(self) -> None:
        self.per_layer: Counter[int] = Counter()

    @property
    def total(self) -> int:
        """Over all layers."""
        return self.per_layer.total()


@contextmanager
def intervene(model: OpenModel | nn.Module, *interventions: Intervention) -> Iterator[Firings]:
    """Carry out interventions on every forward pass inside the `with` block, at every token position.

    Prefill and each decoded token count alike, so a cached generation sees what an uncached one sees. At one layer the
    interventions act in the order given; nested blocks add theirs after the outer ones. The hooks are gone when the
    block is left, however it is left.

    Yields:
        `Firings`, counting.

    Raises:
        GravlensError: a layer out of range, a direction of another width, an output that is no state, and, at a
            clean exit, a layer that was never run.
    """
    opened = open_model(model)
    edits = [(edit, direction) for edit in interventions for direction in each(edit.directions)]
    firings = Firings()
    firings.per_layer.update({_check_fit(direction, opened): 0 for _, direction in edits})
    with ExitStack() as hooks:
        for edit, direction in edits:
            hook = _hook(edit, direction, firings)
            hooks.callback(resid_post(opened, direction.layer).register_forward_hook(hook).remove)
        yield firings
    silent = sorted(layer for layer, count in firings.per_layer.items() if count == 0)
    if silent or not edits:
        raise GravlensError(
            f"No forward pass reached layer {', '.join(map(str, silent))}." if edits else "No intervention was given.",
            "Inside the block this very model is run, with at least one intervention.",
            "with intervene(model, Ablate(v)): generate_answers(model, prompts).",
        )


def _hook(edit: Intervention, direction: Direction, firings: Firings) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        firings.per_layer[direction.layer] += 1
        if isinstance(output, Tensor):
            return edit.edit(output, direction)
        if type(output) is tuple and output and isinstance(output[0], Tensor):
            return (edit.edit(output[0], direction), *output[1:])
        raise GravlensError(
            f"The block of layer {direction.layer} gives a {type(output).__name__}.",
            "A block gives its states [prompt, pos, d_model], alone or first in a tuple.",
            "a decoder-only Hugging Face model, a TransformerBridge or a HookedTransformer.",
        )

    return hook


def _widened(hidden: Tensor, direction: Direction) -> tuple[Tensor, Tensor]:
    """States in fp32 at least (bf16 would round a small step away), and the vector beside them."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return wide, torch.tensor(direction.vector, dtype=wide.dtype, device=wide.device)


def _check_directions(directions: Direction | Directions) -> None:
    if not each(directions):
        raise GravlensError("No direction was given.", "An intervention has at least one.", "locate_vrev(sequence).")
    for direction in each(directions):
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


def _check_fit(direction: Direction, model: OpenModel) -> int:
    layer = check_layer(direction.layer, model.n_layers)
    if direction.vector.shape != (model.d_model,):
        raise GravlensError(
            f"The direction of layer {layer} has the shape {direction.vector.shape}.",
            f"This model's residual stream has width {model.d_model}.",
            "a direction that was located in this model's history.",
        )
    return layer
