"""Hidden states (`resid_post`): of one open model, and cached over the checkpoints of a sequence."""

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import torch
import xarray
from jaxtyping import Float, Int
from torch import Tensor

from gravlens.activations.fingerprint import known_by_stamps
from gravlens.activations.positions import Answers, Positions, described, offset_of, queries_of
from gravlens.activations.reader import BATCH as BATCH
from gravlens.activations.reader import Offset as Offset
from gravlens.activations.reader import Plan, Through, all_finite, read_each
from gravlens.activations.reader import read_residuals as read_residuals
from gravlens.activations.reader import residuals_of_batch as residuals_of_batch
from gravlens.activations.session import SESSION, kept_bytes
from gravlens.activations.store import Store, read_through_store
from gravlens.core import display as html
from gravlens.core.errors import SAVED, GravlensError, as_list, at_home, check_layer, of_kind, reading, wrong_kind
from gravlens.core.files import check_digest, read_tensors, write_tensors
from gravlens.history.encoding import KWARGS, last_positions, prompts_digest, template_kwargs
from gravlens.history.sequence import Checkpoint, ModelSequence, Prompts
from gravlens.history.sources import Known, Resolved, resolve
from gravlens.history.weight_files import remark_on_same
from gravlens.models.families import all_centred
from gravlens.models.placement import Placement
from gravlens.models.swapping import check_one_precision, one_shape, precision_of
from gravlens.models.tokenizers import sequence_tokenizer

# A difference below this many units of the dtype's rounding, relative to the state's norm, is the pass's own noise
# (the same prompt in another batch or with other padding differs by less: tests/directions/test_directions.py).
NOISE_ROUNDINGS = 16.0
EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "bfloat16": 2.0**-8, "float16": 2.0**-11}
Lengths = TypeVar("Lengths", float, np.ndarray)
RESID_POST = re.compile(r"blocks\.(\d+)\.hook_resid_post")


class Cache(Protocol):
    """TransformerLens' `ActivationCache`, or a dict of the same names."""

    def __iter__(self) -> Iterator[str]: ...
    def __getitem__(self, name: str, /) -> Any: ...


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
    __repr__ = html.brief

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

    @classmethod
    def from_caches(
        cls,
        caches: Mapping[str, Cache],
        tokens: Int[Tensor, "prompt pos"],
        attention_mask: Int[Tensor, "prompt pos"] | None = None,
        *,
        positions: Offset = "last",
    ) -> "Residuals":
        """Take the states that TransformerLens' `run_with_cache` kept, at the layers that the caches hold.

        Args:
            caches: checkpoint (`witness`, `anchor`, `{run}/{step}`) -> its cache, all of the same `tokens`.
            tokens: as they were run, with padding on either side.
            attention_mask: 0 at padding. Needed, since padding has states too, and is on the right by default:
                `torch.ones_like(tokens)` if no prompt is padded.
            positions: `"last"`, each prompt's last token, or an offset from its end.

        Raises:
            GravlensError: no mask; caches of different tokens, layers or widths, or without a batch dimension; states
                that are not finite, or of centred weights.
        """
        ids, last = _prompts_run(tokens, attention_mask)
        at = torch.arange(len(ids)), last + 1 + offset_of(positions, min(map(len, ids)))
        caches = of_kind(caches, Mapping, "A dict of caches is needed.", '{"witness": cache, "anchor": cache}.')
        held = {name: _resid_posts(cache) for name, cache in caches.items()}
        kinds = {name: (tuple(own), {tuple(one.shape) for one in own.values()}) for name, own in held.items()}
        (layers, shapes), *others = kinds.values() or [((), set[tuple[int, ...]]())]
        if others != [(layers, shapes)] * len(others) or [one[:-1] for one in shapes] != [(*tokens.shape,)]:
            given = f"The caches hold resid_post of these layers and shapes: {kinds}."
            wanted = f"All hold the same layers, of the shape [{len(ids)}, {tokens.shape[1]}, d_model]."
            remedy = "run_with_cache(tokens) with one names_filter, without remove_batch_dim and pos_slice."
            raise GravlensError(given, wanted, remedy)
        states = {name: torch.stack([one.detach()[at].cpu() for one in own.values()], 1) for name, own in held.items()}
        check_one_precision(dtypes := {name: str(one.dtype).removeprefix("torch.") for name, one in states.items()})
        sources = {name: f"{type(cache).__name__} in memory" for name, cache in caches.items()}
        meta = {"positions": positions, "dtype": sorted({*dtypes.values()}), "sources": sources}
        values = torch.stack([one.float() for one in states.values()]).numpy()
        made = cls(values, tuple(caches), layers, prompts_digest(ids), meta)
        # Once they are known to be finite: ∞ would pass for centred.
        if centred := [name for name, one in states.items() if all_centred([(one, -1)])]:
            given = f"The states of {', '.join(centred)} have mean 0 over d_model, as of centred writing weights."
            remedy = "HookedTransformer.from_pretrained_no_processing(…)."
            raise GravlensError(given, "Weights must not be processed.", remedy)
        return made

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


def _prompts_run(tokens: Any, mask: Any) -> tuple[list[list[int]], Int[Tensor, " prompt"]]:
    """Return each prompt's token ids without padding, and the index of its last token."""
    for one in (tokens, tokens if mask is None else mask):
        of_kind(one, Tensor, "Tokens and mask [prompt, pos] are needed.", "tokens = model.to_tokens(prompts).")
    whole = mask is not None and tokens.ndim == 2 and tokens.shape == mask.shape and bool(mask.any(1).all())
    if mask is None or not whole or ((mask != 0) & (mask != 1)).any():  # tokens in its place would pass for a mask
        shape = "None" if mask is None else f"{(*mask.shape,)}, leaves a prompt without tokens or is not of 0 and 1"
        given = f"The attention mask is {shape}, for tokens {tuple(tokens.shape)}."
        wanted = "It tells each prompt's tokens from padding, whose states mean nothing."
        remedy = "torch.ones_like(tokens) if all prompts have one length; else the mask that was run, or that of "
        remedy += "transformer_lens.utilities.get_attention_mask(model.tokenizer, tokens, prepend_bos=True)."
        raise GravlensError(given, wanted, remedy)
    rows = zip(tokens.cpu(), mask.cpu().bool(), strict=True)
    return [row[true].tolist() for row, true in rows], last_positions(mask.cpu())


def _resid_posts(cache: Cache) -> dict[int, Float[Tensor, "prompt pos d_model"]]:
    if not hasattr(cache, "keys"):  # the pair that run_with_cache returns
        remedy = '{"witness": cache, …} with _, cache = model.run_with_cache(tokens).'
        raise wrong_kind(cache, "ActivationCaches are needed.", remedy)
    layers = sorted(int(found[1]) for key in cache if (found := RESID_POST.fullmatch(key)))
    return {layer: cache[f"blocks.{layer}.hook_resid_post"] for layer in layers}


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
    What this process has read of unchanged folders is not read again (docs/residuals.md).

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
    precisions: dict[str, str] = {}
    plans = [request.plan] * len(request.checkpoints)
    for number, found, states in read_each(plans, request.checkpoints, "huggingface", placement, precisions):
        if not rows[number]:
            about[number] = states.mean(0, dtype=np.float64)
        away = states - about[number]
        total[number] += away.sum(0)
        rows[number] += len(found)
        if squares is not None:
            squares[number] += np.einsum("nld,nle->lde", away, away, optimize=True)
    offset = total / rows[:, None, None]
    if squares is not None:
        squares = squares / rows[:, None, None, None] - offset[..., :, None] * offset[..., None, :]
    return Moments(about + offset, squares, int(rows[0]), **request.labels(set(precisions.values())))


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
    if any(request.plan.index is not None for request in asked.values()):
        given = f"positions={next(iter(asked.values())).meta['positions']!r} reads several tokens of a prompt."
        wanted, remedy = (
            "One state per prompt is needed.",
            'positions="last", an offset from the end, or "instruction".',
        )
        raise GravlensError(given, wanted, remedy)
    return dict(zip(asked, read_together(list(asked.values()), placement), strict=True))


def read_here(
    plan: Plan, checkpoints: Sequence[Resolved], through: Through, placement: Placement
) -> tuple[Float[np.ndarray, "checkpoint row layer d_model"], set[str]]:
    """Return all states in memory, those of folders that were read before copied, and their precisions."""
    values = np.empty((len(checkpoints), plan.ends[-1], len(plan.layers), plan.d_model), np.float32)
    how = (through, repr(placement.where))
    keys = [known_by_stamps(one, how) if kept_bytes() else None for one in checkpoints]
    gaps = [SESSION.fill(key, plan, out) for key, out in zip(keys, values, strict=True)]
    # Precisions of those that are not opened; one that is opened says its own.
    whole = [one for one, gap in zip(checkpoints, gaps, strict=True) if not gap]
    check_one_precision(precisions := {one.name: precision_of(one, placement) for one in whole})
    left = [number for number, gap in enumerate(gaps) if gap]
    plans = [Plan.of([plan.queries[i] for i in gaps[number]], plan.layers, plan.d_model) for number in left]
    rows = [np.array([row for i in gaps[number] for row in plan.rows(i)]) for number in left]
    for which, found, states in read_each(plans, [checkpoints[n] for n in left], through, placement, precisions):
        values[left[which], rows[which][found]] = states
    for number, part, where in zip(left, plans, rows, strict=True):
        if (key := keys[number]) is not None:
            SESSION.keep(key, part, values[number, where])
    pairs = zip(checkpoints, values, strict=True)
    remark_on_same({checkpoint.name: sha256(states.data).hexdigest() for checkpoint, states in pairs}, "states")
    return values, set(precisions.values())


def read_together(requests: Sequence[Request], placement: Placement = Placement()) -> list[Residuals]:
    """Read several prompt sets of the same checkpoints and layers, opening each checkpoint once."""
    first, *_ = requests
    queries = [query for request in requests for query in request.plan.queries]
    plan = Plan.of(queries, first.plan.layers, first.plan.d_model)
    values, precisions = read_here(plan, first.checkpoints, "huggingface", placement)
    ends = np.cumsum([request.plan.ends[-1] for request in requests])[:-1]
    parts = zip(requests, np.split(values, ends, axis=1), strict=True)
    return [request.result(part, precisions) for request, part in parts]


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
