"""Residual-stream states: of one opened model, and cached over the checkpoints of a sequence."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from gravlens.checkpoints import Checkpoint, ModelSequence, Prompts
from gravlens.errors import GravlensError, check_layer
from gravlens.inference import run_trunk
from gravlens.models import OpenModel, check_same_shape, open_each, resid_post
from gravlens.prompts import Batch, encode, last_positions, pad
from gravlens.store import read_tensors, write_tensors
from gravlens.tokenizer import check_vocabulary, sequence_tokenizer

Positions = Literal["last"] | int
BATCH = 32


@dataclass(frozen=True, eq=False)
class Residuals:
    """`resid_post` at the read position, over checkpoints × prompts × layers.

    Attributes:
        values: [checkpoint, prompt, layer, d_model], fp32, in the residual stream's own units.
        checkpoints: names (`witness`, `anchor`, `{run}/{step}`).
        layers: layer numbers, ascending.
        prompts: digest of the prompt set.
        meta: what it was made from: read position, dtype, chat template, system prompt, sources.
    """

    values: Float[np.ndarray, "checkpoint prompt layer d_model"] = field(repr=False)
    checkpoints: tuple[str, ...]
    layers: tuple[int, ...]
    prompts: str
    meta: dict[str, Any] = field(default_factory=dict)

    def of(self, checkpoint: str) -> Float[np.ndarray, "prompt layer d_model"]:
        """The states of one checkpoint."""
        if checkpoint not in self.checkpoints:
            raise GravlensError(
                f"These residuals hold no checkpoint {checkpoint!r}.",
                f"They hold {', '.join(self.checkpoints)}.",
                "one of these names, or cache_residuals again.",
            )
        return self.values[self.checkpoints.index(checkpoint)]

    @property
    def runs(self) -> dict[str, tuple[int, ...]]:
        """Run name -> its steps, ascending."""
        found: dict[str, list[int]] = {}
        for name in self.checkpoints:
            run, slash, step = name.rpartition("/")
            if slash:
                found.setdefault(run, []).append(int(step))
        return {run: tuple(sorted(steps)) for run, steps in found.items()}

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file."""
        meta = {"checkpoints": self.checkpoints, "layers": self.layers, "prompts": self.prompts, "meta": self.meta}
        return write_tensors(path, "residuals", {"values": self.values}, meta)

    @classmethod
    def load(cls, path: Path | str) -> "Residuals":
        """Read a file of `save`."""
        arrays, meta = read_tensors(path, "residuals")
        return cls(
            arrays["values"], tuple(meta["checkpoints"]), tuple(meta["layers"]), meta["prompts"], dict(meta["meta"])
        )

    def to_xarray(self) -> xarray.DataArray:
        """The values with named axes."""
        coords = {"checkpoint": list(self.checkpoints), "layer": list(self.layers)}
        return xarray.DataArray(
            self.values, coords, ("checkpoint", "prompt", "layer", "d_model"), "resid_post", {"prompts": self.prompts}
        )


def cache_residuals(
    sequence: ModelSequence,
    prompts: Prompts | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    checkpoints: Sequence[Checkpoint] | None = None,
    through: Literal["huggingface", "bridge"] = "huggingface",
) -> Residuals:
    """Read `resid_post` of every checkpoint of a sequence on the same prompts.

    One model is opened and the weights of later folders are swapped into it; each pass stops at the deepest layer
    asked for and computes no logits; only the read positions are kept.

    Args:
        sequence: the history.
        prompts: default: the sequence's probes; under its system prompt, if they have none of their own.
        layers: default: all.
        positions: `"last"`, the last prompt token (after the template's generation prompt), or a negative index
            counted from the end (−1 is the last).
        checkpoints: which ones; default: witness, anchor and every run's.
        through: read folders as Hugging Face models or through `TransformerBridge`; both give the same states.

    Returns:
        `Residuals`, values [checkpoint, prompt, layer, d_model].

    Raises:
        GravlensError: no prompts, a layer out of range, a checkpoint that cannot be opened or has another shape.
    """
    prompts = sequence.require_probes() if prompts is None else sequence.prompts_of(prompts)
    tokenizer = sequence_tokenizer(sequence, prompts)
    ids = encode(tokenizer, prompts)
    wanted = list(sequence if checkpoints is None else checkpoints)
    rows: list[np.ndarray] = []
    shapes: list[tuple[Checkpoint, OpenModel]] = []
    dtypes: set[str] = set()
    for checkpoint, model in tqdm(
        open_each(wanted, tokenizer=tokenizer, through=through), "residuals", len(wanted), leave=False
    ):
        if not shapes or shapes[0][1] is not model:
            shapes = [*shapes[:1], (checkpoint, model)]
            check_same_shape(shapes)
        check_vocabulary(checkpoint, model, ids)
        layers = _layers(layers, model.n_layers)
        rows.append(read_residuals(model, ids, layers=layers, positions=positions).numpy())
        dtypes.add(str(model.dtype).removeprefix("torch."))
    meta = {
        "positions": positions,
        "dtype": sorted(dtypes),
        "chat_template": sequence.chat_template if getattr(tokenizer, "chat_template", None) else "none",
        **({"system": prompts.system} if prompts.system else {}),
        "sources": {checkpoint.name: checkpoint.described for checkpoint in wanted},
    }
    return Residuals(np.stack(rows), tuple(c.name for c in wanted), tuple(layers or ()), prompts.digest, meta)


def _layers(layers: Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    if layers is None:
        return tuple(range(n_layers))
    if len(layers) == 0:
        raise GravlensError("No layer was asked for.", f"Layers are 0 to {n_layers - 1}.", "layers=None for all.")
    return tuple(sorted({check_layer(layer, n_layers) for layer in layers}))


def read_residuals(
    model: OpenModel, ids: Sequence[Sequence[int]], *, layers: Sequence[int], positions: Positions = "last"
) -> Float[Tensor, "prompt layer d_model"]:
    """States of one opened model, fp32 on the CPU; prompts are batched by length."""
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    out = torch.empty(len(ids), len(layers), model.d_model)
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            out[rows] = residuals_of_batch(model, pad([ids[r] for r in rows]), layers=layers, positions=positions).cpu()
    return out


def residuals_of_batch(
    model: OpenModel, batch: Batch, *, layers: Sequence[int], positions: Positions = "last"
) -> Float[Tensor, "prompt layer d_model"]:
    """States of one padded batch, fp32; differentiable where gradients are on."""
    rows = torch.arange(len(batch.input_ids))
    read = _read_index(batch, positions)
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            # Indexing copies, so nothing that is kept is a view of a live buffer.
            states[layer] = hidden[rows.to(hidden.device), read.to(hidden.device)].float()
            if layer == max(layers):
                raise _DeepestLayer

        return hook

    with _hooked([(resid_post(model, layer), keep(layer)) for layer in layers]), suppress(_DeepestLayer):
        run_trunk(model, batch)
    return torch.stack([states[layer] for layer in layers], dim=1)


class _DeepestLayer(Exception):  # noqa: N818 (a signal, not an error)
    """Ends a forward pass; the blocks above are not needed."""


@contextmanager
def _hooked(hooks: Sequence[tuple[nn.Module, Callable[[nn.Module, Any, Any], None]]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read_index(batch: Batch, positions: Positions) -> Tensor:
    offset = -1 if positions == "last" else positions
    lengths = batch.attention_mask.sum(1)
    if not isinstance(offset, int) or offset >= 0 or -offset > int(lengths.min()):
        raise GravlensError(
            f"positions={positions!r} was given; the shortest prompt has {int(lengths.min())} tokens.",
            'A position is "last" or a negative index from the end that every prompt has.',
            'positions="last".',
        )
    return last_positions(batch.attention_mask) + 1 + offset
