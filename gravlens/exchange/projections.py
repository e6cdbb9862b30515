"""Projective control vectors: an ablation or a clamp as a safetensors file that states what it does, and where."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gravlens.activations.residuals import Residuals
from gravlens.core.errors import GravlensError, at_home, reading
from gravlens.core.files import read_tensors, write_tensors
from gravlens.directions.direction import Direction, Directions, Subspace, Subspaces, each
from gravlens.history.weight_files import contents
from gravlens.interventions.edits import Ablate, At, Clamp, Intervention, check_intervention
from gravlens.models.opening import Openable, open_model, weights_of

KIND = "projection"
# The part of the metadata that is the same in every file of this version. `c` is 0 for an ablation.
STATED = {"version": 1, "hook_point": "blocks.{l}.hook_resid_post", "formula": "h - (h Q^T - c) Q", "dtype": "float32"}
OPERATIONS = {Ablate: "ablate", Clamp: "clamp"}
PROVENANCE = ("estimator", "prompts", "distance")


def to_projection(intervention: Intervention, path: Path | str, *, model: Openable) -> Path:
    """Write an `Ablate` or a `Clamp`, alone or in an `At`, to a file that any reader of safetensors can apply.

    For each layer l `basis.{l}` [rank, d_model] has orthonormal rows Q and `component.{l}` [rank] is c, in residual
    units: h becomes h − (h Qᵀ − c) Q at the output of block l. The JSON under `meta` has `operation`, `hook_point`,
    `positions`, `formula`, `dtype`, `version`, `vectors_sha256` (of the tensors' bytes in the order of their names) and
    `model_sha256` (of the weights, as in the column `digest` of `inspect_sequence`).

    Args:
        intervention: one direction or subspace per layer.
        path: the file, `.safetensors`.
        model: the model that it is made for, in the dtype that it is used in.

    Raises:
        GravlensError: another intervention (a `Steer` has `to_gguf`), or several spans at one layer.

    Examples:
        >>> path = gl.exchange.to_projection(gl.Ablate(vs), "ablate.safetensors", model=model)
        >>> with gl.intervene(model, gl.exchange.from_projection(path, model=model)):
        ...     answers = gl.generate_answers(model, prompts, max_new_tokens=8)
    """
    inner, positions = (intervention, "all") if not isinstance(intervention, At) else vars(intervention).values()
    operation, spans = OPERATIONS.get(type(inner)), each(check_intervention(intervention).directions)
    if operation is None or len({span.layer for span in spans}) < len(spans):
        given = f"{type(inner).__name__} at layers {[span.layer for span in spans]} was given."
        wanted = "A projection is an Ablate or a Clamp of one direction or subspace per layer."
        raise GravlensError(given, wanted, "Ablate(directions); to_gguf for a Steer; span_of for several at one layer.")
    arrays: dict[str, np.ndarray] = {}
    for span in spans:
        # what a zero state becomes is c Q
        put = inner.edit(torch.zeros(span.basis.shape[1], dtype=torch.float64), span).numpy()
        arrays |= {f"basis.{span.layer}": span.basis, f"component.{span.layer}": (span.basis @ put).astype(np.float32)}
    facts = {span.layer: {name: getattr(span, name) for name in PROVENANCE} for span in spans}
    hashes = {"vectors_sha256": _digest(arrays), "model_sha256": _weights_digest(model)}
    meta = {**STATED, "operation": operation, "positions": positions, **hashes, "facts": facts}
    return write_tensors(path, KIND, arrays, meta)


def from_projection(path: Path | str, *, model: Openable | None = None) -> Intervention:
    """Read a file of `to_projection` as an `Ablate` or a `Clamp`, in an `At` where it acts at some positions only.

    Args:
        path: the file.
        model: raise unless the file was made for these weights; None: for any, as for a later checkpoint.

    Raises:
        GravlensError: a file that is missing, corrupt, or changed since; another operation, hook point, formula, dtype
            or version; another model.

    Examples:
        >>> path = gl.exchange.to_projection(gl.At(gl.Clamp(vs[1], given), "last"), "clamp.safetensors", model=model)
        >>> gl.exchange.from_projection(path).positions
        'last'
    """
    path = at_home(path)
    arrays, meta = read_tensors(path, KIND)
    for name, known in {**{name: [value] for name, value in STATED.items()}, "operation": OPERATIONS.values()}.items():
        if meta.get(name) not in known:
            given, wanted = f"{path} states {name} = {meta.get(name)!r}.", f"Known is {' or '.join(map(str, known))}."
            raise GravlensError(given, wanted, "a file of to_projection, or the version of gravlens that wrote it.")
    if meta.get("vectors_sha256") != (found := _digest(arrays)):
        given = f"{path} states vectors_sha256 = {meta.get('vectors_sha256')!r}, and its vectors have {found}."
        raise GravlensError(given, "The vectors must be those that were written.", "write or copy it again.")
    if model is not None and meta.get("model_sha256") != (weights := _weights_digest(model)):
        given = f"{path} is for weights of the digest {meta.get('model_sha256')!r}, these have {weights}."
        wanted = "A projection is estimated on one model in one dtype, and other weights have other activations."
        raise GravlensError(
            given, wanted, "open_model of that checkpoint; from_projection(path) to apply it all the same."
        )
    with reading(path, "Tensors basis.{l} [rank, d_model] and component.{l} [rank] are expected.", "write it again."):
        return _intervention(arrays, meta)


def _intervention(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Intervention:
    layers = sorted(int(layer) for layer in meta["facts"])
    bases = [arrays[f"basis.{layer}"] for layer in layers]
    puts = [arrays[f"component.{layer}"] for layer in layers]
    fit = all(basis.shape == (len(put), bases[0].shape[-1]) for basis, put in zip(bases, puts, strict=True))
    # what would not be applied is no part of the file: a layer without facts, a component that an ablation has not
    if not fit or len(arrays) > 2 * len(layers) or (meta["operation"] == "ablate" and any(map(np.any, puts))):
        given = f"Layers {layers} are stated; the tensors are { ({name: one.shape for name, one in arrays.items()}) }."
        wanted = "Each has a basis [rank, d_model] and a component [rank], 0 for an ablation, and no other layer has."
        raise GravlensError(given, wanted, "write it again.")
    facts = [{**meta["facts"][str(layer)], "layer": layer} for layer in layers]
    pairs = list(zip(bases, facts, strict=True))
    spans = Subspaces(tuple(Subspace(basis, **fact) for basis, fact in pairs))
    if all(len(basis) == 1 for basis in bases):
        spans = Directions(tuple(Direction(basis[0], **fact) for basis, fact in pairs))
    edit: Intervention = Ablate(spans)
    if meta["operation"] == "clamp":
        # the anchor's mean state enters by its components alone, so c Q serves as well
        means = np.stack([put @ basis for put, basis in zip(puts, bases, strict=True)])
        edit = Clamp(spans, Residuals(means[None, None], ("anchor",), tuple(layers), "", {}))
    at: Any = meta["positions"]  # `At` checks them; JSON has no tuples
    return edit if at == "all" else At(edit, tuple(at) if isinstance(at, list) else at)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    return hashlib.sha256(b"".join(np.ascontiguousarray(arrays[name]).tobytes() for name in sorted(arrays))).hexdigest()


def _weights_digest(model: Openable) -> str:
    return contents(sorted(weights_of(open_model(model).module).items())).digest
