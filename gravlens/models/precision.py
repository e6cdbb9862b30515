"""Precision of a model: its dtype, and the quantisation of its weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gravlens.core.errors import GravlensError

STORED = "stored"  # the dtype of the checkpoint's file
SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "fp64": "float64", "auto": STORED}
NAMES = ("float32", "float16", "bfloat16", "float64")


def as_dtype(given: torch.dtype | str) -> torch.dtype | None:
    """Return a dtype given itself or its name; None for `"stored"` (or `"auto"`), which depends on the checkpoint."""
    name = SHORT.get(str(given), str(given).removeprefix("torch."))
    if name == STORED:
        return None
    if name not in NAMES:
        wanted = "Models are read in float32, float16, bfloat16 or float64, or as they are stored."
        raise GravlensError(f"The dtype {str(given)!r} cannot be used.", wanted, "float32, bf16, or stored.")
    return getattr(torch, name)


def precision_name(dtype: torch.dtype, quantised: str | None) -> str:
    """Describe dtype and quantisation: `float32, 4-bit (bitsandbytes nf4)`."""
    return ", ".join(filter(None, [str(dtype).removeprefix("torch."), quantised]))


def quantisation(module: nn.Module) -> str | None:
    """Describe the quantisation of a model, such as `4-bit (bitsandbytes nf4)`; None if it has none."""
    inner: Any = getattr(module, "original_model", module)  # of a bridge
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # of PEFT
    if found := _named(getattr(getattr(inner, "config", None), "quantization_config", None)):
        return found
    for weight in inner.parameters():  # quantised by hand: not in any configuration
        if not weight.is_floating_point() or type(weight.data).__module__.startswith("torchao"):
            kinds = [type(one).__name__ for one in (weight, weight.data)]
            kind = next((kind for kind in kinds if kind not in ("Parameter", "Tensor")), str(weight.dtype))
            return f"quantised ({kind.removeprefix('torch.')})"
    return None


def quantisation_in(config: Mapping[str, Any] | None) -> str | None:
    """Describe how weights were saved quantised, given the content of a config.json; None if they were not."""
    return _named((config or {}).get("quantization_config"))


def _named(config: Any) -> str | None:
    """Describe a quantisation configuration: transformers' object, or its JSON."""
    if not config:
        return None
    entries: Mapping[str, Any] = config if isinstance(config, Mapping) else vars(config)
    method = entries.get("quant_method", "an unknown method")
    method = str(getattr(method, "value", method))
    if method == "bitsandbytes":
        # transformers' object keeps the flag under a private name.
        four = entries.get("load_in_4bit", entries.get("_load_in_4bit"))
        return f"4-bit (bitsandbytes {entries.get('bnb_4bit_quant_type', 'fp4')})" if four else "8-bit (bitsandbytes)"
    if bits := entries.get("bits"):
        return f"{bits}-bit ({method})"
    kind = entries.get("quant_type")
    named = kind if isinstance(kind, str) else type(kind).__name__ if kind is not None else ""
    return f"quantised ({' '.join(filter(None, [method, named]))})"


def check_unquantised(module: nn.Module, what: str) -> None:
    """Raise if weights are quantised and `what` (a noun) would read or write them as plain numbers."""
    if found := quantisation(module):
        given, wanted = f"The weights of this {type(module).__name__} are {found}.", f"{what} needs plain numbers."
        remedy = "the same checkpoint in full precision (states, steering and ablation work on quantised ones)."
        raise GravlensError(given, wanted, remedy)
