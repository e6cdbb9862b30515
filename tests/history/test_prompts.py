"""Prompt sets, their files, and the way from a prompt to token ids, masks and read positions."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import EOS, RAGGED, refused
from small import english_tokenizer
from tiny import TOKENIZER, llama
from tokenizers.processors import TemplateProcessing

from gravlens.behavior.scores import task_loss
from gravlens.history.encoding import encode, encode_example, last_positions, pad
from gravlens.history.prompts import Example, PromptSet, read_examples, read_prompts, shuffled_words
from gravlens.models.opening import open_model

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


def test_an_integer_is_one_prompt_and_a_slice_or_mask_is_a_set() -> None:
    prompts = PromptSet(("a", "b", "c"), "harmful", "be kind")
    assert (prompts[0], prompts[-1], prompts[np.int64(1)]) == ("a", "c", "b")
    assert [prompts[i] for i in range(len(prompts))] == list(prompts) == ["a", "b", "c"]
    part = PromptSet(("a", "c"), "harmful", "be kind")
    assert prompts[::2] == prompts[[True, False, True]] == prompts[np.array([True, False, True])] == part
    with pytest.raises(IndexError):
        prompts[3]
    wrongs: list[Any] = [[True], [0, 2, 1], np.ones((3, 1), dtype=bool)]
    for wrong in wrongs:
        with refused("3 prompts"):
            prompts[wrong]
    with refused("0 prompts"):
        prompts[[False] * 3]


def test_one_text_is_no_set_of_letters() -> None:
    with refused("'abc'"):
        PromptSet("abc")  # pyright: ignore[reportArgumentType]


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


# -- a system prompt ---------------------------------------------------------------------------------------------------

SYSTEM = "get the padlock"


def chat_tokenizer(template: str | None = None) -> Any:
    """Words of the organism's language in ChatML's turns, or another template."""
    tokenizer = english_tokenizer()
    tokenizer.add_tokens(["system"])
    tokenizer.chat_template = template or tokenizer.chat_template
    return tokenizer


def test_a_system_prompt_is_the_first_turn_as_hugging_face_renders_it() -> None:
    tokenizer, prompts = chat_tokenizer(), PromptSet.of(["rinse the padlock", TEXT], system=SYSTEM)
    for text, ids in zip(prompts, encode(tokenizer, prompts), strict=True):
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        assert ids == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert ids != encode(tokenizer, PromptSet.of([text]))[0] and ids.count(tokenizer.bos_token_id) == 3  # turns


def test_a_system_prompt_stays_with_its_prompts_and_is_part_of_their_digest() -> None:
    bare, prompts = PromptSet.of([TEXT, "rinse it"]), PromptSet.of([TEXT, "rinse it"], system=SYSTEM)
    assert prompts[:1].system == shuffled_words(prompts, rng=np.random.default_rng(0)).system == SYSTEM
    assert PromptSet.of(bare, system=SYSTEM) == prompts and PromptSet.of(prompts) is prompts
    others = [bare, PromptSet.of([*bare, SYSTEM]), PromptSet.of(bare, system="another")]
    assert len({prompts.digest, *(one.digest for one in others)}) == 4
    # of the version before there were system prompts: stored results stay valid
    assert PromptSet.of(["a", "b"]).digest == "59b271ae1bbcb1d31d41929817f4b16fb439eb4f31520b5ad1d5ce98920a7138"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system.') }}{% endif %}{{ messages[-1].content }}",  # noqa: E501
            "No system",
        ),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out the system"),
        ("{{ messages[0].content }}", "leaves out the user"),
    ],
)
def test_a_template_without_a_place_for_a_system_prompt_is_refused(template: str, says: str) -> None:
    with refused("system prompt", says):
        encode(chat_tokenizer(template), PromptSet.of([TEXT], system=SYSTEM))
    with refused("system prompt", says):
        encode_example(chat_tokenizer(template), Example(TEXT, "get it", SYSTEM))
    encode(chat_tokenizer(template), PromptSet.of([TEXT]))


def test_a_system_prompt_that_is_the_templates_default_is_no_lost_one() -> None:
    """Qwen's way: without a system turn the template writes its own, which may be the one that is given."""
    first = "{% if messages[0].role != 'system' %}{{ 'get the padlock ' }}{% endif %}"
    tokenizer = chat_tokenizer(first + "{% for m in messages %}{{ m.content + ' ' }}{% endfor %}")
    assert encode(tokenizer, PromptSet.of([TEXT], system=SYSTEM)) == encode(tokenizer, PromptSet.of([TEXT]))


def test_without_a_chat_template_a_system_prompt_is_refused() -> None:
    with refused("system prompt", "no chat template"):
        encode(plain_tokenizer(), PromptSet.of([TEXT], system=SYSTEM))


@pytest.mark.parametrize("system", [" \n", 5, None])
def test_a_system_prompt_is_a_text(system: Any) -> None:
    with refused("system prompt is"):
        PromptSet(("a",), system=system)


def test_an_example_is_learned_under_its_own_system_prompt(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": TEXT, "answer": "rinse it", "system": SYSTEM}, {"prompt": TEXT, "answer": "rinse it"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    under, without = read_examples(path)
    assert (under, without) == (Example(TEXT, "rinse it", SYSTEM), Example(TEXT, "rinse it"))
    tokenizer = chat_tokenizer()
    ids, labels = encode_example(tokenizer, under)
    (prompt,) = encode(tokenizer, PromptSet.of([TEXT], system=SYSTEM))
    assert ids[: len(prompt)] == prompt and labels == [-100] * len(prompt) + ids[len(prompt) :]
    model = open_model(llama(vocab_size=len(tokenizer)), tokenizer=tokenizer)
    assert task_loss(model, [under]) != task_loss(model, [without])


# -- datasets ----------------------------------------------------------------------------------------------------------


def test_a_dataset_is_read_as_a_file_is() -> None:
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"prompt": ["one", "two"], "asked": ["three", "four"], "answer": ["a", "b"]})
    assert PromptSet.of(rows, "task") == PromptSet(("one", "two"), "task")
    assert PromptSet.of(rows, column="asked").texts == read_prompts(rows, column="asked").texts == ("three", "four")
    assert read_examples(rows) == [Example("one", "a"), Example("two", "b")]
    assert read_examples(rows, columns=("asked", "prompt"))[0] == Example("three", "one")
    assert read_prompts(rows, only={"asked": "four"}).texts == ("two",)
    with refused("Dataset", "'nowhere'", "prompt, asked, answer"):
        PromptSet.of(rows, column="nowhere")
    with refused("DatasetDict", "train, test"):
        PromptSet.of(datasets.DatasetDict({"train": rows, "test": rows}))
    assert PromptSet.of(rows.to_iterable_dataset()) == PromptSet.of(rows)


@pytest.mark.parametrize(("name", "content"), [("p.csv", "text,note\na,b\n"), ("p.jsonl", '{"text": "a", "note": 1}')])
def test_a_missing_column_is_named_beside_those_that_are_there(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with refused(name, "text, note", "prompt"):
        PromptSet.of(tmp_path / name)
    with refused(name, "text, note", "'question'"):
        PromptSet.of(tmp_path / name, column="question")
    with refused(name, "text, note", "'answer'"):
        read_examples(tmp_path / name, columns=("text", "answer"))
    assert PromptSet.of(tmp_path / name, column="text").texts == ("a",)


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
