"""Bars: there where a call takes long, gone afterwards, silent where TQDM_DISABLE asks for it, one at a time."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny

from gravlens.activations.residuals import cache_residuals
from gravlens.behavior.answers import generate_answers
from gravlens.behavior.divergence import kl_from
from gravlens.behavior.scores import refusal_log_odds, task_loss
from gravlens.core import progress as module
from gravlens.core.progress import progress
from gravlens.directions.vrev import direction_from, locate_vrev
from gravlens.history.prompts import Example, PromptSet
from gravlens.history.sequence import ModelSequence
from gravlens.interventions.edits import Ablate
from gravlens.interventions.effects import causal_effect
from gravlens.interventions.refusal import Filters, choose_refusal, refusal_candidates
from gravlens.models.opening import open_model
from gravlens.stats.damage import measure_damage, pruned, update_norms, weight_noise
from gravlens.training.finetune import Recipe, finetune

BARS = {
    "residuals", "weight noise", "effects", "answers", "logits", "likelihoods", "divergence", "damage", "refusal",
    "fine-tuning",
}  # fmt: skip


def all_that_takes_long(folder: Path) -> None:
    """Each call that may take minutes, on models that are tiny."""
    anchor, other = (open_model(tiny.llama(seed), tokenizer=tiny.TOKENIZER) for seed in (1, 2))
    ends = {"witness": tiny.llama(0), "anchor": anchor.module}
    prompts, examples = PromptSet(tuple(tiny.PROMPTS)), [Example(prompt, "sorry") for prompt in tiny.PROMPTS]
    seq = ModelSequence.from_models(**ends, probes=prompts, tokenizer=tiny.TOKENIZER)
    vs, score = locate_vrev(seq), partial(refusal_log_odds, openings=["sorry"])
    halves = {"harmful": prompts[:3], "harmless": prompts[3:]}
    norms = {1: update_norms(anchor, other)}
    weight_noise(anchor, vs, prompts, norms=norms, draws=2, rng=np.random.default_rng(0))
    causal_effect(anchor, {"ablated": Ablate(vs)}, score=score, prompts=prompts, n_random=1)
    generate_answers(anchor, prompts, max_new_tokens=2)
    score(anchor, prompts)
    task_loss(anchor, examples)
    kl_from(anchor, other, prompts, max_new_tokens=2)
    measure_damage(anchor, vs, prompts, damages={"pruned": partial(pruned, share=0.3)})
    lenient = Filters(induce=-1e9, kl=1e9, depth=9.0)
    choose_refusal(anchor, refusal_candidates(anchor, **halves), **halves, score=score, filters=lenient)
    finetune(anchor, examples, out=folder / "run", recipe=Recipe(steps=2, batch=1), save_steps=[2])
    cache_residuals(seq, store=folder / "store")


@pytest.mark.usefixtures("bars")
def test_every_long_call_has_a_bar_and_nothing_else_is_written(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    all_that_takes_long(tmp_path)
    out, written = capfd.readouterr()
    lines = written.replace("\r", "\n").splitlines()
    assert {line.split(":")[0] for line in lines if line.strip()} == BARS and out == ""
    assert "0%" in written and not lines[-1].strip()  # it is gone when it is done


@pytest.mark.usefixtures("bars")
def test_no_call_writes_anything_where_one_asks_for_silence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    all_that_takes_long(tmp_path)
    assert capfd.readouterr() == ("", "")


# -- one bar -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AFTER", 0.0)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def is_shown() -> bool:
    with progress("it", total=1) as bar:
        return not bar.disable


@pytest.mark.usefixtures("bars")
def test_the_variable_is_read_when_a_bar_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, shown in (("1", False), ("0", True), ("", True), ("true", False)):
        monkeypatch.setenv("TQDM_DISABLE", value)
        assert is_shown() is shown


@pytest.mark.usefixtures("bars")
def test_a_bar_within_a_bar_is_hidden_also_after_an_error() -> None:
    with progress("outer", total=2) as outer:
        assert not is_shown()
        outer.update()
    assert is_shown()
    with pytest.raises(KeyboardInterrupt), progress("outer", [1, 2]):
        raise KeyboardInterrupt
    assert is_shown()


@pytest.mark.usefixtures("bars")
def test_what_is_done_at_once_shows_no_bar(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "AFTER", 60.0)
    with progress("it", range(100)) as things:
        assert list(things) == list(range(100))
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(module, "AFTER", 0.0)
    with progress("it", range(100), leave=True) as things:
        list(things)
    assert "it: 100%" in capfd.readouterr().err


# -- how long it will take ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("bars")
def test_a_long_call_says_once_what_it_does_and_for_how_long(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("answers", total=20, unit="prompt") as bar:
        for _ in range(20):  # 2 s each: after 4 s the other 18 take 36 s
            bar.update()
    with progress("effects", total=21, work="21 scorings of 64 prompts", seconds=61.0) as bar:
        assert "effects: 21 scorings of 64 prompts, about 60 s\n" in capfd.readouterr().err.replace("\r", "\n")
        bar.update(3)
    with progress("residuals", total=400, unit="prompt") as bar:
        bar.update(1)
        bar.update(1)
    said = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "about" in line]
    assert said == ["residuals: 400 prompts, about 13 min more"]


@pytest.mark.usefixtures("bars")
def test_a_short_call_a_call_within_another_and_a_silent_one_say_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with progress("effects", total=21, seconds=3.0) as bar:
        bar.update()
    with progress("outer", total=1), progress("effects", total=21, seconds=300.0) as bar:
        bar.update()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress("effects", total=21, seconds=300.0) as bar:
        bar.update()
    assert "about" not in capfd.readouterr().err


@pytest.mark.usefixtures("bars")
def test_an_effect_announces_its_scorings(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "LONG", 0.0)
    model = open_model(tiny.llama(1), tokenizer=tiny.TOKENIZER)
    score, vs = partial(refusal_log_odds, openings=["sorry"]), direction_from(np.ones(tiny.WIDTH), layer=1)
    causal_effect(model, {"a": Ablate(vs), "b": Ablate(vs)}, score=score, prompts=tiny.PROMPTS, n_random=2)
    said = [line for line in capfd.readouterr().err.replace("\r", "\n").splitlines() if "about" in line]
    assert said == [f"effects: 6 scorings of {len(tiny.PROMPTS)} prompts, about 0 s"]
