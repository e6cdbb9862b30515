"""Hidden states (`resid_post`): of one open model, and cached over the checkpoints of a sequence."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import xarray
from jaxtyping import Float, Int

from gravlens.activations.positions import Answers, Positions, described, queries_of
from gravlens.activations.reader import BATCH as BATCH
from gravlens.activations.reader import Offset as Offset
from gravlens.activations.reader import Plan, Through, all_finite, read_each, read_here
from gravlens.activations.reader import read_residuals as read_residuals
from gravlens.activations.reader import residuals_of_batch as residuals_of_batch
from gravlens.activations.store import Store, read_through_store
from gravlens.core import display as html
from gravlens.core.errors import SAVED, GravlensError, as_list, at_home, check_layer, of_kind, reading
from gravlens.core.files import check_digest, read_tensors, write_tensors
from gravlens.history.encoding import KWARGS, prompts_digest, template_kwargs
from gravlens.history.sequence import Checkpoint, ModelSequence, Prompts
from gravlens.history.sources import Known, Resolved, resolve
from gravlens.models.placement import Placement
from gravlens.models.swapping import one_shape
from gravlens.models.tokenizers import sequence_tokenizer

# A difference below this many units of the dtype's rounding, relative to the state's norm, is the pass's own noise
# (the same prompt in another batch or with other padding differs by less: tests/directions/test_directions.py).
NOISE_ROUNDINGS = 16.0
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
Lengths = TypeVar("Lengths", float, np.ndarray)


def run_and_step(name: str) -> tuple[str, int] | None:
    """Split the name `{run}/{step}` of a checkpoint; None for any other name."""
    run, slash, step = name.rpartition("/")
    return (run, int(step)) if slash and step.isdecimal() else None


@dataclass(frozen=True, eq=False)
class Residuals:
    """Hidden states `resid_post` over checkpoints × prompts × layers.

    Attributes:
        values: fp32 and finite, in units of the residual stream; from a store they are memory-mapped and read-only.
        checkpoints: names (`witness`, `anchor`, `{run}/{step}`).
        prompts: digest of the prompts' token ids (`prompts_digest`).
        meta: provenance: read position, dtype, chat template and its arguments, system prompt, sources.
        index: (prompt, token) of each row where rows are tokens; None where each prompt is one row.

    Examples:
        >>> given.values.shape  # checkpoint, prompt, layer, d_model
        (8, 6, 3, 32)
        >>> given.to_xarray().sel(checkpoint="anchor", layer=1).shape
        (6, 32)
    """

    values: Float[np.ndarray, "checkpoint prompt layer d_model"] = field(repr=False)
    checkpoints: tuple[str, ...]
    layers: tuple[int, ...]
    prompts: str
    meta: dict[str, Any] = field(default_factory=dict)
    index: Int[np.ndarray, "row 2"] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        """GravlensError for states that are not finite."""
        if isinstance(self.values, np.memmap) or all_finite(self.values):  # a store has looked at its files
            return
        name = next(name for name, states in zip(self.checkpoints, self.values, strict=False) if not all_finite(states))
        prompt, column = np.argwhere(~np.isfinite(self.of(name)).all(-1))[0]
        given = f"The states of {name} are not finite at prompt {prompt}, layer {self.layers[column]}"
        given += f" ({', '.join(self.meta.get('dtype', ['unknown dtype']))})."
        remedy = "leave that checkpoint out (a diverged run has NaN weights); bf16 or float32 where float16 overflowed."
        raise GravlensError(given, "Hidden states are finite numbers.", remedy)

    def of(self, checkpoint: str) -> Float[np.ndarray, "prompt layer d_model"]:
        """Return the states of one checkpoint; GravlensError for an unknown name."""
        if checkpoint not in self.checkpoints:
            given = f"Checkpoint {checkpoint!r} is not in these residuals."
            wanted = f"They contain {', '.join(self.checkpoints)}."
            raise GravlensError(given, wanted, "one of these names, or cache_residuals with that checkpoint.")
        return self.values[self.checkpoints.index(checkpoint)]

    @property
    def runs(self) -> dict[str, tuple[int, ...]]:
        """Steps of each run, ascending, by the run's name."""
        found: dict[str, list[int]] = {}
        for name in self.checkpoints:
            if followed := run_and_step(name):
                found.setdefault(followed[0], []).append(followed[1])
        return {run: tuple(sorted(steps)) for run, steps in found.items()}

    def _repr_html_(self) -> str:
        others = [name for name in self.checkpoints if not run_and_step(name)]
        rows = [("values", f"{list(self.values.shape)}: checkpoint, prompt, layer, d_model; {self.values.dtype}")]
        rows += [("checkpoints", html.listed(others))] if others else []
        rows += [(f"run {name}", f"steps {html.listed(steps)}") for name, steps in self.runs.items()]
        rows += [("layers", html.listed(self.layers)), ("prompts", self.prompts[:16])]
        rows += [(name.replace("_", " "), str(fact)) for name, fact in self.meta.items() if name != "sources"]
        return html.facts(rows, title="Residuals")

    def save(self, path: Path | str) -> Path:
        """Write one safetensors file and return its path."""
        meta = {"checkpoints": self.checkpoints, "layers": self.layers, "prompts": self.prompts, "meta": self.meta}
        arrays = {"values": self.values} if self.index is None else {"values": self.values, "index": self.index}
        return write_tensors(path, "residuals", arrays, meta)

    @classmethod
    def load(cls, path: Path | str) -> "Residuals":
        """Read a file written by `save`."""
        with reading(path, *SAVED):
            arrays, meta = read_tensors(path, "residuals")
            names, layers = tuple(meta["checkpoints"]), tuple(meta["layers"])
            prompts = check_digest(meta["prompts"], path)
            return cls(arrays["values"], names, layers, prompts, dict(meta["meta"]), arrays.get("index"))

    def to_xarray(self) -> xarray.DataArray:
        """Return the values with named axes."""
        coords: dict[str, Any] = {"checkpoint": list(self.checkpoints), "layer": list(self.layers)}
        if self.index is not None:
            coords |= {"of_prompt": ("prompt", self.index[:, 0]), "pos": ("prompt", self.index[:, 1])}
        axes = ("checkpoint", "prompt", "layer", "d_model")
        return xarray.DataArray(self.values, coords, axes, "resid_post", {"prompts": self.prompts})


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

    One model is opened, and the weights of later folders are swapped into it. A forward pass stops at the deepest layer
    that is read and computes no logits; a prefix that all prompts share is run once; only the read positions are kept.

    Args:
        prompts: default: the sequence's probes; under its system prompt, unless they have their own.
        positions: `"last"`, the last prompt token (after the template's generation prompt); a negative index;
            `"instruction"`, the mean over the prompt's own tokens; `Answers(texts)`, the mean over an answer after each
            prompt. With one row per token: `"post_instruction"`, the template's tokens after the instruction; `"all"`;
            a function of token ids that returns positions.
        checkpoints: default: witness, anchor and those of all runs.
        through: open folders as Hugging Face models or as `TransformerBridge`; both give the same states.
        store: folder of a content-addressed cache: cached states are reused, a killed call resumes, and the values are
            memory-mapped. Default: the values are held in memory.
        executor: any `concurrent.futures.Executor`, also Dask's or submitit's; its workers fill the store.

    Raises:
        GravlensError: no prompts, a layer out of range, a checkpoint that cannot be opened, has another shape or was
            processed (centred, or folded where another is not); an executor without a store; a full disk.

    Examples:
        >>> residuals = gl.cache_residuals(seq, seq.held_out, layers=[1, 2], store="store")
        >>> residuals.checkpoints[:3], residuals.layers
        (('witness', 'anchor', 'seed0/1'), (1, 2))
    """
    request = prepare(sequence, prompts, layers=layers, positions=positions, checkpoints=checkpoints)
    if store is not None:
        cache = Store(at_home(store), through, placement)
        return request.result(*read_through_store(request.plan, request.checkpoints, cache, executor))
    if executor is None:
        return request.read(through, placement)
    given, wanted = f"A {type(executor).__name__} and no store were given.", "Workers send nothing back: they fill one."
    raise GravlensError(given, wanted, 'store="states", a folder that all workers reach.')


@dataclass(frozen=True, eq=False)
class Request:
    """What to read of which checkpoints, each resolved once for the whole call, and the labels of the result."""

    plan: Plan
    checkpoints: tuple[Resolved, ...]
    prompts: str
    meta: dict[str, Any]

    def read(self, through: Through = "huggingface", placement: Placement = Placement()) -> Residuals:
        """Read all states into memory."""
        return self.result(*read_here(self.plan, self.checkpoints, through, placement))

    def result(self, values: Float[np.ndarray, "checkpoint prompt layer d_model"], precisions: set[str]) -> Residuals:
        """Return values with their labels."""
        return Residuals(values, **self.labels(precisions), index=self.plan.index)

    def labels(self, precisions: set[str]) -> dict[str, Any]:
        """Return the fields that `Residuals` and `Moments` share."""
        meta = {"positions": self.meta["positions"], "dtype": sorted(precisions), **self.meta}
        names = tuple(checkpoint.name for checkpoint in self.checkpoints)
        return {"checkpoints": names, "layers": self.plan.layers, "prompts": self.prompts, "meta": meta}


def prepare(
    sequence: ModelSequence | Path | str,
    prompts: Prompts | None = None,
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = "last",
    checkpoints: Sequence[Checkpoint] | None = None,
) -> Request:
    """Resolve the arguments of `cache_residuals`; no model is opened."""
    sequence = ModelSequence.of(sequence)
    prompts = sequence.require_probes() if prompts is None else sequence.prompts_of(prompts)
    known = Known()  # checkpoints that share a folder, such as an adapter's base, resolve it once
    tokenizer = sequence_tokenizer(sequence, prompts, known)
    queries = queries_of(tokenizer, prompts, positions)
    asked = [one.ids[: one.start] if isinstance(positions, Answers) else one.ids for one in queries]
    wanted = [resolve(one, known, weights=False) for one in (sequence if checkpoints is None else checkpoints)]
    n_layers, d_model = one_shape(wanted)
    meta = {
        "positions": described(positions),
        "chat_template": sequence.chat_template if getattr(tokenizer, "chat_template", None) else "none",
        **({"system": prompts.system} if prompts.system else {}),
        **({KWARGS: kwargs} if (kwargs := template_kwargs(tokenizer)) else {}),
        "sources": {checkpoint.name: checkpoint.described for checkpoint in wanted},
    }
    plan = Plan.of(queries, layers_of(layers, n_layers), d_model)
    return Request(plan, tuple(wanted), prompts_digest(asked), meta)


def check_states(given: Residuals) -> Residuals:
    """Return residuals as they are; GravlensError for anything else."""
    remedy = "cache_residuals(sequence), cache_residuals(sequence, sequence.held_out), or Residuals.load(path)."
    return of_kind(given, Residuals, "Residuals of one set of prompts are needed.", remedy)


def layers_of(layers: int | Sequence[int] | None, n_layers: int) -> tuple[int, ...]:
    """Sort and check layers; None means all."""
    if layers is None:
        return tuple(range(n_layers))
    layers = as_list(layers)
    if len(layers) == 0:
        raise GravlensError("No layer was given.", f"Layers are 0 to {n_layers - 1}.", "layers=None for all.")
    return tuple(sorted({check_layer(layer, n_layers) for layer in layers}))


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean, and optionally covariance, of `resid_post` over prompts.

    `mean` and `covariance` (divided by `rows`, the number of states of a checkpoint and layer) are fp64, in units of
    the residual stream; the other fields are those of `Residuals`.
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
    """Reduce the states of `cache_residuals` over prompts in fp64, in memory that does not grow with their number.

    Args:
        reduce: `"mean"`, or `"covariance"` for both.
        positions: as in `cache_residuals`, like the rest; with one row per token, the moments are over tokens.

    Raises:
        GravlensError: what `cache_residuals` raises.
    """
    if reduce not in ("mean", "covariance"):  # else a misspelt "covariance" would silently give means
        raise GravlensError(f"reduce={reduce!r} was given.", 'reduce must be "mean" or "covariance".', 'reduce="mean".')
    request = prepare(sequence, prompts, layers=layers, positions=positions, checkpoints=checkpoints)
    shape = (len(request.checkpoints), len(request.plan.layers), request.plan.d_model)
    # Squares are summed about the first batch's mean: about 0 they would cancel where the mean is large.
    about, total, rows = np.zeros(shape), np.zeros(shape), np.zeros(shape[0], int)
    squares = np.zeros((*shape, shape[-1])) if reduce == "covariance" else None
    precisions: set[str] = set()
    for number, found, states, precision in read_each(request.plan, request.checkpoints, "huggingface", placement):
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
    return Moments(about + offset, squares, int(rows[0]), **request.labels(precisions))


def substitute(residuals: Residuals, *, witness: str = "witness", anchor: str = "anchor") -> Residuals:
    """Return residuals of a witness and an anchor for `locate_vrev`, with other checkpoints in these roles.

    A *wrong witness* (another initialisation or lineage) shares this anchor, so its baseline is not 0. A *sibling
    anchor* A′ (this witness, another alignment seed) gives cos(h(θ_t) − h(A), h(W) − h(A′)), without a common anchor.

    Raises:
        GravlensError: an unknown name.
    """
    check_states(residuals)
    values = np.stack([residuals.of(witness), residuals.of(anchor)])
    sources = residuals.meta.get("sources", {})  # a file's metadata may name none
    sources = {"witness": sources.get(witness, witness), "anchor": sources.get(anchor, anchor)}
    meta = {**residuals.meta, "sources": sources}
    return replace(residuals, values=values, checkpoints=("witness", "anchor"), meta=meta)


def from_start(residuals: Residuals, *, start: str) -> Residuals:
    """Measure drift from another start, h(θ_t) − h(start): an unaligned twin starts at the witness.

    Raises:
        GravlensError: `start` or `anchor` is not in the residuals.
    """
    check_states(residuals)
    moved = replace(residuals, values=residuals.values.copy())  # values of a store are read-only
    moved.of("anchor")[:] = residuals.of(start)
    return moved


def cache_sets(
    sequence: ModelSequence | Path | str,
    sets: Mapping[str, Prompts],
    *,
    layers: int | Sequence[int] | None = None,
    positions: Positions = "last",
    placement: Placement = Placement(),
) -> dict[str, Residuals]:
    """Read the states of several prompt sets, opening each checkpoint once; arguments as in `cache_residuals`.

    GravlensError for positions with several rows per prompt, and what `cache_residuals` raises.
    """
    asked = {name: prepare(sequence, prompts, layers=layers, positions=positions) for name, prompts in sets.items()}
    first = next(iter(asked.values()))
    queries = [query for request in asked.values() for query in request.plan.queries]
    plan = Plan.of(queries, first.plan.layers, first.plan.d_model)
    if plan.index is not None:
        given = f"positions={first.meta['positions']!r} reads several tokens of a prompt."
        wanted, remedy = (
            "One state per prompt is needed.",
            'positions="last", an offset from the end, or "instruction".',
        )
        raise GravlensError(given, wanted, remedy)
    states = replace(first, plan=plan).read(placement=placement)
    ends = np.cumsum([len(request.plan.queries) for request in asked.values()])[:-1]
    parts = zip(asked.items(), np.split(states.values, ends, axis=1), strict=True)
    return {
        name: replace(states, values=values, prompts=one.prompts, meta={**states.meta, **one.meta})
        for (name, one), values in parts
    }


# --- rounding -------------------------------------------------------------------------------------------------------
def noise_floor(residuals: Residuals, layer: int) -> float:
    """Length by which the forward pass's rounding may move a mean state, residual units (docs/directions.md)."""
    return rounding_noise(state_length(residuals, layer), *residuals.meta.get("dtype", ()))


def state_length(residuals: Residuals, layer: int) -> float:
    """Mean length of the anchor's states, residual units, as far as their rounding is concerned."""
    i = residuals.layers.index(layer)
    # Contrasts are shorter than the states that they are differences of, and whose rounding they have.
    if lengths := residuals.meta.get("state_lengths"):
        return lengths[i]
    return float(np.linalg.norm(residuals.of("anchor")[:, i].astype(np.float64), axis=1).mean())


def rounding_noise(length: Lengths, *precisions: str) -> Lengths:
    """Length by which rounding may move mean states of these lengths, residual units; no precision is fp32.

    It covers the forward pass's rounding and that of an adapter merged into weights of the dtype.
    """
    # quantised weights may compute in less than their dtype says: the coarsest is taken
    epsilon = max((EPSILON.get(name, 2.0**-8) for name in precisions), default=EPSILON["float32"])
    return NOISE_ROUNDINGS * epsilon * length
