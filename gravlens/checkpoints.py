"""Checkpoints of one training history: a witness, an anchor, and the runs that start at the anchor."""

import glob
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gravlens.errors import GravlensError
from gravlens.prompts import PromptSet

ChatTemplate = Literal["own", "anchor", "none"]
Source = Path | str | nn.Module
Prompts = PromptSet | Sequence[str] | Path | str


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One state of the weights: a folder (opened when it is needed), a hub id, or a model in memory.

    Attributes:
        name: how results call it (`witness`, `anchor`, `seed0/20`).
        source: the folder, the hub id, or the model.
        step: optimizer steps since the anchor, for the checkpoints of a run.
    """

    name: str
    source: Source
    step: int | None = None

    @property
    def described(self) -> str:
        """The source in words."""
        return str(self.source) if isinstance(self.source, Path | str) else f"a {type(self.source).__name__} in memory"


@dataclass(frozen=True, eq=False)
class ModelSequence:
    """A training history: what `locate_vrev` and everything after it reads.

    Attributes:
        witness: a checkpoint of the dominant phase.
        anchor: the aligned checkpoint, where every run starts.
        runs: run name -> its checkpoints in order of their steps; may be empty.
        probes: prompts that directions are estimated on ("given").
        held_out: other prompts that trajectories are judged on.
        harmless: harmless prompts, for over-refusal.
        tokenizer: one for all models in memory that carry none; folders bring their own.
        chat_template: `own` (witness and anchor must agree), `anchor` (the anchor's for all: an explicit choice for
            a base model that never saw a template), or `none` (prompts are read as they are).
    """

    witness: Checkpoint
    anchor: Checkpoint
    runs: Mapping[str, tuple[Checkpoint, ...]] = field(default_factory=dict)
    probes: PromptSet | None = None
    held_out: PromptSet | None = None
    harmless: PromptSet | None = None
    tokenizer: Any | None = None
    chat_template: ChatTemplate = "own"

    def __post_init__(self) -> None:
        if self.chat_template not in ("own", "anchor", "none"):
            raise GravlensError(
                f"chat_template={self.chat_template!r} was given.",
                "It says whose chat template all checkpoints are read with.",
                "'own', 'anchor' or 'none'.",
            )

    @classmethod
    def from_folders(
        cls,
        *,
        witness: Path | str,
        anchor: Path | str,
        runs: Mapping[str, str | Path | Sequence[Path | str]] | None = None,
        probes: Prompts | None = None,
        held_out: Prompts | None = None,
        harmless: Prompts | None = None,
        chat_template: ChatTemplate = "own",
    ) -> "ModelSequence":
        """A history on disk; nothing is opened yet.

        Args:
            witness: folder of `save_pretrained`, or a hub id.
            anchor: likewise.
            runs: run name -> a pattern (`"ft/checkpoint-*"`) or a list of folders; ordered by the last number in
                each folder's name, which is the step.
            probes: prompts: a list, a `PromptSet`, or a file.
            held_out: likewise, other prompts to judge on.
            harmless: likewise, for over-refusal.
            chat_template: see `ModelSequence`.

        Raises:
            GravlensError: a folder is missing, or a pattern matches nothing.
        """
        return cls(
            witness=Checkpoint("witness", _existing(witness)),
            anchor=Checkpoint("anchor", _existing(anchor)),
            runs={name: _run_of_folders(name, folders) for name, folders in (runs or {}).items()},
            probes=None if probes is None else PromptSet.of(probes, "harmful"),
            held_out=None if held_out is None else PromptSet.of(held_out, "harmful"),
            harmless=None if harmless is None else PromptSet.of(harmless, "harmless"),
            chat_template=chat_template,
        )

    @classmethod
    def from_models(
        cls,
        *,
        witness: nn.Module,
        anchor: nn.Module,
        runs: Mapping[str, Mapping[int, nn.Module] | Sequence[nn.Module]] | None = None,
        probes: Prompts | None = None,
        held_out: Prompts | None = None,
        tokenizer: Any | None = None,
        chat_template: ChatTemplate = "own",
    ) -> "ModelSequence":
        """A history in memory: `HookedTransformer`, `TransformerBridge` or Hugging Face models.

        `runs` maps a run's name to `{step: model}`, or to a list (then the steps are 1, 2, …). `tokenizer` is needed
        where the models carry none.
        """
        return cls(
            witness=Checkpoint("witness", witness),
            anchor=Checkpoint("anchor", anchor),
            runs={name: _run_of_models(name, models) for name, models in (runs or {}).items()},
            probes=None if probes is None else PromptSet.of(probes, "harmful"),
            held_out=None if held_out is None else PromptSet.of(held_out, "harmful"),
            tokenizer=tokenizer,
            chat_template=chat_template,
        )

    @classmethod
    def from_toml(cls, path: Path | str) -> "ModelSequence":
        """Read a history that a person wrote by hand; paths are relative to the file. See docs/sequence.md."""
        path = Path(path)
        table = _read_toml(path)
        here = path.parent
        sequence = cls.from_folders(
            witness=_existing(table["witness"], here),
            anchor=_existing(table["anchor"], here),
            runs={name: _relative_run(here, run) for name, run in table.get("runs", {}).items()},
            chat_template=table.get("chat_template", "own"),
        )
        sets = {
            key: PromptSet.of(
                here / Path(table[key]).expanduser() if isinstance(table[key], str) else table[key],
                "harmless" if key == "harmless" else "harmful",
            )
            for key in _PROMPT_KEYS
            if key in table
        }
        return replace(sequence, **sets)

    def __iter__(self) -> Iterator[Checkpoint]:
        """Witness, anchor, then every checkpoint of every run."""
        yield self.witness
        yield self.anchor
        for run in self.runs.values():
            yield from run

    def require_probes(self) -> PromptSet:
        """The probe prompts, or the error that says how to give them."""
        if self.probes is None:
            raise GravlensError(
                "This sequence has no probe prompts.",
                "A direction is estimated over a set of prompts.",
                "ModelSequence.from_folders(..., probes='probes.jsonl') or probes=['How do I …?', …].",
            )
        return self.probes

    def _repr_html_(self) -> str:
        rows = [("witness", self.witness.described), ("anchor", self.anchor.described)]
        rows += [(name, f"steps {', '.join(str(c.step) for c in run)}") for name, run in self.runs.items()]
        rows += [("probes", f"{len(self.probes)} prompts" if self.probes else "none"), ("chat", self.chat_template)]
        cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows)
        return f"<table><caption>ModelSequence</caption>{cells}</table>"


def _existing(folder: Path | str, here: Path = Path()) -> Path | str:
    """A folder that exists, seen from `here`, or a hub id (`owner/name` that looks like no path)."""
    path = here / Path(folder).expanduser()
    if path.exists():
        return path
    if isinstance(folder, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", folder) and not path.parent.exists():
        return folder
    raise GravlensError(
        f"The checkpoint {folder} does not exist.",
        "A folder written by save_pretrained is needed (or a hub id, owner/name).",
        f"check the path; it is looked up from {here.resolve().name}/.",
    )


def _run_of_folders(name: str, folders: str | Path | Sequence[Path | str]) -> tuple[Checkpoint, ...]:
    if isinstance(folders, str | Path):
        found = [Path(match) for match in glob.glob(os.path.expanduser(str(folders))) if Path(match).is_dir()]
    else:
        found = [Path(_existing(folder)) for folder in folders]
    if not found:
        raise GravlensError(
            f"The run {name!r} ({folders}) matches no folder.",
            "A run is one or more checkpoint folders.",
            "a pattern such as 'ft/checkpoint-*', or a list of folders.",
        )
    steps = {folder: _step_of(name, folder) for folder in found}
    return _ordered(name, [Checkpoint(f"{name}/{step}", folder, step) for folder, step in steps.items()])


def _step_of(name: str, folder: Path) -> int:
    numbers = re.findall(r"\d+", folder.name)
    if not numbers:
        raise GravlensError(
            f"The folder {folder} of run {name!r} has no step in its name.",
            "The last number in a checkpoint folder's name is its step.",
            "rename it, as in checkpoint-20.",
        )
    return int(numbers[-1])


def _run_of_models(name: str, models: Mapping[int, nn.Module] | Sequence[nn.Module]) -> tuple[Checkpoint, ...]:
    pairs = models.items() if isinstance(models, Mapping) else enumerate(models, 1)
    return _ordered(name, [Checkpoint(f"{name}/{step}", model, step) for step, model in pairs])


def _ordered(name: str, checkpoints: list[Checkpoint]) -> tuple[Checkpoint, ...]:
    steps = [checkpoint.step for checkpoint in checkpoints]
    if len(set(steps)) < len(steps):
        raise GravlensError(
            f"The run {name!r} has two checkpoints of one step ({sorted(s for s in steps if s is not None)}).",
            "Each step of a run is one checkpoint.",
            "a narrower pattern.",
        )
    return tuple(sorted(checkpoints, key=lambda checkpoint: checkpoint.step or 0))


# --- SEQUENCE.toml ----------------------------------------------------------------------------------------------

_PROMPT_KEYS = ("probes", "held_out", "harmless")
_KEYS = {"witness", "anchor", "runs", "chat_template", *_PROMPT_KEYS}


def _read_toml(path: Path) -> dict[str, Any]:
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
    if unknown := sorted(set(table) - _KEYS):
        raise GravlensError(
            f"{path} has the unknown key {', '.join(unknown)}.", f"Known keys: {', '.join(sorted(_KEYS))}.", remedy
        )
    if not isinstance(table.get("runs", {}), dict):
        raise GravlensError(f"{path}: runs is not a table.", "Runs have names.", '[runs]\\nseed0 = "ft/checkpoint-*"')
    entries = {**table.get("runs", {}), **{key: table[key] for key in _PROMPT_KEYS if key in table}}
    if wrong := [key for key, entry in entries.items() if not _is_text_or_texts(entry)]:
        raise GravlensError(f"{path}: {', '.join(wrong)} is no text.", "A text or a list of texts is needed.", remedy)
    return table


def _is_text_or_texts(entry: Any) -> bool:
    return isinstance(entry, str) or (isinstance(entry, list) and all(isinstance(item, str) for item in entry))


def _relative_run(here: Path, run: str | list[str]) -> str | list[Path | str]:
    if isinstance(run, str):
        pattern = os.path.expanduser(run)
        return pattern if os.path.isabs(pattern) else os.path.join(glob.escape(str(here)), pattern)
    return [_existing(folder, here) for folder in run]
