"""A prompt that is longer than the context is refused wherever it would be run, and families without one are free."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import transformers
from histories import refused

from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.behavior.answers import generate_answers
from gravlens.behavior.divergence import answer_log_likelihood
from gravlens.behavior.scores import refusal_log_odds
from gravlens.blockers.anchoring import Rehearsal
from gravlens.history.encoding import encode
from gravlens.history.prompts import Example
from gravlens.history.sequence import ModelSequence
from gravlens.models.families import context_of
from gravlens.models.opening import open_model
from gravlens.training.finetune import Recipe, finetune

SHORT = list(tiny.PROMPTS)
LONG = " ".join(SHORT * 4)
LENGTH = len(encode(tiny.TOKENIZER, [LONG])[0])
OLD: Any = {"seq_length": 64}  # BLOOM's, of its training
LINEAR: Any = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}
OPENING = str(tiny.TOKENIZER.decode([60]))


def test_the_long_prompt_is_beyond_the_context_and_the_short_ones_are_not() -> None:
    assert LENGTH > 128 > max(map(len, encode(tiny.TOKENIZER, SHORT)))


PASSES: dict[str, Any] = {
    "read_residuals": lambda model: read_residuals(model, encode(model.tokenizer, [*SHORT, LONG]), layers=[0]),
    "refusal_log_odds": lambda model: refusal_log_odds(model, [*SHORT, LONG], openings=[OPENING]),
    "answer_log_likelihood": lambda model: answer_log_likelihood(model, [LONG], ["get the padlock"]),
    "generate_answers": lambda model: generate_answers(model, [*SHORT, LONG], max_new_tokens=1),
    "Rehearsal": lambda model: Rehearsal([Example(LONG, "get it")]).bind(model, rng=np.random.default_rng(0)),
}


@pytest.mark.parametrize("run", PASSES)
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_every_pass_names_prompt_length_and_context(kind: str, run: str, tmp_path: Path) -> None:
    model = tiny.opened(kind, tmp_path)
    with refused(f"'{LONG[:20]}", " tokens") as _:
        PASSES[run](model)
    with pytest.raises(Exception, match=rf"has (1|{LENGTH}|\d\d\d).*holds 128 tokens"):
        PASSES[run](model)


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_an_answer_must_fit_too(kind: str, tmp_path: Path) -> None:
    model = tiny.opened(kind, tmp_path)
    room = 128 - max(map(len, encode(model.tokenizer, SHORT)))
    assert len(generate_answers(model, SHORT[:1], max_new_tokens=3)) == 1
    with refused(f"{room + 1} more"):
        generate_answers(model, SHORT, max_new_tokens=room + 1)
    with pytest.raises(Exception, match=f"max_new_tokens={room} or less"):
        generate_answers(model, SHORT, max_new_tokens=room + 1)
    for none in (0, -1, 1.5):
        with refused(f"max_new_tokens={none}"):
            generate_answers(model, SHORT, max_new_tokens=none)  # pyright: ignore[reportArgumentType]
    with pytest.raises(Exception, match="Try: shorter prompts"):  # no number of tokens would help
        generate_answers(model, [LONG], max_new_tokens=1)


@pytest.mark.parametrize("store", [False, True])
def test_a_history_names_the_checkpoint(tmp_path: Path, store: bool) -> None:
    for seed, name in enumerate(("base", "aligned")):
        tiny.save(tiny.llama(seed), tmp_path / name)
    seq = ModelSequence.from_folders(witness=tmp_path / "base", anchor=tmp_path / "aligned", probes=[*SHORT, LONG])
    with pytest.raises(Exception, match=rf"has {LENGTH} tokens.*context of witness \(.*base\) holds 128"):
        cache_residuals(seq, store=tmp_path / "store" if store else None)


@pytest.mark.parametrize("make", [tiny.llama, tiny.gpt2])
def test_examples_must_fit(tmp_path: Path, make: Any) -> None:
    with refused(f"'{LONG[:20]}"):
        finetune(
            open_model(make(), tokenizer=tiny.TOKENIZER),
            [Example(LONG, "get it")],
            out=tmp_path / "run",
            recipe=Recipe(steps=1, batch=1),
        )


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (transformers.GPT2Config(n_positions=64), 64),
        (transformers.OPTConfig(max_position_embeddings=64), 64),
        (transformers.MptConfig(max_seq_len=64), 64),
        (transformers.LlamaConfig(max_position_embeddings=64, **LINEAR), 64),
        (transformers.MistralConfig(max_position_embeddings=64, sliding_window=8), 64),
        (transformers.Gemma3Config(text_config={"max_position_embeddings": 64, "sliding_window": 8}), 64),
        (transformers.FalconConfig(max_position_embeddings=64, alibi=True), None),
        (transformers.BloomConfig(**OLD), None),
        (transformers.MambaConfig(), None),
        (transformers.RwkvConfig(context_length=64), None),
        (transformers.RecurrentGemmaConfig(attention_window_size=8), None),
    ],
)
def test_what_a_configuration_declares(config: Any, wanted: int | None) -> None:
    assert context_of(config) == wanted


@pytest.mark.parametrize("name", ["Mamba", "Bloom", "Rwkv"])
def test_families_without_a_limit_run_long_prompts(name: str) -> None:
    torch.manual_seed(0)
    further = (
        {"n_head": 4}
        if name == "Bloom"
        else {"attention_hidden_size": 32, "context_length": 16}
        if name == "Rwkv"
        else {}
    )
    config = getattr(transformers, f"{name}Config")(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, **further
    )
    model = open_model(transformers.AutoModelForCausalLM.from_config(config), tokenizer=tiny.TOKENIZER)
    ids = encode(tiny.TOKENIZER, [LONG])
    found = read_residuals(model, ids, layers=[1])
    hidden = model.module(torch.tensor(ids), output_hidden_states=True, use_cache=False).hidden_states
    assert found.isfinite().all() and len(hidden) >= 2
