"""KL against closed forms and against Hugging Face's own logits, one prompt at a time and without padding."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, moved, refused
from scipy.stats import entropy

from gravlens.behavior import divergence
from gravlens.behavior.answers import generate_answers
from gravlens.behavior.divergence import answer_log_likelihood, kl_from
from gravlens.models.forward import generate
from gravlens.models.opening import OpenModel, open_model

# Ragged on purpose; one is empty.
ANSWERS = ["sure , here is how :", "sorry", "no , i must refuse such requests", "", "of course , do this :", "sorry ,"]


def ids_of(answers: Sequence[str]) -> list[list[int]]:
    return [tiny.TOKENIZER(answer, add_special_tokens=False)["input_ids"] for answer in answers]


def distributions(model: OpenModel, prompt: list[int], answer: list[int]) -> np.ndarray:
    """[pos, vocab] after the prompt and each token of the answer, fp64; nothing of gravlens is run."""
    with torch.no_grad():
        out: Any = model.module(torch.tensor([prompt + answer]))
    logits = np.asarray(getattr(out, "logits", out)[0], dtype=np.float64)[len(prompt) - 1 :]
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def by_hand(reference: OpenModel, model: OpenModel, answers: list[list[int]]) -> list[float]:
    pairs = list(zip(PROMPT_IDS, answers, strict=True))
    return [entropy(distributions(reference, *pair), distributions(model, *pair), axis=1).mean() for pair in pairs]


@pytest.fixture(params=tiny.KINDS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[OpenModel, OpenModel]:
    return tuple(tiny.opened(request.param, tmp_path / str(seed), seed) for seed in (0, 1))


# --- KL ---------------------------------------------------------------------------------------------------------


def constant(logits: Sequence[float]) -> OpenModel:
    """A GPT-2 that says the same distribution everywhere: these logits for the first tokens, −20 for the others."""
    model = tiny.gpt2()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(tiny.WIDTH)[0])
        model.lm_head.weight[:, 0] = -20.0  # tied with the embedding, whose first column thus has these values too
        model.lm_head.weight[: len(logits), 0] = torch.tensor(logits)
    return open_model(model, tokenizer=tiny.TOKENIZER)


def test_kl_of_planted_distributions_is_the_closed_form() -> None:
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.1, 0.3, 0.6])
    one, other = constant(np.log(p)), constant(np.log(q))
    forth, back = (p * np.log(p / q)).sum(), (q * np.log(q / p)).sum()
    assert abs(forth - back) > 0.05
    np.testing.assert_allclose(kl_from(one, other, tiny.PROMPTS, answers=ANSWERS), forth, atol=1e-5)
    np.testing.assert_allclose(kl_from(other, one, tiny.PROMPTS, answers=ANSWERS), back, atol=1e-5)


def test_kl_of_given_answers_is_hugging_faces_own_of_each_prompt_alone(pair: tuple[OpenModel, OpenModel]) -> None:
    found = kl_from(*pair, tiny.PROMPTS, answers=ANSWERS)
    wanted = by_hand(*pair, ids_of(ANSWERS))
    assert found.dtype == np.float64 and np.std(wanted) > 0.01
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_kl_reads_the_references_own_greedy_answers(pair: tuple[OpenModel, OpenModel]) -> None:
    own, others = (generate(model, PROMPT_IDS, max_new_tokens=5) for model in pair)
    found, wanted = kl_from(*pair, tiny.PROMPTS, max_new_tokens=5), by_hand(*pair, own)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert not np.allclose(wanted, by_hand(*pair, others), rtol=1e-2)


def test_kl_over_an_empty_answer_is_that_of_the_next_token() -> None:
    pair = [tiny.opened("llama", Path(), seed) for seed in (0, 1)]
    found = kl_from(*pair, tiny.PROMPTS, answers=[""] * len(tiny.PROMPTS))
    first = [[distributions(model, ids, [])[0] for ids in PROMPT_IDS] for model in pair]
    np.testing.assert_allclose(found, entropy(*first, axis=1), rtol=1e-4)


def test_kl_of_models_of_different_kinds_keeps_the_prompts_in_their_order(tmp_path: Path) -> None:
    """A bridge is read in batches of equal length, a plain model in ragged ones."""
    plain, bridge = open_model(tiny.llama(0), tokenizer=tiny.TOKENIZER), tiny.opened("bridge", tmp_path, 1)
    np.testing.assert_allclose(
        kl_from(plain, bridge, tiny.PROMPTS, answers=ANSWERS), by_hand(plain, bridge, ids_of(ANSWERS)), rtol=1e-4
    )


def test_kl_of_a_model_to_itself_is_zero_and_grows_with_the_way() -> None:
    model = tiny.llama()
    opened = [open_model(moved(model, seed=1, by=by), tokenizer=tiny.TOKENIZER) for by in (0.0, 0.01, 0.1)]
    zero, near, far = (kl_from(opened[0], other, tiny.PROMPTS, answers=ANSWERS) for other in opened)
    assert np.array_equal(zero, np.zeros(len(ANSWERS))) and (near > 0).all() and (near < far).all()


def test_small_passes_give_the_same_and_hold_no_more_positions_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = [tiny.opened("llama", Path(), seed) for seed in (0, 1)]
    whole = kl_from(*pair, tiny.PROMPTS, answers=ANSWERS)
    sizes: list[int] = []
    own = divergence.end_logits

    def counted(*given: Any) -> torch.Tensor:
        logits = own(*given)
        sizes.append(logits.shape[0] * logits.shape[1])
        return logits

    monkeypatch.setattr(divergence, "POSITIONS", 20)
    monkeypatch.setattr(divergence, "end_logits", counted)
    np.testing.assert_allclose(kl_from(*pair, tiny.PROMPTS, answers=ANSWERS), whole, rtol=1e-5)
    assert max(sizes) <= 20 and len(sizes) == 2 * 3


def test_models_of_different_languages_are_refused() -> None:
    model = tiny.opened("llama", Path())
    wider = copy.deepcopy(tiny.TOKENIZER)
    wider.add_tokens(["stranger"])
    with refused("different vocabularies"):
        kl_from(model, replace(model, tokenizer=wider), tiny.PROMPTS)
    bigger = open_model(tiny.llama(vocab_size=tiny.VOCABULARY + 8), tokenizer=tiny.TOKENIZER)
    with refused("different vocabularies", str(tiny.VOCABULARY), str(tiny.VOCABULARY + 8)):
        kl_from(model, bigger, tiny.PROMPTS, max_new_tokens=2)
    plain = copy.deepcopy(tiny.TOKENIZER)
    plain.chat_template = None
    with refused("different chat templates"):
        kl_from(model, replace(model, tokenizer=plain), tiny.PROMPTS)
    with refused("no tokenizer"):
        kl_from(replace(model, tokenizer=None), model, tiny.PROMPTS)


def test_answers_that_do_not_fit_the_prompts_are_refused() -> None:
    model = tiny.opened("llama", Path())
    with refused("6 prompts and 1 answers"):
        kl_from(model, model, tiny.PROMPTS, answers=["sorry"])
    with refused("6 prompts and 1 answers"):
        answer_log_likelihood(model, tiny.PROMPTS, ["sorry"])


# --- how likely an answer is ------------------------------------------------------------------------------------


def test_answer_log_likelihood_is_the_mean_over_its_tokens_alone(pair: tuple[OpenModel, OpenModel]) -> None:
    wanted = []
    for prompt, answer in zip(PROMPT_IDS, ids_of(ANSWERS), strict=True):
        steps = distributions(pair[0], prompt, answer)
        wanted.append(np.mean([np.log(steps[i, token]) for i, token in enumerate(answer)]) if answer else np.nan)
    np.testing.assert_allclose(answer_log_likelihood(pair[0], tiny.PROMPTS, ANSWERS), wanted, rtol=1e-4)


def test_a_model_finds_its_own_answers_likelier_than_another_models() -> None:
    one, other = (tiny.opened("llama", Path(), seed) for seed in (0, 1))
    own, others = (generate_answers(model, tiny.PROMPTS, max_new_tokens=6) for model in (one, other))
    assert (answer_log_likelihood(one, tiny.PROMPTS, own) > answer_log_likelihood(one, tiny.PROMPTS, others)).all()


def test_empty_answers_alone_have_no_likelihood() -> None:
    found = answer_log_likelihood(tiny.opened("llama", Path()), tiny.PROMPTS, [""] * len(tiny.PROMPTS))
    assert np.isnan(found).all() and found.shape == (len(tiny.PROMPTS),)
