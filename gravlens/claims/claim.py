"""How much of a reversion claim the controls allow: a level, a sentence, and what caps it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from gravlens.claims.criteria import DEMANDS
from gravlens.claims.effects import effects
from gravlens.claims.evidence import FAR, Case, Demand, Evidence, counted
from gravlens.claims.preregistration import ALPHA
from gravlens.core import display as html
from gravlens.core.errors import GravlensError, of_kind

LEVELS = (
    "no alignment",
    "alignment observed",
    "exceeds a matched null",
    "specific to this history",
    "causal",
    "durable",
)
_HELD = (
    "The drift is aligned with v_rev and specific to this history, and holding v_rev holds the harm, better than "
    "holding matched random directions does"
)
STATEMENTS = (
    "No alignment with v_rev is shown",
    "Alignment with v_rev is observed; that a matched null is exceeded is not shown",
    "The drift is aligned with v_rev beyond weight noise of the same size; that it is this history's direction is not "
    "shown",
    "The drift is aligned with v_rev, and this is specific to this history; that it causes the return is not shown",
    f"{_HELD}; that the block outlasts its release is not shown",
    f"{_HELD}; half of the harm is still held at the last step, after the block was lifted",
)


@dataclass(frozen=True, eq=False)
class Claim:
    """The verdict (docs/claims.md).

    Attributes:
        level: 0 to 5, as in `LEVELS`.
        statement: what may be said at that level, with alignment and fraction.
        setting: of the tests: α, layers, unit, numbers, and whether they were fixed beforehand.
        remarks: nulls that are not exceeded, what caps the level, and the levels of the anchors alone.
        capped_by: the demand of the next level that failed or was not run ("" at level 5).
        demands: `level, name, holds` (`<NA>`: not run, or out of reach of these numbers), `figures`, of all levels.
        effects: `effect, mean, low, high, n, unit`.
        alone: the claim on each anchor by itself, where there are several.
    """

    level: int
    statement: str
    setting: str
    remarks: tuple[str, ...]
    capped_by: str
    demands: pd.DataFrame
    effects: pd.DataFrame
    alone: Mapping[str, "Claim"] = field(default_factory=dict, repr=False)
    __repr__ = html.brief

    @property
    def sentence(self) -> str:
        """All that may be said."""
        return " ".join([self.statement, self.setting, *self.remarks])

    def _repr_html_(self) -> str:
        shown = self.demands.assign(holds=self.demands.holds.map({True: "yes", False: "no"}).fillna("not run"))
        title = f"Claim: level {self.level} of {len(LEVELS) - 1}, {LEVELS[self.level]}"
        return html.of_frame(shown, title=title, notes=[self.sentence], rest=".demands")


def claim(evidence: Evidence | Sequence[Evidence], *, alpha: float | None = None, alone: bool = True) -> Claim:
    """Find the highest level at which its demands and those of all lower levels hold (docs/claims.md).

    A demand that was not run, or that no result could meet with these numbers of runs, strangers or directions, caps
    the level as a failed one does, and is named. Of several anchors one claim is made, on tests that are combined over
    them. GravlensError for a trajectory without runs.

    Args:
        evidence: what was run, of one anchor or of several.
        alpha: the level of every test; default: the preregistered one, else .05.
        alone: of several anchors, judge each by itself too.

    Examples:
        >>> null = gl.nulls.isotropic(vs, steps=[1, 5, 20], draws=200, rng=rng)
        >>> verdict = gl.claim(gl.claims.Evidence(tr, nulls=[null]))
        >>> verdict.capped_by in verdict.demands.name.tolist()
        True
    """
    anchors = list(evidence) if isinstance(evidence, Sequence) else [evidence]
    if not anchors:
        raise GravlensError("No evidence was given.", "A claim is about one anchor at least.", "claim([Evidence(…)]).")
    for one in anchors:
        of_kind(one, Evidence, "Evidence is needed.", "Evidence(follow(residuals, directions), nulls=[…]).")
    fixed = anchors[0].preregistration
    case = Case(anchors, alpha if alpha is not None else fixed.alpha if fixed is not None else ALPHA)
    demands = [demand for find in DEMANDS for demand in find(case)]
    caps = [demand for demand in demands if not demand.holds]
    # levels build on each other: the lowest cap counts
    level = min((demand.level - 1 for demand in caps), default=len(LEVELS) - 1)
    next_caps = [demand for demand in caps if demand.level == level + 1]
    table = pd.DataFrame([vars(demand) for demand in demands])
    # nullable: a plain column would turn None, not run, into False
    table = table.astype({"holds": "boolean"})
    sizes = effects(case)
    each = {one.name: claim(one, alpha=case.alpha) for one in anchors} if alone and len(anchors) > 1 else {}
    said = f"{STATEMENTS[level]}: {_seen(case, sizes)}.{_anchor_shared(case, level)}"
    remarks = _remarks(case, level, next_caps, each)
    named = next_caps[0].name if next_caps else ""
    return Claim(level, said, _setting(case), remarks, named, table, sizes, each)


def _anchor_shared(case: Case, level: int) -> str:
    """What strangers of another basis leave open at level 3 and above."""
    if level < 3:
        return ""
    times = float(np.nanmax([np.nan_to_num(evidence.times_as_far) for evidence in case.anchors]))
    if times <= FAR:
        return ""
    return f" The strangers are {times:.1f} times as far: that drift and v_rev share an anchor is not excluded."


def _remarks(case: Case, level: int, caps: Sequence[Demand], alone: Mapping[str, Claim]) -> tuple[str, ...]:
    named = "; ".join(f"{demand.name} ({demand.figures})" for demand in caps)
    capped = [f"Level {level + 1} ({LEVELS[level + 1]}) is not reached: {named}."] if caps else []
    levels = pd.Series([one.level for one in alone.values()], dtype=int).value_counts().sort_index().items()
    apart = [f"Each anchor alone: {', '.join(f'level {one} in {n}' for one, n in levels)}."] if alone else []
    return (*_told(case), *capped, *apart)


def _seen(case: Case, sizes: pd.DataFrame) -> str:
    rows = sizes.set_index("effect")
    parts = []
    for effect in ("alignment", "fraction"):
        mean, low, high = (float(rows[column][effect]) for column in ("mean", "low", "high"))
        parts.append(f"{effect} {mean:.2f}" + ("" if low != low else f" [{low:.2f}, {high:.2f}]"))
    n = sum(len(evidence.final) for evidence in case.anchors)
    among = f"{len(case.anchors)} anchors, " if len(case.anchors) > 1 else "one anchor, "
    return f"{parts[0]}, {parts[1]} of the way back at step {_steps(case)} ({among}{counted(n, 'run')} in all)"


def _steps(case: Case) -> str:
    return " and ".join(map(str, sorted({evidence.last for evidence in case.anchors})))


def _setting(case: Case) -> str:
    """Say what the tests were fixed to: α, layers, unit, and whether this was done beforehand."""
    layers = sorted({layer for evidence in case.anchors for layer in evidence.trajectory.layers_in_mean})
    over = f"mean over the layers {html.listed(layers)}"
    departures = list(dict.fromkeys(why for evidence in case.anchors for why in evidence.departures(case.alpha)))
    if case.fixed:
        digests = {evidence.preregistration.digest[:8] for evidence in case.anchors if evidence.preregistration}
        late = any(evidence.preregistration.after_runs for evidence in case.anchors if evidence.preregistration)
        how = f"preregistered ({', '.join(sorted(digests))})" + (", after the runs were made" if late else "")
    else:
        over = "largest layer, for layers and step were chosen afterwards"
        how = "; ".join(departures)
    counts = {
        "stranger": [len(evidence.strangers) for evidence in case.anchors],
        "random direction": [len(dict(evidence.each("random"))) for evidence in case.anchors],
    }
    numbers = ", ".join(f"{counted(max(n), name)}{' an anchor' * (len(n) > 1)}" for name, n in counts.items() if any(n))
    beside = f"; {numbers}" if numbers else ""
    return f"α = {case.alpha:g}, {over}, unit: the {case.unit}{beside}; {how}."


def _told(case: Case) -> Iterator[str]:
    """Sentences about nulls that no level demands, where not every run exceeds them."""
    found: dict[str, list[pd.DataFrame]] = {}
    for evidence in case.anchors:
        for name, rows in evidence.others:
            found.setdefault(name, []).append(rows)
    for name, parts in found.items():
        rows = pd.concat(parts)
        if not rows.above.all():
            below = f"{int((~rows.above).sum())} of {len(rows)}"
            yield f"Not above the null “{name.replace('_', ' ')}” (p99 {rows.p99.mean():.2f}) in {below} comparisons."
