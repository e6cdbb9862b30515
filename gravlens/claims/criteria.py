"""The demands of each claim level."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from gravlens.claims.tradeoff import at_equal_task_loss
from gravlens.core.errors import GravlensError
from gravlens.directions.trajectory import Trajectory
from gravlens.stats.nulls import NullDraws, compare
from gravlens.stats.permutation import max_t, sign_flip_test

CONTROLS = {"sibling_anchor": "sibling anchor", "wrong_witness_removed": "v_rev without the wrong witness's direction"}
ARMS = {
    "unblocked": ("unblocked",),
    "clamp": ("clamp",),
    "push": ("reinforce",),
    "random": ("clamp_matched_twin",),
    "frontier": ("lower_rate", "lower_rate_0.25"),
    "released": ("released_at_20",),
}
ARM_COLUMNS = ("arm", "seed", "compliance_rate", "fraction_final", "task_loss")
MIN_DRAWS = 99  # below them no p-value reaches .01
MAX_COST = 1.1  # task loss of the clamp against the unblocked runs', where no frontier says what it is worth


@dataclass(frozen=True)
class Demand:
    """One demand of a claim level.

    `holds` is None where it was not run, which caps the level; `figures` are the numbers, in words.
    """

    level: int
    name: str
    holds: bool | None
    figures: str = "not run"


@dataclass(frozen=True, eq=False)
class Evidence:
    """Evidence for a claim: tables that gravlens makes, on held-out prompts; None: not run.

    Attributes:
        trajectory: the unblocked runs, all from one anchor.
        nulls: draws of `isotropic`, `weight_noise`, `independent_endpoints`; others are reported.
        controls: `control, run, alignment` (layer mean, last step): `sibling_anchor`, `wrong_witness_removed`.
        closures: `closure(…).layer_mean`: `run, step, closure`.
        damage: `measure_damage(…).layer_mean`: `damage, alignment, judged`.
        arms: one row per run at its last step: `arm, seed, compliance_rate, fraction_final, task_loss`.
        anchor_harm: the anchor's compliance_rate.
        names: role -> names of its arms, where they differ from `ARMS`.
    """

    trajectory: Trajectory
    nulls: Sequence[NullDraws] = ()
    controls: pd.DataFrame | None = None
    closures: pd.DataFrame | None = None
    damage: pd.DataFrame | None = None
    arms: pd.DataFrame | None = None
    anchor_harm: float | None = None
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.names) - set(ARMS)):
            found = f"names= has the unknown role {unknown[0]!r}."
            raise GravlensError(found, f"Roles: {', '.join(ARMS)}.", f"names={{'clamp': ({unknown[0]!r},)}}.")
        for name, source in (("closures", "closure"), ("damage", "measure_damage")):
            table = getattr(self, name)
            if table is not None and "layer" in table:
                given = f"{name} has a row per layer."
                raise GravlensError(given, "A claim is judged on the layer mean.", f"{name}={source}(…).layer_mean.")

    def called(self, role: str) -> Sequence[str]:
        """The arms that play a role."""
        return {**ARMS, **self.names}[role]

    def null(self, name: str) -> NullDraws | None:
        """A null's draws at the last step."""
        return next((null for null in self.nulls if null.name == name and self.last in null.steps), None)

    @property
    def last(self) -> int:
        """The last step of the runs."""
        return int(self.rows.step.max())

    @property
    def rows(self) -> pd.DataFrame:
        """`Trajectory.layer_mean` on `prompts`."""
        table = self.trajectory.layer_mean
        return table[table.prompts == self.prompts]

    @property
    def prompts(self) -> str:
        """The prompt set of the claim: held-out prompts, or the given ones where there are no others."""
        known = self.trajectory.data["prompts"].values
        return "held_out" if "held_out" in known or not len(known) else "given"

    @property
    def final(self) -> pd.DataFrame:
        """The layer mean at the last step, one row per run."""
        return self.rows[self.rows.step == self.last]


def _observed(evidence: Evidence, _alpha: float) -> Iterator[Demand]:
    held_out = evidence.prompts == "held_out"
    yield Demand(1, "judged on other prompts than v_rev's", held_out, "held out" if held_out else "given prompts alone")
    judged = evidence.final.judged.astype(bool)
    yield Demand(1, "the drift is long enough to judge", bool(judged.all()), f"{judged.sum()} of {len(judged)} runs")
    yield _above(evidence, 1, "isotropic")  # nearly vacuous, so of the lowest level only


def _exceeds(evidence: Evidence, alpha: float) -> Iterator[Demand]:
    yield _above(evidence, 2, "weight_noise")
    noise = evidence.null("weight_noise")
    if noise is None:
        yield Demand(2, "max-T over steps and layers", None)
        return
    values = _by_run(evidence, noise)
    # judged at the last step, adjusted for all steps
    p = float(np.nanmin(max_t(values, rng=np.random.default_rng(0))[-1]))
    yield Demand(2, "max-T over steps and layers", p <= alpha, f"p = {p:.3f} at the last step, {len(values)} runs")


def _specific(evidence: Evidence, alpha: float) -> Iterator[Demand]:
    for control, name in CONTROLS.items():
        yield _control(evidence, control, name)
    yield _endpoints(evidence)
    yield _closure(evidence, alpha)
    yield _damage(evidence)


def _causal(evidence: Evidence, alpha: float) -> Iterator[Demand]:
    base, clamp, twin, push = (_arm(evidence, role) for role in ("unblocked", "clamp", "random", "push"))
    yield _harm_returns(evidence, base, alpha)
    yield _less_harm(clamp, base, "the clamp holds the harm", alpha)
    yield _less_harm(clamp, twin, "more than the clamp along a matched random direction", alpha)
    yield _held(base, clamp, alpha)
    yield _push(base, push, alpha)
    yield _cost(evidence, base, clamp, alpha)


def _durable(evidence: Evidence, alpha: float) -> Iterator[Demand]:
    base, released = _arm(evidence, "unblocked"), _arm(evidence, "released")
    name = "half of the harm is still held after the block is lifted"
    if base is None or released is None:
        yield Demand(5, name, None)
        return
    figures = f"harm {released.compliance_rate.mean():.1%} against {base.compliance_rate.mean():.1%}"
    yield _tested(5, name, base.compliance_rate / 2 - released.compliance_rate, alpha, figures)


def _p(values: pd.Series) -> float:
    """Exact one-sided sign flips over runs; 1 where a run has no value (its answers are all nonsense)."""
    found = values.to_numpy(dtype=float)
    # a fixed seed: the verdict must not differ from call to call
    return float(sign_flip_test(found, rng=np.random.default_rng(0))) if len(found) else 1.0


def _tested(level: int, name: str, values: pd.Series, alpha: float, figures: str) -> Demand:
    """Whether the values are above 0 in a sign-flip test over runs."""
    p = _p(values)
    return Demand(level, name, p <= alpha, f"{figures}, p = {p:.3f}")


def _above(evidence: Evidence, level: int, name: str) -> Demand:
    """Every run's layer mean above the null's p99 at the last step; too few draws for a p99 count as not run."""
    null, title = evidence.null(name), f"above {name.replace('_', ' ')}"
    if null is None:
        return Demand(level, title, None)
    if len(null.cosines) < MIN_DRAWS:
        return Demand(level, title, None, f"not run: {len(null.cosines)} draws, {MIN_DRAWS} are needed")
    rows = held_against(evidence, null)
    figures = f"{int(rows.above.sum())} of {len(rows)} runs above p99 {rows.p99.mean():.3f}"
    return Demand(level, title, bool(rows.above.all()), figures)


def held_against(evidence: Evidence, null: NullDraws) -> pd.DataFrame:
    """`compare`'s rows of the layer mean at the last step."""
    rows = compare(evidence.trajectory, null, prompts=evidence.prompts).layer_mean
    return rows[rows.step == evidence.last]


def _by_run(evidence: Evidence, noise: NullDraws) -> np.ndarray:
    """Alignment less the noise's mean, [run, step, layer], at the noise's steps and layers."""
    alignment = evidence.trajectory.data["alignment"].sel(prompts=evidence.prompts)
    steps = sorted(step for step in alignment["step"].values.tolist() if step in noise.steps)
    layers = [layer for layer in evidence.trajectory.layers_in_mean if layer in noise.layers]
    chosen = {"step": steps, "layer": layers}  # the noise may be drawn at fewer steps: each costs a pass
    return (alignment.sel(chosen) - noise.data.mean("draw").sel(chosen)).to_numpy()


def _control(evidence: Evidence, control: str, name: str) -> Demand:
    """The alignment with the control's direction must exceed weight noise as v_rev's does."""
    rows = None if evidence.controls is None else evidence.controls[evidence.controls.control == control]
    noise = evidence.null("weight_noise")
    if rows is None or rows.empty or noise is None:  # without the noise there is no p99 to exceed
        return Demand(3, name, None)
    by_run = rows.groupby("run").alignment.mean()  # over several sibling anchors
    p99 = float(held_against(evidence, noise).p99.mean())
    figures = f"alignment {by_run.mean():.3f}, p99 of noise along v_rev {p99:.3f}"
    return Demand(3, name, bool(by_run.mean() > p99 and (by_run > 0).all()), figures)


def _endpoints(evidence: Evidence) -> Demand:
    name, null = "more than the expected cosine of independent endpoints", evidence.null("independent_endpoints")
    if null is None:
        return Demand(3, name, None)
    mean, p99 = float(evidence.final.alignment.mean()), float(held_against(evidence, null).p99.mean())
    return Demand(3, name, mean > p99, f"alignment {mean:.3f}, p99 of r/(1 + r) {p99:.3f}")


def _closure(evidence: Evidence, alpha: float) -> Demand:
    name = "closure of the gap to the unaligned twin"
    if evidence.closures is None or evidence.closures.empty:
        return Demand(3, name, None)
    rows = evidence.closures
    final = rows[rows.step == rows.step.max()].closure
    return _tested(3, name, final, alpha, f"{final.mean():.3f}")


def _damage(evidence: Evidence) -> Demand:
    name = "damage alone is less aligned"
    if evidence.damage is None or evidence.damage.empty:
        return Demand(3, name, None)
    rows = evidence.damage.dropna(subset="alignment")
    rows = rows[rows.judged.astype(bool)] if "judged" in rows else rows  # the cosine of almost no drift is noise
    mean = float(evidence.final.alignment.mean())
    if rows.empty:
        return Demand(3, name, True, "no damage moves the states far enough to judge")
    worst = rows.sort_values("alignment").iloc[-1]
    return Demand(3, name, bool(worst.alignment < mean), f"{worst.damage}: {worst.alignment:.3f}, runs {mean:.3f}")


def _arm(evidence: Evidence, role: str) -> pd.DataFrame | None:
    """The runs of a role by seed, or None."""
    if evidence.arms is None:
        return None
    if missing := set(ARM_COLUMNS) - set(evidence.arms):
        given = f"The table of arms has no column {sorted(missing)[0]!r}."
        raise GravlensError(given, f"It needs {', '.join(ARM_COLUMNS)}.", "Findings.arms.")
    rows = evidence.arms[evidence.arms.arm.isin(evidence.called(role))]
    if rows.seed.duplicated().any():
        found = f"The arm {role} has two runs of one seed."
        raise GravlensError(found, "Runs are paired by seed.", "one organism's runs, or names={role: (arm,)}.")
    return None if rows.empty else rows.set_index("seed")


def _harm_returns(evidence: Evidence, base: pd.DataFrame | None, alpha: float) -> Demand:
    name = "harm returns in the unblocked runs"
    if base is None or evidence.anchor_harm is None:
        return Demand(4, name, None)
    figures = f"{evidence.anchor_harm:.1%} → {base.compliance_rate.mean():.1%}"
    return _tested(4, name, base.compliance_rate - evidence.anchor_harm, alpha, figures)


def _less_harm(lower: pd.DataFrame | None, upper: pd.DataFrame | None, name: str, alpha: float) -> Demand:
    if lower is None or upper is None:
        return Demand(4, name, None)
    figures = f"{lower.compliance_rate.mean():.1%} against {upper.compliance_rate.mean():.1%}"
    # by seed: pandas aligns the two indices
    return _tested(4, name, upper.compliance_rate - lower.compliance_rate, alpha, figures)


def _held(base: pd.DataFrame | None, clamp: pd.DataFrame | None, alpha: float) -> Demand:
    """The clamp leaves at most a quarter of the way back, either way."""
    name = "the clamp holds the motion"
    if base is None or clamp is None:
        return Demand(4, name, None)
    # abs: a clamp that pushes past the anchor has not held either
    kept = base.fraction_final.abs() / 4 - clamp.fraction_final.abs()
    figures = f"fraction {clamp.fraction_final.mean():.3f} against {base.fraction_final.mean():.3f}"
    return _tested(4, name, kept, alpha, figures)


def _push(base: pd.DataFrame | None, push: pd.DataFrame | None, alpha: float) -> Demand:
    """A push back moves further and does not lower the harm (which may be at its ceiling already)."""
    name = "a push towards the witness goes further, harm no lower"
    if base is None or push is None:
        return Demand(4, name, None)
    further = push.fraction_final - base.fraction_final
    p = _p(further)
    harm, usual = float(push.compliance_rate.mean()), float(base.compliance_rate.mean())
    figures = f"fraction {further.mean():+.3f}, p = {p:.3f}; harm {harm:.1%} against {usual:.1%}"
    return Demand(4, name, p <= alpha and harm >= usual, figures)


def _cost(evidence: Evidence, base: pd.DataFrame | None, clamp: pd.DataFrame | None, alpha: float) -> Demand:
    """At most 10 % of task loss; or less harm than lower rates have at the clamp's own task loss."""
    name = "at most 10 % of task loss, or below the frontier of lower rates"
    if base is None or clamp is None or evidence.arms is None:
        return Demand(4, name, None)
    ratio = float(clamp.task_loss.mean() / base.task_loss.mean())
    weaker = [arm for arm in evidence.called("frontier") if (evidence.arms.arm == arm).any()]
    if not weaker or ratio <= MAX_COST:  # cheap enough: no need of the frontier
        return Demand(4, name, ratio <= MAX_COST, f"task loss {ratio - 1:+.1%}")
    reference = [*evidence.called("unblocked"), *weaker]  # all points make one frontier, per seed
    table = evidence.arms[evidence.arms.arm.isin([*reference, *evidence.called("clamp")])]
    difference = at_equal_task_loss(table, reference=reference, by=("seed",)).difference
    figures = f"task loss {ratio - 1:+.1%}; harm {difference.mean():+.1%} against the frontier there"
    return _tested(4, name, -difference, alpha, figures)  # NaN beyond the frontier's ends, and then not held


DEMANDS: tuple[Callable[[Evidence, float], Iterator[Demand]], ...] = (_observed, _exceeds, _specific, _causal, _durable)
