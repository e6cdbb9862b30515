"""measure_support.py and its table: what works of every family, measured again."""

import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from gravlens.activations.positions import Query
from gravlens.activations.reader import Reader, read_block, read_residuals
from gravlens.models.opening import open_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "analyses"))

import measure_support as support  # noqa: E402

REFUSED = {"Gemma 3n", "DeepSeek V4"}
# Padding changes what these read, so that their prompts have to be read in batches of one length.
UNPADDED = {"RWKV", "RecurrentGemma", "PaliGemma"}
RECURRENT = {
    *("Mamba", "Mamba 2", "Falcon-Mamba", "Falcon-H1", "Granite 4", "Bamba", "Jamba", "Zamba2", "Nemotron-H"),
    *("LFM2", "LFM2-VL", "Qwen3-Next", "Qwen3.5", "Qwen3.5 (with images)", "RWKV", "RecurrentGemma"),
}
QUICK = ("GPT-OSS", "Mamba", "LFM2", "Gemma 4", "DeepSeek V3", "Mistral 3", "Qwen2-VL", "Gemma 3n", "LFM2-VL")


@pytest.fixture(scope="module")
def committed() -> pd.DataFrame:
    return pd.read_csv(ROOT / "docs/data/families.csv", keep_default_na=False).set_index("family")


@pytest.mark.parametrize(
    "family", [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in support.NAMES]
)
def test_every_family_does_what_the_table_says(family: str, committed: pd.DataFrame) -> None:
    row, stated = support.measure(family), committed.loc[family]
    assert row["class"] == stated["class"] and row["refused"] == stated["refused"]
    assert bool(row["refused"]) == (family in REFUSED)
    if family in REFUSED:
        return
    assert row["states"] <= support.EXACT and row["ablation"] <= support.EXACT
    assert (row["padded"] <= support.EXACT) == (family not in UNPADDED)
    assert str(row["answers"]) == stated["answers"]


@pytest.mark.parametrize("family", ["PaliGemma", "RecurrentGemma", "RWKV"])
def test_states_of_a_ragged_set_are_those_of_each_prompt_alone(family: str) -> None:
    model = support.make(family)
    layers, opened = range(support.LAYERS), open_model(model)
    wanted = support.reference(family, model).states
    queries = [Query(tuple(ids), ((len(ids) - 1,),)) for ids in support.PROMPTS]
    reader = Reader(opened, layers=layers)
    for rows, states in read_block(reader, queries):
        assert support.off(torch.from_numpy(states), wanted[rows]) <= support.EXACT
    assert support.off(read_residuals(opened, support.PROMPTS, layers=layers), wanted) <= support.EXACT


def test_the_committed_table_is_complete_and_nothing_in_it_is_wrong(committed: pd.DataFrame) -> None:
    assert tuple(committed.index) == support.NAMES and list(committed.columns) == support.COLUMNS[1:]
    assert set(committed.index[committed.refused != ""]) == REFUSED
    opened = committed[committed.refused == ""].astype({"states": float, "padded": float, "ablation": float})
    assert (opened[["states", "ablation"]] <= support.EXACT).all(axis=None)
    assert set(opened.index[opened.padded > support.EXACT]) == UNPADDED
    assert not {*opened.index[opened.keys_reused == "True"]} & (RECURRENT - {"RecurrentGemma"})


def test_the_page_shows_the_committed_table() -> None:
    table, page = pd.read_csv(ROOT / "docs/data/families.csv"), (ROOT / "docs/architectures.md").read_text("utf-8")
    assert support.page_table(table) in page and support.page_refused(table) in page
    assert all(name in page.partition("Where *padded* is large")[2][:100] for name in UNPADDED)
