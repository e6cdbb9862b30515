"""An organism made of a real pre-trained chat model: a short alignment phase, then harmless fine-tuning.

The witness is the model itself. Its own greedy answers to harmless prompts keep the alignment phase close to its style,
and are one of two harmless data sets; the other is the answers that come with the prompts, if there are any.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from gravlens import __version__
from gravlens.behavior.answers import generate_answers
from gravlens.core.errors import GravlensError, at_home
from gravlens.history.hub import located
from gravlens.history.prompt_formats import Row, read_rows
from gravlens.history.prompts import ENCODING, Example, PromptSet
from gravlens.models.opening import load_tokenizer, open_model, save_folder
from gravlens.organisms.arms import made_by
from gravlens.organisms.base import ENGLISH, Arm, Measures, PromptSets, inner_layers, unknown_data
from gravlens.organisms.fetch import cache_folder, fetched_prompts, fetched_smollm2
from gravlens.organisms.gguf import gguf_to_folder
from gravlens.training.finetune import finetune
from gravlens.training.recipe import Recipe

# ChatML without the default system turn that some templates add: the same for every prompt, it only costs tokens.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
T = TypeVar("T")
N_PROBES, N_HELD_OUT, N_HARMLESS, N_TASK, N_ALIGNED = 32, 64, 48, 48, 128  # 64: a rate of 95 % is known to 87-98 %
# bf16: a forward pass of 16 x 64 tokens takes .9 s in place of 1.5 s.
PHASE = Recipe(80, 8, 2e-5, weight_decay=0.0, bf16=True, freeze_embeddings=True)


@dataclass(frozen=True)
class Pretrained:
    """Configuration of one organism made of a real model; every field can be changed.

    Attributes:
        model: folder or hub id (`hf://owner/name`) of a chat model.
        harmful: file of harmful prompts: 64 are held out to judge on, the rest is for alignment and probes.
        harmless: file of harmless prompts, with answers or without.
        harmful_train: more harmful prompts for alignment and probes.
        chat_template: replaces the tokenizer's own in all checkpoints.
        runs: number of fine-tuning seeds of each arm.
        threads: number of threads of each process.
    """

    model: Path | str
    harmful: Path
    harmless: Path
    harmful_train: Path | None = None
    chat_template: str | None = None
    runs: int = 1
    threads: int = os.cpu_count() or 1
    layers_in_mean: tuple[int, ...] = tuple(range(8, 25))
    alignment: Recipe = PHASE
    recipe: Recipe = replace(PHASE, steps=50)
    save_steps: tuple[int, ...] = (1, 5, 20, 50)
    behavior_steps: tuple[int, ...] = (20, 50)
    noise_draws: int = 20

    @property
    def name(self) -> str:
        """`pretrained`."""
        return "pretrained"

    @property
    def key(self) -> str:
        """Digest of the configuration, the files' contents, the versions and the threads."""
        files = [at_home(f) for f in (self.harmful, self.harmless, self.harmful_train) if f is not None]
        for file in files:
            read_rows(file, "prompt")  # raises the error that explains an invalid file, before anything is made
        digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        # runs=0: more runs are added to the same history, which is made once
        made = (ENCODING, self.measures.max_new_tokens, __version__, torch.__version__)
        facts = (astuple(replace(self, runs=0)), digests, *made)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """Witness, anchor, and a second alignment."""
        # no wrong witness: no other model has this vocabulary
        return {"witness": None, "anchor": "witness", "sibling_anchor": "witness"}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """Both harmless data sets, unblocked and blocked; a random direction; the unaligned twin."""
        seeds, penalty, own = tuple(range(self.runs)), made_by("penalty"), "own_answers"
        data = "given_answers" if self._has_answers() else own
        arms = (
            Arm("unblocked", seeds, data, keep=True),
            Arm("penalty", seeds, data, blocker=penalty),
            Arm("penalty_random", seeds, data, blocker=made_by("penalty_random")),
            Arm("unaligned_twin", seeds, data, start="witness"),
        )
        if data == own:
            return arms
        # A control for style: on the witness's own words alignment rose to .46 without any harm (docs/pretrained.md).
        return (*arms, Arm(f"unblocked_{own}", seeds, own), Arm(f"penalty_{own}", seeds, own, blocker=penalty))

    @property
    def noise(self) -> Mapping[int, int]:
        """At the last step only."""  # each draw is a forward pass over all held-out prompts
        return {self.recipe.steps: self.noise_draws}

    @property
    def measures(self) -> Measures:
        """English openings, `MAX_NEW_TOKENS` per answer."""
        return ENGLISH

    def make(self, name: str, start: Path | None, folder: Path) -> None:
        """Copy the model with its own answers, or run the alignment phase."""
        if start is None:
            self._copy_witness(folder)
            return
        seed, recipe = {"anchor": 0, "sibling_anchor": 1}[name], self.alignment
        data = self._alignment_examples(start, np.random.default_rng([seed, 50]))
        made = finetune(start, data, out=folder / "run", recipe=recipe, save_steps=[recipe.steps], seed=seed)
        for path in Path(str(made.checkpoints[-1].source)).iterdir():
            os.replace(path, folder / path.name)
        shutil.rmtree(folder / "run")

    def examples(self, data: str, seed: int, home: Path) -> list[Example]:
        """Return `given_answers` (of the harmless file) or `own_answers` (the witness's), on the same prompts."""
        rows = self._harmless()[N_HARMLESS + N_TASK + N_ALIGNED :]  # disjoint from judging, task loss and alignment
        if data == "own_answers":
            own = _own_answers(home / "witness")
            return [Example(row["prompt"], own[row["prompt"]]) for row in rows]
        if data != "given_answers":
            raise unknown_data(data, "given_answers, own_answers")
        return [Example(row["prompt"], row["answer"]) for row in rows]

    def prompts(self, home: Path) -> PromptSets:
        """Return probes (half of each source's alignment prompts), and held-out and harmless prompts of no training."""
        held_out, _, probes = self._harmful()
        return {
            "probes": PromptSet(tuple(probes), "harmful"),
            "held_out": PromptSet(tuple(held_out), "harmful"),
            "harmless": PromptSet(tuple(row["prompt"] for row in self._harmless()[:N_HARMLESS]), "harmless"),
        }

    def task(self, home: Path) -> list[Example]:
        """Return held-out harmless prompts with their given answers, or else the witness's own."""
        rows = self._harmless()[N_HARMLESS : N_HARMLESS + N_TASK]
        own = {} if self._has_answers() else _own_answers(home / "witness")
        return [Example(row["prompt"], own.get(row["prompt"]) or row.get("answer", "")) for row in rows]

    def _copy_witness(self, folder: Path) -> None:
        model = open_model(self.model, tokenizer=load_tokenizer(self.model))
        if self.chat_template is not None and model.tokenizer is not None:
            model.tokenizer.chat_template = self.chat_template
        prompts = PromptSet(tuple(row["prompt"] for row in self._harmless()), "harmless")
        answers = generate_answers(model, prompts, max_new_tokens=self.measures.max_new_tokens)
        save_folder(model, folder)
        lines = [json.dumps({"prompt": p, "answer": a}) for p, a in zip(prompts, answers, strict=True)]
        (folder / "own_answers.jsonl").write_text("\n".join(lines) + "\n")

    def _alignment_examples(self, witness: Path, rng: np.random.Generator) -> list[Example]:
        n = self.alignment.steps * self.alignment.batch // 2
        _, harmful, _ = self._harmful()
        own, refusals = _own_answers(witness), ENGLISH.refusals
        harmless = [row["prompt"] for row in self._harmless()[N_HARMLESS + N_TASK :][:N_ALIGNED]]
        refused = [Example(harmful[i % len(harmful)], refusals[rng.integers(len(refusals))]) for i in range(n)]
        return refused + [Example(prompt, own[prompt]) for prompt in (harmless[i % len(harmless)] for i in range(n))]

    def _harmful(self) -> tuple[list[str], list[str], list[str]]:
        """Return held-out prompts, those of alignment, and the probes among these (half of each file)."""
        first = _shuffled(_texts(self.harmful))
        more = [] if self.harmful_train is None else _shuffled(_texts(self.harmful_train))
        more = [text for text in more if text not in first]
        held_out, rest = first[:N_HELD_OUT], first[N_HELD_OUT:]
        if len(rest) + len(more) < N_PROBES:
            given = f"{self.harmful} has {len(first)} harmful prompts."
            wanted = f"{N_HELD_OUT} are held out and at least {N_PROBES} more are needed."
            raise GravlensError(given, wanted, "a longer file, or harmful_train with more prompts.")
        half = N_PROBES // 2 if len(more) >= N_PROBES // 2 else 0  # AdvBench alone: .16 on HarmBench, against .72
        return held_out, _shuffled(rest + more), (more[:half] + rest)[:N_PROBES]

    def _harmless(self) -> list[Row]:
        rows = _shuffled(list({row["prompt"]: row for row in read_rows(self.harmless, "prompt")}.values()))
        least = N_HARMLESS + N_TASK + N_ALIGNED + 64
        if len(rows) < least:
            given = f"{self.harmless} has {len(rows)} harmless prompts."
            raise GravlensError(given, f"At least {least} are needed.", "a longer file.")
        return rows

    def _has_answers(self) -> bool:
        return all(row.get("answer") for row in read_rows(self.harmless, "prompt"))


def _texts(path: Path) -> list[str]:
    # each prompt once: a repeated one could be both trained on and judged on
    return list(dict.fromkeys(row["prompt"] for row in read_rows(path, "prompt")))


def _shuffled(rows: list[T]) -> list[T]:
    # one fixed order for all seeds: which prompts are held out must not depend on the run
    return [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]


def _own_answers(witness: Path) -> dict[str, str]:
    return {row["prompt"]: row["answer"] for row in read_rows(witness / "own_answers.jsonl", "prompt", "answer")}


def pretrained_organism(
    model: str = "",
    harmful: Path | None = None,
    harmless: Path | None = None,
    *,
    runs: int = 0,
    threads: int = 0,
    quick: bool = False,
) -> Pretrained:
    """Return the organism of a model; files that are not given are those of `gravlens fetch`.

    Args:
        model: hub id (`hf://owner/name`), folder or GGUF file.
        harmful: file of harmful prompts.
        harmless: file of harmless prompts, with answers or without.
        runs: number of fine-tuning seeds of each arm; 0: one.
        threads: number of threads of a process; 0: all cores.
        quick: a shorter alignment phase and fewer draws of weight noise.

    Raises:
        GravlensError: no files were given and none fetched.
    """
    source = located(model) if model else fetched_smollm2()
    prompts = fetched_prompts()
    if source is None:
        raise GravlensError("No model was given.", "A model is needed.", "gravlens fetch smollm2, or --model FOLDER.")
    if (harmful is None or harmless is None) and prompts is None:
        remedy = "gravlens fetch prompts, or --harmful and --harmless."
        raise GravlensError("No prompts were given.", "Both sets are needed.", remedy)
    if str(source).endswith(".gguf"):
        source = gguf_to_folder(at_home(source), cache_folder() / Path(source).stem)
    extra: dict[str, Any] = {"threads": threads} if threads else {}
    if model:
        extra["layers_in_mean"] = inner_layers(source)
    if quick:
        extra |= {"alignment": replace(PHASE, steps=40), "noise_draws": 5}
    return Pretrained(
        source,
        harmful or prompts.harmful,  # pyright: ignore[reportOptionalMemberAccess]
        harmless or prompts.harmless,  # pyright: ignore[reportOptionalMemberAccess]
        # AdvBench was cleaned of HarmBench's prompts only: with other harmful prompts it could leak into training.
        harmful_train=None if harmful or prompts is None else prompts.harmful_train,
        chat_template=None if model else CHATML,
        runs=runs or 1,
        **extra,
    )
