"""measure_architectures.py and the table that it wrote: every family is read as Hugging Face computes it."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from typer.testing import CliRunner

from gravlens.activations.residuals import residuals_of_batch
from gravlens.history.encoding import Batch, pad
from gravlens.models.forward import final_logits
from gravlens.models.opening import open_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "analyses"))

import measure_architectures as architectures  # noqa: E402

WANTED = (
    "Llama Qwen2 Qwen3 Gemma2 Gemma3 OLMo2 OLMo3 Mistral Phi3 GPT-NeoX GPT-2 Granite StableLM Falcon Cohere Mixtral "
    "Qwen2-MoE Qwen3-MoE"
).split()
# What the committed table has no number for: the bridge of TransformerLens 3.9 is wrong about it, or fails at it.
REFUSED = {
    ("OLMo2", "bfloat16"),
    ("OLMo3", "bfloat16"),
    ("Falcon (ALiBi)", "float32"),
    *(
        (name, dtype)
        for name in ("Cohere", "Cohere (QK norm)", "Falcon (new decoder)")
        for dtype in architectures.DTYPES
    ),
}
# In bf16 the error of that family's bridge is no larger than another one's rounding, so it is opened.
WRONG_IN_BF16 = "Falcon (ALiBi)"
WINDOWED = [name for name, (_, own) in architectures.FAMILIES.items() if own.get("sliding_window")]
OFF = architectures.COLUMNS[-1]


@pytest.fixture(scope="module")
def committed() -> pd.DataFrame:
    return pd.read_csv(ROOT / "docs/data/architectures.csv")


def rows_of(table: pd.DataFrame) -> set[tuple[str, ...]]:
    return set(table[architectures.COLUMNS[:-1]].itertuples(index=False, name=None))


def bounds(table: pd.DataFrame) -> pd.Series:
    """What a difference may be: the promise in fp32, a sane size in bf16."""
    loose = table.architecture.eq(WRONG_IN_BF16) & table.path.eq("bridge")
    return table.dtype.map({"float32": 1e-5, "bfloat16": 0.1}).mask(loose & table.dtype.eq("bfloat16"), 0.3)


# -- every family, measured here -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", architectures.FAMILIES)
def test_pitfall_1_residuals_are_hugging_faces_with_any_padding(
    architecture: str, tmp_path: Path, committed: pd.DataFrame
) -> None:
    measured = architectures.measure(architecture, tmp_path)
    stated = committed[committed.architecture == architecture]
    assert rows_of(measured) == rows_of(stated) and len(measured) == len(stated)
    beyond = measured[measured[OFF] > bounds(measured)]
    assert beyond.empty, f"\n{beyond}"
    missing = measured[measured[OFF].isna()]
    assert rows_of(missing) <= rows_of(stated[stated[OFF].isna()]), "a path that the table has a number for is refused"


@pytest.mark.parametrize("architecture", architectures.FAMILIES)
def test_pitfall_1_final_logits_in_a_ragged_batch_are_hugging_faces_alone(architecture: str, tmp_path: Path) -> None:
    folder = architectures.make(architecture, tmp_path)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = torch.stack([model(torch.tensor([ids])).logits[0, -1] for ids in architectures.PROMPTS])
    found = final_logits(open_model(folder), architectures.PROMPTS)
    assert architectures.largest_difference(found, wanted) <= 1e-5


# -- what would be seen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", WINDOWED)
def test_the_prompts_are_longer_than_the_sliding_windows(architecture: str, tmp_path: Path) -> None:
    folder = architectures.make(architecture, tmp_path)
    wanted = architectures.reference(folder, torch.float32)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.sliding_window = 64
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    found = architectures.read(open_model(model), "right")
    off = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert (off[0, :1] > 0.01).all() and off[1:2].max() < 1e-5, "the long prompt, and not the one of one token"


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "Gemma2", "GPT-NeoX"])
def test_another_layer_another_token_or_the_final_norm_would_be_seen(architecture: str, tmp_path: Path) -> None:
    folder = architectures.make(architecture, tmp_path)
    wanted = architectures.reference(folder, torch.float32)
    opened = open_model(folder)
    found = architectures.read(opened, "left")
    assert architectures.largest_difference(found[:, 1:], wanted[:, :-1]) > 0.1
    long = [ids for ids in architectures.PROMPTS if len(ids) > 1]
    rows = [row for row, ids in enumerate(architectures.PROMPTS) if len(ids) > 1]
    before = residuals_of_batch(opened, pad(long), layers=range(architectures.LAYERS), positions=-2)
    assert architectures.largest_difference(before, wanted[rows]) > 0.1
    with torch.no_grad():
        module: Any = opened.module
        normed = module(torch.tensor([long[0]]), output_hidden_states=True).hidden_states[-1][0, -1]
    assert architectures.largest_difference(normed[None], wanted[:1, -1]) > 0.1


@pytest.mark.parametrize("architecture", ["Llama", "GPT-2", "Falcon (ALiBi)"])
@pytest.mark.parametrize("part", ["attention_mask", "position_ids"])
def test_a_lost_mask_would_be_seen_and_lost_positions_where_they_are_learned(
    architecture: str, part: str, tmp_path: Path
) -> None:
    folder = architectures.make(architecture, tmp_path)
    wanted = architectures.reference(folder, torch.float32)
    batch = pad(architectures.PROMPTS, architectures.EOS, "left")
    naive = {"attention_mask": torch.ones_like, "position_ids": lambda ids: torch.arange(ids.shape[1]).expand_as(ids)}
    model = open_model(folder)
    read = model.module.base_model.forward

    def forward(**inputs: Any) -> Any:
        return read(**{**inputs, part: naive[part](inputs["input_ids"])})

    forward.__signature__ = inspect.signature(read)  # type: ignore[attr-defined]
    model.module.base_model.forward = forward
    with torch.no_grad():
        found = residuals_of_batch(model, Batch(*batch), layers=range(architectures.LAYERS))
    off = architectures.largest_difference(found, wanted)
    # Rotary and ALiBi attention know distances alone.
    assert (off > 0.01) == (part == "attention_mask" or architecture == "GPT-2"), off


# -- the command, the committed table, and the page --------------------------------------------------------------------


def test_the_command_writes_the_table_and_prints_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "FAMILIES", {"Llama": architectures.FAMILIES["Llama"]})
    result = CliRunner().invoke(architectures.app, ["--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    table = pd.read_csv(tmp_path / "new/architectures.csv")
    assert list(table.columns) == architectures.COLUMNS and len(table) == 14
    assert architectures.page_table(table) in result.output


def test_the_committed_table_is_complete(committed: pd.DataFrame) -> None:
    assert list(committed.columns) == architectures.COLUMNS
    assert set(WANTED) <= set(architectures.FAMILIES)
    wanted = {
        (name, path, padding, dtype)
        for name in architectures.FAMILIES
        for path in architectures.PATHS
        for padding in architectures.PADDINGS
        for dtype in architectures.DTYPES
    }
    wanted |= {(n, architectures.REUSED, "right", d) for n in architectures.FAMILIES for d in architectures.DTYPES}
    assert rows_of(committed) == wanted and len(committed) == len(wanted)


def test_the_committed_differences_are_within_bounds_and_the_missing_ones_known(committed: pd.DataFrame) -> None:
    missing = committed[committed[OFF].isna()]
    assert set(missing.path) == {"bridge"}
    assert set(zip(missing.architecture, missing.dtype, strict=True)) == REFUSED
    assert not (committed[OFF] > bounds(committed)).any()
    alone = committed[(committed.path == "direct") & (committed.padding == "none")]
    assert (alone[OFF] == 0).all(), "one prompt alone, read from Hugging Face's own model, is bit for bit the same"


def test_the_table_of_the_page_is_that_of_the_file(committed: pd.DataFrame) -> None:
    page = (ROOT / "docs/architectures.md").read_text(encoding="utf-8")
    assert architectures.page_table(committed) in page
    described = re.findall(r"^\| ([\w, ()-]+) \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE)
    assert {name for cell in described[1:] for name in cell.split(", ")} >= set(WANTED)
