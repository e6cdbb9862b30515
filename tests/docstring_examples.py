"""Examples in the docstrings of public names, run on one tiny history: `python tests/docstring_examples.py`."""

import contextlib
import doctest
import inspect
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blocked
import matplotlib as mpl
import numpy as np
from histories import history_on_disk, moved
from transformers import PrinterCallback, Trainer

import gravlens as gl
from gravlens.behavior import scores
from gravlens.organisms.base import ENGLISH

# Namespaces of which README or a page names something: their main names have an example too.
NAMESPACES = (
    "blockers claims controls damage decomposition directions divergence effects estimators exchange geometry judges "
    "nulls patching plot readout refusal scores stats subspaces training"
).split()
# A public name of the top level without an example -> why.
WITHOUT: dict[str, str] = {}
# An example that needs a package of an extra which `dev` leaves out -> the module.
NEEDS = {"exchange.to_inspect_log": "inspect_ai"}
# An example that takes more than a few seconds.
LONG = {"audit"}
TOML = """\
witness = "base"
anchor = "aligned"
probes = "probes.jsonl"
held_out = "held_out.jsonl"
[runs]
seed0 = "ft/seed0/checkpoint-*"
seed1 = "ft/seed1/checkpoint-*"
"""


@dataclass(frozen=True)
class Outcome:
    """One docstring's examples: how many lines of input, how many ran, and what failed."""

    lines: int
    tried: int
    report: str

    @property
    def passed(self) -> bool:
        return self.tried == self.lines > 0 and not self.report


def top() -> dict[str, Any]:
    """Name -> class or function of the top level."""
    found = {name: getattr(gl, name) for name in gl.__all__}
    return {name: value for name, value in found.items() if not inspect.ismodule(value)}


def public() -> dict[str, Any]:
    """Name -> class or function, of the top level and of `NAMESPACES`; each object once."""
    found = top()
    for space in NAMESPACES:
        module = getattr(gl, space)
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            # what a module imports is public elsewhere
            own = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith(module.__name__)
            if own and not name.startswith("_") and value not in found.values():
                found[f"{space}.{name}"] = value
    return found


def parsed(value: Any) -> list[doctest.Example]:
    # a class would inherit its parent's docstring
    written = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
    return doctest.DocTestParser().get_examples(written or "")


def with_examples() -> dict[str, Any]:
    return {name: value for name, value in public().items() if parsed(value)}


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def names(folder: Path) -> dict[str, Any]:
    """What the examples name (docs/reference/index.md lists it), of a tiny history that is written to a folder."""
    mpl.use("Agg")
    answers = [*ENGLISH.refusals, *ENGLISH.compliances, *scores.DEFAULT_REFUSAL_OPENINGS]
    history_on_disk(folder, " ".join(dict.fromkeys(" ".join(answers).split())))
    (folder / "SEQUENCE.toml").write_text(TOML)
    base = gl.open_model(folder / "base")  # of which `sibling2` is one more alignment
    for part in (moved(base.module, seed=6), base.tokenizer):
        part.save_pretrained(folder / "sibling2")
    with working_in(folder):
        seq = gl.ModelSequence.from_toml(folder / "SEQUENCE.toml")
        given, held_out = gl.cache_residuals(seq), gl.cache_residuals(seq, seq.held_out)
    vs = gl.locate_vrev(given)
    return {
        "gl": gl,
        "np": np,
        "seq": seq,
        "given": given,
        "held_out": held_out,
        "vs": vs,
        "tr": gl.follow([given, held_out], vs),
        "model": gl.open_model(seq.runs["seed0"][-1]),
        "prompts": seq.held_out,
        "examples": gl.read_examples(folder / "data.jsonl"),
    }


def a_trainer(folder: Path) -> Trainer:
    """A Hugging Face Trainer of the anchor, for three steps; it prints nothing."""
    aligned = gl.open_model(folder / "aligned")
    trainer = blocked.trainer(folder / "trainer", aligned.module)
    trainer.processing_class = aligned.tokenizer
    trainer.remove_callback(PrinterCallback)
    return trainer


def run(name: str, value: Any, known: dict[str, Any], folder: Path) -> Outcome:
    """Run one docstring's examples in the folder, with a random generator of their own."""
    examples = parsed(value)
    globs = {**known, "rng": np.random.default_rng(0)}
    if "trainer" in (value.__doc__ or ""):  # a Hugging Face Trainer can be used once
        globs["trainer"] = a_trainer(folder)
    test = doctest.DocTest(examples, globs, name, None, 0, value.__doc__)
    said = io.StringIO()
    with working_in(folder):
        found = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.write)
    return Outcome(len(examples), found.attempted, said.getvalue())


def main() -> int:
    """Print name, lines and outcome of every example, or of the given names; the exit code says if all passed."""
    failed = 0
    with tempfile.TemporaryDirectory() as home:
        known, found = names(Path(home)), with_examples()
        found = {name: value for name, value in found.items() if not sys.argv[1:] or name in sys.argv[1:]}
        for name, value in found.items():
            outcome = run(name, value, known, Path(home))
            failed += not outcome.passed
            print(f"{name:40} {outcome.lines:2}  {'passed' if outcome.passed else 'FAILED'}\n{outcome.report}", end="")
    bare = sorted(set(top()) - set(found) - set(WITHOUT))
    others = sorted(set(public()) - set(found) - set(top()))
    print(f"{len(found)} names with examples, {failed} failed; top-level names without: {', '.join(bare) or 'none'}")
    print(f"names of namespaces without: {', '.join(others) or 'none'}")
    return int(bool(failed or bare))


if __name__ == "__main__":
    sys.exit(main())
