"""Decompose motion: a drift over directions, ancestors, layers and positions; an update over the weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import xarray
from jaxtyping import Float
from numpy.random import Generator
from scipy.optimize import nnls
from torch import Tensor

from gravlens.activations.residuals import Residuals, check_states, substitute
from gravlens.core.errors import GravlensError, as_list
from gravlens.directions.direction import Direction, Directions, Span, Spans, Subspaces
from gravlens.directions.subspaces import (
    NOTHING_LEFT,
    drift_subspaces,
    leading_components,
    orthogonal_part,
    random_like,
    share_within,
    whole_state,
)
from gravlens.directions.trajectory import ByLayer, drift_per_prompt, drifts, judged_from, measure_drift, runs_of
from gravlens.directions.vrev import locate_vrev
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Resolved
from gravlens.models.opening import OpenModel
from gravlens.models.precision import check_unquantised
from gravlens.models.swapping import open_each

__all__ = ["ancestor_pull", "candidate_spans", "leak_map", "rank_table", "split_drift", "split_update"]


OWN, REST, WHOLE = "top_components", "rest", "all"
NO_ANGLE = 0.1  # degrees: a drift closer to v_rev has no orthogonal part but rounding


def split_drift(
    residuals: Residuals, parts: Mapping[str, Spans], *, components: int = 3, layers: Sequence[int] | None = None
) -> ByLayer:
    """Split each drift h(θ_t) − h(anchor) by orthogonal projection, in the order of `parts`.

    What two parts share goes to the first. After the parts come the run's own leading components (right singular
    vectors of the per-prompt drifts of all its steps, not centred), then the rest. The mean drift lies close to its own
    components by construction: their share is no finding about them.

    Args:
        residuals: hold `anchor` and the runs.
        parts: name -> one direction or subspace per layer, v_rev first: `{"v_rev": vs, "refusal": refusal}`.
        components: number of the run's own components; 0 omits that part.
        layers: default: those where every part is defined.

    Returns:
        `run, step, layer, part` (those given, `top_components`, `rest`), `share` (of ‖drift‖²; NaN without drift).

    Examples:
        >>> parts = gl.decomposition.split_drift(held_out, {"v_rev": vs})
        >>> parts.table.part.unique().tolist()
        ['v_rev', 'top_components', 'rest']
    """
    check_states(residuals)
    if taken := {OWN, REST} & parts.keys():
        raise GravlensError(f"A part is called {taken.pop()!r}.", f"{OWN} and {REST} are added.", "another name.")
    chosen = _layers(residuals, parts) if layers is None else tuple(layers)
    names = [*parts, *([OWN] if components else []), REST]
    results = []
    for run, steps in runs_of(residuals).items():
        mean = drifts(residuals, run, chosen)
        each = np.concatenate([drift_per_prompt(residuals, f"{run}/{step}", chosen) for step in steps])
        # the order decides: shared variance goes to the first
        spans = [[_basis(name, part, layer) for name, part in parts.items()] for layer in chosen]
        if components:
            with np.errstate(invalid="ignore"):  # a run that does not move has components without shares
                spans = [[*rows, leading_components(each[:, i], rank=components)[0]] for i, rows in enumerate(spans)]
        shares = np.stack([_shares(mean[:, i], rows) for i, rows in enumerate(spans)], axis=1)
        axes = {"run": [run], "step": list(steps), "layer": list(chosen), "part": names}
        results.append(ByLayer.of(xarray.Dataset({"share": (tuple(axes), shares[None])}, axes)))
    return ByLayer.concat(results)


def _shares(
    drift: Float[np.ndarray, "step d_model"], spans: Sequence[Float[np.ndarray, "rank d_model"]]
) -> Float[np.ndarray, "step part"]:
    """Shares of the squared length in each span beyond the previous ones, and of the rest."""
    taken, left, lengths = np.empty((0, drift.shape[1])), drift, []
    for span in spans:
        _, sizes, rows = np.linalg.svd(span - span @ taken.T @ taken, full_matrices=False)
        taken = np.vstack([taken, rows[sizes > NOTHING_LEFT]])  # a part within the earlier ones adds nothing
        before, left = left, drift - drift @ taken.T @ taken
        lengths.append(((before - left) ** 2).sum(1))
    lengths.append((left**2).sum(1))
    with np.errstate(invalid="ignore"):
        return np.stack(lengths, axis=1) / (drift**2).sum(1, keepdims=True)


def _basis(name: str, part: Spans, layer: int) -> Float[np.ndarray, "rank d_model"]:
    basis = part[layer].basis.astype(np.float64)
    if not np.isfinite(basis).all():
        raise _nowhere(name, [layer])
    return basis


def ancestor_pull(residuals: Residuals, witnesses: Sequence[str], *, layers: Sequence[int] | None = None) -> ByLayer:
    """Which of several ancestors pulls: min over c ≥ 0 of ‖drift − Σ_i c_i (h(W_i) − h(anchor))‖, per drift.

    Non-negative least squares (Lawson & Hanson 1974, scipy): a coefficient is the fraction of the way to that ancestor,
    0 where the drift leads away from it. Nearly collinear ancestors share their sum arbitrarily: where `condition` is
    large read the sum, or each ancestor alone. The anchor's own excursion raises every coefficient. `witnesses` are
    names of checkpoints in the residuals; GravlensError for one that equals the anchor at a layer.

    Returns:
        `run, step, layer, witness, coefficient, explained` (share of ‖drift‖² explained by the fit; NaN without drift),
        `condition` (of the unit directions: 1 orthogonal, large collinear; `.layer_mean` has the largest).

    Examples:
        >>> pull = gl.decomposition.ancestor_pull(held_out, ["witness"])
        >>> pull.layer_mean.run.unique().tolist()
        ['seed0', 'seed1']
    """
    check_states(residuals)
    if not witnesses or len(set(witnesses)) < len(witnesses):
        raise GravlensError(f"The witnesses {list(witnesses)} were given.", "Each is named once.", "their names.")
    found = {name: locate_vrev(substitute(residuals, witness=name)) for name in witnesses}
    chosen = _layers(residuals, found) if layers is None else tuple(layers)
    unit = [np.concatenate([_basis(name, vs, layer) for name, vs in found.items()]) for layer in chosen]
    lengths = [[vs[layer].distance for vs in found.values()] for layer in chosen]
    conditions = np.array([np.linalg.cond(rows) for rows in unit])
    results = []
    for run, steps in runs_of(residuals).items():
        mean = drifts(residuals, run, chosen)
        # full length: a coefficient is a fraction of the way
        ways = [rows * np.array(length)[:, None] for rows, length in zip(unit, lengths, strict=True)]
        pulls = np.array([[nnls(way.T, one)[0] for way, one in zip(ways, step, strict=True)] for step in mean])
        fitted = np.einsum("slw,lwd->sld", pulls, np.stack(ways))
        with np.errstate(invalid="ignore"):
            explained = 1 - ((mean - fitted) ** 2).sum(2) / (mean**2).sum(2)
        axes = {"run": [run], "step": list(steps), "layer": list(chosen), "witness": list(witnesses)}
        data = {"coefficient": (tuple(axes), pulls[None]), "explained": (tuple(axes)[:3], explained[None])}
        found = ByLayer.of(xarray.Dataset({**data, "condition": ("layer", conditions)}, axes))
        # the fit is as arbitrary as it is at its worst layer: a mean would hide it
        results.append(replace(found, layer_mean=found.layer_mean.assign(condition=conditions.max())))
    return ByLayer.concat(results)


def split_update(
    anchor: Checkpoint | Resolved,
    witness: Checkpoint | Resolved,
    checkpoints: Iterable[Checkpoint | Resolved],
    *,
    shared: bool = False,
) -> pd.DataFrame:
    """Decompose each update θ_t − θ_anchor along the task vector θ_witness − θ_anchor, tensor by tensor.

    The task vector is that of Ilharco et al., "Editing models with task arithmetic" (2022), reversed. One model is open
    at a time; with the anchor's weights and the task vector that makes three times the weights. `shared`: only tensors
    that all three share by name and shape (a vocabulary grew, embeddings were untied). GravlensError for a model that
    is quantised, no plain Hugging Face model, or has other parameters than the anchor.

    Returns:
        One row per checkpoint × parameter tensor, and `all`: `checkpoint, step, tensor, cosine, fraction` (of the task
        vector: 0 the anchor, 1 the witness), `share_parallel`, `share_orthogonal` (of ‖update‖², along and across that
        tensor's task vector), `norm` (of the update). NaN without update or task vector.

    Examples:
        >>> table = gl.decomposition.split_update(seq.anchor, seq.witness, seq.runs["seed0"])
        >>> table.columns.tolist()[:3]
        ['checkpoint', 'step', 'tensor']
    """
    # clone: the opened model is closed, or swapped in place, before the next
    opened = open_each([anchor, witness, *checkpoints], through="huggingface")
    start = {name: weight.clone() for name, weight in _weights(*next(opened), {}).items()}
    way = {name: weight - start[name] for name, weight in _weights(*next(opened), start, shared).items()}
    rows = []
    for checkpoint, model in opened:
        weights = _weights(checkpoint, model, way, shared)
        products = np.array([_products(weight - start[name], way[name]) for name, weight in weights.items()])
        # the products add up over tensors, so the whole needs no second pass
        table = _measured(np.vstack([products.sum(0), products]))
        names = pd.DataFrame({"checkpoint": checkpoint.name, "step": checkpoint.step, "tensor": [WHOLE, *weights]})
        rows.append(names.join(table))
    if not rows:
        raise GravlensError("No checkpoint was given.", "An update leads to a checkpoint.", "the runs' checkpoints.")
    # nullable: not every checkpoint is a run's step
    return pd.concat(rows, ignore_index=True).astype({"step": "Int64"})


def _weights(
    checkpoint: Checkpoint, model: OpenModel, like: Mapping[str, Tensor], shared: bool = False
) -> dict[str, Tensor]:
    check_unquantised(model.module, "An update")
    weights = {name: weight.detach() for name, weight in model.module.named_parameters()}
    if shared and (both := {n: w for n, w in weights.items() if n in like and w.shape == like[n].shape}):
        weights, like = both, {name: like[name] for name in both}
    shapes = [{name: tuple(weight.shape) for name, weight in some.items()} for some in (weights, like)]
    if not model.family.own_tensors or (like and shapes[0] != shapes[1]):
        apart = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[:1]
        raise GravlensError(
            f"{checkpoint.name} ({checkpoint.described}) is a {type(model.module).__name__}"
            + (f" with another {apart[0][0]} than the anchor." if like and apart else "."),
            "Weights are compared tensor by tensor, between Hugging Face models of one shape.",
            "checkpoints of one history; an adapter's merged model (merge_and_unload()).",
        )
    return weights


def _products(update: Tensor, way: Tensor) -> tuple[float, ...]:
    """⟨u, w⟩, ⟨u, u⟩, ⟨w, w⟩ in fp64."""
    pairs = ((update, way), (update, update), (way, way))
    return tuple(float((one * other).sum(dtype=torch.float64)) for one, other in pairs)


def _measured(products: Float[np.ndarray, "tensor 3"]) -> pd.DataFrame:
    along, update, way = products.T
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine, fraction = along / np.sqrt(update * way), along / way
    columns = {"cosine": cosine, "fraction": fraction, "share_parallel": cosine**2, "share_orthogonal": 1 - cosine**2}
    return pd.DataFrame({**columns, "norm": np.sqrt(update)})


def _layers(residuals: Residuals, parts: Mapping[str, Spans]) -> tuple[int, ...]:
    """The layers where every part is defined."""
    chosen = residuals.layers
    for name, part in parts.items():
        has = {one.layer for one in part if np.isfinite(one.basis).all()}
        if not (left := tuple(layer for layer in chosen if layer in has)):
            raise _nowhere(name, chosen)
        chosen = left
    return chosen


def _nowhere(name: str, layers: Sequence[int]) -> GravlensError:
    given = f"{name} is undefined at layer {', '.join(map(str, layers))}."
    wanted = "Every part and ancestor needs a direction at every layer."
    return GravlensError(given, wanted, "layers=[…] where it has one, or leave it out.")


def leak_map(given: Sequence[Residuals], held_out: Sequence[Residuals] = ()) -> pd.DataFrame:
    """Map where each checkpoint moved: over layers, token positions, and prompts that a block has not seen.

    `given` are residuals on the probes, one per position, `held_out` the same on other prompts. v_rev is located per
    position on the given prompts and used on both sets (docs/leaks.md).

    Returns:
        One row per run × step × layer × position × prompt set (`given`, `held_out`): `alignment`, `fraction` as in
        `follow`; in distances `drift_norm`, the length of the mean drift, and `drift_rms`, the root mean square of the
        prompts' own, in which opposite motions do not cancel; `judged` (as in `follow`); `share_along_vrev` of the
        per-prompt drifts' summed squared length; `refit_angle`, degrees between v_rev and the direction from this
        checkpoint to the witness, on the row's own prompts.

    Examples:
        >>> moved = gl.decomposition.leak_map([gl.cache_residuals(seq, positions=at) for at in (-1, -2)])
        >>> moved.position.unique().tolist()
        [-1, -2]
    """
    located, others = _by_position(given), _by_position(held_out)
    same = any(one.prompts == located[position].prompts for position, one in others.items() if position in located)
    if same or not located or not others.keys() <= located.keys():
        raise GravlensError(
            f"Given positions: {sorted(located)}; {'the same prompts' if same else 'held out'} at {sorted(others)}.",
            "Each held-out position needs v_rev there, located on other prompts.",
            "cache_residuals(sequence, positions=…) at each position, for both sets of prompts.",
        )
    frames = []
    for position, states in located.items():
        vs = locate_vrev(states).defined()
        sets = {"given": states} | ({"held_out": others[position]} if position in others else {})
        for prompts, residuals in sets.items():
            for run, steps in runs_of(residuals).items():
                tables = (_leaks(residuals, run, step, vs) for step in steps)
                frames += [table.assign(position=position, prompts=prompts) for table in tables]
    table = pd.concat(frames, ignore_index=True)
    first = ["run", "step", "layer", "position", "prompts"]
    return table[[*first, *table.columns.drop(first)]]


def _leaks(residuals: Residuals, run: str, step: int, vs: Directions) -> pd.DataFrame:
    checkpoint = f"{run}/{step}"
    drift = drift_per_prompt(residuals, checkpoint, vs.layers)
    to_witness = drift_per_prompt(residuals, "witness", vs.layers, start=checkpoint)
    mean, each_prompt = measure_drift(drift.mean(0), vs), measure_drift(drift, vs)
    # rounding may pass 1, of which arccos is NaN
    refit = np.clip(measure_drift(to_witness.mean(0), vs)["alignment"], -1, 1)
    square = (each_prompt["drift_norm"] ** 2).mean(0)
    with np.errstate(invalid="ignore"):  # no drift has no share along v_rev
        share = (each_prompt["projection"] ** 2).mean(0) / square
    length, rms = mean["drift_norm"] / vs.distances, np.sqrt(square) / vs.distances
    return pd.DataFrame(
        {"run": run, "step": step, "layer": vs.layers, "alignment": mean["alignment"], "fraction": mean["fraction"],
         "drift_norm": length, "drift_rms": rms, "judged": mean["drift_norm"] > judged_from(vs, residuals),
         "share_along_vrev": share, "refit_angle": np.degrees(np.arccos(refit))}
    )  # fmt: skip


def _by_position(several: Sequence[Residuals]) -> dict[int, Residuals]:
    """Residuals by position (−1 is the last prompt token)."""
    several = [check_states(one) for one in as_list(several)]
    positions = [one.meta.get("positions", "last") for one in several]
    found = dict(zip([-1 if p == "last" else int(p) for p in positions], several, strict=True))
    if len(found) < len(several):
        given = f"Residuals at positions {positions} were given."
        raise GravlensError(given, "Each position may occur once.", "leave one out.")
    return found


def candidate_spans(
    residuals: Residuals,
    directions: Directions,
    *,
    fit_on: Sequence[str],
    ranks: Sequence[int] = (1, 2, 4, 16),
    refusal: Directions | None = None,
    n_random: int = 1,
    rng: Generator,
) -> dict[str, list[Spans]]:
    """Fit spans that may hold what fine-tuning did on some runs, to be tested on others (docs/leaks.md).

    Args:
        residuals: of the anchor and of `fit_on`, on the given prompts.
        directions: v_rev, for layers and distances.
        fit_on: `"{run}/{step}"`, of other runs than the tested ones.
        ranks: numbers of leading components of the per-prompt drift.
        refusal: a refusal direction at the same layers.
        n_random: random spans of each rank and kind.

    Returns:
        Kind -> spans: `v_rev`; `drift` and `drift_orthogonal` (to v_rev, at the layers where anything is left) of each
        rank; `refusal`; `isotropic`, `covariance_matched` of the drifts' ranks; `whole_state`.

    Examples:
        >>> spans = gl.decomposition.candidate_spans(given, vs, fit_on=["seed1/20"], ranks=(1, 2), rng=rng)
        >>> "v_rev" in spans and "drift" in spans
        True
    """
    check_states(residuals)
    vs = directions.defined()
    # on other runs: a run's own components fit it by construction
    drift = [drift_subspaces(residuals, vs, at=fit_on, rank=rank) for rank in ranks]
    anchor = residuals.of("anchor")[:, [residuals.layers.index(layer) for layer in vs.layers]]
    draws = range(n_random)
    found: dict[str, list[Spans]] = {
        "v_rev": [vs],
        "drift": [*drift],
        "drift_orthogonal": [part for spaces in drift if len(part := _without(spaces, vs))],
        "refusal": [] if refusal is None else [refusal.at(vs.layers)],
        "isotropic": [random_like(spaces, rng=rng) for spaces in drift for _ in draws],
        "covariance_matched": [random_like(spaces, rng=rng, states=anchor) for spaces in drift for _ in draws],
        "whole_state": [whole_state(vs)],
    }
    return {kind: spans for kind, spans in found.items() if spans}


def _without(spaces: Subspaces, vs: Directions) -> Subspaces:
    """The part orthogonal to v_rev, at the layers that have one."""
    apart = [space.layer for space in spaces if space.rank > 1 or _angle(space, vs[space.layer]) > NO_ANGLE]
    return orthogonal_part(spaces.at(apart), vs)


def rank_table(
    residuals: Residuals,
    spans: Mapping[str, Sequence[Spans]],
    *,
    directions: Directions,
    at: Sequence[str],
    refusal: Directions | None = None,
) -> ByLayer:
    """Share of a run's drift in spans that were fitted without it, on other prompts.

    Args:
        residuals: of the anchor and of `at`.
        spans: kind -> spans, e.g. from `candidate_spans`.
        directions: v_rev.
        at: the tested checkpoints, `"{run}/{step}"`.
        refusal: a refusal direction at the same layers.

    Returns:
        One row per checkpoint × span × layer: `run`, `step`, `span` (its kind), `rank`, `fitted_on`, `layer`, `share`
        (of the summed squared length of the per-prompt drifts; k / d_model for an isotropic span of rank k),
        `angle_vrev`, `angle_refusal` (degrees; 0: within the span). `.layer_mean` is over the span's own layers.

    Examples:
        >>> spans = gl.decomposition.candidate_spans(given, vs, fit_on=["seed1/20"], ranks=(1, 2), rng=rng)
        >>> table = gl.decomposition.rank_table(held_out, spans, directions=vs, at=["seed0/20"]).table
        >>> table.run.unique().tolist()
        ['seed0']
    """
    check_states(residuals)
    results = []
    for checkpoint in at:
        run, _, step = checkpoint.rpartition("/")
        for kind, several in spans.items():
            for one in several:
                fitted_on = ", ".join(next(iter(one)).made_from.get("checkpoints", ()))
                facts = {"run": run, "step": int(step), "span": kind, "rank": rank_of(one), "fitted_on": fitted_on}
                rows = _ranks(residuals, checkpoint, one, directions, refusal)
                means = rows.drop(columns="layer").mean().to_frame().T  # skips NaN: no drift at that layer
                results.append(ByLayer(*(pd.DataFrame(facts, index=some.index).join(some) for some in (rows, means))))
    return ByLayer.concat(results)


def rank_of(spans: Spans) -> int:
    """Largest rank over the layers."""
    return max(len(span.basis) for span in spans)


def _ranks(
    residuals: Residuals, checkpoint: str, spans: Spans, directions: Directions, refusal: Directions | None
) -> pd.DataFrame:
    drift = drift_per_prompt(residuals, checkpoint, spans.layers)
    return pd.DataFrame(
        {
            "layer": span.layer,
            "share": share_within(drift[:, i], span) if drift[:, i].any() else np.nan,
            "angle_vrev": _angle(span, directions[span.layer]),
            "angle_refusal": np.nan if refusal is None else _angle(span, refusal[span.layer]),
        }
        for i, span in enumerate(spans)
    )


def _angle(span: Span, direction: Direction) -> float:
    """Degrees between a direction and a span (the principal angle, without an SVD of the whole state)."""
    basis, vector = span.basis.astype(np.float64), direction.vector.astype(np.float64)
    inside = basis @ vector  # arctan2, for the arccos of a cosine near 1 loses half of its digits
    return float(np.degrees(np.arctan2(np.linalg.norm(vector - inside @ basis), np.linalg.norm(inside))))
