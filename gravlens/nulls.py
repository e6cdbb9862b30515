"""What alignment would be by chance: a null is a function that returns draws; `compare` holds runs against them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from tqdm.auto import tqdm

from gravlens.checkpoints import Checkpoint
from gravlens.directions import Directions
from gravlens.errors import GravlensError
from gravlens.models import OpenModel, open_model
from gravlens.prompts import PromptSet, encode
from gravlens.residuals import read_residuals
from gravlens.trajectory import Trajectory, measure_drift


@dataclass(frozen=True, eq=False)
class NullDraws:
    """Cosines with v_rev under a null.

    Attributes:
        name: of the null.
        cosines: [draw, step, layer]; the layers of one draw belong together.
        steps: the steps that it is drawn for.
        layers: the layers.
    """

    name: str
    cosines: Float[np.ndarray, "draw step layer"] = field(repr=False)
    steps: tuple[int, ...]
    layers: tuple[int, ...]


def isotropic_p_value(cosine: float, d_model: int) -> float:
    """P(cos > c) of a uniformly random direction: ½ P(Beta(½, (d − 1)/2) > c²), mirrored for negative c."""
    tail = 0.5 * float(stats.beta.sf(cosine**2, 0.5, (d_model - 1) / 2))
    return tail if cosine >= 0 else 1 - tail


def isotropic_quantile(probability: float, d_model: int) -> float:
    """The quantile of the cosine of a uniformly random direction with a fixed one, in closed form."""
    magnitude = float(np.sqrt(stats.beta.ppf(abs(2 * probability - 1), 0.5, (d_model - 1) / 2)))
    return magnitude if probability >= 0.5 else -magnitude


def isotropic(directions: Directions, *, steps: Sequence[int], draws: int, rng: np.random.Generator) -> NullDraws:
    """Uniformly random drifts, independent between layers. Nearly vacuous: real drifts are anything but isotropic."""
    defined = directions.defined()
    shape = (draws, len(steps), len(defined))
    along = rng.standard_normal(shape)
    across = rng.chisquare(defined.vectors.shape[1] - 1, shape)
    return NullDraws("isotropic", along / np.sqrt(along**2 + across), tuple(steps), defined.layers)


def weight_noise(
    anchor: Checkpoint | OpenModel,
    directions: Directions,
    prompts: PromptSet,
    *,
    norms: Mapping[int, Mapping[str, float]],
    draws: int,
    rng: np.random.Generator,
) -> NullDraws:
    """Gaussian noise on the anchor's weights, each tensor's norm matched to that of a run's update.

    Args:
        anchor: the checkpoint that the noise is added to (a folder: the copy that is opened is put back as it was).
        directions: one direction a layer.
        prompts: what the runs are judged on.
        norms: step -> tensor name -> norm of the update (`update_norms`, averaged over runs).
        draws: how many at each step.
        rng: source of randomness.

    Returns:
        Cosines of the drift that the noise makes with v_rev, [draw, step, layer].
    """
    model, defined = open_model(anchor), directions.defined()
    ids = encode(model.tokenizer, prompts)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    start = _mean_states(model, ids, defined.layers)
    original = {name: weight.detach().clone() for name, weight in _named(model, norms).items()}
    cosines = np.empty((draws, len(norms), len(defined)))
    try:
        for column, step in enumerate(tqdm(norms, "weight noise", leave=False)):
            for draw in range(draws):
                _add_noise(_named(model, norms), original, norms[step], generator)
                drift = _mean_states(model, ids, defined.layers) - start
                cosines[draw, column] = measure_drift(drift, defined)["alignment"]
    finally:
        with torch.no_grad():
            for name, weight in _named(model, norms).items():
                weight.copy_(original[name])
    return NullDraws("weight_noise", cosines, tuple(norms), defined.layers)


def update_norms(before: OpenModel, after: OpenModel) -> dict[str, float]:
    """Norm of the difference of each parameter of two Hugging Face models."""
    later = dict(after.module.named_parameters())
    with torch.no_grad():
        norms = {name: float((later[name] - weight).norm()) for name, weight in before.module.named_parameters()}
    return {name: norm for name, norm in norms.items() if norm > 0}


def compare(trajectory: Trajectory, null: NullDraws, *, prompts: str = "held_out") -> pd.DataFrame:
    """Hold every run × step × layer (<NA>: the layer mean) against a null.

    Returns:
        Columns `null, run, step, layer, alignment, p99, p_value, above`; p = (1 + k)/(1 + n), one-sided.
    """
    table = trajectory.table[(trajectory.table.prompts == prompts) & trajectory.table.step.isin(null.steps)]
    if table.empty:
        raise GravlensError(
            f"The trajectory has no {prompts} rows at the steps {list(null.steps)}.",
            "A null is compared step by step.",
            f"prompts={sorted(trajectory.table.prompts.unique())[0]!r}, or draws for the trajectory's steps.",
        )
    mean = [null.layers.index(layer) for layer in trajectory.layers_in_mean]
    rows = []
    for run, step, layer, alignment in table[["run", "step", "layer", "alignment"]].to_numpy(dtype=object):
        draws = null.cosines[:, null.steps.index(step)]
        drawn = draws[:, mean].mean(1) if layer is pd.NA else draws[:, null.layers.index(layer)]
        p99 = float(np.quantile(drawn, 0.99))
        # not `>=`: a run or a draw without drift has no cosine, and must not count as significant
        p_value = (1 + int((~(drawn < alignment)).sum())) / (1 + len(drawn))
        rows.append((null.name, run, step, layer, alignment, p99, p_value, alignment > p99))
    columns = ["null", "run", "step", "layer", "alignment", "p99", "p_value", "above"]
    return pd.DataFrame(rows, columns=columns).astype({"layer": "Int64"})


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
            weight.copy_(original[name] + noise * (norms.get(name, 0.0) / noise.norm()))


def _mean_states(
    model: OpenModel, ids: Sequence[Sequence[int]], layers: Sequence[int]
) -> Float[np.ndarray, "layer d_model"]:
    return read_residuals(model, ids, layers=layers).numpy().mean(0, dtype=np.float64)
