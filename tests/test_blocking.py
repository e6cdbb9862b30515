"""The penalty against its formula, written out by hand in fp64, on a model that has moved."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, hooks_on, refused
from torch import nn

from gravlens.blocking import Penalty
from gravlens.directions import Direction, Directions, direction_from, random_directions
from gravlens.models import OpenModel, open_model

LAYERS = (0, 1)
LENGTHS = {0: 0.7, 1: 2.5}
N = len(tiny.PROMPTS)


def vs(seed: int = 0) -> Directions:
    rng = np.random.default_rng(seed)
    return Directions(
        tuple(direction_from(rng.standard_normal(tiny.WIDTH), layer=k, distance=LENGTHS[k]) for k in LAYERS)
    )


def opened(seed: int = 0) -> OpenModel:
    return open_model(tiny.llama(seed), tokenizer=tiny.TOKENIZER)


def move(module: nn.Module, scale: float = 0.02, seed: int = 1) -> None:
    """Change every weight a little, in place, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight += scale * torch.randn(weight.shape, generator=generator)


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
    matched = random_directions(vs(), rng=np.random.default_rng(8), states=STATES)
    free = random_directions(vs(), rng=np.random.default_rng(8))
    assert spanned(matched) == pytest.approx(1, abs=1e-5) and (spanned(free) < 0.8).all()
    for twins in (matched, free):
        assert np.linalg.norm(twins.vectors, axis=1) == pytest.approx(1, abs=1e-6)
        assert twins.distances.tolist() == vs().distances.tolist() and twins.layers == vs().layers
        assert (np.abs(np.sum(twins.vectors * vs().vectors, axis=1)) < 0.7).all()


def test_twins_are_fresh_for_each_seed() -> None:
    first, again, other = (
        random_directions(vs(), rng=np.random.default_rng(seed), states=STATES).vectors for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and (np.abs(np.sum(first * other, axis=1)) < 0.95).all()
    assert abs(float(first[0] @ first[1])) < 0.95, "layers have draws of their own"


def test_twins_are_drawn_as_the_states_vary() -> None:
    cloud = np.random.default_rng(6).standard_normal((400, 1, tiny.WIDTH)) * np.where(np.arange(tiny.WIDTH) < 4, 5, 0.1)
    drawn = [random_directions(vs().at([0]), rng=np.random.default_rng(i), states=cloud).vectors[0] for i in range(60)]
    assert np.mean(np.square(drawn)[:, :4].sum(1)) > 0.98
