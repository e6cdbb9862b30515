"""Resolve a checkpoint once: its folders, and what their configurations and headers say."""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

from torch import nn

from gravlens.core.display import brief
from gravlens.core.errors import GravlensError, reading, said
from gravlens.history.hub import (
    BARE,
    PREFIX,
    bare_ids,
    commit_of,
    hub_id,
    is_hub_id,
    local_folder,
    located,
    repository_of,
    snapshots_here,
)
from gravlens.history.sequence import Checkpoint
from gravlens.history.weight_files import (
    ADAPTER_CONFIG,
    Stamp,
    Weights,
    adapter_folder,
    contents,
    read_headers,
    stamp,
    weight_paths,
)

CHAIN = 8  # adapters over adapters; a circle ends here
CONFIG = "config.json"
# Bookkeeping that changes with the library that saved a configuration, not with what the model computes.
BOOKKEEPING = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}


@dataclass(frozen=True, eq=False)
class Folder:
    """A folder with a whole model or an adapter. Its files are read when first needed, each once.

    Attributes:
        path: the folder; for a hub id its snapshot in the Hugging Face cache; for a checkpoint of a named adapter
            (`checkpoint-5/policy/`) the adapter's.
        source: the folder or hub id that was resolved.
        stamps: `stamp` of each configuration file when it was resolved, at `resolved_at` (ns).
    """

    path: Path
    source: Path | str
    stamps: Mapping[str, Stamp] = field(init=False, repr=False)
    resolved_at: int = field(default_factory=time.time_ns, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stamps", {name: stamp(self.path / name) for name in (CONFIG, ADAPTER_CONFIG)})

    @property
    def is_adapter(self) -> bool:
        """Whether it holds a PEFT adapter."""
        return bool(self.stamps[ADAPTER_CONFIG])

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders that may hold its tokenizer: its own, and the checkpoint's around a named adapter."""
        return tuple(dict.fromkeys([self.path, *([self.source] if isinstance(self.source, Path) else [])]))

    @cached_property
    def commit(self) -> str | None:
        """`owner--name@commit` of a snapshot in the Hugging Face cache, where files never change; else None."""
        return commit_of(self.path)

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """The adapter's or the model's configuration, or None where it is unreadable."""
        try:
            config = json.loads((self.path / (ADAPTER_CONFIG if self.is_adapter else CONFIG)).read_text("utf-8"))
        except Exception:
            return None  # loading raises later, with transformers' reason
        return config if isinstance(config, dict) else None

    @property
    def architecture(self) -> dict[str, Any] | None:
        """The configuration without bookkeeping: equal for folders of which the weights fit into one model."""
        if self.config is None or self.is_adapter:
            return self.config
        return {key: value for key, value in self.config.items() if key not in BOOKKEEPING}

    @cached_property
    def weights(self) -> Weights:
        """The headers of the weight files; raises where a file is missing or truncated."""
        return read_headers(self.path)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the weights, computed by reading all of them."""
        return contents(self.weights.load()).digest

    @property
    def changed(self) -> bool:
        """Whether a file that was read has been written since."""
        if self.commit:  # evicted and downloaded again, it has other stamps and the same content
            return False
        read = dict(self.__dict__).get("weights")  # an unread header cannot be stale
        files = [] if read is None else zip(read.files, read.stamps, strict=True)
        now = {name: stamp(self.path / name) for name in self.stamps}
        return now != self.stamps or any(stamp(path) != before for path, before in files)

    def fetched(self) -> "Folder":
        """Return this folder with its weights, which are downloaded if they are missing."""
        if not is_hub_id(self.source) or self._has_weights():
            return self
        # By commit, because a branch may have moved since its configuration was read.
        path = local_folder(f"{PREFIX}{repository_of(self.source)}@{self.path.name}" if self.commit else self.source)
        return self if path == self.path else Folder(path, self.source)

    def _has_weights(self) -> bool:
        try:
            return all(path.exists() for path in weight_paths(self.path))
        except GravlensError:
            return False


Known: TypeAlias = dict[str, Folder]


@dataclass(frozen=True, eq=False)
class Resolved:
    """A checkpoint and the folders that make it up.

    Attributes:
        folders: a whole model, then the adapters over it; empty for a model in memory.
        template: another checkpoint, if it is read with that one's tokenizer and chat template.
        tokenizer: the folder of a tokenizer that replaces its own.
    """

    checkpoint: Checkpoint
    folders: tuple[Folder, ...]
    template: "Resolved | None" = field(default=None, repr=False)
    tokenizer: Folder | None = field(default=None, repr=False)
    __repr__ = brief

    @property
    def name(self) -> str:
        return self.checkpoint.name

    @property
    def described(self) -> str:
        return self.checkpoint.described

    @property
    def base(self) -> Folder:
        return self.folders[0]  # of the whole model

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(folder.path for folder in self.folders)

    def fetched(self) -> "Resolved":
        """Return it with all weights downloaded."""
        return replace(self, folders=tuple(folder.fetched() for folder in self.folders))

    def check_unchanged(self) -> None:
        """Raise if a file was written since it was read."""
        if any(folder.changed for folder in self.folders):
            raise changed_meanwhile(self)  # configuration and weights may not belong together


def changed_meanwhile(checkpoint: Checkpoint | Resolved) -> GravlensError:
    """Return the error for a checkpoint that is written while it is read."""
    given = f"{checkpoint.name} ({checkpoint.described}) changed while it was opened."
    wanted = "A checkpoint must not be written while it is read."
    return GravlensError(given, wanted, "the same call once it is completely written; nothing was kept of it.")


# --- resolving --------------------------------------------------------------------------------------------------
def resolve(checkpoint: Checkpoint | Resolved, known: Known | None = None, *, weights: bool = True) -> Resolved:
    """Find the folders that make up a checkpoint (returned unchanged if resolved): a whole model, then its adapters.

    Args:
        known: folders resolved before, by source; it is filled. Checkpoints that share a folder (an adapter's base, the
            anchor as template) share its `Folder`.
        weights: download the weights of a hub id too, not only its small files.
    """
    if isinstance(checkpoint, Resolved):
        return checkpoint
    known = {} if known is None else known
    other, given = checkpoint.template, checkpoint.tokenizer
    template = resolve(other, known, weights=False) if isinstance(other, Checkpoint) else None
    tokenizer = _folder(given, known, False) if isinstance(given, str | Path) else None
    if isinstance(checkpoint.source, nn.Module):
        return Resolved(checkpoint, (), template, tokenizer)
    found, chain = checkpoint, [_folder(checkpoint.source, known, weights)]
    while chain[0].is_adapter:
        found = _base_of(found, chain[0].path, known)
        chain.insert(0, _folder(_source(found), known, weights))
        if len(chain) > CHAIN:
            raise _no_base(chain[-1].path, "names adapters in a circle as its base", "a whole model at the end")
    return Resolved(checkpoint, tuple(chain), template, tokenizer)


def as_folder(source: Folder | Path | str, *, weights: bool = True) -> Folder:
    """Return the one folder of a path or hub id."""
    if isinstance(source, Folder):
        return source
    source = located(source)
    with reading(source, "The folder of a checkpoint must be readable.", "check its permissions."):
        return Folder(adapter_folder(local_folder(source, weights=weights)), source)


def _folder(source: Path | str, known: Known, weights: bool) -> Folder:
    source = located(source)
    key = source if isinstance(source, str) else str(source.resolve())
    if key in known:
        found = known[key].fetched() if weights else known[key]
    else:
        found = as_folder(source, weights=weights)
        found = known.setdefault(str(found.path.resolve()), found)  # two revisions of a hub may be one commit
    known[key] = found
    return found


def _base_of(checkpoint: Checkpoint, folder: Path, known: Known) -> Checkpoint:
    """Return what an adapter is added to: the checkpoint's base or, if that is an adapter too, possibly its base.

    `base_model_name_or_path` of the adapter decides between them.
    """
    named = _named_base(folder)
    if checkpoint.base is None:
        return Checkpoint(f"base of {checkpoint.name}", _place_of(named, folder))
    base = checkpoint.base
    if _contradicts(named, base) and (below := _folder(_source(base), known, False)).is_adapter:
        base = _base_of(base, below.path, known)  # the anchor's own adapter, trained further
    if _contradicts(named, base):
        wanted = f"it would be added to {checkpoint.base.name} ({checkpoint.base.described})"
        raise _no_base(folder, f"was trained over {named}, and {wanted}", f"one that was trained over {base.name}")
    return base


def _named_base(folder: Path) -> str:
    """Return `base_model_name_or_path` of an adapter, or ""."""
    try:
        named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except Exception as error:
        raise _no_base(folder, f"has a corrupt {ADAPTER_CONFIG} ({said(error)})", "PEFT's configuration") from error
    return named if isinstance(named, str) else ""


def _place_of(named: str, folder: Path) -> Path | str:
    """Return the folder, or the hub's model, that an adapter names as its base."""
    if named and Path(named).is_dir():
        return Path(named)
    meant = hub_id(named)
    # A path of the machine that trained it may have the form of a hub id, and anyone may own that id.
    if meant and (bare_ids() or snapshots_here(meant)):
        return meant
    found = f"names {named or 'no'} base, which is not here"
    if meant is None:
        raise _no_base(folder, found, "a base in its own configuration")
    given, wanted = f"The adapter {folder} {found}.", "Which model of the hub it is added to is yours to say."
    remedy = f'Checkpoint(…, base=Checkpoint("base", "{meant}")); in a history that anchor; or set {BARE}=1.'
    raise GravlensError(given, wanted, remedy)


def _contradicts(named: str, base: Checkpoint) -> bool:
    source = _source(base)
    # A path that does not exist here may be the base's on the machine that trained it: no contradiction.
    if named and Path(named).is_dir():
        return not (isinstance(source, Path) and source.is_dir() and Path(named).samefile(source))
    if isinstance(source, str) and hub_id(named):
        return not _same_model(repository_of(named), repository_of(source))
    return False


def _same_model(named: str, base: str) -> bool:
    """Whether two repositories are one, or the first is the second quantised (`unsloth/…-bnb-4bit`) by anyone."""
    quantised = re.fullmatch(r"[^/]+/(.+?)(-unsloth)?-bnb-[48]bit", named.lower())
    return named == base or (quantised is not None and quantised[1] == base.lower().partition("/")[2])


def _source(checkpoint: Checkpoint) -> Path | str:
    if isinstance(checkpoint.source, nn.Module):
        remedy = "PeftModel.from_pretrained(model, folder).merge_and_unload() in memory."
        wanted = "An adapter's folder is added to a base that is a folder too."
        raise GravlensError(f"{checkpoint.name} is {checkpoint.described}.", wanted, remedy)
    return checkpoint.source


def _no_base(folder: Path, found: str, wanted: str) -> GravlensError:
    return GravlensError(
        f"The adapter {folder} {found}.",
        f"An adapter is only defined over its own base: {wanted} is needed.",
        f"fix base_model_name_or_path in its {ADAPTER_CONFIG}, or merge it once (merge_and_unload()) and save that.",
    )
