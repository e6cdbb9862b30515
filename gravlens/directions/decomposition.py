"""Where the motion goes: a drift over named directions, over several ancestors; an update over the weights."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
import xarray
from jaxtyping import Float
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
from gravlens.directions.trajectory import JUDGED_FROM, ByLayer, drift_per_prompt, drifts, measure_drift, runs_of
from gravlens.directions.vrev import locate_vrev
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Resolved
from gravlens.models.opening import OpenModel
from gravlens.models.precision import check_unquantised
from gravlens.models.swapping import open_each

OWN, REST, WHOLE = "top_components", "rest", "all"


# --- the drift over directions ----------------------------------------------------------------------------------
def split_drift(
    residuals: Residuals, parts: Mapping[str, Spans], *, components: int = 3, layers: Sequence[int] | None = None
) -> ByLayer:
    """Split each drift h(θ_t) − h(anchor) by orthogonal projection, in the order of `parts`.

    A part counts with what is orthogonal to the parts before it, so what two parts share goes to the first. After the
    parts come the run's own leading components (right singular vectors of the per-prompt drifts of all its steps, not
    centred), then the rest. The mean drift lies close to its own components by construction: read that share as
    what few directions hold beyond the parts, not as a finding about them.

    Args:
        residuals: hold `anchor` and the runs.
        parts: name -> one direction or subspace a layer, v_rev first: `{"v_rev": vs, "refusal": refusal}`.
        components: how many of the run's own components; 0 leaves that part out.
        layers: which ones (default: those where every part is defined).

    Returns:
        `.table` with columns `run, step, layer, part, share` (of ‖drift‖²; 1 in sum over parts, NaN where there is no
        drift), `.layer_mean` without `layer`. Parts are those given, `top_components` and `rest`.

    Raises:
        GravlensError: no run, a part that is undefined at a layer or has a reserved name, more components than drifts.
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
        spans = [[_basis(name, part, layer) for name, part in parts.items()] for layer in chosen]
        if components:
            spans = [[*rows, _components(each[:, i], components)] for i, rows in enumerate(spans)]
        shares = np.stack([_shares(mean[:, i], rows) for i, rows in enumerate(spans)], axis=1)
        axes = {"run": [run], "step": list(steps), "layer": list(chosen), "part": names}
        results.append(ByLayer.of(xarray.Dataset({"share": (tuple(axes), shares[None])}, axes)))
    return ByLayer.concat(results)


def _components(drift: Float[np.ndarray, "drift d_model"], rank: int) -> Float[np.ndarray, "rank d_model"]:
    with np.errstate(invalid="ignore"):  # a run that does not move has components of no length, and no shares
        return leading_components(drift, rank=rank)[0]


def _shares(
    drift: Float[np.ndarray, "step d_model"], spans: Sequence[Float[np.ndarray, "rank d_model"]]
) -> Float[np.ndarray, "step part"]:
    """Shares of the squared length within each span beyond those before it, and of what is left."""
    taken, left, lengths = np.empty((0, drift.shape[1])), drift, []
    for span in spans:
        _, sizes, rows = np.linalg.svd(span - span @ taken.T @ taken, full_matrices=False)
        taken = np.vstack([taken, rows[sizes > NOTHING_LEFT]])
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


# --- the drift over ancestors -----------------------------------------------------------------------------------
def ancestor_pull(residuals: Residuals, witnesses: Sequence[str], *, layers: Sequence[int] | None = None) -> ByLayer:
    """Which of several ancestors pulls: min over c ≥ 0 of ‖drift − Σ_i c_i (h(W_i) − h(anchor))‖, for each drift.

    Non-negative least squares (Lawson & Hanson 1974, scipy) on directions of their full length: a coefficient is the
    part of the way to that ancestor. One that the drift leads away from gets 0. Ancestors that lie in nearly one
    direction share their sum in an arbitrary way, and often one of them gets all: look at `condition`, and where it
    is large at the sum, or at each ancestor by itself. Drift and directions subtract one anchor, whose own excursion
    raises every coefficient.

    Args:
        residuals: hold `anchor`, the runs and the witnesses.
        witnesses: names of checkpoints in them, `"witness"` among others.
        layers: which ones (default: those where every witness differs from the anchor).

    Returns:
        `.table` with columns `run, step, layer, witness, coefficient, explained` (share of ‖drift‖² that the whole fit
        explains; NaN without drift), `condition` (condition number of the directions at unit length: 1 orthogonal,
        large collinear); `.layer_mean` without `layer`, its `condition` the largest of any layer.

    Raises:
        GravlensError: no run, no witness, one twice, or one that does not differ from the anchor at a layer.
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


# --- the update over the weights --------------------------------------------------------------------------------
def split_update(
    anchor: Checkpoint | Resolved,
    witness: Checkpoint | Resolved,
    checkpoints: Iterable[Checkpoint | Resolved],
    *,
    shared: bool = False,
) -> pd.DataFrame:
    """How much of each update θ_t − θ_anchor lies along the task vector θ_witness − θ_anchor, tensor by tensor.

    The task vector is that of Ilharco et al., "Editing models with task arithmetic" (2022), taken back. One model is
    open at a time; the anchor's weights and the task vector are kept as well, three times the weights in all.

    Args:
        anchor: where the updates start.
        witness: where the task vector leads.
        checkpoints: where the updates lead.
        shared: over those tensors alone that all three share by name and shape, where a vocabulary grew or embeddings
            were untied on the way.

    Returns:
        One row per checkpoint × parameter tensor, `all` the whole: `checkpoint, step, tensor, cosine, fraction` (of the
        task vector: 0 the anchor, 1 as far as the witness), `share_parallel` and `share_orthogonal` (of ‖update‖²,
        along that tensor's own task vector and across it; `all` takes the one vector of all weights), `norm` (of the
        update). NaN where there is no update or no task vector.

    Raises:
        GravlensError: a model that is not a plain Hugging Face model, or has other parameters than the anchor (with
            `shared`: none of its parameters), or is quantised.
    """
    opened = open_each([anchor, witness, *checkpoints], through="huggingface")
    start = {name: weight.clone() for name, weight in _weights(*next(opened), {}).items()}
    way = {name: weight - start[name] for name, weight in _weights(*next(opened), start, shared).items()}
    rows = []
    for checkpoint, model in opened:
        weights = _weights(checkpoint, model, way, shared)
        products = np.array([_products(weight - start[name], way[name]) for name, weight in weights.items()])
        table = _measured(np.vstack([products.sum(0), products]))
        table.insert(0, "tensor", [WHOLE, *weights])
        table.insert(0, "step", checkpoint.step)
        table.insert(0, "checkpoint", checkpoint.name)
        rows.append(table)
    if not rows:
        raise GravlensError("No checkpoint was given.", "An update leads to a checkpoint.", "the runs' checkpoints.")
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
    """⟨u, w⟩, ⟨u, u⟩, ⟨w, w⟩, summed in fp64."""
    pairs = ((update, way), (update, update), (way, way))
    return tuple(float((one * other).sum(dtype=torch.float64)) for one, other in pairs)


def _measured(products: Float[np.ndarray, "tensor 3"]) -> pd.DataFrame:
    along, update, way = products.T
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine, fraction = along / np.sqrt(update * way), along / way
    columns = {"cosine": cosine, "fraction": fraction, "share_parallel": cosine**2, "share_orthogonal": 1 - cosine**2}
    return pd.DataFrame({**columns, "norm": np.sqrt(update)})


# --- tables -----------------------------------------------------------------------------------------------------
def _layers(residuals: Residuals, parts: Mapping[str, Spans]) -> tuple[int, ...]:
    """The residuals' layers where every part is defined."""
    chosen = residuals.layers
    for name, part in parts.items():
        has = {one.layer for one in part if np.isfinite(one.basis).all()}
        if not (left := tuple(layer for layer in chosen if layer in has)):
            raise _nowhere(name, chosen)
        chosen = left
    return chosen


def _nowhere(name: str, layers: Sequence[int]) -> GravlensError:
    return GravlensError(
        f"{name} is undefined at layer {', '.join(map(str, layers))}.",
        "Each part has a direction at each layer, and each ancestor differs from the anchor there.",
        "layers=[…] where it has one, or leave it out.",
    )


# A drift closer to v_rev than this (degrees) has no part orthogonal to it but rounding.
NO_ANGLE = 0.1


# --- where: layers, positions, prompts ----------------------------------------------------------------------------
def leak_map(given: Sequence[Residuals], held_out: Sequence[Residuals] = ()) -> pd.DataFrame:
    """Where each checkpoint has moved: over layers, token positions, and prompts that a block has not seen.

    v_rev is located at each position by itself, on the given prompts, and used on both sets (docs/leaks.md).

    Args:
        given: residuals of witness, anchor and the runs on the probes, one for each position.
        held_out: the same on other prompts, at the same positions.

    Returns:
        One row per run × step × layer × position × prompt set (`given`, `held_out`): `alignment` and `fraction` as in
        `follow`; `drift_norm` in units of the distance; `judged`, whether that is above 2 %; `share_along_vrev`, the
        part of the per-prompt drifts' summed squared length that lies along v_rev; `refit_angle`, degrees between
        v_rev and the direction estimated again, from this checkpoint to the witness, on the row's own prompts.

    Raises:
        GravlensError: no run, a position twice, held-out residuals of the same prompts or at other positions.
    """
    located, others = _by_position(given), _by_position(held_out)
    same = any(one.prompts == located[position].prompts for position, one in others.items() if position in located)
    if same or not located or not others.keys() <= located.keys():
        raise GravlensError(
            f"Given prompts were read at positions {sorted(located)}, {'the same' if same else 'held-out'} ones at "
            f"{sorted(others)}.",
            "v_rev is located at every position on the given prompts; the held-out ones are others.",
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
    refit = np.clip(measure_drift(to_witness.mean(0), vs)["alignment"], -1, 1)
    with np.errstate(invalid="ignore"):  # no drift has no share along v_rev
        share = (each_prompt["projection"] ** 2).sum(0) / (each_prompt["drift_norm"] ** 2).sum(0)
    length = mean["drift_norm"] / vs.distances
    return pd.DataFrame(
        {"run": run, "step": step, "layer": vs.layers, "alignment": mean["alignment"],
         "fraction": mean["fraction"], "drift_norm": length, "judged": length > JUDGED_FROM,
         "share_along_vrev": share, "refit_angle": np.degrees(np.arccos(refit))}
    )  # fmt: skip


def _by_position(several: Sequence[Residuals]) -> dict[int, Residuals]:
    """Position (−1 is the last prompt token) -> residuals."""
    several = [check_states(one) for one in as_list(several)]
    positions = [one.meta.get("positions", "last") for one in several]
    found = dict(zip([-1 if p == "last" else int(p) for p in positions], several, strict=True))
    if len(found) < len(several):
        raise GravlensError(
            f"Residuals at positions {positions} were given.", "Each position is there once.", "leave one out."
        )
    return found


# --- in which directions ------------------------------------------------------------------------------------------
def candidate_spans(
    residuals: Residuals,
    directions: Directions,
    *,
    fit_on: Sequence[str],
    ranks: Sequence[int] = (1, 2, 4, 16),
    refusal: Directions | None = None,
    n_random: int = 1,
    rng: np.random.Generator,
) -> dict[str, list[Spans]]:
    """Spans that may hold what fine-tuning did, fitted on some runs, to be tested on others (docs/leaks.md).

    Args:
        residuals: of the anchor and of the checkpoints of `fit_on`, on the given prompts.
        directions: v_rev; its layers and distances are used.
        fit_on: `"{run}/{step}"`, of other runs than those that are tested.
        ranks: how many leading components of their per-prompt drift.
        refusal: a refusal direction at the same layers.
        n_random: random spans of each rank and kind.
        rng: of the random spans.

    Returns:
        Kind -> spans: `v_rev`; `drift`, at each rank; `drift_orthogonal`, what is left of it without v_rev (a layer
        where nothing is left is left out); `refusal`; `isotropic` and `covariance_matched`, of the drifts' ranks;
        `whole_state`.

    Raises:
        GravlensError: a checkpoint or layer that is missing from the residuals, a rank above the number of drifts.
    """
    check_states(residuals)
    vs = directions.defined()
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
    """How much of a run's drift lies in spans that were fitted without it.

    Args:
        residuals: of the anchor and of the checkpoints of `at`; other prompts than the spans were fitted on.
        spans: kind -> spans, such as `candidate_spans` gives.
        directions: v_rev.
        at: the checkpoints that are tested, `"{run}/{step}"`.
        refusal: a refusal direction at the same layers.

    Returns:
        One row per checkpoint × span × layer: `run`, `step`, `span` (its kind), `rank`, `fitted_on`, `layer`, `share`
        (of the summed squared length of the per-prompt drifts; a random isotropic span of rank k holds k / d_model),
        `angle_vrev` and `angle_refusal` (degrees; 0: it lies within). `.layer_mean` is over the span's own layers.
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
                means = rows.drop(columns="layer").mean().to_frame().T  # skips NaN: the drift's own layers
                results.append(ByLayer(*(pd.DataFrame(facts, index=some.index).join(some) for some in (rows, means))))
    return ByLayer.concat(results)


def rank_of(spans: Spans) -> int:
    """The rank of spans: that of the largest layer's."""
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
    """Degrees between a direction and a span (the principal angle, without the SVD of a whole state)."""
    basis, vector = span.basis.astype(np.float64), direction.vector.astype(np.float64)
    inside = basis @ vector
    return float(np.degrees(np.arctan2(np.linalg.norm(vector - inside @ basis), np.linalg.norm(inside))))
