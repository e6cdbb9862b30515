"""Image–text models are read as their language model; a family of several residual streams is refused at opening."""

import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from folders import adapter
from histories import RAGGED, assert_same_states, refused
from peft import PeftModel
from safetensors.torch import load_file, save_file

from gravlens.activations.reader import pads
from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.core.errors import GravlensError
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.interventions.edits import Ablate
from gravlens.interventions.hooks import intervene
from gravlens.interventions.orthogonalization import orthogonalized
from gravlens.models.families import check_one_stream, family_of
from gravlens.models.forward import final_logits, generate
from gravlens.models.opening import open_model
from gravlens.models.swapping import open_each

sys.path.append(str(Path(__file__).resolve().parents[2] / "analyses"))

import measure_support as support

ALL = range(support.LAYERS)
SOME = ("Mistral 3", "Qwen3-VL", "SmolVLM", "Gemma 3 (with images)", "Llama 4 (with images)", "LLaVA")
some = pytest.mark.parametrize("family", SOME)


def save(family: str, folder: Path, seed: int = 0) -> Path:
    model = support.make(family)
    with torch.no_grad():
        torch.manual_seed(seed)
        for weight in model.parameters():
            weight += 0.05 * seed * torch.randn(weight.shape)
    return tiny.save(model, folder)


def states(model: Any) -> torch.Tensor:
    return read_residuals(open_model(model), RAGGED, layers=ALL)


def test_prompts_of_other_lengths_are_read_apart_where_padding_changes_states(tmp_path: Path) -> None:
    """In PaliGemma all tokens of a prompt attend to each other, and to padding on either side."""
    family = "PaliGemma"
    model = support.make(family)
    ids = [[7, 9, 11, 30, 31, 8, 21], [12, 40], [20, 50], [20, 23, 70]]
    wanted = torch.stack([support._states(family, model, torch.tensor([one])) for one in ids])
    opened = open_model(model)
    assert not pads(opened) and pads(open_model(support.make("Mistral 3")))
    assert_same_states(read_residuals(opened, ids, layers=ALL), wanted)
    prompts = tiny.PROMPTS[:3]
    folder = tiny.save(model, tmp_path / "model")
    found = cache_residuals(ModelSequence.from_folders(witness=folder, anchor=folder, probes=prompts)).of("anchor")
    encoded = encode(tiny.TOKENIZER, prompts)
    assert len({len(one) for one in encoded}) > 1
    each = torch.stack([support._states(family, model, torch.tensor([one])) for one in encoded])
    assert_same_states(torch.from_numpy(found.copy()), each)


# -- the language model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", support.WRAPPERS)
def test_blocks_are_the_language_models_and_never_an_equally_deep_towers(family: str) -> None:
    model = support.make(family)
    opened = open_model(model)
    names = {part: name for name, part in model.named_modules()}
    assert [names[part] for part in opened.blocks] == [names[support.block(model, layer)] for layer in ALL]
    towers = [part for name, part in model.named_modules() if support.TOWERS.search(name)]
    assert any(isinstance(part, torch.nn.ModuleList) and len(part) == support.LAYERS for part in towers), "no rival"
    assert (opened.n_layers, opened.d_model) == (support.LAYERS, support.WIDTH)


@pytest.mark.parametrize(
    ("family", "plain"), [("Mistral 3", "Mistral"), ("LLaVA", "Llama"), ("Gemma 3 (with images)", "Gemma3")]
)
def test_a_folder_of_a_wrapper_is_the_text_model_with_its_weights(family: str, plain: str, tmp_path: Path) -> None:
    wrapper = support.make(family)
    text = getattr(transformers, f"{plain}ForCausalLM")(wrapper.config.get_text_config()).eval()
    text.model.load_state_dict(wrapper.get_decoder().state_dict())
    text.lm_head.load_state_dict(wrapper.lm_head.state_dict())
    found, wanted = open_model(tiny.save(wrapper, tmp_path)), open_model(text, tokenizer=tiny.TOKENIZER)
    assert_same_states(states(found), states(wanted))
    assert_same_states(final_logits(found, RAGGED), final_logits(wanted, RAGGED))
    assert generate(found, RAGGED, max_new_tokens=5) == generate(wanted, RAGGED, max_new_tokens=5)
    assert torch.equal(found.family.unembedding, text.lm_head.weight)


@some
def test_weights_are_swapped_into_one_model(family: str, tmp_path: Path) -> None:
    folders = [save(family, tmp_path / str(seed), seed) for seed in range(2)]
    rows = [Checkpoint(f"run/{step}", folder, step) for step, folder in enumerate([*folders, folders[0]])]
    pairs = [(states(model), model.module) for _, model in open_each(rows, through="huggingface")]
    assert len({module for _, module in pairs}) == 1
    wanted = [states(folder) for folder in folders]
    assert all(torch.equal(pair[0], wanted[i]) for pair, i in zip(pairs, (0, 1, 0), strict=True))
    assert not torch.equal(wanted[0], wanted[1])


@pytest.mark.parametrize("family", ["Mistral 3", "Qwen3-VL", "SmolVLM"])
def test_an_adapter_over_a_wrapper_is_what_peft_makes_of_it(family: str, tmp_path: Path) -> None:
    base = save(family, tmp_path / "base")
    auto = transformers.AutoModelForImageTextToText
    targets = r".*(language_model|text_model).*\.(q_proj|v_proj)"
    folder = adapter(base, tmp_path / "adapter", auto=auto, target_modules=targets)
    wanted = PeftModel.from_pretrained(auto.from_pretrained(base), folder).merge_and_unload()
    assert_same_states(states(folder), states(wanted))
    assert not torch.allclose(states(folder), states(base), atol=1e-3)


@pytest.mark.parametrize("targets", [".*language_model.*(q_proj|down_proj)", ["q_proj", "down_proj", "qkv"]])
def test_an_adapter_that_was_trained_in_the_wrapper_fits_the_text_model_alone(tmp_path: Path, targets: Any) -> None:
    base, auto = save("Qwen3.5 (with images)", tmp_path / "base"), transformers.AutoModelForImageTextToText
    folder = adapter(base, tmp_path / "adapter", auto=auto, target_modules=targets)
    assert any(".language_model." in name for name in load_file(folder / "adapter_model.safetensors"))
    wanted = PeftModel.from_pretrained(auto.from_pretrained(base), folder).merge_and_unload()
    model = open_model(folder)
    assert type(model.module).__name__ == "Qwen3_5ForCausalLM"
    assert_same_states(states(model), states(wanted))
    assert_same_states(final_logits(model, RAGGED), final_logits(open_model(wanted), RAGGED))
    assert not torch.allclose(states(folder), states(base), atol=1e-3)


@some
def test_writes_are_the_language_models_and_can_be_orthogonalised(family: str, tmp_path: Path) -> None:
    opened = open_model(save(family, tmp_path))
    text = set(support.block(opened.module, 0).modules()) | {opened.module.get_input_embeddings()}
    text |= {part for layer in ALL for part in support.block(opened.module, layer).modules()}
    writes = list(opened.family.writes())
    assert {write.module for write in writes} <= text and len(writes) >= 1 + 2 * support.LAYERS
    if family in ("Mistral 3", "SmolVLM", "LLaVA"):
        v = direction_from(support.vector().numpy(), layer=1)
        along = states(orthogonalized(opened, v)) @ support.vector()
        assert along.abs().max() < 1e-4 * states(opened).norm(dim=-1).max()


@pytest.mark.parametrize("name", ["T5", "Bart"])
def test_an_encoder_decoder_is_refused(name: str, tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_ff": 16, "num_layers": 1, "encoder_layers": 1, "decoder_layers": 1}
    config = getattr(transformers, f"{name}Config")(vocab_size=tiny.VOCABULARY, num_heads=2, **sizes)
    getattr(transformers, f"{name}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    with refused(str(tmp_path), "encoder–decoder"):
        open_model(tmp_path)


# -- several residual streams ------------------------------------------------------------------------------------------

SEVERAL = {"Gemma 3n": (4, 2, 3, support.WIDTH), "DeepSeek V4": (2, 3, 4, support.WIDTH)}


@pytest.mark.parametrize("family", SEVERAL)
@pytest.mark.parametrize("where", ["folder", "memory", "bf16", "swapping", "intervening"])
def test_a_family_of_several_streams_is_refused_at_opening(family: str, where: str, tmp_path: Path) -> None:
    model = support.make(family)
    with refused(type(model).__name__, str(SEVERAL[family])):
        match where:
            case "folder":
                open_model(tiny.save(model, tmp_path))
            case "memory":
                open_model(model)
            case "bf16":
                open_model(model.bfloat16())
            case "swapping":
                list(open_each([Checkpoint("anchor", tiny.save(model, tmp_path))], through="huggingface"))
            case _:
                with intervene(model, Ablate(direction_from(support.vector().numpy(), layer=1))):
                    pass


def test_a_block_that_text_does_not_pass_is_no_stream() -> None:
    model = tiny.llama()
    model.model.forward = lambda **_: None  # type: ignore[method-assign]
    with refused("outputs nothing"):
        open_model(model)
    model = tiny.llama(1)
    del model.model.embed_tokens.weight
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(3, 16))
    with refused("does not run on token ids alone"):
        open_model(model)


def test_looking_at_a_block_leaves_no_trace() -> None:
    model = tiny.llama(attention_dropout=0.5).train()
    model.model.layers[2].eval()
    modes = [part.training for part in model.modules()]
    fired: list[Any] = []
    model.model.layers[0].register_forward_hook(lambda *_: fired.append(1))
    before = torch.get_rng_state()
    open_model(model)
    assert torch.equal(torch.get_rng_state(), before) and [part.training for part in model.modules()] == modes
    assert not fired and torch.is_grad_enabled() and len(model.model.layers[0]._forward_hooks) == 1
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_a_model_is_looked_at_once_and_only_up_to_its_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passed = tiny.llama(), []
    monkeypatch.setattr(
        model.model, "forward", lambda _f=model.model.forward, **given: (passed.append(1), _f(**given))[1]
    )
    monkeypatch.setattr(model.model.layers[1], "forward", lambda *_, **__: pytest.fail("the second block was run"))
    for _ in range(3):
        open_model(model)
    assert len(passed) == 1


def test_weights_without_values_are_not_run() -> None:
    check_one_stream(family_of(tiny.llama().to("meta")))


# -- tensors without a place -------------------------------------------------------------------------------------------


def qwen_as_llama(folder: Path) -> None:
    support.make("Qwen2").save_pretrained(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"qwen2"', '"llama"').replace("Qwen2For", "LlamaFor"))


def with_tensors(folder: Path, *names: str) -> Path:
    path = folder / "model.safetensors"
    save_file({**load_file(path), **{name: torch.ones(2, 2) for name in names}}, path, {"format": "pt"})
    return folder


LOST = {
    "another family": (qwen_as_llama, "9 tensors"),
    "another block": (lambda folder: with_tensors(folder, "model.layers.3.mlp.up_proj.weight"), "model.layers.3.mlp"),
    "adapters beside": (
        lambda folder: with_tensors(folder, "model.layers.1.mlp.up_proj.lora_A.default.weight"),
        "lora_A.default",
    ),
}


@pytest.mark.parametrize("what", LOST)
def test_tensors_without_a_place_in_the_family_are_named(what: str, tmp_path: Path) -> None:
    breaks, named = LOST[what]
    breaks(tiny.save(tiny.llama(), tmp_path / "run-1"))
    with refused("run-1", named, "LlamaForCausalLM"):
        open_model(tmp_path / "run-1")
    anchor = tiny.save(tiny.llama(), tmp_path / "anchor")
    with pytest.raises(GravlensError, match="run-1"):
        list(open_each([Checkpoint("anchor", anchor), Checkpoint("run/1", tmp_path / "run-1")], through="huggingface"))


def test_harmless_leftovers_and_a_wrappers_tower_are_passed_over(tmp_path: Path) -> None:
    names = ("model.layers.0.self_attn.masked_bias", "v_head.summary.weight")
    folder = with_tensors(tiny.save(tiny.llama(), tmp_path / "plain"), *names)
    assert torch.equal(states(folder), states(tiny.llama()))
    wrapper = save("Llama 4 (with images)", tmp_path / "wrapper")
    assert any("vision_model" in name for name in load_file(wrapper / "model.safetensors"))
    assert type(open_model(wrapper).module).__name__ == "Llama4ForCausalLM"
    with refused("language_model.model.layers.3"):
        open_model(with_tensors(wrapper, "language_model.model.layers.3.input_layernorm.weight"))
