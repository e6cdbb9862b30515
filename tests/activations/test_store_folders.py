"""Nothing outside a store's own folders is ever removed: stores among random trees of other files."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
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
