"""Open checkpoints one after the other: one model stays open, and weights are swapped into it."""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gravlens.core.errors import GravlensError
from gravlens.history.prefetch import in_turn
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Folder, Resolved, as_folder
from gravlens.models.configs import read_config
from gravlens.models.opening import (
    OpenModel,
    add_adapter,
    adopt,
    check_not_centred,
    checkpoint_tokenizer,
    load_huggingface,
    not_opened,
    open_model,
    quiet,
    shape_of,
    weights_of,
)
from gravlens.models.placement import Placement
from gravlens.models.precision import as_dtype, check_unquantised, precision_name, quantisation_in

ONE_SHAPE = "Checkpoints of one history have one shape.", "checkpoints of one training history."


def open_each(
    checkpoints: Iterable[Checkpoint | Resolved],
    *,
    tokenizer: Any | None = None,
    through: Literal["huggingface", "bridge"],
    placement: Placement = Placement(),
) -> Iterator[tuple[Checkpoint, OpenModel]]:
    """Open checkpoints one after the other: one model stays open and the weights are swapped into it.

    A yielded model is valid until the next iteration. Models in memory are yielded as they are; adapters are merged
    into their base in place, and its weights restored for the next; a quantised folder is opened as a new model, and
    adapters attached to it. The next checkpoint is prefetched meanwhile (`placement.keep`). One that is written while
    it is opened is an error.
    """
    opened: OpenModel | None = None
    config: Any = None
    with closing(in_turn(checkpoints, keep=placement.keep)) as turns:  # evicts also when the caller stops early
        for resolved in turns:
            if not resolved.folders:
                yield resolved.checkpoint, open_model(resolved, tokenizer=tokenizer)
                continue
            base, *adapters = resolved.folders
            wanted = _swappable(base, placement)
            if opened is None or wanted is None or wanted != config or (adapters and through == "bridge"):
                opened = None  # release the old weights before loading the new ones
                # A bridge takes no adapter, so it is merged before the bridge is made.
                first = resolved if adapters and through == "bridge" else replace(resolved, folders=(base,))
                own = tokenizer or checkpoint_tokenizer(resolved)
                opened, config = open_model(first, tokenizer=own, through=through, **placement.where), wanted
            else:
                swap_weights(opened, base)
                check_not_centred(resolved.checkpoint, opened.family)
            if adapters:
                opened, same = (opened, False) if through == "bridge" else _with_adapters(opened, resolved)
                config = wanted if same else None  # untied embeddings do not fit the next weights
            resolved.check_unchanged()
            yield resolved.checkpoint, opened


def _swappable(folder: Folder, placement: Placement) -> Any:
    """Return a key, equal for two folders if one's weights fit into the other's model; None if no other fits."""
    if quantisation_in(folder.config) or folder.architecture is None:
        return None
    # With "stored", bf16 weights copied into an fp32 model would be read in fp32.
    return folder.architecture, as_dtype(placement.dtype) or folder.weights.dtype


def _with_adapters(model: OpenModel, resolved: Resolved) -> tuple[OpenModel, bool]:
    """Merge or attach a checkpoint's adapters; also return whether the weights kept their names and shapes."""
    module, before = model.module, _shapes(model.weights)
    for adapter in resolved.folders[1:]:
        module = add_adapter(module, adapter)
    weights = weights_of(module)
    return adopt(resolved.checkpoint, module, model.tokenizer, weights), _shapes(weights) == before


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def swap_weights(model: OpenModel, source: Folder | Path | str) -> None:
    """Copy a checkpoint's weights into a model that gravlens opened from a checkpoint of the same architecture."""
    check_unquantised(model.module, "Swapping weights in")
    folder = as_folder(source)
    if quantisation_in(folder.config):
        given, remedy = f"{folder.source} was saved quantised.", "open_each or open_model, which open it."
        raise GravlensError(given, "Only unquantised weights can be swapped.", remedy)
    shapes, tensors = folder.weights.shapes, folder.weights.load()
    if shapes.keys() != model.weights.keys():  # tied or renamed: transformers maps the names while loading
        found = weights_of(load_huggingface(folder, folder.weights.load_dtype(model.dtype)))
        shapes, tensors = _shapes(found), iter(found.items())
    wanted = _shapes(model.weights)
    if wrong := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        given = f"The weights of {folder.source} have another shape or name than those before it"
        raise GravlensError(f"{given} ({', '.join(wrong[:3])}).", *ONE_SHAPE)
    with torch.no_grad():
        for name, tensor in tensors:
            model.weights[name].copy_(tensor)


def one_shape(checkpoints: Sequence[Resolved]) -> tuple[int, int]:
    """Return the number of layers and the width of the residual stream, by the configurations, if all agree."""
    if not checkpoints:
        raise GravlensError("No checkpoint was given.", "At least one is needed.", "checkpoints=None for all.")
    known: dict[Path, tuple[int, int]] = {}
    shapes = [_shape(checkpoint, known) for checkpoint in checkpoints]
    first, wanted = checkpoints[0], shapes[0]
    for checkpoint, shape in zip(checkpoints, shapes, strict=True):
        if shape != wanted:
            given = f"{checkpoint.name} ({checkpoint.described}) has {shape[0]} layers of width {shape[1]}, "
            given += f"{first.name} ({first.described}) has {wanted[0]} layers of width {wanted[1]}."
            raise GravlensError(given, *ONE_SHAPE)
    _check_folded_alike([one.checkpoint for one in checkpoints if not one.folders])
    return wanted


def inner_of(n_layers: int) -> tuple[int, ...]:
    """Return the inner layers of a model with `n_layers` blocks."""
    # The share of its blocks that layers 8 to 24 are of SmolLM2-135M's 30. Fixed before any result, never tuned.
    return tuple(range(round(0.27 * n_layers), min(round(0.8 * n_layers), n_layers - 1) + 1))


def _check_folded_alike(in_memory: Sequence[Checkpoint]) -> None:
    models = [(checkpoint, open_model(checkpoint)) for checkpoint in in_memory]
    unlike = {model.family.is_folded: (checkpoint, model) for checkpoint, model in models}
    if len(unlike) > 1:
        (folded, model), (other, _) = unlike[True], unlike[False]
        given = f"{folded.name} ({folded.described}) has folded norms, {other.name} ({other.described}) has not."
        wanted = "All checkpoints of a history are processed alike, best of all not at all."
        raise GravlensError(given, wanted, model.family.unprocessed)


def _shape(checkpoint: Resolved, known: dict[Path, tuple[int, int]]) -> tuple[int, int]:
    if not checkpoint.folders:
        model = open_model(checkpoint)
        return model.n_layers, model.d_model
    folder = checkpoint.base.path
    if folder not in known:
        # Each architecture has its own names for these (GPT-2: n_layer, n_embd), which only transformers knows.
        try:
            with quiet():
                known[folder] = shape_of(read_config(folder))
        except GravlensError:
            raise
        except Exception as error:  # whatever a configuration leads transformers to
            raise not_opened(folder, error) from error
    return known[folder]


def precision_of(checkpoint: Resolved, placement: Placement) -> str:
    """Return the `precision` that a checkpoint will be opened in; only headers are read."""
    if not checkpoint.folders:
        return open_model(checkpoint).precision
    dtype = as_dtype(placement.dtype) or checkpoint.base.fetched().weights.dtype or torch.float32
    return precision_name(dtype, quantisation_in(checkpoint.base.config))


def check_one_precision(precisions: Mapping[str, str]) -> None:
    """Raise where checkpoints (name -> precision) are not read in one: a difference would be the rounding's.

    Of a witness in plain weights beside a quantised anchor and its runs a warning tells: no drift is measured from it.
    """
    for other, name in pairwise(sorted(precisions, key=lambda name: name == "witness")):  # the witness is last
        one, unlike = precisions[other], precisions[name]
        given = f"{other} is read in {one}, {name} in {unlike}."
        if name == "witness" and one.startswith(f"{unlike}, "):
            remark = "v_rev includes the rounding of the anchor's weights. Try: a witness quantised alike."
            warnings.warn(f"{given} {remark}", stacklevel=3)
        elif one != unlike:
            wanted = "Checkpoints are compared in one precision: else the rounding would count as drift."
            remedy = "one dtype for all (Placement(dtype=…)), and all quantised alike or none."
            raise GravlensError(given, wanted, remedy)
