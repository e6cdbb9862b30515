"""Every committed picture and table is made by docs/make_figures.sh, and its origin is recorded."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = sorted(
    path.relative_to(ROOT / "docs").as_posix()
    for folder in ("figures", "data")
    for path in (ROOT / "docs" / folder).iterdir()
    if path.name != "provenance.csv"
)


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("make_figures", ROOT / "docs/make_figures.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_committed_file_is_one_group_s(script: Any) -> None:
    assert sorted(file for group in script.GROUPS.values() for file in group.files) == COMMITTED


@pytest.mark.parametrize("file", COMMITTED)
def test_each_committed_file_is_the_one_that_is_recorded(file: str, script: Any) -> None:
    row = script.recorded()[file]
    (group,) = [group for group in script.GROUPS.values() if file in group.files]
    assert row["sha256"] == script.digest(ROOT / "docs" / file), "made by other means: bash docs/make_figures.sh NAME"
    assert row["command"] == "; ".join(group.commands)
    assert row["commit"] and row["date"]
    # made before there was a record: nobody knows where, and the commit is the last that changed the file
    assert bool(row["processor"]) == bool(row["torch"]) == bool(row["minutes"])


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no git history here")
def test_a_file_without_a_processor_carries_the_commit_that_changed_it_last(script: Any) -> None:
    def git(*given: str) -> str:
        return subprocess.run(["git", *given], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if git("rev-parse", "--is-shallow-repository") == "true":
        pytest.skip("a shallow clone does not have the commits")
    unknown = {file: row["commit"] for file, row in script.recorded().items() if not row["processor"]}
    assert {file: git("log", "-1", "--format=%h", "--abbrev=7", "--", f"docs/{file}") for file in unknown} == unknown


def test_the_commands_name_scripts_that_exist(script: Any) -> None:
    words = {word for group in script.GROUPS.values() for one in group.commands for word in one.split()}
    named = {word for word in words if word.endswith((".py", ".md"))}
    assert named and [word for word in named if not (ROOT / word).is_file()] == []


def test_a_group_leaves_its_files_and_their_record(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs/data").mkdir(parents=True)
    (tmp_path / "docs/data/provenance.csv").write_text(
        ",".join(script.COLUMNS) + "\n" + "data/old.csv" + "," * 7 + "\n"
    )
    groups = {
        "first": script.Group(("echo one > $OUT/a.csv",), {"data/first.csv": "a.csv"}, 1),
        "second": script.Group(("cat $OUT/a.csv $OUT/a.csv > $OUT/b.csv",), {"data/b.csv": "b.csv"}, 20, after="first"),
    }
    for name, value in {
        "ROOT": tmp_path,
        "PROVENANCE": tmp_path / "docs/data/provenance.csv",
        "GROUPS": groups,
    }.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "commit", lambda: "abcdef0+")
    script.main(["second"])
    assert (tmp_path / "docs/data/b.csv").read_text() == "one\none\n", "after the first, in its folder"
    rows = script.recorded()
    assert [*rows] == ["data/b.csv", "data/first.csv", "data/old.csv"]
    made = rows["data/b.csv"]
    assert made["commit"] == "abcdef0+" and made["processor"] and made["torch"] and float(made["minutes"]) >= 0
    assert made["sha256"] == script.digest(tmp_path / "docs/data/b.csv")
    groups["first"] = script.Group(("false",), {"data/first.csv": "a.csv"}, 1)
    with pytest.raises(subprocess.CalledProcessError):
        script.main(["first"])
    assert script.recorded() == rows, "what failed is not recorded"


def test_the_list_and_an_unknown_name(script: Any) -> None:
    def run(*given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "docs/make_figures.sh"), *given],
            env={**os.environ, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=False,
        )

    told = run("--list").stdout
    assert [name for name in script.GROUPS if f"{name}  {script.GROUPS[name].minutes} min" not in told] == []
    refused = run("no_such_group")
    assert refused.returncode == 1 and "Groups: organism" in refused.stderr
