"""Atomic writes, and safetensors files that name their kind and layer convention in the header."""

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gravlens.core.errors import GravlensError, at_home

CONVENTION = "blocks.{layer}.hook_resid_post; layers count from 0; the last block is read before the final norm"


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file atomically: a killed process leaves the old file or none, never a partial one."""
    place = at_home(path).resolve()  # a link is followed: renaming over it would leave its target old
    if place.is_char_device() or place.is_fifo():  # renaming over /dev/null would make it a regular file
        place.write_bytes(content)
        return path
    place.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder: os.replace is atomic only within one file system.
    handle, scratch = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(scratch, _mode_of(place))
        os.replace(scratch, place)
    except BaseException:  # Ctrl-C too
        Path(scratch).unlink(missing_ok=True)
        raise
    return path


def _mode_of(place: Path) -> int:
    """The permissions of an existing file, or those of a new one; mkstemp's 0600 would lock colleagues out."""
    if place.exists():
        return place.stat().st_mode & 0o777
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return 0o666 & ~mask


def write_json(path: Path, content: Any) -> Path:
    """Write JSON atomically; NaN becomes null."""  # json would write NaN, which no other parser reads
    return write_atomically(path, (json.dumps(without_nan(content), indent=1) + "\n").encode())


def write_table(path: Path, table: pd.DataFrame, *, float_format: str | None = None) -> Path:
    """Write a table as CSV atomically, without its index."""
    return write_atomically(path, table.to_csv(index=False, float_format=float_format).encode())


def without_nan(value: Any) -> Any:
    """Convert a value for JSON: NaN and infinities become None, numpy scalars become Python numbers."""
    if isinstance(value, Mapping):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_tensors(path: Path | str, kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Path:
    """Write arrays and JSON-serialisable metadata as one safetensors file of a kind, which is verified on reading."""
    return write_atomically(at_home(path), tensor_bytes(kind, arrays, meta))


def tensor_bytes(kind: str, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> bytes:
    """Return the content of a file of `write_tensors`: equal arrays and metadata give equal bytes."""
    # safetensors writes the buffer as it lies: a transposed view would be stored with its numbers mixed up.
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata=_header(kind, meta))
    start = 8 + int.from_bytes(content[:8], "little")
    return _header_bytes(json.loads(content[8:start])) + content[start:]


def _header_bytes(header: Mapping[str, Any]) -> bytes:
    """Return a safetensors header with sorted keys: safetensors itself writes them in random order."""
    text = json.dumps(header, sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # the format wants the tensors aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def _header(kind: str, meta: Mapping[str, Any]) -> dict[str, str]:
    return {"gravlens": kind, "convention": CONVENTION, "meta": json.dumps(without_nan(dict(meta)))}


def read_tensors(path: Path | str, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file of `write_tensors`; raise on another kind, another convention or a corrupt file."""
    path = at_home(path)
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return arrays, _meta(path, kind, file.metadata() or {})
    except SafetensorError as error:
        raise damaged(path, error) from error
    except OSError as error:
        needed = f"A file of {kind} is needed."
        raise GravlensError(f"{path} cannot be read ({error}).", needed, "check the path.") from error


def meta_of(content: bytes, path: Path | str, kind: str) -> dict[str, Any]:
    """Return the metadata of a file of `write_tensors`, given its first bytes including the whole header."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return _meta(path, kind, header.get("__metadata__", {}))


def _meta(path: Path | str, kind: str, header: Mapping[str, str]) -> dict[str, Any]:
    found, convention = header.get("gravlens", "tensors of another program"), header.get("convention", "unknown")
    if (found, convention) != (kind, CONVENTION):  # a file that counts layers otherwise would be off by one, silently
        given = f"{path} holds {found!r} by the convention {convention!r}."
        wanted = f"A gravlens file of {kind} by the convention {CONVENTION!r} is needed."
        raise GravlensError(given, wanted, f"write it again with this version's .save() of {kind}.")
    return json.loads(header["meta"])


def check_digest(prompts: str, path: Path | str) -> str:
    """Return the prompts' digest that a file holds; raise for one of texts, which earlier versions wrote."""
    if re.fullmatch("[0-9a-f]{64}", prompts):
        given = f"{path} knows its prompts by a digest of their texts (written by an earlier version of gravlens)."
        wanted = "Prompts are known by their token ids: one text under two chat templates is two prompts."
        raise GravlensError(given, wanted, "compute it again: cache_residuals, locate_vrev or refusal_candidates.")
    return prompts


class TensorWriter:
    """Write one fp32 tensor in pieces, under a temporary name until it is complete.

    The file is one of `write_tensors` in `folder`, its name `{stem}.{SHA-256 of its content}.safetensors`.
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
            if hasattr(os, "posix_fallocate"):  # reserves the space, so that a full disk is reported now
                os.posix_fallocate(handle, 0, self._start + self._bytes)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._file.close()  # flushes, and may find the disk full
        finally:
            self._path.unlink(missing_ok=True)  # `finish` has renamed it

    def write(self, start: int, values: np.ndarray) -> None:
        """Write values at an offset, in elements of the tensor."""
        self._file.seek(self._start + 4 * start)
        self._file.write(np.ascontiguousarray(values, dtype="<f4").data)

    def finish(self) -> Path:
        """Rename the file to its final name and return the path."""
        self._file.flush()
        self._file.seek(0)  # hashed from the file, not while writing: the pieces come in any order
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        path = self._path.with_name(f"{self._stem}.{digest}.safetensors")
        os.chmod(self._path, 0o644)
        os.replace(self._path, path)
        return path


def map_tensor(path: Path, name: str) -> np.ndarray:
    """Memory-map an fp32 tensor of a file of `write_tensors`, read-only."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    # By hand: safetensors reads whole tensors, and this one may be larger than the memory.
    return np.memmap(path, "<f4", "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))


def once(folder: Path, make: Callable[[Path], None], *, replace: bool = False) -> Path:
    """Create a folder atomically, unless it exists or to replace it: `make` fills it under a temporary name."""
    if folder.is_dir() and not replace:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        make(scratch)
        if replace:
            shutil.rmtree(folder, ignore_errors=True)  # os.replace needs an empty target
        os.chmod(scratch, 0o755)  # mkdtemp makes it 0700
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        if replace or not folder.is_dir():  # another process may have created it first
            raise
    return folder


def damaged(path: Path | str, error: Exception) -> GravlensError:
    """Return the error for a safetensors file that cannot be read."""
    given, remedy = f"{path} is corrupt or truncated ({error}).", "copy or save it again; nothing was changed."
    return GravlensError(given, "A complete safetensors file is needed.", remedy)
