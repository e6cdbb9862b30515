"""States that were read once in this process are not computed again, and never in place of others."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import assert_same_states, moved, refused, sequence_on_disk, weights_of

from gravlens.activations import fingerprint, reader
from gravlens.activations.residuals import cache_residuals
from gravlens.activations.session import LIMIT, SESSION
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import locate_vrev
from gravlens.history.sequence import ModelSequence
from gravlens.models.placement import Placement

EACH = tiny.LAYERS * tiny.WIDTH * 4  # bytes of a prompt's states


@pytest.fixture(autouse=True)
def _empty(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fingerprint, "SETTLED", 0.0)  # the files of a test are a moment old
    monkeypatch.delenv(LIMIT, raising=False)
    SESSION.clear()
    yield
    SESSION.clear()


@pytest.fixture
def seq(tmp_path: Path) -> ModelSequence:
    names = ("witness", "anchor", "ft/checkpoint-1", "ft/checkpoint-2")
    folder = sequence_on_disk(tmp_path, {name: tiny.llama(i) for i, name in enumerate(names)})
    return ModelSequence.from_toml(folder / "SEQUENCE.toml")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Name of each checkpoint that is read, and how many of its prompts."""
    seen: list[tuple[str, int]] = []
    own = reader.read_block

    def counted(one: Any, queries: Any) -> Any:
        seen.append((one.of.split(" (")[0], len(queries)))
        return own(one, queries)

    monkeypatch.setattr(reader, "read_block", counted)
    return seen


def without(seq: ModelSequence, *given: Any, **named: Any) -> np.ndarray:
    """The same call in a session that knows nothing."""
    SESSION.clear()
    return cache_residuals(seq, *given, **named).values


def test_follow_reads_what_locate_has_not_and_opens_each_checkpoint_once(
    seq: ModelSequence, opened: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    vs = locate_vrev(seq)
    assert sorted(opened) == [("anchor", 6), ("witness", 6)]
    opened.clear()
    found = follow(seq, vs)
    assert sorted(opened) == [("anchor", 6), ("seed0/1", 12), ("seed0/2", 12)]
    opened.clear()
    assert follow(seq, vs).table.equals(found.table) and not opened
    monkeypatch.setenv(LIMIT, "0")
    wanted = follow(seq, vs).table
    assert len(opened) == 3
    measures = ["alignment", "fraction", "drift_norm"]
    np.testing.assert_allclose(found.table[measures], wanted[measures], rtol=1e-4, atol=1e-5)


def test_other_layers_and_prompts_are_read_alone(seq: ModelSequence, opened: list[tuple[str, int]]) -> None:
    few, all_prompts = list(tiny.PROMPTS[1:4]), list(tiny.PROMPTS)
    cache_residuals(seq, few, layers=[1], checkpoints=[seq.anchor])
    cache_residuals(seq, all_prompts[::-1], layers=[1], checkpoints=[seq.anchor])
    assert opened == [("anchor", 3), ("anchor", 3)]
    whole = cache_residuals(seq, all_prompts, checkpoints=[seq.anchor]).values  # with layers that nobody has read
    assert opened[2:] == [("anchor", 6)]
    cache_residuals(seq, few, layers=[0, 2], checkpoints=[seq.anchor])
    assert len(opened) == 3
    assert_same_states(whole, without(seq, all_prompts, checkpoints=[seq.anchor]))


def test_rows_that_are_tokens(seq: ModelSequence, opened: list[tuple[str, int]]) -> None:
    pair = {"positions": "all", "checkpoints": [seq.anchor]}
    cache_residuals(seq, list(tiny.PROMPTS[2:4]), **pair)
    found = cache_residuals(seq, list(tiny.PROMPTS), **pair).values
    assert [n for _, n in opened] == [2, 4]
    assert_same_states(found, without(seq, list(tiny.PROMPTS), **pair))


def test_a_caller_may_change_what_it_gets(seq: ModelSequence) -> None:
    found = cache_residuals(seq).values
    wanted = found.copy()
    found[:] = 0
    again = cache_residuals(seq).values
    assert np.array_equal(again, wanted)
    again[:] = 1
    assert np.array_equal(cache_residuals(seq).values, wanted)


# -- never in place of others ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps_mtime", [False, True])
def test_a_folder_that_changed_is_read_anew(seq: ModelSequence, tmp_path: Path, keeps_mtime: bool) -> None:
    before, file = cache_residuals(seq).of("anchor").copy(), weights_of(tmp_path / "anchor")
    stat = file.stat()
    moved(tiny.llama(1), seed=7).save_pretrained(tmp_path / "other")
    file.write_bytes(weights_of(tmp_path / "other").read_bytes())
    if keeps_mtime:  # what `cp -p` does; the size is the same
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = cache_residuals(seq)
    assert_same_states(after.of("anchor"), without(seq)[1])
    assert np.abs(after.of("anchor") - before).max() > 0.1


@pytest.mark.parametrize(
    "other",
    [{"placement": Placement(dtype="bf16")}, {"positions": -2}, {"positions": "instruction"}, {"through": "bridge"}],
    ids=str,
)
def test_what_is_read_otherwise_is_not_confused(
    seq: ModelSequence, opened: list[tuple[str, int]], other: dict[str, Any]
) -> None:
    cache_residuals(seq, checkpoints=[seq.anchor])
    found = cache_residuals(seq, checkpoints=[seq.anchor], **other).values
    assert len(opened) == 2
    assert_same_states(found, without(seq, checkpoints=[seq.anchor], **other))


def test_another_chat_template_makes_other_prompts(
    seq: ModelSequence, tmp_path: Path, opened: list[tuple[str, int]]
) -> None:
    before = cache_residuals(seq).values
    for name in ("witness", "anchor"):
        template = tmp_path / name / "chat_template.jinja"
        text = template.read_text(encoding="utf-8")
        assert "<bot>" in text
        template.write_text(text.replace("<bot>", "<user>"), encoding="utf-8")
    changed = replace(seq, chat_template="anchor")
    assert np.abs(cache_residuals(changed).values - before).max() > 0.1 and len(opened) == 8


def test_a_model_in_memory_that_was_trained_between_two_calls_is_read_anew() -> None:
    models = [tiny.llama(seed) for seed in (0, 1)]
    seq = ModelSequence.from_models(witness=models[0], anchor=models[1], tokenizer=tiny.TOKENIZER)
    before = cache_residuals(seq, list(tiny.PROMPTS)).values
    with torch.no_grad():
        models[1].model.layers[0].mlp.down_proj.weight.mul_(-2)
    after = cache_residuals(seq, list(tiny.PROMPTS)).values
    assert np.abs(after[1] - before[1]).max() > 0.1 and SESSION.size == 0
    assert np.array_equal(after[0], before[0])


def test_files_written_a_moment_ago_are_not_kept(seq: ModelSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "SETTLED", 3600.0)
    cache_residuals(seq)
    assert SESSION.size == 0


def test_what_acts_on_states_from_outside_is_neither_kept_nor_served(
    seq: ModelSequence, opened: list[tuple[str, int]]
) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rough = cache_residuals(seq).values
    assert SESSION.size == 0
    exact = cache_residuals(seq).values
    assert not np.array_equal(rough, exact) and SESSION.size > 0
    opened.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert np.array_equal(cache_residuals(seq).values, rough)
    assert len(opened) == 4


# -- how much ----------------------------------------------------------------------------------------------------------


def test_what_was_not_used_for_longest_is_dropped(
    seq: ModelSequence, opened: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gravlens.activations.session.kept_bytes", lambda: 7 * EACH)
    first, second, third = ({"checkpoints": [one]} for one in list(seq)[:3])
    prompts = list(tiny.PROMPTS[:3])
    for which in (first, second, first, third):  # the second was used before the first
        cache_residuals(seq, prompts, **which)
        assert SESSION.size <= 7 * EACH
    assert len(opened) == 3
    cache_residuals(seq, prompts, **first)
    cache_residuals(seq, prompts, **third)
    assert len(opened) == 3
    cache_residuals(seq, prompts, **second)
    assert len(opened) == 4
    SESSION.clear()
    cache_residuals(seq, [*tiny.PROMPTS, *(seq.probes or ())], **first)  # of itself more than may be kept: nothing is
    assert SESSION.size == 0


def test_the_variable_says_how_much(seq: ModelSequence, monkeypatch: pytest.MonkeyPatch) -> None:
    cache_residuals(seq)
    assert SESSION.size == 4 * 6 * EACH
    monkeypatch.setenv(LIMIT, "1")
    cache_residuals(seq, seq.held_out, positions="all")
    assert 0 < SESSION.size <= 1 << 20
    monkeypatch.setenv(LIMIT, "much")
    with refused(LIMIT, "much"):
        cache_residuals(seq)
