"""Plan an audit: what a history has now, what a claim level needs, and what that costs on this machine."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from numpy.random import Generator

from gravlens.activations.cost import plan_reading
from gravlens.core.display import brief, duration, of_frame
from gravlens.core.errors import GravlensError, at_home, reading
from gravlens.history.sequence import ModelSequence
from gravlens.stats.power_analysis import LEVELS, Design, Effects, needed, power

PAIRED = ("twins", "clamp", "push", "released")
BACKWARD = 3  # a training step costs about three forward passes
LENGTH = 2  # of an example of the data, prompt and answer, in prompts: assumed, not measured
STEPS = 100  # where neither runs nor an argument say how long a run is


@dataclass(frozen=True, eq=False)
class Plan:
    """What is there, and what is needed.

    Attributes:
        table: a row per level and list of plans: `level, power_now, plan, power, enough, now` (runs that are there),
            `needed, histories` and `strangers` (to be supplied: gravlens cannot train them), `missing` (fine-tuning
            runs) and `minutes` of these (NaN: not known).
        now: what is there: `anchors`, `strangers` and `directions` of each, and runs by arm.
        effects: what is planned for.
        seconds: of one fine-tuning run on this machine; NaN if unknown.
        basis: where `seconds` is from.
        target: the power that is asked for.
    """

    table: pd.DataFrame
    now: Mapping[str, int]
    effects: Effects
    seconds: float
    basis: str
    target: float
    __repr__ = brief

    def lines(self) -> list[tuple[str, str]]:
        """Return quantities and their values as text: of each level the plan with the fewest runs to train."""
        counts = ", ".join(f"{name.replace('_', ' ')}: {n}" for name, n in self.now.items())
        rows = [("now", counts), ("effects planned for", self.effects.source)]
        for level, plans in self.table.groupby("level"):
            best = plans.sort_values(["enough", "missing"], ascending=[False, True]).iloc[0]
            rows.append((f"level {level}", f"power {best.power_now:.0%} now; {self._told(best)}"))
        cost = "not known" if math.isnan(self.seconds) else duration(self.seconds)
        return [*rows, ("a run to train", f"{cost}: {self.basis}")]

    def _told(self, row: pd.Series) -> str:
        if row.power_now >= self.target:
            return "enough as it is"
        if not row.enough:
            return f"no plan of the lists has {self.target:.0%} with these effects ({row.power:.0%} at most)"
        supplied = {"further histories": row.histories, "strangers": row.strangers}
        supply = "".join(f", {n} {what} to supply" for what, n in supplied.items() if n)
        cost = "" if math.isnan(row.minutes) else f", about {duration(60 * row.minutes)}"
        return f"{row.power:.0%} with {row.needed}{supply}, {row.missing} runs to train{cost}"

    def _repr_html_(self) -> str:
        return of_frame(self.table, title="Plan", notes=[f"{name}: {value}" for name, value in self.lines()])


def plan_audit(
    sequences: ModelSequence | Path | str | Iterable[ModelSequence | Path | str],
    *,
    effects: Effects | Path | str | None = None,
    alpha: float = 0.05,
    target: float = 0.8,
    steps: int | None = None,
    batch: int = 8,
    rng: Generator,
) -> Plan:
    """Plan what to add to one history, or to several that are judged together, for each claim level.

    The time of a run is that of the pilot's runs, or an estimate from this machine's speed, measured within seconds.

    Args:
        sequences: the histories, or their SEQUENCE.toml; the controls that they name count.
        effects: what to plan for, or a pilot's results folder; default: what was measured on the refusal organisms.
        alpha: the largest p-value that is called significant.
        target: the power that is asked for.
        steps: of a run; default: the last one of the runs that are there, else 100.
        batch: examples of a step.
        rng: draws the simulated studies.

    Raises:
        GravlensError: no history, or what `Effects.from_results` and `needed` raise.
    """
    # not as_list: a ModelSequence is itself iterable, over its checkpoints
    given = [sequences] if isinstance(sequences, ModelSequence | Path | str) else sequences
    histories = [ModelSequence.of(one) for one in given]
    if not histories:
        raise GravlensError("No history was given.", "A plan is about one at least.", "plan_audit('SEQUENCE.toml').")
    pilot = at_home(effects) if isinstance(effects, str | Path) else None
    planned = Effects.from_results(effects) if isinstance(effects, str | Path) else effects or Effects()
    now = _counts(histories)
    lasts = [run[-1].step or 0 for one in histories for run in one.runs.values()]
    seconds, basis = _seconds_of_a_run(histories[0], steps or max(lasts, default=0) or STEPS, batch, pilot)
    # a history without runs is simulated with one, and then found to lack it
    design = Design(now["anchors"], max(1, now["runs"] // now["anchors"]), now["strangers"], now["directions"])
    simulated = power(**vars(design), alpha=alpha, effects=planned, rng=rng).set_index("level").power
    rows = []
    for level in LEVELS:
        # the simulation knows numbers alone: directions without the clamp beside them reach nothing
        there = all(now[arm] >= n for arm, n in design.arms(level).items())
        for found in needed(level, target, effects=planned, alpha=alpha, rng=rng).to_dict("records"):
            wanted = Design(**{name: found[name] for name in vars(design)})
            first = {"level": level, "power_now": float(simulated[level]) * there, "plan": found["plan"]}
            rows.append({**first, "power": found["power"], "enough": found["enough"], **_missing(wanted, level, now)})
    table = pd.DataFrame(rows)
    return Plan(table.assign(minutes=table.missing * seconds / 60), now, planned, seconds, basis, target)


def _counts(histories: Sequence[ModelSequence]) -> dict[str, int]:
    """Count anchors, runs in every arm over all of them, and the strangers and directions that each one has."""
    controls = [one.controls for one in histories]
    return {
        "anchors": len(histories),
        "strangers": min(len(one.strangers) for one in controls) + len(histories) - 1,
        "directions": min(len(one.random) for one in controls),
        "runs": sum(len(one.runs) for one in histories),
        **{arm: sum(len(getattr(one, arm)) for one in controls) for arm in PAIRED},
        "stranger_twins": sum(len(runs) for one in controls for runs in one.stranger_twins.values()),
        "random": sum(len(clamped.runs) for one in controls for clamped in one.random.values()),
    }


def _missing(wanted: Design, level: int, now: Mapping[str, int]) -> dict[str, Any]:
    arms, further = wanted.arms(level), max(0, wanted.anchors - now["anchors"])
    return {
        "now": ", ".join(f"{arm.replace('_', ' ')}: {now[arm]}" for arm in arms),
        "needed": str(wanted),
        "histories": further,
        "strangers": max(0, wanted.strangers - now["strangers"] - further),  # a further history brings its witness
        # arm by arm: a twin too many does not stand in for a clamp
        "missing": sum(max(0, n - now[arm]) for arm, n in arms.items()),
    }


def _seconds_of_a_run(history: ModelSequence, steps: int, batch: int, pilot: Path | None) -> tuple[float, str]:
    if pilot is not None:
        file = (pilot if pilot.is_dir() else pilot.parent) / "arms.csv"
        with reading(file, "A pilot's table is that of a results folder.", "gravlens reproduce, which writes it."):
            arms = pd.read_csv(file)
            recorded = float(arms.seconds_per_step.mean()) if "seconds_per_step" in arms else math.nan
        if not math.isnan(recorded):
            return steps * recorded, f"{steps} steps of {recorded:.3g} s, as recorded in the pilot"
    try:
        forecast = plan_reading(history)
    except GravlensError as error:  # models in memory, blocks too large to time: the plan holds without a time
        return math.nan, error.given
    # of one prompt through the whole model: the forecast's digests and openings are no part of training
    prompt = forecast.seconds["passes"] / (forecast.checkpoints * forecast.prompts)
    told = f"an estimate for {steps} steps of {batch} examples, without measuring the run"
    return steps * batch * BACKWARD * LENGTH * prompt, told
