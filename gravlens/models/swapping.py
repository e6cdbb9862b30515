"""One model is opened, and the weights of one checkpoint after the other are swapped into it."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from gravlens.core.errors import GravlensError
from gravlens.history.hub import local_folder
from gravlens.history.precision import as_dtype, check_unquantised, is_quantised_folder, precision_name, quantisation_of
from gravlens.history.prefetch import in_turn
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import lineage
from gravlens.history.weight_files import architecture, held_dtype, shapes_of, stored_dtype, tensors_of
from gravlens.models.adapters import merge_adapter
from gravlens.models.families import check_not_centred, folded_apart
from gravlens.models.opening import (
    OpenModel,
    checkpoint_tokenizer,
    load_huggingface,
    not_opened,
    open_model,
    quiet,
    weights_of,
)
from gravlens.models.placement import Placement


def open_each(
    checkpoints: Iterable[Checkpoint],
    *,
    tokenizer: Any | None = None,
    through: Literal["huggingface", "bridge"],
    placement: Placement = Placement(),
) -> Iterator[tuple[Checkpoint, OpenModel]]:
    """Open checkpoints one after the other: one model stays open and the weights are swapped into it.

    The model that is yielded is valid until the next one is asked for. Models in memory are yielded as they are. An
    adapter is added to its base in place, and the base's weights are put back for the next one. Quantised folders are
    opened anew, each. While one is read the next one's files are fetched (`placement.keep`).
    """
    opened: OpenModel | None = None
    config: Any = None
    with closing(in_turn(checkpoints, keep=placement.keep)) as turns:
        for checkpoint, folders in turns:
            if not folders:
                yield checkpoint, open_model(checkpoint, tokenizer=tokenizer)
                continue
            base, *adapters = folders
            wanted = _swappable(base, placement)
            if opened is None or wanted is None or wanted != config or (adapters and through == "bridge"):
                opened = None  # the old weights go before the new ones come
                # A bridge takes no adapter, so there it is merged before the bridge is made.
                first = checkpoint if adapters and through == "bridge" else base
                own = tokenizer or checkpoint_tokenizer(checkpoint)
                opened, config = open_model(first, tokenizer=own, through=through, **placement.where), wanted
            else:
                swap_weights(opened, base)
                check_not_centred(checkpoint, opened.family)
            if adapters:
                opened, same = (opened, False) if through == "bridge" else _with_adapters(opened, adapters)
                config = wanted if same else None  # embeddings that were untied do not fit the next weights
            yield checkpoint, opened


def _swappable(folder: Path, placement: Placement) -> Any:
    """What two folders have in common whose weights go into one model; None where no other's do."""
    if is_quantised_folder(folder) or (config := architecture(folder)) is None:
        return None
    return config, as_dtype(placement.dtype) or stored_dtype(folder)


def _with_adapters(model: OpenModel, adapters: Sequence[Path]) -> tuple[OpenModel, bool]:
    """Add adapters in place; whether the weights still have the names that they had."""
    for adapter in adapters:
        merge_adapter(model.module, adapter)
    weights = weights_of(model.module)
    return replace(model, weights=weights), weights.keys() == model.weights.keys()


def swap_weights(model: OpenModel, source: Path | str) -> None:
    """Put a checkpoint's weights into a model that gravlens opened from a checkpoint of the same architecture.

    Raises:
        GravlensError: weights of other names or shapes, or quantised ones.
    """
    check_unquantised(model.module, "Swapping weights in")
    folder = local_folder(source)
    if is_quantised_folder(folder):
        raise GravlensError(
            f"{source} was saved quantised.", "Plain weights are swapped.", "open_each or open_model, which open it."
        )
    shapes, tensors = shapes_of(folder), tensors_of(folder)
    if shapes.keys() != model.weights.keys():  # tied, or renamed: let transformers map the names
        found = weights_of(load_huggingface(folder, held_dtype(folder, model.dtype)))
        shapes, tensors = {name: tuple(tensor.shape) for name, tensor in found.items()}, iter(found.items())
    wanted = {name: tuple(weight.shape) for name, weight in model.weights.items()}
    if wrong := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        raise _another_shape(source, wrong)
    with torch.no_grad():
        for name, tensor in tensors:
            model.weights[name].copy_(tensor)


def one_shape(checkpoints: Sequence[Checkpoint]) -> tuple[int, int]:
    """Number of layers and width of the residual stream, by the checkpoints' configurations; nothing is opened.

    Raises:
        GravlensError: no checkpoint, one without a readable configuration, two of different shapes, or models in
            memory of which one has folded norms and another has not.
    """
    if not checkpoints:
        raise GravlensError("No checkpoint was asked for.", "At least one is read.", "checkpoints=None for all.")
    shapes = {checkpoint: _shape(checkpoint) for checkpoint in checkpoints}
    (first, wanted), *others = shapes.items()
    for checkpoint, shape in others:
        if shape != wanted:
            raise GravlensError(
                f"{checkpoint.name} ({checkpoint.described}) has {shape[0]} layers of width {shape[1]}, "
                f"{first.name} ({first.described}) has {wanted[0]} layers of width {wanted[1]}.",
                "Checkpoints of one history have one shape.",
                "checkpoints of one training history.",
            )
    _check_folded_alike([one for one in checkpoints if isinstance(one.source, nn.Module)])
    return wanted


def _check_folded_alike(checkpoints: Sequence[Checkpoint]) -> None:
    models = [(checkpoint, open_model(checkpoint)) for checkpoint in checkpoints]
    unlike = {model.family.is_folded: (checkpoint, model) for checkpoint, model in models}
    if len(unlike) > 1:
        raise folded_apart(unlike[True][0], unlike[True][1].family, unlike[False][0])


def _shape(checkpoint: Checkpoint) -> tuple[int, int]:
    if isinstance(checkpoint.source, nn.Module):
        model = open_model(checkpoint)
        return model.n_layers, model.d_model
    folder = lineage(checkpoint, weights=False)[0]
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise not_opened(folder, error) from error
    return config.num_hidden_layers, config.hidden_size


def precision_of(checkpoint: Checkpoint, placement: Placement) -> str:
    """The `precision` that a checkpoint will be opened in; its weights are not read."""
    if isinstance(checkpoint.source, nn.Module):
        return open_model(checkpoint).precision
    wanted = as_dtype(placement.dtype)
    folder = lineage(checkpoint, weights=wanted is None)[0]
    dtype = wanted or stored_dtype(folder) or torch.float32
    return precision_name(dtype, quantisation_of(folder))


def _another_shape(source: Path | str, names: list[str]) -> GravlensError:
    return GravlensError(
        f"The weights of {source} have another shape or name than those before it ({', '.join(names[:3])}).",
        "Checkpoints of one history have one shape.",
        "checkpoints of one training history.",
    )
