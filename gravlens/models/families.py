"""The interface to a library's models (`Family`), its implementation for Hugging Face, and `OpenModel`.

To add a library, subclass `Family` and name it in `CLASSES` and `library`. A new Hugging Face architecture needs no
code: blocks and writes are found by shape.
"""

import copy
import inspect
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.pytorch_utils import Conv1D

from gravlens import models
from gravlens.core.display import brief
from gravlens.core.errors import GravlensError, check_layer, said
from gravlens.history.encoding import pad
from gravlens.models.precision import precision_name, quantisation

ONE_DECODER = "a decoder-only language model, as in docs/architectures.md."
_TRIED: "WeakSet[nn.Module]" = WeakSet()  # models of which a block was seen to output one residual stream
Inputs: TypeAlias = Mapping[str, Tensor]  # the fields of a `Batch`, on the model's device
CLASSES = {"TransformerBridge": "bridge", "HookedTransformer": "hooked_transformer"}
CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")  # as configurations call it
ENDS = "generation_eos"  # attribute of a tokenizer: `eos_token_id` of the checkpoints that are read with it
ROWS = 64  # of a tensor are inspected: not even one of them has mean 0 by chance
# Allowed difference of logits in a batch from those alone, in units of their length, in fp32 and below.
EXACT, ROUNDED = 1e-4, 0.03
_BATCHES: "WeakKeyDictionary[nn.Module, dict[tuple[int, ...], bool]]" = WeakKeyDictionary()
_ACTIVE = {
    "training": bool,
    "_forward_hooks": OrderedDict,
    "_forward_pre_hooks": OrderedDict,
}  # of a module, and nothing
# |mean| · √d_model / RMS of a row is about 1 by chance; after centring only rounding is left of it.
FP32_LEAVES, ROUNDING_LEAVES = 1e-4, 4  # the second in units of the eps of a coarser dtype


class _Seen(Exception):  # noqa: N818 (a signal)
    """Ends a pass after its first block."""


@dataclass(frozen=True, eq=False)
class Write:
    """A module that adds its output to the residual stream."""

    name: str
    module: nn.Module
    tensors: tuple[tuple[Tensor, int], ...]  # each with its axis of length d_model
    __repr__ = brief


class Family(ABC):
    """A model of one library, behind the interface that all of gravlens uses.

    Attributes:
        module: the library's own model.
        blocks: per layer, the module with `blocks.{layer}.hook_resid_post` as its output, or as its first part.
        d_model: width of the residual stream.
        name: of the family, as results store it.
        unprocessed: the call that loads such a model without processing its weights.
        own_tensors: the parameters are the checkpoint's, under their Hugging Face names.
        kv_cache: generation uses a KV cache, and `trunk` continues from one.
    """

    name: ClassVar[str]
    unprocessed: ClassVar[str]
    own_tensors: ClassVar[bool]
    kv_cache: ClassVar[bool]

    def __init__(self, module: Any, blocks: Iterable[nn.Module], d_model: int) -> None:
        self.module, self.blocks, self.d_model = module, tuple(blocks), d_model

    @classmethod
    def boot(cls, source: str, module: Any, tokenizer: Any | None) -> Any:
        """Make this library's model of a Hugging Face model that was loaded from `source`."""
        wanted = "Folders and hub ids are opened through 'huggingface' or 'bridge'."
        raise GravlensError(f"through={cls.name!r} was given for {source}.", wanted, f"pass {cls.unprocessed}")

    @property
    @abstractmethod
    def embedding(self) -> Tensor:
        """The weights of the embedding: their device and dtype are those of the residual stream."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """Number of token ids with a row in the embedding."""

    @property
    @abstractmethod
    def head(self) -> nn.Module | None:
        """The unembedding module."""

    @property
    @abstractmethod
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """The weights of `head`."""

    @property
    def context(self) -> int | None:
        """Number of tokens that fit into the context; None where nothing limits them."""
        return None

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm before the unembedding; None where its name differs by architecture, as in transformers."""
        return None

    @abstractmethod
    def trunk(self, inputs: Inputs, cache: Any | None = None) -> None:
        """Run the blocks for their hooks, if possible without logits; continue and extend a KV `cache`."""

    @abstractmethod
    def logits(self, inputs: Inputs, keep: int, cache: Any | None = None) -> Float[Tensor, "prompt keep vocab"]:
        """Return the logits at the last `keep` positions; continue from a KV `cache`."""

    @property
    def padding(self) -> bool:
        """Whether batches for logits and generation may hold prompts of different lengths, padded on the left."""
        return False

    @property
    def batching(self) -> bool:
        """Whether they may hold several prompts at all."""
        return True

    @property
    def ends(self) -> tuple[int, ...]:
        """End-of-sequence tokens of the checkpoint's generation configuration; none where the library drops it."""
        return ()

    @abstractmethod
    def generate(self, inputs: Inputs, max_new_tokens: int, ends: Sequence[int]) -> Int[Tensor, "prompt pos"]:
        """Generate greedily until one of the tokens `ends`; the prompts are included."""

    @abstractmethod
    def writes(self) -> Iterator[Write]:
        """Yield the modules that add to the residual stream, one at a time: a caller may stop early."""

    @property
    def is_folded(self) -> bool:
        """Whether the norms' weights were folded into the weights that read from them."""
        return False  # transformers never does it


class HuggingFace(Family):
    """Any decoder-only model of transformers, or that of an image–text model, inside a PEFT wrapper or not."""

    name = "huggingface"
    unprocessed = "AutoModelForCausalLM.from_pretrained(...) of the checkpoint's own folder."
    own_tensors = kv_cache = True

    def __init__(self, module: Any) -> None:
        super().__init__(module, block_list(module), module.config.get_text_config().hidden_size)

    @property
    def context(self) -> int | None:
        return context_of(self.module.config)

    # Recurrent and hybrid models differ: RecurrentGemma, Mamba with biases and RWKV let padding into their state,
    # MiniMax into the one that generation continues from, and RWKV mixes up the prompts of a batch.
    @property
    def padding(self) -> bool:
        return self._together([13, 4])

    @property
    def batching(self) -> bool:
        return self.padding or self._together([4, 4])

    def _together(self, lengths: list[int]) -> bool:
        """Whether prompts of these lengths have the same logits together as alone: tried once per model."""
        tried = _BATCHES.setdefault(self.module, {})
        if (key := tuple(lengths)) not in tried:
            tokens = torch.linspace(1, self.vocabulary - 2, sum(lengths), device=self.embedding.device).long()
            with bare(self.module):
                tried[key] = _same_answers(self.module, [part.tolist() for part in tokens.split(lengths)])
        return tried[key]

    @classmethod
    def boot(cls, source: str, module: Any, tokenizer: Any | None) -> Any:
        return module

    @property
    def embedding(self) -> Tensor:
        # Quantisation and device maps leave these plain numbers on a device.
        return self.module.get_input_embeddings().weight

    @property
    def vocabulary(self) -> int:
        return self.embedding.shape[0]

    @property
    def head(self) -> nn.Module | None:
        return self.module.get_output_embeddings()

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        return self.module.get_output_embeddings().weight

    def trunk(self, inputs: Inputs, cache: Any | None = None) -> None:
        # Called directly: `Trainer` wraps the whole model's forward in autocast. Of an image–text model all but the
        # head: some of them mask text otherwise than their language model alone (PaliGemma).
        trunk = unwrapped(self.module).base_model
        known = inspect.signature(trunk.forward).parameters
        # Only position_ids may be dropped: without its mask a padded batch would be read wrongly.
        given: dict[str, Any] = {key: part for key, part in inputs.items() if key != "position_ids" or key in known}
        if cache is not None:
            given["cache" if "cache" in known else "past_key_values"] = cache
        trunk(**given, use_cache=cache is not None)

    def logits(self, inputs: Inputs, keep: int, cache: Any | None = None) -> Float[Tensor, "prompt keep vocab"]:
        known = inspect.signature(unwrapped(self.module).forward).parameters
        given: dict[str, Any] = {key: part for key, part in inputs.items() if key in known}
        if "logits_to_keep" in known:  # the logits of all positions may be the largest tensor of the pass
            given["logits_to_keep"] = keep
        if cache is not None:
            given["cache" if "cache" in known else "past_key_values"] = cache
        return self.module(**given, use_cache=cache is not None).logits[:, -keep:]

    @property
    def ends(self) -> tuple[int, ...]:
        return listed(getattr(self.module, "generation_config", None))

    def generate(self, inputs: Inputs, max_new_tokens: int, ends: Sequence[int]) -> Int[Tensor, "prompt pos"]:
        plain = transformers.GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(ends) or None, pad_token_id=0
        )
        with configured(self.module, plain):
            return self.module.generate(
                inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=plain
            )

    def writes(self) -> Iterator[Write]:
        # Embeddings of the stream's width and, in each part of a block, the last projection to that width.
        for name, child in decoder(self.module).named_modules():
            if isinstance(child, nn.Embedding) and child.embedding_dim == self.d_model:
                yield Write(name, child, ((child.weight, 1),))
        for layer, block in enumerate(self.blocks):
            for name, part in block.named_modules(prefix=f"block {layer}"):
                found = [*_projections(name, part, self.d_model), *_experts(name, part, self.d_model)]
                yield from found[-1:]


def listed(config: Any) -> tuple[int, ...]:
    """Return `eos_token_id` of a configuration, which is a number, a list or absent."""
    given: Any = config.get("eos_token_id") if isinstance(config, dict) else getattr(config, "eos_token_id", None)
    return () if given is None else (given,) if isinstance(given, int) else tuple(given)


def _same_answers(module: Any, prompts: Sequence[list[int]]) -> bool:
    """Whether the logits of a few steps of generation are those of each prompt alone, up to rounding."""
    try:
        together, alone = _step_logits(module, prompts), [_step_logits(module, [one]) for one in prompts]
    except Exception:  # whatever an architecture raises that cannot do it: generation itself tells the user
        return False
    within = EXACT if module.dtype in (torch.float32, torch.float64) else ROUNDED
    for found, wanted in zip(together, torch.cat(alone), strict=True):
        for one, other in zip(found, wanted, strict=True):
            if not (one - other).norm() <= within * other.norm():
                return False
            if one.argmax() != other.argmax():  # a tie: the next steps follow other tokens
                break
    return True


def _step_logits(module: Any, prompts: Sequence[list[int]]) -> Float[Tensor, "prompt step vocab"]:
    plain = transformers.GenerationConfig(
        max_new_tokens=3, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    batch = pad(prompts, side="left")
    ids, mask = (part.to(module.device) for part in batch[:2])
    with configured(module, plain):
        logits = module.generate(ids, attention_mask=mask, generation_config=plain).logits
    return torch.stack(logits, dim=1).float().cpu()


@contextmanager
def bare(module: nn.Module) -> Generator[None]:
    """Switch hooks and dropout off inside the block."""
    kept = [(vars(part), {name: vars(part)[name] for name in _ACTIVE}) for part in module.modules()]
    try:
        for held, _ in kept:
            held.update({name: value() for name, value in _ACTIVE.items()})
        yield
    finally:
        for held, before in kept:
            held.update(before)


def hooks_on(part: nn.Module) -> list[Any]:
    """Return forward hooks, except those that only record or ask for gradients."""
    hooks = [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]  # pyright: ignore[reportPrivateUsage]
    # transformers leaves its recording hooks behind after `output_hidden_states`; a bridge has some on its norms.
    recording = ("transformers.", "peft.", "transformer_lens.model_bridge.")
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith(recording)]


def acting_on(part: nn.Module) -> list[Any]:
    """Return what else than its class's code acts on a pass: `hooks_on`, hooks on all modules, a replaced `forward`."""
    everywhere = *torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()  # pyright: ignore[reportPrivateUsage]
    # accelerate replaces it too, to move what goes in to its device and what comes out to fp32: for each token alike
    moved = hasattr(part, "_hf_hook") or hasattr(part, "_original_forward")
    return [*hooks_on(part), *everywhere, *([] if moved else [one for one in [vars(part).get("forward")] if one])]


def copied(module: Any) -> Any:
    """Deep-copy a Hugging Face model.

    Raises:
        GravlensError: it has hooks on it, such as those of `intervene`: the copy would keep them for good.
    """
    backward = "_backward_hooks", "_backward_pre_hooks"
    hooked = [
        name
        for name, part in module.named_modules()
        if hooks_on(part) or any(getattr(part, kind, None) for kind in backward)
    ]
    if hooked:
        given = f"{described(module)} has hooks on it ({', '.join(hooked[:3]) or 'on the whole model'})."
        wanted = "A copy of it is needed, which would keep them, and the edits of intervene, for good."
        raise GravlensError(given, wanted, "the same call outside of intervene(…), and without hooks of your own.")
    return copy.deepcopy(module)


@contextmanager
def configured(module: nn.Module, config: transformers.GenerationConfig) -> Generator[None]:
    """Replace the model's own generation configuration, from which transformers fills what `config` leaves unset."""
    # Penalties, beams, suppressed and forced tokens, …; a PEFT wrapper may hold one in addition to its model's.
    own = [
        (vars(part), vars(part)["generation_config"]) for part in module.modules() if "generation_config" in vars(part)
    ]
    try:
        for holder, _ in own:
            holder["generation_config"] = config
        yield
    finally:
        for holder, kept in own:
            holder["generation_config"] = kept


def library(name: str) -> type[Family]:
    """Return a family by name."""
    match name:
        case "huggingface":
            return HuggingFace
        case "bridge":
            return models.lens.Bridge  # loaded here, lazily: TransformerLens takes 3 s to import
        case "hooked_transformer":
            return models.lens.Hooked
        case _:
            given, remedy = f"through={name!r} was given.", 'through="huggingface".'
            raise GravlensError(given, "It is 'huggingface' or 'bridge'.", remedy)


def family_of(module: Any) -> Family:
    """Return the family of a model in memory."""
    # By the names of its classes: isinstance would import TransformerLens.
    names = (cls.__name__ for cls in type(module).__mro__)
    return library(next((CLASSES[name] for name in names if name in CLASSES), "huggingface"))(module)  # pyright: ignore[reportCallIssue]


@dataclass(frozen=True, eq=False, repr=False)
class OpenModel:
    """A model that can be read, hooked and generated with.

    Attributes:
        family: its library's interface: blocks, logits, generation, weights by role.
        tokenizer: its tokenizer, or None.
        weights: parameters and persistent buffers by Hugging Face name, to swap a checkpoint's weights into; empty for
            a model that was passed in memory.

    Examples:
        >>> model = gl.open_model("aligned")
        >>> model.n_layers, model.d_model, model.precision
        (3, 32, 'float32')
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
        """The modules that output `blocks.{layer}.hook_resid_post`, by layer."""
        return self.family.blocks

    @property
    def d_model(self) -> int:
        return self.family.d_model

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.family.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the residual stream."""
        return self.family.embedding.dtype

    @property
    def precision(self) -> str:
        """Dtype and quantisation; see `precision_name`."""
        return precision_name(self.dtype, quantisation(self.module))


def resid_post(model: OpenModel, layer: int) -> nn.Module:
    """Return the module that outputs (alone or first) `blocks.{layer}.hook_resid_post` [prompt, pos, d_model]."""
    return model.blocks[check_layer(layer, model.n_layers)]


def context_of(config: Any) -> int | None:
    """Return the number of positions that a configuration declares; None for recurrent models and ALiBi."""
    told = vars(config.get_text_config())  # without aliases: RWKV calls the length that it was trained on so
    sizes = [told.get(name) for name in CONTEXT if isinstance(told.get(name), int) and not told.get("alibi")]
    return next((size for size in sizes if size > 0), None)


def check_context(model: OpenModel, ids: Sequence[Sequence[int]], *, new: int = 0, of: str = "") -> None:
    """Raise if a prompt, with `new` tokens to be generated, exceeds the context; `of` names the checkpoint."""
    # Learned positions would end in an index error; rotary ones go on, into angles that no training has seen.
    longest, context = max(ids, key=len), model.family.context
    if context is None or len(longest) + new <= context:
        return
    of = of or f"this {type(model.module).__name__} {getattr(model.module, 'name_or_path', '')}".strip()
    text = f"of token ids {list(longest[:8])} …"
    if model.tokenizer is not None:
        shown = " ".join(model.tokenizer.decode(longest, skip_special_tokens=True).split())
        text = repr(shown if len(shown) < 100 else f"{shown[:60]} … {shown[-30:]}")
    given = f"The prompt {text} has {len(longest)} tokens{f', and {new} more are to be generated' if new else ''}."
    left = context - len(longest)
    remedy = f"max_new_tokens={left} or less, or shorter prompts." if new and left > 0 else "shorter prompts."
    raise GravlensError(given, f"The context of {of} holds {context} tokens.", remedy)


def unwrapped(module: Any) -> Any:
    """Return the model inside a PEFT wrapper, whose signature hides the model's inputs; adapters are in place in it."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module


def decoder(module: Any) -> Any:
    """Return the language model, without its head, in a Hugging Face model: a part of an image–text one, else all."""
    inner = unwrapped(module)
    is_wrapper = inner.config.get_text_config() is not inner.config
    return inner.get_decoder() if is_wrapper else inner.base_model


def block_list(module: Any) -> nn.ModuleList:
    """Return the blocks of a Hugging Face model."""
    if not hasattr(module, "config"):
        wanted = "A Hugging Face model, a TransformerBridge or a HookedTransformer is needed."
        remedy = "AutoModelForCausalLM.from_pretrained(...) or TransformerBridge.boot_transformers(...)."
        raise GravlensError(f"A {type(module).__name__} was given.", wanted, remedy)
    n_layers = module.config.get_text_config().num_hidden_layers
    # Not of the whole module: a vision tower may have as many layers, and larger ones.
    found = [m for m in decoder(module).modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not found:
        given = f"{type(module).__name__} has no list of its {n_layers} blocks."
        wanted = "The residual stream is read at the outputs of the blocks."
        raise GravlensError(given, wanted, ONE_DECODER)
    # Some architectures have other lists of one entry per layer, such as embeddings or norms: smaller than the blocks.
    return max(found, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def check_one_stream(family: Family) -> None:
    """Raise unless a block outputs [prompt, pos, d_model]: 2 prompts of 3 tokens are run up to it, once per model."""
    if family.module in _TRIED or family.embedding.is_meta:
        return
    found = _first_output(family)
    if found != (2, 3, family.d_model):
        given = f"A block of {described(family.module)} outputs {found} for 2 prompts of 3 tokens."
        wanted = f"One residual stream, (2, 3, {family.d_model}), is read and intervened on; this family keeps several."
        raise GravlensError(given, wanted, "a family of docs/architectures.md.")
    _TRIED.add(family.module)


def _first_output(family: Family) -> tuple[int, ...] | str:
    """Return the shape of the first block's output, or what it is; the pass ends there and leaves nothing behind."""
    seen: list[tuple[int, ...] | str] = []

    def stop(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(tuple(hidden.shape) if isinstance(hidden, Tensor) else f"a {type(hidden).__name__}")
        raise _Seen

    training = [part for part in family.module.modules() if part.training]
    inputs = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    inputs["position_ids"] = torch.arange(3).expand(2, 3)
    handle = family.blocks[0].register_forward_hook(stop, prepend=True)  # before a user's
    try:
        for part in training:  # not by eval(), which a library may override; dropout would draw random numbers
            part.training = False
        with torch.no_grad():
            family.trunk({name: part.to(family.embedding.device) for name, part in inputs.items()})
    except _Seen:
        pass
    except Exception as error:
        given = f"{described(family.module)} does not run on token ids alone ({said(error)})."
        raise GravlensError(given, "A text prompt is read by a decoder-only model.", ONE_DECODER) from error
    finally:
        handle.remove()
        for part in training:
            part.training = True
    return seen[0] if seen else "nothing"


def described(module: Any) -> str:
    """Return a model's class and family, for messages."""
    kind = getattr(getattr(module, "config", None), "model_type", None)
    return f"{type(module).__name__} ({kind})" if kind else type(module).__name__


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


def all_centred(tensors: Iterable[tuple[Tensor, int]]) -> bool:
    """Whether every tensor has mean 0 over its axis, and not all are zero."""
    evidence = False
    for tensor, axis in tensors:
        rows = tensor.detach().movedim(axis, -1).flatten(0, -2)[:ROWS] if tensor.ndim > 1 else tensor.detach()[None]
        scale = rows.float().square().mean().sqrt()
        if scale > 0:  # zeros, as in a new bias, are no evidence either way
            evidence = True
            mean = rows.float().mean(-1).square().mean().sqrt() * rows.shape[-1] ** 0.5
            if not mean <= _rounding(rows) * scale:  # so written, NaN is not centred
                return False
    return evidence


def _rounding(rows: Tensor) -> float:
    """Bound what rounding leaves of a mean of 0, in the coarsest dtype that represents these numbers exactly."""
    # A bf16 checkpoint that was opened in fp32 still carries the rounding of bf16.
    coarse = (d for d in (torch.bfloat16, torch.float16) if torch.equal(rows.to(d).to(rows.dtype), rows))
    return max([FP32_LEAVES, *(ROUNDING_LEAVES * torch.finfo(dtype).eps for dtype in coarse)])
