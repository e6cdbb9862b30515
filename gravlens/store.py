"""Safetensors files, written whole or not at all, that say by their header what they are."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gravlens.errors import GravlensError

CONVENTION = "blocks.{layer}.hook_resid_post; layers count from 0; the last block is read before the final norm"


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file in one step: a kill leaves the old file or none, never a half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write JSON in one step; NaN is written as null."""
    return write_atomically(path, (json.dumps(_without_nan(content), indent=1) + "\n").encode())


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_tensors(path: Path | str, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
    """Write arrays and what they were made from as one safetensors file.

    Args:
        path: the file.
        kind: what it holds (`residuals`, `directions`); held against on reading.
        arrays: the arrays by name.
        meta: anything that JSON can hold.
    """
    header = {"gravlens": kind, "convention": CONVENTION, "meta": json.dumps(_without_nan(dict(meta)))}
    tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return write_atomically(Path(path), save(tensors, metadata=header))


def read_tensors(path: Path | str, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of `write_tensors`; another kind, another convention or a damaged file is refused."""
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise GravlensError(
            f"{path} cannot be read ({error}).", f"A file of {kind} is needed.", "check the path."
        ) from error
    if header.get("gravlens") != kind or header.get("convention") != CONVENTION:
        raise GravlensError(
            f"{path} holds {header.get('gravlens', 'tensors of another program')!r} "
            f"by the convention {header.get('convention', 'unknown')!r}.",
            f"A gravlens file of {kind} by the convention {CONVENTION!r} is needed.",
            f"write it again with this version's .save() of {kind}.",
        )
    return arrays, json.loads(header["meta"])


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder unless it is there: it is made under another name and renamed, so what is there is complete."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        make(scratch)
        os.chmod(scratch, 0o755)
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        if not folder.is_dir():  # else another process was first, which is as good
            raise
    return folder


def damaged(path: Path | str, error: Exception) -> GravlensError:
    """The error for a safetensors file that cannot be read."""
    return GravlensError(
        f"{path} is damaged or was not written to its end ({error}).",
        "A whole safetensors file is needed.",
        "copy or save that checkpoint again; nothing was changed.",
    )
