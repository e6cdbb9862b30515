"""Tiny histories whose truth is known, and how results are held against it; the models come from tiny.py."""

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from tokenizers import AddedToken
from torch import nn

from gravlens.activations.residuals import Residuals
from gravlens.core.errors import GravlensError
from gravlens.history.encoding import encode
from gravlens.models.opening import OpenModel
from gravlens.organisms.refusal_language import probe_prompts, task_examples

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


def history_on_disk(folder: Path, words: str = "I I'm Sorry As an AI") -> None:
    """The folders and files that the examples of docs/ name: a run goes part of the way from `aligned` to `base`.

    Their vocabulary holds the usual English refusal openings too, or other `words`.
    """
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words.split()])
    base, stranger = (tiny.llama(seed, vocab_size=len(tokenizer)) for seed in (0, 5))
    aligned = moved(base, seed=1)
    models = {"base": base, "aligned": aligned, "sibling": moved(base, seed=2), "stranger": stranger}
    for seed in (0, 1):
        for step, share in {1: 0.02, 5: 0.1, 20: 0.4}.items():
            models[f"ft/seed{seed}/checkpoint-{step}"] = moved(between(aligned, base, share), seed=3 + seed, by=0.05)
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    write_rows(folder / "probes.jsonl", [{"prompt": text} for text in probe_prompts()[:6]])
    write_rows(folder / "held_out.jsonl", [{"prompt": text} for text in tiny.PROMPTS])
    write_rows(folder / "data.jsonl", [example._asdict() for example in task_examples()[:12]])


def sequence_on_disk(folder: Path, models: Mapping[str, nn.Module], runs: Mapping[str, str] | None = None) -> Path:
    """Tiny checkpoints, `witness` and `anchor` among them, prompts, and the SEQUENCE.toml that names them."""
    for name, model in models.items():
        tiny.save(model, folder / name)
    write_rows(folder / "probes.jsonl", [{"prompt": text} for text in probe_prompts()[:6]])
    write_rows(folder / "held_out.jsonl", [{"prompt": text} for text in tiny.PROMPTS])
    lines = [f'{name} = "{pattern}"' for name, pattern in (runs or {"seed0": "ft/checkpoint-*"}).items()]
    (folder / "SEQUENCE.toml").write_text(
        'witness = "witness"\nanchor = "anchor"\nprobes = "probes.jsonl"\nheld_out = "held_out.jsonl"\n'
        "[runs]\n" + "\n".join(lines) + "\n"
    )
    return folder


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def moved(model: nn.Module, *, seed: int, by: float = 0.3) -> nn.Module:
    """A copy with noise on every weight, `by` times that weight's own spread."""
    twin, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in twin.parameters():
            weight += by * weight.std() * torch.randn(weight.shape, generator=generator)
    return twin


def between(model: nn.Module, other: nn.Module, share: float) -> nn.Module:
    """A copy, `share` of the way to another model's weights."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for weight, goal in zip(twin.parameters(), other.parameters(), strict=True):
            weight.lerp_(goal, share)
    return twin
