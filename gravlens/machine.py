"""How fast a machine is at what a reading does: measured here in seconds, or said for another machine."""

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from gravlens.costs import Shape, flops_of, passes_of
from gravlens.errors import GravlensError
from gravlens.folders import weight_files
from gravlens.models import OpenModel, open_model, quiet
from gravlens.passes import TOKENS, TOKENS_ELSEWHERE, Reader, batches_of, reuses_keys, tokens_for
from gravlens.placement import Placement, as_device
from gravlens.positions import Query
from gravlens.precision import as_dtype
from gravlens.readings import Plan
from gravlens.store import write_atomically

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
