"""A user's own checkpoints and data as a setting: the same arms and measures as for the histories made here."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from gravlens import __version__
from gravlens.core.errors import GravlensError
from gravlens.history.prompts import Example, PromptSet, read_examples
from gravlens.history.sequence import ModelSequence
from gravlens.history.sources import lineage
from gravlens.interventions.orthogonalization import save_folder
from gravlens.models.opening import open_model
from gravlens.organisms.arms import Arm, core_arms
from gravlens.organisms.base import Measures
from gravlens.organisms.pretrained import ENGLISH, inner_layers
from gravlens.training.finetune import Recipe


@dataclass(frozen=True)
class GivenHistory:
    """Witness, anchor and prompts of a sequence's file, and harmless data to fine-tune on.

    Attributes:
        sequence: SEQUENCE.toml with witness, anchor, probes and held-out prompts (docs/sequence.md).
        data: JSONL or CSV of `prompt` and `answer`; the last eighth is held out for the task's loss.
        harmless: prompts on which refusing would be over-refusal; default: the sequence's.
        runs: fine-tuning seeds of each arm.
        layers: of the mean and of the blockers; default: the inner ones.
        measures: how this model's refusals and other answers begin.
    """

    sequence: Path
    data: Path
    harmless: Path | None = None
    runs: int = 2
    layers: tuple[int, ...] = ()
    recipe: Recipe = Recipe(steps=50, batch=8, learning_rate=2e-5, weight_decay=0.0)
    save_steps: tuple[int, ...] = (1, 5, 20, 50)
    measures: Measures = ENGLISH
    threads: int = os.cpu_count() or 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "save_steps", self.recipe.saved_steps(self.save_steps))
        history = self._history()
        sets = {"probes": history.probes, "held_out": history.held_out, "harmless": self.harmless or history.harmless}
        if missing := [name for name, given in sets.items() if given is None]:
            raise GravlensError(
                f"{self.sequence} names no {' and no '.join(missing)} prompts.",
                "Blockers act on the probes, harm is judged on the held-out ones, over-refusal on the harmless ones.",
                f'{missing[0]} = "{missing[0]}.jsonl" in that file.',
            )

    @property
    def name(self) -> str:
        """`given`."""
        return "given"

    @property
    def key(self) -> str:
        """Digest of the files' contents, where the checkpoints lie, the recipe, the versions and the threads."""
        history = self._history()
        texts = [repr(read_examples(self.data)), *(prompts.digest for prompts in self.prompts(Path()).values())]
        sources = [str(checkpoint.source) for checkpoint in (history.witness, history.anchor)]
        facts = (texts, sources, self.layers, astuple(self.recipe), self.save_steps, astuple(self.measures))
        facts = (*facts, self.threads, __version__, torch.__version__)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """Both are there already."""
        return {"witness": None, "anchor": None}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Those that a large model can afford."""
        return core_arms(tuple(range(self.runs)), "data")

    @property
    def behavior_steps(self) -> tuple[int, ...]:
        """The last step alone."""
        return (self.recipe.steps,)

    @property
    def noise(self) -> Mapping[int, int]:
        """None is drawn."""
        return {}

    @property
    def layers_in_mean(self) -> tuple[int, ...]:
        """Those given, or the inner ones."""
        return self.layers or inner_layers(lineage(self._history().anchor)[0])

    def make(self, name: str, start: Path | None, folder: Path) -> None:
        """Link a checkpoint's files, or save it merged where it is an adapter."""
        checkpoint = getattr(self._history(), name)
        whole, *adapters = lineage(checkpoint)
        if adapters:
            folder.rmdir()
            save_folder(open_model(checkpoint), folder)
            return
        for path in whole.iterdir():
            if path.is_file():
                (folder / path.name).symlink_to(path.resolve())

    def examples(self, data: str, seed: int, home: Path) -> list[Example]:
        """All of the data but the last eighth."""
        rows = read_examples(self.data)
        return rows[: len(rows) - self._n_task(rows)]

    def prompts(self, home: Path) -> Mapping[Literal["probes", "held_out", "harmless"], PromptSet]:
        """The sequence's, and the harmless ones."""
        history = self._history()
        return {
            "probes": replace(history.require_probes(), role="harmful"),
            "held_out": PromptSet.of(history.held_out or (), "harmful"),
            "harmless": history.prompts_of(self.harmless or history.harmless or (), "harmless"),
        }

    def task(self, home: Path) -> list[Example]:
        """The last eighth of the data."""
        rows = read_examples(self.data)
        return rows[len(rows) - self._n_task(rows) :]

    def _n_task(self, rows: list[Example]) -> int:
        if len(rows) < 16:
            raise GravlensError(f"{self.data} has {len(rows)} rows.", "At least 16 are needed.", "more data.")
        return len(rows) // 8

    def _history(self) -> ModelSequence:
        history = ModelSequence.from_toml(self.sequence)
        if history.chat_template != "own":
            raise GravlensError(
                f'{self.sequence} says chat_template = "{history.chat_template}".',
                "A comparison trains and measures with each checkpoint's own template.",
                "save the template you want with the tokenizer of both checkpoints.",
            )
        if history.tokenizer is not None:
            raise GravlensError(
                f"{self.sequence} names a tokenizer for all checkpoints.",
                "A comparison trains and measures with each checkpoint's own tokenizer.",
                "save it into the folders of both checkpoints (tokenizer.save_pretrained).",
            )
        return history
