"""Directional ablation of v_rev in a fine-tuned model: does refusal return, more than for random directions?"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any, Literal

import pandas as pd

from gravlens.directions.direction import Directions
from gravlens.interventions.edits import Ablate
from gravlens.interventions.effects import causal_effect
from gravlens.studies.inputs import Question, ends, located, opened

Twins = Literal["matched", "isotropic"]
LEVEL = 0.05


@dataclass(frozen=True, eq=False)
class Ablation:
    """Effect of ablating v_rev on a score.

    Attributes:
        table: as of `Effect`: one row per layer and, with several layers, one for all (layer <NA>).
        best: `Effect.largest`: the row with the largest increase. Its `p_largest` compares that with the largest
            increase of each random draw over the same rows; `low`, `high` are a 95 % band over all rows at once
            (bootstrap over prompts).
        checkpoint: name of the checkpoint in which v_rev was ablated.
        anchor: the anchor's mean score.
    """

    table: pd.DataFrame
    best: pd.Series
    checkpoint: str
    anchor: float

    @property
    def comes_back(self) -> bool:
        """Whether the largest increase has p ≤ .05 against the random directions' largest, and a band above 0."""
        # The band alone is not enough: ablating any direction damages a model, and damage moves log-odds too.
        return bool(self.best["p_largest"] <= LEVEL and self.best["low"] > 0)

    @property
    def share(self) -> float:
        """Share of the gap to the anchor's score that is closed; NaN if the anchor's is not higher."""
        way = self.anchor - float(self.best["baseline"])
        return float(self.best["difference"]) / way if way > 0 else nan

    def lines(self) -> list[str]:
        """Summarise in sentences, the verdict first."""
        score, prompts = self.table.attrs.get("score", "score"), int(self.best["n_prompts"])
        back = "comes back" if self.comes_back else "does not come back"
        way = f" ({self.share:.0%} of the way to the anchor)" if self.comes_back and not isnan(self.share) else ""
        few = f"; {least} random directions are needed for p ≤ {LEVEL}" if self.best["n_random"] < (least := 19) else ""
        return [
            f"refusal {back} beyond random directions: p = {self.best['p_largest']:.3f} for the largest rise of "
            f"{len(self.table)} against that of each of {self.best['n_random']} random directions{way}{few}",
            f"largest rise of {len(self.table)}: {described(self.best)}",
            f"{self.checkpoint}, {prompts} prompts; {score} of the anchor: {self.anchor:+.2f}",
        ]


def ablate_vrev(
    question: Question, *, layers: Sequence[int] = (), n_random: int = 20, twins: Twins = "matched"
) -> Ablation:
    """Ablate v_rev, located on the sequence's probes, in a checkpoint: at each layer alone, and at all layers.

    Args:
        question: the checkpoint, the prompts and the score.
        layers: default: every layer with a v_rev.
        n_random: random draws, each one direction per layer; 19 or more for p ≤ .05.
        twins: random directions with the covariance of the anchor's states on the probes, or isotropic ones.

    Raises:
        GravlensError: no probes, a layer out of range or without a v_rev, or an error of `causal_effect`.
    """
    sequence, place = question.sequence, question.placement
    states = ends(sequence, layers=layers, placement=place)
    directions = located(states, layers).defined()
    anchor = float(question.score(opened(sequence, sequence.anchor, place), question.prompts).mean())
    model = opened(sequence, question.checkpoint, place)  # after the anchor's score, so one model is in memory
    ask: dict[str, Any] = {"score": question.score, "prompts": question.prompts, "n_random": n_random}
    ask["states"] = states if twins == "matched" else "isotropic"
    effect = causal_effect(model, each_and_all(directions), **ask)
    table = effect.table.assign(condition="ablate")  # the layer has a column of its own
    best = effect.largest()
    best["condition"] = "ablate"
    return Ablation(table, best, question.checkpoint.name, anchor)


def each_and_all(directions: Directions) -> dict[str, Ablate]:
    """Ablations of each direction at its layer alone and, if there are several, of all together."""
    alone = {f"layer {one.layer}": Ablate(one) for one in directions}
    return alone | ({"all layers": Ablate(directions)} if len(alone) > 1 else {})


def described(row: pd.Series) -> str:
    """Describe one row of a table of effects."""
    where = "all layers" if pd.isna(row["layer"]) else f"layer {row['layer']}"
    crossing = ""
    if "crossing" in row:
        crossing = f", {row['crossing']:.0%} of the prompts cross 0 (random {row['random_crossing']:.0%})"
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
    return (
        f"{row['condition']} at {where}: {row['baseline']:+.2f} to {row['with_intervention']:+.2f}, difference "
        f"{row['difference']:+.2f}{interval}, random directions "
        f"{row['random_low']:+.2f} to {row['random_high']:+.2f}, p = {row['p_random']:.3f}{crossing}"
    )
