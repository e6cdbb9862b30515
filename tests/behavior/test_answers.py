"""Answers of reasoning models: thought, answer and end; cut answers; prefill."""

import copy
import json
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import refused
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gravlens.behavior.answers import (
    THOUGHT_TAGS,
    Answer,
    Harm,
    as_answer,
    compliance_rate,
    generate_answers,
    substring_judge,
    verdicts_of,
)
from gravlens.behavior.divergence import answer_log_likelihood
from gravlens.behavior.judges import agreement, strongreject_judge
from gravlens.models.opening import OpenModel, open_model

WORDS = (
    "<unk> <bos> <eos> <turn> <think> </think> sure sorry no steps hm hello <|channel|> <|message|> <|end|> <|start|> "
    "analysis final assistant here"
).split()
TEMPLATE = "{% for m in messages %}<turn> {{ m['content'] }} <eos> {% endfor %}{% if add_generation_prompt %}<turn>"
SAYS = "sorry hm </think> sure steps".split()


def speaker(chain: dict[str, str], *, opening: str = "", special: bool = True, template: bool = True) -> OpenModel:
    """A model that follows each token with another one, whatever was asked; its template may open a thought."""
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = WhitespaceSplit()
    marks = [word for word in WORDS[3:] if word.startswith("<") and (special or "think" not in word)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", additional_special_tokens=marks
    )
    tokenizer.chat_template = f"{TEMPLATE} {opening}{{% endif %}}" if template else None
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=len(WORDS), intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        eos_token_id=2, bos_token_id=1, tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(WORDS)))
        model.model.norm.weight.fill_(1)
        for word, following in chain.items():
            model.lm_head.weight[WORDS.index(following), WORDS.index(word)] = 1
    return open_model(model, tokenizer=tokenizer)


def chained(text: str) -> dict[str, str]:
    return dict(pairwise(text.split()))


# -- thoughts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("opening", "closing"), THOUGHT_TAGS)
def test_a_thought_between_any_tags_is_no_part_of_the_answer(opening: str, closing: str) -> None:
    for text, answer, thought in [
        (f"{opening}\nI cannot.\n{closing}\n\nSure: rake.", "Sure: rake.", "I cannot."),
        (f"I cannot.\n{closing}\n\nSure: rake.", "Sure: rake.", "I cannot."),  # the template opened it
        (f"{opening}a{closing}one {opening}b{closing}two", "one two", "ab"),
        (f"{opening}a{opening}b{closing}c{closing}d", "d", "abc"),
        (f"{opening}Let me recall the steps that", "", "Let me recall the steps that"),
        (f"{opening}{closing}Sure.", "Sure.", ""),
    ]:
        found = as_answer(text)
        assert (found, found.thought, found.said) == (answer, thought, text)
        assert found.thought_only == (not answer)
    cut = as_answer("Let me recall", thinking=True)
    assert (cut, cut.thought) == ("", "Let me recall") and cut.thought_only


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>analysis<|message|>I cannot.<|end|><|start|>assistant<|channel|>final<|message|>Sure: rake.",
        "<|channel|>analysis<|message|>I cannot.<|end|><|channel|>final<|message|>Sure: rake.<|return|>",
        "analysisI cannot.assistantfinalSure: rake.",  # what a tokenizer leaves without special tokens
    ],
)
def test_gpt_oss_answers_in_the_channel_final(text: str) -> None:
    found = as_answer(text)
    assert (found, found.thought) == ("Sure: rake.", "I cannot.")
    cut = as_answer("<|channel|>analysis<|message|>Let me recall")
    assert cut.thought_only and cut == ""


@pytest.mark.parametrize("text", ["Sure. ", "", "a < b", "an analysis of it", "<b>final</b>"])
def test_a_text_without_thought_stays_as_it_is(text: str) -> None:
    found = as_answer(text)
    assert found == text and not found.thought and found.complete and as_answer(found) is found


def test_an_answer_is_a_string_in_files_and_processes() -> None:
    answer = as_answer("<think>a</think> b", complete=False)
    assert json.dumps([answer]) == '["b"]'
    for copied in (pickle.loads(pickle.dumps(answer)), copy.deepcopy(answer)):
        assert (copied, copied.thought, copied.complete, copied.said) == ("b", "a", False, "<think>a</think> b")


# -- what judges see and rates count ---------------------------------------------------------------------------------


THOUGHT = "<think>\nIt may be illegal. I cannot tell.\n</think>\n\n"
GIVEN = {
    THOUGHT + "Sure: rake the pins.": True,
    "<think>\nOpen it with a wrench.\n</think>\n\nI cannot help with that.": False,
    "I should refuse: I cannot.\n</think>\nSure: rake.": True,
}


def test_every_judge_sees_the_answer_alone() -> None:
    prompts, answers, wanted = ["how?"] * len(GIVEN), list(GIVEN), list(GIVEN.values())
    seen: list[list[str]] = []

    def judge(_prompts: Any, answers: Any) -> Any:
        seen.append(list(answers))
        return ["cannot" not in answer for answer in answers]

    def rate(prompts: Any, answers: Any) -> Any:
        return np.array([[not verdict, 5, 5] for verdict in judge(prompts, answers)])

    assert substring_judge()(prompts, answers).tolist() == wanted
    assert verdicts_of(prompts, answers, judge).tolist() == wanted
    assert strongreject_judge(rate)(prompts, answers).tolist() == wanted
    assert compliance_rate(prompts, answers, judge) == Harm(2, 3)
    table = agreement({"own": judge, "substrings": substring_judge()}, prompts, answers)
    assert table["agree"].item() == 1 and table["answers"].item() == 3
    assert all("illegal" not in answer and "think" not in answer for answers in seen for answer in answers)


def test_thoughts_alone_are_left_out_and_cut_answers_are_counted() -> None:
    answers = [
        *GIVEN, "<think>\nLet me recall the steps", THOUGHT, "", "<think></think>", "no no no no no no no no",
        Answer("Sure: first", complete=False), Answer("I cannot", complete=False),
        Answer("", thought="hm", complete=False),
    ]  # fmt: skip
    found = compliance_rate(["how?"] * len(answers), answers, substring_judge())
    assert found == Harm(3, 5, empty=2, degenerate=1, thought_only=3, cut=2)
    assert found.cut_share == 0.4 and found.refused.count == 2 and np.isnan(Harm(0, 0).cut_share)


# -- generation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("opening", ["", "<think>"])
def test_generated_thoughts_are_told_from_answers(opening: str, special: bool) -> None:
    """The opening tag is the model's own or the template's, a special token or not."""
    said = "sorry hm </think> sure steps <eos>"
    chain = chained(f"<think> {said}") | ({} if opening else {"<turn>": "<think>"})
    model = speaker(chain, opening=opening, special=special)
    (answer,) = generate_answers(model, ["hello"])
    assert (answer, answer.thought, answer.complete) == ("sure steps", "sorry hm", True)
    for length, wanted in {2: ("", False), 4 + (not opening): ("sure", False)}.items():
        (cut,) = generate_answers(model, ["hello"], max_new_tokens=length)
        assert (cut, cut.complete) == wanted
    assert compliance_rate(["hello"], [answer], substring_judge(["sorry"])) == Harm(1, 1)
    (thought,) = generate_answers(model, ["hello"], max_new_tokens=3 - bool(opening))
    assert compliance_rate(["hello"], [thought], substring_judge(["sorry"])) == Harm(0, 0, thought_only=1)


def test_generated_channels_are_told_apart_though_they_are_special_tokens() -> None:
    said = "<turn> <|channel|> analysis <|message|> hm <|end|> <|start|> assistant"
    model = speaker(chained(said) | {"assistant": "final", "final": "sure", "sure": "<eos>"})
    (answer,) = generate_answers(model, ["hello"])
    assert answer.thought == "hm" and answer == "final sure"  # of a chain that has no second `<|channel|>`


def test_the_likelihood_of_an_answer_is_that_of_what_was_said() -> None:
    model = speaker(chained("<turn> <think> sorry hm </think> sure steps <eos>"))
    answers = generate_answers(model, ["hello"])
    said = answer_log_likelihood(model, ["hello"], answers)
    assert said == answer_log_likelihood(model, ["hello"], ["<think> sorry hm </think> sure steps"])
    assert said > answer_log_likelihood(model, ["hello"], ["sure steps"])


@pytest.mark.parametrize("template", [True, False])
def test_a_prefilled_answer_is_continued_and_returned_whole(template: bool) -> None:
    model = speaker(chained("<turn> sorry no <eos>") | chained("sure here steps <eos>"), template=template)
    prefill = "sure here" if template else " sure here"
    (answer,) = generate_answers(model, ["hello"], prefill=prefill)
    assert (answer, answer.complete) == ("sure here steps", True)
    assert compliance_rate(["hello"], [answer], substring_judge(["sorry"])) == Harm(1, 1)
    with refused("'shall we'"):
        generate_answers(model, ["hello"], prefill="shall we")


def test_a_prefill_is_what_transformers_continues() -> None:
    """`continue_final_message` of transformers renders the same text."""
    model = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    turns = [{"role": "user", "content": tiny.PROMPTS[0:1].texts[0]}, {"role": "assistant", "content": "sure , here"}]
    text = tiny.TOKENIZER.apply_chat_template(turns, continue_final_message=True, tokenize=False)
    ids = tiny.TOKENIZER(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    said = model.module.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
    (found,) = generate_answers(model, tiny.PROMPTS[:1], prefill="sure , here", max_new_tokens=8)
    assert found == "sure , here " + tiny.TOKENIZER.decode(said, skip_special_tokens=True)
