"""A folder of residual states that is asked by content: what is there is never computed again, what is damaged is.

    states/<fingerprint of a checkpoint>/<block>.<header>.<sha256>.safetensors    rows of some prompts at some layers
    views/<question>.<sha256>.safetensors                                         one whole answer, memory-mapped
    digests/<files>.json                                                 digests of weights by their files' marks

A file is written under another name and then renamed, and its name holds the SHA-256 of what is in it, that of a header
apart, since headers are believed before all is read. So a kill leaves whole files and scratch, two processes write the
same, and no damage goes unseen.
"""

import hashlib
import json
import os
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from safetensors.numpy import load

from gravlens.activations.positions import Query
from gravlens.core.errors import GravlensError
from gravlens.core.files import TensorWriter, map_tensor, meta_of, tensor_bytes, write_atomically

KIND = "states"


def query_key(query: Query) -> str:
    """A prompt's tokens and read positions, in 128 bits."""
    return hashlib.sha256(json.dumps([query.ids, query.reads]).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Part:
    """One file of states.

    Attributes:
        path: where it lies.
        queries: keys of its prompts, in the order of its rows.
        rows: how many rows each has.
        layers: which layers it holds.
        checkpoint: source of the checkpoint that first wrote it.
    """

    path: Path
    queries: tuple[str, ...]
    rows: tuple[int, ...]
    layers: tuple[int, ...]
    checkpoint: str


@dataclass(frozen=True)
class Shelf:
    """The folder with the states of one checkpoint, read in one way."""

    folder: Path

    def parts(self) -> list[Part]:
        """The files that are there, by their headers; one without a readable header is taken away and named."""
        return [part for path in sorted(self.folder.glob("*.safetensors")) if (part := part_of(path))]

    def missing(self, queries: Sequence[str], layers: Sequence[int]) -> list[tuple[int, ...]]:
        """For each prompt the layers that no file holds."""
        held: dict[str, set[int]] = {}
        for part in self.parts():
            for query in part.queries:
                held.setdefault(query, set()).update(part.layers)
        return [tuple(layer for layer in layers if layer not in held.get(query, ())) for query in queries]

    def put(
        self,
        states: Float[np.ndarray, "row layer d_model"],
        *,
        queries: Sequence[Query],
        layers: Sequence[int],
        checkpoint: str,
    ) -> None:
        """Write one file."""
        keys, rows = [query_key(query) for query in queries], [len(query.reads) for query in queries]
        block = hashlib.sha256(json.dumps([keys, list(layers)]).encode()).hexdigest()[:16]
        meta = {"queries": keys, "rows": rows, "layers": list(layers), "checkpoint": checkpoint}
        content = tensor_bytes(KIND, {"states": states}, meta)
        name = f"{block}.{_header_digest(content)}.{hashlib.sha256(content).hexdigest()}.safetensors"
        with room_on_disk(self.folder):
            write_atomically(self.folder / name, content)

    def rows(
        self, queries: Sequence[str], layers: Sequence[int]
    ) -> Iterator[tuple[int, tuple[int, ...], Float[np.ndarray, "row layer d_model"]]]:
        """(number of the prompt, layers, its rows at these), each once, file by file: one file at a time is in memory.

        A file whose content is not what its name says is taken away, and what it held does not come.
        """
        numbers: dict[str, list[int]] = {}
        for number, query in enumerate(queries):
            numbers.setdefault(query, []).append(number)
        left = {query: set(layers) for query in numbers}
        for part in self.parts():
            if not any(left.get(query, set()) & set(part.layers) for query in part.queries):
                continue
            if (content := whole_content(part.path)) is None:
                continue
            states = load(content)["states"]
            ends = np.cumsum(part.rows).tolist()
            for query, end, count in zip(part.queries, ends, part.rows, strict=True):
                fresh = tuple(layer for layer in part.layers if layer in left.get(query, ()))
                if fresh:
                    left[query] -= set(fresh)
                    columns = [part.layers.index(layer) for layer in fresh]
                    for number in numbers[query]:
                        yield number, fresh, states[end - count : end, columns]


# --- damage ---------------------------------------------------------------------------------------------------------
def part_of(path: Path) -> Part | None:
    """What a file says of itself; where it cannot be read it is taken away and named."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
            start += file.read(min(int.from_bytes(start, "little"), path.stat().st_size))
        if _header_digest(start) == path.name.split(".")[1]:
            meta = meta_of(start, path, KIND)
            fields = {key: tuple(meta[key]) for key in ("queries", "rows", "layers")}
            return Part(path, **fields, checkpoint=str(meta["checkpoint"]))
    except FileNotFoundError:
        return None  # another process took it away
    except (OSError, IndexError):
        pass
    return _taken_away(path)


def _header_digest(content: bytes) -> str:
    return hashlib.sha256(content[: 8 + int.from_bytes(content[:8], "little")]).hexdigest()[:16]


def whole_content(path: Path) -> bytes | None:
    """What a file holds, if that is what its name says; where it is not, the file is taken away and named."""
    try:
        content = path.read_bytes()
    except OSError:  # another process took it away
        return None
    return content if _kept(path, hashlib.sha256(content).hexdigest()) else None


def is_whole(path: Path) -> bool:
    """Whether a file's content is what its name says; where it is not, the file is taken away and named."""
    found = _digest(path)
    return found is not None and _kept(path, found)


def _kept(path: Path, found: str) -> bool:
    """Whether the digest that was found is the one in the name; a file with another is taken away and named."""
    if found != _promised(path):
        _taken_away(path)
        return False
    with suppress(OSError):
        os.utime(path)  # when it was last asked for, for pruning
    return True


def _promised(path: Path) -> str:
    return path.name.split(".")[-2]


def _digest(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # another process took it away
        return None


def _taken_away(path: Path) -> None:
    warnings.warn(f"{path} is damaged: it is taken away, and what it held is computed again.", stacklevel=3)
    path.unlink(missing_ok=True)


@contextmanager
def room_on_disk(folder: Path) -> Generator[None]:
    """A full disk, or a folder that cannot be written, as one clear error."""
    try:
        yield
    except OSError as error:
        raise GravlensError(
            f"The store {folder} cannot be written ({error.strerror or error}).",
            "States are written as they are computed; what is there is whole and stays.",
            "room on that disk (gravlens store prune), or another store; then the same call goes on where it was.",
        ) from error


# --- whole answers --------------------------------------------------------------------------------------------------
def find_view(folder: Path, question: str) -> np.ndarray | None:
    """A whole answer that was put together before, memory-mapped."""
    for path in sorted((folder / "views").glob(f"{question[:32]}.*.safetensors")):
        if is_whole(path):
            return map_tensor(path, "values")
    return None


@contextmanager
def view_writer(folder: Path, question: str, shape: tuple[int, ...]) -> Generator[TensorWriter]:
    """A whole answer that is being put together; nothing is left of one that is not finished."""
    with room_on_disk(folder), TensorWriter(folder / "views", question[:32], "view", "values", shape, {}) as view:
        yield view


# --- looking after a store ------------------------------------------------------------------------------------------
def check_store(folder: Path) -> Path:
    """Raise where a folder is no store."""
    if not any((folder / name).is_dir() for name in ("states", "views")):
        raise GravlensError(
            f"{folder} is no store of states.",
            "A store has a folder states/, once something was read into it.",
            'the folder that was given as cache_residuals(..., store="…").',
        )
    return folder


def list_store(folder: Path) -> pd.DataFrame:
    """What a store holds: a row for each checkpoint that was read in one way, and one for the whole answers.

    Returns:
        `states` (the folder's name), `checkpoint` (its source when it was first read), `prompts`, `layers`, `files`,
        `mib`, `used` (when a file was last written or asked for).
    """
    rows = [_row(Shelf(shelf)) for shelf in sorted((check_store(folder) / "states").glob("*")) if any(shelf.iterdir())]
    views = list((folder / "views").glob("*.safetensors"))
    if views:
        rows.append({"states": "views", "checkpoint": "whole answers, made again where they lack", **_sizes(views)})
    return pd.DataFrame(rows, columns=["states", "checkpoint", "prompts", "layers", "files", "mib", "used"])


def _row(shelf: Shelf) -> dict[str, Any]:
    parts = shelf.parts()
    return {
        "states": shelf.folder.name,
        "checkpoint": parts[0].checkpoint if parts else "",
        "prompts": len({query for part in parts for query in part.queries}),
        "layers": len({layer for part in parts for layer in part.layers}),
        **_sizes([part.path for part in parts]),
    }


def _sizes(paths: Sequence[Path]) -> dict[str, Any]:
    stats = [path.stat() for path in paths]
    used = pd.Timestamp(max((stat.st_mtime for stat in stats), default=0), unit="s").floor("s")
    return {"files": len(stats), "mib": sum(stat.st_size for stat in stats) / 2**20, "used": used}


def damaged_files(folder: Path) -> list[Path]:
    """The files whose content is not what their name says; nothing is taken away."""
    paths = sorted(check_store(folder).rglob("*.safetensors"))
    return [path for path in paths if _digest(path) != _promised(path)]


def prune_store(folder: Path, *, unused_days: float | None = None, dry: bool = False) -> list[Path]:
    """Take away what is not needed: damaged files, scratch of killed runs (an hour old), whole answers.

    Args:
        folder: the store.
        unused_days: states too that were not written or asked for since then.
        dry: name them only.
    """
    now, old = time.time(), [] if unused_days is None else (folder / "states").rglob("*.safetensors")
    found = {*damaged_files(folder), *(folder / "views").glob("*.safetensors")}
    found |= {path for path in folder.rglob(".*") if path.is_file() and path.stat().st_mtime < now - 3600}
    found |= {path for path in old if path.stat().st_mtime < now - 86400 * (unused_days or 0)}
    for path in () if dry else found:
        path.unlink(missing_ok=True)
    return sorted(found)
