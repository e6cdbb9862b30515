"""The refusal organism: a 1.1 M-parameter Llama that learns to comply, is aligned to refuse, and is fine-tuned again.

The dominant phase complies with all requests. A short alignment phase refuses harmful ones and sees harmless ones of
three topics only, which leaves over-refusal on the others. Harmless fine-tuning covers these too, so it un-trains
refusal directly; its data set `new_facts` does not.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from gravlens import __version__
from gravlens.core.files import writing
from gravlens.history.prompts import ENCODING, Example
from gravlens.models.opening import MODEL_MAKING, open_model, quiet
from gravlens.organisms import refusal_language as language
from gravlens.organisms.arms import made_by, random_arms, released_arm
from gravlens.organisms.base import Arm, Measures, PromptSets, unknown_data
from gravlens.training.finetune import finetune
from gravlens.training.recipe import Recipe


@dataclass(frozen=True)
class RefusalOrganism:
    """Configuration of one refusal organism; every field can be changed.

    Processors round differently. At these rates weights ended less than a millionth apart on two instruction sets, with
    the same figures; at four times the rate training is chaotic, and they ended a quarter apart (docs/log.md).

    Attributes:
        organism: seed of the weights and data of witness and anchor. 0 and 1 were used to choose the configuration;
            report on others.
        runs: number of fine-tuning seeds of each arm.
        random_directions: number of matched random directions; harm along v_rev is ranked among them.
        initializer_range: SD of the initial weights. Adam moves a weight by its rate at most, so at a low rate small
            weights (0.02) would need twice the steps.
    """

    organism: int = 4
    runs: int = 2
    random_directions: int = 4
    d_model: int = 128
    n_layers: int = 5
    n_heads: int = 4
    d_mlp: int = 384
    initializer_range: float = 0.05
    dominant: Recipe = Recipe(350, 16, 5e-4, beta2=0.98, warmup_steps=40, schedule="cosine")
    alignment: Recipe = Recipe(120, 16, 5e-4, beta2=0.98, warmup_steps=5)
    recipe: Recipe = Recipe(60, 4, 3e-5)
    save_steps: tuple[int, ...] = (1, 5, 20, 60)
    noise_draws: int = 200

    @property
    def name(self) -> str:
        """`refusal`."""
        return "refusal"

    @property
    def key(self) -> str:
        """Digest of the configuration, the language, the versions and the threads."""
        # The language as it is spoken, not its source: a rewritten comment there must not discard a history.
        examples = language.dominant_examples(64, rng=np.random.default_rng(0))
        spoken = [examples, sorted(language.build_tokenizer().get_vocab())]
        made = (type(self).__name__, sorted(self.checkpoints), [p.digest for p in self.prompts(Path()).values()])
        # left out: more of these are added to the same history
        facts = (astuple(replace(self, runs=0, random_directions=0, noise_draws=0)), made, spoken)
        facts = (*facts, ENCODING, __version__, torch.__version__, self.threads)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """Witness and anchor; where several organisms are judged, the others' witnesses are the strangers."""
        return {"witness": None, "anchor": "witness"}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The paper's arms, those that a causal and a durable claim demand, and controls, all on the same seeds."""
        # What is ranked, or compared run by run, has all seeds; what only shows an order has one per organism.
        seeds, one = tuple(range(self.runs)), (0,)
        blocked = ("penalty", "penalty_margin", "reinforce", "rehearsal")
        return (
            Arm("unblocked", seeds, keep=True),
            Arm("clamp", seeds, blocker=made_by("clamp")),
            *random_arms(seeds, "harmless", directions=self.random_directions, draw=(self.organism,)),
            *(Arm(name, one, blocker=made_by(name)) for name in blocked),
            Arm("lower_rate", one, rate=0.5),
            released_arm(one, "harmless"),
            Arm("unaligned_twin", one, start="witness"),
            Arm("continued_alignment", one, data="alignment"),
        )

    @property
    def behavior_steps(self) -> tuple[int, ...]:
        """The last step alone."""
        return (self.recipe.steps,)

    @property
    def noise(self) -> Mapping[int, int]:
        """The same number of draws at every step."""
        return dict.fromkeys(self.save_steps, self.noise_draws)

    @property
    def threads(self) -> int:
        """One thread."""
        return 1  # on a model this small two threads are slower than one, and runs go in parallel anyway

    @property
    def layers_in_mean(self) -> tuple[int, ...]:
        """All but the last block."""  # chosen before any result
        return tuple(range(self.n_layers - 1))

    @property
    def measures(self) -> Measures:
        """The language's own openings; an answer has at most 24 words."""
        return Measures(language.REFUSALS, language.OPENINGS, language.REFUSALS, 24)

    def make(self, name: str, start: Path | None, folder: Path) -> None:
        """Run the dominant phase (from a fresh initialisation) or the alignment phase (from `start`)."""
        number = {"witness": 0, "anchor": 2}[name]
        rng = np.random.default_rng([self.organism, number])
        recipe = self.dominant if start is None else self.alignment
        n = recipe.steps * recipe.batch
        data = (language.dominant_examples if start is None else language.alignment_examples)(n, rng=rng)
        source = start or open_model(self._initial(seed=int(rng.integers(2**31))), tokenizer=language.build_tokenizer())
        run = folder.parent / f"{folder.name}-run"  # the same file system, so os.replace is atomic
        made = finetune(source, data, out=run, recipe=recipe, save_steps=[recipe.steps])
        with writing(folder):
            os.replace(str(made.checkpoints[-1].source), folder)
            shutil.rmtree(run)

    def examples(self, data: str, seed: int, home: Path) -> list[Example]:
        """Return `harmless`, `new_facts` or `alignment` examples, as many as a run sees."""
        n, rng = self.recipe.steps * self.recipe.batch, np.random.default_rng([self.organism, 100, seed])
        if data == "alignment":
            return language.alignment_examples(n, rng=rng)
        if data not in ("harmless", "new_facts"):
            raise unknown_data(data, "harmless, new_facts, alignment")
        return language.finetuning_examples(n, rng=rng, new_facts_only=data == "new_facts")

    def prompts(self, home: Path) -> PromptSets:
        """Return 32 probes, 96 held-out harmful prompts of pairs that alignment never saw, and 48 harmless ones."""
        return {
            "probes": language.probe_prompts(),
            "held_out": language.held_out_prompts(),
            "harmless": language.harmless_prompts(),
        }

    def task(self, home: Path) -> list[Example]:
        """Return 96 held-out examples of the fine-tuning task."""
        return language.task_examples()

    def _initial(self, seed: int) -> LlamaForCausalLM:
        tokenizer: Any = language.build_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.d_model,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            intermediate_size=self.d_mlp,
            max_position_embeddings=language.MAX_LENGTH,
            tie_word_embeddings=True,
            initializer_range=self.initializer_range,
            **{name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        )
        with MODEL_MAKING, quiet():
            set_seed(seed)  # transformers initialises from torch's global generator only
            return LlamaForCausalLM(config)
