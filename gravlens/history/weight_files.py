"""Weight files of a checkpoint folder: find them, verify that they are complete, read headers and tensors."""

import hashlib
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import torch
from safetensors import safe_open
from torch import Tensor

from gravlens.core.errors import GravlensError, read_object, reading
from gravlens.core.files import damaged

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
STATE = "trainer_state.json"
STEP = re.compile(r"checkpoint-\d+")  # a Trainer's name for a checkpoint
TRAINING = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")  # pickles of Trainer that hold no weights
Stamp: TypeAlias = tuple[int, ...]
STORED_AS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def weight_paths(folder: Path) -> list[Path]:
    """Return the safetensors files of a model's or an adapter's weights; none of them is opened."""
    if not folder.is_dir():
        raise GravlensError(f"{folder} is not a folder.", "A checkpoint is a folder.", "check the path.")
    folder = adapter_folder(folder)
    return _adapter_file(folder) if (folder / ADAPTER_CONFIG).is_file() else _model_files(folder)


def adapter_folder(folder: Path) -> Path:
    """Return the subfolder of a checkpoint's one named adapter (`checkpoint-5/policy/`), or the folder itself."""
    # PEFT writes an adapter that is not called "default" into a subfolder of its name.
    if any((folder / name).exists() for name in (ADAPTER_CONFIG, WEIGHTS, INDEX)):
        return folder
    named = sorted(path.parent for path in folder.glob(f"*/{ADAPTER_CONFIG}") if not STEP.fullmatch(path.parent.name))
    if len(named) > 1:
        given = f"{folder} holds {len(named)} adapters: {', '.join(path.name for path in named)}."
        remedy = f"the folder of one of them, {named[0]}; of a run: '{folder.parent / 'checkpoint-*' / named[0].name}'."
        raise GravlensError(given, "A checkpoint has one adapter.", remedy)
    return named[0] if named else folder


def _model_files(folder: Path) -> list[Path]:
    if preferred := next(folder.glob("shard-*-model-*.safetensors"), None):
        given = f"{folder} holds {preferred.name}, which transformers would read too."
        raise GravlensError(
            given, "What is checked and hashed must be what is read.", f"a folder with {WEIGHTS} alone."
        )
    if (folder / ADAPTER).exists():
        given, wanted = f"{folder} holds {ADAPTER} and no {ADAPTER_CONFIG}.", "An adapter is read by its configuration."
        raise GravlensError(given, wanted, f"copy {ADAPTER_CONFIG}, or move {ADAPTER} away if it was merged.")
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise _no_weights(folder, "AutoModelForCausalLM", "transformers")
    shards = [folder / name for name in _shards(folder / INDEX)]
    if absent := [shard.name for shard in shards if not shard.is_file()]:
        given = f"{folder} has no {', '.join(absent[:3])}, which {INDEX} names."
        raise GravlensError(given, "Every shard is needed.", "wait until it is complete, or copy it again.")
    return shards


def _shards(index: Path) -> list[str]:
    with reading(index, "Its weight_map names the file of each tensor.", "copy or save it again."):
        names = sorted(set(read_object(index)["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):  # a path could lead out of the folder
            raise ValueError("its shards are not file names in that folder")
        return names


def _adapter_file(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).exists() or (folder / INDEX).exists():  # either could be meant
        given = f"{folder} holds both a whole model and an adapter ({ADAPTER_CONFIG})."
        remedy = f"move {ADAPTER_CONFIG} away where the adapter was merged already."
        raise GravlensError(given, "A checkpoint is one of the two.", remedy)
    if not (folder / ADAPTER).is_file():
        raise _no_weights(folder, "AutoPeftModelForCausalLM", "peft")
    return [folder / ADAPTER]


# What a sharded training leaves in place of weights: files, and the command that puts them together.
SHARDED = {
    "FSDP": (("pytorch_model_fsdp_[0-9]*", "*.distcp"), "accelerate merge-weights {shards} {folder}-whole"),
    "DeepSpeed ZeRO": (
        ("zero_to_fp32.py", "global_step[0-9]*"),
        "python {folder}/zero_to_fp32.py {folder} {folder}-whole --safe_serialization",
    ),
}


def _no_weights(folder: Path, loader: str, package: str) -> GravlensError:
    for what, (patterns, command) in SHARDED.items():
        if shards := [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
            given = f"{folder} holds no weights as safetensors, but the shards of {what} ({shards[0].name})."
            wanted = "They are put together once, in a folder that gets config.json and the tokenizer's files too."
            shards = shards[0] if shards[0].is_dir() else folder
            return GravlensError(given, wanted, command.format(folder=folder, shards=shards))
    found = {path.name for suffix in ("*.bin", "*.pt", "*.pth") for path in folder.glob(suffix)}
    pickles = sorted(name for name in found if not name.startswith(TRAINING))
    convert = (
        f'convert it once: python -c "from {package} import {loader} as M; '
        f"M.from_pretrained('{folder.name}').save_pretrained('{folder.name}-safetensors')\""
    )
    given = f"only pickled weights ({', '.join(pickles[:3])})" if pickles else "no weights as safetensors"
    remedy = "" if pickles else "wait until it is written, or copy it again; if it was published as a pickle: "
    wanted = "Reading a pickle can run code, so safetensors are needed."
    return GravlensError(f"{folder} holds {given}.", wanted, f"{remedy}if you trust it, {convert}")


class Entry(NamedTuple):
    """One tensor in a safetensors header."""

    file: Path
    dtype: torch.dtype | str  # the file's own name for a dtype that is not floating point
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Weights:
    """The headers of a folder's weight files."""

    files: tuple[Path, ...]
    stamps: tuple[Stamp, ...]  # of each file, before it was opened
    tensors: Mapping[str, Entry]  # sorted by name, however the folder is sharded

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by tensor name."""
        return {name: entry.shape for name, entry in self.tensors.items()}

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating-point dtype of most numbers, or None."""  # a bf16 model may keep its norms in fp32
        counts: dict[torch.dtype, int] = {}
        for entry in self.tensors.values():
            if isinstance(entry.dtype, torch.dtype):
                counts[entry.dtype] = counts.get(entry.dtype, 0) + math.prod(entry.shape)
        return max(counts, key=lambda dtype: counts[dtype], default=None)

    def load_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype to load in before copying to `dtype`: the stored one, where there is only one."""
        stored = {entry.dtype for entry in self.tensors.values()}
        only = stored.pop() if len(stored) == 1 else dtype
        return only if isinstance(only, torch.dtype) else dtype

    def load(self) -> Iterator[tuple[str, Tensor]]:
        """Load each tensor in turn, sorted by name."""
        opened, file = None, None
        for name, entry in self.tensors.items():
            if entry.file != opened:
                opened, file = entry.file, safe_open(entry.file, framework="pt")
            yield name, file.get_tensor(name)  # pyright: ignore[reportOptionalMemberAccess]


def read_headers(folder: Path) -> Weights:
    """Open each weight file of a folder once and read its header; raise as `weight_paths`, or if one is truncated."""
    files, found = weight_paths(folder), dict[str, Entry]()
    stamps = tuple(stamp(path) for path in files)  # before opening: a file written in between is noticed
    for path in files:
        with reading(path, "A safetensors file is needed.", "check its permissions."):
            path.open("rb").close()  # safe_open takes any failure for a missing file
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    part = file.get_slice(name)
                    kind: str = part.get_dtype()  # pyright: ignore[reportAssignmentType]
                    found[name] = Entry(path, STORED_AS.get(kind, kind), tuple(part.get_shape()))
        except Exception as error:  # a shape or dtype that is none raises what it likes
            raise damaged(path, error) from error
    return Weights(tuple(files), stamps, dict(sorted(found.items())))


def stamp(path: Path) -> Stamp:
    """Return what changes when a file is written: device, inode, size, mtime and ctime; () for a missing file."""
    try:
        stat = path.stat()
    except OSError:
        return ()
    # No program can set the ctime back; `cp -p` and `os.utime` restore the mtime.
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@dataclass(frozen=True)
class Contents:
    """Summary of weights: their stored dtypes, and SHA-256 of names, dtypes, shapes and bytes in the order of names."""

    tensors: int
    parameters: int
    dtype: str
    digest: str


def contents(named: Iterable[tuple[str, Tensor]]) -> Contents:
    """Count and hash tensors, one at a time; the digest is independent of sharding and equal on disk and in memory."""
    digest, tensors, parameters, dtypes = hashlib.sha256(), 0, 0, set()
    for name, tensor in named:
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        # Viewed as bytes, because numpy has no bfloat16.
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        tensors, parameters, dtypes = tensors + 1, parameters + tensor.numel(), dtypes | {dtype}
    return Contents(tensors, parameters, ",".join(sorted(dtypes)), digest.hexdigest())


def repeated(digests: Mapping[str, str]) -> dict[str, str]:
    """Return names whose digest an earlier name has -> that name."""
    first: dict[str, str] = {}
    seen = {name: first.setdefault(digest, name) for name, digest in digests.items()}
    return {name: before for name, before in seen.items() if name != before}


def remark_on_same(digests: Mapping[str, str], what: str) -> None:
    """Warn of checkpoints (name -> digest of `what`) that equal an earlier one."""
    for name, other in repeated(digests).items():
        remark = f"{name} and {other} have the same {what}: nothing moves between them."
        warnings.warn(f"{remark} Try: gravlens inspect, which lists sources and digests.", stacklevel=3)


def trained_steps(folder: Path) -> int | None:
    """Return `global_step` of a Trainer checkpoint, or None if there is no trainer_state.json."""
    path = folder / STATE
    if not path.is_file():
        return None
    remedy = "wait until it is complete, or remove that file: then the folder's name gives the step."
    with reading(f"global_step of {path}", "Trainer writes there how many steps a checkpoint has.", remedy):
        return int(str(json.loads(path.read_bytes())["global_step"]))  # 5.7 and true are no steps
