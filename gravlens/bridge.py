"""A `TransformerBridge` over a Hugging Face model, held against that model before it is trusted."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from gravlens.errors import GravlensError

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
