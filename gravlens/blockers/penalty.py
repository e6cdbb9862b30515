"""Penalise how far the states of probes move along directions, in subspaces, or altogether."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from gravlens.activations.residuals import read_residuals, residuals_of_batch
from gravlens.blockers.blocking import BoundBlocker, Draws, check_fields, without_dropout
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction, Directions, Spans, each
from gravlens.history.encoding import encode, pad
from gravlens.history.prompts import PromptSet
from gravlens.models.opening import OpenModel

Side = Literal["one", "both", "reinforce"]


class Movement:
    """Movement of probes away from the anchor within spans, in units of each layer's distance."""

    def __init__(self, model: OpenModel, spans: Spans, probes: PromptSet) -> None:
        spans = Directions.of(spans).defined() if isinstance(spans, Direction | Directions) else spans
        self.model, self.layers, self.ids = model, spans.layers, encode(model.tokenizer, probes)
        with without_dropout(model.module):
            self.anchor = read_residuals(model, self.ids, layers=self.layers).to(model.device)  # read once
        rank = max(len(span.basis) for span in spans)
        # One tensor for all layers, so that a step takes one product; zero rows where a layer's rank is smaller.
        bases = torch.zeros(len(spans), rank, model.d_model)
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

    Attributes:
        directions: one direction or subspace per layer; the mean is over their layers.
        probes: the prompts x.
        margin: 0 blocks movement along v; above 0 the model is pushed the other way, by up to this fraction.
        strength: λ.
        batch: probes drawn for each step; None: all.
        side: `one` penalises movement along v alone; `both` is a clamp, λ · mean of ‖s‖², also in subspaces of any rank
            (with `whole_state(vs)` it anchors the full vector); `reinforce` pushes the model along v until s = margin,
            λ · mean of relu(margin − s)².
        on_mean: penalise the mean s_l over probes instead of each probe's: single prompts may then move.

    Examples:
        >>> blocker = gl.blockers.Penalty(vs, seq.probes, margin=0.0)
        >>> recipe = gl.Recipe(steps=2)
        >>> held = gl.finetune(seq.anchor, examples, out="ft/penalty", recipe=recipe, blocker=blocker)
        >>> len(held.log)
        2
    """

    directions: Spans
    probes: PromptSet
    margin: float = 0.0
    strength: float = 30.0
    batch: int | None = 8
    side: Side = "one"
    on_mean: bool = False

    def __post_init__(self) -> None:
        check_fields(self, from_0=("margin", "strength"), from_1=("batch",))
        if self.side not in get_args(Side):
            wanted = f"side must be one of {', '.join(get_args(Side))}."
            raise GravlensError(f"Penalty(side={self.side!r}) was given.", wanted, 'side="one".')
        rank = max(len(span.basis) for span in each(self.directions))
        if self.side != "both" and rank > 1:
            given = f'Penalty(side="{self.side}") was given a subspace of rank {rank}.'
            raise GravlensError(given, "Only a direction (rank 1) has two sides.", 'side="both".')
        if self.side == "both" and self.margin:
            given = f'Penalty(side="both", margin={self.margin}) was given.'
            raise GravlensError(given, "A clamp has no margin.", "margin=0.")

    def bind(self, model: OpenModel, *, rng: np.random.Generator) -> BoundBlocker:
        movement = Movement(model, self.directions, self.probes)
        draws = Draws(len(self.probes), self.batch, rng)

        def loss(weight: float = 1.0) -> Float[Tensor, ""]:
            return weight * self._of(movement.of(draws()))

        return BoundBlocker(loss=loss, skip=draws.skip)

    def _of(self, moved: Float[Tensor, "probe layer rank"]) -> Float[Tensor, ""]:
        moved = moved.mean(0, keepdim=True) if self.on_mean else moved  # before the relu: else nothing could cancel
        if self.side == "reinforce":
            moved = torch.relu(self.margin - moved)
        elif self.side == "one":
            moved = torch.relu(moved + self.margin)
        return self.strength * moved.square().sum(-1).mean()
