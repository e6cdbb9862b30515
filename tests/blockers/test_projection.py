"""Projections of the update against gradients by autograd in fp64 and closed forms, tensor by tensor."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocked import LENGTHS, apart, flat, move, opened, trainer, vs, weights
from histories import PROMPT_IDS, hooks_on, refused
from torch import nn
from transformers import TrainerCallback

from gravlens.blockers.blocking import Scheduled, Until, block
from gravlens.blockers.penalty import Movement
from gravlens.blockers.projection import TaskVectorProjection, UpdateProjection, _Projector
from gravlens.directions.direction import Subspaces
from gravlens.directions.subspaces import span_of, whole_state
from gravlens.models.opening import OpenModel, open_model

N = len(tiny.PROMPTS)


def fractions(module: Any, anchor: Any, rows: Sequence[int] = range(N), directions: Any = None) -> torch.Tensor:
    """s [layer]: the mean motion of some probes, by Hugging Face's hidden states, each prompt alone."""
    terms = []
    for v in vs() if directions is None else directions:
        moved = []
        for row in rows:
            ids = torch.tensor([PROMPT_IDS[row]])
            now, then = (m(ids, output_hidden_states=True).hidden_states[v.layer + 1][0, -1] for m in (module, anchor))
            moved.append((now - then) @ torch.tensor(v.basis[0], dtype=now.dtype) / v.distance)
        terms.append(torch.stack(moved).mean())
    return torch.stack(terms)


def measured(model: OpenModel, anchor: Any, rows: Sequence[int] = range(N), directions: Any = None) -> np.ndarray:
    with torch.no_grad():
        return fractions(copy.deepcopy(model.module).double(), anchor, rows, directions).numpy()


def gradients(module: Any, anchor: Any, rows: Sequence[int] = range(N)) -> torch.Tensor:
    """G [layer, parameter], by autograd in fp64."""
    twin = copy.deepcopy(module).double()
    parameters = [twin.get_parameter(name) for name in sorted(weights(twin))]
    grads = [
        torch.autograd.grad(s, parameters, retain_graph=True, allow_unused=True) for s in fractions(twin, anchor, rows)
    ]
    zero = [torch.zeros_like(p) if g is None else g for row in grads for p, g in zip(parameters, row, strict=True)]
    return torch.cat([one.flatten() for one in zero]).reshape(len(grads), -1)


def bound_pair(scale: float, seed: int = 1, **changes: Any) -> tuple[OpenModel, Any, Any]:
    """A model that has moved since it was bound, its anchor in fp64, and the bound projection."""
    model = opened()
    anchor = copy.deepcopy(model.module).double()
    bound = UpdateProjection(vs(), tiny.PROMPTS, **changes).bind(model, rng=np.random.default_rng(0))
    move(model.module, scale, seed)
    return model, anchor, bound


# -- the exact projection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.003, 0.02, 0.05])
@pytest.mark.parametrize("tolerance", [5e-4, 1e-5])
def test_after_a_large_update_nothing_has_moved_at_any_layer(scale: float, tolerance: float) -> None:
    model, anchor, bound = bound_pair(scale, tolerance=tolerance, iterations=20)
    before, free = measured(model, anchor), flat(weights(model.module))
    norm = bound.after_update()
    assert np.abs(before).max() > 0.02 and np.abs(measured(model, anchor)).max() <= tolerance + 1e-6
    assert norm == pytest.approx(float((flat(weights(model.module)) - free).norm()), rel=1e-3)
    assert hooks_on(model) == 0 and all(weight.grad is None for weight in model.module.parameters())


def test_over_many_steps_nothing_accumulates() -> None:
    model, anchor, bound = bound_pair(0.01)
    left = []
    for seed in range(6):
        bound.after_update()
        left.append(np.abs(measured(model, anchor)).max())
        move(model.module, 0.01, seed + 10)
    assert max(left) <= 5.1e-4 and np.abs(measured(model, anchor)).max() > 0.01


def test_what_was_learnt_of_the_gram_matrix_serves_the_next_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, passes = [], []
    inverse, of = _Projector._fresh_inverse, Movement.of
    monkeypatch.setattr(_Projector, "_fresh_inverse", lambda self: fresh.append(1) or inverse(self))
    monkeypatch.setattr(Movement, "of", lambda self, rows: passes.append(1) or of(self, rows))
    model, _, bound = bound_pair(0.003, tolerance=1e-4)
    for seed in range(10):
        bound.after_update()
        move(model.module, 0.003, seed + 10)
    assert 1 <= len(fresh) <= 2 and len(passes) <= 10 * 4


@pytest.mark.long
def test_one_move_a_step_without_a_check_does_not_drift_off() -> None:
    """Nothing is seen after the one move, so the gradients must be renewed where motion has piled up."""
    model, anchor, bound = bound_pair(0.02, iterations=1)
    usual, left = np.abs(measured(model, anchor)).max(), []
    for seed in range(40):
        bound.after_update()
        left.append(np.abs(measured(model, anchor)).max())
        move(model.module, 0.02, seed + 10)
    assert max(left) < 4 * usual


@pytest.mark.parametrize("two_sided", [True, False])
def test_the_first_move_is_the_closed_form(two_sided: bool) -> None:
    model, anchor, bound = bound_pair(1e-4, tolerance=1e-9, iterations=1, two_sided=two_sided)
    moved, G = flat(weights(model.module)), gradients(model.module, anchor)
    c = torch.tensor(measured(model, anchor))
    c = c if two_sided else c.clamp(min=0)
    bound.after_update()
    wanted = -G.T @ torch.linalg.solve(G @ G.T, c)
    assert apart(flat(weights(model.module)) - moved, wanted) < 0.02 and float(wanted.norm()) > 0


def test_it_is_the_projection_of_the_update_to_first_order() -> None:
    """Δθ′ = Δθ − Gᵀ (G Gᵀ)⁻¹ G Δθ: the nearest update whose motion along every direction is none."""
    model, anchor, bound = bound_pair(1e-4, tolerance=1e-9, iterations=1)
    start = flat(weights(tiny.llama()))
    update, G = flat(weights(model.module)) - start, gradients(tiny.llama(), anchor)
    bound.after_update()
    kept = flat(weights(model.module)) - start
    wanted = update - G.T @ torch.linalg.solve(G @ G.T, G @ update)
    assert apart(kept - update, wanted - update) < 0.02
    assert float((G @ kept).norm()) < 0.02 * float((G @ update).norm())


def test_the_change_lies_in_the_span_of_the_gradients_and_no_other_is_shorter() -> None:
    model, anchor, bound = bound_pair(1e-3, tolerance=1e-9, iterations=1)
    moved, G = flat(weights(model.module)), gradients(model.module, anchor)
    bound.after_update()
    change = flat(weights(model.module)) - moved
    within = G.T @ torch.linalg.solve(G @ G.T, G @ change)
    assert apart(within, change) < 1e-3


def test_one_sided_leaves_what_has_moved_the_other_way() -> None:
    signs = set()
    for seed in range(1, 9):
        model, anchor, bound = bound_pair(0.004, seed, two_sided=False)
        before = measured(model, anchor)
        bound.after_update()
        after = measured(model, anchor)
        assert (after < 5.1e-4).all()
        assert after[before < 0] == pytest.approx(before[before < 0], abs=0.1 * np.abs(before).max())
        signs.add(tuple(before > 0))
    assert len(signs) == 4, "layers moved both ways"


def test_one_sided_does_nothing_where_all_has_moved_the_other_way() -> None:
    for seed in range(1, 20):
        model, anchor, bound = bound_pair(0.004, seed, two_sided=False)
        if (measured(model, anchor) < 0).all():
            before = flat(weights(model.module))
            assert bound.after_update() == 0 and torch.equal(flat(weights(model.module)), before)
            return
    pytest.fail("no such move")


@pytest.mark.parametrize("weight", [0.25, 0.5])
def test_a_weight_is_the_part_that_is_taken_back(weight: float) -> None:
    model, anchor, bound = bound_pair(0.01, tolerance=1e-6, iterations=20)
    before = measured(model, anchor)
    bound.after_update(weight)
    assert measured(model, anchor) == pytest.approx((1 - weight) * before, abs=5e-6)


def test_sampled_probes_hold_their_own_mean_alone() -> None:
    model, anchor, bound = bound_pair(0.02, batch=3, iterations=20)
    drawn = np.random.default_rng(0).choice(N, size=3, replace=False)
    others = [row for row in range(N) if row not in drawn]
    bound.after_update()
    assert np.abs(measured(model, anchor, drawn)).max() <= 5.1e-4
    assert np.abs(measured(model, anchor, others)).max() > 0.02
    again = np.abs(measured(model, anchor)).max()
    bound.after_update()  # other probes are drawn then
    assert np.abs(measured(model, anchor, drawn)).max() > 0.01 or again > 0.01


def test_each_layer_is_held_where_a_constraint_on_their_sum_lets_them_move() -> None:
    model, anchor, bound = bound_pair(0.0)
    G = gradients(model.module, anchor)
    apart_by = torch.tensor([0.05, -0.05], dtype=torch.float64)  # an early layer pays for a late one
    put(model.module, flat(weights(model.module)) + G.T @ torch.linalg.solve(G @ G.T, apart_by))
    moved = measured(model, anchor)
    assert abs(moved.sum()) < 0.1 * np.abs(moved).min() and np.abs(moved).min() > 0.04
    bound.after_update()
    assert np.abs(measured(model, anchor)).max() <= 5.1e-4


def put(module: nn.Module, values: torch.Tensor) -> None:
    """The reverse of `flat(weights(module))`."""
    named = dict(module.named_parameters())
    with torch.no_grad():
        for name, part in zip(
            sorted(named), values.split([named[name].numel() for name in sorted(named)]), strict=True
        ):
            named[name].copy_(part.reshape(named[name].shape))


def test_frozen_weights_stay_and_motion_is_held_by_the_others() -> None:
    model = opened()
    anchor = copy.deepcopy(model.module).double()
    frozen = model.module.model.embed_tokens.weight.requires_grad_(False)
    before = frozen.clone()
    bound = UpdateProjection(vs(), tiny.PROMPTS, iterations=20).bind(model, rng=np.random.default_rng(0))
    with torch.no_grad():
        for name, weight in model.module.named_parameters():
            weight += 0.0 if "embed" in name else 0.02 * torch.randn_like(weight)
    bound.after_update()
    assert torch.equal(frozen, before) and np.abs(measured(model, anchor)).max() <= 5.1e-4


def test_rank_one_subspaces_are_directions_and_wider_ones_are_refused() -> None:
    thin = Subspaces(tuple(span_of(v.vector, layer=v.layer, distance=v.distance) for v in vs()))
    model, anchor, _ = bound_pair(0.0)
    bound = UpdateProjection(thin, tiny.PROMPTS).bind(model, rng=np.random.default_rng(0))
    move(model.module)
    bound.after_update()
    assert np.abs(measured(model, anchor, directions=thin)).max() <= 5.1e-4
    with refused(f"rank {tiny.WIDTH}"):
        UpdateProjection(whole_state(vs()), tiny.PROMPTS)


@pytest.mark.parametrize("wrong", [{"tolerance": 0.0}, {"iterations": 0}, {"batch": 0}])
def test_what_holds_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with refused(f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        UpdateProjection(vs(), tiny.PROMPTS, **wrong)


class Measure(TrainerCallback):
    """|s| of the worst layer after each step."""

    def __init__(self, model: OpenModel) -> None:
        self.model, self.anchor, self.worst = model, copy.deepcopy(model.module).double(), []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.worst.append(np.abs(measured(self.model, self.anchor)).max())


def test_in_training_every_step_is_held_until_the_block_is_lifted(tmp_path: Path) -> None:
    model = opened()
    measure = Measure(model)
    run = trainer(tmp_path, model.module, callback=measure, max_steps=5, learning_rate=5e-3)
    with block(run, Scheduled(UpdateProjection(vs(), tiny.PROMPTS), Until(3))):
        run.train()
    assert max(measure.worst[:3]) <= 5.1e-4 and min(measure.worst[3:]) > 0.01


@pytest.mark.long
def test_a_resumed_run_is_held_too_and_ends_close_by(tmp_path: Path) -> None:
    """Not bit for bit: what was learnt of the Gram matrix is not saved, so both stop within the tolerance."""
    ends = []
    for i, steps in enumerate([(4,), (2, 4)]):
        for last in steps:
            model = opened()
            run = trainer(tmp_path / str(i), model.module, max_steps=last, save_strategy="steps", save_steps=2)
            with block(run, UpdateProjection(vs(), tiny.PROMPTS, batch=3)):
                run.train(resume_from_checkpoint=None if last == steps[0] else str(tmp_path / "1/checkpoint-2"))
        ends.append(flat(weights(model.module)))
    moved = ends[0] - flat(weights(tiny.llama()))
    assert apart(ends[1] - flat(weights(tiny.llama())), moved) < 0.05


# -- in weight space ---------------------------------------------------------------------------------------------------


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    return tiny.save(tiny.llama(7), tmp_path / "witness")


def taken_back(found: torch.Tensor, anchor: torch.Tensor, tau: torch.Tensor, weight: float, two: bool) -> torch.Tensor:
    """D − weight · ⟨D, τ⟩ / ‖τ‖² · τ, in fp64."""
    D, t = (found - anchor).double(), tau.double()
    share = (D * t).sum() / (t * t).sum() if t.any() else torch.zeros(())
    return anchor.double() + D - weight * (share if two else share.clamp(min=0)) * t


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_the_task_vector_s_part_is_taken_back_tensor_by_tensor(witness: Path, two_sided: bool, weight: float) -> None:
    model, goal = opened(), tiny.llama(7)
    bound = TaskVectorProjection(witness, two_sided=two_sided).bind(model, rng=np.random.default_rng(0))
    anchor = weights(model.module)
    move(model.module, 0.05)
    free = weights(model.module)
    norm = bound.after_update(weight)
    signs, total = set(), 0.0
    for name, found in model.module.named_parameters():
        tau = goal.get_parameter(name).detach() - anchor[name]
        wanted = taken_back(free[name], anchor[name], tau, weight, two_sided)
        assert float((found - wanted).detach().abs().max()) < 1e-6
        signs.add(bool(((free[name] - anchor[name]) * tau).sum() > 0))
        total += float((wanted - free[name]).square().sum())
    assert signs == {True, False} and norm == pytest.approx(total**0.5, rel=1e-4)


def test_all_of_the_way_to_the_witness_is_taken_back(witness: Path) -> None:
    model = opened()
    anchor = flat(weights(model.module))
    bound = TaskVectorProjection(open_model(witness).module).bind(model, rng=np.random.default_rng(0))
    model.module.load_state_dict(tiny.llama(7).state_dict())
    bound.after_update()
    assert apart(flat(weights(model.module)), anchor) < 1e-5


def test_a_tensor_that_the_witness_shares_is_left_alone() -> None:
    model = opened()
    bound = TaskVectorProjection(copy.deepcopy(model.module)).bind(model, rng=np.random.default_rng(0))
    move(model.module)
    before = flat(weights(model.module))
    assert bound.after_update() == 0 and torch.equal(flat(weights(model.module)), before)


def test_a_witness_of_another_shape_is_refused() -> None:
    other = tiny.llama(0, intermediate_size=56)
    with refused("model.layers.0.mlp.gate_proj.weight"):
        TaskVectorProjection(other).bind(opened(), rng=np.random.default_rng(0))


def test_the_lengths_of_these_tests_differ() -> None:
    assert len(set(LENGTHS.values())) == 2  # else a distance that is left out would not be seen
