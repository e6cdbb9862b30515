"""Steering vectors in other formats: GGUF control vectors, lm-evaluation-harness' `steered`, plain `.npz`.

A file contains strength · distance · v for each layer: at scale 1 the other program adds what `Steer(directions,
strength)` adds at the same layer. A file that is read steers at strength 1 as it does at scale 1 there.
"""

import json
import re
import tempfile
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, ReaderField
from torch import Tensor, nn

from gravlens.core.errors import GravlensError, at_home, reading
from gravlens.core.files import check_digest, without_nan, write_atomically, writing
from gravlens.directions.direction import Direction, Directions, each
from gravlens.directions.vrev import direction_from
from gravlens.interventions.edits import Steer
from gravlens.models.families import resid_post
from gravlens.models.opening import Openable, open_model

ARCHITECTURE = "controlvector"
TENSOR = re.compile(r"direction\.(\d+)")  # name of a layer's vector in llama.cpp and repeng
HOOKPOINT = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)")  # name of a block in a Hugging Face model
FACTS = "gravlens.facts"  # provenance of the directions; other programs ignore it
# What a file adds its vectors to, by the last word of a key, as `glp.mode` or `gravlens.hook_point`.
STATED = {"operation": "add", "hook_point": "blocks.{l}.hook_resid_post"}
ADDED = re.compile(r"add(?:itive|ition)?", re.IGNORECASE)
POST = re.compile(r"(?:(?:blocks\..*\.)?hook_)?resid_post|(?:residual_stream_)?post_layer|" + HOOKPOINT.pattern)
APPLIED = {
    **dict.fromkeys(("operation", "mode", "action"), ADDED),
    **dict.fromkeys(("hook_point", "hookpoint", "hook_name", "hook"), POST),
}


def to_gguf(
    directions: Direction | Directions,
    path: Path | str,
    *,
    strength: float = 1.0,
    model_hint: str = "unknown",
    layer_0: bool = False,
) -> Path:
    """Write a control vector for llama.cpp (`--control-vector`) and repeng (`ControlVector.import_gguf`).

    Both add `direction.{l}` to the output of block l, counted from 0, at every token: layer l of gravlens.

    Args:
        strength: steering strength of the other program's scale 1, in distances; negative: away from the witness.
        model_hint: type of the model (`llama`), for display in other programs.
        layer_0: write layer 0 too. llama.cpp rejects a file that contains it, repeng does not.

    Raises:
        GravlensError: an undefined direction, two of one layer, strength 0, or layer 0 without `layer_0=True`.

    Examples:
        >>> path = gl.exchange.to_gguf(vs.at([1, 2]), "v.gguf", model_hint="llama")  # llama.cpp has no layer 0
        >>> gl.exchange.from_gguf(path).layers
        (1, 2)
    """
    chosen = _checked(directions, strength)
    if 0 in chosen.layers and not layer_0:  # the user would learn it from llama.cpp only, at load time
        rest = sorted(set(chosen.layers) - {0})
        wanted = "llama.cpp has no control vector at layer 0 and rejects a file that contains one."
        remedy = f"{f'directions.at({rest})' if rest else 'a direction of another layer'}; for repeng layer_0=True."
        raise GravlensError(f"Directions of layers {sorted(chosen.layers)} were given.", wanted, remedy)
    # GGUFWriter writes to a path only, and not atomically.
    with writing(path), tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "vector.gguf"
        writer = GGUFWriter(written, ARCHITECTURE)
        writer.add_string(f"{ARCHITECTURE}.model_hint", model_hint)
        writer.add_uint32(f"{ARCHITECTURE}.layer_count", len(chosen))
        writer.add_string(FACTS, _facts(chosen, strength))
        for name, value in STATED.items():
            writer.add_string(f"gravlens.{name}", value)
        for one in chosen:
            vector = strength * one.distance * one.vector.astype(np.float64)  # rounded to fp32 once, at the end
            writer.add_tensor(f"direction.{one.layer}", vector.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return write_atomically(at_home(path), written.read_bytes())


def from_gguf(path: Path | str) -> Directions:
    """Read a control vector of llama.cpp, repeng or `to_gguf`; a direction's distance is the norm of its vector.

    Raises:
        GravlensError: a file that is missing, corrupt, not GGUF, or has any tensor but `direction.{layer}` in fp32; one
            that states another operation than addition, or another hook point than the output of a block.

    Examples:
        >>> path = gl.exchange.to_gguf(vs.at([1, 2]), "v.gguf")
        >>> with gl.intervene(model, gl.Steer(gl.exchange.from_gguf(path), -0.5)):
        ...     answers = gl.generate_answers(model, prompts, max_new_tokens=8)
    """
    path = at_home(path)
    with _parsing(path, "A GGUF file"):
        reader = GGUFReader(path)
        # Copied: GGUFReader's arrays are views of a memory map of the file.
        tensors = [(tensor.name, tensor.tensor_type, np.array(tensor.data)) for tensor in reader.tensors]
        stated = {name: _value_of(field) for name, field in reader.fields.items()}
    for name, kind, _ in tensors:
        if not TENSOR.fullmatch(name) or kind != GGMLQuantizationType.F32:
            given = f"{path} contains the tensor {name!r} as {kind.name}."
            wanted = "A control vector has tensors direction.1, direction.2, … of type F32."
            raise GravlensError(given, wanted, "a file of to_gguf, of repeng or of llama-cvector-generator.")
    if (kind := stated.get("general.architecture", ARCHITECTURE)) != ARCHITECTURE:
        given, wanted = f"{path} is a GGUF of the architecture {kind!r}.", f"A control vector's is {ARCHITECTURE!r}."
        raise GravlensError(given, wanted, "a file of to_gguf, of repeng or of llama-cvector-generator.")
    _check_applied(path, stated)
    vectors = [(int(name.removeprefix("direction.")), vector) for name, _, vector in tensors]
    return _directions(path, vectors, _parsed(path, stated.get(FACTS, "")), name="control_vector")


def _value_of(field: ReaderField) -> str:
    """Return a scalar's or a string's text; "" for an array."""
    if len(field.data) != 1 or GGUFValueType.ARRAY in field.types:
        return ""
    part = field.parts[field.data[0]]
    return bytes(part).decode() if field.types == [GGUFValueType.STRING] else str(part[0])


def _check_applied(path: Path, stated: Mapping[str, Any]) -> None:
    """Raise where a file states that its vectors are projected out, or act elsewhere than after a block."""
    for name, value in stated.items():
        allowed = APPLIED.get(name.rpartition(".")[2])
        if wrong := [one for one in np.ravel(value) if allowed and not allowed.fullmatch(str(one))]:
            given = f"{path} states {name} = {str(wrong[0])!r}."
            wanted = "These directions are added to the output of a block (add, resid_post)."
            remedy = "Ablate(direction_from(vector, layer=l)) for a projection; another hook point has no form here."
            raise GravlensError(given, wanted, remedy)


def to_steered(
    directions: Direction | Directions, path: Path | str, *, strength: float = 1.0, model: Openable | None = None
) -> Path:
    """Write a `.pt` for lm-evaluation-harness: `--model steered --model_args pretrained=…,steer_path=…`.

    Its `layers.{l}` is layer l of gravlens, at every token. The vector is v, the coefficient strength · distance.

    Args:
        path: the file; the harness recognises it by its suffix, `.pt` or `.pth`.
        strength: in distances; negative: away from the witness.
        model: the Hugging Face model that will be steered, for the names of its blocks; default: `layers.{l}`, as in
            Llama, Mistral, Qwen, Gemma, Phi and GPT-NeoX.

    Raises:
        GravlensError: an undefined direction, two of one layer, strength 0, another suffix, a layer that is out of the
            model's range, or a model with block names that the harness does not accept.

    Examples:
        >>> gl.exchange.to_steered(vs, "v.pt", model=model).name  # the model names its blocks
        'v.pt'
    """
    path = at_home(path)
    if path.suffix not in (".pt", ".pth"):
        raise GravlensError(f"The path {path.name} was given.", "The harness reads .pt or .pth.", f"{path.stem}.pt.")
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
    torch.save(content, buffer := BytesIO())
    return write_atomically(path, buffer.getvalue())


def from_steered(path: Path | str) -> Directions:
    """Read a `.pt` of lm-evaluation-harness' `steered`; a pickle that could run code is never loaded.

    Raises:
        GravlensError: a file that is missing, corrupt, or contains more than plain tensors; a `.csv` (names of features
            of sparse autoencoders); any action but `add` to whole blocks, one vector per layer.

    Examples:
        >>> gl.exchange.from_steered(gl.exchange.to_steered(vs, "v.pt", strength=0.5)).layers
        (0, 1, 2)
    """
    path = at_home(path)
    with _parsing(path, "A torch file of plain tensors (others can run code and are not loaded)"):
        if path.suffix == ".csv":
            wanted = "A steered .csv contains names of features of sparse autoencoders and no vector."
            raise GravlensError(f"{path.name} is a table.", wanted, "the .pt file.")
        content = dict(torch.load(path, map_location="cpu", weights_only=True))  # may be from a GPU
    vectors, facts = [], {}
    for hookpoint, entry in content.items():
        layer, coefficient = _layer_of(path, hookpoint, entry), float(entry.get("steering_coefficient", 1.0))
        _check_applied(path, {name: value for name, value in entry.items() if isinstance(value, str)})
        vectors.append((layer, entry["steering_vector"].detach().double().numpy() * coefficient))
        facts |= _parsed(path, entry.get(FACTS, ""))
    return _directions(path, vectors, facts, name="steered")


def _hookpoint(layer: int, model: Openable | None) -> str:
    """Return a block's name for the harness."""
    if model is None:
        return f"layers.{layer}"
    opened = open_model(model)
    # The harness looks names up in the model's `base_model`.
    block, names = resid_post(opened, layer), getattr(opened.module, "base_model", nn.Module()).named_modules()
    found = next((name for name, module in names if module is block), None)
    if found is None or not HOOKPOINT.fullmatch(found):
        given = f"Block {layer} of this {type(opened.module).__name__} has the name {found!r} for the harness."
        wanted = "It must be named layers.0, h.0 or blocks.0, as in Hugging Face models."
        raise GravlensError(given, wanted, "open_model(folder), which opens a Hugging Face model.")
    return found


def _layer_of(path: Path, hookpoint: Any, entry: Any) -> int:
    """Return the layer of an entry that adds a vector to a whole block."""
    named, found = HOOKPOINT.fullmatch(str(hookpoint)), None
    if not named or not isinstance(entry, dict) or not isinstance(entry.get("steering_vector"), Tensor):
        found = f"no vector of a block under {hookpoint!r}"
    elif entry.get("action") != "add" or entry.get("bias") is not None or entry.get("head_index") is not None:
        found = f"under {hookpoint!r} the action {entry.get('action')!r}, with a bias, or of one head"
    if named and not found:
        return int(named[1])
    wanted = "A direction is one vector per layer that is added to the block's output (`layers.3`, action 'add')."
    raise GravlensError(f"{path} contains {found}.", wanted, "a file of to_steered, or the entries that add to blocks.")


def to_npz(directions: Direction | Directions, path: Path | str) -> Path:
    """Write unit `vectors` [layer, d_model], `layers`, `distances` (residual units) and `facts` (JSON) for plain NumPy.

    `operation` and `hook_point` state that they are added to the output of blocks.

    Raises:
        GravlensError: an undefined direction, or two of one layer.

    Examples:
        >>> with np.load(gl.exchange.to_npz(vs, "v.npz")) as file:
        ...     file["vectors"].shape
        (3, 32)
    """
    chosen, buffer = _checked(directions, 1.0), BytesIO()
    layers, facts = np.array(chosen.layers), np.array(_facts(chosen, 1.0))
    stated: dict[str, Any] = {name: np.array(value) for name, value in STATED.items()}
    np.savez(buffer, vectors=chosen.vectors, layers=layers, distances=chosen.distances, facts=facts, **stated)
    return write_atomically(at_home(path), buffer.getvalue())


def from_npz(path: Path | str) -> Directions:
    """Read a `.npz` with `vectors` [layer, d_model] and `layers`; `distances` default to the vectors' norms.

    Raises:
        GravlensError: a file that is missing, corrupt or pickled, arrays of different lengths, or an `operation` or
            `hook_point` other than that of `to_npz`.

    Examples:
        >>> bool(np.allclose(gl.exchange.from_npz(gl.exchange.to_npz(vs, "v.npz")).vectors, vs.vectors, atol=1e-6))
        True
    """
    path = at_home(path)
    with _parsing(path, "A .npz of `vectors` [layer, d_model] and `layers` [layer]"):
        with np.load(path, allow_pickle=False) as file:  # a pickled array could run code
            arrays = {name: file[name] for name in file.files}
        _check_applied(path, arrays)
        layers, vectors = arrays["layers"].astype(int).tolist(), arrays["vectors"].astype(np.float64)
        if "distances" in arrays:
            vectors *= arrays["distances"].reshape(len(vectors), 1) / np.linalg.norm(vectors, axis=1, keepdims=True)
        pairs, facts = list(zip(layers, vectors, strict=True)), str(arrays.get("facts", ""))
    return _directions(path, pairs, _parsed(path, facts), name="npz")


def _checked(directions: Direction | Directions, strength: float) -> Directions:
    """Return the directions to write; raise where one is undefined, has length 0, or shares its layer."""
    chosen: tuple[Any, ...] = each(directions)
    if gone := next((one for one in chosen if one.undefined is not None), None):
        given = f"The direction of layer {gone.layer} is undefined: {gone.undefined}."
        raise GravlensError(given, "A file needs a vector for each of its layers.", "directions.defined().")
    Steer(directions, strength)  # checks: at least one, unit length, finite strength and distance
    layers, lengths = [one.layer for one in chosen], [strength * one.distance for one in chosen]
    # A vector of length 0 would steer nothing there, and has no direction when it is read again.
    if len(set(layers)) < len(layers) or not all(lengths):
        wanted = "A file needs one vector per layer, none of length 0."
        remedy = "one direction per layer, each with a distance, and a strength other than 0."
        raise GravlensError(f"Vectors of layers {layers} and lengths {lengths} were given.", wanted, remedy)
    return Directions(chosen)


def _facts(directions: Iterable[Direction], strength: float) -> str:
    """Return the provenance of directions as JSON, by layer; a strength other than 1 is added to it."""
    written = {} if strength == 1 else {"strength": strength}
    kept = ("estimator", "prompts", "reliability")
    facts = {
        one.layer: {**{name: getattr(one, name) for name in kept}, "made_from": {**one.made_from, **written}}
        for one in directions
    }
    return json.dumps(without_nan(facts))


def _parsed(path: Path, facts: str) -> dict[int, dict[str, Any]]:
    """Parse `_facts` into arguments of `replace`; empty for files of other programs."""
    with _parsing(path, "JSON of gravlens"):
        return {
            int(layer): {
                "estimator": str(one["estimator"]),
                "prompts": check_digest(str(one["prompts"]), path),
                "reliability": float("nan" if one["reliability"] is None else one["reliability"]),  # JSON has no NaN
                "made_from": dict(one["made_from"]),
            }
            for layer, one in json.loads(facts or "{}").items()
        }


def _directions(
    path: Path, vectors: Sequence[tuple[int, np.ndarray]], facts: Mapping[int, Mapping[str, Any]], *, name: str
) -> Directions:
    """Make directions of vectors, layers ascending, with the provenance of each."""
    layers, shapes = [layer for layer, _ in vectors], {vector.shape for _, vector in vectors}
    if len(shapes) != 1 or len(min(shapes)) != 1 or len(set(layers)) < len(layers):
        given = f"{path} contains vectors of layers {layers} and shapes {sorted(shapes)}."
        wanted = "It must contain one vector per layer, all of one width."
        raise GravlensError(given, wanted, "a file that was made for one model.")
    ordered = sorted(vectors, key=lambda pair: pair[0])  # a writer may order names as text: 10 before 2
    plain = [direction_from(vector, layer=i, name=f"layer {i} of {path.name}") for i, vector in ordered]
    return Directions(tuple(replace(one, **{"estimator": name, **facts.get(one.layer, {})}) for one in plain))


@contextmanager
def _parsing(path: Path, expected: str) -> Generator[None]:
    """Raise any failure to parse a file as GravlensError: what a foreign parser raises is not documented."""
    if not path.is_file():
        raise GravlensError(f"There is no file {path}.", "A file of directions was expected.", "check the path.")
    with reading(path, f"{expected} was expected.", "write or copy it again."):
        try:
            yield
        except Exception as error:
            if type(error).__name__ != "UnpicklingError":
                raise
            # torch's message advises to load an unsafe pickle all the same
            raise ValueError("UnpicklingError: it holds more than tensors") from error
