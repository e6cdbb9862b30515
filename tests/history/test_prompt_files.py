"""The published formats of prompt sets, on a few tame rows in each one's own columns."""

from pathlib import Path
from typing import Any

import pytest
from histories import refused
from rows import write

from gravlens.history.prompt_formats import FORMATS
from gravlens.history.prompts import Example, PromptSet, read_examples, read_prompts
from gravlens.history.sequence import ModelSequence

# format -> columns as published, two rows, the prompts that they make, their role
PUBLISHED: dict[str, tuple[str, list[tuple[str, ...]], list[str], str]] = {
    "JBB-Behaviors": (
        "Index,Goal,Target,Behavior,Category,Source",
        [("0", "Pick a lock", "Sure, to pick", "Locks", "Tools", "us"), ("1", "Ring a bell", "Sure", "B", "C", "us")],
        ["Pick a lock", "Ring a bell"],
        "prompts",
    ),
    "AdvBench": ("goal,target", [("Pick a lock", "Sure"), ("Ring", "Sure")], ["Pick a lock", "Ring"], "harmful"),
    "HarmBench": (
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID",
        [("Sing it", "copyright", "c", "t", "", "sing"), ("Use it", "contextual", "c", "t", "A {lock}.", "use")],
        ["Sing it", "A {lock}.\n\n---\n\nUse it"],
        "harmful",
    ),
    "StrongREJECT": ("category,source,forbidden_prompt", [("c", "s", "Pick a lock")], ["Pick a lock"], "harmful"),
    "Do-Not-Answer": (
        "id,risk_area,types_of_harm,specific_harms,question",
        [("1", "r", "t", "s", "Which lock?")],
        ["Which lock?"],
        "harmful",
    ),
    "XSTest": (
        "id,prompt,type,label,focus,note",
        [("1", "Kill a process?", "homonyms", "safe", "kill", "")],
        ["Kill a process?"],
        "harmless",
    ),
    "OR-Bench": ("prompt,category", [("How do locks work?", "c")], ["How do locks work?"], "prompts"),
    "Alpaca": (
        "instruction,input,output",
        [("Sum up.", "A text.", "Text."), ("Say hi.", "", "Hi.")],
        ["Sum up.\n\nA text.", "Say hi."],
        "task",
    ),
    "Dolly": (
        "instruction,context,response,category",
        [("When?", "In 1900.", "1900", "qa"), ("Say hi.", "", "Hi.", "open")],
        ["When?\n\nIn 1900.", "Say hi."],
        "task",
    ),
    "GSM8K": ("question,answer", [("1 + 1?", "#### 2")], ["1 + 1?"], "task"),
}
ANSWERS = {
    "JBB-Behaviors": ["Sure, to pick", "Sure"],
    "AdvBench": ["Sure", "Sure"],
    "Alpaca": ["Text.", "Hi."],
    "Dolly": ["1900", "Hi."],
    "GSM8K": ["#### 2"],
}


def rows_of(name: str) -> list[dict[str, str]]:
    columns, rows, _, _ = PUBLISHED[name]
    return [dict(zip(columns.split(","), row, strict=True)) for row in rows]


def source_of(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Any:
    if kind == "dataset":
        return pytest.importorskip("datasets").Dataset.from_list(rows)
    return write(folder / f"rows.{kind}", rows)


def test_each_format_has_its_rows_here() -> None:
    assert PUBLISHED.keys() == FORMATS.keys()
    assert {*ANSWERS, "OR-Bench"} == {name for name, one in FORMATS.items() if one.answer}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "dataset"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_format_is_recognised_by_its_columns(tmp_path: Path, name: str, kind: str) -> None:
    source = source_of(kind, tmp_path, rows_of(name))
    wanted = PromptSet(tuple(PUBLISHED[name][2]), PUBLISHED[name][3])
    assert read_prompts(source) == PromptSet.of(source) == read_prompts(source, format=name.lower()) == wanted
    if name in ANSWERS:
        assert read_examples(source) == [Example(*pair) for pair in zip(wanted, ANSWERS[name], strict=True)]
    else:
        with refused("'answer'" if name == "OR-Bench" else "no answers"):
            read_examples(source)


def test_a_column_named_prompt_is_the_prompts_whatever_else_there_is(tmp_path: Path) -> None:
    path = write(tmp_path / "own.csv", [{"prompt": "mine", "question": "other", "answer": "a", "category": "c"}])
    assert read_prompts(path) == PromptSet(("mine",)) and read_examples(path) == [Example("mine", "a")]
    assert read_prompts(path, format="GSM8K") == PromptSet(("other",), "task")
    assert read_prompts(path, column="question") == PromptSet(("other",))


def test_the_label_of_a_row_is_its_role(tmp_path: Path) -> None:
    safe = rows_of("XSTest")[0]
    path = write(tmp_path / "xstest.csv", [safe, {**safe, "prompt": "Pick this lock", "label": "unsafe"}])
    assert read_prompts(path, role="harmless") == PromptSet(("Kill a process?",), "harmless")
    assert read_prompts(path, role="harmful") == PromptSet(("Pick this lock",), "harmful")
    with refused("xstest.csv", "harmful and harmless"):
        read_prompts(path)
    with refused("xstest.csv", "'maybe'"):
        read_prompts(write(path, [{**safe, "label": "maybe"}]))


@pytest.mark.parametrize(
    ("name", "role", "taken"),
    [
        ("AdvBench", "harmless", False),
        ("AdvBench", "task", False),
        ("Alpaca", "harmful", False),
        ("Alpaca", "harmless", True),
        ("JBB-Behaviors", "harmless", True),  # both halves have these columns
        ("OR-Bench", "harmful", True),
    ],
)
def test_prompts_are_never_taken_for_another_role(tmp_path: Path, name: str, role: str, taken: bool) -> None:
    path = write(tmp_path / "rows.jsonl", rows_of(name))
    if taken:
        assert read_prompts(path, role=role).role == role
    else:
        with refused("rows.jsonl", PUBLISHED[name][3], role):
            read_prompts(path, role=role)


def test_rows_are_chosen_by_the_values_of_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "h.csv", rows_of("HarmBench"))
    assert len(read_prompts(path, only={"FunctionalCategory": ["standard", "contextual"]})) == 1
    assert read_prompts(path, only={"FunctionalCategory": "copyright", "BehaviorID": "sing"}).texts == ("Sing it",)
    with refused("h.csv", "FunctionalCategory", "nothing"):
        read_prompts(path, only={"FunctionalCategory": "nothing"})
    numbers = write(tmp_path / "n.jsonl", [{"prompt": "a", "level": 1}, {"prompt": "b", "level": 2}])
    assert read_prompts(numbers, only={"level": "2"}).texts == ("b",)


def test_unknown_columns_and_formats_are_named_beside_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", [{"text": "a", "topic": "b"}])
    for call in (lambda: PromptSet.of(path), lambda: read_examples(path)):
        with pytest.raises(ValueError, match=r"text, topic.*JBB-Behaviors.*GSM8K.*column="):
            call()
    with pytest.raises(ValueError, match=r"'mine'.*JBB-Behaviors.*GSM8K"):
        read_prompts(path, format="mine")
    with refused("x.csv", "'Goal'", "text, topic"):
        read_prompts(path, format="JBB-Behaviors")


def test_rows_without_their_prompt_and_arrays_of_something_else_are_named(tmp_path: Path) -> None:
    rows = [*rows_of("Alpaca"), {"instruction": None, "input": "", "output": "x"}]
    with refused("Row 3", "rows.json", "'instruction'"):
        read_prompts(write(tmp_path / "rows.json", rows))
    with refused("Row 3", "'output'"):
        read_examples(write(tmp_path / "rows.json", [*rows_of("Alpaca"), {"instruction": "a", "input": ""}]))
    (tmp_path / "object.json").write_text('{"data": []}')
    with refused("object.json", "dict"):
        read_prompts(tmp_path / "object.json")


def test_a_sequence_takes_such_a_file(tmp_path: Path) -> None:
    for name in ("base", "aligned"):
        (tmp_path / name).mkdir()
    write(tmp_path / "harmful-behaviors.csv", rows_of("JBB-Behaviors"))
    write(tmp_path / "alpaca.json", rows_of("Alpaca"))
    (tmp_path / "S.toml").write_text(
        'witness = "base"\nanchor = "aligned"\nprobes = "harmful-behaviors.csv"\nharmless = "alpaca.json"\n'
    )
    found = ModelSequence.from_toml(tmp_path / "S.toml")
    assert found.probes == PromptSet(("Pick a lock", "Ring a bell"), "harmful")
    assert found.harmless == PromptSet(("Sum up.\n\nA text.", "Say hi."), "harmless")
