"""A penalty on how far probes have moved along directions, or in subspaces, or in their whole state."""

from dataclasses import dataclass
from math import inf
from typing import Literal, get_args

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from gravlens.activations.residuals import read_residuals, residuals_of_batch
from gravlens.blockers.blocking import BoundBlocker, Draws, without_dropout
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction, Directions, Spans, each
from gravlens.history.prompts import PromptSet, encode, pad
from gravlens.models.opening import OpenModel

Side = Literal["one", "both", "reinforce"]


class Movement:
    """How far probes have moved from the anchor in some spans, in units of each layer's distance."""

    def __init__(self, model: OpenModel, spans: Spans, probes: PromptSet) -> None:
        spans = Directions.of(spans).defined() if isinstance(spans, Direction | Directions) else spans
        self.model, self.layers, self.ids = model, spans.layers, encode(model.tokenizer, probes)
        with without_dropout(model.module):
            self.anchor = read_residuals(model, self.ids, layers=self.layers).to(model.device)
        rank = max(len(span.basis) for span in spans)
        bases = torch.zeros(len(spans), rank, model.d_model)  # rows of zeros, where a layer's rank is smaller
        for i, span in enumerate(spans):
            bases[i, : len(span.basis)] = torch.from_numpy(span.basis.astype(np.float64) / span.distance)
        self.per_distance = bases.to(model.device)

    def of(self, rows: np.ndarray) -> Float[Tensor, "probe layer rank"]:
        """⟨h_l(x; θ) − h_l(x; anchor), basis⟩ / distance_l, differentiable in the parameters."""
        with without_dropout(self.model.module):
            states = residuals_of_batch(self.model, pad([self.ids[row] for row in rows]), layers=self.layers)
        moved = states - self.anchor[rows]
        return einsum(moved, self.per_distance, "probe layer d, layer rank d -> probe layer rank")


@dataclass(frozen=True, eq=False)
class Penalty:
    """λ · mean over layers and probes of relu(s + margin)², s_l(x) = ⟨h_l(x; θ) − h_l(x; anchor), v_l⟩ / distance_l.

    With `side="both"` it is a *clamp*, λ · mean of ‖s‖², along directions or in subspaces of any rank; over
    `whole_state(vs)` that is the full-vector anchor. With `side="reinforce"` it pushes the model along v until
    s = margin: λ · mean of relu(margin − s)².

    Attributes:
        directions: one direction or subspace a layer; their layers are the Λ of the mean.
        probes: the prompts x.
        margin: 0 blocks motion along v; above 0 the model is *pushed* the other way, by up to this fraction.
        strength: λ.
        batch: how many probes are drawn anew at each step; None: all.
        side: motion back along v alone, motion both ways, or a push back.
        on_mean: penalise the probes' mean s_l in place of each probe's: weak prompts are free then.
    """

    directions: Spans
    probes: PromptSet
    margin: float = 0.0
    strength: float = 30.0
    batch: int | None = 8
    side: Side = "one"
    on_mean: bool = False

    def __post_init__(self) -> None:
        if not (0 <= self.strength < inf and 0 <= self.margin < inf) or (self.batch is not None and self.batch < 1):
            raise GravlensError(
                f"Penalty(margin={self.margin}, strength={self.strength}, batch={self.batch}) was given.",
                "Margin and strength are at least 0 and finite, the batch at least 1.",
                "Penalty(directions, probes) for the defaults.",
            )
        if self.side not in get_args(Side):
            raise GravlensError(
                f"Penalty(side={self.side!r}) was given.",
                f"A side is one of {', '.join(get_args(Side))}.",
                'side="one".',
            )
        rank = max(len(span.basis) for span in each(self.directions))
        if self.side != "both" and rank > 1:
            raise GravlensError(
                f'Penalty(side="{self.side}") was given a subspace of rank {rank}.',
                "A subspace has no back and forth.",
                'side="both".',
            )
        if self.side == "both" and self.margin:
            raise GravlensError(
                f'Penalty(side="both", margin={self.margin}) was given.', "A clamp has no margin.", 'side="one".'
            )

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        """Read the probes' states at the anchor."""
        movement = Movement(model, self.directions, self.probes)
        draws = Draws(len(self.probes), self.batch, rng)

        def loss(weight: float = 1.0) -> Float[Tensor, ""]:
            return weight * self._of(movement.of(draws()))

        return BoundBlocker(loss=loss, skip=draws.skip)

    def _of(self, moved: Float[Tensor, "probe layer rank"]) -> Float[Tensor, ""]:
        moved = moved.mean(0, keepdim=True) if self.on_mean else moved
        if self.side == "reinforce":
            moved = torch.relu(self.margin - moved)
        elif self.side == "one":
            moved = torch.relu(moved + self.margin)
        return self.strength * moved.square().sum(-1).mean()
