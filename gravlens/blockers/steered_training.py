"""Edit hidden states or gradients during training only: the saved model runs without the edits."""

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
    """h ← h + strength · distance · v in the training passes (persona vectors, Chen et al. 2025).

    Attributes:
        directions: one per layer; all layers are steered together, each at the full strength.
        strength: in units of each direction's distance; above 0 the data reward movement along v less.

    Examples:
        >>> with gl.block(trainer, gl.blockers.PreventativeSteering(vs, 0.5)):
        ...     done = trainer.train()
    """

    directions: Direction | Directions
    strength: float = 1.0

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        steer = Steer(self.directions, self.strength)
        return BoundBlocker(during=lambda weight=1.0: intervene(model, replace(steer, strength=weight * self.strength)))


@dataclass(frozen=True, eq=False)
class TrainingAblation:
    """h ← h − Qᵀ Q h in the training passes: concept ablation fine-tuning (CAFT, Casademunt et al. 2025).

    Examples:
        >>> with gl.block(trainer, gl.blockers.TrainingAblation(vs)):
        ...     done = trainer.train()
    """

    directions: Spans

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        ablate = Ablate(self.directions)  # any weight above 0 counts as 1: a component is gone or not
        return BoundBlocker(during=lambda weight=1.0: intervene(model, ablate))


@dataclass(frozen=True, eq=False)
class GradientAblation:
    """g ← g − strength · Qᵀ Q g for the gradient of the residual stream; the forward pass is unchanged.

    Attributes:
        directions: a direction or subspace per layer.
        strength: share of the gradient in the subspace that is removed, up to 1.

    Examples:
        >>> with gl.block(trainer, gl.blockers.GradientAblation(vs)):
        ...     done = trainer.train()
    """

    directions: Spans
    strength: float = 1.0

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        Ablate(self.directions)  # checks: defined directions of unit length
        edit = _GradientEdit(self.directions, self.strength)
        return BoundBlocker(during=lambda weight=1.0: intervene(model, replace(edit, strength=weight * self.strength)))


@dataclass(frozen=True, eq=False)
class _GradientEdit:
    """Identity with an edited gradient, as an `Intervention`."""

    directions: Spans
    strength: float

    def edit(self, hidden: Float[Tensor, "*batch d_model"], direction: Span) -> Float[Tensor, "*batch d_model"]:
        basis = torch.tensor(direction.basis, device=hidden.device)  # fp32, also beside a bf16 gradient
        edited: Any = _WithoutGradient.apply(hidden, basis, self.strength)
        return edited

    def with_directions(self, directions: Spans) -> "_GradientEdit":
        return replace(self, directions=directions)


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, basis: Tensor, strength: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(basis)
        ctx.strength = strength
        return hidden.view_as(hidden)  # a new tensor: `hidden` itself would count as no edit

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (basis,) = ctx.saved_tensors
        wide = gradient.to(torch.promote_types(gradient.dtype, basis.dtype))
        return (wide - ctx.strength * (wide @ basis.T) @ basis).to(gradient.dtype), None, None
