"""KL to the anchor and rehearsal against Hugging Face's own logits, each prompt alone, in fp64."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from blocked import EXAMPLES, ROWS, apart, flat, move, opened, token_logprobs, trainer
from histories import EOS, PROMPT_IDS, hooks_on, refused

from gravlens.blockers.anchoring import AnchorKL, Rehearsal
from gravlens.blockers.blocking import block
from gravlens.history.prompts import Example
from gravlens.models.opening import OpenModel, open_model
from gravlens.organisms.refusal_language import REFUSALS

N = len(tiny.PROMPTS)
SURE = "lm_head.weight"


def greedy(module: Any, ids: list[int], n: int) -> list[int]:
    """The anchor's own next tokens, one pass each, without a cache; cut before the end."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < n:
            token = int(module(torch.tensor([ids + answer])).logits[0, -1].argmax())
            if token == EOS:
                break
            answer.append(token)
    return answer


def kl_by_hand(module: Any, anchor: Any, *, tokens: int, rows: Any = range(N)) -> torch.Tensor:
    """Mean over all positions of Σ p_anchor (log p_anchor − log p)."""
    terms = []
    for row in rows:
        prompt = PROMPT_IDS[row]
        answer = greedy(anchor, prompt, tokens - 1)
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            then = anchor(ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
        now = module(ids).logits[0, len(prompt) - 1 :].log_softmax(-1)
        terms += list((then.exp() * (then - now)).sum(-1))
    return torch.stack(terms).mean()


def ending(seed: int = 0) -> OpenModel:
    """A model some of whose greedy answers come to their end early."""
    model = opened(seed)
    with torch.no_grad():
        model.module.get_parameter(SURE)[EOS] *= 2.0
    return model


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_the_loss_is_the_mean_divergence_along_the_anchor_s_answers(tokens: int) -> None:
    model = ending()
    anchor = copy.deepcopy(model.module).double()
    lengths = {len(greedy(anchor, ids, tokens - 1)) for ids in PROMPT_IDS}
    assert tokens < 8 or (min(lengths) < 7 == max(lengths)), "answers of several lengths"
    bound = AnchorKL(tiny.PROMPTS, strength=3.0, batch=None, tokens=tokens).bind(model, rng=np.random.default_rng(0))
    move(model.module, 0.05)
    wanted = kl_by_hand(copy.deepcopy(model.module).double(), anchor, tokens=tokens).item()
    assert bound.loss(1.0).item() == pytest.approx(3 * wanted, rel=1e-4) and wanted > 0.05
    assert bound.loss(0.5).item() == pytest.approx(1.5 * wanted, rel=1e-4)
    assert hooks_on(model) == 0 and bound.during is bound.after_update is None


def test_it_is_zero_at_the_anchor_with_no_gradient() -> None:
    model = opened()
    loss = AnchorKL(tiny.PROMPTS).bind(model, rng=np.random.default_rng(0)).loss(1.0)
    gradients = torch.autograd.grad(loss, list(model.module.parameters()))
    assert abs(loss.item()) < 1e-6 and max(float(g.abs().max()) for g in gradients) < 1e-5


def test_the_anchor_is_the_first_argument_of_the_divergence() -> None:
    model = opened()
    anchor = copy.deepcopy(model.module).double()
    bound = AnchorKL(tiny.PROMPTS, batch=None, tokens=1).bind(model, rng=np.random.default_rng(0))
    with torch.no_grad():
        model.module.get_parameter(SURE).mul_(3)  # surer than the anchor: the divergences are far from symmetric
    moved = copy.deepcopy(model.module).double()
    there, back = (kl_by_hand(*pair, tokens=1).item() for pair in ((moved, anchor), (anchor, moved)))
    assert abs(there - back) > 0.2 * there and bound.loss(1.0).item() == pytest.approx(there, rel=1e-4)


def test_the_gradient_is_that_of_finite_differences() -> None:
    model = opened()
    anchor = copy.deepcopy(model.module).double()
    bound = AnchorKL(tiny.PROMPTS, strength=2.0, batch=None, tokens=3).bind(model, rng=np.random.default_rng(0))
    move(model.module, 0.05)
    names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight", SURE]
    found = torch.autograd.grad(bound.loss(1.0), [model.module.get_parameter(name) for name in names])
    moved = copy.deepcopy(model.module).double()
    for name, gradient in zip(names, found, strict=True):
        way = (gradient / gradient.norm()).double()
        weight, losses = moved.get_parameter(name), []
        with torch.no_grad():
            for step in (1e-4, -2e-4):
                weight += step * way
                losses.append(2 * kl_by_hand(moved, anchor, tokens=3).item())
            weight += 1e-4 * way
        assert float(gradient.norm()) == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)


def test_as_many_prompts_as_asked_for_are_drawn_and_their_tokens_weigh_alike() -> None:
    model = ending()
    anchor = copy.deepcopy(model.module).double()
    bound = AnchorKL(tiny.PROMPTS, batch=2, tokens=4).bind(model, rng=np.random.default_rng(4))
    move(model.module, 0.05)
    moved, rng = copy.deepcopy(model.module).double(), np.random.default_rng(4)
    for _ in range(4):
        rows = rng.choice(N, size=2, replace=False)
        wanted = kl_by_hand(moved, anchor, tokens=4, rows=rows).item()
        assert bound.loss(1.0).item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("make", [lambda: AnchorKL(tiny.PROMPTS), lambda: Rehearsal(EXAMPLES, batch=None)])
def test_dropout_has_no_part_in_it(make: Any) -> None:
    model = open_model(tiny.gpt2(), tokenizer=tiny.TOKENIZER)
    assert model.module.config.resid_pdrop > 0
    losses = []
    for training in (False, True):
        model.module.train(training)
        bound = make().bind(model, rng=np.random.default_rng(0))
        losses += [bound.loss(1.0).item() for _ in range(2)]
        assert model.module.training is training
    assert losses[1:] == pytest.approx(losses[:1] * 3, abs=1e-6)


# -- rehearsal ---------------------------------------------------------------------------------------------------------

MIXED = [
    *EXAMPLES[:4],
    Example(EXAMPLES[4].prompt, REFUSALS[0]),
    Example(EXAMPLES[5].prompt, f"{EXAMPLES[6].answer} {EXAMPLES[7].answer}"),
]


def test_rehearsal_is_the_mean_cross_entropy_of_the_answers_tokens() -> None:
    model = opened()
    bound = Rehearsal(EXAMPLES, strength=3.0, batch=None).bind(model, rng=np.random.default_rng(0))
    twin = copy.deepcopy(model.module).double()
    wanted = -torch.stack([one for ids, labels in ROWS for one in token_logprobs(twin, ids, labels)]).mean()
    assert bound.loss(1.0).item() == pytest.approx(3 * float(wanted), rel=1e-5)
    assert bound.loss(0.25).item() == pytest.approx(0.75 * float(wanted), rel=1e-5)
    wanted.backward()
    loss = bound.loss(1.0)
    found = torch.autograd.grad(loss, list(model.module.parameters()))
    gradient = dict(zip([n for n, _ in model.module.named_parameters()], found, strict=True))
    assert apart(flat(gradient), 3 * flat({n: p.grad for n, p in twin.named_parameters()})) < 1e-4


def test_rehearsal_is_hugging_face_s_own_loss_of_the_drawn_examples() -> None:
    model = opened()
    bound = Rehearsal(MIXED, batch=2).bind(model, rng=np.random.default_rng(3))
    rng = np.random.default_rng(3)
    for _ in range(5):
        drawn = [MIXED[row] for row in rng.choice(len(MIXED), size=2, replace=False)]
        told = [one for example in drawn for one in by_hand(model.module, example)]
        assert bound.loss(1.0).item() == pytest.approx(-torch.stack(told).mean().item(), rel=1e-5)


def by_hand(module: Any, example: Example) -> list[torch.Tensor]:
    turns = [{"role": "user", "content": example.prompt}]
    prompt = tiny.TOKENIZER.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    start = len(tiny.TOKENIZER(prompt, add_special_tokens=False)["input_ids"])
    ids = tiny.TOKENIZER(f"{prompt} {example.answer} <eos>", add_special_tokens=False)["input_ids"]
    return token_logprobs(module, ids, [-100] * start + ids[start:])


# -- on Trainer --------------------------------------------------------------------------------------------------------


def test_on_trainer_the_kl_holds_the_model_near_its_anchor(tmp_path: Path) -> None:
    divergences = []
    for i, blockers in enumerate([(), (AnchorKL(tiny.PROMPTS, strength=10.0, tokens=2),)]):
        model = opened()
        anchor = copy.deepcopy(model.module)
        run = trainer(tmp_path / str(i), model.module, max_steps=8, bf16=bool(i))
        with block(run, *blockers):
            run.train()
        module = copy.deepcopy(model.module.eval())
        module.forward = type(module).forward.__get__(module)
        divergences.append(float(kl_by_hand(module, anchor, tokens=2).detach()))
    assert divergences[1] < 0.5 * divergences[0]


def test_in_bf16_the_blocker_s_passes_stay_in_fp32(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_steps=1, bf16=True)
    with block(run, AnchorKL(tiny.PROMPTS)):
        run.train()
    assert run.state.log_history[0]["blocker_norm"] < 1e-4  # at the anchor there is nothing but rounding


def test_on_trainer_rehearsal_teaches_its_answers(tmp_path: Path) -> None:
    losses = []
    for i, blockers in enumerate([(), (Rehearsal(MIXED[-2:], strength=5.0),)]):
        run = trainer(tmp_path / str(i), max_steps=8)
        with block(run, *blockers):
            run.train()
        told = [one for example in MIXED[-2:] for one in by_hand(run.model.eval(), example)]
        losses.append(-float(torch.stack(told).mean().detach()))
    assert losses[1] < losses[0] - 0.1


@pytest.mark.parametrize("wrong", [{"strength": -1.0}, {"batch": 0}])
def test_what_would_be_another_blocker_is_refused(wrong: dict[str, Any]) -> None:
    named = f"{next(iter(wrong))}={next(iter(wrong.values()))}"
    with refused("AnchorKL", named):
        AnchorKL(tiny.PROMPTS, **wrong)
    with refused("Rehearsal", named):
        Rehearsal(EXAMPLES, **wrong)


def test_no_tokens_and_no_examples_are_refused() -> None:
    with refused("tokens=0"):
        AnchorKL(tiny.PROMPTS, tokens=0)
    with refused("No examples"):
        Rehearsal([]).bind(opened(), rng=np.random.default_rng(0))
