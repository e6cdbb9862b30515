"""Laws of the code: nothing unpickles or prints, dependencies are declared and pinned, no machine's paths."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import structure
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]

PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
UNSAFE = {"trust_remote_code", "allow_pickle"}

# file:function -> why its **kwargs may be
CALLBACK = "TrainerCallback's signature: Trainer hands over all that it has"
KEYWORDS_ALLOWED = {
    "gravlens/activations/reader.py:update": "transformers' own Cache.update, whose arguments differ by version",
    **{
        f"gravlens/training/finetune.py:on_{event}": CALLBACK
        for event in ("train_begin", "step_begin", "pre_optimizer_step", "step_end", "save", "train_end")
    },
    **{
        f"gravlens/organisms/arms.py:{name}": "the fields of a blocker, which checks them itself"
        for name in ("_penalty", "_projection", "_make", "blocker")
    },
    **{f"gravlens/training/monitor.py:on_{event}": CALLBACK for event in ("train_begin", "step_end")},
    **{
        f"gravlens/blockers/blocking.py:on_{event}": CALLBACK
        for event in ("train_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "log")
    },
}
KEYWORDS_ALLOWED["gravlens/exchange/inspect_eval.py:__init__"] = "Inspect's -M options, handed to open_model"
KEYWORDS_ALLOWED["gravlens/cli/output.py:print_answer"] = "the tables of a script, by the names that --json prints"
# distribution -> who imports it, where gravlens does not
NEEDED_BY_OTHERS = {"accelerate": "transformers.Trainer"}
# file -> why it may call torch.load, and there only in the words `weights_only=True`
TENSORS_ALONE = {
    "gravlens/exchange/control_vectors.py": "lm-evaluation-harness takes steering vectors as .pt and in no other form"
}

TREES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for folder in ("gravlens", "analyses")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
PACKAGE = {name: tree for name, tree in TREES.items() if name.startswith("gravlens/")}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

every_file = pytest.mark.parametrize("file", TREES)
every_package_file = pytest.mark.parametrize("file", PACKAGE)


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
    found = [name for name in structure.imports(tree) if name.split(".")[0] in PICKLES or name == "torch.load"]
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
    assert [name for name in found if name != "print" or not file.startswith("gravlens/cli/")] == []


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
    open_ended = {
        f"{file}:{node.name}"
        for node in [node for node in ast.walk(TREES[file]) if isinstance(node, structure.Function)]
        if node.args.kwarg
    }
    assert open_ended == {known for known in KEYWORDS_ALLOWED if known.startswith(f"{file}:")}


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


def test_every_file_has_a_subject() -> None:
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
    names = {name.split(".")[0] for tree in PACKAGE.values() for name in structure.imports(tree)}
    third_party = names - set(sys.stdlib_module_names) - {"gravlens"} - structure.OPTIONAL.keys()
    distributions = packages_distributions()
    imported = {canonicalize_name(distributions[name][0]) for name in third_party}
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert declared == imported | NEEDED_BY_OTHERS.keys()


@pytest.mark.parametrize(("module", "extra"), structure.OPTIONAL.items())
def test_what_is_optional_is_declared_by_its_extra(module: str, extra: str) -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["optional-dependencies"][extra]}
    assert canonicalize_name(module) in declared
