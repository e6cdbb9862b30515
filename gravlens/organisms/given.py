"""A user's own checkpoints and data as an organism: the same arms and measures as for the others."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import torch

from gravlens import __version__
from gravlens.core.display import brief
from gravlens.core.errors import GravlensError
from gravlens.history.prompts import ENCODING, Example, PromptSet, read_examples
from gravlens.history.sequence import ModelSequence
from gravlens.history.sources import resolve
from gravlens.models.opening import open_model, save_folder
from gravlens.organisms.arms import core_arms
from gravlens.organisms.base import ENGLISH, Arm, Measures, PromptSets, inner_layers, n_task
from gravlens.training.recipe import Recipe


@dataclass(frozen=True)
class GivenHistory:
    """Witness, anchor and prompts of a SEQUENCE.toml, and harmless data to fine-tune on.

    Attributes:
        sequence: SEQUENCE.toml with witness, anchor, probes and held-out prompts (docs/sequence.md).
        data: a file of `prompt` and `answer`, or of conversations (docs/prompts.md); the last eighth is held out for
            the task loss.
        harmless: prompts on which refusing would be over-refusal; default: the sequence's.
        runs: number of fine-tuning seeds of each arm.
        layers: layers of the mean and of the blockers; default: the inner ones.
        measures: how this model's refusals and other answers begin.
        columns: columns of prompt and answer in `data`; default: by its columns.
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
    columns: tuple[str, str] | None = None
    __repr__ = brief

    def __post_init__(self) -> None:
        object.__setattr__(self, "save_steps", self.recipe.saved_steps(self.save_steps))
        history = self._history()
        sets = {"probes": history.probes, "held_out": history.held_out, "harmless": self.harmless or history.harmless}
        if missing := [name for name, given in sets.items() if given is None]:
            given = f"{self.sequence} names no {' and no '.join(missing)} prompts."
            wanted = "Blockers act on the probes; harm is judged on held_out prompts, over-refusal on harmless ones."
            raise GravlensError(given, wanted, f'{missing[0]} = "{missing[0]}.jsonl" in that file.')

    @property
    def name(self) -> str:
        """`given`."""
        return "given"

    @property
    def key(self) -> str:
        """Digest of the files' contents, the paths of the checkpoints, the recipe, the versions and the threads."""
        history = self._history()
        texts = [repr(self._data()), *(prompts.digest for prompts in self.prompts(Path()).values())]
        # checkpoints by path: the key is read at every call, and hashing would read all weights
        sources = [str(checkpoint.source) for checkpoint in (history.witness, history.anchor)]
        chosen = (self.layers, astuple(self.recipe), self.save_steps, astuple(self.measures), self.threads)
        facts = (texts, sources, *chosen, ENCODING, __version__, torch.__version__)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """Witness and anchor, which exist already."""
        return {"witness": None, "anchor": None}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The arms that a large model can afford."""
        return core_arms(tuple(range(self.runs)), "data")

    @property
    def behavior_steps(self) -> tuple[int, ...]:
        """The last step only."""
        return (self.recipe.steps,)

    @property
    def noise(self) -> Mapping[int, int]:
        """No weight noise."""
        return {}

    @property
    def layers_in_mean(self) -> tuple[int, ...]:
        """The given layers, or the inner ones."""
        return self.layers or inner_layers(resolve(self._history().anchor).base.path)

    def make(self, name: str, start: Path | None, folder: Path) -> None:
        """Link a checkpoint's files, or save an adapter merged."""
        checkpoint = getattr(self._history(), name)
        whole, *adapters = resolve(checkpoint).paths
        if adapters:
            save_folder(open_model(checkpoint), folder)
            return
        for path in whole.iterdir():
            if path.is_file():
                (folder / path.name).symlink_to(path.resolve())  # no second copy of the weights

    def examples(self, data: str, seed: int, home: Path) -> list[Example]:
        """Return all of the data but the last eighth; `finetune` orders it by the seed."""
        rows = self._data()
        return rows[: len(rows) - n_task(rows, self.data)]

    def prompts(self, home: Path) -> PromptSets:
        """Return the sequence's prompts, and the harmless ones."""
        history = self._history()
        return {
            "probes": replace(history.require_probes(), role="harmful"),
            "held_out": PromptSet.of(history.held_out or (), "harmful"),
            "harmless": history.prompts_of(self.harmless or history.harmless or (), "harmless"),
        }

    def task(self, home: Path) -> list[Example]:
        """Return the last eighth of the data."""
        rows = self._data()
        return rows[len(rows) - n_task(rows, self.data) :]

    def _data(self) -> list[Example]:
        return read_examples(self.data, columns=self.columns)

    def _history(self) -> ModelSequence:
        history = ModelSequence.from_toml(self.sequence)
        own = {
            "chat_template": history.chat_template == "own",
            "tokenizer": history.tokenizer is None,
            "chat_template_kwargs": not history.chat_template_kwargs,
        }
        if wrong := [
            name for name, is_own in own.items() if not is_own
        ]:  # a run's checkpoints are saved with its start's tokenizer
            given = f"{self.sequence} sets {wrong[0]} = {str(getattr(history, wrong[0]))!r} for all checkpoints."
            wanted = f"A comparison trains and measures with each checkpoint's own {wrong[0].replace('_', ' ')}."
            raise GravlensError(
                given, wanted, "save it into the folders of both checkpoints (tokenizer.save_pretrained)."
            )
        return history
