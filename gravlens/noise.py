"""Damage of a matched size: Gaussian noise on the anchor's weights, and how far it moves the model along v_rev."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from gravlens.checkpoints import Checkpoint
from gravlens.directions import Directions
from gravlens.errors import GravlensError
from gravlens.models import OpenModel, open_model
from gravlens.nulls import NullDraws
from gravlens.precision import check_unquantised
from gravlens.progress import progress
from gravlens.prompts import PromptSet, encode
from gravlens.residuals import read_residuals
from gravlens.trajectory import measure_drift


def weight_noise(
    anchor: Checkpoint | OpenModel,
    directions: Directions,
    prompts: PromptSet,
    *,
    norms: Mapping[int, Mapping[str, float]],
    draws: int,
    rng: np.random.Generator,
) -> NullDraws:
    """Gaussian noise on the anchor's weights, each tensor's norm matched to that of a run's update (docs/nulls.md).

    Args:
        anchor: the checkpoint that the noise is added to (a folder: the copy that is opened is put back as it was).
        directions: one direction a layer.
        prompts: what the runs are judged on.
        norms: step -> tensor name -> norm of the update (`update_norms`, averaged over runs).
        draws: how many at each step.
        rng: source of randomness.

    Returns:
        Cosines of the drift that the noise makes with v_rev, [draw, step, layer].

    Raises:
        GravlensError: the anchor lacks a tensor of `norms`, or is quantised.
    """
    model, defined = open_model(anchor), directions.defined()
    check_unquantised(model.module, "Weight noise")
    ids = encode(model.tokenizer, prompts)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    start = mean_states(model, ids, defined.layers)
    original = {name: weight.detach().clone() for name, weight in _named(model, norms).items()}
    cosines = np.empty((draws, len(norms), len(defined)))
    try:
        with progress("weight noise", total=draws * len(norms), unit="draw") as bar:
            for column, draw in product(range(len(norms)), range(draws)):
                _add_noise(_named(model, norms), original, norms[tuple(norms)[column]], generator)
                drift = mean_states(model, ids, defined.layers) - start
                cosines[draw, column] = measure_drift(drift, defined)["alignment"]
                bar.update()
    finally:
        with torch.no_grad():
            for name, weight in _named(model, norms).items():
                weight.copy_(original[name])
    return NullDraws("weight_noise", cosines, tuple(norms), defined.layers)


def update_norms(before: OpenModel, after: OpenModel) -> dict[str, float]:
    """‖θ_after − θ_before‖ of each parameter of two Hugging Face models."""
    for model in (before, after):
        check_unquantised(model.module, "The norm of an update")
    later = dict(after.module.named_parameters())
    with torch.no_grad():
        norms = {name: float((later[name] - weight).norm()) for name, weight in before.module.named_parameters()}
    return {name: norm for name, norm in norms.items() if norm > 0}


def _named(model: OpenModel, norms: Mapping[int, Mapping[str, float]]) -> dict[str, Tensor]:
    wanted = {name for step in norms.values() for name in step}
    found = {name: weight for name, weight in model.module.named_parameters() if name in wanted}
    if missing := sorted(wanted - found.keys()):
        raise GravlensError(
            f"This {type(model.module).__name__} has no tensor {', '.join(missing[:3])}.",
            "Noise goes to the anchor's own tensors, by their Hugging Face names.",
            "norms of update_norms(anchor, checkpoint), both opened through='huggingface'.",
        )
    return found


def _add_noise(
    weights: Mapping[str, Tensor],
    original: Mapping[str, Tensor],
    norms: Mapping[str, float],
    generator: torch.Generator,
) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            noise = torch.randn(weight.shape, generator=generator)
            noise *= norms.get(name, 0.0) / noise.norm()
            weight.copy_(original[name] + noise.to(weight.device))


def mean_states(
    model: OpenModel, ids: Sequence[Sequence[int]], layers: Sequence[int]
) -> Float[np.ndarray, "layer d_model"]:
    """The states' mean over prompts in fp64, at the last prompt token."""
    return read_residuals(model, ids, layers=layers).numpy().mean(0, dtype=np.float64)
