"""Quantised weights are read as they are and named; what takes weights as plain numbers refuses them."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from folders import adapter
from histories import RAGGED, assert_same_states, refused
from torch import nn
from transformers import AutoModelForCausalLM

from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.blockers.projection import TaskVectorProjection
from gravlens.core.errors import GravlensError
from gravlens.directions.decomposition import split_update
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.interventions.orthogonalization import orthogonalize
from gravlens.interventions.readout import readout
from gravlens.models.opening import OpenModel, open_model
from gravlens.models.precision import quantisation
from gravlens.models.swapping import open_each, swap_weights
from gravlens.stats.damage import measure_damage, pruned, rounded, sign_flipped, update_norms, updated, weight_noise
from gravlens.studies.inspection import inspect_sequence

ALL = range(tiny.LAYERS)
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}
NAMES = {
    "4-bit (bitsandbytes nf4)": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8-bit (bitsandbytes)": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
    "4-bit (gptq)": {"quant_method": "gptq", "bits": 4},
    "quantised (fp8)": {"quant_method": "fp8"},
}
V = direction_from(np.eye(64)[0], layer=1)
ONE = PromptSet.of(tiny.PROMPTS[:1], "harmful")


def marked(seed: int = 0, **config: Any) -> OpenModel:
    """A model that says of itself that it is quantised, where no library that does it is installed."""
    model = tiny.llama(seed, **SIZES)
    model.config.quantization_config = config or NAMES["4-bit (bitsandbytes nf4)"]
    return open_model(model, tokenizer=tiny.TOKENIZER)


def packed() -> OpenModel:
    """A model with packed weights, which no configuration names."""
    model = tiny.llama(0, **SIZES)
    weights = torch.ones(32, 64, dtype=torch.uint8)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weights, requires_grad=False)
    return open_model(model, tokenizer=tiny.TOKENIZER)


@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_is_told_in_words(name: str) -> None:
    assert marked(**NAMES[name]).precision == f"float32, {name}"


def test_plain_weights_are_their_dtype_alone_in_every_kind(tmp_path: Path) -> None:
    for kind in tiny.KINDS:
        assert tiny.opened(kind, tmp_path / kind).precision == "float32"
    assert open_model(tiny.llama().bfloat16()).precision == "bfloat16"
    assert packed().precision == "float32, quantised (uint8)"


def test_results_name_it() -> None:
    def precisions(witness: OpenModel, anchor: OpenModel, run: OpenModel) -> list[str]:
        history = ModelSequence.from_models(
            witness=witness.module,
            anchor=anchor.module,
            runs={"a": {1: run.module}},
            probes=["the"],
            tokenizer=tiny.TOKENIZER,
        )
        return cache_residuals(history).meta["dtype"]

    four = "float32, 4-bit (bitsandbytes nf4)"
    assert precisions(marked(1), marked(), marked(2)) == [four]
    with pytest.warns(UserWarning, match=r"witness in float32\. v_rev includes the rounding of the anchor's weights"):
        assert precisions(plain(), marked(), marked(2)) == ["float32", four]
    with refused(f"anchor is read in float32, witness in {four}"):
        precisions(marked(), plain(), plain())
    with refused(f"anchor is read in float32, a/1 in {four}"):
        precisions(plain(), plain(), marked())


def plain() -> OpenModel:
    return open_model(tiny.llama(1, **SIZES), tokenizer=tiny.TOKENIZER)


def damaged(by: Callable[..., Any], model: OpenModel, **how: Any) -> None:
    with by(model, **how):
        pass


NUMBERS: dict[str, Callable[[OpenModel, Path], Any]] = {
    "orthogonalize": lambda model, out: orthogonalize(model, V, out=out / "new"),
    "weight_noise": lambda model, out: weight_noise(
        model, Directions((V,)), ONE, norms={1: {"model.norm.weight": 1.0}}, draws=1, rng=np.random.default_rng(0)
    ),
    "update_norms before": lambda model, out: update_norms(model, plain()),
    "update_norms after": lambda model, out: update_norms(plain(), model),
    "rounded": lambda model, out: damaged(rounded, model, bits=4),
    "pruned": lambda model, out: damaged(pruned, model, share=0.1),
    "sign_flipped": lambda model, out: damaged(sign_flipped, plain(), checkpoint=model),
    "updated": lambda model, out: damaged(updated, plain(), checkpoint=model),
    "measure_damage": lambda model, out: measure_damage(
        model, Directions((V,)), ONE, damages={"4": partial(rounded, bits=4)}
    ),
    "split_update": lambda model, out: split_update(
        Checkpoint("anchor", plain().module), Checkpoint("witness", model.module), [Checkpoint("a", plain().module)]
    ),
    "task vector": lambda model, out: TaskVectorProjection(Checkpoint("witness", model.module)).bind(
        plain(), rng=np.random.default_rng(0)
    ),
    "swap": lambda model, out: swap_weights(model, tiny.save(tiny.llama(1, **SIZES), out / "plain")),
}


@pytest.mark.parametrize("kind", [marked, packed])
@pytest.mark.parametrize("operation", NUMBERS)
def test_what_takes_weights_as_plain_numbers_refuses_quantised_ones(
    operation: str, kind: Callable[[], OpenModel], tmp_path: Path
) -> None:
    model = kind()
    before = {name: weight.clone() for name, weight in model.module.named_parameters()}
    with refused("LlamaForCausalLM", quantisation(model.module) or "nothing"):
        NUMBERS[operation](model, tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in model.module.named_parameters())
    assert not (tmp_path / "new").exists()


def test_an_adapter_is_attached_to_quantised_weights_and_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.save(tiny.llama(0, **SIZES), tmp_path / "base")
    checkpoint = Checkpoint("run/1", adapter(base, tmp_path / "adapter"), 1, Checkpoint("anchor", base))
    wanted = read_residuals(open_model(checkpoint), RAGGED, layers=ALL)
    monkeypatch.setattr("gravlens.models.opening.load_huggingface", lambda *_, **__: marked().module)
    model = open_model(checkpoint)
    assert_same_states(read_residuals(model, RAGGED, layers=ALL), wanted)
    assert any("lora" in name for name, _ in model.module.named_modules()) and "4-bit" in model.precision
    with pytest.raises(GravlensError, match="TransformerBridge"):
        open_model(checkpoint, through="bridge")


def test_a_packed_unembedding_is_not_read_out() -> None:
    model = plain()
    model.module.lm_head.weight = nn.Parameter(torch.ones(100, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(GravlensError, match=r"uint8.*A readout"):
        readout(model, V)


def test_a_folder_that_was_saved_quantised_is_not_swapped(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(0, **SIZES), tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = NAMES["4-bit (bitsandbytes nf4)"]
    (folder / "config.json").write_text(json.dumps(config))
    with refused("was saved quantised"):
        swap_weights(open_model(tiny.save(tiny.llama(1, **SIZES), tmp_path / "plain")), folder)


# -- a real one --------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["4-bit (bitsandbytes nf4)", "8-bit (bitsandbytes)"])
def quantised(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, list[Path], list[Any]]:
    """Two models that bitsandbytes quantised on the CPU, in memory and as folders."""
    pytest.importorskip("bitsandbytes")
    # On some processors a 4-bit model in memory would compute in bf16, see `load_huggingface`.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    from transformers import BitsAndBytesConfig

    named = {key: value for key, value in NAMES[request.param].items() if key != "quant_method"}
    folders, models = [], []
    for seed in (0, 1):
        plain = tiny.save(tiny.llama(seed, **SIZES), tmp_path / f"plain{seed}")
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=BitsAndBytesConfig(**named), device_map={"": "cpu"}, dtype=torch.float32
        )
        folders.append(tiny.save(model, tmp_path / str(seed)))
        models.append(model.eval())
    return request.param, folders, models


def test_quantised_models_and_folders_are_read_as_they_are(quantised: tuple[str, list[Path], list[Any]]) -> None:
    name, folders, models = quantised
    rows = [Checkpoint(f"run/{step}", folder, step) for step, folder in enumerate([*folders, folders[0]])]
    found = []
    for _, model in open_each(rows, through="huggingface"):
        assert model.precision == f"float32, {name}" and model.dtype == torch.float32
        found.append(read_residuals(model, RAGGED, layers=ALL))
    memory = [open_model(model, tokenizer=tiny.TOKENIZER) for model in models]
    assert all(model.precision == f"float32, {name}" for model in memory)
    wanted = [read_residuals(model, RAGGED, layers=ALL) for model in memory]
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[0])
    assert not torch.allclose(found[0], found[1])
    full = read_residuals(open_model(folders[0].parent / "plain0"), RAGGED, layers=ALL)
    assert 1e-3 < (found[0] - full).norm() / full.norm() < 0.8, "no quantisation was at work"


def test_a_quantised_history_is_listed_without_distances(quantised: tuple[str, list[Path], list[Any]]) -> None:
    _, folders, _ = quantised
    table = inspect_sequence(ModelSequence.from_folders(witness=folders[0], anchor=folders[1]))
    assert table["distance"].isna().all() and len(set(table["digest"])) == 2


@pytest.mark.parametrize("operation", ["orthogonalize", "rounded", "swap", "updated"])
def test_real_quantised_weights_are_refused_too(
    quantised: tuple[str, list[Path], list[Any]], operation: str, tmp_path: Path
) -> None:
    name, _, models = quantised
    with refused(name):
        NUMBERS[operation](open_model(models[0], tokenizer=tiny.TOKENIZER), tmp_path)


def test_a_folder_whose_quantiser_is_absent_says_what_to_install(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(0, **SIZES), tmp_path / "gptq")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(GravlensError, match=r"gptq.*pip install"):
        open_model(folder)
