"""The refusal organism: a 1.1 M-parameter Llama that learns to comply, is aligned to refuse, and is fine-tuned again.

Everything about its history is known and cheap to make anew: the dominant phase complies with all requests; a short
alignment phase refuses harmful ones and sees harmless ones of three topics alone, which leaves over-refusal elsewhere;
harmless fine-tuning covers the other topics too and so un-trains refusal directly (its data set `new_facts` does not).
"""

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from gravlens import __version__
from gravlens.core.errors import GravlensError
from gravlens.history.prompts import Example, PromptSet
from gravlens.models.opening import open_model
from gravlens.organisms import refusal_language as language
from gravlens.organisms.arms import Arm, clamp, lifted, matched_twin, penalty, reinforce
from gravlens.organisms.base import Measures
from gravlens.training.finetune import Recipe, finetune


@dataclass(frozen=True)
class RefusalOrganism:
    """Configuration of one organism; change any part of it.

    Attributes:
        organism: seed of the weights and data of witness and anchor. 0 and 1 were used to choose the configuration, 2
            and 3 were seen with an earlier one (docs/log.md); report on others.
        runs: fine-tuning seeds of each arm.
    """

    organism: int = 4
    runs: int = 6
    d_model: int = 128
    n_layers: int = 5
    n_heads: int = 4
    d_mlp: int = 384
    dominant: Recipe = Recipe(400, 32, 2e-3, beta2=0.98, warmup_steps=40, schedule="cosine")
    alignment: Recipe = Recipe(120, 32, 1e-3, beta2=0.98, warmup_steps=5)
    recipe: Recipe = Recipe(100, 4, 3e-5)
    save_steps: tuple[int, ...] = (1, 5, 20, 100)
    noise_draws: int = 200

    @property
    def name(self) -> str:
        """Name of the setting."""
        return "refusal"

    @property
    def key(self) -> str:
        """Digest of the configuration, the versions and the threads: the same key, the same weights."""
        spoken = [
            language.dominant_examples(64, rng=np.random.default_rng(0)),
            sorted(language.build_tokenizer().get_vocab()),
        ]
        asked = [prompts.digest for prompts in self.prompts(Path()).values()]
        made = (type(self).__name__, sorted(self.checkpoints), asked)
        facts = (
            astuple(replace(self, runs=0, noise_draws=0)),
            made,
            spoken,
            __version__,
            torch.__version__,
            self.threads,
        )
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]

    @property
    def checkpoints(self) -> Mapping[str, str | None]:
        """Witness and anchor, and controls: a witness of another initialisation, second and third alignments."""
        siblings = dict.fromkeys(("anchor", "sibling_anchor", "sibling_anchor_2"), "witness")
        return {"witness": None, "wrong_witness": None, **siblings}

    @property
    def arms(self) -> tuple[Arm, ...]:
        """The paper's arms, those that a causal and a durable claim demand, and two controls, all on the same seeds."""
        seeds = tuple(range(self.runs))
        return (
            Arm("unblocked", seeds, keep=True),
            Arm("penalty", seeds, blocker=penalty),
            Arm("penalty_margin", seeds, blocker=partial(penalty, margin=0.03)),
            Arm("penalty_random", seeds, blocker=partial(penalty, along=matched_twin)),
            Arm("clamp", seeds, blocker=clamp),
            Arm("clamp_matched_twin", seeds, blocker=partial(clamp, along=matched_twin)),
            Arm("reinforce", seeds, blocker=reinforce),
            Arm("lower_rate", seeds, rate=0.5),
            lifted(seeds, "harmless"),
            Arm("unblocked_new_facts", seeds, data="new_facts"),
            Arm("unaligned_twin", seeds, start="witness"),
            Arm("continued_alignment", seeds, data="alignment"),
        )

    @property
    def behavior_steps(self) -> tuple[int, ...]:
        """The last step alone."""
        return (self.recipe.steps,)

    @property
    def noise(self) -> Mapping[int, int]:
        """As many draws at every step."""
        return dict.fromkeys(self.save_steps, self.noise_draws)

    @property
    def threads(self) -> int:
        """One: two threads on so small a model are slower than one, and runs go side by side."""
        return 1

    @property
    def layers_in_mean(self) -> tuple[int, ...]:
        """All but the last block."""
        return tuple(range(self.n_layers - 1))

    @property
    def measures(self) -> Measures:
        """Openings are the language's own; an answer is at most 24 words."""
        return Measures(language.REFUSALS, language.OPENINGS, language.REFUSALS, 24)

    def make(self, name: str, start: Path | None, folder: Path) -> None:
        """Run the dominant phase (from a fresh initialisation) or the alignment phase (from `start`)."""
        number = {"witness": 0, "wrong_witness": 1, "anchor": 2, "sibling_anchor": 3, "sibling_anchor_2": 4}[name]
        rng = np.random.default_rng([self.organism, number])
        recipe = self.dominant if start is None else self.alignment
        n = recipe.steps * recipe.batch
        data = (language.dominant_examples if start is None else language.alignment_examples)(n, rng=rng)
        source = start or open_model(self._initial(seed=int(rng.integers(2**31))), tokenizer=language.build_tokenizer())
        run = folder.parent / f"{folder.name}-run"
        made = finetune(source, data, out=run, recipe=recipe, save_steps=[recipe.steps])
        os.replace(str(made.checkpoints[-1].source), folder)
        shutil.rmtree(run)

    def examples(self, data: str, seed: int, home: Path) -> list[Example]:
        """`harmless`, `new_facts` or `alignment`, as many as a run sees."""
        n, rng = self.recipe.steps * self.recipe.batch, np.random.default_rng([self.organism, 100, seed])
        if data == "alignment":
            return language.alignment_examples(n, rng=rng)
        if data not in ("harmless", "new_facts"):
            raise GravlensError(
                f"The data set {data!r} was asked for.", "It has harmless, new_facts, alignment.", "one."
            )
        return language.finetuning_examples(n, rng=rng, new_facts_only=data == "new_facts")

    def prompts(self, home: Path) -> Mapping[Literal["probes", "held_out", "harmless"], PromptSet]:
        """32 probes, 96 held-out harmful prompts of pairs that alignment never saw, 48 harmless ones."""
        return {
            "probes": language.probe_prompts(),
            "held_out": language.held_out_prompts(),
            "harmless": language.harmless_prompts(),
        }

    def task(self, home: Path) -> list[Example]:
        """96 held-out examples of the fine-tuning task."""
        return language.task_examples()

    def _initial(self, seed: int) -> LlamaForCausalLM:
        set_seed(seed)
        tokenizer: Any = language.build_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=self.d_model,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            intermediate_size=self.d_mlp,
            max_position_embeddings=language.MAX_LENGTH,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return LlamaForCausalLM(config)
