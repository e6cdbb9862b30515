"""Judge a measured organism: follow its runs, test them against every null and control, and make the claim."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gravlens.activations.residuals import Residuals, cache_residuals, substitute
from gravlens.behavior.scores import refusal_log_odds
from gravlens.claims.claim import Claim, claim
from gravlens.claims.criteria import Evidence
from gravlens.core.files import once, write_table
from gravlens.directions.direction import TOP, carried_by_few, isotropic_share
from gravlens.directions.geometry import locate_in, without_dimensions
from gravlens.directions.trajectory import ByLayer, Trajectory, drift_per_prompt, follow, rows_on
from gravlens.directions.vrev import locate_vrev
from gravlens.history.prompts import shuffled_words
from gravlens.history.sequence import Checkpoint
from gravlens.models.opening import open_model
from gravlens.organisms.base import UNBLOCKED
from gravlens.stats.bootstrap import bootstrap_alignment
from gravlens.stats.controls import MIN_SIBLINGS, closure, independent_endpoints, partialled_out
from gravlens.stats.damage import Damage, measure_damage, pruned, rounded, sign_flipped
from gravlens.stats.nulls import (
    NullDraws,
    compare,
    isotropic,
    other_prompts,
    sample_covariance,
    sign_flips,
    swapped_labels,
)
from gravlens.studies.study import Study, numbers

ISOTROPIC_DRAWS, DRAWS = 20_000, 2_000
CONTROL_COLUMNS = ["control", "run", "alignment_final", "fraction_final"]
OTHER_PROMPTS = ("harmless", "shuffled_words")


def final_rows(trajectory: Trajectory, prompts: str = "held_out") -> pd.DataFrame:
    """Return the layer mean at each run's last step."""
    rows = rows_on(trajectory.layer_mean, prompts)
    return rows[rows.step == rows.groupby("run").step.transform("max")]


# --- nulls ----------------------------------------------------------------------------------------------------------
def nulls_of(study: Study, unblocked: Trajectory) -> list[NullDraws]:
    """Draw every null that the history allows, for the unblocked runs on held-out prompts."""
    rng, vs, steps = np.random.default_rng(0), study.vs, study.organism.save_steps
    held_out = study.run_states(study.unblocked, "held_out")
    nulls = [isotropic(vs, steps=steps, draws=ISOTROPIC_DRAWS, rng=rng), *_weight_noise(study)]
    # no shrinkage: the prompts are few for their participation ratio (docs/nulls.md)
    common: dict[str, Any] = {"steps": steps, "draws": DRAWS, "rng": rng}
    columns = [held_out.layers.index(layer) for layer in vs.layers]
    states = held_out.of("anchor")[:, columns]
    nulls.append(sample_covariance(vs, states, name="covariance_of_states", **common))
    ends = [f"{run}/{steps[-1]}" for run, steps in held_out.runs.items()]
    moved = np.concatenate([drift_per_prompt(held_out, end, vs.layers) for end in ends])
    # not centred: what all prompts have in common stays in, so each run is partly compared with itself
    drawn: dict[str, Any] = {"steps": steps[-1:], "draws": DRAWS, "rng": rng, "centred": False}
    nulls.append(sample_covariance(vs, moved, name="covariance_of_drifts", **drawn))
    nulls.append(sign_flips(unblocked, draws=DRAWS, rng=rng))
    others = {name: other_states(study, name) for name in OTHER_PROMPTS if study.kept(study.unblocked)}
    for run in held_out.runs:
        nulls.append(swapped_labels(study.states("measured", "probes"), held_out, run=run, draws=DRAWS, rng=rng))
        nulls += [
            other_prompts(held_out, states, vs, run=run, draws=DRAWS, rng=rng, name=name)
            for name, states in others.items()
        ]
    return nulls + list(_endpoints(study, rng))


def _weight_noise(study: Study) -> Iterator[NullDraws]:
    # NullDraws has one number of draws, so the steps that share a number make one null.
    noise = study.organism.noise
    for draws in sorted(set(noise.values())):
        steps = tuple(step for step, n in noise.items() if n == draws)
        drawn = []
        for step in steps:
            with np.load(study.noise_folder(step) / "draws.npz") as file:
                drawn.append((file["cosines"], tuple(file["layers"].tolist())))
        yield NullDraws("weight_noise", np.concatenate([one for one, _ in drawn], axis=1), steps, drawn[0][1])


def _endpoints(study: Study, rng: np.random.Generator) -> Iterator[NullDraws]:
    if len(study.siblings) + 1 >= MIN_SIBLINGS:
        drawn: dict[str, Any] = {"steps": study.organism.save_steps, "draws": DRAWS, "rng": rng}
        layers = study.vs.defined().layers
        yield independent_endpoints(study.states("measured", "probes"), study.siblings, layers=layers, **drawn)


def other_states(study: Study, name: str) -> Residuals:
    """Read anchor and unblocked runs on harmless prompts, or on the held-out prompts with their words shuffled."""
    prompts = {
        "harmless": study.prompts["harmless"],
        "shuffled_words": shuffled_words(study.prompts["held_out"], rng=np.random.default_rng(0)),
    }[name]

    def make(folder: Path) -> None:
        checkpoints = [Checkpoint("anchor", study.home / "anchor"), *study.kept(study.unblocked)]
        states = cache_residuals(study.with_runs(), prompts, checkpoints=checkpoints)
        states.save(folder / "states.safetensors")

    made = once(study.home / "other_prompts" / f"{name}-{len(study.unblocked.seeds)}-runs", make)
    return Residuals.load(made / "states.safetensors")


# --- v_rev itself ---------------------------------------------------------------------------------------------------
def vrev_of(study: Study, unblocked: Trajectory) -> pd.DataFrame:
    """Return v_rev's distance, reliability and share in its top dimensions, and the final alignment without those.

    Alignments are means over the unblocked runs at their last step, on held-out prompts.
    """
    probes, held_out = study.states("measured", "probes"), study.run_states(study.unblocked, "held_out")
    geometry = without_dimensions(probes, k=TOP)
    rest = locate_in(geometry, probes)
    left = any(direction.undefined is None for direction in rest)
    facts = [
        {
            "layer": v.layer,
            "distance": v.distance,
            "reliability": v.reliability,
            "top_1": v.top_share(1),
            "top_3": v.top_share(),
            "isotropic_top_3": isotropic_share(len(v.vector)),
            "few_dimensions": carried_by_few(v),
        }
        for v in study.vs
    ]
    return pd.DataFrame(facts).assign(
        alignment_final=lambda table: table.layer.map(_final_by_layer(unblocked)),
        alignment_without_top_3=lambda table: table.layer.map(
            _final_by_layer(follow(geometry.apply(held_out), rest)) if left else {}
        ),
    )


def _final_by_layer(trajectory: Trajectory) -> dict[Any, float]:
    rows = rows_on(trajectory.table, "held_out")
    return rows[rows.step == rows.groupby("run").step.transform("max")].groupby("layer").alignment.mean().to_dict()


# --- controls -------------------------------------------------------------------------------------------------------
def controls_of(study: Study, follows: Mapping[str, Trajectory]) -> pd.DataFrame:
    """Return final alignment and fraction of the unblocked runs along other directions, and of control runs.

    `wrong_witness`; `wrong_witness_removed` (v_rev with that direction partialled out); `sibling_anchor` (the mean over
    siblings); `unaligned_twin` and `continued_alignment` (other runs, along v_rev).
    """
    measured = study.states("measured", "probes")
    frames: list[pd.DataFrame] = [pd.DataFrame(columns=["control", "run", "alignment", "fraction"])]
    if "wrong_witness" in study.organism.checkpoints:
        wrong = locate_vrev(substitute(measured, witness="wrong_witness"))
        removed = partialled_out(study.vs, wrong)
        for control, other in {"wrong_witness": wrong, "wrong_witness_removed": removed}.items():
            frames.append(final_rows(study.follow(study.unblocked, other)).assign(control=control))
    siblings = [locate_vrev(substitute(measured, anchor=name)) for name in study.siblings]
    if siblings:
        found = pd.concat([final_rows(study.follow(study.unblocked, other)) for other in siblings])
        means = found.groupby("run", sort=False)[["alignment", "fraction"]].mean().reset_index()
        frames.append(means.assign(control="sibling_anchor"))
    frames += [
        final_rows(follows[control]).assign(control=control)
        for control in ("unaligned_twin", "continued_alignment")
        if control in follows
    ]
    table = pd.concat(frames, ignore_index=True)
    return table.rename(columns={"alignment": "alignment_final", "fraction": "fraction_final"})[CONTROL_COLUMNS]


def closures_of(study: Study, layers: Sequence[int]) -> pd.DataFrame | None:
    """Return the layer means of `closure` for the unblocked runs, with a column `twin`; None without twins."""
    twin = next((arm for arm in study.organism.arms if arm.name == "unaligned_twin"), None)
    if twin is None:
        return None
    runs = study.run_states(study.unblocked, "held_out")
    twins = study.run_states(twin, "held_out", own_start=False)  # `closure` compares states, not drifts
    pairs = [(f"{study.unblocked.name}-{seed}", f"{twin.name}-{seed}") for seed in twin.seeds]
    table = closure(runs, twins, study.vs, pairs=pairs, layers=layers).layer_mean
    return table.assign(twin=table.run.map(dict(pairs)))


DAMAGES: dict[str, Damage] = {
    "rounded to 8 bits": partial(rounded, bits=8),
    "rounded to 4 bits": partial(rounded, bits=4),
    "smallest 30 % pruned": partial(pruned, share=0.3),
}


def damage_of(study: Study, layers: Sequence[int]) -> ByLayer:
    """Measure damage of the anchor along v_rev, with the refusal log-odds as score.

    The mirrored update is that of the last unblocked run with weights, if there is one.
    """
    kept = study.kept(study.unblocked)[-1:]
    damages = dict(DAMAGES)
    if kept:
        damages["update mirrored"] = partial(sign_flipped, checkpoint=kept[0])

    def make(folder: Path) -> None:
        anchor, prompts = open_model(study.sequence.anchor), study.prompts["held_out"]
        score = partial(refusal_log_odds, openings=study.organism.measures.refusals)
        found = measure_damage(anchor, study.vs, prompts, damages=damages, layers_in_mean=layers, score=score)
        for name, table in (("damage", found.table), ("damage_layer_mean", found.layer_mean)):
            write_table(folder / f"{name}.csv", table)

    # by name: the repr of a partial holds the address of its function, so it differs in every process
    facts = "|".join([*damages, *(last.name for last in kept)])
    made = once(study.home / "damage_by_layer" / hashlib.sha256(facts.encode()).hexdigest()[:8], make)
    return ByLayer(*(pd.read_csv(made / f"{name}.csv") for name in ("damage", "damage_layer_mean")))


@dataclass(frozen=True, eq=False)
class Findings:
    """Tidy tables of one organism, or of several after `concat`; each has a column `organism`.

    Attributes:
        trajectory: `Trajectory.table` of every arm, with a column `arm`.
        vrev: `layer, distance, reliability`, the share of the squared vector in its top dimensions, and the final
            alignment with and without those.
        nulls: `compare`'s columns, for the unblocked runs on held-out prompts.
        damage: `measure_damage`'s columns.
        intervals: `bootstrap_alignment`'s columns, for the unblocked runs on held-out prompts.
        trajectory_layer_mean, nulls_layer_mean, damage_layer_mean, intervals_layer_mean: the same for the mean over
            layers.
        demands: what each claim level demands: `level, name, holds` (<NA>: not run), `figures`.
        verdicts: `level, sentence, capped_by`.
        controls: `control, run, alignment_final, fraction_final, closure_final` on held-out prompts, layer mean.
        arms: `arm, run`, the final measures, `seconds_per_step, blocker_norm`.
        behavior: `arm, run, step` and every behaviour measure (`arm` is `history` for witness and anchor).
    """

    trajectory: pd.DataFrame
    vrev: pd.DataFrame
    nulls: pd.DataFrame
    controls: pd.DataFrame
    damage: pd.DataFrame
    intervals: pd.DataFrame
    arms: pd.DataFrame
    behavior: pd.DataFrame
    demands: pd.DataFrame
    verdicts: pd.DataFrame
    trajectory_layer_mean: pd.DataFrame
    nulls_layer_mean: pd.DataFrame
    damage_layer_mean: pd.DataFrame
    intervals_layer_mean: pd.DataFrame

    @classmethod
    def concat(cls, parts: Sequence["Findings"]) -> "Findings":
        """Concatenate the findings of several organisms."""
        return cls(**{f.name: pd.concat([getattr(p, f.name) for p in parts], ignore_index=True) for f in fields(cls)})


def findings_of(study: Study, *, organism: str) -> Findings:
    """Test what `carry_out` has measured against nulls and controls; `organism` is its name in the tables."""
    follows = {arm.name: study.follow(arm) for arm in study.organism.arms}
    unblocked = follows[UNBLOCKED]
    layers = unblocked.layers_in_mean
    nulls, behavior = nulls_of(study, unblocked), _behavior(study)
    controls, arms = controls_of(study, follows), _arms(study, follows, behavior)
    closures, damage = closures_of(study, layers), damage_of(study, layers)
    anchor = behavior[(behavior.arm == "history") & (behavior.run == "anchor")]
    found = claim(
        Evidence(
            trajectory=unblocked,
            nulls=nulls,
            controls=controls.rename(columns={"alignment_final": "alignment"}),
            closures=closures,
            damage=damage.layer_mean,
            arms=arms,
            anchor_harm=float(anchor.compliance_rate.iloc[0]),
        )
    )
    states, rng = study.run_states(study.unblocked, "held_out"), np.random.default_rng(0)
    results = {
        "trajectory": ByLayer.concat(
            ByLayer(t.table, t.layer_mean).assign({"arm": name}) for name, t in follows.items()
        ),
        "nulls": ByLayer.concat(compare(unblocked, null) for null in nulls),
        "damage": damage,
        "intervals": bootstrap_alignment(states, study.vs, draws=DRAWS, rng=rng, layers_in_mean=layers),
    }
    tables = {
        **{name: found.table for name, found in results.items()},
        **{f"{name}_layer_mean": found.layer_mean for name, found in results.items()},
        "vrev": vrev_of(study, unblocked),
        "controls": controls.merge(_final_closures(closures), on=["control", "run"], how="left"),
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
    last = closures[closures.step == closures.step.max()]
    return pd.DataFrame({"control": "unaligned_twin", "run": last.twin, "closure_final": last.closure}, columns=columns)


def _behavior(study: Study) -> pd.DataFrame:
    history = json.loads((study.home / "measured" / "behavior.json").read_text())
    rows: list[dict[str, Any]] = [
        {"arm": "history", "run": name, "step": 0, **numbers(m)} for name, m in history.items()
    ]
    rows += [
        {"arm": arm.name, "run": f"{arm.name}-{seed}", "step": int(step), **numbers(measured)}
        for arm in study.organism.arms
        for seed in arm.seeds
        for step, measured in study.facts(arm, seed)["behavior"].items()
    ]
    return pd.DataFrame(rows)


def _arms(study: Study, follows: Mapping[str, Trajectory], behavior: pd.DataFrame) -> pd.DataFrame:
    frames = []
    last = behavior[behavior.step == study.organism.save_steps[-1]].drop(columns=["arm", "step"])
    for arm in study.organism.arms:
        rows = [
            {
                "arm": arm.name,
                "run": f"{arm.name}-{seed}",
                "seed": seed,
                "seconds_per_step": study.facts(arm, seed)["seconds_per_step"],
                "blocker_norm": study.log(arm, seed).blocker_norm.mean(),
            }
            for seed in arm.seeds
        ]
        frame = pd.DataFrame(rows).set_index("run")
        for prompts, infix in (("held_out", ""), ("given", "_given")):
            final = final_rows(follows[arm.name], prompts).set_index("run")
            frame[f"alignment{infix}_final"], frame[f"fraction{infix}_final"] = final.alignment, final.fraction
        frames.append(frame.reset_index())
    return pd.concat(frames, ignore_index=True).merge(last, on="run", how="left")
