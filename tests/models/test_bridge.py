"""A bridge is held against Hugging Face's model when it is opened: what fails or computes something else is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from histories import assert_same_states, refused
from transformer_lens.model_bridge import TransformerBridge
from transformers import MistralConfig, MistralForCausalLM

from gravlens.activations.residuals import cache_residuals
from gravlens.history.sequence import ModelSequence
from gravlens.models import lens as bridge
from gravlens.models.opening import open_model

boot = TransformerBridge.boot_transformers


def rigged(monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    """Boot as TransformerLens does, then let something be different about the bridge."""

    def booted(*args: Any, **kwargs: Any) -> Any:
        made = boot(*args, **kwargs)
        change(made)
        return made

    monkeypatch.setattr(bridge.TransformerBridge, "boot_transformers", booted)


def scale_an_attention_output(by: float) -> Any:
    def change(made: Any) -> None:
        made.blocks[1].attn.register_forward_hook(lambda _m, _i, out: (by * out[0], *out[1:]))

    return change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bridge_that_computes_the_same_is_opened(dtype: torch.dtype, tmp_path: Path) -> None:
    opened = open_model(tiny.save(tiny.llama(), tmp_path), dtype=dtype, through="bridge")
    assert (opened.kind, opened.dtype, opened.n_layers) == ("bridge", dtype, tiny.LAYERS)


@pytest.mark.parametrize(("dtype", "by"), [(torch.float32, 1.1), (torch.bfloat16, -3.0)])
def test_a_bridge_that_computes_something_else_is_refused(
    dtype: torch.dtype, by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tiny.llama(), tmp_path)
    rigged(monkeypatch, scale_an_attention_output(by))
    with refused(str(folder), "LlamaForCausalLM", "logits that are off by"):
        open_model(folder, dtype=dtype, through="bridge")
    assert open_model(folder, dtype=dtype).kind == "huggingface"


def test_rounding_is_not_refused_though_it_moves_fp32_logits_more_than_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tiny.llama(), tmp_path)
    rigged(monkeypatch, scale_an_attention_output(1.004))  # half a unit in the last place of bf16
    open_model(folder, dtype=torch.bfloat16, through="bridge")
    with refused("off by"):
        open_model(folder, through="bridge")


def test_the_trial_sees_padding_and_the_end_of_a_sliding_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shape = {name: getattr(tiny.llama().config, name) for name in names}
    config = MistralConfig(**shape, num_key_value_heads=2, sliding_window=4, initializer_range=0.2)
    folder = tiny.save(MistralForCausalLM(config), tmp_path)
    open_model(folder, through="bridge")

    def forget_the_window(made: Any) -> None:
        made.original_model.config.sliding_window = None

    rigged(monkeypatch, forget_the_window)
    with refused("off by"):
        open_model(folder, through="bridge")


@pytest.mark.parametrize(
    "error", [ValueError("Unsupported architecture: X\nmore"), RuntimeError(""), KeyError("q_norm")]
)
def test_what_transformer_lens_cannot_boot_is_one_error_that_names_the_way_out(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tiny.llama(), tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(bridge.TransformerBridge, "boot_transformers", fail)
    with pytest.raises(ValueError, match='through="huggingface"') as caught:
        open_model(folder, through="bridge")
    assert caught.value.__cause__ is error and "more" not in str(caught.value)


def test_an_interruption_is_none_of_its_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny.save(tiny.llama(), tmp_path)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bridge.TransformerBridge, "boot_transformers", interrupt)
    with pytest.raises(KeyboardInterrupt):
        open_model(folder, through="bridge")


def test_the_trial_leaves_the_weights_and_later_readings_as_they_are(tmp_path: Path) -> None:
    folders = {n: tiny.save(tiny.llama(seed), tmp_path / n) for seed, n in enumerate(("witness", "anchor"))}
    seq = ModelSequence.from_folders(**folders, probes=tiny.PROMPTS)  # pyright: ignore
    assert_same_states(cache_residuals(seq, through="bridge").values, cache_residuals(seq).values)
    weights = open_model(folders["anchor"], through="bridge").weights
    assert all(torch.equal(weights[name], weight) for name, weight in tiny.llama(1).named_parameters())
