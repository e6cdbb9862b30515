"""What a long reading will cost, before it is run: tokens, operations, bytes, memory and seconds."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from gravlens import html
from gravlens.adapters import lineage
from gravlens.checkpoints import Checkpoint, ModelSequence, Prompts
from gravlens.costs import TRIAL_TOKENS, Pass, Shape, flops_of, passes_of, shape_of
from gravlens.errors import GravlensError
from gravlens.folders import weight_files
from gravlens.machine import Machine, measured_machine
from gravlens.placement import Placement
from gravlens.positions import Positions, Query
from gravlens.precision import as_dtype
from gravlens.readings import Plan
from gravlens.residuals import prepare
from gravlens.stored_readings import least_tokens, part_sizes

READINGS_OF_STATES = 3  # through SHA-256 while an answer is put together: each file, the answer, the answer once more


@dataclass(frozen=True)
class Forecast:
    """What a reading into an empty store costs.

    Attributes:
        checkpoints: how many.
        prompts: how many.
        tokens: of all prompts, once.
        tokens_run: through one checkpoint, as its embedding sees them: with padding, without what is reused or cut.
        flops: operations of all checkpoints.
        bytes_read: of all weights, once; they are read twice, for their digests and to be opened.
        bytes_stored: of states; the answer that is put together of them takes as much again.
        memory: bytes of a worker, without Python and its libraries (about 0.7 GB).
        tasks: of an executor.
        workers: that share them.
        seconds: of each part: `digests`, `opening`, `passes`, `storing`.
        machine: the rates that it was reckoned with.
    """

    checkpoints: int
    prompts: int
    tokens: int
    tokens_run: int
    flops: float
    bytes_read: int
    bytes_stored: int
    memory: int
    tasks: int
    workers: int
    seconds: dict[str, float]
    machine: Machine

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())

    def lines(self) -> list[tuple[str, str]]:
        """The forecast in words: what, and how much."""
        m, spent = self.machine, ", ".join(f"{part} {duration(s)}" for part, s in self.seconds.items())
        return [
            ("checkpoints × prompts", f"{self.checkpoints:,} × {self.prompts:,}"),
            ("tokens of the prompts, and run", f"{self.tokens:,}, {self.tokens_run:,}"),
            ("operations", f"{self.flops:.3g} FLOP"),
            ("weights read", f"{amount(self.bytes_read)}, for digests and once more"),
            ("states stored", f"{amount(self.bytes_stored)}, and as much for the answer"),
            ("memory of a worker", f"{amount(self.memory)}, and Python's"),
            ("tasks for an executor", f"{self.tasks:,}"),
            ("time", f"{duration(self.total)} with {self.workers} worker(s)"),
            ("of these", spent),
            (
                "machine, " + ("measured here" if m.measured else "as it was named"),
                f"{m.flops:.3g} FLOP/s; read {amount(m.read)}/s, hash {amount(m.hashed)}/s, "
                f"write {amount(m.written)}/s",
            ),
        ]

    def _repr_html_(self) -> str:
        return html.facts(self.lines(), title="Forecast")

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {**asdict(self), "total": self.total}


def plan_reading(
    sequence: ModelSequence,
    prompts: Prompts | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    placement: Placement = Placement(),
    machine: Machine | None = None,
    workers: int = 1,
) -> Forecast:
    """What `cache_residuals` of the same arguments will cost, with a store that is empty.

    Args:
        sequence: the history; only small files of a hub id are downloaded.
        prompts: default: the sequence's probes.
        layers: default: all.
        positions: where states are read.
        placement: device and dtype.
        machine: default: this one, measured in seconds.
        workers: processes that share the work.

    Raises:
        GravlensError: what `cache_residuals` raises before it opens a model; a model in memory.
    """
    asked = prepare(sequence, prompts, layers=layers, positions=positions)
    plan = asked.plan
    config, shape = _configuration(sequence.anchor)
    if machine is None:
        folder = lineage(sequence.anchor, weights=False)[0]
        whole = folder if list(folder.glob("*.safetensors")) else None
        machine = measured_machine(plan, shape, config, whole, placement)
    dtype = as_dtype(placement.dtype) or getattr(config, "dtype", None) or torch.float32
    sizes = [_bytes(checkpoint, shape, config) for checkpoint in asked.checkpoints]
    least = least_tokens(placement.device)
    return forecast(plan, shape, sizes=sizes, machine=machine, workers=workers, least=least, width=dtype.itemsize)


def forecast(
    plan: Plan, shape: Shape, *, sizes: Sequence[int], machine: Machine, workers: int = 1, least: int, width: int
) -> Forecast:
    """The same from a plan, a shape and a machine, none of which need be here.

    Args:
        plan: prompts, layers and blocks.
        shape: the model's.
        sizes: bytes of each checkpoint's files.
        machine: rates of a worker.
        workers: how many.
        least: tokens of a task, at least (`stored_readings.least_tokens`).
        width: bytes of a number in memory.
    """
    n, deepest = len(sizes), plan.layers[-1]
    passes = list(passes_of(plan, shape, tokens=machine.tokens, reuse=machine.reuse))
    flops = sum(flops_of(one, shape, deepest) for one in passes)
    trial = 2 * TRIAL_TOKENS * sum(shape.matrices)
    stored = 4 * plan.ends[-1] * len(plan.layers) * plan.d_model
    blocks = [sum(plan.queries[i].end - len(plan.prefix) for i in block) for block in plan.blocks]
    tasks = len(part_sizes(blocks, least))
    opened = n if workers == 1 else n * tasks  # without an executor weights are swapped, and each is opened once
    models = 1 if workers == 1 else opened
    shares = {
        "digests": sum(sizes) * (1 / machine.read + 1 / machine.hashed) / _used(n, workers),
        "opening": (models * machine.startup + sum(sizes) * opened / n / machine.read) / _used(opened, workers),
        "passes": (n * flops + models * trial) / machine.flops / _used(opened, workers),
        "storing": n * stored * (1 / machine.hashed + 1 / machine.written) / _used(opened, workers)
        + n * stored * (READINGS_OF_STATES / machine.hashed + 1 / machine.written),
    }
    return Forecast(
        checkpoints=n,
        prompts=len(plan.queries),
        tokens=sum(len(query.ids) for query in plan.queries),
        tokens_run=sum(one.tokens for one in passes),
        flops=n * flops,
        bytes_read=sum(sizes),
        bytes_stored=n * stored,
        memory=_memory(plan, shape, passes, width),
        tasks=n * tasks,
        workers=workers,
        seconds=shares,
        machine=machine,
    )


def _used(tasks: int, workers: int) -> float:
    """By how much workers shorten so many equal tasks: the last round may leave some of them idle."""
    return tasks / math.ceil(tasks / workers)


def _memory(plan: Plan, shape: Shape, passes: Sequence[Pass], width: int) -> int:
    """Weights, the largest tensor once more while weights are swapped, the largest batch, and a block of states."""
    cache = shape.cached * (plan.layers[-1] + 1)
    batch = max(
        one.tokens * (4 * shape.d_model + 3 * shape.widest) + one.prompts * (one.past + one.width) * cache
        for one in passes
    )
    rows = max(sum(len(plan.queries[i].reads) for i in block) for block in plan.blocks)
    return width * (shape.parameters + shape.largest + batch) + 8 * rows * len(plan.layers) * plan.d_model


def _configuration(checkpoint: Checkpoint) -> tuple[PretrainedConfig, Shape]:
    if isinstance(checkpoint.source, nn.Module):
        raise GravlensError(
            f"{checkpoint.name} is {checkpoint.described}.",
            "A plan is made from the configurations of folders or hub ids.",
            "model.save_pretrained(folder).",
        )
    config = AutoConfig.from_pretrained(lineage(checkpoint, weights=False)[0], trust_remote_code=False)
    return config, shape_of(config)


def _bytes(checkpoint: Checkpoint, shape: Shape, config: PretrainedConfig) -> int:
    """Of a checkpoint's files, its base's too; by the configuration where they are not here."""
    folders = lineage(checkpoint, weights=False)
    if all(list(folder.glob("*.safetensors")) for folder in folders):
        return sum(path.stat().st_size for folder in folders for path in weight_files(folder))
    return shape.parameters * (getattr(config, "dtype", None) or torch.float32).itemsize


def without_files(config: PretrainedConfig, lengths: Sequence[int], *, layers: Sequence[int]) -> tuple[Plan, Shape]:
    """For a model that is not here: its shape, and a plan for prompts of so many tokens that have nothing in common."""
    shape = shape_of(config)
    queries = [Query((number,) * length, ((length - 1,),)) for number, length in enumerate(lengths)]
    return Plan.of(queries, sorted(layers), shape.d_model), shape


def amount(size: float) -> str:
    """Bytes in words."""
    power = min(int(math.log10(max(size, 1))) // 3, 4)
    return f"{size / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    unit, name = next(((u, n) for u, n in ((3600, "h"), (60, "min")) if seconds >= 2 * u), (1, "s"))
    return f"{seconds / unit:.3g} {name}"
