"""Forecast the cost of reading a history: tokens, 2 · parameters · tokens operations, bytes, and from these a time."""

import hashlib
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from statistics import median
from timeit import repeat
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from gravlens.activations.plan import Plan
from gravlens.activations.positions import Positions
from gravlens.activations.reader import Reader, batches_of, tokens_for
from gravlens.activations.residuals import prepare
from gravlens.activations.store import least_tokens, part_sizes
from gravlens.core import display as html
from gravlens.core.display import amount, duration
from gravlens.core.errors import GravlensError
from gravlens.history.sequence import ModelSequence, Prompts
from gravlens.history.sources import Resolved, resolve
from gravlens.models.families import block_list
from gravlens.models.opening import open_model, quiet
from gravlens.models.placement import Placement, as_device
from gravlens.models.precision import as_dtype

__all__ = ["Forecast", "Machine", "plan_reading"]

# Mixture-of-experts configurations have no common name for the number of experts that process a token.
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
SUSTAINED = 0.4  # share of a vendor's peak FLOP/s that dense forward passes reach
STATE_PASSES = 3  # states are written in blocks, read back, and written as one array, each time with their SHA-256
TIMED, LARGEST_TIMED = 3e7, 2e9  # parameters of the shallow model that is timed: it has two blocks at least
HASHED = 64 << 20  # bytes that are read and hashed to time the disk


@dataclass(frozen=True)
class Machine:
    """Rates of one worker.

    Attributes:
        flops: sustained floating-point operations per second.
        disk: bytes per second that files are read or written at, with their SHA-256.
        measured: whether both were measured on this machine.
    """

    flops: float
    disk: float
    measured: bool = False


@dataclass(frozen=True)
class Forecast:
    """Cost of `cache_residuals` with an empty store.

    Attributes:
        checkpoints: number of checkpoints.
        prompts: number of prompts.
        tokens: tokens per checkpoint up to the last position that is read, with the shared prefix counted once.
        flops: 2 · parameters of the blocks · tokens, over all checkpoints.
        bytes_read: size of all weights; they are read twice, for their digests and to open the models.
        bytes_downloaded: the part of it that is not on this disk; `seconds` does not contain its download.
        bytes_stored: size of the states; the memory-mapped array takes the same space again.
        memory: bytes of one model's weights.
        tasks: number of tasks for an executor.
        workers: number of workers that share them.
        seconds: time of each part: `digests`, `opening`, `passes`, `storing`.
        machine: the rates.
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
        """Quantities and their values as text."""
        m = self.machine
        return [
            ("checkpoints × prompts", f"{self.checkpoints:,} × {self.prompts:,}"),
            ("tokens of a checkpoint", f"{self.tokens:,}"),
            ("operations", f"{self.flops:.3g} FLOP"),
            (
                "weights",
                f"{amount(self.bytes_read)}, read twice; {amount(self.bytes_downloaded)} to download",
            ),
            ("states", f"{amount(self.bytes_stored)}, and the same again for the memory-mapped array"),
            ("memory of a worker", f"{amount(self.memory)} of weights"),
            ("tasks for an executor", f"{self.tasks:,}"),
            ("time", f"{duration(self.total)} with {self.workers} worker(s)"),
            ("time by part", ", ".join(f"{part} {duration(s)}" for part, s in self.seconds.items())),
            (
                f"machine, {'measured here' if m.measured else 'as given'}",
                f"{m.flops:.3g} FLOP/s, {amount(m.disk)}/s",
            ),
        ]

    def _repr_html_(self) -> str:
        return html.facts(self.lines(), title="Forecast")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and `total` for JSON."""
        return {**asdict(self), "total": self.total}


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
    """Forecast the cost of `cache_residuals` with the same arguments and an empty store.

    Args:
        sequence: the history; only small files of a hub id are downloaded.
        prompts: default: the sequence's probes.
        layers: default: all.
        positions: where states are read.
        placement: device and dtype.
        machine: default: this machine, measured within seconds.
        workers: number of processes that share the work.

    Raises:
        GravlensError: what `cache_residuals` raises before it opens a model; a model in memory.
    """
    sequence = ModelSequence.of(sequence)
    request = prepare(sequence, prompts, layers=layers, positions=positions)
    sizes = [_bytes_on_disk(checkpoint) for checkpoint in request.checkpoints]
    folder = resolve(sequence.anchor, weights=False).base.path
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    machine = machine or measured_machine(request.plan, config, folder, placement)
    return forecast(request.plan, config, sizes=sizes, machine=machine, workers=workers, placement=placement)


def _bytes_on_disk(checkpoint: Resolved) -> int | None:
    """Size of a checkpoint's weights with its base; None where they are not on this disk."""
    if not checkpoint.folders:
        raise GravlensError(
            f"{checkpoint.name} is {checkpoint.described}.",
            "A forecast is made from the configurations of folders or hub ids.",
            "model.save_pretrained(folder).",
        )
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
    flops = 2 * sum(blocks[: plan.layers[-1] + 1]) * n * tokens
    stored = 4 * n * plan.ends[-1] * len(plan.layers) * plan.d_model
    dtype: Any = config.dtype or torch.float32  # a configuration without weights may name none
    whole = parameters * dtype.itemsize
    weights = sum(whole if size is None else size for size in sizes)
    opened = n if workers == 1 else tasks  # every task opens its checkpoint
    rounds = math.ceil(opened / workers)  # some workers may be idle in the last one
    return Forecast(
        checkpoints=n,
        prompts=len(plan.queries),
        tokens=tokens,
        flops=flops,
        bytes_read=weights,
        bytes_downloaded=whole * list(sizes).count(None),
        bytes_stored=stored,
        memory=parameters * (as_dtype(placement.dtype) or dtype).itemsize,
        tasks=tasks,
        workers=workers,
        seconds={
            "digests": weights / n * math.ceil(n / workers) / machine.disk,
            "opening": weights / n * rounds / machine.disk,
            "passes": flops / opened * rounds / machine.flops,
            "storing": STATE_PASSES * stored / machine.disk,
        },
        machine=machine,
    )


def count_parameters(config: PretrainedConfig) -> tuple[int, tuple[float, ...]]:
    """Count all parameters of a model, and those of each block that multiply a token (of experts the active share)."""
    with torch.device("meta"), quiet():  # no weights are read or initialised
        module: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    active = next((k for name in ACTIVE_EXPERTS if isinstance(k := getattr(text, name, None), int)), None)

    def multiplied(weight: torch.Tensor) -> float:  # transformers keeps a block's experts in one tensor [expert, …]
        return weight.numel() * (min(1, active / len(weight)) if weight.ndim == 3 and active else 1)

    # A depthwise convolution [channel, 1, width] (Mamba) has more dimensions than a vector and is no matrix either.
    matrices = [[p for p in block.parameters() if p.ndim > 1 and min(p.shape[:2]) > 1] for block in block_list(module)]
    return sum(p.numel() for p in module.parameters()), tuple(sum(map(multiplied, block)) for block in matrices)


# --- rates ----------------------------------------------------------------------------------------------------------
def named_machine(*, peak_flops: float, disk: float) -> Machine:
    """Return rates for a machine that is not here: SUSTAINED of a vendor's peak FLOP/s, and bytes/s of a disk.

    Raises:
        GravlensError: one of them is not positive.
    """
    if peak_flops > 0 and disk > 0:
        return Machine(SUSTAINED * peak_flops, disk)
    raise GravlensError(
        f"A machine with {peak_flops:g} FLOP/s and a disk of {disk:g} bytes/s was given.",
        "Both rates must be positive.",
        "--peak-flops 989e12 --disk-gbps 2 (an H100 in bf16), or neither to measure this machine.",
    )


def measured_machine(plan: Plan, config: PretrainedConfig, folder: Path, placement: Placement) -> Machine:
    """Time one batch of a plan through a shallow model of random weights, and SHA-256 of a weight file of a folder."""
    blocks, config = count_parameters(config)[1], deepcopy(config)
    if 2 * blocks[0] > LARGEST_TIMED:
        raise GravlensError(
            f"This model has blocks of {blocks[0]:.1e} parameters.",
            f"Two blocks of up to {LARGEST_TIMED / 2:.0e} parameters each can be timed.",
            "--peak-flops and --disk-gbps of the machine that will read them.",
        )
    text, depth = config.get_text_config(), min(len(blocks), max(2, int(TIMED / blocks[0])))
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]  # transformers refuses a list of another length
    with quiet():
        module: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    dtype = as_dtype(placement.dtype) or config.dtype or torch.float32
    model = open_model(module.to(as_device(placement.device), dtype).eval())
    reader = Reader(model, layers=range(depth), prefix=plan.prefix)
    batches = batches_of(plan.queries, prefix=reader.shared, tokens=tokens_for(model))
    batch = [plan.queries[i] for i in batches[len(batches) // 2]]
    flops = 2 * sum(blocks[:depth]) * sum(query.end - reader.shared for query in batch)
    path = next(folder.glob("*.safetensors"), None)
    with path.open("rb") if path else BytesIO(bytes(HASHED)) as file:
        size = len(file.read(HASHED))
        hashing = _seconds(lambda: (file.seek(0), hashlib.sha256(file.read(HASHED))))
    return Machine(flops / _seconds(lambda: reader.read(batch)), size / hashing, measured=True)


def _seconds(work: Callable[[], Any]) -> float:
    return median(repeat(work, number=1, repeat=4)[1:])  # the first warms up
