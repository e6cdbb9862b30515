"""Read prompt files and datasets, and recognise the columns of published prompt sets; no prompt is shipped."""

import csv
import gzip
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from pandas import DataFrame

from gravlens.core.errors import GravlensError, at_home, reading, wrong_kind

Only = Mapping[str, str | Sequence[str]]
Said = tuple[str, str]  # a turn: its role (system, user or assistant) and its text
Placed = tuple[str, Any]  # where a row stands in its source, and the row


class Row(dict[str, Any]):
    """A row by its columns; `where` is its place in the source, as in "Row 2 (line 3)"."""

    def __init__(self, cells: Mapping[str, Any], where: str) -> None:
        super().__init__(cells)
        self.where = where


@dataclass(frozen=True)
class PromptFormat:
    """The columns of one published set.

    Attributes:
        columns: columns that identify it; a file may have more.
        prompt: column of the prompts: texts, or lists of turns.
        answer: column of the answers, if it has one; the same as `prompt` where answers end the conversations.
        role: `harmful`, `harmless` or `task`; "" if the file does not say.
        labels: value of the column `label` -> role, if it differs between rows.
        context: a column that is part of the prompt and may be empty.
        joined: format string that joins prompt and context.
    """

    columns: tuple[str, ...]
    prompt: str
    answer: str = ""
    role: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    context: str = ""
    joined: str = "{prompt}\n\n{context}"


PLAIN = PromptFormat(("prompt",), "prompt", "answer")
# The first match wins. JBB-Behaviors and OR-Bench have a harmful and a harmless file of the same columns: no role.
FORMATS: dict[str, PromptFormat] = {
    "JBB-Behaviors": PromptFormat(("Index", "Goal", "Target", "Behavior", "Category"), "Goal", "Target"),
    "AdvBench": PromptFormat(("goal", "target"), "goal", "target", "harmful"),
    "HarmBench": PromptFormat(
        ("Behavior", "FunctionalCategory", "SemanticCategory", "BehaviorID"),
        "Behavior",
        role="harmful",
        context="ContextString",
        joined="{context}\n\n---\n\n{prompt}",  # HarmBench's own DirectRequest
    ),
    "StrongREJECT": PromptFormat(("category", "source", "forbidden_prompt"), "forbidden_prompt", role="harmful"),
    "Do-Not-Answer": PromptFormat(
        ("risk_area", "types_of_harm", "specific_harms", "question"), "question", role="harmful"
    ),
    "XSTest": PromptFormat(
        ("prompt", "type", "label", "focus"), "prompt", labels={"safe": "harmless", "unsafe": "harmful"}
    ),
    "OR-Bench": replace(PLAIN, columns=("prompt", "category")),
    "Alpaca": PromptFormat(("instruction", "input", "output"), "instruction", "output", "task", context="input"),
    "Dolly": PromptFormat(
        ("instruction", "context", "response", "category"), "instruction", "response", "task", context="context"
    ),
    "GSM8K": PromptFormat(("question", "answer"), "question", "answer", "task"),
}
# Chat data by its columns, as TRL and others take it. Of a preference pair the chosen answer is the answer.
CHAT_FORMATS: dict[str, PromptFormat] = {
    "prompt-answer": replace(PLAIN, columns=("prompt", "answer")),
    "prompt-completion": PromptFormat(("prompt", "completion"), "prompt", "completion"),
    "DPO": PromptFormat(("prompt", "chosen", "rejected"), "prompt", "chosen"),
    "messages": PromptFormat(("messages",), "messages", "messages"),
    "ShareGPT": PromptFormat(("conversations",), "conversations", "conversations"),
    "chosen-rejected": PromptFormat(("chosen", "rejected"), "chosen", "chosen"),
}
ROLES = {
    **{"system": "system", "developer": "system", "user": "user", "human": "user"},
    **{"assistant": "assistant", "gpt": "assistant", "model": "assistant"},
}
KEEPS_LISTS = "JSONL or parquet, which keep lists."
NOT_TEXT = ("tool_calls", "function_call", "reasoning_content", "thinking")  # a template would render them
LIST_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")


class Entry(NamedTuple):
    """A prompt, its role ("" if the file does not say), the row that holds it, and what belongs to it.

    Attributes:
        answer: "" if the row has none, or answers were not requested.
        system: the row's system prompt, or "".
        earlier: the turns between the system prompt and the prompt.
    """

    prompt: str
    role: str
    row: Row
    answer: str = ""
    system: str = ""
    earlier: tuple[Said, ...] = ()


def read_entries(
    source: Any, shape: PromptFormat | str | None = None, only: Only | None = None, *, answers: bool = False
) -> list[Entry]:
    """Read the prompts of a file, of one split of a `datasets.Dataset`, or of rows in memory, in order.

    Args:
        shape: a format or its name; default: recognised by the columns.
        only: column -> value or values of the rows to keep.
        answers: whether each row needs an answer.
    """
    rows = read_rows(source)
    shape = format_of(source, rows, shape, answers=answers)
    if answers and not shape.answer:
        given = f"{source_name(source)} has prompts and no answers (columns {', '.join(shape.columns)})."
        wanted = "An example is a prompt and an answer."
        raise GravlensError(given, wanted, "a file with columns 'prompt' and 'answer', or columns=(prompt, answer).")
    check_columns(source, rows, shape.prompt, *([shape.answer] if answers else []))
    return [_entry(source, row, shape, answers) for row in _kept(source, rows, only or {})]


def format_of(
    source: Any, rows: Sequence[Row], shape: PromptFormat | str | None = None, *, answers: bool = False
) -> PromptFormat:
    """Return the format that is given or named, or the one that the columns identify."""
    formats = {**FORMATS, **CHAT_FORMATS}
    known = f"The formats known by their columns are {', '.join(formats)}"
    if isinstance(shape, str):
        names = {name.casefold(): name for name in formats}
        if shape.casefold() not in names:
            raise GravlensError(f"format={shape!r} was given.", f"{known}.", "one of these names.")
        return formats[names[shape.casefold()]]
    if shape is not None:
        return shape
    columns = _columns(rows)
    found = [one for one in formats.values() if set(one.columns) <= set(columns)]
    if "prompt" in columns:  # a user's own file: other columns may equal those of a published set by chance
        own = [one for one in found if one.prompt == "prompt" and (one.answer or "prompt") in columns]
        whole = [one for one in found if answers and one.prompt == one.answer]
        return [*own, *whole, PLAIN][0]
    if found:
        return found[0]
    if {"role", "content"} <= set(columns) or {"from", "value"} <= set(columns):
        given = f"{source_name(source)} is a list of turns (columns {_list(columns)})."
        raise GravlensError(given, "Prompts are a list of conversations.", "[turns], or one conversation a line.")
    given = f"{source_name(source)} has the columns {_list(columns)}: no 'prompt', and no known format."
    first, last = (columns or ["question"])[0], (columns or ["answer"])[-1]
    named = f"columns=({first!r}, {last!r}) if they hold prompts and answers, or a column 'answer' beside 'prompt'."
    remedy = named if answers else f"column={first!r} if it holds the prompts, or rename it to 'prompt'."
    wanted = f"{known}; any other file has a column 'prompt' (the first row of a table names the columns)."
    raise GravlensError(given, wanted, remedy)


def check_columns(source: Any, rows: Sequence[Row], *keys: str) -> None:
    """Raise unless some row has each of the columns."""
    if missing := [key for key in keys if not any(key in row for row in rows)]:
        columns = _columns(rows)
        given = f"{source_name(source)} has no column {' and no '.join(map(repr, missing))}"
        wanted = f"Each row needs {' and '.join(map(repr, keys))}."
        remedy = f"one of its columns ({_list(columns)}), or another file."
        raise GravlensError(f"{given}; its columns are {_list(columns)}.", wanted, remedy)


def check_rows(source: Any, rows: list[Row], *keys: str) -> list[Row]:
    """Return the rows; raise unless each has a string for each key."""
    check_columns(source, rows, *keys)
    for row in rows:
        if not all(isinstance(row.get(key), str) for key in keys):
            raise _no_text(source, row, *keys)
    return rows


def _no_text(source: Any, row: Row, *keys: str) -> GravlensError:
    needed = " and ".join(map(repr, keys))
    found = f"has no text for {needed}; its columns are {_list(_columns([row]))}"
    return _wrong_row(source, row, found, f"Each row needs {needed} as text.")


def _wrong_row(source: Any, row: Row, found: str, wanted: str, remedy: str = "") -> GravlensError:
    remedy = remedy or "correct that row, or leave it out."
    return GravlensError(f"{row.where} of {source_name(source)} {found}.", wanted, remedy)


def _entry(source: Any, row: Row, shape: PromptFormat, answers: bool) -> Entry:
    turns = _turns(source, row, shape.prompt, "user")
    if isinstance(row[shape.prompt], str):
        if shape.prompt == shape.answer:
            found, wanted = f"has text in {shape.prompt!r}", "A conversation is a list of turns with role and content."
            raise _wrong_row(source, row, found, wanted, KEEPS_LISTS)
        turns = [("user", _with_context(row, shape))]
    if answers and shape.prompt != shape.answer:
        turns = _answered(source, row, shape, turns)
    *before, (_, answer) = turns if turns[-1][0] == "assistant" else [*turns, ("assistant", "")]
    # A missing value is None in a Dataset and "" in a CSV file; beside plain prompts it may be anything.
    system = (row.get("system") or "") if answers or not isinstance(row[shape.prompt], str) else ""
    if not isinstance(system, str):
        raise _wrong_row(source, row, f"has the system prompt {str(system)[:40]!r}", "It is a text.")
    earlier = before[:-1]
    if earlier and earlier[0][0] == "system":
        (_, system), *earlier = earlier
    if not before or before[-1][0] != "user" or not before[-1][1].strip():
        last = f"a turn of the {before[-1][0]}" if before and before[-1][0] != "user" else "a blank prompt"
        wanted = "The model answers a user's turn, which is not blank."
        raise _wrong_row(source, row, f"asks with {last}", wanted)
    return Entry(before[-1][1], _role(source, row, shape), row, answer, system, tuple(earlier))


def _answered(source: Any, row: Row, shape: PromptFormat, turns: list[Said]) -> list[Said]:
    """Return the turns with the one of the answer's column; that may repeat the prompt before it."""
    *repeated, last = _turns(source, row, shape.answer, "assistant")
    if last[0] == "assistant" and repeated == turns[len(turns) - len(repeated) :]:
        return [*turns, last]
    found = f"has another conversation in {shape.answer!r} than in {shape.prompt!r}"
    wanted = "The answer is a text, or a list of the assistant's turn."
    remedy = f"columns=({shape.answer!r}, {shape.answer!r}) to read that conversation."
    raise _wrong_row(source, row, found, wanted, remedy)


def _turns(source: Any, row: Row, key: str, role: str) -> list[Said]:
    """Return a list of turns; a text is one turn of this role."""
    cell = _plain(row.get(key))
    if isinstance(cell, str):
        if LIST_AS_TEXT.match(cell):
            found, wanted = f"has a list of turns as text in {key!r}", "A table of text has no lists."
            raise _wrong_row(source, row, found, wanted, KEEPS_LISTS)
        return [(role, cell)]
    # `datasets` gives a sequence of turns as lists by key.
    if isinstance(cell, Mapping) and all(isinstance(values, list) for values in cell.values()):
        cell = [dict(zip(cell, turn, strict=True)) for turn in zip_longest(*cell.values())]
    if not isinstance(cell, list) or not cell:
        raise _no_text(source, row, key)
    return [_turn(source, row, turn) for turn in cell]


def _turn(source: Any, row: Row, turn: Any) -> Said:
    cells = turn if isinstance(turn, Mapping) else {}
    said, text = str(cells.get("role") or cells.get("from")), cells.get("content")
    text = _plain(cells.get("value") if text is None else text)
    parts = text if isinstance(text, list) else [{"type": "text", "text": text}]
    kinds = [str(part.get("type")) if isinstance(part, Mapping) else type(part).__name__ for part in parts]
    others = [kind for kind in kinds if kind != "text"] + [key for key in NOT_TEXT if cells.get(key)]
    if not cells:
        found = f"{str(turn)[:40]!r} in place of a turn"
    elif others or said not in ROLES:
        found = f"a turn with {others[0]}" if others else f"a turn of the role {said!r}"
    elif all(isinstance(part.get("text"), str) for part in parts):
        return ROLES[said], "".join(part["text"] for part in parts)
    else:
        found = "a turn without text"
    wanted = f"A turn has text, and a role among {', '.join(ROLES)}."
    raise _wrong_row(source, row, f"has {found}", wanted)


def _plain(cell: Any) -> Any:
    return cell.tolist() if hasattr(cell, "tolist") else cell  # a list is an array in a DataFrame


def _with_context(row: Row, shape: PromptFormat) -> str:
    context = row.get(shape.context) if shape.context else ""  # pandas writes its index in a column named ""
    if not isinstance(context, str) or not context.strip():
        return row[shape.prompt]
    return shape.joined.format(prompt=row[shape.prompt], context=context)


def _role(source: Any, row: Row, shape: PromptFormat) -> str:
    if not shape.labels:
        return shape.role
    label = str(row.get("label"))
    if label not in shape.labels:
        given, wanted = f"has the label {label!r}", f"Labels are {_list([*shape.labels])}."
        raise _wrong_row(source, row, given, wanted)
    return shape.labels[label]


def _kept(source: Any, rows: list[Row], only: Only) -> list[Row]:
    columns = _columns(rows)
    for column, wanted in only.items():
        values = {wanted} if isinstance(wanted, str) else set(wanted)
        found = {str(row.get(column)) for row in rows}
        rows = [row for row in rows if str(row.get(column)) in values]
        if not rows:
            given = f"{source_name(source)} has no row where {column} is {_list(sorted(values))}."
            held = f"Its columns are {_list(columns)}; {column} is {_list(sorted(found)[:8])}."
            raise GravlensError(given, held, "only={column: value} with these.")
    return rows


def is_table(source: Any) -> bool:
    """Whether this is a `datasets.Dataset`, a DataFrame, or rows and conversations in memory."""
    # isinstance would need the package `datasets`, an extra
    return hasattr(source, "column_names") or isinstance(source, DataFrame) or _in_memory(source)


def _in_memory(source: Any) -> bool:
    return isinstance(source, list) and bool(source) and all(isinstance(one, Mapping | list) for one in source)


def read_rows(source: Any, *keys: str) -> list[Row]:
    """Read the rows of a file, a `Dataset` or a list; raise as `check_rows` for the given keys."""
    rows: list[Row] = []
    for number, (place, cells) in enumerate(_rows_of_table(source) if is_table(source) else _rows_of_file(source), 1):
        where, cells = f"Row {number} ({place})", {"messages": cells} if isinstance(cells, list) else cells
        if not isinstance(cells, Mapping):
            given, remedy = f"{where} of {source_name(source)} is {str(cells)[:40]!r}.", '{"prompt": "How do I …?"}.'
            raise GravlensError(given, "A row is an object with named columns.", remedy)
        rows.append(Row(cells, where))
    if not rows:
        raise GravlensError(f"{source_name(source)} is empty.", "At least one row is needed.", "another file.")
    return check_rows(source, rows, *keys)


def _rows_of_table(table: Any) -> list[Placed]:
    if isinstance(getattr(table, "column_names", None), dict):  # a DatasetDict has them by split
        splits = list(table.column_names)
        given = f"A {type(table).__name__} with the splits {_list(splits)} was given."
        raise GravlensError(given, "One split is read.", f"dataset[{splits[0]!r}].")
    return _indexed(table.to_dict("records") if isinstance(table, DataFrame) else table)


def _indexed(rows: Iterable[Any]) -> list[Placed]:
    return [(f"index {index}", row) for index, row in enumerate(rows)]


def _rows_of_file(source: Path | str) -> list[Placed]:
    if not isinstance(source, Path | str):
        remedy = "PromptSet.of([…]) or Contrast.of([…], […]) for texts."
        raise wrong_kind(source, "A file or a datasets.Dataset is read.", remedy)
    path = at_home(source)
    if not os.path.isfile(path):  # Path.is_file raises for a text that is too long for a name
        found = "is a folder" if os.path.isdir(path) else "does not exist"
        remedy = "check the path, or [prompt], a list, for the text of one prompt."
        raise GravlensError(f"The prompt file {path} {found}.", "A file is needed.", remedy)
    name = path.name.lower()
    form = Path(name.removesuffix(".gz")).suffix
    if name.endswith(".parquet"):
        return _parquet(path)
    with reading(path, "A prompt file is needed.", "another file."):
        content = path.read_bytes()
        content = gzip.decompress(content) if name.endswith(".gz") else content
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if form not in READERS:
            raise _unknown_form(path) from error
        raise GravlensError(f"{path} is not UTF-8 text ({error}).", "Prompts are text.", "save it as UTF-8.") from error
    if "\0" in text:  # UTF-16 without its mark decodes as UTF-8
        raise GravlensError(f"{path} contains NUL characters.", "Prompts are text.", "save it as UTF-8.")
    return READERS.get(form, _recognised)(path, text.replace("\r\n", "\n").replace("\r", "\n"))


def _parquet(path: Path) -> list[Placed]:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        given, remedy = f"{path} is parquet, and pyarrow is not installed.", "pip install pyarrow, or a JSONL file."
        raise GravlensError(given, "Parquet is read with pyarrow.", remedy) from error
    with reading(path, "A parquet file is needed.", "write it again."):
        return _indexed(parquet.ParquetFile(path).read().to_pylist())  # read_table takes a/b=c/ for a column


def _json_lines(path: Path, text: str) -> list[Placed]:
    rows: list[Placed] = []
    for number, line in _filled_lines(text):
        try:
            rows.append((f"line {number}", json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise _not_json(path, number, error) from error
    return rows


def _json(path: Path, text: str) -> list[Placed]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if rows := _objects(text):  # JSON lines under this name
            return rows
        raise _not_json(path, getattr(error, "lineno", 1), error) from error
    lists = [content] if isinstance(content, list) else []
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value]
        if len(lists) == 1 and all(isinstance(one, dict) and {"role", "from"} & one.keys() for one in lists[0]):
            lists = [[content]]  # one conversation
    if len(lists) != 1:
        given = f"{path} holds a {type(content).__name__} with {len(lists)} lists of rows."
        wanted = "A .json file is one array of objects, or an object with one such array."
        raise GravlensError(given, wanted, "an array, or JSONL.")
    return _indexed({"prompt": row} if isinstance(row, str) else row for row in lists[0])


def _table(path: Path, text: str, delimiter: str = "") -> list[Placed]:
    if not delimiter:  # Excel writes semicolons where the comma is decimal
        names = re.sub('"[^"]*"', "", text.lstrip("\n").partition("\n")[0])
        delimiter = next((one for one in ",;\t" if one in names), ",")
    records = list(_records(path, text, delimiter))
    if not records:
        return []
    (_, header), *rows = records
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        given = f"{path} has the column {', '.join(twice)} twice."
        raise GravlensError(given, "Each column has its own name.", "rename one of them.")
    for line, cells in rows:
        if any(cells[len(header) :]):
            given = f"Line {line} of {path} has {len(cells)} cells, and the header {len(header)}."
            raise GravlensError(given, "Each row has a cell for each column.", "quote cells that contain commas.")
    return [(f"line {line}", dict(zip(header, cells, strict=False))) for line, cells in rows]


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the cells of each row, and the line on which it begins."""
    reader, line = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True), 1
    try:
        for cells in reader:
            if cells:
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        given = f"Line {line} of {path} cannot be read ({error})."
        wanted = "A cell with a separator, a quote or a line break is quoted, its quotes doubled."
        raise GravlensError(given, wanted, "correct that row, or save the table as JSONL.") from error


def _lines(path: Path, text: str) -> list[Placed]:
    if _objects(text):
        given = f"{path} holds a JSON object on each line."
        remedy = f"rename it to {path.stem.removesuffix('.jsonl')}.jsonl."
        raise GravlensError(given, "A .txt file is a prompt a line.", remedy)
    return [(f"line {number}", {"prompt": line}) for number, line in _filled_lines(text)]


def _recognised(path: Path, text: str) -> list[Placed]:
    """Return JSON lines under any name; nothing else is certain."""
    if rows := _objects(text):
        return rows
    raise _unknown_form(path)


def _objects(text: str) -> list[Placed]:
    """Return the rows if every line is a JSON object."""
    try:
        rows = [(f"line {number}", json.loads(line)) for number, line in _filled_lines(text)]
    except (ValueError, RecursionError):
        return []
    return rows if all(isinstance(row, dict) for _, row in rows) else []


def _filled_lines(text: str) -> Iterator[tuple[int, str]]:
    # splitlines would cut at a U+2028 within a prompt
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _unknown_form(path: Path) -> GravlensError:
    given = f"The form of {path} is unknown."
    wanted = f"A prompt file is {', '.join(READERS)} (each also as .gz) or .parquet."
    return GravlensError(given, wanted, "save it as one of these, under its name.")


def _not_json(path: Path, line: int, error: Exception) -> GravlensError:
    where = f", column {column}" if (column := getattr(error, "colno", 0)) else ""
    given = f"Line {line} of {path} is not JSON ({getattr(error, 'msg', error)}{where})."
    return GravlensError(given, "JSONL has one object a line, JSON one array.", "correct that line.")


READERS: dict[str, Callable[[Path, str], list[Placed]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".jsonlines": _json_lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": partial(_table, delimiter="\t"),
    ".txt": _lines,
}


def _columns(rows: Sequence[Row]) -> list[str]:
    return [str(column) for column in rows[0]] if rows else []


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(str, names)) or "none"


def source_name(source: Any) -> str:
    """Return a file's path, or words for a dataset, for messages."""
    return f"This {type(source).__name__}" if is_table(source) else str(source)
