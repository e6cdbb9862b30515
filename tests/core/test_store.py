"""Files are whole or absent, and say what they are."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from histories import refused
from safetensors.numpy import save_file

from gravlens.core import files as store
from gravlens.core.files import CONVENTION, once, read_tensors, write_atomically, write_json, write_tensors

ARRAYS = {
    "a": np.array([[0.1, np.nan], [-np.inf, 2.0**-149]], dtype=np.float32),
    "b": np.arange(6, dtype=np.int64).reshape(2, 3).T,  # not contiguous
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("when", ["replace", "fdopen"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, when: str
) -> None:
    write_atomically(tmp_path / "old", b"old")

    def interrupt(*_: Any) -> None:
        raise error

    monkeypatch.setattr(store.os, when, interrupt)
    for name in ("old", "new"):
        with pytest.raises(error):
            write_atomically(tmp_path / name, b"something longer")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_bytes() == b"old"


def test_a_file_is_replaced_in_one_step_and_readable_by_all(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        assert write_atomically(tmp_path / "deep/er/file", content).read_bytes() == content
    assert os.stat(tmp_path / "deep/er/file").st_mode & 0o777 == 0o644
    assert len(list((tmp_path / "deep/er").iterdir())) == 1


def test_links_are_followed_modes_are_kept_and_pipes_stay_pipes(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o600)
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    mask = os.umask(0o027)
    try:
        write_atomically(tmp_path / "fresh", b"new")
    finally:
        os.umask(mask)
    assert (tmp_path / "fresh").stat().st_mode & 0o777 == 0o640
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(tmp_path / "pipe", b"read by another program")
    assert os.read(reader, 100) == b"read by another program" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_json_has_null_for_what_is_no_number(tmp_path: Path) -> None:
    content = {"a": np.float64("nan"), "b": [float("inf"), np.int64(3), (1.5, None)], 4: {"c": np.bool_(True)}}
    text = write_json(tmp_path / "x.json", content).read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"a": None, "b": [None, 3, [1.5, None]], "4": {"c": True}}


def test_tensors_come_back_exactly(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "t.safetensors", "residuals", ARRAYS, {"name": "ü", "value": 0.1, "nan": np.nan})
    arrays, meta = read_tensors(path, "residuals")
    assert arrays.keys() == ARRAYS.keys() and meta == {"name": "ü", "value": 0.1, "nan": None}
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype and arrays[name].shape == array.shape
        assert arrays[name].tobytes() == np.ascontiguousarray(array).tobytes()


def test_pitfall_5_another_kind_or_convention_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tensors(tmp_path / "t.safetensors", "residuals", ARRAYS, {})
    with refused("t.safetensors", "residuals"):
        read_tensors(path, "directions")
    with monkeypatch.context() as patch:
        patch.setattr(store, "CONVENTION", CONVENTION.replace("from 0", "from 1"))
        with refused("t.safetensors", "from 0"):
            read_tensors(path, "residuals")
    assert read_tensors(path, "residuals")[0].keys() == ARRAYS.keys()


def test_tensors_of_another_program_are_refused(tmp_path: Path) -> None:
    save_file({"a": np.zeros(3)}, tmp_path / "foreign.safetensors")
    with refused("foreign.safetensors", "another program"):
        read_tensors(tmp_path / "foreign.safetensors", "residuals")


@pytest.mark.parametrize("length", [0, 4, 60, -1])
def test_a_truncated_file_is_named(tmp_path: Path, length: int) -> None:
    path = write_tensors(tmp_path / "t.safetensors", "residuals", ARRAYS, {})
    path.write_bytes(path.read_bytes()[:length])
    with refused("t.safetensors", "corrupt"):
        read_tensors(path, "residuals")


def test_a_file_that_is_not_there_or_no_file_is_named(tmp_path: Path) -> None:
    with refused("nowhere.safetensors"):
        read_tensors(tmp_path / "nowhere.safetensors", "residuals")
    with refused(tmp_path.name):
        read_tensors(tmp_path, "residuals")


# -- folders that are made once ----------------------------------------------------------------------------------------


def test_a_folder_is_made_once(tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "file").write_text("whole")

    for _ in range(2):
        assert (once(tmp_path / "deep/folder", make) / "file").read_text() == "whole"
    assert len(made) == 1 and [path.name for path in (tmp_path / "deep").iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_making_leaves_nothing_and_can_be_done_again(tmp_path: Path, error: Any) -> None:
    def fail(folder: Path) -> None:
        (folder / "file").write_text("half")
        raise error

    with pytest.raises(error):
        once(tmp_path / "folder", fail)
    assert list(tmp_path.iterdir()) == []
    assert once(tmp_path / "folder", lambda folder: (folder / "file").touch()).is_dir()


def test_where_another_process_was_first_its_folder_stays(tmp_path: Path) -> None:
    def overtaken(folder: Path) -> None:
        (folder / "file").write_text("second")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder/file").write_text("first")

    assert (once(tmp_path / "folder", overtaken) / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
