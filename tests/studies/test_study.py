"""A study: models loaded per run, what is cached, and what a worker process gets."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from gravlens.activations.residuals import cache_residuals
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import Folder, as_folder
from gravlens.models import opening
from gravlens.organisms.arms import TABLE, blocker, core_arms, dose_arms, further_arms, made_by
from gravlens.organisms.base import Arm
from gravlens.studies import experiment
from gravlens.studies.study import Study
from gravlens.training.recipe import Recipe

PLAN: dict[str, Any] = {**small.PLAN, "recipe": Recipe(4, 4, 1e-3), "save_steps": (1, 2, 4), "noise_draws": 2}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A measured history without runs."""
    made = Study.at(small.Short(**PLAN), tmp_path_factory.mktemp("cache"))
    for name in ("witness", "anchor"):
        experiment.make_checkpoint(made, name)
    experiment.measure_history(made)
    return made


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the folders whose weights a model is loaded from."""
    names: list[str] = []
    real = opening.load_huggingface

    def listen(source: Folder | Path | str, *given: Any, **further: Any) -> Any:
        names.append(as_folder(source).path.name)
        return real(source, *given, **further)

    monkeypatch.setattr(opening, "load_huggingface", listen)
    return names


@pytest.mark.long
@pytest.mark.parametrize(
    ("arm", "starts"),
    [(Arm("plain", (0,)), "anchor"), (Arm("held", (0,), blocker=made_by("penalty")), "anchor"),
     (Arm("twin", (0,), start="witness"), "witness")],
    ids=["unblocked", "blocked", "twin"],
)  # fmt: skip
def test_a_run_loads_three_models(study: Study, loaded: list[str], arm: Arm, starts: str) -> None:
    experiment.run_arm(study, arm, 0)
    # to train, to compare with (start, anchor and witness in turn), and to measure (all checkpoints in turn)
    assert loaded == [starts, starts, "checkpoint-1"]
    facts = study.facts(arm, 0)
    assert (
        list(facts["update_norms"]) == ["1", "2", "4"] and {"kl_witness", "kl_anchor"} <= facts["behavior"]["4"].keys()
    )


def test_a_history_is_measured_with_one_model(tmp_path: Path, study: Study, loaded: list[str]) -> None:
    again = Study(study.organism, tmp_path)
    for name in study.organism.checkpoints:
        (tmp_path / name).symlink_to(study.home / name)
    experiment.measure_history(again)
    assert len(loaded) == 1
    for name in ("probes", "held_out", "held_out-2"):
        assert np.array_equal(again.states("measured", name).values, study.states("measured", name).values)


def test_states_read_from_an_open_model_are_those_of_its_folder(study: Study) -> None:
    measured = study.states("measured", "held_out")
    history = [Checkpoint(name, study.home / name) for name in study.organism.checkpoints]
    wanted = cache_residuals(study.sequence, study.prompts["held_out"], checkpoints=history)
    assert measured.checkpoints == wanted.checkpoints and np.array_equal(measured.values, wanted.values)
    assert measured.meta["sources"] == wanted.meta["sources"]


def test_states_and_prompts_are_read_once_and_stay_out_of_a_job(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    first = study.states("measured", "probes"), study.prompts, study.vs
    monkeypatch.setattr(type(study.organism), "prompts", None)
    assert (study.states("measured", "probes"), study.prompts, study.vs) == first
    assert len(pickle.dumps(study)) < 3000, "a worker process gets the organism and a path"
    again = pickle.loads(pickle.dumps(study))
    assert again == study and np.array_equal(again.vs.vectors, study.vs.vectors)


def test_every_arm_reaches_a_worker_process() -> None:
    arms = (*core_arms((0, 1), "harmless"), *further_arms((0, 1), "harmless", (1,)), *dose_arms((0, 1), "harmless"))
    for arm in arms:
        again = pickle.loads(pickle.dumps(arm))
        assert (again.blocker is None) == (arm.blocker is None)
        assert arm.blocker is None or again.blocker.keywords == arm.blocker.keywords  # pyright: ignore
    names = [arm.name for arm in arms]
    assert len(set(names)) == len(names) and {*TABLE} <= {*names}


def test_twins_and_doses_are_derived_from_the_arm_of_that_name() -> None:
    assert made_by("projection_matched_twin").keywords == {"kind": "projection", "along": "matched_twin"}  # pyright: ignore
    doses = {arm.name: arm.blocker.keywords for arm in dose_arms((0,), "harmless")}  # pyright: ignore
    assert doses["clamp_matched_twin_strength_300"] == {"kind": "clamp", "along": "matched_twin", "strength": 300}
    assert doses["kl_strength_0.1"] == {"kind": "kl", "along": "v_rev", "strength": 0.1}
    with pytest.raises(ValueError, match="'sideways' is unknown"):
        blocker("clamp", "sideways")
