"""Directions in other programs' files, held against the real libraries' readers, and against what a model computes."""

import json
import pickle
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import xarray
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gravlens import GravlensError, Steer, intervene, open_model
from gravlens.directions.direction import Direction, Directions
from gravlens.exchange.control_vectors import from_gguf, from_npz, from_steered, to_gguf, to_npz, to_steered
from gravlens.history.encoding import encode
from gravlens.history.prompts import PromptSet
from gravlens.interventions.orthogonalization import orthogonalize, orthogonalized
from gravlens.models.forward import final_logits

ROOT = Path(__file__).resolve().parents[2]
FORMATS = {"gguf": (to_gguf, from_gguf), "pt": (to_steered, from_steered), "npz": (to_npz, from_npz)}
every_format = pytest.mark.parametrize("ending", FORMATS)


def directions(*layers: int, width: int = tiny.WIDTH) -> Directions:
    rng = np.random.default_rng(0)
    made = []
    for layer in layers or (1, 2):
        vector = rng.standard_normal(width)
        made.append(
            Direction(
                vector / np.linalg.norm(vector),
                layer,
                3.0 + layer,
                0.9,
                "difference_of_means",
                "digest",
                {"witness": "base", "n_prompts": 32},
            )
        )
    return Directions(tuple(made))


def same(read: Directions, written: Directions, strength: float = 1.0) -> None:
    assert read.layers == written.layers
    np.testing.assert_allclose(read.vectors, np.sign(strength) * written.vectors, atol=2e-7)
    np.testing.assert_allclose(read.distances, abs(strength) * written.distances, rtol=1e-6)


# -- there and back ----------------------------------------------------------------------------------------------------


@every_format
def test_what_is_written_is_read_with_all_that_is_known_of_it(ending: str, tmp_path: Path) -> None:
    write, read = FORMATS[ending]
    written = directions(1, 2)
    unsure = Directions((replace(written[1], reliability=float("nan")), written[2]))
    path = write(unsure, tmp_path / "deep" / f"v.{ending}")
    again = read(path)
    same(again, written)
    assert np.isnan(again[1].reliability) and again[2].reliability == 0.9
    for one in again:
        assert (one.estimator, one.prompts) == ("difference_of_means", "digest")
        assert one.made_from == {"witness": "base", "n_prompts": 32} and one.undefined is None
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    content = path.read_bytes()
    assert write(unsure, path).read_bytes() == content, "the same directions give the same file"
    same(read(write(written[2], tmp_path / f"one.{ending}")), directions(1, 2).at([2]))


@pytest.mark.parametrize("ending", ["gguf", "pt"])
@pytest.mark.parametrize("strength", [0.5, -2.0])
def test_what_is_read_steers_as_its_file_does(ending: str, strength: float, tmp_path: Path) -> None:
    write, read = FORMATS[ending]
    again = read(write(directions(), tmp_path / f"v.{ending}", strength=strength))
    same(again, directions(), strength)
    assert again[1].made_from["strength"] == strength
    model = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)
    ids = encode(tiny.TOKENIZER, PromptSet.of(tiny.PROMPTS))
    found = []
    for steer in (Steer(again), Steer(directions(), strength), Steer(directions(), -strength)):
        with intervene(model, steer):
            found.append(final_logits(model, ids))
    assert (found[0] - found[1]).abs().max() < 1e-4 < 0.1 < (found[0] - found[2]).abs().max()


@every_format
def test_layers_ascend_in_whatever_order_they_were_written(ending: str, tmp_path: Path) -> None:
    write, read = FORMATS[ending]
    mixed = directions(1, 2, 11)
    path = write(Directions((mixed[11], mixed[1], mixed[2])), tmp_path / f"v.{ending}")
    same(read(path), mixed)


# -- what the other programs find there --------------------------------------------------------------------------------


def test_the_gguf_library_finds_what_llama_cpp_and_repeng_ask_for(tmp_path: Path) -> None:
    reader = GGUFReader(to_gguf(directions(1, 2), tmp_path / "v.gguf", strength=-0.5, model_hint="llama"))
    text = {
        key: bytes(reader.fields[key].parts[-1]).decode()
        for key in ("general.architecture", "controlvector.model_hint")
    }
    assert text == {"general.architecture": "controlvector", "controlvector.model_hint": "llama"}
    assert reader.fields["controlvector.layer_count"].parts[-1].tolist() == [2]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == ["direction.1", "direction.2"]
    for one in directions(1, 2):
        tensor = tensors[f"direction.{one.layer}"]
        assert tensor.tensor_type == GGMLQuantizationType.F32 and tensor.shape.tolist() == [tiny.WIDTH]
        np.testing.assert_allclose(tensor.data, -0.5 * one.distance * one.vector, rtol=1e-6)


def test_layer_0_is_for_repeng_alone(tmp_path: Path) -> None:
    with pytest.raises(GravlensError, match=r"layers \[0, 1\].*llama.cpp has no .* layer 0.*at\(\[1\]\).*layer_0=True"):
        to_gguf(directions(0, 1), tmp_path / "v.gguf")
    with pytest.raises(GravlensError, match="another layer"):
        to_gguf(directions(0)[0], tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []
    same(from_gguf(to_gguf(directions(0, 1), tmp_path / "v.gguf", layer_0=True)), directions(0, 1))
    same(from_steered(to_steered(directions(0, 1), tmp_path / "v.pt")), directions(0, 1))


def test_a_control_vector_of_another_program_is_read_by_its_lengths(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "v.gguf", "controlvector")  # as repeng writes it
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_uint32("controlvector.layer_count", 2)
    for layer in (3, 1):
        writer.add_tensor(f"direction.{layer}", np.array([0, 0, -2.0 * layer, 0], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = from_gguf(tmp_path / "v.gguf")
    assert read.layers == (1, 3) and read.distances.tolist() == [2, 6]
    assert read.vectors.tolist() == [[0, 0, -1, 0]] * 2
    assert read[1].estimator == "control_vector" and read[1].prompts == "" and np.isnan(read[1].reliability)


def test_the_harness_entry_has_its_keys_and_plain_tensors(tmp_path: Path) -> None:
    path = to_steered(directions(1, 2), tmp_path / "v.pt", strength=0.5)
    content = torch.load(path, weights_only=True)
    assert list(content) == ["layers.1", "layers.2"]
    entry = content["layers.2"]
    assert entry["action"] == "add" and entry["bias"] is None and entry["head_index"] is None
    assert entry["steering_coefficient"] == pytest.approx(0.5 * 5)
    np.testing.assert_array_equal(entry["steering_vector"].numpy(), directions(1, 2)[2].vector)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (tiny.llama, "layers.2"),
        (tiny.gpt2, "h.2"),
        (lambda: get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])), "model.model.layers.2"),
    ],
)
def test_blocks_are_named_as_the_harness_looks_them_up(build: Any, name: str, tmp_path: Path) -> None:
    model = build()
    path = to_steered(directions(2), tmp_path / "v.pt", model=model)
    (hookpoint,) = torch.load(path, weights_only=True)
    assert hookpoint == name
    assert dict(model.base_model.named_modules())[hookpoint] is open_model(model).blocks[2]  # hf_steered.py's look-up
    same(from_steered(path), directions(2))


def test_blocks_that_the_harness_cannot_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GravlensError, match="Layers are whole numbers from 0 to 2"):
        to_steered(directions(3), tmp_path / "v.pt", model=tiny.llama())
    with pytest.raises(GravlensError, match=r"Block 1 of this TransformerBridge"):
        to_steered(directions(1), tmp_path / "v.pt", model=tiny.opened("bridge", tmp_path / "model"))
    with pytest.raises(GravlensError, match=r"v\.bin was given.*Try: v\.pt"):
        to_steered(directions(1), tmp_path / "v.bin")


@pytest.mark.parametrize("build", [tiny.llama, tiny.gpt2])
@pytest.mark.parametrize("strength", [1.0, -0.5])
def test_the_harness_steers_as_it_is_steered_here(build: Any, strength: float, tmp_path: Path) -> None:
    harness = pytest.importorskip("lm_eval.models.hf_steered")
    folder = tiny.save(build(), tmp_path / "model")
    here = open_model(folder)
    path = to_steered(directions(0, 2), tmp_path / "v.pt", strength=strength, model=here)
    there = harness.SteeredModel(str(folder), str(path), device="cpu", dtype="float32")
    ids = torch.tensor(encode(tiny.TOKENIZER, tiny.PROMPTS)[:1])
    with torch.no_grad(), intervene(here, Steer(directions(0, 2), strength)):
        wanted = here.module(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(there._model_call(ids), wanted, atol=1e-5, rtol=1e-5)
        assert (here.module(ids).logits - wanted).abs().max() > 0.1


def test_a_steered_file_of_others_may_leave_out_the_coefficient_and_be_in_half_precision(tmp_path: Path) -> None:
    vector = torch.tensor([0.0, 3.0, 4.0], dtype=torch.bfloat16, requires_grad=True)
    torch.save({"gpt_neox.layers.7": {"steering_vector": vector, "action": "add"}}, tmp_path / "v.pt")
    read = from_steered(tmp_path / "v.pt")
    assert read.layers == (7,) and read[7].distance == 5 and read[7].estimator == "steered"
    np.testing.assert_allclose(read[7].vector, [0, 0.6, 0.8], rtol=1e-6)


def test_numpy_alone_writes_and_reads_an_npz(tmp_path: Path) -> None:
    with np.load(to_npz(directions(0, 2), tmp_path / "v.npz"), allow_pickle=False) as file:
        assert file["layers"].tolist() == [0, 2] and file["distances"].tolist() == [3, 5]
        np.testing.assert_array_equal(file["vectors"], directions(0, 2).vectors)
        assert json.loads(str(file["facts"]))["2"]["estimator"] == "difference_of_means"
    np.savez(tmp_path / "own.npz", vectors=np.array([[0, 2.0], [3, 4]]), layers=[5, 4])
    read = from_npz(tmp_path / "own.npz")
    assert read.layers == (4, 5) and read.distances.tolist() == [5, 2]
    np.testing.assert_allclose(read.vectors, [[0.6, 0.8], [0, 1]], rtol=1e-6)
    np.savez(tmp_path / "own.npz", vectors=np.array([[0, 2.0]]), layers=[5], distances=[7.0])
    assert from_npz(tmp_path / "own.npz")[5].distance == 7


# -- what is refused ---------------------------------------------------------------------------------------------------


@every_format
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (replace(directions()[1], undefined="no difference"), r"layer 1 is undefined: no difference.*defined\(\)"),
        (replace(directions()[1], vector=2 * directions()[1].vector), "layer 1 .* has length 2"),
        (replace(directions()[1], distance=float("nan")), "distance"),
        (replace(directions()[1], distance=0.0), r"lengths \[0.0\].*none of length 0"),
        (Directions((directions()[1], directions()[1])), r"layers \[1, 1\].*one vector per layer"),
        (Directions(()), "No direction was given"),
    ],
)
def test_directions_that_no_file_can_hold_write_nothing(ending: str, wrong: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(GravlensError, match=said):
        FORMATS[ending][0](wrong, tmp_path / f"v.{ending}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [to_gguf, to_steered])
def test_strength_0_is_no_direction(write: Any, tmp_path: Path) -> None:
    with pytest.raises(GravlensError, match="a strength other than 0"):
        write(directions(), tmp_path / "v.pt", strength=0)


@every_format
def test_an_absent_a_cut_and_a_foreign_file_are_one_clear_error(ending: str, tmp_path: Path) -> None:
    write, read = FORMATS[ending]
    path = tmp_path / f"v.{ending}"
    with pytest.raises(GravlensError, match="There is no file"):
        read(path)
    whole = write(directions(), path).read_bytes()
    for content in (b"", b"nothing", whole[:20], whole[: len(whole) // 2], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(GravlensError, match=rf"v\.{ending} cannot be read \(\w+") as caught:
            read(path)
        assert "\n" not in str(caught.value)


class Intruder:
    """Runs code when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    mark, steered = tmp_path / "ran", tmp_path / "v.pt"
    torch.save({"layers.1": {"steering_vector": Intruder(mark), "action": "add"}}, steered)
    with pytest.raises(
        GravlensError, match=r"cannot be read \(UnpicklingError: it holds more.*plain tensors"
    ) as caught:
        from_steered(steered)
    assert "weights_only=False" not in str(caught.value) and not mark.exists()
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"layers.1": Intruder(mark)}, protocol=2))
    with pytest.raises(GravlensError, match="UnpicklingError"):
        from_steered(tmp_path / "plain.pt")
    for name, array in {
        "vectors": np.array([[Intruder(mark)]], dtype=object),
        "extra": np.array([Intruder(mark)]),
    }.items():
        np.savez(tmp_path / "v.npz", **{"layers": [1], "vectors": [[1.0]], name: array}, allow_pickle=True)
        with pytest.raises(GravlensError, match="allow_pickle=False"):
            from_npz(tmp_path / "v.npz")
    assert not mark.exists()
    torch.load(steered, weights_only=False)
    assert mark.exists(), "the pickle would have run"


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"layers.1": {"action": "clamp"}}, "'clamp'"),
        ({"layers.1": {"bias": torch.ones(3)}}, "with a bias"),
        ({"layers.1": {"head_index": 0}}, "of one head"),
        ({"layers.1.mlp": {}}, "no vector of a block under 'layers.1.mlp'"),
        ({"layers.1": {"steering_vector": [1.0]}}, "no vector of a block"),
        ({"layers.1": {}, "model.layers.1": {}}, r"layers \[1, 1\]"),
        ({"layers.1": {}, "layers.2": {"steering_vector": torch.ones(4)}}, r"shapes \[\(3,\), \(4,\)\]"),
        ({"layers.1": {"steering_vector": torch.zeros(3)}}, r"layer 1 of v.pt\) has length 0"),
        ({"layers.1": {"steering_vector": torch.full((3,), torch.nan)}}, r"layer 1 of v.pt\) has length nan"),
        ({"layers.1": {"gravlens.facts": "{"}}, "JSON of gravlens"),
        ({"layers.1": {"gravlens.facts": '{"1": {}}'}}, "JSON of gravlens"),
        ({}, r"layers \[\]"),
    ],
)
def test_what_is_no_vector_added_to_a_block_is_refused(entries: Any, said: str, tmp_path: Path) -> None:
    plain = {"steering_vector": torch.ones(3), "action": "add"}
    torch.save({name: plain | entry for name, entry in entries.items()}, tmp_path / "v.pt")
    with pytest.raises(GravlensError, match=said):
        from_steered(tmp_path / "v.pt")


def test_a_table_of_autoencoder_features_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.csv").write_text("loader,action\n")
    with pytest.raises(GravlensError, match="names of features of sparse autoencoders"):
        from_steered(tmp_path / "v.csv")


@pytest.mark.parametrize(
    ("name", "kind"), [("token_embd.weight", np.float32), ("direction.1", np.float16), ("direction.x", np.float32)]
)
def test_a_gguf_of_something_else_is_refused_by_its_tensor(name: str, kind: Any, tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.add_tensor(name, np.ones(4, dtype=kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GravlensError, match=f"contains the tensor '{name}' as F"):
        from_gguf(tmp_path / "v.gguf")


STATES = [  # key, value, whether it says what is done here
    ("glp.mode", "project", False),  # as projective control vectors state it
    ("glp.mode", "add", True),
    ("glp.hook_point", "residual_stream_post_layer", True),
    ("glp.hook_point", "attn_out_pre_residual", False),
    ("controlvector.operation", "ablate", False),
    ("controlvector.hook", "blocks.1.hook_resid_mid", False),
    ("controlvector.hook_point", "resid_pre", False),
    ("controlvector.hook_name", "model.layers.1", True),
    ("controlvector.hook_name", "model.layers.1.mlp", False),
    ("controlvector.method", "pca", True),  # how it was estimated
]


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize(("key", "value", "same_here"), STATES)
def test_a_file_that_states_another_operation_or_hook_point_is_refused(
    ending: str, key: str, value: str, same_here: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"v.{ending}"
    if ending == "gguf":
        writer = GGUFWriter(path, "controlvector")
        writer.add_string(key, value)
        writer.add_float32("glp.alpha_default", 1.0)
        writer.add_tensor("direction.1", np.ones(4, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    elif ending == "npz":
        np.savez(path, vectors=np.ones((1, 4)), layers=[1], **{key: value})
    else:
        torch.save({"layers.1": {"steering_vector": torch.ones(4), "action": "add", key: value}}, path)
    if same_here:
        assert FORMATS[ending][1](path)[1].distance == 2
    else:
        with pytest.raises(GravlensError, match=f"states {key} = '{value}'"):
            FORMATS[ending][1](path)


def test_files_state_their_operation_and_hook_point(tmp_path: Path) -> None:
    reader = GGUFReader(to_gguf(directions(), tmp_path / "v.gguf"))
    text = {key: bytes(field.parts[-1]).decode() for key, field in reader.fields.items() if key.startswith("gravlens.")}
    assert text["gravlens.operation"] == "add" and text["gravlens.hook_point"] == "blocks.{l}.hook_resid_post"
    with np.load(to_npz(directions(), tmp_path / "v.npz"), allow_pickle=False) as file:
        assert (str(file["operation"]), str(file["hook_point"])) == ("add", "blocks.{l}.hook_resid_post")


def test_a_gguf_of_another_architecture_is_no_control_vector(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "v.gguf", "projector")
    writer.add_tensor("direction.1", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GravlensError, match="architecture 'projector'"):
        from_gguf(tmp_path / "v.gguf")


@pytest.mark.parametrize(
    "arrays",
    [
        {"vectors": np.ones((2, 3))},
        {"vectors": np.ones((2, 3)), "layers": [1]},
        {"vectors": np.ones(3), "layers": [1]},
        {"vectors": np.ones((2, 3)), "layers": [1, 1]},
        {"vectors": np.ones((1, 3)), "layers": ["one"]},
        {"vectors": np.ones((2, 3)), "layers": [1, 2], "distances": [1.0]},
        {"vectors": np.zeros((1, 3)), "layers": [1]},
        {"vectors": np.ones((1, 3)), "layers": [1], "facts": "[]"},
    ],
)
def test_arrays_that_do_not_fit_are_one_clear_error(arrays: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "v.npz", **arrays)
    with pytest.raises(GravlensError, match=r"v\.npz"):
        from_npz(tmp_path / "v.npz")


def test_an_array_that_was_changed_is_found_by_its_checksum(tmp_path: Path) -> None:
    path = to_npz(directions(), tmp_path / "v.npz")
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        content[archive.getinfo("vectors.npy").header_offset + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(GravlensError, match="cannot be read"):
        from_npz(path)


# -- named axes --------------------------------------------------------------------------------------------------------


def test_directions_as_xarray_and_pandas() -> None:
    given = directions(1, 2)
    lost = replace(given[2], vector=np.full(tiny.WIDTH, np.nan), undefined="no difference")
    found = Directions((given[1], lost)).to_xarray()
    assert isinstance(found, xarray.Dataset) and found.vector.dims == ("layer", "d_model")
    np.testing.assert_array_equal(found.vector.sel(layer=1), given[1].vector)
    table = found.drop_vars("vector").to_dataframe()
    assert table.loc[1].to_dict() == {
        "distance": 4.0, "reliability": 0.9, "estimator": "difference_of_means", "undefined": "",
    }  # fmt: skip
    assert table.undefined[2] == "no difference"


# -- an orthogonalised model -------------------------------------------------------------------------------------------


def test_an_orthogonalised_model_is_an_ordinary_folder(tmp_path: Path) -> None:
    source, v = open_model(tiny.llama(tie_word_embeddings=True), tokenizer=tiny.TOKENIZER), directions(1)[1]
    folder = orthogonalize(source, v, out=tmp_path / "out")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(tiny.PROMPTS.texts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        found = model(ids, output_hidden_states=True)
        wanted = orthogonalized(source, v).module(ids)
        before = source.module(ids)
    np.testing.assert_allclose(found.logits, wanted.logits, atol=1e-5)
    assert (found.logits - before.logits).abs().max() > 0.1
    for states in found.hidden_states[:-1]:  # the last is after the final norm
        assert (states @ torch.tensor(v.vector)).abs().max() < 1e-5 * states.norm(dim=-1).max()


# -- the figures of the page -------------------------------------------------------------------------------------------


def test_the_table_of_the_page_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "exchange.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs" / "data" / "exchange.json").read_text())["programs"]
    assert set(measured) == {"repeng", "lm_eval", "llama_cpp"}
    for name, program in measured.items():
        files = list(program["files"].values())
        amiss = ("next_layer", "layer_before", "opposite_sign", "no_vector")
        least = [min(file[what] for file in files if what in file) for what in amiss]
        worst = max(file["as_here"] for file in files)
        assert worst < 2e-5 and min(least) > 1e5 * worst
        (row,) = re.findall(rf"^\| {name} {re.escape(program['version'])} \|[^|]+\|(.*)\|$", page, re.M)
        close = [f"{value:.1e}" if value else "0" for value in (program["unsteered"], worst)]
        assert [cell.strip() for cell in row.split("|")] == [*close, *(f"{value:.1f}" for value in least)]
    assert f"read it back to {measured['repeng']['read_back']:.1e}." in page
