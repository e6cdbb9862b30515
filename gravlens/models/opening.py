"""Open a folder, a hub id or a model in memory as an `OpenModel`: load weights, merge adapters, load tokenizers."""

import copy
import json
import logging
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from gravlens.core.errors import GravlensError
from gravlens.core.files import damaged, once
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Folder, Resolved, as_folder, resolve
from gravlens.models.families import ENDS, Family, OpenModel, all_centred, family_of, library, listed
from gravlens.models.placement import DeviceMap, as_device, check_map, no_offloading, no_room
from gravlens.models.precision import as_dtype, check_unquantised

ADAPTER = "gravlens"  # PEFT's name of the adapter while it is merged
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
    """Open a checkpoint, a folder, a hub id or a model in memory; an `OpenModel` is returned unchanged.

    A folder or hub id is loaded as a Hugging Face model, or as a `TransformerBridge` (`through="bridge"`); weights are
    never processed. A PEFT adapter is merged into its base. A model in memory is used as it is, also quantised.

    Args:
        tokenizer: default: the checkpoint's, by its `template`.
        device: as in `Placement`, like `dtype` and `device_map`.

    Raises:
        GravlensError: not a complete causal language model in safetensors; an adapter that does not fit its base;
            centred writing weights, which change `resid_post`; an unavailable device, weights that would be offloaded.
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
    for weight in weights.values():
        if weight.device.type == "cpu":
            # Out of the memory-mapped file: it would keep the disk space of an evicted checkpoint. And the last bits of
            # a matrix product depend on memory alignment: loaded and swapped in, a checkpoint would give other bits.
            weight.data = weight.data.clone()
    module = library(through).boot(str(base.path), module, tokenizer)  # a bridge may hold views of the weights
    return _adopt(checkpoint, module, tokenizer, weights)


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
                trust_remote_code=False,  # its own code may do anything
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
        wanted = "All are needed; transformers would initialise the missing ones at random."
        remedy = "save the checkpoint again (model.save_pretrained of a causal language model)."
        raise GravlensError(f"Weights are missing from {source}: {', '.join(missing[:3])}.", wanted, remedy)
    return model.eval()  # no dropout


def merge_adapter(module: Any, folder: Folder) -> None:
    """Merge a PEFT adapter into the weights of a Hugging Face model, in place; no second model is made."""
    check_unquantised(module, "Merging an adapter")
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    _ = folder.weights  # raises on a pickled or truncated adapter before PEFT changes the model
    try:
        with warnings.catch_warnings():  # PEFT asks transformers for names that it will drop
            warnings.simplefilter("ignore", FutureWarning)
            merged, lost = _merged(module, folder)
    except GravlensError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _does_not_fit(folder, reason) from error
    if lost:
        raise _does_not_fit(folder, f"{len(lost)} tensors have no counterpart, the first is {sorted(lost)[0]}")
    for name, weight in merged.named_parameters():  # PEFT freezes the base
        weight.requires_grad_(name in trained)


def _merged(module: Any, folder: Folder) -> tuple[Any, set[str]]:
    """Return the model with the adapter merged by PEFT, and the names of tensors without a counterpart."""
    try:
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        given = f"{folder.path} is an adapter and PEFT is not installed."
        raise GravlensError(given, "Adapters are merged by PEFT.", "pip install peft, or gravlens[train].") from error
    config = PeftConfig.from_pretrained(str(folder.path))
    # The first makes PEFT import a module that the file names, the second adds blocks to the model.
    for foreign in ("megatron_config", "layer_replication"):
        if getattr(config, foreign, None):
            raise _does_not_fit(folder, f"it uses {foreign}")
    config.inference_mode = True
    adapted = PeftModel(module, config, adapter_name=ADAPTER)
    # PeftModel.from_pretrained would also load a pickled adapter; here it only gets tensors from safetensors.
    report = set_peft_model_state_dict(adapted, dict(folder.weights.load()), adapter_name=ADAPTER)
    # PEFT skips unused and missing tensors silently.
    empty = {name for name in report.missing_keys if ADAPTER in name.split(".")}  # the base's are missing as a rule
    lost = empty | set(report.unexpected_keys)
    return adapted.unload() if lost else adapted.merge_and_unload(safe_merge=True), lost


def _does_not_fit(folder: Folder, reason: str) -> GravlensError:
    wanted = "Every tensor of an adapter must match the base; otherwise the base would be compared with itself."
    remedy = "the model that it was trained over, or merge_and_unload() there and save_pretrained()."
    return GravlensError(f"The adapter {folder.path} does not fit its base ({reason}).", wanted, remedy)


def load_tokenizer(source: Folder | Path | str) -> Any | None:
    """Load the tokenizer of a folder or hub id, or return None if it has none."""
    folder = as_folder(source, weights=False)
    try:
        with quiet():
            found: Any = transformers.AutoTokenizer.from_pretrained(folder.path, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        return None
    setattr(found, ENDS, stored_ends(folder.path))
    return found


def stored_ends(folder: Path) -> tuple[int, ...]:
    """Return `eos_token_id` of a folder's generation configuration or, as transformers does, of its config.json."""
    for name in ("generation_config.json", "config.json"):
        with suppress(OSError, ValueError):
            return listed(json.loads((folder / name).read_text("utf-8")))
    return ()


def checkpoint_tokenizer(checkpoint: Checkpoint | Resolved) -> Any | None:
    """Load the tokenizer that a checkpoint is read with, by its `template`; None if there is none."""
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
    """Load a checkpoint's own tokenizer: the one given, the adapter's, or else its base's; None if there is none."""
    checkpoint = resolved.checkpoint
    if resolved.tokenizer is not None:
        if (found := load_tokenizer(resolved.tokenizer)) is None:
            given, wanted = f"{checkpoint.tokenizer} holds no tokenizer.", "tokenizer= is one, or a folder or hub id."
            raise GravlensError(given, wanted, "a folder written by tokenizer.save_pretrained.")
        return found
    if checkpoint.tokenizer is not None:
        return checkpoint.tokenizer
    if isinstance(checkpoint.source, nn.Module):
        return getattr(checkpoint.source, "tokenizer", None)
    folders = reversed(resolved.folders)  # the adapter's first: it may have added tokens
    return next((found for folder in folders if (found := load_tokenizer(folder))), None)


def not_opened(source: Path | str, error: Exception) -> GravlensError:
    """Return the error for a folder that transformers cannot open."""
    given = f"{source} could not be opened ({str(error).strip().splitlines()[0]})."
    wanted = "A folder written by save_pretrained or a reachable hub id is needed; a checkpoint's own code is not run."
    package = ", and install the missing package" if isinstance(error, ImportError) else ""
    return GravlensError(given, wanted, f"check the path and that it has config.json and *.safetensors{package}.")


def _adopt(checkpoint: Checkpoint, module: Any, tokenizer: Any | None, weights: Mapping[str, Tensor]) -> OpenModel:
    family = family_of(module)
    check_not_centred(checkpoint, family)
    tokenizer = tokenizer or getattr(module, "tokenizer", None)
    if tokenizer is not None and not hasattr(tokenizer, ENDS):  # one that the user loaded, perhaps for another library
        folder = Path(str(getattr(tokenizer, "name_or_path", "")))
        setattr(tokenizer, ENDS, stored_ends(folder) if folder.name else ())
    return OpenModel(family, tokenizer, weights)


def check_not_centred(checkpoint: Checkpoint, family: Family) -> None:
    """Raise if everything that writes to the residual stream has mean 0: `resid_post` is not the checkpoint's."""
    # Cheap for a model that was not centred: the first rows of its embedding settle it.
    if all_centred(pair for write in family.writes() for pair in write.tensors):
        given = f"{checkpoint.name} ({checkpoint.described}) has centred writing weights."
        wanted = "Weights as trained are needed: centring subtracts the mean over d_model from resid_post."
        raise GravlensError(given, wanted, family.unprocessed)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, tied ones once, as `save_pretrained` writes them."""
    state = module.state_dict()
    return {**dict(module.named_parameters()), **{n: b for n, b in module.named_buffers() if n in state}}


def save_folder(model: OpenModel, folder: Path) -> Path:
    """Save a model and its tokenizer as a Hugging Face folder, atomically; an existing folder is replaced."""

    def save(scratch: Path) -> None:
        with quiet():
            model.module.save_pretrained(scratch)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(scratch)

    return once(folder, save, replace=True)


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
