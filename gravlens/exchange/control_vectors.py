"""Directions in the files of other programs: GGUF control vectors, lm-evaluation-harness' `steered`, plain `.npz`.

A file holds strength · distance · v of each layer: the other program adds at scale 1 what `Steer(directions, strength)`
adds here, at the same layer. What is read steers at strength 1 as its file does at scale 1.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from torch import Tensor, nn

from gravlens.core.errors import GravlensError
from gravlens.core.files import without_nan, write_atomically
from gravlens.directions.direction import Direction, Directions, each
from gravlens.directions.vrev import direction_from
from gravlens.interventions.edits import Steer
from gravlens.models.opening import Openable, open_model, resid_post

ARCHITECTURE = "controlvector"
TENSOR = re.compile(r"direction\.(\d+)")  # llama.cpp's and repeng's name of one layer's vector
HOOKPOINT = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)")  # a block's name in a Hugging Face model
FACTS = "gravlens.facts"  # what the directions were made from; other programs do not ask for it
TORCH_FILES = (".pt", ".pth")


# --- GGUF -----------------------------------------------------------------------------------------------------------
def to_gguf(
    directions: Direction | Directions,
    path: Path | str,
    *,
    strength: float = 1.0,
    model_hint: str = "unknown",
    layer_0: bool = False,
) -> Path:
    """Write a control vector for llama.cpp (`--control-vector`) and repeng (`ControlVector.import_gguf`).

    Both add `direction.{l}` to what block l gives, counted from 0, at every token: gravlens' layer l.

    Args:
        directions: defined ones, one a layer.
        path: the file.
        strength: what the other program's scale 1 is, in distances; negative: away from the witness.
        model_hint: the model's type (`llama`), for other programs to show.
        layer_0: write layer 0 too. llama.cpp refuses a file that holds it, repeng does not.

    Raises:
        GravlensError: an undefined direction, two of one layer, strength 0, or layer 0 without `layer_0=True`.
    """
    chosen = _checked(directions, strength)
    if 0 in chosen.layers and not layer_0:
        rest = sorted(set(chosen.layers) - {0})
        raise GravlensError(
            f"Directions of layers {sorted(chosen.layers)} were given.",
            "llama.cpp has no control vector at layer 0, and refuses the whole of a file that holds one.",
            f"{f'directions.at({rest})' if rest else 'a direction of another layer'}; for repeng layer_0=True.",
        )
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "vector.gguf"
        writer = GGUFWriter(written, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(chosen))
        writer.add_string(FACTS, _facts(chosen, strength))
        for one in chosen:
            vector = strength * one.distance * one.vector.astype(np.float64)
            writer.add_tensor(f"direction.{one.layer}", vector.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return write_atomically(Path(path), written.read_bytes())


def from_gguf(path: Path | str) -> Directions:
    """Read a control vector of llama.cpp, repeng or `to_gguf`: each distance is the length of a layer's vector.

    Args:
        path: the file, `.gguf`.

    Raises:
        GravlensError: a file that is absent, damaged, no GGUF, or holds anything but `direction.{layer}` in fp32.
    """
    path = _present(path)
    try:
        reader = GGUFReader(path)
        tensors = [(tensor.name, tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors]
        facts = _text(reader, FACTS)
    except Exception as error:  # whatever a foreign parser meets in a broken file
        raise _unreadable(path, "A GGUF file", error) from error
    for name, kind, _ in tensors:
        if not TENSOR.fullmatch(name) or kind != GGMLQuantizationType.F32:
            raise GravlensError(
                f"{path} holds the tensor {name!r} as {kind.name}.",
                "A control vector holds direction.1, direction.2, … as F32.",
                "a file of to_gguf, of repeng or of llama-cvector-generator.",
            )
    vectors = [(int(name.removeprefix("direction.")), vector) for name, _, vector in tensors]
    return _directions(path, vectors, _parsed(path, facts), name="control_vector")


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.get_field(key)
    return "" if field is None else bytes(field.parts[field.data[0]]).decode()


# --- lm-evaluation-harness ------------------------------------------------------------------------------------------
def to_steered(
    directions: Direction | Directions,
    path: Path | str,
    *,
    strength: float = 1.0,
    model: Openable | None = None,
) -> Path:
    """Write a `.pt` for lm-evaluation-harness: `--model steered --model_args pretrained=…,steer_path=…`.

    Its `layers.{l}` is gravlens' layer l, at every token. The vector is v, the coefficient strength · distance.

    Args:
        directions: defined ones, one a layer.
        path: the file; the harness knows it by its ending, `.pt` or `.pth`.
        strength: in distances; negative: away from the witness.
        model: the Hugging Face model that is to be steered, for the names of its blocks; default: `layers.{l}`, as
            Llama, Mistral, Qwen, Gemma, Phi and GPT-NeoX have them.

    Raises:
        GravlensError: an undefined direction, two of one layer, strength 0, another ending, a layer that the model
            lacks, or a model whose blocks the harness cannot name.
    """
    path = Path(path)
    if path.suffix not in TORCH_FILES:
        raise GravlensError(
            f"{path.name} was named.", "The harness knows the file by its ending: .pt or .pth.", f"{path.stem}.pt."
        )
    content = {
        _hookpoint(one.layer, model): {
            "steering_vector": torch.tensor(one.vector),
            "steering_coefficient": strength * one.distance,
            "action": "add",
            "bias": None,
            "head_index": None,
            FACTS: _facts([one], strength),
        }
        for one in _checked(directions, strength)
    }
    buffer = BytesIO()
    torch.save(content, buffer)
    return write_atomically(path, buffer.getvalue())


def from_steered(path: Path | str) -> Directions:
    """Read a `.pt` of lm-evaluation-harness' `steered`; a pickle that would run code is never opened.

    Args:
        path: the file, `.pt`.

    Raises:
        GravlensError: a file that is absent, damaged, or holds more than plain tensors; a `.csv` (it names features of
            sparse autoencoders); anything but `add` to whole blocks, one vector a layer.
    """
    path = _present(path)
    if path.suffix == ".csv":
        raise GravlensError(
            f"{path.name} is a table.",
            "A steered .csv names features of sparse autoencoders and holds no vector.",
            "the .pt file, which does.",
        )
    try:
        content = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged archive, or a pickle of something that is no tensor
        raise _unreadable(
            path, "A torch file of plain tensors (others can run code, and are not opened)", error
        ) from error
    vectors, facts = [], {}
    for hookpoint, entry in content.items():
        layer, coefficient = _layer_of(path, hookpoint, entry), float(entry.get("steering_coefficient", 1.0))
        vectors.append((layer, entry["steering_vector"].detach().double().numpy() * coefficient))
        facts |= _parsed(path, entry.get(FACTS, ""))
    return _directions(path, vectors, facts, name="steered")


def _hookpoint(layer: int, model: Openable | None) -> str:
    """A block's name as the harness looks it up: in the model's `base_model`."""
    if model is None:
        return f"layers.{layer}"
    opened = open_model(model)
    block, names = resid_post(opened, layer), getattr(opened.module, "base_model", nn.Module()).named_modules()
    found = next((name for name, module in names if module is block), None)
    if found is None or not HOOKPOINT.fullmatch(found):
        raise GravlensError(
            f"The harness would know block {layer} of this {type(opened.module).__name__} as {found!r}.",
            "A Hugging Face model names its blocks layers.0, h.0 or blocks.0.",
            "open_model(folder), which opens one.",
        )
    return found


def _layer_of(path: Path, hookpoint: Any, entry: Any) -> int:
    """The layer of an entry that adds a vector to a whole block; any other is refused."""
    named = HOOKPOINT.fullmatch(str(hookpoint))
    if not named or not isinstance(entry, dict) or not isinstance(entry.get("steering_vector"), Tensor):
        raise _not_added(path, f"no vector of a block under {hookpoint!r}")
    if entry.get("action") != "add" or entry.get("bias") is not None or entry.get("head_index") is not None:
        raise _not_added(path, f"under {hookpoint!r} the action {entry.get('action')!r}, with a bias, or of one head")
    return int(named[1])


def _not_added(path: Path, found: str) -> GravlensError:
    return GravlensError(
        f"{path} holds {found}.",
        "A direction is one vector a layer, added to all that a block gives (`layers.3`, action 'add').",
        "a file of to_steered, or the entries that add to blocks.",
    )


# --- npz ------------------------------------------------------------------------------------------------------------
def to_npz(directions: Direction | Directions, path: Path | str) -> Path:
    """Write `vectors` [layer, d_model] of unit length, `layers`, `distances` and `facts` (JSON) for numpy alone.

    Args:
        directions: defined ones, one a layer; `distances` are in residual units.
        path: the file, `.npz`.

    Raises:
        GravlensError: an undefined direction, or two of one layer.
    """
    chosen, buffer = _checked(directions, 1.0), BytesIO()
    layers, facts = np.array(chosen.layers), np.array(_facts(chosen, 1.0))
    np.savez(buffer, vectors=chosen.vectors, layers=layers, distances=chosen.distances, facts=facts)
    return write_atomically(Path(path), buffer.getvalue())


def from_npz(path: Path | str) -> Directions:
    """Read a `.npz` with `vectors` [layer, d_model] and `layers`; without `distances` they are the vectors' lengths.

    Args:
        path: the file, `.npz`.

    Raises:
        GravlensError: a file that is absent, damaged, pickled, or whose arrays do not fit each other.
    """
    path = _present(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        layers, vectors = arrays["layers"].astype(int).tolist(), arrays["vectors"].astype(np.float64)
        if "distances" in arrays:
            vectors *= arrays["distances"].reshape(len(vectors), 1) / np.linalg.norm(vectors, axis=1, keepdims=True)
        pairs, facts = list(zip(layers, vectors, strict=True)), str(arrays.get("facts", ""))
    except Exception as error:  # no zip, a pickle, an array too few
        raise _unreadable(path, "A .npz of `vectors` [layer, d_model] and `layers` [layer]", error) from error
    return _directions(path, pairs, _parsed(path, facts), name="npz")


# --- what all of them share -----------------------------------------------------------------------------------------
def _checked(directions: Direction | Directions, strength: float) -> Directions:
    """The directions to write; raises where one is undefined, twice there, or of length 0 at this strength."""
    chosen: tuple[Any, ...] = each(directions)
    for one in chosen:
        if one.undefined is not None:
            raise GravlensError(
                f"The direction of layer {one.layer} is undefined: {one.undefined}.",
                "A file for other programs holds a vector at each of its layers.",
                "directions.defined(), which leaves the undefined ones out.",
            )
    Steer(directions, strength)  # one at least, of unit length, at a finite strength and distance
    layers, lengths = [one.layer for one in chosen], [strength * one.distance for one in chosen]
    if len(set(layers)) < len(layers) or not all(lengths):
        raise GravlensError(
            f"Vectors of layers {layers} and lengths {lengths} were to be written.",
            "A file holds one vector a layer, and none of length 0.",
            "one direction of each layer, with a distance, and a strength that is not 0.",
        )
    return Directions(chosen)


def _facts(directions: Iterable[Direction], strength: float) -> str:
    """What directions were made from, JSON by layer; the strength is added where it is not 1."""
    written = {} if strength == 1 else {"strength": strength}
    facts = {
        one.layer: {
            "estimator": one.estimator,
            "prompts": one.prompts,
            "reliability": one.reliability,
            "made_from": {**one.made_from, **written},
        }
        for one in directions
    }
    return json.dumps(without_nan(facts))


def _parsed(path: Path, facts: str) -> dict[int, dict[str, Any]]:
    """`_facts` read back, as what `replace` takes; nothing of a file that other programs wrote."""
    try:
        return {
            int(layer): {
                "estimator": str(one["estimator"]),
                "prompts": str(one["prompts"]),
                "reliability": float("nan") if one["reliability"] is None else float(one["reliability"]),
                "made_from": dict(one["made_from"]),
            }
            for layer, one in json.loads(facts or "{}").items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _unreadable(path, "What gravlens wrote beside the vectors", error) from error


def _directions(
    path: Path, vectors: Sequence[tuple[int, np.ndarray]], facts: Mapping[int, Mapping[str, Any]], *, name: str
) -> Directions:
    """Vectors of layers as directions, layers ascending, with what is known of each."""
    layers, shapes = [layer for layer, _ in vectors], {vector.shape for _, vector in vectors}
    if len(shapes) != 1 or len(min(shapes)) != 1 or len(set(layers)) < len(layers):
        raise GravlensError(
            f"{path} holds vectors of layers {layers} and shapes {sorted(shapes)}.",
            "A file of directions holds one vector a layer, all of the model's width.",
            "a file that was made for one model.",
        )
    ordered = sorted(vectors, key=lambda pair: pair[0])
    plain = [direction_from(vector, layer=i, name=f"layer {i} of {path.name}") for i, vector in ordered]
    return Directions(tuple(replace(one, **{"estimator": name, **facts.get(one.layer, {})}) for one in plain))


def _present(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise GravlensError(f"No file lies at {path}.", "A file of directions is wanted.", "check the path.")
    return path


def _unreadable(path: Path, wanted: str, error: Exception) -> GravlensError:
    first, *_ = [*str(error).strip().splitlines(), ""]
    # torch's own words for a pickle advise to open it all the same
    said = type(error).__name__ if type(error).__name__ == "UnpicklingError" else f"{type(error).__name__}: {first}"
    return GravlensError(f"{path} cannot be read ({said}).", f"{wanted} is wanted.", "write or copy it again.")
