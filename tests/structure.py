"""Figures of the package's structure, read from the source without running it: `python tests/structure.py`."""

import ast
import functools
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "gravlens"
Function = ast.FunctionDef | ast.AsyncFunctionDef
# module -> its extra: imported where it is used, for it may be absent
OPTIONAL = {"peft": "train", "plotly": "plots", "inspect_ai": "exchange"}
DIRECTIVES = ("# noqa", "# pyright", "# ruff", "# fmt", "# type:", "# --", "# ==")  # for tools, or headings


@functools.cache
def files() -> dict[str, Path]:
    """Module -> its file."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def stub(package: str) -> dict[str, str]:
    """Name of a lazily loaded face -> the module that has it, from its `__init__.pyi`."""
    path = files()[package].with_suffix(".pyi")
    if not path.exists():
        return {}
    found = {}
    for node in tree(path).body:
        if isinstance(node, ast.ImportFrom):
            base = f"{package}.{node.module}" if node.module else package
            found |= {a.name: f"{base}.{a.name}" if f"{base}.{a.name}" in files() else base for a in node.names}
    return found


def names(node: ast.AST) -> Iterator[str]:
    """What one import statement imports, in full; a relative one keeps its dots."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def imports(node: ast.AST) -> Iterator[str]:
    """Each imported name in `node`, in full, as `gravlens.core.errors.GravlensError`."""
    for inner in ast.walk(node):
        yield from names(inner)


def module_of(name: str) -> str:
    """The file that an import reads: the longest module that `name` begins with; a lazy face hands on to its file."""
    module = max((m for m in files() if f"{name}.".startswith(f"{m}.")), key=len, default="gravlens")
    rest = name.removeprefix(f"{module}.").split(".")[0] if name != module else ""
    target = stub(module).get(rest, module)
    return (
        target if target == module or name == f"{module}.{rest}" else module_of(target + name[len(module + rest) + 1 :])
    )


@functools.cache
def graph() -> dict[str, frozenset[str]]:
    """Module -> the modules that its file imports, `gravlens` itself (a lazy face) left out."""
    return {
        module: frozenset({module_of(n) for n in imports(tree(path)) if n.split(".")[0] == "gravlens"})
        - {module, "gravlens"}
        for module, path in files().items()
    }


@functools.cache
def floor(module: str) -> int:
    """Length of the longest chain of imports below a module, itself included."""
    return 1 + max((floor(below) for below in graph()[module]), default=0)


def chain() -> list[str]:
    """The longest chain of imports, from above."""
    found = [max(files(), key=floor)]
    while below := graph()[found[-1]]:
        found.append(max(sorted(below), key=floor))
    return found


def subpackage(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def functions() -> Iterator[tuple[str, Function]]:
    """`file:name` and definition of every function of the package."""
    for path in files().values():
        for node in ast.walk(tree(path)):
            if isinstance(node, Function):
                yield f"{path.relative_to(ROOT).as_posix()}:{node.name}", node


def body_lines(function: Function) -> int:
    """Lines of a function, its docstring not counted."""
    docstring = function.body[0] if ast.get_docstring(function) is not None else None
    lines = function.end_lineno - function.lineno + 1
    return lines - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def parameters(function: Function) -> int:
    """Parameters of a function, `self` and `cls` not counted."""
    arguments = [a.arg for a in function.args.posonlyargs + function.args.args + function.args.kwonlyargs]
    return len(arguments) - (arguments[:1] in (["self"], ["cls"]))


def is_command(function: Function) -> bool:
    """Whether typer makes a command of it, whose parameters are its options."""
    return any("command" in ast.unparse(decorator) for decorator in function.decorator_list)


def length(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def code_and_comments(path: Path) -> tuple[int, int]:
    """Lines of code (docstrings and blank lines not counted), and comments that explain it."""
    source = path.read_text(encoding="utf-8")
    docstrings: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node) is not None:
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code: set[int] = set()
    comments = 0
    silent = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments += not token.string.startswith(DIRECTIVES)
        elif token.type not in silent:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - docstrings), comments


def figures() -> dict[str, float]:
    """The row of docs/architecture.md."""
    bodies = sorted(body_lines(function) for _, function in functions())
    counted = [code_and_comments(path) for path in files().values()]
    folders = {subpackage(module) for module in files()} - {""}
    return {
        "lines": sum(map(length, files().values())),
        "files": len(files()),
        "subpackages": len(folders),
        "body p90": bodies[int(0.9 * len(bodies))],
        "body max": bodies[-1],
        "largest file": max(map(length, files().values())),
        "floors": max(map(floor, files())),
        "imports per file": round(sum(map(len, graph().values())) / len(files()), 2),
        "code lines per comment": round(sum(c for c, _ in counted) / sum(n for _, n in counted), 1),
    }


if __name__ == "__main__":
    for figure, value in figures().items():
        print(f"{figure:24} {value:,}")
    print("longest chain:", " > ".join(module.removeprefix("gravlens.") for module in chain()))
