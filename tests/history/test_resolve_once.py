"""Each checkpoint is resolved once per call, and each weight file's header is read once."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from folders import adapter
from histories import refused
from test_ahead import ROLES, RUN, Hub, fake, models  # noqa: F401 (fixtures)

from gravlens.activations import fingerprint as fingerprints
from gravlens.activations import plan
from gravlens.activations.residuals import cache_residuals
from gravlens.history import sources, weight_files
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.history.sources import resolve
from gravlens.models.placement import Placement
from gravlens.studies.inspection import inspect_sequence


class Counts:
    """How often each source was looked up, and each weight file was opened for its header or for its tensors."""

    def __init__(self) -> None:
        self.looked_up, self.headers, self.loads = Counter[str](), Counter[str](), Counter[str]()


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counts:
    """Count lookups of sources, and openings of weight files that gravlens reads anything from."""
    found, look, plain = Counts(), sources.local_folder, weight_files.safe_open

    def looked_up(source: Any, **more: Any) -> Path:
        found.looked_up[str(source)] += 1
        return look(source, **more)

    class Opened:
        def __init__(self, path: Any, **more: Any) -> None:
            self.path, self.file, self.loaded = str(path), plain(path, **more), False
            found.headers[self.path] += 1

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...

        def get_tensor(self, name: str) -> Any:
            if not self.loaded:
                found.headers[self.path] -= 1
                found.loads[self.path] += 1
            self.loaded = True
            return self.file.get_tensor(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    monkeypatch.setattr(sources, "local_folder", looked_up)
    monkeypatch.setattr(weight_files, "safe_open", Opened)
    monkeypatch.setattr(fingerprints, "SETTLED", 0)
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A witness, an anchor, a run of three models and one of three adapters: eight checkpoints."""
    folder = tmp_path_factory.mktemp("history")
    for seed, name in enumerate(("base", "aligned", "full/step1", "full/step2", "full/step3")):
        tiny.save(tiny.llama(seed), folder / name)
    for step in (1, 2, 3):
        adapter(folder / "aligned", folder / f"lora/checkpoint-{step}", step)
    return folder


def sequence(home: Path, **more: Any) -> ModelSequence:
    runs = {"full": str(home / "full/*"), "lora": str(home / "lora/*")}
    return ModelSequence.from_folders(
        witness=home / "base", anchor=home / "aligned", runs=runs, probes=tiny.PROMPTS, **more
    )


@pytest.mark.parametrize("template", ["own", "anchor", "none"])
@pytest.mark.parametrize("placement", [Placement(), Placement(dtype="stored")])
@pytest.mark.parametrize("stored", [False, True])
def test_eight_checkpoints_are_resolved_once_and_their_headers_read_once(
    home: Path, tmp_path: Path, counts: Counts, stored: bool, placement: Placement, template: Any
) -> None:
    history = sequence(home, chat_template=template)
    files = sorted(map(str, home.rglob("*model.safetensors")))
    assert len(list(history)) == len(files) == 8
    cache_residuals(history, store=tmp_path if stored else None, placement=placement)
    assert counts.looked_up == {str(Path(file).parent): 1 for file in files}
    assert counts.headers == dict.fromkeys(files, 1)


def test_a_warm_store_reads_each_header_once_and_loads_nothing(home: Path, tmp_path: Path, counts: Counts) -> None:
    first = cache_residuals(sequence(home), store=tmp_path).values.copy()
    files = sorted(map(str, home.rglob("*model.safetensors")))
    assert set(counts.loads) == set(files)
    counts.__init__()
    again = cache_residuals(sequence(home), store=tmp_path).values
    assert np.array_equal(first, again) and not counts.loads
    assert counts.headers == dict.fromkeys(files, 1) and set(counts.looked_up.values()) == {1}


def test_inspecting_a_history_resolves_each_checkpoint_once(home: Path, counts: Counts) -> None:
    inspect_sequence(sequence(home))
    assert set(counts.looked_up.values()) == {1} and set(counts.headers.values()) == {1}


@pytest.mark.parametrize("stored", [False, True])
def test_a_hub_is_asked_once_for_each_revision_and_once_for_its_weights(
    fake: Hub,  # noqa: F811
    tmp_path: Path,
    counts: Counts,
    stored: bool,
) -> None:
    history = ModelSequence.from_folders(**ROLES, runs={"run": RUN}, probes=tiny.PROMPTS)
    cache_residuals(history, placement=Placement(keep=1), store=tmp_path / "store" if stored else None)
    asked = Counter(fake.downloads)
    assert asked == {(revision, size): 1 for revision in fake.commits for size in ("small", "whole")}
    assert len(counts.looked_up) == 16 and set(counts.looked_up.values()) == {1}
    assert set(counts.headers.values()) == {1}


@pytest.mark.usefixtures("fake")
def test_a_tokenizer_on_a_hub_is_asked_for_once(home: Path, counts: Counts) -> None:
    cache_residuals(sequence(home, tokenizer=ROLES["anchor"]))
    assert counts.looked_up[ROLES["anchor"]] == 1 and set(counts.looked_up.values()) == {1}


def test_a_folder_that_is_written_after_it_was_resolved_is_refused(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a store too: its shape and precision were taken from what was there before."""
    for name in ("base", "aligned"):
        shutil.copytree(home / name, tmp_path / name)
    pair = ModelSequence.from_folders(witness=tmp_path / "base", anchor=tmp_path / "aligned", probes=tiny.PROMPTS)
    plain = plan.open_each

    def overwritten(*given: Any, **more: Any) -> Any:
        config = tmp_path / "aligned/config.json"
        config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.5'))
        return plain(*given, **more)

    monkeypatch.setattr(plan, "open_each", overwritten)
    with refused("anchor", "changed while it was opened"):
        cache_residuals(pair)


def test_a_file_that_is_written_twice_within_a_tick_of_the_clock_is_told_by_its_content(
    home: Path, tmp_path: Path
) -> None:
    """Such a file keeps its stamp, which is simulated here: the second write is hidden from `changed`."""
    shutil.copytree(home / "aligned", tmp_path / "a")
    resolved = resolve(Checkpoint("a", tmp_path / "a"))
    fingerprints.fingerprint(resolved, ())
    fingerprints.check_same_content(resolved)
    shutil.copy(home / "base/model.safetensors", tmp_path / "a/model.safetensors")
    (folder,) = resolved.folders
    object.__setattr__(folder.weights, "stamps", tuple(weight_files.stamp(path) for path in folder.weights.files))
    assert not folder.changed
    with refused("a", "changed while it was opened"):
        fingerprints.check_same_content(resolved)
