"""Arms: kinds of fine-tuning runs, and what their blockers are made of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import numpy as np

from gravlens.activations.residuals import Residuals
from gravlens.blockers.anchoring import AnchorKL, Rehearsal
from gravlens.blockers.blocking import Blocker, Scheduled, Until
from gravlens.blockers.constrained_sft import ConstrainedSFT
from gravlens.blockers.penalty import Penalty
from gravlens.blockers.projection import TaskVectorProjection, UpdateProjection
from gravlens.blockers.steered_training import GradientAblation, PreventativeSteering, TrainingAblation
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Directions, Spans, Subspaces
from gravlens.directions.subspaces import drift_subspaces, orthogonal_part, random_like, whole_state
from gravlens.history.prompts import Example, PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.refusal import refusal_candidates
from gravlens.models.opening import open_model

UNBLOCKED = "unblocked"
LATE = 6  # layers at most of an exact projection: each costs a backward pass


@dataclass(frozen=True, eq=False)
class Grounds:
    """What an arm's blocker may be made of; all of it is known before the run.

    Attributes:
        sequence: witness, anchor, probes.
        states: residuals of witness and anchor on the probes, at the layers of the mean.
        vs: v_rev, located on them.
        other: residuals of the anchor and of an unblocked run of another seed on the probes, or None.
        refusals: refusals of the probes, to rehearse.
        harmless: prompts of the run's own data.
        rng: for random twins, fresh in each run.
    """

    sequence: ModelSequence
    states: Residuals
    vs: Directions
    other: Residuals | None
    refusals: Sequence[Example]
    harmless: PromptSet
    rng: np.random.Generator

    @property
    def probes(self) -> PromptSet:
        """The prompts that blockers act on; nothing is judged on them."""
        return self.sequence.require_probes()


Make: TypeAlias = Callable[[Grounds], Blocker]
Along: TypeAlias = Callable[[Grounds], Spans]


@dataclass(frozen=True)
class Arm:
    """One kind of run.

    Attributes:
        name: how tables call it.
        seeds: one run each; a seed fixes data and order, so that arms are paired by seed.
        data: which of the setting's data sets.
        start: the checkpoint it starts from.
        blocker: makes the blocker of a run, or None.
        other: the arm whose run of another seed the blocker is made of; those runs come first.
        rate: learning rate, as a ratio to the recipe's.
        more_steps: steps at which states are read beside the setting's.
        keep: keep the weights of its checkpoints.
    """

    name: str
    seeds: tuple[int, ...]
    data: str = "harmless"
    start: str = "anchor"
    blocker: Make | None = None
    other: str | None = None
    rate: float = 1.0
    more_steps: tuple[int, ...] = ()
    keep: bool = False


# --- along what ---------------------------------------------------------------------------------------------------
def v_rev(grounds: Grounds) -> Directions:
    """The history-defined direction."""
    return grounds.vs


def matched_twin(grounds: Grounds) -> Spans:
    """A fresh random direction a layer, from the covariance of the anchor's states on the probes."""
    columns = [grounds.states.layers.index(layer) for layer in grounds.vs.layers]
    return random_like(grounds.vs, rng=grounds.rng, states=grounds.states.of("anchor")[:, columns])


def isotropic_twin(grounds: Grounds) -> Spans:
    """A fresh isotropic direction a layer."""
    return random_like(grounds.vs, rng=grounds.rng)


def drift_of_another_run(grounds: Grounds, rank: int = 1) -> Subspaces:
    """The leading components of the per-prompt drift of an unblocked run of another seed, at its last step."""
    if grounds.other is None:
        raise GravlensError(
            "There is no other run.", "A run-defined direction is fitted on another seed's run.", "two seeds or more."
        )
    ((run, steps),) = grounds.other.runs.items()
    return drift_subspaces(grounds.other, grounds.vs, at=[f"{run}/{steps[-1]}"], rank=rank)


def drift_without_v_rev(grounds: Grounds) -> Subspaces:
    """The leading component of another run's drift, its part orthogonal to v_rev."""
    return orthogonal_part(drift_of_another_run(grounds), grounds.vs)


def all_but_v_rev(grounds: Grounds) -> Subspaces:
    """The whole state but v_rev."""
    return orthogonal_part(whole_state(grounds.vs), grounds.vs)


def everything(grounds: Grounds) -> Subspaces:
    """The whole state: the full-vector anchor."""
    return whole_state(grounds.vs)


def harmful_minus_harmless(grounds: Grounds) -> Directions:
    """The anchor's difference of means between the probes and harmless prompts, a layer each (Arditi et al. 2024)."""
    anchor, harmless = open_model(grounds.sequence.anchor), replace(grounds.harmless, system=grounds.probes.system)
    found = Directions(refusal_candidates(anchor, harmful=grounds.probes, harmless=harmless))
    return Directions(tuple(replace(found[v.layer], distance=v.distance) for v in grounds.vs))


# --- with what ----------------------------------------------------------------------------------------------------
def penalty(grounds: Grounds, along: Along = v_rev, margin: float = 0.0, strength: float = 30.0) -> Penalty:
    """The one-sided penalty."""
    return Penalty(along(grounds), grounds.probes, margin=margin, strength=strength)


def mean_penalty(grounds: Grounds) -> Penalty:
    """The one-sided penalty on the probes' mean."""
    return Penalty(grounds.vs, grounds.probes, on_mean=True)


def clamp(grounds: Grounds, along: Along = v_rev, strength: float = 30.0) -> Penalty:
    """The two-sided penalty, in a subspace of any rank."""
    return Penalty(along(grounds), grounds.probes, side="both", strength=strength)


def released(grounds: Grounds, step: int) -> Scheduled:
    """The two-sided penalty until a step, and nothing from there on."""
    return Scheduled(clamp(grounds), Until(step))


def one_layer(grounds: Grounds, layer: int) -> Penalty:
    """The one-sided penalty at one layer."""
    return Penalty(grounds.vs.at([layer]), grounds.probes)


def reinforce(grounds: Grounds) -> Penalty:
    """The opposite: a push all the way back."""
    return Penalty(grounds.vs, grounds.probes, side="reinforce", margin=1.0)


def projection(
    grounds: Grounds, along: Along = v_rev, two_sided: bool = True, batch: int | None = None
) -> UpdateProjection:
    """The exact projection, at the last layers of the mean."""
    spans = along(grounds)
    assert isinstance(spans, Directions)
    return UpdateProjection(spans.at(spans.layers[-LATE:]), grounds.probes, two_sided=two_sided, batch=batch)


def steering(grounds: Grounds, strength: float) -> PreventativeSteering:
    """Preventative steering at the last layer of the mean."""
    return PreventativeSteering(grounds.vs[grounds.vs.layers[-1]], strength)


def training_ablation(grounds: Grounds) -> TrainingAblation:
    """CAFT along v_rev."""
    return TrainingAblation(grounds.vs)


def gradient_ablation(grounds: Grounds) -> GradientAblation:
    """No gradient along v_rev in the backward pass."""
    return GradientAblation(grounds.vs)


def anchor_kl(grounds: Grounds, strength: float = 1.0) -> AnchorKL:
    """KL to the anchor on the probes."""
    return AnchorKL(grounds.probes, strength)


def rehearsal(grounds: Grounds, strength: float = 1.0) -> Rehearsal:
    """Two refusals a step."""
    return Rehearsal(grounds.refusals, strength)


def constrained(_grounds: Grounds) -> ConstrainedSFT:
    """Constrained fine-tuning with the paper's β."""
    return ConstrainedSFT()


def task_vector(grounds: Grounds) -> TaskVectorProjection:
    """The update projected off the witness − anchor task vector."""
    return TaskVectorProjection(grounds.sequence.witness)


# --- the arms that are compared -----------------------------------------------------------------------------------
def core_arms(seeds: tuple[int, ...], data: str, suffix: str = "") -> tuple[Arm, ...]:
    """Which of them holds the harm, which holds v_rev: the arms that a large model can afford."""
    made: dict[str, Make] = {
        "clamp": clamp,
        "clamp_drift": partial(clamp, along=drift_of_another_run),
        "clamp_drift_orthogonal": partial(clamp, along=drift_without_v_rev),
        "clamp_matched_twin": partial(clamp, along=matched_twin),
        "whole_state": partial(clamp, along=everything),
        "penalty": penalty,
        "clamp_isotropic_twin": partial(clamp, along=isotropic_twin),
        "projection": projection,
        "all_but_v_rev": partial(clamp, along=all_but_v_rev),
        "rehearsal": rehearsal,
        "kl": anchor_kl,
        "penalty_random": partial(penalty, along=matched_twin),
    }
    other = UNBLOCKED + suffix
    arms = [Arm(f"{name}{suffix}", seeds, data, blocker=make, other=other) for name, make in made.items()]
    lower = Arm(f"lower_rate{suffix}", seeds, data, rate=0.5)
    return (Arm(f"{UNBLOCKED}{suffix}", seeds, data, keep=not suffix), *arms, lower)


def further_arms(seeds: tuple[int, ...], data: str, layers: Sequence[int]) -> tuple[Arm, ...]:
    """What a small model can afford beside them."""
    made: dict[str, Make] = {
        "penalty_margin": partial(penalty, margin=0.03),
        "penalty_mean": mean_penalty,
        **{f"penalty_layer_{layer}": partial(one_layer, layer=layer) for layer in layers},
        "reinforce": reinforce,
        "projection_one_sided": partial(projection, two_sided=False),
        "projection_sampled": partial(projection, batch=8),
        "projection_isotropic_twin": partial(projection, along=isotropic_twin),
        "projection_matched_twin": partial(projection, along=matched_twin),
        "steering_0.5": partial(steering, strength=0.5),
        "steering_1": partial(steering, strength=1.0),
        "training_ablation": training_ablation,
        "gradient_ablation": gradient_ablation,
        "clamp_drift_rank_4": partial(clamp, along=partial(drift_of_another_run, rank=4)),
        "clamp_drift_rank_16": partial(clamp, along=partial(drift_of_another_run, rank=16)),
        "clamp_refusal": partial(clamp, along=harmful_minus_harmless),
        "constrained": constrained,
        "task_vector": task_vector,
    }
    arms = [Arm(name, seeds, data, blocker=make, other=UNBLOCKED) for name, make in made.items()]
    return (*arms, Arm("lower_rate_0.25", seeds, data, rate=0.25), lifted(seeds, data))


def lifted(seeds: tuple[int, ...], data: str) -> Arm:
    """The release test: the clamp of `clamp` until step 20, and then nothing."""
    return Arm("released_at_20", seeds, data, blocker=partial(released, step=20), more_steps=(22, 25, 30, 40, 60))


def dose_arms(seeds: tuple[int, ...], data: str) -> tuple[Arm, ...]:
    """Blockers at a tenth and at ten times their strength: where does each begin to help, and to harm the task?"""
    made: dict[str, tuple[Callable[..., Blocker], float]] = {
        "penalty": (penalty, 30.0),
        "clamp": (clamp, 30.0),
        "clamp_drift": (partial(clamp, along=drift_of_another_run), 30.0),
        "clamp_matched_twin": (partial(clamp, along=matched_twin), 30.0),
        "whole_state": (partial(clamp, along=everything), 30.0),
        "kl": (anchor_kl, 1.0),
        "rehearsal": (rehearsal, 1.0),
    }
    doses = [
        Arm(
            f"{name}_strength_{times * default:g}",
            seeds,
            data,
            blocker=partial(make, strength=times * default),
            other=UNBLOCKED,
        )
        for name, (make, default) in made.items()
        for times in (0.1, 10)
    ]
    return (*doses, Arm("steering_2", seeds, data, blocker=partial(steering, strength=2.0)))
