"""How much of a reversion claim the controls allow: a level, a sentence, and what caps it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from gravlens.claims.criteria import DEMANDS
from gravlens.claims.effects import effects
from gravlens.claims.evidence import Case, Demand, Evidence
from gravlens.core import display as html
from gravlens.core.errors import GravlensError, of_kind
from gravlens.stats.nulls import compare

LEVELS = (
    "no alignment",
    "alignment observed",
    "exceeds a matched null",
    "specific to this history",
    "causal",
    "durable",
)
ALPHA = 0.05
# of the levels themselves, or of statements that the levels test in another way
DEMANDED = ("isotropic", "weight_noise", "independent_endpoints", "sign_flips")


@dataclass(frozen=True, eq=False)
class Claim:
    """The verdict (docs/claims.md): `level` 0 to 5, as in `LEVELS`, and the `sentence` that may be said.

    `capped_by` is the demand of the next level that failed or was not run ("" at level 5); `demands` has the columns
    `level, name, holds` (`<NA>`: not run, or out of reach of these numbers), `figures`, of all levels; `effects` has
    `effect, mean, low, high, n, unit`; `alone` is the level of each anchor judged by itself, where there are several.
    """

    level: int
    sentence: str
    capped_by: str
    demands: pd.DataFrame
    effects: pd.DataFrame
    alone: Mapping[str, int] = field(default_factory=dict)

    def _repr_html_(self) -> str:
        shown = self.demands.assign(holds=self.demands.holds.map({True: "yes", False: "no"}).fillna("not run"))
        title = f"Claim: level {self.level} of {len(LEVELS) - 1}, {LEVELS[self.level]}"
        return html.of_frame(shown, title=title, notes=[self.sentence], rest=".demands")


def claim(evidence: Evidence | Sequence[Evidence], *, alpha: float | None = None) -> Claim:
    """Find the highest level at which its demands and those of all lower levels hold (docs/claims.md).

    A demand that was not run, or that no result could meet with these numbers of runs, strangers or directions, caps
    the level as a failed one does, and is named. Of several anchors one claim is made, on tests that are combined over
    them. GravlensError for a trajectory without runs.

    Args:
        evidence: what was run, of one anchor or of several.
        alpha: the level of every test; default: the preregistered one, else .05.
    """
    anchors = [evidence] if isinstance(evidence, Evidence) else list(evidence)
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
    alone = {one.name: claim(one, alpha=case.alpha).level for one in anchors} if len(anchors) > 1 else {}
    said = _sentence(case, level, next_caps, sizes, alone)
    return Claim(level, said, next_caps[0].name if next_caps else "", table, sizes, alone)


def _sentence(case: Case, level: int, caps: Sequence[Demand], sizes: pd.DataFrame, alone: Mapping[str, int]) -> str:
    held = (
        "The drift is aligned with v_rev and specific to this history, and holding v_rev holds the harm, better than "
        "holding matched random directions does"
    )
    said = (
        "No alignment with v_rev is shown",
        "Alignment with v_rev is observed; that a matched null is exceeded is not shown",
        "The drift is aligned with v_rev beyond weight noise of the same size; that it is this history's direction is "
        "not shown",
        "The drift is aligned with v_rev, and this is specific to this history; that it causes the return is not shown",
        f"{held}; that the block outlasts its release is not shown",
        f"{held}; half of the harm is still held at the last step, after the block was lifted",
    )[level]
    named = "; ".join(f"{demand.name} ({demand.figures})" for demand in caps)
    capped = [f"Level {level + 1} ({LEVELS[level + 1]}) is not reached: {named}."] if caps else []
    counted = pd.Series(list(alone.values())).value_counts().sort_index().items()
    apart = [f"Each anchor alone: {', '.join(f'level {one} in {n}' for one, n in counted)}."] if alone else []
    return " ".join([f"{said}: {_seen(case, sizes)}.", _frame(case), *_told(case), *capped, *apart])


def _seen(case: Case, sizes: pd.DataFrame) -> str:
    rows = sizes.set_index("effect")
    parts = []
    for effect, form in (("alignment", ".2f"), ("fraction", ".2f")):
        mean, low, high = (rows.at[effect, column] for column in ("mean", "low", "high"))
        span = "" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]"
        parts.append(f"{effect} {mean:{form}}{span}")
    n = sum(len(evidence.final) for evidence in case.anchors)
    among = f"{len(case.anchors)} anchors, " if len(case.anchors) > 1 else "one anchor, "
    return f"{parts[0]}, {parts[1]} of the way back at step {_steps(case)} ({among}{n} run{'s' * (n != 1)} in all)"


def _steps(case: Case) -> str:
    return " and ".join(map(str, sorted({evidence.last for evidence in case.anchors})))


def _frame(case: Case) -> str:
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
        "strangers": [len(evidence.strangers) for evidence in case.anchors],
        "random directions": [len(dict(evidence.each("random"))) for evidence in case.anchors],
    }
    numbers = ", ".join(f"{max(n)} {name}{' an anchor' * (len(n) > 1)}" for name, n in counts.items() if any(n))
    beside = f"; {numbers}" if numbers else ""
    return f"α = {case.alpha:g}, {over}, unit: the {case.unit}{beside}; {how}."


def _told(case: Case) -> Iterator[str]:
    """Sentences about nulls that no level demands, where not every run exceeds them."""
    found: dict[str, list[pd.DataFrame]] = {}
    for evidence in case.anchors:
        for null in evidence.nulls:
            if null.name not in DEMANDED and evidence.last in null.steps:
                rows = compare(evidence.trajectory, null, prompts=evidence.prompts).layer_mean
                found.setdefault(null.name, []).append(rows[rows.step == evidence.last])
    for name, parts in found.items():
        rows = pd.concat(parts)
        if not rows.above.all():
            below = f"{int((~rows.above).sum())} of {len(rows)}"
            yield f"Not above the null “{name.replace('_', ' ')}” (p99 {rows.p99.mean():.2f}) in {below} comparisons."
