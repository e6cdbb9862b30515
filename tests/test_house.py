"""The house: order of imports, budgets, laziness, dependencies, and what must not be committed."""

import ast
import graphlib
import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import gravlens

ROOT = Path(__file__).resolve().parents[1]

# A room imports only rooms before it; the files of a folder are one room.
ROOMS = (
    "errors html progress prompt_files precision placement prompts store folders hub sequence_file checkpoints "
    "processing adapters ahead bridge models swapping tokenizer inference gguf positions passes fingerprints "
    "residual_store readings stored_readings residuals moments costs machine planning contrasts behavior strongreject "
    "judges divergence covariance directions estimators trajectory plane geometry subspaces interventions hooks "
    "weights exchange inspect_logs signs nulls choices noise controls damage resampling crossfit decomposition "
    "inspection readout effects questions ablation selectivity tradeoff demands claims refusal leaks blocking blockers "
    "thresholds monitor finetune arms style plots frontiers heatmaps plane_plots paper report fetch settings workers "
    "experiment gathering findings comparison paired reproduce cli"
).split()

FILE_LINES, FUNCTION_LINES, PARAMETERS = 350, 40, 7
HEAVY = {"torch", "transformers", "transformer_lens", "matplotlib", "pandas", "scipy"}
PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE = {"trust_remote_code", "allow_pickle"}

# file:function -> why its **kwargs may be
CALLBACK = "TrainerCallback's signature: Trainer hands over all that it has"
KEYWORDS_ALLOWED = {
    "gravlens/passes.py:update": "transformers' own Cache.update, whose arguments differ by version",
    **{
        f"gravlens/finetune.py:on_{event}": CALLBACK for event in ("train_begin", "step_begin", "step_end", "train_end")
    },
    **{f"gravlens/monitor.py:on_{event}": CALLBACK for event in ("train_begin", "step_end")},
    **{
        f"gravlens/blocking.py:on_{event}": CALLBACK
        for event in ("train_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "log")
    },
}
# file:function -> why it may have more parameters
PARAMETERS_ALLOWED = {
    "gravlens/residuals.py:cache_residuals": "the engine's one door: what, where, how, and whose work",
    "gravlens/finetune.py:finetune": "training's one door: from where, on what, how, and who takes part or watches",
}
# distribution -> who imports it, where gravlens does not
NEEDED_BY_OTHERS = {"accelerate": "transformers.Trainer"}
# module -> its extra: imported where it is used
OPTIONAL = {"peft": "train", "plotly": "plots", "inspect_ai": "exchange"}
# file -> why it may call torch.load, and there only in the words `weights_only=True`
TENSORS_ALONE = {"gravlens/exchange.py": "lm-evaluation-harness takes steering vectors as .pt and in no other form"}

TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for folder in ("gravlens", "analyses")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PACKAGE = {name: tree for name, tree in TREES.items() if name.startswith("gravlens/")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PUBLIC = [
    (node.module, alias.asname or alias.name)
    for node in ast.parse((ROOT / "gravlens/__init__.pyi").read_text()).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
]

every_file = pytest.mark.parametrize("file", TREES)
every_package_file = pytest.mark.parametrize("file", PACKAGE)


# -- order of imports --------------------------------------------------------------------------------------------------


def imports(tree: ast.AST) -> Iterator[str]:
    """Each imported name in full, as `gravlens.errors.GravlensError`; a relative one keeps its dots."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def room(file: str) -> str:
    return Path(file).with_suffix("").parts[1]


def too_late(tree: ast.AST, own: str) -> list[str]:
    """Imports of `own` room's file that are neither of an earlier room nor of its own."""
    allowed = {*ROOMS[: ROOMS.index(own) + 1], "__version__"} if own in ROOMS else set()
    inner = [name for name in imports(tree) if name.startswith(".") or name.split(".")[0] == "gravlens"]
    return [name for name in inner if name.startswith(".") or f"{name}.".split(".")[1] not in allowed]


@every_package_file
def test_a_room_imports_only_earlier_rooms(file: str) -> None:
    assert too_late(PACKAGE[file], room(file)) == []


@pytest.mark.parametrize(
    "source",
    [
        "import gravlens",
        "import gravlens.cli",
        "from gravlens import Direction",
        "from gravlens.plots import plot_arms",
        "from . import errors",
        "from .errors import GravlensError",
        "def f():\n    from gravlens.cli import app",
    ],
)
def test_a_late_import_is_seen(source: str) -> None:
    assert too_late(ast.parse(source), "models")
    assert not too_late(ast.parse("from gravlens import __version__, errors\nimport gravlens.store, torch"), "models")


def test_every_file_stands_in_the_list_of_rooms() -> None:
    assert {room(file) for file in PACKAGE} - {"__init__"} == set(ROOMS)


def test_no_import_cycle() -> None:
    modules = {file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file for file in PACKAGE}

    def file_of(name: str) -> str:
        """The module that an import is of: `gravlens.cli.rooms` is that file, not its folder's `__init__` too."""
        return max((other for other in modules if f"{name}.".startswith(f"{other}.")), key=len, default="gravlens")

    graph = {
        module: {file_of(name) for name in imports(PACKAGE[file])} - {module, "gravlens"}
        for module, file in modules.items()
    }
    graphlib.TopologicalSorter(graph).prepare()


@every_package_file
def test_modules_import_at_their_top(file: str) -> None:
    functions = [node for node in ast.walk(PACKAGE[file]) if isinstance(node, ast.FunctionDef)]
    inner = [name for function in functions for name in imports(function)]
    assert [name for name in inner if name.split(".")[0] not in OPTIONAL] == []


# -- what no file may hold ---------------------------------------------------------------------------------------------


def switched_on(node: ast.AST) -> list[str]:
    """Names among UNSAFE that a keyword or a dict sets to anything but False."""
    pairs = [(node.arg, node.value)] if isinstance(node, ast.keyword) else []
    if isinstance(node, ast.Dict):
        pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
    return [name for name, value in pairs if name in UNSAFE and getattr(value, "value", None) is not False]


def loads_tensors_alone(node: ast.AST) -> bool:
    """`torch.load(…, weights_only=True)` in these very words: no variable, nothing unpacked, no other unpickler."""
    if not isinstance(node, ast.Call) or ast.unparse(node.func) != "torch.load":
        return False
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
    return (
        len(node.args) == 1 and given.get("weights_only") is True and given.keys() <= {"map_location", "weights_only"}
    )


def forbidden(tree: ast.AST, tensors_alone: bool = False) -> list[str]:
    """Calls, imports and switches that run what a file holds, or that write to the screen."""
    safe = [node.func for node in ast.walk(tree) if tensors_alone and loads_tensors_alone(node)]
    found = [name for name in imports(tree) if name.split(".")[0] in PICKLES or name == "torch.load"]
    for node in ast.walk(tree):
        found += switched_on(node)
        match node:
            case ast.Call(func=ast.Name(id="print")):
                found.append("print")
            case ast.Attribute(value=ast.Name(id="torch"), attr="load") if any(node is one for one in safe):
                continue
            case ast.Attribute(value=ast.Name(id="torch"), attr="load") | ast.Attribute(attr="read_pickle"):
                found.append(node.attr)
    return found


@every_package_file
def test_nothing_prints_or_unpickles(file: str) -> None:
    found = forbidden(PACKAGE[file], tensors_alone=file in TENSORS_ALONE)
    assert [name for name in found if name != "print" or room(file) != "cli"] == []


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "import pickle",
        "from pickle import loads",
        "torch.load(f)",
        "from torch import load",
        "pd.read_pickle(f)",
        "g(trust_remote_code=True)",
        "np.load(f, allow_pickle=x)",
        "g(**{**other, 'trust_remote_code': 1})",
    ],
)
def test_what_is_forbidden_is_seen(source: str) -> None:
    assert forbidden(ast.parse(source))
    safe = "g(trust_remote_code=False)\nd = {'allow_pickle': False}\njson.load(f)\nfrom torch import nn"
    assert not forbidden(ast.parse(safe))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=x)",
        "torch.load(f, weights_only=1)",
        "torch.load(f, **{'weights_only': True})",
        "torch.load(f, weights_only=True, **more)",
        "torch.load(f, weights_only=True, pickle_module=other)",
        "torch.load(*files, weights_only=True)[0](torch.load)",
        "load = torch.load",
        "from torch import load\nload(f, weights_only=True)",
        "torch.load(f, weights_only=True)\ntorch.load(g)",
        "torch.load(f, weights_only=True)\nimport pickle",
    ],
)
def test_torch_load_is_seen_but_where_it_opens_tensors_alone(source: str) -> None:
    assert forbidden(ast.parse(source), tensors_alone=True)
    safe = ast.parse("torch.load(f, map_location='cpu', weights_only=True)")
    assert forbidden(safe) == ["load"] and not forbidden(safe, tensors_alone=True)


@every_file
def test_no_keywords_are_passed_through_unread(file: str) -> None:
    open_ended = {f"{file}:{node.name}" for node in functions_of(TREES[file]) if node.args.kwarg}
    assert open_ended == {known for known in KEYWORDS_ALLOWED if known.startswith(f"{file}:")}


# -- budgets -----------------------------------------------------------------------------------------------------------


def functions_of(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def is_command(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether typer makes a command of it, whose parameters are its options."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


def over_budget(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """What `function` exceeds, its docstring and self not counted."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    lines = function.end_lineno - function.lineno + 1
    lines -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
    arguments = [a.arg for a in function.args.posonlyargs + function.args.args + function.args.kwonlyargs]
    parameters = len(arguments) - (arguments[:1] in (["self"], ["cls"]))
    return [
        f"{function.name} has {count} {what}, and {budget} are allowed"
        for count, budget, what in [(lines, FUNCTION_LINES, "lines"), (parameters, PARAMETERS, "parameters")]
        if count > budget and not is_command(function)
    ]


@every_file
def test_budgets(file: str) -> None:
    assert len((ROOT / file).read_text().splitlines()) <= FILE_LINES
    excesses = [
        excess
        for function in functions_of(TREES[file])
        for excess in over_budget(function)
        if f"{file}:{function.name}" not in PARAMETERS_ALLOWED or "lines" in excess
    ]
    assert excesses == []


def test_a_budget_is_met_at_its_edge_and_exceeded_one_further() -> None:
    def excess(lines: int, parameters: int) -> list[str]:
        names = ", ".join(["self", "*", *(f"a{i}" for i in range(parameters))])
        body = '    """Two lines\n    of docstring."""\n' + "    pass\n" * (lines - 1)
        return over_budget(functions_of(ast.parse(f"def f({names}):\n{body}"))[0])

    assert excess(FUNCTION_LINES, PARAMETERS) == []
    assert len(excess(FUNCTION_LINES + 1, PARAMETERS)) == len(excess(FUNCTION_LINES, PARAMETERS + 1)) == 1


# -- the lazy door -----------------------------------------------------------------------------------------------------


def fresh_python(code: str) -> str:
    """What `code` writes in a new interpreter; its own imports are its only ones."""
    environment = {name: value for name, value in os.environ.items() if name != "EAGER_IMPORT"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, json, gravlens; print(json.dumps([sorted(sys.modules), dir(gravlens)]))"
    loaded, public = json.loads(fresh_python(code))
    assert "gravlens" in loaded and HEAVY.isdisjoint(loaded)
    assert {name for _, name in PUBLIC} <= set(public)


def test_stub_and_public_names_agree() -> None:
    assert sorted(name for _, name in PUBLIC) == sorted(gravlens.__all__)


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_public_name_resolves_and_explains_itself(module: str, name: str) -> None:
    public = getattr(gravlens, name)
    assert public is getattr(importlib.import_module(f"gravlens.{module}"), name)
    if inspect.isclass(public) or inspect.isroutine(public):
        written = public.__doc__ or ""
        assert written.strip() and not written.startswith(f"{name}("), "a dataclass's own signature is no docstring"


# -- what is committed -------------------------------------------------------------------------------------------------


def committed() -> list[Path]:
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("this is no git checkout")
    return [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def machine_paths(text: str) -> list[str]:
    folders = "|".join(["root", "home", "work", "farm", "tmp", "Users"])
    return re.findall(rf"(?:(?<![\w.~}}/-])|(?<=file://))/(?:{folders})/[\w.]+", text)


def test_nothing_of_this_machine_is_committed() -> None:
    found = {}
    for path in committed():
        content = path.read_bytes()
        if b"\0" not in content and (paths := machine_paths(content.decode(errors="replace"))):
            found[path.relative_to(ROOT).as_posix()] = paths
    assert found == {}


@pytest.mark.parametrize("folder", ["root", "home", "tmp", "Users"])
def test_a_machine_path_is_seen(folder: str) -> None:
    assert machine_paths(f'weights = "/{folder}/me/weights"') and machine_paths(f"file:///{folder}/me")
    assert not machine_paths(f"https://example.org/{folder}/me and docs/{folder}/me")


def test_no_room_without_a_subject() -> None:
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert [path.name for path in committed() if path.suffix == ".py" and path.stem in vague] == []


# -- dependencies ------------------------------------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for lines in (PROJECT["dependencies"], *extras) for line in lines]


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_requirement_is_bounded_and_pinned_within_its_bounds(requirement: Requirement) -> None:
    assert {"<", "<=", "==", "~="} & {clause.operator for clause in requirement.specifier}
    pins = dict(line.split("==") for line in constraints())
    assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])


def constraints() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_constraints_are_exact_and_of_no_machine() -> None:
    assert [line for line in constraints() if not re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line)] == []


def test_what_is_imported_is_what_is_declared() -> None:
    names = {name.split(".")[0] for tree in PACKAGE.values() for name in imports(tree)}
    third_party = names - set(sys.stdlib_module_names) - {"gravlens"} - OPTIONAL.keys()
    distributions = packages_distributions()
    imported = {canonicalize_name(distributions[name][0]) for name in third_party}
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert declared == imported | NEEDED_BY_OTHERS.keys()


@pytest.mark.parametrize(("module", "extra"), OPTIONAL.items())
def test_what_is_optional_is_declared_by_its_extra(module: str, extra: str) -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]}
    assert canonicalize_name(module) in declared
