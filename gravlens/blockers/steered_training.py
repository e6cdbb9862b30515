"""Changes of the training passes alone: the model that is saved runs without them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gravlens.blockers.blocking import BoundBlocker
from gravlens.directions.direction import Direction, Directions, Span, Spans
from gravlens.interventions.edits import Ablate, Steer
from gravlens.interventions.hooks import intervene
from gravlens.models.opening import OpenModel


@dataclass(frozen=True, eq=False)
class PreventativeSteering:
    """h ← h + strength · distance · v in the training passes, so that the data need not move the model there.

    Persona vectors (Chen et al. 2025). With a strength above 0 the model is already back in training and has less to
    gain from moving along v_rev.

    Attributes:
        directions: one a layer; steered at all of them together, so at one layer the strength is a full one.
        strength: in units of each direction's distance.
    """

    directions: Direction | Directions
    strength: float = 1.0

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Nothing is read."""
        steer = Steer(self.directions, self.strength)
        return BoundBlocker(during=lambda weight=1.0: intervene(model, replace(steer, strength=weight * self.strength)))


@dataclass(frozen=True, eq=False)
class TrainingAblation:
    """h ← h − Qᵀ Q h in the training passes: the data can neither read nor use the subspace (CAFT, Casademunt 2025).

    Attributes:
        directions: a direction or subspace a layer.
    """

    directions: Spans

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Nothing is read; there is no half of an ablation, so any weight above 0 is a whole one."""
        ablate = Ablate(self.directions)
        return BoundBlocker(during=lambda weight=1.0: intervene(model, ablate))


@dataclass(frozen=True, eq=False)
class GradientAblation:
    """g ← g − strength · Qᵀ Q g for the residual's gradient in the backward pass; the forward pass is as it was.

    Attributes:
        directions: a direction or subspace a layer.
        strength: share of the gradient there that is removed; 1 is all of it.
    """

    directions: Spans
    strength: float = 1.0

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Nothing is read."""
        Ablate(self.directions)  # raises where a direction is undefined or not of unit length
        return BoundBlocker(
            during=lambda weight=1.0: intervene(model, _GradientEdit(self.directions, weight * self.strength))
        )


@dataclass(frozen=True, eq=False)
class _GradientEdit:
    """The identity, as an `Intervention`, with an edited gradient."""

    directions: Spans
    strength: float

    def edit(self, hidden: Float[Tensor, "*batch d_model"], direction: Span) -> Float[Tensor, "*batch d_model"]:
        basis = torch.tensor(direction.basis, device=hidden.device)
        edited: Any = _WithoutGradient.apply(hidden, basis, self.strength)
        return edited

    def with_directions(self, directions: Spans) -> "_GradientEdit":
        return replace(self, directions=directions)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, basis: Tensor, strength: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(basis)
        ctx.strength = strength
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (basis,) = ctx.saved_tensors
        wide = gradient.to(torch.promote_types(gradient.dtype, basis.dtype))
        return (wide - ctx.strength * (wide @ basis.T) @ basis).to(gradient.dtype), None, None
