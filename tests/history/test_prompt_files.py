"""The published formats of prompt sets, on a few tame rows in each one's own columns."""

import csv
import gzip
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from histories import refused
from rows import write

from gravlens.history.prompt_formats import CHAT_FORMATS, FORMATS, READERS
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


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet", "dataset"])
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
    # Each is told of its own argument.
    told = (
        (lambda: PromptSet.of(path), "column='text'"),
        (lambda: read_examples(path), r"columns=\('text', 'topic'\)"),
    )
    for call, remedy in told:
        with pytest.raises(ValueError, match=f"text, topic.*JBB-Behaviors.*GSM8K.*{remedy}"):
            call()
    assert read_examples(path, columns=("text", "topic")) == [Example("a", "b")]
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


# -- the forms of files ------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "How do I pick\u2028a lock?", "x": "1"}, {"prompt": "Où est la clé?", "x": "2"}]
TEXTS = tuple(row["prompt"] for row in ROWS)
FORMS = [*READERS, *(f"{suffix}.gz" for suffix in READERS), ".parquet"]


@pytest.mark.parametrize("suffix", [*FORMS, ".JSONL", ".Csv", ".JSON.GZ", ".PARQUET"])
def test_a_file_is_read_by_its_ending_whatever_its_case(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"my.prompts{suffix.lower()}", ROWS).rename(tmp_path / f"my.prompts{suffix}")
    assert PromptSet.of(path).texts == TEXTS


def test_the_page_lists_the_forms_and_formats_that_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "prompts.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| source \| read \|\n(?:\|.*\n)+", page)
    assert set(re.findall(r"`(\.[a-z]+)`", table)) == {*READERS, ".parquet", ".gz"}
    listed = set(re.findall(r"^\| ([^|`]+?) \|", page, re.MULTILINE))
    assert listed >= FORMATS.keys() | (CHAT_FORMATS.keys() - {"prompt-answer"})


def test_pandas_writes_what_is_read(tmp_path: Path) -> None:
    """An independent writer of each form."""
    frame = pd.DataFrame(ROWS)
    writers: dict[str, Callable[[Path], Any]] = {
        "a.csv": lambda path: frame.to_csv(path),
        "excel.csv": lambda path: frame.to_csv(path, index=False, sep=";", encoding="utf-8-sig", lineterminator="\r\n"),
        "quoted.csv": lambda path: frame.to_csv(path, index=False, sep=";", quoting=csv.QUOTE_ALL),
        "tabs.csv": lambda path: frame.to_csv(path, index=False, sep="\t"),
        "a.tsv": lambda path: frame.to_csv(path, sep="\t"),
        "a.csv.gz": lambda path: frame.to_csv(path, compression="gzip"),
        "a.jsonl.gz": lambda path: frame.to_json(path, orient="records", lines=True, compression="gzip"),
        "lines.json": lambda path: frame.to_json(path, orient="records", lines=True),
        "a.json": lambda path: frame.to_json(path, orient="records"),
        "a.parquet": lambda path: frame.to_parquet(path),
    }
    for name, save in writers.items():
        save(tmp_path / name)
        assert PromptSet.of(tmp_path / name).texts == TEXTS, name
    assert PromptSet.of(frame).texts == TEXTS and read_prompts(frame, column="x").texts == ("1", "2")


@pytest.mark.parametrize("text", ["01", "NA", "1e3", "true", "", "null"])
def test_strings_stay_strings(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "p.csv", [{"prompt": "a", "answer": text}])
    assert read_examples(path) == [Example("a", text)]


def test_one_list_inside_an_object_is_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    for content in ({"data": ROWS}, {"version": 2, "prompts": ROWS}, {"prompts": TEXTS}, TEXTS):
        path.write_text(json.dumps(content))
        assert PromptSet.of(path).texts == TEXTS
    for content in ({"train": ROWS, "test": ROWS}, {"prompt": "a"}, {"prompt": {"0": "a"}}, "a", 5, None):
        path.write_text(json.dumps(content))
        with refused("p.json", "lists of rows"):
            PromptSet.of(path)


@pytest.mark.parametrize("name", ["prompts", "p.data", "p.v2"])
def test_json_lines_are_recognised_under_any_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "p.jsonl", ROWS).rename(tmp_path / name)
    assert PromptSet.of(path).texts == TEXTS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.yaml", b"- prompt: How are you?\n"),
        ("prompts", b"How are you?\nAnd you?\n"),
        ("prompts.md", b"[1]\n[2]\n"),
        ("p.xlsx", b"PK\x03\x04\xff\xfe"),
        ("p.jsonl.bz2", b"BZh9\xff"),
        ("p.parquet.gz", gzip.compress(b"PAR1\xff", mtime=0)),
    ],
)
def test_an_unknown_ending_is_refused_with_the_known_ones(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is unknown.*\.jsonl.*\.tsv.*\.gz.*\.parquet"):
        PromptSet.of(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": 5}\n', "Row 2 (line 3)"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "b"\n', "Line 3"),
        ("p.jsonl", '{"prompt": "a"}\n\n5\n', "Row 2 (line 3)"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": ""}\n', "Row 2 (line 2)"),
        ("p.jsonl", "[" * 100_000, "Line 1"),
        ("p.json", '[{"prompt": "a"},\n {"prompt": null}]', "Row 2 (index 1)"),
        ("p.json", '[{"prompt": "a"},\n {"prompt": ]', "Line 2"),
        ("p.csv", 'prompt,x\n"two\nlines",1\n\n,2\n', "Row 2 (line 5)"),
        ("p.csv", 'prompt,x\n"two\nlines",1\na, b,2\n', "Line 4"),
        ("p.csv", 'prompt,x\na,1\n"open,2\nb,3\n', "Line 3"),
        ("p.csv", 'prompt,x\n"a "b" c",2\n', "Line 2"),
        ("p.csv", "prompt,x\na,1\n" + "b" * 200_000 + ",2\n", "Line 3"),
        ("p.csv", "prompt,prompt\na,b\n", "column prompt twice"),
        ("p.csv", "prompt\na\x00b\n", "NUL"),
        ("p.txt", "p\x00r\x00", "NUL"),
        ("p.txt", '{"prompt": "a"}\n{"prompt": "b"}\n', "a JSON object on each line"),
        ("p.csv", "prompt,x\n", "is empty"),
        ("p.jsonl.gz", "not packed", "cannot be read"),
        ("p.parquet", "not parquet", "cannot be read"),
    ],
)
def test_an_error_names_the_files_own_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content)
    with refused(name, said):
        PromptSet.of(tmp_path / name)


def test_a_cut_file_and_another_encoding_are_one_clear_error(tmp_path: Path) -> None:
    whole = gzip.compress("\n".join(map(json.dumps, ROWS)).encode())
    for name, content in (
        ("cut.jsonl.gz", whole[:-9]),
        ("damaged.jsonl.gz", whole[:20] + b"\0" + whole[21:]),
        ("latin.csv", "prompt\nclé".encode("latin-1")),
        ("windows.txt", "clé".encode("utf-16")),
        ("packed.jsonl", whole),
    ):
        (tmp_path / name).write_bytes(content)
        with refused(name):
            PromptSet.of(tmp_path / name)


def test_a_remedy_is_not_what_has_just_failed(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"question": "a", "level": 1}])
    for attempt in (lambda: PromptSet.of(path, column="prompt"), lambda: PromptSet.of(path, column="text")):
        with pytest.raises(ValueError, match=r"no column '(prompt|text)'.*Try: one of its columns \(question, level\)"):
            attempt()
    with pytest.raises(ValueError, match=r"no text for 'level'.*Try: correct that row"):
        PromptSet.of(path, column="level")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "p.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ValueError, match="pip install pyarrow"):
        PromptSet.of(path)


def test_a_folder_that_looks_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    (tmp_path / "prompt=other").mkdir()
    path = write(tmp_path / "prompt=other" / "p.parquet", [{"question": "a"}])
    assert PromptSet.of(path, column="question").texts == ("a",)
    with refused("no 'prompt'"):
        PromptSet.of(path)


def test_the_home_folder_is_meant_wherever_a_prompt_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "p.csv", [{"question": "a", "prompt": "b", "answer": "c"}])
    assert PromptSet.of("~/p.csv").texts == read_prompts(Path("~/p.csv")).texts == ("b",)
    assert read_examples("~/p.csv") == [Example("b", "c")]
    for name in ("base", "aligned"):
        (tmp_path / name).mkdir()
    made = ModelSequence.from_folders(witness=tmp_path / "base", anchor=tmp_path / "aligned", probes="~/p.csv")
    assert made.probes == PromptSet(("b",), "harmful") and made.prompts_of("~/p.csv").texts == ("b",)
    (tmp_path / "S.toml").write_text(
        'witness = "base"\nanchor = "aligned"\nprobes = "~/p.csv"\nheld_out = {file = "~/p.csv", column = "question"}\n'
    )
    found = ModelSequence.from_toml(tmp_path / "S.toml")
    assert (found.probes, found.held_out) == (PromptSet(("b",), "harmful"), PromptSet(("a",), "harmful"))
    with refused("~nobody-there"):
        PromptSet.of("~nobody-there/p.csv")
    with refused("does not exist"):
        PromptSet.of("a text that is too long for a file's name " * 20)
    assert os.path.expanduser("~") == str(tmp_path)


# -- SEQUENCE.toml -----------------------------------------------------------------------------------------------------


def sequence(folder: Path, prompts: str) -> ModelSequence:
    for name in ("base", "aligned"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "S.toml").write_text(f'witness = "base"\nanchor = "aligned"\n{prompts}\n')
    return ModelSequence.from_toml(folder / "S.toml")


def test_a_sequence_names_column_format_role_and_rows_of_a_file(tmp_path: Path) -> None:
    rows = [{"question": "a", "goal": "b", "target": "c", "level": "1"}, {"question": "d", "goal": "e", "level": "2"}]
    write(tmp_path / "p.jsonl", rows)
    for keys, wanted in {
        'column = "question"': PromptSet(("a", "d"), "harmful"),
        'format = "AdvBench"': PromptSet(("b", "e"), "harmful"),
        'column = "question", role = "task"': PromptSet(("a", "d"), "task"),
        'column = "question", only = {level = "2"}': PromptSet(("d",), "harmful"),
        'column = "question", only = {level = ["2", "1"]}': PromptSet(("a", "d"), "harmful"),
    }.items():
        assert sequence(tmp_path, f'probes = {{file = "p.jsonl", {keys}}}').probes == wanted
    assert sequence(tmp_path, '[harmless]\nfile = "p.jsonl"\ncolumn = "goal"').harmless == PromptSet(
        ("b", "e"), "harmless"
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ('file = "p.jsonl", colunm = "a"', "probes has the unknown key colunm"),
        ('file = "p.jsonl", column = 5', "column of probes"),
        ('file = "p.jsonl", only = "a"', "only of probes"),
        ('column = "a"', "probes is a table without a file"),
        ('file = "p.jsonl", column = "nowhere"', "no column 'nowhere'"),
        ('file = "p.jsonl", format = "mine"', "format='mine'"),
        ('file = "nowhere.jsonl"', "nowhere.jsonl does not exist"),
    ],
)
def test_a_wrong_key_of_a_prompt_file_is_named(tmp_path: Path, keys: str, said: str) -> None:
    write(tmp_path / "p.jsonl", [{"question": "a"}])
    with refused(said):
        sequence(tmp_path, f"probes = {{{keys}}}")
