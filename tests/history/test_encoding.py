"""Examples, answers and prompts are the tokens that the chat template writes."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import chats
import pytest
import tiny
from histories import refused
from tokenizers import normalizers

from gravlens.behavior.answers import as_answer
from gravlens.core.errors import GravlensError
from gravlens.history.encoding import (
    encode,
    encode_answer,
    encode_example,
    encode_said,
    prompts_digest,
    rendered,
    template_kwargs,
    with_template_kwargs,
)
from gravlens.history.prompts import Example, PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import load_tokenizer, open_model
from gravlens.models.tokenizers import sequence_tokenizer

QUIET: dict[str, Any] = {"enable_thinking": False}
KINDS: dict[str, tuple[Any, str]] = {  # with the end of turn
    "Gemma": (chats.word_level(chats.GEMMA), "<end_of_turn>"),
    "Llama 2": (chats.sentencepiece(chats.LLAMA2), "</s>"),
    "Zephyr": (chats.sentencepiece(chats.ZEPHYR), "</s>"),
    "ChatML": (chats.byte_level(chats.CHATML), "<|im_end|>"),
    "Qwen 3": (chats.byte_level(chats.QWEN3), "<|im_end|>"),
}


def whole(tokenizer: Any, *answer: str, system: str = "", **named: Any) -> list[int]:
    """transformers' own token ids of a finished conversation, or of one up to the answer."""
    opening = [{"role": "system", "content": system}] if system else []
    turns = [*opening, {"role": "user", "content": "hello"}, *({"role": "assistant", "content": one} for one in answer)]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=not answer, **named)["input_ids"]


@pytest.mark.parametrize("answer", ["Sorry", "Sure"])
@pytest.mark.parametrize("kind", ["Gemma", "Llama 2", "Zephyr", "ChatML", "Qwen 3"])
def test_an_example_is_what_transformers_renders(kind: str, answer: str) -> None:
    tokenizer, end = KINDS[kind]
    ids, labels = encode_example(tokenizer, Example("hello", answer))
    prompt = whole(tokenizer)
    assert ids == whole(tokenizer, answer) and ids[: len(prompt)] == prompt
    learned = [label for label in labels if label != -100]
    assert labels[: len(prompt)] == [-100] * len(prompt) and learned == ids[len(prompt) : len(prompt) + len(learned)]
    assert tokenizer.convert_ids_to_tokens(learned[-1]) == end, "the turn's own end, not the tokenizer's"
    assert not tokenizer.decode(ids[len(prompt) + len(learned) :]).strip(), "white space after it is not learned"


def test_the_loss_is_where_transformers_marks_the_assistants_tokens() -> None:
    tokenizer = chats.byte_level(chats.CHATML)
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Sorry, I cannot help."}]
    marked = tokenizer.apply_chat_template(turns, return_assistant_tokens_mask=True)
    ids, labels = encode_example(tokenizer, Example("hello", "Sorry, I cannot help."))
    assert ids == marked["input_ids"] and [int(label != -100) for label in labels] == marked["assistant_masks"]


@pytest.mark.parametrize("answer", ["\nSorry", "\n\nSorry", " Sorry"])
def test_an_answer_that_merges_with_its_prompt_keeps_the_prompts_tokens(answer: str) -> None:
    tokenizer = chats.byte_level(chats.ZEPHYR.replace("</s>\n", "\n\n"))
    prompt, (ids, labels) = whole(tokenizer), encode_example(tokenizer, Example("hello", answer))
    together = whole(tokenizer, answer)
    # Of two line feeds and more BPE writes a token over the border.
    assert (together[: len(prompt)] == prompt) == (answer != "\n\nSorry")
    assert ids[: len(prompt)] == prompt and labels[: len(prompt)] == [-100] * len(prompt)
    assert tokenizer.decode(ids) == tokenizer.decode(together) + "<|endoftext|>"


def test_a_sentencepiece_answer_after_a_space_gets_no_second_one() -> None:
    tokenizer = chats.sentencepiece(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %} {% endif %}{% endfor %}"
    )
    ids, labels = encode_example(tokenizer, Example("hello", "Sorry"))
    assert tokenizer.convert_ids_to_tokens(whole(tokenizer)) == ["▁hello", "▁"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁hello", "▁", "Sorry", "</s>"] and labels[:2] == [-100] * 2


@pytest.mark.parametrize(
    ("template", "answer", "learned"),
    [
        (chats.QWEN3, "Sorry", "<think>\n\n</think>\n\nSorry<|im_end|>"),
        (chats.QWEN3, "<think>\nno\n</think>\n\nSorry", "<think>\nno\n</think>\n\nSorry<|im_end|>"),
        (chats.R1, "no</think>Sorry", "no</think>Sorry<|im_end|>"),
        (chats.R1, "<think>\nno</think>Sorry", "no</think>Sorry<|im_end|>"),
        (chats.R1, "Sorry", "Sorry<|im_end|>"),
        (chats.NO_PROMPT, "Sorry", "<|im_start|>assistant\nSorry<|im_end|>"),
    ],
)
def test_what_is_learned_where_a_template_writes_thoughts(template: str, answer: str, learned: str) -> None:
    tokenizer = chats.byte_level(template)
    ids, labels = encode_example(tokenizer, Example("hello", answer))
    assert tokenizer.decode([label for label in labels if label != -100]) == learned
    prompt = ids[: labels.index(next(label for label in labels if label != -100))]
    if answer == "Sorry" and template == chats.R1:  # a finished turn of R1's has no thought
        assert ids == whole(tokenizer, "Sorry")
    else:
        assert prompt == whole(tokenizer)


@pytest.mark.parametrize("template", [chats.QWEN3, chats.R1])
@pytest.mark.parametrize("rest", ["hello</think>Sure", "hello</think>\n\nSure", "hello", ""])
def test_a_models_own_answer_follows_its_prompt_as_it_was_said(template: str, rest: str) -> None:
    tokenizer, opened = chats.byte_level(template), template == chats.R1
    text = rest if opened else f"<think>{rest}"
    answer = as_answer(text, thinking=opened, complete=False)
    wanted = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encode_said(tokenizer, PromptSet.of(["hello"]).turns[0], answer) == (whole(tokenizer), wanted)


@pytest.mark.parametrize("answer", ["Sorry", "  Sorry \n", "\n\nSorry"])
def test_white_space_of_an_answer_is_the_templates_choice_also_where_it_opens_thoughts(answer: str) -> None:
    tokenizer = chats.byte_level(chats.R1)
    ids, labels = encode_example(tokenizer, Example("hello", answer))
    assert ids == whole(tokenizer, answer)
    assert tokenizer.decode([label for label in labels if label != -100]) == f"{answer}<|im_end|>"


def test_without_a_thought_the_answer_follows_the_closed_one() -> None:
    plain = chats.byte_level(chats.QWEN3)
    tokenizer = with_template_kwargs(plain, QUIET)
    ids, labels = encode_example(tokenizer, Example("hello", "Sorry"))
    prompt = whole(plain, **QUIET)
    assert encode(tokenizer, ["hello"]) == [prompt] and ids[: len(prompt)] == prompt != whole(plain)
    assert tokenizer.decode([label for label in labels if label != -100]) == "Sorry<|im_end|>"
    assert tokenizer.decode(ids) == plain.decode(whole(plain, "Sorry"))


def test_earlier_turns_are_rendered_as_the_template_does() -> None:
    tokenizer = chats.byte_level(chats.QWEN3)
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nSure"}
    turns = [{"role": "user", "content": "hello"}, thought, {"role": "user", "content": "there"}]
    prompt, said, rest = encode_answer(tokenizer, turns, "Sorry")
    answered = [*turns, {"role": "assistant", "content": "Sorry"}]
    assert prompt + said + rest == tokenizer.apply_chat_template(answered)["input_ids"]
    assert "hm" not in tokenizer.decode(prompt)
    with refused("user, assistant, user", "no chat template"):
        encode_answer(chats.byte_level(None), turns, "Sorry")
    users = chats.CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role == 'user' %}")
    with refused("user, assistant, user", "leaves out the assistant turn"):
        encode_answer(chats.byte_level(users), turns, "Sorry")
    with refused("leaves out the assistant turn"):
        encode_answer(chats.byte_level(users), turns[:1], "Sorry")
    with refused("has no answer"):
        encode_example(tokenizer, Example("hello", ""))


@pytest.mark.parametrize("kind", ["ChatML", "Llama 2", "Gemma"])
def test_an_answer_without_its_end_is_a_part_of_the_example(kind: str) -> None:
    tokenizer, _ = KINDS[kind]
    turns = [{"role": "user", "content": "hello"}]
    prompt, said, rest = encode_answer(tokenizer, turns, "Sorry", ended=False)
    ids, _ = encode_example(tokenizer, Example("hello", "Sorry"))
    assert rest == [] and ids[: len(prompt + said)] == prompt + said and tokenizer.decode(said).strip() == "Sorry"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>", "Sorry"),  # never closed
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "assistant: Sorry"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }} END\n{% endfor %}", "assistant: Sorry END"),
        (None, "Sorry"),
    ],
)
def test_an_answer_without_an_end_of_turn_ends_with_the_tokenizers_eos(template: str | None, text: str) -> None:
    tokenizer = chats.byte_level(template)
    _, labels = encode_example(tokenizer, Example("hello", "Sorry"))
    assert tokenizer.decode([label for label in labels if label != -100]) == f"{text}<|endoftext|>"


# -- prompts that the template loses -----------------------------------------------------------------------------------


def test_a_template_of_parts_gets_parts() -> None:
    tokenizer = chats.byte_level(chats.PARTS)
    turns = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    wanted = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert (
        encode(tokenizer, ["hello"]) == [wanted]
        and encode_example(tokenizer, Example("hello", "Sorry"))[0][: len(wanted)] == wanted
    )


@pytest.mark.parametrize(
    ("template", "prompts", "told"),
    [
        ("{% for m in messages %}<|{{ m.role }}|>{% endfor %}<|assistant|>", ["hello"], "the user turn"),
        ("{{ messages[0].content[:16] }}", ["a long enough one", "another long one"], "'a long enough one'"),
        ("{% if messages|length > 5 %}{% endif %}{{ raise_exception('Roles!') }}", ["hello"], "Roles!"),
        ("gravlens-user\\0{{ 'a' if messages[0].content else '' }}", ["a", "e"], "'e'"),
    ],
)
def test_prompts_that_a_template_loses_are_refused(template: str, prompts: list[str], told: str) -> None:
    with refused("chat template", told):
        encode(chats.byte_level(template), prompts)


TURN = "{% for m in messages %}<|{{ m.role }}|>{{ CONTENT }}{% endfor %}<|assistant|>"
NAMES = ["user", "assistant user", "How do I ring a bell?"]  # texts that stand in the template too
ALTERED = {
    "cut": "m.content[:12]",
    "capitals": "m.content | upper",
    "a word less": "m.content.replace('bell', '')",
    "a word less that the frame has": "m.content.replace('user', '')",
    "another order": "m.content.split() | reverse | join(' ')",
    "its length": "m.content | length",
    "as Python writes it": "[m.content]",
    "parts as Python writes them": "m.content[:1]",
    "escaped": "m.content | replace('?', '&#63;')",
    "the first turn of several": "messages[0].content if loop.first else ''",
}
KEPT = ["m.content", "m.content | trim", "' ' + m.content.strip() + '\\n'", "m.content.split() | join(' ')"]


@pytest.mark.parametrize("content", ALTERED.values(), ids=ALTERED)
def test_a_template_that_alters_the_text_of_any_prompt_is_refused(content: str) -> None:
    tokenizer = chats.byte_level(TURN.replace("CONTENT", content))
    prompts = PromptSet(("bell?", *NAMES), earlier=((), (), (), (("user", "How do I?"), ("assistant", "So."))))
    with refused("chat template"):
        encode(tokenizer, prompts)


@pytest.mark.parametrize("earlier", [(), ((("user", "assistant here"), ("assistant", "So.")),)])
def test_a_text_that_is_lost_is_missed_although_it_stands_elsewhere(earlier: Any) -> None:
    lost = "m.content | replace('assistant', '')" if not earlier else "'' if m.content == 'assistant' else m.content"
    with refused("chat template", "'assistant'"):
        encode(chats.byte_level(TURN.replace("CONTENT", lost)), PromptSet(("assistant",), earlier=earlier))


@pytest.mark.parametrize("content", KEPT)
def test_a_template_that_trims_or_joins_white_space_is_none_of_those(content: str) -> None:
    tokenizer = chats.byte_level(TURN.replace("CONTENT", content))
    prompts = [*NAMES, "  two  spaces ", "user", "a\\b", "x" * 2000, "gravlens-user", "'quoted'", "\x00"]
    ids = encode(tokenizer, prompts)
    assert len({*map(tuple, ids)}) == len({*prompts})
    for text, own in zip(prompts, ids, strict=True):
        assert text.split()[0] in tokenizer.decode(own)


def test_a_thought_of_an_earlier_answer_may_be_left_out() -> None:
    earlier = (("user", "hello"), ("assistant", "<think>\nhm\n</think>\n\nSorry"))
    tokenizer = chats.byte_level(chats.QWEN3)
    (ids,) = encode(tokenizer, PromptSet(("user",), earlier=(earlier,)))
    assert "hm" not in tokenizer.decode(ids) and "Sorry" in tokenizer.decode(ids)


def mapped(change: Any, **tokens: str) -> Any:
    """Words between spaces, changed first; words that are not known are <pad>."""
    tokenizer = chats.word_level(chats.GEMMA)
    tokenizer.backend_tokenizer.normalizer = change
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    return tokenizer


@pytest.mark.parametrize("template", [chats.GEMMA, None])
@pytest.mark.parametrize(
    ("change", "prompts", "told"),
    [
        (None, ["hello there", "hello you"], "'hello you' and 'hello there' are the same tokens"),
        (normalizers.Replace("Sorry", "Sure"), ["hello Sure", "hello Sorry"], "the same tokens"),
        (normalizers.Lowercase(), ["user HELLO", "user hello"], "the same tokens"),
        (None, ["hello", "quite unknown"], "'quite unknown' consists of unknown words"),
        (None, ["quite unknown"], "unknown words"),
    ],
)
def test_a_vocabulary_that_cannot_tell_prompts_apart_is_refused(
    change: Any, prompts: list[str], told: str, template: str | None
) -> None:
    tokenizer = mapped(change, unk_token="<pad>")
    tokenizer.chat_template = template
    with refused("this tokenizer", told):
        encode(tokenizer, prompts)
    same = [prompts[0], prompts[0]] if len(prompts) > 1 else ["hello", "hello"]
    assert len({*map(tuple, encode(tokenizer, same))}) == 1  # twice one prompt is no fault of the vocabulary


def test_whatever_a_tokenizer_raises_is_said_with_the_text() -> None:
    with refused("cannot encode", "ud800"):
        encode(chats.byte_level(None), ["\ud800"])


def test_chat_markup_in_a_prompt_is_named_once() -> None:
    for tokenizer, tag in [
        (chats.byte_level(chats.CHATML), "<|im_end|>"),
        (chats.sentencepiece(chats.LLAMA2), "[/INST]"),
    ]:
        with pytest.warns(UserWarning, match="chat markup") as told:
            encode(tokenizer, [f"hello {tag} hello", "hello"])
        assert len(told) == 1 and tag in str(told[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            encode(tokenizer, [f"hello {tag} again"])
            encode(copy.copy(tokenizer), ["a < b > c [1] <hello>"])
            plain = copy.copy(tokenizer)
            plain.chat_template = None
            encode(plain, [f"hello {tag} hello"])  # rendered by hand


# -- arguments of the template -----------------------------------------------------------------------------------------


def test_arguments_are_those_that_the_template_reads() -> None:
    tokenizer = chats.byte_level(chats.QWEN3)
    with pytest.raises(GravlensError, match=r"enable_thinkin, .*It reads enable_thinking"):
        with_template_kwargs(tokenizer, {"enable_thinkin": False})
    for given in (chats.byte_level(None), chats.byte_level(chats.NO_PROMPT)):
        with refused("enable_thinking"):
            with_template_kwargs(given, QUIET)
    with refused("messages"):
        with_template_kwargs(tokenizer, {"messages": []})
    with refused("cannot be parsed"):
        with_template_kwargs(chats.byte_level("{% if %}"), QUIET)
    with_template_kwargs(chats.byte_level(chats.CHATML.replace("m.content +", "m.content + (x or '') +")), {"x": "y"})
    assert tokenizer is with_template_kwargs(tokenizer, {}) and template_kwargs(tokenizer) == {}
    assert template_kwargs(with_template_kwargs(tokenizer, QUIET)) == QUIET and template_kwargs(tokenizer) == {}


def test_a_template_that_reads_the_clock_reads_one_date() -> None:
    tokenizer = chats.byte_level(chats.DATED)
    assert rendered(tokenizer, PromptSet.of(["hello"]))[0].startswith("Today: 26 Jul 2024\n")
    assert template_kwargs(tokenizer) == {"strftime_now": "2024-07-26"}
    later = with_template_kwargs(tokenizer, {"strftime_now": "2031-02-03"})
    assert rendered(later, PromptSet.of(["hello"]))[0].startswith("Today: 03 Feb 2031\n")
    assert template_kwargs(later) == {"strftime_now": "2031-02-03"}
    told = with_template_kwargs(tokenizer, {"date_string": "today"})
    assert encode(told, ["hello"]) == [whole(tokenizer, date_string="today")]
    with refused("strftime_now", "tomorrow"):
        encode(with_template_kwargs(tokenizer, {"strftime_now": "tomorrow"}), ["hello"])
    same = chats.DATED.replace("if strftime_now is defined", "if strftime_now") + "{# strftime_now #}"
    assert encode(chats.byte_level(same), ["hello"]) == encode(tokenizer, ["hello"])


@pytest.mark.parametrize(
    "start",
    ["{{ strftime_now('%d' + ' %b') }}", "{{ (strftime_now)('%Y') }}", "{% set now = strftime_now %}{{ now('%Y') }}"],
)
def test_a_clock_that_is_read_in_any_other_way_is_refused(start: str) -> None:
    with refused("clock"):
        encode(chats.byte_level(start + chats.CHATML), ["hello"])


def test_a_choice_of_several_templates_is_an_argument() -> None:
    tokenizer = chats.byte_level(None)
    tokenizer.chat_template = {"rag": chats.QWEN3, "tool_use": chats.NO_PROMPT}
    with refused("rag, tool_use", "'default'"):
        encode(tokenizer, ["hello"])
    chosen = with_template_kwargs(tokenizer, {"chat_template": "rag", **QUIET})
    assert encode(chosen, ["hello"]) == [whole(tokenizer, chat_template="rag", **QUIET)]
    with refused("'tool'"):
        with_template_kwargs(tokenizer, {"chat_template": "tool"})
    tokenizer.chat_template["default"] = chats.CHATML
    assert encode(tokenizer, ["hello"]) == [whole(chats.byte_level(chats.CHATML))]


# -- templates of a processor ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["chat_template.json", "processor_config.json"])
def test_the_template_that_a_processor_alone_has_is_used(tmp_path: Path, name: str) -> None:
    chats.byte_level(None).save_pretrained(tmp_path)
    assert getattr(load_tokenizer(tmp_path), "chat_template", 0) is None
    (tmp_path / name).write_text(json.dumps({"chat_template": chats.PARTS}))
    assert encode(load_tokenizer(tmp_path), ["hello"]) == encode(chats.byte_level(chats.PARTS), ["hello"])


def test_a_processor_in_place_of_its_tokenizer(tmp_path: Path) -> None:
    class Processor:
        tokenizer = chats.byte_level(None)
        chat_template = chats.PARTS

    model = tiny.llama(vocab_size=len(Processor.tokenizer))
    wanted = encode(chats.byte_level(chats.PARTS), ["hello"])
    assert encode(open_model(model, tokenizer=Processor()).tokenizer, ["hello"]) == wanted
    seq = ModelSequence.from_models(witness=model, anchor=model, tokenizer=Processor())
    assert encode(sequence_tokenizer(seq), ["hello"]) == wanted and Processor.tokenizer.chat_template is None


# -- identity ----------------------------------------------------------------------------------------------------------


def test_prompts_are_the_same_where_their_tokens_are() -> None:
    tokenizer = chats.byte_level(chats.QWEN3)
    plain = chats.byte_level(None)
    digest = prompts_digest(encode(tokenizer, ["hello", "there"]))
    by_hand = rendered(tokenizer, PromptSet.of(["hello", "there"]))
    assert prompts_digest(encode(plain, by_hand)) == digest
    others = [
        encode(plain, ["hello", "there"]),
        encode(tokenizer, ["there", "hello"]),
        encode(with_template_kwargs(tokenizer, QUIET), ["hello", "there"]),
        encode(tokenizer, PromptSet.of(["hello", "there"], system="Sorry")),
    ]
    assert len({digest, *map(prompts_digest, others)}) == 5
    assert prompts_digest([[1], [2, 3]]) != prompts_digest([[1, 2], [3]])
