"""The notebooks run from their first cell to their last, show what they promise, and carry nothing of a machine."""

import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_A_CELL = 600
PICTURES = {"plot-alignment", "plot-layers", "plot-ablation", "steer"}
# cell of quickstart.ipynb -> what its output shows
SHOWN = {
    "ask": "witness.*anchor",
    "harm": r"harmfulness: witness \d+%, anchor \d+%",
    "vrev": "<th>distance</th>",
    "vrev-all": "<td>0</td>.*<td>4</td>",
    "tune": "ModelSequence.*seed1.*steps 1, 5, 20, 100",
    "follow": "alignment.*fraction.*>100</th>",
    "null": "isotropic.*p_value|p_value.*isotropic",
    "intervene": "fine-tuned, ablated",
    "ablate": "at every layer.*p_random|p_random.*at every layer",
    "block": "blocked.*held_out",
    "bridge": r"cosine with the direction from folders: 1\.0000",
}


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def executed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """A notebook, executed in an empty folder; an error in a cell is raised with its traceback."""
    notebook = nbformat.read(request.param, as_version=4)
    folder = str(tmp_path_factory.mktemp(request.param.stem))
    client = nbclient.NotebookClient(notebook, timeout=SECONDS_A_CELL, resources={"metadata": {"path": folder}})
    client.execute()
    return notebook


def shown(cell: NotebookNode) -> str:
    """The texts among a cell's outputs."""
    outputs = cell.get("outputs", [])
    texts = [out.get("text", "") for out in outputs]
    texts += [text for out in outputs for kind, text in out.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(texts)


def pictures(cell: NotebookNode) -> list[str]:
    return [out.data["image/png"] for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]


def lacking(notebook: NotebookNode) -> list[str]:
    """Cells of quickstart.ipynb that do not show what they promise."""
    cells = {cell.id: cell for cell in notebook.cells}
    missing = [name for name, text in SHOWN.items() if not re.search(text, shown(cells[name]), re.DOTALL)]
    return missing + [name for name in PICTURES if not pictures(cells[name])]


def test_a_notebook_runs_and_shows_what_it_promises(executed: NotebookNode) -> None:
    assert [cell.id for cell in executed.cells if cell.cell_type == "code" and cell.execution_count is None] == []
    assert lacking(executed) == []


def test_a_cell_that_shows_nothing_is_seen() -> None:
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.outputs = []
    assert set(lacking(notebook)) == {*SHOWN, *PICTURES}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_what_is_committed_was_executed_in_order_and_shows_it(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert lacking(notebook) == []
    assert [out.ename for cell in notebook.cells for out in cell.get("outputs", []) if out.output_type == "error"] == []
