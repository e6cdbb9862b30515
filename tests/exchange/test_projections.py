"""Projective control vectors: read back they do what was written; a reader of plain torch does the same."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from histories import PROMPT_IDS, refused, synthetic
from safetensors import safe_open

from gravlens import Ablate, At, Clamp, GravlensError, Patch, Steer, intervene, open_model
from gravlens.activations.residuals import Residuals
from gravlens.core.files import read_tensors, write_tensors
from gravlens.directions.direction import Directions, Subspaces, each
from gravlens.directions.subspaces import span_of
from gravlens.directions.vrev import direction_from
from gravlens.exchange.projections import KIND, _digest, from_projection, to_projection
from gravlens.history.weight_files import contents, read_headers
from gravlens.interventions.edits import Intervention
from gravlens.models.forward import final_logits

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
VS = Directions(tuple(direction_from(RNG.standard_normal(tiny.WIDTH), layer=i, distance=2.0 + i) for i in (0, 2)))
PLANES = Subspaces(tuple(span_of(RNG.standard_normal((2, tiny.WIDTH)), layer=i, distance=3.0) for i in (1, 2)))
STATES: Residuals = synthetic({"anchor": RNG.standard_normal((5, tiny.LAYERS, tiny.WIDTH))})
EDITS: dict[str, Intervention] = {
    "ablated direction": Ablate(VS[2]),
    "ablated directions": Ablate(VS),
    "ablated subspaces": Ablate(PLANES),
    "clamped directions": Clamp(VS, STATES),
    "clamped to the witness": Clamp(VS, STATES, strength=1.0),
    "clamped subspaces": Clamp(PLANES, STATES),
    "at the last token": At(Clamp(VS, STATES), "last"),
    "at two offsets": At(Ablate(VS), (-1, -2)),
}
MODEL = open_model(tiny.llama(), tokenizer=tiny.TOKENIZER)


def logits(*edits: Intervention) -> torch.Tensor:
    with intervene(MODEL, *edits):
        return final_logits(MODEL, PROMPT_IDS)


@pytest.mark.parametrize("name", EDITS)
def test_what_is_read_does_what_was_written(name: str, tmp_path: Path) -> None:
    path = to_projection(EDITS[name], tmp_path / "v.safetensors", model=MODEL)
    read = from_projection(path, model=MODEL)
    torch.testing.assert_close(logits(read), logits(EDITS[name]), atol=1e-5, rtol=1e-5)
    assert type(read) is type(EDITS[name]) and getattr(read, "positions", "all") == getattr(
        EDITS[name], "positions", "all"
    )
    plain = final_logits(MODEL, PROMPT_IDS)
    assert (logits(read) - plain).abs().max() > 1e-2, "the edit is large enough to be seen"
    for one, other in zip(each(read.directions), each(EDITS[name].directions), strict=True):
        facts = [(type(span), span.layer, span.distance, span.estimator) for span in (one, other)]
        assert facts[0] == facts[1] and np.array_equal(one.basis, other.basis)


def readers() -> dict[str, Any]:
    """The names that the page's reader of plain torch defines."""
    page = (ROOT / "docs" / "exchange.md").read_text(encoding="utf-8")
    (source,) = [
        block for block in re.findall(r"^```python no-run\n(.*?)^```$", page, re.M | re.S) if "def project" in block
    ]
    assert "gravlens" not in source.replace("file.metadata()", "") and sum(map(bool, source.split("\n"))) <= 15
    names: dict[str, Any] = {}
    exec(source, names)
    return names


@pytest.mark.parametrize("name", [name for name, edit in EDITS.items() if not isinstance(edit, At)])
def test_the_reader_of_the_page_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    path = to_projection(EDITS[name], tmp_path / "v.safetensors", model=MODEL)
    module: Any = tiny.llama()
    hooks = readers()["project"](path, module.model.layers)
    with torch.no_grad():
        found = torch.stack([module(torch.tensor([ids])).logits[0, -1] for ids in PROMPT_IDS])
    torch.testing.assert_close(found, logits(EDITS[name]), atol=1e-4, rtol=1e-4)
    for hook in hooks:
        hook.remove()


def test_the_reader_of_the_page_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    at = to_projection(EDITS["at the last token"], tmp_path / "at.safetensors", model=MODEL)
    path = to_projection(Ablate(VS), tmp_path / "v.safetensors", model=MODEL)
    arrays, meta = read_tensors(path, KIND)
    other = write_tensors(tmp_path / "o.safetensors", KIND, {**arrays, "basis.0": -2 * arrays["basis.0"]}, meta)
    for wrong in (at, other):
        with pytest.raises(AssertionError):
            readers()["project"](wrong, tiny.llama().model.layers)


def test_the_file_states_what_it_does_and_for_which_weights(tmp_path: Path) -> None:
    folder = tiny.save(tiny.llama(), tmp_path / "model")
    path = to_projection(Clamp(VS, STATES, 0.5), tmp_path / "v.safetensors", model=folder)
    with safe_open(path, framework="np") as file:
        meta = json.loads(file.metadata()["meta"])
        component = {layer: file.get_tensor(f"component.{layer}") for layer in VS.layers}
    assert [meta[name] for name in ("operation", "hook_point", "positions", "dtype", "version")] == [
        "clamp", "blocks.{l}.hook_resid_post", "all", "float32", 1,
    ]  # fmt: skip
    assert meta["model_sha256"] == contents(sorted(read_headers(folder).load())).digest
    for v in VS:
        mean = STATES.of("anchor")[:, v.layer].mean(0)
        np.testing.assert_allclose(component[v.layer], [mean @ v.vector + 0.5 * v.distance], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"operation": "project"}, "operation = 'project'"),
        ({"hook_point": "blocks.{l}.hook_resid_pre"}, "hook_resid_pre"),
        ({"formula": "h - h Q^T Q / 2"}, "formula"),
        ({"version": 2}, "version = 2"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"vectors_sha256": "0" * 64}, "vectors_sha256"),
        ({"positions": "nowhere"}, "nowhere"),
        ({"facts": {"7": {}}}, "basis.7"),
    ],
)
def test_a_file_that_states_something_else_is_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = to_projection(Ablate(VS), tmp_path / "v.safetensors", model=MODEL)
    arrays, meta = read_tensors(path, KIND)
    from_projection(write_tensors(path, KIND, arrays, meta))  # unchanged it is read
    write_tensors(path, KIND, arrays, {**meta, **changes})
    with pytest.raises(GravlensError, match=re.escape(said)):
        from_projection(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"basis.9": VS[0].basis},  # a layer that no facts name: it would not be ablated
        {"component.0": np.ones(1, np.float32)},  # of an ablation, which would leave it out
        {"component.0": np.zeros(2, np.float32)},
        {"basis.0": VS[0].vector},
        {"basis.0": np.full((1, 16), 0.25, np.float32)},
    ],
)
def test_tensors_that_would_not_be_applied_are_refused(changes: dict[str, np.ndarray], tmp_path: Path) -> None:
    path = to_projection(Ablate(VS), tmp_path / "v.safetensors", model=MODEL)
    arrays, meta = read_tensors(path, KIND)
    arrays = {**arrays, **changes}
    write_tensors(path, KIND, arrays, {**meta, "vectors_sha256": _digest(arrays)})
    with refused("the tensors are"):
        from_projection(path)


def test_another_model_and_another_dtype_are_refused_where_the_model_is_given(tmp_path: Path) -> None:
    path = to_projection(Ablate(VS), tmp_path / "v.safetensors", model=MODEL)
    for other in (tiny.llama(seed=1), tiny.llama().to(torch.bfloat16)):
        with refused("is for weights of the digest"):
            from_projection(path, model=other)
    assert isinstance(from_projection(path), Ablate)


def test_what_is_no_projection_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    twice = Ablate(Directions((VS[0], VS[0])))
    for edit in (Steer(VS), Patch(VS, STATES, [[i] for i in range(5)]), twice):
        with refused(type(edit).__name__):
            to_projection(edit, path, model=MODEL)
    for other in (Ablate, VS, "ablate"):
        with refused("was given"):
            to_projection(other, path, model=MODEL)  # type: ignore[arg-type]
    assert not path.exists()


def test_a_corrupt_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    path = to_projection(Ablate(VS), tmp_path / "v.safetensors", model=MODEL)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for wrong in (path, tmp_path / "none.safetensors"):
        with refused(wrong.name):
            from_projection(wrong)
