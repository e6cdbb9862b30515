"""Where the motion goes: a drift over named directions, over several ancestors; an update over the weights."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.optimize import nnls
from torch import Tensor

from gravlens.checkpoints import Checkpoint
from gravlens.controls import substitute
from gravlens.directions import locate_vrev
from gravlens.errors import GravlensError
from gravlens.models import OpenModel
from gravlens.precision import check_unquantised
from gravlens.residuals import Residuals
from gravlens.subspaces import NOTHING_LEFT, Spans, leading_components
from gravlens.swapping import open_each
from gravlens.trajectory import drift_per_prompt, drifts

OWN, REST, WHOLE = "top_components", "rest", "all"


# --- the drift over directions ----------------------------------------------------------------------------------


def split_drift(
    residuals: Residuals, parts: Mapping[str, Spans], *, components: int = 3, layers: Sequence[int] | None = None
) -> pd.DataFrame:
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
        Columns `run, step, layer` (`<NA>`: the mean over the layers), `part, share` (of ‖drift‖²; 1 in sum over parts,
        NaN where there is no drift). Parts are those given, `top_components` and `rest`.

    Raises:
        GravlensError: no run, a part that is undefined at a layer or has a name of ours, more components than drifts.
    """
    if taken := {OWN, REST} & parts.keys():
        raise GravlensError(f"A part is called {taken.pop()!r}.", f"{OWN} and {REST} are added.", "another name.")
    chosen = _layers(residuals, parts) if layers is None else tuple(layers)
    names = [*parts, *([OWN] if components else []), REST]
    frames = []
    for run, steps in _runs(residuals).items():
        mean = drifts(residuals, run, chosen)
        each = np.concatenate([drift_per_prompt(residuals, f"{run}/{step}", chosen) for step in steps])
        spans = [[_basis(name, part, layer) for name, part in parts.items()] for layer in chosen]
        if components:
            spans = [[*rows, _components(each[:, i], components)] for i, rows in enumerate(spans)]
        shares = np.stack([_shares(mean[:, i], rows) for i, rows in enumerate(spans)], axis=1)
        frames.append(_tidy(run, steps, chosen, {"part": names, "share": shares}))
    return pd.concat(frames, ignore_index=True)


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


def ancestor_pull(
    residuals: Residuals, witnesses: Sequence[str], *, layers: Sequence[int] | None = None
) -> pd.DataFrame:
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
        Columns `run, step, layer` (`<NA>`: the mean over the layers), `witness`, `coefficient`, `explained` (share of
        ‖drift‖² that the whole fit explains; NaN without drift), `condition` (condition number of the directions at
        unit length: 1 orthogonal, large collinear; at `<NA>` the largest).

    Raises:
        GravlensError: no run, no witness, one twice, or one that does not differ from the anchor at a layer.
    """
    if not witnesses or len(set(witnesses)) < len(witnesses):
        raise GravlensError(f"The witnesses {list(witnesses)} were given.", "Each is named once.", "their names.")
    found = {name: locate_vrev(substitute(residuals, witness=name)) for name in witnesses}
    chosen = _layers(residuals, found) if layers is None else tuple(layers)
    unit = [np.concatenate([_basis(name, vs, layer) for name, vs in found.items()]) for layer in chosen]
    lengths = [[vs[layer].distance for vs in found.values()] for layer in chosen]
    conditions = np.array([np.linalg.cond(rows) for rows in unit])
    frames = []
    for run, steps in _runs(residuals).items():
        mean = drifts(residuals, run, chosen)
        ways = [rows * np.array(length)[:, None] for rows, length in zip(unit, lengths, strict=True)]
        pulls = np.array([[nnls(way.T, one)[0] for way, one in zip(ways, step, strict=True)] for step in mean])
        fitted = np.einsum("slw,lwd->sld", pulls, np.stack(ways))
        with np.errstate(invalid="ignore"):
            explained = 1 - ((mean - fitted) ** 2).sum(2) / (mean**2).sum(2)
        columns = {"witness": list(witnesses), "coefficient": pulls, "explained": _spread(explained, pulls.shape)}
        table = _tidy(run, steps, chosen, columns)
        at = {**dict(zip(chosen, conditions, strict=True)), pd.NA: conditions.max()}
        frames.append(table.assign(condition=[at[layer] for layer in table["layer"]]))
    return pd.concat(frames, ignore_index=True)


def _spread(values: Float[np.ndarray, "step layer"], shape: tuple[int, ...]) -> Float[np.ndarray, "step layer part"]:
    return np.broadcast_to(values[..., None], shape)


# --- the update over the weights --------------------------------------------------------------------------------


def split_update(
    anchor: Checkpoint, witness: Checkpoint, checkpoints: Iterable[Checkpoint], *, shared: bool = False
) -> pd.DataFrame:
    """How much of each update θ_t − θ_anchor lies along the task vector θ_witness − θ_anchor, tensor by tensor.

    The task vector is that of Ilharco et al., "Editing models with task arithmetic" (2022), taken back. One model is
    open at a time; beside it the anchor's weights and the task vector are kept, three times the weights in all.

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
        GravlensError: a model that is no plain Hugging Face model, or has other parameters than the anchor (with
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
    if model.kind != "huggingface" or (like and shapes[0] != shapes[1]):
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


def _runs(residuals: Residuals) -> dict[str, tuple[int, ...]]:
    if not residuals.runs:
        raise GravlensError(
            f"These residuals hold no run ({', '.join(residuals.checkpoints)}).",
            "What is split is the drift of a checkpoint of a run.",
            'runs={"seed0": "ft/checkpoint-*"} in the sequence.',
        )
    return residuals.runs


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


def _tidy(
    run: str, steps: Sequence[int], layers: Sequence[int], columns: Mapping[str, Sequence[str] | np.ndarray]
) -> pd.DataFrame:
    """Names of parts and values [step, layer, part] as rows; the mean over layers is appended."""
    ((kind, names), *values) = columns.items()
    rows = product(steps, [*layers, pd.NA], names)
    table = pd.DataFrame([(run, *row) for row in rows], columns=["run", "step", "layer", kind])
    for name, numbers in values:
        numbers = np.asarray(numbers)
        table[name] = np.concatenate([numbers, numbers.mean(1, keepdims=True)], axis=1).ravel()
    return table.astype({"layer": "Int64"})
