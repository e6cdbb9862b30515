"""Matched contrasts, against differences taken by hand and a planted truth."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, assert_same_states, plant, planted_vector, reference, refused
from rows import write

from gravlens.activations.contrasts import Contrast, cache_contrasts, read_contrast
from gravlens.directions.geometry import locate_in, raw
from gravlens.directions.trajectory import follow
from gravlens.directions.vrev import locate_vrev
from gravlens.history.prompts import PromptSet
from gravlens.history.sequence import ModelSequence

TEXTS = tiny.PROMPTS.texts
CONTRAST = Contrast.of(TEXTS[:3], TEXTS[3:6])
BELOW = range(tiny.LAYERS - 1)  # Hugging Face's last hidden state is behind the final norm


def sequence(witness: Any, anchor: Any, **more: Any) -> ModelSequence:
    return ModelSequence.from_models(witness=witness, anchor=anchor, tokenizer=tiny.TOKENIZER, **more)


def by_hand(model: Any) -> torch.Tensor:
    states = reference(model, PROMPT_IDS, BELOW)
    return states[:3] - states[3:6]


# -- pairs -------------------------------------------------------------------------------------------------------------


def half(folder: Path, name: str, goals: dict[Any, str], index: str = "Index") -> Path:
    columns = {"Target": "Sure", "Behavior": "b", "Category": "c"}
    return write(folder / name, [{index: key, "Goal": goal, **columns} for key, goal in goals.items()])


def test_two_halves_are_matched_by_their_index_in_the_order_of_the_first(tmp_path: Path) -> None:
    harmful = half(tmp_path, "harmful.csv", {3: "Pick a lock", 0: "Ring"})
    benign = half(tmp_path, "benign.csv", {0: "Sing", 3: "Buy a lock"})
    found = read_contrast(harmful, benign)
    assert found == Contrast.of(["Pick a lock", "Ring"], ["Buy a lock", "Sing"])
    assert (found.harmful.role, found.harmless.role, len(found), len(found[:1])) == ("harmful", "harmless", 2, 1)
    datasets = pytest.importorskip("datasets")
    tables = [datasets.Dataset.from_csv(str(path), cache_dir=str(tmp_path)) for path in (harmful, benign)]
    assert read_contrast(*tables) == found


@pytest.mark.parametrize(
    ("benign", "named"),
    [({0: "Sing"}, "Index 1"), ({0: "Sing", 2: "Buy"}, "Index 1, 2"), ({0: "Sing", 1: "Ring"}, "one text")],
)
def test_halves_that_do_not_match_are_refused(tmp_path: Path, benign: Any, named: str) -> None:
    harmful = half(tmp_path, "harmful.csv", {0: "Pick", 1: "Ring"})
    with refused(named):
        read_contrast(harmful, half(tmp_path, "benign.csv", benign))


def test_an_index_is_there_and_names_one_prompt(tmp_path: Path) -> None:
    harmful = half(tmp_path, "harmful.jsonl", {0: "Pick"})
    rows = [json.loads(harmful.read_text())] * 2
    with refused("Index 0", "repeated"):
        read_contrast(write(tmp_path / "twice.jsonl", rows), harmful)
    with refused("'topic'", "Goal"):
        read_contrast(harmful, harmful, index="topic")


def test_one_file_holds_a_pair_in_each_row(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", [{"harmful": "Pick a lock", "harmless": "Buy a lock"}])
    assert read_contrast(path) == Contrast.of(["Pick a lock"], ["Buy a lock"])
    with refused("pairs.csv", "'harmless'", "harmful, other"):
        read_contrast(write(path, [{"harmful": "a", "other": "b"}]))


def test_pairs_are_of_one_number_and_one_system_prompt() -> None:
    with refused("2 harmful and 1 harmless"):
        Contrast.of(["a", "b"], ["c"])
    with refused("'be kind'"):
        Contrast.of(PromptSet.of(["a"], system="be kind"), ["c"])


# -- states and directions ---------------------------------------------------------------------------------------------


def test_contrasts_are_the_differences_of_hugging_faces_states() -> None:
    witness, anchor = tiny.gpt2(0), tiny.gpt2(1)
    found = cache_contrasts(sequence(witness, anchor, runs={"seed0": [tiny.gpt2(2)]}), CONTRAST, layers=BELOW)
    assert found.checkpoints == ("witness", "anchor", "seed0/1")
    for name, model in {"witness": witness, "anchor": anchor, "seed0/1": tiny.gpt2(2)}.items():
        assert_same_states(found.of(name), by_hand(model))
    v = locate_vrev(found)[1]
    wanted = (by_hand(witness) - by_hand(anchor)).mean(0)[1]
    assert_same_states(v.vector * v.distance, wanted.numpy())
    assert (v.made_from["contrast"], v.made_from["n_prompts"]) == ("harmful - harmless", 3)
    assert follow(found, locate_vrev(found)).table["run"].unique().tolist() == ["seed0"]


def test_what_moves_harmful_and_harmless_alike_is_no_contrast() -> None:
    """A bias planted at one layer moves every state by one vector: a large v_rev, and none over matched contrasts."""
    anchor = tiny.gpt2(0)
    seq = sequence(plant(anchor, planted_vector(), 0), anchor, probes=PromptSet.of(TEXTS[:3]))
    assert locate_vrev(seq, layer=0).distance == pytest.approx(3, rel=1e-4)
    contrasts = cache_contrasts(seq, CONTRAST)
    assert locate_vrev(contrasts)[0].undefined is not None
    with refused("undefined at layer 0"):
        locate_vrev(contrasts, layer=0)
    assert locate_vrev(contrasts)[1].undefined is None  # the next block's attention and MLP are not linear


def test_the_floor_is_that_of_the_states_not_of_their_difference() -> None:
    """Two halves that hardly differ leave the rounding of whole states in their difference."""
    anchor = tiny.gpt2(0)
    found = cache_contrasts(sequence(plant(anchor, 300 * planted_vector(), 0), anchor), CONTRAST, layers=[0])
    states = np.linalg.norm(reference(anchor, PROMPT_IDS, range(1)).numpy(), axis=-1)
    assert found.meta["state_lengths"][0] > 300 > states.max()
    assert locate_vrev(found)[0].undefined is not None
    assert locate_in(raw(found), found)[0].undefined is not None


# -- positions of their own --------------------------------------------------------------------------------------------


def last_two(ids: list[int]) -> list[int]:
    return [-2, -1]


def test_the_same_number_of_positions_is_paired_from_the_end() -> None:
    model, layers = tiny.gpt2(0), range(tiny.LAYERS - 1)
    pair = Contrast.of([TEXTS[0], TEXTS[1]], [TEXTS[1], TEXTS[0]])
    found = cache_contrasts(sequence(model, tiny.gpt2(1)), pair, layers=layers, positions=last_two)
    ids = [PROMPT_IDS[0], PROMPT_IDS[1]]
    states = np.stack([reference(model, ids, layers, position).numpy() for position in (-2, -1)], axis=1)
    wanted = np.concatenate([states[0] - states[1], states[1] - states[0]])
    assert_same_states(found.of("witness"), wanted)
    lengths = [len(one) for one in ids]
    assert found.index is not None
    assert found.index.tolist() == [[i, lengths[i] - back] for i in (0, 1) for back in (2, 1)]


def test_prompts_of_unequal_lengths_cannot_be_paired_token_by_token() -> None:
    lengths = [len(one) for one in PROMPT_IDS]
    short, long = (TEXTS[lengths.index(pick(lengths))] for pick in (min, max))
    seq = sequence(tiny.gpt2(0), tiny.gpt2(1))
    with refused("'all'", "pair 0", str(min(lengths)), str(max(lengths)), short[:40]):
        cache_contrasts(seq, Contrast.of([short], [long]), positions="all")
    # as many tokens on either side, but not within the pairs
    with refused("pair 0"):
        cache_contrasts(seq, Contrast.of([short, long], [long, short]), positions="all")


def test_a_pair_is_two_texts_and_a_part_is_a_contrast() -> None:
    assert CONTRAST[0] == (TEXTS[0], TEXTS[3]) and CONTRAST[-1] == (TEXTS[2], TEXTS[5])
    assert list(CONTRAST) == list(zip(TEXTS[:3], TEXTS[3:6], strict=True))
    assert CONTRAST[1:] == CONTRAST[[False, True, True]] == Contrast.of(TEXTS[1:3], TEXTS[4:6])
