"""Merge a PEFT adapter into an open model, in place."""

import warnings
from typing import Any

from gravlens.core.errors import GravlensError
from gravlens.history.sources import Folder
from gravlens.models.precision import check_unquantised

NAME = "gravlens"  # PEFT's name of the adapter while it is merged


def merge_adapter(module: Any, folder: Folder) -> None:
    """Merge an adapter into the weights of a Hugging Face model, in place; no second model is made.

    Raises:
        GravlensError: PEFT is not installed; a quantised base; a pickled or corrupt adapter; an adapter that names a
            module to import; an adapter with unused or missing tensors, which PEFT would skip silently.
    """
    check_unquantised(module, "Merging an adapter")
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    _ = folder.weights  # raises on a pickled or truncated adapter before PEFT changes the model
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
        raise _does_not_fit(folder, f"{len(lost)} tensors have no counterpart, the first is {sorted(lost)[0]}")
    for name, weight in merged.named_parameters():
        weight.requires_grad_(name in trained)


def _merged(module: Any, folder: Folder) -> tuple[Any, set[str]]:
    """Return the model with the adapter merged (by PEFT), and the names of tensors without a counterpart."""
    try:
        from peft import PeftConfig, PeftModel, set_peft_model_state_dict
    except ImportError as error:
        raise GravlensError(
            f"{folder.path} is an adapter and PEFT is not installed.",
            "Adapters are merged by PEFT.",
            "pip install peft, or gravlens with its extra: pip install -e '.[train]'.",
        ) from error
    config = PeftConfig.from_pretrained(str(folder.path))
    # The first makes PEFT import a module that the file names, the second adds blocks to the model.
    for foreign in ("megatron_config", "layer_replication"):
        if getattr(config, foreign, None):
            raise _does_not_fit(folder, f"it uses {foreign}")
    config.inference_mode = True
    adapted = PeftModel(module, config, adapter_name=NAME)
    # PeftModel.from_pretrained would also load a pickled adapter; here it only gets tensors from safetensors.
    report = set_peft_model_state_dict(adapted, dict(folder.weights.load()), adapter_name=NAME)
    empty = {name for name in report.missing_keys if NAME in name.split(".")}
    lost = empty | set(report.unexpected_keys)
    return adapted.unload() if lost else adapted.merge_and_unload(safe_merge=True), lost


def _does_not_fit(folder: Folder, reason: str) -> GravlensError:
    return GravlensError(
        f"The adapter {folder.path} does not fit its base ({reason}).",
        "Every tensor of an adapter must match the base; otherwise the base would be compared with itself.",
        "the model that it was trained over, or merge_and_unload() there and save_pretrained().",
    )
