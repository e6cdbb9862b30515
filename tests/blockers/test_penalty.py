"""The penalty against its formula, written out by hand in fp64, on a model that has moved."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocked import LENGTHS, move, opened, vs
from histories import PROMPT_IDS, hidden_states, hooks_on, refused

from gravlens.blockers.penalty import Penalty
from gravlens.directions.direction import Direction, Directions, Subspace, Subspaces
from gravlens.directions.subspaces import random_like, span_of, whole_state
from gravlens.directions.vrev import direction_from
from gravlens.models.opening import OpenModel, open_model

N = len(tiny.PROMPTS)


def by_hand(penalty: Penalty, module: Any, anchor: Any, rows: range = range(N)) -> torch.Tensor:
    """λ · mean over layers and probes of relu(s + m)², each prompt alone, in the modules' own dtype."""
    terms = []
    for row in rows:
        ids = torch.tensor([PROMPT_IDS[row]])
        now = module(ids, output_hidden_states=True).hidden_states
        then = anchor(ids, output_hidden_states=True).hidden_states
        for v in penalty.directions.defined():
            moved = (now[v.layer + 1] - then[v.layer + 1])[0, -1]
            s = moved @ torch.tensor(v.vector, dtype=moved.dtype) / v.distance
            terms.append(torch.clamp(s + penalty.margin, min=0) ** 2)
    return penalty.strength * sum(terms, torch.zeros(())) / len(terms)


@pytest.mark.parametrize(("margin", "strength"), [(0.0, 30.0), (0.03, 30.0), (0.5, 1.5)])
def test_the_loss_is_the_formula(margin: float, strength: float) -> None:
    model, penalty = opened(), Penalty(vs(), tiny.PROMPTS, margin=margin, strength=strength, batch=N)
    anchor = copy.deepcopy(model.module).double()
    bound = penalty.bind(model, rng=np.random.default_rng(0))
    move(model.module)
    wanted = by_hand(penalty, copy.deepcopy(model.module).double(), anchor).item()
    assert wanted > 0.01
    assert bound.loss().item() == pytest.approx(wanted, rel=1e-4)
    assert bound.loss().shape == () and hooks_on(model) == 0


def test_a_term_is_the_same_in_any_batch_of_probes() -> None:
    model, penalty = opened(), Penalty(vs(), tiny.PROMPTS, batch=2)
    anchor = copy.deepcopy(model.module)
    bound = penalty.bind(model, rng=np.random.default_rng(4))
    move(model.module)
    each = [by_hand(penalty, model.module, anchor, range(i, i + 1)).item() for i in range(N)]
    pairs = [(a + b) / 2 for i, a in enumerate(each) for b in each[:i]]
    drawn = [bound.loss().item() for _ in range(12)]
    nearest = [min(pairs, key=lambda pair: abs(pair - loss)) for loss in drawn]
    assert drawn == pytest.approx(nearest, rel=1e-4)
    assert len(set(nearest)) > 3, "probes are drawn anew"


@pytest.mark.parametrize("margin", [0.0, 0.03, 0.4])
def test_at_the_anchor_it_is_the_margin_squared(margin: float) -> None:
    bound = Penalty(vs(), tiny.PROMPTS, margin=margin, strength=10.0).bind(opened(), rng=np.random.default_rng(0))
    assert bound.loss().item() == pytest.approx(10 * margin**2, rel=1e-3, abs=1e-9)


def test_dropout_has_no_part_in_it() -> None:
    model = open_model(tiny.gpt2(), tokenizer=tiny.TOKENIZER)
    assert model.module.config.resid_pdrop > 0
    bound = Penalty(vs(), tiny.PROMPTS).bind(model, rng=np.random.default_rng(0))
    model.module.train()
    assert bound.loss().item() == pytest.approx(0, abs=1e-9) and model.module.training
    again = Penalty(vs(), tiny.PROMPTS).bind(model, rng=np.random.default_rng(0))  # bound in training mode
    assert again.loss().item() == pytest.approx(0, abs=1e-9) and model.module.training
    model.module.eval()
    bound.loss()
    assert not model.module.training


def planted(model: OpenModel, amount: float) -> None:
    """Move the states of layer 0 by `amount` of the distance, at every prompt alike."""
    block: Any = model.module.model.layers[0]
    shift = amount * LENGTHS[0] * torch.from_numpy(np.array(vs()[0].vector))
    block.register_forward_hook(
        lambda _m, _i, out: (out[0] + shift, *out[1:]) if isinstance(out, tuple) else out + shift
    )


@pytest.mark.parametrize("amount", [-0.4, -0.05, 0.1, 0.6])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_it_is_one_sided_around_the_margin(amount: float, margin: float) -> None:
    model = opened()
    penalty = Penalty(vs().at([0]), tiny.PROMPTS, margin=margin, strength=7.0)
    bound = penalty.bind(model, rng=np.random.default_rng(0))
    planted(model, amount)
    assert bound.loss().item() == pytest.approx(7 * max(amount + margin, 0) ** 2, rel=1e-3, abs=1e-9)


def test_the_gradient_is_that_of_finite_differences() -> None:
    model, penalty = opened(), Penalty(vs(), tiny.PROMPTS, margin=0.1, batch=N)
    anchor = copy.deepcopy(model.module).double()
    bound = penalty.bind(model, rng=np.random.default_rng(0))
    move(model.module)
    names = [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
        "model.embed_tokens.weight",
    ]
    found = torch.autograd.grad(bound.loss(), [model.module.get_parameter(name) for name in names])
    moved = copy.deepcopy(model.module).double()
    for name, gradient in zip(names, found, strict=True):
        way = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(2)).double()
        way *= gradient != 0  # tokens that no probe holds
        weight, step = moved.get_parameter(name), 1e-5
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                weight += sign * step * way
                losses.append(by_hand(penalty, moved, anchor).item())
        with torch.no_grad():
            weight += step * way
        difference = (losses[0] - losses[1]) / (2 * step)
        assert float((gradient.double() * way).sum()) == pytest.approx(difference, rel=2e-3)
        assert abs(difference) > 0.01


def test_what_has_moved_the_other_way_has_no_gradient() -> None:
    model = opened()
    bound = Penalty(vs().at([0]), tiny.PROMPTS).bind(model, rng=np.random.default_rng(0))
    planted(model, -0.2)
    loss = bound.loss()
    gradient = torch.autograd.grad(loss, [model.module.get_parameter("model.layers.0.mlp.down_proj.weight")])[0]
    assert loss.item() == 0 and not gradient.any()


def test_weights_are_read_and_not_changed_and_gradients_stay_where_they_are() -> None:
    model = opened()
    before = copy.deepcopy(model.module.state_dict())
    bound = Penalty(vs(), tiny.PROMPTS, margin=0.1).bind(model, rng=np.random.default_rng(0))
    bound.loss()
    assert all(torch.equal(weight, before[name]) for name, weight in model.module.state_dict().items())
    assert all(weight.grad is None for weight in model.module.parameters())


@contextmanager
def listening(model: OpenModel) -> Iterator[list[list[int]]]:
    """Which probes each pass holds, by their numbers, in their order."""
    passes: list[list[int]] = []

    def look(_module: Any, _args: Any, inputs: dict[str, torch.Tensor]) -> None:
        rows = zip(inputs["input_ids"].tolist(), inputs["attention_mask"].sum(1).tolist(), strict=True)
        passes.append([PROMPT_IDS.index(ids[:length]) for ids, length in rows])

    handle = model.module.base_model.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()


def draws(seed: int, *, batch: int = 3) -> list[list[int]]:
    model = opened()
    bound = Penalty(vs(), tiny.PROMPTS, batch=batch).bind(model, rng=np.random.default_rng(seed))
    with listening(model) as passes:
        for _ in range(20):
            bound.loss()
    return passes


def test_probes_are_drawn_anew_without_repeats_by_the_generator_that_was_given() -> None:
    torch.manual_seed(0)
    first = draws(0)
    torch.manual_seed(1)
    assert first == draws(0) != draws(1)
    assert all(len(set(drawn)) == len(drawn) == 3 for drawn in first)
    assert {row for drawn in first for row in drawn} == set(range(N)) and len({tuple(d) for d in first}) > 10
    assert all(sorted(drawn) == list(range(N)) for drawn in draws(0, batch=99)), "no more than there are"


def test_undefined_layers_have_no_part() -> None:
    undefined = Direction(np.full(tiny.WIDTH, np.nan), 1, 0.0, undefined="no difference")
    losses = []
    for directions in (vs().at([0]), Directions((vs()[0], undefined))):
        model = opened()
        bound = Penalty(directions, tiny.PROMPTS, margin=0.1).bind(model, rng=np.random.default_rng(0))
        move(model.module)
        losses.append(bound.loss().item())
    assert losses[0] == losses[1] > 0
    with refused("undefined at layer 1"):
        Penalty(Directions((undefined,)), tiny.PROMPTS).bind(opened(), rng=np.random.default_rng(0))


@pytest.mark.parametrize("wrong", [{"margin": -0.01}, {"strength": -1.0}, {"batch": 0}])
def test_what_would_be_another_blocker_is_refused(wrong: dict[str, Any]) -> None:
    with refused(f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        Penalty(vs(), tiny.PROMPTS, **wrong)


def test_a_direction_of_a_layer_that_the_model_lacks_is_refused() -> None:
    beyond = Directions((direction_from(np.ones(tiny.WIDTH), layer=tiny.LAYERS),))
    with refused(f"Layer {tiny.LAYERS}"):
        Penalty(beyond, tiny.PROMPTS).bind(opened(), rng=np.random.default_rng(0))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"side": "two"}, "side='two'"),
        ({"side": "both", "margin": 0.1}, "margin=0.1"),
        ({"directions": whole_state(vs())}, f"rank {tiny.WIDTH}"),
        ({"directions": whole_state(vs()), "side": "reinforce"}, f"rank {tiny.WIDTH}"),
    ],
)
def test_a_side_that_there_is_not_is_refused(wrong: dict[str, Any], named: str) -> None:
    with refused(named):
        Penalty(**{"directions": vs(), "probes": tiny.PROMPTS, **wrong})


# -- other sides, subspaces, the mean ----------------------------------------------------------------------------------


def moves(module: Any, anchor: Any, spans: Any) -> list[np.ndarray]:
    """For each span ⟨h − h(anchor), basis⟩ / distance [probe, rank], by Hugging Face's hidden states in fp64."""
    found = []
    for span in spans:
        states = [[hidden_states(m, ids)[span.layer + 1][-1].numpy() for ids in PROMPT_IDS] for m in (module, anchor)]
        found.append((np.array(states[0]) - states[1]) @ span.basis.T.astype(np.float64) / span.distance)
    return found


def moved_pair(penalty: Penalty, scale: float = 0.02) -> tuple[float, list[np.ndarray]]:
    """The loss after a move, and how far each probe has moved."""
    model = opened()
    anchor = copy.deepcopy(model.module).double()
    bound = penalty.bind(model, rng=np.random.default_rng(0))
    move(model.module, scale)
    return bound.loss().item(), moves(copy.deepcopy(model.module).double(), anchor, penalty.directions)


def spaces(*ranks: int) -> Subspaces:
    rng = np.random.default_rng(3)
    made = [span_of(rng.standard_normal((r, tiny.WIDTH)), layer=k, distance=LENGTHS[k]) for k, r in enumerate(ranks)]
    return Subspaces(tuple(made))


@pytest.mark.parametrize("spans", [vs(), spaces(1, 1), spaces(4, 4), spaces(2, 7), spaces(5, 1)])
def test_a_clamp_is_the_squared_length_of_the_motion_in_a_subspace(spans: Any) -> None:
    loss, moved = moved_pair(Penalty(spans, tiny.PROMPTS, side="both", strength=3.0, batch=None))
    assert loss == pytest.approx(3 * np.mean([(s**2).sum(1) for s in moved]), rel=1e-4)


def test_a_clamp_of_the_whole_state_is_the_full_vector_anchor() -> None:
    loss, _ = moved_pair(Penalty(whole_state(vs()), tiny.PROMPTS, side="both", strength=1.0, batch=None))
    model = opened()
    now, then = copy.deepcopy(model.module).double(), copy.deepcopy(model.module).double()
    move(model.module)
    now.load_state_dict(model.module.state_dict())
    terms = [
        float((hidden_states(now, ids)[k + 1][-1] - hidden_states(then, ids)[k + 1][-1]).square().sum()) / length**2
        for ids in PROMPT_IDS
        for k, length in LENGTHS.items()
    ]
    assert loss == pytest.approx(np.mean(terms), rel=1e-4)


def test_a_clamp_does_not_depend_on_the_basis_of_its_subspace() -> None:
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
    turned = [Subspace(turn @ space.basis, space.layer, space.distance) for space in spaces(3, 3)]
    losses = [
        moved_pair(Penalty(spans, tiny.PROMPTS, side="both"))[0] for spans in (spaces(3, 3), Subspaces(tuple(turned)))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] > 0.1


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_reinforcement_pushes_up_to_the_margin(margin: float) -> None:
    penalty = Penalty(vs(), tiny.PROMPTS, side="reinforce", margin=margin, strength=2.0, batch=None)
    loss, moved = moved_pair(penalty)
    assert loss == pytest.approx(2 * np.mean(np.maximum(margin - np.array(moved), 0) ** 2), rel=1e-4)
    assert any((s < margin).any() for s in moved) and any((s > margin).any() for s in moved)


def test_a_step_down_reinforcement_moves_along_the_direction_and_one_down_the_penalty_back() -> None:
    for side, sign in (("reinforce", 1), ("one", -1)):
        model = opened()
        anchor = copy.deepcopy(model.module).double()
        penalty = Penalty(vs(), tiny.PROMPTS, side=side, margin=0.5, batch=None)  # pyright: ignore[reportArgumentType]
        loss = penalty.bind(model, rng=np.random.default_rng(0)).loss()
        gradients = torch.autograd.grad(loss, list(model.module.parameters()), allow_unused=True)
        with torch.no_grad():
            for weight, gradient in zip(model.module.parameters(), gradients, strict=True):
                weight -= 0 if gradient is None else 1e-6 * gradient
        moved = moves(copy.deepcopy(model.module).double(), anchor, vs())
        assert all(sign * s.mean() > 0 for s in moved)


@pytest.mark.parametrize("side", ["one", "both"])
def test_on_the_mean_weak_prompts_are_free(side: Any) -> None:
    loss, moved = moved_pair(Penalty(vs(), tiny.PROMPTS, side=side, strength=1.0, batch=None, on_mean=True))
    means = np.array([s.mean() for s in moved])
    wanted = np.mean((np.maximum(means, 0) if side == "one" else means) ** 2)
    assert loss == pytest.approx(wanted, rel=1e-3) and wanted > 0
    assert loss < 0.9 * moved_pair(Penalty(vs(), tiny.PROMPTS, side=side, strength=1.0, batch=None))[0]


def test_strength_and_weight_are_factors() -> None:
    losses = []
    for strength, weight in ((30.0, 1.0), (3.0, 1.0), (30.0, 0.1), (30.0, 0.0)):
        model = opened()
        bound = Penalty(vs(), tiny.PROMPTS, strength=strength).bind(model, rng=np.random.default_rng(0))
        move(model.module)
        losses.append(bound.loss(weight).item())
    assert losses[1:] == pytest.approx([losses[0] / 10, losses[0] / 10, 0]) and losses[0] > 0.1
    assert bound.during is bound.after_update is None


# -- the matched random twin -------------------------------------------------------------------------------------------

STATES = np.random.default_rng(5).standard_normal((6, 2, tiny.WIDTH)) * np.linspace(0.1, 3, tiny.WIDTH) + 40


def spanned(twins: Directions) -> np.ndarray:
    """Share of each vector within the span of the centred states of its layer."""
    shares = []
    for i, twin in enumerate(twins):
        basis = np.linalg.svd(STATES[:, i] - STATES[:, i].mean(0), full_matrices=False)[2][:5]  # centring costs one
        shares.append(np.linalg.norm(basis @ twin.vector))
    return np.array(shares)


def test_covariance_matched_twins_lie_where_the_states_differ_and_isotropic_ones_do_not() -> None:
    matched = random_like(vs(), rng=np.random.default_rng(8), states=STATES)
    free = random_like(vs(), rng=np.random.default_rng(8))
    assert spanned(matched) == pytest.approx(1, abs=1e-5) and (spanned(free) < 0.8).all()
    for twins in (matched, free):
        assert np.linalg.norm(twins.vectors, axis=1) == pytest.approx(1, abs=1e-6)
        assert twins.distances.tolist() == vs().distances.tolist() and twins.layers == vs().layers
        assert (np.abs(np.sum(twins.vectors * vs().vectors, axis=1)) < 0.7).all()


def test_twins_are_fresh_for_each_seed() -> None:
    first, again, other = (
        random_like(vs(), rng=np.random.default_rng(seed), states=STATES).vectors for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and (np.abs(np.sum(first * other, axis=1)) < 0.95).all()
    assert abs(float(first[0] @ first[1])) < 0.95, "layers have draws of their own"


def test_twins_are_drawn_as_the_states_vary() -> None:
    cloud = np.random.default_rng(6).standard_normal((400, 1, tiny.WIDTH)) * np.where(np.arange(tiny.WIDTH) < 4, 5, 0.1)
    drawn = [random_like(vs().at([0]), rng=np.random.default_rng(i), states=cloud).vectors[0] for i in range(60)]
    assert np.mean(np.square(drawn)[:, :4].sum(1)) > 0.98
