"""Residual-stream states: of one opened model, and cached over the checkpoints of a sequence."""

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray
from jaxtyping import Float, Int
from torch import Tensor

from gravlens.activations.plan import Plan, Through, read_each, read_here
from gravlens.activations.positions import Positions, described, offset_of, queries_of
from gravlens.activations.reader import Enough, Kept
from gravlens.activations.stored import Stored, read_through_store
from gravlens.core import display as html
from gravlens.core.errors import GravlensError, as_list, check_layer, of_kind
from gravlens.core.files import read_tensors, write_tensors
from gravlens.history.prompts import Batch, last_positions, pad
from gravlens.history.sequence import Checkpoint, ModelSequence, Prompts
from gravlens.models.forward import run_trunk
from gravlens.models.opening import OpenModel
from gravlens.models.placement import Placement
from gravlens.models.swapping import one_shape
from gravlens.models.tokenizers import sequence_tokenizer

BATCH = 32
Offset = Literal["last"] | int  # from the end of each prompt


def run_and_step(name: str) -> tuple[str, int] | None:
    """Run and step of a checkpoint named `{run}/{step}`; None of another."""
    run, slash, step = name.rpartition("/")
    return (run, int(step)) if slash and step.isdecimal() else None


@dataclass(frozen=True, eq=False)
class Residuals:
    """`resid_post` at the read positions, over checkpoints × prompts × layers.

    Attributes:
        values: [checkpoint, prompt, layer, d_model], fp32, in the residual stream's own units; from a store they are
            memory-mapped and read-only.
        checkpoints: names (`witness`, `anchor`, `{run}/{step}`).
        layers: layer numbers, ascending.
        prompts: digest of the prompt set.
        meta: what it was made from: read position, dtype, chat template, system prompt, sources.
        index: where positions of one prompt are rows of their own, (prompt, token) of each row; else None.
    """

    values: Float[np.ndarray, "checkpoint prompt layer d_model"] = field(repr=False)
    checkpoints: tuple[str, ...]
    layers: tuple[int, ...]
    prompts: str
    meta: dict[str, Any] = field(default_factory=dict)
    index: Int[np.ndarray, "row 2"] | None = field(default=None, repr=False)

    def of(self, checkpoint: str) -> Float[np.ndarray, "prompt layer d_model"]:
        """The states of one checkpoint, residual units; GravlensError where these residuals hold none of that name."""
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
            if followed := run_and_step(name):
                found.setdefault(followed[0], []).append(followed[1])
        return {run: tuple(sorted(steps)) for run, steps in found.items()}

    def _repr_html_(self) -> str:
        followed = {f"{run}/{step}" for run, steps in self.runs.items() for step in steps}
        others = [name for name in self.checkpoints if name not in followed]
        rows = [("values", f"{list(self.values.shape)}: checkpoint, prompt, layer, d_model; {self.values.dtype}")]
        rows += [("checkpoints", html.listed(others))] if others else []
        rows += [(f"run {name}", f"steps {html.listed(steps)}") for name, steps in self.runs.items()]
        rows += [("layers", html.listed(self.layers)), ("prompts", self.prompts[:16])]
        rows += [(name.replace("_", " "), str(fact)) for name, fact in self.meta.items() if name != "sources"]
        return html.facts(rows, title="Residuals")

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file."""
        meta = {"checkpoints": self.checkpoints, "layers": self.layers, "prompts": self.prompts, "meta": self.meta}
        arrays = {"values": self.values} if self.index is None else {"values": self.values, "index": self.index}
        return write_tensors(path, "residuals", arrays, meta)

    @classmethod
    def load(cls, path: Path | str) -> "Residuals":
        """Read a file of `save`."""
        arrays, meta = read_tensors(path, "residuals")
        names, layers = tuple(meta["checkpoints"]), tuple(meta["layers"])
        return cls(arrays["values"], names, layers, meta["prompts"], dict(meta["meta"]), arrays.get("index"))

    def to_xarray(self) -> xarray.DataArray:
        """The values with named axes."""
        coords: dict[str, Any] = {"checkpoint": list(self.checkpoints), "layer": list(self.layers)}
        if self.index is not None:
            coords |= {"of_prompt": ("prompt", self.index[:, 0]), "pos": ("prompt", self.index[:, 1])}
        return xarray.DataArray(
            self.values, coords, ("checkpoint", "prompt", "layer", "d_model"), "resid_post", {"prompts": self.prompts}
        )


def cache_residuals(
    sequence: ModelSequence | Path | str,
    prompts: Prompts | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = "last",
    checkpoints: Sequence[Checkpoint] | None = None,
    through: Through = "huggingface",
    placement: Placement = Placement(),
    store: Path | str | None = None,
    executor: Executor | None = None,
) -> Residuals:
    """Read `resid_post` of every checkpoint of a sequence on the same prompts.

    One model is opened and the weights of later folders are swapped into it; each pass stops at the deepest layer
    asked for and computes no logits; what all prompts begin with is run once; only the read positions are kept.

    Args:
        sequence: the history.
        prompts: default: the sequence's probes; under its system prompt, if they have none of their own.
        layers: default: all.
        positions: `"last"`, the last prompt token (after the template's generation prompt); a negative index counted
            from the end (−1 is the last); `"instruction"`, the mean over the prompt's own tokens; `Answers(texts)`, the
            mean over the tokens of an answer after each prompt. Rows of their own, one a token: `"post_instruction"`,
            the template's tokens after the instruction; `"all"`; a function of token ids that gives positions.
        checkpoints: which ones; default: witness, anchor and every run's.
        through: read folders as Hugging Face models or through `TransformerBridge`; both give the same states.
        placement: device, dtype and disk; see `Placement`.
        store: a folder that keeps states by what they are of: what is there is not computed again, a killed call goes
            on where it was, and the values are memory-mapped. Default: they are held in memory.
        executor: whose workers fill the store, a checkpoint each; any `concurrent.futures.Executor`, Dask's or
            submitit's.

    Returns:
        `Residuals`, values [checkpoint, prompt, layer, d_model].

    Raises:
        GravlensError: no prompts, a layer out of range, a checkpoint that cannot be opened, has another shape or was
            processed (centred, or folded where another is not); an executor without a store; a disk that is full.
    """
    asked = prepare(sequence, prompts, layers=layers, positions=positions, checkpoints=checkpoints)
    if store is None:
        _check_no(executor)
        values, precisions = read_here(asked.plan, asked.checkpoints, through, placement)
    else:
        stored = Stored(Path(store), through, placement)
        values, precisions = read_through_store(asked.plan, asked.checkpoints, stored, executor)
    return Residuals(values, asked.names, asked.plan.layers, asked.prompts, asked.meta(precisions), asked.plan.index)


@dataclass(frozen=True, eq=False)
class Asked:
    """What is to be read of which checkpoints, and how a result names it.

    Attributes:
        plan: prompts as tokens, layers, read positions.
        checkpoints: in order.
        prompts: digest of the prompt set.
        positions: in a word.
        chat_template: whose.
        system: the system prompt, or nothing.
    """

    plan: Plan
    checkpoints: tuple[Checkpoint, ...]
    prompts: str
    positions: str | int
    chat_template: str
    system: str

    @property
    def names(self) -> tuple[str, ...]:
        """Of the checkpoints."""
        return tuple(checkpoint.name for checkpoint in self.checkpoints)

    def meta(self, precisions: set[str]) -> dict[str, Any]:
        """What a result was made from."""
        return {
            "positions": self.positions,
            "dtype": sorted(precisions),
            "chat_template": self.chat_template,
            **({"system": self.system} if self.system else {}),
            "sources": {checkpoint.name: checkpoint.described for checkpoint in self.checkpoints},
        }


def prepare(
    sequence: ModelSequence | Path | str,
    prompts: Prompts | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = "last",
    checkpoints: Sequence[Checkpoint] | None = None,
) -> Asked:
    """What `cache_residuals` would read; no model is opened."""
    sequence = ModelSequence.of(sequence)
    prompts = sequence.require_probes() if prompts is None else sequence.prompts_of(prompts)
    tokenizer = sequence_tokenizer(sequence, prompts)
    queries = queries_of(tokenizer, prompts, positions)
    wanted = tuple(sequence if checkpoints is None else checkpoints)
    n_layers, d_model = one_shape(wanted)
    plan = Plan.of(queries, layers_of(layers, n_layers), d_model)
    template = sequence.chat_template if getattr(tokenizer, "chat_template", None) else "none"
    return Asked(plan, wanted, prompts.digest, described(positions), template, prompts.system)


def _check_no(executor: Executor | None) -> None:
    if executor is not None:
        raise GravlensError(
            f"A {type(executor).__name__} and no store were given.",
            "Workers write what they read into a store; they send nothing back.",
            'store="states", a folder that all workers reach.',
        )


def check_states(given: Residuals) -> Residuals:
    """Residuals as they are; GravlensError for anything else."""
    return of_kind(
        given,
        Residuals,
        "Residuals of one set of prompts are needed.",
        "cache_residuals(sequence), cache_residuals(sequence, sequence.held_out), or Residuals.load(path).",
    )


def layers_of(layers: int | Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """Layers that were asked for, ascending; None is all. Raises where one is out of range."""
    if layers is None:
        return tuple(range(n_layers))
    layers = as_list(layers)
    if len(layers) == 0:
        raise GravlensError("No layer was asked for.", f"Layers are 0 to {n_layers - 1}.", "layers=None for all.")
    return tuple(sorted({check_layer(layer, n_layers) for layer in layers}))


def read_residuals(
    model: OpenModel, ids: Sequence[Sequence[int]], *, layers: Sequence[int], positions: Offset = "last"
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
    model: OpenModel, batch: Batch, *, layers: Sequence[int], positions: Offset = "last"
) -> Float[Tensor, "prompt layer d_model"]:
    """States of one padded batch, fp32; differentiable where gradients are on."""
    kept = Kept(model, layers, model.device)
    kept.at([[[at]] for at in _read_index(batch, positions).tolist()])
    with kept.hooked():
        with suppress(Enough):
            run_trunk(model, batch)
        return kept.rows()


def _read_index(batch: Batch, positions: Offset) -> Int[Tensor, " prompt"]:
    offset = offset_of(positions, int(batch.attention_mask.sum(1).min()))
    return last_positions(batch.attention_mask) + 1 + offset


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean, and covariance where it was asked for, of `resid_post` over prompts.

    Attributes:
        mean: [checkpoint, layer, d_model], fp64, in the residual stream's own units.
        covariance: [checkpoint, layer, d_model, d_model], fp64, divided by the number of rows; or None.
        rows: how many states each is over.
        checkpoints: names (`witness`, `anchor`, `{run}/{step}`).
        layers: layer numbers, ascending.
        prompts: digest of the prompt set.
        meta: what it was made from, as in `Residuals`.
    """

    mean: Float[np.ndarray, "checkpoint layer d_model"] = field(repr=False)
    covariance: Float[np.ndarray, "checkpoint layer d_model d_model"] | None = field(repr=False)
    rows: int
    checkpoints: tuple[str, ...]
    layers: tuple[int, ...]
    prompts: str
    meta: dict[str, Any] = field(default_factory=dict)


def residual_moments(
    sequence: ModelSequence,
    prompts: Prompts | None = None,
    *,
    reduce: Literal["mean", "covariance"] = "mean",
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    checkpoints: Sequence[Checkpoint] | None = None,
    placement: Placement = Placement(),
) -> Moments:
    """What `cache_residuals` reads, reduced over prompts in fp64 as it is read: memory does not grow with their number.

    Args:
        sequence: the history.
        prompts: default: the sequence's probes.
        reduce: `"mean"`, or `"covariance"`, which gives both.
        layers: default: all.
        positions: as in `cache_residuals`; where rows are tokens, the moments are over tokens.
        checkpoints: which ones; default: witness, anchor and every run's.
        placement: device, dtype and disk.

    Raises:
        GravlensError: what `cache_residuals` raises.
    """
    if reduce not in ("mean", "covariance"):
        raise GravlensError(
            f"reduce={reduce!r} was given.", "States are reduced over prompts.", '"mean" or "covariance".'
        )
    asked = prepare(sequence, prompts, layers=layers, positions=positions, checkpoints=checkpoints)
    shape = (len(asked.checkpoints), len(asked.plan.layers), asked.plan.d_model)
    # About the first batch's mean, which is near the whole mean: what is squared and summed is not far from 0.
    about, total, rows = np.zeros(shape), np.zeros(shape), np.zeros(shape[0], int)
    squares = np.zeros((*shape, shape[-1])) if reduce == "covariance" else None
    precisions: set[str] = set()
    for number, found, states, precision in read_each(asked.plan, asked.checkpoints, "huggingface", placement):
        if not rows[number]:
            about[number] = states.mean(0, dtype=np.float64)
        away = states - about[number]
        total[number] += away.sum(0)
        rows[number] += len(found)
        precisions.add(precision)
        if squares is not None:
            squares[number] += np.einsum("nld,nle->lde", away, away, optimize=True)
    offset = total / rows[:, None, None]
    if squares is not None:
        squares = squares / rows[:, None, None, None] - offset[..., :, None] * offset[..., None, :]
    return Moments(
        about + offset, squares, int(rows[0]), asked.names, asked.plan.layers, asked.prompts, asked.meta(precisions)
    )


def substitute(residuals: Residuals, *, witness: str = "witness", anchor: str = "anchor") -> Residuals:
    """The pair of states that `locate_vrev` reads, with another checkpoint as witness or as anchor.

    A *wrong witness* (another initialisation or lineage) shares this anchor, so its baseline is not 0. A *sibling
    anchor* A′ (this witness, another alignment seed) gives cos(h(θ_t) − h(A), h(W) − h(A′)): no anchor in common.

    Args:
        residuals: hold both checkpoints.
        witness: name of the one that stands for the witness.
        anchor: name of the one that stands for the anchor.

    Raises:
        GravlensError: the residuals hold no checkpoint of that name.
    """
    check_states(residuals)
    values = np.stack([residuals.of(witness), residuals.of(anchor)])
    sources = residuals.meta.get("sources", {})
    meta = {
        **residuals.meta,
        "sources": {"witness": sources.get(witness, witness), "anchor": sources.get(anchor, anchor)},
    }
    return replace(residuals, values=values, checkpoints=("witness", "anchor"), meta=meta)


def from_start(residuals: Residuals, *, start: str) -> Residuals:
    """Runs that start elsewhere (an unaligned twin starts at the witness): their drift is h(θ_t) − h(start).

    Args:
        residuals: hold `anchor`, the start and the runs.
        start: name of the checkpoint that takes the anchor's place.

    Raises:
        GravlensError: the residuals hold no checkpoint of that name.
    """
    check_states(residuals)
    values = residuals.values.copy()
    moved = replace(residuals, values=values)
    moved.of("anchor")[:] = residuals.of(start)
    return moved
