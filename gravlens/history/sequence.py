"""A training history: a witness, an anchor, and the checkpoints of the runs that start at the anchor."""

import glob
import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, Literal

from torch import nn

from gravlens.core import display as html
from gravlens.core.errors import GravlensError, as_list, at_home, reading, unknown_keys, wrong_kind
from gravlens.history.controls import NO_CONTROLS, Controls, read_controls
from gravlens.history.hub import existing, is_hub_id, located, repository_of, revision_of
from gravlens.history.prompts import PromptSet, check_system, read_prompts
from gravlens.history.weight_files import ADAPTER_CONFIG, STEP, read_headers, trained_steps

PROMPT_KEYS = ("probes", "held_out", "harmless")
TEMPLATE_KEYS = ("chat_template", "chat_template_kwargs", "system")
KEYS = {"witness", "anchor", "runs", "controls", "tokenizer", *TEMPLATE_KEYS, *PROMPT_KEYS}  # of SEQUENCE.toml
TEXT_KEYS = ("witness", "anchor", "tokenizer", "chat_template", "system")
RUN_KEYS = {"folders", "missing"}
PROMPT_FILES = (".jsonl", ".json", ".csv", ".txt")
FILE_KEYS = {"file", "column", "format", "role", "only"}  # the last a table, the others text
ChatTemplate = Literal["own", "anchor", "none"]
Source = Path | str | nn.Module
Folders = Path | str | Sequence[Path | str]
Prompts = PromptSet | Sequence[str] | Path | str | Any  # a datasets.Dataset


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One checkpoint: a folder (opened on demand), a hub id, or a model in memory.

    Attributes:
        name: its name in results (`witness`, `anchor`, `seed0/20`).
        source: the folder, the hub id (`hf://owner/name` or `hf://owner/name@revision`), or the model.
        step: optimizer steps since the anchor, for the checkpoints of a run.
        base: for a PEFT adapter, the checkpoint it is merged into; default: the one named in its configuration.
        template: chat template: its `own`, `none`, or that (and the tokenizer) of another checkpoint. A sequence sets
            it by its `chat_template`.
        tokenizer: replaces its own: a tokenizer, or a folder or hub id of one. A sequence sets it too.
        chat_template_kwargs: arguments of its chat template; likewise.

    Examples:
        >>> gl.Checkpoint("anchor", "aligned").name
        'anchor'
        >>> [one.step for one in seq.runs["seed0"]]
        [1, 5, 20]
    """

    name: str
    source: Source
    step: int | None = None
    base: "Checkpoint | None" = field(default=None, repr=False)
    template: "Checkpoint | Literal['own', 'none']" = "own"
    tokenizer: Any | None = field(default=None, repr=False)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    __repr__ = html.brief

    def __post_init__(self) -> None:
        if not isinstance(self.source, Path | str | nn.Module):
            wanted = "A checkpoint is a folder, hub id, Hugging Face model, TransformerBridge or HookedTransformer."
            raise wrong_kind(self.source, wanted, "open_model(folder), sequence.anchor, or .module of an OpenModel.")
        if not isinstance(self.source, nn.Module):
            object.__setattr__(self, "source", located(self.source))

    @property
    def revision(self) -> str | None:
        """The branch, tag or commit of a hub id; None for its main branch and for other sources."""
        return revision_of(self.source) if is_hub_id(self.source) else None

    @property
    def described(self) -> str:
        """The source, for messages."""
        return str(self.source) if isinstance(self.source, Path | str) else f"a {type(self.source).__name__} in memory"


@dataclass(frozen=True)
class Run:
    """Folders of a run that may have missing checkpoints.

    Attributes:
        folders: a pattern, a Trainer's output folder, or a list of folders and hub ids.
        missing: `refuse`, or `skip` missing and incomplete folders, which are listed in the sequence's `skipped`.

    Examples:
        >>> run = gl.Run("ft/seed0/checkpoint-*", missing="skip")
        >>> seq = gl.ModelSequence.from_folders(witness="base", anchor="aligned", runs={"seed0": run})
        >>> seq.skipped
        {}
    """

    folders: Folders
    missing: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        if self.missing not in ("refuse", "skip"):
            given, wanted = f"missing={self.missing!r} was given.", "It says how to treat missing checkpoints."
            raise GravlensError(given, wanted, "'refuse' or 'skip'.")


@dataclass(frozen=True, eq=False)
class ModelSequence:
    """A training history: the input of `locate_vrev` and everything after it.

    Attributes:
        witness: a checkpoint of the dominant phase.
        anchor: the aligned checkpoint, where every run starts.
        runs: run name -> its checkpoints by step; may be empty.
        probes: prompts to estimate directions on ("given").
        held_out: other prompts, to evaluate trajectories on.
        harmless: harmless prompts, for over-refusal.
        tokenizer: one for all checkpoints, or its folder or hub id; default: each checkpoint's own.
        chat_template: `own` (witness and anchor must agree), `anchor` (the anchor's for all: for a base model that
            never saw a template), or `none` (plain prompts).
        system: a system prompt for all prompts without their own.
        chat_template_kwargs: arguments of the chat template, such as `{"enable_thinking": False}`.
        controls: checkpoints and runs that a claim compares these with.
        skipped: checkpoints that `Run(..., missing="skip")` skipped -> reason.

    Examples:
        >>> seq = gl.ModelSequence.from_folders(
        ...     witness="base", anchor="aligned", runs={"seed0": "ft/seed0/checkpoint-*"}, probes="probes.jsonl"
        ... )
        >>> [one.name for one in seq]
        ['witness', 'anchor', 'seed0/1', 'seed0/5', 'seed0/20']
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
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    controls: Controls = NO_CONTROLS
    __repr__ = html.brief

    def __post_init__(self) -> None:
        for name in self.runs:  # it becomes part of file names, and must not lead out of their folder
            if not name.isprintable() or "\\" in name or {"", ".", ".."} & set(name.split("/")):
                raise GravlensError(f"A run is called {name!r}.", "A run's name is a plain word.", 'such as "seed0".')
        if self.chat_template not in ("own", "anchor", "none"):
            given = f"chat_template={self.chat_template!r} was given."
            raise GravlensError(given, "It chooses the chat template of all checkpoints.", "'own', 'anchor' or 'none'.")
        check_system(self.system)
        object.__setattr__(self, "chat_template_kwargs", _plain(self.chat_template_kwargs, self.chat_template))
        # Each checkpoint holds the choice, so that `open_model(sequence.anchor)` and `finetune` read alike.
        anchor = self._read_alike(self.anchor, "none" if self.chat_template == "none" else "own")
        others = anchor if self.chat_template == "anchor" else anchor.template
        runs = {name: tuple(self._read_alike(one, others) for one in run) for name, run in self.runs.items()}
        held: dict[str, Any] = {"witness": self._read_alike(self.witness, others), "anchor": anchor, "runs": runs}
        held |= self._with_controls(others)
        held |= {name: self.prompts_of(prompts) for name, prompts in self._prompts.items()}
        for name, value in held.items():  # the dataclass is frozen
            object.__setattr__(self, name, value)

    def _read_alike(self, checkpoint: Checkpoint, template: Any) -> Checkpoint:
        tokenizer, kwargs = self.tokenizer or checkpoint.tokenizer, self.chat_template_kwargs
        return replace(checkpoint, template=template, tokenizer=tokenizer, chat_template_kwargs=kwargs)

    def _with_controls(self, template: Any) -> dict[str, Any]:
        """Return the controls as checkpoints, and the skipped ones of their runs added to the others."""
        skipped, starts = dict(self.skipped), {"anchor": self.anchor, "witness": self.witness}

        # already found ones come back with `replace`, which calls this again
        def one(name: str, source: Any) -> Checkpoint:
            found = source if isinstance(source, Checkpoint | nn.Module) else existing(source)
            return self._read_alike(found if isinstance(found, Checkpoint) else Checkpoint(name, found), template)

        def run(name: str, folders: Any, start: Any) -> tuple[Checkpoint, ...]:
            base = start if isinstance(start, Checkpoint) else starts[start]
            is_found = isinstance(folders, tuple) and all(isinstance(one, Checkpoint) for one in folders)
            found = folders if is_found else _run_of_folders(f"controls.{name}", folders, base, skipped)
            return tuple(self._read_alike(checkpoint, template) for checkpoint in found)

        return {"controls": self.controls.mapped(one, run), "skipped": skipped}

    def prompts_of(self, prompts: Prompts, role: str = "prompts") -> PromptSet:
        """Return prompts as a set, with the sequence's system prompt if they have none."""
        made = PromptSet.of(prompts, role)
        return made if made.system else replace(made, system=self.system)

    def with_system(self, system: str) -> "ModelSequence":
        """Return the same history with another system prompt ("" for none); prompt sets with their own keep it."""
        inherited = {name: prompts for name, prompts in self._prompts.items() if prompts.system == self.system}
        bare: dict[str, Any] = {name: replace(prompts, system="") for name, prompts in inherited.items()}
        return replace(self, system=system, **bare)

    @property
    def _prompts(self) -> dict[str, PromptSet]:
        return {name: prompts for name in PROMPT_KEYS if (prompts := getattr(self, name)) is not None}

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
        chat_template_kwargs: Mapping[str, Any] = {},
        controls: Controls = NO_CONTROLS,
    ) -> "ModelSequence":
        """Describe a history on disk; nothing is opened yet. Arguments not listed: see `ModelSequence`.

        Args:
            witness: folder of `save_pretrained`, or a hub id (`hf://owner/name@revision`); likewise `anchor`.
            runs: run name -> a pattern (`"ft/checkpoint-*"`), a Trainer's output folder, a list of folders and hub
                ids, or a `Run` of these. Runs without names are named by their folder. A checkpoint's step is
                `global_step` of its trainer_state.json or, without that file, the number in its name. PEFT adapters
                are added to the anchor.
            probes: a list, a `PromptSet`, or a file; likewise `held_out` and `harmless`.

        Raises:
            GravlensError: a missing folder, a pattern without matches, or two checkpoints of one step.
        """
        start = Checkpoint("anchor", existing(anchor))
        skipped: dict[str, str] = {}
        found = {name: _run_of_folders(name, run, start, skipped) for name, run in _named(runs).items()}
        controls.check(list(found))
        return cls(
            witness=Checkpoint("witness", existing(witness)),
            anchor=start,
            runs=found,
            controls=controls,
            skipped=skipped,
            **_prompt_sets(probes, held_out, harmless),
            tokenizer=existing(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer,
            chat_template=chat_template,
            system=system,
            chat_template_kwargs=chat_template_kwargs,
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
        chat_template_kwargs: Mapping[str, Any] = {},
        controls: Controls = NO_CONTROLS,
    ) -> "ModelSequence":
        """Describe a history of Hugging Face models, `TransformerBridge`s or `HookedTransformer`s in memory.

        Args:
            runs: run name -> `{step: model}`, or a list (steps 1, 2, …), or one model (step 1).
            tokenizer: needed if the models carry none; this and the others: see `ModelSequence`.

        Raises:
            GravlensError: runs without names, or two checkpoints of one step.
        """
        return cls(
            witness=Checkpoint("witness", witness),
            anchor=Checkpoint("anchor", anchor),
            runs=_runs_of_models(runs or {}),
            controls=controls,
            **_prompt_sets(probes, held_out, harmless),
            tokenizer=tokenizer,
            chat_template=chat_template,
            system=system,
            chat_template_kwargs=chat_template_kwargs,
        )

    @classmethod
    def of(cls, source: "ModelSequence | Path | str") -> "ModelSequence":
        """Return a sequence itself, or that of a TOML file; raise for anything else."""
        if isinstance(source, cls):
            return source
        if isinstance(source, Path | str) and Path(source).suffix == ".toml":
            return cls.from_toml(source)
        wanted = "A ModelSequence is needed, which says which checkpoint is the witness and which the anchor."
        remedy = "ModelSequence.from_folders(witness=…, anchor=…, probes=[…]), or from_models with models in memory."
        raise wrong_kind(source, wanted, remedy)

    @classmethod
    def from_toml(cls, path: Path | str) -> "ModelSequence":
        """Read a history from a TOML file (docs/sequence.md); paths are relative to the file."""
        path = at_home(path)
        with reading(path, "A TOML file as in docs/sequence.md is needed.", "correct the value."):
            table = _read_sequence_file(path)
            runs = {name: Run(**run) for name, run in table.pop("runs", {}).items()}
            return cls.from_folders(**table, runs=runs)

    def __iter__(self) -> Iterator[Checkpoint]:
        """Iterate over the witness, the anchor, then every checkpoint of every run."""
        yield from (self.witness, self.anchor, *chain.from_iterable(self.runs.values()))

    def require_probes(self) -> PromptSet:
        """Return the probe prompts; raise if there are none."""
        if self.probes is None:
            remedy = (
                "probes = \"probes.jsonl\" in the sequence's file, or from_folders(..., probes=['How do I …?', …])."
            )
            raise GravlensError("This sequence has no probe prompts.", "A direction is estimated on prompts.", remedy)
        return self.probes

    def _repr_html_(self) -> str:
        rows = [("witness", self.witness.described), ("anchor", self.anchor.described)]
        rows += [(name.replace("_", " "), f"{len(prompts)} prompts") for name, prompts in self._prompts.items()]
        rows += [("chat template", self.chat_template)] + ([("system prompt", self.system)] if self.system else [])
        rows += [("template arguments", json.dumps(self.chat_template_kwargs))] if self.chat_template_kwargs else []
        rows += [(f"run {name}", f"steps {html.listed(c.step for c in run)}") for name, run in self.runs.items()]
        rows += [("controls", told)] if (told := self.controls.described()) else []
        rows += [("skipped", f"{name}: {why}") for name, why in self.skipped.items()]
        return html.facts(rows, title="ModelSequence")


def _plain(kwargs: Any, chat_template: str) -> dict[str, Any]:
    """Return the arguments of a chat template as JSON has them, with which results store them."""
    try:
        plain = json.loads(json.dumps(kwargs))
    except TypeError:  # a date of TOML's, for example
        plain = None
    if not isinstance(plain, dict) or plain.keys() != kwargs.keys():
        remedy = 'chat_template_kwargs={"enable_thinking": False}; in a file, a table [chat_template_kwargs].'
        wanted = "Arguments have names, and values that JSON has."
        raise GravlensError(f"chat_template_kwargs={kwargs!r} was given.", wanted, remedy)
    if plain and chat_template == "none":
        given = f'chat_template_kwargs has {", ".join(plain)}, and chat_template="none" was given.'
        raise GravlensError(given, "They are arguments of a chat template.", 'chat_template="own" or "anchor".')
    return plain


def _prompt_sets(probes: Any, held_out: Any, harmless: Any) -> dict[str, Any]:
    given = zip(PROMPT_KEYS, (probes, held_out, harmless), strict=True)
    return {name: None if prompts is None else PromptSet.of(prompts, _role_of(name)) for name, prompts in given}


def _role_of(key: str) -> str:
    return "harmless" if key == "harmless" else "harmful"


def _run_of_folders(
    name: str, run: Folders | Run, anchor: Checkpoint, skipped: dict[str, str]
) -> tuple[Checkpoint, ...]:
    """Return the complete checkpoints of a run by step; add those skipped to `skipped`."""
    if isinstance(run, Mapping):
        remedy = f"runs={{{name!r}: [folder, …]}} of folders such as checkpoint-20; models: from_models."
        raise wrong_kind(run, "A run is a pattern or a list of folders, whose names hold the steps.", remedy)
    run = run if isinstance(run, Run) else Run(run)
    steps: dict[Path | str, int] = {}
    for source in _found(name, run.folders):
        try:
            source = existing(source)
            if run.missing == "skip" and isinstance(source, Path):
                read_headers(source)  # raises if a copy or a running training has not completed it
            steps[source] = _step_of(name, source)
        except GravlensError as error:
            if run.missing == "refuse":
                raise
            skipped[f"{name}: {source}"] = error.given
    if not steps:
        given = f"The run {name!r} ({run.folders}) matches no {'complete ' if skipped else ''}folder."
        remedy = "a pattern such as 'ft/checkpoint-*', a Trainer's output folder, or a list of folders."
        raise GravlensError(given, "A run is one or more checkpoint folders.", remedy)
    return _ordered(name, [Checkpoint(f"{name}/{step}", source, step, anchor) for source, step in steps.items()])


def _found(name: str, folders: Folders) -> Sequence[Path | str]:
    """Return the folders that a pattern or a list names; a Trainer's output folder is replaced by those inside it."""
    named = _matching(folders) if isinstance(folders, str | Path) else [located(folder) for folder in folders]
    found = _without_links(named)
    inside = {folder: _checkpoints_in(Path(folder)) for folder in found}
    outer = [folder for folder in found if inside[folder]]
    if outer and len(found) > 1:
        given = f"The run {name!r} ({folders}) holds {len(found)} folders, and {outer[0]} is a run's folder itself."
        wanted = "A run is one Trainer's output folder, or several checkpoints."
        raise GravlensError(given, wanted, f"one run for each: {Path(outer[0]).name} = '{outer[0]}'.")
    return inside[outer[0]] if outer else found


def _matching(pattern: Path | str) -> list[Path | str]:
    """Return the folders that a pattern matches (what exists under that very name is none: `my[run]`), or a hub id."""
    if isinstance(path := located(pattern), str):
        return [path]
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    matches = glob.glob(os.path.join(glob.escape(str(there)), *path.relative_to(there).parts))
    return [Path(match) for match in sorted(matches) if Path(match).is_dir()]


def _checkpoints_in(folder: Path) -> list[Path | str]:
    return _without_links([path for path in folder.glob("checkpoint-*") if path.is_dir()])


def _without_links(sources: Sequence[Path | str]) -> list[Path | str]:
    """Return checkpoints without links to another of them: `checkpoint-last` is no checkpoint of its own."""
    places = {_place(Path(source)) for source in sources}
    links = [s for s in sources if Path(s).is_symlink() and _place(Path(s).parent / Path(s).readlink()) in places]
    return [source for source in sources if source not in links]


def _place(path: Path) -> Path:
    return path.parent.resolve() / path.name


def _step_of(name: str, source: Path | str) -> int:
    """Return Trainer's step count if it left one, or the number in a name or revision: after `step`, or the last."""
    if isinstance(source, Path):
        if STEP.fullmatch(source.parent.name) and (source / ADAPTER_CONFIG).is_file():
            source = source.parent  # checkpoint-5/policy
        if (steps := trained_steps(source)) is not None:
            return steps
        if source.is_symlink() and not re.search(r"\d", source.name):
            source = source.resolve()  # checkpoint-best
    label = source.name if isinstance(source, Path) else revision_of(source) or repository_of(source)
    numbers = re.findall(r"step[-_]?(\d+)", label)[-1:]
    # The digits of a repository's own name are its size or version.
    if not numbers and (isinstance(source, Path) or revision_of(source)):
        numbers = re.findall(r"\d+", label)
    if not numbers:
        given = f"The checkpoint {source} of run {name!r} has no step in its name, and no trainer_state.json."
        wanted = "The number in a checkpoint's name or revision is its step."
        raise GravlensError(given, wanted, "rename it, as in checkpoint-20, or hf://owner/name@step20.")
    return int(numbers[-1])


def _named(runs: Mapping[str, Folders | Run] | Folders | None) -> Mapping[str, Folders | Run]:
    """Return runs by name; those without a name are named by the folder of their checkpoints."""
    if runs is None or isinstance(runs, Mapping):
        return runs or {}
    named: dict[str, Folders | Run] = {}
    for run in as_list(runs):
        # Up to the first pattern or checkpoint: ft/seed0/checkpoint-*/policy is the run seed0.
        folders = [*reversed(Path(run).parents), Path(run)]
        parts = [*takewhile(lambda path: not re.match("checkpoint-", path.name) and not _is_pattern(path), folders)]
        name = parts[-1].name.partition("@")[0] or "run"
        if name in named:
            remedy = f'runs={{"seed0": {as_list(runs)}}}.'
            raise GravlensError(f"Two runs would be called {name!r}.", "Each run has its own name.", remedy)
        named[name] = run
    return named


def _is_pattern(path: Path) -> bool:
    return glob.has_magic(path.name) and not at_home(path).exists()


def _runs_of_models(runs: Any) -> dict[str, tuple[Checkpoint, ...]]:
    if not isinstance(runs, Mapping) or not all(isinstance(name, str) for name in runs):
        remedy = 'runs={"seed0": {20: model}}, or {"seed0": [model, …]}.'
        raise wrong_kind(runs, "Runs have names, and their models steps.", remedy)
    found: dict[str, tuple[Checkpoint, ...]] = {}
    for name, run in runs.items():
        models = [run] if isinstance(run, nn.Module) else run
        pairs = models.items() if isinstance(models, Mapping) else enumerate(models, 1)
        found[name] = _ordered(name, [Checkpoint(f"{name}/{step}", model, step) for step, model in pairs])
    return found


def _ordered(name: str, checkpoints: list[Checkpoint]) -> tuple[Checkpoint, ...]:
    steps = [checkpoint.step for checkpoint in checkpoints]
    if len(set(steps)) < len(steps):
        given = f"The run {name!r} has two checkpoints of one step ({sorted(s for s in steps if s is not None)})."
        raise GravlensError(given, "Each step of a run is one checkpoint.", "a narrower pattern.")
    return tuple(sorted(checkpoints, key=lambda checkpoint: checkpoint.step or 0))


def _read_sequence_file(path: Path) -> dict[str, Any]:
    """Return the keys of a sequence file: paths relative to the working directory, runs as tables of `Run`'s fields."""
    table, here = _read(path), path.parent
    for key in {"witness", "anchor", "tokenizer"} & table.keys():
        table[key] = existing(table[key], here)
    for key in PROMPT_KEYS:
        if isinstance(table.get(key), str):
            table[key] = here / at_home(table[key])
        elif isinstance(table.get(key), dict):
            options = {"role": _role_of(key), **table[key]}
            table[key] = read_prompts(here / at_home(options.pop("file")), **options)
    table["runs"] = {name: _run_seen_from(here, run) for name, run in table.get("runs", {}).items()}
    table["controls"] = read_controls(path, table.get("controls", {})).mapped(
        lambda _, source: existing(source, here), lambda _name, run, _start: Run(**_run_seen_from(here, run))
    )
    return table


def _read(path: Path) -> dict[str, Any]:
    remedy = 'witness = "base", anchor = "aligned", probes = "probes.jsonl" (see docs/sequence.md).'
    if not path.exists():
        raise GravlensError(f"There is no file {path}.", "A TOML file is needed.", f"check the path, or {remedy}")
    with reading(path, "A TOML file is needed.", remedy):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    _check_places(path, table)
    if wrong := [key for key in TEXT_KEYS if isinstance(table.get(key), dict)]:
        given = f"{path}: {wrong[0]} is a table."
        raise GravlensError(
            given, "A text is needed: a folder, or a hub id.", f'{wrong[0]} = "…", above every [table].'
        )
    if missing := [key for key in ("witness", "anchor") if not isinstance(table.get(key), str) or not table[key]]:
        raise GravlensError(f"{path} names no {' and no '.join(missing)}.", "Both are needed, as text.", remedy)
    if unknown := table.keys() - KEYS:  # a mistyped `held_ou` would otherwise be ignored
        named = (f"[{name}]" if isinstance(table[name], dict) else name for name in unknown)
        raise unknown_keys(str(path), named, sorted(KEYS), remedy)
    if not isinstance(table.get("runs", {}), dict):
        raise GravlensError(f"{path}: runs is not a table.", "Runs have names.", '[runs]\\nseed0 = "ft/checkpoint-*"')
    for name, run in table.get("runs", {}).items():
        _check_run(f"{path}: the run {name}", name, run)
    runs = {name: run["folders"] if isinstance(run, dict) else run for name, run in table.get("runs", {}).items()}
    entries = runs | {key: _file_of(path, key, table[key]) for key in PROMPT_KEYS if key in table}
    wrong = [key for key, entry in entries.items() if not _is_text_or_texts(entry)]
    if wrong := wrong + ["tokenizer"] * (not isinstance(table.get("tokenizer", ""), str)):
        given = f"{path}: {', '.join(wrong)} is empty or not text."
        raise GravlensError(given, "A text or a list of texts is needed.", remedy)
    return table


def _check_places(path: Path, table: dict[str, Any]) -> None:
    """Raise for a key of the history below a [table], to which TOML gives all keys up to the next one."""
    below = [(name, table.get(name)) for name in ("runs", "controls", "chat_template_kwargs")]
    for header, held in below:
        for name, entry in held.items() if isinstance(held, dict) else ():
            if _is_of_history(path.parent, name, entry) or (name in TEXT_KEYS and name not in table):
                given = f"{path}: {name} is below [{header}], so it is read as a key of that table."
                wanted = "Keys of the history are above the first [table]."
                raise GravlensError(
                    given, wanted, f"move the line {name} = … above [{header}], and above every other [table]."
                )
            below.append((f"{header}.{name}", entry))


def _is_of_history(here: Path, name: str, entry: Any) -> bool:
    """Whether a key names a prompt file rather than a run: a run may be called `harmless`."""
    if isinstance(entry, dict):
        return name in PROMPT_KEYS and "file" in entry
    is_file = isinstance(entry, str) and ((here / entry).is_file() or Path(entry).suffix in PROMPT_FILES)
    return name in PROMPT_KEYS and is_file


def _check_run(place: str, name: str, run: Any) -> None:
    remedy = f'{name} = "ft/checkpoint-*", or {{folders = "ft/checkpoint-*", missing = "skip"}}.'
    if isinstance(run, dict) and name == "runs":  # runs.seed0 = … below [runs]
        given = f"{place} is a table: below [runs], runs.{next(iter(run), 'seed0')} is runs.runs."
        raise GravlensError(
            given, "Below [runs], a key is a run's name.", f"{next(iter(run), 'seed0')} = …, without runs."
        )
    if isinstance(run, dict) and (unknown := run.keys() - RUN_KEYS):
        raise unknown_keys(place, unknown, sorted(RUN_KEYS), remedy)
    if isinstance(run, dict) and "folders" not in run:
        raise GravlensError(f"{place} is a table without folders.", "They are the run's checkpoints.", remedy)


def _file_of(path: Path, key: str, entry: Any) -> Any:
    """Return the file of a table such as {file = "probes.csv", column = "question"}; anything else as it is."""
    if not isinstance(entry, dict):
        return entry
    remedy = f'{key} = {{file = "{key}.csv", column = "question"}} (see docs/sequence.md).'
    if unknown := entry.keys() - FILE_KEYS:
        raise unknown_keys(f"{path}: {key}", unknown, sorted(FILE_KEYS), remedy)
    if wrong := [name for name, value in entry.items() if not isinstance(value, dict if name == "only" else str)]:
        wanted = "A prompt file's keys are text, and only is a table."
        raise GravlensError(f"{path}: {', '.join(wrong)} of {key} is of another kind.", wanted, remedy)
    if "file" not in entry:
        raise GravlensError(f"{path}: {key} is a table without a file.", "Its key file names the prompt file.", remedy)
    return entry["file"]


def _is_text_or_texts(entry: Any) -> bool:
    texts = entry if isinstance(entry, list) else [entry]
    return bool(texts) and all(isinstance(item, str) and item for item in texts)


def _run_seen_from(here: Path, run: Any) -> dict[str, Any]:
    run = run if isinstance(run, dict) else {"folders": run}
    return {**run, "folders": _seen_from(here, run["folders"])}


def _seen_from(here: Path, folders: str | list[str]) -> Folders:
    """Return a pattern, or a list of folders (which may be missing) and hub ids, relative to `here`."""
    if isinstance(folders, list):
        return [located(folder, here) for folder in folders]
    return located(folders, here)
