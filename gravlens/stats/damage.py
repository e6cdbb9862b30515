"""Damage without training: rounding, pruning, the update's mirror image. Does it move a model along v_rev too?"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gravlens.activations.residuals import read_residuals, rounding_noise
from gravlens.behavior.scores import Score
from gravlens.core.errors import GravlensError
from gravlens.core.progress import progress
from gravlens.directions.direction import Directions
from gravlens.directions.trajectory import ByLayer, judged_from, measure_drift
from gravlens.history.encoding import encode
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint
from gravlens.models.opening import Openable, OpenModel, open_model
from gravlens.models.precision import check_unquantised
from gravlens.stats.nulls import NullDraws

__all__ = [
    "measure_damage", "pruned", "reweighted", "rounded", "sign_flipped", "update_norms", "updated", "weight_noise",
]  # fmt: skip


Source: TypeAlias = Checkpoint | Path | str | nn.Module | OpenModel
# a function of the anchor that gives a damaged model for as long as its context lasts: partial(rounded, bits=4)
Damage: TypeAlias = Callable[[OpenModel], AbstractContextManager[OpenModel]]
UNDAMAGED = "none"
BITS = range(2, 17)
LINEAR_DRAWS, LINEAR_WITHIN = 8, 0.25


# --- kinds of damage ----------------------------------------------------------------------------------------------
@contextmanager
def rounded(model: Openable, bits: int, *, norm: float | None = None) -> Generator[OpenModel]:
    """The model with every matrix rounded to nearest, symmetric, one scale per output channel, and put back after.

    A channel's largest weight is 2^(bits − 1) − 1 steps: 127 at 8 bits, 7 at 4. Embeddings are matrices with a channel
    per token; vectors (biases, norms) stay.

    Args:
        model: a Hugging Face model.
        bits: 2 to 16.
        norm: scale the change to this total norm (`reweighted`); None leaves it as it is.

    Raises:
        GravlensError: bits out of range, or what `reweighted` raises.

    Examples:
        >>> with gl.damage.rounded(model, bits=4) as rounded:
        ...     scores = gl.refusal_log_odds(rounded, prompts)
    """
    model = open_model(model)
    if bits not in BITS:
        raise GravlensError(f"{bits!r} bits were asked for.", "Weights are rounded to 2 to 16 bits.", "bits=4.")
    levels = 2 ** (bits - 1) - 1
    weights = {name: _to_grid(weight, levels, axis) for name, (weight, axis) in _matrices(model).items()}
    with reweighted(model, weights, norm=norm) as damaged:
        yield damaged


@contextmanager
def pruned(model: Openable, share: float, *, norm: float | None = None) -> Generator[OpenModel]:
    """The model with the smallest weights of every matrix set to 0, and put back after (docs/controls.md).

    Args:
        model: a Hugging Face model.
        share: of each matrix's weights, between 0 and 1; vectors (biases, norms) stay.
        norm: scale the change to this total norm (`reweighted`); None leaves it as it is.

    Raises:
        GravlensError: a share that is not between 0 and 1, or what `reweighted` raises.

    Examples:
        >>> with gl.damage.pruned(model, 0.2) as pruned:
        ...     scores = gl.refusal_log_odds(pruned, prompts)
    """
    model = open_model(model)
    if not 0 < share < 1:
        raise GravlensError(f"A share of {share!r} was given.", "It lies between 0 and 1.", "share=0.1 for a tenth.")
    weights = {name: _without_smallest(weight, share) for name, (weight, _) in _matrices(model).items()}
    with reweighted(model, weights, norm=norm) as damaged:
        yield damaged


@contextmanager
def sign_flipped(model: Openable, checkpoint: Source, *, norm: float | None = None) -> Generator[OpenModel]:
    """The mirror image of an update, θ = anchor − (θ_t − anchor), and the anchor back after.

    Of the same size, tensor by tensor, as what training did, and where states follow weights linearly its drift is the
    run's with the other sign: what the two have in common is damage.

    Args:
        model: the anchor.
        checkpoint: θ_t, of a run that starts there.
        norm: scale the change to this total norm (`reweighted`); None leaves it as it is.

    Raises:
        GravlensError: the two models' weights do not match, or what `reweighted` raises.

    Examples:
        >>> with gl.damage.sign_flipped(gl.open_model(seq.anchor), seq.runs["seed0"][-1]) as mirrored:
        ...     scores = gl.refusal_log_odds(mirrored, prompts)
    """
    model = open_model(model)
    own, other = _parameters(model), _parameters(open_model(checkpoint))
    _check_same(own, other)
    with torch.no_grad():
        weights = {name: 2 * weight - other[name].to(weight) for name, weight in own.items()}
    with reweighted(model, weights, norm=norm) as damaged:
        yield damaged


@contextmanager
def updated(model: Openable, checkpoint: Source, *, norm: float | None = None) -> Generator[OpenModel]:
    """The anchor with a run's own update θ_t − anchor, and the anchor back after: the positive control.

    Args:
        model: the anchor.
        checkpoint: θ_t, of a run that starts there.
        norm: scale the change to this total norm (`reweighted`); None leaves it as it is.

    Raises:
        GravlensError: the two models' weights do not match, or what `reweighted` raises.

    Examples:
        >>> with gl.damage.updated(gl.open_model(seq.anchor), seq.runs["seed0"][-1]) as updated:
        ...     scores = gl.refusal_log_odds(updated, prompts)
    """
    model = open_model(model)
    weights = _parameters(open_model(checkpoint))
    _check_same(_parameters(model), weights)
    with reweighted(model, weights, norm=norm) as damaged:
        yield damaged


@contextmanager
def reweighted(model: Openable, weights: Mapping[str, Tensor], *, norm: float | None = None) -> Generator[OpenModel]:
    """A model with other weights for as long as the context lasts; they are put back bit for bit, whatever happens.

    Args:
        model: a Hugging Face model; it is changed in place and yielded.
        weights: parameter name -> its temporary value; the others stay.
        norm: scale the change, all tensors by one factor, to this total norm, √(Σ of all squares).

    Raises:
        GravlensError: not a Hugging Face model, an unknown tensor or one of another shape, no change to scale.
    """
    model = open_model(model)
    own = _parameters(model)
    _check_same({name: own[name] for name in weights if name in own}, weights)
    kept = {name: own[name].detach().clone() for name in weights}
    factor = 1.0 if norm is None else _factor(norm, change_norm(kept, weights))
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight = weight.to(kept[name])
                own[name].copy_(weight if norm is None else torch.lerp(kept[name], weight, factor))
        yield model
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                own[name].copy_(weight)


def change_norm(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Norm of the difference of all tensors together, in fp64."""
    with torch.no_grad():
        squares = [float((after[name].to(old) - old).double().square().sum()) for name, old in before.items()]
    return math.sqrt(math.fsum(squares))


# --- measuring damage -------------------------------------------------------------------------------------------------
def measure_damage(
    anchor: Source,
    directions: Directions,
    prompts: PromptSet,
    *,
    damages: Mapping[str, Damage],
    layers_in_mean: Sequence[int] | None = None,
    score: Score | None = None,
) -> ByLayer:
    """Does damage alone move the anchor along v_rev, and does it undo refusal?

    Each damage is a single contrast, not a null (docs/controls.md): rounding is one draw. For draws there is
    `weight_noise`.

    Args:
        anchor: the checkpoint that is damaged; a model that was handed over is put back as it was.
        directions: v_rev.
        prompts: the drift is read and the score is measured on these (held-out ones).
        damages: name -> a function of the anchor that gives the damaged model as a context, such as
            `partial(rounded, bits=4)`; for comparison, a run is `partial(updated, checkpoint=...)`.
        layers_in_mean: layers of the mean (default: all that are defined).
        score: (model, prompts) -> one number a prompt, such as the refusal log-odds.

    Returns:
        A row per damage and layer, the first damage `none`: `damage, layer`; `alignment, fraction, drift_norm, judged`
        as in `Trajectory.table`; `weight_norm` (total norm of the change of the weights); and `score`, the mean over
        prompts, where one is given. `.layer_mean` is the mean over `layers_in_mean`.

    Raises:
        GravlensError: a model that is not a plain Hugging Face one, a damage that gives another shape, a layer of the
            mean without a direction.

    Examples:
        >>> damages = {"4 bits": lambda model: gl.damage.rounded(model, bits=4)}
        >>> gl.damage.measure_damage(seq.anchor, vs, prompts, damages=damages).layer_mean.damage.tolist()
        ['none', '4 bits']
    """
    directions = Directions.of(directions)
    model, defined = open_model(anchor), directions.defined()
    mean = defined.layers if layers_in_mean is None else tuple(layers_in_mean)
    defined.at(mean)  # says which layer has no direction
    before = {name: weight.detach().clone() for name, weight in _parameters(model).items()}
    ids, start, parts = encode(model.tokenizer, prompts), None, []
    with progress("damage", list({UNDAMAGED: nullcontext, **damages}.items())) as every:
        for name, damage in every:
            with damage(model) as damaged:
                states = mean_states(damaged, ids, defined.layers)
                start = states if start is None else start  # the first is the undamaged anchor
                least = judged_from(defined, rounding_noise(np.linalg.norm(start, axis=-1), model.precision))
                after = _parameters(damaged)
                _check_same(before, after)
                facts: dict[str, Any] = {"weight_norm": change_norm(before, after)}
                if score is not None:
                    facts["score"] = float(np.mean(score(damaged, prompts)))
            parts.append(ByLayer.of(_moved(name, states - start, defined, least), mean).assign(facts))
    return ByLayer.concat(parts)


def _moved(
    damage: str,
    drift: Float[np.ndarray, "layer d_model"],
    directions: Directions,
    least: Float[np.ndarray, " layer"],
) -> xarray.Dataset:
    measures = measure_drift(drift, directions)
    measures["judged"] = measures["drift_norm"] > least
    axes = {"damage": [damage], "layer": list(directions.layers)}
    columns = ("alignment", "fraction", "drift_norm", "judged")
    return xarray.Dataset({name: (tuple(axes), measures[name][None]) for name in columns}, axes)


# --- weights ------------------------------------------------------------------------------------------------------
def _parameters(model: OpenModel) -> dict[str, Tensor]:
    if not model.family.own_tensors:
        given = f"A {type(model.module).__name__} was given."
        wanted = "Damage goes to a Hugging Face model's own tensors, which no other kind holds as they were trained."
        raise GravlensError(given, wanted, "the checkpoint's folder, or open_model(folder).")
    check_unquantised(model.module, "Damage")
    return dict(model.module.named_parameters())


def _matrices(model: OpenModel) -> dict[str, tuple[Tensor, int]]:
    """Parameters of two axes or more, tied ones once, with the axis of their inputs, over which a channel runs."""
    own = _parameters(model)
    found = {}
    for prefix, module in model.module.named_modules():
        axis = -2 if isinstance(module, Conv1D) or getattr(module, "is_transposed", False) else -1
        for child, weight in module.named_parameters(recurse=False):
            name = f"{prefix}.{child}" if prefix else child
            if name in own and weight.ndim > 1:
                found[name] = (weight.detach(), axis)
    return found


def _to_grid(weight: Tensor, levels: int, axis: int) -> Tensor:
    """In fp64, so that what lies on the grid already stays where it is."""
    exact = weight.double()
    step = exact.abs().amax(axis, keepdim=True) / levels
    step = torch.where(step > 0, step, 1.0)  # a channel of zeros
    return ((exact / step).round() * step).to(weight.dtype)


def _without_smallest(weight: Tensor, share: float) -> Tensor:
    kept = weight.flatten().clone()
    kept[kept.abs().argsort(stable=True)[: round(share * kept.numel())]] = 0
    return kept.view(weight.shape)


def _factor(norm: float, found: float) -> float:
    if found > 0 and norm > 0:
        return norm / found
    given = f"A change of norm {found:.3g} was to be scaled to {norm:.3g}."
    raise GravlensError(given, "Both are above 0.", "norm=None, or a damage that changes this model's weights.")


def _check_same(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    wrong = [name for name, weight in other.items() if name not in own or own[name].shape != weight.shape]
    if wrong := wrong or [name for name in own if name not in other]:
        given = f"Another shape or name was given for {', '.join(wrong[:3])}."
        wanted = "Damage and update have the anchor's tensors, by name and shape."
        raise GravlensError(given, wanted, "a checkpoint of the same history, its adapter merged (merge_and_unload()).")


def weight_noise(
    anchor: Openable,
    directions: Directions,
    prompts: PromptSet,
    *,
    norms: Mapping[int, Mapping[str, float]],
    draws: int,
    rng: np.random.Generator,
    linear: bool = False,
) -> NullDraws:
    """Gaussian noise on the anchor's weights, each tensor's norm matched to that of a run's update (docs/nulls.md).

    Args:
        anchor: the checkpoint that the noise is added to (a folder: the copy that is opened is put back as it was).
        directions: one direction per layer.
        prompts: what the runs are judged on.
        norms: step -> tensor name -> norm of the update (`update_norms`, averaged over runs).
        draws: how many at each step.
        rng: source of randomness.
        linear: where states move linearly with weights, a cosine does not depend on the noise's size, and noise −ε has
            the opposite one. Then draw at the last step's norms alone, half as often, and let the cosines and their
            negatives stand for every step. Eight draws test it, at the first and last norms and mirrored: where cosines
            differ by more than a quarter of their r.m.s., and of 24 draws or fewer, all are drawn as usual.

    Returns:
        Cosines of the drift that the noise makes with v_rev, [draw, step, layer].

    Raises:
        GravlensError: a tensor of `norms` is missing from the anchor, or is quantised.

    Examples:
        >>> norms = {20: gl.damage.update_norms(gl.open_model(seq.anchor), model)}
        >>> null = gl.damage.weight_noise(seq.anchor, vs, prompts, norms=norms, draws=3, rng=rng)
        >>> null.cosines.shape
        (3, 1, 3)
    """
    directions = Directions.of(directions)
    model, defined = open_model(anchor), directions.defined()
    check_unquantised(model.module, "Weight noise")
    ids = encode(model.tokenizer, prompts)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    start = mean_states(model, ids, defined.layers)
    original = {name: weight.detach().clone() for name, weight in _named(model, norms).items()}

    def drawn(sizes: Mapping[str, float], number: int) -> Float[np.ndarray, "draw layer"]:
        cosines = np.empty((number, len(defined)))
        for row in cosines:
            _add_noise(_named(model, norms), original, sizes, generator)
            row[:] = measure_drift(mean_states(model, ids, defined.layers) - start, defined)["alignment"]
            bar.update()
        return cosines

    try:
        with progress("weight noise", total=draws * len(norms), unit="draw") as bar:
            if linear and draws > 3 * LINEAR_DRAWS and _is_linear(drawn, norms, generator):
                half = drawn(norms[max(norms)], (draws + 1) // 2)
                columns = [np.concatenate([half, -half])[:draws]] * len(norms)
            else:
                columns = [drawn(sizes, draws) for sizes in norms.values()]
    finally:
        with torch.no_grad():
            for name, weight in _named(model, norms).items():
                weight.copy_(original[name])
    return NullDraws("weight_noise", np.stack(columns, axis=1), tuple(norms), defined.layers)


def _is_linear(
    drawn: Callable[[Mapping[str, float], int], Float[np.ndarray, "draw layer"]],
    norms: Mapping[int, Mapping[str, float]],
    generator: torch.Generator,
) -> bool:
    state, found = generator.get_state(), []
    last = norms[max(norms)]
    for sizes in (last, norms[min(norms)], {name: -norm for name, norm in last.items()}):
        generator.set_state(state)  # the same noise, of another size
        found.append(drawn(sizes, LINEAR_DRAWS))
    generator.set_state(state)
    one, smaller, mirrored = found
    differences = np.stack([smaller - one, mirrored + one])
    return bool(np.sqrt((differences**2).mean((1, 2))).max() <= LINEAR_WITHIN * np.sqrt((one**2).mean()))


def update_norms(before: Openable, after: Openable) -> dict[str, float]:
    """‖θ_after − θ_before‖ of each parameter of two Hugging Face models.

    Args:
        before: the start of a run, such as the anchor.
        after: a checkpoint of that run.

    Raises:
        GravlensError: quantised weights.

    Examples:
        >>> norms = gl.damage.update_norms(gl.open_model(seq.anchor), model)
        >>> norms["lm_head.weight"] > 0
        True
    """
    before, after = open_model(before), open_model(after)
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
        given = f"This {type(model.module).__name__} has no tensor {', '.join(missing[:3])}."
        remedy = "norms of update_norms(anchor, checkpoint), both opened through='huggingface'."
        raise GravlensError(given, "Noise goes to the anchor's own tensors, by their Hugging Face names.", remedy)
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
