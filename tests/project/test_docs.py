"""The docs: every example runs, every link leads somewhere, and the pages list what there is."""

import ast
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from histories import history_on_disk
from test_architecture import SUBPACKAGES

from gravlens.history import sequence as sequences
from gravlens.history.sequence import ModelSequence
from gravlens.studies import audit, evidence
from gravlens.studies.experiment import measure_behavior

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *PAGES]}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, those with a further word (`python no-run`) left out."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def script(text: str) -> str:
    """The Python blocks of a page as one script, each line at its place on the page."""
    lines = [""] * text.count("\n")
    for match in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        first = text.count("\n", 0, match.start(1))
        for offset, line in enumerate(match[1].splitlines()):
            lines[first + offset] = line
    return "\n".join(lines)


def run(page: str) -> dict[str, object]:
    """Run a page's examples in this folder; its names."""
    names: dict[str, object] = {"__name__": page}
    exec(compile(script(TEXTS[page]), page, "exec"), names)
    return names


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    history_on_disk(folder)
    (toml,) = blocks(TEXTS["docs/sequence.md"], "toml")
    (folder / "SEQUENCE.toml").write_text(toml)
    return folder


@pytest.fixture
def here(history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the history, and the working folder."""
    shutil.copytree(history, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WITH_EXAMPLES = [page for page, text in TEXTS.items() if blocks(text, "python")]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=() if page == "README.md" else pytest.mark.long) for page in WITH_EXAMPLES]
)
@pytest.mark.usefixtures("here")
def test_the_examples_of_a_page_run(page: str) -> None:
    run(page)


def test_the_examples_would_be_seen_to_fail(here: Path) -> None:
    shutil.rmtree(here / "aligned")
    with pytest.raises(ValueError, match="aligned does not exist"):
        run("docs/directions.md")


@pytest.mark.usefixtures("here")
def test_the_sequence_file_of_the_docs_is_the_sequence_of_the_docs() -> None:
    written, made = (
        ModelSequence.from_toml("SEQUENCE.toml"),
        ModelSequence.from_folders(
            witness="base",
            anchor="aligned",
            runs={f"seed{seed}": f"ft/seed{seed}/checkpoint-*" for seed in (0, 1)},
            probes="probes.jsonl",
            held_out="held_out.jsonl",
        ),
    )
    assert [(c.name, Path(str(c.source))) for c in written] == [(c.name, Path(str(c.source))) for c in made]
    assert (written.probes, written.held_out, written.chat_template) == (made.probes, made.held_out, "own")


# -- what the pages list -----------------------------------------------------------------------------------------------


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", TEXTS[page], flags=re.MULTILINE | re.DOTALL)


def links(page: str) -> Iterator[Path]:
    """The files that a page links to, fragments left out."""
    for target in re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose(page)):
        target = "".join(target).split("#")[0]
        if target and not re.match(r"[a-z]+:", target):
            yield (ROOT / page).parent / target


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_to_a_file(page: str) -> None:
    broken = {path.resolve().relative_to(ROOT).as_posix() for path in links(page) if not path.exists()}
    assert broken == set()


def test_the_index_links_to_every_page() -> None:
    linked = {path.name for path in links("docs/index.md")}
    assert [page.name for page in PAGES if page.name not in linked and page.name != "index.md"] == []


# -- the architecture --------------------------------------------------------------------------------------------------


def test_the_architecture_names_every_subpackage_in_the_order_of_its_imports() -> None:
    page = TEXTS["docs/architecture.md"]
    (line,) = re.findall(r"`(core\s[a-z\s]+ cli)`", page)
    assert line.split() == SUBPACKAGES
    assert [name for name in SUBPACKAGES if f"| `{name}` |" not in page] == []


@pytest.mark.parametrize(("page", "fewest"), [("docs/architecture.md", 40), ("CONTRIBUTING.md", 5)])
def test_every_file_that_the_pages_for_contributors_name_is_there(page: str, fewest: int) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:gravlens|tests|analyses|benchmarks|docs)/[\w/.-]+\.\w+)`", text)
    assert len(named) > fewest
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_log_is_dated_newest_first() -> None:
    dates = [
        re.match(r"(\d{4}-\d{2}-\d{2}): \S", heading) for heading in re.findall("^## (.*)", TEXTS["docs/log.md"], re.M)
    ]
    found = [date[1] for date in dates if date]
    assert len(found) == len(dates) and found == sorted(found, reverse=True)


def keys(source: str) -> set[str]:
    """Every text that is a key in a dict display: fields of results.json, columns of its tables, names of figures."""
    displays = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Dict)]
    found = {key.value for display in displays for key in display.keys if isinstance(key, ast.Constant)}
    return {key for key in found if isinstance(key, str)}


def test_every_field_and_column_of_a_results_folder_is_documented() -> None:
    tables = inspect.getsource(evidence).partition("class Findings")[2]  # what precedes it draws nulls and controls
    sources = [inspect.getsource(audit), f"class Findings{tables}", inspect.getsource(measure_behavior)]
    wanted = set().union(*map(keys, sources)) - {"answers", "refusals", "compliances"}  # not written; keywords
    assert {"schema_version", "closure_final", "blocker_norm", "two_sided_log_odds"} <= wanted
    documented = set(re.findall(r"`([^`]+?)(?:\.csv)?`", prose("docs/results.md")))
    assert wanted - documented == set()


def options(script: str) -> set[str]:
    """The options of a script's command; ablate_layer.py is `gravlens ablate`, which stands on cli.md."""
    file, name = (script, "main") if script != "ablate_layer.py" else ("../gravlens/cli/interventions.py", "ablate")
    tree = ast.parse((ROOT / "analyses" / file).read_text(encoding="utf-8"))
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return {f"--{argument.arg.replace('_', '-')}" for argument in main.args.args} - {"--sequence"}


def test_every_option_of_the_scripts_is_documented_and_no_other() -> None:
    documented = set(re.findall(r"--[a-z][a-z-]*", TEXTS["docs/scripts.md"]))
    assert documented >= options("steer_sweep.py")
    assert documented <= set().union(*(options(path.name) for path in (ROOT / "analyses").glob("*.py")))


def test_every_key_of_a_sequence_file_is_documented() -> None:
    documented = set(re.findall(r"`\[?(\w+)\]?`", prose("docs/sequence.md")))
    assert documented >= sequences.KEYS | sequences.RUN_KEYS | sequences.FILE_KEYS


def test_every_test_that_a_page_names_exists() -> None:
    named = {name for text in TEXTS.values() for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", text)}
    missing = []
    for name in sorted(named):
        path, _, function = name.partition("::")
        if not re.search(rf"^def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE):
            missing.append(name)
    assert len(named) > 40 and missing == []
