"""Prompt sets, their files, and the way from a prompt to token ids, masks and read positions."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from histories import EOS, RAGGED, refused
from tiny import TOKENIZER
from tokenizers.processors import TemplateProcessing

from gravlens.prompts import (
    Example,
    PromptSet,
    encode,
    encode_example,
    last_positions,
    pad,
    read_examples,
)

TEXT = "how do i pick the padlock today"
BOS = TOKENIZER.bos_token_id


def plain_tokenizer(*, adds_bos: bool = False) -> Any:
    """The organism's tokenizer without a chat template; on demand it writes a BOS itself, as Llama's does."""
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = None
    if adds_bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


# -- prompt sets -------------------------------------------------------------------------------------------------------


def test_a_prompt_set_is_made_of_a_list_and_stays_itself() -> None:
    prompts = PromptSet.of(["a", "b", "c"], "harmful")
    assert (len(prompts), list(prompts), prompts.role) == (3, ["a", "b", "c"], "harmful")
    assert PromptSet.of(prompts) is prompts
    assert prompts[1:] == PromptSet(("b", "c"), "harmful")


def test_pitfall_6_the_digest_is_of_content_and_order_alone(tmp_path: Path) -> None:
    prompts = PromptSet.of(["a", "b"])
    (tmp_path / "anything.txt").write_text("a\nb\n")
    assert prompts.digest == PromptSet.of(tmp_path / "anything.txt", "harmful").digest
    others = (["b", "a"], ["a", "b", "b"], ["ab"], ["a b"])
    assert len({prompts.digest, *(PromptSet.of(one).digest for one in others)}) == 5


@pytest.mark.parametrize("texts", [[], [""], ["a", "  \n"]])
def test_empty_prompts_are_refused(texts: list[str]) -> None:
    with refused("prompt set"):
        PromptSet.of(texts)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", '{"prompt": "one"}\n\n{"prompt": "two, three"}'),
        ("p.csv", 'Index,prompt\n1,one\n2,"two, three"\n'),
        ("p.txt", "one\r\n\ntwo, three\n"),
        ("spreadsheet.csv", '\ufeffprompt\none\n"two, three"\n'),
    ],
)
def test_each_format_gives_the_same_prompts(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert PromptSet.of(str(tmp_path / name)).texts == ("one", "two, three")


@pytest.mark.parametrize("text", ["two\nlines", "line\u2028separator", "next\x85line", "“quoted”, and more"])
def test_a_prompt_with_unusual_characters_is_read_whole(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "p.csv").write_text(f'prompt\n"{text}"\n', encoding="utf-8")
    assert [PromptSet.of(tmp_path / name).texts for name in ("p.jsonl", "p.csv")] == [(text,), (text,)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("broken.jsonl", b'{"prompt": "a"\n'),
        ("number.jsonl", b'{"prompt": 5}\n'),
        ("list.jsonl", b'["prompt"]\n'),
        ("column.csv", b"text\na\n"),
        ("empty.txt", b"\n\n"),
        ("binary.txt", b"\xff\xfe\x00"),
    ],
)
def test_a_bad_prompt_file_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with refused(name):
        PromptSet.of(tmp_path / name)


def test_a_missing_prompt_file_is_named(tmp_path: Path) -> None:
    with refused("nowhere.jsonl"):
        PromptSet.of(tmp_path / "nowhere.jsonl")


def test_examples_are_read_and_a_missing_answer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    assert read_examples(path) == [Example("a", "b")]
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    with refused("Row 2", "train.jsonl", "answer"):
        read_examples(path)


# -- token ids ---------------------------------------------------------------------------------------------------------


def test_a_chat_template_renders_the_user_turn_and_the_generation_prompt() -> None:
    (ids,) = encode(TOKENIZER, PromptSet.of([TEXT]))
    assert TOKENIZER.decode(ids) == f"<bos> <user> {TEXT} <bot>"


def test_without_a_template_the_text_is_read_as_it_is() -> None:
    (ids,) = encode(plain_tokenizer(), PromptSet.of([TEXT]))
    assert TOKENIZER.decode(ids) == TEXT


@pytest.mark.parametrize("text", [TEXT, f"<bos> {TEXT}", f"<bos> <bos> {TEXT}"])
@pytest.mark.parametrize("templated", [True, False])
def test_pitfall_5_exactly_one_bos(text: str, templated: bool) -> None:
    tokenizer = plain_tokenizer(adds_bos=True)
    if templated:
        tokenizer.chat_template = "{{ bos_token }} {{ messages[0].content }} <bot>"
    (ids,) = encode(tokenizer, PromptSet.of([text]))
    assert ids.count(BOS) == 1 and ids[0] == BOS
    assert TOKENIZER.decode(ids[1:]) == (f"{TEXT} <bot>" if templated else TEXT)


def test_no_tokenizer_is_an_error() -> None:
    with refused("no tokenizer"):
        encode(None, PromptSet.of(["a"]))


def test_an_example_is_learned_on_its_answer_alone() -> None:
    ids, labels = encode_example(TOKENIZER, Example(TEXT, "no , i must refuse such requests"))
    assert TOKENIZER.decode(ids) == f"<bos> <user> {TEXT} <bot> no , i must refuse such requests <eos>"
    n_prompt = len(encode(TOKENIZER, PromptSet.of([TEXT]))[0])
    assert labels == [-100] * n_prompt + ids[n_prompt:]


# -- padding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad_id", [0, EOS])
def test_pitfall_1_the_mask_is_made_of_lengths_so_a_genuine_eos_or_pad_stays(side: Any, pad_id: int) -> None:
    batch = pad(RAGGED, pad_id, side)
    for row, ids in enumerate(RAGGED):
        true = batch.attention_mask[row].bool()
        assert batch.input_ids[row][true].tolist() == ids
        assert batch.position_ids[row][true].tolist() == list(range(len(ids)))
        assert set(batch.input_ids[row][~true].tolist()) <= {pad_id}
    assert (batch.attention_mask[:, -1 if side == "left" else 0] == 1).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_pitfall_1_the_last_position_is_the_last_true_token(side: Any) -> None:
    batch = pad(RAGGED, EOS, side)
    last = last_positions(batch.attention_mask)
    assert batch.input_ids[torch.arange(len(RAGGED)), last].tolist() == [ids[-1] for ids in RAGGED]
    assert last_positions(batch.attention_mask.bool()).tolist() == last.tolist()
