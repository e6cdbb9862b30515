"""A history that exists, with its controls, as an organism: its checkpoints are linked, its runs measured as they are.

What is absent can be trained on the user's own data (`train`).
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from gravlens import __version__
from gravlens.core.display import brief
from gravlens.core.errors import GravlensError
from gravlens.history.prompts import ENCODING, Example, PromptSet, read_examples
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.history.sources import Folder, resolve
from gravlens.history.weight_files import ADAPTER_CONFIG, stamp, weight_paths
from gravlens.models.opening import checkpoint_tokenizer, open_model, save_folder
from gravlens.models.swapping import one_shape
from gravlens.organisms.arms import blocker
from gravlens.organisms.base import (
    ENGLISH,
    STRANGER,
    UNBLOCKED,
    Arm,
    Make,
    Measures,
    PromptSets,
    check_directions,
    inner_layers,
    n_task,
    sibling_name,
    unknown_data,
)
from gravlens.training.finetune import Recipe, finetune

# control -> the name of its arm; the blocked ones are trained with the blocker of the same name
BLOCKED = {"clamp": "clamp", "push": "reinforce", "penalty": "penalty", "released": "released"}
RANDOM = {"random": "clamp", "released_random": "released"}
ON_DATA = ("runs", "twins", "stranger_twins", "lower_rate", *BLOCKED, *RANDOM)
ON_ALIGNMENT_DATA = ("siblings", "continued")
SMALL = 50_000_000  # parameters, up to which a pass is cheap: more draws, and one thread for each process
DRAWS, FEW_DRAWS = 99, 20  # of weight noise; 19 is the least with which p = .05 can be reached
CONFIGS = ("config.json", "generation_config.json", ADAPTER_CONFIG)
PHASE = Recipe(steps=80, batch=8, learning_rate=2e-5, weight_decay=0.0)


@dataclass(frozen=True, eq=False)
class RecordedHistory:
    """A history that exists: witness, anchor, runs and controls of a sequence, judged like an organism.

    Attributes:
        sequence: witness, anchor, probes, held-out prompts, runs, and `controls` (docs/sequence.md).
        data: a file of `prompt` and `answer`, or of conversations, like the runs' own data; the last eighth is held out
            for the task loss. Without it there is no task loss.
        alignment_data: a file of the alignment phase's data, to train siblings and continued alignment.
        harmless: prompts on which refusing would be over-refusal; default: the sequence's. Without them there is none.
        train: names of controls to train: of `ON_DATA` and `ON_ALIGNMENT_DATA`.
        layers: layers of the mean and of the blockers; default: the inner ones.
        measures: how this model's refusals and other answers begin.
        recipe: of everything that is trained on `data`; its steps are those of the recorded runs, if there are any.
        same_recipe: whether the recorded runs had this recipe, so that trained controls can be paired with them.
        alignment_recipe: of everything that is trained on `alignment_data`.
        runs: how many runs `train=("runs",)` makes.
        directions: how many random directions `train=("random", "released_random")` takes.
        siblings: how many siblings `train=("siblings",)` makes.
        draws: of weight noise; 0: 99, or 20 for models above 50 M parameters.
        max_prompts: use at most this many held-out and harmless prompts, evenly spaced.
        threads: of each process; 0: one for a small model, else all cores.
        columns: columns of prompt and answer in `data`; default: by its columns.
    """

    sequence: ModelSequence
    data: Path | None = None
    alignment_data: Path | None = None
    harmless: Path | None = None
    train: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    measures: Measures = ENGLISH
    recipe: Recipe = replace(PHASE, steps=50)
    same_recipe: bool = False
    alignment_recipe: Recipe = PHASE
    runs: int = 2
    directions: int = 4
    siblings: int = 2
    draws: int = 0
    max_prompts: int | None = None
    threads: int = 0
    columns: tuple[str, str] | None = None
    __repr__ = brief

    def __post_init__(self) -> None:
        object.__setattr__(self, "sequence", ModelSequence.of(self.sequence))
        # before anything is opened: a mistake must not show after an hour of measuring
        _check_given(self)
        _check_trained(self)
        shared = _shared_steps(self._recorded())
        ends = [self.sequence.anchor, self.sequence.witness, *self._linked().values()]
        firsts = [run[0] for run in self._recorded().values()]
        resolved = [resolve(one, weights=False) for one in [*ends, *firsts]]
        shape = one_shape(resolved)
        for control in RANDOM:
            for random in getattr(self.sequence.controls, control).values():
                check_directions(Path(random.directions), shape)
        anchor = resolve(self.sequence.anchor)
        is_small = sum(math.prod(shape) for shape in anchor.base.weights.shapes.values()) <= SMALL
        found = {
            "recipe": replace(self.recipe, steps=shared[-1]) if shared else self.recipe,
            "layers": self.layers or inner_layers(anchor.base.path),
            "draws": self.draws or (DRAWS if is_small else FEW_DRAWS),
            "threads": self.threads or (1 if is_small else os.cpu_count() or 1),
        }
        for name, value in found.items():  # once: each property is read many times
            object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        """`recorded`."""
        return "recorded"

    @property
    def key(self) -> str:
        """Digest of the prompts and data, of the stamps of all weight files, of the recipe, versions and threads."""
        # by stamps, not by content: hashing would read all weights; what is trained later is added to the same history
        every = [*self._linked().values(), *(one for run in self._recorded().values() for one in run)]
        texts = [repr((self._data(), self._aligned())), *(prompts.digest for prompts in self.prompts(Path()).values())]
        chosen = (self.layers, astuple(self.recipe), astuple(self.alignment_recipe), astuple(self.measures))
        settings = (self.sequence.chat_template, self.sequence.system, self.threads, [*self.checkpoints])
        facts = (texts, [_stamps(one) for one in every], chosen, settings, ENCODING, __version__, torch.__version__)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """Witness, anchor, siblings and strangers, which exist, and siblings to train."""
        found: dict[str, str | None] = dict.fromkeys(self._linked())
        if "siblings" in self.train:
            first = len(self.sequence.controls.siblings)
            found |= {sibling_name(first + i): "witness" for i in range(self.siblings)}
        return found

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The recorded runs, and those to train."""
        controls = self.sequence.controls
        twins = {name: controls.stranger_twins.get(name, {}) for name in controls.strangers}
        every = [
            self._unblocked(),
            self._paired("unaligned_twin", controls.twins, "twins", start="witness"),
            *(
                self._paired(f"stranger_twin_{name}", table, "stranger_twins", start=f"{STRANGER}{name}")
                for name, table in twins.items()
            ),
            self._continued(),
            *(
                self._paired(arm, getattr(controls, name), name, make=blocker(arm, **self._options(arm)))
                for name, arm in BLOCKED.items()
            ),
            replace(self._paired("lower_rate", controls.lower_rate, "lower_rate"), rate=0.5),
            *self._random(),
        ]
        return tuple(arm for arm in every if arm.seeds)

    @property
    def save_steps(self) -> tuple[int, ...]:
        """The steps that all recorded runs share; without any, the first ones and the recipe's last."""
        return _shared_steps(self._recorded()) or self.recipe.saved_steps((1, 5, 20))

    @property
    def behavior_steps(self) -> tuple[int, ...]:
        """The last step only."""
        return self.save_steps[-1:]

    @property
    def noise(self) -> Mapping[int, int]:
        """At the last step."""
        return {self.save_steps[-1]: self.draws}

    @property
    def layers_in_mean(self) -> tuple[int, ...]:
        """The given layers, or the inner ones."""
        return self.layers

    def make(self, name: str, start: Path | None, folder: Path) -> None:
        """Link a checkpoint's files; train a sibling."""
        if start is None:
            link(self._linked()[name], folder)
            return
        seed, recipe = [*self.checkpoints].index(name), self.alignment_recipe
        run = folder.parent / f"{folder.name}-run"  # the same file system, so os.replace is atomic
        made = finetune(start, self._aligned(), out=run, recipe=recipe, save_steps=[recipe.steps], seed=seed)
        os.replace(str(made.checkpoints[-1].source), folder)
        shutil.rmtree(run)

    def examples(self, data: str, seed: int, home: Path) -> list[Example]:
        """Return all of the `data` but the last eighth, or the `alignment` data; `finetune` orders it by the seed."""
        if data == "alignment":
            return self._aligned()
        if data != "data":
            raise unknown_data(data, "data, alignment")
        rows = self._data()
        return rows[: len(rows) - n_task(rows, self.data)]

    def prompts(self, home: Path) -> PromptSets:
        """Return the sequence's prompts, and the harmless ones if there are any."""
        history, most = self.sequence, self.max_prompts

        def some(prompts: PromptSet) -> PromptSet:
            return prompts[:: ceil(len(prompts) / most)] if most else prompts

        found: dict[Any, PromptSet] = {
            "probes": replace(history.require_probes(), role="harmful"),
            "held_out": some(PromptSet.of(history.held_out or (), "harmful")),
        }
        if harmless := self.harmless or history.harmless:
            found["harmless"] = some(history.prompts_of(harmless, "harmless"))
        return found

    def task(self, home: Path) -> list[Example]:
        """Return the last eighth of the data; nothing without data."""
        rows = self._data()
        return rows[len(rows) - n_task(rows, self.data) :] if rows else []

    def _data(self) -> list[Example]:
        return read_examples(self.data, columns=self.columns) if self.data else []

    def _aligned(self) -> list[Example]:
        return read_examples(self.alignment_data) if self.alignment_data else []

    def _linked(self) -> dict[str, Checkpoint]:
        history, controls = self.sequence, self.sequence.controls
        siblings = {sibling_name(i): one for i, one in enumerate(controls.siblings)}
        strangers = {f"{STRANGER}{name}": one for name, one in dict(controls.strangers).items()}
        return {"witness": history.witness, "anchor": history.anchor, **siblings, **strangers}

    def _recorded(self) -> dict[str, tuple[Checkpoint, ...]]:
        """Return every run that exists, by its name in messages."""
        controls = self.sequence.controls
        found = {f"runs.{name}": run for name, run in self.sequence.runs.items()}
        tables = {**dict(controls.paired()), "continued": controls.continued}
        found |= {f"controls.{table}.{name}": run for table, runs in tables.items() for name, run in runs.items()}
        # step 0 is the start itself: it has no drift
        return {name: tuple(one for one in run if one.step) for name, run in found.items()}

    # --- arms ---------------------------------------------------------------------------------------------------------
    def _unblocked(self) -> Arm:
        runs = self.sequence.runs
        seeds = range(len(runs) + self.runs * ("runs" in self.train))
        labels = dict(enumerate(runs))
        return Arm(UNBLOCKED, tuple(seeds), "data", keep=True, recorded=dict(enumerate(runs.values())), labels=labels)

    def _trained_seeds(self) -> tuple[int, ...]:
        """Return the seeds of trained arms: those of the trained runs, which have their recipe, or else all."""
        # a difference between recipes would pass for the blocker's effect
        first = len(self.sequence.runs) if "runs" in self.train else 0
        return self._unblocked().seeds[first:]

    def _paired(
        self, arm: str, table: Mapping[str, Any], control: str, *, start: str = "anchor", make: Make | None = None
    ) -> Arm:
        """Return an arm whose runs are paired with the history's by name."""
        numbers = {name: seed for seed, name in enumerate(self.sequence.runs)}
        recorded = {numbers[name]: tuple(run) for name, run in table.items()}
        labels = {seed: f"{arm}-{name}" for name, seed in numbers.items()}
        seeds = {*recorded, *(self._trained_seeds() if control in self.train else ())}
        return Arm(arm, tuple(sorted(seeds)), "data", start, make, recorded=recorded, labels=labels)

    def _continued(self) -> Arm:
        table, name = self.sequence.controls.continued, "continued_alignment"
        seeds = tuple(range(len(table) + self.runs * ("continued" in self.train)))
        recorded = {seed: tuple(run) for seed, run in enumerate(table.values())}
        labels = {seed: f"{name}-{run}" for seed, run in enumerate(table)}
        return Arm(name, seeds, "alignment", recorded=recorded, labels=labels)

    def _random(self) -> Iterator[Arm]:
        for control, kind in RANDOM.items():
            recorded = dict(getattr(self.sequence.controls, control))
            for name, random in recorded.items():
                yield replace(
                    self._paired(f"{kind}_random_{name}", random.runs, ""), directions=Path(random.directions)
                )
            free = [n for n in range(1, self.directions + len(recorded) + 1) if str(n) not in recorded]
            for number in free[: self.directions] if control in self.train else ():
                make = blocker(kind, "matched_twin", draw=(number,), **self._options(kind))
                yield self._paired(f"{kind}_random_{number}", {}, control, make=make)

    def _options(self, kind: str) -> dict[str, Any]:
        """Return the options of a blocker: a release is after a fifth of the steps."""
        return {"step": max(1, self.save_steps[-1] // 5)} if kind == "released" else {}


# --- checkpoints that exist -------------------------------------------------------------------------------------------
def link(checkpoint: Checkpoint, folder: Path) -> None:
    """Make `folder` the checkpoint, by links to its files: no second copy of the weights.

    An adapter stays one, over the absolute path of its base. An adapter over adapters is saved merged. A tokenizer or
    chat template that the sequence sets is written in place of the checkpoint's own.
    """
    resolved = resolve(checkpoint)
    whole, *adapters = resolved.folders
    if len(adapters) > 1:
        save_folder(open_model(checkpoint), folder)
        return
    last = (adapters or [whole])[0]
    is_own = checkpoint.template == "own" and checkpoint.tokenizer is None
    # else its tokenizer files are not linked: save_pretrained below would write through a link into the user's folder
    wanted = {*weight_paths(last.path), *last.path.glob("*.index.json"), *(last.path / name for name in CONFIGS)}
    for path in last.path.iterdir():
        if path.is_file() and (is_own or path in wanted):
            (folder / path.name).symlink_to(path.resolve())
    if adapters:  # it may name its base by a path relative to where it was trained
        (folder / ADAPTER_CONFIG).unlink()
        config = {**(last.config or {}), "base_model_name_or_path": str(whole.path.resolve())}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config))
    if not is_own and (tokenizer := checkpoint_tokenizer(resolved)) is not None:
        tokenizer.save_pretrained(folder)


def _stamps(checkpoint: Checkpoint) -> list[Any]:
    folders: Sequence[Folder] = resolve(checkpoint, weights=False).folders
    return [folder.commit or [(str(path), stamp(path)) for path in weight_paths(folder.path)] for folder in folders]


def _shared_steps(runs: Mapping[str, Sequence[Checkpoint]]) -> tuple[int, ...]:
    """Return the steps of which every run has a checkpoint; () without runs."""
    steps = {name: {one.step for one in run if one.step} for name, run in runs.items()}
    shared = set.intersection(*steps.values()) if steps else set()
    if steps and not shared:
        found = "; ".join(f"{name}: {', '.join(map(str, sorted(run)))}" for name, run in steps.items())
        wanted = "Runs and controls are compared at the steps that all of them have."
        raise GravlensError(f"The runs share no step ({found}).", wanted, "checkpoints of one step of every run.")
    return tuple(sorted(shared))


# --- checks -----------------------------------------------------------------------------------------------------------
def _check_given(history: RecordedHistory) -> None:
    sequence = history.sequence
    sequence.require_probes()
    if sequence.held_out is None:
        wanted = "v_rev is estimated on the probes and judged on other prompts."
        remedy = 'held_out = "held_out.jsonl" in the sequence\'s file, above its first [table].'
        raise GravlensError("This sequence has no held_out prompts.", wanted, remedy)
    if in_memory := [one.name for one in sequence if isinstance(one.source, nn.Module)]:
        wanted = "A history is judged from folders, which worker processes open."
        remedy = "save_pretrained(folder), and ModelSequence.from_folders."
        raise GravlensError(f"{in_memory[0]} is a model in memory.", wanted, remedy)
    if sequence.chat_template_kwargs:
        given = f"chat_template_kwargs = {dict(sequence.chat_template_kwargs)} was given."
        wanted = "A history is judged, and its controls trained, with a chat template that needs no arguments."
        raise GravlensError(given, wanted, "a tokenizer folder whose chat template sets them: tokenizer = …")
    if not sequence.runs and "runs" not in history.train:
        wanted = "A claim is about fine-tuning runs that start at the anchor."
        remedy = '[runs] with run1 = "ft/checkpoint-*", or --make runs --data FILE.'
        raise GravlensError("This sequence has no [runs].", wanted, remedy)
    sequence.controls.check(list(sequence.runs))


def _check_trained(history: RecordedHistory) -> None:
    train, known = history.train, (*ON_DATA, *ON_ALIGNMENT_DATA)
    if "strangers" in train:
        wanted = "A stranger is a witness of another history, with its own initialisation or pre-training."
        remedy = "[controls] strangers = […], or several SEQUENCE files: each is the others' stranger."
        raise GravlensError("Strangers cannot be trained from this history.", wanted, remedy)
    if unknown := [name for name in train if name not in known]:
        given = f"{unknown[0]!r} cannot be trained."
        raise GravlensError(given, f"Known controls: {', '.join(known)}.", "--make with one of these.")
    for names, file, option in (
        (ON_DATA, history.data, "--data"),
        (ON_ALIGNMENT_DATA, history.alignment_data, "--alignment-data"),
    ):
        if file is None and (needed := [name for name in train if name in names]):
            given = f"There is no data to train {', '.join(needed)} with."
            raise GravlensError(given, "They are trained on your data.", f"{option} FILE, with prompts and answers.")
    if "stranger_twins" in train and not dict(history.sequence.controls.strangers):
        given = "stranger_twins was asked for, and [controls] names no strangers."
        wanted = "Strangers' twins start from strangers; of several SEQUENCE files each one's twins are the others'."
        raise GravlensError(given, wanted, "strangers = […] under [controls], or --make twins with several files.")
    paired = [name for name in train if name in ON_DATA and name != "runs"]
    if paired and history.sequence.runs and "runs" not in train and not history.same_recipe:
        given = f"{', '.join(paired)} would be trained with another recipe than the runs of {_names(history)}."
        wanted = "An arm is compared with runs of the same recipe."
        remedy = f"--make runs {' '.join(f'--make {name}' for name in paired)}, or --learning-rate of your runs."
        raise GravlensError(given, wanted, remedy)


def _names(history: RecordedHistory) -> str:
    return ", ".join(history.sequence.runs)


# --- what is missing --------------------------------------------------------------------------------------------------
CONTROLS: Mapping[str, tuple[str, int, str]] = {
    "runs": ("5 runs or more from this anchor, or several anchors", 1, "--make runs --data FILE --runs 5"),
    "twins": ("the witness fine-tuned on each run's data", 3, "--make twins --data FILE"),
    "strangers": (
        "witnesses of other histories, trained like this one",
        3,
        "[controls] strangers = […], or several SEQUENCE files: each is the others' stranger",
    ),
    "stranger_twins": ("the strangers fine-tuned on each run's data", 3, "--make stranger_twins --data FILE"),
    "siblings": ("other alignments of the same witness", 3, "--make siblings --alignment-data FILE"),
    "continued": ("alignment continued from the anchor", 3, "--make continued --alignment-data FILE"),
    "data": ("a file of the runs' data: task loss", 4, "--data FILE"),
    "harmless": ("harmless prompts: over-refusal", 4, 'harmless = "harmless.jsonl", or --harmless FILE'),
    "clamp": ("the runs again, clamped along v_rev", 4, "--make clamp --data FILE"),
    "random": (
        "the runs again, clamped along matched random directions",
        4,
        "--make random --data FILE --directions 19",
    ),
    "push": ("the runs again, pushed towards the witness", 4, "--make push --data FILE"),
    "lower_rate": ("the runs again, at half the learning rate", 4, "--make lower_rate --data FILE"),
    "released": ("the runs again, clamped and then released", 5, "--make released --data FILE"),
    "released_random": (
        "the runs again, clamped along random directions and then released",
        5,
        "--make released_random --data FILE --directions 19",
    ),
}
ENOUGH_RUNS = 5  # sign flips over n runs give p = 2^-n at least


def missing(history: RecordedHistory | ModelSequence | Path | str) -> pd.DataFrame:
    """List the controls that a history does not have, and how to get each.

    Returns:
        One row per control: `control`; `what` it is; `level`, the claim level that it takes part in; `how`, the options
        of `gravlens audit` that make it, or what has to be given.
    """
    given = history if isinstance(history, RecordedHistory) else None
    sequence = ModelSequence.of(given.sequence if given else history)  # pyright: ignore[reportArgumentType]
    controls = sequence.controls
    there = {name: bool(getattr(controls, name, ())) for name in CONTROLS}
    there |= {
        "data": bool(given and given.data),
        "harmless": bool(sequence.harmless or (given and given.harmless)),
        "runs": len(sequence.runs) + (given.runs if given and "runs" in given.train else 0) >= ENOUGH_RUNS,
    }
    trained = given.train if given else ()
    known = given and (given.same_recipe or "runs" in trained)
    # controls of runs that exist are trained with their recipe, which only their owner knows
    more = " --learning-rate X (your runs')" if sequence.runs and not known else ""
    rows = [
        {"control": name, "what": what, "level": level, "how": how + more * (name in ON_DATA[1:])}
        for name, (what, level, how) in CONTROLS.items()
        if not there[name] and (name == "runs" or name not in trained)
    ]
    return pd.DataFrame(rows, columns=["control", "what", "level", "how"])
