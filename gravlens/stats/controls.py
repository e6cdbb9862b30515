"""Controls: single contrasts that tell how much of an alignment is specific to this history."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, product

import numpy as np
import pandas as pd
import xarray
from einops import einsum
from jaxtyping import Float
from numpy.random import Generator

from gravlens.activations.residuals import Residuals, check_states
from gravlens.activations.residuals import from_start as from_start
from gravlens.activations.residuals import substitute as substitute
from gravlens.core.display import brief
from gravlens.core.errors import GravlensError
from gravlens.directions.covariance import draws_by_layer
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.trajectory import ByLayer, drifts, follow, mean_state
from gravlens.directions.vrev import locate_vrev
from gravlens.stats.nulls import NullDraws

__all__ = [
    "AnchorRatio", "anchor_ratio", "closure", "compare_witnesses", "from_start", "independent_endpoints",
    "partialled_out", "substitute",
]  # fmt: skip


NOTHING_LEFT = 1e-5  # of a unit vector: an fp32 one is rounded at about 1e-7
MIN_SIBLINGS = 3  # a spread over two is a guess


def partialled_out(directions: Directions, other: Directions) -> Directions:
    """Remove another history's direction: unit(v − ⟨v, u⟩u), layer by layer.

    With `other` towards a wrong witness from the same anchor this removes what the two share: common structure, and
    part of the anchor's own excursion. Not all of it, for u is one noisy view of it: where only the anchor is shared
    and c = r/(1 + r), a cosine of c·√((1 − c)/(1 + c)) remains (0.29 of 0.5): docs/controls.md. The distance becomes
    distance·‖v − ⟨v, u⟩u‖; a layer where nothing is left or `other` is undefined becomes undefined.

    Examples:
        >>> states = gl.cache_residuals(seq, checkpoints=[*seq, gl.Checkpoint("stranger", "stranger")])
        >>> other = gl.locate_vrev(gl.controls.substitute(states, witness="stranger"))
        >>> specific = gl.controls.partialled_out(vs, other)
        >>> bool(abs(specific[1].vector @ other[1].vector) < 1e-3)
        True
    """
    directions, other = Directions.of(directions), Directions.of(other)
    return Directions(tuple(_partialled(direction, other[direction.layer]) for direction in directions))


def _partialled(direction: Direction, other: Direction) -> Direction:
    if direction.undefined is not None:
        return direction
    name = other.made_from.get("witness", other.estimator)
    v, u = direction.vector.astype(np.float64), other.vector.astype(np.float64)
    rest = v - (v @ u) / (u @ u) * u  # u has unit length to fp32 only
    left, undefined = float(np.linalg.norm(rest)), None
    if other.undefined is not None:
        undefined = f"the direction to take out ({name}) is undefined: {other.undefined}"
    elif left <= NOTHING_LEFT:
        undefined = f"nothing is left once the direction of {name} is taken out"
    return replace(
        direction,
        vector=rest / left if undefined is None else np.full_like(rest, np.nan),
        distance=direction.distance * left,
        reliability=float("nan"),  # that of the halves was v's, not the remainder's
        made_from={**direction.made_from, "partialled_out": name},
        undefined=undefined,
    )


def compare_witnesses(
    probes: Residuals,
    held_out: Residuals,
    *,
    witnesses: Sequence[str],
    anchors: Sequence[str] = ("anchor",),
    layers_in_mean: Sequence[int],
) -> pd.DataFrame:
    """Follow every run along the direction of every pair of witness and anchor, located on `probes`.

    An earlier or later witness, another lineage, an equally distant checkpoint that is no ancestor: read an alignment
    with its pair's distance and cosine with v_rev. The drift always starts at `anchor` (docs/controls.md).
    GravlensError for a pair that does not differ at one of the layers.

    Returns:
        Columns `witness, anchor, run, step, alignment, fraction, distance` (residual units), `cosine_with_v_rev`, means
        over `layers_in_mean`.

    Examples:
        >>> witnesses = ["witness", "seed1/20"]
        >>> table = gl.controls.compare_witnesses(given, held_out, witnesses=witnesses, layers_in_mean=[0, 1])
        >>> table.witness.unique().tolist()
        ['witness', 'seed1/20']
    """
    check_states(probes)
    v_rev = _between(probes, "witness", "anchor", layers_in_mean)
    frames = []
    for witness, anchor in product(witnesses, anchors):
        pair = _between(probes, witness, anchor, layers_in_mean)
        rows = follow(held_out, pair).layer_mean[["run", "step", "alignment", "fraction"]]
        cosines = einsum(pair.vectors.astype(np.float64), v_rev.vectors, "layer d, layer d -> layer")
        facts = {"distance": pair.distances.mean(), "cosine_with_v_rev": cosines.mean()}
        frames.append(rows.assign(witness=witness, anchor=anchor, **facts))
    columns = ["witness", "anchor", "run", "step", "alignment", "fraction", "distance", "cosine_with_v_rev"]
    return pd.concat(frames, ignore_index=True)[columns]


def _between(residuals: Residuals, witness: str, anchor: str, layers: Sequence[int]) -> Directions:
    """The direction from one checkpoint to another, defined at all the layers."""
    # all pairs at the same layers, or the means would not compare
    found = locate_vrev(substitute(residuals, witness=witness, anchor=anchor)).at(layers)
    if undefined := [direction.layer for direction in found if direction.undefined is not None]:
        given = f"{witness} and {anchor} do not differ at the layers {undefined}."
        raise GravlensError(given, "All pairs are compared on the same layers.", "layers_in_mean without those.")
    return found


@dataclass(frozen=True, eq=False)
class AnchorRatio:
    """Spread of alignment seeds relative to the witness's distance, and the cosine that this alone makes.

    `r` [layer] is the variance ratio of the anchor's excursion to the witness's, infinite where the siblings scatter as
    far as the witness is; `expected_cosine` is r/(1 + r), within 0 and 1; `draws` [draw, layer] are of
    `expected_cosine` over siblings; `siblings` include the anchor.
    """

    layers: tuple[int, ...]
    r: Float[np.ndarray, " layer"]
    expected_cosine: Float[np.ndarray, " layer"]
    draws: Float[np.ndarray, "draw layer"] = field(repr=False)
    siblings: tuple[str, ...] = ()
    __repr__ = brief

    @property
    def table(self) -> pd.DataFrame:
        """A row per layer: `layer, r, expected_cosine`, and `low, high`, the draws' central 95 %."""
        low, high = np.quantile(self.draws, (0.025, 0.975), axis=0)
        columns = {"layer": self.layers, "r": self.r, "expected_cosine": self.expected_cosine}
        return pd.DataFrame({**columns, "low": low, "high": high})


def anchor_ratio(
    residuals: Residuals, *, siblings: Sequence[str], layers: Sequence[int], draws: int, rng: Generator
) -> AnchorRatio:
    """Estimate r of the shared anchor over siblings: the same witness, aligned with other seeds.

    About the siblings' mean m let the anchor be a, the witness w, and e an endpoint independent of both, as far from m
    as the witness. With r = E‖a‖²/‖w‖²

        E cos(e − a, w − a) ≈ E‖a‖² / E‖w − a‖² = r/(1 + r).

    The siblings' unbiased variance (summed over d) estimates E‖a‖², the mean of ‖h(W) − h(A_i)‖² estimates E‖w − a‖²
    (docs/controls.md). A run's endpoint does depend on its anchor: this is the independent endpoint's case only. The
    draws are a Bayesian bootstrap over siblings (Rubin, "The Bayesian Bootstrap", 1981): the error of an expectation,
    and no null (`independent_endpoints` is). `anchor` always counts as a
    sibling; GravlensError for fewer than 3.

    Examples:
        >>> others = [gl.Checkpoint(name, name) for name in ("sibling", "sibling2")]
        >>> states = gl.cache_residuals(seq, checkpoints=[*seq, *others])
        >>> ratio = gl.controls.anchor_ratio(states, siblings=["sibling", "sibling2"], layers=[0, 1], draws=99, rng=rng)
        >>> ratio.expected_cosine.shape, ratio.draws.shape
        ((2,), (99, 2))
    """
    check_states(residuals)
    names = tuple(dict.fromkeys(["anchor", *siblings]))
    if len(names) < MIN_SIBLINGS:
        wanted = f"A variance over alignment seeds needs at least {MIN_SIBLINGS}, the anchor counted."
        remedy = "align the witness with further seeds: Checkpoint(name, folder) of each when states are cached."
        raise GravlensError(f"{len(names)} siblings were given ({', '.join(names)}).", wanted, remedy)
    states = np.stack([mean_state(residuals, name, layers) for name in names])  # [sibling, layer, d]
    squares = ((mean_state(residuals, "witness", layers) - states) ** 2).sum(-1)
    pairs = np.array(list(combinations(range(len(names)), 2)))
    apart = ((states[pairs[:, 0]] - states[pairs[:, 1]]) ** 2).sum(-1) / 2  # each pair's unbiased variance
    # Dirichlet weights: a resample of three siblings can be one sibling thrice, which has no variance
    weights = np.vstack([np.full(len(names), 1 / len(names)), rng.dirichlet(np.ones(len(names)), draws)])
    shared = weights[:, pairs[:, 0]] * weights[:, pairs[:, 1]]
    variance, distance = shared @ apart / shared.sum(1, keepdims=True), weights @ squares
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = (variance / distance).clip(0, 1)  # by few siblings the variance can exceed the distance
        r = cosine[0] / (1 - cosine[0])
    return AnchorRatio(tuple(layers), r, cosine[0], cosine[1:], names)


def independent_endpoints(
    residuals: Residuals,
    siblings: Sequence[str],
    *,
    steps: Sequence[int],
    draws: int,
    rng: Generator,
    layers: Sequence[int] | None = None,
) -> NullDraws:
    """Cosines of endpoints that share the anchor with v_rev and nothing else, equal at every step.

    An endpoint e is as far from the mean m of all alignments as the witness, in the direction of a random mixture of
    the anchor's centred states over prompts, one for all layers. A draw is cos(e − a, w − a): its mean is about
    r/(1 + r), and it spreads as single endpoints do. `anchor_ratio`'s own draws spread only as that estimate does, and
    so are no null. The draws of m and of the distance include that few siblings and one witness estimate them
    (docs/controls.md). Arguments as `anchor_ratio`; `layers` defaults to all of the residuals', `steps` are those that
    the null serves; GravlensError for one prompt.

    Examples:
        >>> others = [gl.Checkpoint(name, name) for name in ("sibling", "sibling2")]
        >>> states = gl.cache_residuals(seq, checkpoints=[*seq, *others])
        >>> null = gl.controls.independent_endpoints(states, ["sibling", "sibling2"], steps=[20], draws=99, rng=rng)
        >>> null.cosines.shape
        (99, 1, 3)
    """
    check_states(residuals)
    layers = residuals.layers if layers is None else tuple(layers)
    names = anchor_ratio(residuals, siblings=siblings, layers=layers, draws=1, rng=rng).siblings
    anchors = np.stack([mean_state(residuals, name, layers) for name in names])
    witness, k = mean_state(residuals, "witness", layers), len(names)
    variance = anchors.var(0, ddof=1).sum(-1)
    square = (((witness - anchors) ** 2).sum(-1).mean(0) - variance).clip(min=0)  # of the witness from m, unbiased
    states = residuals.of("anchor")[:, [residuals.layers.index(layer) for layer in layers]]
    drawn = draws_by_layer(states, draws=2 * draws, rng=rng, shrunk=False)
    cosines = np.empty((draws, len(steps), len(layers)))
    for i, mixtures in enumerate(drawn):
        length = (mixtures**2).sum(-1)
        # m is estimated by the siblings and the witness, each weighted by its precision: the rest is uncertain.
        weight = variance[i] / (k * square[i] + variance[i]) if variance[i] else 0.0
        centre = (1 - weight) * anchors[:, i].mean(0) + weight * witness[i]
        # The witness's distance is one draw as well, as long or short as the second half's mixtures turn out.
        spread = square[i] / (length[draws:] / length.mean()) + (1 - weight) * variance[i] / k
        ends = centre + np.sqrt(spread / length.mean())[:, None] * mixtures[:draws] - anchors[0, i]
        towards = witness[i] - anchors[0, i]
        cosines[:, :, i] = (ends @ towards / np.linalg.norm(ends, axis=1) / np.linalg.norm(towards))[:, None]
    return NullDraws("independent_endpoints", cosines, tuple(steps), layers)


def closure(
    runs: Residuals,
    twins: Residuals,
    directions: Directions,
    *,
    pairs: Sequence[tuple[str, str]],
    layers: Sequence[int],
) -> ByLayer:
    """Share of the gap between a run and its unaligned twin that has closed.

    closure(t) = 1 − ⟨h(W_t) − h(θ_t), v_rev⟩ / distance: 0 where the same data moves both alike, 1 where the run has
    reached its twin; above 0 is reversion beyond the common drift. GravlensError where their steps differ.

    Args:
        runs: residuals with `anchor` and the runs.
        twins: residuals with `witness` and the twins, on the same prompts.
        directions: v_rev.
        pairs: (run, twin) names, trained on the same data.
        layers: layers of the mean.

    Examples:
        >>> runs = {"twin0": "ft/seed1/checkpoint-*"}  # stands for the witness fine-tuned on the data of seed0
        >>> twins = gl.ModelSequence.from_folders(witness="base", anchor="aligned", runs=runs, probes="probes.jsonl")
        >>> states = gl.cache_residuals(twins)
        >>> gl.controls.closure(given, states, vs, pairs=[("seed0", "twin0")], layers=[0, 1]).layer_mean.step.tolist()
        [1, 5, 20]
    """
    chosen = directions.at(layers)
    # from the states: the twin's residuals hold no anchor to take a drift from
    gap = mean_state(twins, "witness", layers) - mean_state(runs, "anchor", layers)
    parts = []
    for run, twin in pairs:
        if runs.runs.get(run) != twins.runs.get(twin):
            given = f"{run} has steps {runs.runs.get(run)}, its twin {twin} {twins.runs.get(twin)}."
            raise GravlensError(given, "Run and twin are paired by step.", "the same save_steps for both.")
        twin_drift = drifts(from_start(twins, start="witness"), twin, layers)
        apart = gap + twin_drift - drifts(runs, run, layers)
        left = einsum(apart, chosen.vectors.astype(np.float64), "step layer d, layer d -> step layer")
        axes = {"run": [run], "step": list(runs.runs[run]), "layer": list(layers)}
        closed = (1 - left / chosen.distances)[None]
        parts.append(ByLayer.of(xarray.Dataset({"closure": (tuple(axes), closed)}, axes)))
    return ByLayer.concat(parts)
