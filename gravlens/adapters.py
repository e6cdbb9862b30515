"""PEFT adapters: what an adapter is added to, and adding it to an opened model in place."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from gravlens.checkpoints import Checkpoint
from gravlens.errors import GravlensError
from gravlens.folders import ADAPTER_CONFIG, is_adapter, tensors_of, weight_files
from gravlens.hub import is_hub_id, local_folder, repository_of
from gravlens.precision import check_unquantised

NAME = "gravlens"  # under which PEFT knows the adapter while it is merged
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


# --- adding one -------------------------------------------------------------------------------------------------


def merge_adapter(module: Any, folder: Path) -> None:
    """Add an adapter's change to the weights of a Hugging Face model, in place; no second model is made.

    Raises:
        GravlensError: PEFT is not installed; a base that is quantised; a pickled or broken adapter; one that names a
            module to import; one whose tensors are not all taken, or that leaves some of its places empty: it would
            make the base, or half of it.
    """
    check_unquantised(module, "Merging an adapter")
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    weight_files(folder)
    try:
        with warnings.catch_warnings():  # PEFT asks transformers for names that it will drop
            warnings.simplefilter("ignore", FutureWarning)
            merged, lost = _merged(module, folder)
    except GravlensError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise _does_not_fit(folder, reason) from error
    if lost:
        raise _does_not_fit(folder, f"{len(lost)} of its tensors have no place, {sorted(lost)[0]} the first")
    for name, weight in merged.named_parameters():
        weight.requires_grad_(name in trained)


def _merged(module: Any, folder: Path) -> tuple[Any, set[str]]:
    """The model with the adapter in its weights, and the names that fit nowhere; PEFT does the arithmetic."""
    try:
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise GravlensError(
            f"{folder} is an adapter and PEFT is not installed.",
            "Adapters are PEFT's.",
            "pip install peft, or gravlens with its extra: pip install -e '.[train]'.",
        ) from error
    config = PeftConfig.from_pretrained(str(folder))
    for foreign in ("megatron_config", "layer_replication"):  # would import a module that the file names; add blocks
        if getattr(config, foreign, None):
            raise _does_not_fit(folder, f"it asks for {foreign}")
    config.inference_mode = True
    adapted = PeftModel(module, config, adapter_name=NAME)
    # Tensors are handed over, so that PEFT itself opens no file of weights.
    report = set_peft_model_state_dict(adapted, dict(tensors_of(folder)), adapter_name=NAME)
    empty = {name for name in report.missing_keys if NAME in name.split(".")}
    lost = empty | set(report.unexpected_keys)
    return adapted.unload() if lost else adapted.merge_and_unload(safe_merge=True), lost


def _does_not_fit(folder: Path, reason: str) -> GravlensError:
    return GravlensError(
        f"The adapter {folder} does not fit its base ({reason}).",
        "Every tensor of an adapter has its place in the base, or base would be held against base.",
        "the model that it was trained over, or merge_and_unload() there and save_pretrained().",
    )
