"""Operations per token of a model, by its configuration, and the rates of this machine, measured."""

import hashlib
from collections.abc import Callable
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from statistics import median
from timeit import repeat
from typing import Any

import torch
from transformers import PretrainedConfig

from gravlens.activations.reader import Plan, Reader, batches_of, tokens_for
from gravlens.core.errors import GravlensError
from gravlens.models.families import block_list
from gravlens.models.opening import MODEL_MAKING, auto_class, open_model, quiet
from gravlens.models.placement import Placement, as_device
from gravlens.models.precision import as_dtype

# Mixture-of-experts configurations have no common name for the number of experts that process a token.
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
TIMED, LARGEST_TIMED = 3e7, 2e9  # parameters of the shallow model that is timed: it has two blocks at least
HASHED = 64 << 20  # bytes that are read and hashed to time the disk


def count_parameters(config: PretrainedConfig) -> tuple[int, tuple[float, ...]]:
    """Count all parameters of a model, and those of each block that multiply a token (of experts the active share)."""
    with MODEL_MAKING, torch.device("meta"), quiet():  # no weights are read or initialised
        module: Any = auto_class(config).from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    active = next((k for name in ACTIVE_EXPERTS if isinstance(k := getattr(text, name, None), int)), None)

    def multiplied(weight: torch.Tensor) -> float:  # transformers keeps a block's experts in one tensor [expert, …]
        return weight.numel() * (min(1, active / len(weight)) if weight.ndim == 3 and active else 1)

    # A depthwise convolution [channel, 1, width] (Mamba) has more dimensions than a vector and is no matrix either.
    matrices = [[p for p in block.parameters() if p.ndim > 1 and min(p.shape[:2]) > 1] for block in block_list(module)]
    return sum(p.numel() for p in module.parameters()), tuple(sum(map(multiplied, block)) for block in matrices)


def measured_rates(plan: Plan, config: PretrainedConfig, folder: Path, placement: Placement) -> tuple[float, float]:
    """Time one batch of a plan through a shallow model of random weights, and SHA-256 of a weight file of a folder."""
    blocks, config = count_parameters(config)[1], deepcopy(config)
    if 2 * blocks[0] > LARGEST_TIMED:
        found = f"This model has blocks of {blocks[0]:.1e} parameters."
        wanted = f"Two blocks of up to {LARGEST_TIMED / 2:.0e} each can be timed."
        raise GravlensError(found, wanted, "--peak-flops and --disk-gbps of the machine that will read them.")
    text, depth = config.get_text_config(), min(len(blocks), max(2, int(TIMED / blocks[0])))
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:depth]  # transformers refuses a list of another length
    with MODEL_MAKING, quiet():
        module: Any = auto_class(config).from_config(config, trust_remote_code=False)
    dtype = as_dtype(placement.dtype) or config.dtype or torch.float32
    model = open_model(module.to(as_device(placement.device), dtype).eval())
    reader = Reader(model, layers=range(depth), prefix=plan.prefix)
    batches = batches_of(plan.queries, prefix=reader.shared, tokens=tokens_for(model))
    batch = [plan.queries[i] for i in batches[len(batches) // 2]]  # of middle length
    flops = 2 * sum(blocks[:depth]) * sum(query.end - reader.shared for query in batch)
    path = next(folder.glob("*.safetensors"), None)
    with path.open("rb") if path else BytesIO(bytes(HASHED)) as file:
        size = len(file.read(HASHED))
        hashing = _seconds(lambda: (file.seek(0), hashlib.sha256(file.read(HASHED))))
    return flops / _seconds(lambda: reader.read(batch)), size / hashing


def _seconds(work: Callable[[], Any]) -> float:
    return median(repeat(work, number=1, repeat=4)[1:])  # the first warms up
