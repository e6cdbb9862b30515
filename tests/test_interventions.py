"""Interventions: their algebra, where and how often they act, that they bite, and that nothing is left behind."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, assert_same_states, hidden_states, hooked_twin, hooks_on, planted_vector, refused
from torch import Tensor, nn
from transformers import GenerationConfig

from gravlens.directions import Direction, Directions, direction_from
from gravlens.inference import final_logits, generate
from gravlens.interventions import Ablate, Steer, everywhere, intervene
from gravlens.models import OpenModel, open_model
from gravlens.residuals import read_residuals

LAST = tiny.LAYERS - 1
EQUAL = [ids[:11] for ids in PROMPT_IDS]  # of one length: TransformerLens runs them as one batch


def direction(layer: int = 1, seed: int = 0, distance: float = 3.0) -> Direction:
    return direction_from(planted_vector(seed).numpy(), layer=layer, distance=distance)


def all_layers() -> Directions:
    return Directions(tuple(direction(layer, seed=layer) for layer in range(tiny.LAYERS)))


def states(seed: int = 1, *shape: int) -> Tensor:
    return torch.randn(*(shape or (4, 7)), tiny.WIDTH, generator=torch.Generator().manual_seed(seed)) * 50


@pytest.fixture(params=tiny.KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> OpenModel:
    return tiny.opened(request.param, tmp_path)


@pytest.fixture
def llama() -> OpenModel:
    return tiny.opened("llama", Path())


# --- algebra ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, -0.5, 0.0])
def test_steering_adds_strength_times_distance_along_v(strength: float) -> None:
    v, h = direction(distance=4.0), states()
    moved = Steer(v, strength).edit(h, v).double().numpy() - h.double().numpy()
    np.testing.assert_allclose(moved, np.broadcast_to(strength * 4.0 * v.vector, moved.shape), atol=2e-5)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-6)]
)
def test_ablation_leaves_nothing_along_v_and_all_else(dtype: torch.dtype, tolerance: float) -> None:
    v, h = direction(), states().to(dtype)
    once = Ablate(v).edit(h, v)
    vector, scale = v.vector.astype(np.float64), h.double().norm(dim=-1).numpy()
    assert once.dtype == dtype
    assert (np.abs(once.double().numpy() @ vector) <= tolerance * scale).all()
    rest = h.double().numpy() - (h.double().numpy() @ vector)[..., None] * vector
    assert (np.linalg.norm(once.double().numpy() - rest, axis=-1) <= tolerance * scale).all()
    twice = Ablate(v).edit(once, v)
    assert ((twice - once).double().norm(dim=-1).numpy() <= tolerance * scale).all()


def test_an_edit_is_a_new_tensor_and_changes_neither_state_nor_direction() -> None:
    v, h = direction(), states()
    before, vector = h.clone(), v.vector.copy()
    for edit in (Steer(v), Steer(v, 0.0), Ablate(v)):
        edited = edit.edit(h, v)
        assert edited.data_ptr() != h.data_ptr() and edited.untyped_storage().nbytes() == 4 * edited.numel()
        edited += 1
    assert torch.equal(h, before) and np.array_equal(v.vector, vector) and not v.vector.flags.writeable


@pytest.mark.parametrize("make", [lambda v: Steer(v, 0.3), Ablate])
def test_in_bf16_only_the_result_is_rounded(make: Any) -> None:
    v, h = direction(distance=700.0), states().to(torch.bfloat16)
    exact = make(v).edit(h.double(), v).to(torch.bfloat16)
    assert (make(v).edit(h, v) == exact).double().mean() > 0.99  # but for a tie that fp32 rounded first


def test_one_direction_at_every_layer() -> None:
    v = direction(layer=1)
    spread = everywhere(v, 4)
    assert (
        spread.layers == (0, 1, 2, 3) and (spread.vectors == v.vector).all() and (spread.distances == v.distance).all()
    )
    assert everywhere(v, tiny.opened("llama", Path())).layers == tuple(range(tiny.LAYERS))


def test_other_directions_keep_kind_and_strength() -> None:
    other = direction(seed=5)
    swapped = Steer(direction(), 0.3).with_directions(other)
    assert isinstance(swapped, Steer) and swapped.strength == 0.3 and swapped.directions is other
    assert isinstance(Ablate(direction()).with_directions(other), Ablate)


# --- that they act, where and how often -------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(tiny.LAYERS))
@pytest.mark.parametrize("make", [Steer, Ablate])
def test_a_hook_bites_at_its_layer_and_not_below(model: OpenModel, layer: int, make: Any) -> None:
    v = direction(layer)
    everything, clean = range(tiny.LAYERS), final_logits(model, PROMPT_IDS)
    before = read_residuals(model, PROMPT_IDS, layers=everything)
    with intervene(model, make(v)):
        logits, after = final_logits(model, PROMPT_IDS), read_residuals(model, PROMPT_IDS, layers=everything)
    assert not torch.allclose(logits, clean, atol=1e-3)
    if layer:
        assert_same_states(after[:, :layer], before[:, :layer], 1e-6)
    assert_same_states(after[:, layer], make(v).edit(before[:, layer], v), 1e-5)
    assert torch.equal(final_logits(model, PROMPT_IDS), clean)


def test_every_kind_of_model_is_steered_alike(tmp_path: Path) -> None:
    edits = (Steer(all_layers(), 0.7), Ablate(direction(1, seed=8)))

    def steered(opened: OpenModel) -> Tensor:
        with intervene(opened, *edits):
            return final_logits(opened, PROMPT_IDS)

    gpt2 = tiny.gpt2()
    pairs = [(tiny.opened("llama", tmp_path), tiny.opened("bridge", tmp_path))]
    pairs += [(open_model(gpt2), open_model(hooked_twin(gpt2)))]
    for plain, lens in pairs:
        wanted = steered(plain)
        assert (wanted - final_logits(plain, PROMPT_IDS)).abs().max() > 1
        torch.testing.assert_close(steered(lens), wanted, atol=2e-5 * float(wanted.abs().max()), rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_steering_the_last_block_in_closed_form(kind: str) -> None:
    """Hugging Face's own state before the final norm, moved by hand, through its own norm and unembedding."""
    opened, v = tiny.opened(kind, Path()), direction(LAST)
    module: Any = opened.module
    norm = module.model.norm if kind == "llama" else module.transformer.ln_f
    kept: list[Tensor] = []
    handle = norm.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0].clone()))
    with torch.no_grad():
        module(torch.tensor(EQUAL))
        handle.remove()
        wanted = module.lm_head(norm(kept[0] + 2 * v.distance * torch.tensor(v.vector)))[:, -1]
    with intervene(opened, Steer(v, 2.0)):
        torch.testing.assert_close(final_logits(opened, EQUAL), wanted, atol=1e-5, rtol=1e-5)


def test_layer_l_is_what_block_l_plus_1_reads(llama: OpenModel) -> None:
    module: Any = llama.module
    v, ids = direction(0), PROMPT_IDS[0]
    clean = hidden_states(module, ids)[1]
    read: list[Tensor] = []
    handle = module.model.layers[1].register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0][0]))
    with intervene(llama, Ablate(v)), torch.no_grad():
        module(torch.tensor([ids]))
    handle.remove()
    assert_same_states(read[0], Ablate(v).edit(clean, v))  # at every position


def test_firings_are_layers_times_forward_passes_of_a_cached_generation(model: OpenModel) -> None:
    new = 5
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = model.blocks[0].register_forward_hook(count)
    with intervene(model, Steer(all_layers(), 0.1)) as firings:
        answers = generate(replace(model, tokenizer=None), EQUAL, max_new_tokens=new)  # without eos none ends early
    handle.remove()
    assert [len(answer) for answer in answers] == [new] * len(EQUAL)
    assert passes == new  # the prefill gives the first token, the last one is never fed
    assert firings.per_layer == dict.fromkeys(range(tiny.LAYERS), new) and firings.total == tiny.LAYERS * new


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("edit", [Steer(all_layers(), 0.5), Ablate(all_layers())])
def test_the_same_with_the_cache_on_and_off_and_padded_and_alone(kind: str, edit: Any) -> None:
    opened = tiny.opened(kind, Path())
    module: Any = opened.module
    uncached = GenerationConfig(max_new_tokens=8, do_sample=False, use_cache=False, pad_token_id=0)
    clean = generate(opened, PROMPT_IDS, max_new_tokens=8)
    with intervene(opened, edit):
        together, logits = generate(opened, PROMPT_IDS, max_new_tokens=8), final_logits(opened, PROMPT_IDS)
        alone = [generate(opened, [ids], max_new_tokens=8)[0] for ids in PROMPT_IDS]
        logits_alone = torch.cat([final_logits(opened, [ids]) for ids in PROMPT_IDS])
        with torch.no_grad():
            recomputed = [
                module.generate(torch.tensor([ids]), generation_config=uncached)[0, len(ids) :] for ids in PROMPT_IDS
            ]
    assert together == alone == [_cut(tokens.tolist()) for tokens in recomputed]
    assert together != clean
    torch.testing.assert_close(logits, logits_alone, atol=1e-5 * float(logits.abs().max()), rtol=0)


def _cut(tokens: list[int]) -> list[int]:
    eos = tiny.TOKENIZER.eos_token_id
    return tokens[: tokens.index(eos)] if eos in tokens else tokens


def test_interventions_act_in_the_order_given_and_nested_ones_after_the_outer(llama: OpenModel) -> None:
    v = direction(1)
    along = torch.tensor(v.vector)
    wanted = {"steer, ablate": 0.0, "ablate, steer": v.distance}

    def component() -> Tensor:
        return read_residuals(llama, PROMPT_IDS, layers=[1])[:, 0] @ along

    found = {}
    with intervene(llama, Steer(v), Ablate(v)):
        found["steer, ablate"] = component()
    with intervene(llama, Ablate(v)) as outer, intervene(llama, Steer(v)) as inner:
        found["ablate, steer"] = component()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], torch.full_like(found[name], value), atol=1e-4, rtol=0)
    assert outer.per_layer == inner.per_layer == {1: 1}


@pytest.mark.parametrize("edit", [Steer(all_layers()), Ablate(all_layers())])
def test_gradients_pass_and_gradient_checkpointing_changes_nothing(edit: Any) -> None:
    grads, passes = [], []
    for checkpointing in (False, True):
        module: Any = tiny.llama()
        module.train()
        if checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs: list[Any] = []
        module.model.layers[1].self_attn.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        with intervene(module, edit):
            ids = torch.tensor(EQUAL)
            module(ids, labels=ids, use_cache=False).loss.backward()
        passes.append(len(runs))
        grads.append(module.model.embed_tokens.weight.grad)
    assert passes == [1, 2]  # the second time it was recomputed, and edited again
    torch.testing.assert_close(grads[0], grads[1])
    plain: Any = tiny.llama()
    plain(ids, labels=ids).loss.backward()
    assert not torch.allclose(grads[0], plain.model.embed_tokens.weight.grad)


class _Block(nn.Module):
    """A block whose output is what it is told to be."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> Any:
        return self.output


def _toy(output: Any) -> OpenModel:
    block = _Block(output)
    return OpenModel(block, "huggingface", (block,), tiny.WIDTH, None, {})


def test_a_tuple_keeps_its_other_elements() -> None:
    h, attention, v = states(), states(2), direction(0)
    toy = _toy((h, attention, "cache"))
    with intervene(toy, Ablate(v)):
        first, *others = toy.module()
    assert torch.equal(first, Ablate(v).edit(h, v)) and others[0] is attention and others[1] == "cache"


@pytest.mark.parametrize("output", [{"hidden": torch.zeros(1, tiny.WIDTH)}, None, (), ("cache", 1), [torch.zeros(1)]])
def test_an_output_that_is_no_state_is_an_error(output: Any) -> None:
    toy = _toy(output)
    with refused("layer 0", type(output).__name__), intervene(toy, Ablate(direction(0))):
        toy.module()
    assert hooks_on(toy) == 0


# --- that nothing is left behind --------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
def test_nothing_is_left_after_an_exception(model: OpenModel, error: type[BaseException]) -> None:
    clean, hooks = final_logits(model, EQUAL), hooks_on(model)  # a first pass: transformers adds hooks of its own there
    with pytest.raises(error), intervene(model, Ablate(all_layers())), intervene(model, Steer(all_layers())):  # noqa: PT012
        assert hooks_on(model) == hooks + 2 * tiny.LAYERS
        raise error  # and no complaint about hooks that never fired hides it
    assert hooks_on(model) == hooks and torch.equal(final_logits(model, EQUAL), clean)


def test_nothing_is_left_when_the_interruption_comes_amid_a_forward_pass(llama: OpenModel) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = llama.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), intervene(llama, Ablate(all_layers())):
        final_logits(llama, PROMPT_IDS)
    handle.remove()
    assert hooks_on(llama) == 0


def test_nothing_is_left_after_use_and_the_weights_are_untouched(model: OpenModel) -> None:
    clean, hooks = generate(model, EQUAL, max_new_tokens=4), hooks_on(model)
    before = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    with intervene(model, Steer(all_layers()), Ablate(all_layers())):
        generate(model, EQUAL, max_new_tokens=4)
    assert hooks_on(model) == hooks and generate(model, EQUAL, max_new_tokens=4) == clean
    assert all(torch.equal(weight, before[name]) for name, weight in model.module.state_dict().items())


def test_nothing_is_left_where_a_later_direction_does_not_fit(llama: OpenModel) -> None:
    with refused("Layer 3"), intervene(llama, Ablate(direction(0)), Ablate(direction(tiny.LAYERS))):
        pass
    assert hooks_on(llama) == 0


# --- what is refused --------------------------------------------------------------------------------------------


def test_a_block_in_which_nothing_ran_is_an_error(llama: OpenModel) -> None:
    with refused("0, 1, 2"), intervene(llama, Ablate(all_layers())):
        pass
    with refused("layer 2"), intervene(llama, Ablate(direction(0)), Steer(direction(2))):
        read_residuals(llama, PROMPT_IDS, layers=[0])  # stops below layer 2
    with refused("layer 1"), intervene(llama, Ablate(direction(1))):
        final_logits(tiny.opened("llama", Path()), PROMPT_IDS)  # another model
    with refused("No intervention"), intervene(llama):
        final_logits(llama, PROMPT_IDS)
    assert hooks_on(llama) == 0


def test_a_direction_that_does_not_fit_the_model_is_refused(llama: OpenModel) -> None:
    wide = direction_from(np.ones(tiny.WIDTH + 1), layer=0)
    with refused("(33,)"), intervene(llama, Steer(wide)):
        pass
    with refused("Layer -1"), intervene(llama, Steer(direction(-1))):
        pass


@pytest.mark.parametrize("make", [Steer, Ablate])
def test_undefined_and_unscaled_directions_are_refused_by_name(make: Any) -> None:
    nothing = Direction(np.full(tiny.WIDTH, np.nan), 2, 0.0, undefined="witness and anchor differ by 0")
    with refused("layer 2", "differ by 0"):
        make(Directions((direction(1), nothing)))
    with refused("layer 2", "nan"):
        make(replace(nothing, undefined=None))
    with refused("layer 1", "length 2"):
        make(replace(direction(1), vector=2 * direction(1).vector))
    with refused("No direction"):
        make(Directions(()))


def test_a_strength_or_distance_that_is_no_number_is_refused() -> None:
    with refused("nan"):
        Steer(direction(), float("nan"))
    with refused("inf"):
        Steer(direction(distance=float("inf")))
