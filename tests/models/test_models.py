"""Models of every kind behind one face: opened from folders, swapped; bad checkpoints are named."""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bomb import Bomb
from histories import RAGGED, assert_same_states, refused, weights_of
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from gravlens.activations.residuals import read_residuals
from gravlens.core.errors import GravlensError
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.families import resid_post
from gravlens.models.forward import final_logits
from gravlens.models.opening import OpenModel, load_tokenizer, open_model
from gravlens.models.swapping import open_each, swap_weights
from gravlens.models.tokenizers import sequence_tokenizer

ALL = range(tiny.LAYERS)
TIED: dict[str, Any] = {"tie_word_embeddings": True}
every_kind = pytest.mark.parametrize("kind", tiny.KINDS)
both_ways = pytest.mark.parametrize("through", ["huggingface", "bridge"])


def states(model: OpenModel) -> torch.Tensor:
    return read_residuals(model, RAGGED, layers=ALL)


def behavior(model: OpenModel) -> tuple[torch.Tensor, torch.Tensor]:
    """What a checkpoint does: its states and, so that the head counts too, its logits."""
    return states(model), final_logits(model, RAGGED)


def same(one: tuple[torch.Tensor, ...], other: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def checkpoints(*sources: Any) -> list[Checkpoint]:
    return [Checkpoint(f"run/{step}", source, step) for step, source in enumerate(sources)]


# -- opening -----------------------------------------------------------------------------------------------------------


@every_kind
def test_every_kind_is_opened_with_one_face(kind: str, tmp_path: Path) -> None:
    model = tiny.opened(kind, tmp_path)
    assert (model.n_layers, model.d_model, model.dtype) == (tiny.LAYERS, tiny.WIDTH, torch.float32)
    assert model.kind == {"llama": "huggingface", "gpt2": "huggingface"}.get(kind, kind)
    assert open_model(model) is model
    assert model.tokenizer.get_vocab() == tiny.TOKENIZER.get_vocab()


@every_kind
def test_pitfall_5_layers_are_blocks_and_any_other_number_is_refused(kind: str, tmp_path: Path) -> None:
    model = tiny.opened(kind, tmp_path)
    assert len({resid_post(model, layer) for layer in ALL}) == tiny.LAYERS
    for layer in (-1, tiny.LAYERS):
        with refused(f"Layer {layer}"):
            resid_post(model, layer)


def test_a_folder_is_its_weights_unprocessed(tmp_path: Path) -> None:
    model = tiny.gpt2(3)
    opened = open_model(tiny.save(model, tmp_path))
    assert not opened.module.training
    for name, weight in model.state_dict().items():
        assert torch.equal(opened.module.state_dict()[name], weight)


def test_a_model_in_memory_is_taken_as_it_is() -> None:
    model = tiny.llama()
    assert open_model(Checkpoint("anchor", model)).module is model
    with refused("Linear"):
        open_model(nn.Linear(2, 2))


def test_one_layer_is_enough() -> None:
    model = open_model(tiny.llama(num_hidden_layers=1))
    assert model.n_layers == 1 and read_residuals(model, RAGGED, layers=[0]).shape == (len(RAGGED), 1, tiny.WIDTH)


@both_ways
def test_bf16_weights_are_read_in_fp32(tmp_path: Path, through: Any) -> None:
    model = tiny.llama(1).to(torch.bfloat16)
    folder = tiny.save(model, tmp_path)
    assert load_file(weights_of(folder))["model.norm.weight"].dtype == torch.bfloat16
    opened = open_model(folder, through=through)
    assert opened.dtype == torch.float32
    rounded = tiny.llama(2)  # .float() of the bf16 model would keep its rounded rotary frequencies
    rounded.load_state_dict(model.state_dict())
    assert_same_states(states(opened), states(open_model(rounded)))


# -- one model stays open, weights are swapped into it -----------------------------------------------------------------

FAMILIES: dict[str, Callable[[int], Any]] = {
    "untied": tiny.llama,
    "tied": lambda seed: tiny.llama(seed, **TIED),
    "gpt2": tiny.gpt2,
}


@both_ways
@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_weights_are_those_of_each_folder_opened_alone(tmp_path: Path, family: str, through: Any) -> None:
    folders = [tiny.save(FAMILIES[family](seed), tmp_path / str(seed)) for seed in range(3)]
    found, modules = [], set()
    for _, model in open_each(checkpoints(*folders, folders[0]), through=through):
        found.append(behavior(model))
        modules.add(model.module)
    alone = [behavior(open_model(folder, through=through)) for folder in folders]
    assert len(modules) == 1, "each folder was opened anew"
    assert all(same(one, other) for one, other in zip(found, [*alone, alone[0]], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(found[0], found[1], strict=True))


@pytest.mark.parametrize("first", ["sharded", "whole"])
def test_sharded_folders_are_swapped_too(tmp_path: Path, first: str) -> None:
    models = {"sharded": tiny.llama(0), "whole": tiny.llama(1)}
    folders = {name: tiny.save(model, tmp_path / name) for name, model in models.items()}
    weights_of(folders["sharded"]).unlink()
    models["sharded"].save_pretrained(folders["sharded"], max_shard_size="20KB")
    assert len(list(folders["sharded"].glob("*.safetensors"))) > 1
    order = sorted(folders, key=lambda name: name != first)
    for name, (_, model) in zip(
        order, open_each(checkpoints(*map(folders.get, order)), through="huggingface"), strict=True
    ):
        assert same(behavior(model), behavior(open_model(models[name])))


@pytest.mark.parametrize("first", ["spelled_out", "implied"])
def test_tied_weights_may_be_spelled_out_in_one_folder_alone(tmp_path: Path, first: str) -> None:
    models = {"spelled_out": tiny.llama(0, **TIED), "implied": tiny.llama(1, **TIED)}
    folders = {name: tiny.save(model, tmp_path / name) for name, model in models.items()}
    weights = load_file(weights_of(folders["spelled_out"]))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, weights_of(folders["spelled_out"]), {"format": "pt"})
    order = sorted(folders, key=lambda name: name != first)
    for name, (_, model) in zip(
        order, open_each(checkpoints(*map(folders.get, order)), through="huggingface"), strict=True
    ):
        assert same(behavior(model), behavior(open_model(models[name])))


@both_ways
@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
        {"rms_norm_eps": 0.5},
        {"intermediate_size": 24},
        TIED,
    ],
)
def test_another_configuration_is_opened_anew_not_swapped(tmp_path: Path, change: dict[str, Any], through: Any) -> None:
    ours, other = tiny.save(tiny.llama(0), tmp_path / "ours"), tiny.save(tiny.llama(0, **change), tmp_path / "other")
    found = [(model.module, behavior(model)) for _, model in open_each(checkpoints(ours, other, ours), through=through)]
    assert len({module for module, _ in found}) == 3
    for folder, (_, did) in zip((ours, other, ours), found, strict=True):
        assert same(did, behavior(open_model(folder, through=through)))
    assert not same(found[0][1], found[1][1])


def test_a_folder_that_differs_in_dtype_alone_is_swapped(tmp_path: Path) -> None:
    full, half = tiny.save(tiny.llama(0), tmp_path / "full"), tiny.save(tiny.llama(1).bfloat16(), tmp_path / "half")
    found = [(model.module, behavior(model)) for _, model in open_each(checkpoints(full, half), through="huggingface")]
    assert found[0][0] is found[1][0]
    assert same(found[1][1], behavior(open_model(half)))


@both_ways
def test_swapping_never_changes_a_model_that_was_handed_over(tmp_path: Path, through: Any) -> None:
    mine = tiny.llama(0)
    before = copy.deepcopy(mine.state_dict())
    folders = [tiny.save(tiny.llama(seed), tmp_path / str(seed)) for seed in (1, 2)]
    sources = [mine, folders[0], mine, folders[1], mine]
    found = [(model.module, behavior(model)) for _, model in open_each(checkpoints(*sources), through=through)]
    assert [module is mine for module, _ in found] == [True, False, True, False, True]
    assert all(torch.equal(weight, before[name]) for name, weight in mine.state_dict().items())
    assert same(found[0][1], found[4][1]) and not same(found[1][1], found[3][1])


def test_weights_that_do_not_fit_are_refused_and_named(tmp_path: Path) -> None:
    ours, other = tiny.save(tiny.llama(0), tmp_path / "ours"), tiny.save(tiny.llama(1), tmp_path / "other")
    weights = load_file(weights_of(other))
    save_file({**weights, "model.norm.weight": torch.ones(5)}, weights_of(other), {"format": "pt"})
    with refused("other", "model.norm.weight"):
        swap_weights(open_model(ours), other)


# -- bad checkpoints ---------------------------------------------------------------------------------------------------


def drop_a_tensor(folder: Path) -> None:
    weights = load_file(weights_of(folder))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, weights_of(folder), {"format": "pt"})


def truncate(folder: Path) -> None:
    weights_of(folder).write_bytes(weights_of(folder).read_bytes()[:-5])


def lose_a_shard(folder: Path) -> None:
    weights_of(folder).unlink()
    tiny.llama(1).save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


BREAKAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "empty weights": lambda folder: weights_of(folder).write_bytes(b""),
    "no weights": lambda folder: weights_of(folder).unlink(),
    "a tensor is missing": drop_a_tensor,
    "a shard is missing": lose_a_shard,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "broken config": lambda folder: (folder / "config.json").write_text("{"),
    "no language model": lambda folder: (folder / "config.json").write_text('{"model_type": "vit"}'),
    "unknown family": lambda folder: (folder / "config.json").write_text('{"model_type": "none-such"}'),
    "missing": shutil.rmtree,
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_a_broken_checkpoint_is_named_whether_it_comes_first_or_is_swapped_in(tmp_path: Path, breakage: str) -> None:
    good, bad = tiny.save(tiny.llama(0), tmp_path / "good"), tiny.save(tiny.llama(1), tmp_path / "bad")
    BREAKAGES[breakage](bad)
    with refused(str(bad)):
        open_model(bad)
    opened = open_each(checkpoints(good, bad), through="huggingface")
    next(opened)
    with refused(str(bad)):
        next(opened)


def test_a_relative_folder_that_looked_like_a_hub_id_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for opens in (open_model, load_tokenizer):
        with refused("ft/anchor"):
            opens("ft/anchor")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pitfall_9_pickled_weights_are_refused_and_never_unpickled(tmp_path: Path, name: str) -> None:
    folder, fired = tiny.save(tiny.llama(), tmp_path / "pickled"), tmp_path / "fired"
    weights_of(folder).unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb(fired)))
    good = tiny.save(tiny.llama(1), tmp_path / "good")
    with refused(str(folder), "pickled", name):
        open_model(folder)
    with refused(str(folder), "pickled", name):
        list(open_each(checkpoints(good, folder), through="huggingface"))
    assert not fired.exists()
    pickle.loads((folder / name).read_bytes()).close()
    assert fired.exists(), "the bomb was a dud"


def test_pitfall_9_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    folder, fired = tiny.save(tiny.llama(), tmp_path / "both"), tmp_path / "fired"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(fired)))
    assert open_model(folder).n_layers == tiny.LAYERS and not fired.exists()


def test_pitfall_9_pickled_weights_beside_foreign_safetensors_are_refused(tmp_path: Path) -> None:
    model = tiny.llama()
    folder = tiny.save(model, tmp_path / "adapted")
    weights_of(folder).unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")  # harmless, and transformers would read it
    save_file({"some.lora_A.weight": torch.ones(2)}, folder / "other_model.safetensors", {"format": "pt"})
    with refused(str(folder)):
        open_model(folder)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    folder, fired = tiny.save(tiny.llama(), tmp_path / "remote"), tmp_path / "fired"
    (folder / "theirs.py").write_text(f"open({str(fired)!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "theirs",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    with refused(str(folder)):
        open_model(folder)
    assert not fired.exists()


# -- the tokenizer of a history ----------------------------------------------------------------------------------------


def tokenizer_folder(folder: Path, **changes: Any) -> Path:
    tokenizer = copy.deepcopy(tiny.TOKENIZER)
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return folder


def test_one_tokenizer_is_read_from_the_folders_or_handed_over(tmp_path: Path) -> None:
    a, b = tokenizer_folder(tmp_path / "a"), tokenizer_folder(tmp_path / "b")
    folders = sequence_tokenizer(ModelSequence.from_folders(witness=a, anchor=b))
    memory = ModelSequence.from_models(witness=tiny.llama(), anchor=tiny.llama(), tokenizer=tiny.TOKENIZER)
    assert folders.chat_template == sequence_tokenizer(memory).chat_template == tiny.TOKENIZER.chat_template
    assert folders.get_vocab() == tiny.TOKENIZER.get_vocab()


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    a, b = tokenizer_folder(tmp_path / "a"), tokenizer_folder(tmp_path / "b")
    spec = json.loads((b / "tokenizer.json").read_text())
    vocabulary = spec["model"]["vocab"]
    vocabulary["get"], vocabulary["the"] = vocabulary["the"], vocabulary["get"]
    (b / "tokenizer.json").write_text(json.dumps(spec))
    with refused("vocabular"):
        sequence_tokenizer(ModelSequence.from_folders(witness=a, anchor=b))


@pytest.mark.parametrize("other", [None, "{{ messages[0].content }} <bot>"])
def test_pitfall_7_templates_never_mix_silently(tmp_path: Path, other: str | None) -> None:
    a, b = tokenizer_folder(tmp_path / "a", chat_template=other), tokenizer_folder(tmp_path / "b")
    with refused("different chat templates"):
        sequence_tokenizer(ModelSequence.from_folders(witness=a, anchor=b))
    with pytest.raises(GravlensError, match='chat_template="anchor"'):
        sequence_tokenizer(ModelSequence.from_folders(witness=b, anchor=a))
    for choice, template in [("anchor", tiny.TOKENIZER.chat_template), ("none", None)]:
        sequence = ModelSequence.from_folders(witness=a, anchor=b, chat_template=choice)  # pyright: ignore
        assert sequence_tokenizer(sequence).chat_template == template


def test_reading_without_a_template_leaves_the_users_tokenizer_as_it_was() -> None:
    mine = copy.deepcopy(tiny.TOKENIZER)
    pair: dict[str, Any] = {"witness": tiny.llama(), "anchor": tiny.llama(), "tokenizer": mine}
    assert sequence_tokenizer(ModelSequence.from_models(**pair, chat_template="none")).chat_template is None
    assert mine.chat_template == tiny.TOKENIZER.chat_template


def test_an_anchor_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with refused("bare", "no tokenizer"):
        sequence_tokenizer(ModelSequence.from_folders(witness=tmp_path / "bare", anchor=tmp_path / "bare"))
    with refused("LlamaForCausalLM", "no tokenizer"):
        sequence_tokenizer(ModelSequence.from_models(witness=tiny.llama(), anchor=tiny.llama()))


def test_an_opened_model_is_named_on_a_line_without_its_weights() -> None:
    assert (
        repr(open_model(tiny.llama(), tokenizer=tiny.TOKENIZER))
        == f"OpenModel(kind='huggingface', d_model={tiny.WIDTH})"
    )


def test_a_tokenizer_of_no_class_of_its_own_is_read_as_it_was_saved(tmp_path: Path) -> None:
    """AutoTokenizer would read a word-level vocabulary beside a Qwen2 as byte-level BPE, with other tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 4}
    config = Qwen2Config(vocab_size=tiny.VOCABULARY, num_hidden_layers=1, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    tiny.TOKENIZER.save_pretrained(tmp_path)
    wanted = [tiny.TOKENIZER(text)["input_ids"] for text in tiny.PROMPTS]
    found = open_model(tmp_path).tokenizer
    assert found is not None and [found(text)["input_ids"] for text in tiny.PROMPTS] == wanted


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    tiny.llama(0).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {**weights, name.removeprefix("model."): 2 * weights[name]}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with refused("no place for: layers.0.mlp.up_proj.weight"):
        open_model(tmp_path)


def test_a_tokenizer_is_given_as_a_path_too(tmp_path: Path) -> None:
    tiny.llama(0).save_pretrained(tmp_path)
    with refused("org/name does not exist"):
        open_model(tmp_path, tokenizer="org/name")


def test_a_panic_of_tokenizers_is_one_error(tmp_path: Path) -> None:
    folder = tokenizer_folder(tmp_path / "a")
    kept = json.loads((folder / "tokenizer.json").read_text())
    kept["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (folder / "tokenizer.json").write_text(json.dumps(kept))
    with refused("could not be opened"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "tensor", "harmless"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "own", True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "others", False),
        ("transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8, dtype=torch.bool), True),
        ("model.layers.0.self_attn.attn.bias", torch.ones(32), False),
    ],
)
def test_a_tensor_is_harmless_by_what_it_holds(tmp_path: Path, name: str, tensor: Any, harmless: bool) -> None:
    """A mask or the frequencies that the model computes; not a bias, nor other frequencies, under these names."""
    model = tiny.llama(0)
    tiny.save(model, tmp_path / "a")
    if isinstance(tensor, str):
        tensor = model.model.rotary_emb.inv_freq.clone() * (1 if tensor == "own" else 2)
    held = load_file(weights_of(tmp_path / "a"))
    save_file({**held, name: tensor}, weights_of(tmp_path / "a"), {"format": "pt"})
    if harmless:
        open_model(tmp_path / "a")
        return
    with refused(name, "no place"):
        open_model(tmp_path / "a")


def test_an_adapter_without_its_configuration_is_not_passed_over(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(0), tmp_path / "a")
    shutil.copy(weights_of(folder), folder / "adapter_model.safetensors")
    with refused("adapter_model.safetensors", "no adapter_config.json"):
        open_model(folder)
