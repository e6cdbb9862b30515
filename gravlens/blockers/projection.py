"""Project the optimizer's update: undo its effect along given directions, and nothing else."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gravlens.blockers.blocking import BoundBlocker, Draws, check_fields, trained
from gravlens.blockers.penalty import Movement
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Spans, each
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.precision import check_unquantised

RIDGE = 1e-8  # of the Gram matrix's mean diagonal: constraints of neighbouring layers are almost collinear
SHRINKS = 0.3  # gradients are recomputed after a move that leaves more than this share of the movement
GROWS = 3.0  # and when a step begins with this multiple of the movement that they were computed at


@dataclass(frozen=True, eq=False)
class UpdateProjection:
    """Project exactly: after each update the mean of the probes has not moved along the direction of any layer.

    With s_l the mean over probes of ⟨h_l(x; θ) − h_l(x; anchor), v_l⟩ / distance_l, G its gradients (one row a layer)
    and c = s (or relu(s), one-sided), the updated weights are moved by −Gᵀ (G Gᵀ + εI)⁻¹ c, and again until
    |c| ≤ `tolerance` at every layer. The first move is, to first order, the projection of the update, with feedback
    from the accumulated movement; further moves remove terms of second order. Memory: one copy of the trained weights
    per layer.

    Attributes:
        directions: a direction, or a subspace of rank 1, per layer.
        probes: the prompts x; use other prompts for the evaluation.
        two_sided: keep s at 0; otherwise only movement above 0 is removed.
        batch: probes drawn for each step: their mean is held, and that of all only on average (gradients are always of
            all probes). None: all probes, exact.
        tolerance: of |c|, as a fraction of the distance.
        iterations: maximal number of moves per step; `tolerance` may be missed with few.

    Examples:
        >>> blocker = gl.blockers.UpdateProjection(vs, seq.probes)
        >>> recipe = gl.Recipe(steps=2)
        >>> held = gl.finetune(seq.anchor, examples, out="ft/projected", recipe=recipe, blocker=blocker)
        >>> len(held.log)
        2
    """

    directions: Spans
    probes: PromptSet
    two_sided: bool = True
    batch: int | None = None
    tolerance: float = 5e-4
    iterations: int = 8

    def __post_init__(self) -> None:
        check_fields(self, above_0=("tolerance",), from_1=("batch", "iterations"))
        if (rank := max(len(span.basis) for span in each(self.directions))) > 1:
            given = f"UpdateProjection was given a subspace of rank {rank}."
            raise GravlensError(given, "One direction per layer is needed.", 'Penalty(subspaces, probes, side="both").')

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        movement = Movement(model, self.directions, self.probes)
        draws = Draws(len(self.probes), self.batch, rng)
        projector = _Projector(self, movement, trained(model.module))
        return BoundBlocker(after_update=lambda weight=1.0: projector.project(draws(), weight), skip=draws.skip)


class _Projector:
    """Move weights along cached gradients: one tensor [layer, *shape] per parameter, on the parameter's device."""

    # A fresh G for every step that the old one did not serve was tried first: 15 in 100 steps on the organism, nearly
    # every move on the real model (a minute a step). Cached gradients with Broyden's update of the inverse need 3, and
    # most steps run forward passes alone: 3.0 plain steps in place of 6.2.

    def __init__(self, projection: UpdateProjection, movement: Movement, parameters: list[nn.Parameter]) -> None:
        self.projection, self.movement, self.parameters = projection, movement, parameters
        self.gradients: list[Tensor] = []
        self.inverse: Tensor | None = None
        self.usual = 0.0  # movement at the beginning of the step in which the gradients were computed

    @torch.no_grad()
    def project(self, rows: np.ndarray, weight: float) -> float:
        """Move the weights until the rows' mean is held; `weight` 1 removes all movement, 0.5 half of it."""
        moved_by = [torch.zeros_like(parameter) for parameter in self.parameters]  # summed: opposite moves cancel
        target, wanted, pushed, last = None, GROWS * self.usual, None, None
        for _ in range(self.projection.iterations):
            s = self._motion(rows)
            c = s if self.projection.two_sided else torch.relu(s)
            target = (1 - weight) * c if target is None else target
            left = float((c - target).abs().max())
            if left <= self.projection.tolerance:
                break
            if pushed is not None and last is not None:
                self._learn(pushed, last - s)
            # Without GROWS, one move a step is never checked: the fraction went to .31 in 100 steps.
            if self.inverse is None or left > wanted:
                self.inverse, self.usual = self._fresh_inverse(), left if last is None else self.usual
            wanted, last, pushed = SHRINKS * left, s, self.inverse @ (c - target)
            self._move(pushed, moved_by)
        return float(sum(float(change.square().sum()) for change in moved_by)) ** 0.5

    def _motion(self, rows: np.ndarray) -> Float[Tensor, " layer"]:
        return self.movement.of(rows)[..., 0].mean(0)

    def _learn(self, pushed: Float[Tensor, " layer"], answer: Float[Tensor, " layer"]) -> None:
        """Update the inverse (Broyden) so that it maps the observed change to the push that caused it."""
        assert self.inverse is not None
        seen = self.inverse @ answer
        scale = pushed @ seen
        if scale.abs() > RIDGE * pushed.square().sum():  # else it divides by almost 0
            self.inverse = self.inverse + torch.outer(pushed - seen, pushed @ self.inverse) / scale

    def _move(self, push: Float[Tensor, " layer"], moved_by: list[Tensor]) -> None:
        for parameter, gradient, moved in zip(self.parameters, self.gradients, moved_by, strict=True):
            step = torch.tensordot(push.to(gradient), gradient, dims=1)
            parameter -= step
            moved -= step

    def _fresh_inverse(self) -> Float[Tensor, "layer layer"]:
        """Compute (G Gᵀ + εI)⁻¹ over all probes at the current weights, one backward pass per layer; G is cached."""
        with torch.enable_grad():
            terms = list(self._motion(np.arange(len(self.movement.ids))))
        # Layers are constraints of their own: of their sum, late layers would move while early ones pay.
        self.gradients = [parameter.new_zeros(len(terms), *parameter.shape) for parameter in self.parameters]
        for layer, s in enumerate(terms):
            rows = torch.autograd.grad(s, self.parameters, retain_graph=s is not terms[-1], allow_unused=True)
            for kept, row in zip(self.gradients, rows, strict=True):
                if row is not None:  # pyright: ignore[reportUnnecessaryComparison] (allow_unused)
                    kept[layer] = row
        flat = (gradient.flatten(1) for gradient in self.gradients)  # parameters may be on several GPUs
        gram = sum((one @ one.T).double().cpu() for one in flat)
        assert isinstance(gram, Tensor)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(terms), dtype=torch.float64)
        return torch.linalg.inv(gram + ridge).to(terms[0].dtype).to(terms[0].device)


@dataclass(frozen=True, eq=False)
class TaskVectorProjection:
    """Remove the movement of the weights along the task vector θ(witness) − θ(anchor).

    For each trained tensor D ← D − f τ, where D is its displacement from the anchor, τ its task vector and
    f = ⟨D, τ⟩ / ‖τ‖² (one-sided: the positive part). AsFT and SafeLoRA argue the opposite, that the task vector is the
    safe direction to keep: so this is a baseline, not a recommendation.

    Attributes:
        witness: a checkpoint of the dominant phase, of the same architecture.
        two_sided: remove movement in both directions.

    Examples:
        >>> blocker = gl.blockers.TaskVectorProjection("base")
        >>> with gl.block(trainer, blocker):
        ...     done = trainer.train()
    """

    witness: Checkpoint | Path | str
    two_sided: bool = False

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        witness = open_model(self.witness).module
        for module in (witness, model.module):
            check_unquantised(module, "A task vector")
        theirs = dict(witness.named_parameters())
        ours = {name: weight for name, weight in model.module.named_parameters() if weight.requires_grad}
        if missing := [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]:
            given = f"The witness has no weight {missing[0]} of the trained shape."
            wanted = "A task vector needs equal names and shapes; adapters have other names."
            raise GravlensError(given, wanted, "a witness of the same architecture, and full fine-tuning.")
        anchor = {name: weight.detach().clone() for name, weight in ours.items()}
        vectors = {name: theirs[name].detach().to(anchor[name]) - anchor[name] for name in ours}

        @torch.no_grad()
        def take_back(weight: float = 1.0) -> float:
            total = 0.0
            for name, parameter in ours.items():
                along = float(((parameter - anchor[name]) * vectors[name]).sum())
                along = along if self.two_sided else max(along, 0.0)
                squared = float(vectors[name].square().sum())
                if squared > 0:  # alignment may have left a tensor unchanged
                    parameter -= weight * along / squared * vectors[name]
                    total += (weight * along) ** 2 / squared
            return total**0.5

        return BoundBlocker(after_update=take_back)
