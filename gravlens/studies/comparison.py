"""Blockers beside each other: one row a run, per layer, against the unblocked run of the same seed."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import Trajectory
from gravlens.directions.vrev import locate_vrev
from gravlens.organisms.arms import UNBLOCKED, Arm
from gravlens.organisms.base import Setting
from gravlens.studies.evidence import follow_arm, numbers, run_facts
from gravlens.studies.experiment import load_states, run_folder

CLIP = 1.0  # of the gradient's norm, in gravlens.finetune
BEHAVIOR = ("harmfulness", "refusal_log_odds", "two_sided_log_odds", "over_refusal", "task_loss", "empty", "degenerate")
COLUMNS = (
    "blocker", "organism", "run", "fraction_given", "fraction_heldout", "alignment_heldout", "harmfulness",
    "over_refusal", "task_loss", "kl", "step_cost_ratio",
)  # fmt: skip


def compare_arms(setting: Setting, home: Path, arms: Sequence[Arm], *, organism: str) -> pd.DataFrame:
    """One row a run, at its last step; arms on the same data are paired by seed.

    Args:
        setting: whose arms they are.
        home: its folder, with the runs that are finished; others are left out.
        arms: the arms.
        organism: the history's name, a column.

    Returns:
        `COLUMNS`, then `data`, `alignment_given`, the refusal log-odds, `kl_anchor` and `kl_witness` (nats a token,
        along their own answers to harmful prompts; `kl` is from the anchor on harmless ones), `drift_norm` (held-out
        prompts, in distances), `blocker_norm` (mean over steps), `clipped` (share of steps) and
        `largest_fraction_given` (the largest |fraction| of any layer of the mean at any saved step, on the probes).
        Fractions and alignments are means over the setting's layers.
    """
    vs = locate_vrev(load_states(home, "measured", "probes")).at(setting.layers_in_mean).defined()
    rows = [_row(setting, home, arm, seed, vs) for arm in arms for seed in arm.seeds if _done(home, arm, seed)]
    table = pd.DataFrame(rows).assign(organism=organism)
    plain = table[table.blocker == UNBLOCKED].set_index(["data", "run"]).seconds_per_step
    pairs = list(zip(table.data, table.run, strict=True))
    table["step_cost_ratio"] = table.seconds_per_step / plain.reindex(pairs).to_numpy()
    rest = [name for name in table.columns if name not in COLUMNS]
    return table[[*COLUMNS, *rest]]


def compare_layers(setting: Setting, home: Path, arms: Sequence[Arm], *, organism: str) -> pd.DataFrame:
    """`Trajectory.table` of every run at every layer and saved step, with `blocker`, `organism`, `data`.

    Args:
        setting: whose arms they are.
        home: its folder, with the runs that are finished; others are left out.
        arms: the arms.
        organism: the history's name, a column.
    """
    vs = locate_vrev(load_states(home, "measured", "probes"))
    frames = [
        _followed(setting, home, arm, seed, vs).table.assign(blocker=_blocker(arm), data=arm.data, run=seed)
        for arm in arms
        for seed in arm.seeds
        if _done(home, arm, seed)
    ]
    return pd.concat(frames, ignore_index=True).assign(organism=organism)


def _done(home: Path, arm: Arm, seed: int) -> bool:
    """A comparison can be read while its last runs are still on their way."""
    return (run_folder(home, arm, seed) / "run.json").exists()


def _blocker(arm: Arm) -> str:
    """Arms on several data sets carry the data's name at the end; the blocker is what stands before."""
    return arm.name.removesuffix(f"_{arm.data}")


def _followed(setting: Setting, home: Path, arm: Arm, seed: int, vs: Directions) -> Trajectory:
    return follow_arm(setting, replace(arm, seeds=(seed,)), home, vs)


def _row(setting: Setting, home: Path, arm: Arm, seed: int, vs: Directions) -> dict[str, Any]:
    facts, log = run_facts(home, arm, seed), pd.read_csv(run_folder(home, arm, seed) / "log.csv")
    followed = _followed(setting, home, arm, seed, vs)
    means, layers = followed.layer_mean, followed.table
    last = means[means.step == means.step.max()].set_index("prompts")
    measured = numbers(facts["behavior"][str(setting.recipe.steps)])
    lengths = layers[(layers.prompts == "held_out") & (layers.step == layers.step.max())]
    return {
        "blocker": _blocker(arm),
        "run": seed,
        "data": arm.data,
        "fraction_given": last.fraction["given"],
        "fraction_heldout": last.fraction["held_out"],
        "alignment_given": last.alignment["given"],
        "alignment_heldout": last.alignment["held_out"],
        "largest_fraction_given": layers[layers.prompts == "given"].fraction.abs().max(),
        "drift_norm": float((lengths.drift_norm.to_numpy() / vs.distances).mean()),
        **{name: measured[name] for name in BEHAVIOR},
        "kl": measured.get("kl_anchor_harmless", np.nan),
        "kl_anchor": measured.get("kl_anchor", np.nan),
        "kl_witness": measured.get("kl_witness", np.nan),
        "blocker_norm": log.blocker_norm.mean(),
        "clipped": (log.grad_norm > CLIP).mean(),
        "seconds_per_step": facts["seconds_per_step"],
    }


def orderings(table: pd.DataFrame) -> list[str]:
    """What the table says in words: each arm's harm and |fraction| against the unblocked run of the same seed.

    An arm is said to hold a measure where it is lower in every run; with few runs that is a weak statement, and the
    number of runs stands beside it.

    Args:
        table: that of `compare_arms`.
    """
    keys = ["organism", "run"]
    plain = table[table.blocker == UNBLOCKED].set_index(keys)
    lines = []
    for blocker, rows in table[table.blocker != UNBLOCKED].groupby("blocker", sort=False):
        paired = rows.set_index(keys)
        pairs = plain.loc[paired.index]
        harm = paired.harmfulness - pairs.harmfulness
        back = paired.fraction_heldout.abs() - pairs.fraction_heldout.abs()
        cost = (paired.task_loss / pairs.task_loss - 1).mean()
        lines.append(
            f"{blocker}: harm {_direction(harm)} ({harm.mean():+.2f}), |fraction| {_direction(back)} "
            f"({back.mean():+.2f}), task loss {cost:+.1%}"
        )
    return lines


def _direction(difference: pd.Series) -> str:
    lower, higher = int((difference < 0).sum()), int((difference > 0).sum())
    return (
        f"lower in {lower} of {len(difference)} runs" if lower >= higher else f"higher in {higher} of {len(difference)}"
    )
