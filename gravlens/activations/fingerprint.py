"""Fingerprint of a checkpoint: one digest of its weights, its configuration, and how it is read."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gravlens.activations.reader import hooks_on
from gravlens.core.errors import GravlensError
from gravlens.core.files import CONVENTION, write_json
from gravlens.history.sources import Folder, Resolved, changed_meanwhile
from gravlens.history.weight_files import contents
from gravlens.models.opening import weights_of

LAYOUT = 1  # raised whenever the same checkpoint would give other states
# Seconds. A file system's clock ticks every few milliseconds (FAT: 2 s): a file may be written twice within a tick and
# keep its stamp, so only a file that is older than this is known by its stamp alone.
SETTLED = 2.0


def fingerprint(checkpoint: Resolved, how: Sequence[str], memo: Path | None = None) -> str:
    """Return the SHA-256 of a checkpoint's weights, its configuration and how it is read.

    A hub's revision is known by its commit, which is a digest of its files: its weights need not be on this disk.

    Args:
        how: what else the states depend on (`huggingface`, `float32`, the versions of libraries).
        memo: a folder that caches the digests of weights by their files' stamps, so that unchanged files are read once.

    Raises:
        GravlensError: a model in memory that is in training mode or has hooks: its weights do not determine its states.
    """
    module = checkpoint.checkpoint.source
    if isinstance(module, nn.Module):
        _check_plain(checkpoint, module)
        parts = [[contents(sorted(_state_of(module).items())).digest, _configuration_of(module)]]
    else:
        parts = [_part(folder, memo) for folder in checkpoint.folders]
    return hashlib.sha256(json.dumps([LAYOUT, CONVENTION, *how, parts], sort_keys=True).encode()).hexdigest()


def check_same_content(checkpoint: Resolved) -> None:
    """Raise if a folder's content is no longer what its fingerprint says."""
    checkpoint.check_unchanged()
    for folder in checkpoint.folders:
        if folder.commit or _settled(folder):
            continue
        if _part(folder, None) != _part(Folder(folder.path, folder.source), None):  # its files are read again
            raise changed_meanwhile(checkpoint)


def _part(folder: Folder, memo: Path | None) -> list[Any]:
    return [folder.commit or _digest_of(folder, memo), folder.architecture]


def _settled(folder: Folder) -> bool:
    """Return whether all files of a folder are old enough to be known by their stamps."""
    stamps = [one for one in (*folder.stamps.values(), *folder.weights.stamps) if one]
    return all(folder.resolved_at - one[-1] > SETTLED * 1e9 for one in stamps)


def _check_plain(checkpoint: Resolved, module: nn.Module) -> None:
    """Raise if more than the weights acts on the states."""
    parts = list(module.modules())
    # A TransformerBridge has hooks of its own on its norms, and none on hook points, where a user's are.
    points = [part for part in parts if hasattr(part, "fwd_hooks")] or parts
    hooked = any(hooks_on(part) for part in points)
    if hooked or any(part.training for part in parts):
        found, remedy = ("has hooks on it", "remove the hooks") if hooked else ("is in training mode", "model.eval()")
        given = f"{checkpoint.name} ({checkpoint.described}) {found}."
        wanted = "A store is keyed by weights, which alone would not give these states again."
        raise GravlensError(given, wanted, f"store=None, or {remedy}.")


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers of a model in memory; the state dict adds a quantised model's scales."""
    state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    return {**weights_of(module), **dict(module.named_buffers()), **state}


def _configuration_of(module: Any) -> str:
    config: Any = getattr(module, "config", None) or getattr(module, "cfg", None)
    told = json.dumps(config.to_dict(), sort_keys=True, default=str) if hasattr(config, "to_dict") else repr(config)
    if not hasattr(module, "peft_config"):
        return told
    acting = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")  # which adapters, and how much
    return told + repr([[getattr(part, name, None) for name in acting] for part in module.modules()])


def _digest_of(folder: Folder, memo: Path | None) -> str:
    """Return the digest of a folder's weights, from the memo if none of its files has changed since."""
    if memo is None:
        return folder.digest
    files = [str(path.resolve()) for path in folder.weights.files]
    place = memo / f"{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]}.json"
    seen = [list(one) for one in folder.weights.stamps]
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
        if known["files"] == seen and known["check"] == _check(seen, known["digest"]):
            return known["digest"]
    except Exception:
        pass  # never seen, or corrupt
    digest = folder.digest
    if _settled(folder) and not folder.changed:
        with suppress(OSError):  # a memo only saves time; a full disk is reported where states are written
            write_json(place, {"files": seen, "digest": digest, "check": _check(seen, digest)})
    return digest


def _check(seen: list[list[int]], digest: str) -> str:
    # A corrupt entry must not be believed: it would name another checkpoint's states.
    return hashlib.sha256(json.dumps([seen, digest]).encode()).hexdigest()
