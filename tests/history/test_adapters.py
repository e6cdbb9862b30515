"""Adapters and checkpoints as people make them: grown vocabularies, 4-bit bases, named adapters, sharded trainings."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from folders import QV, adapter
from histories import RAGGED, assert_same_states, reference, refused
from peft import AdaLoraConfig, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.core.errors import GravlensError
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode
from gravlens.history.sequence import Checkpoint, ModelSequence, Run
from gravlens.history.sources import resolve
from gravlens.interventions.orthogonalization import orthogonalize
from gravlens.models.forward import final_logits
from gravlens.models.opening import open_model
from gravlens.models.swapping import open_each

ALL = range(tiny.LAYERS)
TURNS = ["<|turn|>", "<|end|>"]
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128}


def behavior(source: Any) -> torch.Tensor:
    model = open_model(source)
    return torch.cat([read_residuals(model, RAGGED, layers=ALL).flatten(), final_logits(model, RAGGED).flatten()])


def history(folder: Path, **runs: Any) -> ModelSequence:
    return ModelSequence.from_folders(
        witness=folder / "base", anchor=folder / "aligned", runs=runs, probes=tiny.PROMPTS[:2]
    )


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    for seed, name in enumerate(("base", "aligned")):
        tiny.save(tiny.llama(seed), tmp_path / name)
    return tmp_path


# -- a vocabulary of another size --------------------------------------------------------------------------------------


def resized(base: Path, tokens: int) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.resize_token_embeddings(tokens, mean_resizing=False)
    return model


def chat_adapter(base: Path, folder: Path, tokens: int, saved: list[str] | None, seed: int = 0) -> Path:
    """The usual chat fine-tune: new turn markers, a resized embedding, LoRA on the rest."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=QV, task_type="CAUSAL_LM", modules_to_save=saved)
    adapted: Any = get_peft_model(resized(base, tokens), config)
    with torch.no_grad():
        for weight in adapted.parameters():
            weight += 0.05 * torch.randn_like(weight) * weight.requires_grad
    adapted.save_pretrained(folder)
    tokenizer = copy.deepcopy(tiny.TOKENIZER)
    tokenizer.add_special_tokens({"additional_special_tokens": TURNS})
    tokenizer.save_pretrained(folder)
    return folder


def by_hand(base: Path, folder: Path, tokens: int) -> Any:
    return PeftModel.from_pretrained(resized(base, tokens), folder).merge_and_unload()


BOTH, MORE, FEWER = ["embed_tokens", "lm_head"], tiny.VOCABULARY + 2, tiny.VOCABULARY - 1


@pytest.mark.parametrize(
    ("saved", "tokens", "tied"), [(BOTH, MORE, False), (None, MORE, True), (BOTH, MORE, True), (None, FEWER, False)]
)
def test_an_adapter_with_all_rows_of_another_vocabulary_is_what_peft_makes_of_it(
    pair: Path, saved: list[str] | None, tokens: int, tied: bool
) -> None:
    tiny.save(tiny.llama(1, tie_word_embeddings=tied), pair / "aligned")
    tiny.save(tiny.llama(0, tie_word_embeddings=tied), pair / "base")
    folders = [chat_adapter(pair / "aligned", pair / f"ft/checkpoint-{n}", tokens, saved, n) for n in (1, 5)]
    found = history(pair, seed0=pair / "ft")
    for checkpoint, folder in zip(found.runs["seed0"], folders, strict=True):
        model = open_model(checkpoint)
        assert model.family.vocabulary == tokens
        assert_same_states(behavior(model), behavior(by_hand(pair / "aligned", folder, tokens)))
    order = [*found, found.anchor, found.runs["seed0"][0]]
    seen = [behavior(model)[: read_size()] for _, model in open_each(order, through="huggingface")]
    wanted = [behavior(open_model(one))[: read_size()] for one in order]
    assert all(torch.equal(one, other) for one, other in zip(seen, wanted, strict=True)), "something was left behind"


def read_size() -> int:
    return len(RAGGED) * tiny.LAYERS * tiny.WIDTH  # the logits depend on the vocabulary


def test_a_chat_fine_tune_is_read_from_folders(pair: Path) -> None:
    chat_adapter(pair / "aligned", pair / "ft/checkpoint-5", MORE, BOTH)
    residuals = cache_residuals(history(pair, seed0=pair / "ft"))
    assert residuals.runs == {"seed0": (5,)} and (residuals.of("seed0/5") != residuals.of("anchor")).any()


@pytest.mark.parametrize("lost", ["embed_tokens", "lm_head"])
def test_new_rows_that_the_adapter_does_not_hold_are_not_made_up(tmp_path: Path, lost: str) -> None:
    base = tiny.save(tiny.llama(0), tmp_path / "base")
    folder = chat_adapter(base, tmp_path / "adapter", MORE, None)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if lost not in name}, path)
    with refused("adapter", "size mismatch"):
        open_model(folder)


OTHERS: dict[str, Callable[[], Any]] = {
    "token indices": lambda: LoraConfig(r=2, target_modules=QV, trainable_token_indices=[3, 5], task_type="CAUSAL_LM"),
    "AdaLoRA": lambda: AdaLoraConfig(init_r=2, target_modules=QV, total_step=10, task_type="CAUSAL_LM"),
    "VeRA": lambda: VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_that_peft_does_not_save_are_not_missed(kind: str, tied: bool, tmp_path: Path) -> None:
    base = tiny.save(tiny.llama(tie_word_embeddings=tied), tmp_path / "base")
    adapted: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), OTHERS[kind]())
    with torch.no_grad():
        for weight in adapted.parameters():
            weight += 0.1 * weight.requires_grad
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = behavior(adapted.merge_and_unload())
    assert_same_states(behavior(tmp_path / "adapter"), wanted)
    assert not torch.allclose(wanted, behavior(base), atol=1e-2)


def test_new_tokens_that_were_trained_by_index_are_read(tmp_path: Path) -> None:
    base, new = tiny.save(tiny.llama(), tmp_path / "base"), [tiny.VOCABULARY, tiny.VOCABULARY + 1]
    config = LoraConfig(r=2, target_modules=QV, trainable_token_indices=new, task_type="CAUSAL_LM")
    adapted = get_peft_model(resized(base, tiny.VOCABULARY + 2), config)
    with torch.no_grad():
        for weight in adapted.parameters():
            weight += 0.1 * weight.requires_grad
    adapted.save_pretrained(tmp_path / "adapter")
    found, wanted = open_model(tmp_path / "adapter"), open_model(adapted.merge_and_unload())
    assert found.family.vocabulary == tiny.VOCABULARY + 2
    assert_same_states(read_residuals(found, [new], layers=ALL), read_residuals(wanted, [new], layers=ALL))


def test_an_adapter_of_the_prompt_is_refused(tmp_path: Path) -> None:
    base = tiny.save(tiny.llama(), tmp_path / "base")
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    with refused(str(tmp_path / "adapter"), "PROMPT_TUNING", "changes no weights"):
        open_model(tmp_path / "adapter")


# -- a quantised base --------------------------------------------------------------------------------------------------


@pytest.fixture
def four_bit(tmp_path: Path) -> Path:
    """A plain base, a 4-bit anchor that bitsandbytes made on the CPU, and two adapters over it."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny.save(tiny.llama(0, **SIZES), tmp_path / "base")
    plain = tiny.save(tiny.llama(1, **SIZES), tmp_path / "plain")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, dtype=torch.float32)
    tiny.save(model, tmp_path / "aligned")
    for step in (1, 5):
        folder = adapter(plain, tmp_path / f"ft/checkpoint-{step}", step)
        rename_base(folder, str(tmp_path / "aligned"))
    return tmp_path


def rename_base(folder: Path, base: str) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": base}))


def test_an_adapter_over_a_four_bit_base_is_attached_as_peft_attaches_it(
    four_bit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Else the models loaded by hand would compute in bf16 on some processors, see `load_huggingface`.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)
    found = history(four_bit, seed0=four_bit / "ft")
    order = [*found, found.runs["seed0"][0], found.anchor]
    seen = [(behavior(model), model.precision) for _, model in open_each(order, through="huggingface")]
    load = AutoModelForCausalLM.from_pretrained
    attached = [PeftModel.from_pretrained(load(four_bit / "aligned"), one.source) for one in found.runs["seed0"]]
    anchor, first, second = (behavior(one) for one in (load(four_bit / "aligned"), *attached))
    wanted = (behavior(four_bit / "base"), anchor, first, second, first, anchor)
    assert all(torch.equal(one, other) for (one, _), other in zip(seen, wanted, strict=True))
    assert {told for _, told in seen[1:]} == {"float32, 4-bit (bitsandbytes nf4)"} and seen[0][1] == "float32"
    assert not torch.equal(first, anchor) and not torch.equal(first, second)
    for store in ({}, {"store": four_bit / "states"}):
        with pytest.warns(UserWarning, match="4-bit.*witness in float32"):
            read = cache_residuals(found, layers=ALL, **store)
        for one, module in zip(found.runs["seed0"], attached, strict=True):
            wanted = reference(module, encode(tiny.TOKENIZER, found.probes), ALL[:-1])
            assert_same_states(read.of(one.name)[:, :-1], wanted)


def test_what_needs_plain_numbers_refuses_an_attached_adapter(four_bit: Path, tmp_path: Path) -> None:
    (first, _) = history(four_bit, seed0=four_bit / "ft").runs["seed0"]
    model = open_model(first)
    with refused("4-bit"):
        orthogonalize(model, direction_from(np.ones(64), layer=1), out=tmp_path / "out")
    over = adapter(four_bit / "plain", tmp_path / "over")
    rename_base(over, str(first.source))
    with refused("over", "quantised"):
        open_model(Checkpoint("run/2", over, 2, first))


@pytest.mark.parametrize("named", ["unsloth/aligned-bnb-4bit", "unsloth/Aligned-unsloth-bnb-4bit", "owner/other"])
def test_a_quantised_twin_of_the_anchor_is_its_base(tmp_path: Path, named: str) -> None:
    tiny.save(tiny.llama(0), tmp_path / "base")
    folder = adapter(tiny.save(tiny.llama(1), tmp_path / "aligned"), tmp_path / "ft/checkpoint-1")
    (checkpoint,) = history(tmp_path, seed0=tmp_path / "ft").runs["seed0"]
    wanted = behavior(checkpoint)
    rename_base(folder, named)
    assert torch.equal(behavior(checkpoint), wanted)


# -- adapters with a name ----------------------------------------------------------------------------------------------


def named_adapter(base: Path, folder: Path, *names: str) -> Path:
    """A checkpoint of PEFT's, whose adapters are not called `default`."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=QV, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        adapted.add_adapter(name, config)
    adapted.save_pretrained(folder)
    tiny.TOKENIZER.save_pretrained(folder)
    assert not (folder / "adapter_config.json").exists()
    return folder


@pytest.mark.parametrize("missing", ["refuse", "skip"])
def test_the_one_named_adapter_of_a_checkpoint_is_found(pair: Path, missing: Any) -> None:
    torch.manual_seed(0)
    folder = named_adapter(pair / "aligned", pair / "ft/checkpoint-5", "policy")
    (checkpoint,) = history(pair, seed0=Run(pair / "ft", missing=missing)).runs["seed0"]
    wanted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(pair / "aligned"), folder / "policy")
    assert checkpoint.step == 5 and resolve(checkpoint).paths[-1] == folder / "policy"
    assert_same_states(behavior(checkpoint), behavior(wanted.merge_and_unload()))
    assert open_model(checkpoint).tokenizer is not None


def test_several_named_adapters_are_listed_and_one_can_be_chosen(pair: Path) -> None:
    for step in (5, 20):
        named_adapter(pair / "aligned", pair / f"ft/checkpoint-{step}", "policy_2", "reference")
    with refused("checkpoint-5", "policy_2, reference"):
        open_model(history(pair, seed0=pair / "ft").runs["seed0"][0])
    found = history(pair, seed0=str(pair / "ft/checkpoint-*/policy_2")).runs["seed0"]
    assert [checkpoint.step for checkpoint in found] == [5, 20]
    assert ModelSequence.from_folders(
        witness=pair / "base", anchor=pair / "aligned", runs=str(pair / "ft/checkpoint-*/policy_2")
    ).runs.keys() == {"ft"}
    assert not torch.equal(behavior(found[0]), behavior(pair / "aligned"))


# -- shards of a training ----------------------------------------------------------------------------------------------

SHARDS = {
    "pytorch_model_fsdp_0/__0_0.distcp": ("FSDP", "accelerate merge-weights {}/pytorch_model_fsdp_0 {}-whole"),
    "__0_0.distcp": ("FSDP", "accelerate merge-weights {} {}-whole"),
    "global_step5/mp_rank_00_model_states.pt": ("ZeRO", "python {}/zero_to_fp32.py {} {}-whole --safe_serialization"),
    "zero_to_fp32.py": ("ZeRO", "python {}/zero_to_fp32.py {} {}-whole --safe_serialization"),
}


@pytest.mark.parametrize("shard", SHARDS)
def test_a_sharded_training_is_told_how_to_become_a_checkpoint(tmp_path: Path, shard: str) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "checkpoint-5")
    (folder / "model.safetensors").unlink()
    (folder / shard).parent.mkdir(exist_ok=True)
    (folder / shard).write_bytes(b"")
    what, command = SHARDS[shard]
    with pytest.raises(GravlensError, match=what) as caught:
        open_model(folder)
    assert str(folder) in caught.value.given and caught.value.remedy == command.replace("{}", str(folder))
