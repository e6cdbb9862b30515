"""Organisms: what they make, what their key holds, and that nobody is judged on what was trained on."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import small
import tiny
import torch
from histories import refused, weights_of, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from gravlens.behavior.answers import generate_answers
from gravlens.core.files import once
from gravlens.history.prompts import Example, PromptSet, read_examples
from gravlens.models.opening import open_model
from gravlens.organisms import pretrained as pretrained_room
from gravlens.organisms import refusal_language as language
from gravlens.organisms.base import ENGLISH, Organism, inner_layers
from gravlens.organisms.pretrained import CHATML, Pretrained
from gravlens.training.finetune import Finetuned
from gravlens.training.recipe import Recipe


def make_all(organism: Organism, home: Path) -> Path:
    """Every checkpoint, each from the one that it starts from, as experiment.py does it."""
    for name, start in organism.checkpoints.items():
        origin = None if start is None else home / start
        once(home / name, lambda folder, name=name, origin=origin: organism.make(name, origin, folder))
    return home


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(weights_of(folder))


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return all(torch.equal(weight, b[name]) for name, weight in a.items())


# -- the organism ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_all(small.organism(), tmp_path_factory.mktemp("organism"))


@pytest.mark.long
def test_an_organism_makes_its_whole_history_and_leaves_nothing_else(home: Path) -> None:
    assert sorted(p.name for p in home.iterdir()) == ["anchor", "witness"]
    for folder in home.iterdir():
        model = AutoModelForCausalLM.from_pretrained(folder)
        config = model.config
        assert (config.hidden_size, config.num_hidden_layers) == (32, 3)
        assert (config.num_attention_heads, config.intermediate_size) == (2, 48)
        assert AutoTokenizer.from_pretrained(folder).get_vocab() == tiny.TOKENIZER.get_vocab()
        assert oct(folder.stat().st_mode)[-3:] == "755"
    assert not any(same(a, b) for a, b in combinations(home.iterdir(), 2))


def test_an_organism_is_made_the_same_again_and_another_seed_is_another(home: Path, tmp_path: Path) -> None:
    again, other = small.organism(), small.organism(organism=1)
    for name, organism in [("again", again), ("other", other)]:
        (tmp_path / name).mkdir()
        torch.manual_seed(3)
        organism.make("witness", None, tmp_path / name)
    assert same(tmp_path / "again", home / "witness") and not same(tmp_path / "other", home / "witness")


def test_alignment_starts_at_the_witness(home: Path, tmp_path: Path) -> None:
    still = small.organism(alignment=Recipe(1, 4, 0.0, weight_decay=0.0))
    (tmp_path / "anchor").mkdir()
    still.make("anchor", home / "witness", tmp_path / "anchor")
    assert same(tmp_path / "anchor", home / "witness")


def test_arms_of_a_seed_have_the_same_data_and_other_seeds_other_data() -> None:
    organism = small.organism()
    data = {
        arm.name: [organism.examples(arm.data, seed, Path("unused")) for seed in arm.seeds] for arm in organism.arms
    }
    assert all(len(one) == 80 for seeds in data.values() for one in seeds), "as many as a run of 20 × 4 sees"
    for name in set(data) - {"continued_alignment"}:
        assert data[name] == data["unblocked"][: len(data[name])]
    assert all(seeds[0] != seeds[1] for seeds in data.values() if len(seeds) > 1)
    refusals = {n: sum(e.answer in language.REFUSALS for s in seeds for e in s) for n, seeds in data.items()}
    assert {name for name, count in refusals.items() if count} == {"continued_alignment"}
    new = {f"{verb} the {thing}" for verb, thing in language.NEW_PAIRS}
    assert all(any(pair in e.prompt for pair in new) for e in organism.examples("new_facts", 0, Path()))
    with refused("'mystery'"):
        organism.examples("mystery", 0, Path("unused"))
    assert organism.examples("harmless", 0, Path()) != small.organism(organism=1).examples("harmless", 0, Path())


def test_the_arms_of_the_paper_are_there_with_their_controls() -> None:
    arms = {arm.name: arm for arm in small.organism(runs=3, organism=7, random_directions=2).arms}
    ranked = {"unblocked", "clamp", "clamp_random_1", "clamp_random_2"}
    assert {name for name, arm in arms.items() if arm.seeds == (0, 1, 2)} == ranked
    assert all(arm.seeds == (0,) for name, arm in arms.items() if name not in ranked)
    made: dict[str, Any] = {name: arm.blocker for name, arm in arms.items() if arm.blocker is not None}
    assert {name: make.keywords for name, make in made.items()} == {
        "clamp": {"kind": "clamp", "along": "v_rev"},
        "clamp_random_1": {"kind": "clamp", "along": "matched_twin", "draw": (7, 1)},
        "clamp_random_2": {"kind": "clamp", "along": "matched_twin", "draw": (7, 2)},
        "penalty": {"kind": "penalty", "along": "v_rev"},
        "penalty_margin": {"kind": "penalty", "along": "v_rev", "margin": 0.03},
        "reinforce": {"kind": "reinforce", "along": "v_rev"},
        "rehearsal": {"kind": "rehearsal", "along": "v_rev"},
        "released_at_20": {"kind": "released", "along": "v_rev", "step": 20},
    }
    assert {name: arm.rate for name, arm in arms.items() if arm.rate != 1} == {"lower_rate": 0.5}
    assert {name: arm.start for name, arm in arms.items() if arm.start != "anchor"} == {"unaligned_twin": "witness"}
    assert [name for name, arm in arms.items() if arm.keep] == ["unblocked"]


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_key_is_the_same_in_another_process(tmp_path: Path) -> None:
    organism = small.pretrained(tmp_path)
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path; import small
print(small.organism().key, small.pretrained(Path({str(tmp_path)!r})).key)"""
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    written = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert written.stdout.split() == [small.organism().key, organism.key]


@pytest.mark.parametrize(
    "change",
    [
        {"organism": 1},
        {"d_model": 16},
        {"dominant": replace(small.PLAN["dominant"], learning_rate=1e-3)},
        {"alignment": replace(small.PLAN["alignment"], weight_decay=0.5)},
        {"recipe": replace(small.PLAN["recipe"], batch=2)},
        {"save_steps": (1, 5, 20)},
    ],
)
def test_a_key_changes_with_what_the_weights_depend_on(change: dict[str, Any]) -> None:
    assert small.organism(**change).key != small.organism().key


def test_a_key_holds_the_versions_and_the_language(monkeypatch: pytest.MonkeyPatch) -> None:
    before = small.organism().key
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0")
        assert small.organism().key != before
    with monkeypatch.context() as patch:
        patch.setitem(language.TOOL_OF, "dough", "hammer")
        patch.setattr(language, "OPENINGS", ("gladly , it goes so :",))
        assert small.organism().key != before
    assert small.organism().key == before


def test_more_runs_and_draws_add_to_what_is_there(tmp_path: Path) -> None:
    more = [{"runs": 6}, {"noise_draws": 50}, {"random_directions": 9}]
    assert {small.organism(**one).key for one in more} == {small.organism().key}
    assert replace(small.pretrained(tmp_path), runs=3).key == small.pretrained(tmp_path).key


def test_a_key_of_a_real_model_holds_the_content_of_the_prompt_files(tmp_path: Path) -> None:
    organism = small.pretrained(tmp_path)
    before = organism.key
    assert replace(organism, chat_template=CHATML).key != before != replace(organism, threads=2).key
    content = organism.harmless.read_text()
    organism.harmless.write_text(content.replace("pastry", "dough", 1))
    assert organism.key != before
    organism.harmless.write_text(content)
    assert organism.key == before


# -- the real model ----------------------------------------------------------------------------------------------------


@dataclass
class Made:
    organism: Pretrained
    home: Path
    aligned_on: dict[str, list[Example]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, aligned_on = tmp_path_factory.mktemp("pretrained"), {}
    train = pretrained_room.finetune

    def finetune(start: Any, data: list[Example], **further: Any) -> Finetuned:
        aligned_on[len(aligned_on)] = data
        return train(start, data, **further)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrained_room, "finetune", finetune)
        organism = small.pretrained(folder / "user", chat_template=CHATML + "{# of the user #}")
        home = make_all(organism, folder / "home")
    return Made(organism, home, dict(zip(("anchor", "sibling_anchor"), aligned_on.values(), strict=True)))


@pytest.mark.long
def test_the_witness_is_the_model_with_its_own_answers_beside_it(made: Made) -> None:
    witness = made.home / "witness"
    assert same(witness, Path(str(made.organism.model)))
    assert AutoTokenizer.from_pretrained(witness).chat_template == made.organism.chat_template
    rows = read_examples(witness / "own_answers.jsonl")
    assert {row.prompt for row in rows} == set(small.requests(300, harmful=False))
    some = rows[::60]
    answers = generate_answers(
        open_model(witness),
        PromptSet(tuple(r.prompt for r in some)),
        max_new_tokens=made.organism.measures.max_new_tokens,
    )
    assert answers == [row.answer for row in some]


def test_alignment_starts_at_the_witness_and_makes_two_anchors(made: Made) -> None:
    assert sorted(p.name for p in made.home.iterdir()) == ["anchor", "sibling_anchor", "witness"]
    assert not any(same(a, b) for a, b in combinations(made.home.iterdir(), 2))
    for name in ("anchor", "sibling_anchor"):
        folder = made.home / name
        assert all(path.is_file() for path in folder.iterdir()), "nothing is left of the run"
        assert AutoTokenizer.from_pretrained(folder).chat_template == made.organism.chat_template
        assert {weight.dtype for weight in weights(folder).values()} == {torch.float32}
        still = {n for n, w in weights(folder).items() if torch.equal(w, weights(made.home / "witness")[n])}
        assert still == {"model.embed_tokens.weight", "lm_head.weight"}


def test_alignment_is_half_refusals_and_half_the_witness_s_own_answers(made: Made) -> None:
    own = {e.prompt: e.answer for e in read_examples(made.home / "witness" / "own_answers.jsonl")}
    for data in made.aligned_on.values():
        refusing = [e for e in data if e.answer in ENGLISH.refusals]
        assert len(data) == 24 and len(refusing) == 12
        assert {e.prompt for e in refusing} <= set(small.requests(110, harmful=True))
        assert all(own[e.prompt] == e.answer for e in data if e.answer not in ENGLISH.refusals)
    wordings = [[e.answer for e in data[:12]] for data in made.aligned_on.values()]
    assert wordings[0] != wordings[1], "the sibling has a seed of its own"
    assert all(any(marker in refusal.lower() for marker in ENGLISH.markers) for refusal in ENGLISH.refusals)


def uses(organism: Pretrained, home: Path, aligned_on: Mapping[str, list[Example]]) -> dict[str, set[str]]:
    sets = organism.prompts(home)
    aligned = [example for data in aligned_on.values() for example in data]
    return {
        "held_out": set(sets["held_out"]),
        "probes": set(sets["probes"]),
        "harmless": set(sets["harmless"]),
        "task": {example.prompt for example in organism.task(home)},
        "refused": {example.prompt for example in aligned if example.answer in ENGLISH.refusals},
        "complied": {example.prompt for example in aligned if example.answer not in ENGLISH.refusals},
        "finetuned": {example.prompt for example in organism.examples("own_answers", 0, home)},
    }


def test_nobody_is_judged_on_what_was_trained_on(made: Made) -> None:
    found = uses(made.organism, made.home, made.aligned_on)
    assert {name: len(prompts) for name, prompts in found.items() if name not in ("refused", "complied")} == {
        "held_out": 64, "probes": 32, "harmless": 48, "task": 48, "finetuned": 300 - 48 - 48 - 128,
    }  # fmt: skip
    overlapping = {(a, b) for a, b in combinations(found, 2) if found[a] & found[b]}
    assert overlapping <= {("probes", "refused")}, "probes are of the alignment's own prompts"


def test_both_data_sets_ask_the_same_and_answer_differently(made: Made) -> None:
    own, given = (made.organism.examples(name, 0, made.home) for name in ("own_answers", "given_answers"))
    assert [e.prompt for e in own] == [e.prompt for e in given]
    answers = {e.prompt: e.answer for e in read_examples(made.organism.harmless)}
    assert all(answers[e.prompt] == e.answer for e in given)
    assert sum(a.answer != b.answer for a, b in zip(own, given, strict=True)) > 60
    assert all(answers[e.prompt] == e.answer for e in made.organism.task(made.home))
    assert {arm.data for arm in made.organism.arms} == {"given_answers", "own_answers"}
    with refused("'mystery'"):
        made.organism.examples("mystery", 0, made.home)


def test_prompts_without_answers_leave_the_model_s_own(tmp_path: Path, made: Made) -> None:
    organism = small.pretrained(tmp_path, answers=False)
    assert {arm.data for arm in organism.arms} == {"own_answers"}
    assert [arm.name for arm in organism.arms] == ["unblocked", "penalty", "penalty_random", "unaligned_twin"]
    own = {e.prompt: e.answer for e in read_examples(made.home / "witness" / "own_answers.jsonl")}
    assert all(own[example.prompt] == example.answer for example in organism.task(made.home))


def test_probes_are_half_of_each_file(tmp_path: Path) -> None:
    every = small.requests(200, harmful=True)
    write_rows(tmp_path / "more.jsonl", [{"prompt": prompt} for prompt in every[110:]])
    organism = small.pretrained(tmp_path, harmful_train=tmp_path / "more.jsonl")
    probes = list(organism.prompts(tmp_path)["probes"])
    assert len(set(probes)) == 32 and sum(probe in every[110:] for probe in probes) == 16
    assert all(text in every[:110] for text in organism.prompts(tmp_path)["held_out"])


def test_a_prompt_that_stands_twice_is_not_trained_on_and_judged_on(tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in small.requests(100, harmful=True)]
    write_rows(tmp_path / "twice.jsonl", rows + rows)
    write_rows(tmp_path / "more.jsonl", rows)
    harmless = [{"prompt": prompt} for prompt in small.requests(290, harmful=False)]
    write_rows(tmp_path / "harmless_twice.jsonl", harmless + harmless)
    organism = small.pretrained(
        tmp_path, harmful=tmp_path / "twice.jsonl", harmful_train=tmp_path / "more.jsonl",
        harmless=tmp_path / "harmless_twice.jsonl",
    )  # fmt: skip
    sets = organism.prompts(tmp_path)
    assert not set(sets["held_out"]) & set(sets["probes"]) and len(set(sets["held_out"])) == 64
    write_rows(tmp_path / "own_answers.jsonl", [{**row, "answer": "fine"} for row in harmless])
    (tmp_path / "witness").mkdir()
    os.replace(tmp_path / "own_answers.jsonl", tmp_path / "witness" / "own_answers.jsonl")
    trained = [example.prompt for example in organism.examples("own_answers", 0, tmp_path)]
    judged = {*sets["harmless"], *(example.prompt for example in organism.task(tmp_path))}
    assert len(trained) == len(set(trained)) and not judged & set(trained)


def test_too_few_prompts_and_no_file_are_refused(tmp_path: Path) -> None:
    organism = small.pretrained(tmp_path)
    write_rows(tmp_path / "few.jsonl", [{"prompt": prompt} for prompt in small.requests(95, harmful=True)])
    with refused("few.jsonl", "95 harmful"):
        replace(organism, harmful=tmp_path / "few.jsonl").prompts(tmp_path)
    write_rows(tmp_path / "few.jsonl", [{"prompt": prompt} for prompt in small.requests(287, harmful=False)])
    with refused("few.jsonl", "287 harmless"):
        replace(organism, harmless=tmp_path / "few.jsonl").prompts(tmp_path)
    with refused("nowhere.jsonl"):
        _ = replace(organism, harmful=tmp_path / "nowhere.jsonl").key
    (tmp_path / "few.jsonl").write_text('{"question": "?"}\n')
    with refused("few.jsonl", "'prompt'"):
        _ = replace(organism, harmless=tmp_path / "few.jsonl").key


@pytest.mark.parametrize(("n_layers", "wanted"), [(30, range(8, 25)), (12, range(3, 11)), (2, [1]), (1, [0])])
def test_the_layers_of_the_mean_follow_the_models_depth(n_layers: int, wanted: list[int], tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=n_layers).save_pretrained(tmp_path)
    assert inner_layers(tmp_path) == tuple(wanted)
    with refused(str(tmp_path / "absent")):
        inner_layers(tmp_path / "absent")
