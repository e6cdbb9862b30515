"""Fingerprint of a checkpoint: one digest of its weights, its configuration, and how it is read."""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils import _python_dispatch as dispatch

from gravlens.activations.reader import read_residuals
from gravlens.core.errors import GravlensError
from gravlens.core.files import CONVENTION, sha256_of, write_json
from gravlens.history.sources import Folder, Resolved, changed_meanwhile
from gravlens.history.weight_files import Stamp, contents, stamp, weight_paths
from gravlens.models.families import hooks_on
from gravlens.models.opening import open_model, weights_of

LAYOUT = 2  # raised whenever the same checkpoint would give other states
# Seconds. A file system's clock ticks every few milliseconds (FAT: 2 s): a file may be written twice within a tick and
# keep its stamp, so only a file that is older than this is known by its stamp alone.
SETTLED = 2.0
LONG = 128  # tokens: some changes act on later positions only, such as a window of attention


def fingerprint(checkpoint: Resolved, how: Sequence[str], memo: Path | None = None) -> str:
    """Return the SHA-256 of a checkpoint's weights, its configuration and how it is read.

    A hub's revision is known by its commit, which is a digest of its files: its weights need not be on this disk. Those
    that are must have the content that was downloaded. A model in memory is known by states on fixed tokens, too: much
    acts on them that is in no weight (a replaced `forward`, a wrapper, an attribute of a module).

    Args:
        how: what else the states depend on (`huggingface`, `float32`, the versions of libraries).
        memo: a folder that caches the digests of weights by their files' stamps, so that unchanged files are read once.

    Raises:
        GravlensError: a model in memory that is in training mode or has hooks, autocast, a hook on all modules, or
            another mode of torch: states of other prompts might be changed in other ways.
    """
    _check_surroundings()
    how = [*how, _matmul_precision()]
    module = checkpoint.checkpoint.source
    if isinstance(module, nn.Module):
        _check_plain(checkpoint, module)
        states = _states_digest(checkpoint)  # before the weights, which the first pass of some models packs
        parts = [[contents(sorted(_state_of(module).items())).digest, _configuration_of(module), states]]
    else:
        _check_code()
        parts = [_part(folder, memo) for folder in checkpoint.folders]
    return hashlib.sha256(json.dumps([LAYOUT, CONVENTION, *how, parts], sort_keys=True).encode()).hexdigest()


def known_by_stamps(checkpoint: Resolved, how: Sequence[str]) -> str | None:
    """Return a key of folders by the stamps of their files; None where it would not be certain.

    That is: a model in memory; files missing or written a moment ago; what a store refuses in libraries or around.
    """
    try:
        _check_surroundings()
        _check_code()
        settled = bool(checkpoint.folders) and all(_settled(folder) for folder in checkpoint.folders)
        parts = [[*folder.stamps.items(), folder.weights.stamps] for folder in checkpoint.folders] if settled else []
    except GravlensError:  # reading such a checkpoint tells what is wrong with it
        return None
    return hashlib.sha256(json.dumps([*how, _matmul_precision(), parts]).encode()).hexdigest() if parts else None


def check_same_content(checkpoint: Resolved) -> None:
    """Raise if a folder's content is no longer what its fingerprint says."""
    checkpoint.check_unchanged()
    for folder in checkpoint.folders:
        if folder.commit or _settled(folder):
            continue
        if _part(folder, None) != _part(Folder(folder.path, folder.source), None):  # its files are read again
            raise changed_meanwhile(checkpoint)


def _part(folder: Folder, memo: Path | None) -> list[Any]:
    published = folder.commit is not None and _is_as_downloaded(folder, memo)
    return [folder.commit if published else _digest_of(folder, memo), folder.architecture]


def _is_as_downloaded(folder: Folder, memo: Path | None) -> bool:
    """Whether the weights of a snapshot, as far as they are here, have the content that their commit names."""
    try:
        files = weight_paths(folder.path)
    except GravlensError:  # not downloaded yet, or evicted
        return True
    return all(path.is_symlink() and _has_its_name(path.resolve(), memo) for path in files)


def _has_its_name(blob: Path, memo: Path | None) -> bool:
    """Whether a file of the hub's cache has the SHA-256 that is its name; of another name nothing is known."""
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return True
    seen, read = stamp(blob), partial(sha256_of, blob)
    return _remembered(["file", str(blob)], [seen], memo, read, lambda: _old([seen], time.time_ns())) == blob.name


def _settled(folder: Folder) -> bool:
    """Return whether all files of a folder are old enough to be known by their stamps."""
    return _old([*folder.stamps.values(), *folder.weights.stamps], folder.resolved_at)


def _old(stamps: Sequence[Stamp], now: int) -> bool:
    return all(now - one[-1] > SETTLED * 1e9 for one in stamps if one)


def _check_surroundings() -> None:
    """Raise if something outside the model acts on its states."""
    kinds = {"cpu", *([str(found.type)] if (found := torch.accelerator.current_accelerator()) else [])}
    modes = [
        *torch.overrides._get_current_function_mode_stack(),  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
        *dispatch._get_current_dispatch_mode_stack(),  # pyright: ignore[reportPrivateUsage]
    ]
    acting = ["torch.autocast"] * any(torch.is_autocast_enabled(kind) for kind in kinds)
    acting += ["a hook on all modules"] * bool(
        torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    )
    # `torch.device("cuda")` as a context is such a mode too, and only says where new tensors are.
    acting += [type(mode).__name__ for mode in modes if type(mode).__name__ != "DeviceContext"]
    if acting:
        given, wanted = f"{acting[0]} is active.", "A store serves the states of checkpoints as they are."
        raise GravlensError(given, wanted, "store=None, or the call outside of it.")


def _check_code() -> None:
    """Raise if another program has replaced code of transformers or torch that computes states of every model."""
    held: list[tuple[str, Any, str]] = [
        (f"{name}.{kind.__name__}.{method}", vars(kind)[method], name)
        for name, module in [*sys.modules.items()]
        if name.startswith("transformers.models.") and ".modeling_" in name
        for kind in vars(module).values()
        if isinstance(kind, type) and kind.__module__ == name
        for method in {"__init__", "forward"} & vars(kind).keys()
    ]
    functions = [(name, one) for name, one in vars(nn.functional).items() if isinstance(one, FunctionType)]
    held += [(f"torch.nn.functional.{name}", one, "torch") for name, one in functions]
    if loaded := sys.modules.get("transformers.modeling_utils"):  # heavy to load, and not needed for a look
        sdpa = loaded.ALL_ATTENTION_FUNCTIONS["sdpa"]
        held.append(("The attention function sdpa", sdpa, "transformers.integrations"))
    for name, one, owner in held:
        if not getattr(one, "__module__", "").startswith(owner):
            wanted = "A store serves what the libraries' own code computes."
            raise GravlensError(f"{name} was replaced.", wanted, "store=None, or without the change.")


def _matmul_precision() -> str:
    with suppress(RuntimeError):
        return torch.get_float32_matmul_precision()
    return "set otherwise"  # by torch's newer settings, which this function refuses to read


def _check_plain(checkpoint: Resolved, module: nn.Module) -> None:
    """Raise if more than the weights acts on the states."""
    parts = list(module.modules())
    hooked = any(hooks_on(part) for part in parts)
    if hooked or any(part.training for part in parts):
        found, remedy = ("has hooks on it", "remove the hooks") if hooked else ("is in training mode", "model.eval()")
        given = f"{checkpoint.name} ({checkpoint.described}) {found}."
        wanted = "A store is keyed by weights, which alone would not give these states again."
        raise GravlensError(given, wanted, f"store=None, or {remedy}.")


def _states_digest(checkpoint: Resolved) -> str:
    model = open_model(checkpoint)
    length = min(model.family.context or LONG, LONG)
    ids = torch.linspace(0, model.family.vocabulary - 1, length).long().tolist()
    states = read_residuals(model, [ids, ids[::-1]], layers=range(model.n_layers), finite=False)
    return hashlib.sha256(states.numpy().tobytes()).hexdigest()


def _state_of(module: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers of a model in memory; the scales of quantised ones act on its states."""
    # Not `state_dict()`: where bitsandbytes has packed 4-bit weights for the processor, it changes the model.
    return {**weights_of(module), **dict(module.named_buffers())}


def _configuration_of(module: Any) -> str:
    config: Any = getattr(module, "config", None) or getattr(module, "cfg", None)
    told = json.dumps(config.to_dict(), sort_keys=True, default=str) if hasattr(config, "to_dict") else repr(config)
    if not hasattr(module, "peft_config"):
        return told
    acting = ("scaling", "active_adapters", "disable_adapters", "merged_adapters")  # which adapters, and how much
    return told + repr([[getattr(part, name, None) for name in acting] for part in module.modules()])


def _digest_of(folder: Folder, memo: Path | None) -> str:
    """Return the digest of a folder's weights, from the memo if none of its files has changed since."""
    files = [str(path.resolve()) for path in folder.weights.files]

    def settled() -> bool:
        return _settled(folder) and not folder.changed

    return _remembered(files, folder.weights.stamps, memo, lambda: folder.digest, settled)


def _remembered(
    files: Sequence[str],
    stamps: Sequence[Stamp],
    memo: Path | None,
    compute: Callable[[], str],
    settled: Callable[[], bool],
) -> str:
    """Return a digest of files from the memo if their stamps are the same, else compute it and keep it if settled."""
    if memo is None:
        return compute()
    place = memo / f"{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:32]}.json"
    seen = [list(one) for one in stamps]
    try:
        known = json.loads(place.read_text(encoding="utf-8"))
        if known["files"] == seen and known["check"] == _check(seen, known["digest"]):
            return known["digest"]
    except Exception:
        pass  # never seen, or corrupt
    digest = compute()
    if settled():
        with suppress(GravlensError):  # a memo only saves time; a full disk is reported where states are written
            write_json(place, {"files": seen, "digest": digest, "check": _check(seen, digest)})
    return digest


def _check(seen: list[list[int]], digest: str) -> str:
    # A corrupt entry must not be believed: it would name another checkpoint's states.
    return hashlib.sha256(json.dumps([seen, digest]).encode()).hexdigest()
