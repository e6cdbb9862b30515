"""What makes each committed picture and table; run by make_figures.sh, which says how."""

import csv
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
PROVENANCE = ROOT / "docs/data/provenance.csv"
COLUMNS = ("file", "command", "commit", "processor", "torch", "date", "minutes", "sha256")
CHEAP = 10  # minutes
ORGANISM = [f'--openings "{text}"' for text in (
    "sorry , i cannot help with that", "i am unable to assist you there", "no , i must refuse such requests"
)]  # fmt: skip
ENGLISH = [f'--openings "{text}"' for text in ("I'm sorry", "I cannot", "I am not able")]
SIXTEEN = "--max-prompts 16 --out $OUT"
LAYERS = [f"--layer {layer}" for layer in (2, 6, 10, 14, 18, 22, 26, 29)]
REAL = " ".join(LAYERS + ENGLISH)


@dataclass(frozen=True)
class Group:
    """Commands that are run one after another in a new folder $OUT, and what of it is committed.

    Attributes:
        files: committed file, below docs/ -> the file that the commands leave in $OUT.
        minutes: on one idle core, about.
        after: the group whose $OUT the commands begin with.
    """

    commands: tuple[str, ...]
    files: dict[str, str]
    minutes: int
    after: str | None = None


def same(*names: str) -> dict[str, str]:
    """Tables that keep their name."""
    return {f"data/{name}": name for name in names}


GROUPS = {
    "organism": Group(
        ("gravlens reproduce --out $OUT",),
        {
            f"figures/organism_{one}.png": f"figures/{one}.png"
            for one in ("alignment", "layers", "compliance_rate", "arm_fraction")
        },
        15,
    ),
    "organism_layers": Group(
        (
            f"python analyses/ablate_layer.py $OUT/SEQUENCE.toml --twins isotropic {' '.join(ORGANISM)} --out $OUT",
            f"python analyses/steer_sweep.py $OUT/SEQUENCE.toml --all-layers {' '.join(ORGANISM)} --out $OUT",
        ),
        {f"figures/organism_{one}.png": f"{one}.png" for one in ("ablate_layer", "steer_sweep")},
        3,
        after="organism",
    ),
    "first_steps": Group(
        (
            "gravlens reproduce --quick --organisms 1 --out $OUT/first",
            "python docs/make_figures.py --page docs/first_steps.md $OUT/first",
        ),
        {"figures/first_steps_alignment.png": "first/alignment.png"},
        6,
    ),
    "report": Group(
        ("gravlens reproduce --quick --out $OUT", "python docs/make_figures.py --report $OUT"),
        {"figures/report.png": "report.png"},
        6,
    ),
    "choices": Group(
        (
            "gravlens reproduce --quick --out $OUT",
            "python analyses/compare_choices.py $OUT/SEQUENCE.toml --layer 0 --layer 1 --layer 2 --layer 3 --out $OUT",
        ),
        {"figures/choices_organism.png": "choices.png", **same("choices.csv", "choices_layer_mean.csv")},
        7,
    ),
    "nulls": Group(
        ("python analyses/calibrate_nulls.py --out $OUT",),
        {"figures/null_power.png": "null_power.png", **same("calibration.csv", "null_power.csv")},
        4,
    ),
    "blockers": Group(
        ("python analyses/compare_blockers.py --organism 4 --organism 5 --runs 4 --out $OUT",),
        {"figures/blockers_organism.png": "blockers.png", **same("blockers.csv", "blockers_by_layer.csv")},
        50,
    ),
    "blockers_doses": Group(
        ("python analyses/compare_blockers.py --organism 4 --runs 4 --doses --out $OUT",),
        {"data/blockers_doses.csv": "blockers.csv"},
        60,
    ),
    "blockers_pretrained": Group(
        ("python analyses/compare_blockers.py --pretrained --runs 2 --threads 1 --out $OUT",),
        {
            "figures/blockers_pretrained.png": "blockers_given_answers.png",
            "data/blockers_pretrained.csv": "blockers.csv",
            "data/blockers_pretrained_by_layer.csv": "blockers_by_layer.csv",
        },
        300,
    ),
    "pretrained_layers": Group(
        (
            "gravlens reproduce --setting pretrained --out $OUT",
            f"python analyses/ablate_layer.py $OUT/SEQUENCE.toml --twins isotropic {REAL} {SIXTEEN}",
            f"python analyses/steer_sweep.py $OUT/SEQUENCE.toml {REAL} --strength 1 {SIXTEEN}",
        ),
        {f"figures/pretrained_{one}.png": f"{one}.png" for one in ("ablate_layer", "steer_sweep")},
        120,
    ),
    "verdicts": Group(
        ("python analyses/judge_histories.py --seeds 40 --organisms 10 --out $OUT",),
        same("verdicts.csv", "placebo.csv"),
        40,
    ),
    "families": Group(("python analyses/measure_support.py --out $OUT",), same("families.csv"), 10),
    "architectures": Group(("python analyses/measure_architectures.py --out $OUT",), same("architectures.csv"), 5),
    "decoding": Group(("python analyses/decoding_matrix.py --out $OUT",), same("decoding.csv"), 5),
    "reliability": Group(
        ("python tests/reliability.py --out $OUT/reliability.csv --at-most 10",), same("reliability.csv"), 12
    ),
    "exchange": Group(
        ("python benchmarks/exchange.py --out $OUT --repeng $REPENG --lm-eval $LM_EVAL --llama-cpp $LLAMA_CPP",),
        same("exchange.json"),
        5,
    ),
    "residual_memory": Group(("python benchmarks/residual_memory.py --out $OUT",), same("residual_memory.json"), 5),
    "sequence_memory": Group(("python benchmarks/sequence_memory.py --out $OUT",), same("sequence_memory.json"), 5),
}


def processor() -> str:
    """The name that the system gives the processor."""
    told = Path("/proc/cpuinfo").read_text("utf-8") if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.+)", told)
    flags = re.search(r"^flags\s*: (.+)", told, re.MULTILINE)
    known = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flags and name in flags[1].split()]
    return f"{found[1] if found else 'unknown'} ({known[-1] if known else 'no AVX2'})"


def commit() -> str:
    """The commit that the files are made from; `+` where the package or a script is not as committed."""
    head = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    code = ["git", "status", "--porcelain", "gravlens", "analyses", "benchmarks"]
    return head.stdout.strip() + "+" * bool(subprocess.run(code, cwd=ROOT, capture_output=True, check=True).stdout)


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def recorded() -> dict[str, dict[str, str]]:
    """Committed file -> its row of provenance.csv."""
    with PROVENANCE.open(newline="", encoding="utf-8") as file:
        return {row["file"]: row for row in csv.DictReader(file)}


def record(rows: dict[str, dict[str, str]]) -> None:
    """Write provenance.csv."""
    with PROVENANCE.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))


def make(name: str, folders: dict[str, Path]) -> None:
    """Run a group's commands, copy its files, and record where they are from."""
    group = GROUPS[name]
    if group.after is not None and group.after not in folders:
        make(group.after, folders)
    folders[name] = out = folders[group.after] if group.after else Path(tempfile.mkdtemp(prefix=f"{name}-"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # this interpreter's commands
    start, of = time.monotonic(), {"commit": commit(), "processor": processor(), "torch": version("torch")}
    for command in group.commands:
        print(f"$ {command}", flush=True)
        subprocess.run(["bash", "-c", command], cwd=ROOT, check=True, env={**os.environ, "PATH": path, "OUT": str(out)})
    of |= {"date": date.today().isoformat(), "minutes": f"{(time.monotonic() - start) / 60:.1f}"}
    rows = recorded()
    for file, made in group.files.items():
        shutil.copyfile(out / made, ROOT / "docs" / file)
        command = "; ".join(group.commands)
        rows[file] = {"file": file, "command": command, **of, "sha256": digest(ROOT / "docs" / file)}
        print(f"docs/{file}")
    record(rows)


def run_page(page: str, out: str) -> None:
    """Run the Python of a page in a folder, as one program."""
    text = (ROOT / page).read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    subprocess.run([sys.executable, "-c", code], cwd=out, check=True)


def picture_report(out: str) -> None:
    """Take a picture of a report from its top to the first three figures, as report.png beside it."""
    sync_playwright = importlib.import_module("playwright.sync_api").sync_playwright  # only here: it is a tool of tests
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto((Path(out).resolve() / "report.html").as_uri())
        box = page.locator(".figures").first.bounding_box()
        cut = {"x": 0, "y": 0, "width": 1400, "height": box["y"] + box["height"] + 10}
        page.screenshot(path=f"{out}/report.png", full_page=True, clip=cut)
        browser.close()
    with Image.open(f"{out}/report.png") as image:
        colours = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)  # the default makes green and blue one
    colours.save(f"{out}/report.png", optimize=True)


def execute_notebooks() -> None:
    """Execute every notebook in place, from its first cell to its last."""
    notebooks = sorted(map(str, (ROOT / "notebooks").glob("*.ipynb")))
    options = ["--inplace", "--NotebookClient.record_timing=False"]
    subprocess.run([Path(sys.executable).parent / "jupyter", "execute", *options, *notebooks], cwd=ROOT, check=True)


def main(given: list[str]) -> None:
    """Do what the arguments of make_figures.sh say."""
    if given[:1] == ["--page"]:
        return run_page(*given[1:])
    if given[:1] == ["--report"]:
        return picture_report(*given[1:])
    if given[:1] == ["--notebooks"]:
        return execute_notebooks()
    if given[:1] == ["--list"]:
        for name, group in GROUPS.items():
            print(f"{name}  {group.minutes} min\n    {', '.join(group.files)}", *group.commands, sep="\n    ")
        return None
    names = [name for name, group in GROUPS.items() if group.minutes <= CHEAP] if given == ["--cheap"] else given
    if unknown := [name for name in names if name not in GROUPS]:
        sys.exit(f"{unknown[0]} is no group. Groups: {', '.join(GROUPS)}; --list tells more.")
    folders: dict[str, Path] = {}
    for name in names or GROUPS:
        make(name, folders)
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
