"""Install the wheel in fresh environments, by pip and by uv, without constraints.txt, and use it there.

    python tests/fresh_install.py [pip] [uv]

Needs the package index, and some minutes. torch is installed first and alone, in the version that constraints.txt
names: an open range would take the newest build for GPUs, of gigabytes. All else is what the installer chooses. Prints
the versions that were resolved, each beside its range in pyproject.toml.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TORCH = re.search(r"^torch==.*", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
DATA = ("py.typed", "__init__.pyi", "reporting/report.html.jinja")
# Run by the fresh environment's Python, in an empty folder: every module, the data files, and a history from nothing.
SMOKE = f"""
import importlib, pkgutil, sys
from importlib import metadata, resources
import gravlens as gl

modules = [one.name for one in pkgutil.walk_packages(gl.__path__, "gravlens.") if not one.name.endswith("__main__")]
for name in modules:
    importlib.import_module(name)
for name in {DATA!r}:
    assert resources.files("gravlens").joinpath(name).is_file(), name

from transformers import LlamaConfig, LlamaForCausalLM
from gravlens.organisms.refusal_language import build_tokenizer, probe_prompts, task_examples
tokenizer = build_tokenizer()
sizes = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
             num_attention_heads=4, initializer_range=0.2)
for name in ("base", "aligned"):
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(name)
    tokenizer.save_pretrained(name)
prompts, examples = gl.PromptSet(tuple(probe_prompts()[:6])), task_examples()[:8]
gl.finetune("aligned", examples, out="ft", recipe=gl.Recipe(steps=2), save_steps=[1])
seq = gl.ModelSequence.from_folders(
    witness="base", anchor="aligned", runs={{"seed0": "ft/checkpoint-*"}}, probes=prompts, held_out=prompts)
vs = gl.locate_vrev(seq)
table = gl.follow(gl.cache_residuals(seq), vs).table
assert table.step.tolist() == [1, 1, 1, 2, 2, 2], table
gl.exchange.to_gguf(vs.at([1, 2]), "v.gguf")
gl.plot.save_figure(gl.plot_alignment(gl.follow(gl.cache_residuals(seq), vs), prompts="given"), "alignment.png")
print(len(modules), "modules;", "installed in", gl.__path__[0])
"""


def said(*command: object, cwd: Path) -> str:
    """What a command prints; its errors are shown and end the script."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, text=True, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:200]}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def check(installer: str, wheel: Path, home: Path) -> None:
    """Install with pip or uv into an environment of its own, and print what was resolved."""
    place = home / installer
    said(sys.executable, "-m", "venv", place, cwd=home)
    python = place / "bin" / "python"
    if installer == "uv":
        said(python, "-m", "pip", "install", "uv", cwd=home)
    install = [python, "-m", *(["uv"] if installer == "uv" else []), "pip", "install"]
    into = ["--python", python] if installer == "uv" else []
    said(*install, *into, TORCH[0] if TORCH else "torch", cwd=home)
    said(*install, *into, wheel, cwd=home)
    empty = home / f"{installer}-work"
    empty.mkdir()
    print(f"{installer}: gravlens {said(place / 'bin' / 'gravlens', '--version', cwd=empty).split()[-1]}")
    print(said(python, "-c", SMOKE, cwd=empty).splitlines()[-1].replace(str(home), "…"))
    listed = json.loads(said(python, "-m", "pip", "list", "--format=json", cwd=empty))
    versions = {one["name"].lower().replace("_", "-"): one["version"] for one in listed}
    for line in map(Requirement, PROJECT["dependencies"]):
        print(f"  {line.name:18} {versions[line.name]:16} {line.specifier}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        said(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "-w", home, cwd=home)
        (wheel,) = home.glob("gravlens-*.whl")
        for installer in sys.argv[1:] or ("pip", "uv"):
            check(installer, wheel, home)


if __name__ == "__main__":
    main()
