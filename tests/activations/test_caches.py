"""Residuals from caches of a HookedTransformer or TransformerBridge: the states that gravlens reads itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, hooked_twin, moved, refused

from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.directions.vrev import locate_vrev
from gravlens.history.encoding import Batch, pad
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import open_model

LAYERS = range(tiny.LAYERS)
RIGHT, LEFT = (pad(PROMPT_IDS, side=side) for side in ("right", "left"))
assert len(set(map(len, PROMPT_IDS))) > 1  # ragged: some are padded


@pytest.fixture(params=["bridge", "hooked_transformer"], scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Witness and anchor of one architecture, as TransformerLens' own models."""
    home: Path = tmp_path_factory.mktemp("pair")
    if request.param == "bridge":
        models = {"witness": tiny.llama(), "anchor": moved(tiny.llama(), seed=1)}
        opened = {name: open_model(tiny.save(one, home / name), through="bridge") for name, one in models.items()}
        return {name: one.module for name, one in opened.items()}
    found = {"witness": hooked_twin(tiny.gpt2()), "anchor": hooked_twin(moved(tiny.gpt2(), seed=1))}
    for one in found.values():
        one.tokenizer = tiny.TOKENIZER
    return found


def run(models: dict[str, Any], batch: Batch = RIGHT, **options: Any) -> dict[str, Any]:
    with torch.no_grad():
        return {
            name: model.run_with_cache(batch.input_ids, attention_mask=batch.attention_mask, **options)[1]
            for name, model in models.items()
        }


def taken(models: dict[str, Any], batch: Batch = RIGHT, **options: Any) -> Residuals:
    return Residuals.from_caches(run(models, batch, **options), batch.input_ids, batch.attention_mask)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * float(np.linalg.norm(wanted, axis=-1).min()))


# --- the states ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [RIGHT, LEFT], ids=["right", "left"])
def test_the_states_are_those_of_cache_residuals(pair: dict[str, Any], batch: Batch) -> None:
    wanted = cache_residuals(ModelSequence.from_models(**pair, probes=tiny.PROMPTS))
    found = taken(pair, batch)
    assert (found.checkpoints, found.layers, found.prompts) == (wanted.checkpoints, wanted.layers, wanted.prompts)
    assert found.values.dtype == np.float32 and found.meta["dtype"] == wanted.meta["dtype"]
    assert found.meta["positions"] == "last" and "ActivationCache" in found.meta["sources"]["witness"]
    assert_same(found.values, wanted.values)


def test_an_offset_counts_from_each_prompts_own_end(pair: dict[str, Any]) -> None:
    wanted = cache_residuals(ModelSequence.from_models(**pair, probes=tiny.PROMPTS), positions=-3)
    for batch in (RIGHT, LEFT):
        found = Residuals.from_caches(run(pair, batch), *batch[:2], positions=-3)
        assert_same(found.values, wanted.values)


def test_the_last_column_of_a_padded_batch_is_padding(pair: dict[str, Any]) -> None:
    """The trap: its states are finite, of the same shape, and those of no prompt."""
    cache, found = run(pair)["anchor"], taken(pair)
    padded = RIGHT.attention_mask[:, -1] == 0
    column = cache["blocks.1.hook_resid_post"][:, -1].numpy()
    assert padded.any() and not padded.all()
    off = np.linalg.norm(column - found.of("anchor")[:, 1], axis=1)
    assert (off[padded] > 0.1).all() and (off[~padded] == 0).all()


def test_a_cache_may_hold_some_layers_and_be_a_dict(pair: dict[str, Any]) -> None:
    everything, names = taken(pair), [f"blocks.{layer}.hook_resid_post" for layer in (2, 0)]
    some = taken(pair, names_filter=lambda name: name in names)
    assert some.layers == (0, 2) and np.array_equal(some.values, everything.values[:, :, [0, 2]])
    plain = {key: {name: cache[name] for name in names} for key, cache in run(pair).items()}
    assert np.array_equal(Residuals.from_caches(plain, *RIGHT[:2]).values, some.values)


def test_layers_are_in_the_order_of_their_numbers() -> None:
    """Not of their names, in which 10 stands before 2."""
    cache = {f"blocks.{layer}.hook_resid_post": torch.full((2, 3, 4), layer) + torch.eye(4)[0] for layer in (10, 2, 0)}
    found = Residuals.from_caches({"anchor": cache}, torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3))
    assert found.layers == (0, 2, 10) and found.of("anchor")[0, :, 1].tolist() == [0, 2, 10]


def test_states_with_a_gradient_and_in_bf16_are_taken(pair: dict[str, Any]) -> None:
    _, cache = pair["anchor"].run_with_cache(RIGHT.input_ids, attention_mask=RIGHT.attention_mask)
    assert Residuals.from_caches({"anchor": cache}, *RIGHT[:2]).values.shape[1] == len(PROMPT_IDS)
    half = {f"blocks.{layer}.hook_resid_post": cache["resid_post", layer].bfloat16() for layer in LAYERS}
    found = Residuals.from_caches({"anchor": half}, *RIGHT[:2])
    assert found.meta["dtype"] == ["bfloat16"] and found.values.dtype == np.float32


# --- v_rev --------------------------------------------------------------------------------------------------------


def test_v_rev_of_two_caches_and_of_two_models_is_that_of_the_sequence(pair: dict[str, Any]) -> None:
    wanted = locate_vrev(ModelSequence.from_models(**pair, probes=tiny.PROMPTS))
    models = locate_vrev(pair["witness"], pair["anchor"], prompts=tiny.PROMPTS)
    caches = locate_vrev(*run(pair).values(), prompts=(RIGHT.input_ids, RIGHT.attention_mask))
    assert np.array_equal(models.vectors, wanted.vectors)
    np.testing.assert_allclose(caches.vectors, wanted.vectors, atol=1e-5)
    np.testing.assert_allclose(caches.distances, wanted.distances, rtol=1e-5)
    assert {one.prompts for one in (*models, *caches)} == {wanted[0].prompts}
    one = locate_vrev(*run(pair).values(), prompts=RIGHT, layer=1)
    assert one.layer == 1 and np.array_equal(one.vector, caches[1].vector)
    assert locate_vrev(*run(pair).values(), prompts=RIGHT, layer=[2, 0]).layers == (2, 0)


def test_the_roles_are_in_the_order_given(pair: dict[str, Any]) -> None:
    there = locate_vrev(pair["witness"], pair["anchor"], prompts=tiny.PROMPTS, layer=1)
    back = locate_vrev(pair["anchor"], pair["witness"], prompts=tiny.PROMPTS, layer=1)
    assert np.array_equal(there.vector, -back.vector)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_without_a_mask_nothing_is_read(pair: dict[str, Any]) -> None:
    caches = run(pair)
    with refused("mask is None", "(6, "):
        Residuals.from_caches(caches, RIGHT.input_ids)
    with refused("mask is None"):
        locate_vrev(*caches.values(), prompts=RIGHT.input_ids)
    with refused("No prompts"):
        locate_vrev(*caches.values())
    with refused("PromptSet"):
        locate_vrev(*caches.values(), prompts=tiny.PROMPTS)
    with refused("(6, 2)"):
        Residuals.from_caches(caches, RIGHT.input_ids, RIGHT.attention_mask[:, :2])
    empty = RIGHT.attention_mask.clone()
    empty[3] = 0
    with refused("leaves a prompt without tokens"):
        Residuals.from_caches(caches, RIGHT.input_ids, empty)
    with refused("not of 0 and 1"):  # exchanged
        locate_vrev(*caches.values(), prompts=(RIGHT.attention_mask, RIGHT.input_ids))
    with refused("ndarray"):
        Residuals.from_caches(caches, RIGHT.input_ids, RIGHT.attention_mask.numpy())
    with refused("list"):
        Residuals.from_caches([*caches.values()], *RIGHT[:2])  # type: ignore[arg-type]
    for kind in (torch.bool, torch.float32):
        same = Residuals.from_caches(caches, RIGHT.input_ids, RIGHT.attention_mask.to(kind))
        assert np.array_equal(same.values, Residuals.from_caches(caches, *RIGHT[:2]).values)
    with refused("positions=-99"):
        Residuals.from_caches(caches, *RIGHT[:2], positions=-99)


def test_caches_of_other_shapes_are_refused(pair: dict[str, Any]) -> None:
    caches = run(pair)
    others = {
        "pos_slice": run(pair, pos_slice=-1),
        "names_filter": run(pair, names_filter=lambda _: False),
        "other tokens": run(pair, Batch(*(part[:, :9] for part in RIGHT))),
        "no batch": run(pair, Batch(*(part[:1] for part in RIGHT)), remove_batch_dim=True),
        "one layer": run(pair, names_filter="blocks.1.hook_resid_post"),
    }
    for name, other in others.items():
        with refused("resid_post"):
            Residuals.from_caches({"witness": caches["witness"], "anchor": other["anchor"]}, *RIGHT[:2])
        if name != "one layer":
            with refused("resid_post"):
                Residuals.from_caches({"anchor": other["anchor"]}, *RIGHT[:2])
    with refused("resid_post"):
        Residuals.from_caches({}, *RIGHT[:2])
    wide = {name: torch.cat([caches["anchor"][name]] * 2, -1) for name in ("blocks.0.hook_resid_post",)}
    narrow = {name: caches["anchor"][name] for name in wide}
    with refused("64"):
        Residuals.from_caches({"witness": wide, "anchor": narrow}, *RIGHT[:2])


def test_what_is_no_cache_is_refused(pair: dict[str, Any]) -> None:
    pair_of = pair["anchor"].run_with_cache(RIGHT.input_ids)
    with refused("A tuple"):  # (logits, cache)
        Residuals.from_caches({"anchor": pair_of}, *RIGHT[:2])
    with refused("A ActivationCache"):  # one cache instead of names and caches
        Residuals.from_caches(pair_of[1], *RIGHT[:2])
    with refused("ActivationCache"):
        locate_vrev(pair_of[1], pair["anchor"], prompts=tiny.PROMPTS)


def test_caches_of_two_precisions_are_refused(pair: dict[str, Any]) -> None:
    caches = run(pair)
    half = {f"blocks.{layer}.hook_resid_post": caches["anchor"]["resid_post", layer].bfloat16() for layer in LAYERS}
    with refused("float32", "bfloat16"):
        Residuals.from_caches({"witness": caches["witness"], "anchor": half}, *RIGHT[:2])


def test_states_of_centred_weights_are_refused() -> None:
    """What `HookedTransformer.from_pretrained` makes by default: another `resid_post`, whose mean is 0."""
    model = hooked_twin(tiny.gpt2())
    plain = run({"anchor": model})
    model.load_and_process_state_dict(
        model.state_dict(), fold_ln=False, center_writing_weights=True, center_unembed=False
    )
    assert Residuals.from_caches(plain, *RIGHT[:2]).layers == tuple(LAYERS)
    with refused("centred writing weights"):
        Residuals.from_caches(run({"anchor": model}), *RIGHT[:2])


def test_states_that_are_not_finite_are_refused(pair: dict[str, Any]) -> None:
    cache = {name: tensor.clone() for name, tensor in run(pair)["anchor"].items() if name.endswith("resid_post")}
    ends = RIGHT.attention_mask.sum(1) - 1
    cache["blocks.1.hook_resid_post"][:, -1][RIGHT.attention_mask[:, -1] == 0] = torch.nan  # padding is not read
    assert Residuals.from_caches({"anchor": cache}, *RIGHT[:2]).layers == tuple(LAYERS)
    cache["blocks.1.hook_resid_post"][2, ends[2]] = torch.inf
    with refused("anchor", "prompt 2", "layer 1"):
        Residuals.from_caches({"anchor": cache}, *RIGHT[:2])
