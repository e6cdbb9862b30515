"""A hub's revisions: fetched while another is read, evicted behind, and nothing else is touched."""

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from folders import adapter, snapshot
from histories import RAGGED, refused
from huggingface_hub.errors import LocalEntryNotFoundError

from gravlens.activations.residuals import cache_residuals
from gravlens.core.errors import GravlensError
from gravlens.history import hub
from gravlens.history.prefetch import in_turn
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.models.forward import final_logits
from gravlens.models.opening import open_model
from gravlens.models.placement import Placement
from gravlens.models.swapping import open_each

NAME, RUN = "owner/name", [f"hf://owner/name@step{step}" for step in range(1, 7)]
ROLES = {"witness": "hf://owner/name@base", "anchor": "hf://owner/name@aligned"}


class Hub:
    """A hub that "downloads" by laying a snapshot down as huggingface_hub does, and counts what lies on disk."""

    def __init__(self, cache: Path, models: Path) -> None:
        self.cache, self.models, self.downloads, self.most = cache, models, list[tuple[str, str]](), 0
        self.broken: set[str] = set()
        self.whole = threading.RLock()  # nobody looks while a snapshot is half laid down
        self.threads: set[str] = set()
        self.commits: dict[str, int] = {"base": 90, "aligned": 91, **{f"step{n}": n for n in range(1, 7)}}

    def home(self, repo: str = NAME) -> Path:
        return self.cache / f"models--{repo.replace('/', '--')}"

    def on_disk(self, repo: str = NAME) -> set[int]:
        """Numbers of the commits whose weights lie there."""
        with self.whole:
            found = {int(path.parent.name) for path in self.home(repo).glob("snapshots/*/*.safetensors")}
            blobs = {int(path.name.split("-")[0]) for path in self.home(repo).glob("blobs/*.safetensors")}
        assert found == blobs, "a blob without its snapshot, or the other way round"
        return found

    def lay(self, revision: str, repo: str = NAME) -> Path:
        commit = f"{self.commits[revision]:040}"

        def make(folder: Path) -> None:
            shutil.rmtree(folder, ignore_errors=True)  # a part of it may be there
            shutil.copytree(self.models / str(self.commits[revision]), folder)

        return snapshot(self.cache, revision, commit, make, repo.replace("/", "--"))

    def download(self, repo: str, *, revision: str, ignore_patterns: list[str], **_: Any) -> str:
        self.threads.add(threading.current_thread().name)
        with self.whole:
            return self._download(repo, revision, ignore_patterns)

    def _download(self, repo: str, revision: str, ignore_patterns: list[str]) -> str:
        if len(revision) == 40:  # a commit
            revision = next(name for name, commit in self.commits.items() if f"{commit:040}" == revision)
        if revision in self.broken:
            raise LocalEntryNotFoundError(f"no {revision}")
        folder = self.home(repo) / "snapshots" / f"{self.commits[revision]:040}"
        if not any(folder.glob("*.safetensors")):
            self.downloads.append((revision, "small" if hub.WEIGHTS in ignore_patterns else "whole"))
            self.lay(revision, repo)
            if hub.WEIGHTS in ignore_patterns:
                for link in folder.glob("*.safetensors"):
                    link.resolve().unlink(), link.unlink()
        (self.home(repo) / "refs" / revision).write_text(folder.name)
        self.most = max(self.most, len(self.on_disk()))
        return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made beforehand: a thread that drew weights would share torch's seed with what is opened meanwhile."""
    folder = tmp_path_factory.mktemp("models")
    for seed in (*range(1, 7), 90, 91):
        tiny.save(tiny.llama(seed), folder / str(seed))
    return folder


@pytest.fixture
def fake(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "cache", models)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr("gravlens.history.hub.snapshot_download", made.download)
    return made


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*stays on disk")
        yield


def run(*sources: str) -> list[Checkpoint]:
    return [Checkpoint(f"run/{step}", source, step) for step, source in enumerate(sources or RUN)]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_six_revisions_need_room_for_keep_and_one(fake: Hub, keep: int) -> None:
    seen = []
    for found in in_turn(run(), keep=keep):
        assert found.checkpoint.step is not None
        number, folder = found.checkpoint.step + 1, found.base.path
        assert (folder / "model.safetensors").exists() and folder.name == f"{number:040}"
        assert {n for n in fake.on_disk() if n <= number} == set(range(max(1, number - keep + 1), number + 1))
        seen.append(number)
    assert seen == list(range(1, 7)) and len(fake.downloads) == 6
    assert fake.most == keep + 1
    assert fake.on_disk() == set(range(6 - keep + 1, 7))


def test_all_stay_without_keep(fake: Hub) -> None:
    list(in_turn(run(), keep=None))
    assert fake.on_disk() == set(range(1, 7))


def test_the_next_is_downloaded_in_the_background_while_one_is_read(fake: Hub) -> None:
    turns = in_turn(run(*RUN[:2]), keep=1)
    next(turns)
    downloaded(fake, 2)
    assert not any(name == threading.main_thread().name for name in fake.threads)
    turns.close()


def downloaded(fake: Hub, number: int) -> None:
    """Wait, while one is read, until so many were downloaded."""
    for _ in range(500):
        if len(fake.downloads) == number:
            return
        threading.Event().wait(0.01)
    raise AssertionError("the next one was not fetched while this one was read")


@pytest.mark.parametrize("way", ["closed", "raised", "dropped"])
def test_eviction_survives_an_early_end(fake: Hub, way: str) -> None:
    turns = in_turn(run(), keep=1)
    next(turns), next(turns)
    downloaded(fake, 3)
    if way == "closed":
        turns.close()
    elif way == "raised":
        with pytest.raises(RuntimeError, match="reader"):
            turns.throw(RuntimeError("reader"))
    else:
        del turns
    assert fake.on_disk() == {2}, "the last read stays, and what was fetched ahead goes"


def test_an_error_ahead_is_raised_in_its_own_turn(fake: Hub) -> None:
    fake.broken = {"step3"}
    seen = []
    with refused("hf://owner/name@step3"):
        for found in in_turn(run(), keep=1):
            seen.append(found.checkpoint.source)
    assert seen == RUN[:2] and fake.on_disk() == {2}


def test_what_was_there_before_stays_and_so_do_other_repositories(fake: Hub) -> None:
    fake.lay("step2"), fake.lay("step2", "other/fork")
    list(in_turn(run(), keep=1))
    assert fake.on_disk() == {2, 6} and fake.on_disk("other/fork") == {2}
    list(in_turn(run(*RUN[:1]), keep=1))
    assert fake.on_disk() == {1, 2, 6}


def test_a_fork_with_a_commit_of_the_same_name_stays(fake: Hub) -> None:
    for revision in ("step1", "step2"):
        fake.lay(revision, "other/fork")
    list(in_turn(run(), keep=1))
    assert fake.on_disk("other/fork") == {1, 2} and fake.on_disk() == {6}


def test_witness_anchor_and_bases_are_never_evicted(fake: Hub) -> None:
    anchor = Checkpoint("anchor", ROLES["anchor"])
    history = [Checkpoint("witness", ROLES["witness"]), anchor, *run()]
    list(in_turn(history, keep=1))
    assert fake.on_disk() == {90, 91, 6}
    list(
        in_turn(
            [*run("hf://owner/name@step1", ROLES["anchor"], "hf://owner/name@step2", "hf://owner/name@step3"), anchor],
            keep=1,
        )
    )
    assert {90, 91, 6} <= fake.on_disk()


def test_a_base_that_an_adapter_alone_names_stays(fake: Hub, models: Path, tmp_path: Path) -> None:
    folder = adapter(models / "1", tmp_path / "adapter")
    config = folder / "adapter_config.json"
    config.write_text(
        json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": RUN[0].removeprefix("hf://")})
    )
    rows = [*run(RUN[0]), Checkpoint("run/1", folder, 1), *run(*RUN[1:])]
    list(in_turn(rows, keep=1))
    assert fake.on_disk() == {1, 6}


def test_the_anchor_under_another_name_in_a_run_stays(fake: Hub) -> None:
    fake.commits["step1"] = fake.commits["aligned"]
    list(in_turn([*run(*RUN[:3]), Checkpoint("anchor", ROLES["anchor"]), *run(*RUN[3:])], keep=1))
    assert 91 in fake.on_disk()


def test_one_commit_under_two_names_is_there_as_long_as_it_is_read(fake: Hub) -> None:
    fake.commits["step2"] = fake.commits["step1"]
    for found in in_turn(run(*RUN[:4]), keep=1):
        assert (found.base.path / "model.safetensors").exists(), found.described
    assert fake.on_disk() == {4} and fake.most == 2


def test_a_revision_that_is_named_again_is_downloaded_once(fake: Hub) -> None:
    list(in_turn(run(RUN[0], RUN[1], RUN[2], RUN[0]), keep=1))
    assert [revision for revision, _ in fake.downloads] == ["step1", "step2", "step3"]
    assert fake.on_disk() == {1}


def test_blobs_that_another_revision_shares_stay(fake: Hub) -> None:
    mine = fake.lay("step2")
    shared = (mine / "model.safetensors").resolve()

    def lay(revision: str, repo: str = NAME) -> Path:
        folder = Hub.lay(fake, revision, repo)
        if revision == "step1":
            (folder / "config.json").unlink()
            (folder / "config.json").symlink_to((mine / "config.json").resolve())
        return folder

    fake.lay = lay  # type: ignore[method-assign]
    list(in_turn(run(RUN[0], RUN[2], RUN[3]), keep=1))
    assert shared.exists() and (mine / "config.json").read_text() and fake.on_disk() == {2, 4}


def test_what_cannot_be_deleted_is_a_warning(fake: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Path) -> Any:
        raise OSError("read-only file system")

    monkeypatch.setattr("gravlens.history.hub.scan_cache_dir", fails)
    with pytest.warns(UserWarning, match=r"stays on disk.*read-only file system"):
        assert len(list(in_turn(run(*RUN[:2]), keep=1))) == 2


def test_local_folders_and_models_in_memory_are_never_touched(tmp_path: Path, fake: Hub) -> None:
    folder, model = tiny.save(tiny.llama(0), tmp_path / "mine"), tiny.llama(1)
    rows = [Checkpoint(f"run/{step}", source, step) for step, source in enumerate([folder, model, RUN[0], folder])]
    assert [len(found.folders) for found in in_turn(rows, keep=1)] == [1, 0, 1, 1]
    assert (folder / "model.safetensors").exists() and fake.on_disk() == {1}


def test_a_folder_that_is_written_while_the_one_before_is_read_is_found(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    tiny.save(tiny.llama(0), folders[0])
    turns = in_turn([Checkpoint(f"run/{n}", folder, n) for n, folder in enumerate(folders)], keep=None)
    next(turns)
    tiny.save(tiny.llama(1), folders[1])
    assert next(turns).paths == (folders[1],)


@pytest.mark.parametrize("breaks", ["posix_fadvise", "weight_paths"])
def test_reading_ahead_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: str) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no such luck") if breaks == "posix_fadvise" else GravlensError("a", "b", "c")

    if breaks == "posix_fadvise":
        monkeypatch.setattr("os.posix_fadvise", fails, raising=False)
    else:
        monkeypatch.setattr("gravlens.history.prefetch.weight_paths", fails)
    folder = tiny.save(tiny.llama(0), tmp_path / "one")
    assert len(list(in_turn([Checkpoint("a", folder), Checkpoint("b", folder)], keep=None))) == 2
    monkeypatch.delattr("os.posix_fadvise", raising=False)
    assert len(list(in_turn([Checkpoint("a", folder), Checkpoint("b", folder)], keep=None))) == 2


# -- through what reads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["huggingface", "bridge"])
def test_models_are_those_of_the_revisions_and_hold_no_evicted_file(fake: Hub, through: Any) -> None:
    for checkpoint, model in open_each(run(), through=through, placement=Placement(keep=1)):
        assert checkpoint.step is not None
        alone = open_model(tiny.llama(checkpoint.step + 1), tokenizer=tiny.TOKENIZER)
        torch.testing.assert_close(final_logits(model, RAGGED), final_logits(alone, RAGGED), atol=1e-4, rtol=1e-4)
        held = mapped(lambda line: str(fake.cache) in line and "(deleted)" in line)
        assert not held, "the room of an evicted file is not free while it is mapped"
    assert fake.most == 2


def mapped(wanted: Callable[[str], bool]) -> list[str]:
    maps = Path("/proc/self/maps")
    return [line for line in maps.read_text().splitlines() if wanted(line)] if maps.exists() else []


def test_a_history_on_a_hub_in_the_room_of_its_ends_and_two(fake: Hub) -> None:
    runs = {"seed0": RUN[:3], "seed1": RUN[3:]}
    history = ModelSequence.from_folders(witness=ROLES["witness"], anchor=ROLES["anchor"], runs=runs, probes=["the"])
    wanted = cache_residuals(history).values
    list(in_turn(run(), keep=None))
    for revision in fake.on_disk():
        hub.evict(fake.home() / "snapshots" / f"{revision:040}")
    assert fake.on_disk() == set()
    fake.most, fake.downloads = 0, []
    found = cache_residuals(history, placement=Placement(keep=1)).values
    assert (found == wanted).all()
    assert fake.most == 4 and fake.on_disk() == {90, 91, 6}
    assert sorted(revision for revision, size in fake.downloads if size == "whole") == sorted(fake.commits)


def test_a_tokenizer_is_read_without_downloading_weights(fake: Hub) -> None:
    history = ModelSequence.from_folders(witness=ROLES["witness"], anchor=ROLES["anchor"], runs={"a": RUN[:1]})
    from gravlens.models.tokenizers import sequence_tokenizer

    assert sequence_tokenizer(history).get_vocab() == tiny.TOKENIZER.get_vocab()
    assert {size for _, size in fake.downloads} == {"small"} and fake.on_disk() == set()


def test_a_store_needs_no_more_room_and_no_weights_where_it_holds_the_states(fake: Hub, tmp_path: Path) -> None:
    seq = ModelSequence.from_folders(**ROLES, runs={"run": RUN}, probes=tiny.PROMPTS)
    first = cache_residuals(seq, placement=Placement(keep=1), store=tmp_path / "store").values.copy()
    assert fake.most == 2 + 1 + 1 and fake.on_disk() == {90, 91, 6}, "the ends of the history, and keep + 1"
    plain = cache_residuals(seq, placement=Placement(keep=1)).values
    assert np.array_equal(first, plain)
    fake.downloads.clear()
    again = cache_residuals(seq, placement=Placement(keep=1), store=tmp_path / "store").values
    assert np.array_equal(again, first) and {what for _, what in fake.downloads} == {"small"}
