"""Safetensors files, written whole or not at all, that say by their header what they are."""

import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gravlens.core.errors import GravlensError

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
    return write_atomically(path, (json.dumps(without_nan(content), indent=1) + "\n").encode())


def write_table(path: Path, table: pd.DataFrame, *, float_format: str | None = None) -> Path:
    """Write a table as CSV in one step, without its index."""
    return write_atomically(path, table.to_csv(index=False, float_format=float_format).encode())


def without_nan(value: Any) -> Any:
    """What JSON can hold: NaN and infinities as None, numpy's numbers as plain ones."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
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
    return write_atomically(Path(path), tensor_bytes(kind, arrays, meta))


def tensor_bytes(kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    """The content of a file of `write_tensors`, the same for the same arrays and meta."""
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata=_header(kind, meta))
    start = 8 + int.from_bytes(content[:8], "little")
    return _header_bytes(json.loads(content[8:start])) + content[start:]


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    """A safetensors header with its keys in order: safetensors itself writes them in a random one."""
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _header(kind: str, meta: Mapping[str, Any]) -> dict[str, str]:
    return {"gravlens": kind, "convention": CONVENTION, "meta": json.dumps(without_nan(dict(meta)))}


def read_tensors(path: Path | str, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of `write_tensors`; another kind, another convention or a damaged file is refused."""
    with _opened(path, kind) as file:
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        return arrays, _meta(path, kind, file.metadata() or {})


def meta_of(content: bytes, path: Path | str, kind: str) -> dict[str, Any]:
    """What a file of `write_tensors` says of itself, given its beginning with all of its header."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return _meta(path, kind, header.get("__metadata__", {}))


@contextmanager
def _opened(path: Path | str, kind: str) -> Generator[Any]:
    try:
        with safe_open(path, framework="np") as file:
            yield file
    except SafetensorError as error:
        raise damaged(path, error) from error
    except OSError as error:
        raise GravlensError(
            f"{path} cannot be read ({error}).", f"A file of {kind} is needed.", "check the path."
        ) from error


def _meta(path: Path | str, kind: str, header: Mapping[str, str]) -> dict[str, Any]:
    if header.get("gravlens") != kind or header.get("convention") != CONVENTION:
        raise GravlensError(
            f"{path} holds {header.get('gravlens', 'tensors of another program')!r} "
            f"by the convention {header.get('convention', 'unknown')!r}.",
            f"A gravlens file of {kind} by the convention {CONVENTION!r} is needed.",
            f"write it again with this version's .save() of {kind}.",
        )
    return json.loads(header["meta"])


class TensorWriter:
    """One fp32 tensor that is written in pieces, under another name until it is whole.

    The file is one of `write_tensors`, its name `{stem}.{SHA-256 of its content}.safetensors`.

    Args:
        folder: where it will lie.
        stem: the first part of its name.
        kind: what it holds.
        name: the tensor's.
        shape: the tensor's.
        meta: anything that JSON can hold.
    """

    def __init__(
        self, folder: Path, stem: str, kind: str, name: str, shape: tuple[int, ...], meta: Mapping[str, Any]
    ) -> None:
        self._stem, self._bytes = stem, 4 * math.prod(shape)
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, self._bytes]}
        header = _header_bytes({"__metadata__": _header(kind, meta), name: entry})
        folder.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(dir=folder, prefix=f".{stem}.")
        self._path, self._file, self._start = Path(scratch), os.fdopen(handle, "r+b"), len(header)
        try:
            self._file.write(header)
            if hasattr(os, "posix_fallocate"):  # a full disk is known before anything else is written
                os.posix_fallocate(handle, 0, self._start + self._bytes)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()  # writes what is left, where there may be no room
        finally:
            self._path.unlink(missing_ok=True)  # it has another name, if it was finished

    def write(self, start: int, values: np.ndarray) -> None:
        """Put numbers at a place, counted in numbers from the tensor's first."""
        self._file.seek(self._start + 4 * start)
        self._file.write(np.ascontiguousarray(values, dtype="<f4").data)

    def finish(self) -> Path:
        """Give the file its name."""
        self._file.flush()
        self._file.seek(0)
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        path = self._path.with_name(f"{self._stem}.{digest}.safetensors")
        os.chmod(self._path, 0o644)
        os.replace(self._path, path)
        return path


def map_tensor(path: Path, name: str) -> np.ndarray:
    """An fp32 tensor of a file of `write_tensors`, memory-mapped and read-only."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    return np.memmap(path, "<f4", "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))


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
