"""Parsers under Hypothesis: any bytes are a result or one `GravlensError`, and what is written is read as it was."""

import json
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pandas as pd
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gravlens.core.errors import GravlensError
from gravlens.core.files import read_tensors, write_tensors
from gravlens.directions.direction import Directions
from gravlens.directions.vrev import direction_from
from gravlens.exchange import from_gguf, from_npz, to_gguf, to_npz
from gravlens.history.prompts import read_prompts
from gravlens.history.sequence import ModelSequence
from gravlens.history.weight_files import read_headers

settings.register_profile(
    "parsers", derandomize=True, max_examples=60, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
quickly = settings(settings.get_profile("parsers"))

# Of JSON and TOML alike.
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(str.strip)


def read(name: str, content: bytes, parse: Callable[[Path], Any]) -> Any:
    """What is read of a file with this content, or the error's text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            return parse(path)
        except GravlensError as error:
            told = str(error)
    assert "\n" not in told and name in told
    return told


def edited(whole: bytes) -> st.SearchStrategy[bytes]:
    """A valid file of which a piece is replaced, dropped or added."""
    places = st.integers(0, len(whole))
    return st.builds(
        lambda at, n, new: whole[:at] + new + whole[at + n :], places, st.integers(0, 12), st.binary(max_size=12)
    )


# -- histories ---------------------------------------------------------------------------------------------------------
KEYS = ["witness", "anchor", "probes", "held_out", "harmless", "tokenizer", "chat_template", "chat_template_kwargs",
        "system", "runs", "controls", "nope"]  # fmt: skip


def as_toml(value: Any) -> str:
    """A value as TOML writes it; null, which it lacks, as a text."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(str(key))} = {as_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_toml, value)) + "]"
    if isinstance(value, float):
        return {"inf": "inf", "-inf": "-inf", "nan": "nan"}.get(repr(value), repr(value))
    return json.dumps(str(value) if value is None else value)


def history(path: Path) -> ModelSequence:
    for name in ("base", "aligned"):
        (path.parent / name).mkdir()
    return ModelSequence.from_toml(path)


@quickly
@given(st.binary(max_size=60) | edited(b'witness = "base"\nanchor = "aligned"\nprobes = ["a"]\n[runs]\nx = "ft/*"\n'))
def test_any_bytes_are_a_history_or_an_error(content: bytes) -> None:
    assert isinstance(read("SEQUENCE.toml", content, history), ModelSequence | str)


@quickly
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
@example({"probes": {"file": "SEQUENCE.toml", "only": {"a": 5}}})
@example({"controls": {"random": {"a": {"directions": "x", "b": [[]]}}}})
def test_any_values_are_a_history_or_an_error(table: dict[str, Any]) -> None:
    lines = [f"{key} = {as_toml(value)}" for key, value in {"witness": "base", "anchor": "aligned", **table}.items()]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    assert isinstance(read("SEQUENCE.toml", content, history), ModelSequence | str)


# -- prompts -----------------------------------------------------------------------------------------------------------
NAMES = st.sampled_from(["p.jsonl", "p.json", "p.csv", "p.tsv", "p.txt", "p", "p.jsonl.gz", "p.parquet"])
SOME = b'{"prompt": "How do I ring a bell?", "answer": "So."}\n{"prompt": "Why?", "answer": "So."}\n'


@quickly
@given(NAMES, st.binary(max_size=60) | edited(SOME) | edited(b'prompt,answer\n"a, b",c\nd,e\n'))
def test_any_bytes_are_prompts_or_an_error(name: str, content: bytes) -> None:
    found = read(name, content, lambda path: [*read_prompts(path)])
    assert isinstance(found, str) or (found and all(text.strip() for text in found))


@quickly
@given(
    st.lists(st.dictionaries(st.sampled_from(["prompt", "answer", "messages", "role", "content"]), VALUES, max_size=3))
)
def test_any_rows_are_prompts_or_an_error(rows: list[dict[str, Any]]) -> None:
    content = "\n".join(map(json.dumps, rows)).encode()
    assert isinstance(read("p.jsonl", content, lambda path: [*read_prompts(path)]), list | str)


@quickly
@given(st.lists(WORDS, min_size=1, max_size=5))
def test_prompts_are_read_as_they_were_written(texts: list[str]) -> None:
    rows = [{"prompt": text} for text in texts]
    unbroken = [" ".join(text.split()) for text in texts]  # a table's cell may lose the kind of its line breaks
    written = {
        "p.jsonl": ("\n".join(json.dumps(row) for row in rows).encode(), texts),
        "p.json": (json.dumps(rows, ensure_ascii=False).encode(), texts),
        "p.csv": (pd.DataFrame({"prompt": unbroken}).to_csv(index=False).encode(), unbroken),
        "p.parquet": (pd.DataFrame({"prompt": texts}).to_parquet(None), texts),
    }
    for name, (content, wanted) in written.items():
        assert read(name, content, lambda path: [*read_prompts(path)]) == wanted


# -- tensors -----------------------------------------------------------------------------------------------------------
SHAPES = st.lists(st.integers(0, 3), max_size=3)
PLACES = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "nope"]), VALUES | SHAPES, max_size=4)
HEADERS = st.dictionaries(
    st.text(string.ascii_letters, max_size=4) | st.just("__metadata__"), VALUES | PLACES, max_size=3
)


def safetensors(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def weights(path: Path) -> dict[str, Any]:
    return {name: tuple(one.shape) for name, one in read_headers(path.parent).tensors.items()}


@quickly
@given(st.binary(max_size=80) | st.builds(safetensors, HEADERS, st.binary(max_size=16)))
def test_any_bytes_are_weights_or_an_error(content: bytes) -> None:
    assert isinstance(read("model.safetensors", content, weights), dict | str)
    assert isinstance(read("x.safetensors", content, lambda path: read_tensors(path, "x")), str)


@quickly
@given(st.dictionaries(st.text(string.ascii_letters, min_size=1, max_size=5), SHAPES, max_size=4))
def test_shapes_of_weights_are_read_as_they_were_written(shapes: dict[str, list[int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, Path(folder) / "model.safetensors")
        assert weights(Path(folder) / "model.safetensors") == {name: tuple(shape) for name, shape in shapes.items()}


FINITE = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8)


@quickly
@given(
    st.lists(st.floats(width=32, allow_nan=False), max_size=6), st.dictionaries(st.text(max_size=5), FINITE, max_size=3)
)
def test_arrays_are_read_as_they_were_written(numbers: list[float], meta: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_tensors(Path(folder) / "x.safetensors", "x", {"a": np.array(numbers, dtype=np.float32)}, meta)
        arrays, found = read_tensors(path, "x")
    assert arrays["a"].tolist() == numbers and found == meta


# -- directions --------------------------------------------------------------------------------------------------------
def gguf_bytes() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        vs = Directions(tuple(direction_from(np.arange(1.0, 5.0) + layer, layer=layer) for layer in (1, 2)))
        return to_gguf(vs, Path(folder) / "v.gguf").read_bytes()


@quickly
@given(st.binary(max_size=60) | edited(gguf_bytes()))
def test_any_bytes_are_a_control_vector_or_an_error(content: bytes) -> None:
    assert isinstance(read("v.gguf", content, from_gguf), Directions | str)


VECTORS = st.lists(st.floats(-1e3, 1e3, width=32, allow_subnormal=False), min_size=3, max_size=3).filter(
    lambda v: np.linalg.norm(v) > 1e-3
)


@quickly
@given(st.lists(VECTORS, min_size=1, max_size=3))
def test_vectors_are_read_as_they_were_written(vectors: list[list[float]]) -> None:
    vs = Directions(tuple(direction_from(np.array(vector), layer=i) for i, vector in enumerate(vectors)))
    with tempfile.TemporaryDirectory() as folder:
        found = [
            from_gguf(to_gguf(vs, Path(folder) / "v.gguf", layer_0=True)),
            from_npz(to_npz(vs, Path(folder) / "v.npz")),
        ]
        other = {one.name: one.data for one in gguf.GGUFReader(Path(folder) / "v.gguf").tensors}
        for i, vector in enumerate(vectors):
            np.testing.assert_allclose(other[f"direction.{i}"], vector, rtol=1e-5, atol=1e-6)
    for one in found:
        np.testing.assert_allclose(one.vectors * one.distances[:, None], vectors, rtol=1e-4, atol=1e-4)
