"""Carrying out an organism: complete parts are reused, and an interrupted part leaves nothing behind."""

import json
import os
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from histories import refused, weights_of
from safetensors.torch import load_file

from gravlens.activations.residuals import cache_residuals, read_residuals
from gravlens.behavior.divergence import kl_from
from gravlens.core.errors import GravlensError, check_layer
from gravlens.directions.subspaces import whole_state
from gravlens.directions.vrev import locate_vrev
from gravlens.history.encoding import encode
from gravlens.models.opening import open_model
from gravlens.organisms.arms import blocker as of_kind
from gravlens.organisms.arms import drift_of_another_run, made_by, random_arms
from gravlens.organisms.base import Arm, Grounds
from gravlens.studies import experiment
from gravlens.studies.experiment import blocker_of, carry_out, cosine_with
from gravlens.studies.study import Study
from gravlens.training.recipe import Recipe

pytestmark = pytest.mark.long


class Few(small.Short):
    """An organism with three arms."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        seeds = tuple(range(self.runs))
        return (
            Arm("unblocked", seeds, keep=True),
            Arm("penalty", seeds, blocker=of_kind("penalty", margin=0.1)),
            Arm("penalty_random", seeds, blocker=made_by("penalty_random")),
        )


def few(**changes: Any) -> Few:
    return Few(**{**small.PLAN, "recipe": Recipe(4, 4, 1e-3), "save_steps": (1, 4), "noise_draws": 2, **changes})


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "processes", small.inline)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished organism, in a folder whose name a glob would misread."""
    folder = tmp_path_factory.mktemp("cache") / "of [mine]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "processes", small.inline)
        carry_out({"one": few()}, folder)
    return folder


@pytest.fixture
def home(cache: Path) -> Path:
    return Study.at(few(), cache).home


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder: when it was written, and which file it is."""
    found = {p.relative_to(folder).as_posix(): p.stat() for p in folder.rglob("*") if p.is_file()}
    return {name: (stat.st_mtime_ns, stat.st_ino) for name, stat in found.items()}


def folders(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_dir()}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(weights_of(folder))


# -- what lies there ---------------------------------------------------------------------------------------------------


def test_all_of_an_organism_is_made_and_only_what_is_kept_has_weights(home: Path) -> None:
    kept = {f"runs/unblocked/seed{seed}/checkpoint-{step}" for seed in (0, 1) for step in (1, 4)}
    runs = {f"runs/{arm}/seed{seed}" for arm in ("unblocked", "penalty", "penalty_random") for seed in (0, 1)}
    noise = {f"noise/step{step}-2-draws-2-runs" for step in (1, 4)}
    history = {"witness", "anchor", "measured"}
    above = {"runs", "runs/unblocked", "runs/penalty", "runs/penalty_random", "noise", "other_prompts"}
    others = {f"other_prompts/{name}-2-runs" for name in ("harmless", "shuffled_words")}
    damage = {path for path in folders(home) if path.startswith("damage_by_layer")}
    assert len(damage) == 2, "one measurement, named by what was done"
    assert folders(home) == kept | runs | noise | others | damage | history | above
    for run in runs:
        states = {"probes.safetensors", "held_out.safetensors", "held_out-2.safetensors"}
        files = {path.name for path in (home / run).iterdir() if path.is_file()}
        assert files == {"finetune.json", "run.json", "log.csv", "checksums.json", *states}


def test_the_home_is_keyed_by_name_and_key(cache: Path) -> None:
    assert Study.at(few(), cache).home == cache / "histories" / "refusal" / few().key
    assert Study.at(few(organism=1), cache).home != Study.at(few(), cache).home


def test_the_history_comes_back_by_the_same_door_as_a_user_s(home: Path) -> None:
    sequence = Study(few(), home).with_runs()
    assert {name: [c.step for c in run] for name, run in sequence.runs.items()} == {"seed0": [1, 4], "seed1": [1, 4]}
    residuals = cache_residuals(sequence, few().prompts(home)["held_out"])
    for name in residuals.checkpoints:
        run, _, step = name.rpartition("/")
        part = f"runs/unblocked/{run}" if run else "measured"
        stored = Study(few(), home).states(part, "held_out")
        assert np.array_equal(residuals.of(name), stored.of(f"unblocked-{run[4:]}/{step}" if run else name))
        assert stored.prompts == residuals.prompts


def test_the_states_of_every_checkpoint_are_its_own(home: Path) -> None:
    measured = Study(few(), home).states("measured", "probes")
    assert measured.checkpoints == tuple(few().checkpoints)
    assert len(measured.checkpoints) == 2
    tokenizer = open_model(home / "anchor").tokenizer
    ids = encode(tokenizer, few().prompts(home)["probes"])
    for name in measured.checkpoints:
        states = read_residuals(open_model(home / name), ids, layers=range(3)).numpy()
        assert np.allclose(measured.of(name), states, atol=1e-5)
    blocked = Study(few(), home).states("runs/penalty/seed1", "probes")
    assert blocked.checkpoints == ("penalty-1/1", "penalty-1/4") and blocked.layers == (0, 1, 2)


def test_a_run_s_facts_are_those_of_its_checkpoints(home: Path) -> None:
    folder = Study(few(), home).run_folder(few().arms[0], 1)
    facts = json.loads((folder / "run.json").read_text())
    assert facts["seconds_per_step"] > 0 and list(facts["behavior"]) == ["4"], "answers are asked at the chosen steps"
    anchor = weights(home / "anchor")
    for step in (1, 4):
        after = weights(folder / f"checkpoint-{step}")
        moved = {name: float((after[name] - anchor[name]).norm()) for name in anchor if name in after}
        norms = facts["update_norms"][str(step)]
        assert norms == pytest.approx({name: moved[name] for name in norms}, rel=1e-4) and len(norms) > 20
    assert len(facts["behavior"]["4"]["answers"]) == 8
    assert set(json.loads((home / "measured" / "behavior.json").read_text())) == {"witness", "anchor"}


def test_divergences_are_along_the_references_own_answers(home: Path) -> None:
    facts = json.loads((Study(few(), home).run_folder(few().arms[0], 1) / "run.json").read_text())["behavior"]["4"]
    model = open_model(Study(few(), home).run_folder(few().arms[0], 1) / "checkpoint-4")
    for name, (reference, kind) in {
        "kl_anchor_harmless": ("anchor", "harmless"),
        "kl_anchor": ("anchor", "held_out"),
        "kl_witness": ("witness", "held_out"),
    }.items():
        before, prompts = open_model(home / reference), few().prompts(home)[kind]
        wanted = kl_from(before, model, prompts, max_new_tokens=few().measures.max_new_tokens).mean()
        assert facts[name] == pytest.approx(wanted, rel=1e-3)
    assert facts["kl_anchor_harmless"] > 0


def test_the_last_states_are_read_at_further_positions_too(home: Path) -> None:
    states = Study(few(), home).states("runs/penalty/seed1", "held_out-2")
    assert states.checkpoints == ("penalty-1/4",) and states.meta["positions"] == -2
    last = Study(few(), home).states("runs/penalty/seed1", "held_out").of("penalty-1/4")
    assert not np.allclose(states.of("penalty-1/4"), last)


def test_noise_is_of_the_runs_mean_norm_at_the_anchor(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    found: list[Any] = []
    real = experiment.weight_noise

    def listen(anchor: Any, directions: Any, prompts: Any, **further: Any) -> Any:
        asked.update(further, anchor=anchor, prompts=prompts, directions=directions)
        found.append(real(anchor, directions, prompts, **further))
        return found[-1]

    monkeypatch.setattr(experiment, "weight_noise", listen)
    study = Study(few(noise_draws=3), home)  # draws that are not there yet
    experiment.draw_noise(study, 3)
    runs = [json.loads((home / f"runs/unblocked/seed{seed}/run.json").read_text()) for seed in (0, 1)]
    name = "model.layers.1.mlp.up_proj.weight"
    wanted = sum(run["update_norms"]["4"][name] for run in runs) / 2
    assert asked["norms"][4][name] == pytest.approx(wanted) and list(asked["norms"]) == [1, 4] and asked["draws"] == 3
    assert asked["prompts"].texts == study.prompts["held_out"].texts
    anchor = dict(asked["anchor"].module.named_parameters())
    assert all(torch.equal(weight, anchor[name]) for name, weight in weights(home / "anchor").items() if name in anchor)
    vs = locate_vrev(Study(few(), home).states("measured", "probes"))
    assert np.array_equal(asked["directions"].vectors, vs.vectors)
    for column, step in enumerate((1, 4)):
        cosines, layers = study.noise(step)
        assert cosines.shape == (3, 1, 3) and layers == (0, 1, 2)
        assert np.array_equal(cosines[:, 0], found[-1].cosines[:, column])
        assert (np.abs(cosines) <= 1).all() and len(np.unique(cosines)) == 9
        shutil.rmtree(study.noise_folder(step))


# -- arms --------------------------------------------------------------------------------------------------------------


def blocker(home: Path, make: Any, seed: int = 0, other: str | None = None) -> Any:
    return blocker_of(Study(few(), home), Arm("arm", (0, 1), blocker=make, other=other), seed)


def test_a_penalty_acts_along_v_rev_of_the_inner_layers(home: Path) -> None:
    vs = locate_vrev(Study(few(), home).states("measured", "probes"))
    made = blocker(home, of_kind("penalty", margin=0.1))
    assert made.directions.layers == few().layers_in_mean == (0, 1) and made.margin == 0.1
    assert np.allclose(made.directions.vectors, vs.vectors[:2], atol=1e-5)
    assert np.allclose(made.directions.distances, vs.distances[:2], rtol=1e-4)
    assert made.probes.texts == few().prompts(home)["probes"].texts
    assert blocker_of(Study(few(), home), Arm("unblocked", (0,)), 0) is None


def test_its_random_twin_is_fresh_for_each_run_and_of_the_anchor_s_states_on_the_probes(home: Path) -> None:
    vs = blocker(home, of_kind("penalty")).directions
    twins = [blocker(home, made_by("penalty_random"), seed).directions for seed in (0, 1, 0)]
    assert np.array_equal(twins[0].vectors, twins[2].vectors)
    assert (np.abs(np.sum(twins[0].vectors * twins[1].vectors, axis=1)) < 0.98).all()
    states = Study(few(), home).states("measured", "probes").of("anchor")
    for twin in twins:
        assert twin.layers == vs.layers and np.allclose(twin.distances, vs.distances)
        for i, layer in enumerate(twin.layers):
            centred = states[:, layer] - states[:, layer].mean(0)
            basis = np.linalg.svd(centred, full_matrices=False)[2][: len(centred) - 1]
            assert np.linalg.norm(basis @ twin.vectors[i]) == pytest.approx(1, abs=1e-4)


def test_an_arm_s_own_random_direction_is_the_same_for_all_of_its_runs(home: Path) -> None:
    first, second = random_arms((0, 1), "harmless", directions=2, draw=(3,))
    twins = [blocker(home, first.blocker, seed).directions for seed in (0, 1)]
    assert np.array_equal(twins[0].vectors, twins[1].vectors)
    other = blocker(home, second.blocker).directions
    assert (np.abs(np.sum(twins[0].vectors * other.vectors, axis=1)) < 0.98).all()
    assert first.name == "clamp_random_1" and blocker(home, first.blocker).side == "both"


def test_a_random_arm_tells_how_near_to_v_rev_its_direction_was(home: Path) -> None:
    study = Study(few(), home)
    vs, twin = study.vs, blocker(home, made_by("penalty_random"), 1).directions
    wanted = np.mean([abs(float(twin[layer].vector @ vs[layer].vector)) for layer in (0, 1)])
    arms = {arm.name: arm for arm in few().arms}
    assert study.facts(arms["penalty_random"], 1)["cosine"] == pytest.approx(wanted, rel=1e-4)
    assert study.facts(arms["unblocked"], 1)["cosine"] is None and study.facts(arms["penalty"], 1)["cosine"] is None
    assert cosine_with(vs, vs) == pytest.approx(1) and cosine_with(whole_state(vs), vs) == pytest.approx(1)


def test_a_run_defined_direction_is_that_of_the_next_seed_s_unblocked_run(home: Path) -> None:
    seen: list[Grounds] = []
    for seed in (0, 1):
        blocker(home, lambda grounds: seen.append(grounds), seed, other="unblocked")
    assert [list(grounds.other.runs) for grounds in seen if grounds.other] == [["unblocked-1"], ["unblocked-0"]]
    spaces = drift_of_another_run(seen[0])
    states = Study(few(), home).states("runs/unblocked/seed1", "probes").of("unblocked-1/4")
    drift = states - Study(few(), home).states("measured", "probes").of("anchor")
    for space in spaces:
        leading = np.linalg.svd(drift[:, space.layer], full_matrices=False)[2][0]
        assert abs(leading @ space.basis[0]) == pytest.approx(1, abs=1e-4)
    with refused("no other run"):
        blocker_of(Study(few(), home), Arm("alone", (0,), blocker=drift_of_another_run, other="unblocked"), 0)  # pyright: ignore


def test_arms_that_are_made_of_other_runs_come_after_them(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(experiment, "run_arm", lambda _study, arm, seed: order.append(f"{arm.name}{seed}"))
    arms = [Arm("late", (0,), other="unblocked"), Arm("unblocked", (0, 1)), Arm("early", (0,))]
    carry_out({"one": few()}, home.parents[2], arms=arms)
    assert order == ["unblocked0", "unblocked1", "early0", "late0"]


def test_each_run_gets_its_arm_s_start_data_blocker_and_seed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []

    def listen(start: Any, examples: Any, **further: Any) -> Any:
        calls.append({"start": start.source, "examples": examples, **further})
        raise InterruptedError

    monkeypatch.setattr(experiment, "finetune", listen)
    arms = [
        Arm("new", (0,), data="new_facts", start="witness"),
        Arm("new", (1,), blocker=of_kind("penalty", margin=0.2), rate=0.5),
    ]
    for arm, seed in zip(arms, (0, 1), strict=True):
        with pytest.raises(InterruptedError):
            experiment.run_arm(Study(few(), home), arm, seed)
    first, second = calls
    assert first["start"] == home / "witness" and second["start"] == home / "anchor"
    assert first["examples"] == few().examples("new_facts", 0, home)
    assert second["examples"] == few().examples("harmless", 1, home)
    assert (first["seed"], second["seed"]) == (0, 1) and first["blocker"] is None and second["blocker"].margin == 0.2
    assert first["recipe"] == few().recipe
    assert second["recipe"] == replace(few().recipe, learning_rate=0.5 * few().recipe.learning_rate)
    assert tuple(second["save_steps"]) == (1, 4)
    assert list((home / "runs" / "new").iterdir()) == [], "nothing half is left"
    (home / "runs" / "new").rmdir()


def test_checkpoints_are_made_after_what_they_start_from() -> None:
    starts = {"c": "b", "a": None, "b": "a", "d": "a", "e": None}
    assert [sorted(wave) for wave in experiment._waves(starts)] == [["a", "e"], ["b", "d"], ["c"]]


# -- going on where it was ---------------------------------------------------------------------------------------------


def test_what_is_complete_is_not_made_again(cache: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    before = files(home)
    for name in ("finetune", "weight_noise", "prepare", "measure_behavior"):
        monkeypatch.setattr(experiment, name, lambda *given, **_: made.append(given))
    monkeypatch.setattr(Few, "make", lambda *given: made.append(given))
    assert carry_out({"one": few()}, cache)["one"].home == home
    assert made == [] and files(home) == before


def test_a_damaged_part_of_the_cache_is_made_again_and_is_as_before(
    cache: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut run.json ended every later call in a traceback."""
    monkeypatch.setattr(experiment, "processes", small.inline)
    own = tmp_path / home.relative_to(cache)
    shutil.copytree(home, own, symlinks=True)
    run = own / "runs/penalty/seed1"
    wanted = (run / "probes.safetensors").read_bytes()
    (run / "run.json").write_text("")
    with pytest.warns(UserWarning, match=r"seed1 is damaged \(run.json"):
        carry_out({"it": few()}, tmp_path)
    assert json.loads((run / "run.json").read_text()) and (run / "probes.safetensors").read_bytes() == wanted
    sources = Study(few(), own).states("runs/penalty/seed1", "probes").meta["sources"]
    assert set(sources.values()) == {"checkpoint-1", "checkpoint-4"}, "not the folder's name while it was made"


def test_a_run_that_is_stopped_leaves_no_half_and_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    organism, real = few(runs=1), experiment._measure_run

    def stop(study: Any, checkpoints: Any, start: Any, folder: Path, *, divergence: bool) -> Any:
        if checkpoints[0].name.startswith("penalty-"):
            assert list(folder.glob("checkpoint-*")), "it was trained already"
            raise KeyboardInterrupt
        return real(study, checkpoints, start, folder, divergence=divergence)

    with monkeypatch.context() as patch:
        patch.setattr(experiment, "_measure_run", stop)
        with pytest.raises(KeyboardInterrupt):
            carry_out({"one": organism}, tmp_path)
    home = Study.at(organism, tmp_path).home
    before = files(home)
    assert (home / "runs/unblocked/seed0/run.json").exists() and (home / "measured/behavior.json").exists()
    assert not (home / "runs/penalty/seed0").exists() and not (home / "runs/penalty_random").exists()
    assert [name for name in folders(home) if "/." in f"/{name}"] == [], "no scratch is left"
    assert list((home / "runs/penalty").iterdir()) == []

    carry_out({"one": organism}, tmp_path)
    after = files(home)
    assert {name: after[name] for name in before} == before
    assert {name.split("/seed")[0] for name in after.keys() - before.keys()} >= {"runs/penalty", "runs/penalty_random"}
    carry_out({"one": organism}, tmp_path)
    assert files(home) == after

    carry_out({"one": replace(organism, runs=2)}, tmp_path)
    more = files(home)
    assert {name: more[name] for name in after} == after, "one more seed is added to what is there"
    added = more.keys() - after.keys()
    # the damage of the last run's mirrored update is that of another run
    beside = ("seed1", "-2-runs", "damage_by_layer/")
    assert all(any(part in name for part in beside) for name in added)
    assert {next(part for part in beside if part in name) for name in added} == {*beside}


def test_a_checkpoint_that_could_not_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    organism = few()

    def stop(self: Few, name: str, start: Path | None, folder: Path) -> None:
        (folder / "half").write_text("half")
        raise GravlensError("It broke.", "It should not.", "again.")

    monkeypatch.setattr(Few, "make", stop)
    with refused("It broke"):
        carry_out({"one": organism}, tmp_path)
    assert folders(Study.at(organism, tmp_path).home) == set()


# -- worker processes --------------------------------------------------------------------------------------------------


def test_jobs_run_in_processes_of_so_many_threads_and_an_error_comes_back_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    said = tmp_path / "said"
    with experiment.processes(3, 1) as run_all:
        run_all("jobs", [partial(os.system, f"echo $PPID $OMP_NUM_THREADS > {said}")])
        with refused("Layer 9"):
            run_all("jobs", [partial(check_layer, 9, 3)])
    process, threads = said.read_text().split()
    assert threads == "3" and int(process) != os.getpid()
    assert os.environ["OMP_NUM_THREADS"] == "1" and "TQDM_DISABLE" not in os.environ
