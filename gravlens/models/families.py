"""A `TransformerBridge` over a Hugging Face model, held against that model before it is trusted."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers.pytorch_utils import Conv1D

from gravlens.core.errors import GravlensError
from gravlens.history.sequence import Checkpoint

TRIAL = 16  # tokens of a prompt
# Difference of logits in units of their spread, at the worst quarter of tokens (a router of experts that rounding tips
# over is one token's affair). Rounding makes 1e-6 in fp32 and up to .1 in bf16, a wrong rotary embedding .5.
EXACT, ROUNDED = 1e-3, 0.25


def boot_bridge(source: str, module: Any, tokenizer: Any | None) -> Any:
    """The same weights as a bridge, in the module's own dtype; the module is altered in place.

    Raises:
        GravlensError: TransformerLens does not know the family, fails at it, or computes something else. In bf16 only
            what is grossly wrong can be told from rounding.
    """
    dtype, vocabulary = module.dtype, module.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(1, vocabulary - 2, 2 * TRIAL, device=module.device).long().view(2, TRIAL)
    wanted = _logits(module, ids)
    try:
        # The bridge keeps the parameters themselves, so names recorded before still reach them.
        bridge = TransformerBridge.boot_transformers(source, hf_model=module, tokenizer=tokenizer, dtype=dtype)
        found = _logits(bridge, ids)
    except Exception as error:  # whatever goes wrong inside TransformerLens, the remedy is the same
        raise _refused(source, module, f"fails ({(str(error).strip() or repr(error)).splitlines()[0]})") from error
    spread = wanted.std(dim=-1).clamp(min=1e-30) * wanted.shape[-1] ** 0.5
    off = float(((found - wanted).norm(dim=-1) / spread).quantile(0.75))
    if not off <= (EXACT if dtype in (torch.float32, torch.float64) else ROUNDED):
        raise _refused(source, module, f"computes logits that are off by {off:.1g} of their spread")
    return bridge


def _logits(module: Any, ids: Int[Tensor, "prompt pos"]) -> Float[Tensor, "pos vocab"]:
    """At every true token of two prompts, the second of them padded."""
    mask = torch.ones_like(ids)
    mask[1, TRIAL // 2 :] = 0
    with torch.no_grad():
        out = module(ids, attention_mask=mask)
    return (out if isinstance(out, Tensor) else out.logits)[mask.bool()].float()


def _refused(source: str, module: Any, what: str) -> GravlensError:
    return GravlensError(
        f"TransformerBridge over {source} ({type(module).__name__}, {module.dtype}) {what}.",
        "A bridge computes what Hugging Face's model computes.",
        'through="huggingface", which gives the same states without it, or another version of transformer-lens.',
    )


Kind = Literal["huggingface", "bridge", "hooked_transformer"]
ROWS = 64  # of a tensor are looked at: by chance not even one of them has the mean 0
# A row's |mean| · √d_model / RMS is 1 or so by chance, and what rounding leaves where the mean was taken off.
FP32_LEAVES, ROUNDING_LEAVES = 1e-4, 4  # the second times the eps of a coarser dtype
LOADED_RIGHT = {
    "huggingface": "the checkpoint as it was trained, AutoModelForCausalLM.from_pretrained(...) of its own folder.",
    "bridge": "TransformerBridge.boot_transformers(...) without enable_compatibility_mode(), or with "
    "enable_compatibility_mode(no_processing=True).",
    "hooked_transformer": "HookedTransformer.from_pretrained_no_processing(...).",
}


@dataclass(frozen=True, eq=False)
class Write:
    """A module whose output is added to the residual stream, with its tensors and their axis of length d_model."""

    name: str
    module: nn.Module
    tensors: tuple[tuple[Tensor, int], ...]


def writes_of(module: nn.Module, blocks: Sequence[nn.Module], width: int) -> Iterator[Write]:
    """Of a Hugging Face model: embeddings of the stream's width and, in each part of a block, the last projection.

    They come one by one, so that a caller who stops early has walked over little.
    """
    for name, child in module.named_modules():
        if isinstance(child, nn.Embedding) and child.embedding_dim == width:
            yield Write(name, child, ((child.weight, 1),))
    for layer, block in enumerate(blocks):
        for name, part in block.named_modules(prefix=f"block {layer}"):
            found = [*_projections(name, part, width), *_experts(name, part, width)]
            yield from found[-1:]


def _projections(name: str, part: nn.Module, width: int) -> Iterator[Write]:
    for child, module in part.named_children():
        if isinstance(module, nn.Linear | Conv1D):
            axis = 1 if isinstance(module, Conv1D) else 0
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


# --- centred or folded ------------------------------------------------------------------------------------------
def check_not_centred(checkpoint: Checkpoint, module: Any, kind: Kind, blocks: Sequence[nn.Module], width: int) -> None:
    """Raise where all that writes to the stream has the mean 0: another `resid_post` than the checkpoint's own.

    A model that was not centred shows it in the first rows of its embedding, so this costs next to nothing.
    """
    if kind == "huggingface":
        writes = (pair for write in writes_of(module, blocks, width) for pair in write.tensors)
    else:
        writes = _lens(module, ("embed.W_E", "pos_embed.W_pos"), "attn.W_O attn.b_O mlp.W_out mlp.b_out".split(), -1)
    if _all_centred(writes):
        raise GravlensError(
            f"{checkpoint.name} ({checkpoint.described}) has centred writing weights.",
            "resid_post is that of the weights as they were trained; centring takes its mean over d_model away.",
            LOADED_RIGHT[kind],
        )


def is_folded(module: Any, kind: Kind) -> bool:
    """Whether the norms of a bridge or a HookedTransformer were folded into what reads from them.

    Folding a LayerNorm leaves reading weights that are centred. A folded RMS norm shows only where a HookedTransformer
    has it without weights: in a bridge its weights are one, as they are in any model at its initialisation.
    """
    if kind == "huggingface":
        return False
    bare_rms = getattr(module.cfg, "normalization_type", None) == "RMSPre"
    return bare_rms or _all_centred(_lens(module, (), ("attn.W_Q", "mlp.W_in"), -2))


def folded_apart(folded: Checkpoint, kind: Kind, other: Checkpoint) -> GravlensError:
    """The refusal of a folded checkpoint beside one that is not."""
    return GravlensError(
        f"{folded.name} ({folded.described}) has folded norms, {other.name} ({other.described}) has not.",
        "Checkpoints of one history are processed alike, best of all not at all.",
        LOADED_RIGHT[kind],
    )


def _lens(module: Any, outer: Iterable[str], inner: Iterable[str], axis: int) -> Iterator[tuple[Tensor, int]]:
    """Tensors under TransformerLens' names, of the model and of each block, those that it has."""
    for part, names in [(module, outer), *((block, inner) for block in module.blocks)]:
        for name in names:
            found = part
            with suppress(NotImplementedError):  # quantised: a bridge's processing cannot read it either
                for step in name.split("."):
                    found = getattr(found, step, None)
            if isinstance(found, Tensor):
                yield found, axis


def _all_centred(tensors: Iterable[tuple[Tensor, int]]) -> bool:
    """Whether each tensor has the mean 0 over its axis; tensors of zeros say nothing, and cannot speak alone."""
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
    """What rounding leaves of a mean of 0, in the coarsest dtype that holds these very numbers."""
    coarse = (d for d in (torch.bfloat16, torch.float16) if torch.equal(rows.to(d).to(rows.dtype), rows))
    return max([FP32_LEAVES, *(ROUNDING_LEAVES * torch.finfo(dtype).eps for dtype in coarse)])
