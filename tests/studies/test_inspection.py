"""A history on one table, against numpy on all weights and hashlib on the files."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from histories import between, moved, refused, weights_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gravlens.activations.residuals import cache_residuals
from gravlens.cli import app
from gravlens.directions.decomposition import split_update
from gravlens.history.sequence import ModelSequence, Run
from gravlens.studies.inspection import inspect_sequence

COLUMNS = "role step source tensors parameters dtype digest compared distance cosine remark".split()
WITNESS, ANCHOR = tiny.llama(0), moved(tiny.llama(0), seed=1)
MODELS = {step: moved(between(ANCHOR, WITNESS, share), seed=step, by=0.05) for step, share in {1: 0.1, 5: 0.6}.items()}


def flat(model: nn.Module) -> np.ndarray:
    return np.concatenate([p.detach().double().numpy().ravel() for p in model.parameters()])


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    for name, model in {"base": WITNESS, "aligned": ANCHOR}.items():
        tiny.save(model, folder / name)
    for step, model in MODELS.items():
        tiny.save(model, folder / f"ft/checkpoint-{step}")
    (folder / "ft/checkpoint-9").mkdir()
    toml = 'witness = "base"\nanchor = "aligned"\n[runs]\nseed0 = {folders = "ft", missing = "skip"}\n'
    (folder / "SEQUENCE.toml").write_text(toml)
    return folder


@pytest.fixture(scope="module")
def table(history: Path) -> pd.DataFrame:
    return inspect_sequence(ModelSequence.from_toml(history / "SEQUENCE.toml"))


def test_every_checkpoint_has_a_row(table: pd.DataFrame, history: Path) -> None:
    assert list(table.columns) == COLUMNS
    assert table["role"].tolist() == ["witness", "anchor", "seed0", "seed0", "seed0"]
    assert table["step"].tolist() == [pd.NA, pd.NA, 1, 5, pd.NA]
    folders = ["base", "aligned", "ft/checkpoint-1", "ft/checkpoint-5", "ft/checkpoint-9"]
    assert table["source"].tolist() == [str(history / folder) for folder in folders]
    assert set(table["dtype"][:4]) == {"float32"} and set(table["parameters"][:4]) == {len(flat(WITNESS))}
    assert set(table["tensors"][:4]) == set(table["compared"][:4]) == {len(list(WITNESS.parameters()))}
    assert table["remark"][:4].eq("").all() and "skipped" in table["remark"][4] and "no weights" in table["remark"][4]
    assert table.loc[4, ["digest", "distance", "parameters"]].isna().all()


def test_weights_that_are_not_finite_are_remarked(history: Path, tmp_path: Path) -> None:
    shutil.copytree(history, tmp_path / "copy")
    model = tiny.llama(7)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    tiny.save(model, tmp_path / "copy/ft/checkpoint-5")
    remarks = inspect_sequence(tmp_path / "copy/SEQUENCE.toml")["remark"]
    assert "not finite (model.layers.1.mlp.up_proj.weight)" in remarks[3] and remarks[:3].eq("").all()


def test_distance_and_cosine_are_those_of_all_weights(table: pd.DataFrame) -> None:
    way = flat(WITNESS) - flat(ANCHOR)
    for row, model in zip(table.itertuples(), (WITNESS, ANCHOR, *MODELS.values()), strict=False):
        update = flat(model) - flat(ANCHOR)
        assert row.distance == pytest.approx(np.linalg.norm(update), rel=1e-5)
        if model is not ANCHOR:
            assert row.cosine == pytest.approx(update @ way / np.linalg.norm(update) / np.linalg.norm(way), abs=1e-5)
    assert table["distance"][1] == 0 and np.isnan(table["cosine"][1]) and table["cosine"][0] == pytest.approx(1)
    assert table["cosine"][2] < table["cosine"][3]


def test_the_digest_is_of_names_dtypes_shapes_and_bytes(table: pd.DataFrame, history: Path) -> None:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(weights_of(history / "base")).items()):
        digest.update(json.dumps([name, "float32", list(tensor.shape)]).encode() + tensor.numpy().tobytes())
    assert table["digest"][0] == digest.hexdigest() and table["digest"][:4].nunique() == 4


def test_models_in_memory_are_inspected_alike(table: pd.DataFrame) -> None:
    found = inspect_sequence(ModelSequence.from_models(witness=WITNESS, anchor=ANCHOR, runs={"seed0": MODELS}))
    numbers = ["tensors", "parameters", "dtype", "digest", "compared", "distance", "cosine"]
    pd.testing.assert_frame_equal(found[numbers], table[numbers][:4])
    assert set(found["source"]) == {"a LlamaForCausalLM in memory"}


def test_what_is_no_plain_model_is_listed_without_a_distance(tmp_path: Path) -> None:
    models = [tiny.opened("bridge", tmp_path / str(seed), seed).module for seed in (0, 1)]
    found = inspect_sequence(ModelSequence.from_models(witness=models[0], anchor=models[1]))
    assert found["distance"].isna().all() and found["digest"].nunique() == 2 and (found["compared"] == 0).all()


def test_another_dtype_and_a_grown_vocabulary_and_untied_embeddings_are_seen(history: Path, tmp_path: Path) -> None:
    grown = tiny.llama(3)
    grown.resize_token_embeddings(tiny.VOCABULARY + 2, mean_resizing=False)
    models = {1: moved(ANCHOR, seed=3).bfloat16(), 2: grown, 3: tiny.llama(4, tie_word_embeddings=True)}
    for step, model in models.items():
        tiny.save(model, tmp_path / f"step{step}")
    found = inspect_sequence(
        ModelSequence.from_folders(
            witness=history / "base",
            anchor=history / "aligned",
            runs={"seed0": [tmp_path / f"step{s}" for s in models]},
        )
    )
    count = len(list(ANCHOR.parameters()))
    assert found["dtype"].tolist() == ["float32", "float32", "bfloat16", "float32", "float32"]
    assert found["tensors"].tolist() == [count, count, count, count, count - 1]
    assert found["compared"].tolist() == [count, count, count, count - 2, count - 1]
    shared = [
        (w, a) for (n, w), a in zip(models[2].named_parameters(), ANCHOR.parameters(), strict=True) if "norm" in n
    ]
    assert found["distance"][3] > torch.stack([(w - a).norm() for w, a in shared]).norm()


def test_an_adapter_is_placed_as_merged_and_digested_with_its_base(history: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        torch.manual_seed(step)
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(history / "aligned"), config)
        model.save_pretrained(tmp_path / f"out/checkpoint-{step}")
    sequence = ModelSequence.from_folders(
        witness=history / "base", anchor=history / "aligned", runs={"seed0": tmp_path / "out"}
    )
    found = inspect_sequence(sequence)
    model: Any = AutoModelForCausalLM.from_pretrained(history / "aligned")
    merged = PeftModel.from_pretrained(model, tmp_path / "out/checkpoint-2").merge_and_unload()  # type: ignore
    assert found["distance"][3] == pytest.approx(np.linalg.norm(flat(merged) - flat(ANCHOR)), rel=1e-4)
    assert found["digest"].nunique() == 4 and found["parameters"][3] > found["parameters"][1]


def test_models_that_share_nothing_are_refused() -> None:
    with refused("witness", "GPT2LMHeadModel"):
        inspect_sequence(ModelSequence.from_models(witness=tiny.gpt2(), anchor=ANCHOR))
    with refused("witness", "another"):
        untied = ModelSequence.from_models(witness=tiny.llama(intermediate_size=64), anchor=ANCHOR)
        split_update(untied.anchor, untied.witness, [])


# -- the command -------------------------------------------------------------------------------------------------------


def command(*arguments: Any) -> Any:
    return CliRunner(env={"COLUMNS": "250", "NO_COLOR": "1"}).invoke(app, ["inspect", *map(str, arguments)])


def test_the_command_prints_the_table(history: Path, table: pd.DataFrame) -> None:
    shown = command(history / "SEQUENCE.toml")
    assert shown.exit_code == 0, shown.output
    for text in ("witness", "anchor", "seed0", "float32", table["digest"][2][:12], f"{table['distance'][2]:.3f}"):
        assert text in shown.stdout
    assert "skipped" in shown.stdout and "nan" not in shown.stdout.lower() and "<NA>" not in shown.stdout


def test_the_command_prints_json(history: Path, table: pd.DataFrame) -> None:
    rows = json.loads(command(history / "SEQUENCE.toml", "--json").stdout)
    assert [list(row) for row in rows] == [COLUMNS] * 5
    assert [row["digest"] for row in rows][:4] == table["digest"].tolist()[:4]
    assert (
        rows[1]["cosine"] is None
        and rows[2]["step"] == 1
        and rows[2]["distance"] == pytest.approx(table["distance"][2])
    )


def test_a_history_that_cannot_be_opened_is_one_message(history: Path, tmp_path: Path) -> None:
    shutil.copytree(history / "base", tmp_path / "base")
    weights_of(tmp_path / "base").write_bytes(b"cut")
    (tmp_path / "x.toml").write_text('witness = "base"\nanchor = "base"\n')
    result = command(tmp_path / "x.toml")
    assert result.exit_code == 2 and result.stdout == "" and "corrupt" in result.stderr


def test_a_run_may_be_skipped_in_part_from_python_too(history: Path) -> None:
    sequence = ModelSequence.from_folders(
        witness=history / "base", anchor=history / "aligned", runs={"seed0": Run(history / "ft", missing="skip")}
    )
    assert [checkpoint.step for checkpoint in sequence.runs["seed0"]] == [1, 5]


def test_two_names_of_one_model_are_remarked_on_whichever_way_it_was_sharded(history: Path, tmp_path: Path) -> None:
    for step in (1, 2):
        ANCHOR.save_pretrained(tmp_path / f"ft/checkpoint-{step}", max_shard_size="20KB")
    sequence = ModelSequence.from_folders(
        witness=history / "base", anchor=history / "aligned", runs={"r": tmp_path / "ft"}, probes=tiny.PROMPTS[:2]
    )
    remarks = inspect_sequence(sequence)["remark"].tolist()
    assert remarks == ["", "", "the same weights as anchor", "the same weights as anchor"]
    with pytest.warns(UserWarning, match="r/1 and anchor have the same states"):
        cache_residuals(sequence)
    with pytest.warns(UserWarning, match="r/1 and anchor have the same weights"):
        cache_residuals(sequence, store=tmp_path / "store")
