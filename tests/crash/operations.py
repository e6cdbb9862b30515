"""What the harness disturbs: every kind of call of gravlens that writes, on models of three narrow layers."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import small
import tiny
import torch
from crash.harness import Operation
from histories import history_on_disk, sequence_on_disk
from typer.testing import CliRunner

import gravlens as gl
from gravlens.activations import reader
from gravlens.activations.store import list_store, prune_store, verify_store
from gravlens.claims.preregistration import Preregistration
from gravlens.core.errors import GravlensError
from gravlens.core.files import write_json, write_table
from gravlens.directions.vrev import direction_from
from gravlens.exchange import to_gguf, to_inspect_log, to_steered
from gravlens.interventions.orthogonalization import orthogonalize
from gravlens.models.opening import open_model, save_folder
from gravlens.organisms import refusal_language as language
from gravlens.organisms.base import Arm
from gravlens.reporting.page import write_report
from gravlens.studies import experiment
from gravlens.studies.study import Study
from gravlens.training.recipe import Recipe

finetuning: Any = import_module("gravlens.training.finetune")
fingerprints: Any = import_module("gravlens.activations.fingerprint")
EXAMPLES = language.finetuning_examples(12, rng=np.random.default_rng(0))
PROMPTS = language.probe_prompts()[:10]


def operations(inputs: Path) -> list[Operation]:
    """All of them; `inputs` is made if it is not there, and only read afterwards."""
    torch.set_num_threads(1)
    reader.TOKENS["cpu"] = 40
    reader.BLOCK_BYTES, reader.TOKENS_ELSEWHERE = 2000, 60  # several files for each checkpoint
    experiment.processes = small.inline
    fingerprints.SETTLED = 0.0  # weights are known by their stamps at once
    if not inputs.exists():
        history_on_disk(inputs)
        tiny.save(tiny.llama(num_hidden_layers=1), inputs / "shallow")  # an optimizer of few tensors, few calls
        sequence_on_disk(
            inputs / "history", {"witness": tiny.llama(0), "anchor": tiny.llama(1), "ft/checkpoint-1": tiny.llama(2)}
        )
    return [*stores(inputs), *runs(inputs), *studies(), *files(inputs), *exporters(inputs), *commands(inputs)]


def numbers(array: Any) -> str:
    return sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# -- the store ---------------------------------------------------------------------------------------------------------


def read(inputs: Path, folder: Path) -> str:
    seq = gl.ModelSequence.from_folders(witness=inputs / "base", anchor=inputs / "aligned")
    return numbers(gl.cache_residuals(seq, PROMPTS, store=folder / "store").values)


def damaged(inputs: Path, folder: Path) -> None:
    """A complete store, then: states of one checkpoint with a flipped bit, a header cut off, no result, old scratch."""
    read(inputs, folder)
    first, second, *_ = sorted((folder / "store/states").rglob("*.safetensors"))
    content = bytearray(first.read_bytes())
    content[-3] ^= 4
    first.write_bytes(content)
    second.write_bytes(second.read_bytes()[:100])
    for view in (folder / "store/views").glob("*.safetensors"):
        view.unlink()
    scratch = first.with_name(f".{first.name}.{'0' * 8}")
    scratch.write_bytes(b"cut")
    os.utime(scratch, (1e9, 1e9))


def stores(inputs: Path) -> list[Operation]:
    """Reading through a store that is empty, complete or damaged, and its maintenance."""
    warm, broken = partial(read, inputs), partial(damaged, inputs)
    one = partial(Operation, "activation cache", spared=("store/digests/*",))

    def table(folder: Path) -> str:
        return list_store(folder / "store").drop(columns=["used"]).to_csv()

    def pruned(folder: Path) -> None:
        prune_store(folder / "store", unused_days=1e-9)

    return [
        one("store cold", partial(read, inputs)),
        one("store warm", partial(read, inputs), warm),
        one("store damaged", partial(read, inputs), broken, damaged=True),
        one("store list", table, broken),
        one("store verify", lambda folder: len(verify_store(folder / "store")), broken),
        one("store prune", lambda folder: [prune_store(folder / "store")][1:], broken),
        one("store prune unused", pruned, broken),
    ]


# -- runs --------------------------------------------------------------------------------------------------------------


def train(inputs: Path, folder: Path, stop: int | None = None) -> str:
    finetuning.RESUMABLE_AFTER = 0.0  # a state to resume from after each step

    class Stop(finetuning.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == stop:
                os.kill(os.getpid(), 9)

    done = gl.finetune(
        inputs / "shallow",
        EXAMPLES,
        out=folder / "out",
        recipe=Recipe(3, 2, 1e-3, warmup_steps=0),
        save_steps=(1, 3),
        monitor=Stop(),
    )
    return f"{[checkpoint.step for checkpoint in done.checkpoints]} {done.log.to_csv()}"


def stopped(inputs: Path, folder: Path) -> None:
    """A run that was killed after two of three steps."""
    if not (number := os.fork()):
        train(inputs, folder, stop=2)
    os.waitpid(number, 0)
    assert list((folder / "out/.resume").glob("checkpoint-*"))


def runs(inputs: Path) -> list[Operation]:
    """Fine-tuning from the start, and from the state of a killed run."""
    one = partial(Operation, "fine-tuning", whole=("out/checkpoint-*",))
    return [
        one("finetune", partial(train, inputs)),
        one("finetune resumed", partial(train, inputs), partial(stopped, inputs)),
    ]


# -- studies -----------------------------------------------------------------------------------------------------------


class Few(small.Short):
    """An organism with one arm."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        return (Arm("unblocked", (0,), keep=True),)


def study(folder: Path) -> Study:
    changes: Mapping[str, Any] = {"recipe": Recipe(2, 4, 1e-3), "save_steps": (2,), "noise_draws": 2, "runs": 1}
    return Study.at(Few(**{**small.PLAN, **changes}), folder / "cache")


def ends_of(folder: Path) -> None:
    for name in study(folder).organism.checkpoints:
        experiment.make_checkpoint(study(folder), name)


def measured(folder: Path) -> None:
    ends_of(folder)
    experiment.measure_history(study(folder))


def studies() -> list[Operation]:
    """Parts of the cache of `reproduce` and `audit`, each made of the parts before it."""
    home = "cache/histories/*/*"
    one = partial(Operation, "reproduce and audit", whole=(f"{home}/witness", f"{home}/anchor", f"{home}/measured"))

    def arm(folder: Path) -> None:
        made = study(folder)
        experiment.preregister(made)
        experiment.run_arm(made, made.unblocked, 0)

    return [
        one("checkpoint", lambda folder: [experiment.make_checkpoint(study(folder), "witness")][1:]),
        one("measured history", lambda folder: [experiment.measure_history(study(folder))][1:], ends_of),
        replace(one("arm", arm, measured), whole=(f"{home}/runs/*/seed0",)),
    ]


# -- files -------------------------------------------------------------------------------------------------------------


def vectors(seed: int) -> gl.Directions:
    rng = np.random.default_rng(seed)
    made = [direction_from(rng.standard_normal(tiny.WIDTH), layer=layer, distance=2.0) for layer in (1, 2)]
    return gl.Directions(tuple(made))


def states(seed: int) -> gl.Residuals:
    values = np.random.default_rng(seed).standard_normal((2, 4, 3, tiny.WIDTH)).astype(np.float32)
    return gl.Residuals(values, ("witness", "anchor"), (0, 1, 2), "probes", {"dtype": ["float32"]})


def spaces(seed: int) -> Any:
    made = [gl.Subspace(one.vector, one.layer, 2.0) for one in vectors(seed)]
    return gl.Subspaces(tuple(made))


def over(name: str, write: Callable[[Any, Path], Any], *contents: Any, area: str = "saved files") -> Operation:
    """Write the second content over the first."""
    old, new = contents

    def run(folder: Path) -> None:
        write(new, folder / "results" / name)

    def before(folder: Path) -> None:
        (folder / "results").mkdir(exist_ok=True)
        write(old, folder / "results" / name)

    return Operation(area, name, run, before)


def files(inputs: Path) -> list[Operation]:
    """Every `.save()`, tables, JSON and the preregistration."""
    tables = [pd.DataFrame({"step": range(n), "x": 0.5}) for n in (2000, 3000)]
    fixed = Preregistration((1, 2), 20, 0.05, "a" * 64, "b" * 64, "compliance_rate", pd.Timestamp("2026-01-01").date())

    def write_plan(folder: Path) -> None:
        fixed.write(folder / "new/preregistration.toml")

    return [
        over("residuals.safetensors", lambda one, path: one.save(path), states(0), states(1)),
        over("directions.safetensors", lambda one, path: one.save(path), vectors(0), vectors(1)),
        over("subspaces.safetensors", lambda one, path: one.save(path), spaces(0), spaces(1)),
        over("table.csv", lambda one, path: write_table(path, one), *tables),
        over("facts.json", lambda one, path: write_json(path, one), {"a": [1.5] * 2000}, {"a": [2.5] * 3000}),
        Operation("saved files", "preregistration", write_plan),
        Operation("saved files", "report", lambda folder: [write_report(folder / "results")][1:], results),
        Operation("saved files", "figure", draw, whole=()),
    ]


def results(folder: Path) -> None:
    """A results folder of numbers that no measurement gave."""
    write_json(folder / "results/results.json", {"schema_version": 2, "setting": "made up", "n_anchors": 1})
    write_table(folder / "results/arms.csv", pd.DataFrame({"arm": ["unblocked"], "run": [0], "compliance_rate": [0.5]}))


def draw(folder: Path) -> None:
    arms = pd.DataFrame({"arm": ["unblocked", "penalty"], "run": [0, 0], "compliance_rate": [0.5, 0.25]})
    gl.plot.save_figure(gl.plot.plot_arms(arms), folder / "figures/compliance_rate", formats=("svg", "png"))


# -- other programs' files, and folders of weights ---------------------------------------------------------------------


def exporters(inputs: Path) -> list[Operation]:
    """Control vectors, Inspect logs, folders of weights."""
    pair, export = (vectors(0), vectors(1)), partial(over, area="exporters")
    made = [
        export("vector.gguf", to_gguf, *pair),
        export("vector.pt", to_steered, *pair),
        Operation("exporters", "save_folder", partial(resave, inputs, "aligned"), whole=("model",)),
        Operation(
            "exporters",
            "save_folder over another",
            partial(resave, inputs, "aligned"),
            partial(resave, inputs, "stranger"),
            whole=("model",),
        ),
        Operation(
            "exporters",
            "orthogonalize",
            lambda folder: [orthogonalize(inputs / "aligned", vectors(0)[1], out=folder / "model")][1:],
            whole=("model",),
        ),
    ]
    if find_spec("inspect_ai"):
        texts = ["yes"] * 3, ["no"] * 3
        made.append(export("log.json", lambda one, path: log_of(one, path), *texts))
    return made


def log_of(texts: Sequence[str], path: Path) -> None:
    to_inspect_log(PROMPTS[:3], path, answers=texts, scores={"x": [0.5] * 3}, model="tiny")


def resave(inputs: Path, name: str, folder: Path) -> None:
    save_folder(open_model(inputs / name), folder / "model")


# -- the command line --------------------------------------------------------------------------------------------------


def command(*words: str) -> Callable[[Path], str]:
    """A command in the folder: a failure that is one line on stderr counts as a clear error."""

    def run(folder: Path) -> str:
        from gravlens.cli import app

        os.chdir(folder)
        done = CliRunner().invoke(app, list(words))
        if done.exit_code == 0 and done.exception is None:
            return done.stdout.replace(str(folder), "")
        if (
            isinstance(done.exception, SystemExit)
            and len(done.stderr.strip().splitlines()) == 1
            and "Try:" in done.stderr
        ):
            raise GravlensError(done.stderr.strip(), "(exit code and one line)", "as it says")
        raise RuntimeError(f"exit code {done.exit_code}: {done.stderr[-300:]} {done.exception!r}")

    return run


def commands(inputs: Path) -> list[Operation]:
    """Commands with --out and --store."""
    toml = str(inputs / "history/SEQUENCE.toml")
    one = partial(Operation, "command line", before=lambda folder: (folder / "out").mkdir())
    return [
        one("gravlens locate", command("locate", toml, "--out", "out/v.safetensors")),
        replace(
            one("gravlens trajectory", command("trajectory", toml, "--out", "out/f.csv", "--store", "store")),
            spared=("store/digests/*",),
        ),
    ]
