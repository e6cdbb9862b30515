"""Histories of known truth: the ladder orders the worlds, the script judges organisms, the committed verdicts hold."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "analyses"))

import judge_histories as script  # noqa: E402
from worlds import trained  # noqa: E402
from worlds.judged import Judged  # noqa: E402
from worlds.simulated import PLANS  # noqa: E402
from worlds.truth import SIMULATED, TRAINED, TRUTH  # noqa: E402

from gravlens.claims.claim import claim  # noqa: E402
from gravlens.history.prompts import PromptSet  # noqa: E402

pytestmark = pytest.mark.long


def levels(name: str, mode: str = "one anchor", seeds: int = 4) -> np.ndarray:
    return np.array([claim(script.simulated(name, PLANS[mode], seed=seed)).level for seed in range(seeds)])


def held(name: str, demand: str) -> bool:
    """Whether a demand holds in the first simulated history of a name."""
    return bool(claim(script.simulated(name, PLANS["one anchor"], seed=0)).demands.set_index("name").holds[demand])


@pytest.mark.parametrize("mode", PLANS)
def test_what_is_true_is_ordered_by_the_level(mode: str) -> None:
    """Means over a few seeds: a single level may be off by chance."""
    means = [
        levels(name, mode).mean() for name in ("noise only", "shared excursion 0.5", "planted", "causal", "durable")
    ]
    assert means == sorted(means) and means[0] < 0.5 and means[-1] > 4
    assert levels("anti-parallel", mode).max() == 0, "the other way is never observed"


@pytest.mark.parametrize(
    ("name", "demand"),
    [
        ("babbling clamp", "the clamp adds no nonsense answers"),
        ("refusing clamp", "the clamp adds no over-refusal"),
        ("no return", "harm returns in the unblocked runs"),
        ("release holds along any direction", "outlasts released random directions"),
        ("anti-parallel", "above weight noise"),
    ],
)
def test_a_false_statement_fails_by_its_own_demand(name: str, demand: str) -> None:
    assert held("durable", demand) and not held(name, demand)


def test_layers_chosen_afterwards_are_told() -> None:
    sentence = claim(script.simulated("best of 30 layers", PLANS["one anchor"], seed=0)).sentence
    assert "chosen afterwards" in sentence
    assert (
        "preregistered (" in claim(script.simulated("30 layers, preregistered", PLANS["one anchor"], seed=0)).sentence
    )


def test_the_placebo_table_counts_both_modes() -> None:
    table = script.placebo(4)
    assert table.seeds.to_list() == [*script.PLACEBO_SEEDS, PLANS["six anchors"].runs]
    assert (table.level_4 <= table.rank_test).all(), "the level asks for more than its rank test"


def test_over_claims_are_counted_against_the_margin_of_chance() -> None:
    counts = {"noise only": [0] * 89 + [1] * 11, "planted": [3] * 80 + [2] * 20}
    rows = [(name, seed, "one anchor", level) for name, some in counts.items() for seed, level in enumerate(some)]
    table = script.rates(pd.DataFrame(rows, columns=["history", "seed", "mode", "level"])).set_index("history")
    assert table.over.to_dict() == {"noise only": 0.11, "planted": 0.0}
    assert table.reached.to_dict() == {"noise only": 1.0, "planted": 0.8}
    assert table.fault.to_dict() == {"noise only": True, "planted": False}, (
        "of 100 tests at .05, 10 are the 97.5 % bound"
    )


# --- organisms --------------------------------------------------------------------------------------------------------


class Tiny(Judged):
    """Asked little."""

    def prompts(self, home: Path) -> dict[Any, PromptSet]:
        return {name: prompts[:8] for name, prompts in super().prompts(home).items()}


def tiny(organism: int) -> Tiny:
    """Narrow and short."""
    return Tiny(
        **(small.PLAN | {"organism": organism, "save_steps": (1, 20), "noise_draws": 20, "random_directions": 1})
    )


def test_every_history_of_an_organism_is_made_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "Judged", tiny)
    monkeypatch.setitem(PLANS, "six anchors", script.Plan(2, 2, 1, 1))
    ring = range(2)
    for seed in ring:
        trained.make_organism(seed, tmp_path)
    table = pd.DataFrame(script.trained_rows(ring, tmp_path))
    assert set(table.history) == set(TRAINED) and list(table.columns) == script.COLUMNS
    assert (table.groupby(["history", "mode"]).size() == len(ring)).all()
    assert (table.level <= 2).all(), "no rank among one stranger an anchor is below .05"


def test_moved_weights_go_where_they_are_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trained, "Judged", tiny)
    trained.make_organism(0, tmp_path)
    study = trained.study_of(0, tmp_path)
    walks, probes, twins = trained.walks_of(study), study.states("measured", "probes"), trained.twins_of(study)
    base, nobody = trained.base_of(study, "0"), trained.Others({}, {})
    found = {
        name: trained.evidence_on(base, walks.probes.get(name, probes), runs, walks.twins.get(name, twins), nobody)
        for name, runs in walks.runs.items()
    }
    alignment = {name: one.final.alignment.mean() for name, one in found.items()}
    assert alignment["planted in the weights"] > 0.1 > -0.1 > alignment["anti-parallel in the weights"]
    noise = alignment["weight noise only"]
    assert alignment["anti-parallel in the weights"] < noise < alignment["planted in the weights"]
    assert alignment["endpoints in the weights"] > 0.1, "the anchor alone is shared"


# --- the committed table ----------------------------------------------------------------------------------------------


def test_the_committed_verdicts_are_complete() -> None:
    table = pd.read_csv(ROOT / "docs/data/verdicts.csv")
    assert list(table.columns) == script.COLUMNS
    assert (table.highest_true_level == table.history.map({name: truth.level for name, truth in TRUTH.items()})).all()
    counts = table.groupby(["history", "mode"]).seed.nunique()
    assert all(counts[name, "one anchor"] >= 40 for name in SIMULATED)
    for name in ("planted", "causal", "durable"):
        rows = table[table.history == name]
        assert (rows.level >= rows.highest_true_level).mean() > 0.8, f"{name}: the positive control"
