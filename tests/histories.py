"""Tiny histories whose truth is known, and how results are held against it; the models come from tiny.py."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from gravlens.errors import GravlensError
from gravlens.models import OpenModel
from gravlens.prompts import encode
from gravlens.residuals import Residuals

EOS = tiny.TOKENIZER.eos_token_id
# Ragged on purpose: one token, a genuine eos and a genuine token 0 (what padding is made of) at the end.
RAGGED = [[7, 9, 11, 30, 31, 5, 8, 21, 40], [12], [1, 50, 60, EOS], [1, 3, 70, 80, 4], [1, 90, 100, 0], [EOS]]
PROMPT_IDS = encode(tiny.TOKENIZER, tiny.PROMPTS)


@contextmanager
def refused(*named: str) -> Iterator[None]:
    """One clear error: it names the input, says what was wanted and what to try, and fits on one line."""
    with pytest.raises(GravlensError) as caught:
        yield
    error = caught.value
    assert all(name in error.given for name in named), error.given
    assert error.wanted.strip() and error.remedy.strip() and "\n" not in str(error)


def plant(model: nn.Module, vector: torch.Tensor, layer: int) -> nn.Module:
    """A copy of a GPT-2 or HookedTransformer whose `resid_post` is moved by `vector` at a layer, at every position."""
    twin: Any = copy.deepcopy(model)
    bias = twin.blocks[layer].mlp.b_out if hasattr(twin, "blocks") else twin.transformer.h[layer].mlp.c_proj.bias
    with torch.no_grad():
        bias += vector
    return twin


def planted_vector(seed: int = 0, length: float = 3.0) -> torch.Tensor:
    """A vector [d_model] of a known length, in residual units."""
    vector = torch.randn(tiny.WIDTH, generator=torch.Generator().manual_seed(seed))
    return length * vector / vector.norm()


def hooked_twin(model: Any) -> Any:
    """The same GPT-2 as a HookedTransformer, weights unprocessed; skips where TransformerLens no longer has it."""
    if int(version("transformer-lens").split(".")[0]) >= 4:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    config = HookedTransformerConfig(
        n_layers=tiny.LAYERS,
        d_model=tiny.WIDTH,
        d_head=tiny.WIDTH // 4,
        n_ctx=model.config.n_positions,
        d_vocab=tiny.VOCABULARY,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=model.config.layer_norm_epsilon,
        device="cpu",
    )
    twin = HookedTransformer(config)
    twin.load_state_dict(convert_gpt2_weights(model, config), strict=False)
    return twin.eval()


def hidden_states(model: Any, ids: list[int]) -> tuple[torch.Tensor, ...]:
    """Hugging Face's own [pos, d_model] states of one prompt alone: after the embedding, each block, the final norm."""
    with torch.no_grad():
        return tuple(h[0] for h in model(torch.tensor([ids]), output_hidden_states=True).hidden_states)


def reference(model: Any, ids: list[list[int]], layers: range, position: int = -1) -> torch.Tensor:
    """[prompt, layer, d_model] of Hugging Face alone, for layers below the last (whose hidden state is post-norm)."""
    return torch.stack(
        [torch.stack([hidden_states(model, one)[layer + 1][position] for layer in layers]) for one in ids]
    )


def assert_same_states(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Each state [..., d_model] agrees to `tolerance` of its own length."""
    found, wanted = (np.asarray(x.detach() if isinstance(x, torch.Tensor) else x) for x in (found, wanted))
    assert found.shape == wanted.shape
    error, scale = np.linalg.norm(found - wanted, axis=-1), np.linalg.norm(wanted, axis=-1)
    assert (scale > 0).all() and (error <= tolerance * scale).all(), f"off by {np.max(error / scale):.1e} of the scale"


def hooks_on(model: OpenModel) -> int:
    """How many forward hooks hang on any part of a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules())


def weights_of(folder: Path) -> Path:
    """The one safetensors file of a folder."""
    (path,) = folder.glob("*.safetensors")
    return path


def synthetic(states: Mapping[str, np.ndarray], *, prompts: str = "probes", meta: Any = None) -> Residuals:
    """Residuals with chosen states: checkpoint -> [prompt, layer, d_model]."""
    values = np.stack([np.asarray(one, dtype=np.float32) for one in states.values()])
    return Residuals(values, tuple(states), tuple(range(values.shape[2])), prompts, meta or {"dtype": ["float32"]})
