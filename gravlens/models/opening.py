"""Open a folder, a hub id or a model in memory as an `OpenModel`: load weights, merge adapters, load tokenizers."""

import copy
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from operator import index
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import transformers
from torch import Tensor, nn

from gravlens.core.errors import GravlensError, read_object, reading, said
from gravlens.core.files import replaced, writing
from gravlens.core.limits import patterns_exceed
from gravlens.core.process_state import MODEL_MAKING, quiet
from gravlens.history.encoding import with_template_kwargs
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Folder, Resolved, as_folder, resolve
from gravlens.history.weight_files import Weights
from gravlens.models.configs import check_files, entries, read_config
from gravlens.models.families import (
    ENDS,
    ONE_DECODER,
    Family,
    OpenModel,
    all_centred,
    check_one_stream,
    described,
    family_of,
    library,
    listed,
)
from gravlens.models.placement import DeviceMap, as_device, check_map, no_offloading, no_room
from gravlens.models.precision import as_dtype, quantisation

PROCESSOR_FILES = ("chat_template.json", "processor_config.json")  # may hold a chat template beside the tokenizer's
TOKENIZER_FILES = ("tokenizer.*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # a folder with one has a tokenizer
MOST_LAYERS, MOST_WIDTH = 2**14, 2**20
ADAPTER = "gravlens"  # PEFT's name of the adapter while it is merged
WHOLE = r"modules_to_save|original_module|(token_adapter\.)?base_layer"  # PEFT's names for a whole matrix
# Tensors that some files hold and no state depends on: masks and constants that are computed today, a value head, heads
# for several tokens at once, scales of a quantised cache.
UNUSED = [r"\.masked_bias$", r"(^|\.)position_ids$", r"^v_head\.", r"(^|\.)mtp(\.|_)", r"\.[kv]_scale$"]
MASK, FREQUENCIES = r"\.(attn|attention)\.bias$", r"rotary_emb\.inv_freq$"  # unused as well, if they are these
OTHER_SENSES = [r"vision|visual|image|audio|speech|video|multi_modal|projector|connector|aligner"]
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
    """Open a checkpoint, folder, hub id (`hf://owner/name`) or model in memory; an `OpenModel` is returned unchanged.

    A folder or hub id is loaded as a Hugging Face model, or as a `TransformerBridge` (`through="bridge"`); weights are
    never processed. A PEFT adapter is merged into its base, or attached to it where that is quantised. Of an image–text
    model the language model is read. A model in memory is used as it is, also quantised.

    Args:
        tokenizer: default: the checkpoint's, by its `template`.
        device: as in `Placement`, like `dtype` and `device_map`.

    Raises:
        GravlensError: not a complete causal language model in safetensors; an adapter that does not fit its base;
            centred writing weights, which change `resid_post`; several residual streams; an unavailable device, weights
            that would be offloaded.

    Examples:
        >>> model = gl.open_model("ft/seed0/checkpoint-20", dtype="bf16")
        >>> model.precision
        'bfloat16'
        >>> gl.open_model(seq.anchor).n_layers
        3
    """
    if isinstance(source, OpenModel):
        return source
    tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    resolved = resolve(source if isinstance(source, Checkpoint | Resolved) else Checkpoint("this checkpoint", source))
    checkpoint = resolved.checkpoint
    if isinstance(checkpoint.source, nn.Module):
        return adopt(checkpoint, checkpoint.source, tokenizer or checkpoint_tokenizer(resolved), {})
    base, *adapters = resolved.folders
    module = load_huggingface(base, dtype, device=device, device_map=device_map)
    tokenizer = tokenizer or checkpoint_tokenizer(resolved)
    for adapter in adapters:
        module = add_adapter(module, adapter)
    weights = weights_of(module)
    for weight in weights.values():
        if weight.device.type == "cpu":
            # Out of the memory-mapped file: it would keep the disk space of an evicted checkpoint. And the last bits of
            # a matrix product depend on memory alignment: loaded and swapped in, a checkpoint would give other bits.
            weight.data = weight.data.clone()
    module = library(through).boot(str(base.path), module, tokenizer)  # a bridge may hold views of the weights
    return adopt(checkpoint, module, tokenizer, weights)


def load_huggingface(
    source: Folder | Path | str,
    dtype: torch.dtype | str = torch.float32,
    *,
    device: str | torch.device = "cpu",
    device_map: DeviceMap = None,
) -> Any:
    """Load a language model from a folder or hub id: safetensors only, without running the checkpoint's code.

    An image–text model is loaded as such, or as its language model alone where transformers has a class for that.
    """
    check_map(device, device_map)
    place, folder = as_device(device), as_folder(source)
    source, stored = folder.source, folder.weights.dtype
    if folder.is_adapter:  # transformers would open whatever base it names
        raise GravlensError(f"{source} is an adapter.", "A whole model is needed.", "open_model(…) merges adapters.")
    try:
        with MODEL_MAKING, quiet():
            config = read_config(folder.path)
            shape_of(config)
            loaded: Any = auto_class(config).from_pretrained(
                folder.path,
                config=config,
                dtype=as_dtype(dtype) or stored or "auto",
                device_map=device_map or (None if place.type == "cpu" else {"": place}),
                trust_remote_code=False,  # its own code may do anything
                use_safetensors=True,  # a pickle can run code
                output_loading_info=True,
            )
    except GravlensError:
        raise
    except torch.OutOfMemoryError as error:
        raise no_room(source, error) from error
    except Exception as error:  # whatever a configuration leads transformers to
        raise not_opened(folder.path, error) from error
    model, report = loaded
    check_whole(source, model, report["missing_keys"])
    names, prefix = folder.weights.tensors, model.base_model_prefix
    twice = [name for name in names if f"{prefix}.{name}" in names]  # transformers would read one of the two
    # transformers passes over frequencies without a word
    apart = {*report["unexpected_keys"], *(name for name in names if re.search(FREQUENCIES, name))}
    unexpected = [*(name for name in apart if not is_computed(name, folder.weights, model)), *twice]
    check_all_used(source, model, unexpected, wrapper=config.get_text_config() is not config)
    for part in model.modules():
        # On some processors bitsandbytes packs 4-bit weights at the first pass, to compute in bf16 whatever dtype was
        # asked for; `state_dict()`, which PEFT calls too, then mixes up their scales.
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
    return model.eval()  # no dropout


def check_whole(source: Path | str, model: Any, absent: Iterable[str]) -> None:
    """Raise if weights are missing from a checkpoint, or do not fit on a device."""
    if away := [name for name, weight in model.named_parameters() if weight.is_meta]:
        raise no_offloading(f"{len(away)} weights of {source} ({away[0]}, …) do not fit on a device")
    if missing := sorted(absent):
        wanted = "All are needed; transformers would initialise the missing ones at random."
        remedy = "save the checkpoint again (model.save_pretrained of a causal language model)."
        raise GravlensError(f"Weights are missing from {source}: {', '.join(missing[:3])}.", wanted, remedy)


def shape_of(config: Any) -> tuple[int, int]:
    """Return n_layers and d_model of a configuration; raise ValueError for numbers that no model has."""
    text = config.get_text_config()
    n_layers, d_model = index(text.num_hidden_layers), index(text.hidden_size)
    # a thousand million blocks would take all time and memory before a weight is read
    if not (0 < n_layers <= MOST_LAYERS and 0 < d_model <= MOST_WIDTH):
        raise ValueError(f"config.json speaks of {n_layers} layers of width {d_model}")
    return n_layers, d_model


def auto_class(config: Any) -> Any:
    """Return the class of transformers that loads a configuration: a causal language model or, if need be, a wrapper.

    Raises:
        GravlensError: an encoder–decoder.
    """
    if config.is_encoder_decoder:
        given = f"{config.name_or_path or 'The configuration'} is an encoder–decoder ({config.model_type})."
        raise GravlensError(given, "One residual stream from prompt to answer is read.", ONE_DECODER)
    wrapper = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    alone = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return transformers.AutoModelForImageTextToText if wrapper and not alone else transformers.AutoModelForCausalLM


def check_all_used(source: Path | str, model: Any, unexpected: Iterable[str], *, wrapper: bool) -> None:
    """Raise if tensors of a checkpoint have no place in its family, except a wrapper's for images and sound."""
    harmless = UNUSED + OTHER_SENSES if wrapper else UNUSED
    if lost := sorted(name for name in unexpected if not re.search("|".join(harmless), name)):
        given = f"{source} holds {len(lost)} tensors that {described(model)} has no place for: "
        wanted = "Without them another model would be read than was trained."
        remedy = "a config.json of the family and depth that was trained; adapters in a folder of their own."
        raise GravlensError(f"{given}{', '.join(lost[:3])}{', …' * (len(lost) > 3)}.", wanted, remedy)


def is_computed(name: str, weights: Weights, model: Any) -> bool:
    """Whether a tensor of a checkpoint is a causal mask, or the frequencies that the model computes."""
    if re.search(MASK, name):
        return name in weights.tensors and len(weights.tensors[name].shape) == 4  # a bias has one axis
    if not re.search(FREQUENCIES, name):
        return False
    found = next((tensor for other, tensor in weights.load() if other == name), None)
    own = [buffer.cpu() for other, buffer in model.named_buffers() if re.search(FREQUENCIES, other)]
    return found is not None and any(one.shape == found.shape and torch.allclose(one, found.to(one)) for one in own)


def add_adapter(module: Any, folder: Folder) -> Any:
    """Merge a PEFT adapter into a Hugging Face model, in place, or attach it to a quantised one; return what to use."""
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    _ = folder.weights  # raises on a pickled or truncated adapter before PEFT changes the model
    if hasattr(module, "peft_config"):
        raise _does_not_fit(folder, "its base is an adapter over quantised weights, which cannot be merged first")
    try:
        with MODEL_MAKING, quiet(), warnings.catch_warnings():  # PEFT asks transformers for names that it will drop
            warnings.simplefilter("ignore", FutureWarning)
            adapted, lost = _adapted(module, folder)
            # Merging would round the sum to the base's few bits.
            whole = adapted if lost or quantisation(module) else adapted.merge_and_unload(safe_merge=True)
    except GravlensError:
        raise
    except Exception as error:  # whatever a configuration leads PEFT to
        raise _does_not_fit(folder, said(error)) from error
    if lost:
        adapted.unload()
        raise _does_not_fit(folder, f"{len(lost)} tensors have no counterpart, the first is {sorted(lost)[0]}")
    for name, weight in whole.named_parameters():  # PEFT freezes the base
        weight.requires_grad_(name in trained)
    return whole.eval()


def _adapted(module: Any, folder: Folder) -> tuple[Any, set[str]]:
    """Return PEFT's model with the adapter attached, and the names of tensors without a counterpart."""
    try:
        from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    except ImportError as error:
        given = f"{folder.path} is an adapter and PEFT is not installed."
        raise GravlensError(given, "Adapters are merged by PEFT.", "pip install peft, or gravlens[train].") from error
    config = PeftConfig.from_pretrained(str(folder.path))
    # The first makes PEFT import a module that the file names, the second adds blocks to the model.
    for foreign in ("megatron_config", "layer_replication"):
        if getattr(config, foreign, None):
            raise _does_not_fit(folder, f"it uses {foreign}")
    if config.peft_type in ("XLORA", "SHADOW"):
        raise _does_not_fit(folder, "its kind loads other models that its configuration names")
    texts = [text for pair in entries(folder.config) for text in pair if isinstance(text, str)]
    if found := patterns_exceed(texts, (name for name, _ in module.named_modules())):
        raise _does_not_fit(folder, f"a regular expression in its configuration {found} on the names of modules")
    if config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise _does_not_fit(folder, f"{kind} adds positions to every prompt and changes no weights")
    config.inference_mode = True
    tensors = dict(folder.weights.load())
    # Of an embedding that was resized and trained PEFT saves the same weights under two names, and reads one.
    again = [
        name for name in tensors if ".modules_to_save." in name and name.replace(".modules_to_save", "") in tensors
    ]
    tensors = {name: tensor for name, tensor in tensors.items() if name not in again}
    if not hasattr(module.base_model, "language_model") and any(".language_model." in name for name in tensors):
        tensors = _of_text_alone(config, tensors)
    _resize_embeddings(module, tensors)
    adapted = PeftModel(module, config, adapter_name=ADAPTER)
    # PeftModel.from_pretrained would also load a pickled adapter; here it only gets tensors from safetensors.
    report = set_peft_model_state_dict(adapted, tensors, adapter_name=ADAPTER)
    # PEFT skips unused and missing tensors silently. What it would not save either is tied to another, or computed.
    empty = {name for name in report.missing_keys if ADAPTER in name.split(".")}  # the base's are missing as a rule
    saved = get_peft_model_state_dict(adapted, adapter_name=ADAPTER, save_embedding_layers=False)
    empty = empty if saved.keys() - tensors.keys() else set[str]()
    return adapted, empty | set(report.unexpected_keys)


def _of_text_alone(config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors under the names of the text model, if it was trained in an image–text model."""
    kept = {
        name.replace(".language_model.", ".", 1): tensor
        for name, tensor in tensors.items()
        if not re.search("|".join(OTHER_SENSES), name)
    }
    # Names that end in these are adapted; a pattern could ask for `language_model`.
    config.target_modules = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in kept}
    return kept


def _resize_embeddings(module: Any, tensors: Mapping[str, Tensor]) -> None:
    """Resize a model's vocabulary to an adapter's, as its training did, if the adapter holds every row of it."""
    ends = [part for part in (module.get_input_embeddings(), module.get_output_embeddings()) if part is not None]
    paths = {part: re.escape(path) for path, part in module.named_modules()}
    tied = all(part.weight is ends[0].weight for part in ends)
    names = [re.compile(rf"\.{paths[part]}(\.({WHOLE}))?\.weight$") for part in (ends[:1] if tied else ends)]
    held = [{len(tensor) for name, tensor in tensors.items() if pattern.search(name)} for pattern in names]
    sizes = set.intersection(*held)
    if len(sizes) == 1 and (rows := sizes.pop()) != len(ends[0].weight):
        module.resize_token_embeddings(rows, mean_resizing=False)


def _does_not_fit(folder: Folder, reason: str) -> GravlensError:
    wanted = "Every tensor of an adapter must match the base; otherwise the base would be compared with itself."
    remedy = "the model that it was trained over, or merge_and_unload() there and save_pretrained()."
    return GravlensError(f"The adapter {folder.path} does not fit its base ({reason}).", wanted, remedy)


def load_tokenizer(source: Folder | Path | str) -> Any | None:
    """Load the tokenizer of a folder or hub id, or return None if it has none."""
    folder = as_folder(source, weights=False)
    for place in folder.places:
        check_files(place)
        try:
            with quiet():
                found: Any = tokenizer_class(place).from_pretrained(place, trust_remote_code=False)
        except BaseException as error:  # whatever its files lead transformers to; a panic in Rust is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            if any(next(place.glob(pattern), None) for pattern in TOKENIZER_FILES):
                raise not_opened(place, error, "tokenizer.json and tokenizer_config.json") from error
            continue  # an adapter's folder without one, or a model's
        if not getattr(found, "chat_template", None):
            found.chat_template = processor_template(place)
        if not found.chat_template and os.path.lexists(template := place / "chat_template.jinja"):
            given = f"{template} is empty, or no file."
            raise GravlensError(given, "Without it prompts would be read plain.", "copy it again, or remove it.")
        setattr(found, ENDS, stored_ends(folder.path))
        return found
    return None


def tokenizer_class(folder: Path) -> Any:
    """Return the class of transformers that reads a folder's tokenizer as it was saved."""
    path = folder / "tokenizer_config.json"
    # AutoTokenizer replaces what some families declare by a class of their own, also where it is tokenizer.json as it
    # stands: a word-level vocabulary beside a Qwen2 was read as a byte-level one, most prompts as the same tokens.
    as_it_is = path.is_file() and read_object(path).get("tokenizer_class") == "TokenizersBackend"
    if as_it_is and (folder / "tokenizer.json").is_file():
        return transformers.PreTrainedTokenizerFast
    return transformers.AutoTokenizer


def processor_template(folder: Path) -> str | dict[str, str] | None:
    """Return the chat template that an image-text model's processor has, where the tokenizer has none."""
    for name in PROCESSOR_FILES:
        if (folder / name).is_file() and (found := read_object(folder / name).get("chat_template")):
            return found
    return None


def text_tokenizer(given: Any) -> Any:
    """Return a tokenizer as it is; of a processor its tokenizer, with the processor's chat template if it has none."""
    if isinstance(given, transformers.PreTrainedTokenizerBase) or not hasattr(given, "tokenizer"):
        return given
    own, template = given.tokenizer, getattr(given, "chat_template", None)
    if getattr(own, "chat_template", None) or not template:
        return own
    own = copy.copy(own)  # it may be the user's
    own.chat_template = template
    return own


def stored_ends(folder: Path) -> tuple[int, ...]:
    """Return `eos_token_id` of a folder's generation configuration or, as transformers does, of its config.json."""
    for name in ("generation_config.json", "config.json"):
        if (path := folder / name).is_file():
            with reading(path, "eos_token_id is a token id, or a list of them.", "save the checkpoint again."):
                return tuple(map(index, listed(read_object(path))))
    return ()


def checkpoint_tokenizer(checkpoint: Checkpoint | Resolved) -> Any | None:
    """Load the tokenizer that a checkpoint is read with, by its `template`; None if there is none."""
    resolved = resolve(checkpoint, weights=False)
    if resolved.template is not None:
        return checkpoint_tokenizer(resolved.template)
    own = own_tokenizer(resolved)
    if own is not None and resolved.checkpoint.template == "own":
        return with_template_kwargs(own, resolved.checkpoint.chat_template_kwargs)
    if own is None or not getattr(own, "chat_template", None):
        return own
    plain = copy.copy(own)  # it may be the user's
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
        return text_tokenizer(checkpoint.tokenizer)
    if isinstance(checkpoint.source, nn.Module):
        return getattr(checkpoint.source, "tokenizer", None)
    folders = reversed(resolved.folders)  # the adapter's first: it may have added tokens
    return next((found for folder in folders if (found := load_tokenizer(folder))), None)


def not_opened(folder: Path, error: BaseException, files: str = "config.json and *.safetensors") -> GravlensError:
    """Return the error for a folder that transformers cannot open."""
    broken = ""
    for path in sorted(folder.glob("*.json")):  # transformers seldom names the file
        with suppress(GravlensError):
            read_object(path)
            continue
        broken += f"; {path.name} is no JSON object"
    given = f"{folder} could not be opened ({said(error)}{broken})."
    wanted = "A folder written by save_pretrained or a reachable hub id is needed; a checkpoint's own code is not run."
    package = ", and install the missing package" if isinstance(error, ImportError) else ""
    return GravlensError(given, wanted, f"check the path and its {files}{package}.")


def adopt(checkpoint: Checkpoint, module: Any, tokenizer: Any | None, weights: Mapping[str, Tensor]) -> OpenModel:
    """Return a model in memory as an `OpenModel`, after checking that its blocks output `resid_post`."""
    family = family_of(module)
    check_one_stream(family)
    check_not_centred(checkpoint, family)
    tokenizer = text_tokenizer(tokenizer or getattr(module, "tokenizer", None))
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
    computed = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        for name in part._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
    }
    buffers = {name: buffer for name, buffer in module.named_buffers() if name not in computed}
    return {**dict(module.named_parameters()), **buffers}


def save_folder(model: OpenModel, folder: Path) -> Path:
    """Save a model and its tokenizer as a Hugging Face folder, atomically; an existing folder is replaced."""

    def save(scratch: Path) -> None:
        with quiet(), writing(folder, Exception):
            model.module.save_pretrained(scratch)
            if model.tokenizer is not None:
                model.tokenizer.save_pretrained(scratch)

    return replaced(folder, save)
