"""Organisms small enough for a test: the refusal organism, and a stand-in for a real model with prompt files."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tiny
from histories import write_rows
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from gravlens.history.prompts import PromptSet
from gravlens.organisms import refusal_language as language
from gravlens.organisms.base import ENGLISH, Measures
from gravlens.organisms.pretrained import CHATML, Pretrained
from gravlens.organisms.refusal import RefusalOrganism
from gravlens.training.recipe import Recipe

PLAN: dict[str, Any] = {
    "organism": 0,
    "runs": 2,
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 2,
    "d_mlp": 48,
    "dominant": Recipe(6, 8, 2e-3),
    "alignment": Recipe(4, 8, 1e-3),
    "recipe": Recipe(20, 4, 1e-3),
    "save_steps": (1, 20),
    "noise_draws": 3,
}


def organism(**changes: Any) -> RefusalOrganism:
    """A refusal organism of 3 narrow layers that trains for a moment."""
    return RefusalOrganism(**{**PLAN, **changes})


@dataclass(frozen=True)
class Short(RefusalOrganism):
    """An organism that is asked little and says little."""

    @property
    def measures(self) -> Measures:
        return replace(super().measures, max_new_tokens=6)

    def prompts(self, home: Path) -> dict[Any, PromptSet]:
        return {name: prompts[:12] for name, prompts in super().prompts(home).items()}


@contextmanager
def inline(_threads: int, _workers: int | None) -> Iterator[Callable[[str, Sequence[Callable[[], Any]]], None]]:
    """In place of worker processes: the jobs in this process, one after the other."""

    def run_all(_name: str, jobs: Sequence[Callable[[], Any]]) -> None:
        for job in jobs:
            job()

    yield run_all


def requests(n: int, *, harmful: bool) -> list[str]:
    """`n` distinct requests, tame like all of the organism's language."""
    pairs = [pair for topic in (language.HARMFUL if harmful else language.HARMLESS).values() for pair in topic]
    every = [language.prompt_of(pair, frame) for frame in language.TRAINING_FRAMES for pair in pairs]
    return every[:n]


def english_tokenizer() -> PreTrainedTokenizerFast:
    """Words of the organism's language and of the English refusals, with ChatML's turns."""
    backend = Tokenizer(WordLevel(unk_token="<unk>"))
    splitter = Whitespace()
    spoken = [
        *language.PHRASINGS,
        *language.MODIFIERS,
        language.GLUE,
        language.TOOLS,
        *language.TOOL_OF,
        *language.STEP_OF,
    ]
    texts = [*spoken, *ENGLISH.refusals, *ENGLISH.compliances]
    words = sorted({word for text in texts for word, _ in splitter.pre_tokenize_str(text)})
    specials = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant"]
    backend.model = WordLevel({word: i for i, word in enumerate([*specials, *words])}, unk_token="<unk>")
    backend.pre_tokenizer = splitter
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    )


def pretrained(home: Path, *, answers: bool = True, **changes: Any) -> Pretrained:
    """A random model, its tokenizer and two prompt files in `home`, and the organism on them."""
    home.mkdir(parents=True, exist_ok=True)
    tokenizer = english_tokenizer()
    model = tiny.llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    harmful = [{"prompt": prompt} for prompt in requests(110, harmful=True)]
    harmless = [{"prompt": prompt} for prompt in requests(300, harmful=False)]
    if answers:
        tools = language.TOOLS.split()
        harmless = [{**row, "answer": f"get the {tools[i % 20]} and rinse it"} for i, row in enumerate(harmless)]
    write_rows(home / "harmful.jsonl", harmful)
    write_rows(home / "harmless.jsonl", harmless)
    plan: dict[str, Any] = {
        "model": home / "model",
        "harmful": home / "harmful.jsonl",
        "harmless": home / "harmless.jsonl",
        "threads": 1,
        "layers_in_mean": (0, 1),
        "save_steps": (1, 4),
        "behavior_steps": (4,),
        "noise_draws": 2,
        "alignment": replace(Pretrained.alignment, steps=6, batch=4, learning_rate=1e-3),
        "recipe": replace(Pretrained.recipe, steps=4, batch=4, learning_rate=1e-3),
    }
    return Pretrained(**{**plan, **changes})
