"""What a stopped run leaves is believed only where it is whole; whatever is damaged, the run ends alike."""

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import test_finetune as runs
import torch
from histories import refused

from gravlens.training.finetune import Finetuned

STEPS = (1, 3, 5, 6)


def run(out: Path) -> Finetuned:
    return runs.run(out, recipe=runs.LONG, save_steps=STEPS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finetuned:
    return run(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped in its fourth step: it has states of the second and the third."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    runs.interrupted(out, recipe=runs.LONG)
    assert sorted(path.name for path in out.glob(".resume/*")) == ["checkpoint-2", "checkpoint-3", "lock"]
    return out


def resumed(out: Path, whole: Finetuned) -> int:
    """The step that a run goes on from; it must end as if nothing had happened."""
    with runs.steps_watched() as passes:
        made = run(out)
    pd.testing.assert_frame_equal(made.log, whole.log, check_exact=True)
    assert [one.step for one in made.checkpoints] == [one.step for one in whole.checkpoints]
    pairs = zip(made.checkpoints, whole.checkpoints, strict=True)
    assert all(runs.same(runs.weights(one), runs.weights(other)) for one, other in pairs)
    assert not (out / ".resume").exists()
    return 6 - len(passes) // 2


def empty(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


STATE = ".resume/checkpoint-3"
FILES = (
    "trainer_state.json optimizer.pt scheduler.pt rng_state.pth model.safetensors config.json checksums.json".split()
)


DAMAGES = [
    *((name, empty) for name in FILES),
    *(("optimizer.pt", damage) for damage in (cut, flip, Path.unlink)),
    *(("checksums.json", damage) for damage in (cut, Path.unlink)),
    ("trainer_state.json", cut),
    ("scheduler.pt", Path.unlink),
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_state_is_passed_over_for_the_one_before(
    name: str, damage: Callable[[Path], Any], stopped: Path, whole: Finetuned, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    damage(out / STATE / name)
    with pytest.warns(UserWarning, match="state of step 3 is not whole.*that of step 2 is tried"):
        assert resumed(out, whole) == 2


def spoil_checkpoint(name: str) -> Callable[[Path], None]:
    return lambda out: flip(out / name / "model.safetensors")


def spoil_both(out: Path) -> None:
    cut(out / STATE / "optimizer.pt")
    empty(out / ".resume/checkpoint-2/model.safetensors")


@pytest.mark.parametrize(
    ("damage", "goes_on", "told"),
    [
        (lambda out: (out / STATE / "optimizer.bin").write_bytes(b"another"), 2, [3]),
        (spoil_both, 0, [3, 2]),
        (spoil_checkpoint("checkpoint-3"), 2, [3]),
        (spoil_checkpoint("checkpoint-1"), 0, [3, 2]),
        (lambda out: shutil.rmtree(out / "checkpoint-1"), 0, [3, 2]),
        (lambda out: shutil.rmtree(out / STATE), 2, []),
        (lambda out: shutil.rmtree(out / ".resume"), 0, []),
    ],
    ids=["file added", "both states", "saved since", "saved before", "checkpoint gone", "state gone", "no states"],
)
def test_a_run_goes_on_from_what_is_whole_with_all_its_checkpoints(
    damage: Callable[[Path], Any], goes_on: int, told: list[int], stopped: Path, whole: Finetuned, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    damage(out)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        assert resumed(out, whole) == goes_on
    texts = [str(one.message) for one in found if "not whole" in str(one.message)]
    assert len(texts) == len(told) and all(f"step {step} is" in text for step, text in zip(told, texts, strict=True))
    assert not told or ("begins again" in texts[-1]) == (goes_on == 0)


def test_checkpoints_from_before_an_earlier_stop_are_looked_at_too(
    stopped: Path, whole: Finetuned, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    runs.interrupted(out, step=1, recipe=runs.LONG)  # in the fifth step, the second after the third
    assert (out / ".resume/checkpoint-4").is_dir()
    flip(out / "checkpoint-1/model.safetensors")
    with pytest.warns(UserWarning, match="begins again"):
        assert resumed(out, whole) == 0


def test_an_undamaged_state_is_used_without_a_word(stopped: Path, whole: Finetuned, tmp_path: Path) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    (out / "checkpoint-1/notes.md").write_text("mine")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*whole")
        assert resumed(out, whole) == 3
    assert (out / "checkpoint-1/notes.md").read_text() == "mine", "a file of the user's is no damage, and stays"


@pytest.mark.parametrize("damage", [empty, cut, Path.unlink])
def test_a_folder_whose_description_is_damaged_is_refused_and_left(
    damage: Callable[[Path], Any], stopped: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(stopped, tmp_path / "run")
    damage(out / "finetune.json")
    before = runs.contents(out)
    with refused(str(out), "finetune.json", "missing" if damage is Path.unlink else "damaged"):
        run(out)
    assert runs.contents(out) == before


@pytest.mark.parametrize(
    "error", [OSError(28, os.strerror(28)), RuntimeError("enforce fail at inline_container.cc: unexpected pos 64")]
)
def test_a_full_disk_is_one_error_and_the_run_goes_on_afterwards(
    error: Exception, whole: Finetuned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, own, saved = tmp_path / "run", torch.save, []

    def full(value: Any, place: Any, *rest: Any, **further: Any) -> None:
        if "optimizer" in str(place) and (saved.append(place) or len(saved) == 3):
            raise error
        own(value, place, *rest, **further)

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(runs.finetuning, "RESUMABLE_AFTER", -1.0)
    with refused(str(out), "cannot be written"):
        run(out)
    with pytest.warns(UserWarning, match="step 3 is not whole"):
        assert resumed(out, whole) == 2


def test_what_a_run_has_not_written_is_left(tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / ".resume").mkdir(parents=True)
    (out / ".resume" / "cv.txt").write_text("mine")
    runs.run(out)
    notes = next(out.glob("checkpoint-*")) / "eval.json"
    notes.write_text("mine")
    runs.run(out)
    assert notes.read_text() == (out / ".resume" / "cv.txt").read_text() == "mine"
    assert sorted(path.name for path in out.glob(".resume/*")) == ["cv.txt"]
