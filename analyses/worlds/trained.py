"""Histories of trained organisms, and histories that move an organism's weights without training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import normalize

from gravlens.activations.residuals import Residuals, read_residuals, substitute
from gravlens.claims.evidence import Evidence
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import locate_vrev
from gravlens.history.encoding import encode
from gravlens.models.opening import OpenModel, open_model, quiet
from gravlens.organisms.base import Arm
from gravlens.stats.bootstrap import bootstrap_alignment
from gravlens.stats.controls import closure
from gravlens.stats.damage import reweighted, weight_noise
from gravlens.stats.nulls import NullDraws
from gravlens.studies.evidence import _judge, damage_of  # pyright: ignore[reportPrivateUsage]
from gravlens.studies.experiment import draw_noise, make_checkpoint, measure_history, preregister, run_arm
from gravlens.studies.study import PROMPT_SETS, Study
from worlds.judged import Judged
from worlds.truth import WAY

FIRST = 101  # organisms from here on: none that anything was chosen on
PROMPT_DRAWS = 200  # of the interval over prompts
NOISE_DRAWS = 99  # where the anchor is another one, and the organism's own draws do not serve
Weights = Mapping[str, torch.Tensor]


def study_of(seed: int, cache: Path) -> Study:
    """Return the study of an organism of this seed."""
    return Study.at(Judged(organism=seed), cache)


def make_organism(seed: int, cache: Path) -> None:
    """Make witness and anchor, preregister, and make every run, its null and damage."""
    study = study_of(seed, cache)
    with quiet():
        for name in study.organism.checkpoints:
            make_checkpoint(study, name)
        measure_history(study)
        preregister(study)
        for arm in study.organism.arms:
            for run in arm.seeds:
                run_arm(study, arm, run)
        for draws in {*study.organism.noise.values()}:
            draw_noise(study, draws)
        damage_of(study, study.organism.layers_in_mean)


# --- evidence ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Others:
    """The strangers of one organism: name -> states of its witness on the probes, and its twins on held-out prompts."""

    witnesses: Mapping[str, np.ndarray]
    twins: Mapping[str, Residuals]


def others_of(studies: Mapping[str, Study]) -> Others:
    """Return the witnesses of some studies as strangers."""
    witnesses = {name: study.states("measured", "probes").of("witness") for name, study in studies.items()}
    return Others(witnesses, {name: twins_of(study) for name, study in studies.items()})


def twins_of(study: Study) -> Residuals:
    """Return states of the unaligned twins, which start at the witness, at the judged step."""
    return last_of(study.run_states(arm_of(study, "unaligned_twin"), "held_out", own_start=False))


def arm_of(study: Study, name: str) -> Arm:
    """Return an arm by name."""
    return next(arm for arm in study.organism.arms if arm.name == name)


def last_of(states: Residuals) -> Residuals:
    """Drop the runs' earlier steps."""
    early = {f"{run}/{step}" for run, steps in states.runs.items() for step in steps[:-1]}
    kept = [i for i, name in enumerate(states.checkpoints) if name not in early]
    return replace(states, values=states.values[kept], checkpoints=tuple(states.checkpoints[i] for i in kept))


def with_runs(states: Residuals, ends: Sequence[str], runs: Mapping[str, np.ndarray]) -> Residuals:
    """Return the states of some checkpoints of the history and of further runs, by the name of their checkpoint."""
    values = [states.of(name) for name in ends]
    return replace(states, values=np.stack([*values, *runs.values()]), checkpoints=(*ends, *runs))


def evidence_on(
    base: Evidence, probes: Residuals, runs: Residuals, twins: Residuals, others: Others, *, turn: int = 0
) -> Evidence:
    """Return evidence on runs of an organism, without arms; run and twin are paired in order, after a `turn`."""
    layers = base.trajectory.layers_in_mean
    ends: dict[str, Directions] = {"": locate_vrev(probes)}
    for name, values in others.witnesses.items():
        more = replace(
            probes, values=np.concatenate([probes.values, values[None]]), checkpoints=(*probes.checkpoints, name)
        )
        ends[name] = locate_vrev(substitute(more, witness=name))
    trajectories = {name: follow(runs, vs, layers_in_mean=layers) for name, vs in ends.items()}
    closures = {}
    for name, theirs in {"": twins, **others.twins}.items():
        pairs = list(zip(runs.runs, np.roll(list(theirs.runs), 0 if name else turn).tolist(), strict=False))
        closures[name] = closure(runs, theirs, ends[name].at(layers), pairs=pairs, layers=layers)
    own, closed = trajectories.pop(""), closures.pop("")
    drawn = {"draws": PROMPT_DRAWS, "rng": np.random.default_rng(0), "layers_in_mean": layers}
    spread = bootstrap_alignment(last_of(runs), ends[""], **drawn).layer_mean
    seen = {"trajectory": own, "closure": closed, "over_prompts": spread[spread.measure == "fraction"]}
    return replace(base, **seen, strangers=trajectories, stranger_closures=closures, arms=None, anchor=None)


# --- histories --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True, eq=False)
class Walks:
    """States of models whose weights were moved: what all windows and modes share, for it takes forward passes.

    Attributes:
        runs, twins: history -> states on the held-out prompts.
        probes: history -> states of its ends on the probes.
        noise: history -> its own weight noise.
    """

    runs: Mapping[str, Residuals]
    twins: Mapping[str, Residuals]
    probes: Mapping[str, Residuals]
    noise: Mapping[str, NullDraws]


def base_of(study: Study, name: str) -> Evidence:
    """Return the evidence on the organism itself, without strangers; of the nulls, those that a level demands."""
    found = _judge(study, name, {}, study.preregistration)[0]
    return replace(found, nulls=[null for null in found.nulls if null.name in ("isotropic", "weight_noise")])


def histories(study: Study, base: Evidence, walks: Walks, others: Others) -> Iterator[tuple[str, Evidence]]:
    """Yield name and evidence of all histories of one organism, before the given strangers."""
    probes, twins = study.states("measured", "probes"), twins_of(study)

    def on(arm: str) -> Evidence:
        runs = last_of(study.run_states(arm_of(study, arm), "held_out"))
        return evidence_on(base, probes, runs, twins, others)

    organism = on("unblocked")
    yield "refusal organism", replace(organism, arms=base.arms, anchor=base.anchor)
    rehearsed = {"unblocked": ("rehearsal",)}
    yield "rehearsal", replace(on("rehearsal"), arms=base.arms, anchor=base.anchor, names=rehearsed)
    yield "continued alignment", on("continued_alignment")
    wrong, *rest = organism.strangers
    yield (
        "wrong witness",
        replace(
            organism,
            trajectory=organism.strangers[wrong],
            closure=organism.stranger_closures[wrong],
            strangers={name: organism.strangers[name] for name in rest},
            stranger_closures={name: organism.stranger_closures[name] for name in rest},
        ),
    )
    moved = {name.replace("unaligned_twin", "twin"): twins.of(name) for name in twins.checkpoints if "/" in name}
    states = {name: values - twins.of("witness") + twins.of("anchor") for name, values in moved.items()}
    runs = with_runs(twins, ("witness", "anchor"), states)
    # a run is held against the other seed's twin: against its own the gap would be unchanged by construction
    yield "common drift in the states", evidence_on(base, probes, runs, twins, others, turn=1)
    for name, walked in walks.runs.items():
        nulls = [null for null in base.nulls if null.name == "isotropic"]
        nulls += [walks.noise.get(name) or next(null for null in base.nulls if null.name == "weight_noise")]
        found = evidence_on(base, walks.probes.get(name, probes), walked, walks.twins.get(name, twins), others)
        yield name, replace(found, nulls=nulls)


def walks_of(study: Study) -> Walks:
    """Move weights, and read the states.

    Planted, weight noise, anti-parallel: shares of the way from anchor to witness, and noise of the unblocked runs'
    norm by tensor, of which the twins have nothing else. Common drift: the twins' updates on the anchor. Endpoints:
    witness, anchor, and where each run is headed are noise about the witness, as long by tensor as alignment's update.
    """
    seed, last = study.organism.organism, study.organism.save_steps[-1]  # pyright: ignore[reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(seed)
    model = open_model(study.home / "anchor")
    anchor, witness = weights_of(model), weights_of(open_model(study.home / "witness"))
    way = {name: witness[name] - weight for name, weight in anchor.items()}
    sizes = study.facts(study.unblocked, 0)["update_norms"][str(last)]

    def noise(norms: Mapping[str, float]) -> Weights:
        drawn = {name: torch.randn(weight.shape, generator=generator) for name, weight in anchor.items()}
        return {
            name: norms.get(name, 0.0) * normalize(one.flatten(), dim=0).view_as(one) for name, one in drawn.items()
        }

    def read(weights: Weights, prompts: str) -> np.ndarray:
        with reweighted(model, weights):
            return states_of(model, study, prompts)

    measured = study.states("measured", "held_out")
    ends, seeds = ("witness", "anchor"), study.unblocked.seeds

    def runs(make: Callable[[int], Weights]) -> Residuals:
        return with_runs(measured, ends, {f"walk-{i}/{last}": read(make(i), "held_out") for i in seeds})

    walked = {
        name: runs(lambda _, share=share: plus(anchor, (share, way), (1.0, noise(sizes))))
        for name, share in {
            "planted in the weights": WAY,
            "weight noise only": 0.0,
            "anti-parallel in the weights": -WAY,
        }.items()
    }
    still = runs(lambda _: plus(witness, (1.0, noise(sizes))))
    twins = dict.fromkeys(walked, still)
    tuned = {
        one.name: weights_of(open_model(one.source))
        for one in study.kept(arm_of(study, "unaligned_twin"))
        if one.step == last
    }
    kept = list(tuned.values())
    walked["common drift in the weights"] = runs(lambda i: plus(anchor, (1.0, kept[i]), (-1.0, witness)))
    name, lengths = "endpoints in the weights", {key: float(one.norm()) for key, one in way.items()}
    start, goal = (plus(witness, (1.0, noise(lengths))) for _ in ends)

    def headed(weights: Weights) -> Weights:
        return plus(weights, (WAY, plus(witness, (1.0, noise(lengths)), (-1.0, weights))))

    both = {"witness": goal, "anchor": start}
    states = {
        kind: replace(
            study.states("measured", kind), values=np.stack([read(both[end], kind) for end in ends]), checkpoints=ends
        )
        for kind in PROMPT_SETS
    }
    walked[name], twins[name] = (
        with_runs(states["held_out"], ends, {f"walk-{i}/{last}": read(headed(one), "held_out") for i in seeds})
        for one in (start, goal)
    )
    norms = {key: WAY * np.sqrt(2) * length for key, length in lengths.items()}
    with reweighted(model, start):
        vs, rng = locate_vrev(states["probes"]), np.random.default_rng([seed, 7])
        drawn = weight_noise(model, vs, study.prompts["held_out"], norms={last: norms}, draws=NOISE_DRAWS, rng=rng)
    return Walks(walked, twins, {name: states["probes"]}, {name: drawn})


def weights_of(model: OpenModel) -> Weights:
    """Copy a model's weights."""
    return {name: weight.detach().clone() for name, weight in model.module.named_parameters()}


def plus(weights: Weights, *moves: tuple[float, Weights]) -> Weights:
    """Add multiples of other weights."""
    return {name: sum((share * move[name] for share, move in moves), start=weight) for name, weight in weights.items()}


def states_of(model: OpenModel, study: Study, prompts: str) -> np.ndarray:
    """Read states [prompt, layer, d_model] at every layer."""
    ids = encode(model.tokenizer, study.prompts[prompts])  # pyright: ignore[reportArgumentType]
    return read_residuals(model, ids, layers=range(model.n_layers)).numpy()
