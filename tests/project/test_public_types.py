"""Whatever class stands in a public signature can be imported from where the public names are."""

import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any

import gravlens

SPECIAL = {"__init__", "__call__", "__getitem__", "__iter__", "__len__"}


def public() -> dict[str, Any]:
    """Name -> object of all that the stub names; a module among them stands for its own public names."""
    found: dict[str, Any] = {}
    for name in gravlens.__all__:
        value = getattr(gravlens, name)
        if inspect.ismodule(value):
            inner = {
                one: getattr(value, one) for one in getattr(value, "__all__", vars(value)) if not one.startswith("_")
            }
            own = (inspect.isclass, inspect.isfunction)  # what a module imports is public elsewhere
            found |= {
                f"{name}.{one}": thing
                for one, thing in inner.items()
                if any(is_own(thing) for is_own in own) and thing.__module__.startswith(value.__name__)
            }
        else:
            found[name] = value
    return found


def signatures(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A function, or a class (its fields) and its own public methods and properties."""
    if inspect.isclass(value) or inspect.isfunction(value):
        yield name, value
    for attribute, member in vars(value).items() if inspect.isclass(value) else ():
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if inspect.isfunction(function) and (not attribute.startswith("_") or attribute in SPECIAL):
            yield f"{name}.{attribute}", function


def hints(value: Any) -> dict[str, Any]:
    """Annotations as objects; names that are imported for the type checker alone stand for anything."""
    absent: dict[str, Any] = {}
    for _ in range(10):
        try:
            return typing.get_type_hints(value, localns=absent or None)
        except NameError as error:
            absent[str(error.name)] = Any
    raise AssertionError(f"{value} names {list(absent)}, which are not there.")


def classes(hint: Any) -> Iterator[type]:
    """The classes of gravlens that an annotation is made of, however deep."""
    if inspect.isclass(hint) and hint.__module__.partition(".")[0] == "gravlens":
        yield hint
    for part in typing.get_args(hint):
        for one in part if isinstance(part, list | tuple) else [part]:
            yield from classes(one)


def not_importable(names: dict[str, Any]) -> dict[str, str]:
    """Class that a signature names and nobody can import -> one of these signatures."""
    known = {id(value) for value in names.values()}
    found = {
        f"{one.__module__}.{one.__qualname__}": where
        for name, value in names.items()
        for where, signature in signatures(name, value)
        for hint in hints(signature).values()
        for one in classes(hint)
        if id(one) not in known
    }
    return dict(sorted(found.items()))


def test_every_type_in_a_public_signature_is_public() -> None:
    assert not_importable(public()) == {}


def test_a_type_that_is_left_out_is_found_with_where_it_stands() -> None:
    names = public()
    for name, where in {
        "Residuals": "follow",  # in a union with a sequence of it
        "Effect": "causal_effect",  # returned
        "BoundBlocker": "Penalty.bind",  # by a method
        "Checkpoint": "Finetuned",  # in a field, in a tuple
        "Answers": "cache_residuals",  # in an alias
    }.items():
        (full,) = {key for key in names if key.rpartition(".")[2] == name}
        left = {key: value for key, value in names.items() if key.rpartition(".")[2] == where.partition(".")[0]}
        value = names[full]
        assert f"{value.__module__}.{value.__qualname__}" in not_importable(left), where
        assert f"{value.__module__}.{value.__qualname__}" not in not_importable({**left, full: value})


def test_annotations_that_are_made_of_others_are_taken_apart() -> None:
    residuals = gravlens.Residuals
    for hint in (
        list[residuals],
        residuals | None,
        dict[str, tuple[residuals, ...]],
        Callable[[residuals], int],
        Callable[[], residuals],
        type[residuals],
    ):
        assert set(classes(hint)) == {residuals}, hint
    assert list(classes(int | str)) == []
