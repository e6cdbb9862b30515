"""Prompt noise in v_rev and drifts: cross-fitting, split-half reliability, the forward pass's own noise."""

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from einops import einsum
from jaxtyping import Float
from numpy.random import Generator

from gravlens.activations.residuals import BATCH, Residuals, check_states, read_residuals, residuals_of_batch
from gravlens.core.errors import GravlensError, check_layer
from gravlens.directions.trajectory import ByLayer, drift_per_prompt, runs_of
from gravlens.directions.vrev import locate_vrev, spearman_brown
from gravlens.history.encoding import encode, pad
from gravlens.history.prompts import PromptSet
from gravlens.models.opening import Openable, OpenModel, open_model

Halves = Float[np.ndarray, "half split prompt"]
Means = Float[np.ndarray, "split layer d_model"]


def cross_fit(residuals: Residuals, *, layers: Sequence[int] | None = None, repeats: int, rng: Generator) -> ByLayer:
    """Alignment and fraction with v_rev of one half of the prompts and the drift of the other, over random halves.

    On the same prompts drift and v_rev share the anchor's prompt noise and correlate without any reversion; halves do
    not. They still share the anchor's *training*, common to all prompts (a sibling anchor removes it: `substitute`).
    Each half is noisier than the whole, which lowers the cosine: see `split_half_reliability`. Each of `repeats` random
    divisions is used both ways; `layers` defaults to those where v_rev is defined.

    Returns:
        `run, step, layer, alignment` (mean over the 2 · repeats splits), `alignment_sd` (over splits, which overlap: no
        standard error), `fraction`.

    Examples:
        >>> fitted = gl.stats.cross_fit(given, repeats=10, rng=rng)
        >>> fitted.layer_mean.run.unique().tolist()
        ['seed0', 'seed1']
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
        # towards is not of unit length
        fractions = _with_mean(einsum(drift, towards, "split layer d, split layer d -> split layer") / distance**2)
        columns = {"alignment": cosines.mean(0), "alignment_sd": cosines.std(0, ddof=1), "fraction": fractions.mean(0)}
        axes = {"run": [run], "step": [step], "layer": list(layers)}
        parts.append(ByLayer.split(axes, {name: values[None, None] for name, values in columns.items()}))
    return ByLayer.concat(parts)


def split_half_reliability(
    residuals: Residuals, *, layers: Sequence[int] | None = None, repeats: int, rng: Generator
) -> pd.DataFrame:
    """How reproducible v_rev and each drift are over prompts: 1 entirely, 0 not at all.

    r is the mean cosine of random halves' directions; the whole has 2r / (1 + r) (Spearman 1910, Brown 1910), at least
    −1. A cosine between two such vectors is at most √(reliability · reliability) on average: a low one may mean too few
    prompts. `layers` defaults to those where v_rev is defined.

    Returns:
        Columns `of` (`v_rev` or the run), `step` (`<NA>` for v_rev), `layer`, `reliability`.

    Examples:
        >>> table = gl.stats.split_half_reliability(given, repeats=10, rng=rng)
        >>> table.of.unique().tolist()
        ['v_rev', 'seed0', 'seed1']
    """
    check_states(residuals)
    layers, halves = _defined_layers(residuals, layers), _halves(residuals, repeats, rng)
    frames = []
    for checkpoint, of, step in [("witness", "v_rev", pd.NA), *_run_steps(residuals)]:
        one, other = (_means(half, residuals, checkpoint, layers) for half in halves)
        r = _cosine(one, other).mean(0)
        frames.append(pd.DataFrame({"of": of, "step": step, "layer": list(layers), "reliability": spearman_brown(r)}))
    # nullable: v_rev has no step
    tables = [frame.astype({"step": "Int64", "layer": "Int64"}) for frame in frames]
    return pd.concat(tables, ignore_index=True)


def forward_noise(
    model: Openable, prompts: PromptSet, *, layers: Sequence[int], repeats: int, rng: Generator
) -> Float[np.ndarray, " layer"]:
    """Measure how far the mean state moves without any change of weights: max ‖h − h′‖ over rebatched prompts [layer].

    Rounding depends on batch size and padding. A first step's `drift_norm` has a meaning only well above this. The
    prompts are shuffled `repeats` times into batches of a random size, 1 to 32.

    Examples:
        >>> noise = gl.stats.forward_noise(model, prompts, layers=[0, 1, 2], repeats=3, rng=rng)
        >>> noise.shape, bool((noise < 1e-3).all())
        ((3,), True)
    """
    model = open_model(model)
    layers = [check_layer(layer, model.n_layers) for layer in layers]
    _check_repeats(repeats)
    ids = encode(model.tokenizer, prompts)
    # fp64 mean: only the pass's own rounding is to show
    mean = read_residuals(model, ids, layers=layers).double().mean(0)
    moved = [(_in_other_batches(model, ids, layers, rng).double().mean(0) - mean).norm(dim=-1) for _ in range(repeats)]
    return torch.stack(moved).amax(0).numpy()


def _in_other_batches(
    model: OpenModel, ids: Sequence[Sequence[int]], layers: Sequence[int], rng: Generator
) -> Float[torch.Tensor, "prompt layer d_model"]:
    """States of the prompts, in their own order, read in random batches."""
    order, size = rng.permutation(len(ids)), int(rng.integers(1, BATCH + 1))
    out = torch.empty(len(ids), len(layers), model.d_model)
    with torch.no_grad():
        for rows in np.split(order, range(size, len(ids), size)):
            # not read_residuals, which sorts by length and makes batches of its own
            out[rows] = residuals_of_batch(model, pad([ids[row] for row in rows]), layers=layers).cpu()
    return out


def _halves(residuals: Residuals, repeats: int, rng: Generator) -> Halves:
    """Weights that average over a random half, and over the other."""
    n = residuals.values.shape[1]
    _check_repeats(repeats)
    if n < 2:
        raise GravlensError("There is one prompt.", "It has no halves.", "residuals on more prompts.")
    # not `permutation`, which shuffles all rows alike
    chosen = rng.permuted(np.tile(np.arange(n) < n // 2, (repeats, 1)), axis=1)
    return np.stack([chosen / (n // 2), ~chosen / (n - n // 2)])


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise GravlensError(f"repeats={repeats} was given.", "It is at least 1.", "repeats=50.")


def _defined_layers(residuals: Residuals, layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers where v_rev of all prompts is defined."""
    directions = locate_vrev(residuals)
    return (directions if layers is None else directions.at(layers)).defined().layers


def _run_steps(residuals: Residuals) -> Iterator[tuple[str, str, int]]:
    return ((f"{run}/{step}", run, step) for run, steps in residuals.runs.items() for step in steps)


def _means(half: np.ndarray, residuals: Residuals, checkpoint: str, layers: Sequence[int]) -> Means:
    """h(checkpoint) − h(anchor), mean over each split's prompts."""
    return np.tensordot(half, drift_per_prompt(residuals, checkpoint, layers), 1)


def _cosine(one: Means, other: Means) -> Float[np.ndarray, "split layer"]:
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
        return einsum(one, other, "split layer d, split layer d -> split layer") / norms


def _with_mean(values: Float[np.ndarray, "split layer"]) -> Float[np.ndarray, "split layer_and_mean"]:
    return np.concatenate([values, values.mean(1, keepdims=True)], axis=1)
