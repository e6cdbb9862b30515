"""A history that exists is measured as it is: states are the checkpoints' own, and weights stay where they are."""

import hashlib
import json
import os
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small
import tiny
import torch
from folders import adapter
from histories import moved, refused, write_rows
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.directions.direction import Directions
from gravlens.directions.subspaces import random_like
from gravlens.directions.vrev import locate_vrev
from gravlens.history.controls import NO_CONTROLS, Controls, RandomClamp
from gravlens.history.encoding import encode
from gravlens.history.sequence import ModelSequence
from gravlens.models.opening import open_model
from gravlens.organisms import refusal_language as language
from gravlens.organisms.base import Arm, Measures
from gravlens.organisms.recorded import ON_ALIGNMENT_DATA, ON_DATA, RecordedHistory, link, missing
from gravlens.studies import experiment
from gravlens.studies.audit import audit
from gravlens.studies.evidence import strangers_of
from gravlens.studies.experiment import carry_out
from gravlens.studies.study import Study
from gravlens.training.recipe import Recipe

SAYS = Measures(language.REFUSALS, language.OPENINGS, language.REFUSALS, 4)
RUNS = {name: f"ft/{name}/checkpoint-*" for name in ("first run", "b")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA history: adapters of two runs over `aligned`, a twin over `base`; a stranger, a sibling, a deep model."""
    home = tmp_path_factory.mktemp("history")
    base = tiny.llama(0)
    models = {"base": base, "aligned": moved(base, seed=1), "sibling": moved(base, seed=2), "stranger": tiny.llama(5)}
    for name, model in {**models, "deep": tiny.llama(7, num_hidden_layers=4)}.items():
        tiny.save(model, home / name)
    for number, (run, steps) in enumerate({"first run": (2, 5, 20), "b": (5, 20, 40)}.items()):
        for step in steps:
            adapter(home / "aligned", home / f"ft/{run}/checkpoint-{step}", 100 * number + step)
    for step in (5, 20):
        adapter(home / "base", home / f"twin/checkpoint-{step}", 300 + step)
    adapter(home / "base", home / "lora_anchor", 400)
    write_rows(home / "probes.jsonl", [{"prompt": text} for text in language.probe_prompts()[:8]])
    write_rows(home / "held_out.jsonl", [{"prompt": text} for text in language.held_out_prompts()[:7]])
    write_rows(home / "harmless.jsonl", [{"prompt": text} for text in language.harmless_prompts()[:5]])
    write_rows(home / "data.jsonl", [one._asdict() for one in language.task_examples()[:24]])
    return home


def sequence(folder: Path, **changes: Any) -> ModelSequence:
    runs = {name: str(folder / pattern) for name, pattern in RUNS.items()}
    ends = {"witness": folder / "base", "anchor": folder / "aligned", "runs": runs}
    prompts = {name: folder / f"{name}.jsonl" for name in ("probes", "held_out")}
    return ModelSequence.from_folders(**{**ends, **prompts, **changes})


def recorded(folder: Path, controls: Controls = NO_CONTROLS, **changes: Any) -> RecordedHistory:
    plan: dict[str, Any] = {"measures": SAYS, "draws": 3}
    return RecordedHistory(sequence(folder, controls=controls), **{**plan, **changes})


def vrev(folder: Path) -> Directions:
    return locate_vrev(sequence(folder, runs={}))


def with_controls(folder: Path) -> Controls:
    vrev(folder).save(folder / "along_vrev.safetensors")
    return Controls(
        siblings=[folder / "sibling"],
        strangers=[folder / "stranger"],
        twins={"b": str(folder / "twin/checkpoint-*")},
        clamp={"first run": str(folder / RUNS["b"])},
        random={"9": RandomClamp(folder / "along_vrev.safetensors", {"b": str(folder / RUNS["b"])})},
    )


@pytest.fixture(scope="module")
def bare(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, dict[str, str], dict[str, str]]:
    """The history without a control carried out, and the user's files before and after."""
    cache, before = tmp_path_factory.mktemp("cache"), digests(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "processes", small.inline)
        return made(recorded(folder), cache), before, digests(folder)


@pytest.fixture(scope="module")
def controlled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "processes", small.inline)
        history = recorded(
            folder, with_controls(folder), data=folder / "data.jsonl", harmless=folder / "harmless.jsonl"
        )
        return made(history, tmp_path_factory.mktemp("cache"))


def made(history: RecordedHistory, cache: Path) -> Study:
    return carry_out({"mine": history}, cache)["mine"]


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder that is no link."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(files)}


def by_peft(base: Path, folder: Path, prompts: Sequence[str]) -> np.ndarray:
    """[prompt, layer, d_model] of an adapter that PEFT itself loads, one prompt at a time; without the last layer."""
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder))
    tokenizer = AutoTokenizer.from_pretrained(base)
    ids = encode(tokenizer, prompts)
    with torch.no_grad():
        hidden = [model(torch.tensor([one]), output_hidden_states=True).hidden_states for one in ids]
    return np.stack(
        [np.stack([states[layer + 1][0, -1].numpy() for layer in range(tiny.LAYERS - 1)]) for states in hidden]
    )


# -- what is measured --------------------------------------------------------------------------------------------------


def test_the_states_of_a_recorded_run_are_those_of_its_adapters(folder: Path, bare: Any) -> None:
    study = bare[0]
    prompts = [json.loads(line)["prompt"] for line in (folder / "held_out.jsonl").read_text().splitlines()]
    for seed, run in enumerate(RUNS):
        states = study.states(f"runs/unblocked/seed{seed}", "held_out")
        assert states.checkpoints == (f"{run}/5", f"{run}/20")  # the steps that both runs have, by the user's names
        for step in (5, 20):
            wanted = by_peft(folder / "aligned", folder / f"ft/{run}/checkpoint-{step}", prompts)
            assert np.allclose(states.of(f"{run}/{step}")[:, :-1], wanted, atol=1e-4)
    ends = cache_residuals(sequence(folder, runs={}), sequence(folder).held_out)
    for name in ("witness", "anchor"):
        assert np.allclose(study.states("measured", "held_out").of(name), ends.of(name), atol=1e-5)


def test_no_weight_is_copied_changed_or_deleted(bare: Any) -> None:
    study, before, after = bare
    assert before == after and before
    assert [
        path for path in digests(study.home) if Path(path).name in ("model.safetensors", "adapter_model.safetensors")
    ] == []


def test_what_a_recorded_run_does_not_have_is_missing_and_not_invented(bare: Any) -> None:
    study = bare[0]
    facts, log = study.facts(study.unblocked, 0), study.log(study.unblocked, 0)
    assert facts["seconds_per_step"] is None and facts["cosine"] is None
    assert log.empty and np.isnan(log.blocker_norm.mean())
    (measured,) = facts["behavior"].values()
    assert measured["task_loss"] is None and measured["over_refusal"] is None  # neither data nor harmless prompts
    assert 0 <= measured["compliance_rate"] <= 1 or measured["compliance_rate"] is None
    assert "kl_anchor" in measured and "kl_anchor_harmless" not in measured
    norms = facts["update_norms"]["20"]
    assert norms and all("q_proj" in name or "v_proj" in name for name in norms)  # what the adapters adapt


def test_weight_noise_is_drawn_at_the_last_step(bare: Any) -> None:
    study = bare[0]
    assert study.noise(20)[0].shape[:2] == (3, 1)


def test_a_study_has_the_recorded_runs_as_a_user_would_enter_them(folder: Path, bare: Any) -> None:
    study = bare[0]
    assert [one.name for one in study.kept(study.unblocked)] == ["first run/5", "first run/20", "b/5", "b/20"]
    runs = study.with_runs().runs
    assert {name: [one.source for one in run] for name, run in runs.items()} == {
        name: [folder / f"ft/{name}/checkpoint-{step}" for step in (5, 20)] for name in RUNS
    }
    assert set(study.follow(study.unblocked).layer_mean.run) == set(RUNS)


def test_controls_are_measured_from_their_own_starts(folder: Path, controlled: Study) -> None:
    assert controlled.siblings == ["sibling_anchor"] and controlled.strangers == ["stranger_stranger"]
    measured = controlled.states("measured", "held_out")
    own = read_residuals(
        open_model(folder / "stranger"), encode(tiny.TOKENIZER, controlled.prompts["held_out"]), layers=range(3)
    )
    assert np.allclose(measured.of("stranger_stranger"), own.numpy(), atol=1e-5)
    twin = controlled.states("runs/unaligned_twin/seed1", "held_out")
    assert twin.checkpoints == ("unaligned_twin-b/5", "unaligned_twin-b/20")
    wanted = by_peft(folder / "base", folder / "twin/checkpoint-20", list(controlled.prompts["held_out"]))
    assert np.allclose(twin.of("unaligned_twin-b/20")[:, :-1], wanted, atol=1e-4)


def test_the_cosine_of_a_random_arm_is_of_its_own_directions(controlled: Study) -> None:
    arm = next(arm for arm in controlled.organism.arms if arm.name == "clamp_random_9")
    assert controlled.facts(arm, 1)["cosine"] == pytest.approx(1, abs=1e-4)  # the file holds v_rev itself
    clamp = next(arm for arm in controlled.organism.arms if arm.name == "clamp")
    assert controlled.facts(clamp, 0)["cosine"] is None
    (measured,) = controlled.facts(clamp, 0)["behavior"].values()
    assert measured["task_loss"] > 0 and measured["kl_anchor_harmless"] >= 0


def closed(study: Study, run: str, twin: str, seeds: tuple[int, int]) -> float:
    """Closure of a run with a twin, by numpy: the mean over the layers of the mean."""
    at = [study.states("measured", "held_out").layers.index(layer) for layer in study.organism.layers_in_mean]

    def mean(part: str, name: str, prompts: str = "held_out") -> np.ndarray:
        return study.states(part, prompts).of(name).astype(np.float64)[:, at].mean(0)

    v = mean("measured", "witness", "probes") - mean("measured", "anchor", "probes")
    apart = mean(f"runs/unaligned_twin/seed{seeds[1]}", f"{twin}/20") - mean(
        f"runs/unblocked/seed{seeds[0]}", f"{run}/20"
    )
    return float(np.mean(1 - np.sum(apart * v, axis=1) / np.sum(v * v, axis=1)))


def test_own_twins_pair_by_run_and_those_of_another_history_in_order(controlled: Study) -> None:
    """Only run b has a twin; another history's first twin stands against the first run, whatever its seed."""
    table = strangers_of(controlled, {"other": controlled}).closures["other"].layer_mean
    assert set(table.run) == {"first run"}
    wanted = closed(controlled, "first run", "unaligned_twin-b", (0, 1))
    assert table[table.step == 20].closure.item() == pytest.approx(wanted, abs=1e-4)


@pytest.mark.long
def test_an_audit_pairs_twins_by_run_and_leaves_the_user_s_sequence_alone(
    folder: Path, controlled: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "processes", small.inline)
    before = digests(folder)
    audit({"mine": controlled.organism}, tmp_path, cache=controlled.home.parents[2])
    table = pd.read_csv(tmp_path / "controls.csv").set_index("control")
    twin = table.loc["unaligned_twin"]
    assert twin.run == "unaligned_twin-b"
    wanted = closed(controlled, "b", "unaligned_twin-b", (1, 1))
    assert twin.closure_final == pytest.approx(wanted, abs=1e-4)
    assert wanted != pytest.approx(closed(controlled, "first run", "unaligned_twin-b", (0, 1)), abs=1e-2)
    assert [*tmp_path.glob("*.toml"), *tmp_path.glob("*.jsonl")] == [] and digests(folder) == before


# -- arms --------------------------------------------------------------------------------------------------------------


def arms(history: RecordedHistory) -> dict[str, tuple[tuple[int, ...], list[int]]]:
    """Name -> seeds, and those that are recorded."""
    return {arm.name: (arm.seeds, sorted(arm.recorded)) for arm in history.arms}


def test_arms_are_paired_by_the_names_of_runs(folder: Path) -> None:
    history = recorded(folder, with_controls(folder))
    assert arms(history) == {
        "unblocked": ((0, 1), [0, 1]),
        "unaligned_twin": ((1,), [1]),
        "clamp": ((0,), [0]),
        "clamp_random_9": ((1,), [1]),
    }
    assert [arm.label(arm.seeds[0]) for arm in history.arms] == [
        "first run",
        "unaligned_twin-b",
        "clamp-first run",
        "clamp_random_9-b",
    ]
    assert Arm("clamp", (3,)).label(3) == "clamp-3"
    assert pickle.loads(pickle.dumps(history)).key == history.key  # a worker gets it


def test_trained_arms_have_the_seeds_of_runs_of_their_recipe(folder: Path) -> None:
    train = ("runs", "twins", "clamp", "random", "released", "released_random", "siblings", "continued")
    given: dict[str, Any] = {"data": folder / "data.jsonl", "alignment_data": folder / "data.jsonl", "directions": 2}
    history = recorded(folder, with_controls(folder), train=train, **given)
    assert arms(history) == {
        "unblocked": ((0, 1, 2, 3), [0, 1]),
        "unaligned_twin": ((1, 2, 3), [1]),
        "continued_alignment": ((0, 1), []),
        "clamp": ((0, 2, 3), [0]),
        "released": ((2, 3), []),
        "clamp_random_9": ((1,), [1]),
        **{f"{kind}_random_{n}": ((2, 3), []) for kind in ("clamp", "released") for n in (1, 2)},
    }
    assert history.checkpoints == {
        **dict.fromkeys(("witness", "anchor", "sibling_anchor", "stranger_stranger")),
        **dict.fromkeys(("sibling_anchor_2", "sibling_anchor_3"), "witness"),
    }
    same = recorded(folder, train=("clamp",), data=folder / "data.jsonl", same_recipe=True)
    assert arms(same)["clamp"] == ((0, 1), []) and same.recipe.steps == 20  # as many as the runs have
    assert len(same.examples("data", 0, folder)) == 21 and len(same.task(folder)) == 3


@pytest.mark.long
def test_a_trained_clamp_joins_the_recorded_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "processes", small.inline)
    given: dict[str, Any] = {
        "data": folder / "data.jsonl",
        "alignment_data": folder / "data.jsonl",
        "same_recipe": True,
    }
    recipe: dict[str, Any] = {
        "recipe": Recipe(1, 4, 1e-3),
        "alignment_recipe": Recipe(2, 4, 1e-3),
        "siblings": 1,
        "directions": 2,
    }
    first = made(recorded(folder, **given, **recipe), tmp_path)
    written = {path: path.stat().st_mtime_ns for path in first.home.rglob("*.safetensors")}
    study = made(recorded(folder, train=("clamp", "random"), **given, **recipe), tmp_path)
    assert study.home == first.home
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what was measured is measured again"
    by_name = {arm.name: arm for arm in study.organism.arms}
    held, base = (study.follow(by_name[name]).layer_mean for name in ("clamp", "unblocked"))
    assert set(held.run) == {"clamp-first run", "clamp-b"} and set(base.run) == set(RUNS)
    assert len(study.log(by_name["clamp"], 0)) == 20
    cosines = {
        name: [study.facts(by_name[name], seed)["cosine"] for seed in (0, 1)]
        for name in ("clamp_random_1", "clamp_random_2")
    }
    assert all(one == other < 1 for one, other in cosines.values())  # one direction for all runs of an arm
    assert cosines["clamp_random_1"] != cosines["clamp_random_2"]


# -- links -------------------------------------------------------------------------------------------------------------


def test_a_lora_anchor_stays_an_adapter(folder: Path, tmp_path: Path) -> None:
    given = sequence(folder, anchor=folder / "lora_anchor", runs={})
    link(given.anchor, tmp_path)
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "adapter_model.safetensors").is_symlink()
    ids = encode(tiny.TOKENIZER, tiny.PROMPTS)
    own, linked = (read_residuals(open_model(one), ids, layers=range(3)) for one in (given.anchor, tmp_path))
    assert np.array_equal(own, linked)


def test_a_base_without_a_template_is_read_with_the_anchor_s(folder: Path, tmp_path: Path) -> None:
    told = AutoTokenizer.from_pretrained(folder / "aligned")
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for name, text in {"base": None, "aligned": template}.items():
        tiny.save(open_model(folder / name).module, tmp_path / name)
        told.chat_template = text
        told.save_pretrained(tmp_path / name)
    before = digests(tmp_path / "base")
    given = sequence(folder, witness=tmp_path / "base", anchor=tmp_path / "aligned", runs={}, chat_template="anchor")
    (tmp_path / "linked").mkdir()
    link(given.witness, tmp_path / "linked")
    assert digests(tmp_path / "base") == before, "the user's tokenizer was written through a link"
    ids, other = (encode(open_model(one).tokenizer, tiny.PROMPTS) for one in (given.witness, tmp_path / "linked"))
    plain = encode(open_model(tmp_path / "base").tokenizer, tiny.PROMPTS)
    assert ids == other != plain


def test_the_key_knows_when_a_checkpoint_was_written_again(folder: Path, tmp_path: Path) -> None:
    run = adapter(folder / "aligned", tmp_path / "ft/checkpoint-5", 1)
    history = recorded(folder)
    given: dict[str, Any] = {"runs": {"r": str(tmp_path / "ft/checkpoint-*")}}
    key = RecordedHistory(sequence(folder, **given), measures=SAYS).key
    assert key != history.key
    assert RecordedHistory(sequence(folder, **given), measures=SAYS, draws=7).key == key  # more is drawn to it
    more: dict[str, Any] = {"data": folder / "data.jsonl"}
    with_data = RecordedHistory(sequence(folder, **given), measures=SAYS, **more)
    assert RecordedHistory(sequence(folder, **given), measures=SAYS, train=("runs",), **more).key == with_data.key
    more |= {"alignment_data": folder / "data.jsonl"}
    keys = [RecordedHistory(sequence(folder), train=train, **more).key for train in ((), ("siblings",))]
    assert keys[0] != keys[1]  # a sibling is read with the history
    os.utime(run / "adapter_model.safetensors", ns=(1, 1))
    assert RecordedHistory(sequence(folder, **given), measures=SAYS).key != key


# -- mistakes ----------------------------------------------------------------------------------------------------------


def test_what_is_needed_is_named(folder: Path) -> None:
    with refused("[runs]"):
        RecordedHistory(sequence(folder, runs={}))
    with refused("held_out"):
        RecordedHistory(sequence(folder, held_out=None))
    with refused("controls.strangers.deep", "4 layers of width 32", "3 layers of width 32"):
        recorded(folder, Controls(strangers=[folder / "deep"]))
    random_like(vrev(folder), rng=np.random.default_rng(0)).save(folder / "random.safetensors")
    wide = [replace(one, vector=np.ones(8)) for one in vrev(folder)]
    Directions(tuple(wide)).save(folder / "wide.safetensors")
    runs = {"b": str(folder / RUNS["b"])}
    recorded(folder, Controls(random={"1": RandomClamp(folder / "random.safetensors", runs)}))
    with refused("wide.safetensors", "width 8"):
        recorded(folder, Controls(random={"1": RandomClamp(folder / "wide.safetensors", runs)}))


def test_runs_without_a_common_step_are_named_with_their_steps(folder: Path) -> None:
    runs = {"one": [folder / "ft/first run/checkpoint-2"], "two": [folder / "ft/b/checkpoint-40"]}
    with refused("runs.one: 2", "runs.two: 40"):
        RecordedHistory(sequence(folder, runs=runs))


@pytest.mark.parametrize(
    ("train", "files", "named"),
    [
        (("strangers",), {}, ["Strangers cannot be trained"]),
        (("twin",), {}, ["'twin'"]),
        (("twins",), {}, ["no data", "twins"]),
        (("siblings",), {"data": "data.jsonl"}, ["no data", "siblings"]),
        (("clamp", "twins"), {"data": "data.jsonl"}, ["clamp, twins", "another recipe", "first run, b"]),
    ],
)
def test_what_cannot_be_trained_is_refused(folder: Path, train: Any, files: dict[str, str], named: list[str]) -> None:
    given: dict[str, Any] = {name: folder / file for name, file in files.items()}
    with refused(*named):
        recorded(folder, train=train, **given)


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_missing_lists_what_is_not_there(folder: Path) -> None:
    table = missing(sequence(folder)).set_index("control")
    assert {*ON_DATA, *ON_ALIGNMENT_DATA, "strangers", "data", "harmless"} - {"penalty"} == {*table.index}
    assert "--alignment-data" in table.how["siblings"] and "SEQUENCE" in table.how["strangers"]
    assert "--learning-rate" in table.how["clamp"] and "--learning-rate" not in table.how["siblings"]
    assert table.level["released"] == 5 and table.level["twins"] == 3
    left = missing(recorded(folder, with_controls(folder), data=folder / "data.jsonl", train=("runs", "push")))
    there = {"siblings", "strangers", "twins", "clamp", "random", "data", "push"}
    assert {*left.control} == {*table.index} - there
    assert "--learning-rate" not in " ".join(left.how)
