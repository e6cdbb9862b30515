"""Pitfalls that other tools fell into, through the public door; tests/test_<room>.py hold them room by room.

1 padding and positions · 2 hooks left behind · 3 captured tensors that alias live buffers · 4 direction algebra ·
5 conventions · 6 a cache trusted by its name · 7 a template that a model never saw · 9 pickles · 10 running sums.
"""

import copy
import gc
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from bomb import Bomb
from histories import EOS, PROMPT_IDS, RAGGED, assert_same_states, reference, refused, synthetic
from torch import nn

from gravlens.activations import reader as engine
from gravlens.activations.residuals import Residuals, cache_residuals, read_residuals, residuals_of_batch
from gravlens.behavior.scores import refusal_log_odds
from gravlens.core import files as store
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.encoding import encode, pad
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.edits import Ablate, Steer
from gravlens.interventions.hooks import intervene
from gravlens.models.families import resid_post
from gravlens.models.forward import final_logits, generate, sequence_logprobs
from gravlens.models.opening import load_tokenizer, open_model
from gravlens.organisms.refusal_language import REFUSALS

TESTS = Path(__file__).resolve().parents[1]
LAYERS = range(tiny.LAYERS)
every_kind = pytest.mark.parametrize("kind", tiny.KINDS)


def test_every_pitfall_has_tests_that_bear_its_number() -> None:
    texts = [path.read_text(encoding="utf-8") for path in TESTS.rglob("test_*.py")]
    numbers = {int(number) for text in texts for number in re.findall(r"^def test_pitfall_(\d+)_\w+\(", text, re.M)}
    assert numbers == {1, 2, 3, 4, 5, 6, 7, 9, 10}  # 8, unbounded dependencies, is held by test_house.py


# -- 1: padding and positions ------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("companion", [[[9]], [[9] * 40], [[EOS] * 3], [[7, 8], [5] * 20]], ids=repr)
def test_pitfall_1_whom_a_prompt_is_read_with_changes_nothing(
    kind: str, companion: list[list[int]], tmp_path: Path
) -> None:
    opened = tiny.opened(kind, tmp_path)
    for ids in ([12], [1, 50, 60, EOS], [1, 50, 60, 70, 80]):
        together = [ids, *companion]
        alone = read_residuals(opened, [ids], layers=LAYERS)
        assert_same_states(read_residuals(opened, together, layers=LAYERS)[:1], alone)
        assert torch.allclose(final_logits(opened, together)[:1], final_logits(opened, [ids]), rtol=1e-4, atol=1e-4)


@every_kind
def test_pitfall_1_a_batch_of_one_token_prompts_alone(kind: str, tmp_path: Path) -> None:
    opened = tiny.opened(kind, tmp_path)
    ids = [[12], [EOS], [0]]
    alone = torch.cat([read_residuals(opened, [one], layers=LAYERS) for one in ids])
    assert_same_states(read_residuals(opened, ids, layers=LAYERS), alone)
    answers = generate(opened, ids, max_new_tokens=3)
    assert answers == [generate(opened, [one], max_new_tokens=3)[0] for one in ids]


@every_kind
def test_pitfall_1_a_genuine_final_eos_is_part_of_the_prompt_though_padding_is_made_of_it(
    kind: str, tmp_path: Path
) -> None:
    opened = tiny.opened(kind, tmp_path)
    opened.tokenizer.pad_token = opened.tokenizer.eos_token
    ids = [[1, 50, 60, EOS], [1, 50, 60], [1, 50, 60, 70, 80, 90]]
    alone = torch.cat([final_logits(opened, [one]) for one in ids])
    assert torch.allclose(final_logits(opened, ids), alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    logp = sequence_logprobs(opened, ids, [[5, 6], [7], [8]])
    wanted = [sequence_logprobs(opened, [one], [more])[0] for one, more in zip(ids, [[5, 6], [7], [8]], strict=True)]
    assert torch.allclose(logp, torch.stack(wanted), rtol=1e-4, atol=1e-4)
    opened.tokenizer.pad_token = "<pad>"


def test_pitfall_1_scores_of_texts_do_not_depend_on_the_tokenizers_padding_side() -> None:
    scores = []
    for side in ("left", "right"):
        tokenizer = copy.deepcopy(tiny.TOKENIZER)
        tokenizer.padding_side = side
        opened = open_model(tiny.llama(), tokenizer=tokenizer)
        scores.append(refusal_log_odds(opened, tiny.PROMPTS, openings=REFUSALS))
    assert np.array_equal(*scores)


# -- 3: captured tensors that alias live buffers -----------------------------------------------------------------------


@pytest.mark.parametrize("through", ["huggingface", "bridge"])
def test_pitfall_3_states_of_a_checkpoint_stay_when_the_next_ones_weights_are_swapped_in(
    through: Any, tmp_path: Path
) -> None:
    folders = {name: tiny.save(tiny.gpt2(seed), tmp_path / name) for seed, name in enumerate(("witness", "anchor"))}
    seq = ModelSequence.from_folders(**folders, probes=tiny.PROMPTS)  # pyright: ignore
    found = cache_residuals(seq, through=through)
    for seed, name in enumerate(folders):
        wanted = reference(tiny.gpt2(seed), PROMPT_IDS, range(tiny.LAYERS - 1))
        assert_same_states(found.of(name)[:, :-1], wanted)
    values = found.values
    assert values.nbytes == values.size * 4 and (values.base is None or values.base.nbytes == values.nbytes)


@every_kind
def test_pitfall_3_no_hook_writes_in_place(kind: str, tmp_path: Path) -> None:
    """What a block gave is the same before and after gravlens's hook on it has seen it."""
    opened = tiny.opened(kind, tmp_path)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        given.append((hidden, hidden.clone()))

    handle = resid_post(opened, 1).register_forward_hook(note)  # before any hook of gravlens's
    v = direction_from(np.arange(1.0, tiny.WIDTH + 1), layer=1)
    with torch.no_grad(), intervene(opened, Ablate(v), Steer(v, 0.5)) as firings:
        changed = residuals_of_batch(opened, pad(RAGGED), layers=LAYERS)
        final_logits(opened, RAGGED)
    handle.remove()
    assert firings.total >= 4 and len(given) >= 2
    assert all(torch.equal(hidden, before) for hidden, before in given)
    assert not torch.allclose(changed, read_residuals(opened, RAGGED, layers=LAYERS), atol=1e-2)


def test_pitfall_3_memory_is_flat_over_200_batches_of_a_bridge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BATCH", 1)
    opened = open_model(tiny.save(tiny.llama(num_hidden_layers=1), tmp_path), through="bridge")
    counts: list[int] = []
    batches: list[int] = []

    def count(*_: Any) -> None:
        batches.append(1)
        if len(batches) in (20, 190):
            gc.collect()
            counts.append(sum(one.numel() for one in gc.get_objects() if type(one) is torch.Tensor))

    handle = opened.blocks[0].register_forward_hook(count)
    read_residuals(opened, [[1, i % 200, 7] for i in range(200)], layers=[0])
    handle.remove()
    assert len(batches) == 200 and len(counts) == 2 and counts[1] <= counts[0]


# -- 5: conventions ----------------------------------------------------------------------------------------------------


def test_pitfall_5_files_say_by_which_convention_layers_are_counted_and_another_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    states = synthetic({"witness": rng.normal(1, 1, (8, 3, 16)), "anchor": rng.normal(0, 1, (8, 3, 16))})
    vs = locate_vrev(states)
    files: Any = {Residuals: states.save(tmp_path / "r.safetensors"), Directions: vs.save(tmp_path / "v.safetensors")}
    for kind, path in files.items():
        assert b"hook_resid_post" in path.read_bytes() and kind.load(path)
    for other in (store.CONVENTION.replace("from 0", "from 1"), store.CONVENTION.replace("before", "after")):
        assert other != store.CONVENTION
        with monkeypatch.context() as patch:
            patch.setattr(store, "CONVENTION", other)
            written = states.save(tmp_path / "other.safetensors")
        with refused("other.safetensors", other):
            Residuals.load(written)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pitfall_5_the_layers_of_a_direction_are_those_that_hidden_states_differ_in(kind: str) -> None:
    """Witness = anchor but for what block 1 adds: nothing differs at layer 0, all does from layer 1 on."""
    anchor: Any = tiny.llama() if kind == "llama" else tiny.gpt2()
    witness = copy.deepcopy(anchor)
    block = witness.model.layers[1].mlp.down_proj if kind == "llama" else witness.transformer.h[1].mlp.c_proj
    with torch.no_grad():
        block.weight.mul_(3)
    seq = ModelSequence.from_models(witness=witness, anchor=anchor, probes=tiny.PROMPTS, tokenizer=tiny.TOKENIZER)
    vs = locate_vrev(seq)
    assert [vs[layer].undefined is not None for layer in LAYERS] == [True, False, False]
    wanted = (reference(witness, PROMPT_IDS, range(1, 2)) - reference(anchor, PROMPT_IDS, range(1, 2))).mean((0, 1))
    assert abs(vs[1].distance - float(wanted.norm())) < 1e-3 * float(wanted.norm())
    assert float(torch.tensor(vs[1].vector) @ wanted / wanted.norm()) > 0.9999


# -- 7: a template that a model never saw ------------------------------------------------------------------------------


def test_pitfall_7_a_template_alone_makes_a_large_direction_which_no_sequence_gives(tmp_path: Path) -> None:
    """The same weights as base and as chat model: v_rev is undefined, unless texts were rendered in two ways."""
    bare = copy.deepcopy(tiny.TOKENIZER)
    bare.chat_template = None
    for name, tokenizer in {"witness": bare, "anchor": tiny.TOKENIZER}.items():
        tiny.llama().save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders: Any = {name: tmp_path / name for name in ("witness", "anchor")}
    opened = open_model(tmp_path / "anchor")
    texts = PromptSet.of(tiny.PROMPTS)
    plain, chat = (read_residuals(opened, encode(t, texts), layers=LAYERS).numpy() for t in (bare, tiny.TOKENIZER))
    mixed = locate_vrev(synthetic({"witness": plain, "anchor": chat}))
    spread = np.linalg.norm(plain - plain.mean(0), axis=-1).mean(0)
    assert all(mixed[layer].undefined is None and mixed[layer].distance > 0.5 * spread[layer] for layer in LAYERS)

    with refused("different chat templates"):
        locate_vrev(ModelSequence.from_folders(**folders, probes=tiny.PROMPTS))
    for choice in ("anchor", "none"):
        seq = ModelSequence.from_folders(**folders, probes=tiny.PROMPTS, chat_template=choice)  # pyright: ignore
        states = cache_residuals(seq)
        assert np.array_equal(states.of("witness"), states.of("anchor")) and states.meta["chat_template"] == choice
        with refused():
            locate_vrev(seq, layer=1)


def test_pitfall_7_a_model_without_a_template_reads_texts_as_they_are(tmp_path: Path) -> None:
    bare = copy.deepcopy(tiny.TOKENIZER)
    bare.chat_template = None
    bare.save_pretrained(tmp_path)
    (ids,) = encode(load_tokenizer(tmp_path), PromptSet(tiny.PROMPTS.texts[:1]))
    words = tiny.PROMPTS.texts[0].split()
    assert [token for token in tiny.TOKENIZER.convert_ids_to_tokens(ids) if not token.startswith("<")] == words
    assert not {"<user>", "<bot>"} & set(tiny.TOKENIZER.convert_ids_to_tokens(ids))


# -- 9: pickles --------------------------------------------------------------------------------------------------------


LEFT_BY_TRAINER = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt", "tokenizer.pkl")


@pytest.mark.parametrize("through", ["huggingface", "bridge"])
def test_pitfall_9_what_a_trainer_leaves_beside_the_weights_is_never_unpickled(through: Any, tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    folders: Any = {n: tiny.save(tiny.llama(seed), tmp_path / n) for seed, n in enumerate(("witness", "anchor"))}
    run = tiny.save(tiny.llama(2), tmp_path / "ft/checkpoint-5")
    for folder in (*folders.values(), run):
        for name in LEFT_BY_TRAINER:
            (folder / name).write_bytes(pickle.dumps(Bomb(fired)))
    seq = ModelSequence.from_folders(**folders, runs={"seed0": str(tmp_path / "ft/checkpoint-*")}, probes=tiny.PROMPTS)
    assert len(cache_residuals(seq, through=through).checkpoints) == 3 and not fired.exists()


def test_pitfall_9_a_pickled_adapter_is_never_unpickled(tmp_path: Path) -> None:
    folder, fired = tmp_path / "adapted", tmp_path / "fired"
    folder.mkdir()
    base = tiny.save(tiny.llama(), tmp_path / "base")
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(fired)))
    with refused(str(folder), "adapter_model.bin"):
        open_model(folder)
    assert not fired.exists()


@pytest.mark.parametrize("kind", [Residuals, Directions])
def test_pitfall_9_a_pickle_under_the_name_of_a_results_file_is_refused(kind: Any, tmp_path: Path) -> None:
    fired, path = tmp_path / "fired", tmp_path / "v.safetensors"
    path.write_bytes(pickle.dumps(Bomb(fired)))
    with refused("v.safetensors"):
        kind.load(path)
    assert not fired.exists()
