"""Judge measured histories: follow their runs, test them against every null and control, and make the claim."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from gravlens.activations.residuals import Residuals, substitute
from gravlens.claims.claim import claim
from gravlens.claims.evidence import Evidence
from gravlens.claims.preregistration import Preregistration
from gravlens.core.errors import read_object
from gravlens.directions.direction import TOP, Directions, carried_by_few, isotropic_share
from gravlens.directions.geometry import locate_in, without_dimensions
from gravlens.directions.plane import residual_plane
from gravlens.directions.trajectory import (
    ByLayer,
    Trajectory,
    drift_per_prompt,
    follow,
    mean_state,
    measure_drift,
    rows_on,
)
from gravlens.directions.vrev import locate_vrev
from gravlens.organisms.base import STRANGER, UNBLOCKED, Arm
from gravlens.stats.bootstrap import bootstrap_alignment
from gravlens.stats.controls import MIN_SIBLINGS, closure, independent_endpoints
from gravlens.stats.nulls import (
    NullDraws,
    compare,
    isotropic,
    other_prompts,
    sample_covariance,
    sign_flips,
    swapped_labels,
)
from gravlens.studies.experiment import damage_of, other_prompt_sets, other_states
from gravlens.studies.study import Study, join, numbers

ISOTROPIC_DRAWS, DRAWS = 20_000, 2_000
CONTROL_COLUMNS = ["control", "run", "alignment_final", "fraction_final"]
TOGETHER = "together"  # the claim over all anchors


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
    others = {name: other_states(study, name) for name in other_prompt_sets(study)}
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
        drawn = [study.noise(step) for step in steps]
        yield NullDraws("weight_noise", np.concatenate([one for one, _ in drawn], axis=1), steps, drawn[0][1])


def _endpoints(study: Study, rng: np.random.Generator) -> Iterator[NullDraws]:
    if len(study.siblings) + 1 >= MIN_SIBLINGS:
        drawn: dict[str, Any] = {"steps": study.organism.save_steps, "draws": DRAWS, "rng": rng}
        layers = study.vs.defined().layers
        yield independent_endpoints(study.states("measured", "probes"), study.siblings, layers=layers, **drawn)


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


def plane_of(study: Study, unblocked: Trajectory) -> pd.DataFrame:
    """Return `residual_plane` of the arms that start at the anchor, with `arm` and `across_share`, held-out prompts.

    Its layer is that of the largest final alignment among those of the mean, over the unblocked runs.
    """
    layers = study.vs.at(study.organism.layers_in_mean).defined().layers
    final = _final_by_layer(unblocked)
    layer = max(layers, key=lambda one: np.nan_to_num(final.get(one, np.nan), nan=-1.0))
    arms = [arm for arm in study.organism.arms if arm.start == "anchor"]
    parts = [study.states("measured", "held_out")]
    parts += [study.states(f"runs/{arm.name}/seed{seed}", "held_out") for arm in arms for seed in arm.seeds]
    column = parts[0].layers.index(layer)  # one layer of all states: joined, all layers would be held twice
    states = join([replace(part, values=part.values[:, :, [column]], layers=(layer,)) for part in parts])
    # strangers have another basis: the first component would be the way to them
    kept = [i for i, name in enumerate(states.checkpoints) if not name.startswith(STRANGER)]
    names = tuple(states.checkpoints[i] for i in kept)
    table = residual_plane(replace(states, values=states.values[kept], checkpoints=names), study.vs[layer])
    own = {arm.label(seed): arm.name for arm in arms for seed in arm.seeds}
    return table.assign(arm=table.run.map(own), across_share=table.attrs["across_share"])


# --- controls -------------------------------------------------------------------------------------------------------
def controls_of(study: Study, follows: Mapping[str, Trajectory], strangers: Mapping[str, Trajectory]) -> pd.DataFrame:
    """Return final alignment and fraction of the unblocked runs along other directions, and of control runs.

    `stranger` (the mean over strangers' directions); `sibling_anchor` (the mean over siblings); `unaligned_twin` and
    `continued_alignment` (other runs, along v_rev).
    """
    measured = study.states("measured", "probes")
    siblings = [locate_vrev(substitute(measured, anchor=name)) for name in study.siblings]
    others = {
        "stranger": list(strangers.values()),
        "sibling_anchor": [study.follow(study.unblocked, other) for other in siblings],
    }
    frames: list[pd.DataFrame] = [pd.DataFrame(columns=["control", "run", "alignment", "fraction"])]
    for control, some in others.items():
        if some:
            found = pd.concat([final_rows(one) for one in some])
            means = found.groupby("run", sort=False)[["alignment", "fraction"]].mean().reset_index()
            frames.append(means.assign(control=control))
    frames += [
        final_rows(follows[control]).assign(control=control)
        for control in ("unaligned_twin", "continued_alignment")
        if control in follows
    ]
    table = pd.concat(frames, ignore_index=True)
    return table.rename(columns={"alignment": "alignment_final", "fraction": "fraction_final"})[CONTROL_COLUMNS]


def closures_of(study: Study, twins: Residuals, vs: Directions, *, pairs: Sequence[tuple[str, str]]) -> ByLayer | None:
    """Return `closure` of the unblocked runs; None where no pair has the same steps.

    Args:
        study: the study of the runs.
        twins: states with `witness` and the unaligned twins, which start there, on the held-out prompts.
        vs: from this anchor to that witness.
        pairs: (run, twin) names.
    """
    runs = study.run_states(study.unblocked, "held_out")
    shared = [pair for pair in pairs if runs.runs.get(pair[0]) == twins.runs.get(pair[1])]
    return closure(runs, twins, vs, pairs=shared, layers=vs.layers) if shared else None


def _by_seed(study: Study, arm: Arm) -> list[tuple[str, str]]:
    """Return the runs and the study's own twins of the same seed, which have the same data: not every run has one."""
    own = study.unblocked
    return [(own.label(seed), arm.label(seed)) for seed in own.seeds if seed in arm.seeds]


def _in_order(study: Study, arm: Arm) -> list[tuple[str, str]]:
    """Return the runs and another history's twins, whose seeds say nothing about this one's."""
    own = study.unblocked
    return [(own.label(seed), arm.label(other)) for seed, other in zip(own.seeds, arm.seeds, strict=False)]


def _twins(study: Study, name: str = "unaligned_twin") -> Arm | None:
    return next((arm for arm in study.organism.arms if arm.name == name), None)


# --- strangers ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Strangers:
    """Witnesses of other histories, seen from one study's anchor.

    Attributes:
        directions: name -> the direction from the anchor to that witness, located on the study's own probes.
        closures: name -> closure of the study's runs to that witness's twins, where it has some.
    """

    directions: Mapping[str, Directions]
    closures: Mapping[str, ByLayer]


def strangers_of(study: Study, others: Mapping[str, Study]) -> Strangers:
    """Return the strangers of a study: its own, and the witnesses of `others` that were read on the same prompts."""
    measured, layers = study.states("measured", "probes"), study.organism.layers_in_mean
    directions = {name: locate_vrev(substitute(measured, witness=name)) for name in study.strangers}
    # of each stranger: states with it as the witness, and its twins, which are compared as states, not as drifts
    twins: dict[str, tuple[Residuals, list[tuple[str, str]]]] = {}
    for name in study.strangers:
        if (arm := _twins(study, f"stranger_twin_{name.removeprefix(STRANGER)}")) is not None:
            states = study.run_states(arm, "held_out", own_start=False)
            twins[name] = substitute(states, witness=name), _by_seed(study, arm)
    for name, other in others.items():
        theirs = other.states("measured", "probes")
        if theirs.prompts != measured.prompts or theirs.values.shape[2:] != measured.values.shape[2:]:
            continue  # other prompts have other states, and another width no common basis
        values = np.concatenate([measured.values, theirs.of("witness")[None]])
        with_witness = replace(measured, values=values, checkpoints=(*measured.checkpoints, name))
        directions[name] = locate_vrev(substitute(with_witness, witness=name))
        if (arm := _twins(other)) is not None:
            twins[name] = other.run_states(arm, "held_out", own_start=False), _in_order(study, arm)
    found = {
        name: closures_of(study, states, directions[name].at(layers), pairs=pairs)
        for name, (states, pairs) in twins.items()
    }
    return Strangers(directions, {name: one for name, one in found.items() if one is not None})


# --- the revised abstract -------------------------------------------------------------------------------------------
OWN_DATA = ("unaligned_twin", "continued_alignment")  # arms of another start, or of another kind of data
OPPOSED = ("penalty", "unblocked", "reinforce")  # block < baseline < push


def revised_claims(study: Study, arms: pd.DataFrame) -> pd.DataFrame:
    """Return one number for each claim of the paper's revised abstract that arms can bear on (docs/paper.md).

    `spearman_alignment_harm` and `spearman_fraction_harm` over the runs of all arms at their last step;
    `ordered_alignment` and `ordered_harm` (1: penalty < unblocked < push, on the arms' means); `rehearsal_cosine`, of
    what rehearsing refusals adds to the drift of the same seed with v_rev, mean over layers; `rehearsal_cut`, the share
    of the unblocked fraction that it cuts. What was not run has no row.
    """
    found: dict[str, float] = {}
    ours = arms[~arms.arm.isin(OWN_DATA)].dropna(subset="compliance_rate")
    if ours.arm.nunique() > 1 and ours.compliance_rate.nunique() > 1:  # of a constant there is no correlation
        for measure in ("alignment", "fraction"):
            pair = ours[f"{measure}_final"], ours.compliance_rate
            found[f"spearman_{measure}_harm"] = float(stats.spearmanr(*pair)[0])  # pyright: ignore[reportArgumentType]
    means = arms.groupby("arm")[["alignment_final", "compliance_rate"]].mean()
    if set(OPPOSED) <= set(means.index):
        for name, column in {"alignment": "alignment_final", "harm": "compliance_rate"}.items():
            block, base, push = means.loc[list(OPPOSED), column]
            found[f"ordered_{name}"] = float(block < base < push)
    if (rehearsal := _twins(study, "rehearsal")) is not None:
        seed, last = rehearsal.seeds[0], study.organism.save_steps[-1]
        states = [study.run_states(replace(arm, seeds=(seed,)), "held_out") for arm in (rehearsal, study.unblocked)]
        layers = study.vs.at(study.organism.layers_in_mean).defined().layers
        names = (f"{arm.label(seed)}/{last}" for arm in (rehearsal, study.unblocked))
        added, base = (mean_state(one, name, layers) for one, name in zip(states, names, strict=True))
        found["rehearsal_cosine"] = float(measure_drift(added - base, study.vs.at(layers))["alignment"].mean())
        cut = arms[arms.seed == seed].set_index("arm").fraction_final
        found["rehearsal_cut"] = float(1 - cut["rehearsal"] / cut[UNBLOCKED])
    return pd.DataFrame({"quantity": list(found), "value": list(found.values())})


@dataclass(frozen=True, eq=False)
class Findings:
    """Tidy tables of one organism, or of several after `concat`; each has a column `organism`.

    Attributes:
        trajectory: `Trajectory.table` of every arm, with a column `arm`.
        vrev: `layer, distance, reliability`, the share of the squared vector in its top dimensions, and the final
            alignment with and without those.
        plane: `plane_of`'s columns: the checkpoints on the plane of v_rev and the first component of the rest.
        nulls: `compare`'s columns, for the unblocked runs on held-out prompts.
        damage: `measure_damage`'s columns.
        intervals: `bootstrap_alignment`'s columns, for the unblocked runs on held-out prompts.
        trajectory_layer_mean, nulls_layer_mean, damage_layer_mean, intervals_layer_mean: the same for the mean over
            layers.
        demands: what each claim level demands: `level, name, holds` (<NA>: not run), `figures`.
        verdicts: `level, statement, setting, sentence, capped_by`; with several anchors the first is of all `together`.
        effects: sizes with intervals: `effect, mean, low, high, n, unit`.
        revised: `quantity, value` of `revised_claims`.
        controls: `control, run, alignment_final, fraction_final, closure_final` on held-out prompts, layer mean.
        arms: `arm, run`, the final measures, `seconds_per_step, blocker_norm`.
        behavior: `arm, run, step` and every behaviour measure (`arm` is `history` for witness and anchor).
    """

    trajectory: pd.DataFrame
    vrev: pd.DataFrame
    plane: pd.DataFrame
    nulls: pd.DataFrame
    controls: pd.DataFrame
    damage: pd.DataFrame
    intervals: pd.DataFrame
    arms: pd.DataFrame
    behavior: pd.DataFrame
    demands: pd.DataFrame
    verdicts: pd.DataFrame
    effects: pd.DataFrame
    revised: pd.DataFrame
    trajectory_layer_mean: pd.DataFrame
    nulls_layer_mean: pd.DataFrame
    damage_layer_mean: pd.DataFrame
    intervals_layer_mean: pd.DataFrame


def findings_of(studies: Mapping[str, Study], *, preregistration: Preregistration | None = None) -> Findings:
    """Test what `carry_out` has measured against nulls and controls, each study's witness a stranger to the others.

    The claim is made on all of them together, `TOGETHER`, and on each by itself.

    Args:
        studies: name -> study.
        preregistration: of runs that existed before; of others it is the one that `carry_out` wrote before them.
    """
    judged = {
        name: _judge(
            study, name, {k: v for k, v in studies.items() if k != name}, study.preregistration or preregistration
        )
        for name, study in studies.items()
    }
    whole = claim([found for found, _ in judged.values()])
    claims = {TOGETHER: whole, **whole.alone} if whole.alone else dict.fromkeys(judged, whole)
    parts: dict[str, list[pd.DataFrame]] = {}
    for name, (_, tables) in judged.items():
        for key, table in tables.items():
            parts.setdefault(key, []).append(table.assign(organism=name))
    for name, found in claims.items():
        said = ("level", "statement", "setting", "sentence", "capped_by")
        verdict = {column: getattr(found, column) for column in said}
        for key, table in (
            ("verdicts", pd.DataFrame([verdict])),
            ("demands", found.demands),
            ("effects", found.effects),
        ):
            parts.setdefault(key, []).append(table.assign(organism=name))
    return Findings(**{key: pd.concat(tables, ignore_index=True) for key, tables in parts.items()})


def _judge(
    study: Study, name: str, others: Mapping[str, Study], preregistration: Preregistration | None
) -> tuple[Evidence, dict[str, pd.DataFrame]]:
    """Return the evidence of one study, and its tables."""
    follows = {arm.name: study.follow(arm) for arm in study.organism.arms}
    unblocked = follows[UNBLOCKED]
    layers = unblocked.layers_in_mean
    nulls, behavior, damage = nulls_of(study, unblocked), _behavior(study), damage_of(study, layers)
    around = strangers_of(study, others)
    # the same runs, and only the direction is another: what the anchor brings in is in both
    strangers = {key: study.follow(study.unblocked, vs) for key, vs in around.directions.items()}
    arms, closed = _arms(study, follows, behavior), _own_closures(study)
    anchor = behavior[(behavior.arm == "history") & (behavior.run == "anchor")].iloc[0]
    states, rng = study.run_states(study.unblocked, "held_out"), np.random.default_rng(0)
    intervals = bootstrap_alignment(states, study.vs, draws=DRAWS, rng=rng, layers_in_mean=layers)
    found = Evidence(
        trajectory=unblocked,
        nulls=nulls,
        strangers=strangers,
        over_prompts=intervals.layer_mean[intervals.layer_mean.measure == "fraction"],
        closure=closed,
        stranger_closures=around.closures,
        damage=damage.layer_mean,
        arms=arms,
        anchor={measure: float(anchor[measure]) for measure in ("compliance_rate", "over_refusal", "nonsense")},
        preregistration=preregistration,
        digests={key: study.prompts[key].digest for key in ("probes", "held_out")},
        name=name,
    )
    results = {
        "trajectory": ByLayer.concat(ByLayer(t.table, t.layer_mean).assign({"arm": arm}) for arm, t in follows.items()),
        "nulls": ByLayer.concat(compare(unblocked, null) for null in nulls),
        "damage": damage,
        "intervals": intervals,
    }
    controls = controls_of(study, follows, strangers)
    return found, {
        **{key: one.table for key, one in results.items()},
        **{f"{key}_layer_mean": one.layer_mean for key, one in results.items()},
        "vrev": vrev_of(study, unblocked),
        "plane": plane_of(study, unblocked),
        "controls": controls.merge(_final_closures(study, closed), on=["control", "run"], how="left"),
        "arms": arms,
        "behavior": behavior,
        "revised": revised_claims(study, arms),
    }


def _own_closures(study: Study) -> ByLayer | None:
    if (twin := _twins(study)) is None:
        return None
    states, vs = study.run_states(twin, "held_out", own_start=False), study.vs.at(study.organism.layers_in_mean)
    return closures_of(study, states, vs, pairs=_by_seed(study, twin))


def _final_closures(study: Study, closed: ByLayer | None) -> pd.DataFrame:
    columns, twin = ["control", "run", "closure_final"], _twins(study)
    if closed is None or twin is None:
        return pd.DataFrame(columns=columns)
    table = closed.layer_mean
    last = table[table.step == table.step.max()]
    facts = {
        "control": "unaligned_twin",
        "run": last.run.map(dict(_by_seed(study, twin))),
        "closure_final": last.closure,
    }
    return pd.DataFrame(facts, columns=columns)


def _behavior(study: Study) -> pd.DataFrame:
    history = read_object(study.home / "measured" / "behavior.json")
    rows: list[dict[str, Any]] = [
        {"arm": "history", "run": name, "step": 0, **numbers(m)} for name, m in history.items()
    ]
    rows += [
        {"arm": arm.name, "run": arm.label(seed), "step": int(step), **numbers(measured)}
        for arm in study.organism.arms
        for seed in arm.seeds
        for step, measured in study.facts(arm, seed)["behavior"].items()
    ]
    n = len(study.prompts["held_out"])
    return pd.DataFrame(rows).assign(nonsense=lambda table: (table["empty"] + table["degenerate"]) / n)


def _arms(study: Study, follows: Mapping[str, Trajectory], behavior: pd.DataFrame) -> pd.DataFrame:
    frames = []
    last = behavior[behavior.step == study.organism.save_steps[-1]].drop(columns=["arm", "step"])
    for arm in study.organism.arms:
        rows = [
            {
                "arm": arm.name,
                "run": arm.label(seed),
                "seed": seed,
                "seconds_per_step": study.facts(arm, seed)["seconds_per_step"],
                "blocker_norm": study.log(arm, seed).blocker_norm.mean(),
                "cosine": study.facts(arm, seed).get("cosine"),
            }
            for seed in arm.seeds
        ]
        frame = pd.DataFrame(rows).set_index("run")
        for prompts, infix in (("held_out", ""), ("given", "_given")):
            final = final_rows(follows[arm.name], prompts).set_index("run")
            frame[f"alignment{infix}_final"], frame[f"fraction{infix}_final"] = final.alignment, final.fraction
        frames.append(frame.reset_index())
    return pd.concat(frames, ignore_index=True).merge(last, on="run", how="left")
