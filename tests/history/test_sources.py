"""Where histories come from: hub, Trainer's folders, adapters, lists; imperfect and hostile ones are named."""

import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
from bomb import Bomb
from folders import adapter, snapshot
from histories import RAGGED, assert_same_states, moved, refused, weights_of
from huggingface_hub.errors import GatedRepoError
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.core.errors import GravlensError
from gravlens.history.sequence import Checkpoint, ModelSequence, Run
from gravlens.history.sources import resolve
from gravlens.history.weight_files import contents, read_headers
from gravlens.models.forward import final_logits
from gravlens.models.opening import load_huggingface, open_model
from gravlens.models.opening import weights_of as named_weights
from gravlens.models.swapping import open_each
from gravlens.models.tokenizers import sequence_tokenizer

ALL = range(tiny.LAYERS)
both_ways = pytest.mark.parametrize("through", ["huggingface", "bridge"])


def states(source: Any) -> torch.Tensor:
    return read_residuals(open_model(source), RAGGED, layers=ALL)


def sharded(model: Any, folder: Path) -> Path:
    tiny.save(model, folder)
    weights_of(folder).unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def sequence(folder: Path, **changes: Any) -> ModelSequence:
    return ModelSequence.from_folders(
        **{"witness": folder / "base", "anchor": folder / "aligned", "probes": tiny.PROMPTS[:2], **changes}
    )


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """`base`, and `aligned` in shards."""
    tiny.save(tiny.llama(0), tmp_path / "base")
    sharded(tiny.llama(1), tmp_path / "aligned")
    return tmp_path


# -- a hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub's cache, as it is laid out under HF_HOME: two revisions and main, one in shards."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for number, (revision, save) in enumerate({"main": tiny.save, "step1000": sharded, "step200": tiny.save}.items()):
        snapshot(cache, revision, f"{number}" * 40, lambda folder, n=number, s=save: s(tiny.llama(n), folder))
    return cache


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("hub_id", "seed"),
    [
        ("hf://owner/name", 0),
        ("hf://owner/name@step1000", 1),
        ("hf://owner/name@step200", 2),
        ("hf://owner/name@" + "2" * 40, 2),
    ],
)
def test_a_hub_id_with_a_revision_is_the_model_of_that_revision(hub_id: str, seed: int) -> None:
    model = open_model(Checkpoint("witness", hub_id))
    assert torch.equal(states(hub_id), states(tiny.llama(seed)))
    assert model.tokenizer.get_vocab() == tiny.TOKENIZER.get_vocab()
    for name, weight in tiny.llama(seed).named_parameters():
        assert torch.equal(model.weights[name], weight)


@pytest.mark.usefixtures("hub")
def test_a_run_is_a_list_of_revisions_in_the_order_of_their_steps(pair: Path) -> None:
    runs = {"pre": ["hf://owner/name@step1000", "hf://owner/name@step200"]}
    found = sequence(pair, witness="hf://owner/name@step200", runs=runs)
    assert [(c.step, c.source, c.revision) for c in found.runs["pre"]] == [
        (200, "hf://owner/name@step200", "step200"),
        (1000, "hf://owner/name@step1000", "step1000"),
    ]
    residuals = cache_residuals(found, ["the"])
    assert (residuals.of("pre/200") == residuals.of("witness")).all()
    assert (residuals.of("pre/1000") == residuals.of("anchor")).all()  # both are model 1
    assert residuals.meta["sources"]["pre/200"] == "hf://owner/name@step200"


@pytest.mark.usefixtures("hub")
def test_revisions_of_a_hub_are_swapped_into_one_model() -> None:
    ids = [f"hf://owner/name@{revision}" for revision in ("main", "step200", "step1000")]
    opened = open_each([Checkpoint(one, one) for one in ids], through="huggingface")
    assert len({id(model.module) for _, model in opened}) == 1


@pytest.mark.usefixtures("hub")
def test_toml_names_revisions(pair: Path) -> None:
    (pair / "x.toml").write_text(
        'witness = "hf://owner/name@step200"\nanchor = "aligned"\n[runs]\npre = ["hf://owner/name@step1000"]\n'
    )
    found = ModelSequence.from_toml(pair / "x.toml")
    assert found.witness.revision == "step200" and found.runs["pre"][0].source == "hf://owner/name@step1000"
    assert found.anchor.revision is None


@pytest.mark.parametrize(
    ("label", "step"),
    [("step1000", 1000), ("stage1-step1000-tokens5B", 1000), ("global_step_30", 30), ("v1.0-20", 20)],
)
def test_the_step_of_a_revision_is_the_number_after_step_or_the_last(pair: Path, label: str, step: int) -> None:
    (checkpoint,) = sequence(pair, runs={"pre": [f"hf://owner/name@{label}"]}).runs["pre"]
    assert checkpoint.step == step


def test_a_number_in_a_repositorys_name_is_no_step(pair: Path) -> None:
    with refused("hf://owner/name-70m", "no step"):
        sequence(pair, runs={"pre": ["hf://owner/name-70m"]})


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("hub_id", ["hf://owner/name@step5", "hf://owner/other", "hf://owner/name@" + "9" * 40])
def test_a_revision_out_of_reach_is_named(hub_id: str) -> None:
    with refused(hub_id):
        open_model(hub_id)


def test_a_snapshot_of_pickles_alone_is_refused(hub: Path) -> None:
    def pickled(folder: Path) -> None:
        weights_of(tiny.save(tiny.llama(), folder)).rename(folder / "pytorch_model.bin")

    snapshot(hub, "pickled", "7" * 40, pickled)
    with refused("7" * 40, "pickled"):
        open_model("hf://owner/name@pickled")


@pytest.mark.parametrize("revision", ["../../../secret", "/etc/x", "a/../../b", "", "a@b", ".."])
def test_a_revision_that_leads_out_of_the_cache_is_no_hub_id(hub: Path, revision: str) -> None:
    (hub.parent / "secret").write_text("1" * 40)
    with refused("hf://owner/name@"):
        open_model(f"hf://owner/name@{revision}")
    with refused("hf://owner/name@"):
        ModelSequence.from_folders(witness=f"hf://owner/name@{revision}", anchor=hub)


def test_a_gated_model_says_to_log_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*_: Any, **__: Any) -> Any:
        text = "401 Client Error. (Request ID: 1)\n\nCannot access gated repo.\nIt is restricted. Please log in."
        raise GatedRepoError(text, response=Mock())

    monkeypatch.setattr("gravlens.history.hub.snapshot_download", gated)
    with pytest.raises(GravlensError, match="Cannot access gated repo") as caught:
        open_model("hf://owner/gated")
    assert "Please log in" in caught.value.given and "hf auth login" in caught.value.remedy


# -- a Trainer's folder ------------------------------------------------------------------------------------------------


def state(folder: Path, step: int) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": []}))
    return folder


def steps(found: ModelSequence) -> dict[int | None, str]:
    return {checkpoint.step: Path(str(checkpoint.source)).name for checkpoint in found.runs["seed0"]}


def test_a_folder_that_trainer_wrote_is_a_run(pair: Path) -> None:
    rows = [{"input_ids": torch.tensor(RAGGED[0]), "labels": torch.tensor(RAGGED[0])}] * 4
    arguments = TrainingArguments(
        output_dir=str(pair / "out"), max_steps=3, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True
    )
    Trainer(model=tiny.llama(1), args=arguments, train_dataset=rows, processing_class=tiny.TOKENIZER).train()  # type: ignore
    found = sequence(pair, runs={"seed0": str(pair / "out")})
    assert steps(found) == {1: "checkpoint-1", 2: "checkpoint-2", 3: "checkpoint-3"}
    residuals = cache_residuals(found)
    assert residuals.checkpoints == ("witness", "anchor", "seed0/1", "seed0/2", "seed0/3")
    drift = [abs(residuals.of(f"seed0/{step}") - residuals.of("anchor")).mean() for step in (1, 2, 3)]
    assert 0 < drift[0] < drift[1] < drift[2]


def test_steps_are_trainers_own_count_and_the_name_where_there_is_none(pair: Path) -> None:
    for name, step in {"checkpoint-1": 30, "checkpoint-2": 4}.items():
        state(pair / "out" / name, step)
    (pair / "out/checkpoint-7").mkdir()
    (pair / "out/runs").mkdir()
    wanted = {4: "checkpoint-2", 7: "checkpoint-7", 30: "checkpoint-1"}
    for run in (pair / "out", [pair / "out"], str(pair / "o*t"), str(pair / "out/checkpoint-*")):
        found = steps(sequence(pair, runs={"seed0": run}))
        assert found == wanted and list(found) == [4, 7, 30]
    (pair / "x.toml").write_text('witness = "base"\nanchor = "aligned"\n[runs]\nseed0 = "out"\n')
    assert steps(ModelSequence.from_toml(pair / "x.toml")) == wanted


def test_two_checkpoints_of_one_step_are_named_whatever_their_names(pair: Path) -> None:
    state(pair / "out/checkpoint-1", 5), state(pair / "out/checkpoint-2", 5)
    with refused("seed0", "[5, 5]"):
        sequence(pair, runs={"seed0": pair / "out"})


def test_several_runs_under_one_pattern_are_named(pair: Path) -> None:
    for seed in (0, 1):
        state(pair / f"ft/seed{seed}/checkpoint-1", 1)
    with refused("seed0", "2 folders", "ft/seed0"):
        sequence(pair, runs={"seed0": str(pair / "ft/*")})


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"global_step": null}'])
def test_a_broken_state_of_trainer_is_named(pair: Path, text: str) -> None:
    (state(pair / "out/checkpoint-1", 1) / "trainer_state.json").write_text(text)
    with refused("checkpoint-1/trainer_state.json", "global_step"):
        sequence(pair, runs={"seed0": pair / "out"})


# -- adapters ----------------------------------------------------------------------------------------------------------


def merged(base: Path, folder: Path) -> Any:
    """What PEFT itself makes of an adapter."""
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()


@both_ways
def test_a_run_of_adapters_is_merged_into_the_anchor_one_by_one(pair: Path, through: Any) -> None:
    folders = [adapter(pair / "aligned", pair / f"out/checkpoint-{step}", step) for step in (1, 5)]
    found = sequence(pair, runs={"seed0": pair / "out"})
    order = [*found, found.anchor, found.runs["seed0"][0]]
    seen, modules = [], set()
    for _, model in open_each(order, tokenizer=sequence_tokenizer(found), through=through):
        seen.append(read_residuals(model, RAGGED, layers=ALL))
        modules.add(id(model.module))
        assert not any("lora" in name for name, _ in model.module.named_modules())
    anchor, first, second = states(pair / "aligned"), *(states(merged(pair / "aligned", f)) for f in folders)
    for one, wanted in zip(seen[1:], (anchor, first, second, anchor, first), strict=True):
        assert_same_states(one, wanted)
    assert torch.equal(seen[1], seen[4]) and torch.equal(seen[2], seen[5]), "something of an adapter was left behind"
    assert not torch.equal(first, anchor) and not torch.equal(first, second)
    assert through == "bridge" or len(modules) == 1, "one model stays open"


def test_a_run_of_adapters_alone_opens_its_base_once(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        adapter(pair / "aligned", pair / f"out/checkpoint-{step}", step)
    opened: list[Any] = []
    monkeypatch.setattr("gravlens.models.opening.load_huggingface", tiny.spied(opened))
    run = sequence(pair, runs={"seed0": pair / "out"}).runs["seed0"]
    grads = [
        all(weight.requires_grad for weight in model.module.parameters())
        for _, model in open_each(run, through="huggingface")
    ]
    assert len(opened) == 1 and all(grads)


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": "all-linear", "use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 7}},
        {"modules_to_save": ["lm_head"]},
        {"task_type": None},
    ],
)
def test_adapters_of_every_kind_are_what_peft_makes_of_them(pair: Path, changes: dict[str, Any]) -> None:
    kinds = [adapter(pair / "aligned", pair / f"out/checkpoint-{step}", step, **changes) for step in (1, 2)]
    with torch.no_grad():
        for folder in kinds:  # a saved head that differs from the base's
            tensors = load_file(folder / "adapter_model.safetensors")
            save_file({n: t + 0.1 * ("lm_head" in n) for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    run = sequence(pair, runs={"seed0": pair / "out"})
    found = [
        {name: weight.clone() for name, weight in named_weights(model.module).items()}
        for _, model in open_each([*run.runs["seed0"], run.anchor], through="huggingface")
    ]
    wanted = [dict(merged(pair / "aligned", folder).named_parameters()) for folder in kinds]
    for one, other in zip(found, [*wanted, dict(tiny.llama(1).named_parameters())], strict=True):
        assert one.keys() == other.keys()
        assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


def test_an_adapter_that_unties_the_embeddings_leaves_the_next_checkpoint_tied(tmp_path: Path) -> None:
    for name, seed in {"base": 0, "aligned": 1}.items():
        tiny.save(tiny.llama(seed, tie_word_embeddings=True), tmp_path / name)
    folder = adapter(tmp_path / "aligned", tmp_path / "out/checkpoint-1", modules_to_save=["lm_head"])
    path = folder / "adapter_model.safetensors"
    save_file({n: t + 0.1 * ("lm_head" in n) for n, t in load_file(path).items()}, path)
    found = sequence(tmp_path, runs={"seed0": tmp_path / "out"})
    order = [*found.runs["seed0"], found.anchor, *found.runs["seed0"]]
    logits = [final_logits(model, RAGGED) for _, model in open_each(order, through="huggingface")]
    assert torch.equal(logits[1], final_logits(open_model(found.anchor), RAGGED))
    assert torch.equal(logits[0], logits[2])
    assert_same_states(logits[0], final_logits(open_model(merged(tmp_path / "aligned", folder)), RAGGED))


def test_gpt2s_transposed_layers_take_adapters(tmp_path: Path) -> None:
    base = tiny.save(tiny.gpt2(1), tmp_path / "aligned")
    tiny.save(tiny.gpt2(0), tmp_path / "base")
    folder = adapter(base, tmp_path / "out/checkpoint-1", target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    (checkpoint,) = sequence(tmp_path, runs={"seed0": tmp_path / "out"}).runs["seed0"]
    assert_same_states(states(checkpoint), states(merged(base, folder)))


def test_an_anchor_may_be_an_adapter_and_its_run_go_on_from_it(pair: Path) -> None:
    aligned = adapter(pair / "base", pair / "dpo", 1)
    over_anchor, over_base = adapter(pair / "base", pair / "ft/step1", 2), adapter(pair / "base", pair / "ft/step2", 3)
    config = json.loads((over_anchor / "adapter_config.json").read_text())
    (over_anchor / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(aligned)}))
    found = sequence(pair, anchor=aligned, runs={"seed0": [over_anchor, over_base]})
    chains = [[path.name for path in resolve(checkpoint).paths] for checkpoint in found]
    assert chains == [["base"], ["base", "dpo"], ["base", "dpo", "step1"], ["base", "step2"]]
    model = merged(pair / "base", aligned)
    assert_same_states(states(found.anchor), states(model))
    twice = PeftModel.from_pretrained(model, over_anchor).merge_and_unload()  # type: ignore[arg-type]
    assert_same_states(states(found.runs["seed0"][0]), states(twice))
    assert cache_residuals(found).checkpoints[1:] == ("anchor", "seed0/1", "seed0/2")


def test_an_adapter_trained_over_another_model_is_refused(pair: Path) -> None:
    adapter(pair / "base", pair / "out/checkpoint-1")  # over the witness
    (checkpoint,) = sequence(pair, runs={"seed0": pair / "out"}).runs["seed0"]
    with refused("out/checkpoint-1", str(pair / "base"), "anchor"):
        open_model(checkpoint)


def rename_base(folder: Path, named: str | None) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))


def test_an_old_path_of_the_base_is_no_contradiction_but_says_nothing_without_one(pair: Path) -> None:
    folder = adapter(pair / "aligned", pair / "out/checkpoint-1")
    rename_base(folder, "moved/away")
    (checkpoint,) = sequence(pair, runs={"seed0": pair / "out"}).runs["seed0"]
    assert_same_states(states(checkpoint), states(merged(pair / "aligned", folder)))
    rename_base(folder, None)
    with refused(str(folder), "no base"):
        open_model(folder)
    rename_base(folder, str(folder))
    with refused(str(folder), "circle"):
        open_model(folder)


def rename_tensors(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace("self_attn", "attention"): t for name, t in load_file(path).items()}, path)


def drop_half(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "lora_A" in name}, path)


def add_a_tensor(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    extra = {name.replace("q_proj", "k_proj"): tensor.clone() for name, tensor in tensors.items() if "q_proj" in name}
    save_file({**tensors, **extra}, path)


def retarget(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["query"]}))


def cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def foreign_module(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"megatron_config": {"x": 1}, "megatron_core": "theirs"}
    (folder / "adapter_config.json").write_text(json.dumps(config))


BREAKAGES: dict[str, Callable[[Path], Any]] = {
    "no tensor lands": rename_tensors,
    "half of it": drop_half,
    "more than its places": add_a_tensor,
    "targets that are not there": retarget,
    "truncated": cut,
    "a module of its own": foreign_module,
    "another width": lambda folder: adapter(tiny.save(tiny.llama(hidden_size=16), folder.parent / "narrow"), folder),
    "no configuration": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "no weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "beside a whole model": lambda folder: tiny.llama().save_pretrained(folder),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_an_adapter_that_does_not_land_is_refused(pair: Path, breakage: str) -> None:
    folder = adapter(pair / "aligned", pair / "out/checkpoint-1")
    BREAKAGES[breakage](folder)
    if breakage == "another width":
        rename_base(folder, str(pair / "aligned"))
    (checkpoint,) = sequence(pair, runs={"seed0": pair / "out"}).runs["seed0"]
    with refused(str(folder)):
        open_model(checkpoint)
    with refused(str(folder)):
        list(open_each([Checkpoint("anchor", pair / "aligned"), checkpoint], through="huggingface"))


def test_a_pickled_adapter_is_refused_and_never_unpickled(pair: Path) -> None:
    folder, fired = adapter(pair / "aligned", pair / "out/checkpoint-1"), pair / "fired"
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(fired)))
    with refused(str(folder), "pickled", "adapter_model.bin"):
        open_model(folder)
    assert not fired.exists()


# -- lists of models in memory -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_run_is_a_list_of_models_of_any_kind(kind: str, tmp_path: Path) -> None:
    models = [tiny.opened(kind, tmp_path / str(seed), seed).module for seed in range(3)]
    found = ModelSequence.from_models(
        witness=models[0], anchor=models[1], runs={"seed0": models}, probes=["the"], tokenizer=tiny.TOKENIZER
    )
    residuals = cache_residuals(found)
    assert residuals.runs == {"seed0": (1, 2, 3)}
    assert (residuals.of("seed0/1") == residuals.of("witness")).all()
    assert (residuals.of("seed0/2") == residuals.of("anchor")).all()
    assert (residuals.of("seed0/3") != residuals.of("anchor")).any()


# -- histories that do not match perfectly -----------------------------------------------------------------------------


def grown(folder: Path, model: Any, words: list[str]) -> Path:
    """The checkpoint with further tokens, each with a row of its own."""
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_tokens([AddedToken(word, single_word=True) for word in words])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_vocabulary_that_grew_is_read_where_prompts_have_the_same_ids(pair: Path) -> None:
    anchor = grown(pair / "grown", tiny.llama(1), ["newcomer"])
    found = cache_residuals(sequence(pair, anchor=anchor))
    assert (found.values == cache_residuals(sequence(pair)).values).all()
    with refused("witness", "cannot read", f"{tiny.VOCABULARY} and {tiny.VOCABULARY + 1} tokens"):
        cache_residuals(sequence(pair, anchor=anchor), ["a newcomer"])
    with refused("witness", f"{tiny.VOCABULARY} and {tiny.VOCABULARY + 1} tokens"):
        sequence_tokenizer(sequence(pair, anchor=anchor, probes=None))
    memory = ModelSequence.from_models(
        witness=tiny.llama(0), anchor=tiny.llama(1), tokenizer=sequence_tokenizer(sequence(pair, anchor=anchor))
    )
    with refused("witness", f"embeddings of {tiny.VOCABULARY} tokens", f"token {tiny.VOCABULARY}"):
        cache_residuals(memory, ["a newcomer"])


@pytest.mark.parametrize("who", ["witness", "run"])
def test_another_tokenizer_is_refused_with_the_first_ids_that_differ(pair: Path, who: str) -> None:
    folder = tiny.save(tiny.llama(2), pair / "out/checkpoint-1")
    spec = json.loads((folder / "tokenizer.json").read_text())
    words = spec["model"]["vocab"]
    words["the"], words["to"] = words["to"], words["the"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    found = sequence(pair, **({"witness": folder} if who == "witness" else {"runs": {"seed0": [folder]}}))
    text = "show me how to pick the gate"
    at = tiny.TOKENIZER.convert_tokens_to_ids
    with refused("witness" if who == "witness" else "seed0/1", text, f"[{at('the')}, ", f"reads [{at('to')}, "):
        cache_residuals(found, [text])


def test_tied_and_untied_embeddings_are_read_alike(pair: Path) -> None:
    tied = tiny.llama(1, tie_word_embeddings=True)
    untied = tiny.llama(2)
    untied.load_state_dict(tied.state_dict())
    runs = {"seed0": [tiny.save(tied, pair / "out/step1"), tiny.save(untied, pair / "out/step2")]}
    found = cache_residuals(sequence(pair, runs=runs))
    assert (found.of("seed0/1") == found.of("seed0/2")).all()


def test_bf16_and_fp32_are_computed_in_one_dtype(pair: Path) -> None:
    half = tiny.save(tiny.llama(0).bfloat16(), pair / "half")
    found = cache_residuals(sequence(pair, witness=half))
    assert found.meta["dtype"] == ["float32"]
    assert_same_states(found.of("witness"), cache_residuals(sequence(pair)).of("witness"), 0.05)


# -- holes -------------------------------------------------------------------------------------------------------------


def lose_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_a_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def no_weights(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def no_weights_but_states(folder: Path) -> None:
    no_weights(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin"):
        (folder / name).write_bytes(b"")


def cut_the_state(folder: Path) -> None:
    (folder / "trainer_state.json").write_text('{"global_')


UNFINISHED = {
    "a shard that the index names": (lose_a_shard, "model-00002"),
    "the end of a shard": (cut_a_shard, "model-00002"),
    "weights": (no_weights, "no weights"),
    "weights, beside Trainer's own pickles": (no_weights_but_states, "no weights"),
    "the end of trainer_state.json": (cut_the_state, "global_step"),
}


@pytest.mark.parametrize("lacks", UNFINISHED)
def test_a_checkpoint_that_is_still_being_written_is_named_or_skipped(pair: Path, lacks: str) -> None:
    breaks, named = UNFINISHED[lacks]
    for step in (1, 2, 3):
        state(sharded(tiny.llama(step), pair / f"out/checkpoint-{step}"), step)
    breaks(pair / "out/checkpoint-2")
    with refused("checkpoint-2", named):
        list(open_each(sequence(pair, runs={"seed0": pair / "out"}), through="huggingface"))
    found = sequence(pair, runs={"seed0": Run(pair / "out", missing="skip")})
    assert [checkpoint.step for checkpoint in found.runs["seed0"]] == [1, 3]
    ((source, why),) = found.skipped.items()
    assert "seed0" in source and "checkpoint-2" in source and named in why
    assert "checkpoint-2" in found._repr_html_()
    assert cache_residuals(found).runs == {"seed0": (1, 3)}


def test_a_checkpoint_missing_in_the_middle_is_named_or_skipped(pair: Path) -> None:
    for step in (1, 3):
        tiny.save(tiny.llama(step), pair / f"out/step{step}")
    folders = [pair / f"out/step{step}" for step in (1, 2, 3)]
    with refused("out/step2"):
        sequence(pair, runs={"seed0": folders})
    found = sequence(pair, runs={"seed0": Run(folders, missing="skip")})
    assert [checkpoint.step for checkpoint in found.runs["seed0"]] == [1, 3] and len(found.skipped) == 1
    toml = 'witness = "base"\nanchor = "aligned"\n[runs]\n'
    listed = '["out/step1", "out/step2", "out/step3"]'
    (pair / "x.toml").write_text(f"{toml}seed0 = {{folders = {listed}, missing = 'skip'}}")
    assert list(steps(ModelSequence.from_toml(pair / "x.toml"))) == [1, 3]
    (pair / "x.toml").write_text(f"{toml}seed0 = {listed}")
    with refused("out/step2"):
        ModelSequence.from_toml(pair / "x.toml")


def test_a_run_with_nothing_whole_or_another_way_to_skip_is_refused(pair: Path) -> None:
    (pair / "out/checkpoint-1").mkdir(parents=True)
    with refused("seed0", "whole"):
        sequence(pair, runs={"seed0": Run(pair / "out", missing="skip")})
    way: Any = "ignore"
    with refused("missing='ignore'"):
        Run(pair / "out", missing=way)


# -- hostile histories -------------------------------------------------------------------------------------------------


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["../x", "..", ".", "a/../b", "/x", "a//b", "", "a\\b", "a\nb", "a/", "\x1b[31m"])
def test_a_run_name_that_leads_elsewhere_is_refused(pair: Path, name: str) -> None:
    state(pair / "out/checkpoint-1", 1)
    (pair / "x.toml").write_text(f'witness = "base"\nanchor = "aligned"\n[runs]\n{json.dumps(name)} = "out"\n')
    before = everything(pair)
    with refused("run is called"):
        ModelSequence.from_toml(pair / "x.toml")
    with refused("run is called"):
        ModelSequence.from_models(witness=tiny.llama(), anchor=tiny.llama(), runs={name: {}})
    assert everything(pair) == before


@pytest.mark.parametrize("run", ["{}/private/*", "{}/private", "../" * 30 + "nowhere/*", "{}/private/../private/id-*"])
def test_a_pattern_reads_nothing_but_checkpoints_and_writes_nothing(pair: Path, run: str) -> None:
    secret = pair / "private/id-7"
    secret.mkdir(parents=True)
    (secret / "key.txt").write_text("SECRET")
    (pair / "x.toml").write_text(
        f'witness = "base"\nanchor = "aligned"\nprobes = ["the"]\n[runs]\nseed0 = "{run.format(pair)}"\n'
    )
    before = everything(pair)
    with pytest.raises(ValueError, match=re.escape("seed0") + "|private") as caught:
        cache_residuals(ModelSequence.from_toml(pair / "x.toml"))
    assert "SECRET" not in str(caught.value) and everything(pair) == before


def test_a_link_is_the_folder_that_it_names_and_one_in_a_circle_ends(pair: Path) -> None:
    (pair / "out").mkdir()
    (pair / "out/checkpoint-5").symlink_to(pair / "aligned")
    (found,) = sequence(pair, runs={"seed0": pair / "out"}).runs["seed0"]
    assert torch.equal(states(found), states(pair / "aligned"))
    (pair / "round").mkdir()
    (pair / "round/checkpoint-1").symlink_to(pair / "round")
    (around,) = sequence(pair, runs={"seed0": pair / "round"}).runs["seed0"]
    with refused("round/checkpoint-1"):
        open_model(around)
    (pair / "broken").mkdir()
    (pair / "broken/checkpoint-1").symlink_to(pair / "nowhere")
    with refused("broken"):
        sequence(pair, runs={"seed0": pair / "broken"})


@pytest.mark.parametrize("shard", ["../stolen.safetensors", "/stolen.safetensors", "..", ""])
def test_an_index_leads_out_of_its_folder_for_nothing(pair: Path, shard: str) -> None:
    folder = pair / "aligned"
    weights_of(tiny.save(tiny.llama(3), pair / "other")).rename(pair / "stolen.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    named = shard.replace("/stolen", str(pair / "stolen")) if shard.startswith("/") else shard
    index["weight_map"] = dict.fromkeys(index["weight_map"], named)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with refused(str(folder)):
        open_model(folder)


def test_code_beside_a_family_that_transformers_knows_is_ignored(pair: Path) -> None:
    folder, fired = pair / "base", pair / "fired"
    (folder / "theirs.py").write_text(f"open({str(fired)!r}, 'w')\nclass Model: pass\nclass Tokenizer: pass\n")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "theirs.Model", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    auto_map = {"AutoTokenizer": ["theirs.Tokenizer", "theirs.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "auto_map": auto_map}))
    model = open_model(folder)
    assert torch.equal(read_residuals(model, RAGGED, layers=ALL), states(tiny.llama(0)))
    assert model.tokenizer.get_vocab() == tiny.TOKENIZER.get_vocab() and not fired.exists()


def test_an_adapter_is_never_opened_as_the_model_that_it_names(pair: Path) -> None:
    folder = adapter(pair / "aligned", pair / "adapter")
    with refused(str(folder), "adapter"):
        load_huggingface(folder)


# -- digests -----------------------------------------------------------------------------------------------------------


def test_equal_weights_have_equal_digests_sharded_or_not_on_disk_or_not(tmp_path: Path) -> None:
    model = tiny.llama(1)
    one, two = tiny.save(model, tmp_path / "one"), sharded(model, tmp_path / "two")
    found = [
        contents(read_headers(one).load()),
        contents(read_headers(two).load()),
        contents(sorted(named_weights(model).items())),
    ]
    assert len(set(found)) == 1 and found[0].dtype == "float32"
    assert found[0].parameters == sum(weight.numel() for weight in model.parameters())
    other = contents(sorted(named_weights(moved(model, seed=1, by=1e-6)).items()))
    assert other.digest != found[0].digest and other.parameters == found[0].parameters
    ones = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    digests = {
        contents(sorted(tensors.items())).digest
        for tensors in (
            ones,
            {"a": ones["a"], "c": ones["b"]},
            {**ones, "a": torch.ones(3, 2)},
            {**ones, "b": torch.zeros(4, dtype=torch.int32)},
        )
    }
    assert len(digests) == 4
