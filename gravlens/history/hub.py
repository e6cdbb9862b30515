"""Hugging Face hub ids (`hf://owner/name[@revision]`): download, look up and evict snapshots in the cache."""

import os
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

from huggingface_hub import constants, scan_cache_dir, snapshot_download
from huggingface_hub.errors import CacheNotFound, RepositoryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from gravlens.core.errors import GravlensError, at_home, said, wrong_kind

PREFIX = "hf://"
BARE = "GRAVLENS_BARE_HUB_IDS"  # environment variable that admits ids without the prefix
_PART = r"[A-Za-z0-9_-][\w.-]*"
_HUB_ID = re.compile(rf"({PREFIX})?{_PART}/{_PART}(@{_PART}(/{_PART})*)?", re.ASCII)
# Weights as safetensors, configurations and tokenizers; never pickles or code, which could run on loading.
WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
WEIGHTS = "*.safetensors"
LOG_IN = "log in (hf auth login, or HF_TOKEN)"
# Copies of the same weights in subfolders (`original/`), Mistral's own format, half precision next to full.
UNWANTED = ("*/*", "consolidated*.safetensors", "*.fp16.safetensors")


def is_hub_id(source: object) -> TypeGuard[str]:
    """Whether it is a text that begins with `hf://`."""
    return isinstance(source, str) and source.startswith(PREFIX)


def hub_id(text: str) -> str | None:
    """Return `hf://owner/name[@revision]` for that text with or without its prefix; None for any other text."""
    return PREFIX + text.removeprefix(PREFIX) if _HUB_ID.fullmatch(text) else None


def repository_of(hub_id: str) -> str:
    """Return `owner/name` of a hub id."""
    return hub_id.removeprefix(PREFIX).partition("@")[0]


def revision_of(hub_id: str) -> str | None:
    """Return the branch, tag or commit of a hub id, or None for its main branch."""
    return hub_id.partition("@")[2] or None


def bare_ids() -> bool:
    """Whether the environment admits hub ids without `hf://`."""
    return os.environ.get(BARE, "") not in ("", "0")


def located(source: Path | str, here: Path = Path()) -> Path | str:
    """Return a hub id with its prefix, or the path as seen from `here`, with `~` for the home folder.

    A text without the prefix is a path: whoever owns `checkpoints/aligned` on the hub must not supply the anchor where
    that folder is missing. `GRAVLENS_BARE_HUB_IDS=1` admits `owner/name`, where neither it nor `owner/` is a path.

    Raises:
        GravlensError: the prefix before anything but `owner/name` or `owner/name@revision`.
    """
    text = re.sub("^hf:/+", PREFIX, str(source))  # pathlib makes one slash of two
    path = here / at_home(source)
    found = hub_id(text)
    if is_hub_id(text) and found is None:
        given, wanted = f"{text} is no hub id.", "After hf:// comes owner/name or owner/name@revision."
        raise GravlensError(given, wanted, "hf://owner/name; a folder is written without hf://.")
    bare = isinstance(source, str) and bare_ids() and not path.parent.exists()
    return found if found and (is_hub_id(text) or bare) else path


def existing(folder: Path | str, here: Path = Path()) -> Path | str:
    """Return an existing folder (relative to `here`), or a hub id."""
    if not isinstance(folder, Path | str):
        remedy = "ModelSequence.from_models(witness=…, anchor=…, runs=…) for models in memory."
        raise wrong_kind(folder, "A folder written by save_pretrained, or a hub id, is needed here.", remedy)
    found = located(folder, here)
    if isinstance(found, Path) and not found.exists():
        raise no_folder(folder, here)
    return found


def no_folder(source: Path | str, here: Path = Path()) -> GravlensError:
    """Return the error for a path at which there is nothing."""
    wanted = f"It was looked for as a path from {here.resolve()}; a model of the hub is written with hf://."
    remedy = f"check the path, or {hub_id(str(source)) or 'hf://owner/name'} (or set {BARE}=1)."
    return GravlensError(f"The checkpoint {source} does not exist.", wanted, remedy)


def local_folder(source: Path | str, *, weights: bool = True) -> Path:
    """Return a folder, or a hub id's snapshot, downloaded if necessary; without `weights` only its small files."""
    source = located(source)
    if isinstance(source, Path):
        if source.is_dir():
            return source
        wanted = "A checkpoint is a folder or a hub id."
        raise GravlensError(f"{source} is a file.", wanted, "its folder.") if source.exists() else no_folder(source)
    try:
        found = snapshot_download(
            repository_of(source),
            revision=revision_of(source),
            allow_patterns=list(WANTED),
            ignore_patterns=[*UNWANTED, *([] if weights else [WEIGHTS])],
        )
    except (OSError, ValueError) as error:
        if part := getattr(error, "snapshot_path", None):  # offline; `weight_paths` names what is missing
            return Path(part)
        given = f"{source} could not be opened ({said(error)})."
        wanted = "A folder written by save_pretrained or a reachable hub id is needed."
        remedy = "check the path, or the id and revision; download it once where there is a network."
        if isinstance(error, RepositoryNotFoundError):  # also a gated one: a hub does not tell them apart to everyone
            remedy = f"check the id; for a gated or private one accept its terms on its page, then {LOG_IN}."
        raise GravlensError(given, wanted, remedy) from error
    return Path(found)


def commit_of(folder: Path) -> str | None:
    """Return `owner--name@commit` of a snapshot folder in the cache, or None for another folder."""
    # Only there does a path name its content: a user's own `snapshots/` folder may be written at any time.
    if folder.parent.name != "snapshots" or re.fullmatch("[0-9a-f]{40}", folder.name) is None:
        return None
    home = folder.parents[1]
    return f"{home.name}@{folder.name}" if home.parent == Path(constants.HF_HUB_CACHE) else None


def snapshots_here(hub_id: str) -> set[Path]:
    """Return the snapshot folders of a repository in the cache that hold at least some weights."""
    home = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository_of(hub_id), repo_type="model")
    return {weights.parent for weights in (home / "snapshots").glob(f"*/{WEIGHTS}")}


def evict(snapshot: Path) -> None:
    """Delete one revision from the cache, as `hf cache` does: blobs that other revisions share are kept."""
    failure = ""
    try:
        found = scan_cache_dir(snapshot.parents[2])
        # A fork has commits of the same name, and only this repository's was downloaded here.
        own = frozenset(repo for repo in found.repos if repo.repo_path == snapshot.resolve().parents[1])
        replace(found, repos=own).delete_revisions(snapshot.name).execute()
    except (OSError, ValueError, CacheNotFound) as error:
        failure = f" ({error})"
    if snapshot.exists():  # only a warning: the states that were read are valid
        warnings.warn(f"{snapshot} stays on disk: it could not be deleted{failure}.", stacklevel=2)
