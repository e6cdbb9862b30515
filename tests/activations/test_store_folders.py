"""Nothing outside a store's own folders is ever removed: stores among random trees of other files."""

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from histories import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from gravlens.activations.positions import Query
from gravlens.activations.store import StateFolder, list_store, mark_store, prune_store, verify_store

HEX = st.text("0123456789abcdef", min_size=1, max_size=3).map(lambda text: (text * 64)[:32])
# Names that are nearly a store's own, and what lies in the folder of an experiment.
PARTS = st.one_of(
    st.sampled_from([
        *("states", "views", "digests", "corrupt", "checkpoints", ".git", "model.safetensors", ".env", "x.json"),
        *("checkpoint-5", ".model.safetensors.tmp", "adapter_model.safetensors", ".resume", "config"),
    ]),
    HEX,
    HEX.map(lambda name: f".{name}"),
    HEX.map(lambda name: f"{name}.safetensors"),
    HEX.map(lambda name: f"{name[:16]}.{name[:16]}.safetensors"),
    HEX.map(lambda name: f"{name}.json"),
)  # fmt: skip
TREES = st.lists(st.tuples(st.lists(PARTS, min_size=1, max_size=4), st.binary(max_size=8)), max_size=25)


def grow(folder: Path, tree: list[tuple[list[str], bytes]]) -> dict[Path, bytes]:
    """Old files (and links to files elsewhere) under these names, as far as no file is in the way."""
    made: dict[Path, bytes] = {}
    for number, (parts, content) in enumerate(tree):
        path = folder.joinpath(*parts)
        if path.exists() or any(parent.is_file() for parent in path.parents):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 5 == 4 and made:
            path.symlink_to(next(iter(made)))
        else:
            path.write_bytes(content)
            os.utime(path, (0, 0))
        made[path] = path.read_bytes()
    return made


def fill(folder: Path) -> list[Path]:
    """A store with a whole, a corrupt and a half-written file."""
    states, rng = StateFolder(folder / "states" / ("5" * 32)), np.random.default_rng(0)
    for token in (1, 2):
        values = rng.normal(size=(1, 1, 4)).astype(np.float32)
        states.put(values, queries=[Query((token,), ((0,),))], layers=[0], checkpoint="here")
    first, second = sorted(states.folder.iterdir())
    second.write_bytes(second.read_bytes()[:-1])
    scratch = states.folder / f".{first.name}.{'0' * 8}"
    scratch.write_bytes(b"half")
    os.utime(scratch, (0, 0))
    return [first, second, scratch]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(tree=TREES, unused=st.sampled_from([None, 0.0, 1.0]))
def test_only_what_a_store_wrote_is_removed(
    tmp_path_factory: pytest.TempPathFactory, tree: list[tuple[list[str], bytes]], unused: float | None
) -> None:
    folder = tmp_path_factory.mktemp("tree")
    others = grow(folder, tree)
    if any(path.is_file() for path in (folder / "states", folder / "states" / ("5" * 32), folder / "corrupt")):
        return  # no store can be made there
    mark_store(folder)
    own = fill(folder)
    verify_store(folder)
    pruned = prune_store(folder, unused_days=unused)
    list_store(folder)
    assert set(pruned) <= set(own) and {own[1], own[2]} <= set(pruned), "the positive control: its own files are"
    assert {path: path.read_bytes() for path in others} == others
    shutil.rmtree(folder)


def test_nothing_is_removed_where_a_link_leads_out_of_a_store(tmp_path: Path) -> None:
    fill(tmp_path / "other")
    shutil.copytree(tmp_path / "other" / "states" / ("5" * 32), tmp_path / "other" / "views")
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("states", "views", "corrupt"):
        (tmp_path / "store").mkdir(exist_ok=True)
        (tmp_path / "store" / name).symlink_to(tmp_path / "other" / ("states" if name == "states" else "views"))
    mark_store(tmp_path / "store")
    assert prune_store(tmp_path / "store", unused_days=0) == []
    assert before <= {*tmp_path.rglob("*")}


@pytest.mark.parametrize("content", [b"", b"\xff" * 9, b"\x04" + bytes(7) + b"null"])
def test_a_file_of_the_right_checksum_and_no_tensors_is_corrupt(tmp_path: Path, content: bytes) -> None:
    fill(tmp_path)
    mark_store(tmp_path)
    path = tmp_path / "states" / ("5" * 32) / f"{'a' * 32}.{hashlib.sha256(content).hexdigest()}.safetensors"
    path.write_bytes(content)
    assert verify_store(tmp_path)[path] == "corrupt"


@pytest.mark.parametrize("name", ["loop", "a\0b", "a" * 300])
def test_a_store_that_cannot_be_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with refused("cannot be written"):
        mark_store(tmp_path / name)


def test_a_folder_that_cannot_be_listed_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    mark_store(tmp_path)

    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "glob", denied)
    for listed in (list_store, verify_store, prune_store):
        with refused("cannot be read (Permission denied)"):
            listed(tmp_path)
