"""Blockers: what is added to a fine-tuning step to keep it from moving along a direction.

A blocker is a frozen description. `bind` is called once, while the model still stands at its start; what it returns is
called at every micro-batch and gives a loss whose gradient is added to the task's. Families of blockers that change a
forward pass or an update instead will bind to the same model through further methods of a `BoundBlocker`.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from gravlens.directions import Directions
from gravlens.errors import GravlensError
from gravlens.models import OpenModel
from gravlens.prompts import PromptSet, encode, pad
from gravlens.residuals import read_residuals, residuals_of_batch


class BoundBlocker(Protocol):
    """A blocker that knows the model it works on."""

    def loss(self) -> Float[Tensor, ""]:
        """The loss that is added at this micro-batch; differentiable in the model's parameters."""
        ...


class Blocker(Protocol):
    """The description of a blocker."""

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Take what is needed from the model at its start (the anchor)."""
        ...


@dataclass(frozen=True, eq=False)
class Penalty:
    """λ · mean over layers and probes of relu(s + margin)², s_l(x) = ⟨h_l(x; θ) − h_l(x; anchor), v_l⟩ / distance_l.

    Attributes:
        directions: one direction a layer; their layers are the Λ of the mean.
        probes: the prompts x.
        margin: 0 blocks motion along v; above 0 the model is *pushed* the other way, by up to this fraction.
        strength: λ.
        batch: how many probes are drawn anew at each step.
    """

    directions: Directions
    probes: PromptSet
    margin: float = 0.0
    strength: float = 30.0
    batch: int = 8

    def __post_init__(self) -> None:
        if self.strength < 0 or self.batch < 1 or self.margin < 0:
            raise GravlensError(
                f"Penalty(margin={self.margin}, strength={self.strength}, batch={self.batch}) was given.",
                "Margin and strength are at least 0, the batch at least 1.",
                "Penalty(directions, probes) for the defaults.",
            )

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> "BoundPenalty":
        """Read the probes' states at the anchor."""
        directions = self.directions.defined()
        ids = encode(model.tokenizer, self.probes)
        anchor = read_residuals(model, ids, layers=directions.layers)
        return BoundPenalty(self, model, ids, anchor, rng)


class BoundPenalty:
    """A `Penalty` at work."""

    def __init__(
        self, penalty: Penalty, model: OpenModel, ids: Sequence[Sequence[int]], anchor: Tensor, rng: np.random.Generator
    ) -> None:
        directions = penalty.directions.defined()
        self.penalty, self.model, self.ids, self.rng = penalty, model, ids, rng
        self.layers = directions.layers
        self.anchor = anchor.to(model.device)
        self.per_distance = torch.tensor(directions.vectors / directions.distances[:, None], dtype=torch.float32).to(
            model.device
        )

    def loss(self) -> Float[Tensor, ""]:
        """The penalty on a fresh draw of probes."""
        size = min(self.penalty.batch, len(self.ids))
        rows = self.rng.choice(len(self.ids), size=size, replace=False)
        with _without_dropout(self.model.module):
            states = residuals_of_batch(self.model, pad([self.ids[row] for row in rows]), layers=self.layers)
        moved = einsum(states - self.anchor[rows], self.per_distance, "prompt layer d, layer d -> prompt layer")
        return self.penalty.strength * torch.relu(moved + self.penalty.margin).square().mean()


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """The anchor was read without: with it, s would be noise where the model has not moved."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
