"""Hooks: where, when and how often interventions act in a model, that they bite, and that nothing is left behind."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import (
    PROMPT_IDS,
    RAGGED,
    assert_same_states,
    hidden_states,
    hooked_twin,
    hooks_on,
    moved,
    plant,
    planted_vector,
    refused,
)
from torch import Tensor, nn
from transformers import GenerationConfig

from gravlens.activations.residuals import Residuals, cache_residuals, read_residuals
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.subspaces import whole_state
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.encoding import encode, pad
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.edits import Ablate, At, Clamp, Patch, Steer
from gravlens.interventions.hooks import intervene
from gravlens.models.families import HuggingFace
from gravlens.models.forward import final_logits, generate, reading, sequence_logprobs
from gravlens.models.opening import OpenModel, open_model

LAST = tiny.LAYERS - 1
EQUAL = [ids[:11] for ids in PROMPT_IDS]  # of one length: TransformerLens runs them as one batch
ONE_TOKEN = [[12], [40]]


def direction(layer: int = 1, seed: int = 0, distance: float = 3.0) -> Direction:
    return direction_from(planted_vector(seed).numpy(), layer=layer, distance=distance)


def all_layers() -> Directions:
    return Directions(tuple(direction(layer, seed=layer) for layer in range(tiny.LAYERS)))


ALL_KINDS = (*tiny.KINDS, "lora_llama", "lora_gpt2")


def same_model(kind: str, folder: Path) -> tuple[Any, OpenModel]:
    """A Hugging Face model as its own reference, and the same weights opened as one of the kinds."""
    model = tiny.llama() if kind in ("llama", "bridge", "lora_llama") else tiny.gpt2()
    if kind.startswith("lora"):
        return with_lora(model).merge_and_unload(), open_model(with_lora(model), tokenizer=tiny.TOKENIZER)
    if kind == "bridge":
        return model, open_model(tiny.save(model, folder), through="bridge")
    return model, open_model(hooked_twin(model) if kind == "hooked_transformer" else model, tokenizer=tiny.TOKENIZER)


def with_lora(model: Any, seed: int = 0) -> Any:
    """A PEFT-wrapped copy whose adapters change what it says."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(seed)
    names = ["c_attn"] if hasattr(model, "transformer") else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def blocks_of(model: Any) -> Any:
    return model.model.layers if hasattr(model, "model") else model.transformer.h


@contextmanager
def by_hand(model: Any, layer: int, change: Any) -> Iterator[None]:
    """A Hugging Face model whose states [prompt, pos, d_model] of a layer go through a function, without gravlens."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = blocks_of(model)[layer].register_forward_hook(hook)
    with torch.no_grad():
        yield
    handle.remove()


def pushed(n: int, positions: Any, by: Tensor) -> Any:
    """States of one prompt of n tokens, moved at positions by hand."""
    which = {"all": slice(None), "last": slice(n - 1, n), "prompt": slice(n), "answer": slice(n, None)}[positions]

    def change(hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[:, which] += by
        return hidden

    return change


@pytest.fixture(params=tiny.KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> OpenModel:
    return tiny.opened(request.param, tmp_path)


@pytest.fixture
def llama() -> OpenModel:
    return tiny.opened("llama", Path())


# --- that they act, where and how often -------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(tiny.LAYERS))
@pytest.mark.parametrize("make", [Steer, Ablate])
def test_pitfall_2_a_hook_bites_at_its_layer_and_not_below(model: OpenModel, layer: int, make: Any) -> None:
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


def test_pitfall_5_layer_l_is_what_block_l_plus_1_reads(llama: OpenModel) -> None:
    module: Any = llama.module
    v, ids = direction(0), PROMPT_IDS[0]
    clean = hidden_states(module, ids)[1]
    read: list[Tensor] = []
    handle = module.model.layers[1].register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0][0]))
    with intervene(llama, Ablate(v)), torch.no_grad():
        module(torch.tensor([ids]))
    handle.remove()
    assert_same_states(read[0], Ablate(v).edit(clean, v))  # at every position


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_pitfall_5_layer_l_is_entry_l_plus_1_of_hidden_states(kind: str) -> None:
    """By Hugging Face's own record; its last entry is after the final norm, so the last layer has none."""
    ids = PROMPT_IDS[0]
    clean = hidden_states(tiny.opened(kind, Path()).module, ids)
    for layer in range(LAST):
        v, module = direction(layer), tiny.opened(kind, Path()).module  # anew: its recorders come after our hook
        with intervene(module, Steer(v)):
            found = hidden_states(module, ids)
        assert_same_states(found[layer + 1], clean[layer + 1] + v.distance * torch.tensor(v.vector))
        assert torch.equal(torch.stack(found[: layer + 1]), torch.stack(clean[: layer + 1]))
        assert not torch.allclose(found[layer + 2], clean[layer + 2], atol=1e-2)


def test_pitfall_2_firings_are_layers_times_forward_passes_of_a_generation(model: OpenModel) -> None:
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
def test_pitfall_5_the_same_with_the_cache_on_and_off_and_padded_and_alone(kind: str, edit: Any) -> None:
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


# --- at chosen positions ----------------------------------------------------------------------------------------

POSITIONS = ("all", "last", "prompt", "answer")
V = direction(1, distance=20.0)
PUSH = V.distance * torch.tensor(V.vector)


def greedy_by_hand(model: Any, prompt: list[int], positions: str, new: int) -> list[int]:
    """Greedy tokens of one prompt alone, each prefix read anew, its states moved by hand."""
    tokens = list(prompt)
    with by_hand(model, 1, pushed(len(prompt), positions, PUSH)):
        while len(tokens) < len(prompt) + new:
            tokens.append(int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pitfall_5_the_same_steered_positions_with_the_cache_on_and_off(kind: str, tmp_path: Path) -> None:
    """Hugging Face's cached and padded answers, and the others' uncached ones, are those of a loop by hand."""
    reference, opened = same_model(kind, tmp_path)
    found = {}
    for positions in POSITIONS:
        with intervene(opened, At(Steer(V), positions)):
            found[positions] = [generate(replace(opened, tokenizer=None), ids, max_new_tokens=6)
                                for ids in (RAGGED, ONE_TOKEN)]  # fmt: skip
        assert found[positions] == [
            [greedy_by_hand(reference, prompt, positions, 6) for prompt in ids] for ids in (RAGGED, ONE_TOKEN)
        ]
    found["none"] = [generate(replace(opened, tokenizer=None), ids, max_new_tokens=6) for ids in (RAGGED, ONE_TOKEN)]
    for ids in (0, 1):  # all differ, so none could stand for another; one token is the last and the prompt
        assert len({str(answers[ids]) for answers in found.values()}) == (5, 4)[ids]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pitfall_5_the_same_steered_positions_in_logits_and_log_probabilities(kind: str, tmp_path: Path) -> None:
    reference, opened = same_model(kind, tmp_path)
    answers = [[5, 6, 7], [8], [9, 10], [11], [12, 13, 14, 15], [16]]
    for positions in POSITIONS:
        logits, totals = [], []
        for prompt, answer in zip(RAGGED, answers, strict=True):
            with by_hand(reference, 1, pushed(len(prompt), positions, PUSH)):
                out = reference(torch.tensor([prompt + answer])).logits[0]
            steps = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            totals.append(sum(out[at].double().log_softmax(-1)[t] for at, t in zip(steps, answer, strict=True)))
            logits.append(out[len(prompt) - 1])
        with intervene(opened, At(Steer(V), positions)):
            torch.testing.assert_close(sequence_logprobs(opened, RAGGED, answers), torch.stack(totals), rtol=1e-4,
                                       atol=1e-3)  # fmt: skip
            if positions != "answer":
                wanted = torch.stack(logits)
                torch.testing.assert_close(final_logits(opened, RAGGED), wanted, rtol=0, atol=1e-4 * wanted.abs().max())


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pitfall_5_the_same_steered_positions_where_residuals_are_read(kind: str, tmp_path: Path) -> None:
    """Read right-padded, at the layer itself and at the one above it."""
    reference, opened = same_model(kind, tmp_path)
    kept: list[Tensor] = []
    for prompt in RAGGED:
        push = pushed(len(prompt), "last", PUSH)
        with by_hand(reference, 1, push), by_hand(reference, 2, lambda h: kept.append(h) or h):
            reference(torch.tensor([prompt]))
    clean = torch.stack([hidden_states(reference, prompt)[2][-1] for prompt in RAGGED])
    with intervene(opened, At(Steer(V), "last")):
        found = read_residuals(opened, RAGGED, layers=[1, 2])
    assert_same_states(found[:, 0], clean + PUSH)
    assert_same_states(found[:, 1], torch.stack([h[0, -1] for h in kept]))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_pitfall_2_firings_are_the_passes_in_which_a_chosen_state_was_changed(kind: str, tmp_path: Path) -> None:
    _, opened = same_model(kind, tmp_path)
    cached = opened.kind == "huggingface"  # the others read the prompt anew for each token
    counts = {"all": 6, "last": 1 if cached else 6, "prompt": 1 if cached else 6, "answer": 5}
    for positions, count in counts.items():
        with intervene(opened, At(Steer(all_layers(), 0.1), positions)) as firings:
            generate(replace(opened, tokenizer=None), EQUAL, max_new_tokens=6)
        assert firings.per_layer == dict.fromkeys(range(tiny.LAYERS), count)


def test_pitfall_2_an_intervention_that_met_none_of_its_positions_is_an_error(llama: OpenModel) -> None:
    """Also where padding lies behind the prompts, and where another intervention acts at the layer."""
    with refused("layer 1", "At"), intervene(llama, At(Ablate(direction()), "answer"), Ablate(direction())):
        read_residuals(llama, RAGGED, layers=[1])
    with refused("layer 1", "At"), intervene(llama, At(Ablate(direction()), "answer")):
        final_logits(llama, RAGGED)


def test_a_pass_of_ones_own_says_what_it_reads(llama: OpenModel) -> None:
    edit, batch = At(Steer(V), "last"), pad(RAGGED, side="left")
    with refused("(6, 9, 32)"), intervene(llama, edit), torch.no_grad():
        llama.module(**batch._asdict())
    assert hooks_on(llama) == 0
    with intervene(llama, edit), torch.no_grad():
        with reading(batch):
            own = llama.module(**batch._asdict()).logits[:, -1]
        torch.testing.assert_close(own, final_logits(llama, RAGGED))
    with pytest.raises(KeyboardInterrupt), reading(batch):
        raise KeyboardInterrupt
    with refused("(6, 9, 32)"), intervene(llama, edit):  # and nothing of the reading is left
        llama.module(**batch._asdict())


# --- a checkpoint's own states ----------------------------------------------------------------------------------


def planted_history(layer: int) -> tuple[Any, Any, Directions, Residuals]:
    """An anchor, a fine-tuned model that is also the witness, v_rev and the states on the prompts."""
    anchor = tiny.gpt2()
    tuned = plant(anchor, planted_vector(3), layer)
    sequence = ModelSequence.from_models(
        witness=tuned, anchor=anchor, probes=list(tiny.PROMPTS), tokenizer=tiny.TOKENIZER
    )
    residuals = cache_residuals(sequence)
    return anchor, tuned, locate_vrev(residuals).defined(), residuals


def test_a_patch_undoes_what_was_planted_and_brings_it_about() -> None:
    """Necessity and sufficiency in closed form: the models differ along v at the last layer and nowhere else."""
    anchor, tuned, vs, residuals = planted_history(LAST)
    clean = {name: final_logits(open_model(m), PROMPT_IDS) for name, m in (("anchor", anchor), ("witness", tuned))}
    assert (clean["anchor"] - clean["witness"]).abs().max() > 0.5 and vs.layers == (LAST,)
    for into, source in ((tuned, "anchor"), (anchor, "witness")):
        with intervene(open_model(into), Patch(vs, residuals, PROMPT_IDS, source)):
            found = final_logits(open_model(into), PROMPT_IDS[::-1])
        torch.testing.assert_close(found, clean[source].flip(0), rtol=1e-4, atol=1e-3)


def test_a_patch_of_the_whole_state_makes_the_sources_next_token_distribution() -> None:
    """Its last block's states go through this model's own norm and head, which both models share."""
    anchor = tiny.gpt2()
    tuned = moved(anchor, seed=4)
    for part in ("ln_f", "wte"):
        getattr(tuned.transformer, part).load_state_dict(getattr(anchor.transformer, part).state_dict())
    sequence = ModelSequence.from_models(
        witness=tuned, anchor=anchor, probes=list(tiny.PROMPTS), tokenizer=tiny.TOKENIZER
    )
    residuals = cache_residuals(sequence)
    spaces = whole_state(locate_vrev(residuals).at([LAST]))
    wanted = final_logits(open_model(anchor), PROMPT_IDS)
    opened = open_model(tuned, tokenizer=tiny.TOKENIZER)
    with intervene(opened, Patch(spaces, residuals, encode(tiny.TOKENIZER, tiny.PROMPTS))):
        torch.testing.assert_close(final_logits(opened, PROMPT_IDS), wanted, rtol=1e-3, atol=1e-3)
        answers = generate(opened, PROMPT_IDS, max_new_tokens=4)
    assert [answer[0] for answer in answers] == wanted.argmax(-1).tolist()
    assert (final_logits(opened, PROMPT_IDS) - wanted).abs().max() > 1


def test_a_clamp_holds_every_state_at_the_anchors_mean(model: OpenModel) -> None:
    read = read_residuals(model, PROMPT_IDS, layers=range(tiny.LAYERS)).numpy()
    names, meta = ("anchor",), {"dtype": ["float32"]}
    residuals = Residuals(read[None], names, tuple(range(tiny.LAYERS)), "", meta)
    vs = all_layers()
    with intervene(model, Clamp(vs, residuals, 0.5)):
        held = read_residuals(model, PROMPT_IDS, layers=range(tiny.LAYERS)).numpy()
    for layer, v in enumerate(vs):
        wanted = read[:, layer].mean(0) @ v.vector + 0.5 * v.distance
        np.testing.assert_allclose(held[:, layer] @ v.vector, wanted, atol=1e-3)


# --- orders, gradients, outputs ---------------------------------------------------------------------------------


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


@pytest.mark.parametrize("wrap", [lambda model: model, with_lora], ids=["full", "lora"])
@pytest.mark.parametrize("edit", [Steer(all_layers()), Ablate(all_layers()), At(Steer(all_layers()), "last")])
def test_pitfall_2_gradients_pass_and_gradient_checkpointing_changes_nothing(edit: Any, wrap: Any) -> None:
    def gradients(checkpointing: bool, *edits: Any) -> tuple[list[Tensor], int]:
        """Of what is trained, and how often a block ran."""
        module = wrap(tiny.llama()).train()
        if checkpointing:
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        runs: list[Any] = []
        blocks = open_model(module).blocks
        handle: Any = blocks[1].self_attn.register_forward_hook(lambda *_: runs.append(1))
        batch = pad(EQUAL)
        with ExitStack() as stack:
            stack.enter_context(reading(batch, torch.full((len(EQUAL),), 5)))  # around the recomputation too
            if edits:
                stack.enter_context(intervene(module, *edits))
            module(batch.input_ids, labels=batch.input_ids, use_cache=False).loss.backward()
        handle.remove()
        return [p.grad for p in module.parameters() if p.grad is not None], len(runs)

    (plain, once), (recomputed, twice), (without, _) = (
        gradients(False, edit), gradients(True, edit), gradients(False)
    )  # fmt: skip
    assert (once, twice) == (1, 2)  # the second time it was recomputed, and edited again
    for one, other in zip(plain, recomputed, strict=True):
        torch.testing.assert_close(one, other)
    assert any(not torch.allclose(one, other, rtol=0.01) for one, other in zip(plain, without, strict=True))


class _Block(nn.Module):
    """A block whose output is what it is told to be."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self) -> Any:
        return self.output


class _Toy(HuggingFace):
    """One block and nothing else."""

    def __init__(self, block: nn.Module) -> None:
        self.module, self.blocks, self.d_model = block, (block,), tiny.WIDTH


def _toy(output: Any) -> OpenModel:
    return OpenModel(_Toy(_Block(output)), None, {})


def test_a_tuple_keeps_its_other_elements() -> None:
    h, attention, v = torch.randn(4, 7, tiny.WIDTH), torch.randn(2), direction(0)
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
def test_pitfall_2_nothing_is_left_after_an_exception(model: OpenModel, error: type[BaseException]) -> None:
    clean, hooks = final_logits(model, EQUAL), hooks_on(model)  # a first pass: transformers adds hooks of its own there
    with pytest.raises(error), intervene(model, Ablate(all_layers())), intervene(model, Steer(all_layers())):  # noqa: PT012
        assert hooks_on(model) == hooks + 2 * tiny.LAYERS
        raise error  # and no complaint about hooks that never fired hides it
    assert hooks_on(model) == hooks and torch.equal(final_logits(model, EQUAL), clean)


def test_pitfall_2_nothing_is_left_when_the_interruption_comes_amid_a_forward_pass(llama: OpenModel) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = llama.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), intervene(llama, Ablate(all_layers())):
        final_logits(llama, PROMPT_IDS)
    handle.remove()
    assert hooks_on(llama) == 0


def test_pitfall_2_nothing_is_left_after_use_and_the_weights_are_untouched(model: OpenModel) -> None:
    clean, hooks = generate(model, EQUAL, max_new_tokens=4), hooks_on(model)
    before = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    with intervene(model, Steer(all_layers()), Ablate(all_layers())):
        generate(model, EQUAL, max_new_tokens=4)
    assert hooks_on(model) == hooks and generate(model, EQUAL, max_new_tokens=4) == clean
    assert all(torch.equal(weight, before[name]) for name, weight in model.module.state_dict().items())


def test_pitfall_2_nothing_is_left_where_a_later_direction_does_not_fit(llama: OpenModel) -> None:
    with refused("Layer 3"), intervene(llama, Ablate(direction(0)), Ablate(direction(tiny.LAYERS))):
        pass
    assert hooks_on(llama) == 0


# --- what is refused --------------------------------------------------------------------------------------------


def test_pitfall_2_a_block_in_which_nothing_ran_is_an_error(llama: OpenModel) -> None:
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
