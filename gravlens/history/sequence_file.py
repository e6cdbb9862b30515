"""SEQUENCE.toml: what a person wrote by hand, held against what a history needs; paths are relative to the file."""

import glob
import os
import tomllib
from pathlib import Path
from typing import Any

from gravlens.core.errors import GravlensError
from gravlens.history.hub import existing, is_hub_id

PROMPT_KEYS = ("probes", "held_out", "harmless")
KEYS = {"witness", "anchor", "runs", "tokenizer", "chat_template", "system", *PROMPT_KEYS}
RUN_KEYS = {"folders", "missing"}


def read_sequence_file(path: Path) -> dict[str, Any]:
    """The keys of a sequence file, each path as seen from here; each run as a table of `folders` and `missing`.

    Raises:
        GravlensError: no readable TOML, no witness or anchor, a key or a kind of value that is unknown, no such folder.
    """
    table, here = _read(path), path.parent
    for key in {"witness", "anchor", "tokenizer"} & table.keys():
        table[key] = existing(table[key], here)
    for key in PROMPT_KEYS:
        if isinstance(table.get(key), str):
            table[key] = here / Path(table[key]).expanduser()
    runs = {name: run if isinstance(run, dict) else {"folders": run} for name, run in table.get("runs", {}).items()}
    return {**table, "runs": {name: {**run, "folders": _seen_from(here, run["folders"])} for name, run in runs.items()}}


def _read(path: Path) -> dict[str, Any]:
    remedy = 'witness = "base", anchor = "aligned", probes = "probes.jsonl" (see docs/sequence.md).'
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise GravlensError(f"{path} cannot be read ({error}).", "A TOML file is needed.", remedy) from error
    except tomllib.TOMLDecodeError as error:
        raise GravlensError(f"{path} is not valid TOML: {error}.", "A TOML file is needed.", remedy) from error
    missing = [key for key in ("witness", "anchor") if not isinstance(table.get(key), str) or not table[key]]
    if missing:
        raise GravlensError(f"{path} names no {' and no '.join(missing)}.", "Both are needed, as text.", remedy)
    if unknown := sorted(set(table) - KEYS):
        raise GravlensError(
            f"{path} has the unknown key {', '.join(unknown)}.", f"Known keys: {', '.join(sorted(KEYS))}.", remedy
        )
    if not isinstance(table.get("runs", {}), dict):
        raise GravlensError(f"{path}: runs is not a table.", "Runs have names.", '[runs]\\nseed0 = "ft/checkpoint-*"')
    runs = {name: run.get("folders") if _is_run(run) else run for name, run in table.get("runs", {}).items()}
    entries = {**runs, **{key: table[key] for key in PROMPT_KEYS if key in table}}
    wrong = [key for key, entry in entries.items() if not _is_text_or_texts(entry)]
    if wrong := wrong + ["tokenizer"] * (not isinstance(table.get("tokenizer", ""), str)):
        raise GravlensError(f"{path}: {', '.join(wrong)} is no text.", "A text or a list of texts is needed.", remedy)
    return table


def _is_run(entry: Any) -> bool:
    """A run that may have holes: `{folders = "ft/checkpoint-*", missing = "skip"}`."""
    return isinstance(entry, dict) and entry.keys() <= RUN_KEYS


def _is_text_or_texts(entry: Any) -> bool:
    return isinstance(entry, str) or (isinstance(entry, list) and all(isinstance(item, str) for item in entry))


def _seen_from(here: Path, folders: str | list[str]) -> str | list[Path | str]:
    """A pattern, or folders of a list (which may be missing) and hub ids."""
    if isinstance(folders, list):
        paths = {folder: here / Path(folder).expanduser() for folder in folders}
        return [f if is_hub_id(f) and not paths[f].parent.exists() else paths[f] for f in folders]
    pattern = os.path.expanduser(folders)
    return pattern if os.path.isabs(pattern) else os.path.join(glob.escape(str(here)), pattern)
