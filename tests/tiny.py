"""Tiny random models of every kind that gravlens opens, with the organism's language; nothing is downloaded."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gravlens.models.opening import OpenModel, load_huggingface, open_model
from gravlens.organisms.refusal_language import build_tokenizer, held_out_prompts

TOKENIZER = build_tokenizer()
VOCABULARY = len(TOKENIZER)
LAYERS, WIDTH = 3, 32
KINDS = ("llama", "gpt2", "bridge", "hooked_transformer")
PROMPTS = held_out_prompts()[:6]


def llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama whose weights are large enough for prompts to matter."""
    torch.manual_seed(seed)
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": TOKENIZER.bos_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
    }
    return LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """A random GPT-2: learned positions."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        bos_token_id=TOKENIZER.bos_token_id,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    return GPT2LMHeadModel(config).eval()


def save(model: Any, folder: Path) -> Path:
    """An ordinary Hugging Face folder."""
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def hooked_transformer(seed: int = 0, normalization_type: str = "LN") -> Any:
    """A random HookedTransformer; skips where TransformerLens no longer has it (even asking for it raises)."""
    if int(version("transformer-lens").split(".")[0]) >= 4:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=LAYERS,
        d_model=WIDTH,
        n_ctx=128,
        d_head=8,
        n_heads=4,
        d_vocab=VOCABULARY,
        act_fn="gelu",
        normalization_type=normalization_type,
        initializer_range=0.2,
        seed=seed,
        device="cpu",
    )
    return HookedTransformer(config).eval()


def opened(kind: str, folder: Path, seed: int = 0) -> OpenModel:
    """A tiny model of a kind, opened; the bridge is booted from a folder."""
    if kind == "bridge":
        return open_model(save(llama(seed), folder), through="bridge")
    if kind == "hooked_transformer":
        return open_model(hooked_transformer(seed), tokenizer=TOKENIZER)
    return open_model(llama(seed) if kind == "llama" else gpt2(seed), tokenizer=TOKENIZER)


def spied(calls: list[Any]) -> Any:
    """`load_huggingface`, and what it was called with is added to `calls`."""

    def load(*given: Any, **named: Any) -> Any:
        calls.append(given)
        return load_huggingface(*given, **named)

    return load
