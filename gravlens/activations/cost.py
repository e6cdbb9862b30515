"""What a reading costs, counted before it is run: the passes, their tokens and floating-point operations."""

import hashlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from gravlens.activations.plan import Plan
from gravlens.activations.positions import Positions, Query
from gravlens.activations.reader import (
    LONGEST_TAIL,
    TOKENS,
    TOKENS_ELSEWHERE,
    Reader,
    batches_of,
    reuses_keys,
    tokens_for,
    window_of,
)
from gravlens.activations.residuals import prepare
from gravlens.activations.stored import least_tokens, part_sizes
from gravlens.core import display as html
from gravlens.core.errors import GravlensError
from gravlens.core.files import write_atomically
from gravlens.history.precision import as_dtype
from gravlens.history.sequence import Checkpoint, ModelSequence, Prompts
from gravlens.history.sources import lineage
from gravlens.history.weight_files import weight_files
from gravlens.models.opening import OpenModel, block_list, open_model, quiet
from gravlens.models.placement import Placement, as_device

ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
TRIAL_TOKENS = 104  # of the trial whether keys and values may be reused, once a model that is opened


@dataclass(frozen=True)
class Shape:
    """What a model computes for a token, by its configuration alone.

    Attributes:
        matrices: for each block, how many numbers a token is multiplied with (of experts those that are active).
        inputs: of these, those that make queries, keys and values.
        attended: width of all heads: each pair of tokens costs 4 × so many operations in a block.
        parameters: all numbers of the model.
        largest: numbers of the largest tensor.
        widest: the widest vector inside a block.
        d_model: width of the residual stream.
        cached: numbers that a token leaves in a block's cache.
        window: tokens that attention looks back at least.
    """

    matrices: tuple[float, ...]
    inputs: int
    attended: int
    parameters: int
    largest: int
    widest: int
    d_model: int
    cached: int
    window: float


def shape_of(config: PretrainedConfig) -> Shape:
    """The shape of a causal language model; it is built without numbers, and no weights are read."""
    with torch.device("meta"), quiet():
        module: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    share = next((value for name in ACTIVE if isinstance(value := getattr(text, name, None), int)), None)
    blocks = [[p for p in block.parameters() if p.ndim > 1 and min(p.shape[:2]) > 1] for block in block_list(module)]
    heads = getattr(text, "num_attention_heads", None) or 0
    head = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    pairs = (getattr(text, "num_key_value_heads", None) or heads) * head
    sizes = [p.numel() for p in module.parameters()]
    return Shape(
        matrices=tuple(sum(_active(p, share) for p in block) for block in blocks),
        inputs=text.hidden_size * (heads * head + 2 * pairs),
        attended=heads * head,
        parameters=sum(sizes),
        largest=max(sizes),
        widest=max(max(p.shape[-2:]) for block in blocks for p in block),
        d_model=text.hidden_size,
        cached=2 * pairs,
        window=window_of(config),
    )


def _active(weight: torch.Tensor, share: int | None) -> float:
    """Numbers of a matrix; of several experts' in one tensor [expert, …] those of the experts that a token meets."""
    return weight.numel() * (min(1, share / len(weight)) if weight.ndim == 3 and share else 1)


# --- passes ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        prompts: how many.
        width: tokens of each, padding too.
        past: tokens of each whose keys and values are there already.
        whole: whether the deepest block is run to its end, or left after its keys and values.
    """

    prompts: int
    width: int
    past: int
    whole: bool

    @property
    def tokens(self) -> int:
        """As the embedding sees them."""
        return self.prompts * self.width


def passes_of(plan: Plan, shape: Shape, *, tokens: int, reuse: bool) -> Iterator[Pass]:
    """The passes that read one checkpoint, in batches of so many tokens.

    Args:
        plan: prompts, layers and blocks.
        shape: the model's.
        tokens: of a batch (`passes.tokens_for`).
        reuse: whether the family goes on from keys and values (`passes.reuses_keys`).
    """
    prefix, fresh = len(plan.prefix) if reuse else 0, True
    for block in plan.blocks:
        queries = [plan.queries[i] for i in block]
        for batch in batches_of(queries, prefix=prefix, tokens=tokens):
            rows = [queries[i] for i in batch]
            if not reuse or max(query.end for query in rows) + LONGEST_TAIL >= shape.window:
                yield Pass(len(rows), max(query.end for query in rows), 0, True)
                continue
            if fresh and prefix:
                yield Pass(1, prefix, 0, False)
            fresh = False
            yield from _two(rows, prefix)


def _two(rows: Sequence[Query], prefix: int) -> Iterator[Pass]:
    """What comes before the positions that are read, and these."""
    starts = [query.start if query.end - query.start <= LONGEST_TAIL else prefix for query in rows]
    body = max(starts) - prefix
    if body:
        yield Pass(len(rows), body, prefix, False)
    tail = max(query.end - start for query, start in zip(rows, starts, strict=True))
    yield Pass(len(rows), tail, prefix + body, True)


def flops_of(one: Pass, shape: Shape, deepest: int) -> float:
    """Operations of a pass up to a layer: 2 for each number and token, and attention's scores and sums."""
    below = list(accumulate(shape.matrices, initial=0))[deepest]
    last = shape.matrices[deepest] if one.whole else shape.inputs
    attention = 4 * shape.attended * (one.past + one.width) * (deepest + one.whole)
    return one.tokens * (2 * (below + last) + attention)


NUMBERS = 30_000_000  # of the blocks of the model that is timed; at least two blocks
LARGEST = 2_000_000_000  # of these two; beyond it nothing is timed here
SAMPLES, REPEATS, SECONDS = 4, 4, 6.0  # batches, how often each, and after how long no more
READ = 128 << 20  # bytes
HASHED, STARTUP = 1.5e9, 10.0  # of a machine that is not here: bytes/s of one core with SHA instructions, and seconds
SUSTAINED = 0.4  # of a peak that a maker names: what dense forward passes were seen to reach


@dataclass(frozen=True)
class Machine:
    """Rates of one worker.

    Attributes:
        flops: operations a second, as `costs` counts them.
        read: bytes of weights a second, from their files to the device.
        hashed: bytes a second through SHA-256.
        written: bytes a second into files.
        startup: seconds to make a model before its weights are read.
        reuse: whether keys and values are gone on from.
        tokens: of a batch.
        measured: here, or said.
    """

    flops: float
    read: float
    hashed: float
    written: float
    startup: float
    reuse: bool
    tokens: int
    measured: bool


def named_machine(*, peak_flops: float, disk: float, device: str = "cuda") -> Machine:
    """The rates of a worker that is not here.

    Args:
        peak_flops: operations a second by its maker; SUSTAINED of them are reckoned with.
        disk: bytes a second that files are read and written with.
        device: decides how many tokens make a batch.

    Raises:
        GravlensError: one of both is not above 0.
    """
    if not (peak_flops > 0 and disk > 0):
        raise GravlensError(
            f"A machine of {peak_flops:g} FLOP/s and a disk of {disk:g} bytes/s was named.",
            "Both are needed.",
            "--peak-flops 989e12 --disk-gbps 2 (an H100 in bf16), or neither: then this machine is measured.",
        )
    tokens = TOKENS.get(device, TOKENS_ELSEWHERE)
    return Machine(SUSTAINED * peak_flops, disk, HASHED, disk, STARTUP, True, tokens, False)


def measured_machine(
    plan: Plan, shape: Shape, config: PretrainedConfig, folder: Path | None, placement: Placement
) -> Machine:
    """Rates of this machine, at a few batches of this very plan and a sample of these very files.

    Args:
        plan: what will be read.
        shape: the model's.
        config: the model's; a shallow one of random weights is timed.
        folder: a checkpoint, as it lies now: on a disk, or in memory where it was read before.
        placement: device and dtype.

    Raises:
        GravlensError: a model so large that even two of its blocks are not timed here.
    """
    began = perf_counter()
    with torch.device("meta"), quiet():
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    startup = perf_counter() - began
    model, shallow = _shallow(shape, config, placement)
    reuse, tokens = reuses_keys(model), tokens_for(model)
    depth = min(plan.layers[-1] + 1, model.n_layers)
    layers = range(depth) if len(plan.layers) > 1 else [depth - 1]
    flops = _flops(replace(plan, layers=tuple(layers)), shallow, model, reuse)
    written, hashed = _written(), _rate(lambda data: hashlib.sha256(data).digest())
    read = _read(folder, model.dtype, model.device) if folder else written
    return Machine(flops, read, hashed, written, startup, reuse, tokens, True)


# --- forward passes -------------------------------------------------------------------------------------------------
def _shallow(shape: Shape, config: PretrainedConfig, placement: Placement) -> tuple[OpenModel, Shape]:
    """The same model with random weights and few blocks."""
    each = max(shape.parameters - shape.d_model * 2 * config.get_text_config().vocab_size, 1) / len(shape.matrices)
    if 2 * each > LARGEST:
        raise GravlensError(
            f"Blocks of {each:.1e} numbers were to be timed on this machine.",
            f"Two blocks of up to {LARGEST / 2:.0e} numbers each are timed.",
            "--peak-flops and --disk-gbps of the machine that will read them.",
        )
    config = deepcopy(config)
    text = config.get_text_config()
    depth = min(len(shape.matrices), max(2, int(NUMBERS / each)))
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]
    with quiet():
        module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    dtype = as_dtype(placement.dtype) or getattr(config, "dtype", None) or torch.float32
    model = open_model(module.to(as_device(placement.device), dtype).eval())
    return model, replace(shape, matrices=shape.matrices[:depth])


def _flops(plan: Plan, shape: Shape, model: OpenModel, reuse: bool) -> float:
    """Counted operations a second, over batches of the plan from short to long."""
    prefix = plan.prefix
    batches = [
        [plan.queries[block[i]] for i in batch]
        for block in plan.blocks
        for batch in batches_of([plan.queries[i] for i in block], prefix=len(prefix), tokens=tokens_for(model))
    ]
    chosen = [batches[(2 * i + 1) * len(batches) // (2 * SAMPLES)] for i in range(SAMPLES)]
    chosen = [batch for i, batch in enumerate(chosen) if batch not in chosen[:i]]
    times: list[list[float]] = [[] for _ in chosen]
    reader, ends = Reader(model, layers=plan.layers, prefix=prefix, reuse=reuse), perf_counter() + SECONDS
    for repeat in range(1 + REPEATS):
        for batch, seconds in zip(chosen, times, strict=True):
            if repeat < 2 or perf_counter() < ends:
                began = perf_counter()
                reader.read(batch)
                seconds.append(perf_counter() - began)
    counted = [_of_batch(plan, batch, shape, len(prefix), reuse) for batch in chosen]
    return sum(counted) / sum(median(seconds[1:]) for seconds in times)  # the first warms up, and runs the prefix


def _of_batch(plan: Plan, batch: Sequence[Query], shape: Shape, prefix: int, reuse: bool) -> float:
    alone = replace(plan, queries=tuple(batch), blocks=(tuple(range(len(batch))),))
    passes = list(passes_of(alone, shape, tokens=1 << 62, reuse=reuse))
    return sum(flops_of(one, shape, plan.layers[-1]) for one in passes[bool(prefix and reuse and len(passes) > 1) :])


# --- files ----------------------------------------------------------------------------------------------------------
def _rate(work: Callable[[bytes], Any], size: int = 32 << 20) -> float:
    """Bytes a second, the median of three."""
    data, seconds = os.urandom(1 << 20) * (size >> 20), []
    for _ in range(3):
        began = perf_counter()
        work(data)
        seconds.append(perf_counter() - began)
    return size / median(seconds)


def _written() -> float:
    with tempfile.TemporaryDirectory() as folder:
        return _rate(lambda data: write_atomically(Path(folder) / "sample", data))


def _read(folder: Path, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes of a folder's tensors a second into a model's memory, over a sample of them."""
    done, seconds = 0, 0.0
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if done >= READ:
                    return done / seconds
                place = torch.zeros(file.get_slice(name).get_shape(), dtype=dtype, device=device)
                began = perf_counter()
                tensor = file.get_tensor(name)
                place.copy_(tensor)
                seconds, done = seconds + perf_counter() - began, done + tensor.nbytes
    return done / seconds


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
    sequence: ModelSequence | Path | str,
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
    sequence = ModelSequence.of(sequence)
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
