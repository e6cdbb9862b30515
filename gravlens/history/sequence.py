"""Checkpoints of one training history: a witness, an anchor, and the runs that start at the anchor."""

import glob
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gravlens.core import display as html
from gravlens.core.errors import GravlensError, as_list, wrong_kind
from gravlens.history.hub import existing, is_hub_id, repository_of, revision_of
from gravlens.history.prompts import PromptSet, check_system
from gravlens.history.weight_files import trained_steps, weight_files

PROMPT_KEYS = ("probes", "held_out", "harmless")
KEYS = {"witness", "anchor", "runs", "tokenizer", "chat_template", "system", *PROMPT_KEYS}  # of SEQUENCE.toml
RUN_KEYS = {"folders", "missing"}
ChatTemplate = Literal["own", "anchor", "none"]
Source = Path | str | nn.Module
Folders = Path | str | Sequence[Path | str]
Prompts = PromptSet | Sequence[str] | Path | str | Any  # a datasets.Dataset


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One checkpoint: a folder (opened on demand), a hub id, or a model in memory.

    Attributes:
        name: its name in results (`witness`, `anchor`, `seed0/20`).
        source: the folder, the hub id (`owner/name` or `owner/name@revision`), or the model.
        step: optimizer steps since the anchor, for the checkpoints of a run.
        base: for a PEFT adapter, the checkpoint it is merged into; default: the one that its configuration names.
        template: the chat template it is read with: its `own`, `none`, or that (and the tokenizer) of another
            checkpoint. A sequence sets it for its checkpoints, by its `chat_template`.
        tokenizer: one that takes the place of the checkpoint's own, or a folder or hub id that holds it. A sequence
            sets it too.
    """

    name: str
    source: Source
    step: int | None = None
    base: "Checkpoint | None" = field(default=None, repr=False)
    template: "Checkpoint | Literal['own', 'none']" = "own"
    tokenizer: Any | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.source, Path | str | nn.Module):
            raise wrong_kind(
                self.source,
                "A checkpoint is a folder, a hub id, or a Hugging Face model, TransformerBridge or HookedTransformer.",
                "open_model(folder), sequence.anchor of a sequence, or opened.module of an OpenModel.",
            )

    @property
    def revision(self) -> str | None:
        """The branch, tag or commit of a hub id; None elsewhere, and for the main branch."""
        return revision_of(self.source) if isinstance(self.source, str) and is_hub_id(self.source) else None

    @property
    def described(self) -> str:
        """The source in words."""
        return str(self.source) if isinstance(self.source, Path | str) else f"a {type(self.source).__name__} in memory"


@dataclass(frozen=True)
class Run:
    """Folders of a run that may have missing checkpoints.

    Attributes:
        folders: a pattern, a Trainer's output folder, or a list of folders and hub ids.
        missing: `refuse`, or `skip`: folders that are not there, or not written to their end, are left out and stand in
            the sequence's `skipped`.
    """

    folders: Folders
    missing: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        if self.missing not in ("refuse", "skip"):
            raise GravlensError(
                f"missing={self.missing!r} was given.", "It says what to do about a hole.", "'refuse' or 'skip'."
            )


@dataclass(frozen=True, eq=False)
class ModelSequence:
    """A training history: the input of `locate_vrev` and everything after it.

    Attributes:
        witness: a checkpoint of the dominant phase.
        anchor: the aligned checkpoint, where every run starts.
        runs: run name -> its checkpoints in order of their steps; may be empty.
        probes: prompts that directions are estimated on ("given").
        held_out: other prompts that trajectories are judged on.
        harmless: harmless prompts, for over-refusal.
        tokenizer: one for all checkpoints, or a folder or hub id that holds it; default: each checkpoint's own.
        chat_template: `own` (witness and anchor must agree), `anchor` (the anchor's for all: an explicit choice for
            a base model that never saw a template), or `none` (prompts are read as they are). Each checkpoint holds
            the choice as its `template`, so that `open_model(sequence.anchor)` and `finetune` read alike.
        system: a system prompt for all prompts that have none of their own.
        skipped: checkpoints that a `Run(..., missing="skip")` left out -> why.
    """

    witness: Checkpoint
    anchor: Checkpoint
    runs: Mapping[str, tuple[Checkpoint, ...]] = field(default_factory=dict)
    probes: PromptSet | None = None
    held_out: PromptSet | None = None
    harmless: PromptSet | None = None
    tokenizer: Any | None = None
    chat_template: ChatTemplate = "own"
    skipped: Mapping[str, str] = field(default_factory=dict)
    system: str = ""

    def __post_init__(self) -> None:
        for name in self.runs:
            _check_run_name(name)
        if self.chat_template not in ("own", "anchor", "none"):
            raise GravlensError(
                f"chat_template={self.chat_template!r} was given.",
                "It says whose chat template all checkpoints are read with.",
                "'own', 'anchor' or 'none'.",
            )
        check_system(self.system)
        anchor = self._read_alike(self.anchor, "none" if self.chat_template == "none" else "own")
        others = anchor if self.chat_template == "anchor" else anchor.template
        runs = {name: tuple(self._read_alike(one, others) for one in run) for name, run in self.runs.items()}
        held: dict[str, Any] = {"witness": self._read_alike(self.witness, others), "anchor": anchor, "runs": runs}
        sets = {name: getattr(self, name) for name in PROMPT_KEYS}
        held |= {name: self.prompts_of(prompts) for name, prompts in sets.items() if prompts is not None}
        for name, value in held.items():
            object.__setattr__(self, name, value)

    def _read_alike(self, checkpoint: Checkpoint, template: Any) -> Checkpoint:
        return replace(checkpoint, template=template, tokenizer=self.tokenizer or checkpoint.tokenizer)

    def prompts_of(self, prompts: Prompts, role: str = "prompts") -> PromptSet:
        """Prompts as a set, under the sequence's system prompt where they have none of their own."""
        made = PromptSet.of(prompts, role)
        return made if made.system else replace(made, system=self.system)

    def with_system(self, system: str) -> "ModelSequence":
        """The same history, its prompts read under a system prompt ("" for none); prompts with their own keep it."""
        sets = {name: prompts for name in PROMPT_KEYS if (prompts := getattr(self, name)) is not None}
        bare: dict[str, Any] = {
            name: replace(prompts, system="") for name, prompts in sets.items() if prompts.system == self.system
        }
        return replace(self, system=system, **bare)

    @classmethod
    def from_folders(
        cls,
        *,
        witness: Path | str,
        anchor: Path | str,
        runs: Mapping[str, Folders | Run] | Folders | None = None,
        probes: Prompts | None = None,
        held_out: Prompts | None = None,
        harmless: Prompts | None = None,
        tokenizer: Any | None = None,
        chat_template: ChatTemplate = "own",
        system: str = "",
    ) -> "ModelSequence":
        """A history on disk; nothing is opened yet.

        Args:
            witness: folder of `save_pretrained`, or a hub id (`owner/name`, `owner/name@revision`).
            anchor: likewise.
            runs: run name -> a pattern (`"ft/checkpoint-*"`), a Trainer's output folder, a list of folders and hub
                ids, or a `Run` of these. One run, or a list of runs, may be given without names: each is called by its
                folder. A checkpoint's step is `global_step` of its trainer_state.json; without that file, the number
                in its name. PEFT adapters are added to the anchor.
            probes: prompts: a list, a `PromptSet`, or a file.
            held_out: likewise, other prompts to judge on.
            harmless: likewise, for over-refusal.
            tokenizer: see `ModelSequence`; needed where the folders hold none.
            chat_template: see `ModelSequence`, like `system`.

        Raises:
            GravlensError: a folder is missing, a pattern matches nothing, or two checkpoints have one step.
        """
        start = Checkpoint("anchor", existing(anchor))
        skipped: dict[str, str] = {}
        return cls(
            witness=Checkpoint("witness", existing(witness)),
            anchor=start,
            runs={name: _run_of_folders(name, run, start, skipped) for name, run in _named(runs).items()},
            skipped=skipped,
            **_prompt_sets(probes, held_out, harmless),
            tokenizer=existing(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer,
            chat_template=chat_template,
            system=system,
        )

    @classmethod
    def from_models(
        cls,
        *,
        witness: nn.Module,
        anchor: nn.Module,
        runs: Mapping[str, Mapping[int, nn.Module] | Sequence[nn.Module] | nn.Module] | None = None,
        probes: Prompts | None = None,
        held_out: Prompts | None = None,
        harmless: Prompts | None = None,
        tokenizer: Any | None = None,
        chat_template: ChatTemplate = "own",
        system: str = "",
    ) -> "ModelSequence":
        """A history in memory: `HookedTransformer`, `TransformerBridge` or Hugging Face models.

        Args:
            witness: a model of the dominant phase.
            anchor: the aligned model.
            runs: run name -> `{step: model}`, or a list (then the steps are 1, 2, …), or one model (step 1).
            probes: prompts that directions are estimated on.
            held_out: other prompts that trajectories are judged on.
            harmless: harmless prompts, for over-refusal.
            tokenizer: see `ModelSequence`; needed where the models carry none.
            chat_template: see `ModelSequence`, like `system`.

        Raises:
            GravlensError: a run without checkpoints, or whose steps do not ascend.
        """
        return cls(
            witness=Checkpoint("witness", witness),
            anchor=Checkpoint("anchor", anchor),
            runs=_runs_of_models(runs or {}),
            **_prompt_sets(probes, held_out, harmless),
            tokenizer=tokenizer,
            chat_template=chat_template,
            system=system,
        )

    @classmethod
    def of(cls, source: "ModelSequence | Path | str") -> "ModelSequence":
        """A sequence as it is, or that of a TOML file; GravlensError for anything else."""
        if isinstance(source, cls):
            return source
        if isinstance(source, Path | str) and Path(source).suffix == ".toml":
            return cls.from_toml(source)
        raise wrong_kind(
            source,
            "A ModelSequence is needed, which says which checkpoint is the witness and which the anchor.",
            "ModelSequence.from_folders(witness=…, anchor=…, probes=[…]), or from_models with models in memory.",
        )

    @classmethod
    def from_toml(cls, path: Path | str) -> "ModelSequence":
        """Read a history that a person wrote by hand; paths are relative to the file. See docs/sequence.md."""
        table = _read_sequence_file(Path(path))
        runs = {name: Run(**run) for name, run in table.pop("runs", {}).items()}
        return cls.from_folders(**table, runs=runs)

    def __iter__(self) -> Iterator[Checkpoint]:
        """Witness, anchor, then every checkpoint of every run."""
        yield self.witness
        yield self.anchor
        for run in self.runs.values():
            yield from run

    def require_probes(self) -> PromptSet:
        """The probe prompts, or the GravlensError that says how to give them."""
        if self.probes is None:
            raise GravlensError(
                "This sequence has no probe prompts.",
                "A direction is estimated over a set of prompts.",
                "probes = \"probes.jsonl\" in the sequence's file, or from_folders(..., probes=['How do I …?', …]).",
            )
        return self.probes

    def _repr_html_(self) -> str:
        rows = [("witness", self.witness.described), ("anchor", self.anchor.described)]
        sets = {name: prompts for name in PROMPT_KEYS if (prompts := getattr(self, name)) is not None}
        rows += [(name.replace("_", " "), f"{len(prompts)} prompts") for name, prompts in sets.items()]
        rows += [("chat template", self.chat_template)] + ([("system prompt", self.system)] if self.system else [])
        rows += [(f"run {name}", f"steps {html.listed(c.step for c in run)}") for name, run in self.runs.items()]
        rows += [("skipped", f"{name}: {why}") for name, why in self.skipped.items()]
        return html.facts(rows, title="ModelSequence")


def _prompt_sets(probes: Any, held_out: Any, harmless: Any) -> dict[str, Any]:
    """Role -> the prompts as a set, or None."""
    given = zip(PROMPT_KEYS, (probes, held_out, harmless), ("harmful", "harmful", "harmless"), strict=True)
    return {name: None if prompts is None else PromptSet.of(prompts, role) for name, prompts, role in given}


def _check_run_name(name: str) -> None:
    """A run's name becomes part of names of results, never a way out of a folder."""
    if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
        raise GravlensError(f"A run is called {name!r}.", "A run's name is a plain word.", 'a name such as "seed0".')


# --- the checkpoints of one run ---------------------------------------------------------------------------------
def _run_of_folders(
    name: str, run: Folders | Run, anchor: Checkpoint, skipped: dict[str, str]
) -> tuple[Checkpoint, ...]:
    """The whole checkpoints of a run, ordered by their steps; what was left out is added to `skipped`."""
    run = run if isinstance(run, Run) else Run(run)
    steps: dict[Path | str, int] = {}
    for source in _found(name, run.folders):
        try:
            source = existing(source)
            if run.missing == "skip" and isinstance(source, Path):
                weight_files(source)
            steps[source] = _step_of(name, source)
        except GravlensError as error:
            if run.missing == "refuse":
                raise
            skipped[f"{name}: {source}"] = error.given
    if not steps:
        raise GravlensError(
            f"The run {name!r} ({run.folders}) matches no folder" + (" that is whole." if skipped else "."),
            "A run is one or more checkpoint folders.",
            "a pattern such as 'ft/checkpoint-*', a Trainer's output folder, or a list of folders.",
        )
    return _ordered(name, [Checkpoint(f"{name}/{step}", source, step, anchor) for source, step in steps.items()])


def _found(name: str, folders: Folders) -> Sequence[Path | str]:
    """The folders that a pattern or a list names; a Trainer's output folder stands for those inside it."""
    if not isinstance(folders, str | Path):
        found: list[Path | str] = list(folders)
    elif (path := Path(folders).expanduser()).is_dir():
        found = [path]
    else:
        found = [Path(match) for match in sorted(glob.glob(str(path))) if Path(match).is_dir()]
    inside = {folder: [p for p in Path(folder).expanduser().glob("checkpoint-*") if p.is_dir()] for folder in found}
    outer = [folder for folder in found if inside[folder]]
    if outer and len(found) > 1:
        raise GravlensError(
            f"The run {name!r} ({folders}) holds {len(found)} folders, and {outer[0]} is a run's folder itself.",
            "A run is one Trainer's output folder, or several checkpoints.",
            f"one run for each: {Path(outer[0]).name} = '{outer[0]}'.",
        )
    return inside[outer[0]] if outer else found


def _step_of(name: str, source: Path | str) -> int:
    """Trainer's own count where it left one, or the number in a name or revision: after `step`, or the last."""
    if isinstance(source, Path) and (steps := trained_steps(source)) is not None:
        return steps
    label = source.name if isinstance(source, Path) else revision_of(source) or repository_of(source)
    numbers = re.findall(r"step[-_]?(\d+)", label)[-1:]
    if not numbers and label != source:  # the digits of a repository's own name are its size or version
        numbers = re.findall(r"\d+", label)
    if not numbers:
        raise GravlensError(
            f"The checkpoint {source} of run {name!r} has no step in its name, and no trainer_state.json.",
            "The number in a checkpoint's name, or in its revision, is its step.",
            "rename it, as in checkpoint-20, or owner/name@step20.",
        )
    return int(numbers[-1])


def _named(runs: Mapping[str, Folders | Run] | Folders | None) -> Mapping[str, Folders | Run]:
    """Runs by their names; those without one are called by the folder that their checkpoints lie in."""
    if runs is None or isinstance(runs, Mapping):
        return runs or {}
    named: dict[str, Folders | Run] = {}
    for run in as_list(runs):
        parts = [part for part in Path(run).parts if not re.match(r"checkpoint-|.*[*?\[]", part)]
        name = parts[-1].partition("@")[0] if parts else "run"
        if name in named:
            raise GravlensError(
                f"Two runs would be called {name!r}.",
                "Each run has its own name.",
                f'runs={{"seed0": {as_list(runs)}}}.',
            )
        named[name] = run
    return named


def _runs_of_models(runs: Any) -> dict[str, tuple[Checkpoint, ...]]:
    if not isinstance(runs, Mapping) or not all(isinstance(name, str) for name in runs):
        raise wrong_kind(
            runs, "Runs have names, and their models steps.", 'runs={"seed0": {20: model}}, or {"seed0": [model, …]}.'
        )
    return {name: _run_of_models(name, models) for name, models in runs.items()}


def _run_of_models(name: str, run: Mapping[int, nn.Module] | Sequence[nn.Module] | nn.Module) -> tuple[Checkpoint, ...]:
    models = [run] if isinstance(run, nn.Module) else run
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
def _read_sequence_file(path: Path) -> dict[str, Any]:
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
    except FileNotFoundError as error:
        raise GravlensError(
            f"There is no file {path}.", "A TOML file is needed.", f"check the path, or {remedy}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error  # without errno and path, which str() repeats
        raise GravlensError(f"{path} cannot be read ({why}).", "A TOML file is needed.", remedy) from error
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
