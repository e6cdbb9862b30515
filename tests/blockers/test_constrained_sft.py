"""Constrained fine-tuning against its formula by hand, token by token, in fp64."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocked import (
    ROWS,
    Gradients,
    apart,
    collate,
    flat,
    move,
    opened,
    task_gradient,
    token_logprobs,
    trainer,
    weights,
)
from histories import hooks_on, refused

from gravlens.blockers.anchoring import AnchorKL
from gravlens.blockers.blocking import Scheduled, Until, block
from gravlens.blockers.constrained_sft import ConstrainedSFT

LONG = ([1, 9, 11, 30, 31, 5, 8, 21, 40, 12], [-100, -100, 11, 30, 31, 5, 8, 21, 40, 12])
BATCH = [LONG, *ROWS[:3]]  # an answer of eight tokens among short ones


def betas(n: int, rule: ConstrainedSFT) -> list[float]:
    """β of an answer's n tokens: the first, the second to fifth, the others."""
    return [rule.first, *[rule.early] * 4, *[rule.later] * n][:n]


def loss_by_hand(module: Any, anchor: Any, rows: Sequence[Any], rule: ConstrainedSFT, items: int) -> torch.Tensor:
    """−Σ (2/β) log σ(β (log p − log p_anchor)) over all answer tokens, by their number."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, labels in rows:
        now = token_logprobs(module, ids, labels)
        with torch.no_grad():
            then = token_logprobs(anchor, ids, labels)
        for beta, p, q in zip(betas(len(now), rule), now, then, strict=True):
            total = total - 2 / beta * torch.log(1 / (1 + torch.exp(-beta * (p - q))))
    return total / items


def constrained(model: Any, rule: ConstrainedSFT, scale: float) -> Any:
    """The context of a bound rule, the model moved since."""
    bound = rule.bind(model, rng=np.random.default_rng(0))
    move(model.module, scale)
    assert bound.loss is bound.after_update is None
    return bound.during(1.0)


def count(rows: Sequence[Any]) -> int:
    return sum(label != -100 for _, labels in rows for label in labels)


@pytest.mark.parametrize("rule", [ConstrainedSFT(), ConstrainedSFT(first=3.0, early=0.7, later=1.5)])
@pytest.mark.parametrize("items", [None, 37])
def test_the_loss_is_the_formula(rule: ConstrainedSFT, items: int | None) -> None:
    model = opened()
    anchor = copy.deepcopy(model.module).double()
    with constrained(model, rule, 0.05):
        extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
        found = model.module(**collate(BATCH), **extra).loss
    moved = copy.deepcopy(model.module).double()
    wanted = loss_by_hand(moved, anchor, BATCH, rule, items or count(BATCH))
    assert found.item() == pytest.approx(float(wanted), rel=1e-4)
    found.backward()
    wanted.backward()
    gradient = {n: p.grad for n, p in model.module.named_parameters()}
    assert apart(flat(gradient), flat({n: p.grad for n, p in moved.named_parameters()})) < 1e-4
    assert hooks_on(model) == 0


def test_at_the_anchor_the_gradient_is_plain_fine_tuning_s() -> None:
    model, plain = opened(), opened()
    with constrained(model, ConstrainedSFT(), 0.0):
        loss = model.module(**collate(BATCH)).loss
    loss.backward()
    plain.module(**collate(BATCH)).loss.backward()
    found, wanted = (flat({n: p.grad for n, p in m.module.named_parameters()}) for m in (model, plain))
    assert apart(found, wanted) < 1e-5
    told = [beta for ids, labels in BATCH for beta in betas(count([(ids, labels)]), ConstrainedSFT())]
    assert loss.item() == pytest.approx(np.mean([2 / beta * np.log(2) for beta in told]), rel=1e-5)


@pytest.mark.parametrize("place", [0, 1, 4, 5, 7])
def test_beta_goes_by_the_place_in_the_answer(place: int) -> None:
    """One token's share of the gradient is 2 σ(−β r) of plain fine-tuning's."""
    rule, model = ConstrainedSFT(first=3.0, early=1.0, later=0.3), opened()
    anchor = copy.deepcopy(model.module)
    ids, labels = LONG
    where = [i for i, label in enumerate(labels) if label != -100][place]
    bound = rule.bind(model, rng=np.random.default_rng(0))
    move(model.module, 0.1)
    r = (token_logprobs(model.module, ids, labels)[place] - token_logprobs(anchor, ids, labels)[place]).item()
    with bound.during(1.0):
        out = model.module(**collate([LONG]))
        (slope,) = torch.autograd.grad(out.loss * count([LONG]), [out.logits], retain_graph=True)
    beta = 3.0 if place == 0 else 1.0 if place < 5 else 0.3
    share = 2 / (1 + np.exp(beta * r))
    plain = out.logits[0, where - 1].detach().softmax(-1)
    plain[labels[where]] -= 1  # the gradient of −log p
    assert abs(share - 1) > 0.01 and torch.allclose(slope[0, where - 1], share * plain, atol=1e-5)


def test_each_answer_of_a_row_has_a_first_token() -> None:
    labels = torch.tensor([[-100, 4, 5, -100, -100, 6, 7, 8, 9, 4, 5, 6, -100], [*[3] * 7, *[-100] * 6]])
    rule = ConstrainedSFT(first=1.0, early=2.0, later=3.0)
    found = rule._beta(labels)
    wanted = [[1.0, 2.0], [1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0], [1.0, 2.0, 2.0, 2.0, 2.0, 3.0, 3.0]]
    assert [found[0, 1:3].tolist(), found[0, 5:12].tolist(), found[1, :7].tolist()] == wanted


def test_dropout_has_no_part_in_the_anchor() -> None:
    model = opened()
    model.module.train()
    bound = ConstrainedSFT().bind(model, rng=np.random.default_rng(0))
    hook: Any
    with bound.during(1.0):
        (hook,) = model.module._forward_hooks.values()
    kept = [cell.cell_contents for cell in hook.__closure__ if isinstance(cell.cell_contents, torch.nn.Module)]
    assert [one.training or any(p.requires_grad for p in one.parameters()) for one in kept] == [False]


def test_on_trainer_with_accumulation_every_token_of_a_step_counts_alike(tmp_path: Path) -> None:
    taken, model, rule = Gradients(), opened(), ConstrainedSFT()
    anchor = copy.deepcopy(model.module).double()
    run = trainer(tmp_path, model.module, callback=taken, gradient_accumulation_steps=2)
    with block(run, rule):
        run.train()
    for step, found in enumerate(taken.steps):
        rows = ROWS[4 * step : 4 * step + 4]
        twin = copy.deepcopy(anchor)
        twin.load_state_dict(taken.weights[step])
        loss_by_hand(twin, anchor, rows, rule, count(rows)).backward()
        assert apart(flat(found), flat({n: p.grad for n, p in twin.named_parameters()})) < 1e-3
    assert apart(flat(taken.steps[0]), flat(task_gradient(tiny.llama(), ROWS[:4]))) < 1e-4
    assert hooks_on(model) == 0


def test_it_is_lifted_at_its_step_and_stands_beside_other_blockers(tmp_path: Path) -> None:
    taken = Gradients()
    run = trainer(tmp_path, callback=taken)
    with block(run, Scheduled(ConstrainedSFT(), Until(1)), AnchorKL(tiny.PROMPTS, strength=0.0)):
        run.train()
    twin = tiny.llama()
    twin.load_state_dict(taken.weights[2])
    assert apart(flat(taken.steps[2]), flat(task_gradient(twin, ROWS[4:6]))) < 1e-4


def test_it_holds_the_model_nearer_to_its_anchor_than_plain_fine_tuning_does(tmp_path: Path) -> None:
    gone = []
    for i, blockers in enumerate([(), (ConstrainedSFT(first=8.0, early=8.0, later=8.0),)]):
        run = trainer(tmp_path / str(i), max_steps=12)
        with block(run, *blockers):
            run.train()
        told = [
            torch.stack(token_logprobs(m.eval(), ids, labels)).mean().item()
            for m in (tiny.llama(), run.model)
            for ids, labels in ROWS
        ]
        gone.append(np.mean(told[len(ROWS) :]) - np.mean(told[: len(ROWS)]))
    assert 0 < gone[1] < 0.8 * gone[0] and weights(run.model)


@pytest.mark.parametrize("wrong", [{"first": 0.0}, {"early": -1.0}, {"later": 0.0}])
def test_a_beta_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with refused(f"{next(iter(wrong))}={next(iter(wrong.values()))}"):
        ConstrainedSFT(**wrong)


def test_a_pass_without_labels_is_refused() -> None:
    model = opened()
    bound = ConstrainedSFT().bind(model, rng=np.random.default_rng(0))
    with refused("without labels"), bound.during(1.0):
        model.module(torch.tensor([[1, 2, 3]]))
    assert hooks_on(model) == 0
