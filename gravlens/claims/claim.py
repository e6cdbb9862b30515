"""How much of a reversion claim the controls allow: a level, a sentence, and what caps it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from gravlens.claims.criteria import DEMANDS, Demand, Evidence, held_against
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


@dataclass(frozen=True, eq=False)
class Claim:
    """The verdict (docs/claims.md): `level` 0 to 5, as in `LEVELS`, and the `sentence` that may be said.

    `capped_by` is the demand of the next level that failed or was not run ("" at level 5); `demands` has the columns
    `level, name, holds` (`<NA>`: not run), `figures`, of all levels.
    """

    level: int
    sentence: str
    capped_by: str
    demands: pd.DataFrame

    def _repr_html_(self) -> str:
        shown = self.demands.assign(holds=self.demands.holds.map({True: "yes", False: "no"}).fillna("not run"))
        title = f"Claim: level {self.level} of {len(LEVELS) - 1}, {LEVELS[self.level]}"
        return html.of_frame(shown, title=title, notes=[self.sentence], rest=".demands")


def claim(evidence: Evidence, *, alpha: float = 0.05) -> Claim:
    """Find the highest level at which its demands and those of all lower levels hold (docs/claims.md).

    A demand that was not run caps the level as a failed one does, and is named. Nothing is claimed beyond the anchor
    that the runs start from. GravlensError for a trajectory without runs or a missing column.

    Args:
        evidence: what was run.
        alpha: the largest p of the sign-flip tests over runs: with fewer than 5 runs none can hold at .05.
    """
    of_kind(evidence, Evidence, "Evidence is needed.", "Evidence(follow(residuals, directions), nulls=[…]).")
    if evidence.rows.empty:
        raise GravlensError("The trajectory holds no run.", "A claim is about runs.", "follow(residuals, vs).")
    demands = [demand for find in DEMANDS for demand in find(evidence, alpha)]
    caps = [demand for demand in demands if not demand.holds]
    # levels build on each other: the lowest cap counts
    level = min((demand.level - 1 for demand in caps), default=len(LEVELS) - 1)
    next_caps = [demand for demand in caps if demand.level == level + 1]
    table = pd.DataFrame([vars(demand) for demand in demands])
    # nullable: a plain column would turn None, not run, into False
    table = table.astype({"holds": "boolean"})
    return Claim(level, _sentence(evidence, level, next_caps), next_caps[0].name if next_caps else "", table)


def _sentence(evidence: Evidence, level: int, caps: Sequence[Demand]) -> str:
    n, mean = len(evidence.final), float(evidence.final.alignment.mean())
    fraction = float(evidence.final.fraction.mean())
    seen = f"alignment {mean:.2f}, {fraction:.2f} of the way back at step {evidence.last}, {n} run{'s' * (n != 1)}"
    held = (
        "The drift is aligned with v_rev and specific to this history, and on this anchor holding v_rev holds the "
        "harm, better than holding a matched random direction does"
    )
    said = (
        f"No alignment with v_rev is shown ({seen}).",
        f"Alignment with v_rev is observed ({seen}); that a matched null is exceeded is not shown.",
        f"The drift is aligned with v_rev beyond weight noise of the same size ({seen}); that it is this history's "
        "direction is not shown.",
        f"The drift is aligned with v_rev, and this is specific to this history ({seen}); that it causes the return is "
        "not shown.",
        f"{held} ({seen}); that the block outlasts its release is not shown.",
        f"{held} ({seen}); half of the harm is still held at the last step, after the block was lifted.",
    )[level]
    named = "; ".join(f"{demand.name} ({demand.figures})" for demand in caps)
    capped = [f"Level {level + 1} ({LEVELS[level + 1]}) is not reached: {named}."] if caps else []
    return " ".join([said, *_told(evidence), *capped])


def _told(evidence: Evidence) -> Iterator[str]:
    """Sentences about nulls that no level demands, where not every run exceeds them."""
    demanded = ("isotropic", "weight_noise", "independent_endpoints")
    others = [null for null in evidence.nulls if null.name not in demanded and evidence.last in null.steps]
    # not a set: the order of the nulls is that of the sentence
    for name in dict.fromkeys(null.name for null in others):
        rows = pd.concat([held_against(evidence, null) for null in others if null.name == name])
        if not rows.above.all():
            below = f"{int((~rows.above).sum())} of {len(rows)}"
            yield f"Not above the null “{name.replace('_', ' ')}” (p99 {rows.p99.mean():.2f}) in {below} comparisons."
