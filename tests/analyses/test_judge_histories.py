"""The histories of known truth: the script runs to its end on tiny organisms, and the committed verdicts hold."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import small

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "analyses"))

import judge_histories as script  # noqa: E402
from worlds import judged  # noqa: E402

from gravlens.claims.claim import claim  # noqa: E402
from gravlens.history.prompts import PromptSet  # noqa: E402

pytestmark = pytest.mark.long

COLUMNS = ["history", "seed", "highest_true_level", "level", "sentence"]


class Tiny(judged.Judged):
    """Asked little."""

    def prompts(self, home: Path) -> dict[Any, PromptSet]:
        return {name: prompts[:8] for name, prompts in super().prompts(home).items()}


def tiny(organism: int) -> Tiny:
    """Narrow and short."""
    return Tiny(**(small.PLAN | {"organism": organism, "save_steps": (1, 10, 20), "n_layers": 4}))


def test_every_history_is_made_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "Judged", tiny)
    for module in (script, judged):
        monkeypatch.setattr(module, "SEEDS", (0,))
    monkeypatch.setattr(script, "NOISE_DRAWS", 20)
    ring = range(2)
    for seed in ring:
        script.make_organism(seed, tmp_path)
    table = pd.DataFrame(script.verdicts(0, tmp_path, ring))
    assert list(table.history.sort_values()) == sorted(script.HIGHEST)
    assert (table.highest_true_level == table.history.map(script.HIGHEST)).all()
    trained = ~table.history.isin(script.WORLDS)
    assert (table[trained].level <= 1).all(), "one run cannot exceed a null by sign flips"


@pytest.mark.parametrize("name", script.WORLDS)
def test_simulated_histories_reach_their_level_and_no_more(name: str) -> None:
    world = script.WORLDS[name]
    levels = [claim(script.simulated_evidence(world, np.random.default_rng([s, 5]))).level for s in range(6)]
    assert max(levels) <= script.HIGHEST[name]
    assert max(levels) == script.HIGHEST[name] or name.endswith("noise, anisotropic"), "noise hides what is true there"


def test_the_committed_verdicts_do_not_claim_too_much() -> None:
    table = pd.read_csv(ROOT / "docs/data/verdicts.csv")
    assert list(table.columns)[:5] == COLUMNS
    assert (table.highest_true_level == table.history.map(script.HIGHEST)).all()
    assert set(table.history) == set(script.HIGHEST) and (table.groupby("history").seed.nunique() >= 20).all()
    assert (table.level > table.highest_true_level).mean() <= 0.05
    assert (table[table.history == "refusal organism"].level >= 3).any(), "the positive control"
