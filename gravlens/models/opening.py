"""Opened models of every family behind one face; all that knows the libraries, with `processing.py`,
`bridge.py` and `tokenizer.py`."""

import copy
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from gravlens.core.errors import GravlensError, check_layer
from gravlens.core.files import damaged
from gravlens.history.hub import local_folder
from gravlens.history.precision import as_dtype, precision_name, quantisation
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import lineage
from gravlens.history.weight_files import is_adapter, stored_dtype, weight_files
from gravlens.models.adapters import merge_adapter
from gravlens.models.families import Kind, boot_bridge, check_not_centred
from gravlens.models.placement import DeviceMap, as_device, check_map, no_offloading, no_room


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
        return self._embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the residual stream is computed in."""
        return self._embedding.dtype

    @property
    def precision(self) -> str:
        """What it computes in, as `precision_name` says it."""
        return precision_name(self.dtype, quantisation(self.module))

    @property
    def _embedding(self) -> Tensor:
        """The first weights that inputs meet; quantisation and device maps leave them numbers on a device."""
        if self.kind == "huggingface":
            return self.module.get_input_embeddings().weight
        return next(self.module.parameters())


Openable: TypeAlias = OpenModel | Checkpoint | Path | str | nn.Module


def open_model(
    source: Openable,
    *,
    tokenizer: Any | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    device_map: DeviceMap = None,
    through: Literal["huggingface", "bridge"] = "huggingface",
) -> OpenModel:
    """Open a checkpoint for reading.

    A folder or hub id is opened as a plain Hugging Face model, or as a `TransformerBridge` (`through="bridge"`);
    weights are never processed. A PEFT adapter is merged into its base. A model in memory is taken as it is, where it
    is, quantised or not, unless its writing weights were centred. An `OpenModel` is returned unchanged.

    Args:
        source: a checkpoint, a folder, a hub id, a model in memory, or an `OpenModel`.
        tokenizer: default: the checkpoint's, after its `template`.
        device: as in `Placement`.
        dtype: likewise.
        device_map: likewise.
        through: `huggingface` or `bridge`.

    Raises:
        GravlensError: the folder is missing, damaged, holds pickled weights alone, or is no causal language model; an
            adapter that does not fit its base; centred writing weights, whose `resid_post` is another; no such device
            here, no such dtype, weights that would be offloaded.
    """
    if isinstance(source, OpenModel):
        return source
    checkpoint = source if isinstance(source, Checkpoint) else Checkpoint("this checkpoint", source)
    if isinstance(checkpoint.source, nn.Module):
        return _adopt(checkpoint, checkpoint.source, tokenizer or checkpoint_tokenizer(checkpoint), {})
    base, *adapters = lineage(checkpoint)
    module = load_huggingface(base, dtype, device=device, device_map=device_map)
    tokenizer = tokenizer or checkpoint_tokenizer(checkpoint)
    for adapter in adapters:
        merge_adapter(module, adapter)
    weights = weights_of(module)
    _own_memory(weights)
    if through == "bridge":  # which may hold views of them
        module = boot_bridge(str(base), module, tokenizer)
    return _adopt(checkpoint, module, tokenizer, weights)


def _own_memory(weights: Mapping[str, Tensor]) -> None:
    """Take weights out of the file that they are a view of, on the CPU.

    An evicted file's room would stay taken; and a product's last bits depend on where in memory its numbers lie, so a
    checkpoint would give other bits opened than swapped in.
    """
    for weight in weights.values():
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()


def load_huggingface(
    source: Path | str,
    dtype: torch.dtype | str = torch.float32,
    *,
    device: str | torch.device = "cpu",
    device_map: DeviceMap = None,
) -> Any:
    """A causal language model from a folder or hub id: safetensors only, no code of the checkpoint is run."""
    check_map(device, device_map)
    place, folder = as_device(device), local_folder(source)
    weight_files(folder)
    if is_adapter(folder):  # transformers would open whatever base it names
        raise GravlensError(f"{source} is an adapter.", "A whole model is needed.", "open_model(…) merges adapters.")
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=as_dtype(dtype) or stored_dtype(folder) or "auto",
                device_map=device_map or (None if place.type == "cpu" else {"": place}),
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise damaged(source, error) from error
    except torch.OutOfMemoryError as error:
        raise no_room(source, error) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise not_opened(source, error) from error
    model, report = loaded
    if away := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise no_offloading(f"{len(away)} weights of {source} ({away[0]}, …) found no room on a device")
    if missing := sorted(report["missing_keys"]):
        raise GravlensError(
            f"The weights of {source} lack {', '.join(missing[:3])}.",
            "Every weight is needed; transformers would draw the missing ones at random.",
            "save that checkpoint again, whole (model.save_pretrained of a causal language model).",
        )
    return model.eval()


def load_tokenizer(source: Path | str) -> Any | None:
    """The tokenizer of a folder or hub id, or None where it has none."""
    folder = local_folder(source, weights=False)
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
    """A checkpoint's own tokenizer (handed over, an adapter's, or else its base's), or None.

    Raises:
        GravlensError: a folder or hub id was handed over that holds none.
    """
    if isinstance(checkpoint.tokenizer, str | Path):
        if (found := load_tokenizer(checkpoint.tokenizer)) is None:
            raise GravlensError(
                f"{checkpoint.tokenizer} holds no tokenizer.",
                "tokenizer= is a tokenizer, or a folder or hub id of one.",
                "a folder written by tokenizer.save_pretrained.",
            )
        return found
    if checkpoint.tokenizer is not None:
        return checkpoint.tokenizer
    if isinstance(checkpoint.source, nn.Module):
        return getattr(checkpoint.source, "tokenizer", None)
    folders = reversed(lineage(checkpoint, weights=False))
    return next((found for folder in folders if (found := load_tokenizer(folder))), None)


def not_opened(source: Path | str, error: Exception) -> GravlensError:
    """The error for a folder that transformers cannot open."""
    return GravlensError(
        f"{source} could not be opened ({str(error).strip().splitlines()[0]}).",
        "A folder written by save_pretrained, or a hub id in reach, is needed; no code of a checkpoint is run.",
        "check the path and that config.json and *.safetensors lie in it"
        + (", and install what it names." if isinstance(error, ImportError) else "."),
    )


def _adopt(checkpoint: Checkpoint, module: Any, tokenizer: Any | None, weights: Mapping[str, Tensor]) -> OpenModel:
    names = {cls.__name__ for cls in type(module).__mro__}
    if "TransformerBridge" in names:
        kind, blocks = "bridge", tuple(block.hook_out for block in module.blocks)
    elif "HookedTransformer" in names:
        kind, blocks = "hooked_transformer", tuple(block.hook_resid_post for block in module.blocks)
    else:
        kind, blocks = "huggingface", tuple(block_list(module))
    d_model = module.cfg.d_model if kind != "huggingface" else module.config.get_text_config().hidden_size
    check_not_centred(checkpoint, module, kind, blocks, d_model)
    return OpenModel(module, kind, blocks, d_model, tokenizer or getattr(module, "tokenizer", None), weights)


def block_list(module: Any) -> nn.ModuleList:
    """The blocks of a Hugging Face model."""
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


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names, tied ones once: what `save_pretrained` writes."""
    state = module.state_dict()
    return {**dict(module.named_parameters()), **{n: b for n, b in module.named_buffers() if n in state}}


@contextmanager
def quiet() -> Generator[None]:
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
