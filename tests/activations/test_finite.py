"""States that are not finite are an error with a name wherever they enter, and never kept; one precision for all."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import refused, synthetic
from safetensors.torch import load_file, save_file

from gravlens.activations import reader, store
from gravlens.activations.contrasts import Contrast, cache_contrasts
from gravlens.activations.reader import all_finite, read_residuals
from gravlens.activations.residuals import Residuals, cache_residuals, residual_moments
from gravlens.core.errors import GravlensError
from gravlens.core.files import write_tensors
from gravlens.directions.vrev import locate_vrev
from gravlens.history.encoding import encode
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import open_model
from gravlens.models.placement import Placement

PROBES = list(tiny.PROMPTS[:3])
SPOILT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A history whose run has diverged at step 5."""
    for seed, name in enumerate(("witness", "anchor", "ft/checkpoint-1", "ft/checkpoint-5")):
        tiny.save(tiny.llama(seed), tmp_path / name)
    path = tmp_path / "ft/checkpoint-5/model.safetensors"
    weights = load_file(path)
    weights[SPOILT][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    return tmp_path


def sequence(home: Path, steps: str = "*") -> ModelSequence:
    runs = {"run": str(home / f"ft/checkpoint-{steps}")}
    return ModelSequence.from_folders(witness=home / "witness", anchor=home / "anchor", runs=runs, probes=PROBES)


@pytest.mark.parametrize("through", ["huggingface", "bridge"])
@pytest.mark.parametrize("kept", [False, True])
def test_a_diverged_run_is_an_error_with_a_name(home: Path, kept: bool, through: Any) -> None:
    folder = {"store": home / "states"} if kept else {}
    named = ("run/5", str(home / "ft/checkpoint-5"), "layer 1", "float32", "3 of 3")
    with refused(*named):
        cache_residuals(sequence(home), through=through, **folder)
    with pytest.raises(GravlensError, match=f"hold NaN.*{SPOILT.split('.', 3)[-1]}.*this run has diverged"):
        cache_residuals(sequence(home), through=through, **folder)
    for path in (home / "states").rglob("*.safetensors"):
        assert not store.is_corrupt(path)
    found = cache_residuals(sequence(home, "1"), through=through, **folder)
    assert found.runs == {"run": (1,)} and np.isfinite(found.values).all()


def test_moments_and_contrasts_refuse_it_too(home: Path) -> None:
    with refused("run/5", "layer 1"):
        residual_moments(sequence(home))
    with refused("run/5", "layer 1"):
        cache_contrasts(sequence(home), Contrast.of(PROBES, tiny.PROMPTS[3:6]))


def test_layers_below_the_first_that_is_not_finite_can_be_read(home: Path) -> None:
    assert np.isfinite(cache_residuals(sequence(home), layers=[0]).values).all()


def overflowing() -> Any:
    """Finite in fp16, as weights; not so its states."""
    model = tiny.llama(0)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(6e4)
    assert all(weight.half().isfinite().all() for weight in model.parameters())
    return model


def test_what_overflows_in_fp16_asks_for_another_dtype(tmp_path: Path) -> None:
    tiny.save(overflowing(), tmp_path / "model")
    history = ModelSequence.from_folders(witness=tmp_path / "model", anchor=tmp_path / "model", probes=PROBES)
    with refused("witness", "layer 1", "float16"):
        locate_vrev(history, placement=Placement(dtype="fp16"))
    with pytest.raises(GravlensError, match="bf16 or float32"):
        locate_vrev(history, placement=Placement(dtype="fp16"))
    assert np.isfinite(cache_residuals(history, placement=Placement(dtype="bf16")).values).all()


def test_finite_weights_that_are_too_large_and_infinite_ones_are_told_apart() -> None:
    ids = encode(tiny.TOKENIZER, PROBES)
    for weight, told in ((3e38, "so large that states overflow"), (math.inf, "weights are infinite")):
        model = tiny.llama()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight *= 1e3
            model.model.layers[0].mlp.down_proj.weight[0] = weight
        with pytest.raises(GravlensError, match=told):
            read_residuals(open_model(model), ids, layers=[0, 1, 2])


def test_positions_that_are_not_read_may_be_anything() -> None:
    """Some families leave NaN where a batch is padded."""
    model, ids = tiny.llama(), [[5, 6, 7], [5, 6, 7, 8, 9, 10, 11]]
    wanted = read_residuals(open_model(model), ids, layers=[0])

    def spoil(_module: Any, _inputs: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, 3:] = float("nan")
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    model.model.layers[0].register_forward_hook(spoil)
    assert torch.equal(read_residuals(open_model(model), ids, layers=[0]), wanted)


def test_residuals_by_hand_and_of_a_file_are_finite(tmp_path: Path) -> None:
    states = np.random.default_rng(0).standard_normal((4, 3, 8)).astype(np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = states.copy()
        spoilt[2, 1, 5] = bad
        with refused("run/5", "prompt 2", "layer 1", "float32"):
            synthetic({"witness": states, "anchor": states, "run/5": spoilt})
        meta = {"checkpoints": ["anchor"], "layers": [4, 6, 8], "prompts": "p", "meta": {"dtype": ["bfloat16"]}}
        path = write_tensors(tmp_path / "old.safetensors", "residuals", {"values": spoilt[None]}, meta)
        with refused("anchor", "prompt 2", "layer 6", "bfloat16"):
            Residuals.load(path)
    largest = np.full_like(states, np.finfo(np.float32).max)
    assert all_finite(largest) and not all_finite(np.array([[np.inf, -np.inf]]))
    synthetic({"anchor": largest})


def test_a_store_of_an_earlier_version_is_not_believed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It kept states that are not finite, and views of them: they are dropped and read again."""
    good, folder = sequence(home, "1"), home / "states"
    wanted = cache_residuals(good).values
    with monkeypatch.context() as earlier:
        earlier.setattr(reader, "check_finite", lambda *_, **__: None)
        earlier.setattr(store, "is_corrupt", lambda _: False)
        plain = store.StateFolder.put
        earlier.setattr(store.StateFolder, "put", lambda self, states, **more: plain(self, states * np.nan, **more))
        earlier.setattr(Residuals, "__post_init__", lambda _: None)
        assert np.isnan(cache_residuals(good, store=folder).values).all()
    assert len(store.verify_store(folder)) == 4  # three of states, one view
    with pytest.warns(UserWarning, match="not finite"):
        assert np.array_equal(cache_residuals(good, store=folder).values, wanted)
    assert store.verify_store(folder) == {}


@pytest.mark.parametrize("kept", [False, True])
def test_checkpoints_of_two_precisions_are_refused(tmp_path: Path, kept: bool) -> None:
    for seed, name in enumerate(("witness", "anchor")):
        model = tiny.llama(seed)
        tiny.save(model.bfloat16() if seed else model, tmp_path / name)
    history = ModelSequence.from_folders(witness=tmp_path / "witness", anchor=tmp_path / "anchor", probes=PROBES)
    folder = {"store": tmp_path / "states"} if kept else {}
    with refused("anchor is read in bfloat16, witness in float32"):
        cache_residuals(history, placement=Placement(dtype="stored"), **folder)
    for dtype in ("float32", "bf16"):
        assert len(cache_residuals(history, placement=Placement(dtype=dtype), **folder).meta["dtype"]) == 1
