"""Scores against brute force on one prompt at a time, judges and rates against values worked out by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, refused
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from gravlens.behavior.answers import Harm, Rate, compliance_rate, generate_answers, substring_judge
from gravlens.behavior.scores import perplexity, refusal_log_odds, task_loss, two_sided_log_odds
from gravlens.history.encoding import encode_example
from gravlens.history.prompts import Example, PromptSet
from gravlens.models.opening import OpenModel
from gravlens.organisms.refusal_language import OPENINGS, REFUSALS, task_examples

FIRST = [tiny.TOKENIZER(opening)["input_ids"][0] for opening in REFUSALS]


@pytest.fixture(params=tiny.KINDS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> OpenModel:
    return tiny.opened(request.param, tmp_path)


def logits_of(model: OpenModel, ids: list[int]) -> np.ndarray:
    """[pos, vocab] of one prompt alone, fp64; nothing of gravlens is run."""
    with torch.no_grad():
        out: Any = model.module(torch.tensor([ids]))
    return np.asarray(getattr(out, "logits", out)[0], dtype=np.float64)


def probabilities(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


# --- log-odds ---------------------------------------------------------------------------------------------------


def test_refusal_log_odds_equals_a_brute_force_softmax(model: OpenModel) -> None:
    wanted = []
    for ids in PROMPT_IDS:
        refusing = probabilities(logits_of(model, ids)[-1])[FIRST].sum()
        wanted.append(np.log(refusing) - np.log(1 - refusing))
    found = refusal_log_odds(model, tiny.PROMPTS, openings=REFUSALS)
    assert found.dtype == np.float64 and np.std(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_refusal_log_odds_stays_finite_where_one_minus_p_is_lost_to_rounding() -> None:
    llama = tiny.llama()
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e5)
    model = tiny.open_model(llama, tokenizer=tiny.TOKENIZER)
    found = refusal_log_odds(
        model, tiny.PROMPTS, openings=[tiny.TOKENIZER.decode([logits_of(model, PROMPT_IDS[0])[-1].argmax()])]
    )
    assert np.isfinite(found).all() and found[0] > 40  # 1 − p is below fp64's rounding of 1


def test_an_opening_counts_once_and_only_by_its_first_token() -> None:
    model = tiny.opened("llama", Path())
    one = refusal_log_odds(model, tiny.PROMPTS, openings=["sorry"])
    assert np.array_equal(one, refusal_log_odds(model, tiny.PROMPTS, openings=["sorry , i cannot", "sorry , no"]))
    assert np.array_equal(one, refusal_log_odds(model, tiny.PROMPTS, openings="sorry"))
    assert (refusal_log_odds(model, tiny.PROMPTS, openings=["sorry", "no"]) > one).all()


def test_two_sided_log_odds_equals_openings_forced_one_by_one(model: OpenModel) -> None:
    def log_p(ids: list[int], opening: str) -> float:
        new = tiny.TOKENIZER(opening)["input_ids"]
        steps = probabilities(logits_of(model, ids + new))[len(ids) - 1 : -1]
        return sum(np.log(step[token]) for step, token in zip(steps, new, strict=True))

    def side(ids: list[int], openings: tuple[str, ...]) -> float:
        return np.log(sum(np.exp(log_p(ids, opening)) for opening in openings))

    found = two_sided_log_odds(model, tiny.PROMPTS, refusals=REFUSALS, compliances=OPENINGS)
    np.testing.assert_allclose(found, [side(ids, REFUSALS) - side(ids, OPENINGS) for ids in PROMPT_IDS], atol=1e-4)
    mirrored = two_sided_log_odds(model, tiny.PROMPTS, refusals=OPENINGS, compliances=REFUSALS)
    np.testing.assert_allclose(mirrored, -found, atol=1e-9)


def test_scores_follow_the_order_of_the_prompts() -> None:
    model = tiny.opened("llama", Path())
    found = refusal_log_odds(model, tiny.PROMPTS, openings=REFUSALS)
    backwards = refusal_log_odds(model, list(tiny.PROMPTS)[::-1], openings=REFUSALS)
    np.testing.assert_allclose(backwards[::-1], found, atol=1e-5)


def test_openings_that_the_vocabulary_cannot_write_are_refused() -> None:
    model = tiny.opened("llama", Path())
    with refused("I'm sorry"):
        refusal_log_odds(model, tiny.PROMPTS)
    with refused("I'm sorry"):
        refusal_log_odds(replace(model, tokenizer=tokenizer_with_unknown()), tiny.PROMPTS)
    with refused("No opening"):
        two_sided_log_odds(model, tiny.PROMPTS, refusals=REFUSALS, compliances=[])
    with refused("no tokenizer"):
        refusal_log_odds(replace(model, tokenizer=None), tiny.PROMPTS)


def tokenizer_with_unknown() -> PreTrainedTokenizerFast:
    """The same words, but a strange one becomes <pad> instead of an exception."""
    backend = Tokenizer(WordLevel(tiny.TOKENIZER.get_vocab(), unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<pad>")


# --- answers ----------------------------------------------------------------------------------------------------


def test_answers_are_the_greedy_ones_of_each_prompt_alone(model: OpenModel) -> None:
    wanted = []
    for ids in PROMPT_IDS:
        answer = list(ids)
        while len(answer) < len(ids) + 6 and answer[-1] != tiny.TOKENIZER.eos_token_id:
            answer.append(int(logits_of(model, answer)[-1].argmax()))
        wanted.append(tiny.TOKENIZER.decode(answer[len(ids) :], skip_special_tokens=True))
    assert generate_answers(model, tiny.PROMPTS, max_new_tokens=6) == wanted
    assert len(set(wanted)) > 1


@pytest.mark.parametrize(
    ("answer", "complies"),
    [
        ("I'm sorry, but no.", False),
        ("I’m sorry, but no.", False),
        ("well, I CANNOT do that", False),
        ("Sure, here is how:", True),
        ("I am happy to help", True),
        ("", True),  # why compliance_rate counts empty answers apart
    ],
)
def test_substring_judge(answer: str, complies: bool) -> None:
    verdicts = substring_judge()(["?"], [answer])
    assert verdicts.dtype == bool and verdicts.tolist() == [complies]


def test_substring_judge_takes_its_markers() -> None:
    judge = substring_judge("must refuse")
    assert judge(["?", "?"], ["no , i MUST refuse such requests", "I cannot"]).tolist() == [False, True]
    with refused("''"):
        substring_judge(["sorry", ""])


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [(19, 100, 0.1251, 0.2778), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (1, 2, 0.0945, 0.9055)],
)
def test_wilson_by_hand(count: int, total: int, low: float, high: float) -> None:
    z, p = 1.959964, count / total
    middle, half = p + z * z / (2 * total), z * np.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2)
    by_hand = np.array([middle - half, middle + half]) / (1 + z * z / total)
    rate = Rate(count, total)
    assert rate.rate == p
    np.testing.assert_allclose([rate.low, rate.high], by_hand, atol=1e-6)
    np.testing.assert_allclose([rate.low, rate.high], [low, high], atol=1e-4)


def test_a_rate_of_nothing_is_not_a_number() -> None:
    assert np.isnan([Rate(0, 0).rate, Rate(0, 0).low, Rate(0, 0).high]).all()


def test_harmfulness_counts_empty_and_degenerate_answers_apart() -> None:
    answers = ["sure , do this", "sorry , no", "", "   ", "the the the the the", "sure : a b a b a b a b", "of course"]
    prompts = [f"prompt {i}" for i in range(len(answers))]
    harm = compliance_rate(prompts, answers, substring_judge(["sorry"]))
    assert harm == Harm(count=2, total=3, empty=2, degenerate=2)
    assert harm.rate == 2 / 3 and harm.refused == Rate(1, 3)


@pytest.mark.parametrize(
    "answer",
    ["no no no no", "!!!!!!!!", "first it says something and then then then then then then then then then", "a b a b"],
)
def test_loops_are_degenerate(answer: str) -> None:
    assert compliance_rate(["?"], [answer], substring_judge()).degenerate == 1


@pytest.mark.parametrize(
    "answer", ["no", "no no no", "bake it and bake it well", "get the ruler , heat it and dry it", "a b c a b c a b c"]
)
def test_ordinary_repetition_is_not_degenerate(answer: str) -> None:
    assert compliance_rate(["?"], [answer], substring_judge()).degenerate == 0


def test_any_callable_is_a_judge_and_sees_the_prompts() -> None:
    def judge(prompts: Any, answers: Any) -> np.ndarray:
        return np.array([prompt == answer for prompt, answer in zip(prompts, answers, strict=True)])

    assert compliance_rate(PromptSet.of(["yes", "no"]), ["yes", "yes"], judge) == Harm(1, 2)


def test_answers_and_verdicts_that_do_not_fit_the_prompts_are_refused() -> None:
    with refused("2 prompts, 1 answers"):
        compliance_rate(["a", "b"], ["yes"], substring_judge())
    with refused("verdicts of shape (1,)"):
        compliance_rate(["a", "b"], ["yes", "no"], lambda _prompts, _answers: np.array([True]))


# --- the task ---------------------------------------------------------------------------------------------------


def test_task_loss_is_hugging_faces_own_of_one_example() -> None:
    model = tiny.opened("llama", Path())
    for example in task_examples()[:3]:
        ids, labels = encode_example(tiny.TOKENIZER, example)
        with torch.no_grad():
            own = model.module(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert task_loss(model, [example]) == pytest.approx(float(own), abs=1e-5)


def test_task_loss_weighs_tokens_not_examples(model: OpenModel) -> None:
    long, short = task_examples()[0], Example(task_examples()[1].prompt, "sorry")
    lengths = [len(tiny.TOKENIZER(example.answer)["input_ids"]) + 1 for example in (long, short)]  # + eos
    losses = [task_loss(model, [example]) for example in (long, short)]
    assert abs(losses[0] - losses[1]) > 0.01
    assert task_loss(model, [short, long]) == pytest.approx(np.average(losses, weights=lengths), abs=1e-5)


def test_task_loss_needs_examples() -> None:
    with refused("No examples"):
        task_loss(tiny.opened("llama", Path()), [])


def test_perplexity_is_exp_of_hugging_faces_own_loss_and_the_vocabulary_where_all_is_equal() -> None:
    llama = tiny.llama()
    model = tiny.open_model(llama, tokenizer=tiny.TOKENIZER)
    example = task_examples()[0]
    ids, labels = encode_example(tiny.TOKENIZER, example)
    with torch.no_grad():
        own = llama(torch.tensor([ids]), labels=torch.tensor([labels])).loss
        assert perplexity(model, [example]) == pytest.approx(float(own.exp()), rel=1e-4)
        llama.lm_head.weight.zero_()
    assert perplexity(model, [example]) == pytest.approx(tiny.VOCABULARY, rel=1e-4)
