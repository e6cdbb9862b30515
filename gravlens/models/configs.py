"""What a checkpoint's configuration may cause: it says what the model is, and not which code reads it (security)."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedConfig

from gravlens.core.errors import GravlensError

# Methods of quantisation whose arithmetic transformers fetches from the hub and runs, where `kernels` is installed. The
# weights of the first are dequantised instead, as transformers does on a CPU; of the others it only has that code.
DEQUANTISED, FETCHED = ("fp8", "mxfp8", "mxfp4", "metal"), ("eetq", "nvfp4")
# Keys that make transformers read other files than those that are checked and hashed: weights by another name, and an
# image encoder's configuration on the hub.
ELSEWHERE = ("transformers_weights", "backbone")
TOKENIZER = re.compile(r"(Tokenizer|TokenizerLegacy|Backend)$")


def read_config(folder: Path) -> Any:
    """Return a model's configuration without what would make transformers fetch and run code, or replace its own.

    The implementations of attention and experts are transformers' defaults, in every part of the configuration.

    Raises:
        GravlensError: as `check_files`; weights that only fetched code can multiply.
    """
    check_files(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for part in _parts(config):
        part._attn_implementation_internal = part._experts_implementation_internal = None
        vars(part).pop("fusion_config", None)  # it replaces classes of transformers for the whole process
        found = vars(part).get("quantization_config")
        if not isinstance(found, dict):
            continue
        if (method := found.get("quant_method")) in FETCHED:
            given = f"The weights of {folder} are quantised by {method}."
            raise GravlensError(given, "transformers would fetch code for it and run it.", "another quantisation.")
        found.pop("use_optimized_inference", None)  # of compressed-tensors: kernels for fp8
        if method in DEQUANTISED:
            found["dequantize"] = True
    return config


def check_files(folder: Path) -> None:
    """Raise if a configuration names files elsewhere, or a tokenizer's class that is none: a model, for example."""
    for name in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError, RecursionError):  # whoever reads the file says so
            found = json.loads((folder / name).read_text("utf-8"))
            if named := next((pair for pair in entries(found) if _leads_elsewhere(*pair)), None):
                break
    else:
        return
    given = f"{folder / name} has {named[0]} = {str(named[1])[:80]!r}."
    wanted = "A checkpoint's configuration may not choose which code or which other files are read."
    raise GravlensError(given, wanted, f"the same file without {named[0]}, if you trust the rest (docs/security.md).")


def _leads_elsewhere(key: str, value: Any) -> bool:
    if key == "per_layer_config":
        return any(name.endswith("_implementation") for name, _ in entries(value))
    if not isinstance(value, str):
        return False
    if key == "tokenizer_class":  # AutoTokenizer takes any class of transformers
        name = re.sub("(Fast)+$", "", value)
        return name in _names_of_transformers() and not TOKENIZER.search(name)
    return key in ELSEWHERE or value.startswith(("hf-hub:", "hf_hub:"))  # the latter: timm's names of models


@cache
def _names_of_transformers() -> frozenset[str]:
    return frozenset(dir(transformers))  # 0.2 s each time: it looks for every optional package


def entries(found: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over the keys and values of JSON, at any depth."""
    for key, value in found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ():
        yield str(key), value
        yield from entries(value)


def _parts(config: Any) -> Iterator[Any]:
    """Iterate over a configuration and those of its parts (text, images)."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)
