"""Histories of states alone, whose truth is set: no model, and as many as one likes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date

import numpy as np
import pandas as pd
import xarray
from jaxtyping import Float

from gravlens.claims.evidence import Evidence
from gravlens.claims.preregistration import Preregistration
from gravlens.directions.trajectory import AXES, ByLayer, Trajectory
from gravlens.stats.nulls import NullDraws

STEP, PROMPTS = 20, 48  # the judged step; held-out prompts
ALIKE = 0.95  # correlation of a draw between layers, where layers are coherent
NOISE_DRAWS, ISOTROPIC_DRAWS, DAMAGES = 200, 2_000, 3
RESAMPLED, SPREAD = 200, 0.02  # bootstrap draws; half an interval over prompts that move alike
Means = Float[np.ndarray, "*many layer d_model"]


@dataclass(frozen=True)
class World:
    """What is true of simulated histories. Lengths are in units of an excursion, which has length 1 on average.

    A witness is an excursion from the centre of its history, and so is the anchor's displacement from the witness.

    Attributes:
        planted: share of the way to the witness that every run goes; below 0 it goes the other way.
        endpoints: share of the way to endpoints of their own that runs and twins go. Witness, anchor and endpoints are
            then independent excursions from one centre, so that the anchor is all that they share.
        shared: share of the variance of the anchors' excursions that all anchors have in common.
        common: share of the way to the witness that the runs go because every fine-tuning run goes there: the twins of
            this witness and of all others move by the same vector.
        apart: distance of the histories' centres: another initialisation has another basis.
        per_prompt: share of the way to the witness that each held-out prompt goes, with a sign of its own which all
            runs share; `balanced`: as many go back as forth, else each sign is drawn.
        decay: the variance of every draw falls as j^-decay over the dimensions: 0 isotropic, 1.5 a participation ratio
            near 5.
        rogue: share of the variance of every draw that lies in one dimension.
        coherent: whether a draw is nearly the same vector at all layers.
        noise: length of each run's own noise.
        best_of: layers of which the best is kept afterwards (0: the mean over all of them is judged).
        preregistered: whether layers and step were fixed beforehand.
    """

    planted: float = 0.0
    endpoints: float = 0.0
    shared: float = 0.0
    common: float = 0.0
    apart: float = 0.0
    per_prompt: float = 0.0
    balanced: bool = True
    decay: float = 0.0
    rogue: float = 0.0
    coherent: bool = False
    noise: float = 0.1
    d_model: int = 64
    n_layers: int = 3
    best_of: bool = False
    preregistered: bool = True


@dataclass(frozen=True)
class Plan:
    """How many of everything a verdict is made of; with several anchors the others' witnesses are the strangers."""

    anchors: int
    runs: int
    strangers: int
    directions: int


PLANS = {"one anchor": Plan(1, 5, 19, 19), "six anchors": Plan(6, 2, 5, 4)}


@dataclass(frozen=True, eq=False)
class History:
    """Mean states of one simulated history.

    Attributes:
        world: what is true of it.
        anchor, witness: [layer, d_model].
        runs, twins: [run, layer, d_model] at the judged step.
        strangers: [stranger, layer, d_model].
        stranger_twins: [stranger, run, layer, d_model].
        signs: [prompt], with which each held-out prompt's own motion goes.
    """

    world: World
    anchor: Means = field(repr=False)
    witness: Means = field(repr=False)
    runs: Means = field(repr=False)
    twins: Means = field(repr=False)
    strangers: Means = field(repr=False)
    stranger_twins: Means = field(repr=False)
    signs: Float[np.ndarray, " prompt"] = field(repr=False)

    def along(self, drifts: Means, end: Means) -> Float[np.ndarray, "*many layer"]:
        """Cosines of drifts with the direction from the anchor to an end."""
        way = end - self.anchor
        return (drifts * way).sum(-1) / np.linalg.norm(drifts, axis=-1) / np.linalg.norm(way, axis=-1)

    def closed(self, end: Means, twins: Means) -> Float[np.ndarray, "run layer"]:
        """Share of the gap to an end's twins that has closed (`gravlens.stats.controls.closure`)."""
        way = end - self.anchor
        return 1 - ((twins - self.runs) * way).sum(-1) / (way**2).sum(-1)


def excursions(world: World, *shape: int, rng: np.random.Generator) -> Means:
    """Draw vectors [*shape, layer, d_model] with the world's covariance; their mean squared length is 1."""
    variance = np.arange(1, world.d_model + 1) ** -world.decay
    variance = (1 - world.rogue) * variance / variance.sum()
    variance[0] += world.rogue
    drawn = rng.standard_normal((*shape, world.n_layers, world.d_model))
    if world.coherent:
        one = rng.standard_normal((*shape, 1, world.d_model))
        drawn = np.sqrt(ALIKE) * one + np.sqrt(1 - ALIKE) * drawn
    return drawn * np.sqrt(variance)


def simulate(world: World, plan: Plan, *, rng: np.random.Generator) -> list[History]:
    """Draw the histories of one verdict."""
    n = max(plan.anchors, 1 + plan.strangers)  # of witnesses, with their twins

    def draw(*shape: int) -> Means:
        return excursions(world, *shape, rng=rng)

    centres = world.apart * draw(n)
    witnesses = centres + draw(n)
    displaced = np.sqrt(world.shared) * draw() + np.sqrt(1 - world.shared) * draw(plan.anchors)
    starts = centres if world.endpoints else witnesses
    anchors = starts[: plan.anchors] + displaced
    ways = witnesses[: plan.anchors] - anchors
    forward = world.common * ways.mean(0)  # of all fine-tuning, so of all twins
    twins = witnesses[:, None] + forward + world.noise * draw(n, plan.runs)
    runs = anchors[:, None] + forward + world.planted * ways[:, None] + world.noise * draw(plan.anchors, plan.runs)
    if world.endpoints:
        twins += world.endpoints * (centres[:, None] + draw(n, plan.runs) - witnesses[:, None])
        goals = centres[: plan.anchors, None] + draw(plan.anchors, plan.runs)
        runs += world.endpoints * (goals - anchors[:, None])
    signs = np.resize((1.0, -1.0), PROMPTS) if world.balanced else rng.choice((1.0, -1.0), PROMPTS)
    runs += world.per_prompt * signs.mean() * ways[:, None]
    found = []
    for i in range(plan.anchors):
        others = [j for j in range(n) if j != i]
        found.append(
            History(world, anchors[i], witnesses[i], runs[i], twins[i], witnesses[others], twins[others], signs)
        )
    return found


def evidence_of(history: History, *, name: str, rng: np.random.Generator) -> Evidence:
    """Return the evidence on a simulated history; its own noise serves as weight noise and as damage."""
    world, way = history.world, history.witness
    drifts = history.runs - history.anchor
    layers: tuple[int, ...] = tuple(range(world.n_layers))
    if world.best_of:
        layers = (int(history.along(drifts, way).mean(0).argmax()),)
    draws = history.along(excursions(world, NOISE_DRAWS, rng=rng), way)
    normals = rng.standard_normal((ISOTROPIC_DRAWS, world.n_layers))
    across = rng.chisquare(world.d_model - 1, normals.shape)
    nulls = {"isotropic": normals / np.sqrt(normals**2 + across), "weight_noise": draws}
    damaged = history.along(excursions(world, DAMAGES, rng=rng), way)[:, list(layers)].mean(1)
    names = [f"stranger{j}" for j in range(len(history.strangers))]
    return Evidence(
        trajectory=_trajectory(history, history.witness, layers),
        nulls=[NullDraws(key, one[:, None], (STEP,), tuple(range(world.n_layers))) for key, one in nulls.items()],
        strangers={key: _trajectory(history, end, layers) for key, end in zip(names, history.strangers, strict=True)},
        over_prompts=_over_prompts(history, layers, rng),
        closure=_by_layer(history.closed(history.witness, history.twins), layers),
        stranger_closures={
            key: _by_layer(history.closed(*pair), layers)
            for key, *pair in zip(names, history.strangers, history.stranger_twins, strict=True)
        },
        damage=pd.DataFrame({"damage": [f"noise {i}" for i in range(DAMAGES)], "alignment": damaged, "judged": True}),
        preregistration=preregistered(layers) if world.preregistered else None,
        name=name,
    )


def preregistered(layers: Sequence[int]) -> Preregistration:
    """Fix layers and step."""
    return Preregistration(tuple(layers), STEP, 0.05, "a" * 64, "b" * 64, "compliance_rate", date(2026, 11, 1))


def _trajectory(history: History, end: Means, layers: tuple[int, ...]) -> Trajectory:
    drifts, way = history.runs - history.anchor, end - history.anchor
    alignment, norm = history.along(drifts, end), np.linalg.norm(drifts, axis=-1)
    projection = alignment * norm
    measures: Mapping[str, np.ndarray] = {
        "alignment": alignment,
        "projection": projection,
        "fraction": projection / np.linalg.norm(way, axis=-1),
        "drift_norm": norm,
        "judged": norm > 0,
    }
    return _as_trajectory(measures, layers)


def _over_prompts(history: History, layers: Sequence[int], rng: np.random.Generator) -> pd.DataFrame:
    """Each run's 95 % interval of the fraction over prompts; prompts that move alike leave next to none."""
    signs, world = history.signs, history.world
    way = history.witness - history.anchor
    fraction = ((history.runs - history.anchor) * way).sum(-1) / (way**2).sum(-1)
    seen = fraction[:, list(layers)].mean(-1)
    drawn = rng.multinomial(len(signs), np.full(len(signs), 1 / len(signs)), RESAMPLED) @ signs / len(signs)
    shifts = world.per_prompt * (drawn - signs.mean())  # a share of the way is a fraction
    low, high = (seen - np.quantile(shifts, end) for end in (0.975, 0.025))
    names = [f"run{i}" for i in range(len(seen))]
    return pd.DataFrame({"run": names, "step": STEP, "estimate": seen, "low": low - SPREAD, "high": high + SPREAD})


def _as_trajectory(measures: Mapping[str, np.ndarray], layers: tuple[int, ...]) -> Trajectory:
    runs, n = next(iter(measures.values())).shape
    places = ([f"run{i}" for i in range(runs)], ["held_out"], [STEP], list(range(n)))
    data = {name: (AXES, values[:, None, None]) for name, values in measures.items()}
    return Trajectory(xarray.Dataset(data, dict(zip(AXES, places, strict=True))), layers)


def _by_layer(closed: Float[np.ndarray, "run layer"], layers: tuple[int, ...]) -> ByLayer:
    runs, n = closed.shape
    facts = {"run": np.repeat([f"run{i}" for i in range(runs)], n), "step": STEP, "layer": np.tile(range(n), runs)}
    table = pd.DataFrame({**facts, "closure": closed.ravel()})
    mean = {"run": [f"run{i}" for i in range(runs)], "step": STEP, "closure": closed[:, list(layers)].mean(1)}
    return ByLayer(table, pd.DataFrame(mean))
