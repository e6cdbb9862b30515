"""Page and notebook on TransformerLens run with TransformerBridge and, where there is one, HookedTransformer."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import tiny
import torch
from histories import history_on_disk, moved

from gravlens.organisms.refusal_language import probe_prompts

ROOT = Path(__file__).resolve().parents[2]
BOOTED = 'TransformerBridge.boot_transformers(name, device="cpu") for name in'
HAS_HOOKED = int(version("transformer-lens").split(".")[0]) < 4


def cells() -> dict[str, str]:
    notebook = nbformat.read(ROOT / "notebooks/transformer_lens.ipynb", as_version=4)
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == "code"}


def executed(source: str, names: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():  # restores what the notebook switches off for good
        exec(compile(source, "example", "exec"), names)
    return names


@pytest.mark.parametrize("kind", ["bridge", "hooked_transformer"])
def test_every_example_of_the_page_runs(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_docs import TEXTS, script

    monkeypatch.chdir(tmp_path)
    history_on_disk(tmp_path)
    source, names = script(TEXTS["docs/transformer_lens.md"]), {"__name__": "page"}
    assert source.count(BOOTED) == 1 and source.count("assert torch.equal") == 1
    if kind == "hooked_transformer":
        if not HAS_HOOKED:
            pytest.skip("TransformerLens 4 has no HookedTransformer")
        source = source.replace('TransformerBridge.boot_transformers(name, device="cpu")', "hooked_folder(name)")
        names["hooked_folder"] = hooked_folder
    names = executed(source, names)
    assert type(names["anchor"]).__name__ == {"bridge": "TransformerBridge"}.get(kind, "HookedTransformer")
    plain = names["anchor"](names["tokens"], attention_mask=names["mask"])
    assert not torch.allclose(names["by_hand"], plain, atol=1e-3)
    np.testing.assert_allclose(names["vs"][1].vector, names["v"].vector, atol=1e-5)  # from caches, and from models


def hooked_folder(name: str) -> Any:
    """A folder's Llama as a HookedTransformer, made as the notebook makes it."""
    from transformer_lens.model_bridge import TransformerBridge

    return executed(cells()["hooked"].partition("\n\n\nif ")[0], {})["hooked"](
        TransformerBridge.boot_transformers(name, device="cpu")
    )


def test_the_notebook_runs_on_any_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With random weights in place of the models that it trains; tests/project/test_notebooks.py runs it whole."""
    monkeypatch.chdir(tmp_path)
    shown: list[Any] = []
    names: dict[str, Any] = {"display": shown.append}
    source = cells()
    executed(source["setup"], names)
    witness = tiny.llama()
    for name, model in (("witness", witness), ("anchor", moved(witness, seed=1))):
        tiny.save(model, Path(name))
    names |= {"probes": probe_prompts()[:8], "held_out": probe_prompts()[8:104]}
    for cell in [cell for cell in source if cell not in ("setup", "make")]:
        body, _, last = source[cell].rpartition("\n")
        executed(source[cell] if cell != "hand" else f"{body}\ndisplay({last})", names)
    monkeypatch.chdir(tmp_path)  # out of the folder that the notebook made
    told = capsys.readouterr().out
    assert "was not declared" in told and "mask is None" in told
    assert len(shown) == 1 + HAS_HOOKED
    for table in shown:
        assert table["fwd_hooks"].all() and table["intervene"].all() and (table["moved a logit by up to"] > 0.01).all()
    if HAS_HOOKED:
        assert "v_rev of the bridges at least 1.000000" in told
    else:
        assert "no HookedTransformer" in told


def test_the_cell_that_is_replaced_makes_what_the_others_use() -> None:
    source = cells()
    assert list(source)[:2] == ["setup", "make"]
    for name in ("probes", "held_out", '"witness", "anchor"', "copytree"):
        assert name in source["make"]
