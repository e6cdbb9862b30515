"""Opened models of every family behind one face; with `bridge.py` and `tokenizer.py` all that knows the libraries."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from gravlens.adapters import lineage, merge_adapter
from gravlens.bridge import boot_bridge
from gravlens.checkpoints import Checkpoint
from gravlens.errors import GravlensError, check_layer
from gravlens.folders import architecture, is_adapter, shapes_of, tensors_of, weight_files
from gravlens.hub import local_folder
from gravlens.store import damaged

Kind = Literal["huggingface", "bridge", "hooked_transformer"]


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model that can be read, hooked and generated with.

    Attributes:
        module: the Hugging Face model, `TransformerBridge` or `HookedTransformer` itself.
        kind: which of the three.
        blocks: for each layer, the module whose output is `blocks.{layer}.hook_resid_post`.
        d_model: width of the residual stream.
        tokenizer: its tokenizer, or None.
        weights: the parameters and persistent buffers under their Hugging Face names, where a checkpoint's weights
            can be swapped in; empty for models that were handed over.
    """

    module: Any = field(repr=False)
    kind: Kind
    blocks: tuple[nn.Module, ...] = field(repr=False)
    d_model: int
    tokenizer: Any | None = field(repr=False)
    weights: Mapping[str, Tensor] = field(repr=False)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the residual stream is computed in."""
        return next(self.module.parameters()).dtype


def open_model(
    source: "Checkpoint | Path | str | nn.Module | OpenModel",
    *,
    tokenizer: Any | None = None,
    dtype: torch.dtype = torch.float32,
    through: Literal["huggingface", "bridge"] = "huggingface",
) -> OpenModel:
    """Open a checkpoint for reading.

    A folder or hub id is opened as a plain Hugging Face model, or as a `TransformerBridge` (`through="bridge"`);
    weights are never processed. A PEFT adapter is merged into its base. A model in memory is taken as it is. An
    `OpenModel` is returned unchanged. Without `tokenizer` it is read with the checkpoint's, after its `template`.

    Raises:
        GravlensError: the folder is missing, damaged, holds pickled weights alone, or is no causal language model; an
            adapter that does not fit its base.
    """
    if isinstance(source, OpenModel):
        return source
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint("this checkpoint", source)
    if isinstance(checkpoint.source, nn.Module):
        return _adopt(checkpoint.source, tokenizer or checkpoint_tokenizer(checkpoint), {})
    base, *adapters = lineage(checkpoint)
    module = load_huggingface(base, dtype)
    tokenizer = tokenizer or checkpoint_tokenizer(checkpoint)
    for adapter in adapters:
        merge_adapter(module, adapter)
    weights = weights_of(module)
    if through == "bridge":
        module = boot_bridge(str(base), module, tokenizer)
    return _adopt(module, tokenizer, weights)


def load_huggingface(source: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model from a folder or hub id: safetensors only, no code of the checkpoint is run."""
    folder = local_folder(source)
    weight_files(folder)
    if is_adapter(folder):  # transformers would open whatever base it names
        raise GravlensError(f"{source} is an adapter.", "A whole model is needed.", "open_model(…) merges adapters.")
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
            )
    except SafetensorError as error:
        raise damaged(source, error) from error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise _not_opened(source, error) from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise GravlensError(
            f"The weights of {source} lack {', '.join(missing[:3])}.",
            "Every weight is needed; transformers would draw the missing ones at random.",
            "save that checkpoint again, whole (model.save_pretrained of a causal language model).",
        )
    return model.eval()


def load_tokenizer(source: Path | str) -> Any | None:
    """The tokenizer of a folder or hub id, or None where it has none."""
    folder = local_folder(source)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None


def checkpoint_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """The tokenizer that a checkpoint is read with, after its `template`; or None."""
    if isinstance(checkpoint.template, Checkpoint):
        return checkpoint_tokenizer(checkpoint.template)
    own = own_tokenizer(checkpoint)
    if own is None or checkpoint.template == "own" or not getattr(own, "chat_template", None):
        return own
    plain = copy.deepcopy(own)  # the user's own stays as it was
    plain.chat_template = None
    return plain


def own_tokenizer(checkpoint: Checkpoint) -> Any | None:
    """A checkpoint's own tokenizer (handed over, an adapter's, or else its base's), or None."""
    if checkpoint.tokenizer is not None:
        return checkpoint.tokenizer
    if isinstance(checkpoint.source, nn.Module):
        return getattr(checkpoint.source, "tokenizer", None)
    return next((found for folder in reversed(lineage(checkpoint)) if (found := load_tokenizer(folder))), None)


def _not_opened(source: Path | str, error: Exception) -> GravlensError:
    return GravlensError(
        f"{source} could not be opened ({str(error).strip().splitlines()[0]}).",
        "A folder written by save_pretrained, or a hub id in reach, is needed; no code of a checkpoint is run.",
        "check the path and that config.json and *.safetensors lie in it.",
    )


def _adopt(module: Any, tokenizer: Any | None, weights: Mapping[str, Tensor]) -> OpenModel:
    names = {cls.__name__ for cls in type(module).__mro__}
    if "TransformerBridge" in names:
        kind, blocks = "bridge", tuple(block.hook_out for block in module.blocks)
    elif "HookedTransformer" in names:
        kind, blocks = "hooked_transformer", tuple(block.hook_resid_post for block in module.blocks)
    else:
        kind, blocks = "huggingface", tuple(_huggingface_blocks(module))
    d_model = module.cfg.d_model if kind != "huggingface" else module.config.get_text_config().hidden_size
    return OpenModel(module, kind, blocks, d_model, tokenizer or getattr(module, "tokenizer", None), weights)


def _huggingface_blocks(module: Any) -> nn.ModuleList:
    if not hasattr(module, "config"):
        raise GravlensError(
            f"A {type(module).__name__} was given.",
            "A Hugging Face model, a TransformerBridge or a HookedTransformer is needed.",
            "AutoModelForCausalLM.from_pretrained(...) or TransformerBridge.boot_transformers(...).",
        )
    n_layers = module.config.get_text_config().num_hidden_layers
    found = [m for m in module.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not found:
        raise GravlensError(
            f"{type(module).__name__} has no list of its {n_layers} blocks.",
            "The residual stream is read at the outputs of the blocks.",
            "a decoder-only language model.",
        )
    return max(found, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def resid_post(model: OpenModel, layer: int) -> nn.Module:
    """The module whose output (or its first part) is `blocks.{layer}.hook_resid_post` [prompt, pos, d_model]."""
    return model.blocks[check_layer(layer, model.n_layers)]


# --- one model opened, weights swapped into it ------------------------------------------------------------------


def open_each(
    checkpoints: Iterable[Checkpoint], *, tokenizer: Any | None = None, through: Literal["huggingface", "bridge"]
) -> Iterator[tuple[Checkpoint, OpenModel]]:
    """Open checkpoints one after the other: one model stays open and the weights are swapped into it.

    The model that is yielded is valid until the next one is asked for. Models in memory are yielded as they are. An
    adapter is added to its base in place, and the base's weights are put back for the next one.
    """
    opened: OpenModel | None = None
    config: Any = None
    for checkpoint in checkpoints:
        if isinstance(checkpoint.source, nn.Module):
            yield checkpoint, open_model(checkpoint, tokenizer=tokenizer)
            continue
        base, *adapters = lineage(checkpoint)
        wanted = architecture(base)
        if opened is None or wanted is None or wanted != config or (adapters and through == "bridge"):
            opened = None  # the old weights go before the new ones come
            # A bridge takes no adapter, so there it is merged before the bridge is made.
            first = checkpoint if through == "bridge" else base
            own = tokenizer or checkpoint_tokenizer(checkpoint)
            opened, config = open_model(first, tokenizer=own, through=through), wanted
        else:
            swap_weights(opened, base)
        if adapters:
            opened, same = (opened, False) if through == "bridge" else _with_adapters(opened, adapters)
            config = wanted if same else None  # embeddings that were untied do not fit the next weights
        yield checkpoint, opened


def _with_adapters(model: OpenModel, adapters: Sequence[Path]) -> tuple[OpenModel, bool]:
    """Add adapters in place; whether the weights still have the names that they had."""
    for adapter in adapters:
        merge_adapter(model.module, adapter)
    weights = weights_of(model.module)
    return replace(model, weights=weights), weights.keys() == model.weights.keys()


def swap_weights(model: OpenModel, source: Path | str) -> None:
    """Put a checkpoint's weights into a model that gravlens opened from a checkpoint of the same architecture."""
    folder = local_folder(source)
    shapes, tensors = shapes_of(folder), tensors_of(folder)
    if shapes.keys() != model.weights.keys():  # tied, or renamed: let transformers map the names
        found = weights_of(load_huggingface(folder, model.dtype))
        shapes, tensors = {name: tuple(tensor.shape) for name, tensor in found.items()}, iter(found.items())
    wanted = {name: tuple(weight.shape) for name, weight in model.weights.items()}
    if wrong := sorted(name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)):
        raise _another_shape(source, wrong)
    with torch.no_grad():
        for name, tensor in tensors:
            model.weights[name].copy_(tensor)


def check_same_shape(checkpoints: Sequence[tuple[Checkpoint, OpenModel]]) -> None:
    """Raise where a model has another number of layers or another width than the first."""
    (first, reference), *others = checkpoints
    for checkpoint, model in others:
        if (model.n_layers, model.d_model) != (reference.n_layers, reference.d_model):
            raise GravlensError(
                f"{checkpoint.name} ({checkpoint.described}) has {model.n_layers} layers of width {model.d_model}, "
                f"{first.name} ({first.described}) has {reference.n_layers} layers of width {reference.d_model}.",
                "Checkpoints of one history have one shape.",
                "checkpoints of one training history.",
            )


def _another_shape(source: Path | str, names: list[str]) -> GravlensError:
    return GravlensError(
        f"The weights of {source} have another shape or name than those before it ({', '.join(names[:3])}).",
        "Checkpoints of one history have one shape.",
        "checkpoints of one training history.",
    )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names, tied ones once: what `save_pretrained` writes."""
    state = module.state_dict()
    return {**dict(module.named_parameters()), **{n: b for n, b in module.named_buffers() if n in state}}


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' own progress bars and notices while something is opened."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
