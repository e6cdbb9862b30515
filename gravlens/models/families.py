"""One class per library of models: what gravlens asks of a model, and how Hugging Face answers.

A new library is a subclass of `Family`, named in `CLASSES` and `library`. A new Hugging Face architecture needs no
code: blocks and writes are found by their shape.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gravlens import models
from gravlens.core.errors import GravlensError, check_layer
from gravlens.history.sequence import Checkpoint
from gravlens.models.precision import precision_name, quantisation

Inputs: TypeAlias = Mapping[str, Tensor]  # the fields of a `Batch`, on the model's device
CLASSES = {"TransformerBridge": "bridge", "HookedTransformer": "hooked_transformer"}
ROWS = 64  # of a tensor are inspected: not even one of them has mean 0 by chance
# |mean| · √d_model / RMS of a row is about 1 by chance; after centring only rounding is left of it.
FP32_LEAVES, ROUNDING_LEAVES = 1e-4, 4  # the second in units of the eps of a coarser dtype


@dataclass(frozen=True, eq=False)
class Write:
    """A module that adds its output to the residual stream, with its tensors and their axis of length d_model."""

    name: str
    module: nn.Module
    tensors: tuple[tuple[Tensor, int], ...]


class Family(ABC):
    """A model of one library, behind the interface that all of gravlens uses.

    Attributes:
        module: the library's own model.
        blocks: per layer, the module whose output (or its first part) is `blocks.{layer}.hook_resid_post`.
        d_model: width of the residual stream.
        name: of the family, as results store it.
        unprocessed: the call that loads such a model without processing its weights.
        own_tensors: the parameters are the checkpoint's, under their Hugging Face names.
        kv_cache: generation uses a KV cache, and `trunk` continues from one.
        padding: batches for logits and generation may hold prompts of different lengths.
    """

    name: ClassVar[str]
    unprocessed: ClassVar[str]
    own_tensors: ClassVar[bool]
    kv_cache: ClassVar[bool]
    padding: ClassVar[bool]

    def __init__(self, module: Any, blocks: Iterable[nn.Module], d_model: int) -> None:
        self.module, self.blocks, self.d_model = module, tuple(blocks), d_model

    @classmethod
    def boot(cls, source: str, module: Any, tokenizer: Any | None) -> Any:
        """Make this library's model of a Hugging Face model that was loaded from `source`."""
        raise GravlensError(
            f"through={cls.name!r} was given for {source}.",
            "Folders and hub ids are opened through 'huggingface' or 'bridge'.",
            f"hand the model over in memory: {cls.unprocessed}",
        )

    @property
    @abstractmethod
    def embedding(self) -> Tensor:
        """The first weights that inputs meet: their device and dtype are those of the residual stream."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of token ids that the embedding has a row for."""

    @property
    @abstractmethod
    def head(self) -> nn.Module | None:
        """The unembedding module."""

    @property
    @abstractmethod
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """The weights of `head`."""

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the unembedding; None where its name differs by architecture, as in transformers."""
        return None

    @abstractmethod
    def trunk(self, inputs: Inputs, cache: Any | None = None) -> None:
        """Run the blocks for the sake of hooks on them, without logits where the library allows it.

        Args:
            inputs: a padded batch.
            cache: keys and values to continue from, and to add to; only where `kv_cache`.
        """

    @abstractmethod
    def logits(self, inputs: Inputs, keep: int) -> Float[Tensor, "prompt keep vocab"]:
        """Logits at the last `keep` positions."""

    @abstractmethod
    def generate(self, inputs: Inputs, max_new_tokens: int, eos: int | None) -> Int[Tensor, "prompt pos"]:
        """Greedy continuations, the prompts included."""

    @abstractmethod
    def writes(self) -> Iterator[Write]:
        """What adds to the residual stream. Lazy: a caller that stops early has walked over little."""

    @property
    def is_folded(self) -> bool:
        """Whether the norms' weights were folded into the weights that read from them; transformers never does it."""
        return False


class HuggingFace(Family):
    """Any decoder-only model of transformers, inside a PEFT wrapper or not."""

    name = "huggingface"
    unprocessed = "AutoModelForCausalLM.from_pretrained(...) of the checkpoint's own folder."
    own_tensors = kv_cache = padding = True

    def __init__(self, module: Any) -> None:
        super().__init__(module, block_list(module), module.config.get_text_config().hidden_size)

    @classmethod
    def boot(cls, source: str, module: Any, tokenizer: Any | None) -> Any:
        """The model itself."""
        return module

    @property
    def embedding(self) -> Tensor:
        """The token embedding: quantisation and device maps leave it plain numbers on a device."""
        return self.module.get_input_embeddings().weight

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding."""
        return self.embedding.shape[0]

    @property
    def head(self) -> nn.Module | None:
        """The module that transformers names as output embeddings."""
        return self.module.get_output_embeddings()

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """Its weight."""
        return self.module.get_output_embeddings().weight

    @property
    def _inner(self) -> Any:
        """The model inside a PEFT wrapper, adapters in place: the wrapper's signature hides the model's inputs."""
        return self.module.get_base_model() if hasattr(self.module, "get_base_model") else self.module

    def trunk(self, inputs: Inputs, cache: Any | None = None) -> None:
        """Call the decoder directly: `Trainer` wraps the whole model's forward in autocast."""
        trunk = self._inner.base_model
        known = inspect.signature(trunk.forward).parameters
        # Only position_ids may be dropped: without its mask a padded batch would be read wrongly.
        given: dict[str, Any] = {key: part for key, part in inputs.items() if key != "position_ids" or key in known}
        if cache is not None:
            given["cache" if "cache" in known else "past_key_values"] = cache
        trunk(**given, use_cache=cache is not None)

    def logits(self, inputs: Inputs, keep: int) -> Float[Tensor, "prompt keep vocab"]:
        """Of the last positions alone, where the architecture can leave out the others."""
        known = inspect.signature(self._inner.forward).parameters
        given: dict[str, Any] = {key: part for key, part in inputs.items() if key in known}
        if "logits_to_keep" in known:
            given["logits_to_keep"] = keep
        return self.module(**given, use_cache=False).logits[:, -keep:]

    def generate(self, inputs: Inputs, max_new_tokens: int, eos: int | None) -> Int[Tensor, "prompt pos"]:
        """By transformers' own `generate`, whatever sampling the checkpoint's configuration asks for."""
        config = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos, pad_token_id=0 if eos is None else eos
        )
        mask = inputs["attention_mask"]
        return self.module.generate(inputs["input_ids"], attention_mask=mask, generation_config=config)

    def writes(self) -> Iterator[Write]:
        """Embeddings of the stream's width and, in each part of a block, the last projection to that width."""
        for name, child in self.module.named_modules():
            if isinstance(child, nn.Embedding) and child.embedding_dim == self.d_model:
                yield Write(name, child, ((child.weight, 1),))
        for layer, block in enumerate(self.blocks):
            for name, part in block.named_modules(prefix=f"block {layer}"):
                found = [*_projections(name, part, self.d_model), *_experts(name, part, self.d_model)]
                yield from found[-1:]


def library(name: str) -> type[Family]:
    """A family by its name. TransformerLens takes 3 s to import, so its file is loaded here, when it is asked for."""
    match name:
        case "huggingface":
            return HuggingFace
        case "bridge":
            return models.lens.Bridge
        case "hooked_transformer":
            return models.lens.Hooked
        case _:
            raise GravlensError(
                f"through={name!r} was given.", "It is 'huggingface' or 'bridge'.", 'through="huggingface".'
            )


def family_of(module: Any) -> Family:
    """The family of a model in memory, told by the names of its classes, so that no library is imported for it."""
    names = (cls.__name__ for cls in type(module).__mro__)
    return library(next((CLASSES[name] for name in names if name in CLASSES), "huggingface"))(module)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True, eq=False, repr=False)
class OpenModel:
    """A model that can be read, hooked and generated with.

    Attributes:
        family: its library's interface: blocks, logits, generation, weights by their role.
        tokenizer: its tokenizer, or None.
        weights: the parameters and persistent buffers under their Hugging Face names, where a checkpoint's weights
            can be swapped in; empty for models that were handed over.
    """

    family: Family
    tokenizer: Any | None
    weights: Mapping[str, Tensor]

    def __repr__(self) -> str:
        return f"OpenModel(kind={self.kind!r}, d_model={self.d_model})"

    @property
    def module(self) -> Any:
        """The Hugging Face model, `TransformerBridge` or `HookedTransformer` itself."""
        return self.family.module

    @property
    def kind(self) -> str:
        """`huggingface`, `bridge` or `hooked_transformer`."""
        return self.family.name

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """For each layer, the module whose output is `blocks.{layer}.hook_resid_post`."""
        return self.family.blocks

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.family.d_model

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self.family.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the residual stream is computed in."""
        return self.family.embedding.dtype

    @property
    def precision(self) -> str:
        """The dtype and, where weights are quantised, how: see `precision_name`."""
        return precision_name(self.dtype, quantisation(self.module))


def resid_post(model: OpenModel, layer: int) -> nn.Module:
    """The module whose output (or its first part) is `blocks.{layer}.hook_resid_post` [prompt, pos, d_model]."""
    return model.blocks[check_layer(layer, model.n_layers)]


# --- parts of a Hugging Face model, found by shape --------------------------------------------------------------
def block_list(module: Any) -> nn.ModuleList:
    """The blocks of a Hugging Face model: of the lists with one entry a layer, the one with the most parameters."""
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


def _projections(name: str, part: nn.Module, width: int) -> Iterator[Write]:
    for child, module in part.named_children():
        if isinstance(module, nn.Linear | Conv1D):
            axis = 1 if isinstance(module, Conv1D) else 0  # Conv1D stores [in, out]
            if module.weight.ndim == 2 and module.weight.shape[axis] == width:
                bias = () if module.bias is None else ((module.bias, 0),)  # pyright: ignore[reportUnnecessaryComparison]
                yield Write(f"{name}.{child}", module, ((module.weight, axis), *bias))


def _experts(name: str, part: nn.Module, width: int) -> Iterator[Write]:
    """Weights of several experts in one tensor [expert, out, in], or [expert, in, out] where the module says so."""
    axis = 2 if getattr(part, "is_transposed", False) else 1
    for child, weight in part.named_parameters(recurse=False):
        if weight.ndim == 3 and weight.shape[axis] == width:
            bias = getattr(part, f"{child}_bias", None)
            yield Write(f"{name}.{child}", part, ((weight, axis), *(() if bias is None else ((bias, 1),))))


# --- processed weights ------------------------------------------------------------------------------------------
def check_not_centred(checkpoint: Checkpoint, family: Family) -> None:
    """Raise if everything that writes to the stream has mean 0: its `resid_post` is not the checkpoint's.

    Cheap for a model that was not centred: the first rows of its embedding settle it.
    """
    if all_centred(pair for write in family.writes() for pair in write.tensors):
        raise GravlensError(
            f"{checkpoint.name} ({checkpoint.described}) has centred writing weights.",
            "Weights as they were trained are needed: centring subtracts the mean over d_model from resid_post.",
            family.unprocessed,
        )


def folded_apart(folded: Checkpoint, family: Family, other: Checkpoint) -> GravlensError:
    """The error for a history in which one checkpoint has folded norms and another has not."""
    return GravlensError(
        f"{folded.name} ({folded.described}) has folded norms, {other.name} ({other.described}) has not.",
        "All checkpoints of a history are processed alike, best of all not at all.",
        family.unprocessed,
    )


def all_centred(tensors: Iterable[tuple[Tensor, int]]) -> bool:
    """Whether every tensor has mean 0 over its axis. A tensor of zeros (a fresh bias) is no evidence either way."""
    told = False
    for tensor, axis in tensors:
        rows = tensor.detach().movedim(axis, -1).flatten(0, -2)[:ROWS] if tensor.ndim > 1 else tensor.detach()[None]
        scale = rows.float().square().mean().sqrt()
        if scale > 0:
            told = True
            mean = rows.float().mean(-1).square().mean().sqrt() * rows.shape[-1] ** 0.5
            if not mean <= _rounding(rows) * scale:
                return False
    return told


def _rounding(rows: Tensor) -> float:
    """What rounding leaves of a mean of 0, in the coarsest dtype that represents these numbers exactly.

    A bf16 checkpoint that was opened in fp32 still carries the rounding of bf16.
    """
    coarse = (d for d in (torch.bfloat16, torch.float16) if torch.equal(rows.to(d).to(rows.dtype), rows))
    return max([FP32_LEAVES, *(ROUNDING_LEAVES * torch.finfo(dtype).eps for dtype in coarse)])
