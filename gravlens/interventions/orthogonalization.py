"""One direction taken out of the weights: every matrix and bias that writes to the residual stream, orthogonalised."""

import copy
import os
import shutil
import tempfile
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
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Direction
from gravlens.history.precision import check_unquantised
from gravlens.history.prompts import pad
from gravlens.history.sequence import Checkpoint
from gravlens.interventions.edits import Ablate
from gravlens.interventions.hooks import check_fit
from gravlens.models.families import Write, writes_of
from gravlens.models.opening import OpenModel, open_model, quiet

LEFT_WITHIN = 1e-4  # of a state's length, along v
LINEAR_WITHIN = 1e-2
FAR = 1000.0  # how much further the second push goes: a norm after the write would hold it back


def orthogonalize(
    source: Checkpoint | Path | str | nn.Module | OpenModel, direction: Direction, *, out: Path | str
) -> Path:
    """Save `orthogonalized`, W ← W − v (vᵀ W), as an ordinary Hugging Face folder, whole or not at all.

    Args:
        source: see `orthogonalized`, like `direction`; it is never changed.
        out: the new folder.

    Raises:
        GravlensError: `out` is there already, or what `orthogonalized` raises; then nothing is written.
    """
    out = Path(out)
    if out.exists():
        raise GravlensError(f"{out} is there already.", "Nothing is written over.", "another name, or remove it.")
    return save_folder(orthogonalized(source, direction), out)


def orthogonalized(source: Checkpoint | Path | str | nn.Module | OpenModel, direction: Direction) -> OpenModel:
    """A copy of a model that cannot write along v: W ← W − v (vᵀ W) wherever W writes to the residual stream.

    Those are the token embedding and learned positions, and in each block the output projections of attention, MLP and
    experts, with their biases. The unembedding stays as it was: tied embeddings are untied. The copy computes what the
    model computes with ⟨w, v⟩ v taken off every single write w: of the embedding, of attention, of the MLP
    ("Refusal in Language Models Is Mediated by a Single Direction", Arditi et al. 2024, weight orthogonalisation).

    No table of architectures is kept: the writes are found by their shape and place, then measured. On random tokens
    the states hold nothing along v (10⁻⁴ of their length), and a push of each write along v arrives in the stream
    in proportion.

    Args:
        source: a folder, a hub id, a checkpoint, or a Hugging Face model in fp32; it is never changed.
        direction: one vector of one layer; the layer only names it, the residual stream has one basis.

    Raises:
        GravlensError: directions of several layers, a direction that is undefined, not of unit length or of another
            width; a model that is no plain Hugging Face model in fp32 or fp64, or quantised; an architecture that
            rescales a write after it (Gemma 2 and 3, OLMo 2) or that writes in another way.
    """
    model = _own_copy(source)
    vector = _vector_of(direction, model)
    writes = tuple(writes_of(model.module, model.blocks, model.d_model))
    _untie(model.module)
    with torch.no_grad():
        for tensor, axis in (pair for write in writes for pair in write.tensors):
            rows, v = tensor.movedim(axis, -1), vector.to(tensor.device)
            rows -= (rows @ v)[..., None] * v
    _check_nothing_left(model, writes, vector)
    _check_each_writes(model, writes, vector)
    return model


def save_folder(model: OpenModel, folder: Path) -> Path:
    """Save a model and its tokenizer as an ordinary Hugging Face folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with quiet():
            model.module.save_pretrained(scratch)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.chmod(scratch, 0o755)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder


def _own_copy(source: Checkpoint | Path | str | nn.Module | OpenModel) -> OpenModel:
    """A model that nobody else holds."""
    model = open_model(source)
    check_unquantised(model.module, "Orthogonalising")
    if model.kind != "huggingface" or hasattr(model.module, "peft_config"):
        raise GravlensError(
            f"A {type(model.module).__name__} was given.",
            "A plain Hugging Face model is orthogonalised.",
            "the checkpoint's folder, or an adapter's merged model (merge_and_unload()).",
        )
    if model.dtype not in (torch.float32, torch.float64):
        raise GravlensError(
            f"The model is in {str(model.dtype).removeprefix('torch.')}.",
            "Rounding would put some of v back into every weight, so fp32 is needed.",
            "the checkpoint's folder or open_model(folder), which open it in fp32.",
        )
    if isinstance(source, OpenModel) or not model.weights:  # it was handed over
        return open_model(copy.deepcopy(model.module), tokenizer=model.tokenizer)
    return replace(model, weights={})  # an untied model has other names than its checkpoint


def _vector_of(direction: Direction, model: OpenModel) -> Float[Tensor, " d_model"]:
    if not isinstance(direction, Direction):
        raise GravlensError(
            f"{type(direction).__name__} of layers {[one.layer for one in direction]} were given."
            if hasattr(direction, "__iter__")
            else f"A {type(direction).__name__} was given.",
            "v_rev differs by layer, but the residual stream that the weights write to has one basis for all layers, "
            "so one direction of one named layer is taken out.",
            "name the layer: directions[12], or locate_vrev(sequence, layer=12).",
        )
    Ablate(direction)  # an undefined direction, or one that is not of unit length, is refused in the same words
    check_fit(direction, model)
    vector = torch.tensor(direction.vector, dtype=torch.float64)
    return (vector / vector.norm()).to(model.device, model.dtype)


def _untie(module: Any) -> None:
    """Give the unembedding weights of its own, where it shares those of the token embedding."""
    head = module.get_output_embeddings()
    if head is None or head.weight is not module.get_input_embeddings().weight:
        return
    head.weight = nn.Parameter(head.weight.detach().clone())
    module.config.tie_word_embeddings = module.config.get_text_config().tie_word_embeddings = False
    module.all_tied_weights_keys = {}


# --- that it holds, by measurement ------------------------------------------------------------------------------
def _check_nothing_left(model: OpenModel, writes: Sequence[Write], vector: Tensor) -> None:
    """Random prompts of 1 to 16 tokens: their states have nothing along v at any layer."""
    states = read_residuals(model, _random_ids(model, range(1, 17)), layers=range(model.n_layers))
    left = ((states @ vector.float().cpu()).abs() / states.norm(dim=-1)).amax(0)
    if not (left <= LEFT_WITHIN).all():
        layer = int((~(left <= LEFT_WITHIN)).int().argmax())
        raise _not_linear(
            model,
            f"with v taken out of its {len(writes)} writes, {left[layer]:.1%} of a state is along v at layer {layer}",
        )


def _check_each_writes(model: OpenModel, writes: Sequence[Write], vector: Tensor) -> None:
    """A push of a write along v arrives in the last block's states along v, and one FAR times as large FAR times so.

    Nothing else writes along v any more, so what does not arrive was no write, and what arrives out of proportion is
    rescaled on its way. One row of a batch for each push.
    """
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
        raise _not_linear(model, f"what {write.name} gives does not arrive in the residual stream as it is")


def _pushed(push: Float[Tensor, "row 1 d_model"]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return (output.reshape(len(push), -1, push.shape[-1]) + push).view(output.shape)  # experts see flat rows

    return hook


def _random_ids(model: OpenModel, lengths: Sequence[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    size = model.module.get_input_embeddings().num_embeddings
    return [rng.integers(size, size=length).tolist() for length in lengths]


def _not_linear(model: OpenModel, found: str) -> GravlensError:
    return GravlensError(
        f"{type(model.module).__name__} cannot be orthogonalised: {found}.",
        "Each write is added to the residual stream as the weights give it; a norm between the two (Gemma 2 and 3, "
        "OLMo 2) would put v back.",
        "Ablate(everywhere(v, model)), which takes v out of the states at inference.",
    )
