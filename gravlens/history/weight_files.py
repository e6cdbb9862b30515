"""The files of one checkpoint's folder: which weights lie in it, whether they are whole, and what they are."""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gravlens.core.errors import GravlensError
from gravlens.core.files import damaged

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
STATE = "trainer_state.json"
TRAINING = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")  # Trainer's pickles that are no weights
STORED_AS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# --- which files ------------------------------------------------------------------------------------------------
def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter, not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's or an adapter's weights; each was opened and is whole.

    Raises:
        GravlensError: no folder; weights that are pickled, absent, cut short, or lack a shard; a model and an adapter
            in one folder.
    """
    if not folder.is_dir():
        raise GravlensError(f"{folder} is no folder.", "A checkpoint is a folder.", "check the path.")
    files = _adapter_file(folder) if is_adapter(folder) else _model_files(folder)
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error
    return files


def _model_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise _no_weights(folder, "AutoModelForCausalLM", "transformers")
    shards = [folder / name for name in _shards(folder / INDEX)]
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        raise GravlensError(
            f"{folder} lacks {', '.join(absent[:3])}, which {INDEX} names.",
            "Every shard is needed.",
            "wait until it is written to its end, or copy that checkpoint again.",
        )
    return shards


def _shards(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        plain = bool(names) and all(Path(name).name == name for name in names)  # a path would lead out of the folder
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(index, error) from error
    if not plain:
        raise damaged(index, ValueError("its shards are no file names of that folder"))
    return names


def _adapter_file(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():
        raise GravlensError(
            f"{folder} holds both a whole model and an adapter ({ADAPTER_CONFIG}).",
            "A checkpoint is one of the two.",
            f"move {ADAPTER_CONFIG} away where the adapter was merged already.",
        )
    if not (folder / ADAPTER).is_file():
        raise _no_weights(folder, "AutoPeftModelForCausalLM", "peft")
    return [folder / ADAPTER]


def _no_weights(folder: Path, loader: str, package: str) -> GravlensError:
    found = {path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix)}
    pickles = sorted(name for name in found if not name.startswith(TRAINING))
    convert = (
        f'convert it once: python -c "from {package} import {loader} as M; '
        f"M.from_pretrained('{folder.name}').save_pretrained('{folder.name}-safetensors')\""
    )
    if pickles:
        given, remedy = f"only pickled weights ({', '.join(pickles[:3])})", f"if you trust it, {convert}"
    else:
        given = "no weights as safetensors"
        remedy = (
            f"wait until it is written, or copy it again; if it was published as a pickle that you trust, {convert}"
        )
    return GravlensError(
        f"{folder} holds {given}.", "Reading a pickle can run code, so safetensors are needed.", remedy
    )


# --- what is in them --------------------------------------------------------------------------------------------
def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, read from the headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


def stored_dtypes(folder: Path) -> dict[torch.dtype | str, int]:
    """In which dtypes a folder's weights are stored -> how many numbers, from the headers; others by their names."""
    numbers: dict[torch.dtype | str, int] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for part in (file.get_slice(name) for name in file.keys()):  # noqa: SIM118
                kind: str = part.get_dtype()  # pyright: ignore[reportAssignmentType]
                dtype = STORED_AS.get(kind, kind)
                numbers[dtype] = numbers.get(dtype, 0) + math.prod(part.get_shape())
    return numbers


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The floating-point dtype of most of a folder's weights, or None."""
    floating = {dtype: count for dtype, count in stored_dtypes(folder).items() if isinstance(dtype, torch.dtype)}
    return max(floating, key=lambda dtype: floating[dtype], default=None)


def held_dtype(folder: Path, dtype: torch.dtype) -> torch.dtype:
    """What a folder's weights are held in while they are copied to `dtype`: as stored, where that loses nothing."""
    stored, *others = stored_dtypes(folder)
    return stored if isinstance(stored, torch.dtype) and not others else dtype


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor by its name, one at a time, sorted by names however the folder is sharded."""
    where: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    opened, file = None, None
    for name in sorted(where):
        if where[name] != opened:
            opened, file = where[name], safe_open(where[name], framework="pt")
        yield name, file.get_tensor(name)  # pyright: ignore[reportOptionalMemberAccess]


@dataclass(frozen=True)
class Contents:
    """What some weights are.

    Attributes:
        tensors: how many.
        parameters: how many numbers.
        dtype: as they are stored; several are joined by a comma.
        digest: SHA-256 of names, dtypes, shapes and bytes, in the order of the names.
    """

    tensors: int
    parameters: int
    dtype: str
    digest: str


def contents(named: Iterable[tuple[str, Tensor]]) -> Contents:
    """Count and digest tensors, one at a time; equal weights have equal digests, sharded or not, on disk or not."""
    digest, tensors, parameters, dtypes = hashlib.sha256(), 0, 0, set()
    for name, tensor in named:
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        tensors, parameters, dtypes = tensors + 1, parameters + tensor.numel(), dtypes | {dtype}
    return Contents(tensors, parameters, ",".join(sorted(dtypes)), digest.hexdigest())


def architecture(folder: Path) -> dict[str, Any] | None:
    """The configuration without bookkeeping, for telling whether weights can be swapped; None where it is unknown."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):  # loading says what is wrong with it
        return None
    bookkeeping = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
    return {key: value for key, value in config.items() if key not in bookkeeping}


def trained_steps(folder: Path) -> int | None:
    """`global_step` of a Trainer checkpoint, or None where Trainer left no state."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GravlensError(
            f"{path} says no global_step ({type(error).__name__}: {error}).",
            "Trainer writes there how many steps a checkpoint has.",
            "wait until it is written to its end, or remove that file: then the folder's name says its step.",
        ) from error
