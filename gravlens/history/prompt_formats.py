"""Read prompt files and datasets, and recognise the columns of published prompt sets; no prompt is shipped."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from gravlens.core.errors import GravlensError, wrong_kind

Row = dict[str, Any]
Only = Mapping[str, str | Sequence[str]]


@dataclass(frozen=True)
class PromptFormat:
    """The columns of one published set.

    Attributes:
        columns: columns that identify it; a file may have more.
        prompt: column of the prompts.
        answer: column of the answers, if it has one.
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


class Entry(NamedTuple):
    """A prompt, its role ("" if the file does not say), and the row that holds it."""

    prompt: str
    role: str
    row: Row


def read_entries(source: Any, shape: PromptFormat | str | None = None, only: Only | None = None) -> list[Entry]:
    """Read the prompts of a file or of one split of a `datasets.Dataset`, in order.

    Args:
        shape: a format or its name; default: recognised by the columns.
        only: column -> value or values of the rows to keep.
    """
    rows = read_rows(source)
    shape = format_of(source, rows, shape)
    rows = _kept(source, check_rows(source, rows, shape.prompt), only or {})
    return [Entry(_prompt(row, shape), _role(source, row, shape), row) for row in rows]


def format_of(source: Any, rows: Sequence[Row], shape: PromptFormat | str | None = None) -> PromptFormat:
    """Return the format that is given or named, or the one that the columns identify."""
    known = f"The formats known by their columns are {', '.join(FORMATS)}"
    if isinstance(shape, str):
        names = {name.casefold(): name for name in FORMATS}
        if shape.casefold() not in names:
            raise GravlensError(f"format={shape!r} was given.", f"{known}.", "one of these names.")
        return FORMATS[names[shape.casefold()]]
    if shape is not None:
        return shape
    columns = _columns(rows)
    found = [one for one in FORMATS.values() if set(one.columns) <= set(columns)]
    if "prompt" in columns:  # a user's own file: other columns may equal those of a published set by chance
        return next((one for one in found if one.prompt == "prompt"), PLAIN)
    if not found:
        given = f"{source_name(source)} has the columns {_list(columns)}: no 'prompt', and no known format."
        remedy = f"column={(columns or ['question'])[0]!r} if it holds the prompts, or rename it to 'prompt'."
        raise GravlensError(given, f"{known}; any other file has a column 'prompt'.", remedy)
    return found[0]


def check_rows(source: Any, rows: list[Row], *keys: str) -> list[Row]:
    """Return the rows; raise unless each has a string for each key."""
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), str) for key in keys):
            needed, columns = " and ".join(map(repr, keys)), _list(_columns([row]))
            given = f"Row {number} of {source_name(source)} has no text for {needed}; its columns are {columns}."
            wanted = f"Each row needs {needed} as text."
            raise GravlensError(given, wanted, "rename the column, or name it (column='question').")
    return rows


def _prompt(row: Row, shape: PromptFormat) -> str:
    context = row.get(shape.context)
    if not isinstance(context, str) or not context.strip():
        return row[shape.prompt]
    return shape.joined.format(prompt=row[shape.prompt], context=context)


def _role(source: Any, row: Row, shape: PromptFormat) -> str:
    if not shape.labels:
        return shape.role
    label = str(row.get("label"))
    if label not in shape.labels:
        given, wanted = f"{source_name(source)} has the label {label!r}.", f"Labels are {_list([*shape.labels])}."
        raise GravlensError(given, wanted, "correct that row.")
    return shape.labels[label]


def _kept(source: Any, rows: list[Row], only: Only) -> list[Row]:
    for column, wanted in only.items():
        values = {wanted} if isinstance(wanted, str) else set(wanted)
        found = {str(row.get(column)) for row in rows}
        rows = [row for row in rows if str(row.get(column)) in values]
        if not rows:
            given = f"{source_name(source)} has no row where {column} is {_list(sorted(values))}."
            held = f"Its columns are {_list(_columns(read_rows(source)))}; {column} is {_list(sorted(found)[:8])}."
            raise GravlensError(given, held, "only={column: value} with these.")
    return rows


def is_table(source: Any) -> bool:
    """Whether this is a `datasets.Dataset` or similar."""
    return hasattr(source, "column_names")  # isinstance would need the package `datasets`, an extra


def read_rows(source: Any, *keys: str) -> list[Row]:
    """Read the rows of a file or a `Dataset`; raise as `check_rows` for the given keys."""
    rows = _rows_of_table(source) if is_table(source) else _rows_of_file(source)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            given, remedy = f"Row {number} of {source_name(source)} is {str(row)[:40]!r}.", '{"prompt": "How do I …?"}.'
            raise GravlensError(given, "A row is an object with named columns.", remedy)
    if not rows:
        raise GravlensError(f"{source_name(source)} is empty.", "At least one row is needed.", "another file.")
    return check_rows(source, rows, *keys)


def _rows_of_table(table: Any) -> list[Row]:
    if isinstance(table.column_names, dict):  # a DatasetDict has them by split
        splits = list(table.column_names)
        given = f"A {type(table).__name__} with the splits {_list(splits)} was given."
        raise GravlensError(given, "One split is read.", f"dataset[{splits[0]!r}].")
    return [dict(row) for row in table]


def _rows_of_file(source: Path | str) -> list[Row]:
    if not isinstance(source, Path | str):
        remedy = "PromptSet.of([…]) or Contrast.of([…], […]) for texts."
        raise wrong_kind(source, "A file or a datasets.Dataset is read.", remedy)
    path = Path(source)
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        remedy = "check the path, or [prompt], a list, for the text of one prompt."
        raise GravlensError(f"The prompt file {path} {found}.", "A file is needed.", remedy)
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
        lines = text.split("\n")  # splitlines would cut at a U+2028 within a prompt
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in lines if line.strip()]
        if path.suffix == ".json":
            if isinstance(content := json.loads(text), list):
                return content
            given, wanted = f"{path} holds a {type(content).__name__}.", "A .json file is one array of objects."
            raise GravlensError(given, wanted, "an array, or JSONL.")
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text)))  # not of `lines`: a quoted prompt may contain line breaks
        return [{"prompt": line} for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise GravlensError(f"{path} is not UTF-8 text ({error}).", "Prompts are text.", "save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        given, wanted = f"{path} has a line that is not JSON ({error}).", "JSONL has one object a line, JSON one array."
        raise GravlensError(given, wanted, "correct that line.") from error


def _columns(rows: Sequence[Row]) -> list[str]:
    # csv.DictReader collects surplus cells under the key None.
    return [column for column in rows[0] if isinstance(column, str)] if rows else []


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(str, names)) or "none"


def source_name(source: Any) -> str:
    """Return a file's path, or words for a dataset, for messages."""
    return f"This {type(source).__name__}" if is_table(source) else str(source)
