"""Looking after a store, in Python and from the command line: what it holds, what is damaged, what may go."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from histories import refused
from typer.testing import CliRunner

from gravlens.activations.positions import Query
from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.activations.store import (
    StateFolder,
    list_store,
    map_verified,
    prune_store,
    query_key,
    verify_store,
)
from gravlens.cli import app
from gravlens.history.sequence import ModelSequence


@pytest.fixture
def store(tmp_path: Path) -> Path:
    read(tmp_path / "store")
    return tmp_path / "store"


def read(folder: Path) -> Residuals:
    seq = ModelSequence.from_models(
        witness=tiny.llama(0), anchor=tiny.llama(1), tokenizer=tiny.TOKENIZER, probes=tiny.PROMPTS
    )
    return cache_residuals(seq, layers=[0, 2], store=folder)


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["store", *map(str, words)], env={"COLUMNS": "200"})
    return result.exit_code, result.output


def states(store: Path) -> list[Path]:
    return sorted((store / "states").rglob("*.safetensors"))


def test_what_a_store_holds_is_listed(store: Path) -> None:
    table = list_store(store)
    assert list(table["prompts"][:2]) == [len(tiny.PROMPTS)] * 2 and list(table["layers"][:2]) == [2, 2]
    assert set(table["checkpoint"][:2]) == {"a LlamaForCausalLM in memory"} and table["states"][2] == "views"
    assert sum(table["files"]) == 3 and (table["mib"] > 0).all() and (table["used"].dt.year > 2000).all()
    code, text = run("list", store)
    assert code == 0 and "LlamaForC" in text and "views" in text
    code, text = run("list", store, "--json")
    assert code == 0 and [row["files"] for row in json.loads(text)] == [1, 1, 1]


def test_damage_is_named_and_nothing_is_taken_away(store: Path) -> None:
    assert verify_store(store) == {} and run("verify", store) == (0, "no corrupt files\n")
    path = states(store)[0]
    path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    assert verify_store(store) == {path: "corrupt"}
    code, text = run("verify", store)
    assert code == 1 and path.name in text.replace("\n", "") and path.exists()


def test_what_can_be_made_again_is_pruned(store: Path) -> None:
    wanted = read(store).values.copy()
    scratch, fresh = (states(store)[0].parent / f".{n * 32}.{n * 8}" for n in "ab")
    for path in (scratch, fresh):
        path.write_bytes(b"half")
    os.utime(scratch, (0, 0))
    views = sorted((store / "views").glob("*.safetensors"))
    assert prune_store(store, dry=True) == sorted([scratch, *views]) and scratch.exists()
    code, text = run("prune", store)
    assert code == 0 and "2 files deleted" in text
    assert not scratch.exists() and fresh.exists() and len(states(store)) == 2
    assert np.array_equal(read(store).values, wanted)


def test_a_file_that_cannot_be_opened_is_not_taken_for_damage(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, real = states(store), Path.open

    def too_many(path: Path, *given: Any, **named: Any) -> Any:
        if path in whole:
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, *given, **named)

    monkeypatch.setattr(Path, "open", too_many)
    with pytest.warns(UserWarning, match="Too many open files"):
        assert StateFolder(whole[0].parent).files() == []
    monkeypatch.undo()
    assert states(store) == whole and verify_store(store) == {}


def test_what_a_store_did_not_write_is_left(store: Path) -> None:
    """A store in the experiment's own folder (store=".") has checkpoints, .git and .env beside it."""
    others = ["model.safetensors", "ft/model.safetensors", "states/mine.safetensors", "views/mine.safetensors"]
    for name in (others := [*others, ".env", ".git/config", "ft/.notes"]):
        path = store / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"not of this store")
        os.utime(path, (0, 0))
    broken = states(store)[0]
    broken.write_bytes(broken.read_bytes()[:-1])
    assert verify_store(store) == {broken: "corrupt"}
    assert broken in prune_store(store, unused_days=0.5) and not broken.exists()
    assert all((store / name).exists() for name in others)


def test_states_that_were_not_asked_for_in_a_while_are_pruned(store: Path) -> None:
    old, used = states(store)
    os.utime(old, (0, 0))
    prune_store(store, unused_days=30)
    assert states(store) == [used]
    os.utime(used, (0, 0))
    read(store)  # it was asked for just now
    prune_store(store, unused_days=30)
    assert used in states(store)


def test_a_folder_that_is_no_store_is_refused_and_nothing_in_it_touched(tmp_path: Path) -> None:
    (tmp_path / "notes.safetensors").write_bytes(b"mine")
    for work in (list_store, verify_store):
        with refused("not an activation cache"):
            work(tmp_path)
    assert run("prune", tmp_path)[0] == 2 and (tmp_path / "notes.safetensors").exists()


def test_a_prompt_is_known_by_its_tokens_and_where_it_is_read() -> None:
    queries = [Query((1, 2), ((1,),)), Query((1, 2), ((0,),)), Query((1, 2), ((0, 1),)), Query((1, 2), ((0,), (1,)))]
    assert len({query_key(query) for query in [*queries, Query((12,), ((0,),))]}) == 5


def test_rows_come_back_as_they_were_put(tmp_path: Path) -> None:
    shelf, rng = StateFolder(tmp_path / "states" / "0"), np.random.default_rng(0)
    queries = [Query((1, 2), ((0,), (1,))), Query((3,), ((0,),))]
    put = rng.normal(size=(3, 2, 4)).astype(np.float32)
    shelf.put(put, queries=queries, layers=[1, 5], checkpoint="here")
    keys = [query_key(query) for query in reversed(queries)]
    assert shelf.missing(keys, [1, 3, 5]) == [(3,), (3,)]
    found = {number: (layers, rows) for number, layers, rows in shelf.rows(keys, [1, 5])}
    assert found[0][0] == found[1][0] == (1, 5)
    assert np.array_equal(found[0][1], put[2:]) and np.array_equal(found[1][1], put[:2])
    assert [(n, layers) for n, layers, _ in shelf.rows(keys[:1], [5])] == [(0, (5,))]


def test_no_flipped_bit_of_a_header_is_believed(tmp_path: Path) -> None:
    """`missing` reads headers alone: what a file seems to hold there is what it holds."""
    shelf, query = StateFolder(tmp_path / "states" / "0"), Query((1, 2), ((1,),))
    shelf.put(np.ones((1, 2, 4), np.float32), queries=[query], layers=[1, 5], checkpoint="here")
    (path,) = shelf.folder.iterdir()
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    for at in range(header):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.warns(UserWarning, match="corrupt"):
            assert shelf.missing([query_key(query)], [1, 5]) == [(1, 5)]
        assert not path.exists() and (tmp_path / "corrupt" / path.name).read_bytes() == flipped
    path.write_bytes(content)
    assert shelf.missing([query_key(query)], [1, 5]) == [()]


def test_what_cannot_be_read_is_reported_and_stays(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's file, or too many open files: neither damage, nor states that are served."""
    locked, real = states(store)[0], Path.open

    def refuses(path: Path, *given: Any, **named: Any) -> Any:
        if path == locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *given, **named)

    monkeypatch.setattr(Path, "open", refuses)
    assert verify_store(store) == {locked: "cannot be read (Permission denied)"}
    code, text = run("verify", store, "--json")
    assert code == 1 and json.loads(text) == {"corrupt": [], "unreadable": [str(locked)]}
    assert locked not in prune_store(store) and locked.exists()
    with refused(f"{locked} cannot be read (Permission denied)"):
        map_verified(locked, "states")


def test_damage_found_while_reading_is_moved_aside_and_pruned_later(store: Path) -> None:
    wanted, broken = read(store).values.copy(), states(store)[0]
    content = broken.read_bytes()[:-1] + bytes([broken.read_bytes()[-1] ^ 1])
    broken.write_bytes(content)
    prune_store(store, dry=True)
    assert broken.exists()
    for view in (store / "views").iterdir():
        view.unlink()
    with pytest.warns(UserWarning, match="moved to corrupt/"):
        assert np.array_equal(read(store).values, wanted)
    aside = store / "corrupt" / broken.name
    assert aside.read_bytes() == content and verify_store(store) == {}
    assert aside in prune_store(store) and not aside.exists()


def test_a_folder_of_states_without_the_marker_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "states" / ("0" * 32)).mkdir(parents=True)
    mine = tmp_path / "states" / ("0" * 32) / f"{'0' * 16}.{'1' * 16}.{'2' * 64}.safetensors"
    mine.write_bytes(b"by another program, by chance of this name")
    with refused("not an activation cache"):
        prune_store(tmp_path)
    assert mine.exists()


def test_one_file_that_cannot_be_deleted_does_not_keep_the_others(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    locked, real = states(store)[0], Path.unlink

    def refuses(path: Path, missing_ok: bool = False) -> None:
        if path == locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        real(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", refuses)
    with refused(f"{locked} cannot be written (Permission denied)"):
        prune_store(store, unused_days=0)
    assert states(store) == [locked] and not list((store / "views").iterdir())
