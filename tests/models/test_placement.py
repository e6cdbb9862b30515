"""Where checkpoints lie while they are read: devices, dtypes, device maps; what cannot be had is one clear line."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from histories import RAGGED, assert_same_states, refused, sequence_on_disk
from safetensors.torch import load_file, save_file

from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.core.errors import GravlensError
from gravlens.directions.vrev import locate_vrev
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.opening import OpenModel, load_huggingface, open_model
from gravlens.models.placement import Placement, as_device
from gravlens.models.swapping import open_each, swap_weights

ALL = range(tiny.LAYERS)
GPU = torch.accelerator.current_accelerator(check_available=True)
on_a_gpu = pytest.mark.skipif(GPU is None, reason="needs a GPU")
EVERYWHERE_CPU = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """One folder in bf16 and one in fp32."""
    return [
        tiny.save(tiny.llama(0).bfloat16(), tmp_path / "half"),
        tiny.save(tiny.llama(1), tmp_path / "full"),
    ]


def states(source: Any, **where: Any) -> torch.Tensor:
    return read_residuals(open_model(source, **where), RAGGED, layers=ALL)


def placed(*folders: Path, **where: Any) -> Iterator[tuple[Checkpoint, OpenModel]]:
    rows = [Checkpoint(f"run/{step}", folder, step) for step, folder in enumerate(folders)]
    return open_each(rows, through="huggingface", placement=Placement(**where))


@pytest.mark.parametrize(
    ("given", "half", "full"),
    [
        (torch.float32, torch.float32, torch.float32),
        ("fp32", torch.float32, torch.float32),
        ("bf16", torch.bfloat16, torch.bfloat16),
        ("torch.float16", torch.float16, torch.float16),
        ("stored", torch.bfloat16, torch.float32),
        ("auto", torch.bfloat16, torch.float32),
    ],
)
def test_a_dtype_by_itself_by_its_name_or_as_stored(pair: list[Path], given: Any, half: Any, full: Any) -> None:
    found = [open_model(folder, dtype=given).dtype for folder in pair]
    assert found == [half, full]
    assert [model.dtype for _, model in placed(*pair, dtype=given)] == found


def test_stored_weights_are_those_of_the_file_and_not_rounded_to_the_first_ones(pair: list[Path]) -> None:
    for (_, model), folder in zip(placed(*pair, pair[0], dtype="stored"), [*pair, pair[0]], strict=True):
        for name, weight in load_file(folder / "model.safetensors").items():
            assert torch.equal(model.weights[name], weight) and model.weights[name].dtype == weight.dtype


def test_stored_is_what_the_file_holds_whatever_the_configuration_says(pair: list[Path]) -> None:
    config = pair[1] / "config.json"
    config.write_text(config.read_text().replace('"float32"', '"bfloat16"'))
    model = open_model(pair[1], dtype="stored")
    assert model.dtype == torch.float32
    assert torch.equal(
        model.weights["model.norm.weight"], load_file(pair[1] / "model.safetensors")["model.norm.weight"]
    )


def test_states_in_bf16_are_those_of_fp32_to_its_rounding(pair: list[Path]) -> None:
    exact, rounded = states(pair[1]), states(pair[1], dtype="bf16")
    off = (rounded - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert 1e-4 < off.max() < 0.1 and rounded.dtype == torch.float32


def test_results_name_the_dtype_and_the_noise_floor_is_its_own(tmp_path: Path) -> None:
    models = {"witness": tiny.llama(0), "anchor": tiny.llama(1), "ft/checkpoint-1": tiny.llama(2)}
    history = ModelSequence.from_toml(sequence_on_disk(tmp_path, models) / "SEQUENCE.toml")
    for dtype, name in {"fp32": "float32", "bf16": "bfloat16"}.items():
        assert cache_residuals(history, placement=Placement(dtype=dtype)).meta["dtype"] == [name]
    exact, rounded = (locate_vrev(history, layer=1, placement=Placement(dtype=dtype)) for dtype in ("fp32", "bf16"))
    assert float(exact.vector @ rounded.vector) > 0.99 and (exact.vector != rounded.vector).any()


@pytest.mark.parametrize("given", ["int8", "float8_e4m3fn", "nonsense", torch.int64])
def test_what_is_no_dtype_of_models_is_refused(pair: list[Path], given: Any) -> None:
    for opens in (lambda: Placement(dtype=given), lambda: open_model(pair[1], dtype=given)):
        with refused("The dtype", str(given)):
            opens()


@pytest.mark.parametrize("name", ["meta", "banana", "cuda:99", "mps:7"])
def test_a_device_that_is_not_here_is_one_clear_line(pair: list[Path], name: str) -> None:
    with pytest.raises(GravlensError, match=rf"'{name}'.* Available: cpu.* Try: auto"):
        open_model(pair[1], device=name)
    with refused(f"'{name}'"):
        list(placed(*pair, device=name))


@pytest.mark.skipif(GPU is not None, reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_and_auto_is_the_cpu(pair: list[Path]) -> None:
    assert as_device("auto") == torch.device("cpu") == open_model(pair[1], device="auto").device
    for name in ("cuda", "cuda:0", "mps"):
        with refused(f"'{name}'", "not on this machine"):
            open_model(pair[1], device=name)


def test_a_map_of_one_device_is_that_device(pair: list[Path]) -> None:
    for device_map in ({"": "cpu"}, "cpu"):
        assert torch.equal(states(pair[1], device_map=device_map), states(pair[1]))
    for (_, model), folder in zip(placed(*pair, device_map={"": "cpu"}), pair, strict=True):
        assert_same_states(read_residuals(model, RAGGED, layers=ALL), states(folder))


@pytest.mark.parametrize("place", ["disk", "meta"])
def test_weights_that_would_be_left_on_disk_are_refused(pair: list[Path], place: str) -> None:
    device_map = {**EVERYWHERE_CPU, "lm_head": place}
    for opens in (lambda: Placement(device_map=device_map), lambda: open_model(pair[1], device_map=device_map)):
        with refused("device_map", place):
            opens()


def test_weights_that_accelerate_left_out_are_refused(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As device_map="auto" does where memory ends: the parameters are on the meta device."""
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained

    def offloading(*given: Any, **named: Any) -> Any:
        model, report = whole(*given, **named)
        model.lm_head.to("meta")
        return model, report

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offloading)
    with refused("lm_head.weight", "full", "do not fit on a device"):
        load_huggingface(pair[1])


def test_a_model_that_does_not_fit_says_so(pair: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", too_large)
    with refused("full", "9 GiB"):
        open_model(pair[1])


def test_a_device_beside_a_map_is_refused(pair: list[Path]) -> None:
    with refused("'cuda'", "device_map"):
        Placement("cuda", device_map="auto")
    with refused("'cuda'", "device_map"):
        open_model(pair[1], device="cuda", device_map={"": "cpu"})


@pytest.mark.parametrize("keep", [0, -1, True, False])
def test_at_least_what_is_read_is_kept(keep: Any) -> None:
    with refused(f"keep={keep!r}"):
        Placement(keep=keep)


def test_names_that_transformers_maps_are_held_as_they_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save(tiny.llama(1, tie_word_embeddings=True).bfloat16(), tmp_path / "spelled")
    weights = load_file(folder / "model.safetensors")
    head = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file({**weights, **head}, folder / "model.safetensors", {"format": "pt"})
    model = open_model(tiny.save(tiny.llama(0, tie_word_embeddings=True), tmp_path / "first"))
    held: list[torch.dtype] = []

    def spied(source: Path, dtype: torch.dtype) -> Any:
        held.append(dtype)
        return load_huggingface(source, dtype)

    monkeypatch.setattr("gravlens.models.swapping.load_huggingface", spied)
    swap_weights(model, folder)
    assert held == [torch.bfloat16] and model.dtype == torch.float32
    assert all(torch.equal(model.weights[name], weight.float()) for name, weight in weights.items())


# -- where there is a GPU ----------------------------------------------------------------------------------------------


@on_a_gpu
def test_a_gpu_reads_what_the_cpu_reads(pair: list[Path]) -> None:
    for device in ("auto", str(GPU)):
        for (_, model), folder in zip(placed(*pair, pair[1], device=device), [*pair, pair[1]], strict=True):
            assert model.device.type == str(GPU)
            assert_same_states(read_residuals(model, RAGGED, layers=ALL), states(folder), 1e-3)


@on_a_gpu
def test_a_model_over_two_devices_takes_the_next_weights_and_states_come_together(pair: list[Path]) -> None:
    if torch.accelerator.device_count() < 2:
        pytest.skip("needs two GPUs")
    halves = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    halves |= {f"model.layers.{layer}": 1 for layer in range(1, tiny.LAYERS)} | {"model.norm": 1, "lm_head": 1}
    for (_, model), folder in zip(placed(*pair, device_map=halves), pair, strict=True):
        assert_same_states(read_residuals(model, RAGGED, layers=ALL), states(folder), 1e-3)
