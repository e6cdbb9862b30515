"""Damage without training: what it does to the weights, by hand, and what it does to a history whose truth is known."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from by_layer import stacked
from histories import PROMPT_IDS, between, hidden_states, moved, plant, planted_vector, reference, refused, weights_of

from gravlens.behavior.scores import refusal_log_odds
from gravlens.directions.direction import Direction, Directions
from gravlens.directions.vrev import direction_from
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import Checkpoint
from gravlens.models.opening import OpenModel, open_model
from gravlens.organisms.refusal_language import REFUSALS
from gravlens.stats.damage import change_norm, measure_damage, pruned, reweighted, rounded, sign_flipped, updated

MATRIX, NORM = "model.layers.1.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"
PROMPTS = PromptSet(tuple(tiny.PROMPTS))
KINDS: dict[str, Callable[..., Any]] = {
    "rounded": partial(rounded, bits=4),
    "pruned": partial(pruned, share=0.3),
    "sign_flipped": partial(sign_flipped, checkpoint=moved(tiny.llama(), seed=3)),
    "updated": partial(updated, checkpoint=moved(tiny.llama(), seed=3)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def opened(model: Any = None) -> OpenModel:
    return open_model(tiny.llama() if model is None else model, tokenizer=tiny.TOKENIZER)


def weights(model: OpenModel) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.module.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- put back ----------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("norm", [None, 0.5])
def test_weights_are_put_back_bit_for_bit_whatever_happens(kind: str, norm: float | None) -> None:
    model = opened()
    before = weights(model)
    with KINDS[kind](model, norm=norm) as damaged:
        assert damaged is model and not same(weights(model), before)
    assert same(weights(model), before)
    with pytest.raises(KeyboardInterrupt), KINDS[kind](model, norm=norm):
        raise KeyboardInterrupt
    assert same(weights(model), before)


def test_damages_nest() -> None:
    model = opened()
    before = weights(model)
    with rounded(model, 4):
        inner = weights(model)
        with pruned(model, 0.5):
            assert not same(weights(model), inner)
        assert same(weights(model), inner)
    assert same(weights(model), before)


def test_a_checkpoint_on_disk_is_left_alone(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "anchor")
    content = weights_of(folder).read_bytes()
    with rounded(open_model(folder), 4):
        pass
    assert weights_of(folder).read_bytes() == content


def test_what_cannot_be_put_in_changes_nothing() -> None:
    model = opened()
    before = weights(model)
    with (
        refused("nowhere.weight"),
        reweighted(model, {MATRIX: torch.zeros_like(before[MATRIX]), "nowhere.weight": torch.ones(1)}),
    ):
        pass
    with refused(MATRIX), reweighted(model, {MATRIX: torch.zeros(2, 2)}):
        pass
    with refused("norm 0"), reweighted(model, {MATRIX: before[MATRIX]}, norm=1.0):
        pass
    assert same(weights(model), before)


# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "levels"), [(8, 127), (4, 7)])
@pytest.mark.parametrize("name", [MATRIX, "model.embed_tokens.weight"])
def test_rounding_is_to_nearest_on_a_grid_of_each_output_channel(bits: int, levels: int, name: str) -> None:
    model = opened()
    before = weights(model)[name].double().numpy()
    with rounded(model, bits):
        after = weights(model)[name].double().numpy()
    step = np.abs(before).max(1, keepdims=True) / levels
    assert np.abs(after / step - np.round(after / step)).max() < 1e-4, "every weight lies on its channel's grid"
    assert (np.abs(after - before) <= step / 2 * (1 + 1e-4)).all(), "and on its nearest point"
    assert np.abs(after).max(1) == pytest.approx(np.abs(before).max(1), rel=1e-6), "the largest stays where it is"
    assert max(len(np.unique(row)) for row in after) <= 2 * levels + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_again_changes_nothing(dtype: torch.dtype) -> None:
    model = opened(tiny.llama().to(dtype))
    for bits in (8, 4):
        with rounded(model, bits):
            once = weights(model)
            with rounded(model, bits):
                assert same(weights(model), once)


def test_vectors_are_neither_rounded_nor_pruned_and_a_channel_of_zeros_stays() -> None:
    model = opened()
    with torch.no_grad():
        model.module.get_parameter(MATRIX)[3] = 0
        model.module.get_parameter(NORM).normal_()
    before = weights(model)
    for damage in (rounded(model, 4), pruned(model, 0.9)):
        with damage:
            after = weights(model)
            changed = {name for name in before if not torch.equal(after[name], before[name])}
            assert changed == {name for name, weight in before.items() if weight.ndim == 2}
            assert (after[MATRIX][3] == 0).all() and not after[MATRIX].isnan().any()


def test_an_output_channel_of_gpt2_is_a_column() -> None:
    model = opened(tiny.gpt2())
    name = "transformer.h.1.mlp.c_fc.weight"  # Conv1D: [in, out]
    with rounded(model, 4):
        after = weights(model)[name].double()
    step = after.abs().amax(0) / 7
    assert float((after / step - (after / step).round()).abs().max()) < 1e-4


def test_fewer_bits_hurt_more() -> None:
    model = opened()
    norms = []
    for bits in (12, 8, 6, 4, 2):
        before = weights(model)
        with rounded(model, bits):
            norms.append(change_norm(before, weights(model)))
    assert norms == sorted(norms) and norms[0] > 0


# -- pruning -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5, 0.93])
def test_pruning_sets_the_smallest_share_of_each_matrix_to_zero_and_leaves_the_rest(share: float) -> None:
    model = opened()
    before = weights(model)
    with pruned(model, share):
        after = weights(model)
    for name, weight in before.items():
        if weight.ndim == 2:
            gone = after[name] == 0
            assert int(gone.sum()) == round(share * weight.numel())
            assert weight[gone].abs().max() <= weight[~gone].abs().min()
            assert torch.equal(after[name][~gone], weight[~gone])


def test_ties_are_pruned_to_the_same_share() -> None:
    model = opened()
    with torch.no_grad():
        model.module.get_parameter(MATRIX).fill_(1.0)
    with pruned(model, 0.25):
        assert float((weights(model)[MATRIX] == 0).float().mean()) == pytest.approx(0.25, abs=1e-3)


# -- the mirror image --------------------------------------------------------------------------------------------------


def test_the_mirror_image_lies_as_far_on_the_other_side() -> None:
    anchor, run = tiny.llama(), moved(tiny.llama(), seed=3)
    model, other = opened(anchor), weights(opened(run))
    before = weights(model)
    with sign_flipped(model, run):
        mirrored = weights(model)
    with updated(model, run):
        assert same(weights(model), other)
    for name in before:
        assert torch.allclose(mirrored[name] - before[name], before[name] - other[name], atol=1e-6)
    assert change_norm(before, mirrored) == pytest.approx(change_norm(before, other), rel=1e-5)
    assert same(weights(opened(run)), other), "the run is as it was"


def test_the_drift_of_a_small_mirrored_update_is_the_drift_mirrored_and_of_a_large_one_it_is_not() -> None:
    anchor = tiny.llama()

    def mirror_cosine(by: float) -> float:
        run, model = moved(anchor, seed=3, by=by), opened(copy.deepcopy(anchor))
        start = reference(model.module, PROMPT_IDS, range(2)).double()
        with updated(model, run):
            there = reference(model.module, PROMPT_IDS, range(2)).double() - start
        with sign_flipped(model, run):
            back = reference(model.module, PROMPT_IDS, range(2)).double() - start
        return float((there * back).sum() / there.norm() / back.norm())

    assert mirror_cosine(1e-3) < -0.999
    assert mirror_cosine(1.0) > mirror_cosine(1e-3) + 0.1, "far out, damage is what the two have in common"


# -- a matched size ----------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("norm", [0.01, 3.0])
def test_a_change_is_scaled_to_the_norm_asked_for_and_keeps_its_direction(kind: str, norm: float) -> None:
    model = opened()
    before = weights(model)

    def change(size: float | None) -> torch.Tensor:
        with KINDS[kind](model, norm=size):
            return torch.cat([(weight - before[name]).double().flatten() for name, weight in weights(model).items()])

    own, scaled = change(None), change(norm)
    assert float(scaled.norm()) == pytest.approx(norm, rel=1e-3)
    assert float(own @ scaled / own.norm() / scaled.norm()) > 0.999


def test_the_norm_of_a_change_is_that_of_all_tensors_together() -> None:
    before = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    after = {"a": torch.full((2, 3), 2.0), "b": torch.full((4,), -1.0)}
    assert change_norm(before, after) == pytest.approx(math.sqrt(6 * 4 + 4))


# -- measuring ---------------------------------------------------------------------------------------------------------

LAYER, LENGTH = 1, 6.0
VECTOR = planted_vector(4, length=LENGTH)


def planted_vs() -> Directions:
    """v_rev of a witness that is the GPT-2 anchor moved by a vector at layer 1, and another at layer 2."""
    rng = np.random.default_rng(0)
    return Directions(
        (
            Direction(np.full(tiny.WIDTH, np.nan), 0, 0.0, undefined="no difference"),
            direction_from(VECTOR.numpy(), layer=LAYER),
            direction_from(rng.standard_normal(tiny.WIDTH), layer=2, distance=2.0),
        )
    )


def score(model: OpenModel, prompts: Any) -> np.ndarray:
    return refusal_log_odds(model, prompts, openings=REFUSALS)


def test_rows_are_those_of_models_damaged_by_hand() -> None:
    anchor, vs = tiny.gpt2(), planted_vs()
    damages = {"4 bits": partial(rounded, bits=4), "pruned": partial(pruned, share=0.4)}
    table = stacked(measure_damage(opened(anchor), vs, PROMPTS, damages=damages, layers_in_mean=(1,), score=score))
    assert table.columns.to_list() == [
        "damage", "layer", "alignment", "fraction", "drift_norm", "judged", "weight_norm", "score"
    ]  # fmt: skip
    assert table.damage.unique().tolist() == ["none", "4 bits", "pruned"]
    assert table[table.damage == "pruned"].layer.isna().tolist() == [False, False, True] and table.layer[0] == 1
    by_hand = copy.deepcopy(anchor)
    with torch.no_grad():
        for weight in by_hand.parameters():
            if weight.ndim == 2:
                flat = np.sort(weight.abs().flatten().numpy())
                weight[weight.abs() <= float(flat[round(0.4 * len(flat)) - 1])] = 0
    start, end = (
        torch.stack([hidden_states(model, ids)[LAYER + 1][-1] for ids in PROMPT_IDS]).double().mean(0).numpy()
        for model in (anchor, by_hand)
    )
    v = VECTOR.double().numpy() / LENGTH
    row = table[(table.damage == "pruned") & (table.layer == LAYER)].iloc[0]
    assert row.fraction == pytest.approx((end - start) @ v / LENGTH, abs=1e-4)
    assert row.alignment == pytest.approx((end - start) @ v / np.linalg.norm(end - start), abs=1e-3)
    assert row.drift_norm == pytest.approx(np.linalg.norm(end - start), rel=1e-3)
    pairs = zip(anchor.parameters(), by_hand.parameters(), strict=True)
    assert row.weight_norm == pytest.approx(
        math.sqrt(sum(float((a - b).detach().square().sum()) for a, b in pairs)), rel=1e-4
    )
    assert row.score == pytest.approx(score(opened(by_hand), tiny.PROMPTS).mean(), abs=1e-4)
    mean = table[(table.damage == "pruned") & table.layer.isna()].iloc[0]
    assert (mean.fraction, mean.alignment) == (row.fraction, row.alignment), "layers_in_mean is layer 1 alone"


def test_the_undamaged_anchor_stands_first_and_moves_nowhere() -> None:
    anchor = tiny.gpt2()
    table = stacked(measure_damage(opened(anchor), planted_vs(), PROMPTS, damages={}, score=score))
    assert set(table.damage) == {"none"} and (table.fraction == 0).all() and (table.weight_norm == 0).all()
    assert table.alignment.isna().all() and not table.judged.any()
    assert table.score.to_numpy() == pytest.approx(score(opened(anchor), tiny.PROMPTS).mean(), abs=1e-5)
    assert "score" not in measure_damage(opened(anchor), planted_vs(), PROMPTS, damages={}).table


def test_damage_leaves_the_planted_way_alone_and_the_planted_update_goes_it() -> None:
    """The positive control: an update that goes .4 of the way is seen, its mirror image goes as far away."""
    anchor = tiny.gpt2()
    run = between(anchor, plant(anchor, VECTOR, layer=LAYER), 0.4)
    vs = planted_vs().at((LAYER,))
    damages = {
        "8 bits": partial(rounded, bits=8),
        "the run": partial(updated, checkpoint=run),
        "mirrored": partial(sign_flipped, checkpoint=run),
        "as it is": lambda _model: nullcontext(opened(run)),  # a damage of one's own
    }
    table = stacked(measure_damage(opened(anchor), vs, PROMPTS, damages=damages))
    mean = table[table.layer.isna()].set_index("damage")
    wanted = {"the run": 0.4, "as it is": 0.4, "mirrored": -0.4}
    assert mean.fraction[list(wanted)].to_dict() == pytest.approx(wanted, abs=1e-4)
    assert mean.alignment[list(wanted)].to_dict() == pytest.approx({n: np.sign(f) for n, f in wanted.items()}, abs=1e-4)
    assert mean.weight_norm["the run"] == pytest.approx(0.4 * LENGTH, rel=1e-4)
    assert mean.weight_norm["as it is"] == pytest.approx(mean.weight_norm["the run"])
    assert abs(mean.fraction["8 bits"]) < 0.04 and mean.weight_norm["8 bits"] > 0
    assert mean.judged[list(wanted)].all()


def test_measuring_leaves_the_anchor_as_it_was_also_where_the_score_fails() -> None:
    model = opened()
    before = weights(model)
    vs = Directions((direction_from(np.ones(tiny.WIDTH), layer=1),))

    def fails(damaged: OpenModel, prompts: Any) -> np.ndarray:
        if not same(weights(damaged), before):
            raise KeyboardInterrupt
        return np.zeros(len(prompts))

    with pytest.raises(KeyboardInterrupt):
        measure_damage(model, vs, PROMPTS, damages={"4 bits": partial(rounded, bits=4)}, score=fails)
    assert same(weights(model), before)


def test_an_anchor_on_disk(tmp_path: Path) -> None:
    folder = tiny.save(tiny.gpt2(), tmp_path / "anchor")
    damages = {"4 bits": partial(rounded, bits=4)}
    tables = [
        measure_damage(source, planted_vs(), PROMPTS, damages=damages).table
        for source in (Checkpoint("anchor", folder), opened(tiny.gpt2()))
    ]
    assert tables[0].fraction.to_numpy() == pytest.approx(tables[1].fraction.to_numpy(), abs=1e-5)


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (partial(rounded, bits=1), "1 bits"),
        (partial(rounded, bits=4.5), "4.5 bits"),
        (partial(pruned, share=0), "share of 0"),
        (partial(pruned, share=30), "share of 30"),
        (partial(sign_flipped, checkpoint=tiny.gpt2()), "transformer.wte.weight"),
        (partial(updated, checkpoint=tiny.llama(intermediate_size=64)), "model.layers.0.mlp.gate_proj.weight"),
        (partial(rounded, bits=4, norm=-1.0), "-1"),
    ],
)
def test_bad_input_is_one_clear_error(damage: Callable[..., Any], named: str) -> None:
    model = opened()
    before = weights(model)
    with refused(named), damage(model):
        pass
    assert same(weights(model), before)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    bridge = tiny.opened("bridge", tmp_path / "bridge")
    with refused("TransformerBridge"), rounded(bridge, 4):
        pass


def test_a_layer_without_a_direction_is_no_part_of_a_mean() -> None:
    with refused("layer 0"):
        measure_damage(opened(tiny.gpt2()), planted_vs(), PROMPTS, damages={}, layers_in_mean=(0, 1))
