"""What names a checkpoint: a path, unless `hf://` or a setting says that it is a hub's model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from folders import adapter, snapshot
from histories import refused

from gravlens.core.errors import GravlensError
from gravlens.history.controls import Controls, RandomClamp
from gravlens.history.hub import BARE, located
from gravlens.history.sequence import Checkpoint, ModelSequence, Run
from gravlens.history.sources import resolve
from gravlens.models.opening import load_huggingface, load_tokenizer, open_model
from gravlens.organisms.pretrained import pretrained_organism

NAME = "checkpoints/aligned"  # of a folder in another working directory, and of a model that anyone may own


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The repositories that a hub was asked for; it has none of them. The working directory is empty."""
    found: list[str] = []

    def download(repo: str, **_: Any) -> Any:
        found.append(repo)
        raise OSError("no such model")

    monkeypatch.setattr("gravlens.history.hub.snapshot_download", download)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(BARE, raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tiny.llama(), tmp_path_factory.mktemp("models") / "whole")


def sequence(model: Path, **more: Any) -> ModelSequence:
    return ModelSequence.from_folders(**{"witness": model, "anchor": model, "probes": ["the"], **more})


def from_toml(model: Path, text: str) -> ModelSequence:
    ends = "".join(f'{key} = "{model}"\n' for key in ("witness", "anchor") if f"{key} =" not in text)
    Path("SEQUENCE.toml").write_text(ends + text)
    return ModelSequence.from_toml("SEQUENCE.toml")


# Each place that takes a checkpoint -> (a folder that exists, the name) -> what is then opened, if it was not before.
PLACES: dict[str, Callable[[Path, Any], Any]] = {
    "open_model": lambda _, name: open_model(name),
    "a checkpoint": lambda _, name: open_model(Checkpoint("anchor", name)),
    "load_huggingface": lambda _, name: load_huggingface(name),
    "load_tokenizer": lambda _, name: load_tokenizer(name),
    "a checkpoint's tokenizer": lambda model, name: resolve(Checkpoint("anchor", model, tokenizer=name)),
    "an adapter's given base": lambda model, name: resolve(
        Checkpoint("run/1", over(adapter(model, Path("adapter")), "moved/away"), base=Checkpoint("base", name))
    ),
    "witness": lambda model, name: resolve(sequence(model, witness=name).witness),
    "anchor": lambda model, name: resolve(sequence(model, anchor=name).anchor),
    "tokenizer": lambda model, name: resolve(sequence(model, tokenizer=name).anchor),
    "a list as a run": lambda model, name: resolve(sequence(model, runs={"r": [name]}).runs["r"][0]),
    "a text as a run": lambda model, name: resolve(sequence(model, runs={"r": name}).runs["r"][0]),
    "Run": lambda model, name: resolve(sequence(model, runs={"r": Run([name])}).runs["r"][0]),
    "a sibling": lambda model, name: resolve(sequence(model, controls=Controls(siblings=[name])).controls.siblings[0]),
    "a stranger": lambda model, name: resolve(
        sequence(model, controls=Controls(strangers={"s": name})).controls.strangers["s"]
    ),
    "witness in TOML": lambda model, name: resolve(from_toml(model, f'witness = "{name}"').witness),
    "anchor in TOML": lambda model, name: resolve(from_toml(model, f'anchor = "{name}"').anchor),
    "tokenizer in TOML": lambda model, name: resolve(from_toml(model, f'tokenizer = "{name}"').anchor),
    "a list in TOML": lambda model, name: resolve(from_toml(model, f'[runs]\nr = ["{name}"]').runs["r"][0]),
    "a text in TOML": lambda model, name: resolve(from_toml(model, f'[runs]\nr = "{name}"').runs["r"][0]),
    "a sibling in TOML": lambda model, name: resolve(
        from_toml(model, f'[controls]\nsiblings = ["{name}"]').controls.siblings[0]
    ),
    "--model": lambda _, name: pretrained_organism(name, Path("harmful"), Path("harmless")),
}
STEPPED = {
    place: "@step5" for place in PLACES if "run" in place.lower() or "list" in place or place == "a text in TOML"
}
every_place = pytest.mark.parametrize("place", PLACES)


@every_place
def test_a_text_without_the_prefix_is_a_path_and_no_hub_is_asked(asked: list[str], model: Path, place: str) -> None:
    name = NAME + STEPPED.get(place, "")
    with pytest.raises(GravlensError) as caught:
        PLACES[place](model, name)
    assert asked == [] and name in str(caught.value)
    if "text" not in place:  # that is a pattern, which matches nothing
        said = caught.value
        assert "as a path from" in said.wanted and str(Path.cwd()) in said.wanted
        assert f"hf://{name}" in said.remedy and f"{BARE}=1" in said.remedy


@every_place
def test_with_the_prefix_or_the_setting_the_hub_is_asked(
    asked: list[str], model: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    name = NAME + STEPPED.get(place, "")
    for text in (f"hf://{name}", Path(f"hf://{name}")):  # pathlib makes one slash of two
        asked.clear()
        with refused(f"hf://{name}", "no such model"):
            PLACES[place](model, text)
        assert set(asked) == {NAME}
        shutil.rmtree("adapter", ignore_errors=True)
    asked.clear()
    monkeypatch.setenv(BARE, "1")
    with refused(f"hf://{name}", "no such model"):
        PLACES[place](model, name)
    assert set(asked) == {NAME}


@pytest.mark.parametrize("off", ["", "0"])
def test_the_setting_is_off_where_it_says_so(asked: list[str], monkeypatch: pytest.MonkeyPatch, off: str) -> None:
    monkeypatch.setenv(BARE, off)
    with refused(NAME, "does not exist"):
        open_model(NAME)
    assert asked == []


def test_under_the_setting_a_path_goes_before_a_hub_id(
    asked: list[str], model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(BARE, "1")
    shutil.copytree(model, NAME)
    assert resolve(Checkpoint("anchor", NAME)).base.path == Path(NAME)
    with refused("checkpoints/alined", "does not exist"):  # mistyped: its folder is there
        open_model("checkpoints/alined")
    assert located("./a/b") == Path("a/b") and located("a") == Path("a")
    assert asked == []


@pytest.mark.parametrize("text", ["hf://", "hf://name", "hf://a/b/c", "hf://a/b@", "hf://a/b@../c", "hf:///a", "hf:/a"])
def test_a_prefix_before_anything_else_is_refused(asked: list[str], text: str) -> None:
    for opens in (open_model, load_tokenizer, lambda one: ModelSequence.from_folders(witness=one, anchor=one)):
        with refused("is no hub id"):
            opens(text)
    assert asked == []


def test_a_run_may_be_one_revision(asked: list[str], model: Path) -> None:
    found = sequence(model, runs={"a": "hf://owner/name-7b@step5"})
    assert [(one.step, one.source, one.revision) for one in found.runs["a"]] == [
        (5, "hf://owner/name-7b@step5", "step5")
    ]
    assert list(sequence(model, runs=["hf://owner/name@step5"]).runs) == ["name"] and asked == []


# -- an adapter's base -------------------------------------------------------------------------------------------------


def over(folder: Path, named: str) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": named}))
    return folder


def test_the_base_that_an_adapter_names_is_no_reason_to_ask_a_hub(
    asked: list[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT writes `owner/name`, or a relative path of the machine that trained it; the file may say anything."""
    for named in (NAME, f"hf://{NAME}"):
        folder = over(adapter(model, tmp_path / "adapter"), named)
        with pytest.raises(GravlensError, match=NAME) as caught:
            open_model(folder)
        assert asked == []
        assert f'base=Checkpoint("base", "hf://{NAME}")' in caught.value.remedy and BARE in caught.value.remedy
        monkeypatch.setenv(BARE, "1")
        with refused(f"hf://{NAME}", "no such model"):
            open_model(folder)
        assert asked == [NAME]
        monkeypatch.delenv(BARE)
        asked.clear()


def test_a_base_in_the_local_cache_is_taken_from_there(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(BARE, raising=False)
    here = snapshot(tmp_path / "cache", "main", "3" * 40, lambda folder: shutil.copytree(model, folder))
    folder = over(adapter(model, tmp_path / "adapter"), "owner/name")
    assert resolve(Checkpoint("this", folder)).paths == (here, folder)


def test_a_given_base_is_compared_with_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("owner--name", "owner--other"):
        snapshot(tmp_path / "cache", "main", "3" * 40, lambda folder: shutil.copytree(model, folder), name)
    folder = over(adapter(model, tmp_path / "adapter"), "owner/name")
    assert len(resolve(Checkpoint("this", folder, base=Checkpoint("base", "hf://owner/name"))).paths) == 2
    with refused("owner/name", "hf://owner/other"):
        resolve(Checkpoint("this", folder, base=Checkpoint("base", "hf://owner/other")))


# -- the home folder ---------------------------------------------------------------------------------------------------


@every_place
def test_a_tilde_is_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path, place: str) -> None:
    home = tmp_path / "home"
    shutil.copytree(model, home / "run" / "step5")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    PLACES[place](model, "~/run/step5")
    with refused("nobody-here"):  # a user that does not exist
        PLACES[place](model, "~nobody-here/run/step5")


def test_files_that_a_history_names_may_lie_in_the_home_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "probes.txt").write_text("the\n")
    (tmp_path / "SEQUENCE.toml").write_text(
        f'witness = "{model}"\nanchor = "{model}"\nprobes = "~/probes.txt"\n[controls.random.r]\ndirections = "~/d"\n'
    )
    found = ModelSequence.from_toml("~/SEQUENCE.toml")
    assert found.require_probes().texts == ("the",)
    assert found.controls.random["r"].directions == RandomClamp(tmp_path / "d", {}).directions
