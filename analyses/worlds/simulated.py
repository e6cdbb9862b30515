"""Histories of states alone, whose truth is set: no model, and as many as one likes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from jaxtyping import Float

from gravlens.activations.residuals import Residuals
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import measure_drift
from gravlens.stats.nulls import NullDraws

PROMPT_SPREAD = 0.05  # of a checkpoint's states over prompts, in distances of witness and anchor
SETS = {"probes": 32, "held_out": 48}  # prompt set -> prompts
SIBLINGS = ("sibling_anchor", "sibling_anchor_2")


@dataclass(frozen=True)
class World:
    """What is true of a simulated history.

    Attributes:
        planted: shares of the way from the anchor to the witness, one a step; the runs really go there.
        endpoints: runs head for endpoints of their own, independent of all, and have gone these shares of the way;
            witness, anchor and siblings are independent too, so that the anchor is all that they share.
        decay: the variance of noise and excursions falls as j^-decay over the dimensions: 0 isotropic, 1.5 a
            participation ratio near 5.
        noise: of each run, in distances.
        d_model: width.
        n_layers: layers, independent of each other.
        runs: how many.
    """

    planted: tuple[float, ...] = ()
    endpoints: tuple[float, ...] = ()
    decay: float = 0.0
    noise: float = 0.1
    d_model: int = 64
    n_layers: int = 3
    runs: int = 5


@dataclass(frozen=True, eq=False)
class Simulated:
    """A history of a `World`.

    Attributes:
        probes: states of witness, anchor, siblings, a wrong witness, the runs.
        held_out: the same checkpoints on other prompts.
        twins: the history and the witness's own runs (`twin-0/1`, …) on the held-out prompts.
        world: what is true of it.
        scales: SD of each dimension of noise, [d_model], of unit norm.
    """

    probes: Residuals = field(repr=False)
    held_out: Residuals = field(repr=False)
    twins: Residuals = field(repr=False)
    world: World
    scales: Float[np.ndarray, " d_model"] = field(repr=False)

    def noise(self, directions: Directions, *, draws: int, rng: np.random.Generator) -> NullDraws:
        """The world's own noise as a null: cosines of what it does to a mean state with v_rev."""
        steps = self.probes.runs["run-0"]
        shape = (draws, len(steps), len(directions), len(self.scales))
        cosines = measure_drift(rng.standard_normal(shape) * self.scales, directions)["alignment"]
        return NullDraws("weight_noise", cosines, steps, directions.layers)

    def damage(self, directions: Directions, *, n: int, rng: np.random.Generator) -> pd.DataFrame:
        """Draw noise of a run's size `n` times, in the form of `measure_damage(...).layer_mean`."""
        drift = rng.standard_normal((n, len(directions), len(self.scales))) * self.scales * self.world.noise
        found = measure_drift(drift, directions)["alignment"].mean(1)
        return pd.DataFrame({"damage": [f"noise {i}" for i in range(n)], "alignment": found, "judged": True})


def simulate(world: World, *, rng: np.random.Generator) -> Simulated:
    """Draw a history of a world."""
    scales = np.arange(1, world.d_model + 1) ** (-world.decay / 2)
    scales = scales / np.linalg.norm(scales)

    def excursion(size: float = 1.0) -> Float[np.ndarray, "layer d_model"]:
        return size * rng.standard_normal((world.n_layers, world.d_model)) * scales

    shares = world.planted or world.endpoints
    if world.endpoints:
        means = {name: excursion() for name in ("witness", "anchor", *SIBLINGS, "wrong_witness")}
    else:
        displaced = excursion()  # what all alignments of this witness have in common
        means = {name: displaced + excursion(0.2) for name in ("anchor", *SIBLINGS)}
        means |= {"witness": np.zeros_like(displaced), "wrong_witness": excursion()}
    runs, twins = {}, {}
    for i in range(world.runs):
        for kind, start, found in (("run", "anchor", runs), ("twin", "witness", twins)):
            goal = excursion() if world.endpoints else means["witness"]
            for step, share in enumerate(shares, 1):
                moved = means[start] + share * (goal - means[start])
                found[f"{kind}-{i}/{step}"] = moved + excursion(world.noise)
    everything = means | runs | twins
    probes, held_out = (_states(everything, name, n, rng) for name, n in SETS.items())
    ours, theirs = [*means, *runs], [*means, *twins]
    return Simulated(_only(probes, ours), _only(held_out, ours), _only(held_out, theirs), world, scales)


def _only(states: Residuals, names: Sequence[str]) -> Residuals:
    values = np.stack([states.of(name) for name in names])
    return replace(states, values=values, checkpoints=tuple(names))


def _states(means: Mapping[str, np.ndarray], name: str, n: int, rng: np.random.Generator) -> Residuals:
    """States about each checkpoint's mean; what a prompt adds is the same at every checkpoint, but for a little."""
    first = next(iter(means.values()))
    prompt = rng.standard_normal((n, *first.shape))
    spread = PROMPT_SPREAD / np.sqrt(first.shape[1])
    states = [mean + prompt + spread * rng.standard_normal(prompt.shape) for mean in means.values()]
    layers = tuple(range(len(first)))
    return Residuals(np.stack(states).astype(np.float32), tuple(means), layers, name, {"dtype": ["float32"]})
