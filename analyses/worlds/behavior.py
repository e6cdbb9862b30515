"""Arms whose harm follows a rule that is set: what a block along v_rev does, and along random directions."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

UNBLOCKED, BLOCKED, ANCHOR = 0.9, 0.02, {"compliance_rate": 0.02, "over_refusal": 0.3, "nonsense": 0.0}
BETWEEN_SEEDS = 0.04  # SD of harm
HALF_AT = 0.4  # |cos| with v_rev at which a clamp holds half of the harm: measured on refusal organisms
COLUMNS = ["arm", "seed", "compliance_rate", "fraction_final", "task_loss", "nonsense", "over_refusal", "cosine"]


@dataclass(frozen=True)
class Rule:
    """What is true of the arms.

    Attributes:
        placebo: v_rev is one of the random directions: harm differs between directions, but not with |cos|.
        between: SD of harm between directions.
        spread: SD of the random directions' cosine with v_rev.
        nonsense, over_refusal: of the clamp along v_rev.
        loss: task loss of the clamp, in those of the unblocked runs; the frontier of lower rates has as little harm at
            this loss, where it is above 1.
        returns: whether harm returns at all.
        released: harm after the clamp along v_rev is lifted.
        released_random: the same along a random direction.
    """

    placebo: bool = False
    between: float = 0.05
    spread: float = 0.15
    nonsense: float = 0.01
    over_refusal: float = 0.3
    loss: float = 1.0
    returns: bool = True
    released: float = UNBLOCKED
    released_random: float = UNBLOCKED


def harm_along(cosine: float, rule: Rule, rng: np.random.Generator) -> float:
    """Harm of a clamp along one direction, over all seeds: it falls with |cos|, or (placebo) with nothing."""
    if rule.placebo:
        return rng.normal(0.45, 0.15)
    return UNBLOCKED / (1 + (cosine / HALF_AT) ** 4) + rng.normal(0, rule.between)


def arms_of(rule: Rule, *, seeds: int, directions: int, rng: np.random.Generator) -> pd.DataFrame:
    """Draw the arms of one anchor at their last step."""
    rows: list[tuple[object, ...]] = []

    def arm(
        name: str,
        harm: float,
        fraction: float,
        loss: float = 1.0,
        *,
        cosine: float = np.nan,
        nonsense: float = 0.01,
        over: float = 0.3,
    ) -> None:
        for seed in range(seeds):
            # rounded to answers of 96 prompts: rates tie, and ties count against the claim
            rate = np.round(np.clip(harm + rng.normal(0, BETWEEN_SEEDS), 0, 1) * 96) / 96
            rows.append(
                (name, seed, rate, fraction + rng.normal(0, 0.02), loss + rng.normal(0, 0.01), nonsense, over, cosine)
            )

    harm = UNBLOCKED if rule.returns else BLOCKED
    arm("unblocked", harm, 0.5)
    # the frontier runs straight from the unblocked runs to a rate that is too low to learn the task
    worst = 1.1 * rule.loss
    held = harm_along(1.0, rule, rng) if rule.loss == 1 else harm + (BLOCKED - harm) * (rule.loss - 1) / (worst - 1)
    arm(
        "clamp",
        held if rule.returns else BLOCKED,
        0.01,
        rule.loss,
        nonsense=rule.nonsense,
        over=rule.over_refusal,
    )
    if rule.loss > 1:
        arm("lower_rate", BLOCKED, 0.05, worst)
    arm("reinforce", min(harm + 0.05, 1.0), 0.9)
    arm("released_at_20", rule.released + rng.normal(0, rule.between), 0.2)
    for n in range(1, directions + 1):
        cosine = float(np.clip(abs(rng.normal(0, rule.spread)), 0, 0.9))
        arm(f"clamp_random_{n}", harm_along(cosine, rule, rng) if rule.returns else BLOCKED, 0.4, cosine=cosine)
        arm(f"released_random_{n}", rule.released_random + rng.normal(0, rule.between), 0.45)
    return pd.DataFrame(rows, columns=COLUMNS)
