"""Power of the claim ladder: how many anchors, runs, strangers and random directions does a level need?"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from numpy.random import Generator
from scipy import stats

from gravlens.core.errors import GravlensError, at_home, reading
from gravlens.stats.permutation import ALL_SIGNS_UP_TO, least_p_value, rank_test, sign_flip_test

LEVELS = (2, 3, 4, 5)
SIMULATIONS = 2_000  # the standard error of a power is then at most .011
AT_ONCE = 250  # simulations whose 9,999 random sign flips are held in memory together
SOURCE = "refusal organisms 4 to 7 (docs/power.md)"


@dataclass(frozen=True)
class Effects:
    """Sizes of the effects that are planned for, all on the layer mean at the judged step.

    The model is Gaussian: an anchor's value is drawn about the mean, a run's about its anchor's. Cosines and rates are
    not cut at their limits.

    Attributes:
        alignment: mean alignment of the runs.
        alignment_anchors: its SD between anchors.
        alignment_runs: its SD between runs of one anchor.
        noise: SD of one draw of matched weight noise.
        strangers: mean alignment of the runs towards a stranger.
        strangers_sd: its SD between strangers.
        closure: mean closure of the gap to the run's own twin.
        closure_sd: its SD between anchors.
        stranger_closure: mean closure of the gap to a stranger's twin.
        stranger_closure_sd: its SD between strangers.
        anchor_harm: compliance rate of the anchor; this and the following are rates between 0 and 1.
        harm: mean of the unblocked runs.
        harm_anchors: its SD between anchors.
        harm_seeds: SD of a run's rate between seeds, in every arm.
        clamp: mean under the clamp along v_rev.
        random: mean under the clamp along a matched random direction.
        random_directions: its SD between directions.
        held: share of the harm that is still held after the block was lifted.
        held_sd: its SD between runs.
        source: where the figures are from.

    Examples:
        >>> effects = gl.stats.Effects(alignment=0.3, source="a pilot")
        >>> effects.alignment
        0.3
    """

    alignment: float = 0.70
    alignment_anchors: float = 0.067
    alignment_runs: float = 0.006
    noise: float = 0.25
    strangers: float = -0.008
    strangers_sd: float = 0.185
    closure: float = 0.385
    closure_sd: float = 0.152
    stranger_closure: float = 0.035
    stranger_closure_sd: float = 0.021
    anchor_harm: float = 0.038
    harm: float = 0.933
    harm_anchors: float = 0.091
    harm_seeds: float = 0.02
    clamp: float = 0.104
    random: float = 0.391
    random_directions: float = 0.301
    held: float = 0.03
    held_sd: float = 0.02
    source: str = SOURCE

    @classmethod
    def from_results(cls, results: Path | str) -> "Effects":
        """Estimate the effects from a pilot: a results folder of `gravlens reproduce`, or its `results.json`.

        What the pilot did not measure, or only once where a spread is needed, keeps its default; `source` says what
        was measured. GravlensError where the folder has no arms.csv.
        """
        results = at_home(results)
        folder = results if results.is_dir() else results.parent
        if not (folder / "arms.csv").is_file():
            given = f"{results} has no arms.csv beside it."
            raise GravlensError(given, "A pilot is a results folder.", "gravlens reproduce --quick --out pilot.")
        with reading(folder, "A pilot's tables are a results folder's.", "gravlens reproduce, which writes them."):
            tables = {
                name: pd.read_csv(folder / f"{name}.csv") if (folder / f"{name}.csv").is_file() else None
                for name in ("controls", "nulls_layer_mean", "behavior")
            }
            measured = _measured(pd.read_csv(folder / "arms.csv"), **tables)
            found = {name: float(value) for name, value in measured if name and np.isfinite(value)}
        return cls(**found, source=f"{folder.name}: {', '.join(found) or 'nothing'}; all else: {SOURCE}")


def _measured(
    arms: pd.DataFrame,
    controls: pd.DataFrame | None,
    nulls_layer_mean: pd.DataFrame | None,
    behavior: pd.DataFrame | None,
) -> Iterator[tuple[str, float]]:
    """Yield fields of `Effects` and their estimates; NaN where there is nothing to estimate from."""
    base, harm = arms[arms.arm == "unblocked"], "compliance_rate"
    yield from zip(("alignment", "alignment_anchors", "alignment_runs"), _spreads(base, "alignment_final"), strict=True)
    yield from zip(("harm", "harm_anchors", "harm_seeds"), _spreads(base, harm), strict=True)
    yield "clamp", arms[arms.arm == "clamp"][harm].mean()
    # one direction per arm, or (an older form) a fresh one for each run
    random = arms[arms.arm.str.startswith("clamp_random_") | (arms.arm == "clamp_matched_twin")]
    direction = random.arm.where(random.arm != "clamp_matched_twin", random.run)
    by_direction = random.groupby(["organism", direction.rename("direction")])[harm].mean().reset_index()
    yield from zip(("random", "", "random_directions"), _spreads(by_direction, harm), strict=True)
    released = arms[arms.arm.str.fullmatch("released(_at_.*)?")]
    pairs = released.merge(base, on=["organism", "seed"], suffixes=("", "_base"))
    pairs["held"] = 1 - pairs[harm] / pairs[f"{harm}_base"].where(pairs[f"{harm}_base"] > 0)
    yield from (("held", _spreads(pairs, "held")[0]), ("held_sd", pairs.held.std()))
    if controls is not None:
        others = controls[controls.control.str.startswith("stranger") | (controls.control == "wrong_witness")]
        means = others.groupby(["organism", "control"]).alignment_final.mean()
        # "stranger" is a mean over several, which spreads less than they do
        single = means[means.index.get_level_values("control") != "stranger"]
        yield from (("strangers", means.mean()), ("strangers_sd", single.std()))
        yield from zip(("closure", "closure_sd"), _spreads(controls, "closure_final")[:2], strict=True)
    if nulls_layer_mean is not None:
        noise = nulls_layer_mean[nulls_layer_mean.null == "weight_noise"]
        yield "noise", float(noise.p99.mean() / stats.norm.isf(0.01))
    if behavior is not None:
        yield "anchor_harm", behavior[(behavior.arm == "history") & (behavior.run == "anchor")][harm].mean()


def _spreads(table: pd.DataFrame, column: str) -> tuple[float, float, float]:
    """Mean over anchors, SD between their means, and the SD within an anchor, pooled."""
    # the mean of the anchors' means: an anchor with more runs counts no more
    groups = table.dropna(subset=column).groupby("organism")[column]
    means, within = groups.mean(), groups.var().mean()
    return means.mean(), means.std(), math.sqrt(within) if within >= 0 else math.nan


@dataclass(frozen=True)
class Design:
    """Numbers of a study: anchors, and of each one runs, strangers, random directions and draws of weight noise.

    Examples:
        >>> gl.stats.Design(anchors=2, runs=3, strangers=19).runs
        3
    """

    anchors: int = 1
    runs: int = 2
    strangers: int = 0
    directions: int = 0
    draws: int = 200

    def __post_init__(self) -> None:
        least = {"anchors": 1, "runs": 1, "strangers": 0, "directions": 0, "draws": 0}
        for name, smallest in least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < smallest:
                wanted = f"{name} is a whole number, {smallest} or more."
                raise GravlensError(f"{name}={value!r} was given.", wanted, f"{name}={max(smallest, 1)}.")

    @property
    def units(self) -> int:
        """Units of the sign flips: anchors if there are several, else runs."""
        return self.anchors if self.anchors > 1 else self.runs

    def __str__(self) -> str:
        counts = {"run": self.runs, "stranger": self.strangers, "random direction": self.directions}
        own = ", ".join(f"{n} {name}{'s' * (n > 1)}" for name, n in counts.items() if n)
        return f"{self.anchors} anchors, each with {own}" if self.anchors > 1 else f"1 anchor with {own}"

    def arms(self, level: int) -> dict[str, int]:
        """Fine-tuning runs that a level takes, those of the lower ones included; witnesses and anchors do not count.

        With several anchors the other witnesses are strangers, and have their twins already.
        """
        own = self.anchors * self.runs
        # only strangers that are nobody's own witness here have to be trained on the runs' data
        further = max(0, self.strangers - (self.anchors - 1)) * own
        counts = {
            2: {"runs": own},
            3: {"twins": own, "stranger_twins": further},
            4: {"clamp": own, "push": own, "random": own * self.directions},
            5: {"released": own},
        }
        return {arm: n for least, arms in counts.items() if least <= level for arm, n in arms.items()}

    def trained(self, level: int) -> int:
        """Sum of `arms`."""
        return sum(self.arms(level).values())


# Two ways to grow: more strangers and directions for one anchor, or more anchors, where the others' witnesses serve as
# strangers. More runs of several anchors hardly help: the anchor is the unit.
PLANS: dict[str, tuple[Design, ...]] = {
    "one anchor": tuple(Design(1, runs, n, n) for n in (19, 39, 79) for runs in (2, 5, 8)),
    "several anchors": tuple(Design(n, 2, n - 1, k) for n in (2, 3, 4, 5, 6, 8, 10, 12) for k in (4, 9)),
}


def power(
    *,
    anchors: int = 1,
    runs: int = 2,
    strangers: int = 0,
    directions: int = 0,
    draws: int = 200,
    alpha: float = 0.05,
    effects: Effects = Effects(),
    simulations: int = SIMULATIONS,
    rng: Generator,
) -> pd.DataFrame:
    """Simulate how often studies of these numbers reach each claim level (docs/power.md).

    The tests are those of `claim`, with the layers preregistered. Its other demands are taken to hold: on the isotropic
    null, damage, motion, cost, nonsense and over-refusal.

    Args:
        anchors: number of anchors, each with its runs; of several, the anchor is the unit.
        runs: runs of each anchor, in every arm.
        strangers: of each anchor, with their twins; with several anchors the other witnesses are strangers.
        directions: matched random directions of each anchor.
        draws: draws of weight noise of each anchor.
        alpha: the largest p-value that is called significant.
        effects: sizes of the effects, and their spreads.
        simulations: number of simulated studies; the power's standard error is at most ½ / √simulations.
        rng: draws the studies.

    Returns:
        A row per level: `level, power` (of reaching it, and so all lower ones), `least_p` (the smallest p-value that
        its tests allow), `cannot` ("" or why no result could reach it).

    Raises:
        GravlensError: a number that is not whole or negative, `alpha` not between 0 and 1, no simulations.

    Examples:
        >>> table = gl.stats.power(anchors=1, runs=3, strangers=19, simulations=50, rng=rng)
        >>> table.level.tolist()
        [2, 3, 4, 5]
    """
    design = Design(anchors, runs, strangers, directions, draws)
    return pd.DataFrame(_rows(design, _checked(alpha), effects, simulations, rng))


def needed(
    level: int,
    power: float = 0.8,
    *,
    effects: Effects = Effects(),
    alpha: float = 0.05,
    simulations: int = SIMULATIONS,
    rng: Generator,
) -> pd.DataFrame:
    """Find the smallest study that reaches a level with a given power: the fewest anchors, then runs, of two lists.

    Returns:
        A row per list of `PLANS`: `plan` (the list), `anchors, runs, strangers, directions, draws`,
        `trained` (fine-tuning runs in all arms) and `power`; where no plan of the list has it, the one with the most
        power, with `enough` False.

    Raises:
        GravlensError: a level other than 2 to 5, or a power that is not between 0 and 1.

    Examples:
        >>> gl.stats.needed(2, power=0.8, simulations=50, rng=rng).columns.tolist()[:3]
        ['plan', 'anchors', 'runs']
    """
    if level not in LEVELS or not 0 < power < 1:
        given = f"level={level!r} and power={power!r} were given."
        raise GravlensError(given, "Levels 2 to 5 are tested; power is between 0 and 1.", "needed(3, .8, rng=…).")
    found = []
    for name, plans in PLANS.items():
        best: dict[str, Any] = {"power": -1.0}
        # what only a higher level needs is left out
        plans = {replace(p, strangers=p.strangers * (level > 2), directions=p.directions * (level > 3)) for p in plans}
        # an anchor needs a witness and an alignment of its own, which cost more than runs
        for design in sorted(plans, key=lambda plan: (plan.anchors, plan.trained(level))):
            reached = _rows(design, _checked(alpha), effects, simulations, rng)[LEVELS.index(level)]["power"]
            if reached > best["power"]:
                best = {"plan": name, **vars(design), "trained": design.trained(level), "power": reached}
            if reached >= power:
                break
        found.append({**best, "enough": best["power"] >= power})
    return pd.DataFrame(found)


def _checked(alpha: float) -> float:
    if not 0 < alpha < 1:
        raise GravlensError(f"alpha={alpha!r} was given.", "It lies between 0 and 1.", "alpha=0.05.")
    return alpha


def _rows(design: Design, alpha: float, effects: Effects, simulations: int, rng: Generator) -> list[dict[str, Any]]:
    if simulations < 1:
        raise GravlensError(f"simulations={simulations!r} was given.", "At least one is needed.", "simulations=2000.")
    reached = _simulated(design, alpha, effects, simulations, rng)
    rows, cannot = [], ""
    for level, holds in zip(LEVELS, np.logical_and.accumulate(reached), strict=True):
        tests = dict(_least(design, level))
        cannot = cannot or next((_obstacle(what, p, alpha) for what, p in tests.items() if p > alpha), "")
        rows.append({"level": level, "power": float(holds.mean()), "least_p": max(tests.values()), "cannot": cannot})
    return rows


def _least(design: Design, level: int) -> Iterator[tuple[str, float]]:
    """Yield what each test of a level has, in words, and the least p-value that it allows."""
    of = f" of {design.anchors} anchors" if design.anchors > 1 else ""
    unit = f"{design.units} {'anchor' if design.anchors > 1 else 'run'}{'s' * (design.units > 1)}"
    if level == 2:
        yield f"{design.draws} draws of weight noise", 1 / (1 + design.draws)
    if level == 3:
        yield f"{design.strangers or 'no'} strangers{of}", float(1 + design.strangers) ** -design.anchors
    if level == 4:
        yield f"{design.directions or 'no'} random directions{of}", float(1 + design.directions) ** -design.anchors
    if level > 3:
        yield unit, least_p_value(design.units)


def _obstacle(what: str, p: float, alpha: float) -> str:
    return f"cannot be reached with {what}: the least p is {p:.2g}, alpha {alpha:g}"


# --- one simulated study per column ---------------------------------------------------------------------------------
def _simulated(
    design: Design, alpha: float, effects: Effects, n: int, rng: Generator
) -> Bool[np.ndarray, "level study"]:
    """Whether the tests of each level, 2 to 5, hold."""
    e, shape = effects, (design.anchors, design.runs, n)
    aligned = e.alignment + _spread(rng, shape, e.alignment_anchors, e.alignment_runs)
    means = aligned.mean(1)
    # the chance that a draw of noise, averaged over anchors, is as aligned: so many of the draws are
    # (1e-12: without noise every positive alignment is beyond it)
    beyond = stats.norm.sf(means.mean(0) / max(e.noise, 1e-12) * math.sqrt(design.anchors))
    p_noise = (1 + rng.binomial(design.draws, beyond)) / (1 + design.draws)
    # of fewer units the claim asks at level 1 for what level 2 asks of them
    agree = _flips(aligned, alpha, rng) if least_p_value(design.units) <= alpha else True
    closed = e.closure + e.closure_sd * rng.standard_normal((design.anchors, n))
    specific = _first(means, e.strangers, e.strangers_sd, design.strangers, alpha, rng)
    specific &= _first(closed, e.stranger_closure, e.stranger_closure_sd, design.strangers, alpha, rng)
    # arms are paired by seed in reality; independent seeds make the differences noisier, and the power smaller
    base = e.harm + _spread(rng, shape, e.harm_anchors, e.harm_seeds)
    clamp = e.clamp + _spread(rng, shape, 0.0, e.harm_seeds)
    # a random direction's harm is a mean over the same number of seeds
    spread = math.hypot(e.random_directions, e.harm_seeds / math.sqrt(design.runs))
    causal = _first(-clamp.mean(1), -e.random, spread, design.directions, alpha, rng)
    causal &= _flips(base - e.anchor_harm, alpha, rng) & _flips(base - clamp, alpha, rng)
    released = base * (1 - e.held - _spread(rng, shape, 0.0, e.held_sd))
    released = released + _spread(rng, shape, 0.0, e.harm_seeds)
    return np.stack([(p_noise <= alpha) & agree, specific, causal, _flips(base / 2 - released, alpha, rng)])


def _spread(
    rng: Generator, shape: tuple[int, int, int], anchors: float, runs: float
) -> Float[np.ndarray, "anchor run study"]:
    between = rng.standard_normal((shape[0], 1, shape[2]))
    return anchors * between + runs * rng.standard_normal(shape)


def _flips(values: Float[np.ndarray, "anchor run study"], alpha: float, rng: Generator) -> Bool[np.ndarray, " study"]:
    """Sign flips over the anchors' means, or over the runs of the only anchor."""
    units = values.mean(1) if len(values) > 1 else values[0]
    if least_p_value(len(units)) > alpha:
        return np.zeros(units.shape[1], dtype=bool)
    parts = units.shape[1] // AT_ONCE + 1 if len(units) > ALL_SIGNS_UP_TO else 1
    p = [sign_flip_test(part, rng=rng) for part in np.array_split(units, parts, axis=1)]
    return np.concatenate(p) <= alpha


def _first(
    own: Float[np.ndarray, "anchor study"], mean: float, spread: float, controls: int, alpha: float, rng: Generator
) -> Bool[np.ndarray, " study"]:
    """`rank_test` of each study's own values among Gaussian controls; all anchors have equally many."""
    above = stats.norm.sf((own - mean) / max(spread, 1e-12))
    total = (1 + rng.binomial(controls, above)).sum(0)
    # the least sum is one per anchor
    return total < len(own) + _sums_that_reach(len(own), controls + 1, alpha)


def _sums_that_reach(anchors: int, size: int, alpha: float) -> int:
    """How many sums of ranks, from the least one on, have p ≤ alpha: with equal sizes p is monotonic in the sum."""

    def p(excess: int) -> float:
        whole, rest = divmod(excess, anchors)
        return rank_test([1 + whole + (i < rest) for i in range(anchors)], [size] * anchors)

    return bisect_right(range(anchors * (size - 1) + 1), alpha, key=p)
