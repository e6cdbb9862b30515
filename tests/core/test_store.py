"""Files are whole or absent, and say what they are."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from histories import refused
from safetensors.numpy import save_file

from gravlens.core import files as store
from gravlens.core.errors import GravlensError
from gravlens.core.files import (
    CHECKSUMS,
    CONVENTION,
    is_whole,
    once,
    read_tensors,
    replaced,
    write_atomically,
    write_json,
    write_tensors,
)

ARRAYS = {
    "a": np.array([[0.1, np.nan], [-np.inf, 2.0**-149]], dtype=np.float32),
    "b": np.arange(6, dtype=np.int64).reshape(2, 3).T,  # not contiguous
}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("when", ["replace", "fsync"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Any, when: str
) -> None:
    write_atomically(tmp_path / "old", b"old")

    def interrupt(*_: Any) -> None:
        raise error

    monkeypatch.setattr(store.os, when, interrupt)
    for name in ("old", "new"):
        with pytest.raises(GravlensError if error is OSError else error, match=name if error is OSError else None):
            write_atomically(tmp_path / name, b"something longer")
    assert [path.name for path in tmp_path.iterdir()] == ["old"] and (tmp_path / "old").read_bytes() == b"old"


def test_a_file_is_replaced_in_one_step_and_readable_by_all(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        assert write_atomically(tmp_path / "deep/er/file", content).read_bytes() == content
    (tmp_path / "plain").touch()
    assert os.stat(tmp_path / "deep/er/file").st_mode == os.stat(tmp_path / "plain").st_mode
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


def test_a_damaged_folder_is_moved_aside_and_made_again(tmp_path: Path) -> None:
    """Cut, empty, altered and missing files, and a damaged list of them; another program's file is no damage."""

    def make(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("whole")
        (folder / "link").symlink_to(tmp_path / "far")  # a user's weights: theirs to change

    (tmp_path / "far").write_text("1")
    harms: list[Any] = [
        lambda folder: (folder / "deep/file").write_text("whol"),
        lambda folder: (folder / "deep/file").write_text(""),
        lambda folder: (folder / "deep/file").unlink(),
        lambda folder: (folder / CHECKSUMS).write_text(""),
        lambda folder: (folder / CHECKSUMS).write_text("[]"),
        lambda folder: (folder / CHECKSUMS).unlink(),
    ]
    for number, harm in enumerate(harms):
        folder = once(tmp_path / str(number) / "part", make)
        (tmp_path / "far").write_text("2")
        (folder / ".DS_Store").touch()
        assert is_whole(folder) and once(folder, pytest.fail) == folder
        harm(folder)
        harmed = {path.name for path in folder.rglob("*")}
        assert not is_whole(folder)
        with pytest.warns(UserWarning, match="part is damaged.*made again"):
            once(folder, make)
        assert is_whole(folder) and (folder / "deep/file").read_text() == "whole"
        (aside,) = (path for path in folder.parent.iterdir() if path != folder)
        assert {path.name for path in aside.rglob("*")} == harmed, "nothing is deleted"


def test_an_error_while_a_folder_is_replaced_brings_the_old_one_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, put = replaced(tmp_path / "folder", lambda folder: (folder / "file").write_text("old")), os.replace

    def fail_once(source: Path, target: Path) -> None:
        if Path(target) == old and "file" in os.listdir(source) and (Path(source) / "file").read_text() == "new":
            raise OSError(28, "No space left on device")
        put(source, target)

    monkeypatch.setattr(os, "replace", fail_once)
    with refused("folder cannot be written (No space left"):
        replaced(old, lambda folder: (folder / "file").write_text("new"))
    assert (old / "file").read_text() == "old" and list(tmp_path.iterdir()) == [old]


def test_no_flipped_bit_of_a_file_is_believed(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "t.safetensors", "residuals", {"a": np.ones((2, 3), np.float32)}, {"k": "1"})
    content = path.read_bytes()
    for at in range(len(content)):
        flipped = bytearray(content)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(GravlensError, match=r"t\.safetensors"):
            read_tensors(path, "residuals")
    path.write_bytes(content)
    assert read_tensors(path, "residuals")[1] == {"k": "1"}


def test_what_is_renamed_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a file that was renamed before its content was synced is empty."""
    events: list[str] = []
    sync, put = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), sync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"{a} -> {b}"), put(a, b)))
    write_atomically(tmp_path / "file", b"content")
    scratch, rename, folder = events
    assert rename == f"{scratch} -> {tmp_path / 'file'}" and folder == str(tmp_path)
    events.clear()
    once(tmp_path / "folder", lambda folder: (folder / "inside").write_text("x"))
    *inside, rename, folder = events[-4:]
    assert {Path(path).name for path in inside} == {"inside", CHECKSUMS}
    assert rename.endswith(str(tmp_path / "folder")) and folder == str(tmp_path)


def test_a_socket_stays_one_and_a_linked_folder_too(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with refused("socket cannot be written (it is not a regular file)"):
            write_atomically(tmp_path / "socket", b"x")
        assert (tmp_path / "socket").is_socket()
    (tmp_path / "real").mkdir()
    for link, target in (("link", "real"), ("dangling", "new")):
        (tmp_path / link).symlink_to(target)
        assert replaced(tmp_path / link, lambda folder: (folder / "file").write_text("x")) == tmp_path / link
        assert (tmp_path / link).is_symlink() and (tmp_path / target / "file").read_text() == "x"


def test_a_file_of_another_user_stays_theirs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    try:
        os.chown(tmp_path / "file", 12345, 12345)
    except PermissionError:
        pytest.skip("only root may give a file away")
    write_atomically(tmp_path / "file", b"new")
    stat = (tmp_path / "file").stat()
    assert (stat.st_uid, stat.st_gid) == (12345, 12345) and (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("target", ["file/below", "", "n" * 300])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, target: str) -> None:
    (tmp_path / "file").write_text("mine")
    with refused(str(tmp_path / target), "cannot be written"):
        write_atomically(tmp_path / target, b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_made_again_keeps_what_others_put_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    replaced(folder, lambda made: (made / "weights").write_text("old"))
    (folder / "notes").mkdir()
    (folder / "notes" / "eval.json").write_text("mine")
    replaced(folder, lambda made: (made / "weights").write_text("new"))
    assert (folder / "weights").read_text() == "new"
    assert (folder / "notes" / "eval.json").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


@pytest.mark.parametrize("name", ["loop", "a\0b", "a" * 300])
def test_a_path_that_cannot_be_is_one_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with refused("cannot be written"):
        write_atomically(tmp_path / name, b"x")


def test_a_pipe_named_by_the_system_is_written_to() -> None:
    reading, writing = os.pipe()
    write_atomically(Path(f"/dev/fd/{writing}"), b"x")
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pipe.read() == b"x"


def test_a_model_s_file_that_is_not_written_again_does_not_stay(tmp_path: Path) -> None:
    """It would be read beside the new ones; and an interrupted replacement brings the old folder back."""
    old = replaced(tmp_path / "a", lambda folder: [(folder / name).touch() for name in ("model.safetensors", "x.md")])
    replaced(old, lambda folder: (folder / "model-00001-of-00002.safetensors").touch())
    assert {path.name for path in old.iterdir()} == {"model-00001-of-00002.safetensors", "x.md"}
    assert list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("path", [3, None, b"file", ["file"]])
def test_what_is_no_path_is_named(path: Any) -> None:
    with pytest.raises(GravlensError, match="A path is needed"):
        write_tensors(path, "residuals", ARRAYS, {})
