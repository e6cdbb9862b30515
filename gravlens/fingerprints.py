"""What a checkpoint is, in one digest: its weights, its configuration, and how its states are computed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gravlens.adapters import lineage
from gravlens.checkpoints import Checkpoint
from gravlens.folders import ADAPTER_CONFIG, architecture, contents, is_adapter, tensors_of, weight_files
from gravlens.models import weights_of
from gravlens.store import write_json

LAYOUT = 1  # raised whenever the same checkpoint would give other states


def fingerprint(checkpoint: Checkpoint, how: Sequence[str], memo: Path | None = None) -> str:
    """SHA-256 of a checkpoint's weights, its configuration and how it is read.

    Args:
        checkpoint: a folder, a hub id, an adapter over its base, or a model in memory.
        how: what else the states depend on (`huggingface`, `float32`).
        memo: a folder that remembers the digests of weights by their files' size, times and place on the disk, so that
            unchanged files are read once.
    """
    if isinstance(checkpoint.source, nn.Module):
        named = sorted(_state_of(checkpoint.source).items())
        parts = [[contents(named).digest, _configuration_of(checkpoint.source)]]
    else:
        parts = [[_digest_of(folder, memo), _configuration(folder)] for folder in lineage(checkpoint)]
    return hashlib.sha256(json.dumps([LAYOUT, *how, parts], sort_keys=True).encode()).hexdigest()


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a model in memory; a quantised one's hold its scales too."""
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {**weights_of(module), **state}


def _configuration_of(module: Any) -> str:
    config: Any = getattr(module, "config", None) or getattr(module, "cfg", None)
    return json.dumps(config.to_dict(), sort_keys=True, default=str) if hasattr(config, "to_dict") else repr(config)


def _configuration(folder: Path) -> Any:
    if is_adapter(folder):
        return json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    return architecture(folder)


def _digest_of(folder: Path, memo: Path | None) -> str:
    """The digest of a folder's weights, from the memo where none of its files changed since."""
    if memo is None:
        return contents(tensors_of(folder)).digest
    files = [path.resolve() for path in weight_files(folder)]
    place = memo / f"{hashlib.sha256(str(files).encode()).hexdigest()[:32]}.json"
    seen = [list(_marks(path)) for path in files]
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
        if known["files"] == seen and len(known["digest"]) == 64:
            return known["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never seen, or written over
    digest = contents(tensors_of(folder)).digest
    if seen == [list(_marks(path)) for path in files]:  # else it is being written at this moment
        write_json(place, {"files": seen, "digest": digest})
    return digest


def _marks(path: Path) -> Iterator[int]:
    """What changes with a file: its inode's number, size, and times of writing, which no program can set back."""
    stat = path.stat()
    yield from (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
