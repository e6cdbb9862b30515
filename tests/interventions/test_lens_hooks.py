"""Interventions as TransformerLens' hooks: the same bits as `intervene`, and as a hook that is written by hand."""

from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, RAGGED, hooks_on, planted_vector, refused, synthetic
from torch import Tensor

from gravlens.activations.residuals import read_residuals
from gravlens.directions.direction import Direction, Directions, Subspace
from gravlens.directions.subspaces import whole_state
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import Batch, pad
from gravlens.interventions.edits import Ablate, At, Clamp, Patch, Steer, fwd_hooks
from gravlens.interventions.hooks import intervene
from gravlens.models.forward import reading
from gravlens.models.opening import OpenModel, open_model

KINDS = ("bridge", "compatible_bridge", "hooked_transformer")
BATCH = pad([ids[:11] for ids in PROMPT_IDS])  # of one length
V = direction_from(planted_vector().numpy(), layer=1, distance=3.0)
VS = Directions(
    tuple(direction_from(planted_vector(layer).numpy(), layer=layer, distance=2.0) for layer in range(tiny.LAYERS))
)


def opened(kind: str, folder: Path, seed: int = 0) -> OpenModel:
    if kind != "compatible_bridge":
        return tiny.opened(kind, folder, seed)
    model = tiny.opened("bridge", folder, seed)
    model.module.enable_compatibility_mode(no_processing=True)  # calls a hook once for each name of its place
    return model


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> OpenModel:
    return opened(request.param, tmp_path)


def interventions(model: OpenModel) -> dict[str, Any]:
    residuals = states_of(model)
    return {
        "steer": Steer(V, 0.7),
        "steer at every layer": Steer(VS, -0.4),
        "ablate": Ablate(V),
        "ablate at every layer": Ablate(VS),
        "ablate a subspace": Ablate(Subspace(np.eye(tiny.WIDTH)[:5], 2, 1.0)),
        "clamp": Clamp(VS, residuals, 0.5),
        "patch": Patch(VS, residuals, BATCH.input_ids.tolist()),
        "patch the state": Patch(whole_state(Directions((V,))), residuals, BATCH.input_ids.tolist()),
        "at the last token": At(Steer(V), "last"),
        "at two tokens": At(Ablate(VS), (-1, -3)),
    }


def states_of(model: OpenModel) -> Any:
    """Other states for the same prompts: those of this model, of the prompt before."""
    read = read_residuals(model, BATCH.input_ids.tolist(), layers=range(tiny.LAYERS)).numpy()
    return synthetic({"anchor": np.roll(read, 1, axis=0)})


def run(model: OpenModel, hooks: Any = (), batch: Batch = BATCH) -> Tensor:
    with torch.no_grad(), reading(batch):
        return model.module.run_with_hooks(
            batch.input_ids, attention_mask=batch.attention_mask, fwd_hooks=list(hooks), return_type="logits"
        )


# --- that they are the same ---------------------------------------------------------------------------------------


def test_every_intervention_is_the_same_to_the_last_bit_as_hooks_of_transformer_lens(model: OpenModel) -> None:
    clean, hooks = run(model), hooks_on(model)
    for name, edit in interventions(model).items():
        with intervene(model, edit):
            wanted = run(model)
        assert not torch.allclose(wanted, clean, atol=1e-3), name
        assert torch.equal(run(model, edit.fwd_hooks(model)), wanted), name
        with model.module.hooks(fwd_hooks=edit.fwd_hooks(model.module)):
            assert torch.equal(run(model), wanted), name
        assert torch.equal(run(model), clean) and hooks_on(model) == hooks


def test_hooks_by_hand_are_intervene_to_the_last_bit(model: OpenModel) -> None:
    """As a user of TransformerLens writes them, with nothing of gravlens but the vector."""

    def add(h: Tensor, hook: Any) -> Tensor:
        return h + V.distance * V.tensor(h.device, h.dtype)

    def ablate(h: Tensor, hook: Any) -> Tensor:
        v = V.tensor(h.device, h.dtype)
        return h - (h @ v)[..., None] * v

    for edit, by_hand in ((Steer(V), add), (Ablate(V), ablate)):
        with intervene(model, edit):
            wanted = run(model)
        assert torch.equal(run(model, [(V.hook_name, by_hand)]), wanted)
        assert torch.equal(run(model, [(V.hook_name, edit.hook)]), wanted)
        model.module.add_hook(V.hook_name, edit.hook)
        found = run(model)
        model.module.reset_hooks()
        assert torch.equal(found, wanted)


def test_a_hook_runs_once_for_each_pass(model: OpenModel) -> None:
    """A bridge's place has two names, and one of its modes calls a hook for both."""
    calls: list[str] = []

    @dataclass(frozen=True)
    class Counted:
        directions: Direction

        def edit(self, hidden: Tensor, direction: Direction) -> Tensor:
            calls.append(direction.hook_name)
            return hidden + 1

        def with_directions(self, directions: Any) -> "Counted":
            return replace(self, directions=directions)

    run(model, fwd_hooks(model, Counted(V)))
    assert calls == ["blocks.1.hook_resid_post"]


def test_several_interventions_of_a_layer_act_in_the_order_given(model: OpenModel) -> None:
    edits = (Steer(V), Ablate(V)), (Ablate(V), Steer(V))
    found = [run(model, fwd_hooks(model, *pair)) for pair in edits]
    for pair, one in zip(edits, found, strict=True):
        with intervene(model, *pair):
            assert torch.equal(run(model), one)
    assert not torch.allclose(*found, atol=1e-3)


def test_padded_prompts_are_edited_at_their_own_last_token(model: OpenModel) -> None:
    for side in ("left", "right"):
        batch = pad([ids for ids in RAGGED if len(ids) > 1], side=side)
        edit = At(Steer(V), "last")
        with intervene(model, edit):
            wanted = run(model, batch=batch)
        found = run(model, edit.fwd_hooks(model), batch)
        assert torch.equal(found, wanted) and not torch.allclose(found, run(model, batch=batch), atol=1e-3)


def test_a_model_is_ablated_at_every_layer_along_one_direction(model: OpenModel) -> None:
    """One hook at several places, as papers on refusal directions do it."""
    names = [f"blocks.{layer}.hook_resid_post" for layer in range(tiny.LAYERS)]
    everywhere = Directions(tuple(replace(V, layer=layer) for layer in range(tiny.LAYERS)))
    with intervene(model, Ablate(everywhere)):
        wanted = run(model)
    assert torch.equal(run(model, [(name, Ablate(V).hook) for name in names]), wanted)


# --- names and vectors --------------------------------------------------------------------------------------------


def test_names_and_tensors_of_a_direction() -> None:
    assert V.hook_name == "blocks.1.hook_resid_post"
    assert [one.hook_name for one in VS] == [f"blocks.{layer}.hook_resid_post" for layer in range(tiny.LAYERS)]
    assert Subspace(np.eye(4)[:2], 12, 1.0).hook_name == "blocks.12.hook_resid_post"
    found = V.tensor()
    assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(V.vector.copy()))
    assert V.tensor("meta").device.type == "meta" and V.tensor(dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(VS.tensor(dtype=torch.float64), torch.from_numpy(VS.vectors.astype(np.float64)))
    found += 1  # a copy: the direction is frozen
    assert not np.allclose(found.numpy(), V.vector)


def test_an_undefined_direction_has_no_tensor() -> None:
    """Its NaN would spread over every state that it is added to."""
    nothing = replace(V, vector=np.full(tiny.WIDTH, np.nan), undefined="witness and anchor do not differ")
    with refused("undefined at layer 1"):
        nothing.tensor()
    with refused("undefined at layer 1"):
        Directions((VS[0], nothing)).tensor()


# --- what is refused ----------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_model_is_refused(model: OpenModel) -> None:
    with refused("Layer 3"):  # a bridge would pass over the name
        Ablate(replace(V, layer=tiny.LAYERS)).fwd_hooks(model)
    with refused("(33,)"):
        Ablate(direction_from(np.ones(tiny.WIDTH + 1), layer=1)).fwd_hooks(model)
    with refused("A Direction was given"):
        fwd_hooks(model, V)  # pyright: ignore[reportArgumentType]
    with refused("layers [0, 1, 2]"):
        _ = Ablate(VS).hook


def test_a_layer_that_is_not_there_would_be_silent(tmp_path: Path) -> None:
    """Why `fwd_hooks` checks: a bridge of TransformerLens 3.9 runs without the hook, and 4 raises."""
    bridge = tiny.opened("bridge", tmp_path)
    hooks = [("blocks.3.hook_resid_post", Ablate(V).hook)]
    if version("transformer-lens").startswith("3."):
        assert torch.equal(run(bridge, hooks), run(bridge))
    else:
        with pytest.raises(KeyError, match="does not exist"):
            run(bridge, hooks)


def test_a_hugging_face_model_has_no_hook_points() -> None:
    with refused("LlamaForCausalLM"):
        Ablate(V).fwd_hooks(open_model(tiny.llama()))


def test_a_place_of_another_width_is_refused(model: OpenModel) -> None:
    """`hook_z` is [prompt, pos, head, d_head]."""
    with refused("(6, 11, 4, 8)", "width 32"):
        run(model, [("blocks.1.attn.hook_z", Ablate(V).hook)])


def test_positions_outside_reading_are_refused(model: OpenModel) -> None:
    edit = At(Steer(V), "last")
    with refused("not declared"):
        model.module.run_with_hooks(BATCH.input_ids, fwd_hooks=edit.fwd_hooks(model))
    everywhere = At(Steer(V), "all")  # needs none
    found = model.module.run_with_hooks(BATCH.input_ids, fwd_hooks=everywhere.fwd_hooks(model))
    with torch.no_grad():
        torch.testing.assert_close(found, run(model, Steer(V).fwd_hooks(model)))
