"""The notebooks run from their first cell to their last, show what they promise, and carry nothing of a machine."""

import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from nbformat import NotebookNode

from gravlens.organisms.fetch import fetched_prompts, fetched_smollm2

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECONDS_A_CELL = 600
PICTURE = "picture"
# notebook -> cell -> what its output shows, as text or as a picture
SHOWN = {
    "quickstart": {
        "ask": "witness.*anchor",
        "harm": r"harmfulness: witness \d+%, anchor \d+%",
        "vrev": "Direction.*distance.*reliability",
        "vrev-all": "Directions.*>0</td>.*>4</td>",
        "tune": "ModelSequence.*seed1.*steps 1, 5, 20, 60",
        "follow": "Trajectory.*alignment mean.*fraction mean.*>60</td>",
        "null": "isotropic.*p_value|p_value.*isotropic",
        "plot-alignment": PICTURE,
        "plot-layers": PICTURE,
        "intervene": "fine-tuned, ablated",
        "ablate": "at every layer.*p_random|p_random.*at every layer",
        "plot-ablation": PICTURE,
        "steer": PICTURE,
        "block": "blocked.*held_out",
        "bridge": r"cosine with the direction from folders: 1\.0000",
    },
    "your_own_checkpoints": {
        "tree": "ft/lora/checkpoint-60.*adapter_model.safetensors.*trainer_state.json",
        "folders": "ModelSequence.*run full.*steps 20, 40, 60.*run lora.*steps 20, 40, 60",
        "inspect": "distance.*cosine",
        "follow": "Trajectory.*runs: full, lora",
        "figure": PICTURE,
        "runs": "alignment.*fraction.*full.*lora",
        "holes": "checkpoint-40 holds no weights",
        "skip": "steps 20, 60.*skipped.*checkpoint-40",
        "hub": "run hub.*steps 20, 60",
        "hub-follow": "alignment.*>60</th>",
        "file": "ModelSequence.*run full.*steps 20, 60",
        "template": "different chat templates.*Try: ",
        "template-anchor": "chat_template: anchor",
        "layer": "Layer 5 is out of range.*0 to 4",
        "verdict": r"Level [012] of 5\. .*is not reached",  # one history has no strangers, so never 3
        "verdict-caps": "above weight noise.*the witness ranks before strangers.*not run",
        "verdict-missing": r"twins.*--make twins.*strangers.*\[controls\]",
    },
    "layerwise_ablation": {
        "score": r"witness +-.*anchor +\d.*tuned",
        "ablate": "ablate.*>4</td>.*covariance_matched",
        "ablate-figure": PICTURE,
        "bands": "isotropic, low.*matched, high",
        "steer": "strength 0.5.*strength 1.0",
        "steer-figure": PICTURE,
        "judge": "complies.*ablated at every layer",
        "answers": "v_rev ablated at layer",
    },
    "which_null": {
        "follow": "Trajectory.*seed4",
        "isotropic": "NullDraws: isotropic.*20,000 draws for every run",
        "participation": "participation ratio",
        "covariance": "NullDraws: states",
        "noise": "NullDraws: weight_noise",
        "all": "isotropic.*weight noise.*shuffled words.*sign flips",
        "figure": PICTURE,
        "steps": PICTURE,
        "claim": r"Claim: level \d of 5.*not run",
    },
    "blocking_a_finetune": {
        "make": "Directions",
        "twins": "random twin.*twin without v_rev",
        "watch": PICTURE,
        "layers": "blocked.*free.*random twin|free.*blocked.*random twin",
        "judge": "compliance_rate.*task loss.*witness.*anchor.*free.*blocked.*twin without v_rev",
        "log": "blocker_norm",
    },
    "transformer_lens": {
        "vrev": r"blocks\.2\.hook_resid_post \(128,\) torch\.float32.*Directions.*>4</td>",
        "hand": "steer</td>\\s*<td>True</td>\\s*<td>True</td>.*ablate</td>\\s*<td>True</td>\\s*<td>True</td>",
        "hooks": r"\['blocks\.2\.hook_resid_post'\].*anchor, steered",
        "last": "was not declared.*steered at the last prompt token",
        "cache": r"checkpoint, prompt, layer, d_model.*by layer: \[1\.000000",
        "padding": "token -1 is padding for.*attention mask is None",
        "hooked": r"at least 1\.000000.*differ by at most.*steer</td>\s*<td>True|no HookedTransformer",
    },
    "a_real_model": {
        "fetch": "30 layers, d_model 576, 134.5 M parameters",
        "answers": "the witness begins",
        "behaviour": "witness.*anchor.*tuned",
        "vrev": "Directions.*>1</td>.*>29</td>",
        "follow": "Trajectory.*everyday",
        "figure": PICTURE,
        "layers": PICTURE,
        "harmless": "held-out harmful.*everyday",
        "ablate": "Effect.*ablate.*covariance_matched",
        "ablate-figure": PICTURE,
    },
}
REAL = ("a_real_model",)  # need weights and prompts that were fetched
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


@pytest.fixture(scope="session")
def organisms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of all notebooks, so that each organism is made once."""
    return tmp_path_factory.mktemp("cache")


def marked(path: Path) -> object:
    marks = [pytest.mark.pretrained, pytest.mark.slow] if path.stem in REAL else []
    return pytest.param(path, id=path.stem, marks=marks)


@pytest.fixture(scope="module", params=[marked(path) for path in NOTEBOOKS])
def executed(
    request: pytest.FixtureRequest, organisms: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, NotebookNode]:
    """A notebook, executed in an empty folder; an error in a cell is raised with its traceback."""
    name, environment = request.param.stem, dict(os.environ)
    if name not in REAL:
        environment["GRAVLENS_CACHE"] = str(organisms)
    elif fetched_smollm2() is None or fetched_prompts() is None:
        pytest.skip(
            "no weights or prompts in the cache: run `gravlens fetch smollm2` and `gravlens fetch prompts` first"
        )
    notebook = nbformat.read(request.param, as_version=4)
    folder = str(tmp_path_factory.mktemp(name))
    client = nbclient.NotebookClient(notebook, timeout=SECONDS_A_CELL, resources={"metadata": {"path": folder}})
    client.execute(env=environment)
    return name, notebook


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [out for cell in notebook.cells for out in cell.get("outputs", [])]


def shown(cell: NotebookNode) -> str:
    """The texts among a cell's outputs."""
    texts = [out.get("text", "") for out in cell.get("outputs", [])]
    texts += [
        text
        for out in cell.get("outputs", [])
        for kind, text in out.get("data", {}).items()
        if kind.startswith("text/")
    ]
    return "\n".join(texts)


def shows(cell: NotebookNode, wanted: str) -> bool:
    if wanted == PICTURE:
        return any("image/png" in out.get("data", {}) for out in cell.get("outputs", []))
    return re.search(wanted, shown(cell), re.DOTALL) is not None


def lacking(name: str, notebook: NotebookNode) -> list[str]:
    """Cells that do not show what they promise."""
    cells = {cell.id: cell for cell in notebook.cells}
    return [cell for cell, wanted in SHOWN[name].items() if not shows(cells[cell], wanted)]


def test_a_notebook_runs_and_shows_what_it_promises(executed: tuple[str, NotebookNode]) -> None:
    name, notebook = executed
    assert [cell.id for cell in notebook.cells if cell.cell_type == "code" and cell.execution_count is None] == []
    assert lacking(name, notebook) == []
    told = [line for out in outputs(notebook) if out.get("name") == "stderr" for line in out.text.splitlines()]
    # bitsandbytes, which the tests have beside, says on processors with AVX-512 what it could be faster with
    assert [line for line in told if "gemm_4bit_forward" not in line] == []


def test_it_is_stated_of_every_notebook_what_it_shows() -> None:
    assert set(SHOWN) == {path.stem for path in NOTEBOOKS}


# -- what is committed -------------------------------------------------------------------------------------------------


@every_notebook
def test_a_cell_that_shows_nothing_is_seen(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.outputs = []
    assert lacking(path.stem, notebook) == list(SHOWN[path.stem])


@every_notebook
def test_what_is_committed_was_executed_in_order_and_shows_it(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert lacking(path.stem, notebook) == []


@every_notebook
def test_what_is_committed_is_free_of_noise(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert {out.output_type for out in outputs(notebook)} <= {"stream", "display_data", "execute_result"}  # no error
    assert [out.text for out in outputs(notebook) if out.get("name") == "stderr"] == []  # no bar, no warning
    assert [cell.id for cell in notebook.cells if not re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id)] == []
    assert [cell.id for cell in notebook.cells if cell.metadata] == [] and "widgets" not in notebook.metadata


@every_notebook
def test_every_link_of_a_notebook_leads_to_a_file(path: Path) -> None:
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "markdown")
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if not (path.parent / target.partition("#")[0]).exists()] == []
