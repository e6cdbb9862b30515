"""Does ablating v_rev in a fine-tuned model bring refusal back? Layer by layer, beside matched random directions."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Literal

import pandas as pd

from gravlens.interventions.edits import Ablate
from gravlens.interventions.effects import causal_effect, layerwise_effect
from gravlens.studies.inputs import Question, ends, located, opened

Twins = Literal["matched", "isotropic"]


@dataclass(frozen=True, eq=False)
class Ablation:
    """What ablating v_rev does to a score, and how far it leads back to the anchor.

    Attributes:
        table: an `Effect`'s: a row a layer by itself and, where there are several, one for all of them (layer <NA>).
        checkpoint: the name of the one in which v_rev was ablated.
        anchor: the anchor's mean score.
    """

    table: pd.DataFrame
    checkpoint: str
    anchor: float

    @property
    def best(self) -> pd.Series:
        """The row with the largest rise."""
        return self.table.sort_values("difference").iloc[-1]

    @property
    def comes_back(self) -> bool:
        """Whether that rise is above 0 for all of its interval, and larger than what random directions do."""
        return bool(self.best["low"] > 0 and self.best["difference"] > self.best["random_high"])

    @property
    def share(self) -> float:
        """How much of the way from the checkpoint's score to the anchor's; NaN where the anchor's is not higher."""
        way = self.anchor - float(self.best["baseline"])
        return float(self.best["difference"]) / way if way > 0 else nan

    def lines(self) -> list[str]:
        """The answer in words."""
        score, prompts = self.table.attrs.get("score", "score"), int(self.best["n_prompts"])
        back = "comes back" if self.comes_back else "does not come back"
        known = self.comes_back and not isnan(self.share)
        way = f" ({self.share:.0%} of the way to the anchor)" if known else ""
        return [
            f"{self.checkpoint}, {prompts} prompts; {score} of the anchor: {self.anchor:+.2f}",
            f"largest rise of {len(self.table)}: {described(self.best)}",
            f"refusal {back} beyond random directions{way}",
        ]


def ablate_vrev(
    question: Question, *, layers: Sequence[int] = (), n_random: int = 20, twins: Twins = "matched"
) -> Ablation:
    """Ablate v_rev, located on the sequence's probes, in a checkpoint: at each layer by itself, and at all of them.

    Args:
        question: in which checkpoint, on which prompts, by which score.
        layers: default: every layer with a v_rev.
        n_random: random directions per row; the smallest p is 1/(1 + n_random).
        twins: where they come from: the covariance of the anchor's states on the probes, or all directions alike.

    Raises:
        GravlensError: no probes, a layer out of range or without a v_rev, or what `causal_effect` raises.
    """
    sequence, place = question.sequence, question.placement
    states = ends(sequence, layers=layers, placement=place)
    directions = located(states, layers).defined()
    anchor = float(question.score(opened(sequence, sequence.anchor, place), question.prompts).mean())
    model = opened(sequence, question.checkpoint, place)
    ask = {
        "score": question.score,
        "prompts": question.prompts,
        "n_random": n_random,
        "states": states if twins == "matched" else None,
    }
    table = layerwise_effect(model, directions, {"ablate": Ablate}, **ask).table
    if len(directions) > 1:
        together = causal_effect(model, {"ablate": Ablate(directions)}, **ask).table
        table, attrs = pd.concat([table, together], ignore_index=True), table.attrs
        table.attrs = attrs
    return Ablation(table, question.checkpoint.name, anchor)


def described(row: pd.Series) -> str:
    """One row of a table of effects in words."""
    where = "all layers" if pd.isna(row["layer"]) else f"layer {row['layer']}"
    interval = "" if pd.isna(row["low"]) else f" [{row['low']:+.2f}, {row['high']:+.2f}]"
    return (
        f"{row['condition']} at {where}: {row['baseline']:+.2f} to {row['with_intervention']:+.2f}, difference "
        f"{row['difference']:+.2f}{interval}, random directions "
        f"{row['random_low']:+.2f} to {row['random_high']:+.2f}, p = {row['p_random']:.3f}"
    )
