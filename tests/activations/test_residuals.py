"""The residual stream as it is read: the same as Hugging Face's and HookedTransformer's, alone, padded and batched."""

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import (
    EOS,
    PROMPT_IDS,
    RAGGED,
    assert_same_states,
    hidden_states,
    hooked_twin,
    hooks_on,
    plant,
    planted_vector,
    reference,
    refused,
    synthetic,
)
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from gravlens.activations import reader as engine
from gravlens.activations.residuals import Residuals, cache_residuals, read_residuals, residuals_of_batch
from gravlens.core.errors import GravlensError
from gravlens.history.encoding import encode, pad, prompts_digest
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.families import resid_post
from gravlens.models.forward import run_trunk
from gravlens.models.opening import OpenModel, open_model

ALL, LAST = range(tiny.LAYERS), tiny.LAYERS - 1
every_kind = pytest.mark.parametrize("kind", tiny.KINDS)
# Learned and rotary positions, each as Hugging Face's model and through the bridge.
READERS = ("gpt2", "llama", "gpt2 bridge", "llama bridge")


def reader(name: str, folder: Path) -> tuple[Any, OpenModel]:
    """A Hugging Face model as its own reference, and the same weights as they are read."""
    family, _, bridge = name.partition(" ")
    model = tiny.gpt2() if family == "gpt2" else tiny.llama(num_key_value_heads=2)
    return model, open_model(tiny.save(model, folder), through="bridge") if bridge else open_model(model)


def sequence(**models: nn.Module) -> ModelSequence:
    runs = {"seed0": {5: models["step5"]}} if "step5" in models else {}
    witness, anchor = models["witness"], models["anchor"]
    return ModelSequence.from_models(
        witness=witness, anchor=anchor, runs=runs, probes=tiny.PROMPTS, tokenizer=tiny.TOKENIZER
    )


# -- against Hugging Face and HookedTransformer ------------------------------------------------------------------------


@pytest.mark.parametrize("name", READERS)
def test_pitfall_5_layers_below_the_last_are_hugging_faces_hidden_states(name: str, tmp_path: Path) -> None:
    model, opened = reader(name, tmp_path)
    found = read_residuals(opened, PROMPT_IDS, layers=range(LAST))
    assert_same_states(found, reference(model, PROMPT_IDS, range(LAST)))


@pytest.mark.parametrize("name", READERS)
def test_pitfall_5_the_last_layer_is_read_before_the_final_norm(name: str, tmp_path: Path) -> None:
    model, opened = reader(name, tmp_path)
    found = read_residuals(opened, PROMPT_IDS, layers=[LAST])[:, 0]
    norm = model.transformer.ln_f if "gpt2" in name else model.model.norm
    after = torch.stack([hidden_states(model, ids)[-1][-1] for ids in PROMPT_IDS])
    with torch.no_grad():
        assert_same_states(norm(found), after)
    # A norm forgets length. Hugging Face's model without its norm does not.
    norm.forward = lambda hidden: hidden
    assert_same_states(found, torch.stack([hidden_states(model, ids)[-1][-1] for ids in PROMPT_IDS]))


def test_a_family_that_takes_no_positions_is_read_too() -> None:
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=tiny.WIDTH, n_layer=tiny.LAYERS, n_head=4, initializer_range=0.2
    )
    model = BloomForCausalLM(config).eval()
    found = read_residuals(open_model(model), RAGGED, layers=range(LAST))
    assert_same_states(found, reference(model, RAGGED, range(LAST)))


def test_a_hooked_transformer_is_read_as_by_its_own_cache() -> None:
    model = tiny.hooked_transformer()
    wanted = []
    for ids in RAGGED:
        _, cache = model.run_with_cache(torch.tensor([ids]))
        wanted.append(torch.stack([cache["resid_post", layer][0, -1] for layer in ALL]))
    assert_same_states(read_residuals(open_model(model), RAGGED, layers=ALL), torch.stack(wanted))


def test_folders_models_bridge_and_hooked_transformer_give_the_same(tmp_path: Path) -> None:
    models = {"witness": tiny.gpt2(0), "anchor": tiny.gpt2(1), "step5": tiny.gpt2(2)}
    folders = {name: tiny.save(model, tmp_path / name) for name, model in models.items()}
    on_disk = ModelSequence.from_folders(
        witness=folders["witness"], anchor=folders["anchor"], runs={"seed0": [folders["step5"]]}, probes=tiny.PROMPTS
    )
    wanted = cache_residuals(sequence(**models)).values
    assert_same_states(cache_residuals(on_disk).values, wanted)
    assert_same_states(cache_residuals(on_disk, through="bridge").values, wanted)
    bridges = {name: open_model(folder, through="bridge").module for name, folder in folders.items()}
    assert_same_states(cache_residuals(sequence(**bridges)).values, wanted)
    twins = {name: hooked_twin(model) for name, model in models.items()}
    assert_same_states(cache_residuals(sequence(**twins)).values, wanted)


@pytest.mark.parametrize("position", [-1, -3])
def test_a_position_counts_from_the_end_of_each_prompt(position: int) -> None:
    model = tiny.llama()
    found = read_residuals(open_model(model), PROMPT_IDS, layers=range(LAST), positions=position)
    assert_same_states(found, reference(model, PROMPT_IDS, range(LAST), position))


# -- padding and batches -----------------------------------------------------------------------------------------------


def alone(opened: OpenModel) -> torch.Tensor:
    return torch.cat([read_residuals(opened, [ids], layers=ALL) for ids in RAGGED])


@pytest.mark.parametrize("name", READERS)
def test_pitfall_1_a_prompt_in_a_ragged_batch_is_the_prompt_alone(name: str, tmp_path: Path) -> None:
    model, opened = reader(name, tmp_path)
    batched = read_residuals(opened, RAGGED, layers=ALL)
    assert_same_states(batched, alone(opened))
    assert_same_states(batched[:, :LAST], reference(model, RAGGED, range(LAST)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_id", [0, EOS], ids=["pad", "pad_is_eos"])
@pytest.mark.parametrize("name", [*READERS, "hooked_transformer"])
def test_pitfall_1_left_and_right_padding_agree(name: str, pad_id: int, side: Any, tmp_path: Path) -> None:
    opened = tiny.opened(name, tmp_path) if name == "hooked_transformer" else reader(name, tmp_path)[1]
    with torch.no_grad():
        found = residuals_of_batch(opened, pad(RAGGED, pad_id, side), layers=ALL)
    assert_same_states(found, alone(opened))


def test_pitfall_1_a_genuine_last_eos_is_read_although_padding_is_made_of_it() -> None:
    model = tiny.llama()
    ids = [[1, 50, 60, EOS], [1, 50, 60], [1, 50, 60, 70, 80, 90]]
    with torch.no_grad():
        found = residuals_of_batch(open_model(model), pad(ids, EOS), layers=range(LAST))
    assert_same_states(found, reference(model, ids, range(LAST)))
    assert not torch.allclose(found[0], found[1], atol=0.1)


@every_kind
def test_pitfall_4_the_order_and_number_of_prompts_change_nothing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = tiny.opened(kind, tmp_path)
    ids = [*RAGGED, *PROMPT_IDS]
    wanted = read_residuals(opened, ids, layers=ALL)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    assert_same_states(read_residuals(opened, [ids[i] for i in order], layers=ALL), wanted[order])
    monkeypatch.setattr(engine, "BATCH", 2)
    assert_same_states(read_residuals(opened, ids, layers=ALL), wanted)


# -- what is kept, what is run, what is left behind --------------------------------------------------------------------


@every_kind
def test_pitfall_3_what_is_kept_aliases_no_live_buffer(kind: str, tmp_path: Path) -> None:
    opened = tiny.opened(kind, tmp_path)
    batch = pad([[1, 50, 60, 70], [1, 80, 90, 70]])  # of one length: the last column would do as a view
    with torch.no_grad():
        wanted = residuals_of_batch(opened, batch, layers=ALL)
    assert wanted.untyped_storage().nbytes() == wanted.numel() * wanted.element_size()

    def spoil(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        spoiled.append(inputs[0].add_(1e3))  # what one block wrote, the next one overwrites in place

    spoiled: list[torch.Tensor] = []
    blocks: Any = opened.blocks if opened.kind == "huggingface" else opened.module.blocks
    handle = blocks[1].register_forward_pre_hook(spoil)
    with torch.no_grad():
        found = residuals_of_batch(opened, batch, layers=ALL)
    handle.remove()
    assert spoiled and torch.equal(found[:, 0], wanted[:, 0])


@every_kind
def test_pitfall_3_a_later_change_in_place_of_a_models_output_does_not_reach_it(kind: str, tmp_path: Path) -> None:
    opened = tiny.opened(kind, tmp_path)
    live: list[torch.Tensor] = []

    def hold(_module: nn.Module, _inputs: Any, output: Any) -> None:
        live.append(output[0] if isinstance(output, tuple) else output)

    handle = resid_post(opened, 0).register_forward_hook(hold)
    with torch.no_grad():
        found = residuals_of_batch(opened, pad([RAGGED[0]]), layers=[0])
        before = found.clone()
        live[0].fill_(7.0)
    handle.remove()
    assert torch.equal(found, before)


@pytest.mark.long
def test_pitfall_3_memory_is_flat_over_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BATCH", 1)
    opened = open_model(tiny.llama(num_hidden_layers=1))
    counts: list[int] = []

    def count(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        batches.append(1)
        if len(batches) % 50 == 10:
            gc.collect()
            counts.append(sum(type(thing) is torch.Tensor for thing in gc.get_objects()))

    batches: list[int] = []
    handle = opened.blocks[0].register_forward_hook(count)
    found = read_residuals(opened, [[1, i % 200, 7] for i in range(200)], layers=[0])
    handle.remove()
    assert len(batches) == 200 and len(counts) == 4
    assert max(counts) <= counts[0], f"tensors alive at batches 10, 60, 110, 160: {counts}"
    assert found.untyped_storage().nbytes() == found.numel() * 4


@every_kind
def test_pitfall_2_hooks_are_gone_after_reading(kind: str, tmp_path: Path) -> None:
    opened = tiny.opened(kind, tmp_path)
    run_trunk(opened, pad(RAGGED))  # the bridge sets hooks of its own at its first pass
    before = hooks_on(opened)
    read_residuals(opened, RAGGED, layers=ALL)
    assert hooks_on(opened) == before


@every_kind
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_pitfall_2_hooks_are_gone_after_an_exception(kind: str, error: Any, tmp_path: Path) -> None:
    opened = tiny.opened(kind, tmp_path)
    wanted = read_residuals(opened, RAGGED, layers=ALL)
    before = hooks_on(opened)

    def interrupt(*_: Any) -> None:
        raise error

    handle = resid_post(opened, 1).register_forward_hook(interrupt)
    with pytest.raises(error):
        read_residuals(opened, RAGGED, layers=ALL)
    handle.remove()
    assert hooks_on(opened) == before
    assert torch.equal(read_residuals(opened, RAGGED, layers=ALL), wanted)


def head_and_norm(opened: OpenModel) -> tuple[nn.Module, nn.Module]:
    module: Any = opened.module
    if opened.kind != "huggingface":
        return module.unembed, module.ln_final
    trunk = module.base_model
    return module.get_output_embeddings(), trunk.ln_f if hasattr(trunk, "ln_f") else trunk.norm


@every_kind
def test_a_pass_stops_at_the_deepest_layer_and_computes_no_logits(kind: str, tmp_path: Path) -> None:
    opened = tiny.opened(kind, tmp_path)
    parts = [*(resid_post(opened, layer) for layer in ALL), *head_and_norm(opened)]
    runs = dict.fromkeys(parts, 0)

    def count(module: nn.Module, _inputs: Any) -> None:
        runs[module] += 1

    for part in parts:
        part.register_forward_pre_hook(count)
    for deepest in ALL:
        runs.update(dict.fromkeys(parts, 0))
        read_residuals(opened, RAGGED, layers=[deepest])
        assert list(runs.values()) == [1] * (deepest + 1) + [0] * (LAST - deepest) + [0, 0]


def test_the_whole_models_forward_is_not_called_for_trainer_puts_it_under_autocast(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.llama()
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("the whole model was called"))
    read_residuals(open_model(model), RAGGED, layers=ALL)


@every_kind
def test_states_of_a_batch_carry_gradients_where_they_are_on(kind: str, tmp_path: Path) -> None:
    opened = tiny.opened(kind, tmp_path)
    opened.module.zero_grad()
    residuals_of_batch(opened, pad(RAGGED), layers=[1]).square().sum().backward()
    grads = [p.grad for p in opened.module.parameters() if p.grad is not None]
    assert grads and any(grad.abs().max() > 0 for grad in grads)
    assert not read_residuals(opened, RAGGED, layers=[1]).requires_grad


def test_a_model_that_was_handed_over_is_not_changed() -> None:
    models = {"witness": tiny.gpt2(0), "anchor": tiny.llama(1)}
    before = {name: {k: w.clone() for k, w in m.state_dict().items()} for name, m in models.items()}
    cache_residuals(sequence(**models))
    for name, model in models.items():
        assert all(torch.equal(weight, before[name][k]) for k, weight in model.state_dict().items())


# -- Residuals ---------------------------------------------------------------------------------------------------------


def test_only_what_is_asked_for_is_kept() -> None:
    models = {"witness": tiny.gpt2(0), "anchor": tiny.gpt2(1), "step5": tiny.gpt2(2)}
    everything = cache_residuals(sequence(**models))
    assert everything.checkpoints == ("witness", "anchor", "seed0/5") and everything.layers == tuple(ALL)
    some = cache_residuals(sequence(**models), layers=[2, 0, 2], checkpoints=[Checkpoint("anchor", models["anchor"])])
    assert some.checkpoints == ("anchor",) and some.layers == (0, 2)
    assert some.values.shape == (1, len(tiny.PROMPTS), 2, tiny.WIDTH) and some.values.dtype == np.float32
    assert_same_states(some.of("anchor"), everything.of("anchor")[:, [0, 2]])
    assert some.values.base is None or some.values.base.size == some.values.size
    assert cache_residuals(sequence(**models), layers=np.array([1])).layers == (1,)


def test_residuals_know_their_runs_and_refuse_other_names() -> None:
    states = {name: np.ones((1, 1, 2)) for name in ("witness", "anchor", "a/20", "a/5", "b/c/1")}
    residuals = synthetic(states)
    assert residuals.runs == {"a": (5, 20), "b/c": (1,)}
    with refused("'a/7'"):
        residuals.of("a/7")


def test_residuals_come_back_from_a_file_exactly(tmp_path: Path) -> None:
    found = cache_residuals(sequence(witness=tiny.gpt2(0), anchor=tiny.gpt2(1)), layers=[1])
    loaded = Residuals.load(found.save(tmp_path / "r.safetensors"))
    assert loaded.values.tobytes() == found.values.tobytes() and loaded.values.shape == found.values.shape
    assert (loaded.checkpoints, loaded.layers, loaded.prompts) == (found.checkpoints, found.layers, found.prompts)
    assert loaded.meta == found.meta


def test_xarray_has_named_axes() -> None:
    residuals = synthetic({"witness": np.arange(12.0).reshape(2, 3, 2), "anchor": np.zeros((2, 3, 2))})
    array = residuals.to_xarray()
    assert array.dims == ("checkpoint", "prompt", "layer", "d_model")
    assert array.sel(checkpoint="witness", layer=1).values.tolist() == [[2, 3], [8, 9]]


def test_residuals_say_what_they_were_made_from(tmp_path: Path) -> None:
    found = cache_residuals(
        sequence(witness=tiny.gpt2(0), anchor=tiny.gpt2(1)), ["pick the lock today"[:8]], positions=-1
    )
    assert found.meta["positions"] == -1 and found.meta["dtype"] == ["float32"]
    assert found.meta["sources"] == dict.fromkeys(("witness", "anchor"), "a GPT2LMHeadModel in memory")
    assert found.prompts == prompts_digest(encode(tiny.TOKENIZER, ["pick the"]))
    half = sequence(witness=tiny.gpt2(0).bfloat16(), anchor=tiny.gpt2(1).bfloat16())
    assert cache_residuals(half).meta["dtype"] == ["bfloat16"]


@pytest.mark.parametrize("choice", ["anchor", "none"])
def test_pitfall_7_the_choice_of_template_is_stored_and_read_with(tmp_path: Path, choice: Any) -> None:
    witness, anchor = tiny.save(tiny.gpt2(0), tmp_path / "witness"), tiny.save(tiny.gpt2(1), tmp_path / "anchor")
    (witness / "chat_template.jinja").unlink()
    pair: dict[str, Any] = {"witness": witness, "anchor": anchor, "probes": tiny.PROMPTS}
    with refused("different chat templates"):
        cache_residuals(ModelSequence.from_folders(**pair))
    found = cache_residuals(ModelSequence.from_folders(**pair, chat_template=choice), layers=range(LAST))
    assert found.meta["chat_template"] == choice
    ids = PROMPT_IDS if choice == "anchor" else [tiny.TOKENIZER(text)["input_ids"] for text in tiny.PROMPTS]
    assert_same_states(found.of("witness"), reference(tiny.gpt2(0), ids, range(LAST)))


def test_the_template_of_both_is_stored_as_own_and_of_neither_as_none() -> None:
    pair = sequence(witness=tiny.gpt2(0), anchor=tiny.gpt2(1))
    assert cache_residuals(pair).meta["chat_template"] == "own"
    plain = ModelSequence.from_models(
        witness=tiny.gpt2(0), anchor=tiny.gpt2(1), tokenizer=tiny.TOKENIZER, chat_template="none"
    )
    assert cache_residuals(plain, tiny.PROMPTS).meta["chat_template"] == "none"


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[3], [-1], [0, 99], [1.5], [True]])
def test_a_layer_out_of_range_is_named_with_the_range(layers: Any) -> None:
    pair = sequence(witness=tiny.gpt2(0), anchor=tiny.gpt2(1))
    with refused(f"Layer {layers[-1]!r}"):
        cache_residuals(pair, layers=layers)
    with pytest.raises(GravlensError, match="from 0 to 2"):
        cache_residuals(pair, layers=layers)


def test_no_layers_no_prompts_no_probes_are_refused() -> None:
    pair = sequence(witness=tiny.gpt2(0), anchor=tiny.gpt2(1))
    with refused("No layer"):
        cache_residuals(pair, layers=[])
    with refused("0 prompts"):
        cache_residuals(pair, [])
    with refused("no probe prompts"):
        cache_residuals(ModelSequence.from_models(witness=tiny.gpt2(0), anchor=tiny.gpt2(1), tokenizer=tiny.TOKENIZER))


@pytest.mark.parametrize("positions", [0, 3, -99, True, "first", 1.5])
def test_a_position_that_not_every_prompt_has_is_named(positions: Any) -> None:
    with refused(f"positions={positions!r}"):
        cache_residuals(sequence(witness=tiny.gpt2(0), anchor=tiny.gpt2(1)), positions=positions)


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 2}])
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_checkpoint_of_another_shape_is_named(tmp_path: Path, change: dict[str, int], on_disk: bool) -> None:
    models: dict[str, Any] = {"witness": tiny.llama(0), "anchor": tiny.llama(1), "step5": tiny.llama(2, **change)}
    if not on_disk:
        with refused("seed0/5", "2 layers" if "num_hidden_layers" in change else "width 16"):
            cache_residuals(sequence(**models))
        return
    folders = {name: tiny.save(model, tmp_path / name) for name, model in models.items()}
    runs = {"seed0": [folders["step5"]]}
    pair = {"witness": folders["witness"], "anchor": folders["anchor"]}
    with refused("seed0/5", str(folders["step5"])):
        cache_residuals(ModelSequence.from_folders(**pair, runs=runs, probes=tiny.PROMPTS))


# -- planted truth -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "hooked_transformer"])
def test_a_vector_planted_at_a_layer_is_in_the_states_of_that_layer_and_not_below(kind: str, tmp_path: Path) -> None:
    opened = tiny.opened(kind, tmp_path)
    vector = planted_vector()
    ids = encode(tiny.TOKENIZER, tiny.PROMPTS)
    moved = read_residuals(open_model(plant(opened.module, vector, 1)), ids, layers=ALL)
    difference = moved - read_residuals(opened, ids, layers=ALL)
    assert difference[:, 0].abs().max() == 0
    assert torch.allclose(difference[:, 1], vector.expand(len(ids), -1), atol=1e-5)
    assert not torch.allclose(difference[:, 2], vector.expand(len(ids), -1), atol=1e-2)
