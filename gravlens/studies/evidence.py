"""What a carried-out setting leaves for a sceptic: its runs followed, every null, every control, and the claim."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from gravlens.activations.residuals import Residuals, cache_residuals, from_start, substitute
from gravlens.behavior.scores import refusal_log_odds
from gravlens.claims.claim import Claim, claim
from gravlens.claims.criteria import Evidence
from gravlens.core.files import once, write_table
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import ByLayer, Trajectory, drift_per_prompt, follow, rows_on
from gravlens.directions.vrev import locate_vrev
from gravlens.history.prompts import shuffled_words
from gravlens.history.sequence import Checkpoint
from gravlens.models.opening import open_model
from gravlens.organisms.arms import Arm
from gravlens.organisms.base import Setting
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
from gravlens.studies.experiment import (
    PROMPT_SETS,
    join,
    load_states,
    noise_folder,
    run_folder,
    sequence_of,
    unblocked_arm,
)

ISOTROPIC_DRAWS, DRAWS = 20_000, 2_000
CONTROL_COLUMNS = ["control", "run", "alignment_final", "fraction_final"]
OTHER_PROMPTS = ("harmless", "shuffled_words")


# --- runs followed ------------------------------------------------------------------------------------------------
def follow_arm(setting: Setting, arm: Arm, home: Path, vs: Directions) -> Trajectory:
    """The runs of an arm along v_rev, on probes and held-out prompts."""
    states = [states_of(setting, arm, home, prompts) for prompts in PROMPT_SETS]
    return follow(states, vs, layers_in_mean=setting.layers_in_mean)


def states_of(setting: Setting, arm: Arm, home: Path, prompts: str) -> Residuals:
    """States of the history and of an arm's runs; the drift of runs that start elsewhere is taken from there."""
    runs = [load_states(home, str(run_folder(home, arm, seed).relative_to(home)), prompts) for seed in arm.seeds]
    states = join([load_states(home, "measured", prompts), *runs])
    return states if arm.start == "anchor" else from_start(states, start=arm.start)


def final_rows(trajectory: Trajectory, prompts: str = "held_out") -> pd.DataFrame:
    """The layer mean at each run's last step."""
    rows = rows_on(trajectory.layer_mean, prompts)
    return rows[rows.step == rows.groupby("run").step.transform("max")]


# --- nulls ----------------------------------------------------------------------------------------------------------
def nulls_of(setting: Setting, home: Path, vs: Directions, unblocked: Trajectory) -> list[NullDraws]:
    """Draws of every null that the history allows, for the unblocked runs on held-out prompts."""
    rng, arm = np.random.default_rng(0), unblocked_arm(setting)
    measured, held_out = load_states(home, "measured", "probes"), states_of(setting, arm, home, "held_out")
    nulls = [isotropic(vs, steps=setting.save_steps, draws=ISOTROPIC_DRAWS, rng=rng), *_weight_noise(setting, home)]
    # no shrinkage: the prompts are few for their participation ratio (docs/nulls.md)
    common: dict[str, Any] = {"steps": setting.save_steps, "draws": DRAWS, "rng": rng}
    columns = [held_out.layers.index(layer) for layer in vs.layers]
    states = held_out.of("anchor")[:, columns]
    nulls.append(sample_covariance(vs, states, name="covariance_of_states", **common))
    ends = [f"{run}/{steps[-1]}" for run, steps in held_out.runs.items()]
    moved = np.concatenate([drift_per_prompt(held_out, end, vs.layers) for end in ends])
    # about 0: what all prompts have in common stays in, and each run is partly held against itself
    drawn: dict[str, Any] = {"steps": setting.save_steps[-1:], "draws": DRAWS, "rng": rng, "centred": False}
    nulls.append(sample_covariance(vs, moved, name="covariance_of_drifts", **drawn))
    nulls.append(sign_flips(unblocked, draws=DRAWS, rng=rng))
    others = {name: other_states(setting, home, name) for name in OTHER_PROMPTS if _kept(arm, home)}
    for run in held_out.runs:
        nulls.append(swapped_labels(measured, held_out, run=run, draws=DRAWS, rng=rng))
        nulls += [
            other_prompts(held_out, states, vs, run=run, draws=DRAWS, rng=rng, name=name)
            for name, states in others.items()
        ]
    return nulls + list(_endpoints(setting, measured, vs, rng))


def _weight_noise(setting: Setting, home: Path) -> Iterator[NullDraws]:
    """The steps whose draws are as many are one null."""
    for draws in sorted(set(setting.noise.values())):
        steps = tuple(step for step, n in setting.noise.items() if n == draws)
        drawn = []
        for step in steps:
            with np.load(noise_folder(setting, step, home) / "draws.npz") as file:
                drawn.append((file["cosines"], tuple(file["layers"].tolist())))
        yield NullDraws("weight_noise", np.concatenate([one for one, _ in drawn], axis=1), steps, drawn[0][1])


def _endpoints(setting: Setting, measured: Residuals, vs: Directions, rng: np.random.Generator) -> Iterator[NullDraws]:
    siblings = siblings_of(setting)
    if len(siblings) + 1 >= MIN_SIBLINGS:
        layers = vs.defined().layers
        yield independent_endpoints(measured, siblings, steps=setting.save_steps, draws=DRAWS, rng=rng, layers=layers)


def siblings_of(setting: Setting) -> list[str]:
    """The checkpoints of the history that are second alignments of the same witness."""
    return [name for name in setting.checkpoints if name.startswith("sibling_anchor")]


def other_states(setting: Setting, home: Path, name: str) -> Residuals:
    """States of the anchor and the unblocked runs on harmless prompts, or on the held-out prompts' words shuffled."""
    arm = unblocked_arm(setting)
    prompts = setting.prompts(home)
    sets = {
        "harmless": prompts["harmless"],
        "shuffled_words": shuffled_words(prompts["held_out"], rng=np.random.default_rng(0)),
    }

    def make(folder: Path) -> None:
        checkpoints = [Checkpoint("anchor", home / "anchor"), *_kept(arm, home)]
        states = cache_residuals(sequence_of(setting, home), sets[name], checkpoints=checkpoints)
        states.save(folder / "states.safetensors")

    made = once(home / "other_prompts" / f"{name}-{len(arm.seeds)}-runs", make)
    return Residuals.load(made / "states.safetensors")


def _kept(arm: Arm, home: Path) -> list[Checkpoint]:
    """The checkpoints of an arm whose weights are kept, as its states name them."""
    found = []
    for seed in arm.seeds:
        folders = {int(path.name.split("-")[1]): path for path in run_folder(home, arm, seed).glob("checkpoint-*")}
        found += [Checkpoint(f"{arm.name}-{seed}/{step}", folders[step], step=step) for step in sorted(folders)]
    return found


# --- controls -------------------------------------------------------------------------------------------------------
def controls_of(setting: Setting, home: Path, vs: Directions, follows: dict[str, Trajectory]) -> pd.DataFrame:
    """Final alignment and fraction of the unblocked runs along other directions, and of runs that are controls.

    `wrong_witness`; `wrong_witness_removed` (v_rev with that direction partialled out); `sibling_anchor` (the mean over
    siblings); `unaligned_twin` and `continued_alignment` (other runs, along v_rev).
    """
    arm, measured = unblocked_arm(setting), load_states(home, "measured", "probes")
    frames: list[pd.DataFrame] = [pd.DataFrame(columns=["control", "run", "alignment", "fraction"])]
    if "wrong_witness" in setting.checkpoints:
        wrong = locate_vrev(substitute(measured, witness="wrong_witness"))
        removed = partialled_out(vs, wrong)
        for control, other in {"wrong_witness": wrong, "wrong_witness_removed": removed}.items():
            frames.append(final_rows(follow_arm(setting, arm, home, other)).assign(control=control))
    siblings = [locate_vrev(substitute(measured, anchor=name)) for name in siblings_of(setting)]
    if siblings:
        found = pd.concat([final_rows(follow_arm(setting, arm, home, other)) for other in siblings])
        means = found.groupby("run", sort=False)[["alignment", "fraction"]].mean().reset_index()
        frames.append(means.assign(control="sibling_anchor"))
    frames += [
        final_rows(follows[control]).assign(control=control)
        for control in ("unaligned_twin", "continued_alignment")
        if control in follows
    ]
    table = pd.concat(frames, ignore_index=True)
    return table.rename(columns={"alignment": "alignment_final", "fraction": "fraction_final"})[CONTROL_COLUMNS]


def closures_of(setting: Setting, home: Path, vs: Directions, layers: Sequence[int]) -> pd.DataFrame | None:
    """Layer means of `closure` of the unblocked runs and their twins, with a column `twin`; None without twins."""
    twin = next((arm for arm in setting.arms if arm.name == "unaligned_twin"), None)
    if twin is None:
        return None
    arm, measured = unblocked_arm(setting), load_states(home, "measured", "held_out")
    runs = states_of(setting, arm, home, "held_out")
    twins = join([measured, *(load_states(home, f"runs/{twin.name}/seed{seed}", "held_out") for seed in twin.seeds)])
    pairs = [(f"{arm.name}-{seed}", f"{twin.name}-{seed}") for seed in twin.seeds]
    table = closure(runs, twins, vs, pairs=pairs, layers=layers).layer_mean
    return table.assign(twin=table.run.map(dict(pairs)))


DAMAGES: dict[str, Damage] = {
    "rounded to 8 bits": partial(rounded, bits=8),
    "rounded to 4 bits": partial(rounded, bits=4),
    "smallest 30 % pruned": partial(pruned, share=0.3),
}


def damage_of(setting: Setting, home: Path, vs: Directions, layers: Sequence[int]) -> ByLayer:
    """Rounding, pruning and the mirrored update of the anchor, along v_rev, with the refusal log-odds as score.

    The update is that of the last unblocked run whose weights are kept, where one is.
    """
    kept = _kept(unblocked_arm(setting), home)[-1:]
    damages = dict(DAMAGES)
    if kept:
        damages["update mirrored"] = partial(sign_flipped, checkpoint=kept[0])

    def make(folder: Path) -> None:
        sequence, prompts = sequence_of(setting, home), setting.prompts(home)["held_out"]
        anchor = open_model(sequence.anchor)
        score = partial(refusal_log_odds, openings=setting.measures.refusals)
        found = measure_damage(anchor, vs, prompts, damages=damages, layers_in_mean=layers, score=score)
        write_table(folder / "damage.csv", found.table)
        write_table(folder / "damage_layer_mean.csv", found.layer_mean)

    facts = [str(damage) for damage in DAMAGES.values()] + [last.name for last in kept]
    made = once(home / "damage_by_layer" / hashlib.sha256("|".join(facts).encode()).hexdigest()[:8], make)
    return ByLayer(*(pd.read_csv(made / f"{name}.csv") for name in ("damage", "damage_layer_mean")))


def intervals_of(setting: Setting, home: Path, vs: Directions, layers: Sequence[int]) -> ByLayer:
    """`bootstrap_alignment` of the unblocked runs on held-out prompts."""
    states = states_of(setting, unblocked_arm(setting), home, "held_out")
    return bootstrap_alignment(states, vs, draws=DRAWS, rng=np.random.default_rng(0), layers_in_mean=layers)


@dataclass(frozen=True, eq=False)
class Findings:
    """Tidy tables of one organism (or of several, put together by `concat`); each has a column `organism`.

    Attributes:
        trajectory: `Trajectory.table` of every arm, with a column `arm`.
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
            damage=damage.layer_mean,
            arms=arms,
            anchor_harm=float(anchor.harmfulness.iloc[0]),
        )
    )
    results = {
        "trajectory": ByLayer.concat(ByLayer(t.table, t.layer_mean).assign({"arm": name}) for name, t in follows.items()),
        "nulls": ByLayer.concat(compare(unblocked, null) for null in nulls),
        "damage": damage,
        "intervals": intervals_of(setting, home, vs, unblocked.layers_in_mean),
    }
    tables = {
        **{name: found.table for name, found in results.items()},
        **{f"{name}_layer_mean": found.layer_mean for name, found in results.items()},
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
        held_out = final_rows(follows[arm.name]).set_index("run")
        given = final_rows(follows[arm.name], "given").set_index("run")
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
