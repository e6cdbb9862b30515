"""Whose chat template and which system prompt: one choice for whatever reads the checkpoints of a sequence."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import refused
from small import english_tokenizer
from typer.testing import CliRunner

from gravlens.activations import reader as passes
from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.behavior.scores import refusal_log_odds
from gravlens.blockers.penalty import Penalty
from gravlens.cli import app
from gravlens.core.errors import GravlensError
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.encoding import encode, encode_example
from gravlens.history.prompts import Example, PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.interventions.refusal import refusal_candidates
from gravlens.models.opening import checkpoint_tokenizer, open_model
from gravlens.models.swapping import open_each
from gravlens.models.tokenizers import sequence_tokenizer
from gravlens.organisms.arms import Grounds, harmful_minus_harmless
from gravlens.stats.damage import weight_noise
from gravlens.studies.experiment import _harmless, refusals_of
from gravlens.training.finetune import Recipe, finetune

TOKENIZER = english_tokenizer()
TOKENIZER.add_tokens(["system"])
PROBES = PromptSet(tiny.PROMPTS.texts[:2], "harmful")
SYSTEM = "get the padlock"
CHOICES = ("own", "anchor", "none")
VS = Directions((direction_from(np.arange(1.0, tiny.WIDTH + 1), layer=0),))


def model(seed: int) -> Any:
    return tiny.llama(seed, vocab_size=len(TOKENIZER))


def saved(folder: Path, seed: int, *, template: bool) -> Path:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = TOKENIZER.chat_template if template else None
    model(seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def history(folder: Path, choice: Any, kind: str = "folders") -> ModelSequence:
    """A witness, which never saw a template where the anchor's is chosen, and an anchor with one."""
    if kind == "memory":
        pair = {"witness": model(0), "anchor": model(1), "tokenizer": TOKENIZER}
        return ModelSequence.from_models(**pair, probes=PROBES, chat_template=choice)
    witness, anchor = (
        saved(folder / "base", 0, template=choice != "anchor"),
        saved(folder / "aligned", 1, template=True),
    )
    return ModelSequence.from_folders(witness=witness, anchor=anchor, probes=PROBES, chat_template=choice)


@contextmanager
def read_ids(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """Every row of token ids that an embedding is asked for."""
    seen: list[list[int]] = []
    forward = torch.nn.Embedding.forward

    def look(self: Any, ids: torch.Tensor) -> torch.Tensor:
        seen.extend(ids.tolist())
        return forward(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Embedding, "forward", look)
        yield seen


def without_padding(row: list[int]) -> tuple[int, ...]:
    """A row without the 0 that it is padded with, on either side; no prompt here has a token 0."""
    return tuple(token for token in row if token)


def train(seq: ModelSequence, folder: Path) -> None:
    examples = [Example(text, "get") for text in PROBES]
    finetune(seq.anchor, examples, out=folder / "run", recipe=Recipe(steps=1, batch=2), save_steps=())


READERS: dict[str, Callable[[ModelSequence, Path], Any]] = {
    "finetune": train,
    "weight_noise": lambda seq, _: weight_noise(
        seq.anchor, VS, PROBES, norms={1: {"model.layers.0.mlp.up_proj.weight": 0.1}}, draws=1,
        rng=np.random.default_rng(0),
    ),
    "refusal_log_odds": lambda seq, _: refusal_log_odds(open_model(seq.anchor), PROBES, openings=["get"]),
    "the witness's": lambda seq, _: refusal_log_odds(open_model(seq.witness), PROBES, openings=["get"]),
    "Penalty": lambda seq, _: Penalty(VS, PROBES).bind(open_model(seq.anchor), rng=np.random.default_rng(0)).loss(),
    "cache_residuals": lambda seq, _: cache_residuals(seq),
    "open_each": lambda seq, _: [refusal_log_odds(m, PROBES, openings=["get"]) for _, m in
                                 open_each(list(seq), through="huggingface")],
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("kind", ["folders", "memory"])
def test_whatever_reads_a_sequence_reads_the_sequences_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, choice: str, reader: str
) -> None:
    seq = history(tmp_path, choice, kind)
    tokenizer = sequence_tokenizer(seq)
    wanted = encode(tokenizer, PROBES)
    if reader == "finetune":
        wanted = [encode_example(tokenizer, Example(text, "get"))[0] for text in PROBES]
    # Whole prompts, not what is left of them once their beginning was run.
    monkeypatch.setattr(passes, "reuses_keys", lambda _: False)
    # No trials on other tokens.
    monkeypatch.setattr(passes, "pads", lambda _: True)
    monkeypatch.setattr("gravlens.models.families.HuggingFace.padding", True)
    monkeypatch.setattr("gravlens.models.opening.check_one_stream", lambda _: None)
    with read_ids(monkeypatch) as seen:
        READERS[reader](seq, tmp_path)
    assert not any(0 in one for one in wanted) and {*map(without_padding, seen)} == {*map(tuple, wanted)}
    turns = [{"role": "user", "content": PROBES.texts[0]}]
    rendered = TOKENIZER.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert (encode(tokenizer, PROBES)[0] == rendered) == (choice != "none")


def test_the_choice_is_each_checkpoints_and_a_new_choice_replaces_it(tmp_path: Path) -> None:
    seq = history(tmp_path, "anchor")
    runs = {"seed0": (Checkpoint("seed0/1", tmp_path / "aligned", 1),)}
    seq = replace(seq, runs=runs)
    assert seq.anchor.template == "own"
    assert seq.witness.template is seq.runs["seed0"][0].template is seq.anchor
    plain = replace(seq, chat_template="none")
    assert [checkpoint.template for checkpoint in plain] == ["none"] * 3
    assert [checkpoint.template for checkpoint in replace(plain, chat_template="own")] == ["own"] * 3
    assert checkpoint_tokenizer(replace(seq.anchor, template="none")).chat_template is None
    assert runs["seed0"][0].template == "own", "what was given stays as it was"


def test_templates_of_a_run_never_mix_silently_either(tmp_path: Path) -> None:
    seq = history(tmp_path, "own")
    run = saved(tmp_path / "ft/checkpoint-1", 2, template=False)
    seq = replace(seq, runs={"seed0": (Checkpoint("seed0/1", run, 1),)})
    with refused("different chat templates", "seed0/1"):
        cache_residuals(seq)
    assert cache_residuals(replace(seq, chat_template="anchor")).meta["chat_template"] == "anchor"


# -- the system prompt -------------------------------------------------------------------------------------------------


def test_a_sequences_system_prompt_is_every_prompts_that_has_none(tmp_path: Path) -> None:
    own = PromptSet(("rinse it",), "harmful", "its own")
    seq = replace(history(tmp_path, "own"), held_out=own, harmless=PROBES).with_system(SYSTEM)
    assert seq.probes == replace(PROBES, system=SYSTEM) and seq.harmless == seq.probes and seq.held_out == own
    assert seq.prompts_of(["a"]).system == SYSTEM and seq.prompts_of(own) == own
    other = seq.with_system("another")
    assert (other.require_probes().system, other.held_out) == ("another", own)
    assert seq.with_system("").probes == PROBES
    with refused("system prompt is"):
        seq.with_system("  ")


@pytest.mark.parametrize("prompts", [None, list(PROBES), PROBES])
def test_prompts_are_read_under_it_and_the_results_say_so(tmp_path: Path, prompts: Any) -> None:
    seq = history(tmp_path, "own").with_system(SYSTEM)
    found = cache_residuals(seq, prompts)
    by_hand = cache_residuals(history(tmp_path, "own"), PromptSet.of(PROBES, system=SYSTEM))
    assert np.array_equal(found.values, by_hand.values) and found.prompts == by_hand.prompts
    bare = cache_residuals(history(tmp_path, "own"), prompts)
    assert not np.allclose(found.values, bare.values) and "system" not in bare.meta
    found.save(tmp_path / "states.safetensors")
    assert Residuals.load(tmp_path / "states.safetensors").meta["system"] == found.meta["system"] == SYSTEM
    vs = locate_vrev(found)
    assert vs[0].made_from["system"] == SYSTEM and SYSTEM in vs._repr_html_() and SYSTEM in seq._repr_html_()


def test_a_template_without_a_place_for_it_is_refused_as_such(tmp_path: Path) -> None:
    seq = history(tmp_path, "none").with_system(SYSTEM)
    with refused("system prompt", "no chat template"):
        cache_residuals(seq)
    other = copy.deepcopy(TOKENIZER)
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(GravlensError, match=r"^A system prompt was given.*no chat template"):  # not: another tokenizer
        cache_residuals(seq)


def test_toml_names_it_and_inspect_shows_it_with_the_template(tmp_path: Path) -> None:
    history(tmp_path, "anchor")
    lines = ['witness = "base"', 'anchor = "aligned"', 'probes = ["rinse it"]']
    (tmp_path / "S.toml").write_text("\n".join([*lines, f'system = "{SYSTEM}"', 'chat_template = "anchor"']))
    found = ModelSequence.from_toml(tmp_path / "S.toml")
    assert found.system == found.require_probes().system == SYSTEM
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "S.toml")])
    assert f"chat template: anchor; system prompt: {SYSTEM}" in shown.output, shown.output
    (tmp_path / "S.toml").write_text("\n".join([*lines, "system = 5"]))
    with refused("system prompt is 5"):
        ModelSequence.from_toml(tmp_path / "S.toml")


def test_two_system_prompts_make_no_refusal_direction(tmp_path: Path) -> None:
    seq = history(tmp_path, "own")
    anchor, under = open_model(seq.anchor), PromptSet.of(PROBES, system=SYSTEM)
    with refused("system prompts"):
        refusal_candidates(anchor, harmful=under, harmless=["rinse it"])
    states = cache_residuals(seq.with_system(SYSTEM))
    grounds = Grounds(
        sequence=seq.with_system(SYSTEM), states=states, vs=locate_vrev(states), other=None, refusals=[],
        harmless=PromptSet(("rinse it",), "harmless"), rng=np.random.default_rng(0),
    )  # fmt: skip
    alone = refusal_candidates(anchor, harmful=under, harmless=PromptSet(("rinse it",), system=SYSTEM))
    assert np.allclose(harmful_minus_harmless(grounds)[0].vector, alone[0].vector)


def test_what_blockers_learn_of_prompts_is_read_under_their_system_prompt() -> None:
    assert refusals_of(PromptSet(("a", "b"), system=SYSTEM), ["no"]) == [Example(t, "no", SYSTEM) for t in "ab"]
    data = [Example("a", "x", SYSTEM), Example("b", "x"), Example("c", "x", SYSTEM)]
    assert _harmless(data) == PromptSet(("a", "c"), "harmless", SYSTEM)


@pytest.mark.parametrize("given", ["object", "folder"])
def test_folders_without_a_tokenizer_are_read_with_the_one_that_is_given(tmp_path: Path, given: str) -> None:
    for name, seed in (("base", 0), ("aligned", 1)):
        model(seed).save_pretrained(tmp_path / name)
    TOKENIZER.save_pretrained(tmp_path / "words")
    pair: dict[str, Any] = {"witness": tmp_path / "base", "anchor": tmp_path / "aligned", "probes": PROBES}
    with pytest.raises(GravlensError, match="no tokenizer"):
        cache_residuals(ModelSequence.from_folders(**pair))
    one = TOKENIZER if given == "object" else tmp_path / "words"
    found = cache_residuals(ModelSequence.from_folders(**pair, tokenizer=one))
    for name in ("base", "aligned"):
        TOKENIZER.save_pretrained(tmp_path / name)
    np.testing.assert_array_equal(found.values, cache_residuals(ModelSequence.from_folders(**pair)).values)
    assert open_model(ModelSequence.from_folders(**pair, tokenizer=one).anchor).tokenizer is not None


def test_a_folder_without_a_tokenizer_is_named_where_it_was_given_as_one(tmp_path: Path) -> None:
    model(0).save_pretrained(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    pair: dict[str, Any] = {"witness": tmp_path / "base", "anchor": tmp_path / "base", "probes": PROBES}
    with pytest.raises(GravlensError, match=r"empty.* holds no tokenizer"):
        cache_residuals(ModelSequence.from_folders(**pair, tokenizer=tmp_path / "empty"))


@pytest.mark.parametrize("chance", ["{{ range(9999)|random }}", "{{ lipsum(n=1) }}"])
def test_a_template_that_draws_at_random_is_refused(chance: str) -> None:
    tokenizer = english_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + chance
    tokenizer.add_tokens([str(digit) for digit in range(10)])
    with refused("in two ways"):
        encode(tokenizer, ["use the tool"])


@pytest.mark.parametrize("template", [5, ["x"], b"x"])
def test_a_template_that_is_no_text_is_refused(template: Any) -> None:
    tokenizer = english_tokenizer()
    tokenizer.chat_template = template
    with refused(f"A {type(template).__name__} was given"):
        encode(tokenizer, ["x"])
