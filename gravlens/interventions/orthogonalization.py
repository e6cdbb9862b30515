"""Weight orthogonalization: remove a direction from every matrix and bias that writes to the residual stream."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from gravlens.activations.residuals import read_residuals, residuals_of_batch
from gravlens.core.errors import GravlensError, at_home, wrong_kind
from gravlens.directions.direction import Direction, one_direction
from gravlens.history.encoding import pad
from gravlens.interventions.edits import Ablate
from gravlens.interventions.hooks import check_fit
from gravlens.models.families import copied
from gravlens.models.opening import Openable, OpenModel, open_model, save_folder
from gravlens.models.precision import check_unquantised

LEFT_WITHIN = 1e-4  # largest component along v, relative to a state's length
LINEAR_WITHIN = 1e-2
FAR = 1000.0  # ratio of the two pushes: a norm after the write would not pass on the larger one in proportion


def orthogonalize(source: Openable, direction: Direction, *, out: Path | str) -> Path:
    """Save the `orthogonalized` model, W ← W − v (vᵀ W), as a Hugging Face folder, atomically.

    Args:
        source: as for `orthogonalized`, like `direction`; it is not changed.
        out: a new folder; where anything fails, it is not written.
    """
    out = at_home(out)
    if out.exists():  # before the work: `save_folder` would replace it
        raise GravlensError(f"{out} already exists.", "Nothing is overwritten.", "another name, or remove it.")
    return save_folder(orthogonalized(source, direction), out)


def orthogonalized(source: Openable, direction: Direction) -> OpenModel:
    """Copy a model with orthogonalized weights, W ← W − v (vᵀ W): it cannot write along v (Arditi et al. 2024).

    Weights that write to the residual stream: the token embedding, learned positions, and in each block the output
    projections of attention, MLP and experts, with their biases. The unembedding is kept: tied embeddings are untied.
    The copy computes what the model computes with v ablated from every single write.

    There is no table of architectures: writes are found by shape and place, then verified. On random tokens the
    component of the states along v is below 10⁻⁴ of their length, and a push of each write along v reaches the last
    block in proportion.

    Args:
        source: a folder, a hub id, a checkpoint, or a Hugging Face model in fp32; it is not changed.
        direction: one vector; its layer does not matter, the residual stream has one basis.

    Raises:
        GravlensError: a direction that does not fit; a model that is quantised or no plain Hugging Face model in fp32
            or fp64; an architecture that rescales its writes (Gemma 2 and 3, OLMo 2) or writes in another way.
    """
    model = _own_copy(source)
    vector = _vector_of(direction, model)
    writes = tuple(model.family.writes())
    _untie(model.module)
    with torch.no_grad():
        for tensor, axis in (pair for write in writes for pair in write.tensors):  # GPT-2 keeps [in, out]
            rows, v = tensor.movedim(axis, -1), vector.to(tensor.device)
            rows -= (rows @ v)[..., None] * v  # a view: the weight itself changes
    _check_nothing_left(model, writes, vector)
    _check_each_writes(model, writes, vector)
    return model


def _own_copy(source: Openable) -> OpenModel:
    """Return a model that is safe to change: freshly loaded, or a deep copy."""
    model = open_model(source)
    check_unquantised(model.module, "Orthogonalising")
    if not model.family.own_tensors or hasattr(model.module, "peft_config"):
        remedy = "the checkpoint's folder, or an adapter's merged model (merge_and_unload())."
        raise wrong_kind(model.module, "A plain Hugging Face model is needed.", remedy)
    if model.dtype not in (torch.float32, torch.float64):
        given = f"The model is in {model.dtype}."
        raise GravlensError(
            given, "fp32 is needed: rounding would restore some of v.", "open_model(folder), which loads in fp32."
        )
    if isinstance(source, OpenModel) or not model.weights:  # the caller holds it
        return open_model(copied(model.module), tokenizer=model.tokenizer)
    return replace(model, weights={})  # an untied model has other names than its checkpoint


def _vector_of(direction: Direction, model: OpenModel) -> Float[Tensor, " d_model"]:
    # One, because all layers write to one residual stream: a second would be removed from the same weights.
    Ablate(one_direction(direction))  # raises for an undefined direction, or one that is not of unit length
    check_fit(direction, model)
    vector = torch.tensor(direction.vector, dtype=torch.float64)
    return (vector / vector.norm()).to(model.device, model.dtype)  # again: a length off by 10⁻⁴ leaves 2 · 10⁻⁴ of v


def _untie(module: Any) -> None:
    """Give the unembedding its own copy of weights that it shares with the token embedding."""
    # Reading v from the stream is no write: with shared weights the logits would lose v too.
    head = module.get_output_embeddings()
    if head is None or head.weight is not module.get_input_embeddings().weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    module.config.tie_word_embeddings = module.config.get_text_config().tie_word_embeddings = False
    module.all_tied_weights_keys = {}  # else transformers ties them again


def _check_nothing_left(model: OpenModel, writes: Sequence[Any], vector: Tensor) -> None:
    """Raise unless the states of random prompts of 1 to 16 tokens have no component along v at any layer."""
    states = read_residuals(model, _random_ids(model, range(1, 17)), layers=range(model.n_layers))
    left = ((states @ vector.float().cpu()).abs() / states.norm(dim=-1)).amax(0)
    if (over := ~(left <= LEFT_WITHIN)).any():  # not `>`: NaN fails too
        layer = int(over.int().argmax())
        what = f"with its {len(writes)} writes orthogonalized, {left[layer]:.1%} of a state is along v at layer {layer}"
        raise _not_linear(model, what)


def _check_each_writes(model: OpenModel, writes: Sequence[Any], vector: Tensor) -> None:
    """Raise unless a push of each write along v reaches the last block, and a push FAR times as large FAR times as far.

    Nothing else writes along v any more, so a push that does not arrive was not at a write, and one that arrives out
    of proportion is rescaled by a norm on its way.
    """
    # Row 0 is unpushed, rows 1 … n have each write's near push, the others its far push: one pass for all.
    batch = pad(_random_ids(model, [4]) * (1 + 2 * len(writes)))
    last = [model.n_layers - 1]
    with torch.no_grad(), ExitStack() as hooks:
        size = float(residuals_of_batch(model, pad(_random_ids(model, [4])), layers=last).norm())
        for i, write in enumerate(writes):
            push = torch.zeros(len(batch.input_ids), 1, 1, device=vector.device, dtype=vector.dtype)
            push[1 + i], push[1 + i + len(writes)] = size, FAR * size
            hooks.callback(write.module.register_forward_hook(_pushed(push * vector)).remove)
        along = residuals_of_batch(model, batch, layers=last)[:, 0].double() @ vector.double()
    near, far = ((along[1:] - along[0]) / size).view(2, len(writes))
    arrives = (near.abs() > LEFT_WITHIN) & ((far / FAR - near).abs() <= LINEAR_WITHIN * near.abs())
    if not arrives.all():
        write = writes[int((~arrives).int().argmax())]
        raise _not_linear(model, f"the output of {write.name} is not added to the residual stream unchanged")


def _pushed(push: Float[Tensor, "row 1 d_model"]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return (output.reshape(len(push), -1, push.shape[-1]) + push).view(output.shape)  # experts see flat rows

    return hook


def _random_ids(model: OpenModel, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)  # random tokens: a model without a tokenizer can be verified too
    return [rng.integers(model.family.vocabulary, size=length).tolist() for length in lengths]


def _not_linear(model: OpenModel, found: str) -> GravlensError:
    given = f"{type(model.module).__name__} cannot be orthogonalized: {found}."
    wanted = "A norm between a weight and the residual stream (Gemma 2 and 3, OLMo 2) would restore v."
    return GravlensError(given, wanted, "Ablate(everywhere(v, model)), which ablates v from the states at inference.")
