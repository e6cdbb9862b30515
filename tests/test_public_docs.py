"""Every public name says what it takes and gives: parameters, shapes, units, errors, and where its formula is from.

The rules, over `gravlens.__all__` and the public methods of its classes, read from the source without running it:

- each parameter (of a class: each field) stands under `Args:` (`Attributes:`) or in backticks in the text. Where there
  are one or two and their type says all (a noun of gravlens, an array with its shape, a path), no section is needed. A
  text may hand over to another function with "see `that`, like all that is not named here";
- arrays and tensors have a shape, in jaxtyping's form (weights by name, `Mapping[str, Tensor]`, have any);
- what raises a GravlensError, itself or by a function of its own file, has `Raises:` or names the error;
- what gives a table names its columns in backticks;
- the description of a real number says its unit, or the kind of number that has none (cosine, share, probability, …);
- functions of the SOURCED files, which hold estimators, nulls, tests and measures, give an equation, a reference or
  the page of docs/ that does.
"""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import gravlens

PACKAGE = Path(gravlens.__file__).parent
Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef

# files whose public functions compute what is defined elsewhere
SOURCED = set(
    "directions estimators choices trajectory geometry covariance subspaces nulls noise controls damage resampling "
    "crossfit decomposition readout behavior judges strongreject divergence effects weights refusal leaks "
    "tradeoff".split()
)
UNSOURCED = {
    "direction_from": "what is given",
    "final_choices": "means of another's table",
    "generate_answers": "texts",
    "span_of": "what is given",
}
EQUATION = re.compile(r"[⟨‖Σ√σ½⁻²]|log p\(|[\w)\]] (?:=|←|≈|−|\+|·|/) [\w(]")
REFERENCE = re.compile(r"\b(?:18|19|20)\d\d\b|arXiv|docs/\w+\.md")
UNIT = re.compile(
    r"\bunits?\b|nats|degrees|seconds|bytes|logits?\b|distances?\b|lengths?\b|total norm|"  # it has a unit
    r"fractions?\b|shares?\b|probabilit|cosine|alignment|correlation|ratio|p-value|\bp\b|λ|β|strength|rank|"  # or none
    r"\b0 to 1\b|\bfrom 0\b|between 0 and 1|score|measure|harm\b|difference of each|steps since|rating|else 0"
)
EVERYWHERE = {"ax"}  # means the same in every figure: the Axes to draw on; None makes new ones


# -- what there is -----------------------------------------------------------------------------------------------------


@functools.cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))


@functools.cache
def public() -> dict[str, tuple[str, Documented]]:
    """Name -> its file, and its definition there (of overloads, the one that runs)."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    files = {a.name: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for a in node.names}
    found = {}
    for name in gravlens.__all__:
        nodes = [node for node in tree(files[name]).body if isinstance(node, Documented) and node.name == name]
        found[name] = (files[name], nodes[-1])
    return found


def methods(node: Documented) -> Iterator[Function]:
    """The public methods of a class that are its own."""
    for inner in node.body if isinstance(node, ast.ClassDef) else ():
        if isinstance(inner, Function) and not inner.name.startswith("_"):
            yield inner


CALLABLES = {
    **{name: (module, node) for name, (module, node) in public().items() if isinstance(node, Function)},
    **{
        f"{name}.{method.name}": (module, method)
        for name, (module, node) in public().items()
        for method in methods(node)
    },
}
CLASSES = {name: (module, node) for name, (module, node) in public().items() if isinstance(node, ast.ClassDef)}
DOCUMENTED = {**CALLABLES, **CLASSES}
every_name = pytest.mark.parametrize("name", DOCUMENTED)


def text_of(node: Documented) -> str:
    return ast.get_docstring(node) or ""


def sections(node: Documented) -> dict[str, str]:
    """Heading -> what stands under it; the text before the first one under ""."""
    parts = re.split(r"^(Args|Attributes|Returns|Yields|Raises):\n", text_of(node), flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def items(section: str) -> dict[str, str]:
    """Name -> description, of a section with an item a line and its further lines indented."""
    return dict(re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE))


def parameters(node: Documented) -> dict[str, ast.expr | None]:
    """Parameter, or field of a dataclass -> its annotation."""
    if isinstance(node, ast.ClassDef):
        made = next((f for f in node.body if isinstance(f, Function) and f.name == "__init__"), None)
        if made:
            return parameters(made)
        fields = [
            inner for inner in node.body if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name)
        ]
        return {f.target.id: f.annotation for f in fields if not f.target.id.startswith("_")}
    arguments = [*node.args.posonlyargs, *node.args.args, *filter(None, [node.args.vararg]), *node.args.kwonlyargs]
    return {a.arg: a.annotation for a in arguments if a.arg not in {"self", "cls"} and not a.arg.startswith("_")}


# -- the rules ---------------------------------------------------------------------------------------------------------

SHAPED = {"Float", "Int", "Bool"}
NOUNS = {*CLASSES, "Span", "Spans", "Judge", "Prompts", "Source", "Path"}
HANDS_OVER = re.compile(r"see `(\w+)`, like all that is not named here")


def says_all(annotation: ast.expr | None) -> bool:
    """Whether a type is a noun of gravlens, an array with its shape, or a path."""
    return annotation is not None and any(
        isinstance(node, ast.Name) and node.id in NOUNS | SHAPED for node in ast.walk(annotation)
    )


def described(node: Documented) -> dict[str, str]:
    """Parameter or field -> its description, also where the text hands over to another function."""
    own = sections(node)
    handed = HANDS_OVER.search(text_of(node))
    listed = items(sections(public()[handed[1]][1])["Args"]) if handed else {}
    return listed | items(own.get("Args", "") + own.get("Attributes", ""))


def undescribed(node: Documented) -> list[str]:
    """Parameters that are not described, nor stand in backticks in the text, and whose type is not enough."""
    found, listed, text = parameters(node), described(node), text_of(node)
    missing = [name for name in found if name not in listed and not re.search(rf"`[^`]*\b{name}\b[^`]*`", text)]
    obvious = len(found) <= 2 and not listed
    return [name for name in missing if not (obvious and says_all(found[name]))]


def unknown(node: Documented) -> list[str]:
    """What `Args:` describes and is no parameter (any more)."""
    return [name for name in items(sections(node).get("Args", "")) if name not in parameters(node)]


def shapeless(annotation: ast.AST | None) -> bool:
    """Whether a type holds an array or tensor outside of `Float[array, shape]` and its like."""
    match annotation:
        case ast.Subscript(value=ast.Name(id=name)) if name in SHAPED:
            return False
        case ast.Subscript(value=ast.Name(id="Mapping")) if ast.unparse(annotation) == "Mapping[str, Tensor]":
            return False
        case ast.Attribute(attr="ndarray") | ast.Attribute(attr="Tensor") | ast.Name(id="Tensor"):
            return True
    return annotation is not None and any(map(shapeless, ast.iter_child_nodes(annotation)))


def called(node: ast.AST) -> set[str]:
    return {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def refuses(node: ast.AST, others: dict[str, ast.AST], seen: frozenset[str] = frozenset()) -> bool:
    """Whether a function raises GravlensError, itself or by what it calls of its own file."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Raise) and inner.exc is not None and "GravlensError" in ast.unparse(inner.exc):
            return True
    further = called(node) & others.keys() - seen
    return any(refuses(others[name], others, seen | further) for name in further)


def functions_of(module: str) -> dict[str, ast.AST]:
    return {node.name: node for node in tree(module).body if isinstance(node, Function)}


def says_its_errors(node: Documented) -> bool:
    return "Raises" in sections(node) or "GravlensError" in text_of(node) or bool(HANDS_OVER.search(text_of(node)))


def columns_missing(node: Documented) -> bool:
    """Whether a function gives a table and does not name its columns."""
    gives = ast.unparse(node.returns) if isinstance(node, Function) and node.returns else ""
    return "DataFrame" in gives and not re.search(r"`[\w.]+(?:, \w+)*`", sections(node).get("Returns", text_of(node)))


def real(annotation: ast.AST | None) -> bool:
    text = ast.unparse(annotation) if annotation else ""
    return text.startswith(("Float[", "Sequence[float]")) or text in {"float", "float | None"}


def unitless(node: Documented) -> list[str]:
    """Real numbers, taken or given, whose description has no unit: their item, or the text where they have none."""
    listed, own = described(node), sections(node)
    texts = {name: f"{name.replace('_', ' ')}: {listed.get(name, own[''])}" for name in parameters(node)}
    found = [name for name, annotation in parameters(node).items() if real(annotation) and not UNIT.search(texts[name])]
    gives = isinstance(node, Function) and real(node.returns)
    return found + ["what it returns"] * (gives and not UNIT.search(own[""] + own.get("Returns", "")))


def sourceless(node: Documented) -> bool:
    return not (EQUATION.search(text_of(node)) or REFERENCE.search(text_of(node)))


# -- the rules, held ---------------------------------------------------------------------------------------------------


def is_method(name: str) -> bool:
    return "." in name


@every_name
def test_it_is_documented_and_so_is_each_parameter(name: str) -> None:
    _, node = DOCUMENTED[name]
    assert text_of(node)
    # few parameters explain themselves in a method, and a callback's are Trainer's
    few = is_method(name) and (len(parameters(node)) <= 2 or node.name.startswith("on_"))
    assert few or [parameter for parameter in undescribed(node) if parameter not in EVERYWHERE] == []
    assert unknown(node) == []


@every_name
def test_its_arrays_have_shapes_and_its_table_columns(name: str) -> None:
    _, node = DOCUMENTED[name]
    assert [parameter for parameter, annotation in parameters(node).items() if shapeless(annotation)] == []
    assert not (isinstance(node, Function) and shapeless(node.returns))
    assert not columns_missing(node)


@pytest.mark.parametrize("name", CALLABLES)
def test_its_errors_are_said(name: str) -> None:
    module, node = CALLABLES[name]
    assert not refuses(node, functions_of(module)) or says_its_errors(node)


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if not is_method(name)])
def test_its_numbers_have_units(name: str) -> None:
    assert unitless(DOCUMENTED[name][1]) == []


@pytest.mark.parametrize("name", [name for name in CALLABLES if CALLABLES[name][0] in SOURCED and not is_method(name)])
def test_its_formula_has_a_source(name: str) -> None:
    assert sourceless(CALLABLES[name][1]) == (name in UNSOURCED)


# -- and seen to fail --------------------------------------------------------------------------------------------------

WHOLE = '''
def measure(
    states: Float[np.ndarray, "prompt d_model"], table: pd.DataFrame, *, norm: float, weights: Mapping[str, Tensor]
) -> pd.DataFrame:
    """The share ‖x‖² / n of the states.

    Args:
        states: residual units.
        table: the rows.
        norm: scale to this
            total norm.
        weights: by name.

    Returns:
        Columns `run, share`.

    Raises:
        GravlensError: no states.
    """
    check(states)

def check(states):
    raise GravlensError("a", "b", "c")
'''


def found_in(source: str) -> list[str]:
    """What the rules find in a source's first definition."""
    body = ast.parse(source).body
    node, others = body[0], {inner.name: inner for inner in body}
    assert isinstance(node, Documented)
    found = undescribed(node) + unknown(node) + unitless(node)
    found += [name for name, annotation in parameters(node).items() if shapeless(annotation)]
    found += ["columns"] * columns_missing(node) + ["source"] * sourceless(node)
    return found + ["errors"] * (refuses(node, others) and not says_its_errors(node))


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("", "", []),
        ("        table: the rows.\n", "", ["table"]),
        ("        table: the rows.\n", "        tables: the rows.\n", ["table", "tables"]),
        ("total norm", "size", ["norm"]),
        ("residual units", "of the probes", ["states"]),
        ('Float[np.ndarray, "prompt d_model"]', "np.ndarray", ["states"]),
        ("Mapping[str, Tensor]", "Tensor", ["weights"]),
        ("`run, share`", "of runs", ["columns"]),
        ("The share ‖x‖² / n of", "Something about", ["source"]),
        ("    Raises:\n        GravlensError: no states.\n", "", ["errors"]),
        ('raise GravlensError("a", "b", "c")', "pass", []),
    ],
)
def test_what_a_docstring_lacks_is_found(old: str, new: str, found: list[str]) -> None:
    assert old in WHOLE
    assert found_in(WHOLE.replace(old, new, 1)) == found


def test_a_class_names_its_fields() -> None:
    lacking = 'class A:\n    """Two.\n\n    Attributes:\n        a: a share.\n    """\n    a: float\n    b: float\n'
    assert found_in(lacking)[:2] == ["b", "b"]
