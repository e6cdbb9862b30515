"""The contract of docs/architecture.md: arrows downward between subpackages, no cycle, budgets, a small public face."""

import ast
import graphlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import structure

import gravlens

# A subpackage imports only those before it. Faces and the command line come last.
SUBPACKAGES = (
    "core history models activations behavior directions interventions stats plot blockers training exchange organisms "
    "claims reporting studies cli"
).split()
FILES, FILE_LINES, BODY_LINES, BODY_P90, PARAMETERS = 9, 600, 45, 20, 7
FLOORS, FOLDER_FLOORS, CODE_PER_COMMENT, TOP_NAMES = 18, 11, 15, 40
# Where it stands: the goals are 3.5 imports and 17,000 lines. A raise is written down with its reason in
# docs/architecture.md.
IMPORTS, LINES = 4.98, 26_450
# file:function -> why it may have more parameters
MORE_PARAMETERS = {
    "gravlens/activations/residuals.py:cache_residuals": "what is read, where, how, and by whom",
    "gravlens/training/finetune.py:finetune": "from where, on what, how, and who takes part or watches",
    "gravlens/training/monitor.py:__init__": "along what, on which prompts, when, from where, and when to stop",
    "gravlens/history/sequence.py:from_folders": "all that SEQUENCE.toml may say",
    "gravlens/history/sequence.py:from_models": "all that SEQUENCE.toml may say",
    "gravlens/stats/power_analysis.py:power": "the numbers of a study, and what it is simulated from",
}
HEAVY = {"torch", "transformers", "transformer_lens", "matplotlib", "pandas", "scipy", "sklearn", "xarray"}

every_file = pytest.mark.parametrize("module", structure.files())


def folders() -> dict[str, set[str]]:
    """Subpackage -> the subpackages that its files import."""
    found: dict[str, set[str]] = {name: set() for name in SUBPACKAGES}
    for module, below in structure.graph().items():
        own = structure.subpackage(module)
        if own:
            found[own] |= {structure.subpackage(other) for other in below} - {own, ""}
    return found


@every_file
def test_imports_go_downward(module: str) -> None:
    own = structure.subpackage(module)
    allowed = SUBPACKAGES[: SUBPACKAGES.index(own) + 1] if own else []
    assert [other for other in structure.graph()[module] if structure.subpackage(other) not in allowed] == []


def test_an_upward_import_would_be_seen() -> None:
    """The resolution of names, on which the rule above stands: files, faces, and names of a face."""
    assert structure.module_of("gravlens.core.errors.GravlensError") == "gravlens.core.errors"
    assert structure.module_of("gravlens.studies.audit") == "gravlens.studies.audit"
    assert structure.module_of("gravlens.locate_vrev") == "gravlens.directions.vrev"
    assert structure.module_of("gravlens.nulls.isotropic") == "gravlens.stats.nulls"
    assert structure.subpackage("gravlens.cli.options") == "cli"


def test_no_cycle_between_files() -> None:
    graphlib.TopologicalSorter(structure.graph()).prepare()


@every_file
def test_imports_are_absolute_and_at_the_top(module: str) -> None:
    tree = structure.tree(structure.files()[module])
    assert [name for name in structure.imports(tree) if name.startswith(".")] == []
    inner = [
        name for node in ast.walk(tree) if isinstance(node, structure.Function) for name in structure.imports(node)
    ]
    assert [name for name in inner if name.split(".")[0] not in structure.OPTIONAL] == []


def test_subpackages_are_few_and_small() -> None:
    counts = dict.fromkeys(SUBPACKAGES, 0)
    for module, path in structure.files().items():
        if path.name not in ("__init__.py", "__main__.py"):
            counts[structure.subpackage(module)] += 1
    assert {name: count for name, count in counts.items() if not 0 < count <= FILES} == {}


@every_file
def test_a_face_lists_each_of_its_files(module: str) -> None:
    path = structure.files()[module]
    if path.name == "__init__.py" and structure.subpackage(module) not in ("", "cli"):
        beside = {f"{module}.{other.stem}" for other in path.parent.glob("*.py") if not other.stem.startswith("__")}
        assert beside == {target for target in structure.stub(module).values() if target in beside} == beside


def test_budgets_of_files_and_functions() -> None:
    long_files = {m: n for m, path in structure.files().items() if (n := structure.length(path)) > FILE_LINES}
    long_bodies = {name: n for name, node in structure.functions() if (n := structure.body_lines(node)) > BODY_LINES}
    wide = {
        name: n
        for name, node in structure.functions()
        if (n := structure.parameters(node)) > PARAMETERS and not structure.is_command(node)
    }
    assert long_files == {} and long_bodies == {} and wide.keys() == MORE_PARAMETERS.keys()


@pytest.mark.parametrize(
    ("figure", "budget"),
    [
        ("floors", FLOORS),
        ("imports per file", IMPORTS),
        ("body p90", BODY_P90),
        ("code lines per comment", CODE_PER_COMMENT),
        ("lines", LINES),
    ],
)
def test_budgets_of_the_package(figure: str, budget: float) -> None:
    assert structure.figures()[figure] <= budget


def test_floors_of_subpackages() -> None:
    below = folders()
    depth: dict[str, int] = {}
    for name in SUBPACKAGES:
        depth[name] = 1 + max((depth[other] for other in below[name]), default=0)
    assert max(depth.values()) <= FOLDER_FLOORS


def test_a_body_is_counted_without_its_docstring() -> None:
    source = 'def f(self, *, a, b):\n    """Two lines\n    of docstring."""\n    x = 1\n    return x\n'
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert structure.body_lines(function) == 3 and structure.parameters(function) == 2


# -- the public face ---------------------------------------------------------------------------------------------------


def public() -> dict[str, object]:
    return {name: getattr(gravlens, name) for name in gravlens.__all__}


def test_the_top_is_small_and_the_rest_in_namespaces() -> None:
    top = [name for name, value in public().items() if not inspect.ismodule(value)]
    assert 30 <= len(top) <= TOP_NAMES


def test_every_public_name_resolves_and_explains_itself() -> None:
    silent = []
    for name, value in public().items():
        inner = vars(value) if inspect.ismodule(value) else {name: value}
        for own, thing in inner.items():
            is_own = getattr(thing, "__module__", "").startswith("gravlens") and not own.startswith("_")
            if is_own and (inspect.isclass(thing) or inspect.isfunction(thing)):
                written = (thing.__doc__ or "").strip()
                # the docstring that a dataclass makes for itself is its signature
                silent += [] if written and not written.startswith(f"{thing.__name__}(") else [f"{name}: {own}"]
    assert silent == []


def test_no_top_level_function_has_the_name_of_a_subpackage() -> None:
    functions = {name for name, value in public().items() if not inspect.ismodule(value)}
    assert functions.isdisjoint(SUBPACKAGES)


def fresh_python(code: str) -> str:
    """What `code` prints in a new interpreter; its own imports are its only ones."""
    environment = {name: value for name, value in os.environ.items() if name != "EAGER_IMPORT"}
    command = [sys.executable, "-c", code]
    root = Path(structure.ROOT)
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy() -> None:
    loaded = json.loads(fresh_python("import sys, json, gravlens; print(json.dumps(sorted(sys.modules)))"))
    assert "gravlens" in loaded and HEAVY.isdisjoint(loaded)
