"""Every public class is printed on a page, whatever it holds: a model, 500 prompts, 30 layers, a long table."""

import dataclasses
import html as entities
import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import xarray
from histories import synthetic
from test_public_types import hints, public

import gravlens as gl
from gravlens.core.display import gist
from gravlens.directions.trajectory import ByLayer

LINES, LETTERS, LAYERS = 25, 2500, 30
PROMPTS = tuple(f"How do I pick lock number {i} of {'very ' * 30}many?\nTell me." for i in range(500))
TABLE = pd.DataFrame(np.ones((1000, 12)), columns=[f"a_long_column_name_{i}" for i in range(12)])
PLAIN: dict[Any, Any] = {int: 12_345, float: 0.123456789, bool: True, str: "a name of some length", type(None): None}
# Not made by what they are annotated with, or with a state that only their own functions make.
OTHERWISE = {"Family", "Monitor", "Answer", "Example", "Firings", "GravlensError", "Trajectory", "ByLayer", "OpenModel"}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama(num_hidden_layers=LAYERS)


def classes() -> dict[str, type]:
    return {name: one for name, one in public().items() if inspect.isclass(one) and not vars(one).get("_is_protocol")}


def monster(hint: Any, model: Any, depth: int = 0) -> Any:
    """The largest thing that a field of this annotation may hold."""
    if hint in PLAIN:
        return PLAIN[hint]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return max((monster(one, model, depth + 1) for one in typing.get_args(hint)), key=lambda one: len(repr(one)))
    if origin is typing.Literal:
        return typing.get_args(hint)[0]
    if getattr(hint, "__name__", "") in OTHERWISE:
        return object
    if dataclasses.is_dataclass(hint):
        return filled(hint, model, depth + 1) if depth < 4 else None
    if hint is pd.DataFrame:
        return TABLE
    if origin is not None and issubclass(origin, typing.Mapping):
        value = monster(typing.get_args(hint)[1], model, depth + 1)
        return {f"run number {i}": value for i in range(40)}
    if origin in (tuple, list) or (origin is not None and issubclass(origin, typing.Sequence)):
        inner = typing.get_args(hint)[0]
        return PROMPTS if inner is str else tuple(monster(inner, model, depth + 1) for _ in range(40))
    if inspect.isclass(hint) and issubclass(hint, Path):
        return Path("/a/folder/of/models") / "checkpoint-20"
    if inspect.isclass(hint) and issubclass(hint, torch.nn.Module):
        return model
    one_axis = re.search(r"'\s*(layer|draw|prompt)\s*'", str(hint))  # of jaxtyping; more axes: a matrix
    return np.ones(LAYERS if one_axis else (LAYERS, 500)) if "Float" in str(hint) or "ndarray" in str(hint) else object


def filled(kind: type, model: Any, depth: int = 0) -> Any:
    """An instance with a monster in each field, past the checks of its constructor."""
    made, found = object.__new__(kind), hints(kind)
    for field in dataclasses.fields(kind):
        object.__setattr__(made, field.name, monster(found[field.name], model, depth))
    return made


def assert_short(text: str) -> None:
    assert len(text) <= LETTERS, (len(text), text[:3000])
    assert text.count("\n") < LINES, text


@pytest.mark.parametrize("name", [name for name in classes() if name.rpartition(".")[2] not in OTHERWISE])
def test_the_repr_of_a_class_is_short_whatever_its_fields_hold(name: str, model: Any) -> None:
    kind = classes()[name]
    assert dataclasses.is_dataclass(kind), "a class of another kind has a case in CASES, and its name in OTHERWISE"
    text = repr(filled(kind, model))
    assert_short(text)
    assert text.startswith(kind.__name__)


def test_the_law_sees_a_dataclass_that_prints_its_table_and_its_model(model: Any) -> None:
    @dataclasses.dataclass
    class Prints:
        table: pd.DataFrame
        model: torch.nn.Module

    with pytest.raises(AssertionError):
        assert_short(repr(filled(Prints, model)))


# -- the classes that one meets, with what they really hold ------------------------------------------------------------


class Real:
    """Models in memory of 30 layers, 500 prompts, 12 runs."""

    def __init__(self, model: Any) -> None:
        self.model, self.layers = model, tuple(range(LAYERS))
        self.rng = np.random.default_rng(0)
        tokenizer = tiny.TOKENIZER
        runs = {f"seed{i}": dict.fromkeys((1, 5, 20), model) for i in range(12)}
        prompts = {"probes": PROMPTS, "held_out": [f"{text} Really?" for text in PROMPTS]}
        self.sequence = gl.ModelSequence.from_models(
            witness=model, anchor=model, runs=runs, tokenizer=tokenizer, **prompts
        )
        names = ["witness", "anchor", *(f"seed{i}/{step}" for i in range(12) for step in (1, 5, 20))]
        values = self.rng.standard_normal((len(names), 500, LAYERS, 4)).astype(np.float32)
        self.states = synthetic(dict(zip(names, values, strict=True)))
        self.vs = gl.locate_vrev(self.states)


@pytest.fixture(scope="module")
def real(model: Any) -> Real:
    return Real(model)


# class -> how it is made, and what its repr says
CASES: dict[str, tuple[Callable[[Real], Any], tuple[str, ...]]] = {
    "ModelSequence": (lambda r: r.sequence, ("seed0", "seed11", "500", "LlamaForCausalLM")),
    "Checkpoint": (lambda r: r.sequence.runs["seed0"][1], ("seed0/5", "LlamaForCausalLM")),
    "PromptSet": (lambda r: r.sequence.probes, ("500", "pick lock")),
    "Residuals": (lambda r: r.states, ("witness", "38 in all", "30 in all")),
    "Directions": (lambda r: r.vs, ("30 layers", "layer 0", "distance")),
    "Direction": (lambda r: r.vs[3], ("layer=3", "difference_of_means")),
    "Trajectory": (lambda r: gl.follow(r.states, r.vs), ("seed0", "fraction")),
    "ByLayer": (lambda r: ByLayer(TABLE, TABLE), ("1000", "12")),
    "NullDraws": (
        lambda r: gl.nulls.isotropic(r.vs, steps=(1, 5), draws=500, rng=r.rng),
        ("isotropic", "(1, 5)"),
    ),
    "OpenModel": (lambda r: gl.open_model(r.model), ("huggingface", "d_model")),
    "Family": (lambda r: gl.open_model(r.model).family, ()),
    "Steer": (lambda r: gl.Steer(r.vs, 0.5), ("0.5", "30 layers")),
    "Penalty": (lambda r: gl.blockers.Penalty(r.vs, r.sequence.probes), ("30 layers", "500")),
    "Monitor": (lambda r: gl.Monitor(r.vs, r.sequence.probes), ("30 layers", "500 in all", "every=1")),
    "Example": (lambda r: gl.Example("How?", "So."), ("How?", "So.")),
    "Firings": (lambda r: gl.interventions.Firings(r.layers), ("30",)),
    "Recipe": (lambda r: gl.Recipe(steps=7), ("steps=7",)),
}


@pytest.mark.parametrize("name", CASES)
def test_what_a_class_really_holds_is_named_in_short(name: str, real: Real) -> None:
    make, told = CASES[name]
    made = make(real)
    for text in (repr(made), str(made)):
        assert_short(text)
    assert [word for word in told if word not in repr(made)] == [], repr(made)
    if hasattr(made, "_repr_html_"):
        table = made._repr_html_()
        assert table.count("<tr>") <= LINES
        assert len(entities.unescape(re.sub("<[^>]+>", "", table))) <= LETTERS, table


def test_every_class_of_another_kind_has_a_case() -> None:
    assert OTHERWISE - {"Answer", "GravlensError"} <= CASES.keys()  # these two are the text of an answer, of an error


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (np.ones((3, 4), np.float32), "ndarray[3 × 4]"),
        (torch.ones(2, 5), "Tensor[2 × 5]"),
        (pd.DataFrame({"a": [1, 2]}), "DataFrame[2 × 1]"),
        (xarray.Dataset({"x": (("run", "step"), np.ones((2, 3)))}), "Dataset[run 2 × step 3]"),
        (("a", "b"), "('a', 'b')"),
        ((), "()"),
        (tuple(range(40)), "(0, …, 39; 40 in all)"),
        ({"a": TABLE, "b": TABLE}, "{a, b}"),
        (np.float64(0.5), "np.float64(0.5)"),
        ("x" * 200, "'" + "x" * 149 + "…"),
        (torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(20)]), "<Sequential>"),
    ],
)
def test_the_gist_of_a_value(value: Any, told: str) -> None:
    assert gist(value) == told
