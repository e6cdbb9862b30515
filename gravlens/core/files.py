"""Atomic writes, and files that verify themselves: safetensors with a checksum, folders with a list of them."""

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gravlens.core.errors import GravlensError, at_home, said

CONVENTION = "blocks.{layer}.hook_resid_post; layers count from 0; the last block is read before the final norm"


MODEL_FILE = re.compile(  # of a folder that save_pretrained, or gravlens, has written
    "(model|adapter_|config|generation_config|tokenizer|special_tokens|added_tokens|vocab|merges|chat_template"
    "|processor|preprocessor|checksums|gravlens)"
)
CHECKSUMS = "checksums.json"  # of a folder made by `once`; written last


@contextmanager
def writing(path: Path | str, kinds: type[Exception] = OSError) -> Generator[None]:
    """Raise an OSError inside the block (a full disk, no permission) as a GravlensError that names the path.

    `kinds=Exception` where another library writes: safetensors, torch and tokenizers have errors of their own.
    """
    try:
        yield
    except GravlensError:
        raise
    except kinds as error:
        given = f"{path} cannot be written ({getattr(error, 'strerror', None) or said(error)})."
        remedy = "free space there, or a place that can be written (GRAVLENS_CACHE names the cache's)."
        raise GravlensError(given, "Files that were complete before are kept.", remedy) from error


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file atomically: a killed process leaves the old file or none, never a partial one."""
    with writing(path, Exception):  # pathlib raises RuntimeError of a circle of links, ValueError of a null byte
        place = at_home(path)
        if place.is_char_device() or place.is_fifo():  # renaming over /dev/null would make it a regular file
            place.write_bytes(content)
            return path
        place = place.resolve()  # a link is followed: renaming over it would leave its target old
        if place.exists() and not place.is_file():  # a folder, a disk, a socket
            raise OSError(errno.EINVAL, "it is not a regular file")
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = _scratch(place)
        try:
            with scratch.open("xb") as file:
                if place.exists():  # a new file has the mode that the user's umask gives it
                    _keep_owner_and_mode(scratch, place.stat())
                file.write(content)
                _sync(file)
            os.replace(scratch, place)
        except BaseException:  # Ctrl-C too
            with suppress(OSError):  # the first error is the one to report
                scratch.unlink(missing_ok=True)
            raise
        _sync_folder(place.parent)
    return path


def _keep_owner_and_mode(path: Path, old: os.stat_result) -> None:
    if os.name == "posix" and (path.stat().st_uid, path.stat().st_gid) != (old.st_uid, old.st_gid):
        with suppress(PermissionError):  # only root may give a file away
            os.chown(path, old.st_uid, old.st_gid)
    os.chmod(path, old.st_mode & 0o777)


def _scratch(place: Path) -> Path:
    """Return a hidden name beside a file or folder: os.replace is atomic only within one file system."""
    return place.with_name(f".{place.name}.{secrets.token_hex(4)}")


def _sync(file: Any) -> None:
    """Have the disk hold what was written: after a power cut a renamed file could be empty."""
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not on every network file system
            os.fsync(handle)
    finally:
        os.close(handle)


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
    header, body = json.loads(content[8:start]), content[start:]
    header["__metadata__"]["sha256"] = _checksum(header, hashlib.sha256(body).hexdigest())
    return _header_bytes(header) + body


def _checksum(header: Mapping[str, Any], body: str) -> str:
    """Return the SHA-256 of a safetensors header without its own checksum, and of the digest of what follows it."""
    told = {name: value for name, value in header["__metadata__"].items() if name != "sha256"}
    return hashlib.sha256(json.dumps([{**header, "__metadata__": told}, body], sort_keys=True).encode()).hexdigest()


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
        with safe_open(path, framework="np") as file:  # it checks the header
            told = file.metadata() or {}
            _check_kind(path, kind, told)
            _verify(path)
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(told["meta"])  # noqa: SIM118
    except SafetensorError as error:
        raise damaged(path, error) from error
    except OSError as error:
        needed = f"A file of {kind} is needed."
        raise GravlensError(f"{path} cannot be read ({error}).", needed, "check the path.") from error


def _verify(path: Path) -> None:
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        rest = hashlib.file_digest(file, "sha256").hexdigest()  # from here on
    if header["__metadata__"].get("sha256") != _checksum(header, rest):
        raise damaged(path, ValueError("its content does not have the checksum in its header"))


def meta_of(content: bytes, path: Path | str, kind: str) -> dict[str, Any]:
    """Return the metadata of a file of `write_tensors`, given its first bytes including the whole header."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    told = header.get("__metadata__", {})
    _check_kind(path, kind, told)
    return json.loads(told["meta"])


def _check_kind(path: Path | str, kind: str, header: Mapping[str, str]) -> None:
    found, convention = header.get("gravlens", "tensors of another program"), header.get("convention", "unknown")
    if (found, convention) != (kind, CONVENTION):  # a file that counts layers otherwise would be off by one, silently
        given = f"{path} holds {found!r} by the convention {convention!r}."
        wanted = f"A gravlens file of {kind} by the convention {CONVENTION!r} is needed."
        raise GravlensError(given, wanted, f"write it again with this version's .save() of {kind}.")


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
        self._path, self._start = _scratch(folder / stem), len(header)
        self._file = self._path.open("x+b")
        try:
            self._file.write(header)
            if hasattr(os, "posix_fallocate"):  # reserves the space, so that a full disk is reported now
                os.posix_fallocate(self._file.fileno(), 0, self._start + self._bytes)
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
        _sync(self._file)
        self._file.seek(0)  # hashed from the file, not while writing: the pieces come in any order
        digest = hashlib.file_digest(self._file, "sha256").hexdigest()
        path = self._path.with_name(f"{self._stem}.{digest}.safetensors")
        os.replace(self._path, path)
        _sync_folder(path.parent)
        return path


def map_tensor(path: Path, name: str) -> np.ndarray:
    """Memory-map an fp32 tensor of a file of `write_tensors`, read-only."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    # By hand: safetensors reads whole tensors, and this one may be larger than the memory.
    return np.memmap(path, "<f4", "r", 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))


def once(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder of a cache, unless it is there and whole; one that was damaged is moved aside and made again."""
    if folder.is_dir():
        if not (found := _damage(folder)):
            return folder
        aside = _scratch(folder)
        warnings.warn(f"{folder} is damaged ({found}): it is made again, and kept as {aside.name}.", stacklevel=2)
        with writing(folder):
            os.replace(folder, aside)

    return _made(folder, lambda scratch: (make(scratch), seal(scratch)))


def seal(folder: Path) -> Path:
    """Write the list of checksums by which `once` and `is_whole` know a folder again."""
    return write_json(folder / CHECKSUMS, checksums(folder))


def replaced(folder: Path, make: Callable[[Path], object]) -> Path:
    """Make a folder, in place of an existing one, which stays on any error; other files in it are kept."""
    return _made(folder, make, replace=True)


def _made(folder: Path, make: Callable[[Path], object], *, replace: bool = False) -> Path:
    """Create a folder atomically: `make` fills it under a temporary name."""
    given, folder = folder, at_home(folder).resolve()  # a link stays one
    scratch, before = _scratch(folder), _scratch(folder)
    with writing(folder):
        scratch.mkdir(parents=True)
    try:
        make(scratch)
        with writing(folder):
            sync_files(scratch)
            if replace and folder.exists():  # os.replace needs an empty target
                os.replace(folder, before)
            try:
                os.replace(scratch, folder)
            except OSError:
                if replace or not folder.is_dir():  # another process may have created it first
                    raise
            _bring_over(before, folder)
            _sync_folder(folder.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if before.exists() and not folder.exists():  # Ctrl-C, or an error of the second renaming
            os.replace(before, folder)
        shutil.rmtree(before, ignore_errors=True)
    return given


def _bring_over(before: Path, folder: Path) -> None:
    """Move what is not a model's own file (notes, results of evaluations) from an old folder into its successor."""
    for path in _files_in(before):
        kept = folder / path.relative_to(before)
        # A model's file that was not written again would be read beside the new ones.
        if not (MODEL_FILE.match(path.name) or os.path.lexists(kept)):
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, kept)


def is_whole(folder: Path) -> bool:
    """Whether a folder of `once` is there, with the content that it was made with."""
    return folder.is_dir() and not _damage(folder)


def _files_in(folder: Path) -> list[Path]:
    # What a link leads to may be as large as a model, and is not the folder's.
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def sync_files(folder: Path) -> None:
    """Have the disk hold all files of a folder."""
    for path in _files_in(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a folder, but for the list itself and hidden files (a lock, .DS_Store)."""
    found: dict[str, str] = {}
    for path in _files_in(folder):
        name = path.relative_to(folder)
        if name.name == CHECKSUMS or any(part.startswith(".") for part in name.parts):
            continue
        found[name.as_posix()] = sha256_of(path)
    return found


def _damage(folder: Path) -> str:
    """Return what is wrong with a folder of `once`, or ""."""
    try:
        listed, found = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")), checksums(folder)
        wrong = sorted(name for name, checksum in listed.items() if found.get(name) != checksum)
    except (OSError, ValueError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read, {type(error).__name__}"
    return f"{wrong[0]} does not have its checksum" if wrong else ""


def damaged(path: Path | str, error: Exception) -> GravlensError:
    """Return the error for a safetensors file that cannot be read."""
    given, remedy = f"{path} is corrupt or truncated ({error}).", "copy or save it again; nothing was changed."
    return GravlensError(given, "A complete safetensors file is needed.", remedy)
