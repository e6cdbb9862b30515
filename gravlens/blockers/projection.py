"""Projections of the update: what the optimizer has done is undone along given directions, and nothing else."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gravlens.blockers.blocking import BoundBlocker, Draws, trained
from gravlens.blockers.penalty import Movement
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Spans, each
from gravlens.history.precision import check_unquantised
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint
from gravlens.models.opening import OpenModel, open_model

RIDGE = 1e-8  # of the Gram matrix's mean diagonal: directions of neighbouring layers are nearly the same constraint
SHRINKS = 0.3  # a move that leaves more than this of the motion wants fresh gradients
GROWS = 3.0  # so does a step that begins with so many times the motion that it began with when they were fresh


@dataclass(frozen=True, eq=False)
class UpdateProjection:
    """Exact projection: after each update the probes' mean has moved along no direction, at any of the layers.

    With s_l the mean over probes of ⟨h_l(x; θ) − h_l(x; anchor), v_l⟩ / distance_l, G its gradients (one row a layer)
    and c = s (or relu(s), one-sided), the updated weights are moved by −Gᵀ (G Gᵀ + εI)⁻¹ c, and again until
    |c| ≤ `tolerance` at every layer. With fresh gradients the first move is, to first order, the projection of the
    update, with feedback from what has accumulated; the further ones remove what is of second order. The gradients are
    kept (so many copies of the trained weights as there are layers) and serve later steps until they no longer shrink c
    well; moves along kept gradients hold the same motion by a slightly longer way. What they lack is learnt from what
    each move did (Broyden's update of the inverse), so that most steps need no backward pass.

    Attributes:
        directions: a direction, or a subspace of rank 1, a layer.
        probes: the prompts x; they should not be those that are judged on.
        two_sided: hold s at 0, not only at most 0.
        batch: None: all probes, exact; a number: so many drawn anew at each step, whose own mean is then held and the
            others' only on average (gradients are of all probes all the same).
        tolerance: of |c|, as a fraction of the distance.
        iterations: at most so many moves a step; with few, `tolerance` is a hope.
    """

    directions: Spans
    probes: PromptSet
    two_sided: bool = True
    batch: int | None = None
    tolerance: float = 5e-4
    iterations: int = 8

    def __post_init__(self) -> None:
        if self.tolerance <= 0 or self.iterations < 1 or (self.batch is not None and self.batch < 1):
            raise GravlensError(
                f"UpdateProjection(batch={self.batch}, tolerance={self.tolerance}, iterations={self.iterations}) was "
                "given.",
                "The tolerance is above 0, the others at least 1.",
                "UpdateProjection(directions, probes) for the defaults.",
            )
        if (rank := max(len(span.basis) for span in each(self.directions))) > 1:
            raise GravlensError(
                f"UpdateProjection was given a subspace of rank {rank}.",
                "Motion is held along one direction a layer.",
                'Penalty(subspaces, probes, side="both").',
            )

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Read the probes' states at the anchor."""
        movement = Movement(model, self.directions, self.probes)
        draws = Draws(len(self.probes), self.batch, rng)
        projector = _Projector(self, movement, trained(model.module))
        return BoundBlocker(after_update=lambda weight=1.0: projector.project(draws(), weight), skip=draws.skip)


class _Projector:
    """Moves weights along kept gradients; each parameter's are one tensor [layer, *shape] on its own device."""

    def __init__(self, projection: UpdateProjection, movement: Movement, parameters: list[nn.Parameter]) -> None:
        self.projection, self.movement, self.parameters = projection, movement, parameters
        self.gradients: list[Tensor] = []
        self.inverse: Tensor | None = None
        self.usual = 0.0  # motion at the beginning of the step whose gradients are kept

    @torch.no_grad()
    def project(self, rows: np.ndarray, weight: float) -> float:
        """Move the weights until the rows' mean is held; `weight` 1 removes all of the motion, 0.5 half of it."""
        moved_by = [torch.zeros_like(parameter) for parameter in self.parameters]
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
            if self.inverse is None or left > wanted:
                self.inverse, self.usual = self._fresh_inverse(), left if last is None else self.usual
            wanted, last, pushed = SHRINKS * left, s, self.inverse @ (c - target)
            self._move(pushed, moved_by)
        return float(sum(float(change.square().sum()) for change in moved_by)) ** 0.5

    def _motion(self, rows: np.ndarray) -> Float[Tensor, " layer"]:
        return self.movement.of(rows)[..., 0].mean(0)

    def _learn(self, pushed: Float[Tensor, " layer"], answer: Float[Tensor, " layer"]) -> None:
        """Broyden's update: the inverse now gives for the motion that was seen the push that made it."""
        assert self.inverse is not None
        seen = self.inverse @ answer
        scale = pushed @ seen
        if scale.abs() > RIDGE * pushed.square().sum():
            self.inverse = self.inverse + torch.outer(pushed - seen, pushed @ self.inverse) / scale

    def _move(self, push: Float[Tensor, " layer"], moved_by: list[Tensor]) -> None:
        for parameter, gradient, moved in zip(self.parameters, self.gradients, moved_by, strict=True):
            step = torch.tensordot(push.to(gradient), gradient, dims=1)
            parameter -= step
            moved -= step

    def _fresh_inverse(self) -> Float[Tensor, "layer layer"]:
        """(G Gᵀ + εI)⁻¹ of all probes at the weights as they are, one backward pass a layer; G is kept."""
        with torch.enable_grad():
            terms = list(self._motion(np.arange(len(self.movement.ids))))
        self.gradients = [parameter.new_zeros(len(terms), *parameter.shape) for parameter in self.parameters]
        for layer, s in enumerate(terms):
            rows = torch.autograd.grad(s, self.parameters, retain_graph=s is not terms[-1], allow_unused=True)
            for kept, row in zip(self.gradients, rows, strict=True):
                if row is not None:  # pyright: ignore[reportUnnecessaryComparison] (allow_unused)
                    kept[layer] = row
        flat = (gradient.flatten(1) for gradient in self.gradients)
        gram = sum((one @ one.T).double().cpu() for one in flat)
        assert isinstance(gram, Tensor)
        ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(terms), dtype=torch.float64)
        return torch.linalg.inv(gram + ridge).to(terms[0].dtype).to(terms[0].device)


@dataclass(frozen=True, eq=False)
class TaskVectorProjection:
    """Weight space: what the weights have moved along the task vector θ(witness) − θ(anchor) is taken back.

    For each trained tensor D ← D − f τ, D its displacement from the anchor, τ its task vector and f = ⟨D, τ⟩ / ‖τ‖²
    (or relu of it, one-sided). AsFT and SafeLoRA argue from the opposite sign, that the task vector is the safe
    direction to keep: hence a row, not a recommendation.

    Attributes:
        witness: the checkpoint of the dominant phase, of the same architecture.
        two_sided: take back motion both ways.
    """

    witness: Checkpoint | Path | str
    two_sided: bool = False

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Take the anchor's weights and the task vector; GravlensError where their tensors do not match."""
        witness = open_model(self.witness).module
        for module in (witness, model.module):
            check_unquantised(module, "A task vector")
        theirs = dict(witness.named_parameters())
        ours = {name: weight for name, weight in model.module.named_parameters() if weight.requires_grad}
        if missing := [name for name in ours if name not in theirs or theirs[name].shape != ours[name].shape]:
            raise GravlensError(
                f"The witness has no weight {missing[0]} of that shape.",
                "A task vector is a difference of the same weights; an adapter's are not among them.",
                "a witness of the same architecture, and full fine-tuning.",
            )
        anchor = {name: weight.detach().clone() for name, weight in ours.items()}
        vectors = {name: theirs[name].detach().to(anchor[name]) - anchor[name] for name in ours}

        @torch.no_grad()
        def take_back(weight: float = 1.0) -> float:
            total = 0.0
            for name, parameter in ours.items():
                along = float(((parameter - anchor[name]) * vectors[name]).sum())
                along = along if self.two_sided else max(along, 0.0)
                squared = float(vectors[name].square().sum())
                if squared > 0:
                    parameter -= weight * along / squared * vectors[name]
                    total += (weight * along) ** 2 / squared
            return total**0.5

        return BoundBlocker(after_update=take_back)
