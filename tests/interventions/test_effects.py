"""Causal effects against planted directions, programmed scores, and values worked out by hand."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from histories import PROMPT_IDS, hooks_on, plant, planted_vector, refused, synthetic

from gravlens.activations.residuals import Residuals, read_residuals
from gravlens.behavior.scores import refusal_log_odds
from gravlens.directions.direction import Direction, Directions, Subspaces
from gravlens.directions.subspaces import span_of
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.edits import Ablate, Steer, everywhere
from gravlens.interventions.effects import Effect, causal_effect, crossings, dose_response, layerwise_effect
from gravlens.interventions.hooks import intervene
from gravlens.models.forward import final_logits
from gravlens.models.opening import OpenModel, open_model
from gravlens.plot.lines import plot_effect

LAST = tiny.LAYERS - 1
GAIN = 0.5
SCORE = partial(refusal_log_odds, openings=["sorry"])
COLUMNS = (
    "condition layer baseline with_intervention difference low high p_random n_random random_low random_high n_prompts "
    "crossing random_crossing random_kind"
).split()


def test_a_prompt_crosses_zero_in_the_direction_of_the_mean_alone() -> None:
    baseline, moved = np.array([-1.0, -1.0, 1.0, 1.0]), np.array([2.0, 0.5, -1.5, 2.0])  # up on average
    drawn = np.array([[0.0, 2.0, 0, -5], [2, 2, 0, 0]])
    assert crossings(baseline, moved, drawn) == {"crossing": 0.25, "random_crossing": 0.375}
    assert crossings(-baseline, -moved, -drawn) == {"crossing": 0.25, "random_crossing": 0.375}
    assert crossings(baseline, np.array([-2.0, 2, -1, -3]), drawn[:0]) == {
        "crossing": 0.5,  # a score that falls to 0 itself is no longer above it
        "random_crossing": pytest.approx(float("nan"), nan_ok=True),
    }


def test_crossing_rate_in_a_table_is_that_of_the_scores(planted: OpenModel) -> None:
    given = {"score": SCORE, "prompts": tiny.PROMPTS, "n_random": 3}
    before = SCORE(planted, tiny.PROMPTS)
    shift = float(np.median(before))  # so that some prompts lie on either side

    def shifted(model: Any, prompts: Any) -> np.ndarray:
        return SCORE(model, prompts) - shift

    found = causal_effect(planted, Ablate(direction()), **{**given, "score": shifted})
    (row,) = found.table.to_dict("records")
    with intervene(planted, Ablate(direction())):
        after = shifted(planted, tiny.PROMPTS)
    assert row["difference"] < 0 and row["crossing"] == np.mean((before > shift) & (after <= 0)) > 0
    assert row["random_crossing"] <= row["crossing"]


def direction(layer: int = LAST, seed: int = 0, distance: float = 3.0) -> Direction:
    return direction_from(planted_vector(seed).numpy(), layer=layer, distance=distance)


@pytest.fixture(scope="module")
def planted() -> OpenModel:
    """A Llama whose logit of `sorry` is GAIN · ⟨h, v⟩ of the last block, whose other logits are 0; h lies along v."""
    llama: Any = tiny.llama(mlp_bias=True)
    v = torch.tensor(direction().vector)
    llama.model.norm = torch.nn.Identity()
    with torch.no_grad():
        llama.lm_head.weight.zero_()
        llama.lm_head.weight[tiny.TOKENIZER("sorry")["input_ids"][0]] = GAIN * v
        for block in llama.model.layers:
            block.self_attn.o_proj.weight.mul_(0.05)
            block.mlp.down_proj.weight.mul_(0.05)
        llama.model.layers[LAST].mlp.down_proj.bias += 12 * v
    return open_model(llama, tokenizer=tiny.TOKENIZER)


@pytest.fixture(scope="module")
def llama() -> OpenModel:
    return tiny.opened("llama", Path())


def row(effect: Any, condition: str = "it") -> pd.Series:
    (found,) = [row for _, row in effect.table.iterrows() if row["condition"] == condition]
    return found


# --- the planted direction --------------------------------------------------------------------------------------


def test_ablating_the_planted_direction_does_what_was_planted_and_random_ones_do_not(planted: OpenModel) -> None:
    along = read_residuals(planted, PROMPT_IDS, layers=[LAST])[:, 0].numpy() @ direction().vector
    effect = causal_effect(planted, {"it": Ablate(direction())}, score=SCORE, prompts=tiny.PROMPTS)
    np.testing.assert_allclose(effect.differences["it"], -GAIN * along, atol=1e-4)
    found = row(effect)
    assert found["baseline"] == pytest.approx(GAIN * along.mean() - np.log(tiny.VOCABULARY - 1), abs=1e-4)
    assert found["with_intervention"] == pytest.approx(-np.log(tiny.VOCABULARY - 1), abs=1e-4)
    assert found["p_random"] == 1 / 21 and found["n_random"] == 20
    assert found["high"] < found["random_low"] <= found["random_high"] < -found["difference"] / 2


@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_steering_along_the_planted_direction_in_closed_form(planted: OpenModel, strength: float) -> None:
    condition = {"it": Steer(direction(distance=4.0), strength)}
    effect = causal_effect(planted, condition, score=SCORE, prompts=tiny.PROMPTS)
    np.testing.assert_allclose(effect.differences["it"], GAIN * strength * 4.0, atol=1e-4)
    # A random unit vector u of the same length moves it by GAIN · strength · distance · ⟨u, v⟩, less than all of it.
    assert np.abs(effect.random["it"]).max() < abs(GAIN * strength * 4.0) and row(effect)["p_random"] == 1 / 21
    spread = np.std(effect.random["it"]) / abs(GAIN * strength * 4.0)
    assert 0.5 < spread * np.sqrt(tiny.WIDTH) < 1.7  # ⟨u, v⟩ has standard deviation 1/√d


def test_a_direction_without_the_effect_is_not_told_from_random_ones(planted: OpenModel) -> None:
    """The same test where the claim is false: directions drawn at random give a p that is not small on average."""
    conditions = {f"{seed}": Ablate(direction(seed=seed)) for seed in range(100, 110)}
    table = causal_effect(planted, conditions, score=SCORE, prompts=tiny.PROMPTS).table
    assert 0.3 < table["p_random"].mean() < 0.75 and (table["p_random"] <= 0.05).sum() <= 2


# --- the numbers of a row ---------------------------------------------------------------------------------------


def programmed(values: list[Any], n_prompts: int) -> Any:
    """A score that runs the model and then gives the next value of a list, whatever the model said."""
    left: Iterator[Any] = iter(values)

    def score(model: OpenModel, _prompts: PromptSet) -> np.ndarray:
        final_logits(model, PROMPT_IDS[:1])
        return np.broadcast_to(np.asarray(next(left), dtype=float), (n_prompts,)).copy()

    return score


def test_p_counts_random_draws_at_least_as_far_from_zero_on_either_side(llama: OpenModel) -> None:
    random = [0.5, -1.5, 1.0, -1.0, 0.0, 0.9, 2.0, -0.9, 0.1]  # 4 of 9 are at least 1 away
    score = programmed([2.0, 3.0, *(2.0 + value for value in random)], 6)
    effect = causal_effect(llama, {"it": Ablate(direction())}, score=score, prompts=tiny.PROMPTS, n_random=9)
    found = row(effect)
    np.testing.assert_allclose(effect.random["it"], random)
    assert (found["baseline"], found["with_intervention"], found["difference"]) == (2, 3, 1)
    assert found["p_random"] == (1 + 4) / (1 + 9)
    assert found["random_low"] == pytest.approx(-1.5) and found["random_high"] == pytest.approx(2.0)
    assert (found["low"], found["high"]) == (1, 1) and found["n_prompts"] == 6


def test_twenty_draws_give_their_whole_range_and_many_their_central_95_percent(llama: OpenModel) -> None:
    for n_random, low, high in [(20, 1, 20), (400, 10, 391)]:
        score = programmed([0.0, 0.0, *range(1, n_random + 1)], 6)
        condition = {"it": Ablate(direction())}
        found = row(causal_effect(llama, condition, score=score, prompts=tiny.PROMPTS, n_random=n_random))
        assert (found["random_low"], found["random_high"]) == (low, high)


def test_the_interval_is_the_bootstraps_of_paired_differences(llama: OpenModel) -> None:
    rng = np.random.default_rng(5)
    prompts = PromptSet(tuple(list(tiny.PROMPTS) * 10))
    noise, differences = (
        100 * rng.standard_normal(60),
        1 + rng.standard_normal(60),
    )  # unpaired, the noise would drown it
    score = programmed([noise, noise + differences], 60)
    found = row(causal_effect(llama, {"it": Ablate(direction())}, score=score, prompts=prompts, n_random=0))
    half = 1.96 * differences.std() / np.sqrt(60)
    np.testing.assert_allclose(
        [found["low"], found["high"]], [differences.mean() - half, differences.mean() + half], atol=0.1 * half
    )


def test_one_prompt_has_no_interval_and_no_draws_have_no_p(llama: OpenModel) -> None:
    condition = {"it": Ablate(direction())}
    found = row(causal_effect(llama, condition, score=SCORE, prompts=tiny.PROMPTS[:1], n_random=0))
    assert np.isfinite(found["difference"])
    assert pd.isna(found[["low", "high", "p_random", "random_low", "random_high"]].astype(float)).all()


# --- the random controls ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Recorded:
    """An intervention of a user's own, that writes down which directions it was given."""

    directions: Any
    seen: list[Any] = field(default_factory=list)

    def edit(self, hidden: torch.Tensor, direction: Any) -> torch.Tensor:
        return hidden + torch.tensor(direction.basis[0])

    def with_directions(self, directions: Any) -> "Recorded":
        self.seen.append(directions)
        return Recorded(directions, self.seen)


def test_random_controls_keep_layers_and_distances_and_are_fresh_unit_vectors(llama: OpenModel) -> None:
    given = Directions((direction(0, 1, 2.0), direction(1, 2, 5.0), direction(2, 1, 7.0)))  # 0 and 2 share a vector
    recorded = Recorded(given)
    causal_effect(llama, {"it": recorded}, score=SCORE, prompts=tiny.PROMPTS, n_random=4)
    assert len(recorded.seen) == 4
    for twin in recorded.seen:
        assert twin.layers == given.layers and np.array_equal(twin.distances, given.distances)
        np.testing.assert_allclose(np.linalg.norm(twin.vectors, axis=1), 1, atol=1e-6)
        assert np.array_equal(twin.vectors[0], twin.vectors[2]) and not np.allclose(twin.vectors[0], twin.vectors[1])
    drawn = np.stack([twin.vectors[:2] for twin in recorded.seen]).reshape(-1, tiny.WIDTH)
    assert len(np.unique(drawn, axis=0)) == 8 and (drawn < 0).any(axis=1).all() and (drawn > 0).any(axis=1).all()


def test_interventions_that_act_together_share_their_replacement(llama: OpenModel) -> None:
    first, second = Recorded(direction(0, 1)), Recorded(everywhere(direction(0, 1), llama))
    causal_effect(llama, {"it": [first, second]}, score=SCORE, prompts=tiny.PROMPTS, n_random=2)
    for one, all_layers in zip(first.seen, second.seen, strict=True):
        assert (all_layers.vectors == one.vectors).all()


def test_the_same_generator_gives_the_same_table_and_another_another(llama: OpenModel) -> None:
    conditions = {"it": Ablate(direction()), "too": Steer(direction(0), 0.5)}
    ask = partial(causal_effect, llama, conditions, score=SCORE, prompts=tiny.PROMPTS, n_random=3)
    pd.testing.assert_frame_equal(ask().table, ask().table)
    pd.testing.assert_frame_equal(ask().table, ask(rng=np.random.default_rng(0)).table)
    assert not np.array_equal(ask().random["it"], ask(rng=np.random.default_rng(1)).random["it"])


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_measuring_leaves_every_kind_of_model_as_it_was(kind: str, tmp_path: Path) -> None:
    model = tiny.opened(kind, tmp_path)
    clean, hooks = final_logits(model, PROMPT_IDS), hooks_on(model)
    weights = {name: weight.clone() for name, weight in model.module.state_dict().items()}
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    effect = causal_effect(model, {"it": Ablate(direction())}, score=SCORE, prompts=tiny.PROMPTS, n_random=2)
    assert abs(row(effect)["difference"]) > 1e-3
    assert torch.equal(final_logits(model, PROMPT_IDS), clean) and hooks_on(model) == hooks
    assert all(torch.equal(weight, weights[name]) for name, weight in model.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state[0]) and np.array_equal(np.random.get_state()[1], state[1])


# --- the table --------------------------------------------------------------------------------------------------


def test_the_table_and_its_layers(llama: OpenModel) -> None:
    conditions = {
        "one": Ablate(direction(1)),
        "two": [Steer(direction(1)), Ablate(Directions((direction(1),)))],
        "all": Ablate(everywhere(direction(1), llama)),
        "both": [Ablate(direction(0)), Ablate(direction(2))],
    }
    table = causal_effect(llama, conditions, score=SCORE, prompts=tiny.PROMPTS, n_random=1).table
    assert list(table.columns) == COLUMNS and table["layer"].dtype == "Int64"
    assert table["condition"].tolist() == list(conditions)
    assert table["layer"].tolist()[:2] == [1, 1] and table["layer"].isna().tolist() == [False, False, True, True]
    assert table.attrs["score"] == "refusal_log_odds"
    np.testing.assert_allclose(table["with_intervention"], table["baseline"] + table["difference"])


def test_layer_by_layer_is_one_condition_a_layer_and_leaves_undefined_ones_out(llama: OpenModel) -> None:
    undefined = Direction(np.full(tiny.WIDTH, np.nan), 0, 0.0, undefined="no difference")
    vs = Directions((undefined, direction(1, 1), direction(2, 2)))
    makes = {"ablated": Ablate, "strength 0.5": partial(Steer, strength=0.5)}
    effect = layerwise_effect(llama, vs, makes, score=SCORE, prompts=tiny.PROMPTS, n_random=2)
    assert effect.table["condition"].tolist() == ["ablated", "ablated", "strength 0.5", "strength 0.5"]
    assert effect.table["layer"].tolist() == [1, 2, 1, 2] and effect.table.attrs["score"] == "refusal_log_odds"
    conditions = {f"{name}, layer {v.layer}": make(v) for name, make in makes.items() for v in vs.defined()}
    by_hand = causal_effect(llama, conditions, score=SCORE, prompts=tiny.PROMPTS, n_random=2)
    pd.testing.assert_frame_equal(effect.table.drop(columns="condition"), by_hand.table.drop(columns="condition"))
    assert effect.random.keys() == effect.differences.keys() == conditions.keys()
    alone = layerwise_effect(llama, vs, score=SCORE, prompts=tiny.PROMPTS, n_random=0).table
    assert alone["condition"].tolist() == ["ablate", "ablate"]
    np.testing.assert_allclose(alone["difference"], effect.table["difference"][:2])


def test_the_table_is_drawn(llama: OpenModel) -> None:
    vs = Directions((direction(1, 1), direction(2, 2)))
    effect = layerwise_effect(llama, vs, score=SCORE, prompts=tiny.PROMPTS, n_random=2)
    assert "refusal log odds" in plot_effect(effect.table).get_ylabel().replace("_", " ")


def test_the_html_is_escaped(llama: OpenModel) -> None:
    def score(model: OpenModel, prompts: PromptSet) -> np.ndarray:
        return SCORE(model, prompts)

    score.__name__ = "<i>score</i>"
    condition = {"<b>it</b>": Ablate(direction())}
    html = causal_effect(llama, condition, score=score, prompts=tiny.PROMPTS, n_random=1)._repr_html_()
    assert "&lt;b&gt;it" in html and "&lt;i&gt;score" in html and "<b>it" not in html and "<i>" not in html


# --- what is refused --------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_refused(llama: OpenModel) -> None:
    ask = partial(causal_effect, llama, prompts=tiny.PROMPTS, n_random=1)
    it = {"it": Ablate(direction())}
    with refused("No condition"):
        ask({}, score=SCORE)
    with refused("finite numbers of shape (5,)"):
        ask(it, score=programmed([1.0], 5))
    with refused("returned 0 finite"):
        ask(it, score=programmed([float("nan")], 6))
    with refused("No forward pass"):
        ask(it, score=lambda _model, prompts: np.zeros(len(prompts)))  # a score that never runs the model
    with refused("Layer 3"):
        ask({"it": Ablate(direction(3))}, score=SCORE)
    assert hooks_on(llama) == 0


def test_vrev_of_a_sequence_goes_straight_in() -> None:
    """Steering the anchor by v_rev makes it the witness, where they differ by a bias of one layer."""
    anchor = tiny.gpt2()
    witness = plant(anchor, planted_vector(3), layer=1)
    sequence = ModelSequence.from_models(
        witness=witness, anchor=anchor, probes=list(tiny.PROMPTS), tokenizer=tiny.TOKENIZER
    )
    v = locate_vrev(sequence, layer=1)
    model = open_model(anchor, tokenizer=tiny.TOKENIZER)
    effect = causal_effect(model, {"it": Steer(v)}, score=SCORE, prompts=tiny.PROMPTS, n_random=0)
    wanted = SCORE(open_model(witness, tokenizer=tiny.TOKENIZER), tiny.PROMPTS) - SCORE(model, tiny.PROMPTS)
    np.testing.assert_allclose(effect.differences["it"], wanted, atol=1e-3)
    assert np.abs(wanted).max() > 0.1


# --- random controls from a covariance, and of subspaces ----------------------------------------------------------


def cloud_of(*axes: int, n: int = 200, layers: int = tiny.LAYERS) -> Residuals:
    """Anchor states that vary along a coordinate axis a layer, about a far mean of its own; the witness's are noise."""
    rng = np.random.default_rng(3)
    anchor = np.full((n, layers, tiny.WIDTH), 50.0) * np.arange(1, layers + 1)[:, None]
    for layer in range(layers):
        anchor[:, layer, axes[layer % len(axes)]] += rng.standard_normal(n)
    return synthetic({"witness": rng.standard_normal(anchor.shape), "anchor": anchor})


def test_draws_from_the_anchors_covariance_lie_where_its_states_vary(llama: OpenModel) -> None:
    recorded = Recorded(Directions((direction(0, 1), direction(2, 2))))
    ask = partial(causal_effect, llama, score=SCORE, prompts=tiny.PROMPTS, n_random=3)
    table = ask({"it": recorded}, states=cloud_of(4, 5, 6)).table
    assert table["random_kind"].tolist() == ["covariance_matched"]
    assert ask({"it": recorded}, states="isotropic").table["random_kind"].tolist() == ["isotropic"]
    for twin in recorded.seen[:3]:
        np.testing.assert_allclose(np.abs(twin.vectors), np.eye(tiny.WIDTH)[[4, 6]], atol=1e-4)
        assert np.array_equal(twin.distances, [3.0, 3.0])
    for twin in recorded.seen[3:]:
        assert np.abs(twin.vectors).max() < 0.9


def test_a_vector_at_all_layers_is_replaced_from_the_sum_of_their_covariances(llama: OpenModel) -> None:
    recorded = Recorded(everywhere(direction(0, 1), llama))
    condition = {"it": recorded}
    causal_effect(llama, condition, score=SCORE, prompts=tiny.PROMPTS, n_random=30, states=cloud_of(4, 5, 6))
    drawn = np.stack([twin.vectors[0] for twin in recorded.seen])
    np.testing.assert_allclose((drawn[:, 4:7] ** 2).sum(1), 1, atol=1e-4)
    assert ((drawn[:, 4:7] ** 2).mean(0) > 0.15).all()  # a third each
    assert all((twin.vectors == twin.vectors[0]).all() for twin in recorded.seen)


def test_a_subspace_is_replaced_by_one_of_its_rank(planted: OpenModel) -> None:
    """Ablating a plane that holds the planted direction does what ablating the direction does."""
    spaces = Subspaces((span_of(np.stack([direction().vector, np.eye(tiny.WIDTH)[0]]), layer=LAST, distance=3.0),))
    recorded = Recorded(spaces)
    causal_effect(planted, {"it": recorded}, score=SCORE, prompts=tiny.PROMPTS, n_random=2)
    assert all(isinstance(twin, Subspaces) and twin[LAST].rank == 2 for twin in recorded.seen)
    conditions = {"plane": Ablate(spaces), "line": Ablate(direction())}
    effect = causal_effect(planted, conditions, score=SCORE, prompts=tiny.PROMPTS)
    np.testing.assert_allclose(effect.differences["plane"], effect.differences["line"], atol=1e-4)
    assert effect.table["p_random"].tolist() == [1 / 21, 1 / 21]
    by_layer = layerwise_effect(planted, spaces, score=SCORE, prompts=tiny.PROMPTS, n_random=0).table
    assert by_layer["layer"].tolist() == [LAST]


def test_a_draw_is_one_mixture_of_the_states_for_all_layers_and_conditions(llama: OpenModel) -> None:
    """The same prompts' states, weighted alike, at each layer: where layers are alike, so are the random directions."""
    states = cloud_of(4, 5, 6)
    states.of("anchor")[:] = np.random.default_rng(1).standard_normal((200, 1, tiny.WIDTH))  # all layers alike
    one, other = Recorded(direction(0, 1)), Recorded(Directions((direction(2, 2), direction(1, 3))))
    ask = partial(causal_effect, llama, {"one": one, "other": other}, score=SCORE, prompts=tiny.PROMPTS, n_random=2)
    ask(states=states)
    ask(states="isotropic")
    pairs = list(zip(one.seen, other.seen, strict=True))
    assert len(pairs) == 4 and not np.allclose(pairs[0][0].vectors, pairs[1][0].vectors)
    for alone, both in pairs:
        assert np.array_equal(alone[0].vector, both[2].vector) and np.array_equal(both[2].vector, both[1].vector)


def test_different_vectors_in_one_layer_have_different_replacements(llama: OpenModel) -> None:
    first, second = Recorded(Directions((direction(0, 1), direction(1, 1)))), Recorded(direction(1, 2))
    for states in (None, "isotropic"):
        causal_effect(llama, {"it": [first, second]}, score=SCORE, prompts=tiny.PROMPTS, n_random=1, states=states)
        alike = first.seen[-1][1].vector @ second.seen[-1][1].vector
        assert abs(alike) < 0.95


def test_without_states_random_directions_vary_as_the_models_own_states_do(llama: OpenModel) -> None:
    own = read_residuals(llama, PROMPT_IDS, layers=range(tiny.LAYERS)).numpy()
    given = synthetic({"anchor": own})
    condition = {"it": Ablate(Directions((direction(0, 1), direction(1, 2), direction(2, 3))))}
    ask = partial(causal_effect, llama, condition, score=SCORE, prompts=tiny.PROMPTS, n_random=4)
    np.testing.assert_allclose(ask().random["it"], ask(states=given).random["it"], atol=1e-6)
    assert not np.allclose(ask().random["it"], ask(states="isotropic").random["it"], atol=1e-3)
    assert ask().table["random_kind"].tolist() == ["covariance_matched"]
    with refused("one prompt"):
        ask(prompts=tiny.PROMPTS[:1])
    with refused("states='matched'"):
        ask(states="matched")
    with refused("ndarray"):
        ask(states=own)


# --- the largest of several conditions, and the contrast of two -----------------------------------------------------


def effect_of(differences: dict[str, Any], random: dict[str, Any]) -> Effect:
    moved = {name: np.asarray(values, dtype=float) for name, values in differences.items()}
    table = pd.DataFrame({"condition": list(moved), "difference": [one.mean() for one in moved.values()]})
    draws = {name: np.asarray(values, dtype=float) for name, values in random.items()}
    return Effect(table.assign(low=np.nan, high=np.nan), draws, moved, np.zeros(len(next(iter(moved.values())))))


def test_the_largest_is_compared_with_the_largest_of_each_draw() -> None:
    random = {"a": [0.0, 3.0, 0.0, 1.0], "b": [2.5, 0.0, 0.0, 1.0]}  # maxima 3, 2.5, 1, 0; b's own: one of four
    effect = effect_of({"a": [1.0, 1.0], "b": [2.0, 3.0]}, {"a": random["a"], "b": random["b"]})
    found = effect.largest()
    assert found["condition"] == "b" and found["difference"] == 2.5
    assert found["p_largest"] == (1 + 2) / (1 + 4), "maxima 2.5, 3, 0, 1: a tie counts"
    fallen = effect_of({"a": [-1.0, -1.0], "b": [-2.0, -3.0]}, {name: -np.array(one) for name, one in random.items()})
    mirrored = fallen.largest(sign=-1)
    assert mirrored["condition"] == "b" and mirrored["p_largest"] == found["p_largest"]
    assert (mirrored["low"], mirrored["high"]) == pytest.approx((-found["high"], -found["low"]))
    assert np.isnan(effect_of({"a": [1.0, 2.0]}, {"a": []}).largest()["p_largest"])
    assert np.isnan(effect_of({"a": [1.0]}, {"a": [0.5]}).largest()["low"])


def test_the_band_of_many_conditions_covers_all_of_them_at_once_as_often_as_it_says() -> None:
    """30 conditions without an effect: the largest one's own interval excludes 0 in most worlds, the band in few."""
    rng = np.random.default_rng(0)
    above = {"own": 0, "band": 0}
    for _ in range(200):
        moved = rng.standard_normal((30, 64))
        found = effect_of({str(i): one for i, one in enumerate(moved)}, {str(i): [] for i in range(30)}).largest()
        best = moved[int(found["condition"])]
        above["own"] += best.mean() > 1.96 * best.std() / 8
        above["band"] += found["low"] > 0
    assert above["own"] > 80 and above["band"] <= 16  # two-sided 5 %: 2.5 % above 0, 3.8 standard errors of 200


def test_the_best_of_many_rows_is_found_by_chance_as_often_as_its_p_value_says() -> None:
    """The same law for v_rev and the random directions: against its own row the best one stands out far too often."""
    rng, rows, worlds = np.random.default_rng(0), [str(i) for i in range(10)], 400
    found = {"own row": 0, "largest": 0}
    for _ in range(worlds):
        drawn = 3 * rng.standard_normal((20, 10)) + 3 * rng.standard_normal((20, 1))  # rows of a draw belong together
        moved = {name: np.full(8, one) for name, one in zip(rows, drawn[0], strict=True)}
        best = effect_of(moved, dict(zip(rows, drawn[1:].T, strict=True))).largest()
        found["own row"] += best["difference"] > drawn[1:, int(best["condition"])].max()
        found["largest"] += best["p_largest"] <= 0.05
    assert found["own row"] > 0.1 * worlds
    assert abs(found["largest"] - 0.05 * worlds) < 3 * np.sqrt(0.05 * 0.95 * worlds)


def test_a_contrast_is_paired_over_prompts_and_draws() -> None:
    rng = np.random.default_rng(0)
    shared, random = 100 * rng.standard_normal(80), 100 * rng.standard_normal(19)
    more = 1 + rng.standard_normal(80)
    effect = effect_of({"a": shared + more, "b": shared}, {"a": random + 0.1, "b": random})
    found = effect.contrast("a", "b")
    half = 1.96 * more.std() / np.sqrt(80)
    assert found["difference"] == pytest.approx(more.mean()) and found["p_random"] == 1 / 20
    assert [found["low"], found["high"]] == pytest.approx([more.mean() - half, more.mean() + half], abs=0.1 * half)
    assert found["random_high"] == pytest.approx(0.1)
    with refused("'c'"):
        effect.contrast("a", "c")


def test_states_that_cannot_make_a_twin_are_refused(llama: OpenModel) -> None:
    ask = partial(causal_effect, llama, score=SCORE, prompts=tiny.PROMPTS, n_random=1)
    with refused("not contain layer 2"):
        ask({"it": Ablate(direction(2))}, states=cloud_of(4, layers=2))
    plane = span_of(np.eye(tiny.WIDTH)[:2], layer=0, distance=1.0)
    with refused("span 1 dimensions", "rank 2"):
        ask({"it": Ablate(plane)}, states=cloud_of(4))
    assert hooks_on(llama) == 0


# --- dose and response --------------------------------------------------------------------------------------------


def test_the_dose_curve_of_the_planted_direction_is_a_line(planted: OpenModel) -> None:
    curve = dose_response(planted, direction(distance=4.0), [1.0, -0.5, 0.5], score=SCORE, prompts=tiny.PROMPTS)
    assert curve.table["strength"].tolist() == [-0.5, 0.5, 1.0]
    assert curve.table["condition"].tolist() == ["strength -0.5", "strength 0.5", "strength 1"]
    np.testing.assert_allclose(curve.table["difference"], GAIN * 4.0 * curve.table["strength"], atol=1e-4)
    assert curve.spearman == 1 and (curve.spearman_prompts == 1).all() and curve.spearman_interval == (1, 1)
    assert [curve.slope[name] for name in ("difference", "low", "high")] == pytest.approx([GAIN * 4.0] * 3, abs=1e-4)
    assert curve.slope["p_random"] == 1 / 21
    # The score is linear here, so each random direction gives a line too, if a flatter one, up or down.
    assert curve.spearman_random.shape == (20,) and set(np.round(curve.spearman_random, 9)) == {-1.0, 1.0}
    assert (curve.table["random_high"] < curve.table["difference"].abs()).all()
    assert curve.table.attrs["score"] == "refusal_log_odds" and "Spearman" in curve._repr_html_()


def test_spearman_is_that_of_the_ranks_with_the_baseline_among_them(llama: OpenModel) -> None:
    prompt_curves = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]])  # [prompt, dose]; baseline 0
    score = programmed([np.zeros(3), *prompt_curves.T], 3)
    curve = dose_response(llama, direction(), [1, 2, 3], score=score, prompts=tiny.PROMPTS[:3], n_random=0)
    # Ranks 1 4 2 3 against 1 2 3 4: 1 − 6·(0 + 4 + 1 + 1)/(4·15); ties at the mean rank 3; in order.
    np.testing.assert_allclose(curve.spearman_prompts, [0.4, np.sqrt(3 / 5), 1.0])
    np.testing.assert_allclose(curve.spearman, np.corrcoef([1, 2, 3, 4], [1, 3, 2, 4])[0, 1])  # means 0 5/3 4/3 2


def test_the_slope_and_its_interval_are_those_of_a_line_through_no_effect_at_no_dose(llama: OpenModel) -> None:
    rng, doses = np.random.default_rng(0), np.array([-1.0, 1.0, 2.0])
    slopes = 2 + rng.standard_normal(60)
    moved = doses[:, None] * slopes + 0.1 * rng.standard_normal((3, 60))
    score = programmed([np.zeros(60), *moved], 60)
    prompts = PromptSet(tuple(list(tiny.PROMPTS) * 10))
    curve = dose_response(llama, direction(), doses, score=score, prompts=prompts, n_random=0)
    fitted = [np.linalg.lstsq(doses[:, None], one, rcond=None)[0].item() for one in moved.T]
    assert curve.slope["difference"] == pytest.approx(np.mean(fitted))
    half = 1.96 * np.std(fitted) / np.sqrt(60)
    bounds = [np.mean(fitted) - half, np.mean(fitted) + half]
    assert [curve.slope["low"], curve.slope["high"]] == pytest.approx(bounds, abs=0.1 * half)
    low, high = curve.spearman_interval
    assert low <= curve.spearman <= high and low > 0


def test_a_score_that_does_not_move_has_no_rank_correlation(llama: OpenModel) -> None:
    curve = dose_response(llama, direction(), [1, 2], score=programmed([2.0] * 3, 6), prompts=tiny.PROMPTS, n_random=0)
    assert np.isnan([curve.spearman, *curve.spearman_prompts, *curve.spearman_interval]).all()


@pytest.mark.parametrize("strengths", [[1.0], [0.0, 1.0], [1.0, 1.0]])
def test_a_curve_needs_two_doses(llama: OpenModel, strengths: list[float]) -> None:
    with refused("strengths="):
        dose_response(llama, direction(), strengths, score=SCORE, prompts=tiny.PROMPTS)
