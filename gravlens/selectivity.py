"""Selectivity: whether an intervention moves one behaviour more than the others."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import nn

from gravlens.behavior import Score
from gravlens.effects import Condition, Effect, causal_effect
from gravlens.errors import GravlensError
from gravlens.models import OpenModel
from gravlens.prompts import PromptSet
from gravlens.residuals import Residuals


def measure_selectivity(
    model: OpenModel | nn.Module,
    conditions: Mapping[str, Condition],
    measures: Mapping[str, tuple[Score, PromptSet | Sequence[str]]],
    *,
    n_random: int = 20,
    seed: int = 0,
    states: Residuals | None = None,
) -> pd.DataFrame:
    """Does an intervention move one behaviour more than the others? Each in units of its own spread over prompts.

    Args:
        model: see `causal_effect`, like all that is not named here.
        conditions: name -> an intervention, or several that act together.
        measures: name -> a score and its prompts: refusal on harmful ones, on harmless ones, log-likelihood of a task's
            answers. At least two.
        n_random: random draws per condition.
        seed: of the draws. Draw i is the same set of directions for every measure.

    Returns:
        One row a condition and measure: `condition`, `measure`, `baseline` (mean), `spread` (standard deviation over
        prompts, without intervention), `effect` (mean difference / spread) with its interval `low`, `high`, the range
        `random_low`, `random_high` of the random directions' effects and `p_random`; `margin`, by how much |effect|
        exceeds the largest |effect| among the other measures, and `p_margin`, the share (1 + k)/(1 + n) of random
        directions with a margin at least as large; `n_random`, `random_kind`, `n_prompts`.

    Raises:
        GravlensError: fewer than two measures, a score that is the same for all prompts, what `causal_effect` raises.
    """
    if len(measures) < 2:
        raise GravlensError(
            f"{len(measures)} measure was given.",
            "Selectivity compares two at least.",
            '{"refusal": (refusal_log_odds, harmful), "over-refusal": (refusal_log_odds, harmless)}.',
        )
    effects = {}
    for name, (score, prompts) in measures.items():
        rng = np.random.default_rng(seed)
        effects[name] = causal_effect(
            model, conditions, score=score, prompts=prompts, n_random=n_random, rng=rng, states=states
        )
    spreads = {name: _spread(name, effect.baseline) for name, effect in effects.items()}
    rows = [_selective(condition, effects, spreads) for condition in conditions]
    return pd.concat(rows, ignore_index=True)


def _spread(name: str, baseline: Float[np.ndarray, " prompt"]) -> float:
    spread = float(baseline.std(ddof=1)) if len(baseline) > 1 else 0.0
    if not spread > 0:
        raise GravlensError(
            f"The measure {name} is the same for all of its {len(baseline)} prompts.",
            "A measure is counted in units of its spread over prompts.",
            "more prompts, or a score with more steps than 0 and 1.",
        )
    return spread


def _selective(condition: str, effects: Mapping[str, Effect], spreads: Mapping[str, float]) -> pd.DataFrame:
    """The rows of one condition."""
    units = np.array(list(spreads.values()))
    moved = np.array([effect.differences[condition].mean() for effect in effects.values()]) / units
    random = np.stack([effect.random[condition] for effect in effects.values()]) / units[:, None]
    margins, random_margins = _margins(moved[:, None])[:, 0], _margins(random)
    beyond = (random_margins >= margins[:, None]).sum(1)
    rows = pd.concat([effect.table[effect.table["condition"] == condition] for effect in effects.values()])
    n_random = random.shape[1]
    ends = {name: rows[name].to_numpy() / units for name in ("low", "high", "random_low", "random_high")}
    return pd.DataFrame(
        {"condition": condition, "measure": list(effects), "baseline": rows["baseline"].to_numpy(), "spread": units,
         "effect": moved, **ends, "p_random": rows["p_random"].to_numpy(), "margin": margins,
         "p_margin": (1 + beyond) / (1 + n_random) if n_random else np.nan, "n_random": n_random,
         "random_kind": rows["random_kind"].to_numpy(), "n_prompts": rows["n_prompts"].to_numpy()}
    )  # fmt: skip


def _margins(moved: Float[np.ndarray, "measure n"]) -> Float[np.ndarray, "measure n"]:
    """|effect| less the largest |effect| of the other measures."""
    size = np.abs(moved)
    return np.stack([size[i] - np.delete(size, i, axis=0).max(0) for i in range(len(size))])
