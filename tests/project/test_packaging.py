"""What is built: a wheel that holds the package and nothing else, an sdist that builds it, and what they declare."""

import email
import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import gravlens

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSIONS = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
EXTRAS = {"train", "cluster", "docs", "dev"}
# no network, no build environment: what `python -m build` calls, called here
BUILDS = {"wheel": WheelBuilder, "sdist": SdistBuilder}


def built(kind: str, root: Path, folder: Path) -> Path:
    """The one file that hatchling builds of a checkout or an unpacked sdist."""
    (artifact,) = BUILDS[kind](str(root)).build(directory=str(folder), versions=["standard"])
    return Path(artifact)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(built("sdist", ROOT, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"gravlens-{gravlens.__version__}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(built("wheel", ROOT, tmp_path_factory.mktemp("wheel")))


def package_files(root: Path) -> set[str]:
    """Files of the package; Python's caches are none."""
    files = [path for path in (root / "gravlens").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(root).as_posix() for path in files}


# -- what is in them ---------------------------------------------------------------------------------------------------


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    own = {name for name in names if not name.startswith(f"gravlens-{gravlens.__version__}.dist-info/")}
    assert own == package_files(ROOT)
    assert {"gravlens/py.typed", "gravlens/__init__.pyi", "gravlens/reporting/report.html.jinja"} <= own
    assert {"gravlens/organisms/refusal.py", "gravlens/blockers/penalty.py"} <= own
    assert [name for name in names - own if name.endswith("licenses/LICENSE")]


def test_the_wheel_says_what_it_is(wheel: zipfile.ZipFile) -> None:
    (path,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(wheel.read(path))
    assert (metadata["Name"], metadata["Version"]) == ("gravlens", gravlens.__version__)
    assert metadata["Requires-Python"] == ">=3.11" and metadata["License-Expression"] == "MIT"
    assert set(metadata.get_all("Provides-Extra", [])) >= EXTRAS
    assert b"gravlens = gravlens.cli:app" in wheel.read(path.replace("METADATA", "entry_points.txt"))


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    again = zipfile.ZipFile(built("wheel", sdist, tmp_path))
    assert {name: again.read(name) for name in again.namelist()} == {n: wheel.read(n) for n in wheel.namelist()}


def test_the_sdist_has_tests_and_docs_and_nothing_built(sdist: Path) -> None:
    wanted = [
        "tests/project/test_packaging.py",
        "docs/index.md",
        "mkdocs.yml",
        "constraints.txt",
        "LICENSE",
        "CITATION.cff",
    ]
    assert [name for name in wanted if not (sdist / name).is_file()] == []
    unwanted = ["site", "results", ".ci", ".git", ".venv", "dist"]
    assert [name for name in unwanted if (sdist / name).exists()] == []


def test_what_is_unpacked_imports(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = "import gravlens; from gravlens import GravlensError; print(gravlens.__file__, len(dir(gravlens)))"
    command = [sys.executable, "-c", code]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    file, names = run.stdout.split()
    assert Path(file) == tmp_path / "gravlens/__init__.py" and int(names) >= len(gravlens.__all__)


# -- versions of Python ------------------------------------------------------------------------------------------------


def declared(requirement: str) -> Iterator[str]:
    """Versions of Python that we declare and an installed dependency does not."""
    try:
        found = distribution(Requirement(requirement).name)
    except PackageNotFoundError:  # of an extra that is not installed here
        return
    allowed = SpecifierSet(found.metadata["Requires-Python"] or "")
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(found.metadata.get_all("Classifier") or []))
    # some name none, or their oldest alone: these speak by Requires-Python
    told = {version for version in named if version in VERSIONS} or set(VERSIONS)
    yield from (version for version in VERSIONS if not allowed.contains(f"{version}.9") or version not in told)


def test_this_python_is_declared_and_the_rest_is_what_every_dependency_declares() -> None:
    assert VERSIONS[0] == "3.11" and PROJECT["requires-python"] == ">=3.11"
    extras = PROJECT["optional-dependencies"]
    needed = [*PROJECT["dependencies"], *extras["train"], *extras["cluster"]]
    assert {line: versions for line in needed if (versions := list(declared(line)))} == {}


# -- the citation ------------------------------------------------------------------------------------------------------


def test_the_citation_is_of_this_version_and_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "date-released"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (gravlens.__version__, PROJECT["license"])
    assert citation["authors"] == PROJECT["authors"]
    (paper,) = citation["references"]
    assert paper["identifiers"] == [{"type": "other", "value": "arXiv:2606.28525"}]


def test_types_are_declared_and_the_stub_lies_beside_them() -> None:
    spec = importlib.util.find_spec("gravlens")
    assert spec is not None and spec.origin is not None
    assert (Path(spec.origin).parent / "py.typed").is_file() and "Typing :: Typed" in PROJECT["classifiers"]
