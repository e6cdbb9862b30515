"""Arguments of the chat template: one choice for whatever reads the checkpoints of a sequence, kept in the results."""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import chats
import numpy as np
import pytest
import tiny
import torch
from histories import moved, refused
from test_templates import read_ids, without_padding
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from gravlens.activations import reader as passes
from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.behavior.answers import generate_answers
from gravlens.behavior.scores import refusal_log_odds, task_loss
from gravlens.blockers.anchoring import AnchorKL
from gravlens.cli import app
from gravlens.core.errors import GravlensError
from gravlens.core.files import read_tensors, write_tensors
from gravlens.directions.direction import Direction
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import locate_vrev
from gravlens.history.encoding import encode, encode_example, prompts_digest, with_template_kwargs
from gravlens.history.prompts import Example, PromptSet
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.interventions.refusal import refusal_candidates
from gravlens.models.opening import open_model
from gravlens.models.tokenizers import sequence_tokenizer
from gravlens.training.finetune import Recipe, finetune
from gravlens.training.monitor import Monitor

PLAIN = chats.byte_level(chats.QWEN3)
QUIET = {"enable_thinking": False}
QUIETER = with_template_kwargs(PLAIN, QUIET)
PROBES = PromptSet.of(["hello there", "Sure", "I cannot help."], "harmful")
EXAMPLE = Example("hello", "Sorry")
ROWS: Any = [dict(zip(("input_ids", "labels"), encode_example(QUIETER, EXAMPLE), strict=True))]


def model(seed: int) -> Any:
    base = tiny.llama(0, vocab_size=len(PLAIN), max_position_embeddings=256)
    return moved(base, seed=seed) if seed else base


def folders(folder: Path, template: str = chats.QWEN3) -> dict[str, Any]:
    for name, seed in (("base", 0), ("aligned", 1), ("ft/checkpoint-1", 2)):
        model(seed).save_pretrained(folder / name)
        chats.byte_level(template).save_pretrained(folder / name)
    return {"witness": folder / "base", "anchor": folder / "aligned", "runs": folder / "ft", "probes": PROBES}


def history(folder: Path, kind: str = "folders", **further: Any) -> ModelSequence:
    if kind == "memory":
        pair = {"witness": model(0), "anchor": model(1), "tokenizer": PLAIN}
        return ModelSequence.from_models(**pair, probes=PROBES, chat_template_kwargs=QUIET, **further)
    return ModelSequence.from_folders(**folders(folder), chat_template_kwargs=QUIET, **further)


def monitored(seq: ModelSequence, folder: Path) -> None:
    vs = locate_vrev(seq)
    args = TrainingArguments(str(folder / "out"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    monitor = Monitor(vs, PROBES, anchor=cache_residuals(seq))
    tokenizer = sequence_tokenizer(seq)
    Trainer(
        open_model(seq.anchor).module, args, train_dataset=ROWS, processing_class=tokenizer, callbacks=[monitor]
    ).train()
    assert set(monitor.table.prompts) == {"given"}


def trained(seq: ModelSequence, folder: Path) -> None:
    finetune(seq.anchor, [EXAMPLE], out=folder / "run", recipe=Recipe(steps=1, batch=1), save_steps=())


READERS: dict[str, Any] = {
    "cache_residuals": lambda seq, _: cache_residuals(seq),
    "generate_answers": lambda seq, _: generate_answers(open_model(seq.anchor), PROBES, max_new_tokens=1),
    "refusal_log_odds": lambda seq, _: refusal_log_odds(open_model(seq.witness), PROBES, openings=["Sorry"]),
    "AnchorKL": lambda seq, _: AnchorKL(PROBES, tokens=1).bind(open_model(seq.anchor), rng=np.random.default_rng(0)),
    "finetune": trained,
    "task_loss": lambda seq, _: task_loss(open_model(seq.anchor), [EXAMPLE]),
    "Monitor": monitored,
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["folders", "memory"])
def test_whatever_reads_a_sequence_renders_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reader: str
) -> None:
    seq = history(tmp_path, kind)
    wanted = [PLAIN.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, **QUIET)
              for text in PROBES]  # fmt: skip
    ids = {tuple(one["input_ids"]) for one in wanted}
    example = tuple(encode_example(QUIETER, EXAMPLE)[0])
    if reader == "finetune":
        ids = {example}
    if reader == "task_loss":
        ids = {example[:-1]}  # the line feed after the end of turn is not scored
    if reader == "Monitor":
        ids |= {example}  # it trains too
    monkeypatch.setattr(passes, "reuses_keys", lambda _: False)
    with read_ids(monkeypatch) as seen:
        READERS[reader](seq, tmp_path)
    found = {without_padding(row) for row in seen}  # a family's padding may be tried too, on tokens of its own
    assert ids <= found and not found & {*map(tuple, encode(PLAIN, PROBES)), tuple(encode_example(PLAIN, EXAMPLE)[0])}


def test_results_hold_them_and_know_their_prompts_by_their_tokens(tmp_path: Path) -> None:
    seq = history(tmp_path)
    found, thinking = cache_residuals(seq), cache_residuals(replace(seq, chat_template_kwargs={}))
    found.save(tmp_path / "states.safetensors")
    assert Residuals.load(tmp_path / "states.safetensors").meta["chat_template_kwargs"] == QUIET
    assert "chat_template_kwargs" not in thinking.meta
    shown: Any = seq
    assert "enable_thinking" in shown._repr_html_()
    vs = locate_vrev(found)
    assert vs[0].made_from["chat_template_kwargs"] == QUIET
    assert found.prompts == prompts_digest(encode(QUIETER, PROBES)) == vs[0].prompts
    assert thinking.prompts == prompts_digest(encode(PLAIN, PROBES)) != found.prompts
    by_hand = [*map(PLAIN.decode, encode(QUIETER, PROBES))]
    plain = cache_residuals(replace(seq, chat_template="none", chat_template_kwargs={}), by_hand)
    assert plain.prompts == found.prompts and np.array_equal(plain.values, found.values)
    assert set(follow(plain, vs).table.prompts) == {"given"}, "the same tokens, whichever template wrote them"
    with pytest.raises(GravlensError, match="different chat template kwargs"):
        follow(thinking, vs)


@pytest.mark.parametrize("kwargs", [QUIET, {}])
def test_a_sequences_own_prompts_are_given_under_its_own_arguments_only(tmp_path: Path, kwargs: Any) -> None:
    seq = history(tmp_path, held_out=["there", "here it is"])
    other = replace(seq, chat_template_kwargs=kwargs)
    if not kwargs:
        with pytest.raises(GravlensError, match="different chat template kwargs"):
            follow(other, locate_vrev(seq))
        return
    assert set(follow(other, locate_vrev(seq)).table.prompts) == {"given", "held_out"}


def test_a_store_keeps_both_apart(tmp_path: Path) -> None:
    seq, store = history(tmp_path), tmp_path / "store"
    other = replace(seq, chat_template_kwargs={})
    for one in (seq, other, seq):
        assert np.array_equal(cache_residuals(one, store=store).values, cache_residuals(one).values)
    assert not np.array_equal(cache_residuals(seq, store=store).values, cache_residuals(other, store=store).values)


def test_a_refusal_direction_and_a_monitor_read_one_form_of_the_prompts(tmp_path: Path) -> None:
    seq = history(tmp_path)
    anchor = open_model(seq.anchor)
    one = refusal_candidates(anchor, harmful=PROBES, harmless=["there"])[0]
    assert one.prompts == prompts_digest(encode(QUIETER, PROBES))
    monitor = Monitor(locate_vrev(seq), PROBES, tokenizer=PLAIN)
    args = TrainingArguments(str(tmp_path / "out"), max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    trainer = Trainer(anchor.module, args, train_dataset=ROWS, callbacks=[monitor])
    with refused("arguments {}", "'enable_thinking': False"):
        trainer.train()
    with refused("residuals are of prompts"):
        thinking = cache_residuals(replace(seq, chat_template_kwargs={}))
        again = Monitor(locate_vrev(seq), PROBES, tokenizer=QUIETER, anchor=thinking)
        Trainer(anchor.module, args, train_dataset=ROWS, callbacks=[again]).train()


def test_a_file_has_them_as_a_table(tmp_path: Path) -> None:
    folders(tmp_path)
    lines = ['witness = "base"', 'anchor = "aligned"', 'probes = ["hello"]', "[chat_template_kwargs]"]
    file = tmp_path / "S.toml"
    file.write_text("\n".join([*lines, "enable_thinking = false", '[runs]\nft = "ft"']))
    found = ModelSequence.from_toml(file)
    assert found.chat_template_kwargs == found.anchor.chat_template_kwargs == QUIET
    shown = CliRunner().invoke(app, ["inspect", str(file)])
    assert "chat template: own, enable_thinking=False; system prompt: none" in shown.output, shown.output
    assert cache_residuals(found).prompts == prompts_digest(encode(QUIETER, ["hello"]))
    file.write_text("\n".join([*lines, "date_string = 2024-07-26"]))
    with refused("datetime.date(2024, 7, 26)"):
        ModelSequence.from_toml(file)
    file.write_text("\n".join([*lines[:3], 'chat_template_kwargs = "enable_thinking"']))
    with refused("'enable_thinking'"):
        ModelSequence.from_toml(file)


@pytest.mark.parametrize("kwargs", [{1: 2}, {"x": datetime.date(2024, 1, 1)}, ["x"], {"x": torch.ones(1)}])
def test_what_cannot_be_stored_is_refused(kwargs: Any) -> None:
    with refused("chat_template_kwargs="):
        ModelSequence(Checkpoint("witness", model(0)), Checkpoint("anchor", model(1)), chat_template_kwargs=kwargs)


def test_arguments_without_a_template_that_reads_them_are_refused(tmp_path: Path) -> None:
    with refused("enable_thinking", 'chat_template="none"'):
        history(tmp_path, chat_template="none")
    with refused("think, which the chat template does not read"):
        cache_residuals(replace(history(tmp_path), chat_template_kwargs={"think": False}))
    for name in ("base", "ft/checkpoint-1"):
        chats.byte_level(None).save_pretrained(tmp_path / name)
        (tmp_path / name / "chat_template.jinja").unlink(missing_ok=True)
    seq = ModelSequence.from_folders(
        witness=tmp_path / "base", anchor=tmp_path / "aligned", runs=tmp_path / "ft", probes=PROBES,
        chat_template="anchor", chat_template_kwargs=QUIET,
    )  # fmt: skip
    found = cache_residuals(seq, store=tmp_path / "store")
    assert found.prompts == prompts_digest(encode(QUIETER, PROBES)) and found.meta["chat_template_kwargs"] == QUIET


def test_states_are_the_same_on_another_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seq = ModelSequence.from_folders(**folders(tmp_path, chats.DATED))
    found = cache_residuals(seq)
    assert found.meta["chat_template_kwargs"] == {"strftime_now": "2024-07-26"}
    assert locate_vrev(found)[0].made_from["chat_template_kwargs"] == {"strftime_now": "2024-07-26"}

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 2, 3)

    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Later)
    text = chats.byte_level(chats.DATED + " ").apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    assert "03 Feb 2031" in text, "transformers itself reads the clock"
    assert cache_residuals(seq).prompts == found.prompts
    later = cache_residuals(replace(seq, chat_template_kwargs={"strftime_now": "2031-02-03"}))
    assert later.prompts != found.prompts and later.meta["chat_template_kwargs"] == {"strftime_now": "2031-02-03"}


def test_files_that_know_their_prompts_by_texts_are_refused(tmp_path: Path) -> None:
    found = cache_residuals(history(tmp_path))
    old = {"states.safetensors": found, "vrev.safetensors": locate_vrev(found)}
    for name, result in old.items():
        kind = "residuals" if isinstance(result, Residuals) else "directions"
        arrays, meta = read_tensors(result.save(tmp_path / name), kind)
        for one in [meta] if kind == "residuals" else meta["directions"]:
            one["prompts"] = PROBES.digest
        write_tensors(tmp_path / name, kind, arrays, meta)
        with refused(name, "earlier version"):
            type(result).load(tmp_path / name)
    named = replace(locate_vrev(found)[0], prompts="")
    named.save(tmp_path / "one.safetensors")
    assert Direction.load(tmp_path / "one.safetensors").prompts == ""
