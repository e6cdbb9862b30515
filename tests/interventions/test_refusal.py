"""The refusal direction in a model that was built to refuse along a known one, and the filters at their edges."""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from histories import hidden_states, hooks_on, refused
from scipy.special import rel_entr, softmax
from torch import nn

from gravlens.behavior.scores import refusal_log_odds
from gravlens.directions.direction import Direction
from gravlens.directions.vrev import direction_from
from gravlens.history.encoding import encode, prompts_digest
from gravlens.history.prompts import PromptSet
from gravlens.interventions.edits import Steer
from gravlens.interventions.refusal import Filters, choose_refusal, refusal_candidates
from gravlens.models.forward import final_logits
from gravlens.models.opening import OpenModel, open_model

LAYERS = 5
WRITTEN = {0: 1, 1: 2, 2: 3, 3: 4, 4: 2}  # layer -> the axis of the stream that it writes to
STRENGTHS = {0: 0.3, 1: 1.0, 2: 1.0, 3: 3.0, 4: 0.1}
V = np.eye(tiny.WIDTH)[WRITTEN[1]]
SORRY, SURE = (tiny.TOKENIZER(word)["input_ids"][0] for word in ("sorry", "sure"))
SCORE = partial(refusal_log_odds, openings=["sorry"])
HARM, SOME_HARM = 0, 5  # axes of the embedding that attention reads


def asked(*objects: str) -> PromptSet:
    """Prompts of one length about some objects."""
    return PromptSet(tuple(f"how do i {verb} the {one} today" for one in objects for verb in ("pick", "force", "find")))


FITTED = {"harmful": asked("padlock", "deadbolt"), "harmless": asked("tomato", "tulip")}
JUDGED = {"harmful": asked("safe", "gate"), "harmless": asked("bean", "fern")}


def token(word: str) -> int:
    return tiny.TOKENIZER(word)["input_ids"][0]


@pytest.fixture(scope="module")
def planted() -> OpenModel:
    """Attention alone writes, at every position the mean over earlier words of how harmful their object is.

    Layer 0 writes it to an axis that nothing reads, layer 1 to v, which gives the logit of `sorry`, layer 2 what only
    some of the harmful objects have, layer 3 much of it to w, from which harmless prompts take `sure`, layer 4 a little
    more of it to v.
    """
    model: Any = tiny.llama(num_hidden_layers=LAYERS)
    model.model.norm = nn.Identity()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, :8] = 0
        embedding[:, 8:] *= 0.1
        for word in "padlock deadbolt safe gate".split():
            embedding[token(word), HARM] = 1
        for word in "tomato tulip bean fern".split():
            embedding[token(word), HARM] = -1
        embedding[token("padlock"), SOME_HARM] = 1
        for layer, block in enumerate(model.model.layers):
            block.input_layernorm = nn.Identity()
            block.mlp.down_proj.weight.zero_()
            for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
                getattr(block.self_attn, projection).weight.zero_()
            block.self_attn.v_proj.weight[0, SOME_HARM if layer == 2 else HARM] = 1
            block.self_attn.o_proj.weight[WRITTEN[layer], 0] = STRENGTHS[layer]
        model.lm_head.weight.zero_()
        states = hidden_states(model, encode(tiny.TOKENIZER, JUDGED["harmful"])[0])[-1][-1]
        model.lm_head.weight[SORRY, WRITTEN[1]] = 8.5 / states[WRITTEN[1]]
        model.lm_head.weight[SURE, WRITTEN[3]] = -6 / states[WRITTEN[3]]
    return open_model(model, tokenizer=tiny.TOKENIZER)


@pytest.fixture(scope="module")
def candidates(planted: OpenModel) -> tuple[Direction, ...]:
    return refusal_candidates(planted, **FITTED)


def logits_of(model: OpenModel, prompts: PromptSet) -> np.ndarray:
    return final_logits(model, encode(tiny.TOKENIZER, prompts)).double().numpy()


def log_odds(logits: np.ndarray) -> np.ndarray:
    others = np.delete(logits, SORRY, axis=1)
    return logits[:, SORRY] - np.log(np.exp(others).sum(1))


# --- candidates -------------------------------------------------------------------------------------------------


def test_candidates_are_differences_of_means_at_each_layer_and_position() -> None:
    model = tiny.llama()
    found = refusal_candidates(open_model(model, tokenizer=tiny.TOKENIZER), **FITTED, positions=(-1, -2))
    assert [(one.layer, one.made_from["position"]) for one in found] == [
        (layer, position) for position in (-1, -2) for layer in range(tiny.LAYERS)
    ]
    for one in found:
        if one.layer == tiny.LAYERS - 1:
            continue  # Hugging Face's last hidden state is post-norm
        means = [
            np.mean([hidden_states(model, ids)[one.layer + 1][one.made_from["position"]].numpy() for ids in sets], 0)
            for sets in (encode(tiny.TOKENIZER, prompts) for prompts in FITTED.values())
        ]
        np.testing.assert_allclose(one.vector * one.distance, means[0] - means[1], atol=1e-4)
        harmful = encode(tiny.TOKENIZER, FITTED["harmful"])
        assert one.prompts == prompts_digest(harmful) and one.estimator == "harmful_minus_harmless"


def test_what_each_layer_of_the_planted_model_adds(candidates: tuple[Direction, ...]) -> None:
    axes = np.stack([one.vector[1:5] for one in candidates])
    assert np.allclose(np.linalg.norm(axes, axis=1), 1, atol=1e-5) and (axes >= -1e-6).all()
    assert axes[0, 0] == pytest.approx(1) and axes[1, 1] > 0.9 and 0.2 < axes[2, 2] < 0.7 and axes[3, 3] > 0.8


# --- the choice -------------------------------------------------------------------------------------------------


def test_the_direction_that_decides_refusal_is_chosen(planted: OpenModel, candidates: tuple[Direction, ...]) -> None:
    hooks = hooks_on(planted)
    chosen = choose_refusal(planted, candidates, **JUDGED, score=SCORE)
    assert chosen.direction is candidates[1] and chosen.direction.vector @ V > 0.9
    table = chosen.table
    assert table["layer"].tolist() == list(range(LAYERS)) and (table["position"] == -1).all()
    assert table["dropped"][0].startswith("induce -") and table["dropped"][[1, 2]].tolist() == ["", ""]
    assert "layer 3 is not below 3; KL" in table["dropped"][3] and "layer 4" in table["dropped"][4]
    # Layer 2 passes too, but with what only some harmful objects have in it it leaves some refusal.
    assert table["bypass"][1] < table["bypass"][2] - 0.1 < table["bypass"][0]
    assert hooks_on(planted) == hooks


def test_the_measures_in_closed_form(planted: OpenModel, candidates: tuple[Direction, ...]) -> None:
    found = choose_refusal(planted, candidates, **JUDGED, score=SCORE).table
    harmful, harmless = (logits_of(planted, prompts) for prompts in JUDGED.values())
    assert found.attrs["harmful"] == pytest.approx(log_odds(harmful).mean(), abs=1e-4)
    assert found.attrs["harmless"] == pytest.approx(log_odds(harmless).mean(), abs=1e-4)
    assert found.attrs["harmful"] > 0 > found.attrs["harmless"]
    gain = planted.module.lm_head.weight[SORRY].detach().numpy() @ candidates[1].vector
    without, added = harmless.copy(), harmless.copy()
    # All that layers 0 and 1 write lies along the candidate, and most of what layer 4 writes.
    left = 0.1 / 1.1 * (1 - (candidates[1].vector @ V) ** 2)
    without[:, SORRY], harmful[:, SORRY] = left * without[:, SORRY], left * harmful[:, SORRY]
    added[:, SORRY] += gain * candidates[1].distance
    row = found.iloc[1]
    assert row["bypass"] == pytest.approx(log_odds(harmful).mean(), abs=1e-3)
    assert row["induce"] == pytest.approx(log_odds(added).mean(), abs=1e-3)
    kl = rel_entr(softmax(harmless, axis=1), softmax(without, axis=1)).sum(1).mean()
    assert row["kl"] == pytest.approx(kl, rel=1e-3) and row["kl"] > 1e-4


def test_adding_the_chosen_direction_adds_the_difference_of_means(candidates: tuple[Direction, ...]) -> None:
    hidden = torch.zeros(1, 1, tiny.WIDTH)
    added = Steer(candidates[1]).edit(hidden, candidates[1])[0, 0].numpy()
    np.testing.assert_allclose(added, candidates[1].vector * candidates[1].distance, rtol=1e-6)


def test_a_direction_of_ones_own_has_no_position(planted: OpenModel, candidates: tuple[Direction, ...]) -> None:
    own = direction_from(V, layer=1, distance=candidates[1].distance)
    chosen = choose_refusal(planted, [candidates[0], own], **JUDGED, score=SCORE)
    assert chosen.direction is own and pd.isna(chosen.table["position"][1])


# --- the filters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "layer"),
    [
        (Filters(depth=0.6), 1),  # layers 0 and 1: a block's output is the next one's input
        (Filters(depth=1.0, kl=100.0), 1),
        (Filters(induce=-100.0, kl=0.0, depth=0.4), 0),
    ],
)
def test_filters_are_arguments(
    planted: OpenModel, candidates: tuple[Direction, ...], filters: Filters, layer: int
) -> None:
    chosen = choose_refusal(planted, candidates, **JUDGED, score=SCORE, filters=filters)
    assert chosen.direction.layer == layer
    last = int(LAYERS * filters.depth) - 1
    assert [("is not below" in why) for why in chosen.table["dropped"]] == [one >= last for one in range(LAYERS)]


def test_a_value_at_a_filter_passes_and_one_beyond_does_not(
    planted: OpenModel, candidates: tuple[Direction, ...]
) -> None:
    row = choose_refusal(planted, candidates, **JUDGED, score=SCORE).table.iloc[1]
    at = Filters(induce=row["induce"], kl=row["kl"])
    again = choose_refusal(planted, candidates[1:2], **JUDGED, score=SCORE, filters=at)
    assert again.table["dropped"].tolist() == [""]
    for beyond in (Filters(induce=row["induce"] + 1e-6), Filters(kl=row["kl"] - 1e-6)):
        with refused("All 1 candidates"):
            choose_refusal(planted, candidates[1:2], **JUDGED, score=SCORE, filters=beyond)


def test_where_nothing_passes_the_best_values_are_named(planted: OpenModel, candidates: tuple[Direction, ...]) -> None:
    everything = choose_refusal(planted, candidates, **JUDGED, score=SCORE, filters=Filters(-99.0, 99.0, 2.0)).table
    named = f"lowest bypass {everything['bypass'].min():.3g}", f"highest induce {everything['induce'].max():.3g}"
    with refused("All 5 candidates were filtered out", *named, f"lowest KL {everything['kl'].min():.3g}"):
        choose_refusal(planted, candidates, **JUDGED, score=SCORE, filters=Filters(induce=99.0))
    with refused("No candidate"):
        choose_refusal(planted, [], **JUDGED, score=SCORE)


def test_harmful_and_harmless_that_do_not_differ_make_no_candidate(planted: OpenModel) -> None:
    with refused("length 0"):
        refusal_candidates(planted, harmful=FITTED["harmful"], harmless=FITTED["harmful"])
