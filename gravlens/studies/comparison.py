"""Compare the arms of an ablation study: one row per run, paired by seed with the unblocked baseline."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import Trajectory
from gravlens.organisms.base import UNBLOCKED, Arm
from gravlens.studies.study import Study, numbers

CLIP = 1.0  # of the gradient's norm, in gravlens.finetune
BEHAVIOR = (
    "compliance_rate",
    "refusal_log_odds",
    "two_sided_log_odds",
    "over_refusal",
    "task_loss",
    "empty",
    "degenerate",
    "thought_only",
    "cut_share",
    "over_refusal_cut_share",
)
COLUMNS = (
    "blocker", "organism", "run", "fraction_given", "fraction_heldout", "alignment_heldout", "compliance_rate",
    "over_refusal", "task_loss", "kl", "step_cost_ratio",
)  # fmt: skip


def compare_arms(study: Study, arms: Sequence[Arm], *, organism: str) -> pd.DataFrame:
    """Return one row per run, at its last step; arms on the same data are paired by seed.

    Args:
        study: an organism and its folder. Runs that are not complete are left out.
        arms: the arms to compare.
        organism: the organism's name, a column.

    Returns:
        `COLUMNS`, then `data`, `alignment_given`, the refusal log-odds, `kl_anchor` and `kl_witness` (nats per token,
        along their own answers to harmful prompts; `kl` is from the anchor on harmless ones), `drift_norm` (held-out
        prompts, in distances), `blocker_norm` (mean over steps), `clipped` (share of steps) and
        `largest_fraction_given` (the largest |fraction| of any layer of the mean at any saved step, on the probes).
        Fractions and alignments are means over the organism's layers.
    """
    vs = study.vs.at(study.organism.layers_in_mean).defined()
    table = pd.DataFrame([_row(study, arm, seed, vs) for arm, seed in _done(study, arms)]).assign(organism=organism)
    plain = table[table.blocker == UNBLOCKED].set_index(["data", "run"]).seconds_per_step
    pairs = list(zip(table.data, table.run, strict=True))
    table["step_cost_ratio"] = table.seconds_per_step / plain.reindex(pairs).to_numpy()
    rest = [name for name in table.columns if name not in COLUMNS]
    return table[[*COLUMNS, *rest]]


def compare_layers(study: Study, arms: Sequence[Arm], *, organism: str) -> pd.DataFrame:
    """Return `Trajectory.table` of every complete run, with columns `blocker`, `organism` and `data`.

    Args:
        study: an organism and its folder. Runs that are not complete are left out.
        arms: the arms to compare.
        organism: the organism's name, a column.
    """
    frames = [
        _followed(study, arm, seed, study.vs).table.assign(blocker=_blocker(arm), data=arm.data, run=seed)
        for arm, seed in _done(study, arms)
    ]
    return pd.concat(frames, ignore_index=True).assign(organism=organism)


def _done(study: Study, arms: Sequence[Arm]) -> list[tuple[Arm, int]]:
    return [(arm, seed) for arm in arms for seed in arm.seeds if study.is_done(arm, seed)]


def _blocker(arm: Arm) -> str:
    """Return an arm's name without the suffix of its data set."""
    return arm.name.removesuffix(f"_{arm.data}")


def _followed(study: Study, arm: Arm, seed: int, vs: Directions) -> Trajectory:
    return study.follow(replace(arm, seeds=(seed,)), vs)


def _row(study: Study, arm: Arm, seed: int, vs: Directions) -> dict[str, Any]:
    facts, log = study.facts(arm, seed), study.log(arm, seed)
    followed = _followed(study, arm, seed, vs)
    means, layers = followed.layer_mean, followed.table
    last = means[means.step == means.step.max()].set_index("prompts")
    measured = numbers(facts["behavior"][str(study.organism.recipe.steps)])
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
    """Describe each arm's harm and |fraction| relative to the unblocked run of the same seed, one line per arm.

    Args:
        table: of `compare_arms`.
    """
    keys = ["organism", "run"]
    plain = table[table.blocker == UNBLOCKED].set_index(keys)
    lines = []
    for blocker, rows in table[table.blocker != UNBLOCKED].groupby("blocker", sort=False):
        paired = rows.set_index(keys)
        pairs = plain.loc[paired.index]
        harm = paired.compliance_rate - pairs.compliance_rate
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
