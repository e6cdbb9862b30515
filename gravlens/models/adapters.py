"""PEFT adapters: what an adapter is added to, and adding it to an opened model in place."""

import warnings
from pathlib import Path
from typing import Any

from gravlens.core.errors import GravlensError
from gravlens.history.precision import check_unquantised
from gravlens.history.weight_files import tensors_of, weight_files

NAME = "gravlens"  # under which PEFT knows the adapter while it is merged


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
