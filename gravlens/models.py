"""Opened models of every family behind one face; the only file that knows TransformerLens and Hugging Face."""

import copy
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from gravlens.bridge import boot_bridge
from gravlens.checkpoints import Checkpoint, ModelSequence
from gravlens.errors import GravlensError, check_layer
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
    weights are never processed. A model in memory is taken as it is. An `OpenModel` is returned unchanged.

    Raises:
        GravlensError: the folder is missing, damaged, holds pickled weights alone, or is no causal language model.
    """
    if isinstance(source, OpenModel):
        return source
    if isinstance(source, Checkpoint):
        source = source.source
    if isinstance(source, nn.Module):
        return _adopt(source, tokenizer, {})
    module = load_huggingface(source, dtype)
    tokenizer = tokenizer or load_tokenizer(source)
    weights = {**dict(module.named_parameters()), **_persistent_buffers(module)}
    if through == "bridge":
        module = boot_bridge(str(source), module, tokenizer)
    return _adopt(module, tokenizer, weights)


def load_huggingface(source: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model from a folder or hub id: safetensors only, no code of the checkpoint is run."""
    _check_folder(source)
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True
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
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError):
        if not Path(source).is_dir():
            _check_reach(source)
        return None


def _check_reach(source: Path | str) -> None:
    try:
        with quiet():
            AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise _not_opened(source, error) from error


def _not_opened(source: Path | str, error: Exception) -> GravlensError:
    return GravlensError(
        f"{source} could not be opened ({str(error).strip().splitlines()[0]}).",
        "A folder written by save_pretrained, or a hub id in reach, is needed; no code of a checkpoint is run.",
        "check the path and that config.json and *.safetensors lie in it.",
    )


def _check_folder(source: Path | str) -> None:
    folder = Path(source)
    if not folder.is_dir():
        if isinstance(source, Path) or folder.is_file():
            raise GravlensError(f"{source} is no folder.", "A checkpoint is a folder.", "check the path.")
        return
    tensors = sorted(folder.glob("*.safetensors"))
    if not tensors and (pickles := sorted(p.name for s in ("*.bin", "*.pt", "*.pth") for p in folder.glob(s))):
        raise GravlensError(
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}).",
            "Reading a pickle can run code, so safetensors are needed.",
            'if you trust it, convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder.name}').save_pretrained('{folder.name}-safetensors')\"",
        )
    for path in tensors:
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise damaged(path, error) from error


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

    The model that is yielded is valid until the next one is asked for. Models in memory are yielded as they are.
    """
    opened: OpenModel | None = None
    config: Any = None
    for checkpoint in checkpoints:
        if isinstance(checkpoint.source, nn.Module):
            yield checkpoint, open_model(checkpoint, tokenizer=tokenizer)
            continue
        wanted = _architecture(checkpoint.source)
        if opened is None or wanted is None or wanted != config:
            opened = None  # the old weights go before the new ones come
            opened, config = open_model(checkpoint, tokenizer=tokenizer, through=through), wanted
        else:
            _check_folder(checkpoint.source)
            swap_weights(opened, checkpoint.source)
        yield checkpoint, opened


def swap_weights(model: OpenModel, source: Path | str) -> None:
    """Put a checkpoint's weights into a model that gravlens opened from a checkpoint of the same architecture."""
    found = _read_tensors(Path(source))
    if found.keys() != model.weights.keys():  # tied, sharded in another way, or renamed: let transformers map the names
        other = load_huggingface(source, model.dtype)
        found = {**dict(other.named_parameters()), **_persistent_buffers(other)}
    wrong = [n for n, w in model.weights.items() if n not in found or found[n].shape != w.shape]
    if wrong or found.keys() - model.weights.keys():
        raise _another_shape(source, wrong or sorted(found.keys() - model.weights.keys()))
    with torch.no_grad():
        for name, weight in model.weights.items():
            weight.copy_(found[name])


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


def _persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    state = module.state_dict()
    return {name: buffer for name, buffer in module.named_buffers() if name in state}


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def _architecture(source: Path | str) -> dict[str, Any] | None:
    """The configuration without bookkeeping, for telling whether weights can be swapped; None where it is unknown."""
    try:
        config = json.loads((Path(source) / "config.json").read_text())
    except (OSError, ValueError):  # loading says what is wrong with it
        return None
    bookkeeping = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
    return {key: value for key, value in config.items() if key not in bookkeeping}


# --- the tokenizer of a sequence --------------------------------------------------------------------------------


def sequence_tokenizer(sequence: ModelSequence) -> Any:
    """The one tokenizer that all checkpoints are read with; templates never mix silently.

    Raises:
        GravlensError: no tokenizer is found, witness and anchor have different vocabularies, or different chat
            templates and `chat_template` makes no choice.
    """
    anchor, witness = (_own_tokenizer(sequence, c) for c in (sequence.anchor, sequence.witness))
    if anchor is None:
        raise GravlensError(
            f"The anchor ({sequence.anchor.described}) has no tokenizer.",
            "Prompts are texts and need one.",
            "tokenizer.save_pretrained(folder), or from_models(..., tokenizer=tokenizer).",
        )
    if witness is not None and witness.get_vocab() != anchor.get_vocab():
        raise GravlensError(
            f"Witness and anchor have different vocabularies ({len(witness)} and {len(anchor)} tokens).",
            "All checkpoints of a history read the same token ids.",
            "checkpoints of one history, or one tokenizer= for all.",
        )
    if sequence.chat_template == "none":
        return _without_template(anchor)
    template = getattr(anchor, "chat_template", None)
    if sequence.chat_template == "own" and witness is not None and witness.chat_template != template:
        raise GravlensError(
            "Witness and anchor have different chat templates"
            + (" (the witness has none)." if not witness.chat_template else "."),
            "A difference of templates alone makes a large direction, so the choice is yours and is stored.",
            'chat_template="anchor" (the anchor\'s for all) or "none" (prompts as they are).',
        )
    return anchor


def _own_tokenizer(sequence: ModelSequence, checkpoint: Checkpoint) -> Any | None:
    if sequence.tokenizer is not None:
        return sequence.tokenizer
    if isinstance(checkpoint.source, nn.Module):
        return getattr(checkpoint.source, "tokenizer", None)
    return load_tokenizer(checkpoint.source)


def _without_template(tokenizer: Any) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        return tokenizer
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    return plain


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
