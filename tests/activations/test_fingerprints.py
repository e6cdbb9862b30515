"""What a checkpoint is, in one digest: weights, configuration, how it is read; and the memo of digests."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from gravlens.activations import fingerprint as fingerprints
from gravlens.activations.fingerprint import fingerprint
from gravlens.history import sources
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import resolve
from gravlens.history.weight_files import contents

HOW = ("huggingface", "float32")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.llama(0).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(fingerprints, "SETTLED", 0)
    return tmp_path / "memo"


def digest(folder: Path, memo: Path | None = None, how: Any = HOW) -> str:
    return fingerprint(resolve(Checkpoint("x", folder), weights=False), how, memo)


def add(folder: Path, amount: float) -> None:
    """Change one weight, and leave size and time of the file as they were."""
    path = folder / "model.safetensors"
    stat, weights = path.stat(), load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += amount
    save_file(weights, path, {"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_it_is_what_the_states_depend_on_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    first = digest(folder)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert digest(tmp_path / "elsewhere") == first
    assert len({first, digest(folder, how=("bridge", "float32")), digest(folder, how=("huggingface", "bf16"))}) == 3
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "0"}))
    assert digest(folder) == first
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert digest(folder) != first
    add(tmp_path / "elsewhere", 1e-3)
    assert digest(tmp_path / "elsewhere") != first


def test_a_memo_spares_the_weights_and_is_not_believed_where_they_changed(
    folder: Path, memo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, read = digest(folder, memo), []
    monkeypatch.setattr(sources, "contents", lambda named: read.append(1) or contents(named))
    assert digest(folder, memo) == first and read == []
    add(folder, 1e-3)
    assert digest(folder, memo) == digest(folder) != first and len(read) == 2


@pytest.mark.parametrize("at", range(0, 400, 37))
def test_a_memo_with_a_flipped_bit_is_not_believed(folder: Path, memo: Path, at: int) -> None:
    first = digest(folder, memo)
    (path,) = memo.iterdir()
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= 1
    path.write_bytes(content)
    assert digest(folder, memo) == first


def test_what_was_written_a_moment_ago_is_not_remembered(folder: Path, tmp_path: Path) -> None:
    digest(folder, tmp_path / "memo")
    assert not (tmp_path / "memo").exists()


def test_a_hub_s_revision_is_known_by_its_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also once its weights were evicted; two commits are two; the same path outside the cache is a folder."""
    home = tmp_path / "hub" / "models--owner--name" / "snapshots"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(folder, home / commit)
    alike = digest(home / ("a" * 40))
    assert alike == digest(home / ("b" * 40)) == digest(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    one, other = digest(home / ("a" * 40)), digest(home / ("b" * 40))
    assert len({alike, one, other}) == 3
    (home / ("a" * 40) / "model.safetensors").unlink()
    assert digest(home / ("a" * 40)) == one
