"""Openings are asked for as the model would write them after the prompt, and never where a thought begins."""

from typing import Any

import chats
import numpy as np
import pytest
import tiny
import torch
from histories import refused

from gravlens.behavior.divergence import answer_log_likelihood
from gravlens.behavior.scores import encode_openings, refusal_log_odds, task_loss, two_sided_log_odds
from gravlens.history.encoding import encode, template_kwargs, with_template_kwargs
from gravlens.history.prompts import Example
from gravlens.models.opening import OpenModel, open_model

KINDS = {
    "Gemma": chats.word_level(chats.GEMMA),
    "Llama 2": chats.sentencepiece(chats.LLAMA2),
    "Zephyr": chats.sentencepiece(chats.ZEPHYR),
    "ChatML": chats.byte_level(chats.CHATML),
    "without a generation prompt": chats.byte_level(chats.NO_PROMPT),
    "Qwen 3, quiet": with_template_kwargs(chats.byte_level(chats.QWEN3), {"enable_thinking": False}),
}
SIDES = {"refusals": ["Sorry"], "compliances": ["Sure"]}


def opened(tokenizer: Any, seed: int = 0) -> OpenModel:
    return open_model(tiny.llama(seed, vocab_size=len(tokenizer)), tokenizer=tokenizer)


def written(tokenizer: Any, answer: str) -> list[int]:
    """transformers' own token ids of a finished conversation."""
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]
    return tokenizer.apply_chat_template(turns)["input_ids"]


def place(tokenizer: Any) -> int:
    """Where the conversations with two answers part: the first token of an answer."""
    pairs = zip(written(tokenizer, "Sorry"), written(tokenizer, "Sure"), strict=False)
    return next(i for i, (one, other) in enumerate(pairs) if one != other)


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_asks_for_the_token_that_the_template_writes(kind: str) -> None:
    tokenizer = KINDS[kind]
    at, model = place(tokenizer), opened(tokenizer)
    ids = written(tokenizer, "Sorry")
    assert encode_openings(model, ["Sorry"])[0][0] == ids[at]
    user, kwargs = [{"role": "user", "content": "hello"}], template_kwargs(tokenizer)
    prompt = tokenizer.apply_chat_template(user, add_generation_prompt=True, **kwargs)["input_ids"]
    with torch.no_grad():  # without a generation prompt the answer begins after more than the prompt
        read = ids[:at] if kind == "without a generation prompt" else prompt
        p = model.module(torch.tensor([read])).logits[0, -1].double().softmax(-1)
    refusing, complying = p[ids[at]], p[written(tokenizer, "Sure")[at]]
    wanted = float(refusing.log() - (1 - refusing).log())
    np.testing.assert_allclose(refusal_log_odds(model, ["hello"], openings=["Sorry"]), [wanted], rtol=1e-4)
    found = two_sided_log_odds(model, ["hello"], **SIDES)
    np.testing.assert_allclose(found, [float(refusing.log() - complying.log())], rtol=1e-4)


@pytest.mark.parametrize("template", [chats.QWEN3, chats.R1])
def test_a_thought_before_the_answer_is_refused(template: str) -> None:
    model = opened(chats.byte_level(template))
    for score in (lambda: refusal_log_odds(model, ["hello"], openings=["Sorry"]),
                  lambda: two_sided_log_odds(model, ["hello"], **SIDES)):  # fmt: skip
        with refused("<think>") as _:
            score()
    with pytest.raises(Exception, match="enable_thinking" if template == chats.QWEN3 else "another chat template"):
        refusal_log_odds(model, ["hello"], openings=["Sorry"])


def test_a_thought_in_the_users_text_is_no_thought_of_the_models() -> None:
    model = opened(chats.byte_level(chats.CHATML))
    assert np.isfinite(refusal_log_odds(model, ["hello <think> there"], openings=["Sorry"])).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_likelihood_of_an_answer_is_of_the_tokens_that_are_learned(kind: str) -> None:
    """Without its end: task_loss has that of the end of turn too, so the difference is one token's."""
    tokenizer = KINDS[kind]
    model = opened(tokenizer)
    (prompt,) = encode(tokenizer, ["hello"])
    ids = written(tokenizer, "Sorry")
    ends = {"Gemma": "<end_of_turn>", "Llama 2": "</s>", "Zephyr": "</s>"}.get(kind, "<|im_end|>")
    stop = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids(ends))
    if kind == "Qwen 3, quiet":  # one text, which the tokenizer cuts otherwise before a word
        ids, stop = prompt + encode_openings(model, ["Sorry"])[0] + ids[stop - 1 :], len(prompt) + 2
    with torch.no_grad():
        logp = model.module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    steps = [float(logp[i - 1, ids[i]]) for i in range(len(prompt), stop)]
    assert task_loss(model, [Example("hello", "Sorry")]) == pytest.approx(-np.mean(steps), rel=1e-4)
    body = steps[: -2 if kind == "Llama 2" else -1]  # which writes a space before </s>
    assert answer_log_likelihood(model, ["hello"], ["Sorry"])[0] == pytest.approx(np.mean(body), rel=1e-4)


def test_a_template_without_assistants_turns_says_nothing_of_answers() -> None:
    users = chats.CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}")
    found = [
        refusal_log_odds(opened(chats.byte_level(one)), ["hello"], openings=["Sorry"]) for one in (users, chats.CHATML)
    ]
    assert found[0] == found[1]


def test_a_guards_verdict_is_text_of_its_own() -> None:
    tokenizer = chats.byte_level(chats.CHATML)
    assert encode_openings(opened(tokenizer), ["Sure"], after="") == [tokenizer("Sure")["input_ids"]]
