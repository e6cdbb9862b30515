"""Chat data: conversations as prompts and as examples, from every source, rendered as Hugging Face renders them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from histories import refused
from rows import write
from small import english_tokenizer

from gravlens.activations.contrasts import Contrast, read_contrast
from gravlens.activations.positions import queries_of
from gravlens.history.encoding import encode, encode_example
from gravlens.history.prompts import Example, PromptSet, read_examples, read_prompts, shuffled_words
from gravlens.studies.experiment import refusals_of

ASKED, FIRST, SAID, ANSWER = (
    "how do i pick the padlock today",
    "rinse the padlock",
    "get the sponge",
    "no , i must refuse",
)
SYSTEM = {"role": "system", "content": "get the padlock"}
USER = {"role": "user", "content": ASKED}
ASSISTANT = {"role": "assistant", "content": ANSWER}
BEFORE = [{"role": "user", "content": FIRST}, {"role": "assistant", "content": SAID}]
EARLIER = (("user", FIRST), ("assistant", SAID))

SHARE = {"system": "system", "user": "human", "assistant": "gpt"}
PARTS = [{"type": "text", "text": ASKED[:9]}, {"type": "text", "text": ASKED[9:]}]

# what it is -> a row, its system prompt and its earlier turns
ROWS: dict[str, tuple[dict[str, Any], str, tuple[Any, ...]]] = {
    "messages": ({"messages": [USER, ASSISTANT]}, "", ()),
    "several turns": ({"messages": [SYSTEM, *BEFORE, USER, ASSISTANT]}, SYSTEM["content"], EARLIER),
    "developer": ({"messages": [SYSTEM | {"role": "developer"}, USER, ASSISTANT]}, SYSTEM["content"], ()),
    "parts": (
        {"messages": [USER | {"content": PARTS}, ASSISTANT | {"content": [{"type": "text", "text": ANSWER}]}]},
        "",
        (),
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": SHARE[t["role"]], "value": t["content"]} for t in (SYSTEM, *BEFORE, USER, ASSISTANT)
            ]
        },
        SYSTEM["content"],
        EARLIER,
    ),
    "ShareGPT, system beside": (
        {
            "system": SYSTEM["content"],
            "conversations": [{"from": "human", "value": ASKED}, {"from": "gpt", "value": ANSWER}],
        },
        SYSTEM["content"],
        (),
    ),
    "completion": ({"prompt": ASKED, "completion": ANSWER}, "", ()),
    "completion, turns": ({"prompt": [SYSTEM, *BEFORE, USER], "completion": [ASSISTANT]}, SYSTEM["content"], EARLIER),
    "answer, turns": ({"prompt": [*BEFORE, USER], "answer": ANSWER}, "", EARLIER),
    "DPO": ({"prompt": ASKED, "chosen": ANSWER, "rejected": "yes"}, "", ()),
    "DPO, turns": ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [BEFORE[1]]}, "", ()),
    "DPO, whole": ({"prompt": ASKED, "chosen": [USER, ASSISTANT], "rejected": [USER, BEFORE[1]]}, "", ()),
    "preferences": ({"chosen": [*BEFORE, USER, ASSISTANT], "rejected": [*BEFORE, USER, BEFORE[1]]}, "", EARLIER),
}


def source_of(kind: str, folder: Path, row: dict[str, Any]) -> Any:
    if kind == "dataset":
        return pytest.importorskip("datasets").Dataset.from_list([row])
    if kind == "rows":
        return [row]
    if kind == "parquet":
        pd.DataFrame([row]).to_parquet(folder / "rows.parquet")
        return folder / "rows.parquet"
    if kind == "frame":
        pd.DataFrame([row]).to_parquet(folder / "rows.parquet")
        return pd.read_parquet(folder / "rows.parquet")  # lists are arrays there
    return write(folder / f"rows.{kind}", [row])


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "dataset", "frame", "rows"])
@pytest.mark.parametrize("name", ROWS)
def test_a_conversation_is_a_prompt_and_an_example(tmp_path: Path, name: str, kind: str) -> None:
    row, system, earlier = ROWS[name]
    source = source_of(kind, tmp_path, row)
    prompts = PromptSet((ASKED,), "task", system, (earlier,))
    assert PromptSet.of(source, "task") == read_prompts(source, role="task") == prompts
    (example,) = read_examples(source)
    assert example == Example(ASKED, ANSWER, system, earlier)
    wanted = [SYSTEM] * bool(system) + BEFORE * bool(earlier) + [USER]
    assert prompts.turns == [wanted] and example.turns == wanted


@pytest.mark.parametrize("as_lists", [True, False])
def test_a_conversation_may_be_a_row_by_itself(tmp_path: Path, as_lists: bool) -> None:
    wanted = PromptSet((ASKED, FIRST), earlier=(EARLIER, ()))
    told = [[*BEFORE, USER], BEFORE[:1]]
    assert PromptSet.of(told) == PromptSet.of(iter(told)) == wanted
    (tmp_path / "p.jsonl").write_text(
        "\n".join(json.dumps(turns if as_lists else {"messages": turns}) for turns in told)
    )
    assert PromptSet.of(tmp_path / "p.jsonl") == wanted
    (tmp_path / "p.json").write_text(json.dumps({"messages": told[0]}))
    assert PromptSet.of(tmp_path / "p.json") == wanted[:1]


def test_a_sequence_feature_of_datasets_is_a_list_of_turns() -> None:
    """`datasets` stores a sequence of dicts as a dict of lists."""
    row = {"messages": {"role": ["user", "assistant"], "content": [ASKED, ANSWER]}}
    assert read_examples([row]) == [Example(ASKED, ANSWER)]
    with refused("Row 1", "a turn of the role 'None'"):
        read_prompts([{"messages": {"role": ["user"], "content": [ASKED, ANSWER]}}])


def test_published_columns_stay_what_they_were(tmp_path: Path) -> None:
    """Chat columns beside those of a user's own file, or of a published set, change nothing."""
    own = {"prompt": "mine", "answer": "a", "completion": "b", "chosen": "c", "rejected": "d", "messages": [USER]}
    assert read_examples([own]) == [Example("mine", "a")] and read_prompts([own]).texts == ("mine",)
    gsm = {"question": "1 + 1?", "answer": "2", "messages": [USER]}
    assert read_examples([gsm]) == [Example("1 + 1?", "2")]
    ultra = {"prompt": FIRST, "prompt_id": "1", "messages": [*BEFORE, USER, ASSISTANT]}  # as UltraChat has it
    assert read_prompts([ultra]) == PromptSet((FIRST,))
    assert read_examples([ultra]) == [Example(ASKED, ANSWER, earlier=EARLIER)]
    path = write(tmp_path / "p.jsonl", [{"dialog": [*BEFORE, USER, ASSISTANT]}])
    assert read_prompts(path, column="dialog") == PromptSet((ASKED,), earlier=(EARLIER,))
    assert read_examples(path, columns=("dialog", "dialog")) == [Example(ASKED, ANSWER, earlier=EARLIER)]
    assert read_prompts([{"prompt": "a", "system": 5}]).texts == ("a",)


# -- system prompts ----------------------------------------------------------------------------------------------------


def test_a_system_turn_is_the_sets_where_all_agree_and_each_ones_own_otherwise() -> None:
    same = PromptSet.of([[SYSTEM, USER], [SYSTEM, *BEFORE, USER]])
    assert same == PromptSet((ASKED, ASKED), "prompts", SYSTEM["content"], ((), EARLIER))
    other = {"role": "system", "content": "rinse"}
    mixed = PromptSet.of([[SYSTEM, USER], [other, *BEFORE, USER], [USER]])
    assert mixed.system == "" and mixed.turns == [[SYSTEM, USER], [other, *BEFORE, USER], [USER]]
    given = PromptSet(mixed.texts, "prompts", "kind", mixed.earlier)  # as a sequence gives its own to a set without one
    assert given.turns == [[SYSTEM, USER], [other, *BEFORE, USER], [{"role": "system", "content": "kind"}, USER]]
    replaced = PromptSet.of(mixed, system="kind")
    assert {turns[0]["content"] for turns in replaced.turns} == {"kind"} and replaced[0:1].earlier == ()
    assert PromptSet.of([[SYSTEM, USER]], system="kind").system == "kind"


# -- earlier turns travel with their prompt ----------------------------------------------------------------------------

MIXED = PromptSet((ASKED, FIRST, ASKED), "harmful", "", (EARLIER, (), ()))


def test_slices_masks_and_controls_keep_the_earlier_turns() -> None:
    assert MIXED[:1] == MIXED[[True, False, False]] == PromptSet((ASKED,), "harmful", "", (EARLIER,))
    assert MIXED[1:] == MIXED[[False, True, True]] == PromptSet((FIRST, ASKED), "harmful") and MIXED[1:].earlier == ()
    assert shuffled_words(MIXED, rng=np.random.default_rng(0)).earlier == MIXED.earlier
    assert [one.turns for one in refusals_of(MIXED, ["no"])] == MIXED.turns
    with refused("3 prompts", "earlier turns of 1"):
        PromptSet(MIXED.texts, earlier=(EARLIER,))


def test_the_earlier_turns_are_part_of_the_digest() -> None:
    other = (("user", SAID), ("assistant", FIRST))
    sets = [MIXED, MIXED[[False, True, True]], PromptSet(MIXED.texts), PromptSet(MIXED.texts, earlier=(other, (), ()))]
    sets += [PromptSet(MIXED.texts, earlier=((), EARLIER, ())), PromptSet.of(MIXED, system="kind")]
    assert len({one.digest for one in sets}) == len(sets) and len({*sets}) == len(sets)


def test_a_contrast_keeps_the_conversations_of_its_pairs(tmp_path: Path) -> None:
    harmless = PromptSet((ASKED, SAID, SAID), earlier=((), EARLIER, ()))
    contrast = Contrast.of(MIXED, harmless)  # the first pair is one text in two conversations
    assert contrast.both.turns == [*MIXED.turns, *harmless.turns]
    with refused("1 pairs of one text"):
        Contrast.of(MIXED[:1], MIXED[:1])
    halves = [
        write(tmp_path / f"{name}.jsonl", [{"Index": i, "messages": turns} for i, turns in enumerate(half.turns)])
        for name, half in (("harmful", MIXED), ("harmless", harmless))
    ]
    assert read_contrast(*halves).both.turns == contrast.both.turns


# -- through the chat template -----------------------------------------------------------------------------------------


def chat_tokenizer() -> Any:
    tokenizer = english_tokenizer()
    tokenizer.add_tokens(["system"])
    return tokenizer


def test_a_conversation_is_rendered_as_hugging_face_renders_it() -> None:
    tokenizer, prompts = chat_tokenizer(), PromptSet.of([[SYSTEM, *BEFORE, USER], [USER]])
    wanted = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        for turns in ([SYSTEM, *BEFORE, USER], [USER])
    ]
    assert encode(tokenizer, prompts) == wanted
    ids, labels = encode_example(tokenizer, Example(ASKED, ANSWER, SYSTEM["content"], EARLIER))
    assert ids[: len(wanted[0])] == wanted[0] and labels[: len(wanted[0])] == [-100] * len(wanted[0])


def test_positions_are_those_of_the_last_turn_alone() -> None:
    tokenizer, prompts = chat_tokenizer(), PromptSet.of([[SYSTEM, *BEFORE, USER], [USER]])
    queries = queries_of(tokenizer, prompts, "instruction")
    assert [tokenizer.decode([one.ids[i] for i in one.reads[0]]) for one in queries] == [ASKED, ASKED]
    assert len(queries[0].ids) > len(queries[1].ids)


def test_a_tokenizer_that_cannot_hold_several_turns_is_refused() -> None:
    base = chat_tokenizer()
    for template, says in (
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out the assistant turn"),
        ("{% if messages[1] %}{{ raise_exception('One turn.') }}{% endif %}", "One turn"),
    ):
        base.chat_template = template
        with refused(says):
            encode(base, MIXED)
    base.chat_template = None
    with refused("no chat template"):
        encode(base, MIXED)
    assert len(encode(base, MIXED[1:])) == 2
    with refused("has no answer"):
        encode_example(chat_tokenizer(), Example(ASKED, ""))


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([USER | {"content": [{"type": "image_url", "image_url": {}}, *PARTS]}], "a turn with image_url"),
        ([USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}], "a turn with tool_calls"),
        ([USER, ASSISTANT | {"reasoning_content": "hm"}], "a turn with reasoning_content"),
        ([USER, {"role": "tool", "content": "5"}], "role 'tool'"),
        ([{"from": "observation", "value": "5"}], "role 'observation'"),
        ([USER | {"content": None}], "a turn without text"),
        ([USER | {"role": ["user"]}], "role"),
        ([SYSTEM], "a turn of the system"),
        ([ASSISTANT], "blank prompt"),
        ([USER | {"content": " "}], "blank prompt"),
        ([USER, ASSISTANT, ASSISTANT], "a turn of the assistant"),
        (["text"], "'text' in place of a turn"),
        ([], "no text for 'messages'"),
        ("[{'role': 'user', 'content': 'a'}]", "list of turns as text"),
        ("text", "has text in 'messages'"),
        (None, "no text for 'messages'"),
    ],
)
def test_a_row_that_is_no_conversation_is_named_by_its_line(tmp_path: Path, turns: Any, said: str) -> None:
    lines = [json.dumps({"messages": one}) for one in ([USER, ASSISTANT], turns)]
    (tmp_path / "p.jsonl").write_text("\n\n".join(lines))
    for read in (read_prompts, read_examples):
        with refused("Row 2 (line 3)", "p.jsonl", said):
            read(tmp_path / "p.jsonl")


def test_a_list_of_turns_is_one_conversation_and_not_a_set() -> None:
    with pytest.raises(ValueError, match=r"list of turns .*Try: \[turns\]"):
        PromptSet.of([USER])
    with pytest.raises(ValueError, match=r"list of turns"):
        read_examples([{"from": "human", "value": "a"}])


def test_an_answer_of_another_conversation_is_refused() -> None:
    with refused("Row 1", "another conversation in 'chosen'"):
        read_examples([{"prompt": FIRST, "chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}])


def test_a_table_of_text_cannot_hold_lists(tmp_path: Path) -> None:
    pd.DataFrame({"prompt": [[USER]]}).to_csv(tmp_path / "p.csv", index=False)
    with refused("Row 1 (line 2)", "p.csv", "list of turns as text"):
        PromptSet.of(tmp_path / "p.csv")
