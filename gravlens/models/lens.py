"""TransformerLens models: `TransformerBridge`, and `HookedTransformer` where the installed version has it.

The only file that imports TransformerLens; `families.library` loads it for the first such model.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import GenerationConfig

from gravlens.core.errors import GravlensError, said
from gravlens.core.process_state import quiet
from gravlens.models.families import Family, Inputs, Write, all_centred, configured, context_of, listed

with quiet():  # imported, it silences transformers for good
    from transformer_lens.model_bridge import TransformerBridge

TRIAL = 16  # tokens of a trial prompt
# Allowed difference of logits, in units of their spread, at the worst quarter of tokens (where rounding makes a router
# choose another expert, that is one token). Rounding gives 1e-6 in fp32 and up to 0.1 in bf16, a wrong rotary
# embedding 0.5.
EXACT, ROUNDED = 1e-3, 0.25


class _Lens(Family):
    """Names of weights, hook points and `forward`, common to bridges and HookedTransformers."""

    own_tensors = False
    # Wrong in TransformerLens 3.9 to 4.3, as is `padding`: a bridge's cache stays empty where transformers calls it
    # `cache`, and HookedTransformer counts learned positions twice without a tokenizer.
    kv_cache = False

    @property
    def embedding(self) -> Tensor:
        return next(self.module.parameters())

    @property
    def vocabulary(self) -> int:
        return self.module.cfg.d_vocab

    @property
    def head(self) -> nn.Module | None:
        return getattr(self.module, "unembed", None)

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        return self.module.W_U.T  # stored as [d_model, vocab]

    @property
    def context(self) -> int | None:
        return self.module.cfg.n_ctx

    @property
    def final_norm(self) -> nn.Module:
        if hasattr(self.module, "ln_final"):
            return self.module.ln_final
        given = f"This {type(self.module).__name__} has no final norm (no ln_final)."
        wanted = "A logit lens needs the norm before the unembedding."
        raise GravlensError(given, wanted, "the Hugging Face model, opened from its folder.")

    def trunk(self, inputs: Inputs, cache: Any | None = None) -> None:
        # With return_type=None a HookedTransformer stops before its unembedding; a bridge does not.
        self.module(inputs["input_ids"], attention_mask=inputs["attention_mask"], return_type=None)

    def logits(self, inputs: Inputs, keep: int, cache: Any | None = None) -> Float[Tensor, "prompt keep vocab"]:
        return self.module(inputs["input_ids"], attention_mask=inputs["attention_mask"])[:, -keep:]

    def generate(self, inputs: Inputs, max_new_tokens: int, ends: Sequence[int]) -> Int[Tensor, "prompt pos"]:
        # A bridge over a recurrent model hands over to transformers' own generation.
        with configured(self.module, GenerationConfig()):
            return self.module.generate(
                inputs["input_ids"], max_new_tokens=max_new_tokens, do_sample=False, stop_at_eos=bool(ends),
                eos_token_id=list(ends) or None, return_type="tokens", verbose=False, use_past_kv_cache=False,
            )  # fmt: skip

    def writes(self) -> Iterator[Write]:
        yield from _named(self.module, -1, "embed.W_E", "pos_embed.W_pos")
        for block in self.module.blocks:
            yield from _named(block, -1, "attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out")

    @property
    def is_folded(self) -> bool:
        # Folding a LayerNorm leaves centred reading weights. A folded RMS norm shows only in a HookedTransformer, which
        # then has none of its own (`RMSPre`); in a bridge its weights are 1, as in any model at initialisation.
        bare_rms = getattr(self.module.cfg, "normalization_type", None) == "RMSPre"
        reads = (write for block in self.module.blocks for write in _named(block, -2, "attn.W_Q", "mlp.W_in"))
        return bare_rms or all_centred(pair for read in reads for pair in read.tensors)


class Bridge(_Lens):
    """A `TransformerBridge`; its logits are compared with those of the Hugging Face model that it wraps."""

    name = "bridge"
    unprocessed = (
        "TransformerBridge.boot_transformers(...) without enable_compatibility_mode(), or with "
        "enable_compatibility_mode(no_processing=True)."
    )

    def __init__(self, module: Any) -> None:
        super().__init__(module, (block.hook_out for block in module.blocks), module.cfg.d_model)

    @property
    def context(self) -> int | None:
        return context_of(self.module.original_model.config)  # `n_ctx` is invented for families without a limit

    @property
    def ends(self) -> tuple[int, ...]:
        return listed(getattr(self.module.original_model, "generation_config", None))

    @classmethod
    def boot(cls, source: str, module: Any, tokenizer: Any | None) -> Any:
        """Make a bridge of the module, in place, in its own dtype.

        Raises:
            GravlensError: TransformerLens does not know the architecture, fails, or computes other logits.
        """
        dtype, vocabulary = module.dtype, module.get_input_embeddings().weight.shape[0]
        ids = torch.linspace(1, vocabulary - 2, 2 * TRIAL, device=module.device).long().view(2, TRIAL)
        wanted = _trial_logits(module, ids)
        try:
            # The bridge keeps the parameters themselves, so names recorded before still reach them.
            bridge = TransformerBridge.boot_transformers(source, hf_model=module, tokenizer=tokenizer, dtype=dtype)
            found = _trial_logits(bridge, ids)
        except Exception as error:  # whatever goes wrong inside TransformerLens, the remedy is the same
            raise _refused(source, module, f"fails ({said(error)})") from error
        spread = wanted.std(dim=-1).clamp(min=1e-30) * wanted.shape[-1] ** 0.5
        off = float(((found - wanted).norm(dim=-1) / spread).quantile(0.75))
        # Weights that diverged have no logits to compare; reading their states says so, with the cause.
        if wanted.isfinite().all() and not off <= (EXACT if dtype in (torch.float32, torch.float64) else ROUNDED):
            raise _refused(source, module, f"computes logits that are off by {off:.1g} of their spread")
        return bridge


class Hooked(_Lens):
    """A `HookedTransformer`, passed in memory."""

    name = "hooked_transformer"
    unprocessed = "HookedTransformer.from_pretrained_no_processing(...)."

    def __init__(self, module: Any) -> None:
        super().__init__(module, (block.hook_resid_post for block in module.blocks), module.cfg.d_model)


def _named(part: Any, axis: int, *names: str) -> Iterator[Write]:
    """Yield the tensors that a part has under these names, with their axis of length d_model."""
    for name in names:
        found = part
        with suppress(NotImplementedError):  # quantised: a bridge's processing cannot read these either
            for step in name.split("."):
                found = getattr(found, step, None)
        if isinstance(found, Tensor):
            yield Write(name, getattr(part, name.split(".")[0]), ((found, axis),))


def _trial_logits(module: Any, ids: Int[Tensor, "prompt pos"]) -> Float[Tensor, "pos vocab"]:
    mask = torch.ones_like(ids)
    mask[1, TRIAL // 2 :] = 0  # the second of two prompts is padded: masks are where architectures go wrong
    with torch.no_grad():
        out = module(ids, attention_mask=mask)
    return (out if isinstance(out, Tensor) else out.logits)[mask.bool()].float()


def _refused(source: str, module: Any, what: str) -> GravlensError:
    given = f"TransformerBridge over {source} ({type(module).__name__}, {module.dtype}) {what}."
    remedy = 'through="huggingface", which reads the same activations, or another version of transformer-lens.'
    return GravlensError(given, "A bridge must compute the logits of the Hugging Face model.", remedy)
