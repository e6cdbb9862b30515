"""Resolve a checkpoint to its folders: an adapter is read on top of its bases."""

import json
from pathlib import Path

from torch import nn

from gravlens.core.errors import GravlensError
from gravlens.history.hub import is_hub_id, local_folder, repository_of
from gravlens.history.sequence import Checkpoint
from gravlens.history.weight_files import ADAPTER_CONFIG, is_adapter

CHAIN = 8  # adapters over adapters; a circle ends here


def lineage(checkpoint: Checkpoint, *, weights: bool = True) -> list[Path]:
    """The folders that make up a checkpoint: a whole model, then the adapters over it.

    Args:
        checkpoint: a folder or hub id.
        weights: whether those of a hub id are downloaded too, or its small files alone.

    Raises:
        GravlensError: a folder that is not there, or an adapter whose base is not known.
    """
    chain = [local_folder(_source(checkpoint), weights=weights)]
    while is_adapter(chain[0]):
        checkpoint = base_of(checkpoint, chain[0])
        chain.insert(0, local_folder(_source(checkpoint), weights=weights))
        if len(chain) > CHAIN:
            raise _no_base(chain[-1], "names adapters in a circle as its base", "a whole model at the end")
    return chain


def base_of(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """What an adapter is added to: the checkpoint's base, or where that is an adapter too, maybe that one's base.

    `base_model_name_or_path` of the adapter decides between them. A name that is no folder here may be an old path of
    the base and is no contradiction; another folder, or another hub id, is one.
    """
    named = named_base(folder)
    if checkpoint.base is None:
        if not named or not (Path(named).is_dir() or is_hub_id(named)):
            raise _no_base(folder, f"names {named or 'no'} base, which is not here", "a base in its own configuration")
        return Checkpoint(f"base of {checkpoint.name}", Path(named) if Path(named).is_dir() else named)
    base = checkpoint.base
    if _contradicts(named, base) and is_adapter(below := local_folder(_source(base), weights=False)):
        base = base_of(base, below)  # the anchor's own adapter, trained further
    if _contradicts(named, base):
        wanted = f"it would be added to {checkpoint.base.name} ({checkpoint.base.described})"
        raise _no_base(folder, f"was trained over {named}, and {wanted}", "runs that start at the anchor")
    return base


def named_base(folder: Path) -> str:
    """`base_model_name_or_path` of an adapter, or nothing."""
    try:
        named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise _no_base(folder, f"has a broken {ADAPTER_CONFIG} ({error})", "PEFT's configuration") from error
    return named if isinstance(named, str) else ""


def _contradicts(named: str, base: Checkpoint) -> bool:
    source = _source(base)
    if named and Path(named).is_dir():
        return not (Path(source).is_dir() and Path(named).samefile(source))
    if isinstance(source, str) and is_hub_id(named) and not Path(source).is_dir():
        return repository_of(named) != repository_of(source)
    return False


def _source(checkpoint: Checkpoint) -> Path | str:
    if isinstance(checkpoint.source, nn.Module):
        raise GravlensError(
            f"{checkpoint.name} is {checkpoint.described}.",
            "An adapter's folder is added to a base that lies in a folder too.",
            "PeftModel.from_pretrained(model, folder).merge_and_unload() in memory.",
        )
    return checkpoint.source


def _no_base(folder: Path, found: str, wanted: str) -> GravlensError:
    return GravlensError(
        f"The adapter {folder} {found}.",
        f"An adapter means something over its own base alone: {wanted} is needed.",
        f"mend base_model_name_or_path in its {ADAPTER_CONFIG}, or merge it once (merge_and_unload()) and save that.",
    )
