"""List the checkpoints of a history: source, stored weights, and distance from the anchor in weight space."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from gravlens.directions.decomposition import WHOLE, split_update
from gravlens.history.sequence import TEMPLATE_KEYS, ModelSequence
from gravlens.history.sources import Known, Resolved, resolve
from gravlens.history.weight_files import contents, repeated
from gravlens.models.opening import open_model, weights_of
from gravlens.models.precision import quantisation, quantisation_in


def inspect_sequence(sequence: ModelSequence | Path | str) -> pd.DataFrame:
    """List the checkpoints of a history with their sources, stored weights and distances from the anchor.

    Distances are those of `split_update`, in fp32, over the tensors that anchor, witness and checkpoint share.

    Returns:
        One row per checkpoint: `role` (witness, anchor, or the run), `step`, `source`, `tensors`, `parameters`,
        `dtype` (as stored), `digest` (SHA-256 of names, dtypes, shapes and bytes), `compared` (tensors in the
        distance), `distance` (‖θ − θ_anchor‖), `cosine` (of θ − θ_anchor and θ_witness − θ_anchor), `remark` (why a
        checkpoint was skipped, weights that are not finite, or which one has the same weights). Distances are NaN for a
        model that is quantised or not a plain Hugging Face model. `attrs` has the sequence's `chat_template`,
        `chat_template_kwargs` and `system`.

    Raises:
        GravlensError: a checkpoint that cannot be opened, or shares no tensor with the anchor.

    Examples:
        >>> table = gl.inspect_sequence(seq)
        >>> len(table), table["dtype"].unique().tolist()
        (8, ['float32'])
    """
    sequence, known = ModelSequence.of(sequence), Known()  # `known`: a base shared by adapters is resolved once
    resolved = [resolve(checkpoint, known) for checkpoint in sequence]
    runs = {id(checkpoint): name for name, run in sequence.runs.items() for checkpoint in run}
    rows = [
        {
            "role": runs.get(id(checkpoint), checkpoint.name),
            "step": checkpoint.step,
            "source": checkpoint.described,
            **vars(contents(_watched(_stored(found), lost := []))),
            **placed,
            "remark": f"the weights are not finite ({lost[0]}): a run that diverged" if lost else "",
        }
        for checkpoint, found, placed in zip(sequence, resolved, _places(resolved), strict=True)
    ]
    same = repeated({checkpoint.name: row["digest"] for checkpoint, row in zip(sequence, rows, strict=True)})
    for checkpoint, row in zip(sequence, rows, strict=True):
        remarks = [row["remark"], f"the same weights as {same[checkpoint.name]}" if checkpoint.name in same else ""]
        row["remark"] = "; ".join(filter(None, remarks))
    for source, why in sequence.skipped.items():
        role, _, folder = source.partition(": ")
        rows.append({"role": role, "source": folder, "remark": f"skipped: {why}"})
    # Int64 has missing values; with int64 pandas would make floats of the steps
    table = pd.DataFrame(rows).astype(dict.fromkeys(("step", "tensors", "parameters", "compared"), "Int64"))
    table.attrs = {name: getattr(sequence, name) for name in TEMPLATE_KEYS}
    return table


def _stored(found: Resolved) -> Iterator[tuple[str, Tensor]]:
    if isinstance(found.checkpoint.source, nn.Module):
        yield from sorted(weights_of(found.checkpoint.source).items())
    for folder in found.folders:  # an adapter's base first
        yield from folder.weights.load()


def _watched(tensors: Iterator[tuple[str, Tensor]], lost: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors, and add the names of those that are not finite to `lost`."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.itemsize > 1 and not tensor.isfinite().all():  # of fp8 torch has none
            lost.append(name)
        yield name, tensor


def _places(resolved: Sequence[Resolved]) -> list[dict[Any, Any]]:
    # a sequence begins with witness and anchor
    if any(_is_no_plain_model(found) for found in resolved):
        return [{"compared": 0, "distance": math.nan, "cosine": math.nan} for _ in resolved]
    table = split_update(resolved[1], resolved[0], resolved, shared=True)
    whole = table[table["tensor"] == WHOLE].set_index("checkpoint").rename(columns={"norm": "distance"})
    whole["compared"] = table.groupby("checkpoint").size() - 1  # without the row of the whole
    return whole[["compared", "distance", "cosine"]].to_dict("records")


def _is_no_plain_model(found: Resolved) -> bool:
    if not found.folders:
        model = open_model(found)
        return not model.family.own_tensors or quantisation(model.module) is not None
    return quantisation_in(found.base.config) is not None
