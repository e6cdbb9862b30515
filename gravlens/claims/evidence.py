"""What a claim is judged on: the evidence of one anchor, and of several together."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
import xarray

from gravlens.claims.preregistration import Preregistration
from gravlens.core.display import brief
from gravlens.core.errors import GravlensError
from gravlens.directions.trajectory import ByLayer, Trajectory
from gravlens.stats.nulls import NullDraws, compare

# role -> the arms that play it; a name that ends in "_" stands for all arms that begin so
ARMS = {
    "unblocked": ("unblocked",),
    "clamp": ("clamp",),
    "push": ("reinforce", "push"),
    "random": ("clamp_random_",),
    "frontier": ("lower_rate", "lower_rate_0.25"),
    "released": ("released_at_20", "released"),
    "released_random": ("released_random_",),
}
# nulls of the levels themselves, or of statements that the levels test in another way
DEMANDED = ("isotropic", "isotropic_independent", "weight_noise", "independent_endpoints", "sign_flips")
# Rivals in one basis are about as far as the witness. Farther ones, such as witnesses of other initialisations, do not
# share the anchor's surroundings, so they say nothing of what a shared anchor explains.
FAR = 1.25
ARM_COLUMNS = ("arm", "seed", "compliance_rate", "fraction_final", "task_loss")


def counted(n: int, what: str) -> str:
    """Say how many: `2 runs`, `1 stranger`."""
    return f"{n} {what}{'s' * (n != 1)}"


@dataclass(frozen=True, eq=False)
class Evidence:
    """Evidence on one anchor: tables that gravlens makes, on held-out prompts; what is absent was not run.

    Attributes:
        trajectory: the unblocked runs, all from this anchor, along v_rev.
        nulls: draws of `isotropic` and `weight_noise`; others are reported.
        strangers: name of a stranger -> the same runs along the direction from the anchor to that stranger: a witness
            of another history, or another checkpoint that is no ancestor.
        over_prompts: `bootstrap_alignment(…).layer_mean` of the fraction: `run, step, estimate, low, high`, each run's
            interval over prompts.
        closure: `closure(…)` of the gap between runs and unaligned twins, along v_rev.
        stranger_closures: name of a stranger -> the same with its twins, along its direction.
        damage: `measure_damage(…).layer_mean`: `damage, alignment, judged`.
        arms: one row per run at its last step: `arm, seed, compliance_rate, fraction_final, task_loss`; where measured
            `over_refusal`, `nonsense` (share of answers that are empty or degenerate) and, for random directions,
            `cosine` (their |cos| with v_rev).
        anchor: the anchor's own `compliance_rate`, `over_refusal`, `nonsense`.
        preregistration: what was fixed before the runs. Without one, layers were chosen afterwards, and levels 1 to 3
            are tested on the largest layer.
        digests: of the prompt sets, `probes` and `held_out`, to hold against the preregistration.
        names: role -> its arms, where they differ from `ARMS`.
        name: of the anchor.

    Examples:
        >>> null = gl.nulls.isotropic(vs, steps=[1, 5, 20], draws=200, rng=rng)
        >>> verdict = gl.claim(gl.claims.Evidence(tr, nulls=[null]))
        >>> verdict.demands.columns.tolist()
        ['level', 'name', 'holds', 'figures']
    """

    trajectory: Trajectory
    nulls: Sequence[NullDraws] = ()
    strangers: Mapping[str, Trajectory] = field(default_factory=dict)
    over_prompts: pd.DataFrame | None = None
    closure: ByLayer | None = None
    stranger_closures: Mapping[str, ByLayer] = field(default_factory=dict)
    damage: pd.DataFrame | None = None
    arms: pd.DataFrame | None = None
    anchor: Mapping[str, float] | None = None
    preregistration: Preregistration | None = None
    digests: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    name: str = "anchor"
    __repr__ = brief

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.names) - set(ARMS)):
            found = f"names= has the unknown role {unknown[0]!r}."
            raise GravlensError(found, f"Roles: {', '.join(ARMS)}.", f"names={{'clamp': ({unknown[0]!r},)}}.")
        if self.damage is not None and "layer" in self.damage:
            given = "damage has a row per layer."
            raise GravlensError(given, "Damage is judged on the layer mean.", "damage=measure_damage(…).layer_mean.")
        if self.arms is not None and (missing := set(ARM_COLUMNS) - set(self.arms)):
            given = f"The table of arms has no column {sorted(missing)[0]!r}."
            raise GravlensError(given, f"It needs {', '.join(ARM_COLUMNS)}.", "Findings.arms.")
        if self.rows.empty:
            raise GravlensError("The trajectory holds no run.", "A claim is about runs.", "follow(residuals, vs).")

    # --- alignment ----------------------------------------------------------------------------------------------------
    @property
    def prompts(self) -> str:
        """The prompt set of the claim: held-out prompts, or the given ones where there are no others."""
        known = self.trajectory.data["prompts"].values
        return "held_out" if "held_out" in known or not len(known) else "given"

    @cached_property
    def rows(self) -> pd.DataFrame:
        """`Trajectory.layer_mean` on `prompts`."""
        table = self.trajectory.layer_mean
        return table[table.prompts == self.prompts]

    @cached_property
    def last(self) -> int:
        """The step that is judged: the preregistered one where the runs have it, else their last."""
        fixed = self.preregistration.step if self.preregistration is not None else None
        return fixed if fixed is not None and (self.rows.step == fixed).any() else int(self.rows.step.max())

    @cached_property
    def final(self) -> pd.DataFrame:
        """The layer mean at the judged step, one row per run."""
        return self.rows[self.rows.step == self.last]

    def null(self, name: str) -> NullDraws | None:
        """A null's draws, where it serves the judged step."""
        return next((null for null in self.nulls if null.name == name and self.last in null.steps), None)

    @cached_property
    def others(self) -> list[tuple[str, pd.DataFrame]]:
        """`compare`'s rows at the judged step, of each null that no level demands."""
        others = [null for null in self.nulls if null.name not in DEMANDED and self.last in null.steps]
        rows = [(null.name, compare(self.trajectory, null, prompts=self.prompts).layer_mean) for null in others]
        return [(name, table[table.step == self.last]) for name, table in rows]

    def runs_of(self, trajectory: Trajectory) -> xarray.DataArray:
        """Alignment at the judged step, [run, layer]."""
        return trajectory.data["alignment"].sel(prompts=self.prompts, step=self.last).transpose("run", "layer")

    def distance(self, trajectory: Trajectory) -> xarray.DataArray:
        """Distance of the anchor to the checkpoint that a trajectory's directions lead to, [layer]."""
        data = trajectory.data.sel(prompts=self.prompts, step=self.last)
        return (data["projection"] / data["fraction"]).mean("run")

    def closed(self, closure: ByLayer, trajectory: Trajectory) -> xarray.DataArray:
        """How much of the gap has closed, mean over runs at the judged step, [layer], in residual units.

        Not as a share of the distance: the nearest witness would have the noisiest one.
        """
        table = closure.table[closure.table.step == self.last]
        return table.groupby("layer").closure.mean().to_xarray() * self.distance(trajectory)

    @cached_property
    def times_as_far(self) -> float:
        """How many times as far from the anchor as the witness the strangers are, layer mean; NaN without any."""
        layers = list(self.trajectory.layers_in_mean)
        own = float(self.distance(self.trajectory).sel(layer=layers).mean())
        found = [float(self.distance(one).mean()) / own for one in self.strangers.values()]
        return float(np.mean(found)) if found else float("nan")

    def departures(self, alpha: float) -> list[str]:
        """How the analysis departs from the preregistration, in words; "not preregistered" without one."""
        if self.preregistration is None:
            return ["not preregistered"]
        digests = {name: self.digests.get(name, getattr(self.preregistration, name)) for name in ("probes", "held_out")}
        layers = self.trajectory.layers_in_mean
        return self.preregistration.departures(layers=layers, step=self.last, alpha=alpha, **digests)

    # --- arms ---------------------------------------------------------------------------------------------------------
    def arm(self, role: str) -> pd.DataFrame | None:
        """The runs of a role by seed, or None."""
        found = dict(self.each(role))
        if not found:
            return None
        # the first arm that plays the role: two at once would be two different blocks
        rows = next(iter(found.values()))
        if rows.index.duplicated().any():
            given = f"The arm {role} has two runs of one seed."
            raise GravlensError(given, "Runs are paired by seed.", "one Evidence per anchor, or names={role: (arm,)}.")
        return rows

    def each(self, role: str) -> Iterator[tuple[str, pd.DataFrame]]:
        """The arms of a role, each with its runs by seed."""
        for name in {**ARMS, **self.names}[role]:
            for arm, rows in self._by_arm.items():
                if arm == name or (name.endswith("_") and arm.startswith(name)):
                    yield arm, rows

    @cached_property
    def _by_arm(self) -> Mapping[str, pd.DataFrame]:
        found = () if self.arms is None else self.arms.groupby("arm", sort=False)
        return {str(arm): rows.set_index("seed") for arm, rows in found}


@dataclass(frozen=True, eq=False)
class Case:
    """The evidence of all anchors, and the level α at which every test is made."""

    anchors: Sequence[Evidence]
    alpha: float

    @cached_property
    def fixed(self) -> bool:
        """Whether layers, step, α and prompts were fixed before the runs, at every anchor."""
        return not any(evidence.departures(self.alpha) for evidence in self.anchors)

    def over_layers(self, evidence: Evidence, values: xarray.DataArray) -> np.ndarray:
        """The mean over the layers that were fixed, or the largest layer where they were chosen afterwards."""
        if not self.fixed:
            return np.asarray(values.max("layer"))
        chosen = [layer for layer in evidence.trajectory.layers_in_mean if layer in values["layer"]]
        return np.asarray(values.sel(layer=chosen).mean("layer", skipna=False))

    @property
    def unit(self) -> str:
        """The unit of the tests over signs: the anchor, where there are several."""
        return "anchor" if len(self.anchors) > 1 else "run"

    def units(self, values: Sequence[pd.Series | np.ndarray]) -> np.ndarray:
        """One value per unit: the anchors' means, or the only anchor's runs. A missing run makes its mean missing."""
        each = [np.asarray(one, dtype=float) for one in values]
        if len(self.anchors) == 1:
            return each[0]
        return np.array([one.mean() if len(one) else np.nan for one in each])


@dataclass(frozen=True)
class Demand:
    """One demand of a claim level.

    `holds` is None where it was not run or cannot be reached with these numbers, which caps the level; `figures` are
    the numbers, in words.
    """

    level: int
    name: str
    holds: bool | None
    figures: str = "not run"
