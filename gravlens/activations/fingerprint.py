"""What a checkpoint is, in one digest: its weights, its configuration, and how its states are computed."""

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gravlens.activations.reader import hooks_on
from gravlens.core.errors import GravlensError
from gravlens.core.files import CONVENTION, write_json
from gravlens.history.hub import commit_of
from gravlens.history.sequence import Checkpoint
from gravlens.history.sources import lineage
from gravlens.history.weight_files import ADAPTER_CONFIG, architecture, contents, is_adapter, tensors_of, weight_files
from gravlens.models.opening import weights_of

LAYOUT = 1  # raised whenever the same checkpoint would give other states
SETTLED = 2.0  # seconds after which another write surely gives a file another time


def fingerprint(checkpoint: Checkpoint, how: Sequence[str], memo: Path | None = None) -> str:
    """SHA-256 of a checkpoint's weights, its configuration and how it is read.

    A hub's revision is known by its commit, which is a digest of its files: its weights need not be on this disk.

    Args:
        checkpoint: a folder, a hub id, an adapter over its base, or a model in memory.
        how: what else the states depend on (`huggingface`, `float32`, the versions of libraries).
        memo: a folder that remembers the digests of weights by their files' size, times and place on the disk, so that
            unchanged files are read once.

    Raises:
        GravlensError: a model in memory whose states its weights alone do not tell: in training, or with hooks on it.
    """
    if isinstance(checkpoint.source, nn.Module):
        _check_plain(checkpoint, checkpoint.source)
        named = sorted(_state_of(checkpoint.source).items())
        parts = [[contents(named).digest, _configuration_of(checkpoint.source)]]
    else:
        folders = lineage(checkpoint, weights=False)
        parts = [[commit_of(folder) or _digest_of(folder, memo), _configuration(folder)] for folder in folders]
    return hashlib.sha256(json.dumps([LAYOUT, CONVENTION, *how, parts], sort_keys=True).encode()).hexdigest()


def _check_plain(checkpoint: Checkpoint, module: nn.Module) -> None:
    """Raise where something beside the weights acts on the states; TransformerLens has its hooks on points for them."""
    parts = list(module.modules())
    points = [part for part in parts if hasattr(part, "fwd_hooks")] or parts
    hooked = any(hooks_on(part) for part in points)
    if hooked or any(part.training for part in parts):
        raise GravlensError(
            f"{checkpoint.name} ({checkpoint.described}) {'has hooks on it' if hooked else 'is in training mode'}.",
            "A store is asked by weights, and these alone would not give the same states again.",
            "store=None" + (", or the same after the hooks are gone." if hooked else ", or model.eval()."),
        )


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a model in memory and all its buffers; a quantised one's hold its scales too."""
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {**weights_of(module), **dict(module.named_buffers()), **state}


def _configuration_of(module: Any) -> str:
    config: Any = getattr(module, "config", None) or getattr(module, "cfg", None)
    told = json.dumps(config.to_dict(), sort_keys=True, default=str) if hasattr(config, "to_dict") else repr(config)
    if not hasattr(module, "peft_config"):
        return told
    acting = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")  # which adapters, and how much
    return told + repr([[getattr(part, name, None) for name in acting] for part in module.modules()])


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
    seen, now = [list(_marks(path)) for path in files], time.time_ns()
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
        if known["files"] == seen and known["check"] == _check(seen, known["digest"]):
            return known["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # never seen, or written over
    digest = contents(tensors_of(folder)).digest
    # What was written a moment ago may be written again within the same tick of the clock, and keep its marks.
    settled = all(now - mark[-1] > SETTLED * 1e9 for mark in seen)
    if settled and seen == [list(_marks(path)) for path in files]:
        with suppress(OSError):  # a memo saves time; a full disk is told where states are written
            write_json(place, {"files": seen, "digest": digest, "check": _check(seen, digest)})
    return digest


def _check(seen: list[list[int]], digest: str) -> str:
    """What a memo that was written over does not hold."""
    return hashlib.sha256(json.dumps([seen, digest]).encode()).hexdigest()


def _marks(path: Path) -> Iterator[int]:
    """What changes with a file: its inode's number, size, and times of writing, which no program can set back."""
    stat = path.stat()
    yield from (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
