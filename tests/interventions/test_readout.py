"""The vocabulary readout: against the real forward pass of a state that is moved, in every kind of model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import hooked_twin, hooks_on, refused
from scipy import stats
from transformers import GemmaConfig, GemmaForCausalLM, OPTConfig, OPTForCausalLM

from gravlens.directions.direction import Direction
from gravlens.directions.vrev import direction_from
from gravlens.interventions.readout import readout, readout_openings
from gravlens.models.forward import final_logits
from gravlens.models.opening import OpenModel, open_model

LAST = tiny.LAYERS - 1
WORDS = tiny.TOKENIZER.convert_ids_to_tokens(list(range(tiny.VOCABULARY)))
PROMPT = [7, 9, 11, 30]


def gemma() -> Any:
    """Its norms multiply by 1 + weight, and its logits are tied to the embedding."""
    torch.manual_seed(0)
    config = GemmaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=tiny.WIDTH,
        intermediate_size=48,
        num_hidden_layers=tiny.LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=8,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    return GemmaForCausalLM(config).eval()


def opened(kind: str, folder: Path) -> OpenModel:
    """A tiny model whose final norm has a gain (and bias) of its own."""
    model = open_model(gemma(), tokenizer=tiny.TOKENIZER) if kind == "gemma" else tiny.opened(kind, folder)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            if any(part in name for part in ("ln_final", "ln_f.", "model.norm.")):
                weight += 0.4 * torch.randn(weight.shape, generator=generator)
    return model


def logits_of(model: OpenModel, push: torch.Tensor) -> np.ndarray:
    """Logits after a prompt, in fp64, the last block's output moved by a hook of the test's own."""

    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return (output[0] + push, *output[1:]) if isinstance(output, tuple) else output + push

    handle = model.blocks[-1].register_forward_hook(hook)
    logits = final_logits(model, [PROMPT])[0].double().numpy()
    handle.remove()
    return logits


def last_state(model: OpenModel) -> np.ndarray:
    kept: list[np.ndarray] = []

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        kept.append((output[0] if isinstance(output, tuple) else output)[0, -1].double().numpy())

    handle = model.blocks[-1].register_forward_hook(hook)
    final_logits(model, [PROMPT])
    handle.remove()
    return kept[0]


def all_logits(model: OpenModel, direction: Direction) -> np.ndarray:
    """The readout's logits by token id; every word of this vocabulary is there once."""
    table = readout(model, direction, top=tiny.VOCABULARY)
    assert sorted(table["token"]) == sorted(tiny.TOKENIZER.decode([i]) for i in range(tiny.VOCABULARY))
    by_word = table.set_index("token")["logit"]
    return np.array([by_word[tiny.TOKENIZER.decode([i])] for i in range(tiny.VOCABULARY)])


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.asarray(stats.spearmanr(one, other))[0])


@pytest.mark.parametrize("kind", [*tiny.KINDS, "gemma"])
def test_it_is_how_the_logits_of_a_moved_state_change(kind: str, tmp_path: Path) -> None:
    """For a direction across the state exactly, up to the scale that is left out; for any other nearly in order."""
    model, rng = opened(kind, tmp_path), np.random.default_rng(0)
    state, vector = last_state(model), rng.standard_normal(tiny.WIDTH)
    centred = kind in ("gpt2", "hooked_transformer")
    state = state - state.mean() if centred else state
    across = vector - (vector @ state) / (state @ state) * state
    for one, exact in ((across, True), (vector, False)):
        direction = direction_from(one, layer=LAST)
        step = 1e-2 * float(np.linalg.norm(state)) * torch.tensor(direction.vector)
        change = (logits_of(model, step) - logits_of(model, -step))[: tiny.VOCABULARY]
        change -= change.mean()
        hooks, found = hooks_on(model), all_logits(model, direction)
        assert rank_correlation(found, change) > 0.9 and hooks_on(model) == hooks
        if exact:
            size = np.sqrt((state**2).mean())
            assert found == pytest.approx(change * size / (2e-2 * np.linalg.norm(state)), abs=2e-3 * np.ptp(found))


def test_with_a_norm_of_gain_one_it_is_the_unembedding_itself() -> None:
    model, direction = tiny.llama(), direction_from(np.random.default_rng(0).standard_normal(tiny.WIDTH), layer=0)
    wanted = model.lm_head.weight.detach().double().numpy() @ direction.vector
    found = all_logits(open_model(model, tokenizer=tiny.TOKENIZER), direction)
    assert found == pytest.approx(wanted - wanted.mean(), abs=1e-5)


def test_the_gain_and_the_centring_of_a_layer_norm_are_applied_and_its_bias_is_not() -> None:
    model, rng = tiny.gpt2(), np.random.default_rng(1)
    gain, vector = rng.standard_normal(tiny.WIDTH), rng.standard_normal(tiny.WIDTH) + 2
    with torch.no_grad():
        model.transformer.ln_f.weight.copy_(torch.tensor(gain))
        model.transformer.ln_f.bias.fill_(7)
    direction = direction_from(vector, layer=1)
    unit = vector / np.linalg.norm(vector)
    wanted = model.lm_head.weight.detach().double().numpy() @ (gain * (unit - unit.mean()))
    found = all_logits(open_model(model, tokenizer=tiny.TOKENIZER), direction)
    assert found == pytest.approx(wanted - wanted.mean(), abs=1e-5)
    uncentred = model.lm_head.weight.detach().double().numpy() @ (gain * unit)
    assert rank_correlation(found, uncentred) < 0.95


def test_the_same_model_reads_the_same_in_every_form(tmp_path: Path) -> None:
    direction = direction_from(np.random.default_rng(2).standard_normal(tiny.WIDTH), layer=LAST)
    model = tiny.gpt2()
    plain = all_logits(open_model(model, tokenizer=tiny.TOKENIZER), direction)
    hooked = open_model(hooked_twin(model), tokenizer=tiny.TOKENIZER)
    assert all_logits(hooked, direction) == pytest.approx(plain, abs=1e-4)
    folder = tiny.save(tiny.llama(), tmp_path)
    pair = [all_logits(open_model(folder, through=form), direction) for form in ("huggingface", "bridge")]
    assert pair[0] == pytest.approx(pair[1], abs=1e-5)


def toward(model: Any, *tokens: int, sign: float = 1) -> Direction:
    """The way that raises some tokens of a Llama of gain 1."""
    return direction_from(sign * model.lm_head.weight[list(tokens)].detach().sum(0).numpy(), layer=LAST)


def ids(*openings: str) -> list[int]:
    return [tiny.TOKENIZER(text, add_special_tokens=False)["input_ids"][0] for text in openings]


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_token_is_the_first_or_the_last(sign: int) -> None:
    model = tiny.llama()
    table = readout(open_model(model, tokenizer=tiny.TOKENIZER), toward(model, *ids("sorry"), sign=sign), top=4)
    assert list(table.columns) == ["token", "logit"] and len(table) == 8
    assert table["token"].iloc[0 if sign > 0 else -1] == "sorry"
    assert (np.diff(table["logit"]) <= 0).all() and (table["logit"][:4] > 0).all() and (table["logit"][4:] < 0).all()


def test_refusals_stand_against_compliances() -> None:
    model = tiny.llama()
    opened, sides = open_model(model, tokenizer=tiny.TOKENIZER), {"refusals": ["sorry ,"], "compliances": ["sure"]}
    (refusal, compliance), direction = ids("sorry", "sure"), toward(model, 40, 41)
    logits = all_logits(opened, direction)
    found = readout_openings(opened, direction, **sides)
    assert found == pytest.approx(logits[refusal] - logits[compliance])
    assert readout_openings(opened, toward(model, refusal), **sides) > 0
    assert readout_openings(opened, toward(model, compliance), **sides) < 0
    several = {"refusals": ["sorry ,", "sorry i", "no ,", "i am"], "compliances": ["sure", "i can"]}
    no, alike = ids("no")[0], readout_openings(opened, direction, **several)  # "i" opens both
    assert alike == pytest.approx((logits[refusal] + logits[no]) / 2 - logits[compliance])
    with refused("sorry", "the same tokens"):
        readout_openings(opened, direction, refusals=["sorry ,"], compliances=["sorry i", "sure"])
    with refused("cannot write"):
        readout_openings(opened, direction, refusals=["I'm sorry"], compliances=["sure"])


def norm_less() -> Any:
    """OPT as of 350 million parameters: a projection stands between the final norm and the unembedding."""
    config = OPTConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=tiny.WIDTH, word_embed_proj_dim=16, ffn_dim=48, num_attention_heads=4,
        num_hidden_layers=2, max_position_embeddings=64,
    )  # fmt: skip
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("model", "direction", "named"),
    [
        (tiny.llama, Direction(np.full(tiny.WIDTH, np.nan), 0, 0.0, undefined="no difference"), "no difference"),
        (tiny.llama, direction_from(np.ones(tiny.WIDTH), layer=tiny.LAYERS), f"Layer {tiny.LAYERS}"),
        (tiny.llama, direction_from(np.ones(tiny.WIDTH + 1), layer=0), "shape"),
        (norm_less, direction_from(np.ones(tiny.WIDTH), layer=0), "OPTForCausalLM"),
    ],
)
def test_what_cannot_be_read_is_refused(model: Callable[[], Any], direction: Direction, named: str) -> None:
    with refused(named):
        readout(open_model(model(), tokenizer=tiny.TOKENIZER), direction)


def test_a_model_without_a_tokenizer_or_a_final_norm_is_refused() -> None:
    direction = direction_from(np.ones(tiny.WIDTH), layer=0)
    with refused("LlamaForCausalLM has no tokenizer"):
        readout(tiny.llama(), direction)
    hooked = tiny.hooked_transformer()
    del hooked.ln_final
    with refused("no final norm"):
        readout(open_model(hooked, tokenizer=tiny.TOKENIZER), direction)
