"""What prompt noise does to v_rev and drifts: cross-fitting, split-half reliability, the forward pass's own noise."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float

from gravlens.activations.residuals import BATCH, Residuals, check_states, read_residuals, residuals_of_batch
from gravlens.core.errors import GravlensError, check_layer
from gravlens.directions.trajectory import ByLayer, drift_per_prompt, runs_of
from gravlens.directions.vrev import locate_vrev, spearman_brown
from gravlens.history.prompts import PromptSet, encode, pad
from gravlens.models.opening import Openable, OpenModel, open_model

Halves = Float[np.ndarray, "half split prompt"]


def cross_fit(
    residuals: Residuals, *, layers: Sequence[int] | None = None, repeats: int, rng: np.random.Generator
) -> ByLayer:
    """Alignment and fraction with v_rev of one half of the prompts and the drift of the other, over random halves.

    Drift and v_rev both subtract the anchor's states, so on the same prompts they share its prompt noise, and correlate
    without any reversion. Halves share no prompt, hence no prompt noise. They do share the anchor: what its *training*
    did is common to all prompts, and stays in the cosine (a sibling anchor takes it out: `substitute`). Each half is
    noisier than the whole, which makes the cosine smaller: see `split_half_reliability`.

    Args:
        residuals: `witness`, `anchor` and runs on one set of prompts; v_rev is the difference of means.
        layers: default: all where v_rev is defined.
        repeats: random divisions; each is used both ways.
        rng: source of randomness.

    Returns:
        `.table` with columns `run, step, layer, alignment` (mean over the 2 · repeats splits), `alignment_sd` (over the
        splits: how much depends on which half; not a standard error, because splits overlap), `fraction`;
        `.layer_mean` without `layer`.

    Raises:
        GravlensError: fewer than 2 prompts, no repeats, no run, no layer where v_rev is defined.
    """
    check_states(residuals)
    runs_of(residuals)
    layers, halves = _defined_layers(residuals, layers), _halves(residuals, repeats, rng)
    ways = np.concatenate([halves, halves[::-1]], axis=1)  # [half, split and split the other way, prompt]
    towards = _means(ways[0], residuals, "witness", layers)
    distance = np.linalg.norm(towards, axis=-1)
    parts = []
    for checkpoint, run, step in _run_steps(residuals):
        drift = _means(ways[1], residuals, checkpoint, layers)
        cosines = _with_mean(_cosine(drift, towards))
        fractions = _with_mean(einsum(drift, towards, "split layer d, split layer d -> split layer") / distance**2)
        columns = {
            "alignment": cosines.mean(0),
            "alignment_sd": cosines.std(0, ddof=1),
            "fraction": fractions.mean(0),
        }
        axes = {"run": [run], "step": [step], "layer": list(layers)}
        parts.append(ByLayer.split(axes, {name: values[None, None] for name, values in columns.items()}))
    return ByLayer.concat(parts)


def split_half_reliability(
    residuals: Residuals, *, layers: Sequence[int] | None = None, repeats: int, rng: np.random.Generator
) -> pd.DataFrame:
    """How much v_rev and each drift depend on which prompts were drawn: 1 not at all, 0 entirely.

    r is the cosine of the two halves' directions, a mean over random halves; the whole has 2r / (1 + r) (Spearman 1910,
    Brown 1910), at least −1. A cosine between two such vectors cannot be expected above √(reliability · reliability): a
    low one says that the prompts are too few, not that there is no alignment.

    Args:
        residuals: `witness` and `anchor`, and runs if there are any, on one set of prompts.
        layers: default: all where v_rev is defined.
        repeats: random divisions.
        rng: source of randomness.

    Returns:
        Columns `of` (`v_rev` or the run), `step` (`<NA>` for v_rev), `layer`, `reliability`.

    Raises:
        GravlensError: fewer than 2 prompts, no repeats, no layer where v_rev is defined.
    """
    check_states(residuals)
    layers, halves = _defined_layers(residuals, layers), _halves(residuals, repeats, rng)
    frames = []
    for checkpoint, of, step in [("witness", "v_rev", pd.NA), *_run_steps(residuals)]:
        one, other = (_means(half, residuals, checkpoint, layers) for half in halves)
        r = _cosine(one, other).mean(0)
        frames.append(pd.DataFrame({"of": of, "step": step, "layer": list(layers), "reliability": spearman_brown(r)}))
    tables = [frame.astype({"step": "Int64", "layer": "Int64"}) for frame in frames]
    return pd.concat(tables, ignore_index=True)


def forward_noise(
    model: Openable, prompts: PromptSet, *, layers: Sequence[int], repeats: int, rng: np.random.Generator
) -> Float[np.ndarray, " layer"]:
    """How far the mean state moves while no weight does, max ‖h − h′‖: the same prompts in other batches.

    Rounding depends on the batch's size and padding. A first step's `drift_norm` means something only well above this.

    Args:
        model: opened.
        prompts: what the drift is measured on.
        layers: layer numbers, in the order of the result.
        repeats: how often the prompts are shuffled into batches of a random size, 1 to 32.
        rng: source of randomness.

    Returns:
        [layer]: the largest norm over the repeats, residual units.

    Raises:
        GravlensError: a layer out of range, no repeats.
    """
    model = open_model(model)
    layers = [check_layer(layer, model.n_layers) for layer in layers]
    _check_repeats(repeats)
    ids = encode(model.tokenizer, prompts)
    mean = read_residuals(model, ids, layers=layers).double().mean(0)
    moved = [(_in_other_batches(model, ids, layers, rng).double().mean(0) - mean).norm(dim=-1) for _ in range(repeats)]
    return torch.stack(moved).amax(0).numpy()


def _in_other_batches(
    model: OpenModel, ids: Sequence[Sequence[int]], layers: Sequence[int], rng: np.random.Generator
) -> Float[torch.Tensor, "prompt layer d_model"]:
    """The states of the prompts, in their own order, read in random batches."""
    order, size = rng.permutation(len(ids)), int(rng.integers(1, BATCH + 1))
    out = torch.empty(len(ids), len(layers), model.d_model)
    with torch.no_grad():
        for rows in np.split(order, range(size, len(ids), size)):
            out[rows] = residuals_of_batch(model, pad([ids[row] for row in rows]), layers=layers).cpu()
    return out


# --- halves -------------------------------------------------------------------------------------------------------
def _halves(residuals: Residuals, repeats: int, rng: np.random.Generator) -> Halves:
    """Weights that take the mean over a random half, and over the other."""
    n = residuals.values.shape[1]
    _check_repeats(repeats)
    if n < 2:
        raise GravlensError("There is one prompt.", "It has no halves.", "residuals on more prompts.")
    chosen = rng.permuted(np.tile(np.arange(n) < n // 2, (repeats, 1)), axis=1)
    return np.stack([chosen / (n // 2), ~chosen / (n - n // 2)])


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise GravlensError(f"repeats={repeats} was given.", "It is at least 1.", "repeats=50.")


def _defined_layers(residuals: Residuals, layers: Sequence[int] | None) -> tuple[int, ...]:
    """Those of the layers where v_rev of all prompts is defined."""
    directions = locate_vrev(residuals)
    return (directions if layers is None else directions.at(layers)).defined().layers


def _run_steps(residuals: Residuals) -> Iterator[tuple[str, str, int]]:
    return ((f"{run}/{step}", run, step) for run, steps in residuals.runs.items() for step in steps)


def _means(
    half: Float[np.ndarray, "split prompt"], residuals: Residuals, checkpoint: str, layers: Sequence[int]
) -> Float[np.ndarray, "split layer d_model"]:
    """h(checkpoint) − h(anchor), means over each split's prompts in fp64."""
    return np.tensordot(half, drift_per_prompt(residuals, checkpoint, layers), 1)


def _cosine(
    one: Float[np.ndarray, "split layer d_model"], other: Float[np.ndarray, "split layer d_model"]
) -> Float[np.ndarray, "split layer"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        return einsum(one, other, "split layer d, split layer d -> split layer") / norms


def _with_mean(values: Float[np.ndarray, "split layer"]) -> Float[np.ndarray, "split layer_and_mean"]:
    return np.concatenate([values, values.mean(1, keepdims=True)], axis=1)
