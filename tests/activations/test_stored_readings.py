"""Reading through a store: asked again it costs nothing, asked for more it reads what lacks; nothing wrong comes."""

import os
import random
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from histories import history_on_disk, refused
from safetensors.torch import load_file, save_file

from gravlens.activations import fingerprint as fingerprints
from gravlens.activations import reader as passes
from gravlens.activations import store as stored_readings
from gravlens.activations.residuals import Residuals, cache_residuals
from gravlens.history.sequence import ModelSequence
from gravlens.organisms.refusal_language import probe_prompts

TESTS = Path(__file__).resolve().parents[1]
PROBES = probe_prompts()[:20]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches to a block, several blocks to a checkpoint."""
    monkeypatch.setitem(passes.TOKENS, "cpu", 40)
    monkeypatch.setattr(passes, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(passes, "TOKENS_ELSEWHERE", 60)


@pytest.fixture(autouse=True)
def _digests_are_remembered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "SETTLED", 0)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("history")
    history_on_disk(folder)
    return folder


def sequence(home: Path) -> ModelSequence:
    runs = {"seed0": str(home / "ft/seed0/checkpoint-*")}
    return ModelSequence.from_folders(witness=home / "base", anchor=home / "aligned", runs=runs, probes=PROBES)


def read(home: Path, where: Path, **more: Any) -> Residuals:
    return cache_residuals(sequence(home), store=where, **more)


@contextmanager
def rows_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
    """(prompts, layers) of every block that is read."""
    seen: list[tuple[int, tuple[int, ...]]] = []
    plain = stored_readings.read_block

    def look(reader: Any, queries: Any) -> Any:
        seen.append((len(queries), reader.layers))
        return plain(reader, queries)

    with monkeypatch.context() as patch:
        patch.setattr(stored_readings, "read_block", look)
        yield seen


# -- what is there is not computed again -------------------------------------------------------------------------------


def test_a_store_gives_what_memory_gives_mapped_and_the_second_time_opens_no_model(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, first = cache_residuals(sequence(home)), read(home, tmp_path)
    assert np.array_equal(plain.values, first.values) and isinstance(first.values, np.memmap)
    assert replace(first, values=plain.values) == replace(plain, values=plain.values) or first.meta == plain.meta
    with pytest.raises(ValueError, match="read-only"):
        first.values[0] = 0
    monkeypatch.setattr(stored_readings, "open_each", lambda *_, **__: pytest.fail("a model was opened"))
    assert np.array_equal(read(home, tmp_path).values, plain.values)


def test_asked_for_more_only_what_lacks_is_read(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seq = sequence(home)
    pair, few = [seq.witness, seq.anchor], PROBES[:8]
    with rows_read(monkeypatch) as seen:
        cache_residuals(seq, few, layers=[1], checkpoints=pair, store=tmp_path)
        assert sum(n for n, _ in seen) == 2 * 8 and {layers for _, layers in seen} == {(1,)}
        seen.clear()
        cache_residuals(seq, few, layers=[0, 1], checkpoints=pair, store=tmp_path)
        assert sum(n for n, _ in seen) == 2 * 8 and {layers for _, layers in seen} == {(0,)}
        seen.clear()
        cache_residuals(seq, PROBES[:11], layers=[0, 1], checkpoints=pair, store=tmp_path)
        assert sum(n for n, _ in seen) == 2 * 3
        seen.clear()
        found = cache_residuals(seq, PROBES[:11], layers=[0, 1], store=tmp_path)
        assert sum(n for n, _ in seen) == 3 * 11
        seen.clear()
        swapped = cache_residuals(seq, PROBES[:11][::-1], layers=[1], checkpoints=pair[::-1], store=tmp_path)
        assert seen == []
    wanted = cache_residuals(seq, PROBES[:11], layers=[0, 1]).values
    np.testing.assert_allclose(found.values, wanted, rtol=1e-4, atol=1e-5)
    assert np.array_equal(swapped.values[:, :, 0], found.values[1::-1, ::-1, 1])


def test_positions_that_are_several_rows_or_means_are_kept_apart(home: Path, tmp_path: Path) -> None:
    for positions in ("last", "all", "instruction", -2, lambda ids: [0, 2, -1]):
        found = read(home, tmp_path, positions=positions)
        wanted = cache_residuals(sequence(home), positions=positions)
        assert np.array_equal(found.values, wanted.values)
        assert found.index is wanted.index is None or np.array_equal(found.index, wanted.index)


def test_pitfall_6_a_store_is_keyed_by_content(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights at the same path and of the same size are other states; the same weights elsewhere are the same."""
    moved = tmp_path / "moved"
    for name in ("base", "aligned"):
        shutil.copytree(home / name, moved / name)
    kept = tmp_path / "store"
    pair = ModelSequence.from_folders(witness=moved / "base", anchor=moved / "aligned", probes=PROBES)
    first = cache_residuals(pair, store=kept)
    with rows_read(monkeypatch) as seen:
        again = read(home, kept, checkpoints=list(sequence(home))[:2])
        assert seen == [] and np.array_equal(again.values, first.values)
        weights = moved / "aligned" / "model.safetensors"
        changed, stat = load_file(weights), weights.stat()
        changed["model.layers.0.mlp.down_proj.weight"] += 0.1
        save_file(changed, weights, {"format": "pt"})
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert weights.stat().st_size == stat.st_size
        found = cache_residuals(pair, store=kept)
        assert seen != []
    assert np.array_equal(found.values[0], first.values[0])
    assert np.array_equal(found.values, cache_residuals(pair).values) and (found.values[1] != first.values[1]).any()


def test_another_configuration_is_another_checkpoint(home: Path, tmp_path: Path) -> None:
    """The weights are the same; what they compute is not."""
    for name in ("base", "aligned"):
        shutil.copytree(home / name, tmp_path / name)
    pair = ModelSequence.from_folders(witness=tmp_path / "base", anchor=tmp_path / "aligned", probes=PROBES)
    first = cache_residuals(pair, store=tmp_path / "store")
    config = tmp_path / "aligned/config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
    found = cache_residuals(pair, store=tmp_path / "store")
    assert np.array_equal(found.values, cache_residuals(pair).values) and (found.values[1] != first.values[1]).any()


def test_a_checkpoint_that_changes_between_its_digest_and_its_opening_is_not_kept(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("base", "aligned"):
        shutil.copytree(home / name, tmp_path / name)
    pair = ModelSequence.from_folders(witness=tmp_path / "base", anchor=tmp_path / "aligned", probes=PROBES)
    plain = stored_readings.run_all

    def overwritten(*given: Any) -> None:
        shutil.copy(home / "base" / "model.safetensors", tmp_path / "aligned" / "model.safetensors")
        plain(*given)

    with monkeypatch.context() as patch:
        patch.setattr(stored_readings, "run_all", overwritten)
        with refused("anchor", "changed while it was opened"):
            cache_residuals(pair, store=tmp_path / "store")
    found = cache_residuals(pair, store=tmp_path / "store").values
    assert np.array_equal(found[0], found[1])


def test_another_release_of_what_computes_the_states_reads_them_anew(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read(home, tmp_path)
    with rows_read(monkeypatch) as seen:
        read(home, tmp_path)
        assert seen == []
        monkeypatch.setattr(stored_readings, "version", lambda _: "5.99.1")
        read(home, tmp_path)
        assert seen != []


def test_models_in_memory_are_kept_by_their_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def history(*seeds: int) -> ModelSequence:
        one, other = (tiny.llama(seed) for seed in seeds)
        return ModelSequence.from_models(witness=one, anchor=other, tokenizer=tiny.TOKENIZER, probes=PROBES)

    first = cache_residuals(history(0, 1), store=tmp_path)
    with rows_read(monkeypatch) as seen:
        assert np.array_equal(cache_residuals(history(1, 0), store=tmp_path).values, first.values[::-1])
        assert seen == []
        cache_residuals(history(0, 2), store=tmp_path)
        assert seen != []


def test_models_with_hooks_or_in_training_are_not_kept(tmp_path: Path) -> None:
    """Their states are not those of their weights: the next model with these would get them."""
    models = [tiny.llama(0), tiny.llama(1)]
    seq = ModelSequence.from_models(witness=models[0], anchor=models[1], tokenizer=tiny.TOKENIZER, probes=PROBES)
    handle = models[1].model.layers[0].register_forward_hook(lambda *_: None)
    with refused("anchor", "has hooks on it"):
        cache_residuals(seq, store=tmp_path)
    handle.remove()
    models[0].train()
    with refused("witness", "in training mode"):
        cache_residuals(seq, store=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


# -- killed, damaged, full ---------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_instant_it_goes_on_and_ends_with_the_same_bytes(tmp_path: Path, kills: int) -> None:
    """Two at once on one store end with the same bytes too."""
    command = [sys.executable, "-W", "ignore", str(TESTS / "killed.py"), str(tmp_path), str(kills)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"{kills} kills" in done.stdout


def damage(path: Path, rng: random.Random) -> str:
    """Cut a file short, flip a bit, write over it, empty it, lengthen it, or take it away."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["cut", "flip", "garbage", "empty", "longer", "gone"])
    at = rng.randrange(max(len(content), 1))
    if kind == "flip" and content:
        content[at] ^= 1 << rng.randrange(8)
    new = {"cut": content[:at], "garbage": rng.randbytes(at + 1), "empty": b"", "longer": content + b"\0" * 8}
    path.write_bytes(new.get(kind, content))
    if kind == "gone":
        path.unlink()
    return kind


@pytest.mark.long
@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_file_of_any_kind_is_never_believed(home: Path, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    wanted = read(home, tmp_path).values.copy()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    kinds = {path.relative_to(tmp_path).parts[0] for path in files}
    assert kinds == {"states", "views", "digests", "gravlens_store.json"}
    if seed % 2:
        shutil.rmtree(tmp_path / "views")  # so that states are read anew
        files = [path for path in files if path.exists()]
    for path in rng.sample(files, k=rng.randint(1, 4)):
        damage(path, rng)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(read(home, tmp_path).values, wanted)
        assert np.array_equal(read(home, tmp_path).values, wanted)


def test_a_damaged_file_is_named(home: Path, tmp_path: Path) -> None:
    read(home, tmp_path)
    shutil.rmtree(tmp_path / "views")
    path = next((tmp_path / "states").rglob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.warns(UserWarning, match=path.name):
        read(home, tmp_path)


def test_what_is_read_at_the_last_attempt_is_the_answer(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are damaged once they are written, twice; and again and again."""
    plain, left = stored_readings._assemble, [stored_readings.ATTEMPTS - 1]

    def spoilt(*given: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            path = next((tmp_path / "states").rglob("*.safetensors"))
            path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
        return plain(*given)

    monkeypatch.setattr(stored_readings, "_assemble", spoilt)
    with pytest.warns(UserWarning, match="corrupt"):
        assert np.array_equal(read(home, tmp_path).values, cache_residuals(sequence(home)).values)
    left[0] = 99
    shutil.rmtree(tmp_path / "views")
    with pytest.warns(UserWarning, match="corrupt"), refused("does not hold what was just written"):
        read(home, tmp_path)


def test_a_full_disk_is_one_clear_error_and_the_same_call_goes_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for so many files, then none; what was written stays whole."""
    wanted, room = cache_residuals(sequence(home)).values, [4]
    put = os.replace

    def full(scratch: Path, path: Path) -> None:
        if path.suffix == ".safetensors":
            room[0] -= 1
            if room[0] < 0:
                raise OSError(28, "No space left on device")
        put(scratch, path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with refused("No space left", str(tmp_path)):
            read(home, tmp_path)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with refused("No space left"):
            read(home, tmp_path)
    assert not list((tmp_path / "views").iterdir())
    with rows_read(monkeypatch) as seen:
        assert np.array_equal(read(home, tmp_path).values, wanted) and seen == []


def test_a_disk_that_is_really_full(home: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        with refused("No space left"):
            read(home, disk / "store")
        subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
        assert np.array_equal(read(home, disk / "store").values, cache_residuals(sequence(home)).values)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# -- elsewhere ---------------------------------------------------------------------------------------------------------


class Here(Executor):
    """Runs each task at once; the worker of some dies."""

    def __init__(self, dying: int) -> None:
        self.left = dying

    def submit(self, work: Any, /, *given: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.left -= 1
        if self.left < 0:
            future.set_exception(RuntimeError("A process in the pool was terminated abruptly"))
        else:
            future.set_result(work(*given, **named))
        return future


def test_a_worker_that_dies_loses_nothing(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("worker of Here ended", "terminated abruptly"):
        read(home, tmp_path, executor=Here(8))  # five digests, three checkpoints
    with rows_read(monkeypatch) as seen:
        found = read(home, tmp_path, executor=Here(99))
    assert sum(n for n, _ in seen) == 2 * len(PROBES)
    assert np.array_equal(found.values, cache_residuals(sequence(home)).values)


def test_what_an_executor_cannot_do_is_refused(home: Path, tmp_path: Path) -> None:
    with refused("no store"):
        cache_residuals(sequence(home), executor=Here(9))
    models = ModelSequence.from_models(
        witness=tiny.llama(0), anchor=tiny.llama(1), tokenizer=tiny.TOKENIZER, probes=PROBES
    )
    with refused("in memory, and an executor"):
        cache_residuals(models, store=tmp_path, executor=Here(9))
