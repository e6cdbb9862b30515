"""The arms of an ablation study as a table: which blocker, along which directions, with which options."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from gravlens.blockers.anchoring import AnchorKL, Rehearsal
from gravlens.blockers.blocking import Blocker, Scheduled, Until
from gravlens.blockers.constrained_sft import ConstrainedSFT
from gravlens.blockers.penalty import Penalty
from gravlens.blockers.projection import TaskVectorProjection, UpdateProjection
from gravlens.blockers.steered_training import GradientAblation, PreventativeSteering, TrainingAblation
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Directions, Spans, Subspaces
from gravlens.directions.subspaces import drift_subspaces, orthogonal_part, random_like, whole_state
from gravlens.interventions.refusal import refusal_candidates
from gravlens.models.opening import open_model
from gravlens.organisms.base import UNBLOCKED, Arm, Grounds

LATE = 6  # an exact projection is at the last layers only: each layer costs a backward pass


# --- along which directions -----------------------------------------------------------------------------------------
def matched_twin(grounds: Grounds) -> Spans:
    """Draw a random direction per layer from the covariance of the anchor's states on the probes."""
    columns = [grounds.states.layers.index(layer) for layer in grounds.vs.layers]
    return random_like(grounds.vs, rng=grounds.rng, states=grounds.states.of("anchor")[:, columns])


def drift_of_another_run(grounds: Grounds, rank: int = 1) -> Subspaces:
    """Return the leading components of the per-prompt drift of an unblocked run of another seed, at its last step."""
    if grounds.other is None:
        raise GravlensError(
            "There is no other run.", "A run-defined direction is fitted on another seed's run.", "two seeds or more."
        )
    ((run, steps),) = grounds.other.runs.items()
    return drift_subspaces(grounds.other, grounds.vs, at=[f"{run}/{steps[-1]}"], rank=rank)


def harmful_minus_harmless(grounds: Grounds) -> Directions:
    """Return the anchor's difference of means between probes and harmless prompts, per layer (Arditi et al. 2024)."""
    anchor, harmless = open_model(grounds.sequence.anchor), replace(grounds.harmless, system=grounds.probes.system)
    found = Directions(refusal_candidates(anchor, harmful=grounds.probes, harmless=harmless))
    return Directions(tuple(replace(found[v.layer], distance=v.distance) for v in grounds.vs))


ALONG: Mapping[str, Callable[[Grounds], Spans]] = {
    "v_rev": lambda grounds: grounds.vs,
    "matched_twin": matched_twin,
    "isotropic_twin": lambda grounds: random_like(grounds.vs, rng=grounds.rng),
    "drift": drift_of_another_run,
    "drift_rank_4": partial(drift_of_another_run, rank=4),
    "drift_rank_16": partial(drift_of_another_run, rank=16),
    "drift_without_v_rev": lambda grounds: orthogonal_part(drift_of_another_run(grounds), grounds.vs),
    "all_but_v_rev": lambda grounds: orthogonal_part(whole_state(grounds.vs), grounds.vs),
    "whole_state": lambda grounds: whole_state(grounds.vs),
    "refusal": harmful_minus_harmless,
}


# --- with which blocker ---------------------------------------------------------------------------------------------
def _penalty(grounds: Grounds, spans: Any, **options: Any) -> Penalty:
    return Penalty(spans, grounds.probes, **options)


def _projection(grounds: Grounds, spans: Any, **options: Any) -> UpdateProjection:
    return UpdateProjection(spans.at(spans.layers[-LATE:]), grounds.probes, **options)


def _released(grounds: Grounds, spans: Any, step: int) -> Scheduled:
    return Scheduled(_penalty(grounds, spans, side="both"), Until(step))


BLOCKERS: Mapping[str, Callable[..., Blocker]] = {
    "penalty": _penalty,
    "clamp": partial(_penalty, side="both"),
    "reinforce": partial(_penalty, side="reinforce", margin=1.0),
    "layer": lambda grounds, spans, layer: _penalty(grounds, spans.at([layer])),
    "released": _released,
    "projection": _projection,
    "steering": lambda _, spans, strength: PreventativeSteering(spans[spans.layers[-1]], strength),
    "training_ablation": lambda _, spans: TrainingAblation(spans),
    "gradient_ablation": lambda _, spans: GradientAblation(spans),
    "kl": lambda grounds, _, **options: AnchorKL(grounds.probes, **options),
    "rehearsal": lambda grounds, _, **options: Rehearsal(grounds.refusals, **options),
    "constrained": lambda *_: ConstrainedSFT(),
    "task_vector": lambda grounds, _: TaskVectorProjection(grounds.sequence.witness),
}


def blocker(kind: str, along: str = "v_rev", **options: Any) -> Callable[..., Blocker]:
    """Return a function that makes a run's blocker.

    Args:
        kind: a key of `BLOCKERS`.
        along: a key of `ALONG`.
        **options: of the blocker, such as `strength`; `draw` is the seed of a random direction that is the same in all
            runs of an arm (default: the run's own).

    Raises:
        GravlensError: an unknown `kind` or `along`.
    """
    for given, known in ((kind, BLOCKERS), (along, ALONG)):
        if given not in known:
            raise GravlensError(f"{given!r} is unknown.", f"Known are {', '.join(known)}.", "one of these.")
    return partial(_make, kind=kind, along=along, **options)


def _make(grounds: Grounds, *, kind: str, along: str, draw: Sequence[int] | None = None, **options: Any) -> Blocker:
    # Looked up by name here: worker processes get the names, since lambdas cannot be pickled.
    grounds = grounds if draw is None else replace(grounds, rng=np.random.default_rng(draw))
    return BLOCKERS[kind](grounds, ALONG[along](grounds), **options)


# --- the table ------------------------------------------------------------------------------------------------------
TABLE: Mapping[str, Callable[..., Blocker]] = {
    "clamp": blocker("clamp"),
    "clamp_drift": blocker("clamp", "drift"),
    "clamp_drift_orthogonal": blocker("clamp", "drift_without_v_rev"),
    "clamp_drift_rank_4": blocker("clamp", "drift_rank_4"),
    "clamp_drift_rank_16": blocker("clamp", "drift_rank_16"),
    "clamp_refusal": blocker("clamp", "refusal"),
    "whole_state": blocker("clamp", "whole_state"),
    "all_but_v_rev": blocker("clamp", "all_but_v_rev"),
    "penalty": blocker("penalty"),
    "penalty_margin": blocker("penalty", margin=0.03),
    "penalty_mean": blocker("penalty", on_mean=True),
    "penalty_random": blocker("penalty", "matched_twin"),
    "reinforce": blocker("reinforce"),
    "released_at_20": blocker("released", step=20),
    "projection": blocker("projection"),
    "projection_one_sided": blocker("projection", two_sided=False),
    "projection_sampled": blocker("projection", batch=8),
    "steering_0.5": blocker("steering", strength=0.5),
    "steering_1": blocker("steering", strength=1.0),
    "steering_2": blocker("steering", strength=2.0),
    "training_ablation": blocker("training_ablation"),
    "gradient_ablation": blocker("gradient_ablation"),
    "kl": blocker("kl"),
    "rehearsal": blocker("rehearsal"),
    "constrained": blocker("constrained"),
    "task_vector": blocker("task_vector"),
}
TWINS = ("matched_twin", "isotropic_twin")  # `{arm}_{twin}` is the arm along random directions
CORE = (
    *("clamp", "clamp_drift", "clamp_drift_orthogonal", "clamp_matched_twin", "whole_state", "penalty"),
    *("clamp_isotropic_twin", "projection", "all_but_v_rev", "rehearsal", "kl", "penalty_random"),
)
FURTHER = (
    *("penalty_margin", "penalty_mean", "reinforce", "projection_one_sided", "projection_sampled"),
    *("projection_isotropic_twin", "projection_matched_twin", "steering_0.5", "steering_1", "training_ablation"),
    *("gradient_ablation", "clamp_drift_rank_4", "clamp_drift_rank_16", "clamp_refusal", "constrained", "task_vector"),
)
DEFAULT_STRENGTHS = {
    **dict.fromkeys(("penalty", "clamp", "clamp_drift", "clamp_matched_twin", "whole_state"), Penalty.strength),
    **dict.fromkeys(("kl", "rehearsal"), 1.0),
}


def made_by(name: str) -> Callable[..., Blocker]:
    """Return what makes the blocker of the arm `name`: a row of the table, or the random twin of one."""
    for twin in TWINS:
        if name.endswith(f"_{twin}"):
            return partial(TABLE[name.removesuffix(f"_{twin}")], along=twin)
    return TABLE[name]


def core_arms(seeds: tuple[int, ...], data: str, suffix: str = "") -> tuple[Arm, ...]:
    """Return the arms that a large model can afford; arms on another data set carry a suffix."""
    other = UNBLOCKED + suffix
    arms = (Arm(name + suffix, seeds, data, blocker=made_by(name), other=other) for name in CORE)
    lower = Arm(f"lower_rate{suffix}", seeds, data, rate=0.5)
    return (Arm(other, seeds, data, keep=not suffix), *arms, lower)


def further_arms(seeds: tuple[int, ...], data: str, layers: Sequence[int]) -> tuple[Arm, ...]:
    """Return the arms that only a small model can afford, with one penalty per layer."""
    made = {name: made_by(name) for name in FURTHER}
    made |= {f"penalty_layer_{layer}": blocker("layer", layer=layer) for layer in layers}
    arms = (Arm(name, seeds, data, blocker=make, other=UNBLOCKED) for name, make in made.items())
    return (*arms, Arm("lower_rate_0.25", seeds, data, rate=0.25), released_arm(seeds, data))


def random_arms(
    seeds: tuple[int, ...], data: str, *, directions: int, draw: Sequence[int] = (), kind: str = "clamp"
) -> tuple[Arm, ...]:
    """Return `clamp_random_1` and so on: one matched random direction per arm, the same for all of its seeds.

    The unit of a comparison with v_rev is the direction, not the run: v_rev too is one for all seeds.

    Args:
        seeds: those of the clamp along v_rev.
        data: the data set that is trained on.
        directions: how many arms.
        draw: what the directions are drawn from, before the arm's number: the seed of an organism.
        kind: a key of `BLOCKERS`.
    """
    made = {n: blocker(kind, "matched_twin", draw=(*draw, n)) for n in range(1, directions + 1)}
    return tuple(Arm(f"{kind}_random_{n}", seeds, data, blocker=make, brief=True) for n, make in made.items())


def released_arm(seeds: tuple[int, ...], data: str) -> Arm:
    """Return the release test: a clamp that is lifted at step 20, with states read at more steps after it."""
    return Arm("released_at_20", seeds, data, blocker=TABLE["released_at_20"], more_steps=(22, 25, 30, 40, 60))


def dose_arms(seeds: tuple[int, ...], data: str) -> tuple[Arm, ...]:
    """Return blockers at a tenth and at ten times their strength, for a dose–response curve of harm and task loss."""
    doses = [(name, times * usual) for name, usual in DEFAULT_STRENGTHS.items() for times in (0.1, 10)]
    made = {f"{name}_strength_{dose:g}": partial(made_by(name), strength=dose) for name, dose in doses}
    arms = (Arm(name, seeds, data, blocker=make, other=UNBLOCKED) for name, make in made.items())
    return (*arms, Arm("steering_2", seeds, data, blocker=TABLE["steering_2"]))
