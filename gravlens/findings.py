"""What a carried-out setting shows, as tidy tables: trajectories, nulls, controls, arms, history."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gravlens.arms import Arm
from gravlens.claims import Claim, claim
from gravlens.demands import Evidence
from gravlens.directions import locate_vrev
from gravlens.experiment import load_states, run_folder
from gravlens.gathering import closures_of, controls_of, damage_of, final_rows, follow_arm, intervals_of, nulls_of
from gravlens.nulls import compare
from gravlens.settings.history import Setting
from gravlens.trajectory import Trajectory


@dataclass(frozen=True, eq=False)
class Findings:
    """Tidy tables of one organism (or of several, put together by `concat`); each has a column `organism`.

    Attributes:
        trajectory: `Trajectory.table` of every arm, with a column `arm`.
        nulls: `compare`'s columns, for the unblocked runs on held-out prompts.
        damage: `measure_damage`'s columns.
        intervals: `bootstrap_alignment`'s columns, for the unblocked runs on held-out prompts.
        demands: what each claim level demands: `level, name, holds` (<NA>: not run), `figures`.
        verdicts: `level, sentence, capped_by`.
        controls: `control, run, alignment_final, fraction_final, closure_final` on held-out prompts, layer mean.
        arms: `arm, run`, the final measures, `seconds_per_step, blocker_norm`.
        behavior: `arm, run, step` and every behaviour measure (`arm` is `history` for witness and anchor).
    """

    trajectory: pd.DataFrame
    nulls: pd.DataFrame
    controls: pd.DataFrame
    damage: pd.DataFrame
    intervals: pd.DataFrame
    arms: pd.DataFrame
    behavior: pd.DataFrame
    demands: pd.DataFrame
    verdicts: pd.DataFrame

    @classmethod
    def concat(cls, parts: Sequence["Findings"]) -> "Findings":
        """Put several organisms together."""
        return cls(**{f.name: pd.concat([getattr(p, f.name) for p in parts], ignore_index=True) for f in fields(cls)})


def findings_of(setting: Setting, home: Path, *, organism: str) -> Findings:
    """Read what `carry_out` left, hold it against nulls and controls, and put it into tables."""
    vs = locate_vrev(load_states(home, "measured", "probes"))
    follows = {arm.name: follow_arm(setting, arm, home, vs) for arm in setting.arms}
    unblocked = follows["unblocked"]
    nulls, behavior = nulls_of(setting, home, vs, unblocked), _behavior(setting, home)
    controls, arms = controls_of(setting, home, vs, follows), _arms(setting, home, follows, behavior)
    closures = closures_of(setting, home, vs, unblocked.layers_in_mean)
    damage = damage_of(setting, home, vs, unblocked.layers_in_mean)
    anchor = behavior[(behavior.arm == "history") & (behavior.run == "anchor")]
    found = claim(
        Evidence(
            trajectory=unblocked,
            nulls=nulls,
            controls=controls.rename(columns={"alignment_final": "alignment"}),
            closures=closures,
            damage=damage,
            arms=arms,
            anchor_harm=float(anchor.harmfulness.iloc[0]),
        )
    )
    tables = {
        "trajectory": pd.concat([t.table.assign(arm=name) for name, t in follows.items()], ignore_index=True),
        "nulls": pd.concat([compare(unblocked, null) for null in nulls], ignore_index=True),
        "controls": controls.merge(_final_closures(closures), on=["control", "run"], how="left"),
        "damage": damage,
        "intervals": intervals_of(setting, home, vs, unblocked.layers_in_mean),
        "arms": arms,
        "behavior": behavior,
        "demands": found.demands,
        "verdicts": _verdict(found),
    }
    return Findings(**{name: table.assign(organism=organism) for name, table in tables.items()})


def _verdict(found: Claim) -> pd.DataFrame:
    return pd.DataFrame([{"level": found.level, "sentence": found.sentence, "capped_by": found.capped_by}])


def _final_closures(closures: pd.DataFrame | None) -> pd.DataFrame:
    columns = ["control", "run", "closure_final"]
    if closures is None:
        return pd.DataFrame(columns=columns)
    last = closures[closures.layer.isna() & (closures.step == closures.step.max())]
    return pd.DataFrame({"control": "unaligned_twin", "run": last.twin, "closure_final": last.closure}, columns=columns)


def _behavior(setting: Setting, home: Path) -> pd.DataFrame:
    history = json.loads((home / "measured" / "behavior.json").read_text())
    rows: list[dict[str, Any]] = [
        {"arm": "history", "run": name, "step": 0, **numbers(m)} for name, m in history.items()
    ]
    for arm in setting.arms:
        for seed in arm.seeds:
            measured = run_facts(home, arm, seed)["behavior"]
            rows += [
                {"arm": arm.name, "run": f"{arm.name}-{seed}", "step": int(step), **numbers(m)}
                for step, m in measured.items()
            ]
    return pd.DataFrame(rows)


def numbers(measured: dict[str, Any]) -> dict[str, float]:
    """Without the answers; a rate of nothing is null in JSON."""
    return {key: np.nan if value is None else value for key, value in measured.items() if key != "answers"}


def run_facts(home: Path, arm: Arm, seed: int) -> dict[str, Any]:
    """What `run_arm` left in a run's `run.json`."""
    return json.loads((run_folder(home, arm, seed) / "run.json").read_text())


def _arms(setting: Setting, home: Path, follows: dict[str, Trajectory], behavior: pd.DataFrame) -> pd.DataFrame:
    frames = []
    last = behavior[behavior.step == setting.save_steps[-1]].drop(columns=["arm", "step"])
    for arm in setting.arms:
        held_out = final_rows(follows[arm.name].table).set_index("run")
        given = final_rows(follows[arm.name].table, "given").set_index("run")
        logs = [pd.read_csv(run_folder(home, arm, seed) / "log.csv") for seed in arm.seeds]
        frame = pd.DataFrame(
            {
                "arm": arm.name,
                "run": [f"{arm.name}-{seed}" for seed in arm.seeds],
                "seed": arm.seeds,
                "seconds_per_step": [run_facts(home, arm, seed)["seconds_per_step"] for seed in arm.seeds],
                "blocker_norm": [log.blocker_norm.mean() for log in logs],
            }
        ).set_index("run")
        frame["alignment_final"], frame["fraction_final"] = held_out.alignment, held_out.fraction
        frame["alignment_given_final"], frame["fraction_given_final"] = given.alignment, given.fraction
        frames.append(frame.reset_index())
    return pd.concat(frames, ignore_index=True).merge(last, on="run", how="left")
