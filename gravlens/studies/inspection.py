"""What a history holds: each checkpoint's source, weights and place between anchor and witness, on one table."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from gravlens.directions.decomposition import WHOLE, split_update
from gravlens.history.precision import is_quantised_folder, quantisation
from gravlens.history.sequence import Checkpoint, ModelSequence
from gravlens.history.sources import lineage
from gravlens.history.weight_files import contents, tensors_of
from gravlens.models.opening import open_model, weights_of


def inspect_sequence(sequence: ModelSequence | Path | str) -> pd.DataFrame:
    """List a history: where each checkpoint comes from, what its weights are, how far they are from the anchor's.

    Files are digested as they are stored, one tensor at a time; of an adapter, its base and then itself. Distances are
    those of `split_update`, in fp32, over the tensors that anchor, witness and checkpoint share by name and shape.

    Returns:
        One row per checkpoint: `role` (witness, anchor, or the run), `step`, `source`, `tensors`, `parameters`,
        `dtype` (as stored), `digest` (SHA-256 of names, dtypes, shapes and bytes), `compared` (tensors that the
        distance is over), `distance` (‖θ − θ_anchor‖), `cosine` (of θ − θ_anchor and θ_witness − θ_anchor; NaN without
        either), `remark` (why a checkpoint was skipped). Distances are NaN where a model is no plain
        Hugging Face one, or quantised. `attrs` has `chat_template` and `system`, how the sequence reads prompts.

    Raises:
        GravlensError: a checkpoint that cannot be opened, or shares no tensor with the anchor.
    """
    sequence = ModelSequence.of(sequence)
    runs = {id(checkpoint): name for name, run in sequence.runs.items() for checkpoint in run}
    rows = [
        {
            "role": runs.get(id(checkpoint), checkpoint.name),
            "step": checkpoint.step,
            "source": checkpoint.described,
            **vars(contents(_stored(checkpoint))),
            **placed,
            "remark": "",
        }
        for checkpoint, placed in zip(sequence, _places(sequence), strict=True)
    ]
    for source, why in sequence.skipped.items():
        role, _, folder = source.partition(": ")
        rows.append({"role": role, "source": folder, "remark": f"skipped: {why}"})
    table = pd.DataFrame(rows).astype(dict.fromkeys(("step", "tensors", "parameters", "compared"), "Int64"))
    table.attrs = {"chat_template": sequence.chat_template, "system": sequence.system}
    return table


def _stored(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    if isinstance(checkpoint.source, nn.Module):
        yield from sorted(weights_of(checkpoint.source).items())
        return
    for folder in lineage(checkpoint):
        yield from tensors_of(folder)


def _places(sequence: ModelSequence) -> list[dict[Any, Any]]:
    """Distance and cosine of every checkpoint, in their order."""
    if any(_is_no_plain_model(checkpoint) for checkpoint in sequence):
        return [{"compared": 0, "distance": math.nan, "cosine": math.nan} for _ in sequence]
    table = split_update(sequence.anchor, sequence.witness, sequence, shared=True)
    whole = table[table["tensor"] == WHOLE].set_index("checkpoint").rename(columns={"norm": "distance"})
    whole["compared"] = table.groupby("checkpoint").size() - 1
    return whole[["compared", "distance", "cosine"]].to_dict("records")


def _is_no_plain_model(checkpoint: Checkpoint) -> bool:
    if isinstance(checkpoint.source, nn.Module):
        model = open_model(checkpoint)
        return model.kind != "huggingface" or quantisation(model.module) is not None
    return any(is_quantised_folder(folder) for folder in lineage(checkpoint))
