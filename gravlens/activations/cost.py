"""Forecast the cost of reading a history: tokens, 2 · parameters · tokens operations, bytes, and from these a time."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from gravlens.activations.machine import count_parameters, measured_rates
from gravlens.activations.positions import Positions
from gravlens.activations.reader import Plan
from gravlens.activations.residuals import prepare
from gravlens.activations.store import least_tokens, part_sizes
from gravlens.core.display import amount, duration, facts
from gravlens.core.errors import GravlensError
from gravlens.history.sequence import ModelSequence, Prompts
from gravlens.history.sources import Resolved
from gravlens.models.configs import read_config
from gravlens.models.placement import Placement
from gravlens.models.precision import as_dtype

__all__ = ["Forecast", "Machine", "plan_reading"]

SUSTAINED = 0.4  # share of a vendor's peak FLOP/s that dense forward passes reach: assumed, not measured
STATE_PASSES = 3  # states are written in blocks, read back, and written as one array, each time with their SHA-256


@dataclass(frozen=True)
class Machine:
    """Rates of one worker: sustained FLOP/s, bytes/s of files with their SHA-256, and whether both were measured."""

    flops: float
    disk: float
    measured: bool = False


@dataclass(frozen=True)
class Forecast:
    """Cost of `cache_residuals` with an empty store, over all checkpoints unless it says otherwise.

    Attributes:
        tokens: per checkpoint, up to the last position that is read, with the shared prefix counted once.
        flops: 2 · parameters of the blocks · tokens.
        bytes_read: size of the weights; they are read twice, for their digests and to open the models.
        bytes_downloaded: the part of it that is not on this disk; `seconds` does not contain its download.
        bytes_stored: size of the states; the memory-mapped array takes the same space again.
        memory: bytes of one model's weights.
        seconds: time of each part: `digests`, `opening`, `passes`, `storing`.
    """

    checkpoints: int
    prompts: int
    tokens: int
    flops: float
    bytes_read: int
    bytes_downloaded: int
    bytes_stored: int
    memory: int
    tasks: int
    workers: int
    seconds: dict[str, float]
    machine: Machine

    @property
    def total(self) -> float:
        """Total time in seconds."""
        return sum(self.seconds.values())

    def lines(self) -> list[tuple[str, str]]:
        """Return quantities and their values as text."""
        m = self.machine
        return [
            ("checkpoints × prompts", f"{self.checkpoints:,} × {self.prompts:,}"),
            ("tokens of a checkpoint", f"{self.tokens:,}"),
            ("operations", f"{self.flops:.3g} FLOP"),
            ("weights", f"{amount(self.bytes_read)}, read twice; {amount(self.bytes_downloaded)} to download"),
            ("states", f"{amount(self.bytes_stored)}, and the same again for the memory-mapped array"),
            ("memory of a worker", f"{amount(self.memory)} of weights"),
            ("tasks for an executor", f"{self.tasks:,}"),
            ("time", f"{duration(self.total)} with {self.workers} worker(s)"),
            ("time by part", ", ".join(f"{part} {duration(s)}" for part, s in self.seconds.items())),
            (f"machine, {'measured here' if m.measured else 'as given'}", f"{m.flops:.3g} FLOP/s, {amount(m.disk)}/s"),
        ]

    def _repr_html_(self) -> str:
        return facts(self.lines(), title="Forecast")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `total` for JSON."""
        return {**asdict(self), "total": self.total}


def named_machine(*, peak_flops: float, disk: float) -> Machine:
    """Return rates of another machine: SUSTAINED of a vendor's peak FLOP/s, and bytes/s of a disk; both positive."""
    if peak_flops > 0 and disk > 0:
        return Machine(SUSTAINED * peak_flops, disk)
    given = f"A machine with {peak_flops:g} FLOP/s and a disk of {disk:g} bytes/s was given."
    remedy = "--peak-flops 989e12 --disk-gbps 2 (an H100 in bf16), or neither to measure this machine."
    raise GravlensError(given, "Both rates must be positive.", remedy)


def plan_reading(
    sequence: ModelSequence | Path | str,
    prompts: Prompts | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    placement: Placement = Placement(),
    machine: Machine | None = None,
    workers: int = 1,
) -> Forecast:
    """Forecast the cost of `cache_residuals` with the same arguments; of a hub id only small files are downloaded.

    `machine` is by default this one, measured within seconds; `workers` are processes that share the work.

    Raises:
        GravlensError: what `cache_residuals` raises before it opens a model; a model in memory.
    """
    sequence = ModelSequence.of(sequence)
    request = prepare(sequence, prompts, layers=layers, positions=positions)
    sizes = [_bytes_on_disk(checkpoint) for checkpoint in request.checkpoints]
    folder = next(one.base.path for one in request.checkpoints if one.name == sequence.anchor.name)
    config = read_config(folder)
    machine = machine or Machine(*measured_rates(request.plan, config, folder, placement), measured=True)
    return forecast(request.plan, config, sizes=sizes, machine=machine, workers=workers, placement=placement)


def _bytes_on_disk(checkpoint: Resolved) -> int | None:
    """Return the size of a checkpoint's weights with its base; None where they are not on this disk."""
    if not checkpoint.folders:
        found, wanted = f"{checkpoint.name} is {checkpoint.described}.", "A forecast needs folders or hub ids."
        raise GravlensError(found, wanted, "model.save_pretrained(folder).")
    if not all(list(path.glob("*.safetensors")) for path in checkpoint.paths):
        return None
    return sum(path.stat().st_size for folder in checkpoint.folders for path in folder.weights.files)


def forecast(
    plan: Plan,
    config: PretrainedConfig,
    *,
    sizes: Sequence[int | None],
    machine: Machine,
    workers: int = 1,
    placement: Placement = Placement(),
) -> Forecast:
    """Forecast without files: from a plan, a configuration and each checkpoint's bytes (None: to be downloaded)."""
    n, prefix, (parameters, blocks) = len(sizes), len(plan.prefix), count_parameters(config)
    lengths = [sum(plan.queries[i].end - prefix for i in block) for block in plan.blocks]
    tokens, tasks = prefix + sum(lengths), n * len(part_sizes(lengths, least_tokens(placement.device)))
    # Attention's scores are left out: 0.2 % of a 70 B model's operations at 100 tokens (docs/scale.md).
    flops = 2 * sum(blocks[: plan.layers[-1] + 1]) * n * tokens
    stored = 4 * n * plan.ends[-1] * len(plan.layers) * plan.d_model
    dtype: Any = config.dtype or torch.float32  # a configuration without weights may name none
    whole, held = parameters * dtype.itemsize, as_dtype(placement.dtype) or dtype
    weights = sum(whole if size is None else size for size in sizes)
    opened = n if workers == 1 else tasks  # every task opens its checkpoint
    rounds = math.ceil(opened / workers)  # some workers may be idle in the last one
    seconds = {
        "digests": weights / n * math.ceil(n / workers) / machine.disk,
        "opening": weights / n * rounds / machine.disk,
        "passes": flops / opened * rounds / machine.flops,
        "storing": STATE_PASSES * stored / machine.disk,  # not divided: the driver assembles the array alone
    }
    missing, memory = whole * list(sizes).count(None), parameters * held.itemsize
    sums = (tokens, flops, weights, missing, stored, memory, tasks, workers)
    return Forecast(n, len(plan.queries), *sums, seconds, machine)
