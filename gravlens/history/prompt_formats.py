"""Rows of prompt files and datasets, and the columns of published prompt sets; no prompt is shipped."""

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
        columns: what it is recognised by; a file may have more.
        prompt: the prompts' column.
        answer: the answers' column, where there is one.
        role: `harmful`, `harmless` or `task`; "" where the file does not say.
        labels: value of the column `label` -> role, where it differs from row to row.
        context: a column that is part of the prompt and may be empty.
        joined: how prompt and context are put together.
    """

    columns: tuple[str, ...]
    prompt: str
    answer: str = ""
    role: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    context: str = ""
    joined: str = "{prompt}\n\n{context}"


PLAIN = PromptFormat(("prompt",), "prompt", "answer")
# The first whose columns are all there is taken.
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
    """What a row says: its prompt, its role ("" where the file does not say), and the row itself."""

    prompt: str
    role: str
    row: Row


def read_entries(source: Any, shape: PromptFormat | str | None = None, only: Only | None = None) -> list[Entry]:
    """The prompts of a file or a `datasets.Dataset`, in their order.

    Args:
        source: a path, or a `Dataset` (one split).
        shape: a format or its name; default: recognised by the columns.
        only: column -> the value, or the values, of the rows to keep.

    Raises:
        GravlensError: no such file, unknown columns, or a row without its prompt.
    """
    rows = read_rows(source)
    shape = format_of(source, rows, shape)
    rows = _kept(source, check_rows(source, rows, shape.prompt), only or {})
    return [Entry(_prompt(row, shape), _role(source, row, shape), row) for row in rows]


def format_of(source: Any, rows: Sequence[Row], shape: PromptFormat | str | None = None) -> PromptFormat:
    """The format of rows: the one that is given or named, or the one whose columns they have."""
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
    if "prompt" in columns:
        return next((one for one in found if one.prompt == "prompt"), PLAIN)
    if not found:
        raise GravlensError(
            f"{source_name(source)} has the columns {_list(columns)}: no 'prompt', and those of no known format.",
            f"{known}; any other file has a column 'prompt'.",
            f"column={(columns or ['question'])[0]!r} for the prompts' column, or rename it to 'prompt'.",
        )
    return found[0]


def check_rows(source: Any, rows: list[Row], *keys: str) -> list[Row]:
    """The rows, each of which has a text under each key."""
    for number, row in enumerate(rows, 1):
        if not all(isinstance(row.get(key), str) for key in keys):
            there = _list(_columns([row]))
            raise GravlensError(
                f"Row {number} of {source_name(source)} lacks {' or '.join(map(repr, keys))}; its columns are {there}.",
                f"Each row needs {' and '.join(map(repr, keys))} as text.",
                "rename the column, or name the one that is there (column='question').",
            )
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
        raise GravlensError(
            f"{source_name(source)} has a row with the label {label!r}.",
            f"Labels are {_list([*shape.labels])}.",
            "mend it.",
        )
    return shape.labels[label]


def _kept(source: Any, rows: list[Row], only: Only) -> list[Row]:
    for column, wanted in only.items():
        values = {wanted} if isinstance(wanted, str) else set(wanted)
        found = {str(row.get(column)) for row in rows}
        rows = [row for row in rows if str(row.get(column)) in values]
        if not rows:
            raise GravlensError(
                f"{source_name(source)} has no row whose {column} is {_list(sorted(values))}.",
                f"Its columns are {_list(_columns(read_rows(source)))}; {column} is {_list(sorted(found)[:8])}.",
                "only={column: value} with these.",
            )
    return rows


# --- rows -------------------------------------------------------------------------------------------------------
def is_table(source: Any) -> bool:
    """Whether it is a `datasets.Dataset`, or looks like one; the package itself is not needed."""
    return hasattr(source, "column_names")


def read_rows(source: Any, *keys: str) -> list[Row]:
    """The rows of a `.jsonl`, `.csv`, `.json` or `.txt` file or of a `Dataset`, each held against the wanted keys."""
    rows = _rows_of_table(source) if is_table(source) else _rows_of_file(_path(source))
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise GravlensError(
                f"Row {number} of {source_name(source)} is {str(row)[:40]!r}.",
                "A row is an object with named columns.",
                'lines such as {"prompt": "How do I …?"}.',
            )
    if not rows:
        raise GravlensError(
            f"{source_name(source)} is empty.", "At least one row is needed.", "a file with prompts in it."
        )
    return check_rows(source, rows, *keys)


def _path(source: Path | str) -> Path:
    if isinstance(source, Path | str):
        return Path(source)
    raise wrong_kind(
        source, "A file or a datasets.Dataset is read.", "PromptSet.of([…]) or Contrast.of([…], […]) for texts."
    )


def _rows_of_table(table: Any) -> list[Row]:
    if isinstance(table.column_names, dict):
        splits = list(table.column_names)
        raise GravlensError(
            f"A {type(table).__name__} with the splits {_list(splits)} was given.",
            "One split is read.",
            f"dataset[{splits[0]!r}].",
        )
    return [dict(row) for row in table]


def _rows_of_file(path: Path) -> list[Row]:
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
            return _array(path, json.loads(text))
        if path.suffix == ".csv":
            return list(csv.DictReader(io.StringIO(text)))
        return [{"prompt": line} for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        raise GravlensError(f"{path} is no UTF-8 text ({error}).", "Prompts are text.", "save it as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise GravlensError(
            f"{path} has a line that is not JSON ({error}).",
            "JSONL has one object a line, JSON one array of objects.",
            "correct that line.",
        ) from error


def _array(path: Path, content: Any) -> list[Row]:
    if not isinstance(content, list):
        raise GravlensError(
            f"{path} holds a {type(content).__name__}.", "A .json file is one array of objects.", "JSONL, or an array."
        )
    return content


def _columns(rows: Sequence[Row]) -> list[str]:
    return [column for column in rows[0] if isinstance(column, str)] if rows else []


def _list(names: Sequence[str]) -> str:
    return ", ".join(map(str, names)) or "none"


def source_name(source: Any) -> str:
    """A file or dataset in words."""
    return f"This {type(source).__name__}" if is_table(source) else str(source)
