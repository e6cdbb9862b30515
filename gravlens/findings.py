"""What a carried-out setting shows, as tidy tables: trajectories, nulls, controls, arms, history."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gravlens.arms import Arm
from gravlens.controls import closure, from_start, substitute
from gravlens.directions import Directions, locate_vrev
from gravlens.experiment import PROMPT_SETS, join, load_states, noise_folder, run_folder, unblocked_arm
from gravlens.nulls import NullDraws, compare, isotropic
from gravlens.residuals import Residuals
from gravlens.settings.history import Setting
from gravlens.trajectory import Trajectory, follow

ISOTROPIC_DRAWS = 20_000


@dataclass(frozen=True, eq=False)
class Findings:
    """Tidy tables of one organism (or of several, put together by `concat`); each has a column `organism`.

    Attributes:
        trajectory: `Trajectory.table` of every arm, with a column `arm`.
        nulls: `compare`'s columns, for the unblocked runs on held-out prompts.
        controls: `control, run, alignment_final, fraction_final, closure_final` on held-out prompts, layer mean.
        arms: `arm, run`, the final measures, `seconds_per_step, blocker_norm`.
        behavior: `arm, run, step` and every behaviour measure (`arm` is `history` for witness and anchor).
    """

    trajectory: pd.DataFrame
    nulls: pd.DataFrame
    controls: pd.DataFrame
    arms: pd.DataFrame
    behavior: pd.DataFrame

    @classmethod
    def concat(cls, parts: Sequence["Findings"]) -> "Findings":
        """Put several organisms together."""
        return cls(**{f.name: pd.concat([getattr(p, f.name) for p in parts], ignore_index=True) for f in fields(cls)})


def findings_of(setting: Setting, home: Path, *, organism: str) -> Findings:
    """Read what `carry_out` left and put it into tables."""
    vs = locate_vrev(load_states(home, "measured", "probes"))
    follows = {arm.name: follow_arm(setting, arm, home, vs) for arm in setting.arms}
    trajectory = pd.concat([t.table.assign(arm=name) for name, t in follows.items()], ignore_index=True)
    behavior = _behavior(setting, home)
    tables = {
        "trajectory": trajectory,
        "nulls": _nulls(setting, home, vs, follows["unblocked"]),
        "controls": _controls(setting, home, vs, follows),
        "arms": _arms(setting, home, follows, behavior),
        "behavior": behavior,
    }
    return Findings(**{name: table.assign(organism=organism) for name, table in tables.items()})


def final_rows(table: pd.DataFrame, prompts: str = "held_out") -> pd.DataFrame:
    """Rows of the layer mean at each run's last step."""
    rows = table[table.layer.isna() & (table.prompts == prompts)]
    return rows[rows.step == rows.groupby("run").step.transform("max")]


def _states(setting: Setting, arm: Arm, home: Path, prompts: str) -> Residuals:
    runs = [load_states(home, str(run_folder(home, arm, seed).relative_to(home)), prompts) for seed in arm.seeds]
    states = join([load_states(home, "measured", prompts), *runs])
    return states if arm.start == "anchor" else from_start(states, start=arm.start)


def follow_arm(setting: Setting, arm: Arm, home: Path, vs: Directions) -> Trajectory:
    """The runs of an arm along v_rev, on probes and held-out prompts."""
    states = [_states(setting, arm, home, prompts) for prompts in PROMPT_SETS]
    return follow(states, vs, layers_in_mean=setting.layers_in_mean)


def _nulls(setting: Setting, home: Path, vs: Directions, unblocked: Trajectory) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    nulls = [isotropic(vs, steps=setting.save_steps, draws=ISOTROPIC_DRAWS, rng=rng)]
    for step in setting.noise:
        with np.load(noise_folder(setting, step, home) / "draws.npz") as file:
            nulls.append(NullDraws("weight_noise", file["cosines"], (step,), tuple(file["layers"].tolist())))
    return pd.concat([compare(unblocked, null) for null in nulls], ignore_index=True)


def _controls(setting: Setting, home: Path, vs: Directions, follows: dict[str, Trajectory]) -> pd.DataFrame:
    arm, measured = unblocked_arm(setting), load_states(home, "measured", "probes")
    swaps = {"wrong_witness": {"witness": "wrong_witness"}, "sibling_anchor": {"anchor": "sibling_anchor"}}
    frames = []
    for control, swap in swaps.items():
        if control in setting.checkpoints:
            other = locate_vrev(substitute(measured, **swap))
            frames.append(final_rows(follow_arm(setting, arm, home, other).table).assign(control=control))
    for control in ("unaligned_twin", "continued_alignment"):
        if control in follows:
            frames.append(final_rows(follows[control].table).assign(control=control))
    table = pd.concat(frames, ignore_index=True).rename(
        columns={"alignment": "alignment_final", "fraction": "fraction_final"}
    )
    table = table[["control", "run", "alignment_final", "fraction_final"]]
    return table.merge(_closures(setting, home, vs, follows), on=["control", "run"], how="left")


def _closures(setting: Setting, home: Path, vs: Directions, follows: dict[str, Trajectory]) -> pd.DataFrame:
    columns = ["control", "run", "closure_final"]
    twin = next((arm for arm in setting.arms if arm.name == "unaligned_twin"), None)
    if twin is None:
        return pd.DataFrame(columns=columns)
    arm = unblocked_arm(setting)
    runs = [load_states(home, str(run_folder(home, arm, seed).relative_to(home)), "held_out") for seed in arm.seeds]
    twins = [load_states(home, str(run_folder(home, twin, seed).relative_to(home)), "held_out") for seed in twin.seeds]
    measured = load_states(home, "measured", "held_out")
    pairs = [(f"{arm.name}-{seed}", f"{twin.name}-{seed}") for seed in twin.seeds]
    layers = follows["unblocked"].layers_in_mean
    table = closure(join([measured, *runs]), join([measured, *twins]), vs, pairs=pairs, layers=layers)
    last = table[table.layer.isna() & (table.step == table.step.max())]
    twin_of = dict(pairs)
    return pd.DataFrame(
        {"control": twin.name, "run": last.run.map(twin_of), "closure_final": last.closure}, columns=columns
    )


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
