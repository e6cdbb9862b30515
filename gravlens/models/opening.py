"""Open a checkpoint, a folder, a hub id or a model in memory as an `OpenModel`; load weights and tokenizers."""

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from gravlens.core.errors import GravlensError
from gravlens.core.files import damaged
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Folder, Resolved, as_folder, resolve
from gravlens.models.adapters import merge_adapter
from gravlens.models.families import OpenModel, check_not_centred, family_of, library
from gravlens.models.placement import DeviceMap, as_device, check_map, no_offloading, no_room
from gravlens.models.precision import as_dtype

Openable: TypeAlias = OpenModel | Checkpoint | Resolved | Path | str | nn.Module


def open_model(
    source: Openable,
    *,
    tokenizer: Any | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str = torch.float32,
    device_map: DeviceMap = None,
    through: Literal["huggingface", "bridge"] = "huggingface",
) -> OpenModel:
    """Open a checkpoint.

    A folder or hub id is loaded as a Hugging Face model, or as a `TransformerBridge` (`through="bridge"`); weights are
    never processed. A PEFT adapter is merged into its base. A model in memory is used as it is, also quantised, unless
    its writing weights were centred. An `OpenModel` is returned unchanged.

    Args:
        source: a checkpoint (resolved or not), a folder, a hub id, a model in memory, or an `OpenModel`.
        tokenizer: default: the checkpoint's, by its `template`.
        device: as in `Placement`.
        dtype: likewise.
        device_map: likewise.
        through: `huggingface` or `bridge`.

    Raises:
        GravlensError: a folder that is missing, corrupt, has pickled weights only, or is not a causal language model;
            an adapter that does not fit its base; centred writing weights, which change `resid_post`; an unavailable
            device, an unknown dtype, weights that would be offloaded.
    """
    if isinstance(source, OpenModel):
        return source
    resolved = resolve(source if isinstance(source, Checkpoint | Resolved) else Checkpoint("this checkpoint", source))
    checkpoint = resolved.checkpoint
    if isinstance(checkpoint.source, nn.Module):
        return _adopt(checkpoint, checkpoint.source, tokenizer or checkpoint_tokenizer(resolved), {})
    base, *adapters = resolved.folders
    module = load_huggingface(base, dtype, device=device, device_map=device_map)
    tokenizer = tokenizer or checkpoint_tokenizer(resolved)
    for adapter in adapters:
        merge_adapter(module, adapter)
    weights = weights_of(module)
    _own_memory(weights)
    module = library(through).boot(str(base.path), module, tokenizer)  # a bridge may hold views of the weights
    return _adopt(checkpoint, module, tokenizer, weights)


def _own_memory(weights: Mapping[str, Tensor]) -> None:
    """Copy weights on the CPU out of the memory-mapped file.

    The mapping would keep the disk space of an evicted file. And the last bits of a matrix product depend on memory
    alignment: a checkpoint would give other bits loaded than swapped in.
    """
    for weight in weights.values():
        if weight.device.type == "cpu":
            weight.data = weight.data.clone()


def load_huggingface(
    source: Folder | Path | str,
    dtype: torch.dtype | str = torch.float32,
    *,
    device: str | torch.device = "cpu",
    device_map: DeviceMap = None,
) -> Any:
    """Load a causal language model from a folder or hub id: safetensors only, without running the checkpoint's code."""
    check_map(device, device_map)
    place, folder = as_device(device), as_folder(source)
    source, stored = folder.source, folder.weights.dtype
    if folder.is_adapter:  # transformers would open whatever base it names
        raise GravlensError(f"{source} is an adapter.", "A whole model is needed.", "open_model(…) merges adapters.")
    try:
        with quiet():
            loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
                folder.path,
                dtype=as_dtype(dtype) or stored or "auto",
                device_map=device_map or (None if place.type == "cpu" else {"": place}),
                trust_remote_code=False,
                use_safetensors=True,  # a pickle can run code
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
        raise no_offloading(f"{len(away)} weights of {source} ({away[0]}, …) do not fit on a device")
    if missing := sorted(report["missing_keys"]):
        raise GravlensError(
            f"Weights are missing from {source}: {', '.join(missing[:3])}.",
            "All are needed; transformers would initialise the missing ones at random.",
            "save the checkpoint again (model.save_pretrained of a causal language model).",
        )
    return model.eval()


def load_tokenizer(source: Folder | Path | str) -> Any | None:
    """The tokenizer of a folder or hub id, or None if it has none."""
    folder = as_folder(source, weights=False)
    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None


def checkpoint_tokenizer(checkpoint: Checkpoint | Resolved) -> Any | None:
    """The tokenizer that a checkpoint is read with, after its `template`; or None."""
    resolved = resolve(checkpoint, weights=False)
    if resolved.template is not None:
        return checkpoint_tokenizer(resolved.template)
    own = own_tokenizer(resolved)
    if own is None or resolved.checkpoint.template == "own" or not getattr(own, "chat_template", None):
        return own
    plain = copy.deepcopy(own)  # it may be the user's
    plain.chat_template = None
    return plain


def own_tokenizer(resolved: Resolved) -> Any | None:
    """A checkpoint's own tokenizer (handed over, an adapter's, or else its base's), or None.

    Raises:
        GravlensError: a folder or hub id was handed over that holds none.
    """
    checkpoint = resolved.checkpoint
    if resolved.tokenizer is not None:
        if (found := load_tokenizer(resolved.tokenizer)) is None:
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
    folders = reversed(resolved.folders)  # the adapter's first: it may have added tokens
    return next((found for folder in folders if (found := load_tokenizer(folder))), None)


def not_opened(source: Path | str, error: Exception) -> GravlensError:
    """The error for a folder that transformers cannot open."""
    return GravlensError(
        f"{source} could not be opened ({str(error).strip().splitlines()[0]}).",
        "A folder written by save_pretrained or a reachable hub id is needed; a checkpoint's own code is not run.",
        "check the path and that it has config.json and *.safetensors"
        + (", and install the missing package." if isinstance(error, ImportError) else "."),
    )


def _adopt(checkpoint: Checkpoint, module: Any, tokenizer: Any | None, weights: Mapping[str, Tensor]) -> OpenModel:
    family = family_of(module)
    check_not_centred(checkpoint, family)
    return OpenModel(family, tokenizer or getattr(module, "tokenizer", None), weights)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once, as `save_pretrained` writes them."""
    state = module.state_dict()
    return {**dict(module.named_parameters()), **{n: b for n, b in module.named_buffers() if n in state}}


def save_folder(model: OpenModel, folder: Path) -> Path:
    """Save a model and its tokenizer as a Hugging Face folder, atomically; an existing folder is replaced."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        with quiet():
            model.module.save_pretrained(scratch)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(scratch)
        shutil.rmtree(folder, ignore_errors=True)
        os.chmod(scratch, 0o755)  # mkdtemp makes it private to the user
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return folder


@contextmanager
def quiet() -> Generator[None]:
    """Silence transformers' progress bars and notices inside the block."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
